"""The error names the part that cannot be pickled."""

from __future__ import annotations

import functools
import threading
import types

import pytest
from samples import Explosive, Holder, add, module_of, run_as_main

from zmqsched.errors import NotSerializable, ResultNotSerializable
from zmqsched.payload import Chunk, FunctionPickler, pack_call, pack_value


def complaint_about_call(*args, **kwargs) -> str:
    with pytest.raises(NotSerializable) as caught:
        pack_call(args, kwargs)
    return str(caught.value)


def complaint_about(fn) -> str:
    with pytest.raises(NotSerializable) as caught:
        FunctionPickler().pack(fn)
    return str(caught.value)


def test_the_guilty_argument_is_named_by_its_path():
    lock = threading.Lock()
    assert "argument 2 is a _thread.lock (TypeError: cannot pickle" in complaint_about_call(1, lock)
    assert "keyword `x` is a generator" in complaint_about_call(1, x=(i for i in ()))
    nested = {"a": Holder(fine=1, sock=[1, lock])}
    assert "argument 1 -> ['a'] -> attribute `sock` -> [1] is a _thread.lock" in complaint_about_call(nested)
    assert complaint_about_call(lock).endswith("make the object inside the task")


def test_the_guilty_capture_is_named():
    lock = threading.Lock()
    notebook = module_of("import threading\nlock = threading.Lock()\ndef fit():\n    return lock")

    def fit():
        return lock

    def outer():
        return fit()

    def defaulted(x=1, *, y=lock):
        return y

    assert "cannot pickle `fit`: closure variable `lock` is a _thread.lock" in complaint_about(fit)
    assert "`outer`: closure variable `fit` -> closure variable `lock` is a" in complaint_about(outer)
    assert "`defaulted`: the default of `y` is a" in complaint_about(defaulted)
    assert "`fit`: global `lock` is a" in complaint_about(notebook.fit)
    assert "the partial's argument 1 is a" in complaint_about(functools.partial(add, lock))
    assert "its `self` -> attribute `lock` is a" in complaint_about(types.MethodType(lambda self: 1, Holder(lock=lock)))
    assert "`fit`: closure variable `lock`" in complaint_about(Chunk(fit))


def test_slots_are_looked_into():
    class Slotted:
        __slots__ = ("lock",)

    slotted = Slotted()
    slotted.lock = threading.Lock()
    assert "argument 1 -> attribute `lock` is a _thread.lock" in complaint_about_call(slotted)


def test_results_name_their_culprit():
    with pytest.raises(ResultNotSerializable, match=r"the result -> \['a'\] is a generator.*return plain data"):
        pack_value({"a": (i for i in ())})


def test_whatever_reduce_raises_is_wrapped():
    assert "argument 1 is a samples.Explosive (SystemExit: boom in __reduce__)" in complaint_about_call(
        Explosive()
    )
    with pytest.raises(ResultNotSerializable, match="boom in __reduce__"):
        pack_value([Explosive()])
    bad = Explosive()
    assert "closure variable `bad` is a" in complaint_about(lambda: bad)


def test_an_interrupt_while_pickling_is_the_users():
    class Interrupted:
        def __reduce__(self):
            raise KeyboardInterrupt

    for pack in (pack_value, lambda value: pack_call((value,), {}), lambda value: FunctionPickler().pack(value)):
        with pytest.raises(KeyboardInterrupt):
            pack(Interrupted())


def deep_list():
    nested: list = []
    for _ in range(100_000):
        nested = [nested]
    return nested


def test_nesting_too_deep_is_an_error_not_a_crash():
    printed = run_as_main(
        """
        import sys
        sys.path.insert(0, "tests/payload")
        from test_blame import *
        print("nested too deeply" in complaint_about_call(1, deep_list()))
        try:
            pack_value(deep_list())
        except ResultNotSerializable as error:
            print("nested too deeply" in str(error))
        inner = deep_list()
        print("nested too deeply" in complaint_about(lambda: inner))
        """
    )
    assert printed.split() == ["True"] * 3


def test_a_hostile_object_cannot_break_the_search():
    class Hostile:
        def __getattribute__(self, name):
            raise RuntimeError("leave me alone")

        def __repr__(self):
            raise RuntimeError("no name either")

    assert "argument 1" in complaint_about_call({Hostile: 1, "x": [Hostile(), threading.Lock()]})


def test_the_search_is_bounded():
    many = [Holder(x=number) for number in range(5_000)]
    many.append(threading.Lock())
    assert "argument 1" in complaint_about_call(many)
