"""The node's brain: which worker gets which task, what to report, how much to ask for.

Contract
--------
As the scheduler's: ``handle(event, now)`` takes in, ``Tick`` acts, ``next_deadline()`` says when; no clock, no I/O.

How tasks get to workers
------------------------
* A worker's pipe is a queue that both ends can take from: the shell keeps the worker's end open as well. So short tasks
  are given several at once, which saves a wake-up each, and when the first of them turns out to be long the rest is
  taken back and given to others: what lies in a pipe is never stuck. And when a worker dies, what it had taken and not
  answered is exactly the task it was running.
* How many are given at once follows from how long tasks have taken lately: about ``BATCH_S`` of work.
* Tasks that ask for more than one CPU, or for anything else, are given alone.
* If the first in the queue does not fit, the others wait too: else a wide task would starve behind narrow ones. The
  broker sends only what fits apart from CPUs, so this lasts until running tasks end.

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

How tasks are ended before their time is in ``stops.py``.
"""

from __future__ import annotations

import math
from collections import Counter, OrderedDict
from collections.abc import Iterable
from typing import Literal

from msgspec.structs import replace

from ..config import BEAT_INTERVAL_S, SUSPECT_AFTER_BEATS
from ..protocol import (
    LENT,
    Adopt,
    Advance,
    Attempt,
    Beat,
    Death,
    Declined,
    Dispatch,
    Done,
    Draining,
    Function,
    Functions,
    GoesOn,
    Goodbye,
    GroupAdd,
    Input,
    Interrupted,
    Message,
    NeedFunctions,
    NewKeys,
    No,
    NodeHello,
    Options,
    Order,
    Outcome,
    Output,
    Pause,
    Payload,
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
    WorkerState,
    batches,
    payload_bytes,
    wire_bytes,
)  # fmt: skip
from . import outputs
from .events import (
    AgentAction,
    AgentEvent,
    Born,
    Exited,
    Give,
    Leave,
    Log,
    Printed,
    Quit,
    Reached,
    Reconnected,
    Retire,
    Said,
    SendBeat,
    Start,
    Stood,
    TakeBack,
    TakenBack,
    Tick,
    ToBroker,
    Unreadable,
    UseKeys,
)  # fmt: skip
from .functions import FunctionStore
from .offences import Offences, Strikes
from .priorities import PriorityQueue
from .stops import Ending
from .uplink import Uplink

LOOKAHEAD_S = 0.02
BATCH_S = 0.002
TASK_OVERHEAD_S = 20e-6  # what a task costs a worker besides the call itself
MAX_BATCH = 64  # a pipe holds about 270 small runs
MAX_BATCHED_BYTES = 2 * 1024  # of a call that joins a batch: the pipe must never be full, and large calls gain nothing
MAX_PREFETCH = 256  # for each slot
STUCK_AFTER_S = 0.005  # a batch whose first task takes this long, and three times as long as usual, is taken apart
REPORT_AFTER_S = 0.05  # a task that runs this long is reported as running
MAX_WORKER_FUNCTIONS = 512
MAX_LENT = 128  # slots: each is one more process
SPARE_S = 1.0
LEASE_S = BEAT_INTERVAL_S * SUSPECT_AFTER_BEATS
SILENT_AFTER_S = 5.0
PARTING_S = 2.0  # how long a drained node waits for its last results to be acknowledged
RESTART_BACKOFF_S = 0.1  # doubled with each worker in a row that dies before its first task


class Held:
    """A task at this node. ``number``: in the order they came; ``worker`` is 0 while it waits here; ``orphan``: the session
    that ordered it is over; ``revoked``: it is not wanted any more; ``unwanted``: not here, unless it runs; ``limit_s``: how
    long it may run. ``inputs``: whose results are its arguments, and their names among the functions; of these and its
    own function it ``lacks`` so many."""

    __slots__ = (
        "attempt", "call", "counted", "inputs", "lacks", "limit_s", "number", "options", "orphan", "reported", "revoked",
        "shape", "task", "too_many", "unwanted", "worker",
    )  # fmt: skip

    def __init__(self, order: Order, shape: Shape, number: int) -> None:
        self.number = number
        self.task = order.task
        self.attempt = order.attempt
        self.shape = shape
        self.options: Options = shape.options
        self.call: Payload = order.call
        self.counted = False  # on a WaitGroup
        self.inputs = order.inputs
        self.lacks = 0
        self.worker = 0
        self.reported = False
        self.orphan = False
        self.revoked = False
        self.unwanted = False
        self.too_many = False  # that wait for others
        self.limit_s = self.options.timeout or math.inf

    @property
    def needs(self) -> list[bytes]:
        function = self.shape.function
        return list(dict.fromkeys([function, *[name for _, name in self.inputs]])) if self.inputs else [function]


