"""The node's brain: which worker gets which task, what to report, how much to ask for.

Contract
--------
As the scheduler's: ``handle(event, now)`` takes in, ``Tick`` acts, ``next_deadline()`` says when; no clock, no I/O.

How tasks get to the node
-------------------------
* ``credit`` says how many unfinished tasks the node takes: its slots, and so many more as it can do in ``LOOKAHEAD_S``,
  which hides the way to the broker and back. Nothing is prefetched until there is an estimate. When running tasks
  take longer than estimated, the node takes less, and hands back what it holds beyond that: unstarted, unblamed.
* Work starts only with a lease (``uplink.py``): a node that was frozen or cut off must not begin what has meanwhile been
  given to another. Without one it waits; if the broker has given it up, or is another one, what is unstarted is dropped.
  What runs is an *orphan*: named in the next hello, and adopted, or else finished and offered as it is.

Tasks that wait for others
--------------------------
* A worker whose task waits for tasks that it has submitted says so. Its slot is *lent* meanwhile, and what it has of
  ``LENT``: another worker is started, and the broker may send other tasks. What lay in its pipe is taken back.
* When the wait ends the task just goes on: for a moment more may run than there are slots, but nothing new is started before
  fewer do. Workers beyond the slots are ended when they have been idle for ``SPARE_S``.
* At most ``MAX_LENT`` slots are lent. A task that waits beyond that is ended with an error: it might wait for ever.
* A time limit goes on counting; how long tasks take is estimated without their waits.

What a turn costs
-----------------
* A turn does what its messages ask for, and no more. What time brings (limits, beats, silence, workers to start or to end)
  is looked at when it is due, and at once after any event but the usual ones: a task comes, a task is done.

How tasks get to workers is in ``giving.py``, how many workers there are in ``crew.py``, what they have of the node in
``room.py``; how tasks are ended before their time in ``stops.py``, and how it is all told in ``reports.py``.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable

from msgspec.structs import replace

from ..config import BEAT_INTERVAL_S, SUSPECT_AFTER_BEATS
from ..protocol import (
    Adopt,
    Advance,
    Attempt,
    Beat,
    Death,
    Declined,
    Dispatch,
    Done,
    Draining,
    Fence,
    Function,
    Functions,
    GoesOn,
    Goodbye,
    GroupAdd,
    Interrupted,
    Message,
    NeedFunctions,
    NewKeys,
    No,
    NodeHello,
    Order,
    Outcome,
    Output,
    Pause,
    Progress,
    Results,
    Revoke,
    Run,
    SayHello,
    Shape,
    Stop,
    Stopped,
    Waits,
    Welcome,
    Words,
    Workers,
    batches,
)  # fmt: skip
from . import outputs
from .crew import MAX_LENT, Crew
from .events import (
    AgentAction,
    AgentEvent,
    Born,
    Exited,
    FromTask,
    Leave,
    Log,
    Measured,
    Printed,
    Quit,
    Reached,
    Reconnected,
    Said,
    SendBeat,
    Stood,
    TakenBack,
    Tick,
    ToBroker,
    Unreadable,
    UseKeys,
)  # fmt: skip
from .functions import FunctionStore
from .giving import STUCK_AFTER_S, Giving
from .offences import Offences, Strikes
from .reports import Reports
from .room import Room
from .settings import Care
from .stops import Ending
from .uplink import Uplink
from .workers import REPORT_AFTER_S, Held, Worker

LEASE_S = BEAT_INTERVAL_S * SUSPECT_AFTER_BEATS
SILENT_AFTER_S = 5.0
DRAIN_BEFORE_S = 5.0  # a node that will be ended
TERM_GRACE_S = 20.0  # what a batch system leaves between SIGTERM and SIGKILL, or more
TERMINATED = "killed by SIGTERM"  # as the nursery says it
HEARD_S = 1.0  # how much sooner than a node its workers may have a signal that was sent to all
PARTING_S = 2.0  # how long a drained node waits for its last results to be acknowledged

_USUAL = (Tick, Said, Reached, Printed)


class Agent:
    def __init__(
        self,
        hello: NodeHello,
        gpus: Iterable[str] = (),
        care: Care = Care(),  # noqa: B008 - frozen
        *,
        alone_s: float = math.inf,
        leaves_at: float = math.inf,
    ) -> None:
        """``alone_s``: it ends when the broker has been silent for so long. ``leaves_at``: it will be ended soon after."""
        self._leaves_at = leaves_at
        self._alone_s = alone_s
        self._uplink = Uplink(hello, BEAT_INTERVAL_S, LEASE_S)
        self._uplink.leaves_at = leaves_at
        self._host = hello.where.host
        self._out: list[AgentAction] = []
        self._crew = Crew(hello.slots, care)
        self._workers = self._crew.workers
        self._room = Room(dict(hello.resources), gpus)
        self._functions = FunctionStore()
        self._giving = Giving(self._crew, self._room, self._functions, self._out)
        self._queue = self._giving.queue
        self._held: dict[bytes, Held] = {}
        self._ordered_so_far = 0
        self._lacking: dict[bytes, list[Held]] = {}  # tasks whose function or input is on its way, by its name
        self._orphans = 0
        self._reports = Reports(self._uplink, hello.credit)
        self._terminated: list[tuple[float, Death, Held]] = []  # not reported yet; until when, in their order
        self._beat_interval_s = BEAT_INTERVAL_S
        self._beats = 0
        self._beat_at = 0.0
        self._ticked = True  # since the last event
        self._look_at = 0.0  # when time brings something, at the earliest
        self._leaving = ""
        self._leave_by = math.inf
        self._paused = False
        self._silent_since: float | None = None  # by its own clock, which may have stood still
        self._go_at = math.inf
        self._ended = False
        self.counts: Counter[str] = Counter()
        self._offences = Offences(self.counts)
        self._strikes = Strikes()
        self.name = ""

    # --- the contract ------------------------------------------------------------------------------------------------

    def handle(self, event: AgentEvent, now: float) -> list[AgentAction]:
        self._ticked = False
        if not isinstance(event, _USUAL):
            self._look_at = 0.0
        match event:
            case Said():
                self._said(self._workers[event.worker], event.messages, now)
            case Reached():
                if (received := self._uplink.receive(event.envelope, now)) is not None:
                    self._message(received, now)
            case Reconnected():
                self._uplink.reconnected()
            case Tick():
                self._ticked = True
                self._tick(now)
            case Unreadable(why):
                self._unreadable(why, now)
            case TakenBack(worker, runs):
                self._taken_back(self._workers[worker], runs, now)
            case Measured(sizes):
                self._measured(sizes)
            case Stood(worker, stack):
                if (ending := self._workers[worker].ending) is not None:
                    ending.stack = stack
            case Printed(words, advances):
                self._printed(words, advances)
            case Born(worker, pid):
                self._workers[worker].pid = pid
                self._crew.changed = True
            case Exited(worker):
                self._exited(self._workers[worker], event, now)
            case Leave(drain, reason):
                limited = self._leaves_at < math.inf
                self._leave(drain=drain, reason=reason, by=now + TERM_GRACE_S if limited else math.inf)
        out = self._out.copy()
        self._out.clear()
        return out

    def next_deadline(self) -> float:
        if self._ended:
            return self._uplink.deadline()
        if not self._ticked:
            return 0.0
        return min(self._uplink.deadline(), self._look_at, self._go_at)

    def sanity_check(self) -> None:
        queued = {held.task for held in self._queue}
        lacking = {held.task for tasks in self._lacking.values() for held in tasks}
        given = {task for worker in self._workers.values() for task in worker.runs}
        for tasks in self._lacking.values():
            assert all(held.lacks == sum(held in some for some in self._lacking.values()) for held in tasks), "lacks are off"
        assert len(queued) + len(lacking) + len(given) == len(queued | lacking | given), "a task is in two places"
        assert queued | lacking | given == self._held.keys(), "a task is held and nowhere, or the reverse"
        self._room.sanity_check(self._workers.values())
        self._crew.sanity_check()
        for worker in self._workers.values():
            assert all(held.worker == worker.id for held in worker.runs.values()), "a run at another's worker"
            interrupted = worker.ending is not None and worker.ending.interrupted
            assert not interrupted or len(worker.runs) <= 1, "an interrupted worker was given a run"

    @property
    def has_plenty(self) -> bool:
        """All workers have enough to do for a while."""
        return self._queue.count > 0 and self._giving.has_plenty

    def unanswered(self, worker: int) -> int:
        """How much this worker still has to do."""
        return len(self._workers[worker].runs)

    @property
    def ready(self) -> bool:
        """It has joined, all its workers are there, and the broker knows them."""
        link = self._uplink.link
        return self._crew.complete and link is not None and not self._crew.changed and not link.unfinished()

    @property
    def held(self) -> int:
        return len(self._held)

    # --- from the broker ---------------------------------------------------------------------------------------------

    def _message(self, message: Message, now: float) -> None:
        if not isinstance(message, Dispatch):
            self._look_at = 0.0
        match message:
            case Dispatch(shapes, orders, functions, follow):
                if functions:
                    self._learn(functions)
                self._giving.came_at = now
                coming = set(follow)
                kinds = [(shape, shape.options.rank, [shape.function]) for shape in shapes]
                for order in orders:
                    self._ordered(order, *kinds[order.shape], coming)
            case Functions(functions):
                self._learn(functions)
            case Revoke(attempts, force):
                for attempt in attempts:
                    self._revoke(attempt, force=force)
            case Adopt(attempts):
                self._adopted(attempts, now)
            case Welcome():
                self._welcomed(message)
            case SayHello():
                self._session_over("the broker gave this node up")
            case No(_, text):
                self._end(f"refused by the broker: {text}")
            case Stop(drain, grace_s):
                self._leave(drain=drain, reason="told by the broker", by=now + grace_s if grace_s else math.inf)
            case Pause(on):
                self._pause(on=on)
            case NewKeys(public, secret):
                self._out.append(UseKeys(public, secret))
            case _:
                self._offences.note(f"{type(message).__name__} from the broker", "the broker")

    def _welcomed(self, welcome: Welcome) -> None:
        self.name = welcome.name
        self._beat_interval_s = welcome.beat_interval_s
        self._uplink.pace(welcome.beat_interval_s, welcome.lease_s)
        self._beat_at = 0.0
        self._out.append(Log("info", f"joined as {welcome.name}"))
        self._crew.changed = True
        self._reports.credit = self._crew.slots  # what the hello said
        self._reports.session_begins()
        for body in self._uplink.undelivered:  # what the last session did not deliver and is still worth something
            if isinstance(body, GroupAdd):
                self._uplink.send(replace(body, attempt=0))
            elif isinstance(body, Results | Fence | Output):
                self._uplink.send(body)
            elif isinstance(body, Progress) and (ended := self._ended_since_hello(body)):
                self._uplink.send(ended)
        self._uplink.undelivered.clear()
        if self._leaving:
            self._uplink.send(Draining())

    def _ended_since_hello(self, report: Progress) -> Progress | None:
        """Of what the hello offered. The rest is nobody's any more, and the next broker numbers attempts anew."""
        offered = self._uplink.offered
        deaths = [death for death in report.deaths if Attempt(death.task, death.attempt) in offered]
        stopped = [stop for stop in report.stopped if Attempt(stop.task, stop.attempt) in offered]
        return Progress(self._reports.credit, deaths=deaths, stopped=stopped) if deaths or stopped else None

    def _unreadable(self, why: str, now: float) -> None:
        """What the broker will send again for ever, with all that waits behind it; a new session begins without it."""
        self._offences.note("malformed message", f"the broker: {why}")
        if self._strikes.add(now):
            self._strikes = Strikes()
            self._uplink.over()
            self._session_over("what the broker says cannot be read")

    def _session_over(self, why: str) -> None:
        """This node's tasks are placed elsewhere. What runs goes on and is offered when done."""
        self._out.append(Log("warning", f"{why}; joining anew"))
        for held in [held for held in self._held.values() if not held.worker]:
            self._drop(held)
        for worker in self._workers.values():
            for held in worker.runs.values():
                self._orphans += not held.orphan
                held.orphan = True
            self._giving.take_back(worker)
        for _, _, held in self._terminated:
            self._reports.no_longer_counts(held)
        self._terminated.clear()
        self._reports.session_over()
        running = [next(iter(worker.runs.values())) for worker in self._workers.values() if worker.runs]
        self._uplink.hold([Attempt(held.task, held.attempt) for held in running])

    def _pause(self, *, on: bool) -> None:
        """Take nothing new, and hand back what has not begun."""
        self._paused = on
        self._uplink.hello = replace(self._uplink.hello, paused=on)
        self._out.append(Log("info", "paused" if on else "resumed"))
        if not on:
            return
        for held in [held for held in self._held.values() if not held.worker]:
            self._drop(held)
            self._reports.returned.append(Attempt(held.task, held.attempt))
        for worker in self._workers.values():
            for held in list(worker.runs.values())[1:]:
                held.unwanted = True
            self._giving.take_back(worker)

    def _adopted(self, attempts: list[Attempt], now: float) -> None:
        for attempt in attempts:
            held = self._held.get(attempt.task)
            if held is not None and held.orphan and held.attempt == attempt.attempt:
                held.orphan = False
                held.reported = True
                self._orphans -= 1
                if self._workers[held.worker].waits:
                    self._reports.waiting.append(attempt)
        # The broker takes it that this node has room for what it adopted, whatever it was told on the way: say what is so.
        self._reports.credit = self._wanted_credit(now)
        self._uplink.send(Progress(self._reports.credit))

    def _ordered(self, order: Order, shape: Shape, rank: int, needs: list[bytes], coming: set[bytes]) -> None:
        """``needs``: the shape's function."""
        task, attempt, inputs = order.task, order.attempt, order.inputs
        if task in self._held:
            self._ordered_again(self._held[task], attempt)
            return
        if inputs:
            needs = list(dict.fromkeys([*needs, *[name for _, name in inputs]]))
        self._ordered_so_far += 1
        limit_s = shape.options.timeout or math.inf
        held = Held(self._ordered_so_far, task, attempt, order.call, shape, shape.options, rank, limit_s, needs, inputs)
        self._held[task] = held
        if lacking := [name for name in needs if not self._functions.hold(name)]:
            self._lacks(held, lacking, coming)
        else:
            self._queue.push(task, held, rank)

    def _ordered_again(self, held: Held, attempt: int) -> None:
        """It is here still, from an attempt that was given up: that one answers for both."""
        held.attempt = attempt
        held.revoked = held.unwanted = False
        held.limit_s = held.options.timeout or math.inf
        self._orphans -= held.orphan
        held.orphan = False
        held.reported = False
        self._look_at = 0.0

    def _lacks(self, held: Held, lacking: list[bytes], coming: set[bytes]) -> None:
        held.lacks = len(lacking)
        if wanted := [name for name in lacking if name not in self._lacking and name not in coming]:
            for batch in batches(wanted, len):
                self._uplink.send(NeedFunctions(batch))
        for name in lacking:
            self._lacking.setdefault(name, []).append(held)

    def _learn(self, functions: list[Function]) -> None:
        for function in functions:
            self._functions.add(function.digest, function.blob)
            for held in self._lacking.pop(function.digest, []):
                held.lacks -= 1
                if not held.lacks:
                    self._queue.push(held.task, held, held.rank)

    def _revoke(self, attempt: Attempt, *, force: bool) -> None:
        held = self._held.get(attempt.task)
        if held is None or held.attempt != attempt.attempt:
            return  # it was answered
        if not held.worker:
            self._drop(held)
            self._reports.returned.append(attempt)
            return
        held.revoked = True
        if force:
            held.limit_s = 0.0
        worker = self._workers[held.worker]
        if next(iter(worker.runs)) != held.task:
            self._giving.take_back(worker)  # it lies in the pipe; if the worker takes it first, its answer decides

    # --- from the workers --------------------------------------------------------------------------------------------

    def _said(self, worker: Worker, messages: list[FromTask], now: float) -> None:
        done = 0
        for message in messages:
            if type(message) is Done:
                done += self._done(worker, message, now)
            else:
                self._look_at = 0.0
                self._said_otherwise(worker, message, now)
        if done:
            self._crew.has_done(worker, done)
            if worker.runs and self._look_at > now + STUCK_AFTER_S:  # else it is looked at soon enough
                self._expect(worker)

    def _said_otherwise(self, worker: Worker, message: FromTask, now: float) -> None:
        match message:
            case Declined(task):
                if self._has_ended(worker, task, now):
                    worker.functions.discard(worker.runs[task].shape.function)
                    self._take_from(worker, task, now)
            case GroupAdd():
                running = next(iter(worker.runs), b"")
                if running:
                    worker.runs[running].counted = True
                self._reports.counted(message, running)
            case Fence():
                self._uplink.send(message)
            case Waits() | GoesOn():
                self._turns(worker, message, now)
            case Interrupted() if worker.ending is not None:
                worker.ending.acknowledged = True
                if not worker.runs and worker.ending.over:
                    worker.ending = None

    def _has_ended(self, worker: Worker, task: bytes, now: float) -> bool:
        """Whether this is what the worker was running, as it says. A task can write to its worker's pipe, and anything."""
        if task != next(iter(worker.runs), None):
            self._offences.note("answer to what is not running", f"worker {worker.id}")
            return False
        worker.since = now
        if worker.waits:
            self._reclaim(worker, now)
        return True

    def _measured(self, sizes: dict[int, int]) -> None:
        self._out.extend(self._crew.measured(sizes))
        for worker in self._workers.values():
            if worker.worn:
                self._giving.take_back(worker)

    def _printed(self, words: list[Words], advances: list[Advance]) -> None:
        """At once, so before any result of this turn. Without a session it is lost; what comes later says how much."""
        if (link := self._uplink.link) is not None:
            for message in outputs.messages(link, words, advances, self.name):
                link.send(message)

    def _turns(self, worker: Worker, message: Waits | GoesOn, now: float) -> None:
        """The task waits for others, or goes on."""
        if message.task != next(iter(worker.runs), None):
            self._offences.note("a wait of what is not running", f"worker {worker.id}")
            return
        held = worker.runs[message.task]
        news = Attempt(held.task, held.attempt)
        if isinstance(message, Waits) and not worker.waits:
            self._room.lend(worker)
            worker.waiting_since = now
            self._crew.lent += 1
            if not held.orphan:
                self._reports.waiting.append(news)
            self._giving.take_back(worker)
            if self._crew.lent > MAX_LENT:
                held.too_many = True
                held.limit_s = 0.0
        elif isinstance(message, GoesOn) and worker.waits:
            self._reclaim(worker, now)
            if news in self._reports.waiting:
                self._reports.waiting.remove(news)
            elif not held.orphan:
                self._reports.resumed.append(news)

    def _reclaim(self, worker: Worker, now: float) -> None:
        """The slot is not lent any more."""
        assert worker.waiting_since is not None, "it is not lent"
        worker.waited_s += now - worker.waiting_since
        worker.waiting_since = None
        worker.late = True
        self._crew.lent -= 1
        self._room.reclaim(worker)

    def _done(self, worker: Worker, done: Done, now: float) -> bool:
        if not self._has_ended(worker, done.task, now):
            return False
        held = worker.runs.pop(done.task)
        self._giving.took(max(0.0, done.seconds - worker.waited_s))
        worker.waited_s = 0.0
        ending = worker.ending
        if ending is not None and ending.interrupted and not done.ok:
            self._reports.stopped.append(self._stop_report(worker, held, ending))
            self._reports.no_longer_counts(held)
        else:
            outcome = Outcome(done.task, held.attempt, done.ok, done.value, worker.id, done.retry, done.seconds)
            self._reports.outcomes.append(outcome)
        if ending is not None and ending.over:
            worker.ending = None
        self._forget(held)
        if not worker.runs:
            self._idle(worker, now)
        return True

    def _exited(self, worker: Worker, exited: Exited, now: float) -> None:
        pid, how, untaken, remains = exited.pid, exited.how, exited.untaken, exited.remains
        how = worker.over or how
        early = False
        if worker.waits:
            self._reclaim(worker, now)
        self._taken_back(worker, untaken, now)
        if worker.ending is not None and worker.ending.interrupted:
            for held in worker.runs.values():
                self._reports.stopped.append(self._stop_report(worker, held, worker.ending))
                self._reports.no_longer_counts(held)
                self._forget(held)
            if worker.runs:
                worker.runs.clear()
                self._idle(worker, now)
        elif worker.runs:
            while worker.runs:  # one, unless a task read from its worker's pipe
                running = worker.runs.popitem(last=False)[1]
                ran_s = max(0.0, now - worker.since)
                death = Death(worker.id, pid, how, running.task, running.attempt, ran_s, remains)
                if how == TERMINATED:
                    self._terminated.append((now + HEARD_S, death, running))
                else:
                    self._reports.deaths.append(death)
                    self._reports.no_longer_counts(running)
                self._forget(running)
            self._idle(worker, now)
        elif not (worker.spare or worker.over):
            self._reports.deaths.append(Death(worker.id, pid, how))
            early = not worker.done
        ours = worker.spare or (worker.ending is not None and worker.ending.interrupted)
        self._out.append(Log("info" if ours else "warning", f"worker {worker.id} pid {pid} died: {how}"))
        self._crew.bury(worker, now, early=early)

    def _idle(self, worker: Worker, now: float) -> None:
        worker.idle_since = now
        self._room.release(worker)

    def _taken_back(self, worker: Worker, runs: list[Run], now: float) -> None:
        worker.taking_back = False
        numbers = [worker.runs[run.task].number for run in runs if run.task in worker.runs]
        for run in reversed(runs):
            if run.task not in worker.runs:  # a task answered in its name
                continue
            if run.function:
                worker.functions.discard(run.digest)
            self._take_from(worker, run.task, now)
        self._order_the_front(numbers)

    def _order_the_front(self, numbers: list[int]) -> None:
        """Runs of several workers may have been taken back, one after the other: first come, first served again."""
        front = []
        last = max(numbers, default=0)
        while self._queue.count and self._queue.head().number <= last:
            front.append(self._queue.pop())
        for held in sorted(front, key=lambda held: held.number, reverse=True):
            self._queue.push(held.task, held, held.rank, first=True)

    def _take_from(self, worker: Worker, task: bytes, now: float) -> None:
        """This run was given to the worker and has not begun."""
        held = worker.runs.pop(task)
        held.worker = 0
        if held.orphan:
            self._forget(held)
        elif held.revoked or held.unwanted:
            self._forget(held)
            self._reports.returned.append(Attempt(held.task, held.attempt))
        else:
            self._queue.push(held.task, held, held.rank, first=True)
        if not worker.runs:
            self._idle(worker, now)

    # --- acting --------------------------------------------------------------------------------------------------------

    def _tick(self, now: float) -> None:
        if self._ended:
            self._flush(now)
            return
        looks = now >= self._look_at or not self._crew.settled
        if looks:
            self._look(now)
        if not self._queue.count:
            self._giving.share_the_last()
        elif self._uplink.has_lease(now):
            for worker in self._giving.give(now, self._uplink.lease_ends):
                self._expect(worker)
        if looks or self._reports.due:
            self._reports.send(self._wanted_credit(now))
        if self._crew.changed:
            self._crew.changed = False
            self._uplink.send(Workers(self._crew.states()))
        if self._queue.count:
            self._look_at = min(self._look_at, self._giving.excess_at())
        if self._leaving and not self._ended:
            self._depart(now)
        self._flush(now)

    def _look(self, now: float) -> None:
        """Do what time has brought, and say when it brings more."""
        self._out.extend(self._crew.adjust(now))
        self._watch_workers(now)
        self._hand_back(now)
        if now >= self._beat_at:
            self._beat(now)
        self._notice_silence(now)
        if now >= self._drain_at:
            self._leave(drain=True, reason="its time here is over", by=math.inf)
        self._report_terminated(now)
        waits = [until for until, _, _ in self._terminated[:1]]
        self._look_at = min(self._beat_at, self._drain_at, *self._crew.deadlines(), *waits)
        for worker in self._workers.values():
            self._expect(worker)

    def _expect(self, worker: Worker) -> None:
        """Look again when something falls due of what this worker has."""
        self._look_at = min(self._look_at, worker.due(self._giving.stuck_after()))

    def _flush(self, now: float) -> None:
        for envelope in self._uplink.flush(now):
            self._out.append(ToBroker(envelope))

    def _watch_workers(self, now: float) -> None:
        for worker in self._workers.values():
            if worker.ending is not None and worker.has_nothing_else:
                self._out.extend(worker.ending.advance(worker.id, now))
            if not worker.runs:
                continue
            age = now - worker.since
            if age >= self._giving.stuck_after():
                self._giving.take_back(worker)
            first = worker.first
            if age >= REPORT_AFTER_S and not first.reported:
                first.reported = True
                self._reports.started.append(Attempt(first.task, first.attempt))
            if age >= first.limit_s and worker.ending is None:
                worker.ending = Ending(now, look=not (first.revoked or first.too_many))
                self._giving.take_back(worker)

    def _stop_report(self, worker: Worker, held: Held, ending: Ending) -> Stopped:
        where = f"in worker {self.name}/{worker.id} (pid {worker.pid}) on {self._host}"
        if held.too_many:
            text = f"{held.options.name or 'the task'} was stopped {where}: it waits for tasks of its own, as {MAX_LENT}"
            text += " others on this node do. Nest less deeply, or let tasks return what is to be done next"
            return Stopped(held.task, held.attempt, "TooManyWaiting", text)
        if not ending.look:
            return Stopped(held.task, held.attempt, "cancelled", f"stopped {where}")
        text = f"{held.options.name or 'the task'} was stopped at its time limit of {held.limit_s:g} s, {where}"
        if ending.stack:
            text += f". It stood at, latest call first:\n{ending.stack}"
        return Stopped(held.task, held.attempt, "TaskTimeout", text)

    def _hand_back(self, now: float) -> None:
        """What lies here will not start for long: let the broker place it where it may."""
        last = [self._queue.pop_last() for _ in range(self._giving.excess(now))]
        self._reports.returned.extend(Attempt(held.task, held.attempt) for held in reversed(last))
        for held in last:
            self._forget(held)

    def _report_terminated(self, now: float) -> None:
        """A batch system that ends a job sends SIGTERM to each process of it: then the node leaves too, and no task is to
        blame."""
        while self._terminated and (self._leaving or now >= self._terminated[0][0]):
            _, death, held = self._terminated.pop(0)
            self._reports.deaths.append(replace(death, blamed=not self._leaving))
            self._reports.no_longer_counts(held)

    def _wanted_credit(self, now: float) -> int:
        room = max(0, self._crew.slots - self._orphans + self._crew.useful_lent)
        if self._leaving or self._paused:
            return room if self._crew.lent else 0  # for what the tasks here wait for
        credit = room + self._giving.prefetch(self._giving.stall(now))
        both_prefetch = min(credit, self._reports.credit) > max(self._crew.slots, room)
        if both_prefetch and 0.5 < credit / self._reports.credit < 2.0:
            return self._reports.credit  # not worth a message
        return credit

    def _notice_silence(self, now: float) -> None:
        silent_s = now - self._uplink.heard_at
        if not SILENT_AFTER_S < silent_s < math.inf:
            self._silent_since = None
        elif self._silent_since is None:
            self._silent_since = now
            self._out.append(Log("warning", f"the broker has been silent for {silent_s:.0f} s; still trying"))
        elif now - self._silent_since >= self._alone_s - SILENT_AFTER_S:
            self._end(f"the broker has been silent for {silent_s:.0f} s")

    def _beat(self, now: float) -> None:
        self._beat_at = now + self._beat_interval_s
        if line := self._offences.line(now):
            self._out.append(Log("warning", line))
        if self._uplink.link is None:
            return
        self._beats += 1
        self._out.append(SendBeat(Beat(self._uplink.hello.incarnation, self._beats, self._crew.states())))

    @property
    def _drain_at(self) -> float:
        """When nothing new is begun any more, of which nobody knows how long it takes."""
        return math.inf if self._leaving else self._leaves_at - DRAIN_BEFORE_S

    def _leave(self, *, drain: bool, reason: str, by: float) -> None:
        """``by``: when to go even if something still runs, or earlier if this node's time is over."""
        if not drain:
            self._end(reason)
            return
        self._leave_by = min(self._leave_by, by, self._leaves_at)
        if not self._leaving:
            self._leaving = reason
            self._uplink.send(Draining())

    def _depart(self, now: float) -> None:
        """When nothing is left to do, go as soon as the broker has the last results, or is not there to take them. What
        still runs when the time is up the broker gives to others: nobody is charged with it."""
        if now >= self._leave_by:
            left = len(self._held)
            self._end(f"{self._leaving}; {'1 task is' if left == 1 else f'{left} tasks are'} run elsewhere")
            return
        self._look_at = min(self._look_at, self._leave_by)
        if self._held:  # or again: what was under way to this node when it said that it drains
            self._go_at = math.inf
            return
        self._go_at = min(self._go_at, now + PARTING_S)
        if now >= self._go_at or (self._uplink.link is not None and not self._uplink.link.unfinished()):
            self._end(self._leaving)

    def _end(self, reason: str) -> None:
        self._ended = True
        self._uplink.send(Goodbye(reason))
        self._out.append(Quit(reason))

    def _drop(self, held: Held) -> None:
        """It waits here, unstarted; no longer."""
        if not held.lacks:
            self._queue.remove(held.task, held.rank)
        for name in held.needs if held.lacks else ():
            if held in (lacking := self._lacking.get(name, [])):
                lacking.remove(held)
                if not lacking:
                    del self._lacking[name]
        self._forget(held)

    def _forget(self, held: Held) -> None:
        del self._held[held.task]
        self._orphans -= held.orphan
        for name in held.needs:
            self._functions.release(name)
