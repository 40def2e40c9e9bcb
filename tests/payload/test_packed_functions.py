"""Callables of every kind, packed once while nothing they capture has changed."""

from __future__ import annotations

import functools
import gc
import importlib
import math
import operator
import pickle
import sys
import threading
import weakref

import cloudpickle
import numpy as np
import pytest
from samples import Holder, add, module_of, there_and_back, unpack_function

from zmqsched.payload import FunctionPickler, Wrapper, pack_call, unpack_call
from zmqsched.payload.functions import _equal


def call_packed(blob, *args):
    return unpack_function(blob)(*args)


@pytest.mark.parametrize(
    ("fn", "args", "answer"),
    [
        (add, (1, 2), 3),
        (math.sqrt, (4,), 2),
        (len, ("abc",), 3),
        (int, ("12",), 12),
        (dict.fromkeys, ("a",), {"a": None}),
        ("a,b".split, (",",), ["a", "b"]),
        (functools.partial(add, 1), (2,), 3),
        (operator.attrgetter("real"), (3,), 3),
        (lambda x: x + 1, (1,), 2),
        (Holder(x=5).__dict__.get, ("x",), 5),
        (np.add, (1, 2), 3),
        (Wrapper(add), (1, 2), 3),
    ],
)
def test_every_kind_of_callable_can_be_packed(fn, args, answer):
    pickler = FunctionPickler()
    digest, blob = pickler.pack(fn)
    assert len(digest) == 16
    assert pickler.pack(fn) == (digest, blob)
    assert call_packed(blob, *args) == answer


def test_importable_functions_travel_as_references():
    assert FunctionPickler()._packed(add).plain[1] == pickle.dumps(add, 5)


def test_an_unchanged_function_is_pickled_once(monkeypatch):
    factor = 3
    double = lambda x: 2 * x  # noqa: E731
    fn = lambda x: double(x) * factor + math.floor(1.5)  # noqa: E731
    pickler = FunctionPickler()
    packed = pickler.pack(fn)
    monkeypatch.setattr("zmqsched.payload.functions._pickled", lambda fn: pytest.fail("pickled again"))
    assert pickler.pack(fn) is packed


@pytest.mark.parametrize("name", ["__code__", "__defaults__", "__kwdefaults__"])
def test_a_changed_function_is_pickled_anew(name):
    def fn(x=1, *, y=1):
        return x + y

    def other(x=20, *, y=20):
        return x * y + 7

    pickler = FunctionPickler()
    before = call_packed(pickler.pack(fn)[1])
    setattr(fn, name, getattr(other, name))
    assert fn() != before
    assert call_packed(pickler.pack(fn)[1]) == fn()


def test_a_changed_closure_is_seen():
    factor = 2
    pickler = FunctionPickler()

    def fn(x):
        return x * factor

    assert call_packed(pickler.pack(fn)[1], 1) == 2
    factor = 3
    assert call_packed(pickler.pack(fn)[1], 1) == 3


def test_a_keyword_default_changed_in_place_is_seen():
    def fn(*, y=1):
        return y

    pickler = FunctionPickler()
    assert call_packed(pickler.pack(fn)[1]) == 1
    fn.__kwdefaults__["y"] = 2
    assert call_packed(pickler.pack(fn)[1]) == 2


@pytest.mark.parametrize("mutable", [[1], {1: 1}, {1}, np.ones(1), Holder(x=1), ([1],)])
def test_what_captures_something_mutable_is_compared_each_time(mutable, monkeypatch):
    fn = lambda: mutable  # noqa: E731
    pickler = FunctionPickler()
    first = pickler.pack(fn)
    looked = []
    monkeypatch.setattr("zmqsched.payload.functions._equal", lambda *both: looked.append(both) or _equal(*both))
    assert pickler.pack(fn) is first
    assert len(looked) == 1


def test_a_list_changed_in_place_is_seen():
    items = [1]
    fn = lambda: items  # noqa: E731
    pickler = FunctionPickler()
    assert call_packed(pickler.pack(fn)[1]) == [1]
    items.append(2)
    assert call_packed(pickler.pack(fn)[1]) == [1, 2]