class Worker:
    """``runs``: what it was given and has not answered, in order; the first of them is running since ``since``. ``ending``:
    its task is brought to an end, or was, and the worker is not fit for another yet. ``waiting_since``: since when its task
    waits for others, if it does; ``waited_s``: how long it has in all; ``late``: it has gone on, perhaps beyond the slots;
    ``spare``: it is to end, for it is not needed."""

    __slots__ = (
        "done", "ending", "functions", "gpus", "id", "idle_since", "late", "pid", "runs", "since", "spare", "taking_back",
        "uses", "waited_s", "waiting_since",
    )  # fmt: skip

    def __init__(self, number: int) -> None:
        self.id = number
        self.pid = 0
        self.done = 0
        self.runs: OrderedDict[bytes, Held] = OrderedDict()
        self.since = 0.0
        self.functions: set[bytes] = set()
        self.uses: tuple[tuple[str, float], ...] = ()
        self.gpus: tuple[str, ...] = ()
        self.taking_back = False
        self.ending: Ending | None = None
        self.waiting_since: float | None = None
        self.waited_s = 0.0
        self.late = False
        self.idle_since = 0.0
        self.spare = False

    @property
    def state(self) -> Literal["starting", "idle", "busy", "waiting"]:
        if self.waits:
            return "waiting"
        return "starting" if not self.pid else "busy" if self.runs or self.ending else "idle"

    @property
    def waits(self) -> bool:
        """Its slot is lent."""
        return self.waiting_since is not None

    @property
    def active(self) -> bool:
        """It takes a slot."""
        return bool(self.runs) and self.waiting_since is None

    @property
    def booked(self) -> list[tuple[str, float]]:
        """What its task has of the node's resources now."""
        return [(name, amount) for name, amount in self.uses if not (self.waits and name in LENT)]


