"""What one life of the broker said, held against what it said before, and its verdicts against what really happened.

It looks at the events that go in, at the actions that come out, and into the core's records where no message tells.
"""

from __future__ import annotations

from collections.abc import Iterable

from ..core.events import Arrived, Publish, SchedulerAction, SchedulerEvent, Send, Tick
from ..core.nodes import ALIVE, DRAINING, PAUSED, SUSPECT
from ..core.reasons import Reasons
from ..core.scheduler import Scheduler
from ..core.tasks import SHORT_S, Task
from ..protocol import Dispatch, Envelope, Finals, Results, Submit
from .world import SimulationFailed, named

SLACK_S = 0.1  # of deadlines that are met at the next turn


class Watch:
    """``listened`` is for how long the broker has run so far: what it could not hear while it was paused is no silence."""

    def __init__(self, core: Scheduler, before: Watch | None = None) -> None:
        """``before``: of the broker before, whose journal this one has: what that one answered, this one does not run."""
        self.lost: set[str] = set()  # ids of nodes that were given up
        self.failed: set[bytes] = set()  # tasks whose clients were sent another end than a result
        self._core = core
        self._heard: dict[str, float] = {}  # by node, as ``listened`` was when it was last heard on the work channel
        self._attempts: dict[bytes, int] = {}
        # By task: the sessions that were told its end.
        self._answered: dict[bytes, set[int]] = before._answered if before else {}
        self._seen: dict[int, int] = {}  # by session: the highest number it was sent
        self._unborn: list[bytes] = []  # submitted just now, and not known before
        self._late: list[tuple[Task, tuple[object, ...]]] = []
        self._asks_why_at = 0.0

    def before(self, event: SchedulerEvent, listened: float) -> None:
        self._unborn = []
        self._late = []
        if not isinstance(event, Arrived):
            return
        envelope = event.envelope
        session = self._core._sessions.get(envelope.session)
        if session is None:
            return
        if session.node:
            self._heard[session.node] = listened
        if isinstance(envelope.body, Submit):
            self._unborn = [spec.task for spec in envelope.body.tasks if spec.task not in self._core.book.tasks]
        elif isinstance(envelope.body, Results):
            self._late = [(task, _fate(task)) for task in self._errors_too_late(envelope.body, session.node)]

    def after(self, event: SchedulerEvent, actions: Iterable[SchedulerAction], listened: float) -> None:
        for task_id in self._unborn:
            if task_id in self._core.book.tasks:  # a new record: its story begins anew
                self._attempts.pop(task_id, None)
                self._answered.pop(task_id, None)
        for task, fate in self._late:
            if _fate(task) != fate:
                raise SimulationFailed(f"an error of an attempt that was given up changed {fate} to {task}")
        if isinstance(event, Tick) and self._core.book.now >= self._asks_why_at:
            self._asks_why_at = self._core.book.now + 1.0
            self._each_that_waits_has_a_reason()
        for action in actions:
            if isinstance(action, Send):
                self._sent(action.envelope)
            elif isinstance(action, Publish):
                self._published(action.fact.kind, action.fact.about, isinstance(event, Tick), listened)

    def overdue(self, now: float) -> None:
        """To be called after turns of a broker that was never paused, with its own clock."""
        settings = self._core.settings
        longest = settings.suspect_after_s + settings.ping_grace_s + settings.beat_interval_s + SLACK_S
        for node in self._core._nodes.values():
            if now - node.heard_at > longest:
                raise SimulationFailed(f"{node.id} has been silent for {now - node.heard_at:.1f} s and is not given up")

    def _each_that_waits_has_a_reason(self) -> None:
        book = self._core.book
        waits = sum(not task.node or book.nodes[task.node].state is SUSPECT for task in book.tasks.values())
        told = sum(count for count, _ in Reasons(book, lost=()).of_all())
        if told != waits:
            raise SimulationFailed(f"{waits} tasks wait, and there are reasons for {told}")

    def _errors_too_late(self, results: Results, node: str) -> Iterable[Task]:
        fresh = set()
        late = {}
        for outcome in results.outcomes:
            task = self._core.book.tasks.get(outcome.task)
            if task is None:
                continue
            in_limbo = task.id in self._core.book.limbo
            if outcome.ok or in_limbo or (task.node == node and task.attempt == outcome.attempt):
                fresh.add(task.id)
            else:
                late[task.id] = task
        return [task for task_id, task in late.items() if task_id not in fresh]

    def _sent(self, envelope: Envelope) -> None:
        if not envelope.seq or envelope.seq <= self._seen.get(envelope.session, 0):
            return  # it bears repeating
        self._seen[envelope.session] = envelope.seq
        match envelope.body:
            case Dispatch() as dispatch:
                self._dispatched(dispatch, envelope.session)
            case Finals(finals):
                for final in finals:
                    told = self._answered.setdefault(final.task, set())
                    if envelope.session in told:
                        raise SimulationFailed(f"the broker answered task {named(final.task)} twice")
                    told.add(envelope.session)
                    if final.verdict != "ok":
                        self.failed.add(final.task)
            case _:
                pass

    def _dispatched(self, dispatch: Dispatch, token: int) -> None:
        session = self._core._sessions.get(token)
        assert session is not None
        node = self._core._nodes[session.node]
        nested = all(dispatch.shapes[order.shape].options.depth for order in dispatch.orders)
        if node.state is not ALIVE and not (nested and node.state in (PAUSED, DRAINING)):
            raise SimulationFailed(f"{node.id} is {node.state} and was given tasks")
        longest_s = max((dispatch.shapes[order.shape].options.timeout for order in dispatch.orders), default=0.0)
        lasts = node.lasts(longest_s if longest_s > SHORT_S else 0.0, self._core.book.now)
        if not lasts and not self._core.settings.journal:
            raise SimulationFailed(f"{node.id} leaves before a task that it was given may have ended")
        if node.assigned > node.credit and not self._core.settings.journal:  # with one, what was placed may wait for it
            raise SimulationFailed(f"{node.id} has {node.assigned} tasks and credit for {node.credit}")
        for order in dispatch.orders:
            if order.attempt <= self._attempts.get(order.task, 0):
                raise SimulationFailed(f"task {named(order.task)}: attempt {order.attempt} was there before")
            if order.task in self._answered:
                raise SimulationFailed(f"task {named(order.task)} was answered and runs again")
            if self._core.book.tasks[order.task].cancelled:
                raise SimulationFailed(f"task {named(order.task)} was cancelled and is started again")
            self._attempts[order.task] = order.attempt

    def _published(self, kind: str, node: str, by_clock: bool, listened: float) -> None:
        if kind == "joined":
            self._heard[node] = listened
        elif kind == "lost":
            self.lost.add(node)
            settings = self._core.settings
            silent_s = listened - self._heard[node]
            if by_clock and silent_s < settings.suspect_after_s + settings.ping_grace_s - 1e-6:
                raise SimulationFailed(f"{node} is called lost and was silent for {silent_s:.2f} s only")


def _fate(task: Task) -> tuple[object, ...]:
    return task.state, task.attempt, task.failures, task.node