def test_globals_are_watched_through_functions_and_nested_code():
    notebook = module_of(
        """
        factor = 2
        def helper(x):
            return [x * factor for _ in range(1)][0]
        def fn(x):
            return (lambda: helper(x))()
        """
    )
    pickler = FunctionPickler()
    packed = pickler.pack(notebook.fn)
    assert pickler.pack(notebook.fn) is packed
    assert call_packed(packed[1], 1) == 2
    notebook.factor = 3
    assert call_packed(pickler.pack(notebook.fn)[1], 1) == 3
    notebook.helper = lambda x: -x
    assert call_packed(pickler.pack(notebook.fn)[1], 1) == -1
    notebook.factor = [1]
    notebook.factor.append(2)
    assert call_packed(pickler.pack(notebook.fn)[1], 1) == -1


def test_a_global_defined_later_is_seen():
    notebook = module_of("def fn():\n    return sorted([2, 1])")
    pickler = FunctionPickler()
    assert call_packed(pickler.pack(notebook.fn)[1]) == [1, 2]
    notebook.sorted = lambda items: "mine"
    assert call_packed(pickler.pack(notebook.fn)[1]) == "mine"


def test_recursive_functions_are_remembered_and_not_kept_alive():
    notebook = module_of(
        """
        def even(n):
            return n == 0 or odd(n - 1)
        def odd(n):
            return n != 0 and even(n - 1)
        """
    )
    pickler = FunctionPickler()
    packed = pickler.pack(notebook.even)
    assert pickler.pack(notebook.even) is packed
    assert call_packed(packed[1], 10) is True
    gone = weakref.ref(notebook.even)
    del notebook
    gc.collect()
    assert gone() is None
    assert not pickler._known


def test_the_memory_does_not_grow():
    pickler = FunctionPickler()
    for number in range(50):
        pickler.pack(lambda number=number: number)
    gc.collect()
    assert len(pickler._known) <= 1


def test_equal_functions_have_equal_digests():
    def make():
        return lambda x: x + 1

    assert FunctionPickler().pack(make())[0] == FunctionPickler().pack(make())[0]


def test_registering_a_module_by_value_is_heeded_at_once(tmp_path, monkeypatch):
    (tmp_path / "mine_alone.py").write_text("def fn():\n    return 5\n")
    monkeypatch.syspath_prepend(tmp_path)
    mine_alone = importlib.import_module("mine_alone")

    pickler = FunctionPickler()
    by_reference = pickler.pack(mine_alone.fn)[1]
    cloudpickle.register_pickle_by_value(mine_alone)
    try:
        by_value = pickler.pack(mine_alone.fn)[1]
        argument = pack_call((mine_alone.fn,), {})
    finally:
        cloudpickle.unregister_pickle_by_value(mine_alone)
    monkeypatch.undo()
    del sys.modules["mine_alone"]
    with pytest.raises(ModuleNotFoundError):
        unpack_function(by_reference)
    assert call_packed(by_value) == 5
    assert unpack_call(argument)[0][0]() == 5


def test_a_chunk_is_as_cheap_as_its_function(monkeypatch):
    factor = 2
    fn = lambda x: x * factor  # noqa: E731
    pickler = FunctionPickler()
    first = pickler.pack(Wrapper(fn))
    monkeypatch.setattr("zmqsched.payload.functions._pickled", lambda fn: pytest.fail("pickled again"))
    assert pickler.pack(Wrapper(fn)) == first
    assert call_packed(first[1], 2) == 4


def test_a_wrapper_is_a_value_too():
    assert there_and_back(Wrapper(lambda x: x))(1) == 1


def test_packing_from_many_threads_agrees():
    notebook = module_of("factor = 1\ndef fn():\n    return factor")
    pickler = FunctionPickler()
    digests = []
    threads = [
        threading.Thread(target=lambda: digests.extend(pickler.pack(notebook.fn)[0] for _ in range(50)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(digests) == 200
    assert len(set(digests)) == 1
