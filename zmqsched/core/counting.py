"""Who counts on WaitGroups, and what becomes of it when an attempt dies.

Rules
-----
* A process numbers its additions, and each is taken once. What a client says counts for good.
* What a task says counts as its attempt does. While the attempt is the task's current one its additions count, for the
  moment. If it ends well, or is the last, they count for good; if the task is run again they are taken back, and the next
  attempt makes them anew. So a task that runs twice never counts twice.
* The attempt is known by its node's incarnation: a node has at most one of a task. What was counted at a node that was given
  up is kept until that attempt is heard of to be over: it may be adopted, or its result come after all, and then it counts.
* A node numbers the end of an attempt that has counted, if it has no result, as an addition of nothing: the report of a
  death may end with the session, and the next attempt may be at the same node. Behind it nothing of the old one follows.
* A task of an owner that is gone counts for nothing: should the owner come back, it is run again. What is said for a task
  that is answered counts for nothing either.
* A task that holds a WaitGroup, ends otherwise than with a result and has not counted down has *failed* it (``groups.py``).
  Of a task that was not submitted, or not accepted, its client says so.
* What has gone wrong is told to the waits of one moment, and that is recorded. So it is lost if the session, or the broker,
  ends between that and the arrival of the answer: the client asks again, and hears that the counter is zero.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

from ..protocol import MAX_ITEMS, Final, GroupAdd, GroupDone, GroupWait
from .groups import Answer, Groups, Waiter
from .ledger import Counted

if TYPE_CHECKING:
    from .book import Book
    from .sessions import Session
    from .tasks import Task

MAX_COUNTED = 10_000  # processes whose last addition to a WaitGroup is remembered
MAX_HOLDS = 1_000  # WaitGroups that a task counts on
MAX_REASON = 200  # characters of why a task has failed
HEARD = "heard"

_NOTHING: dict[bytes, int] = {}


class Debts:
    """What an unfinished task has to do with WaitGroups. ``sent``: those it was sent; ``holds``: those, and what else it has
    counted on. ``added``: what it has added to which, by the incarnation of the node that ran it; ``live``: the one whose
    additions count now, or b""."""

    __slots__ = ("added", "holds", "live", "sent")

    def __init__(self, sent: tuple[bytes, ...]) -> None:
        self.sent = sent
        self.holds = dict.fromkeys(sent)
        self.added: dict[bytes, dict[bytes, int]] = {}
        self.live = b""

    @property
    def counted(self) -> dict[bytes, int]:
        """What counts now."""
        return self.added.get(self.live, _NOTHING)

    @property
    def owed(self) -> list[bytes]:
        """Those it was sent and has not counted down."""
        return [group for group in self.sent if self.counted.get(group, 0) >= 0]


class Counting:
    def __init__(self, book: Book) -> None:
        self._book = book
        self.groups = Groups()
        self.counted: OrderedDict[bytes, int] = OrderedDict()  # the last addition, by incarnation

    # --- what is said ------------------------------------------------------------------------------------------------

    def add(self, incarnation: bytes, message: GroupAdd, *, from_node: bool) -> None:
        if message.number and message.number <= self.counted.get(incarnation, 0):
            self._book.counts["additions offered again"] += 1
            return
        if message.number:
            self.counted[incarnation] = message.number
            self.counted.move_to_end(incarnation)
            if len(self.counted) > MAX_COUNTED:
                self.counted.popitem(last=False)
        if not from_node or not message.task:
            message = GroupAdd(message.deltas, message.number, failed=message.failed)
            self._book.record(incarnation, message)
            self._add_for_good(message)
        elif not message.deltas:
            self._book.record(incarnation, GroupAdd([], message.number))
            self.over(message.task, incarnation)
        elif (task := self._book.tasks.get(message.task)) is not None:
            self._book.record(incarnation, message)
            self._add_for_now(task, incarnation, message)
        else:
            self._book.counts["additions of tasks that are over"] += 1
            self._book.record(incarnation, GroupAdd([], message.number))

    def wait(self, session: Session, message: GroupWait) -> None:
        self.answer(self.groups.wait(message.group, Waiter(session.token, message.request, message.task)))

    def answer(self, answers: list[Answer]) -> None:
        for group in {answer.group: None for answer in answers if answer.error}:
            self._book.record(b"", GroupAdd([(group, 1)], failed=HEARD))
        for waiter, error, _ in answers:
            if self._book.ledger is not None:
                self._book.ledger.then(Counted(waiter, error))
            else:
                self.end_wait(waiter, error)

    def end_wait(self, waiter: Waiter, error: str) -> None:
        book = self._book
        session = book.sessions.get(waiter.owner) if isinstance(waiter.owner, int) else None
        if session is not None:
            # The finals that brought the counter to zero must not arrive behind the news that it is zero.
            book.post(session)
            book.sessions.send(session, GroupDone(waiter.request, error))

    def _add_for_good(self, message: GroupAdd) -> None:
        for group, delta in message.deltas:
            if not message.failed:
                self.answer(self.groups.add(group, delta))
            elif delta > 0:
                self.groups.heard(group)
            elif delta:
                self.answer(self.groups.lose(group, message.failed))
            else:
                self.groups.fail(group, message.failed)

    def _add_for_now(self, task: Task, incarnation: bytes, message: GroupAdd) -> None:
        debts = task.debts
        if debts is None:
            debts = task.debts = Debts(())
        self.runs_at(task, self._incarnation(task))
        added = debts.added.setdefault(incarnation, {})
        for group, delta in message.deltas:
            if group not in debts.holds:
                if len(debts.holds) >= MAX_HOLDS:
                    self._book.counts["additions to too many WaitGroups"] += 1
                    continue
                debts.holds[group] = None
                self.groups.hold(group, task.id)
            added[group] = added.get(group, 0) + delta
            if debts.live == incarnation:
                self._apply(task, group, delta)

    # --- the course of a task, if it has debts -----------------------------------------------------------------------

    def hold(self, task: Task) -> None:
        task.debts = Debts(task.kind.options.holds)
        for group in task.debts.sent:
            self.groups.hold(group, task.id)
            self.groups.owes(group, task.id, still=True)

    def runs_at(self, task: Task, incarnation: bytes) -> None:
        """This node's attempt is the one that counts."""
        debts = task.debts
        if debts is not None and incarnation and debts.live != incarnation:
            self.given_up(task)
            debts.live = incarnation
            for group, delta in debts.counted.items():
                self._apply(task, group, delta)

    def given_up(self, task: Task) -> None:
        """No attempt counts now; the one that did may be heard of again."""
        debts = task.debts
        if debts is not None:
            counted, debts.live = debts.counted, b""
            for group, delta in counted.items():
                self._apply(task, group, -delta)

    def over(self, task_id: bytes, incarnation: bytes) -> None:
        """The attempt of the task at this node has ended, and the task has not."""
        task = self._book.tasks.get(task_id)
        if task is None or task.debts is None:
            return
        if task.debts.live == incarnation:
            self.given_up(task)
        added = task.debts.added.pop(incarnation, _NOTHING)
        if back := [(group, -delta) for group, delta in added.items() if delta]:
            self._book.record(incarnation, GroupAdd(back, task=task_id))

    def finish(self, task: Task, debts: Debts, final: Final, *, wanted: bool) -> None:
        """The task is answered; ``wanted``: to somebody."""
        if not wanted:
            self.release(task, debts)
            return
        if kept := [(group, delta) for group, delta in debts.counted.items() if delta]:
            self._book.record(b"", GroupAdd(kept))
        if final.verdict not in ("ok", "NotAccepted") and debts.owed:
            self._fail(task, debts.owed, "it raised an exception" if final.verdict == "error" else final.text)
        for group in debts.holds:
            self.answer(self.groups.release(group, task.id))

    def release(self, task: Task, debts: Debts) -> None:
        """It counts for nothing."""
        for group, delta in debts.counted.items():
            self.answer(self.groups.add(group, -delta))
        for group in debts.holds:
            self.answer(self.groups.release(group, task.id))

    def _fail(self, task: Task, groups: list[bytes], why: str) -> None:
        name = task.kind.options.name or task.kind.shape.label or "a task"
        first_line = why.partition("\n")[0][:MAX_REASON]
        failed = first_line if first_line.startswith(f"{name} ") else f"{name}: {first_line}"
        message = GroupAdd([(group, 0) for group in groups], failed=failed)
        self._book.record(b"", message)
        self._add_for_good(message)

    def settle(self) -> None:
        """Count down the debts that failed tasks have left."""
        for group, text in self.groups.overdue():
            self._book.record(b"", GroupAdd([(group, -1)], failed=text))
            self.answer(self.groups.lose(group, text))

    def _apply(self, task: Task, group: bytes, delta: int) -> None:
        debts = task.debts
        assert debts is not None
        if group in debts.sent:
            self.groups.owes(group, task.id, still=debts.counted.get(group, 0) >= 0)
        self.answer(self.groups.add(group, delta))

    def _incarnation(self, task: Task) -> bytes:
        return self._book.nodes[task.node].incarnation if task.node else b""

    # --- for the journal ---------------------------------------------------------------------------------------------

    def snapshot(self, tasks: list[Task]) -> list[tuple[bytes, GroupAdd]]:
        """What makes the present state, of these unfinished tasks, by whose it is."""
        counters = self.groups.by_hand()
        said: list[tuple[bytes, GroupAdd]] = []
        for task in self._book.tasks.values():
            for group, delta in task.debts.counted.items() if task.debts is not None else ():
                counters[group] = counters.get(group, 0) - delta
        lost = self.groups.lost()
        for group, failures in lost.items():
            counters[group] = counters.get(group, 0) + len(failures)
        deltas = [(group, count) for group, count in counters.items() if count]
        said += [(b"", GroupAdd(deltas[at : at + MAX_ITEMS])) for at in range(0, len(deltas), MAX_ITEMS)]
        said += [(b"", GroupAdd([(group, -1)], failed=text)) for group, failures in lost.items() for text in failures]
        for task in tasks:
            for incarnation, added in task.debts.added.items() if task.debts is not None else ():
                deltas = [(group, delta) for group, delta in added.items() if delta]
                said.append((incarnation, GroupAdd(deltas, task=task.id)))
        failed = self.groups.failed().items()
        said += [(b"", GroupAdd([(group, 0)], failed=text)) for group, failures in failed for text in failures]
        said += [(incarnation, GroupAdd([], number)) for incarnation, number in self.counted.items()]
        return said

    def sanity_check(self) -> None:
        self.groups.sanity_check()
        holders: dict[bytes, set[bytes]] = {}
        owing: dict[bytes, set[bytes]] = {}
        for task in self._book.tasks.values():
            if task.debts is None:
                assert not task.kind.options.holds, f"{task} holds a WaitGroup unbeknown"
                continue
            incarnation = self._incarnation(task)
            assert task.debts.live in (b"", incarnation), f"{task}: what another node's attempt has counted counts"
            for group in task.debts.holds:
                holders.setdefault(group, set()).add(task.id)
            for group in task.debts.owed:
                owing.setdefault(group, set()).add(task.id)
        assert holders == self.groups.holders(), "who holds a WaitGroup is off"
        assert owing == self.groups.owing(), "who owes a WaitGroup is off"
