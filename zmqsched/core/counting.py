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
  death may end with the session, and the next attempt may be at the same node. Behind it nothing of the old one follows
  on that way; its children, who come on another, are known by the attempt's number.
* A task of an owner that is gone counts for nothing: should the owner come back, it is run again. But an owner that was in
  a task will not, and others may wait: then it is as if the task had ended there. What is said for a task that is answered
  counts for nothing either; but as it may be one that its client asks for again, it is kept for a while: the attempt's
  result may come after all.
* What a task has submitted belongs to its attempt, as far as both hold the WaitGroup: what such a *child* has counted when
  it is answered counts as the attempt does, and if the task is run again its unfinished children count for nothing any more.
  They are not ended for that, unless their worker is. A broker that starts from a journal does not know who is whose child.
* What a task's children have left that failed, and is counted down while the task waits for it, counts as its attempt does,
  and so does what a wait will be told of it.
  What those have left that outlive their attempt is owed only if that attempt counts again.
* A child that comes when its parent's attempt is over counts for nothing.
* A task stands for one debt of each WaitGroup that it was sent, and for what it has added to any, as far as it has not
  counted that down. If it ends otherwise than with a result, these debts have failed (``groups.py``). Of a task that was
  not submitted, or not accepted, its client says so.
* In a journal, ``GroupAdd.failed`` with a positive delta says that so many debts have failed, with a negative one that so
  many were counted down, and ``HEARD`` that a wait was told. From a client a delta of 0 says that one has failed.
* What has gone wrong is told to the waits of one moment, and that is recorded. So it is lost if the session, or the broker,
  ends between that and the arrival of the answer: the client asks again, and hears that the counter is zero.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Container, Iterable, Iterator, Mapping
from itertools import islice
from typing import TYPE_CHECKING

from ..protocol import (
    MAX_DELTA,
    MAX_HELD,
    MAX_ITEMS,
    Attempt,
    Death,
    Final,
    GroupAdd,
    GroupDone,
    GroupWait,
    Outcome,
    Stopped,
    nested_in,
    tag_of,
)  # fmt: skip
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
GONE = "whoever had submitted it is gone"

Ended = Attempt | Death | GroupAdd | Outcome | Stopped  # what may say that an attempt is over

_NOTHING: dict[bytes, int] = {}
_NO_FAILURES: Counter[tuple[bytes, str, bool]] = Counter()


class Debts:
    """What an unfinished task has to do with WaitGroups. ``sent``: those it was sent; ``holds``: those, and what else it has
    counted on. ``added``: what it has added to which, by the incarnation of the node that ran it; ``live``: the one whose
    additions count now, or b"". ``parent``: the unfinished task that has submitted it, or b""; ``children``: those it has
    submitted, each with the incarnation of the node that ran the attempt. ``failures``: debts of children that have failed,
    by that incarnation, and by group, text, and whether they were counted down. ``ended``: by that, too, the last attempt
    that is over there. ``attempts``: how many a task has had that is not here. ``void``: it counts for nothing any more."""

    __slots__ = ("added", "attempts", "children", "ended", "failures", "holds", "live", "parent", "sent", "void")

    def __init__(self, sent: tuple[bytes, ...]) -> None:
        self.sent = sent
        self.holds = dict.fromkeys(sent)
        self.added: dict[bytes, dict[bytes, int]] = {}
        self.live = b""
        self.parent = b""
        self.children: dict[bytes, bytes] = {}
        self.ended: dict[bytes, int] = {}
        self.attempts = 0
        self.failures: dict[bytes, Counter[tuple[bytes, str, bool]]] = {}
        self.void = False

    @property
    def counted(self) -> dict[bytes, int]:
        """What counts now."""
        return self.added.get(self.live, _NOTHING)

    def stands_for(self, group: bytes) -> int:
        return max(0, self.counted.get(group, 0) + (group in self.sent))