class Agent:
    def __init__(self, hello: NodeHello, gpus: Iterable[str] = (), *, alone_s: float = math.inf) -> None:
        """``alone_s``: it ends when the broker has been silent for so long."""
        self._alone_s = alone_s
        self._uplink = Uplink(hello, BEAT_INTERVAL_S, LEASE_S)
        self._host = hello.where.host
        self._slots = hello.slots
        self._total = dict(hello.resources)
        self._used = dict.fromkeys(self._total, 0.0)
        self._gpu_load = dict.fromkeys(gpus, 0.0)
        self._workers: dict[int, Worker] = {}
        self._worker_numbers = 0
        self._held: dict[bytes, Held] = {}
        self._ordered_so_far = 0
        self._queue: PriorityQueue[Held] = PriorityQueue()
        self._lacking: dict[bytes, list[Held]] = {}  # tasks whose function or input is on its way, by its name
        self._functions = FunctionStore()
        self._task_s: float | None = None  # how long a task takes, smoothed
        self._credit = hello.credit  # as the broker was told
        self._orphans = 0
        self._outcomes: list[Outcome] = []
        self._started: list[Attempt] = []
        self._returned: list[Attempt] = []
        self._deaths: list[Death] = []
        self._additions = 0  # to WaitGroups, by tasks
        self._stopped: list[Stopped] = []
        self._taken_down: list[bytes] = []  # tasks that had counted on WaitGroups, when their attempts died or were stopped
        self._lent = 0  # how many workers wait
        self._spares = 0  # and are to end
        self._waiting: list[Attempt] = []
        self._resumed: list[Attempt] = []
        self._workers_changed = False
        self._beat_interval_s = BEAT_INTERVAL_S
        self._beats = 0
        self._beat_at = 0.0
        self._start_at = 0.0
        self._early_deaths = 0
        self._leaving = ""
        self._leave_by = math.inf
        self._paused = False
        self._silent_since: float | None = None  # by its own clock, which may have stood still
        self._go_at = math.inf
        self._ended = False
        self._out: list[AgentAction] = []
        self.counts: Counter[str] = Counter()
        self._offences = Offences(self.counts)
        self._strikes = Strikes()
        self.name = ""

    # --- the contract ------------------------------------------------------------------------------------------------

    def handle(self, event: AgentEvent, now: float) -> list[AgentAction]:
        match event:
            case Said(worker, message):
                self._said(worker, message, now)
            case Reached(envelope):
                if (received := self._uplink.receive(envelope, now)) is not None:
                    self._message(received, now)
            case Reconnected():
                self._uplink.reconnected()
            case Tick():
                self._tick(now)
            case Unreadable(why):
                self._unreadable(why, now)
            case TakenBack(worker, runs):
                self._taken_back(self._workers[worker], runs, now)
            case Stood(worker, stack):
                if (ending := self._workers[worker].ending) is not None:
                    ending.stack = stack
            case Printed(words, advances):
                self._printed(words, advances)
            case Born(worker, pid):
                self._workers[worker].pid = pid
                self._workers_changed = True
            case Exited(worker):
                self._exited(self._workers[worker], event, now)
            case Leave(drain, reason):
                self._leave(drain=drain, reason=reason, by=math.inf)
        out, self._out = self._out, []
        return out

    def next_deadline(self) -> float:
        times = [self._uplink.deadline(), self._beat_at, self._go_at, self._leave_by]
        if self._ended:
            return self._uplink.deadline()
        if self._outcomes or self._started or self._returned or self._deaths or self._stopped or self._workers_changed:
            return 0.0
        if self._waiting or self._resumed or self._taken_down:
            return 0.0
        if len(self._workers) < self._wanted_workers:
            times.append(self._start_at)
        if len(self._workers) > self._wanted_workers:
            times += [worker.idle_since + SPARE_S for worker in self._surplus()]
        for worker in self._workers.values():
            if worker.ending is not None and _has_nothing_else(worker):
                times.append(worker.ending.at)
            if worker.runs:
                if len(worker.runs) > 1 and not worker.taking_back:
                    times.append(worker.since + self._stuck_after())
                first = next(iter(worker.runs.values()))
                if not first.reported:
                    times.append(worker.since + REPORT_AFTER_S)
                if first.limit_s < math.inf and worker.ending is None:
                    times.append(worker.since + first.limit_s)
        since = [worker.since for worker in self._workers.values() if worker.active]
        if self._queue and len(since) >= self._slots:
            # When the queue is longer than what is worth prefetching at such a stall: see _hand_back.
            stall = max(2 * LOOKAHEAD_S, self._slots * LOOKAHEAD_S / len(self._queue) + 0.001)
            times.append(max(since) + stall)
        return min(times)

    def sanity_check(self) -> None:
        queued = {held.task for held in self._queue}
        lacking = {held.task for tasks in self._lacking.values() for held in tasks}
        given = {task for worker in self._workers.values() for task in worker.runs}
        for tasks in self._lacking.values():
            assert all(held.lacks == sum(held in some for some in self._lacking.values()) for held in tasks), "lacks are off"
        assert len(queued) + len(lacking) + len(given) == len(queued | lacking | given), "a task is in two places"
        assert queued | lacking | given == self._held.keys(), "a task is held and nowhere, or the reverse"
        for name, used in self._used.items():
            uses = sum(dict(worker.booked).get(name, 0.0) for worker in self._workers.values() if worker.runs)
            assert abs(used - uses) < 1e-6, f"{name} in use is off"
            late = [worker for worker in self._workers.values() if worker.late and worker.active]
            back = sum(dict(worker.uses).get(name, 0.0) for worker in late)
            assert used - back <= self._total[name] + 1e-6, f"{name} is overbooked"
        assert self._lent == sum(worker.waits for worker in self._workers.values()), "the count of lent slots is off"
        assert self._spares == sum(worker.spare for worker in self._workers.values()), "the count of spare workers is off"
        assert sum(worker.active and not worker.late for worker in self._workers.values()) <= self._slots, "too many run"
        for worker in self._workers.values():
            assert all(held.worker == worker.id for held in worker.runs.values()), "a run at another's worker"
            interrupted = worker.ending is not None and worker.ending.interrupted
            assert not interrupted or len(worker.runs) <= 1, "an interrupted worker was given a run"
            assert not worker.waits or worker.runs, "a worker without a task waits"
            assert not (worker.spare and worker.runs), "a worker that is to end was given a task"

    @property
    def has_plenty(self) -> bool:
        """Short tasks wait here and in every worker's pipe: nobody runs dry if answers are read a little later."""
        return bool(self._queue) and self._depth() == MAX_BATCH and all(len(w.runs) > 1 for w in self._workers.values())

    @property
    def ready(self) -> bool:
        """It has joined, all its workers are there, and the broker knows them."""
        born = len(self._workers) >= self._slots and all(worker.pid for worker in self._workers.values())
        link = self._uplink.link
        return born and link is not None and not self._workers_changed and not link.unfinished()

    @property
    def held(self) -> int:
        return len(self._held)

    # --- from the broker ---------------------------------------------------------------------------------------------

    def _message(self, message: Message, now: float) -> None:
        match message:
            case Dispatch(shapes, orders, functions, follow):
                self._learn(functions)
                coming = set(follow)
                for order in orders:
                    self._ordered(order, shapes[order.shape], coming)
            case Functions(functions):
                self._learn(functions)
            case Revoke(attempts, force):
                for attempt in attempts:
                    self._revoke(attempt, force=force)
            case Adopt(attempts):
                self._adopted(attempts)
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
        self._beat_at = 0.0
        self._out.append(Log("info", f"joined as {welcome.name}"))
        self._workers_changed = True
        self._credit = self._slots  # what the hello said
        for body in self._uplink.undelivered:  # what the last session did not deliver and is still worth something
            if isinstance(body, Results | GroupAdd | Output):
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
        return Progress(self._credit, deaths=deaths, stopped=stopped) if deaths or stopped else None

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
            if len(worker.runs) > 1 and not worker.taking_back:
                self._take_back(worker)
        self._started.clear()
        self._returned.clear()
        self._stopped.clear()
        self._waiting.clear()
        self._resumed.clear()
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
            self._returned.append(Attempt(held.task, held.attempt))
        for worker in self._workers.values():
            for held in list(worker.runs.values())[1:]:
                held.unwanted = True
            if len(worker.runs) > 1 and not worker.taking_back:
                self._take_back(worker)

    def _adopted(self, attempts: list[Attempt]) -> None:
        for attempt in attempts:
            held = self._held.get(attempt.task)
            if held is not None and held.orphan and held.attempt == attempt.attempt:
                held.orphan = False
                held.reported = True
                self._orphans -= 1
                if self._workers[held.worker].waits:
                    self._waiting.append(attempt)

    def _ordered(self, order: Order, shape: Shape, coming: set[bytes]) -> None:
        held = self._held.get(order.task)
        if held is not None:  # it is here still, from an attempt that was given up: that one answers for both
            held.attempt = order.attempt
            held.revoked = held.unwanted = False
            held.limit_s = held.options.timeout or math.inf
            self._orphans -= held.orphan
            held.orphan = False
            held.reported = False
            return
        self._ordered_so_far += 1
        held = self._held[order.task] = Held(order, shape, self._ordered_so_far)
        needs = held.needs
        for name in needs:
            self._functions.hold(name)
        lacking = [name for name in needs if name not in self._functions]
        if not lacking:
            self._queue.push(held.task, held, held.options.rank)
            return
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
                    self._queue.push(held.task, held, held.options.rank)

    def _revoke(self, attempt: Attempt, *, force: bool) -> None:
        held = self._held.get(attempt.task)
        if held is None or held.attempt != attempt.attempt:
            return  # it was answered
        if not held.worker:
            self._drop(held)
            self._returned.append(attempt)
            return
        held.revoked = True
        if force:
            held.limit_s = 0.0
        worker = self._workers[held.worker]
        if len(worker.runs) > 1 and not worker.taking_back and next(iter(worker.runs)) != held.task:
            self._take_back(worker)  # it lies in the pipe; if the worker takes it first, its answer decides

    # --- from the workers --------------------------------------------------------------------------------------------

    def _said(self, number: int, message: Done | Declined | GroupAdd | Interrupted | Waits | GoesOn, now: float) -> None:
        worker = self._workers[number]
        if not isinstance(message, Done | Declined):
            if isinstance(message, GroupAdd):
                self._additions += 1
                running = next(iter(worker.runs), b"")
                if running:
                    worker.runs[running].counted = True
                self._uplink.send(GroupAdd(message.deltas, self._additions, running))
            elif isinstance(message, Waits | GoesOn):
                self._turns(worker, message, now)
            elif worker.ending is not None:
                worker.ending.acknowledged = True
                if not worker.runs and worker.ending.over:
                    worker.ending = None
            return
        if message.task != next(iter(worker.runs), None):  # a task can write to its worker's pipe, and anything
            self._offences.note("answer to what is not running", f"worker {number}")
            return
        worker.since = now
        self._reclaim(worker, now)
        if isinstance(message, Declined):
            worker.functions.discard(worker.runs[message.task].shape.function)
            self._take_from(worker, message.task, now)
        else:
            self._done(worker, message, now)
        if worker.ending is not None and worker.ending.over:
            worker.ending = None

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
            self._book(worker, -1)
            worker.waiting_since = now
            self._lent += 1
            if not held.orphan:
                self._waiting.append(news)
            if len(worker.runs) > 1 and not worker.taking_back:
                self._take_back(worker)
            if self._lent > MAX_LENT:
                held.too_many = True
                held.limit_s = 0.0
        elif isinstance(message, GoesOn) and worker.waits:
            self._reclaim(worker, now)
            if news in self._waiting:
                self._waiting.remove(news)
            elif not held.orphan:
                self._resumed.append(news)

    def _reclaim(self, worker: Worker, now: float) -> None:
        """The slot is not lent any more."""
        if worker.waiting_since is not None:
            worker.waited_s += now - worker.waiting_since
            worker.waiting_since = None
            worker.late = True
            self._lent -= 1
            self._book(worker, 1)

    def _book(self, worker: Worker, times: int) -> None:
        for name, amount in worker.uses:
            if name in LENT and name in self._used:
                self._used[name] += times * amount

    def _done(self, worker: Worker, message: Done, now: float) -> None:
        held = worker.runs.pop(message.task)
        worker.done += 1
        self._early_deaths = 0
        took = max(0.0, message.seconds - worker.waited_s) + TASK_OVERHEAD_S
        worker.waited_s = 0.0
        self._task_s = took if self._task_s is None else self._task_s + 0.1 * (took - self._task_s)
        if worker.ending is not None and worker.ending.interrupted and not message.ok:
            self._stopped.append(self._stop_report(worker, held, worker.ending))
            self._no_longer_counts(held)
        else:
            self._outcomes.append(Outcome(held.task, held.attempt, message.ok, message.value, worker.id, message.retry))
        self._forget(held)
        if not worker.runs:
            self._idle(worker, now)

    def _exited(self, worker: Worker, exited: Exited, now: float) -> None:
        _, pid, how, untaken, remains = exited
        self._reclaim(worker, now)
        self._taken_back(worker, untaken, now)
        if worker.ending is not None and worker.ending.interrupted:
            for held in worker.runs.values():
                self._stopped.append(self._stop_report(worker, held, worker.ending))
                self._no_longer_counts(held)
                self._forget(held)
            if worker.runs:
                worker.runs.clear()
                self._idle(worker, now)
        elif worker.runs:
            while worker.runs:  # one, unless a task read from its worker's pipe
                running = worker.runs.popitem(last=False)[1]
                ran_s = max(0.0, now - worker.since)
                self._deaths.append(Death(worker.id, pid, how, running.task, running.attempt, ran_s, remains))
                self._no_longer_counts(running)
                self._forget(running)
            self._idle(worker, now)
        elif not worker.spare:
            self._deaths.append(Death(worker.id, pid, how))
            if not worker.done:
                self._start_at = now + RESTART_BACKOFF_S * 2 ** min(6, self._early_deaths)
                self._early_deaths += 1
        ours = worker.spare or (worker.ending is not None and worker.ending.interrupted)
        self._out.append(Log("info" if ours else "warning", f"worker {worker.id} pid {pid} died: {how}"))
        self._spares -= worker.spare
        del self._workers[worker.id]
        self._workers_changed = True

    def _no_longer_counts(self, held: Held) -> None:
        """Its attempt has ended and has no result. The report of that may end with the session; this does not."""
        if held.counted:
            self._taken_down.append(held.task)

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
        while self._queue and self._queue.head().number <= last:
            front.append(self._queue.pop())
        for held in sorted(front, key=lambda held: held.number, reverse=True):
            self._queue.push(held.task, held, held.options.rank, first=True)

    def _take_from(self, worker: Worker, task: bytes, now: float) -> None:
        """This run was given to the worker and has not begun."""
        held = worker.runs.pop(task)
        held.worker = 0
        if held.orphan:
            self._forget(held)
        elif held.revoked or held.unwanted:
            self._forget(held)
            self._returned.append(Attempt(held.task, held.attempt))
        else:
            self._queue.push(held.task, held, held.options.rank, first=True)
        if not worker.runs:
            self._idle(worker, now)

    # --- acting --------------------------------------------------------------------------------------------------------

    def _tick(self, now: float) -> None:
        if self._ended:
            self._flush(now)
            return
        if len(self._workers) < self._wanted_workers:
            self._start_workers(now)
        elif len(self._workers) > self._wanted_workers:
            self._end_surplus(now)
        self._watch_workers(now)
        if not self._queue:
            self._share_the_last()
        elif self._uplink.has_lease(now):
            self._give(now)
        self._hand_back(now)
        self._report(now)
        if now >= self._beat_at:
            self._beat(now)
        self._notice_silence(now)
        if self._leaving and not self._ended:
            self._depart(now)
        self._flush(now)

    def _flush(self, now: float) -> None:
        self._out.extend(ToBroker(envelope) for envelope in self._uplink.flush(now))

    @property
    def _wanted_workers(self) -> int:
        return self._slots + min(MAX_LENT, self._lent) + self._spares

    def _surplus(self) -> list[Worker]:
        """Idle workers beyond those that are wanted."""
        number = len(self._workers) - self._wanted_workers
        return [worker for worker in self._workers.values() if worker.state == "idle" and not worker.spare][: max(0, number)]

    def _end_surplus(self, now: float) -> None:
        for worker in self._surplus():
            if now >= worker.idle_since + SPARE_S:
                worker.spare = True
                self._spares += 1
                self._out.append(Retire(worker.id))

    def _start_workers(self, now: float) -> None:
        while len(self._workers) < self._wanted_workers and now >= self._start_at:
            self._worker_numbers += 1
            self._workers[self._worker_numbers] = Worker(self._worker_numbers)
            self._out.append(Start(self._worker_numbers))

    def _watch_workers(self, now: float) -> None:
        for worker in self._workers.values():
            if worker.ending is not None and _has_nothing_else(worker):
                self._out.extend(worker.ending.advance(worker.id, now))
            if not worker.runs:
                continue
            age = now - worker.since
            if age >= self._stuck_after() and len(worker.runs) > 1 and not worker.taking_back:
                self._take_back(worker)
            first = next(iter(worker.runs.values()))
            if age >= REPORT_AFTER_S and not first.reported:
                first.reported = True
                self._started.append(Attempt(first.task, first.attempt))
            if age >= first.limit_s and worker.ending is None:
                worker.ending = Ending(now, look=not (first.revoked or first.too_many))
                if len(worker.runs) > 1 and not worker.taking_back:
                    self._take_back(worker)

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

    def _stuck_after(self) -> float:
        return max(STUCK_AFTER_S, 3 * (self._task_s or 0.0))

    def _share_the_last(self) -> None:
        """A worker has nothing to do while another has runs in its pipe: take those back and share them."""
        if any(worker.state == "idle" and not worker.spare for worker in self._workers.values()):
            longest = max(self._workers.values(), key=lambda worker: len(worker.runs))
            waiting = len(longest.runs) - 1
            if waiting * (self._task_s or 0.0) > BATCH_S and not longest.taking_back:
                self._take_back(longest)

    def _take_back(self, worker: Worker) -> None:
        worker.taking_back = True
        self._out.append(TakeBack(worker.id))

    def _give(self, now: float) -> None:
        """Fill idle workers first, then all of them up to a batch."""
        depth = self._depth()
        stuck_after = self._stuck_after()
        fit = [worker for worker in self._workers.values() if worker.pid and worker.ending is None and not worker.spare]
        free = max(0, self._slots - sum(worker.active for worker in self._workers.values()))
        ready = [worker for worker in fit if not worker.runs][:free]
        ready += sorted(
            [w for w in fit if w.active and len(w.runs) < depth and now - w.since < stuck_after],
            key=lambda worker: len(worker.runs),
        )
        for index, worker in enumerate(ready):
            share = -(-len(self._queue) // (len(ready) - index))
            while self._queue and share and len(worker.runs) < depth:
                held = self._queue.head()
                if not self._may_run(held, worker):
                    break
                self._start(self._queue.pop(), worker, now)
                share -= 1

    def _depth(self) -> int:
        """How many runs a worker's pipe may hold: a batch of short ones; of longer ones the next, so that the worker
        does not wait for this process in between."""
        if self._task_s is None:
            return 1
        return max(min(MAX_BATCH, 1 + int(BATCH_S / self._task_s)), 2 if self._task_s <= LOOKAHEAD_S else 1)

    def _may_run(self, held: Held, worker: Worker) -> bool:
        demand = held.options.resources
        if worker.runs:
            return (
                demand == worker.uses
                and _is_plain(demand)
                and self._size(held) <= MAX_BATCHED_BYTES
                and not worker.taking_back
            )
        return all(self._used.get(name, 0.0) + amount <= self._total.get(name, 0.0) + 1e-9 for name, amount in demand)

    def _size(self, held: Held) -> int:
        size = payload_bytes(held.call)
        return size + sum([payload_bytes(self._functions[name]) for _, name in held.inputs]) if held.inputs else size

    def _start(self, held: Held, worker: Worker, now: float) -> None:
        demand = held.options.resources
        if not worker.runs:
            worker.since = now
            worker.late = False
            worker.uses = demand
            for name, amount in demand:
                if name in self._used:  # it may ask for nothing, or next to nothing, of what is not here
                    self._used[name] += amount
            worker.gpus = self._pin(demand)
        held.worker = worker.id
        worker.runs[held.task] = held
        fresh = len(worker.functions) >= MAX_WORKER_FUNCTIONS
        if fresh:
            worker.functions.clear()
        digest = held.shape.function
        function: Payload = b"" if digest in worker.functions else self._functions[digest]
        worker.functions.add(digest)
        env = (("CUDA_VISIBLE_DEVICES", ",".join(worker.gpus)),) if worker.gpus else ()
        until = self._uplink.lease_ends
        inputs = [Input(task, self._functions[each]) for task, each in held.inputs]
        name = held.options.name
        run = Run(held.task, held.attempt, digest, function, held.call, fresh, env, until, name, inputs, held.options.depth)
        self._out.append(Give(worker.id, run))

    def _pin(self, demand: tuple[tuple[str, float], ...]) -> tuple[str, ...]:
        """The least loaded GPUs for this task: whole ones, or a share of one."""
        wanted = dict(demand).get("gpu", 0.0)
        if not wanted or not self._gpu_load:
            return ()
        number = max(1, int(wanted))
        chosen = sorted(self._gpu_load, key=lambda gpu: self._gpu_load[gpu])[:number]
        for gpu in chosen:
            self._gpu_load[gpu] += wanted / number
        return tuple(chosen)

    def _idle(self, worker: Worker, now: float) -> None:
        wanted = dict(worker.uses).get("gpu", 0.0)
        for gpu in worker.gpus:
            self._gpu_load[gpu] -= wanted / len(worker.gpus)
        for name, amount in worker.uses:
            if name in self._used:
                self._used[name] -= amount
        worker.idle_since = now
        worker.uses = ()
        worker.gpus = ()

    def _hand_back(self, now: float) -> None:
        """What lies here will not start for long: let the broker place it where it may."""
        if not self._queue or (stall := self._stall(now)) < 2 * LOOKAHEAD_S:
            return
        excess = len(self._queue) - self._prefetch(stall)
        if excess <= 0:
            return
        last = [self._queue.pop_last() for _ in range(excess)]
        self._returned.extend(Attempt(held.task, held.attempt) for held in reversed(last))
        for held in last:
            self._forget(held)

    def _stall(self, now: float) -> float:
        """For how long no worker has finished anything, if all are busy."""
        ages = [now - worker.since for worker in self._workers.values() if worker.active]
        return min(ages) if len(ages) >= self._slots else 0.0

    def _prefetch(self, stall: float) -> int:
        if self._task_s is None:
            return 0
        return min(MAX_PREFETCH * self._slots, int(self._slots * LOOKAHEAD_S / max(self._task_s, stall)))

    def _wanted_credit(self, now: float) -> int:
        room = max(0, self._slots - self._orphans + min(MAX_LENT, self._lent))
        if self._leaving or self._paused:
            return room if self._lent else 0  # for what the tasks here wait for
        credit = room + self._prefetch(self._stall(now))
        both_prefetch = min(credit, self._credit) > max(self._slots, room)
        if both_prefetch and 0.5 < credit / self._credit < 2.0:
            return self._credit  # not worth a message
        return credit

    def _report(self, now: float) -> None:
        if self._outcomes:
            for batch in batches(self._outcomes, _outcome_bytes):
                self._uplink.send(Results(batch))
            self._outcomes = []
        credit = self._wanted_credit(now)
        if self._waiting or self._resumed:
            self._uplink.send(Progress(credit, waiting=self._waiting, resumed=self._resumed))
            self._waiting, self._resumed = [], []
            self._credit = credit
        if credit != self._credit or self._started or self._returned:
            self._credit = credit
            for message in self._progress(credit):
                self._uplink.send(message)
            self._started, self._returned = [], []
        if self._deaths:
            for deaths in batches(self._deaths, _death_bytes):
                self._uplink.send(Progress(credit, deaths=deaths))
            self._deaths = []
        if self._stopped:
            for stopped in batches(self._stopped, _stopped_bytes):
                self._uplink.send(Progress(credit, stopped=stopped))
            self._stopped = []
        for task in self._taken_down:  # behind the report, which may say that it was the last attempt
            self._additions += 1
            self._uplink.send(GroupAdd([], self._additions, task))
        self._taken_down.clear()
        if self._workers_changed:
            self._workers_changed = False
            self._uplink.send(Workers(self._worker_states()))

    def _progress(self, credit: int) -> list[Progress]:
        """One message, unless very much was returned: that goes last part first, as the broker puts each before what waits
        there."""
        last, *earlier = list(batches(self._returned, _attempt_bytes))[::-1] or [[]]
        return [Progress(credit, self._started, last), *(Progress(credit, returned=part) for part in earlier)]

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
        self._out.append(SendBeat(Beat(self._uplink.hello.incarnation, self._beats, self._worker_states())))

    def _worker_states(self) -> list[WorkerState]:
        return [WorkerState(worker.id, worker.pid, worker.state, worker.done) for worker in self._workers.values()]

    def _leave(self, *, drain: bool, reason: str, by: float) -> None:
        """``by``: when to go even if something still runs."""
        if not drain:
            self._end(reason)
            return
        self._leave_by = min(self._leave_by, by)
        if not self._leaving:
            self._leaving = reason
            self._uplink.send(Draining())

    def _depart(self, now: float) -> None:
        """When nothing is left to do, go as soon as the broker has the last results, or is not there to take them. What
        still runs when the time is up the broker gives to others: nobody is charged with it."""
        if now >= self._leave_by:
            self._end(f"{self._leaving}; {len(self._held)} tasks are run elsewhere")
            return
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
            self._queue.remove(held.task, held.options.rank)
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


def _outcome_bytes(outcome: Outcome) -> int:
    return wire_bytes(outcome.value) + 60


def _attempt_bytes(attempt: Attempt) -> int:
    return len(attempt.task) + 20


def _death_bytes(death: Death) -> int:
    return 4 * (len(death.how) + len(death.remains.stack) + len(death.remains.stderr)) + 100  # 4: what a character may take


def _stopped_bytes(stopped: Stopped) -> int:
    return 4 * len(stopped.text) + 60


def _has_nothing_else(worker: Worker) -> bool:
    """Nothing lies in its pipe behind the task it runs, if it runs one: what its ending waits for."""
    return len(worker.runs) <= 1 and not worker.taking_back


def _is_plain(demand: tuple[tuple[str, float], ...]) -> bool:
    """One CPU at most, and nothing else: the usual task, which any slot can run."""
    return len(demand) == 1 and demand[0][0] == "cpu" and demand[0][1] <= 1
