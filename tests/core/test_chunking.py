"""How many items go into a chunk: played against workers of many kinds, without any of them."""

from __future__ import annotations

import heapq
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zmqsched.core.chunking import BUDGET_S, CHUNK_BYTES, FLOOR_S, GROWTH, ITEMS, TARGET_S, Chunking

sizes = st.integers(0, 10**9)


def played(durations: list[float], slots: int, *, known: bool = True) -> tuple[float, list[int]]:
    """Seconds until workers have run all items, and how many there were in each chunk. A worker gives back what it has not
    begun when its time is up; a message takes 1 ms."""
    policy = Chunking(slots)
    todo, again = len(durations), []
    waiting: list[range] = []
    busy: list[tuple[float, int, range, int]] = []
    now, chunks = 0.0, []
    free = slots
    while todo or again or waiting or busy:
        while (todo or again) and len(waiting) + len(busy) < policy.depth:
            left = todo + sum(map(len, again))
            size = policy.size(left if known else None)
            if again:
                items = again.pop()
                if len(items) > size:
                    again.append(items[size:])
                    items = items[:size]
            else:
                first = len(durations) - todo
                items = range(first, first + min(size, todo))
                todo -= len(items)
            waiting.append(items)
        while waiting and free:
            free -= 1
            items, seconds, begun = waiting.pop(0), 0.0, 0
            while begun < len(items) and seconds < BUDGET_S:
                seconds += durations[items[begun]]
                begun += 1
            chunks.append(begun)
            heapq.heappush(busy, (now + 0.001 + seconds, items.start, items, begun))
        now, _, items, begun = heapq.heappop(busy)
        free += 1
        policy.learn(begun, sum(durations[at] for at in items[:begun]), 10 * begun)
        if items[begun:]:
            again.append(items[begun:])
    return now, chunks


def test_nothing_is_known_at_first():
    assert Chunking(4).size() == Chunking(4).size(10**6) == 1


def test_chunks_grow_until_one_takes_as_long_as_is_wanted():
    policy, grown = Chunking(2), [1]
    for _ in range(6):
        policy.learn(grown[-1], grown[-1] * 20e-6, 0)
        grown.append(policy.size())
    assert grown[1] == GROWTH
    assert 0.05 <= grown[-1] * 20e-6 <= 0.1
    assert grown == sorted(grown)


def test_slower_items_make_chunks_smaller():
    policy = Chunking(2)
    for _ in range(5):
        policy.learn(policy.size(), policy.size() * 0.001, 0)
    assert 50 <= policy.size() <= 100
    for _ in range(10):
        policy.learn(5, 0.1, 0)
    assert policy.size() <= 8


def test_items_longer_than_a_chunk_go_one_by_one():
    policy = Chunking(2)
    policy.learn(1, 3.0, 0)
    assert policy.size() == policy.size(1000) == 1


def test_large_items_make_small_chunks():
    policy = Chunking(2)
    policy.learn(1000, 0.001, 1000 * CHUNK_BYTES // 4)
    assert policy.size() == 4
    policy.learn(1, 0.001, 100 * CHUNK_BYTES)
    assert policy.size() == 1


@given(slots=st.integers(1, 5000), items=st.integers(1, 10**6), seconds=st.floats(0, 1e6), size=sizes, left=sizes)
def test_a_chunk_is_never_empty_and_never_too_many(slots: int, items: int, seconds: float, size: int, left: int):
    policy = Chunking(slots)
    policy.learn(items, seconds, size)
    for wanted in (policy.size(), policy.size(left)):
        assert 1 <= wanted <= max(1, GROWTH * items)
        assert wanted * policy.depth <= max(policy.depth, ITEMS)
        assert wanted == 1 or wanted * seconds / items <= TARGET_S * 1.001
    share = -(-left // policy.depth)
    assert policy.size(left) <= max(1, share, FLOOR_S * items / max(seconds, 1e-9))


@pytest.mark.parametrize("slots", [2, 8])
@pytest.mark.parametrize("known", [True, False])
def test_short_items_make_few_chunks(slots: int, known: bool):
    _, chunks = played([1e-6] * 100_000, slots, known=known)
    assert sum(chunks) == 100_000
    assert len(chunks) < 60 + 12 * slots


@pytest.mark.parametrize("slots", [2, 4, 16])
@pytest.mark.parametrize("seed", range(5))
def test_uneven_items_end_together(slots: int, seed: int):
    """Log-normal, 20 ms in the mean, in any order."""
    draw = random.Random(seed)
    durations = [draw.lognormvariate(-0.5, 1.0) * 0.02 for _ in range(200 * slots)]
    taken, _ = played(durations, slots)
    assert taken <= 1.2 * max(sum(durations) / slots, *durations)


@pytest.mark.parametrize("at", [0, 500, 900])
def test_slow_items_among_quick_ones_do_not_wait_behind_each_other(at: int):
    durations = [0.0001] * 1000
    durations[at : at + 40] = [1.0] * 40
    taken, _ = played(durations, 4)
    assert taken <= 1.25 * sum(durations) / 4


@given(
    durations=st.lists(st.sampled_from([0.0, 1e-6, 1e-3, 0.02, 0.5, 3.0]), max_size=300),
    slots=st.integers(1, 9),
    known=st.booleans(),
)
def test_whatever_the_durations_every_item_runs_once(durations: list[float], slots: int, known: bool):
    _, chunks = played(durations, slots, known=known)
    assert sum(chunks) == len(durations)
