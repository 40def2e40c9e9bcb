"""The scheduler: the broker's truth about tasks and nodes, and the only place that decides.

Contract
--------
* ``handle(event, now) -> list[Action]`` is the only way in and the only way out; ``next_deadline()`` says when the shell
  must call again with ``Tick`` if nothing comes in before. ``now`` is a monotonic clock in seconds. No clock, no I/O, no
  global randomness here: same events, same actions.
* Events other than ``Tick`` are taken in; ``Tick`` acts on all of them together. The shell hands over what has arrived,
  then ticks: under load, batches form by themselves, and a lone task still goes out at once.
* No message of any peer raises. What is out of place is counted by reason in ``counts`` and dropped.

What it knows about tasks is the book's (``book.py``); here is who comes and goes, what they say, and the verdicts on
nodes. What becomes of a task is in ``tasks.py``, of a node in ``nodes.py``; which task goes where in ``placement.py``, and
how it gets there in ``dispatching.py``; how messages survive a broken connection in ``link.py`` and ``sessions.py``.

After a crash
-------------
With a journal (``ledger.py``) nothing is acknowledged and no answer given before it is on disk, and ``restore`` plays the
journal again (``recovery.py``). A node that joins says what it still runs; what of that is open and not placed elsewhere is
*adopted*: that attempt counts. So a broker that follows a crashed one places nothing before the nodes it knew are back, or
``settle_s`` have passed. A task with ``requeue=False`` that may have been started waits longer for its node, then fails.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from random import Random

from ..protocol import (
    Beat,
    Cancel,
    ChangeKeys,
    ClientHello,
    Command,
    Draining,
    Envelope,
    Fact,
    Fence,
    Follow,
    Function,
    Functions,
    Goodbye,
    GroupAdd,
    GroupForget,
    GroupWait,
    Hold,
    Inputs,
    Left,
    Message,
    NeedFunctions,
    NewKeys,
    No,
    NodeHello,
    NodeReport,
    Notice,
    Output,
    Present,
    Progress,
    Query,
    Record,
    Report,
    Results,
    SayHello,
    Shutdown,
    StillOpen,
    Stop,
    Submit,
    Welcome,
    Workers,
    batches,
    clipped,
    nested_in,
)  # fmt: skip
from . import outputs, roles
from .book import Book
from .commands import Commands
from .dispatching import Dispatching
from .events import (
    Alarmed,
    Arrived,
    BeatArrived,
    KeysChanged,
    Leave,
    Log,
    Malformed,
    Publish,
    Quit,
    Rekey,
    SchedulerAction,
    SchedulerEvent,
    Send,
    Shrunk,
    Tick,
    Troubled,
    Undelivered,
    Written,
)  # fmt: skip
from .functions import function_bytes
from .ledger import Answered, Consequence, Counted, Ledger, Placed
from .nodes import ALIVE, DRAINING, GONE, LOST, PAUSED, SUSPECT, Node, Prospect
from .offences import Floods, Offences
from .owners import Owner
from .reasons import SETTLING, UNREAD, Reasons
from .recovery import replay, snapshot
from .roles import ADMIN
from .sessions import Session, Sessions
from .settings import Settings
from .timers import Timers

PARTING_S = 2.0  # how long a shutdown waits for goodbyes
ALARM_EVERY_S = 60.0  # an alarm that lasts is logged again
DESCRIPTORS_A_SLOT = 4
FORMER_NODES = 32  # lost and departed nodes kept for reports


class Scheduler:
    def __init__(self, settings: Settings, random: Random) -> None:
        self.settings = settings
        self.counts: Counter[str] = Counter()
        self._offences = Offences(self.counts)
        self._floods = Floods()
        self._alarmed: dict[str, float] = {}  # when it was logged last
        self._sessions = Sessions(random, cautious=settings.journal)
        self._nodes: dict[str, Node] = {}
        self.book = Book(settings, random, self.counts, self._sessions, self._nodes)
        self._dispatching = Dispatching(self.book)
        self._commands = Commands(self.book, self._fact)
        self._by_incarnation: dict[bytes, Node] = {}
        self._former: list[Node] = []
        self._expected: set[bytes] | None = None  # incarnations of the nodes that the crashed broker had, if known
        self._settled_at = 0.0 if not settings.settle_s else math.inf
        self._watch: Timers[str] = Timers()  # when to look at a node again, by id
        self._node_numbers = 0
        self._last_tick: float | None = None
        self._next_round = 0.0
        self._asked_at: float | None = None  # when a client last asked for something
        self._end_at = math.inf
        self._end_why = ""
        self._out: list[SchedulerAction] = []

    # --- the contract ------------------------------------------------------------------------------------------------

    def handle(self, event: SchedulerEvent, now: float) -> list[SchedulerAction]:
        self.book.now = now
        match event:
            case Arrived():
                self._arrived(event.peer, event.user, event.envelope, now)
            case Tick():
                self._tick(now)
            case BeatArrived(beat):
                self._beat(beat, now)
            case Malformed():
                self._malformed(event, now)
            case Undelivered(_, reason):
                self.counts[f"send refused: {reason}"] += 1
            case KeysChanged():
                self._keys_changed(event)
            case Alarmed(what, advice):
                self._alarm(what, advice, now)
            case Written(number, size):
                assert self.book.ledger is not None, "a journal nobody asked for"
                self._release(*self.book.ledger.written(number, size), now)
            case Troubled(reason):
                self._troubled(reason)
            case Leave(_, reason):
                self._shut_down(reason, now)
        out, self._out = self._out, []
        return out

    def next_deadline(self) -> float:
        placed_at = self._settled_at if self.book.placement.pending and not self.book.load.unread else math.inf
        return min(
            self._next_round, self._end_at, placed_at, self._sessions.deadline(), self._watch.soonest,
            self.book.delayed.soonest,
        )  # fmt: skip

    def sanity_check(self) -> None:
        """Raise AssertionError if any two facts disagree."""
        self._sessions.sanity_check()
        self.book.sanity_check()
        for node in self._nodes.values():
            assert node.state in (ALIVE, SUSPECT, PAUSED, DRAINING), f"{node.id} is {node.state} and kept"

    def restore(self, records: Iterable[Record], now: float) -> None:
        """Play a journal; before the first event."""
        self.book.now = now
        self._expected = replay(self.book, records)
        if not self._expected:
            self._settled_at = min(self._settled_at, now)
        text = f"journal: {len(self.book.tasks)} unfinished tasks, {len(self._expected)} nodes expected"
        self._out.append(Log("info", text))

    # --- events ------------------------------------------------------------------------------------------------------

    def _arrived(self, peer: bytes, user: str, envelope: Envelope, now: float) -> None:
        session = self._sessions.get(envelope.session)
        if session is None or (session.user != user and not self._sessions.has_new_key(session, user)):
            body = envelope.body
            if self._floods.add(peer):
                self.counts["dropped: too many messages without a session"] += 1
            elif isinstance(body, ClientHello | NodeHello):
                self._hello(peer, user, body, now)
            elif not isinstance(body, SayHello):
                self.counts["unknown session"] += 1
                self._out.append(Send(peer, Envelope(envelope.session, 0, 0, SayHello())))
            return
        message = self._sessions.receive(session, peer, envelope, now)
        if session.link.delivered:
            self.book.delivered(session)
        if self.book.ledger is not None:
            self.book.ledger.received(session.token, session.link.received)
        if session.node:
            self._heard(self._nodes[session.node], now)
        if message is not None:
            self._message(session, message, now)

    def _message(self, session: Session, message: Message, now: float) -> None:
        if isinstance(message, GroupAdd):  # from anybody: tasks count too
            self.book.counting.add(session.incarnation, message, from_node=bool(session.node))
        elif session.node:
            self._from_node(self._nodes[session.node], message, now)
        else:
            self._from_client(session, message, now)

    def _from_client(self, session: Session, message: Message, now: float) -> None:
        kind = type(message)
        if kind is not Query and kind is not Goodbye:
            self._asked_at = now
        match message:
            case Submit():
                self.book.submit(session, message)
            case Functions(functions, unknown):
                self.book.learn(functions)
                self.book.has_none_of(session, unknown)
            case Inputs(finals):
                self.book.dependencies.told(session, finals)
            case Cancel(tasks, force):
                for task_id in tasks:
                    self.book.cancel(session, task_id, force=force)
            case GroupWait():
                self.book.counting.wait(session, message)
            case GroupForget(request):
                self.book.counting.groups.forget(session.token, request)
            case Query():
                if session.role == ADMIN:
                    session.prospects = [Prospect(each.resources, each.tags) for each in message.prospects]
                self._sessions.send(session, self._report(session, message, now))
            case StillOpen(tasks):
                self.book.still_open(session, tasks)
            case Follow(request, job):
                self.book.follow(session, request, job)
            case Command() | Shutdown() | ChangeKeys() if session.role != ADMIN:
                self._forbid(session, message)
            case Command():
                self._commands.obey(session, message)
            case Shutdown():
                self._shut_down("a client asked for it", now)
            case ChangeKeys():
                self._out.append(Rekey(session.token, message))
            case Goodbye():
                self._client_gone(session, "left", force=False)
            case _:
                self._misplaced(session, message)

    def _from_node(self, node: Node, message: Message, now: float) -> None:
        match message:
            case Results(outcomes):
                self.book.results(node, outcomes)
            case Progress():
                self._progress(node, message)
            case Workers(workers):
                node.workers = workers
                self._end_nested(node, {state.worker for state in workers})
                self._is_back(node, now)
            case NeedFunctions(digests):
                functions, inputs = self.book.functions, self.book.dependencies.inputs
                known = [Function(d, functions[d]) for d in digests if d in functions]
                known += [Function(name, value) for name in digests if (value := inputs.named(name)) is not None]
                for batch in batches(known, function_bytes):
                    self._sessions.send(self._sessions.of(node), Functions(batch))
            case Fence(client):
                if (session := self._sessions.known(client)) is not None and session.token in node.nested:
                    self._sessions.send(session, message)
            case Output():
                outputs.pass_on(message, node.id, self.book)
            case Draining():
                self._commands.start_draining(node)
            case Goodbye(reason):
                self._node_ends(node, left=True, why=reason or "left")
            case _:
                self._misplaced(self._sessions.of(node), message)

    def _misplaced(self, session: Session, message: Message) -> None:
        role = "node" if session.node else "client"
        who = f"{role} {session.where.host} pid {session.where.pid}"
        self._offences.note(f"{type(message).__name__} from a {role}", who)

    def _forbid(self, session: Session, message: Message) -> None:
        what = type(message).__name__
        self._offences.note(f"{what} from a {session.role}", f"{session.role} {session.where.host} pid {session.where.pid}")
        self._out.append(Send(session.peer, Envelope(0, 0, 0, No("role", roles.forbidden(session.role, what)))))

    def _malformed(self, event: Malformed, now: float) -> None:
        self._offences.note(event.reason, event.sender)
        if event.answer is None or self._floods.add(event.peer):
            return
        if event.answer.code == "malformed" and not self._offences.strike(event.peer, now):
            return
        for session in [session for session in self._sessions if session.peer == event.peer]:
            self._cut(session, f"cannot be understood: {event.answer.text}")
        self._out.append(Send(event.peer, Envelope(0, 0, 0, event.answer)))

    def _cut(self, session: Session, why: str) -> None:
        if session.node:
            self._node_ends(self._nodes[session.node], left=False, why=why)
        else:
            self._client_gone(session, why, force=True)

    def _alarm(self, what: str, advice: str, now: float) -> None:
        self.counts[f"alarm: {what}"] += 1
        if now >= self._alarmed.get(what, -math.inf) + ALARM_EVERY_S:
            self._alarmed[what] = now
            self._out.append(Log("error", f"{what}: {advice}"))

    def _keys_changed(self, event: KeysChanged) -> None:
        for session in list(self._sessions):
            if session.user in event.gone:
                self._cut(session, "came with a key that is good for nothing any more")
                self._out.append(Send(session.peer, Envelope(0, 0, 0, No("key", roles.KEY_GONE))))
            elif (pair := event.moved.get(session.user)) is not None:
                self._sessions.send(session, NewKeys(*pair))
        if event.report is not None and (asker := self._sessions.get(event.session)) is not None:
            self._sessions.send(asker, event.report)

    def _beat(self, beat: Beat, now: float) -> None:
        node = self._by_incarnation.get(beat.incarnation)
        if node is None or beat.number <= node.beat:
            self.counts["beats of nobody or out of order"] += 1
            return
        if self._floods.add(beat.incarnation):
            self.counts["dropped: too many beats"] += 1
            return
        node.beat = beat.number
        # Which workers there are, the work channel says, in order. A beat may be older, or newer: it says how they are.
        now_so = {(state.worker, state.pid): state for state in beat.workers}
        node.workers = [now_so.get((state.worker, state.pid), state) for state in node.workers]
        self._heard(node, now)

    def _tick(self, now: float) -> None:
        self._forgive_own_absence(now)
        if self._watch.soonest <= now:
            for node_id in self._watch.due(now):
                self._examine(self._nodes[node_id], now)
        if self.book.delayed.soonest <= now:
            for task_id in self.book.delayed.due(now):
                self.book.requeue(self.book.tasks[task_id])
        begins_round = now >= self._next_round
        if begins_round:
            self._next_round = now + self.settings.round_s
            self._floods.clear()
            self._end_if_idle(now)
            self._expire_clients(now)
            if now >= self._settled_at + self.settings.await_lost_s:
                self.book.expire_limbo()
            self.book.expire_waiting()
            self.book.dependencies.expire(self.settings.client_lease_s)
            self.book.expire_offers()
            self.book.fail_hopeless([*self._may_be_back(now), *self._prospects()])
            self.book.placement.reserve(now)
            self._publish_counts()
            if line := self._offences.line(now):
                self._out.append(Log("warning", line))
            if self.book.shrink():
                self._out.append(Shrunk())
        ends = self._end_at < math.inf and (now >= self._end_at or self._sessions.empty)
        if ends:  # what clients wanted ends with the cluster, what jobs hold does not
            for owner in [owner for owner in self.book.owners if not owner.job]:
                self._owner_gone(owner, force=False)
        elif now >= self._settled_at:
            self._dispatching.dispatch()
        elif self._settled_at == math.inf:  # the first moment of this broker
            self._settled_at = now + self.settings.settle_s
        if self.book.counting.groups.has_failures:
            self.book.counting.settle()
        if self.book.load.turns(self.book.functions.bytes + self.book.dependencies.inputs.bytes):
            self._push_back()
        if self.book.ledger is not None:
            self._dispatching.start_once()
            self._commit(self.book.ledger, now, hurry=begins_round)
        self._flush(now)
        if ends:
            self._out.append(Quit(self._end_why))

    # --- hello and goodbye -------------------------------------------------------------------------------------------

    def _hello(self, peer: bytes, user: str, hello: ClientHello | NodeHello, now: float) -> None:
        if (no := self._objection(user, hello)) is not None:
            self.counts[f"refused: {no.code}"] += 1
            self._out.append(Log("warning", f"refused {hello.where.host} pid {hello.where.pid}: {no.text}"))
            self._out.append(Send(peer, Envelope(0, 0, 0, no)))
            return
        session = self._sessions.known(hello.incarnation)
        if session is not None and session.role != roles.role_of(user):
            who = f"{user or 'this host'}: {hello.where.host} pid {hello.where.pid}"
            self._offences.note(f"hello in the name of one with a key for {session.role}", who)
            return
        if session is not None and hello.life < session.life:
            self.counts["stale hellos"] += 1
            return
        if roles.role_of(user) == roles.NODE and isinstance(hello, ClientHello) and not self._vouched_for(hello.incarnation):
            self.counts["clients of tasks whose node is not there"] += 1  # it will be, or the next hello finds it so, too
            return
        if session is not None and hello.life > session.life:
            if session.node:
                self._node_ends(self._nodes[session.node], left=False, why="began anew")
            else:
                self._close_session(session)
            session = None
        if session is None:
            session = self._sessions.open(hello, peer, user, now)
            if isinstance(hello, NodeHello):
                self._node_joins(session, hello, now)
            else:
                self._client_joins(session)
        session.heard_at = now
        if session.peer != peer:
            session.peer = peer
            session.link.reconnected()
        name = session.node or self.settings.name
        settings = self.settings
        welcome = Welcome(
            session.token, session.life, settings.epoch, name, settings.beat_interval_s, session.remembered,
            settings.suspect_after_s,
        )  # fmt: skip
        self._out.append(Send(peer, Envelope(session.token, 0, 0, welcome)))

    def _vouched_for(self, incarnation: bytes) -> bool:
        """This client is in a worker that a node says it has."""
        return any(
            nested_in(node.incarnation, incarnation) in {state.worker for state in node.workers}
            for node in self._nodes.values()
        )

    def _objection(self, user: str, hello: ClientHello | NodeHello) -> No | None:
        if why := roles.objection(user, hello):
            return No("role", why)
        theirs = hello.where.python
        if ".".join(theirs.split(".")[:2]) == self.settings.python:
            return None
        what = "node" if isinstance(hello, NodeHello) else "client"
        return No(
            "python",
            f"this {what} runs Python {theirs}, the cluster Python {self.settings.python}: functions travel as bytecode, "
            f"which another minor version cannot run. Start the {what} with Python {self.settings.python}.",
        )

    def _client_joins(self, session: Session) -> None:
        self.book.join(session)
        for node in self._nodes.values():
            self._note_nested(node, session)
        if self.book.load.full:
            self._sessions.send(session, Hold(True))

    def _note_nested(self, node: Node, session: Session) -> None:
        worker = nested_in(node.incarnation, session.incarnation)
        if worker is not None and not session.node:
            node.nested[session.token] = worker

    def _end_nested(self, node: Node, workers: set[int]) -> None:
        """What the tasks of other workers than these had submitted: nobody is there any more who waits for it."""
        for token in [token for token, worker in node.nested.items() if worker not in workers]:
            del node.nested[token]
            if (session := self._sessions.get(token)) is not None:
                self._client_gone(session, "ended with its worker", force=True)

    def _close_session(self, session: Session) -> None:
        self._sessions.close(session)
        self.book.unfollow(session)

    def _client_gone(self, session: Session, why: str, *, force: bool) -> None:
        """For good: nobody will ask for its tasks. What runs may end; with ``force`` it is ended. Those of jobs go on."""
        owner = session.follows[0]
        self._close_session(session)
        dropped = self._owner_gone(owner, force=force)
        who = f"client {session.where.host} pid {session.where.pid}"
        self._out.append(Log("info", f"{who} {why}: {dropped} tasks dropped"))

    def _owner_gone(self, owner: Owner, *, force: bool) -> int:
        """What was in a task of a node that may be lost will not be back."""
        nodes = [*self._nodes.values(), *self._former]
        nested = any(nested_in(node.incarnation, owner.incarnation) is not None for node in nodes)
        return self.book.owner_gone(owner, force=force, nested=nested)

    def _node_joins(self, session: Session, hello: NodeHello, now: float) -> None:
        self._node_numbers += 1
        node = Node(f"n{self._node_numbers}", session.token, hello, now)
        session.node = node.id
        self._nodes[node.id] = node
        self._by_incarnation[node.incarnation] = node
        self.book.placement.join(node)
        for other in self._sessions:
            self._note_nested(node, other)
        self._watch.set(node.id, now + self.settings.suspect_after_s)
        text = f"{hello.where.host} pid {hello.where.pid}, {hello.slots} slots"
        self._fact("joined", node, text)
        if self.settings.max_connections < DESCRIPTORS_A_SLOT * sum([each.slots for each in self._nodes.values()]):
            advice = "each of them may be a client of its own; raise the limit (ulimit -n) where the broker is started"
            self._alarm("few descriptors for so many workers", advice, now)
        self.book.offer(node, hello.holding)
        self._commands.replace(node)
        self.book.record(b"", self._present(now))

    def _is_back(self, node: Node, now: float) -> None:
        """What it had to say of its last session it has said by now."""
        if self._expected is not None:
            self._expected.discard(node.incarnation)
            if not self._expected:
                self._settled_at = min(self._settled_at, now)

    def _present(self, now: float) -> Present:
        """The nodes that are there, and those still waited for."""
        awaited = self._expected if self._expected and now < self._settled_at else ()
        return Present(sorted({*self._by_incarnation, *awaited}))

    def _node_ends(self, node: Node, *, left: bool, why: str) -> None:
        """The node is gone or given up: it holds nothing any more, what it held is queued again."""
        node.move(GONE if left else LOST)
        del self._nodes[node.id]
        del self._by_incarnation[node.incarnation]
        self._watch.set(node.id, None)
        self._sessions.close(self._sessions.of(node))
        self._former = [*self._former, node][-FORMER_NODES:]
        self.book.record(b"", self._present(self.book.now))
        requeued = self.book.leave(node)
        if left:
            self._end_nested(node, set())
        self.counts["requeued: node gone" if left else "requeued: node lost"] += requeued
        self._fact("gone" if left else "lost", node, f"{why}; {requeued} tasks requeued")

    def _prospects(self) -> list[Prospect]:
        return [prospect for session in self._sessions for prospect in session.prospects]

    def _may_be_back(self, now: float) -> list[Node]:
        return [node for node in self._former if node.state is LOST and now - node.heard_at < self.settings.await_lost_s]

    def _shut_down(self, why: str, now: float) -> None:
        """Tell everybody, and end when all have said goodbye, or after a while."""
        self._end_at = min(self._end_at, now + PARTING_S)
        self._end_why = why
        for session in self._sessions:
            if session.node:
                self._sessions.send(session, Stop(drain=False))
            else:
                self._sessions.send(session, Goodbye(clipped(f"the cluster was shut down: {why}")))

    def _progress(self, node: Node, message: Progress) -> None:
        if message.credit != node.credit:
            node.credit = message.credit
            node.version += 1
            self.book.placement.changed(node)
        for death in message.deaths:
            self._fact("worker died", node, f"worker {death.worker} pid {death.pid}: {death.how}")
        self.book.progress(node, message)

    # --- the journal -------------------------------------------------------------------------------------------------

    def _commit(self, ledger: Ledger, now: float, *, hurry: bool) -> None:
        """End the turn: what follows from it waits for the journal."""
        if (write := ledger.commit(hurry=hurry)) is not None:
            self._out.append(write)
        if ledger.has_outgrown(idle=self.book.keeps_nothing):
            self._out.append(ledger.replace(snapshot(self.book, self._present(now))))
        self._release(*ledger.due(), now)

    def _release(self, received: dict[int, int], consequences: list[Consequence], now: float) -> None:
        for token, number in received.items():
            if (session := self._sessions.get(token)) is not None:
                session.link.secure(number, now)
                self._sessions.touch(session)
        for consequence in consequences:
            match consequence:
                case Answered(owner_id, final):
                    self.book.written(owner_id, final)
                case Counted(waiter, error):
                    self.book.counting.end_wait(waiter, error)
                case Placed():
                    self._dispatching.placed(consequence)

    def _troubled(self, reason: str) -> None:
        assert self.book.ledger is not None, "a journal nobody asked for"
        if not self.book.ledger.trouble:
            self._out.append(Log("error", reason))
            for session in self._sessions:
                if not session.node:
                    self._sessions.send(session, Notice(f"{reason}. Nothing is lost; answers wait until it can be written"))
        self.book.ledger.trouble = reason

    # --- acting ------------------------------------------------------------------------------------------------------

    def _flush(self, now: float) -> None:
        for session in self._sessions.due(now):
            if session.finals or session.running:
                self.book.post(session)
            for envelope in self._sessions.flush(session, now):
                self._out.append(Send(session.peer, envelope))

    def _push_back(self) -> None:
        self.counts["clients held back"] += self.book.load.full
        for session in self._sessions:
            if not session.node:
                self._sessions.send(session, Hold(self.book.load.full))

    # --- watching ----------------------------------------------------------------------------------------------------

    def _heard(self, node: Node, now: float) -> None:
        node.heard_at = now
        node.pinged_at = None
        if node.state is SUSPECT:
            node.move(ALIVE)
            self.book.placement.changed(node)
            self._fact("alive", node, "heard of again")

    def _examine(self, node: Node, now: float) -> None:
        """A node's deadline: it was heard of meanwhile, or becomes suspect and is asked, or was asked and is lost."""
        if node.pinged_at is None:
            due = node.heard_at + self.settings.suspect_after_s
            if now >= due:
                node.pinged_at = now
                session = self._sessions.of(node)
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
            self._asked_at = self._asked_at and self._asked_at + gap
            self._sessions.forgive(gap)
            self.book.owners.forgive(gap)
            self.counts["own absences"] += 1
            self._out.append(Log("warning", f"this broker did not run for {gap:.1f} s; deadlines are moved by as much"))

    def _expire_clients(self, now: float) -> None:
        for session in list(self._sessions):
            if not session.node and now - session.heard_at > self.settings.client_lease_s:
                self._client_gone(session, f"was silent for {now - session.heard_at:.0f} s", force=True)
        for owner in self.book.owners.silent_clients(self.settings.client_lease_s, now):
            self._owner_gone(owner, force=True)
        for owner in self.book.owners.old_jobs(self.settings.keep_results_s, now):
            self.book.owners.forget(owner)
            self.book.record(owner.id, Left())

    def _end_if_idle(self, now: float) -> None:
        """Who only looks keeps no cluster alive, nor does a client that is there and asks for nothing."""
        if self.book.tasks or self._asked_at is None:
            self._asked_at = now
        timeout_s = self.settings.idle_timeout_s
        if timeout_s and now - self._asked_at >= timeout_s and self._end_at == math.inf:
            self._shut_down(f"nothing was asked of it for {timeout_s:g} s", now)

    def _publish_counts(self) -> None:
        counts = [(name, number) for name, number in self.book.task_counts()]
        self._out.append(Publish(Fact("counts", self.settings.name, counts=counts)))

    def _fact(self, kind: str, node: Node, text: str) -> None:
        self._out.append(Publish(Fact(kind, node.id, clipped(text))))
        self._out.append(Log("info", f"node {node.id} {kind}: {text}"))

    def _report(self, session: Session, query: Query, now: float) -> Report:
        nodes = [*self._nodes.values(), *self._former]
        clients = sum(1 for session in self._sessions if not session.node)
        counts = sorted(self.counts.items())
        held = SETTLING if now < self._settled_at else UNREAD if self.book.load.unread else ""
        reasons = Reasons(self.book, self._may_be_back(now), self._prospects(), held)
        waiting = reasons.of(self.book.asked_about(session, query.tasks)) if query.tasks else reasons.of_all()
        return Report(
            query.request, self.settings.name, self.settings.epoch, self.settings.policy,
            [_node_report(node, now) for node in nodes], self.book.task_counts(), counts, clients, waiting,
            [self.book.placement.suited(prospect) for prospect in session.prospects] if query.prospects else [],
        )  # fmt: skip


def _node_report(node: Node, now: float) -> NodeReport:
    return NodeReport(
        id=node.id, where=node.where, state=node.state.value, slots=node.slots, credit=node.credit, assigned=node.assigned,
        done=node.done, resources=tuple(node.total.items()),
        free=tuple((name, total - node.used[name]) for name, total in node.total.items()),
        tags=tuple(sorted(node.tags)), workers=list(node.workers), silent_s=max(0.0, now - node.heard_at),
        label=node.label, leaves_in_s=0.0 if node.leaves_at == math.inf else max(0.001, node.leaves_at - now),
    )  # fmt: skip
