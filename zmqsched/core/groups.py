"""WaitGroup counters, as Go's sync.WaitGroup: add, done, wait.

Rules
-----
* A counter lives in the broker, so that tasks on any node count on it. One that is zero and has no waiter is forgotten;
  the next ``add`` makes it anew.
* ``wait`` is answered when the counter is zero. A counter that goes below zero is broken: every wait on it, present and
  next, is answered with that error (Go panics), and the counter starts again at zero.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import NamedTuple

NEGATIVE = "WaitGroup counter went below zero: more done() than add()"


class Waiter(NamedTuple):
    owner: Hashable
    request: int


class Answer(NamedTuple):
    waiter: Waiter
    error: str


class Groups:
    def __init__(self) -> None:
        self._counts: dict[bytes, int] = {}
        self._waiters: dict[bytes, list[Waiter]] = {}
        self._broken: set[bytes] = set()

    def __len__(self) -> int:
        return len(self._counts.keys() | self._waiters.keys() | self._broken)

    def add(self, group: bytes, delta: int) -> list[Answer]:
        count = self._counts.get(group, 0) + delta
        if count > 0:
            self._counts[group] = count
            return []
        self._counts.pop(group, None)
        waiters = self._waiters.pop(group, [])
        if count < 0 and not waiters:
            self._broken.add(group)
        return [Answer(waiter, NEGATIVE if count < 0 else "") for waiter in waiters]

    def wait(self, group: bytes, waiter: Waiter) -> list[Answer]:
        if group in self._broken:
            self._broken.discard(group)
            return [Answer(waiter, NEGATIVE)]
        if group not in self._counts:
            return [Answer(waiter, "")]
        self._waiters.setdefault(group, []).append(waiter)
        return []

    def counts(self) -> dict[bytes, int]:
        return dict(self._counts)

    def broken(self) -> list[bytes]:
        return sorted(self._broken)

    def forget(self, owner: Hashable, request: int | None = None) -> None:
        """The waiter gave up, or (without a request) its owner is gone."""
        for group, waiters in list(self._waiters.items()):
            left = [w for w in waiters if w.owner != owner or (request is not None and w.request != request)]
            if left:
                self._waiters[group] = left
            else:
                del self._waiters[group]

    def sanity_check(self) -> None:
        assert all(count > 0 for count in self._counts.values()), "a counter at or below zero is kept"
        assert self._waiters.keys() <= self._counts.keys(), "somebody waits for a counter that is zero"