class Counting:
    def __init__(self, book: Book) -> None:
        self._book = book
        self.groups = Groups()
        self.counted: OrderedDict[bytes, int] = OrderedDict()  # the last addition, by incarnation
        # Of tasks that are not here.
        self._unclaimed: OrderedDict[bytes, Debts] = OrderedDict()

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
            self._said_by_client(incarnation, message)
        elif not message.deltas:
            self._book.record(incarnation, GroupAdd([], message.number))
            self.over(message, incarnation)
        elif (task := self._book.tasks.get(message.task)) is not None and task.debts is not None and task.debts.void:
            self._book.record(incarnation, GroupAdd([], message.number))
        elif task is not None:
            self._book.record(incarnation, message)
            self._add_for_now(task, incarnation, message)
        else:
            self._book.counts["additions of tasks that are over"] += 1
            self._book.record(incarnation, message)
            self._keep(incarnation, message)

    def _said_by_client(self, incarnation: bytes, message: GroupAdd) -> None:
        """``message.task``: the one in which the client is, and whose children have failed."""
        above = self._book.tasks.get(message.task) if message.failed else None
        message = GroupAdd(message.deltas, message.number, failed=message.failed)
        if above is None or above.debts is None:
            self._book.record(incarnation, message)
            self._add_for_good(message)
        elif where := self._where(above, incarnation):
            self._book.record(incarnation, message)
            self._add_for_good(message)
            self._note_failures(above.debts, where, message.failed, ((group, delta or 1) for group, delta in message.deltas))
        else:  # of an attempt that does not count
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
            elif message.failed == HEARD:
                self.groups.heard(group)
            elif delta < 0:
                self.answer(self.groups.lose(group, message.failed, -delta))
            else:
                self.groups.fail(group, message.failed, delta or 1)

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
                self.groups.hold(group, task.id, 0)
            added[group] = added.get(group, 0) + delta
            if debts.live == incarnation:
                self._apply(task, debts, {group: delta})

    def _keep(self, incarnation: bytes, message: GroupAdd) -> None:
        added = self._kept(message.task).added.setdefault(incarnation, {})
        for group, delta in message.deltas:
            if group in added or len(added) < MAX_HELD:
                added[group] = added.get(group, 0) + delta

    def _kept(self, task_id: bytes) -> Debts:
        debts = self._unclaimed.setdefault(task_id, Debts(()))
        self._unclaimed.move_to_end(task_id)
        if len(self._unclaimed) > MAX_COUNTED:
            self._unclaimed.popitem(last=False)
        return debts

    # --- the course of a task, if it has debts -----------------------------------------------------------------------

    def hold(self, task: Task) -> None:
        task.debts = self._adopted(task, Debts(task.kind.options.holds))
        for group in task.debts.sent:
            self.groups.hold(group, task.id, 1)
        if (kept := self._unclaimed.pop(task.id, None)) is not None:
            task.debts.failures, task.debts.ended = kept.failures, kept.ended
            task.attempt = kept.attempts  # an earlier one may be heard of yet
            for incarnation, added in kept.added.items():
                mine = {group: delta for group, delta in added.items() if group in task.debts.holds}
                task.debts.added[incarnation] = mine

    def runs_at(self, task: Task, incarnation: bytes) -> None:
        """This node's attempt is the one that counts."""
        debts = task.debts
        if debts is not None and incarnation and debts.live != incarnation:
            self._now_counts(task, debts, incarnation)

    def given_up(self, task: Task) -> None:
        """No attempt counts now; the one that did may be heard of again."""
        if task.debts is not None:
            self._now_counts(task, task.debts, b"")

    def _now_counts(self, task: Task, debts: Debts, incarnation: bytes, spared: Container[bytes] = ()) -> None:
        """What was counted in the attempt at this node, and by its open children. In one step: on the way the counter may be
        zero."""
        orphans = [(child, at) for child, at in debts.children.items() if at != incarnation and child not in spared]
        for child, where in orphans:  # it grows
            orphans += [(each, where) for each in self._debts(child).children]
        changes: Counter[bytes] = Counter()
        for counted in (debts.counted, *(self._debts(child).counted for child, _ in orphans)):
            changes.subtract(counted)
        self._withdraw_failures(debts)
        if debts.live:
            debts.added.setdefault(debts.live, {})  # its children are known by it, should one come late
        debts.live = incarnation
        for (group, text, lost), number in debts.failures.get(incarnation, _NO_FAILURES).items():
            (self.groups.note_lost if lost else self.groups.fail)(group, text, number)
        changes.update(debts.counted)
        self._apply(task, debts, changes)
        for child, where in orphans:
            self._orphaned(self._book.tasks[child], self._debts(child), debts, where)

    def _orphaned(self, task: Task, debts: Debts, parents: Debts, where: bytes) -> None:
        """The attempt that has submitted it counts no more. If that ends well after all, this one's debts have failed."""
        for incarnation, added in debts.added.items():
            self._taken_back(task.id, incarnation, added)
            self._kept(task.id).added[incarnation] = {}  # for the same reason
        self._withdraw_failures(debts)
        left = ((group, number) for group in debts.holds if (number := debts.stands_for(group)))
        self._note_failures(parents, where, self._failure(task, GONE), left)
        self._leave(task, debts)
        task.debts = _void()

    def over(self, ended: Ended, incarnation: bytes) -> None:
        """This attempt at this node has ended, and the task has not. It may be at the same node again by now."""
        task = self._book.tasks.get(ended.task)
        if task is None:
            kept = self._unclaimed.get(ended.task)
            if kept is not None:
                if incarnation in kept.added:
                    kept.added[incarnation] = {}
                    kept.failures.pop(incarnation, None)
                kept.ended[incarnation] = ended.attempt or kept.attempts
            return
        if task.debts is None:
            return
        last = ended.attempt
        if not 0 < last <= task.attempt:  # of an earlier session, or of before the task was forgotten
            last = task.attempt - (self._incarnation(task) == incarnation)
        if task.debts.live == incarnation or incarnation in task.debts.children.values():
            later = {child for child in task.debts.children if self._attempt_of_parent(child, task) > last}
            self._now_counts(task, task.debts, b"", later)
        self._taken_back(task.id, incarnation, task.debts.added.get(incarnation, _NOTHING))
        task.debts.added[incarnation] = {}
        task.debts.ended[incarnation] = last
        task.debts.failures.pop(incarnation, None)

    def _attempt_of_parent(self, child: bytes, task: Task) -> int:
        """The one that has submitted it itself; else 0."""
        parent = self._book.tasks[child].kind.options.parent
        return parent.attempt if parent is not None and parent.task == task.id else 0

    def _taken_back(self, task_id: bytes, incarnation: bytes, added: dict[bytes, int]) -> None:
        for back in _steps((group, -delta) for group, delta in added.items()):
            self._book.record(incarnation, GroupAdd(back, task=task_id))

    def finish(self, task: Task, debts: Debts, final: Final, *, wanted: bool) -> None:
        """The task is answered; ``wanted``: to somebody."""
        if not wanted:
            over = debts.live
            self._taken_back(task.id, over, debts.added.get(over, _NOTHING))
            self.release(task, debts)
            debts.added.pop(over, None)
            debts.failures.pop(over, None)
            self.keep(task, debts)
            return
        for_good = self._handed_on(task, debts)
        for kept in _steps(for_good.items()):
            self._book.record(b"", GroupAdd(kept))
        if final.verdict not in ("ok", "NotAccepted"):
            self._failed(task, debts, "it raised an exception" if final.verdict == "error" else final.text)
            if debts.live:
                debts.added[debts.live] = {}  # its children are known by it, should one come late
        else:
            debts.added.pop(debts.live, None)
        debts.failures.pop(debts.live, None)
        if debts.added or debts.void:
            self.keep(task, debts)
        self._leave(task, debts)

    def release(self, task: Task, debts: Debts) -> None:
        """It counts for nothing."""
        self._now_counts(task, debts, b"")
        self._leave(task, debts)

    def keep(self, task: Task, debts: Debts) -> None:
        """What its attempts have counted that count for nothing: its owner may come back and submit it again, and one of
        them have a result; and what comes from them late is known by it."""
        kept = self._kept(task.id)
        kept.attempts, kept.void = task.attempt, debts.void
        kept.added.update(debts.added)
        kept.failures.update(debts.failures)
        kept.ended.update(debts.ended)

    def _leave(self, task: Task, debts: Debts) -> None:
        if debts.parent in self._book.tasks:
            self._debts(debts.parent).children.pop(task.id, None)
        for group in debts.holds:
            self.answer(self.groups.release(group, task.id))

    def abandon(self, task: Task, debts: Debts) -> None:
        """Its owner was in a task that has ended, or died, and will not ask for it again."""
        self.finish(task, debts, Final(task.id, "cancelled", text=GONE), wanted=True)
        task.debts = _void()

    # --- parents and children ----------------------------------------------------------------------------------------

    def _adopted(self, task: Task, debts: Debts) -> Debts:
        """A child of the attempt that has submitted it, if that goes on. One that has ended well has no others: all are
        accepted before its result goes out. So these are of an attempt that does not count."""
        parent = task.kind.options.parent
        if parent is None or task.owner.job:
            return debts
        above = self._book.tasks.get(parent.task)
        if above is None:
            kept = self._unclaimed.get(parent.task)
            if kept is not None and kept.void:
                return _void()
            return debts if kept is None else self._outlived(task, debts, kept, parent.attempt, 0)
        if above.debts is None:
            return debts
        if above.debts.void:
            return _void()
        where = self._where(above, task.owner.incarnation)
        if not where:
            return self._outlived(task, debts, above.debts, parent.attempt, above.attempt)
        # A node that is given up, comes back and is sent the task again still runs it: the old attempt is the new one.
        if parent.attempt <= above.debts.ended.get(where, 0):
            return _void()
        debts.parent = above.id
        above.debts.children[task.id] = where
        return debts

    def _outlived(self, task: Task, debts: Debts, parents: Debts, attempt: int, latest: int) -> Debts:
        """A child of an attempt that counts no more, unless it has the result after all; or of none that is known."""
        client = task.owner.incarnation
        where = next((each for each in parents.added if nested_in(each, client) is not None), b"")
        if where and attempt > parents.ended.get(where, 0):
            self._note_failures(parents, where, self._failure(task, GONE), ((group, 1) for group in debts.sent))
        return _void() if where or attempt < latest else debts

    def _where(self, task: Task, client: bytes) -> bytes:
        """The incarnation of the node that runs the task, if this client is in a worker of it; else b""."""
        where = self._incarnation(task)
        return where if where and nested_in(where, client) is not None else b""

    def _handed_on(self, task: Task, debts: Debts) -> dict[bytes, int]:
        """What it has counted goes on as what its parent's attempt has, its children too. Returns what counts for good: what
        the parent has nothing to do with, or all."""
        above = self._book.tasks.get(debts.parent)
        for child in debts.children:
            self._debts(child).parent = debts.parent
        if above is None:
            return debts.counted
        parents = self._debts(above.id)
        where = parents.children[task.id]
        parents.children.update(dict.fromkeys(debts.children, where))
        parents.failures.setdefault(where, Counter()).update(debts.failures.get(debts.live, _NO_FAILURES))
        self.runs_at(above, where)
        mine = {group: delta for group, delta in debts.counted.items() if group in parents.holds}
        for step in _steps(mine.items()):
            self._book.record(where, GroupAdd(step, task=above.id))
        added = parents.added.setdefault(where, {})
        for group, delta in mine.items():
            added[group] = added.get(group, 0) + delta
            self.groups.hold(group, above.id, parents.stands_for(group))
        return {group: delta for group, delta in debts.counted.items() if group not in mine}

    def _debts(self, task_id: bytes) -> Debts:
        debts = self._book.tasks[task_id].debts
        assert debts is not None, "a parent or a child without debts"
        return debts

    # --- debts that have failed --------------------------------------------------------------------------------------

    def _failed(self, task: Task, debts: Debts, why: str) -> None:
        failed = self._failure(task, why)
        left = {group: number for group in debts.holds if (number := debts.stands_for(group))}
        for step in _steps(left.items()):
            message = GroupAdd(step, failed=failed)
            self._book.record(b"", message)
            self._add_for_good(message)
        if debts.parent in self._book.tasks:
            parents = self._debts(debts.parent)
            self._note_failures(parents, parents.children[task.id], failed, left.items())

    def _note_failures(self, debts: Debts, where: bytes, failed: str, numbers: Iterable[tuple[bytes, int]]) -> None:
        """They are of children of the attempt there."""
        debts.failures.setdefault(where, Counter()).update({(group, failed, False): number for group, number in numbers})

    def _withdraw_failures(self, debts: Debts) -> None:
        """Those of the children of its attempt."""
        for (group, text, lost), number in debts.failures.get(debts.live, _NO_FAILURES).items():
            (self.groups.forget_lost if lost else self.groups.withdraw)(group, text, number)

    def _failure(self, task: Task, why: str) -> str:
        """As it is told."""
        options, label = task.kind.options, task.kind.shape.label
        first_line = why.partition("\n")[0].removeprefix(f"{options.name or label} failed: ")
        return f"{tag_of(task.id, task.kind.shape)}: {first_line[:MAX_REASON]}"

    def settle(self) -> None:
        """Count down the debts that failed tasks have left."""
        for group, text, overdue in self.groups.overdue():
            debts = self._charge_parents(group, text, overdue)
            for step in _steps([(group, -debts)]):
                self._book.record(b"", GroupAdd(step, failed=text))
            if debts:
                self.answer(self.groups.lose(group, text, debts))

    def _charge_parents(self, group: bytes, text: str, overdue: int) -> int:
        """If they are those of a child, and its parent waits for them, the parent's attempt counts them down. Returns how
        many are nobody's."""
        for task_id in self.groups.waiting_in(group):
            task = self._book.tasks.get(task_id)
            if task is None or task.debts is None:
                continue
            failures = task.debts.failures.get(task.debts.live, _NO_FAILURES)
            charged = min(overdue, failures[group, text, False])
            for step in _steps([(group, -charged)]):
                failures[group, text, False] += step[0][1]
                message = GroupAdd(step, task=task_id, failed=text)
                self._book.record(task.debts.live, message)
                self.charge(task_id, task.debts.live, message)
            overdue -= charged
        return overdue

    def charge(self, task_id: bytes, incarnation: bytes, message: GroupAdd) -> None:
        """Debts of a task's children that have failed are counted down as the attempt does."""
        for group, delta in message.deltas:
            self.groups.withdraw(group, message.failed, -delta)
            self.groups.note_lost(group, message.failed, -delta)
        if (task := self._book.tasks.get(task_id)) is not None:
            self._add_for_now(task, incarnation, message)
            if task.debts is not None:
                failures = task.debts.failures.setdefault(incarnation, Counter())
                failures.update({(group, message.failed, True): -delta for group, delta in message.deltas})

    def _apply(self, task: Task, debts: Debts, changes: Mapping[bytes, int]) -> None:
        for group in changes.keys() & debts.holds.keys():
            self.groups.hold(group, task.id, debts.stands_for(group))
        for group, delta in changes.items():
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
        for group, _, debts in lost:
            counters[group] = counters.get(group, 0) + debts
        said += [(b"", GroupAdd(step)) for step in _steps(counters.items())]
        said += [(b"", GroupAdd(step, failed=text)) for group, text, debts in lost for step in _steps([(group, -debts)])]
        for task in tasks:
            for incarnation, added in task.debts.added.items() if task.debts is not None else ():
                said += [(incarnation, GroupAdd(step, task=task.id)) for step in _steps(added.items())]
        failed = self.groups.failed()
        said += [(b"", GroupAdd(step, failed=text)) for group, text, debts in failed for step in _steps([(group, debts)])]
        said += [(incarnation, GroupAdd([], number)) for incarnation, number in self.counted.items()]
        return said

    def sanity_check(self) -> None:
        self.groups.sanity_check()
        holders: dict[bytes, dict[bytes, int]] = {}
        for task in self._book.tasks.values():
            if task.debts is None:
                assert not task.kind.options.holds, f"{task} holds a WaitGroup unbeknown"
                continue
            incarnation = self._incarnation(task)
            assert task.debts.live in (b"", incarnation), f"{task}: what another node's attempt has counted counts"
            for child, where in task.debts.children.items():
                assert self._debts(child).parent == task.id, "a child of another"
                assert where == incarnation, f"{task}: what another node's attempt has submitted counts"
            for group in task.debts.holds:
                holders.setdefault(group, {})[task.id] = task.debts.stands_for(group)
        assert holders == self.groups.holders(), "who holds a WaitGroup, or for how many debts it stands, is off"


def _void() -> Debts:
    debts = Debts(())
    debts.void = True
    return debts


def _steps(deltas: Iterable[tuple[bytes, int]]) -> Iterator[list[tuple[bytes, int]]]:
    """As many as a message may hold, and no more in each than it may say: what has become large was added in many steps."""
    small = (
        (group, max(-MAX_DELTA, min(MAX_DELTA, delta - sign * done)))
        for group, delta in deltas
        for sign in [1 if delta > 0 else -1]
        for done in range(0, abs(delta), MAX_DELTA)
    )
    while step := list(islice(small, MAX_ITEMS)):
        yield step
