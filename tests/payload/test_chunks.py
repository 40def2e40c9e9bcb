"""Several items as one task: what the worker makes of them, and what the client reads of it."""

from __future__ import annotations

import os
import threading

import numpy as np
import pytest

from zmqsched import errors
from zmqsched.payload import (
    Chunk,
    How,
    Outcome,
    enclosed,
    entries_of,
    generator,
    opened,
    origin_of,
    pack_call,
    pack_kinds,
    pack_value,
    unpack_exception,
    unpack_value,
    value_of,
    words_of,
)


def outcome(fn, items, *, spread=False, budget_s=10.0, seed=None, kinds=b"", first=0) -> Outcome:
    """Run as a worker does it, and sent to the client."""
    how = How(False, True, (first, len(items)), spread, budget_s, seed, kinds)
    there = Chunk(fn)(enclosed(pack_call(tuple(items), {})), *how)
    back = unpack_value(pack_value(there))
    assert isinstance(back, Outcome)
    return back


def values(came: Outcome) -> list[object]:
    return [value_of(entry) for entry in entries_of(came.entries)]


@pytest.mark.parametrize(
    "items",
    [
        [],
        [1, 2.5, True, None],
        ["short", "long" * 1000, b"bytes", ("a", "tuple"), (), (1,)],
        [[1], {"a": 2}, {3}, ...],
        [10**400, -1],
    ],
)
def test_values_arrive_as_they_were(items):
    came = outcome(lambda x: x, items)
    assert values(came) == items
    assert [type(value) for value in values(came)] == [type(item) for item in items]
    assert (came.begun, came.failures) == (len(items), [])


def test_arrays_arrive_writable_and_apart_from_the_stream():
    arrays = [np.arange(20_000) + number for number in range(3)]
    came = outcome(lambda x: x * 2, arrays)
    assert len(opened(came.entries)) == 4
    for array, value in zip(arrays, values(came), strict=True):
        assert (value == array * 2).all()
        value[0] = 7


def test_one_bad_item_disturbs_no_other():
    def fn(x):
        if x == 1:
            raise ValueError("one")
        if x == 2:
            raise SystemExit(3)
        return threading.Lock() if x == 3 else x

    came = outcome(fn, range(5))
    assert values(came) == [0, None, None, None, 4]
    assert [failure.offset for failure in came.failures] == [1, 2, 3]
    raised = [unpack_exception(failure.error) for failure in came.failures]
    assert [type(error) for error in raised] == [ValueError, SystemExit, errors.ResultNotSerializable]
    assert words_of(came.failures[0].error) == "ValueError: one"
    origin = origin_of(came.failures[0].error)
    assert (origin.kind, os.path.basename(origin.file)) == ("ValueError", "test_chunks.py")


def test_an_interrupt_ends_the_chunk_and_fails_its_item():
    def fn(x):
        if x == 2:
            raise KeyboardInterrupt
        return x

    came = outcome(fn, range(5))
    assert (came.begun, values(came), came.failures[0].offset) == (3, [0, 1, None], 2)


def test_a_chunk_ends_when_its_time_is_used_up_but_not_before_its_first_item():
    assert outcome(abs, range(100), budget_s=0.0).begun == 1
    assert outcome(abs, range(100), budget_s=1000.0).begun == 100


def test_a_chunk_ends_when_its_results_are_large():
    came = outcome(lambda _: bytes(3 * 1024 * 1024), range(100))
    assert came.begun == 3


def test_a_result_that_cannot_be_read_is_one_failure():
    came = outcome(lambda x: Unreadable() if x == 1 else x, range(3))
    entries = entries_of(came.entries)
    assert (entries[0], entries[2]) == (0, 2)
    with pytest.raises(errors.ResultDecodeError):
        value_of(entries[1])


class Unreadable:
    def __reduce__(self):
        return int, ("not a number",)


def test_items_of_several_iterables_are_spread():
    assert values(outcome(pow, [(2, 3), (3, 2)], spread=True)) == [8, 9]
    came = outcome(pow, [(2, 3), 5], spread=True)
    assert values(came) == [8, None]
    assert isinstance(unpack_exception(came.failures[0].error), TypeError)


def test_which_errors_are_retried():
    def fn(x):
        raise x

    kinds = pack_kinds((LookupError,))
    came = outcome(fn, [KeyError("a"), ValueError("b")], kinds=kinds)
    assert [failure.retry for failure in came.failures] == [True, False]
    assert [failure.retry for failure in outcome(fn, [KeyError("a")]).failures] == [True]


def test_one_alone_raises_what_it_raises():
    how = How(True, False, (7,), False, 1.0, None, b"")
    assert values(Chunk(abs)(-3, *how)) == [3]
    with pytest.raises(TypeError):
        Chunk(abs)("x", *how)


def test_random_numbers_belong_to_the_index():
    def fn(x, rng):
        return float(rng.random())

    seed = (123, (4,))
    whole = values(outcome(fn, range(6), seed=seed))
    parts = values(outcome(fn, range(2), seed=seed)) + values(outcome(fn, range(4), seed=seed, first=2))
    alone = [values(Chunk(fn)(0, *How(True, True, (n, 1), False, 1.0, seed, b"")))[0] for n in range(6)]
    numpys = [np.random.default_rng(np.random.SeedSequence(123, spawn_key=(4, n))).random() for n in range(6)]
    assert whole == parts == alone == numpys
    assert len(set(whole)) == 6
    assert generator(seed, 3).random() == numpys[3]


def test_a_child_that_an_item_forks_ends_where_its_item_does(tmp_path):
    def fn(x):
        with open(tmp_path / "log", "a") as log:
            log.write(f"{x} ")
        if x == 1 and (child := os.fork()):
            assert os.waitpid(child, 0)[1] == 0
        return x

    assert values(outcome(fn, range(4))) == [0, 1, 2, 3]
    assert (tmp_path / "log").read_text() == "0 1 2 3 "
