"""Deadlines by key, without looking at the keys that are not due: a heap with lazy deletion."""

from __future__ import annotations

import heapq
import math
from collections.abc import Hashable, Iterator
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)


class Timers(Generic[Key]):
    """At most one deadline a key. ``soonest``: the first of all, ``math.inf`` if there is none."""

    def __init__(self) -> None:
        self.soonest = math.inf
        self._at: dict[Key, float] = {}
        self._heap: list[tuple[float, int, Key]] = []
        self._count = 0  # breaks ties, so that keys are never compared

    def __len__(self) -> int:
        return len(self._at)

    def __contains__(self, key: Key) -> bool:
        return key in self._at

    def set(self, key: Key, at: float | None) -> None:
        if at is None:
            self._at.pop(key, None)
        elif self._at.get(key) != at:
            self._at[key] = at
            self._count += 1
            heapq.heappush(self._heap, (at, self._count, key))
            if len(self._heap) > 64 + 4 * len(self._at):
                self._heap = [entry for entry in self._heap if self._at.get(entry[2]) == entry[0]]
                heapq.heapify(self._heap)
        self._settle()

    def no_later(self, key: Key, at: float) -> None:
        """Set the deadline unless an earlier one stands. For deadlines that move on all the time: when the earlier one
        comes, the caller looks and sets the true one, which is cheaper than to follow each move."""
        if at < self._at.get(key, math.inf):
            self.set(key, at)

    def due(self, now: float) -> Iterator[Key]:
        """Keys whose deadline has come; each is forgotten as it is given."""
        while self.soonest <= now:
            key = heapq.heappop(self._heap)[2]
            del self._at[key]
            self._settle()
            yield key

    def shift(self, gap: float) -> None:
        """Move every deadline: the clock ran while nobody was there to meet them."""
        self._heap = [(at + gap, count, key) for at, count, key in self._heap]
        self._at = {key: at + gap for key, at in self._at.items()}
        self._settle()

    def _settle(self) -> None:
        """The first entry of the heap is one that counts."""
        while self._heap and self._at.get(self._heap[0][2]) != self._heap[0][0]:
            heapq.heappop(self._heap)
        self.soonest = self._heap[0][0] if self._heap else math.inf
