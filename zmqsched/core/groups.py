"""WaitGroup counters, as Go's sync.WaitGroup: add, done, wait. Whose additions count is in ``counting.py``.

Rules
-----
* A counter is what was added by hand and the unfinished tasks that ``go`` has started. One that is zero, has no waiter and
  no holder is forgotten; the next ``add`` makes it anew.
* ``wait`` is answered when the counter is zero. A counter that goes below zero is broken: every wait on it, present and
  next, is answered with that error (Go panics), and what was added by hand starts again at zero. While a task that holds the
  WaitGroup is unfinished the verdict waits: what tasks and clients say on different ways has no order.
* A *holder* is an unfinished task that has the WaitGroup. It *stands for* so many debts: those that it is to settle, itself
  or by tasks that it starts. When it ends and not well, they are *failed*. More debts than holders stand for, those apart
  that wait for this very counter, say that failed ones are nobody's any more: they are *lost*. They are counted down, and
  ``wait`` is answered with an error that names the tasks.
* That is done while somebody waits. Before, who adds may yet have to submit whom it adds for.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import NamedTuple

NEGATIVE = "WaitGroup counter went below zero: more done() than add()"
NAMED = 3  # failures that an error names; of more it gives the number


class Waiter(NamedTuple):
    """``task``: in which it waits, if in one."""

    owner: Hashable
    request: int
    task: bytes = b""


class Answer(NamedTuple):
    waiter: Waiter
    error: str
    group: bytes


class Groups:
    def __init__(self) -> None:
        self._by_hand: dict[bytes, int] = {}
        self._tasks: dict[bytes, int] = {}  # started by go() and unfinished
        self._holders: dict[bytes, dict[bytes, int]] = {}  # for how many debts each stands
        self._covered: dict[bytes, int] = {}  # for how many all of them do
        # Debts of holders that have ended, by which it was and why; and those of them that were counted down, until a wait
        # has heard it.
        self._failed: dict[bytes, dict[str, int]] = {}
        self._lost: dict[bytes, dict[str, int]] = {}
        self._waiters: dict[bytes, list[Waiter]] = {}
        self._broken: set[bytes] = set()

    def __len__(self) -> int:
        facts = (self._tasks, self._holders, self._failed, self._lost, self._waiters)
        return len(self._by_hand.keys() | self._broken | set().union(*facts))

    def __contains__(self, group: bytes) -> bool:
        """It is not forgotten."""
        facts = (self._by_hand, self._tasks, self._holders, self._failed, self._lost, self._waiters, self._broken)
        return any(group in fact for fact in facts)

    def add(self, group: bytes, delta: int) -> list[Answer]:
        by_hand = self._by_hand.get(group, 0) + delta
        if by_hand:
            self._by_hand[group] = by_hand
        else:
            self._by_hand.pop(group, None)
        return self._look(group)

    def begin(self, group: bytes) -> list[Answer]:
        """A task was started with go()."""
        self._tasks[group] = self._tasks.get(group, 0) + 1
        return self._look(group)

    def end(self, group: bytes) -> list[Answer]:
        """It is answered."""
        left = self._tasks[group] - 1
        if left:
            self._tasks[group] = left
        else:
            del self._tasks[group]
        return self._look(group)

    def hold(self, group: bytes, task: bytes, debts: int) -> None:
        """The task has it, and stands for so many debts."""
        holders = self._holders.setdefault(group, {})
        self._covered[group] = self._covered.get(group, 0) + debts - holders.get(task, 0)
        holders[task] = debts

    def release(self, group: bytes, task: bytes) -> list[Answer]:
        """The task holds it no longer."""
        holders = self._holders[group]
        self._covered[group] -= holders.pop(task)
        if not holders:
            del self._holders[group], self._covered[group]
        return self._look(group)

    def fail(self, group: bytes, text: str, debts: int) -> None:
        """A holder has ended that stood for these."""
        if self._total(group) or group in self._holders:
            _count(self._failed, group, text, debts)

    def withdraw(self, group: bytes, text: str, debts: int) -> None:
        """It does not count that it has ended so."""
        if text in self._failed.get(group, ()):
            _count(self._failed, group, text, -debts)

    @property
    def has_failures(self) -> bool:
        return bool(self._failed)

    def overdue(self) -> list[tuple[bytes, str, int]]:
        """Debts that somebody waits for and nobody is left for, with the failure that has left them."""
        found = []
        for group in self._failed.keys() & self._waiters.keys():
            holders = self._holders.get(group, {})
            waiting = sum(holders.get(task, 0) for task in {waiter.task for waiter in self._waiters[group]})
            left = self._by_hand.get(group, 0) - self._covered.get(group, 0) + waiting
            for text, debts in self._failed[group].items():
                if left > 0:
                    found.append((group, text, min(debts, left)))
                    left -= debts
        return found

    def lose(self, group: bytes, text: str, debts: int) -> list[Answer]:
        """Count down debts that this failure has left; a wait will be told."""
        self.withdraw(group, text, debts)
        self.note_lost(group, text, debts)
        return self.add(group, -debts)

    def note_lost(self, group: bytes, text: str, debts: int) -> None:
        """These are about to be counted down, or have been."""
        _count(self._lost, group, text, debts)

    def forget_lost(self, group: bytes, text: str, debts: int) -> None:
        """What has counted them down does not count, and no wait was told."""
        if text in self._lost.get(group, ()):
            _count(self._lost, group, text, -debts)

    def waiting_in(self, group: bytes) -> list[bytes]:
        """The tasks in which somebody waits."""
        return list({waiter.task: None for waiter in self._waiters.get(group, []) if waiter.task})

    def wait(self, group: bytes, waiter: Waiter) -> list[Answer]:
        if group in self._broken:
            self._broken.discard(group)
            return [Answer(waiter, NEGATIVE, group)]
        if self._total(group):
            self._waiters.setdefault(group, []).append(waiter)
            return []
        return [Answer(waiter, _told(self._lost.pop(group, {})), group)]

    def heard(self, group: bytes) -> None:
        """A wait was answered with what had gone wrong (played from a journal, which has no waits)."""
        self._broken.discard(group)
        self._lost.pop(group, None)

    def forget(self, owner: Hashable, request: int | None = None) -> None:
        """The waiter gave up, or (without a request) its owner is gone."""
        for group, waiters in list(self._waiters.items()):
            left = [w for w in waiters if w.owner != owner or (request is not None and w.request != request)]
            if left:
                self._waiters[group] = left
            else:
                del self._waiters[group]

    def by_hand(self) -> dict[bytes, int]:
        return dict(self._by_hand)

    def broken(self) -> list[bytes]:
        return sorted(self._broken)

    def failed(self) -> list[tuple[bytes, str, int]]:
        return [(group, text, debts) for group, failures in self._failed.items() for text, debts in failures.items()]

    def lost(self) -> list[tuple[bytes, str, int]]:
        return [(group, text, debts) for group, failures in self._lost.items() for text, debts in failures.items()]

    def _total(self, group: bytes) -> int:
        return self._by_hand.get(group, 0) + self._tasks.get(group, 0)

    def _look(self, group: bytes) -> list[Answer]:
        """The counter has changed, or who holds it."""
        total = self._total(group)
        if total > 0 or (total < 0 and group in self._holders):
            return []
        if group not in self._holders:
            self._failed.pop(group, None)  # who failed owed nothing
        waiters = self._waiters.pop(group, [])
        if total < 0:
            self._by_hand.pop(group, None)
            self._lost.pop(group, None)
            if not waiters:
                self._broken.add(group)
            return [Answer(waiter, NEGATIVE, group) for waiter in waiters]
        error = _told(self._lost.pop(group, {})) if waiters else ""
        return [Answer(waiter, error, group) for waiter in waiters]

    def sanity_check(self) -> None:
        assert all(self._by_hand.values()), "a counter that is zero is kept"
        assert all(number > 0 for number in self._tasks.values()), "tasks of nobody are counted"
        for group in self._by_hand.keys() | self._tasks.keys():
            assert self._total(group) >= 0 or group in self._holders, "a counter below zero is kept"
        assert all(self._total(group) for group in self._waiters), "somebody waits for a counter that is zero"
        covered = {group: sum(holders.values()) for group, holders in self._holders.items()}
        assert self._covered == covered, "the debts that holders stand for are off"
        for facts in (self._failed, self._lost):
            assert all(debts > 0 for failures in facts.values() for debts in failures.values()), "a failure has left nothing"
        assert all(self._total(group) or group in self._holders for group in self._failed), "a failure matters to nobody"

    def holders(self) -> dict[bytes, dict[bytes, int]]:
        return {group: dict(tasks) for group, tasks in self._holders.items()}


def _count(facts: dict[bytes, dict[str, int]], group: bytes, text: str, debts: int) -> None:
    failures = facts.setdefault(group, {})
    failures[text] = failures.get(text, 0) + debts
    if failures[text] <= 0:
        del failures[text]
        if not failures:
            del facts[group]


def _told(lost: dict[str, int]) -> str:
    if not lost:
        return ""
    tasks = "a task that held this WaitGroup has" if len(lost) == 1 else f"{len(lost)} tasks that held this WaitGroup have"
    more = f"; and {len(lost) - NAMED} more" if len(lost) > NAMED else ""
    return f"{tasks} ended without done(): {'; '.join(list(lost)[:NAMED])}{more}"
