"""A call notes what on the cluster it refers to, and finds it where it runs."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from zmqsched import errors, payload
from zmqsched.payload import pack_call, pack_value


class Stand:
    """Stands for a task's result, as a future does."""

    def __init__(self, task: bytes) -> None:
        self.task = task

    def __reduce__(self):
        if (found := payload.noting()) is None:
            raise TypeError("only in a call")
        found.inputs[self.task] = self
        return payload.input_value, (self.task,)


def test_a_call_notes_what_it_refers_to_however_deep_and_finds_it_where_it_runs():
    stand, other = Stand(b"a"), Stand(b"b")
    packed = pack_call((stand, [1, {"deep": (stand, other)}]), {"by_name": Stand(b"a")})
    assert payload.references().inputs.keys() == {b"a", b"b"}
    values = {b"a": pack_value(["a list"]), b"b": pack_value(np.arange(100_000))}
    (first, (one, nested)), named = payload.unpack_call(packed, values)
    assert (first, one) == (["a list"], 1)
    assert first is nested["deep"][0] is named["by_name"]
    assert nested["deep"][1].sum() == 4999950000


def test_references_of_a_call_that_needs_cloudpickle_are_noted_too():
    packed = pack_call((lambda: 1, Stand(b"a")), {})
    assert list(payload.references().inputs) == [b"a"]
    assert payload.unpack_call(packed, {b"a": pack_value(7)})[0][1] == 7


def test_a_call_that_refers_to_nothing_has_no_references():
    pack_call((Stand(b"a"),), {})
    pack_call((1,), {})
    assert payload.references() is None


def test_only_calls_may_refer():
    with pytest.raises(errors.ResultNotSerializable, match="only in a call"):
        pack_value([Stand(b"a")])
    assert payload.noting() is None


def test_what_cannot_be_pickled_is_named_and_not_the_reference_beside_it():
    with pytest.raises(errors.NotSerializable, match=r"argument 2 \(_thread\.lock\)"):
        pack_call((Stand(b"a"), threading.Lock()), {})
    assert payload.noting() is None


def test_a_call_packed_while_another_is_has_its_own_references():
    class Submits:
        def __reduce__(self):
            pack_call((Stand(b"inner"),), {})
            assert list(payload.references().inputs) == [b"inner"]
            return int, ()

    pack_call((Stand(b"outer"), Submits()), {})
    assert list(payload.references().inputs) == [b"outer"]
