"""The scheduler: the broker's truth about tasks and nodes, and the only place that decides.

Contract
--------
* ``handle(event, now) -> list[Action]`` is the only way in and the only way out; ``next_deadline()`` says when the shell
  must call again with ``Tick`` if nothing comes in before. ``now`` is a monotonic clock in seconds. No clock, no I/O, no
  global randomness here: same events, same actions.
* Events other than ``Tick`` are taken in; ``Tick`` acts on all of them together. The shell hands over what has arrived,
  then ticks: under load, batches form by themselves, and a lone task still goes out at once.
* No message of any peer raises. What is out of place is counted by reason in ``counts`` and dropped.

What becomes of a task is in ``tasks.py``, of a node in ``nodes.py``; which task goes where in ``placement.py``; how
messages survive a broken connection in ``link.py`` and ``sessions.py``.

Answers
-------
An outcome that names the current attempt of its task decides it. One that does not is a *zombie*: from a node that was
given up and its task placed anew. A zombie's value is as good as any and is accepted if the task is still open (first
result wins); a zombie's error is not, for the newer attempt may succeed. Both are counted.

After a crash
-------------
With a journal (``ledger.py``) nothing is acknowledged and no answer given before it is on disk, and ``restore`` plays the
journal again. A node that joins says what it still runs; what of that is open and not placed elsewhere is *adopted*: that
attempt counts. So a broker that follows a crashed one places nothing before the nodes it knew are back, or
``settle_s`` have passed. A task with ``requeue=False`` that may have been started waits longer for its node, then fails.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from random import Random

from ..config import BEAT_INTERVAL_S, CLIENT_LEASE_S, KEEP_RESULTS_S, PING_GRACE_S, SUSPECT_AFTER_BEATS
from ..protocol import (
    MAX_ITEMS,
    Adopt,
    Attempt,
    Beat,
    Cancel,
    Charged,
    ClientHello,
    Death,
    Dispatch,
    Drain,
    Draining,
    Envelope,
    Fact,
    Final,
    Finals,
    Follow,
    Forgotten,
    Function,
    Functions,
    Goodbye,
    GroupAdd,
    GroupDone,
    GroupForget,
    GroupWait,
    Hold,
    JobTasks,
    Left,
    Message,
    NeedFunctions,
    No,
    NodeHello,
    NodeReport,
    Notice,
    Order,
    Outcome,
    Present,
    Progress,
    Query,
    Record,
    RecordMessage,
    Report,
    Results,
    Revoke,
    Running,
    SayHello,
    Shape,
    Shutdown,
    StillOpen,
    Stop,
    Stopped,
    Submit,
    TaskSpec,
    Unknown,
    Welcome,
    Workers,
    batches,
    clipped,
    wire_bytes,
)  # fmt: skip
from .certificate import certificate, entry
from .events import (
    Arrived,
    BeatArrived,
    Leave,
    Log,
    Malformed,
    Publish,
    Quit,
    SchedulerAction,
    SchedulerEvent,
    Send,
    Shrunk,
    Tick,
    Troubled,
    Undelivered,
    Written,
)  # fmt: skip
from .functions import CAP_BYTES, FunctionStore
from .groups import Answer, Groups, Waiter
from .ledger import Answered, Consequence, Counted, Ledger, Placed, final_bytes
from .load import FUNCTIONS_SHARE, Load, answer_bytes, call_bytes
from .nodes import ALIVE, DRAINING, GONE, LOST, SUSPECT, Node
from .offences import Offences
from .owners import Owner, Owners
from .placement import Placement
from .policy import DEFAULT_POLICY, POLICIES
from .sessions import Session, Sessions
from .tasks import ASSIGNED, DELAYED, FINISHED, QUEUED, RUNNING, WAITING, Kind, Task
from .timers import Timers

MAX_NODE_FUNCTIONS = 4_096  # digests remembered as sent to a node; past it, functions are sent again
PARTING_S = 2.0  # how long a shutdown waits for goodbyes
FORMER_NODES = 32  # lost and departed nodes kept for reports
MAX_BACKOFF_S = 60.0  # the longest wait before a retry
MAX_COUNTED = 10_000  # processes whose last addition to a WaitGroup is remembered


@dataclass(frozen=True)
class Settings:
    """``python`` is the "major.minor" that clients and nodes must share: functions by value are bytecode.

    A task that no node can ever hold fails after ``unservable_after_s``; a node lost less than ``await_lost_s`` ago counts
    as one that may be back. ``journal``: the shell keeps one. ``settle_s``: how long a broker that follows a crashed one
    waits for nodes before it places anything. Above ``max_queued_bytes`` of payloads clients are asked to hold back
    (``load.py``).
    """

    name: str = "cluster"
    epoch: int = 1
    python: str = "3.11"
    policy: str = DEFAULT_POLICY
    beat_interval_s: float = BEAT_INTERVAL_S
    suspect_after_s: float = BEAT_INTERVAL_S * SUSPECT_AFTER_BEATS
    ping_grace_s: float = PING_GRACE_S
    client_lease_s: float = CLIENT_LEASE_S
    unservable_after_s: float = 3.0
    await_lost_s: float = 60.0
    max_deaths: int = 3
    journal: bool = False
    keep_results_s: float = KEEP_RESULTS_S
    settle_s: float = 0.0
    max_queued_bytes: int = 1 << 30


class Scheduler:
    def __init__(self, settings: Settings, random: Random) -> None:
        self.settings = settings
        self.counts: Counter[str] = Counter()
        self._offences = Offences(self.counts)
        self._random = random
        self._ledger = Ledger() if settings.journal else None
        self._sessions = Sessions(random, cautious=settings.journal)
        self._owners = Owners()
        self._placement = Placement(POLICIES[settings.policy](), random)
        self._functions_cap = min(CAP_BYTES, settings.max_queued_bytes // FUNCTIONS_SHARE)
        self._functions = FunctionStore(self._functions_cap)
        self._load = Load(settings.max_queued_bytes)
        self._groups = Groups()
        self._tasks: dict[bytes, Task] = {}
        self._most_tasks = 0  # since the table of tasks was last made anew
        self._waiting: dict[bytes, dict[bytes, Task]] = {}  # by the digest of the function they wait for
        self._waiting_since: dict[bytes, float] = {}  # as each round has found it
        self._delayed: Timers[bytes] = Timers()  # when to queue a task again that failed
        self._nodes: dict[str, Node] = {}
        self._by_incarnation: dict[bytes, Node] = {}
        self._former: list[Node] = []
        # By task: attempts that nodes run and nobody wants so far, and since when they are known.
        self._offers: dict[bytes, tuple[str, int, float]] = {}
        self._expected: set[bytes] | None = None  # incarnations of the nodes that the crashed broker had, if known
        self._settled_at = 0.0 if not settings.settle_s else math.inf
        self._may_start: list[Placed] = []  # what may be started only once, and that is on disk now
        self._limbo: dict[bytes, Task] = {}  # may have been started, before a crash, and must not be again
        self._counted: OrderedDict[bytes, int] = OrderedDict()  # the last addition to a WaitGroup, by incarnation
        self._watch: Timers[str] = Timers()  # when to look at a node again, by id
        self._node_numbers = 0
        self._seq = 0
        self._last_tick: float | None = None
        self._next_round = 0.0
        self._end_at = math.inf
        self._end_why = ""
        self._now = 0.0
        self._out: list[SchedulerAction] = []

    # --- the contract ----------------------------------------------------------------------------------------------

    def handle(self, event: SchedulerEvent, now: float) -> list[SchedulerAction]:
        self._now = now
        match event:
            case Arrived(peer, user, envelope):
                self._arrived(peer, user, envelope, now)
            case Tick():
                self._tick(now)
            case BeatArrived(beat):
                self._beat(beat, now)
            case Malformed():
                self._malformed(event, now)
            case Undelivered(_, reason):
                self.counts[f"send refused: {reason}"] += 1
            case Written(number, size):
                assert self._ledger is not None, "a journal nobody asked for"
                self._release(*self._ledger.written(number, size), now)
            case Troubled(reason):
                self._troubled(reason)
            case Leave(_, reason):
                self._shut_down(reason, now)
        out, self._out = self._out, []
        return out

    def next_deadline(self) -> float:
        at = min(self._next_round, self._end_at)
        if self._placement.pending and not self._load.unread:
            at = min(at, self._settled_at)
        for other in (self._sessions.deadline(), self._watch.next(), self._delayed.next()):
            if other is not None and other < at:
                at = other
        return at

    def sanity_check(self) -> None:
        """Raise AssertionError if any two facts disagree."""
        self._sessions.sanity_check()
        self._placement.sanity_check()
        self._groups.sanity_check()
        self._check_load()
        kinds: Counter[Shape] = Counter()
        for task in self._tasks.values():
            kinds[task.kind.shape] += 1
            held = task.state in (ASSIGNED, RUNNING)
            assert task.state is not FINISHED, f"{task} is finished and kept"
            assert held == bool(task.node), f"{task}: state and node disagree"
            assert not held or self._nodes[task.node].tasks.get(task.id) is task, f"{task} is not at its node"
            waits = task.id in self._waiting.get(task.kind.shape.function, {})
            assert (waits or task.id in self._limbo) == (task.state is WAITING), f"{task}: waits for a function or not"
            assert (task.id in self._delayed) == (task.state is DELAYED), f"{task}: waits for its retry or not"
            assert task.state not in (QUEUED, DELAYED) or not task.cancelled, f"{task} is cancelled and queued"
        delayed = sum(task.state is DELAYED for task in self._tasks.values())
        assert len(self._delayed) == delayed, "a retry of no task is waited for"
        open_: dict[int, set[bytes]] = {}
        for task in self._tasks.values():
            open_.setdefault(id(task.owner), set()).add(task.id)
        for owner in self._owners:
            its = open_.get(id(owner), set())
            assert owner.open == len(its), f"{owner.id!r}: the count of its open tasks is off"
            assert not owner.answers.keys() & its, "a task is answered and open"
            assert self._ledger is not None or not owner.unwritten, "an answer waits for a journal that is not there"
        assert all(kind == kinds[shape] for shape, kind in self._placement.open_kinds().items()), "a kind's count is off"
        assert self._functions.held() == Counter(shape.function for shape in kinds), "functions held for nobody"
        for node in self._nodes.values():
            assert node.state in (ALIVE, SUSPECT, DRAINING), f"{node.id} is {node.state} and kept"
            for name in node.used:
                used = sum(dict(task.kind.options.resources).get(name, 0.0) for task in node.tasks.values())
                assert abs(node.used[name] - used) < 1e-6, f"{node.id}: {name} in use is off"
        if not self._placement.pending:
            self._placement.check_nothing_waits()

    def _check_load(self) -> None:
        assert self._load.tasks == sum(call_bytes(task.call) for task in self._tasks.values()), "bytes of tasks are off"
        assert self._load.answers == self._kept_for_clients(), "bytes of answers are off"

    def _kept_for_clients(self) -> int:
        """Bytes of the answers that clients have not acknowledged."""
        clients = [owner for owner in self._owners if not owner.job]
        return sum(answer_bytes(final) for each in clients for final in (*each.answers.values(), *each.unwritten.values()))

    def open_counts(self) -> Counter[str]:
        """What is held at this moment, by sort; empty when all is answered."""
        counts = Counter(task.state.name for task in self._tasks.values())
        counts["groups"] = len(self._groups)
        counts["kinds"] = sum(1 for number in self._placement.open_kinds().values() if number)
        counts["at nodes"] = sum(node.assigned for node in self._nodes.values())
        counts["bytes of tasks"] = self._load.tasks
        return +counts

    def unacknowledged(self) -> int:
        """Answers that clients have not acknowledged."""
        return sum(len(owner.answers) + len(owner.unwritten) for owner in self._owners if not owner.job)

    # --- events ----------------------------------------------------------------------------------------------------

    def _arrived(self, peer: bytes, user: str, envelope: Envelope, now: float) -> None:
        session = self._sessions.get(envelope.session)
        if session is None or session.user != user:
            body = envelope.body
            if isinstance(body, ClientHello | NodeHello):
                self._hello(peer, user, body, now)
            elif not isinstance(body, SayHello):
                self.counts["unknown session"] += 1
                self._out.append(Send(peer, Envelope(envelope.session, 0, 0, SayHello())))
            return
        message = self._sessions.receive(session, peer, envelope, now)
        if session.link.delivered:
            self._delivered(session)
        if self._ledger is not None:
            self._ledger.received(session.token, session.link.received)
        if session.node:
            self._heard(self._nodes[session.node], now)
        if message is not None:
            self._message(session, message, now)

    def _message(self, session: Session, message: Message, now: float) -> None:
        if isinstance(message, GroupAdd):  # from anybody: tasks count too
            self._add_to_groups(session.incarnation, message)
        elif session.node:
            self._from_node(self._nodes[session.node], message, now)
        else:
            self._from_client(session, message, now)

    def _from_client(self, session: Session, message: Message, now: float) -> None:
        match message:
            case Submit():
                self._submit(session, message)
            case Functions(functions):
                self._learn(functions)
            case Cancel(tasks, force):
                for task_id in tasks:
                    self._cancel(session, task_id, force=force)
            case GroupWait(request, group):
                self._answer(self._groups.wait(group, Waiter(session.token, request)))
            case GroupForget(request):
                self._groups.forget(session.token, request)
            case Query(request):
                self._sessions.send(session, self._report(request, now))
            case StillOpen(tasks):
                self._still_open(session, tasks)
            case Follow(request, job):
                self._follow(session, request, job)
            case Drain(node_id):
                self._drain(session, node_id)
            case Shutdown():
                self._shut_down("a client asked for it", now)
            case Goodbye():
                self._client_gone(session, "left", force=False)
            case _:
                self._misplaced(session, message)

    def _add_to_groups(self, incarnation: bytes, message: GroupAdd) -> None:
        if message.number and message.number <= self._counted.get(incarnation, 0):
            self.counts["additions offered again"] += 1
            return
        if message.number:
            self._counted[incarnation] = message.number
            self._counted.move_to_end(incarnation)
            if len(self._counted) > MAX_COUNTED:
                self._counted.popitem(last=False)
        self._record(incarnation, message)
        for group, delta in message.deltas:
            self._answer(self._groups.add(group, delta))

    def _from_node(self, node: Node, message: Message, now: float) -> None:
        match message:
            case Results(outcomes):
                self._results(node, outcomes, now)
            case Progress():
                self._progress(node, message, now)
            case Workers(workers):
                node.workers = workers
                self._is_back(node, now)
            case NeedFunctions(digests):
                known = [Function(d, self._functions[d]) for d in digests if d in self._functions]
                for batch in batches(known, _function_bytes):
                    self._sessions.send(self._session_of(node), Functions(batch))
            case Draining():
                self._start_draining(node)
            case Goodbye(reason):
                self._node_ends(node, left=True, why=reason or "left")
            case _:
                self._misplaced(self._session_of(node), message)

    def _misplaced(self, session: Session, message: Message) -> None:
        role = "node" if session.node else "client"
        who = f"{role} {session.where.host} pid {session.where.pid}"
        self._offences.note(f"{type(message).__name__} from a {role}", who)

    def _malformed(self, event: Malformed, now: float) -> None:
        self._offences.note(event.reason, event.sender)
        if event.answer is None or (event.answer.code == "malformed" and not self._offences.strike(event.peer, now)):
            return
        for session in [session for session in self._sessions if session.peer == event.peer]:
            why = f"cannot be understood: {event.answer.text}"
            if session.node:
                self._node_ends(self._nodes[session.node], left=False, why=why)
            else:
                self._client_gone(session, why, force=True)
        self._out.append(Send(event.peer, Envelope(0, 0, 0, event.answer)))

    def _beat(self, beat: Beat, now: float) -> None:
        node = self._by_incarnation.get(beat.incarnation)
        if node is None or beat.number <= node.beat:
            self.counts["beats of nobody or out of order"] += 1
            return
        node.beat = beat.number
        # Which workers there are, the work channel says, in order. A beat may be older, or newer: it says how they are.
        now_so = {(state.worker, state.pid): state for state in beat.workers}
        node.workers = [now_so.get((state.worker, state.pid), state) for state in node.workers]
        self._heard(node, now)

    def _tick(self, now: float) -> None:
        self._forgive_own_absence(now)
        if (at := self._watch.next()) is not None and at <= now:
            for node_id in self._watch.due(now):
                self._examine(self._nodes[node_id], now)
        if (at := self._delayed.next()) is not None and at <= now:
            for task_id in self._delayed.due(now):
                self._requeue(self._tasks[task_id])
        begins_round = now >= self._next_round
        if begins_round:
            self._next_round = now + self.settings.beat_interval_s
            self._expire_clients(now)
            self._expire_limbo(now)
            self._expire_waiting(now)
            self._expire_offers(now)
            self._fail_hopeless(now)
            self._placement.reserve(now)
            self._publish_counts()
            if line := self._offences.line(now):
                self._out.append(Log("warning", line))
            self._shrink()
        ends = self._end_at < math.inf and (now >= self._end_at or self._sessions.empty)
        if ends:  # what clients wanted ends with the cluster, what jobs hold does not
            for owner in [owner for owner in self._owners if not owner.job]:
                self._owner_gone(owner, force=False)
        elif now >= self._settled_at:
            self._dispatch()
        elif self._settled_at == math.inf:  # the first moment of this broker
            self._settled_at = now + self.settings.settle_s
        self._push_back()
        if self._ledger is not None:
            self._start_once()
            self._commit(self._ledger, now, hurry=begins_round)
        self._flush(now)
        if ends:
            self._out.append(Quit(self._end_why))

    # --- hello and goodbye -------------------------------------------------------------------------------------------

    def _hello(self, peer: bytes, user: str, hello: ClientHello | NodeHello, now: float) -> None:
        if (no := self._objection(hello)) is not None:
            self.counts[f"refused: {no.code}"] += 1
            self._out.append(Log("warning", f"refused {hello.where.host} pid {hello.where.pid}: {no.text}"))
            self._out.append(Send(peer, Envelope(0, 0, 0, no)))
            return
        session = self._sessions.known(hello.incarnation)
        if session is not None and (hello.life < session.life or session.user != user):
            self.counts["stale hellos"] += 1
            return
        if session is not None and hello.life > session.life:
            if session.node:
                self._node_ends(self._nodes[session.node], left=False, why="began anew")
            else:
                self._close_session(session, now)
            session = None
        if session is None:
            session = self._sessions.open(hello, peer, user, now)
            if isinstance(hello, NodeHello):
                self._node_joins(session, hello, now)
            else:
                self._client_joins(session, now)
        session.heard_at = now
        if session.peer != peer:
            session.peer = peer
            session.link.reconnected()
        name = session.node or self.settings.name
        settings = self.settings
        welcome = Welcome(session.token, session.life, settings.epoch, name, settings.beat_interval_s, session.remembered)
        self._out.append(Send(peer, Envelope(session.token, 0, 0, welcome)))

    def _objection(self, hello: ClientHello | NodeHello) -> No | None:
        theirs = hello.where.python
        if ".".join(theirs.split(".")[:2]) == self.settings.python:
            return None
        what = "node" if isinstance(hello, NodeHello) else "client"
        return No(
            "python",
            f"this {what} runs Python {theirs}, the cluster Python {self.settings.python}: functions travel as bytecode, "
            f"which another minor version cannot run. Start the {what} with Python {self.settings.python}.",
        )

    def _client_joins(self, session: Session, now: float) -> None:
        """It is told what it has missed; what it submits again is known."""
        session.remembered = self._owners.find_client(session.incarnation) is not None
        owner = self._owners.client(session.incarnation, now)
        self._let_follow(session, owner)
        session.finals.extend(owner.answers.values())
        self._sessions.touch(session)
        if self._load.full:
            self._sessions.send(session, Hold(True))

    def _follow(self, session: Session, request: int, job: str) -> None:
        owner = self._owners.find_job(job)
        tasks: list[bytes] = []
        if owner is not None:
            mine = [task.id for task in self._tasks.values() if task.owner is owner]
            tasks = sorted([*mine, *owner.answers, *owner.unwritten])  # a client numbers its tasks in order
        starts = range(0, len(tasks), MAX_ITEMS)
        for start in starts or [0]:
            part = tasks[start : start + MAX_ITEMS]
            self._sessions.send(session, JobTasks(request, job, part, more=start + MAX_ITEMS < len(tasks)))
        if owner is not None:
            if session not in owner.sessions:
                self._let_follow(session, owner)
            session.finals.extend(owner.answers.values())

    def _let_follow(self, session: Session, owner: Owner) -> None:
        owner.sessions.append(session)
        session.follows.append(owner)

    def _close_session(self, session: Session, now: float) -> None:
        self._sessions.close(session)
        self._groups.forget(session.token)
        for owner in session.follows:
            owner.sessions.remove(session)
            owner.submitters.discard(session.token)
            if not owner.job:
                owner.quiet_since = now

    def _client_gone(self, session: Session, why: str, *, force: bool) -> None:
        """For good: nobody will ask for its tasks. What runs may end; with ``force`` it is ended. Those of jobs go on."""
        owner = session.follows[0]
        self._close_session(session, self._now)
        dropped = self._owner_gone(owner, force=force)
        who = f"client {session.where.host} pid {session.where.pid}"
        self._out.append(Log("info", f"{who} {why}: {dropped} tasks dropped"))

    def _owner_gone(self, owner: Owner, *, force: bool) -> int:
        self._owners.forget(owner)
        self._load.answers -= sum(map(answer_bytes, (*owner.answers.values(), *owner.unwritten.values())))
        if self._ledger is not None:
            self._ledger.leave(owner.id)
        mine = [task for task in self._tasks.values() if task.owner is owner]
        for task in mine:
            self._drop(task, "its client is gone", force=force)
        return len(mine)

    def _node_joins(self, session: Session, hello: NodeHello, now: float) -> None:
        self._node_numbers += 1
        node = Node(f"n{self._node_numbers}", session.token, hello, now)
        session.node = node.id
        self._nodes[node.id] = node
        self._by_incarnation[node.incarnation] = node
        self._placement.join(node)
        self._watch.set(node.id, now + self.settings.suspect_after_s)
        text = f"{hello.where.host} pid {hello.where.pid}, {hello.slots} slots"
        self._fact("joined", node, text)
        for attempt in hello.holding:
            self._offers[attempt.task] = (node.id, attempt.attempt, now)
            if (task := self._tasks.get(attempt.task)) is not None:
                self._adopt(task)
        self._record(b"", self._present())

    def _is_back(self, node: Node, now: float) -> None:
        """What it had to say of its last session it has said by now."""
        if self._expected is not None:
            self._expected.discard(node.incarnation)
            if not self._expected:
                self._settled_at = min(self._settled_at, now)

    def _present(self) -> Present:
        """The nodes that are there, and those still waited for."""
        awaited = self._expected if self._expected and self._now < self._settled_at else ()
        return Present(sorted({*self._by_incarnation, *awaited}))

    def _end_offer(self, node: Node, task_id: bytes, attempt: int) -> None:
        """The attempt came to its end before anybody wanted it."""
        if self._offers.get(task_id, ())[:2] == (node.id, attempt):
            del self._offers[task_id]

    def _adopt(self, task: Task) -> None:
        """A node runs this task already, for a session that is over: that attempt counts again, unless there is another."""
        node_id, attempt, _ = self._offers.pop(task.id)
        node = self._nodes[node_id]
        free = task.state is QUEUED or task.id in self._limbo
        if task.cancelled or not free or attempt < task.attempt or not node.fits(task.kind.options.resources):
            return
        if self._limbo.pop(task.id, None) is not None:
            task.move(QUEUED)
            self._placement.enqueue(task)
        self._placement.adopt(task, node, attempt)
        task.move(RUNNING)
        self.counts["adopted"] += 1
        self._sessions.send(self._session_of(node), Adopt([Attempt(task.id, attempt)]))
        self._tell_running(task)

    def _node_ends(self, node: Node, *, left: bool, why: str) -> None:
        """The node is gone or given up: it holds nothing any more, what it held is queued again."""
        node.move(GONE if left else LOST)
        del self._nodes[node.id]
        del self._by_incarnation[node.incarnation]
        self._watch.set(node.id, None)
        self._placement.leave(node)
        self._sessions.close(self._session_of(node))
        self._former = [*self._former, node][-FORMER_NODES:]
        self._offers = {task: offer for task, offer in self._offers.items() if offer[0] != node.id}
        self._record(b"", self._present())
        requeued = 0
        for task in reversed(list(node.tasks.values())):  # to the front of the queue, the first of them last
            self._let_go(task, node)
            if task.kind.options.requeue or task.cancelled:
                self._requeue(task)
                requeued += 1
            else:
                self._fail(task, f"node {node.id} ended while it held the task, and requeue=False forbids another try")
        self.counts["requeued: node gone" if left else "requeued: node lost"] += requeued
        self._fact("gone" if left else "lost", node, f"{why}; {requeued} tasks requeued")

    def _start_draining(self, node: Node) -> None:
        if node.state is not DRAINING:
            node.move(DRAINING)
            self._fact("draining", node, f"{node.assigned} tasks to finish")

    def _drain(self, session: Session, node_id: str) -> None:
        node = self._nodes.get(node_id)
        if node is None:
            there = ", ".join(self._nodes) or "none"
            self._sessions.send(session, Notice(clipped(f"there is no node {node_id!r}; nodes: {there}")))
            return
        self._start_draining(node)
        self._sessions.send(self._session_of(node), Stop(drain=True))

    def _shut_down(self, why: str, now: float) -> None:
        """Tell everybody, and end when all have said goodbye, or after a while."""
        self._end_at = min(self._end_at, now + PARTING_S)
        self._end_why = why
        for session in self._sessions:
            if session.node:
                self._sessions.send(session, Stop(drain=False))
            else:
                self._sessions.send(session, Goodbye("the cluster was shut down"))

    # --- tasks -----------------------------------------------------------------------------------------------------

    def _submit(self, session: Session, message: Submit) -> None:
        trouble = self._ledger.trouble if self._ledger is not None else ""
        self._learn([each for each in message.functions if not trouble or each.digest in self._waiting])
        kinds = [self._placement.kind(shape) for shape in message.shapes]
        owners = [self._owner(session, kind) for kind in kinds]
        missing = {shape.function for shape in message.shapes if shape.function not in self._functions}
        before = self._seq
        tasks = self._tasks
        new = []
        refused = []
        for spec in message.tasks:
            owner = owners[spec.shape]
            if spec.task in tasks or owner.has_answered(spec.task):
                self._submitted_again(spec.task, owner, session)
                continue
            if trouble:
                refused.append(spec.task)
                continue
            new.append(spec)
            task = self._accept(spec, kinds[spec.shape], owner, waits=message.shapes[spec.shape].function in missing)
            if spec.task in self._offers:
                self._adopt(task)
        self.counts["accepted"] += self._seq - before
        self._most_tasks = max(self._most_tasks, len(self._tasks))
        for kind in kinds:
            if not kind.open:
                self._placement.retire(kind)
        if missing and not trouble:
            self._sessions.send(session, NeedFunctions(sorted(missing)))
        if refused:
            self._refuse(session, refused, trouble)
        if new:
            self._record(session.follows[0].id, Submit(message.shapes, new))

    def _owner(self, session: Session, kind: Kind) -> Owner:
        if not kind.options.job:
            return session.follows[0]
        owner = self._owners.job(kind.options.job, self._now)
        self._join_job(session, owner)
        return owner

    def _join_job(self, session: Session, owner: Owner) -> None:
        """Of what was answered before it hears when it asks."""
        if session not in owner.sessions:
            self._let_follow(session, owner)
        owner.submitters.add(session.token)

    def _accept(self, spec: TaskSpec, kind: Kind, owner: Owner, *, waits: bool) -> Task:
        self._seq += 1
        task = self._tasks[spec.task] = Task(spec.task, owner, kind, spec.call, self._seq)
        self._load.tasks += call_bytes(spec.call)
        owner.open += 1
        if not kind.open:
            self._functions.hold(kind.shape.function)
        kind.open += 1
        if kind.options.group:
            self._answer(self._groups.add(kind.options.group, 1))
        if waits:
            self._waiting.setdefault(kind.shape.function, {})[task.id] = task
        else:
            task.move(QUEUED)
            self._placement.enqueue(task)
        return task

    def _still_open(self, session: Session, tasks: list[bytes]) -> None:
        """A client is back, or this broker follows another: what it waits for is here, or to be submitted again."""
        unknown = []
        for task_id in tasks:
            owner = self._owner_of(task_id, session.follows[0])
            if owner is None:
                unknown.append(task_id)
                continue
            if owner.job:
                self._join_job(session, owner)
            self._submitted_again(task_id, owner, session)
        waiting = [self._tasks[task].kind.shape.function for task in tasks if task in self._tasks]
        if missing := {function for function in waiting if function in self._waiting}:
            self._sessions.send(session, NeedFunctions(sorted(missing)))
        self._sessions.send(session, Unknown(unknown))

    def _owner_of(self, task_id: bytes, client: Owner) -> Owner | None:
        """Who is or was to be answered, if the task is known."""
        if (task := self._tasks.get(task_id)) is not None:
            return task.owner if self._owners.knows(task.owner) else client
        if client.has_answered(task_id):
            return client
        return next((owner for owner in self._owners if owner.job and owner.has_answered(task_id)), None)

    def _submitted_again(self, task_id: bytes, owner: Owner, session: Session) -> None:
        """A copy; or the client was given up while an attempt ran, is back, and wants the task after all; or a job's task
        was answered and this client has not heard of it."""
        self.counts["submitted again"] += 1
        task = self._tasks.get(task_id)
        if task is None:
            if owner.job and task_id in owner.answers:
                session.finals.append(owner.answers[task_id])
                self._sessions.touch(session)
        elif not self._owners.knows(task.owner):
            task.owner = owner
            owner.open += 1
            task.cancelled = False
            self._record(owner.id, Submit([task.kind.shape], [TaskSpec(task_id, 0, task.call)]))
            self._charge(task)

    def _refuse(self, session: Session, tasks: list[bytes], trouble: str) -> None:
        """What cannot be kept is not taken."""
        self.counts["not accepted: no journal"] += len(tasks)
        text = f"the broker cannot keep new tasks: {trouble}. Submit again when it can; what was accepted is not lost"
        session.finals.extend(Final(task, "NotAccepted", text=text) for task in tasks)
        self._sessions.touch(session)

    def _learn(self, functions: list[Function]) -> None:
        for function in functions:
            if function.digest not in self._functions:
                self._functions.add(function.digest, function.blob)
                self._record(b"", Functions([function]))
            for task in self._waiting.pop(function.digest, {}).values():
                task.move(QUEUED)
                self._placement.enqueue(task)

    def _results(self, node: Node, outcomes: list[Outcome], now: float) -> None:
        for outcome in outcomes:
            task = self._tasks.get(outcome.task)
            current = task is not None and task.node == node.id and task.attempt == outcome.attempt
            self._offers.pop(outcome.task, None)
            current = current or outcome.task in self._limbo
            if not current:
                self.counts["zombie results"] += 1
            if task is None or not (current or outcome.ok):
                continue
            if outcome.ok:
                if not current and task.node:  # a newer attempt elsewhere is no longer wanted
                    self._call_back(task, force=False)
                self._finish(task, Final(task.id, "ok", outcome.value))
                node.done += 1
            elif outcome.retry and task.failures < task.kind.options.retries and not task.cancelled:
                task.failures += 1
                self.counts["retried"] += 1
                if self._limbo.pop(task.id, None) is None:
                    self._let_go(task, node)
                self._charge(task)
                self._retry(task, now)
            else:
                self._finish(task, Final(task.id, "error", outcome.value))
                node.done += 1

    def _retry(self, task: Task, now: float) -> None:
        """Exponential back-off with jitter, so that what failed together does not come back together."""
        if not task.kind.options.backoff:
            self._requeue(task)
            return
        wait_s = min(MAX_BACKOFF_S, task.kind.options.backoff * 2.0 ** min(task.failures - 1, 60))
        task.move(DELAYED)
        self._delayed.set(task.id, now + wait_s * self._random.uniform(0.5, 1.0))

    def _progress(self, node: Node, message: Progress, now: float) -> None:
        if message.credit != node.credit:
            node.credit = message.credit
            node.version += 1
            self._placement.changed(node)
        for attempt in message.started:
            task = self._current(node, attempt)
            if task is not None and task.state is ASSIGNED:
                task.move(RUNNING)
                self._tell_running(task)
        for attempt in reversed(message.returned):
            task = self._current(node, attempt)
            if task is not None:
                self._let_go(task, node)
                if not task.kind.options.requeue:
                    self._charge(task)
                self._requeue(task)
        for death in message.deaths:
            self._death(node, death, now)
        for stopped in message.stopped:
            self._stopped(node, stopped)

    def _stopped(self, node: Node, stopped: Stopped) -> None:
        self._end_offer(node, stopped.task, stopped.attempt)
        task = self._limbo.get(stopped.task) or self._current(node, Attempt(stopped.task, stopped.attempt))
        if task is None:
            return
        self.counts["stopped"] += 1
        if task.cancelled or stopped.verdict == "TaskTimeout":
            self._finish(task, Final(task.id, "cancelled" if task.cancelled else stopped.verdict, text=stopped.text))
            return
        # It was cancelled for its client's absence, and the client is back.
        if task.node:
            self._let_go(task, node)
        if task.kind.options.requeue:
            self._requeue(task)
        else:
            self._fail(task, "it was stopped while its client seemed gone, and requeue=False forbids another try")

    def _death(self, node: Node, death: Death, now: float) -> None:
        self.counts["worker deaths"] += 1
        self._fact("worker died", node, f"worker {death.worker} pid {death.pid}: {death.how}")
        self._end_offer(node, death.task, death.attempt)
        task = self._current(node, Attempt(death.task, death.attempt)) if death.task else None
        if task is None:
            return
        self._let_go(task, node)
        after_first_s = None if task.died_at is None else now - task.died_at
        task.died_at = now if task.died_at is None else task.died_at
        where = f"{node.id}/{death.worker} on {node.where.host}"
        task.deaths += (entry(death, where, after_first_s, task.deaths),)
        self._charge(task)
        if not task.kind.options.requeue:
            self._fail(task, "its worker died, and requeue=False forbids another try")
        elif len(task.deaths) >= self.settings.max_deaths:
            self._fail(task, f"{len(task.deaths)} workers died running it")
        else:
            self.counts["requeued: worker died"] += 1
            self._requeue(task)

    def _current(self, node: Node, attempt: Attempt) -> Task | None:
        task = self._tasks.get(attempt.task)
        if task is not None and task.node == node.id and task.attempt == attempt.attempt:
            return task
        self.counts["late reports"] += 1
        return None

    def _cancel(self, session: Session, task_id: bytes, *, force: bool) -> None:
        task = self._tasks.get(task_id)
        if task is not None and (task.owner.job or session in task.owner.sessions):  # a job is everybody's
            self._drop(task, "cancelled", force=force)

    def _drop(self, task: Task, why: str, *, force: bool = False) -> None:
        """Cancel what has not started. An attempt at a node is called back: the node hands it back, or its answer comes;
        with ``force`` the node ends it if it runs."""
        if task.state in (WAITING, QUEUED, DELAYED):
            self._finish(task, Final(task.id, "cancelled", text=why))
        elif force or not task.cancelled:
            task.cancelled = True
            self._call_back(task, force=force)

    def _call_back(self, task: Task, *, force: bool) -> None:
        session = self._session_of(self._nodes[task.node])
        self._sessions.send(session, Revoke([Attempt(task.id, task.attempt)], force))

    def _let_go(self, task: Task, node: Node) -> None:
        """The attempt at this node is over, the task is not."""
        node.drop(task)
        task.node = ""
        self._placement.changed(node)

    def _requeue(self, task: Task) -> None:
        task.move(QUEUED)
        self._placement.enqueue(task, first=True)
        if task.cancelled:
            self._finish(task, Final(task.id, "cancelled", text="cancelled before it started"))

    def _fail(self, task: Task, why: str) -> None:
        label = task.kind.shape.label
        name = task.kind.options.name or label or f"task {task.id.hex()[-8:]}"
        self._finish(task, Final(task.id, "WorkerDied", text=certificate(f"{name} failed: {why}", label, task.deaths)))

    def _finish(self, task: Task, final: Final) -> None:
        self._close(task)
        self.counts[final.verdict] += 1
        if self._owners.knows(task.owner):
            self._keep(task.owner, final)
        if task.kind.options.group:
            self._answer(self._groups.add(task.kind.options.group, -1))

    def _close(self, task: Task) -> None:
        """The record of the task is over."""
        kind = task.kind
        if task.node:
            node = self._nodes[task.node]
            self._let_go(task, node)
        elif task.state is QUEUED:
            self._placement.withdraw(task)
        elif task.state is WAITING:
            self._stop_waiting(task)
        elif task.state is DELAYED:
            self._delayed.set(task.id, None)
        task.move(FINISHED)
        del self._tasks[task.id]
        self._load.tasks -= call_bytes(task.call)
        kind.open -= 1
        if not kind.open:
            self._functions.release(kind.shape.function)
            self._placement.retire(kind)
        task.owner.open -= 1
        if not task.owner.open:
            task.owner.quiet_since = self._now

    def _keep(self, owner: Owner, final: Final) -> None:
        if not owner.job:
            self._load.answers += answer_bytes(final)
        if self._ledger is not None:
            owner.unwritten[final.task] = final
            self._ledger.answer(owner.id, final)
        else:
            self._tell(owner, final)

    def _tell(self, owner: Owner, final: Final) -> None:
        """The answer is as safe as it will be; it is kept until it is acknowledged."""
        owner.answers[final.task] = final
        for session in owner.sessions:
            session.finals.append(final)
            self._sessions.touch(session)

    def _delivered(self, session: Session) -> None:
        """Answers were acknowledged. Those of a job are kept for others."""
        owner = session.follows[0]
        messages = [message for message in session.link.delivered if isinstance(message, Finals)]
        for final in itertools.chain.from_iterable(message.finals for message in messages):
            if owner.answers.pop(final.task, None) is not None:
                self._load.answers -= answer_bytes(final)
                if self._ledger is not None:
                    self._ledger.forget(final.task)
        session.link.delivered.clear()

    def _stop_waiting(self, task: Task) -> None:
        if self._limbo.pop(task.id, None) is not None:
            return
        waiting = self._waiting[task.kind.shape.function]
        del waiting[task.id]
        if not waiting:
            del self._waiting[task.kind.shape.function]

    def _tell_running(self, task: Task) -> None:
        for session in task.owner.sessions:
            session.running.append(task.id)
            self._sessions.touch(session)

    def _answer(self, answers: list[Answer]) -> None:
        for waiter, error in answers:
            if self._ledger is not None:
                self._ledger.then(Counted(waiter, error))
            else:
                self._end_wait(waiter, error)

    def _end_wait(self, waiter: Waiter, error: str) -> None:
        session = self._sessions.get(waiter.owner) if isinstance(waiter.owner, int) else None
        if session is not None:
            # The finals that brought the counter to zero must not arrive behind the news that it is zero.
            self._post(session)
            self._sessions.send(session, GroupDone(waiter.request, error))

    # --- the journal -----------------------------------------------------------------------------------------------

    def _record(self, owner: bytes, body: RecordMessage) -> None:
        if self._ledger is not None:
            self._ledger.record(owner, body)

    def _charge(self, task: Task) -> None:
        self._record(b"", self._charged(task))

    def _charged(self, task: Task) -> Charged:
        once = not task.kind.options.requeue and (task.node or task.id in self._limbo)
        return Charged(task.id, task.attempt if once else 0, task.failures, task.deaths)

    def _commit(self, ledger: Ledger, now: float, *, hurry: bool) -> None:
        """End the turn: what follows from it waits for the journal."""
        if (write := ledger.commit(hurry=hurry)) is not None:
            self._out.append(write)
        if ledger.has_outgrown(idle=self.keeps_nothing):
            self._out.append(ledger.replace(self._snapshot()))
        self._release(*ledger.due(), now)

    def _release(self, received: dict[int, int], consequences: list[Consequence], now: float) -> None:
        for token, number in received.items():
            if (session := self._sessions.get(token)) is not None:
                session.link.secure(number, now)
                self._sessions.touch(session)
        for consequence in consequences:
            match consequence:
                case Answered(owner_id, final):
                    owner = self._owners.get(owner_id)
                    if owner is not None and owner.unwritten.pop(final.task, None) is not None:
                        self._tell(owner, final)
                case Counted(waiter, error):
                    self._end_wait(waiter, error)
                case Placed():
                    self._may_start.append(consequence)

    def _start_once(self) -> None:
        """That these tasks are started is on disk: now they may be, if they still are to be."""
        placed, self._may_start = self._may_start, []
        for node_id, attempts in placed:
            self._send_once(node_id, attempts)

    def _send_once(self, node_id: str, attempts: list[Attempt]) -> None:
        wanted = []
        for task_id, number in [(attempt.task, attempt.attempt) for attempt in attempts]:
            task = self._tasks.get(task_id)
            if task is None or task.node != node_id or task.attempt != number:
                continue
            if task.cancelled or self._nodes[node_id].state is not ALIVE:
                self._let_go(task, self._nodes[node_id])
                self._charge(task)
                self._requeue(task)
            else:
                wanted.append(task)
        if wanted:
            self._send_orders(self._nodes[node_id], wanted)

    def _troubled(self, reason: str) -> None:
        assert self._ledger is not None, "a journal nobody asked for"
        if not self._ledger.trouble:
            self._out.append(Log("error", reason))
            for session in self._sessions:
                if not session.node:
                    self._sessions.send(session, Notice(f"{reason}. Nothing is lost; answers wait until it can be written"))
        self._ledger.trouble = reason

    @property
    def keeps_nothing(self) -> bool:
        """No task that anybody wants is open, and no answer kept: a journal of this state is empty."""
        return not any(owner.open or owner.answers or owner.unwritten for owner in self._owners)

    def _snapshot(self) -> list[Record]:
        """Records that ``restore`` makes the present state of."""
        records = [Record(b"", Functions([Function(digest, blob)])) for digest, blob in self._functions.items()]
        records += [Record(b"", GroupAdd([(group, -1)])) for group in self._groups.broken()]
        for owner in self._owners:  # one that has nothing here is remembered too
            answers = [*owner.answers.values(), *owner.unwritten.values()]
            records += [Record(owner.id, Finals(some)) for some in [[], *batches(answers, final_bytes)]]
        tasks = [task for task in self._tasks.values() if self._owners.knows(task.owner)]
        for batch in batches(tasks, _task_bytes):
            records += _submissions(batch)
        charges = [(task, self._charged(task)) for task in tasks]
        records += [Record(b"", charge) for task, charge in charges if charge.attempt or task.failures or task.deaths]
        by_hand = Counter(self._groups.counts())
        by_hand.subtract(task.kind.options.group for task in self._tasks.values() if task.kind.options.group)
        deltas = [(group, count) for group, count in by_hand.items() if count]
        records += [Record(b"", GroupAdd(some)) for some in batches(deltas, _delta_bytes)]
        records += [Record(incarnation, GroupAdd([], number)) for incarnation, number in self._counted.items()]
        records.append(Record(b"", self._present()))
        return records

    def restore(self, records: Iterable[Record], now: float) -> None:
        """Play a journal; before the first event.

        What it cannot know is learned from the peers: nodes say what they run, clients ask again for what they wait for.
        """
        ledger, self._ledger = self._ledger, None  # what is played is written already
        assert ledger is not None, "a journal nobody asked for"
        self._now = now
        self._functions.limit(math.inf)  # who would send again what no longer has room?
        once: set[bytes] = set()
        for record in records:
            self._replay(record.owner, record.body, once)
        for task_id in once & self._tasks.keys():
            task = self._tasks[task_id]
            if task.state is QUEUED:
                self._placement.withdraw(task)
                task.state = WAITING
                self._limbo[task_id] = task
        self._expected = self._expected or set()
        if not self._expected:
            self._settled_at = min(self._settled_at, now)
        self._functions.limit(self._functions_cap)
        self._load.answers = self._kept_for_clients()
        self._ledger = ledger
        self._out.append(Log("info", f"journal: {len(self._tasks)} unfinished tasks, {len(self._expected)} nodes expected"))

    def _replay(self, owner_id: bytes, body: RecordMessage, once: set[bytes]) -> None:
        match body:
            case Functions(functions):
                self._learn(functions)
            case Submit():
                self._resubmit(owner_id, body)
            case Finals(finals):
                owner = self._owners.written(owner_id, self._now)
                for final in finals:
                    self._forget_task(final.task)
                    owner.answers[final.task] = final
            case Forgotten(tasks):
                for task_id in tasks:
                    self._forget_task(task_id)
                for owner in self._owners:
                    for task_id in tasks:
                        owner.answers.pop(task_id, None)
            case Left():
                if (gone := self._owners.get(owner_id)) is not None:
                    self._owners.forget(gone)
                    for task in [task for task in self._tasks.values() if task.owner is gone]:
                        self._forget_task(task.id)
            case GroupAdd():
                self._add_to_groups(owner_id, body)
            case Charged(task_id, attempt, failures, deaths):
                if (charged := self._tasks.get(task_id)) is not None:
                    charged.attempt, charged.failures, charged.deaths = attempt, failures, deaths
                    (once.add if attempt else once.discard)(task_id)
            case Present(nodes):
                self._expected = set(nodes)

    def _resubmit(self, owner_id: bytes, message: Submit) -> None:
        kinds = [self._placement.kind(shape) for shape in message.shapes]
        sender = self._owners.written(owner_id, self._now)
        for spec in message.tasks:
            kind = kinds[spec.shape]
            job = kind.options.job
            owner = self._owners.job(job, self._now) if job else sender
            if spec.task not in self._tasks and not owner.has_answered(spec.task):
                self._accept(spec, kind, owner, waits=kind.shape.function not in self._functions)
        for kind in kinds:
            if not kind.open:
                self._placement.retire(kind)
        self._most_tasks = max(self._most_tasks, len(self._tasks))

    def _forget_task(self, task_id: bytes) -> None:
        task = self._tasks.get(task_id)
        if task is not None:
            self._close(task)
            if task.kind.options.group:
                self._answer(self._groups.add(task.kind.options.group, -1))

    # --- acting ----------------------------------------------------------------------------------------------------

    def _dispatch(self) -> None:
        if not self._placement.pending or self._load.unread:
            return
        orders: dict[str, list[Task]] = {}
        for task, node in self._placement.place():
            orders.setdefault(node.id, []).append(task)
        for node_id, tasks in orders.items():
            node = self._nodes[node_id]
            if len(node.functions) > MAX_NODE_FUNCTIONS:
                node.functions.clear()
            self._send_orders(node, tasks if self._ledger is None else self._dispatch_once(self._ledger, node, tasks))

    def _dispatch_once(self, ledger: Ledger, node: Node, tasks: list[Task]) -> list[Task]:
        """What may be started only once is, when that is on disk. Returns the others."""
        once = [task for task in tasks if not task.kind.options.requeue]
        for task in once:
            self._charge(task)
        if once:
            ledger.then(Placed(node.id, [Attempt(task.id, task.attempt) for task in once]))
        return [task for task in tasks if task.kind.options.requeue]

    def _send_orders(self, node: Node, tasks: list[Task]) -> None:
        for batch in batches(tasks, self._sizes_at(node)):
            self._sessions.send(self._session_of(node), self._dispatch_message(node, batch))

    def _sizes_at(self, node: Node) -> Callable[[Task], int]:
        """What each task takes in a dispatch to this node: with its function, the first time that is named there."""
        named: set[bytes] = set()

        def size(task: Task) -> int:
            digest = task.kind.shape.function
            taken = _task_bytes(task)
            if digest not in node.functions and digest not in named:
                named.add(digest)
                taken += wire_bytes(self._functions[digest])
            return taken

        return size

    def _dispatch_message(self, node: Node, tasks: list[Task]) -> Dispatch:
        index: dict[Shape, int] = {}
        orders = [
            Order(task.id, task.attempt, index.setdefault(task.kind.shape, len(index)), task.call) for task in tasks
        ]
        new = {shape.function for shape in index} - node.functions
        node.functions |= new
        return Dispatch(list(index), orders, [Function(digest, self._functions[digest]) for digest in sorted(new)])

    def _flush(self, now: float) -> None:
        for session in self._sessions.due(now):
            if session.finals or session.running:
                self._post(session)
            for envelope in self._sessions.flush(session, now):
                self._out.append(Send(session.peer, envelope))

    def _push_back(self) -> None:
        if self._load.turns(self._functions.bytes):
            self.counts["clients held back"] += self._load.full
            for session in self._sessions:
                if not session.node:
                    self._sessions.send(session, Hold(self._load.full))

    def _post(self, session: Session) -> None:
        if session.running:
            for tasks in batches(session.running, len):
                self._sessions.send(session, Running(tasks))
            session.running = []
        if session.finals:
            for batch in batches(session.finals, final_bytes):
                self._sessions.send(session, Finals(batch))
            session.finals = []

    # --- watching --------------------------------------------------------------------------------------------------

    def _heard(self, node: Node, now: float) -> None:
        node.heard_at = now
        node.pinged_at = None
        if node.state is SUSPECT:
            node.move(ALIVE)
            self._placement.changed(node)
            self._fact("alive", node, "heard of again")

    def _examine(self, node: Node, now: float) -> None:
        """A node's deadline: it was heard of meanwhile, or becomes suspect and is asked, or was asked and is lost."""
        if node.pinged_at is None:
            due = node.heard_at + self.settings.suspect_after_s
            if now >= due:
                node.pinged_at = now
                session = self._session_of(node)
                session.link.ping(now)
                self._sessions.touch(session)
                if node.state is ALIVE:
                    node.move(SUSPECT)
                    self._fact("suspect", node, f"silent for {now - node.heard_at:.1f} s")
                due = now + self.settings.ping_grace_s
            self._watch.set(node.id, due)
        elif now < (due := node.pinged_at + self._grace()):
            self._watch.set(node.id, due)
        else:
            self._node_ends(node, left=False, why=f"silent for {now - node.heard_at:.1f} s, to a ping as well")

    def _grace(self) -> float:
        """When most nodes fall silent together the fault is likelier ours, or the network's: they get one beat more."""
        silent = sum(node.pinged_at is not None for node in self._nodes.values())
        storm = silent > 2 and silent * 2 > len(self._nodes)
        return self.settings.ping_grace_s + (self.settings.beat_interval_s if storm else 0.0)

    def _forgive_own_absence(self, now: float) -> None:
        """The loop ticks at least once a beat; if it did not, this process was stopped, and nobody else was silent."""
        gap = 0.0 if self._last_tick is None else now - self._last_tick
        self._last_tick = now
        if gap > 1.5 * self.settings.beat_interval_s:
            for node in self._nodes.values():
                node.heard_at = min(now, node.heard_at + gap)
                if node.pinged_at is not None:
                    node.pinged_at = now
            self._watch.shift(gap)
            self._sessions.forgive(gap)
            self._owners.forgive(gap)
            self.counts["own absences"] += 1
            self._out.append(Log("warning", f"this broker did not run for {gap:.1f} s; deadlines are moved by as much"))

    def _expire_clients(self, now: float) -> None:
        for session in list(self._sessions):
            if not session.node and now - session.heard_at > self.settings.client_lease_s:
                self._client_gone(session, f"was silent for {now - session.heard_at:.0f} s", force=True)
        for owner in self._owners.silent_clients(self.settings.client_lease_s, now):
            self._owner_gone(owner, force=True)
        for owner in self._owners.old_jobs(self.settings.keep_results_s, now):
            self._owners.forget(owner)
            self._record(owner.id, Left())

    def _expire_waiting(self, now: float) -> None:
        """A job's tasks whose function never came: whoever has it is gone. Those of a client end with the client."""
        helpless = {
            digest
            for digest, tasks in self._waiting.items()
            if not any(task.owner.submitters or not task.owner.job for task in tasks.values())
        }
        self._waiting_since = {digest: self._waiting_since.get(digest, now) for digest in helpless}
        text = "the task's function has not arrived: the client that submitted it is gone"
        for digest, since in self._waiting_since.items():
            if now - since > self.settings.client_lease_s:
                for task in list(self._waiting[digest].values()):
                    self._finish(task, Final(task.id, "NotAccepted", text=text))

    def _expire_offers(self, now: float) -> None:
        """What runs for a client that did not come back in its time is ended."""
        for task_id, (node_id, attempt, since) in list(self._offers.items()):
            if now - since > self.settings.client_lease_s:
                del self._offers[task_id]
                session = self._session_of(self._nodes[node_id])
                self._sessions.send(session, Revoke([Attempt(task_id, attempt)], force=True))

    def _expire_limbo(self, now: float) -> None:
        if self._limbo and now >= self._settled_at + self.settings.await_lost_s:
            for task in list(self._limbo.values()):
                self._fail(task, "the broker died while the task may have been running, and its node did not come back")

    def _fail_hopeless(self, now: float) -> None:
        if not self._nodes:
            return  # they may all be on their way: nothing is known about what they will offer
        expected = [n for n in self._former if n.state is LOST and now - n.heard_at < self.settings.await_lost_s]
        hopeless = self._placement.hopeless(expected)
        for lane in self._placement.lanes():
            if lane not in hopeless:
                lane.unservable_since = None
        for lane in hopeless:
            if lane.unservable_since is None:
                lane.unservable_since = now
            elif now - lane.unservable_since >= self.settings.unservable_after_s:
                text = self._why_hopeless(lane.demand, lane.tags)
                for task in list(lane.tasks):
                    self._finish(task, Final(task.id, "Unschedulable", text=text))

    def _why_hopeless(self, demand: Iterable[tuple[str, float]], tags: tuple[str, ...]) -> str:
        wants = [_amount(name, amount) for name, amount in demand if amount] + [f"tag {tag}" for tag in tags]
        offers = [
            f"{node.id} ({node.where.host}): {', '.join([*(_amount(*pair) for pair in node.total.items()), *node.tags])}"
            for node in list(self._nodes.values())[:5]
        ]
        return clipped(
            f"no node can ever hold a task that needs {', '.join(wants)}. The nodes offer {'; '.join(offers)}. "
            "Ask for less, or start a node that has it (zmqsched node --resource NAME=AMOUNT --tag TAG)."
        )

    def _shrink(self) -> None:
        """A dict keeps the room it once needed; give it back when most of it is unused."""
        if self._most_tasks > 10_000 and self._most_tasks > 4 * len(self._tasks):
            self._tasks = {task_id: task for task_id, task in self._tasks.items()}  # noqa: C416 - dict() would copy the room too
            self._most_tasks = len(self._tasks)
            self._out.append(Shrunk())

    def _publish_counts(self) -> None:
        counts = [(name, number) for name, number in self._task_counts()]
        self._out.append(Publish(Fact("counts", self.settings.name, counts=counts)))

    def _task_counts(self) -> list[tuple[str, int]]:
        running = sum(len(node.tasks) for node in self._nodes.values())
        waiting = sum(len(tasks) for tasks in self._waiting.values())
        queued = self._placement.queued()
        return [("waiting", waiting), ("queued", queued), ("delayed", len(self._delayed)), ("assigned", running)]

    def _fact(self, kind: str, node: Node, text: str) -> None:
        self._out.append(Publish(Fact(kind, node.id, clipped(text))))
        self._out.append(Log("info", f"node {node.id} {kind}: {text}"))

    def _report(self, request: int, now: float) -> Report:
        nodes = [*self._nodes.values(), *self._former]
        clients = sum(1 for session in self._sessions if not session.node)
        counts = sorted(self.counts.items())
        return Report(
            request, self.settings.name, self.settings.epoch, self.settings.policy,
            [_node_report(node, now) for node in nodes], self._task_counts(), counts, clients,
        )  # fmt: skip

    def _session_of(self, node: Node) -> Session:
        session = self._sessions.get(node.session)
        assert session is not None, f"{node.id} has no session"
        return session


