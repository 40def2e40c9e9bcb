"""The error names the part that cannot be pickled."""

from __future__ import annotations

import concurrent.futures
import functools
import os
import pickle
import queue
import sqlite3
import sys
import threading
import time
import types

import pytest
from samples import Explosive, Holder, add, module_of, run_as_main

from zmqsched.errors import NotSerializable, ResultNotSerializable
from zmqsched.payload import FunctionPickler, Wrapper, pack_call, pack_value
from zmqsched.payload.blame import blame


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
    assert "argument 2 (_thread.lock): TypeError: cannot pickle" in complaint_about_call(1, lock)
    assert "keyword `x` (generator)" in complaint_about_call(1, x=(i for i in ()))
    nested = {"a": Holder(fine=1, sock=[1, lock])}
    assert "argument 1 -> ['a'] -> .sock -> [1] (_thread.lock)" in complaint_about_call(nested)
    assert complaint_about_call(Explosive()).endswith("make the object inside the task")


def test_the_guilty_capture_is_named():
    lock = threading.Lock()
    notebook = module_of("import threading\nlock = threading.Lock()\ndef fit():\n    return lock")

    def fit():
        return lock

    def outer():
        return fit()

    def defaulted(x=1, *, y=lock):
        return y

    assert "cannot pickle `fit` -> closure variable `lock` (_thread.lock)" in complaint_about(fit)
    assert "`outer` -> closure variable `fit` -> closure variable `lock` (_thread.lock)" in complaint_about(outer)
    assert "`defaulted` -> the default of `y` (_thread.lock)" in complaint_about(defaulted)
    assert "`fit` -> global `lock` (_thread.lock)" in complaint_about(notebook.fit)
    assert "`add` -> the partial's argument 1 (_thread.lock)" in complaint_about(functools.partial(add, lock))
    assert "its `self` -> .lock (_thread.lock)" in complaint_about(types.MethodType(lambda self: 1, Holder(lock=lock)))
    assert "`fit` -> closure variable `lock`" in complaint_about(Wrapper(fit))


def test_slots_are_looked_into():
    class Slotted:
        __slots__ = ("lock",)

    slotted = Slotted()
    slotted.lock = threading.Lock()
    assert "argument 1 -> .lock (_thread.lock)" in complaint_about_call(slotted)


def test_results_name_their_culprit():
    with pytest.raises(ResultNotSerializable, match=r"the result -> \['a'\] \(generator\).*; make a list"):
        pack_value({"a": (i for i in ())})


def test_whatever_reduce_raises_is_wrapped():
    assert "argument 1 (samples.Explosive): SystemExit: boom in __reduce__;" in complaint_about_call(Explosive())
    with pytest.raises(ResultNotSerializable, match="boom in __reduce__"):
        pack_value([Explosive()])
    bad = Explosive()
    assert "closure variable `bad` (samples.Explosive)" in complaint_about(lambda: bad)


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


def test_what_makes_ever_new_parts_of_itself():
    class Endless:
        def __reduce__(self):
            return Endless, (Endless(),)

    assert "argument 2 (test_blame." in (told := complaint_about_call(1, Endless()))
    assert "nested too deeply, or refers to itself" in told


def test_the_search_is_bounded(monkeypatch):
    class Endless:
        def __reduce__(self):
            return list, (), None, iter(int, 1)

    monkeypatch.setattr("zmqsched.payload.blame.BUDGET_S", 0.2)
    began = time.monotonic()
    error = pickle.PicklingError("as raised by the first attempt")
    assert blame([("argument 1", [1]), ("argument 2", Endless())], error).startswith("one of the arguments: ")
    assert time.monotonic() - began < 5


def test_the_last_of_very_many_is_found():
    many = [Holder(x=number) for number in range(5_000)]
    many.append(Holder(x=threading.Lock()))
    assert "argument 1 -> [5000] -> .x (_thread.lock)" in complaint_about_call(many)


def test_what_is_part_of_a_whole_is_reported_as_that():
    thread = threading.Thread(target=print)
    assert "argument 1 -> ['worker'] (threading.Thread): " in complaint_about_call({"worker": thread})
    todo = queue.Queue()
    assert "`<lambda>` -> closure variable `todo` (queue.Queue): " in complaint_about(lambda: todo)
    assert "hand over its items as a list" in complaint_about_call(queue.Queue())


def test_a_class_that_travels_by_value_is_looked_into():
    class Service:
        guard = threading.Lock()

    assert "argument 1 -> its class -> .guard (_thread.lock)" in complaint_about_call(Service())
    notebook = module_of("import io\nSTREAM = io.BufferedReader(io.BytesIO())\nclass Service:\n    def call(self):\n"
                         "        return STREAM")  # fmt: skip
    assert "-> its class -> .call -> global `STREAM` (_io.BufferedReader)" in complaint_about_call(notebook.Service())


def test_what_was_made_for_the_occasion_is_reported_as_what_made_it():
    class Makes:
        def __getstate__(self):
            return {"made": threading.Lock()}

    assert "argument 1 -> [0] (test_blame." in (told := complaint_about_call([Makes()]))
    assert "cannot pickle '_thread.lock' object" in told


def test_defaults_are_named():
    def fit(x, stream=sys.stdout):
        return stream

    assert "`fit` -> the default of `stream` (" in complaint_about(fit)


@pytest.mark.parametrize(
    ("value", "advice"),
    [
        (threading.RLock(), "a lock holds up nobody in another process"),
        (threading.Event(), "a lock holds up nobody in another process"),
        ((n for n in ()), "make a list of its items"),
        (sqlite3.connect(":memory:"), "hand over the path, and connect"),
        (open(os.devnull), "hand over the path, and open the file"),  # noqa: SIM115 - cloudpickle would send what is in it
        (concurrent.futures.Future(), "hand over its result"),
        (concurrent.futures.ThreadPoolExecutor(1), "executors stay in their process"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_the_advice_fits(value, advice):
    assert advice in complaint_about_call([value])
    with pytest.raises(ResultNotSerializable, match=advice):
        pack_value(value)
    if hasattr(value, "close"):
        value.close()