def _amount(name: str, amount: float) -> str:
    return f"memory={amount / 2**30:.3g} GiB" if name == "memory" else f"{name}={amount:g}"


def _function_bytes(function: Function) -> int:
    return wire_bytes(function.blob) + 20


def _delta_bytes(_: tuple[bytes, int]) -> int:
    return 32


def _task_bytes(task: Task) -> int:
    return wire_bytes(task.call) + task.kind.bytes


def _submissions(tasks: list[Task]) -> list[Record]:
    """These tasks as they were submitted, by owner."""
    by_owner: dict[bytes, tuple[dict[Shape, int], list[TaskSpec]]] = {}
    for task in tasks:
        index, specs = by_owner.setdefault(task.owner.id, ({}, []))
        specs.append(TaskSpec(task.id, index.setdefault(task.kind.shape, len(index)), task.call))
    return [Record(owner, Submit(list(index), specs)) for owner, (index, specs) in by_owner.items()]


def _node_report(node: Node, now: float) -> NodeReport:
    return NodeReport(
        id=node.id, where=node.where, state=node.state.value, slots=node.slots, credit=node.credit, assigned=node.assigned,
        done=node.done, resources=tuple(node.total.items()),
        free=tuple((name, total - node.used[name]) for name, total in node.total.items()),
        tags=tuple(sorted(node.tags)), workers=list(node.workers), silent_s=max(0.0, now - node.heard_at),
    )  # fmt: skip
