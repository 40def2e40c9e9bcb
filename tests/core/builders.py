"""A small world around each core: actors that speak to it through real links and a wire that really encodes.

The actors have names, tasks have labels ("a", "b"), and every step of a core is followed by its ``sanity_check()``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace as replace_settings
from random import Random
from typing import Literal, TypeVar

from msgspec.structs import replace

from zmqsched.codec import decode, decode_record, encode, encode_record
from zmqsched.config import BEAT_INTERVAL_S, CLUSTER_LOST_AFTER_S
from zmqsched.core.agent import Agent
from zmqsched.core.events import (
    AgentEvent,
    Arrived,
    Ask,
    Asked,
    AskStack,
    BeatArrived,
    Began,
    Born,
    Broken,
    ClientAction,
    ClientEvent,
    Exited,
    Finished,
    FromTask,
    Give,
    Heard,
    Interrupt,
    Kill,
    Leave,
    Log,
    Measured,
    NowRunning,
    Printed,
    Publish,
    Quit,
    Reached,
    Reconnected,
    Replied,
    Retire,
    Said,
    SchedulerAction,
    SchedulerEvent,
    Send,
    SendBeat,
    Start,
    Stood,
    TakeBack,
    TakenBack,
    Tell,
    TellNode,
    TellStack,
    Tick,
    ToBroker,
    Troubled,
    Warned,
    Withdraw,
    Write,
    Written,
)  # fmt: skip
from zmqsched.core.link import Link
from zmqsched.core.requests import Requests
from zmqsched.core.scheduler import Scheduler
from zmqsched.core.settings import Care, Settings
from zmqsched.protocol import (
    Adopt,
    Advance,
    Attempt,
    Beat,
    Cancel,
    ClientHello,
    Death,
    Declined,
    Dispatch,
    Done,
    Envelope,
    Fact,
    Final,
    Finals,
    Follow,
    Function,
    Functions,
    GoesOn,
    Goodbye,
    GroupAdd,
    Host,
    Interrupted,
    JobTasks,
    Message,
    No,
    NodeHello,
    Options,
    Order,
    Outcome,
    Output,
    Progress,
    Query,
    Record,
    Remains,
    Report,
    Results,
    Revoke,
    Run,
    Running,
    SayHello,
    Shape,
    Stopped,
    Submit,
    TaskSpec,
    Waits,
    Welcome,
    Words,
    Workers,
    WorkerState,
)  # fmt: skip

M = TypeVar("M")
PYTHON = "3.11.4"
MORE = 0.01  # a little later: the least step of time that the worlds take


def task_id(label: str) -> bytes:
    return label.encode().rjust(16, b"_")


def label_of(task: bytes) -> str:
    return task.lstrip(b"_").decode(errors="backslashreplace")


def digest(name: str) -> bytes:
    return name.encode().rjust(16, b"@")


def token(name: str) -> bytes:
    return name.encode().ljust(16, b"#")


def blob(name: str) -> bytes:
    return f"the code of {name}".encode()


def options(**asked: object) -> Options:
    """Options with ``resources`` as a dict; the cpu that every task asks for is added."""
    resources = asked.pop("resources", None)
    if resources is not None:
        asked["resources"] = tuple(sorted({"cpu": 1.0, **resources}.items()))  # type: ignore[dict-item]
    if isinstance(asked.get("group"), str):
        asked["group"] = token(asked["group"])  # type: ignore[arg-type]
    if "holds" in asked:
        asked["holds"] = tuple(map(token, asked["holds"]))  # type: ignore[call-overload]
    return Options(**asked)  # type: ignore[arg-type]


def over_the_wire(envelope: Envelope) -> Envelope:
    return decode([bytes(frame) for frame in encode(envelope)])


# --- around the scheduler -------------------------------------------------------------------------------------------


class Peer:
    """The other end of a session with the scheduler. ``heard``: what it was told, oldest first."""

    def __init__(self, world: Broker, name: str, hello: ClientHello | NodeHello, user: str = "") -> None:
        self.world = world
        self.name = name
        self.address = f"{name}#1".encode()
        self.user = user
        self.hello = hello
        self.link: Link | None = None
        self.heard: list[Message] = []
        self.frozen = False
        self._missed: list[Envelope] = []
        self._speaks_at = 0.0

    # what it does

    def says_hello(self, life: int | None = None, address: str | None = None) -> None:
        """The hello as it is, or one of another life of the same process."""
        if life is not None:
            self.hello = replace(self.hello, life=life)
        if address is not None:
            self.address = address.encode()
        self._put(Envelope(0, 0, 0, self.hello))
        self.world.turn()

    def says(self, *messages: Message) -> None:
        assert self.link is not None, f"{self.name} has no session"
        for message in messages:
            self.link.send(message)
        self.flush()
        self.world.turn()

    def comes_back(self) -> None:
        """A new session of the same process: the broker has given it up, or is another."""
        self.says_hello(life=self.hello.life + 1)

    def freezes(self) -> None:
        """It neither hears nor speaks, and neither does its host."""
        self.frozen = True

    def thaws(self) -> None:
        self.frozen = False
        missed, self._missed = self._missed, []
        for envelope in missed:
            self.receive(envelope)
        self.speak()
        self.world.turn()

    # what it was told

    def all(self, kind: type[M]) -> list[M]:
        return [message for message in self.heard if isinstance(message, kind)]

    def last(self, kind: type[M]) -> M:
        return self.all(kind)[-1]

    # the machinery

    def receive(self, envelope: Envelope) -> None:
        if self.frozen:
            self._missed.append(envelope)
            return
        body = envelope.body
        if isinstance(body, Welcome):
            if self.link is None or self.link.session != body.session:
                self.link = Link(body.session)
            self.heard.append(body)
        elif isinstance(body, No | SayHello):
            self.heard.append(body)
        elif self.link is not None and envelope.session == self.link.session:
            message = self.link.receive(envelope, self.world.now)
            if message is not None:
                self.heard.append(message)
                self.on(message)

    def on(self, message: Message) -> None:
        """What this actor keeps of a message."""

    def speak(self) -> None:
        """The sign of life that each process gives once a second."""
        if self.frozen or self.world.now < self._speaks_at:
            return
        self._speaks_at = self.world.now + BEAT_INTERVAL_S
        if self.link is not None:
            self.link.ping(self.world.now)

    def flush(self) -> bool:
        if self.link is None or self.frozen:
            return False
        envelopes = self.link.flush(self.world.now)
        for envelope in envelopes:
            self._put(envelope)
        return bool(envelopes)

    def _put(self, envelope: Envelope) -> None:
        self.world.step(Arrived(self.address, self.user, over_the_wire(envelope)))


NOTHING_LEFT = Remains()


class Client(Peer):
    def __init__(self, world: Broker, name: str, python: str = PYTHON, user: str = "") -> None:
        super().__init__(world, name, ClientHello(token(name), 1, Host(f"{name}-host", 100, python)), user)
        self.finals: list[Final] = []

    def submits(
        self, *labels: str, function: str = "f", with_code: bool = True, qualname: str = "", **asked: object
    ) -> None:
        shape = Shape(digest(function), options(**asked), qualname)
        functions = [Function(digest(function), blob(function))] if with_code else []
        calls = [TaskSpec(task_id(label), 0, b"call of " + label.encode()) for label in labels]
        self.says(Submit([shape], calls, functions))

    def follows(self, job: str) -> list[str]:
        """What the broker says the job has."""
        self.says(Follow(7, job))
        return [label_of(task) for listed in self.all(JobTasks) if listed.request == 7 for task in listed.tasks]

    def asks_why(self, *labels: str) -> dict[str, int]:
        """How many tasks wait, by the reason that the broker names; of these, if any are named."""
        self.says(Query(9, [task_id(label) for label in labels]))
        return {reason: count for count, reason in self.last(Report).waiting}

    def teaches(self, function: str) -> None:
        self.says(Functions([Function(digest(function), blob(function))]))

    def cancels(self, *labels: str, force: bool = False) -> None:
        self.says(Cancel([task_id(label) for label in labels], force))

    def leaves(self) -> None:
        self.says(Goodbye())

    def on(self, message: Message) -> None:
        if isinstance(message, Finals):
            self.finals += message.finals

    @property
    def answers(self) -> dict[str, str]:
        """Verdicts by label; a second answer to one task is an error at once."""
        labels = [label_of(final.task) for final in self.finals]
        assert len(labels) == len(set(labels)), f"answered twice: {labels}"
        return {label_of(final.task): final.verdict for final in self.finals}

    def final(self, label: str) -> Final:
        return next(final for final in self.finals if final.task == task_id(label))

    @property
    def printed(self) -> dict[str, bytes]:
        """By task, what came in order and at its place."""
        found: dict[str, bytes] = {}
        for message in self.all(Output):
            for words in message.words:
                label = label_of(words.task)
                assert words.at >= len(found.get(label, b"")), "out of order"
                found[label] = found.get(label, b"") + words.text
        return found

    @property
    def told_running(self) -> list[str]:
        return [label_of(task) for message in self.all(Running) for task in message.tasks]


class Node(Peer):
    def __init__(
        self,
        world: Broker,
        name: str,
        slots: int,
        credit: int | None,
        resources: dict[str, float],
        tags: Iterable[str],
        python: str,
        user: str,
        label: str = "",
        leaves_in_s: float = 0.0,
    ) -> None:
        self.credit = slots if credit is None else credit
        held = tuple(sorted({"cpu": float(slots), **resources}.items()))
        where = Host(f"{name}-host", 200, python)
        hello = NodeHello(
            token(name), 1, where, slots, self.credit, held, tuple(tags), label=label, leaves_in_s=leaves_in_s
        )
        super().__init__(world, name, hello, user)
        self.orders: dict[str, Order] = {}  # what it was given and has not answered
        self.attempts: list[tuple[str, int]] = []  # all it was ever given
        self.functions: set[bytes] = set()
        self._beats = 0
        self._additions = 0

    @property
    def id(self) -> str:
        return self.last(Welcome).name

    @property
    def holds(self) -> list[str]:
        return list(self.orders)

    def finishes(self, *labels: str, value: bytes = b"value", took: float = 0.0) -> None:
        self.says(Results([replace(self._outcome(label, True, value), ran_s=took) for label in labels]))

    def fails(self, *labels: str, error: bytes = b"the user's error", retry: bool = True) -> None:
        self.says(Results([self._outcome(label, False, error, retry) for label in labels]))

    def counts(self, label: str, *deltas: int, group: str = "g") -> None:
        """The task adds to the WaitGroup."""
        for delta in deltas:
            self._additions += 1
            self.says(GroupAdd([(token(group), delta)], self._additions, task_id(label)))

    def is_over(self, label: str, attempt: int = 0) -> None:
        """What this attempt has counted is followed by nothing, not by a result either. 0: one of an earlier session."""
        self._additions += 1
        self.says(GroupAdd([], self._additions, task_id(label), attempt=attempt))

    def starts(self, *labels: str) -> None:
        self.says(Progress(self.credit, started=[self._attempt(label) for label in labels]))

    def comes_back(self, *, reports: bool = True) -> None:
        """It names what it runs; ``reports``: and has said all that was left to say."""
        held = [self._attempt(label) for label in self.orders]
        self.hello = replace(self.hello, life=self.hello.life + 1, holding=held)
        self.functions.clear()
        self.says_hello()
        if reports:
            self.says(Workers([WorkerState(1, 4711, "idle")]))

    @property
    def adopted(self) -> list[str]:
        return [label_of(attempt.task) for message in self.all(Adopt) for attempt in message.attempts]

    def hands_back(self, *labels: str) -> None:
        returned = [self._attempt(label) for label in labels]
        for label in labels:
            del self.orders[label]
        self.says(Progress(self.credit, returned=returned))

    def stops(self, label: str, verdict: Literal["cancelled", "TaskTimeout"], text: str = "how it was") -> None:
        attempt = self._attempt(label)
        del self.orders[label]
        self.says(Progress(self.credit, stopped=[Stopped(attempt.task, attempt.attempt, verdict, text)]))

    def prints(self, label: str, text: bytes, *, at: int = 0, lines: int = 0, task: str = "") -> None:
        """On standard output; ``task``: what it says that the words are of."""
        words = Words(task_id(task or label), self.orders[label].attempt, 1, 1, at, lines, text)
        self.says(Output([words], node="whatever it says"))

    def advances(self, label: str, fraction: float, text: str = "") -> None:
        self.says(Output([], [Advance(task_id(label), self.orders[label].attempt, fraction, text)]))

    def asks_for(self, credit: int) -> None:
        self.credit = credit
        self.says(Progress(credit))

    def loses_a_worker(
        self, running: str = "", how: str = "killed by SIGSEGV", ran_s: float = 0.0, remains: Remains = NOTHING_LEFT,
        *, blamed: bool = True,
    ) -> None:  # fmt: skip
        attempt = self._attempt(running) if running else Attempt(task_id("nothing"), 0)
        self.orders.pop(running, None)
        death = Death(1, 4711, how, attempt.task if running else b"", attempt.attempt, ran_s, remains, blamed)
        self.says(Progress(self.credit, deaths=[death]))

    def leaves(self, reason: str = "") -> None:
        self.says(Goodbye(reason))

    def beats(self, number: int | None = None) -> None:
        self._beats += 1
        number = self._beats if number is None else number
        self.world.step(BeatArrived(Beat(self.hello.incarnation, number, [WorkerState(1, 4711, "idle")])))

    @property
    def revoked(self) -> list[str]:
        return [label_of(attempt.task) for message in self.all(Revoke) for attempt in message.attempts]

    @property
    def revoked_by_force(self) -> list[str]:
        return [label_of(one.task) for message in self.all(Revoke) if message.force for one in message.attempts]

    def on(self, message: Message) -> None:
        if isinstance(message, Dispatch):
            self.functions |= {function.digest for function in message.functions}
            for order in message.orders:
                assert message.shapes[order.shape].function in self.functions, "a task without its function"
                self.orders[label_of(order.task)] = order
                self.attempts.append((label_of(order.task), order.attempt))
            assert len(self.orders) <= self.credit, f"{self.name} was given more than its credit"

    def speak(self) -> None:
        if not self.frozen and self.world.now >= self._speaks_at:
            self.beats()
        super().speak()

    def _attempt(self, label: str) -> Attempt:
        return Attempt(task_id(label), self.orders[label].attempt)

    def _outcome(self, label: str, ok: bool, value: bytes, retry: bool = True) -> Outcome:
        return Outcome(task_id(label), self.orders.pop(label).attempt, ok, value, 1, retry)


class Disk:
    """Where a journal's commits go, at the end of each turn; of a ``slow`` disk, when it is told to write."""

    def __init__(self) -> None:
        self.commits: list[Write] = []
        self.under_way: list[Write] = []
        self.slow = False

    def records(self, commits: int | None = None) -> list[Record]:
        """What a broker reads that finds the first so many commits; all, unless told."""
        found: list[Record] = []
        for commit in self.commits[:commits]:
            read = [decode_record([bytes(part) for part in encode_record(record)]) for record in commit.records]
            found = read if commit.anew else [*found, *read]
        return found

    def bodies(self, kind: type[M]) -> list[M]:
        return [record.body for record in self.records() if isinstance(record.body, kind)]


class Broker:
    """The scheduler, its clock, and everybody who speaks to it. The wire loses nothing: see test_link.py."""

    def __init__(self, **settings: object) -> None:
        self.now = 100.0
        self.settings = Settings(python="3.11", **settings)  # type: ignore[arg-type]
        self.scheduler = Scheduler(self.settings, Random(1))
        self.disk = Disk()
        self.peers: list[Peer] = []
        self.facts: list[Fact] = []
        self.log: list[str] = []
        self.quit: str | None = None
        self.turn()

    @property
    def counts(self) -> dict[str, int]:
        return dict(self.scheduler.counts)

    def client(self, name: str = "client", **how: str) -> Client:
        client = Client(self, name, **how)
        self.peers.append(client)
        client.says_hello()
        return client

    def node(
        self,
        name: str = "node",
        slots: int = 1,
        *,
        credit: int | None = None,
        resources: dict[str, float] | None = None,
        tags: Iterable[str] = (),
        python: str = PYTHON,
        user: str = "",
        label: str = "",
        leaves_in_s: float = 0.0,
    ) -> Node:
        node = Node(self, name, slots, credit, resources or {}, tags, python, user, label, leaves_in_s)
        self.peers.append(node)
        node.says_hello()
        return node

    def hears(self, envelope: Envelope, address: str = "stranger", user: str = "") -> list[SchedulerAction]:
        """An envelope from nowhere in particular."""
        return self.step(Arrived(address.encode(), user, over_the_wire(envelope)))

    def step(self, event: SchedulerEvent) -> list[SchedulerAction]:
        actions = self.scheduler.handle(event, self.now)
        self.scheduler.sanity_check()
        for action in actions:
            match action:
                case Send(address, envelope):
                    for peer in self.peers:
                        if peer.address == address:
                            peer.receive(over_the_wire(envelope))
                case Publish(fact):
                    self.facts.append(fact)
                case Log(_, text):
                    self.log.append(text)
                case Quit(reason):
                    self.quit = reason
                case Write():
                    self.disk.under_way.append(action)
        return actions

    def turn(self) -> None:
        """The broker acts and the peers answer, until nobody has anything to say at this moment."""
        for _ in range(100):
            self.step(Tick())
            wrote = not self.disk.slow and self._writes()
            if not sum(peer.flush() for peer in self.peers) and not wrote:
                return
        raise AssertionError("they never stop talking")

    def passes(self, seconds: float) -> None:
        """Let time pass for everybody; who is not frozen gives a sign of life each second."""
        end = self.now + seconds
        while self.now < end:
            due = self.scheduler.next_deadline()
            times = [end] if due is None else [end, due]
            times += [peer._speaks_at for peer in self.peers if not peer.frozen]
            self.now = min(end, max(min(times), self.now + MORE))
            for peer in self.peers:
                peer.speak()
            self.turn()

    def sleeps(self, seconds: float) -> None:
        """The broker's own process is stopped, the others are not: what they send arrives when it wakes."""
        self.now += seconds

    # a journal's disk

    def writes(self) -> None:
        """What was on its way to the disk is there."""
        self._writes()
        self.turn()

    def is_troubled(self, reason: str = "no space left") -> None:
        self.disk.slow = True
        self.step(Troubled(reason))
        self.turn()

    def dies(self, *, settle_s: float = 2.0, commits: int | None = None) -> None:
        """It is killed, and the next has what was on disk by then."""
        self.disk.under_way.clear()
        settings = replace_settings(self.settings, epoch=self.scheduler.settings.epoch + 1, settle_s=settle_s)
        self.scheduler = Scheduler(settings, Random(settings.epoch))
        if settings.journal:
            self.scheduler.restore(self.disk.records(commits), self.now)
        self.scheduler.sanity_check()
        for peer in self.peers:
            peer.link = None
        self.turn()

    def _writes(self) -> bool:
        wrote, self.disk.under_way = self.disk.under_way, []
        self.disk.commits += wrote
        if wrote:
            self.step(Written(wrote[-1].number, 1_000 * len(self.disk.records())))
        return bool(wrote)

    def facts_of(self, kind: str) -> list[str]:
        return [fact.about for fact in self.facts if fact.kind == kind]


# --- around a node's agent -------------------------------------------------------------------------------------------


class Workplace:
    """An agent, its workers and the broker it speaks to.

    ``pipes``: by worker, the runs it was given and has not answered, the first of them running.
    ``told``: what the broker heard.
    """

    def __init__(
        self,
        slots: int = 1,
        *,
        resources: dict[str, float] | None = None,
        gpus: Iterable[str] = (),
        workers: bool = True,
        joins: bool = True,
        sloth: bool = False,
        alone_s: float = math.inf,
        leaves_in_s: float = math.inf,
        care: Care = Care(),  # noqa: B008 - frozen
    ) -> None:
        held = tuple(sorted({"cpu": float(slots), **(resources or {})}.items()))
        self.now = 100.0
        hello = NodeHello(token("node"), 1, Host("here", 1, PYTHON), slots, slots, held)
        self.agent = Agent(hello, gpus, care, alone_s=alone_s, leaves_at=self.now + leaves_in_s)
        self.pipes: dict[int, list[Run]] = {}
        self.pids: dict[int, int] = {}
        self.born: list[int] = []
        self.buried: list[int] = []
        self.told: list[Message] = []
        self.hellos: list[NodeHello] = []
        self.beats: list[Beat] = []
        self.given: list[tuple[int, str]] = []
        self.runs: dict[str, Run] = {}
        self.signals: list[tuple[str, int]] = []  # what workers were sent: "ask", "interrupt", "kill"
        self.retired: list[int] = []
        self.stack = "line 1 in f"  # where workers stand
        self.log: list[str] = []
        self.quit: str | None = None
        self.link: Link | None = None
        self.cut = False  # the wire to the broker is cut
        self.workers_start = workers
        self.sloth = sloth  # TakeBack is answered when told to
        self.session = 0
        self._attempts: dict[str, int] = {}
        self._taught: set[bytes] = set()
        self.turn()
        if joins:
            self.broker_welcomes()

    # what the broker does

    def broker_welcomes(self, *adopted: str, beat_interval_s: float = 1.0, lease_s: float = 3.0) -> None:
        """First attempts that it adopts are right behind the welcome."""
        self.session += 1
        self.link = Link(self.session)
        self._taught.clear()
        life = self.hellos[-1].life
        self._arrive(Envelope(self.session, 0, 0, Welcome(self.session, life, 1, "n1", beat_interval_s, lease_s=lease_s)))
        if adopted:
            self.link.send(Adopt([Attempt(task_id(label), 1) for label in adopted]))
            for envelope in self.link.flush(self.now):
                self._arrive(envelope)
        self.turn()

    def broker_forgets(self) -> None:
        """It gave this node up."""
        self._arrive(Envelope(self.session, 0, 0, SayHello()))
        self.link = None
        self.turn()

    def broker_says(self, *messages: Message) -> None:
        assert self.link is not None
        for message in messages:
            self.link.send(message)
        self.turn()

    def broker_orders(self, *labels: str, function: str = "f", with_code: bool = True, **asked: object) -> None:
        orders = []
        for label in labels:
            self._attempts[label] = self._attempts.get(label, 0) + 1
            orders.append(Order(task_id(label), self._attempts[label], 0, b"call of " + label.encode()))
        new = with_code and digest(function) not in self._taught
        self._taught.add(digest(function))
        functions = [Function(digest(function), blob(function))] if new else []
        self.broker_says(Dispatch([Shape(digest(function), options(**asked))], orders, functions))

    def broker_revokes(self, *labels: str, force: bool = False) -> None:
        self.broker_says(Revoke([Attempt(task_id(label), self._attempts[label]) for label in labels], force))

    # what the workers do

    def running(self, worker: int) -> str | None:
        """The task that this worker has taken."""
        return label_of(self.pipes[worker][0].task) if self.pipes.get(worker) else None

    @property
    def all_running(self) -> list[str]:
        return sorted(label for worker in self.pipes if (label := self.running(worker)))

    def at(self, worker: int) -> list[str]:
        return [label_of(run.task) for run in self.pipes[worker]]

    def worker_of(self, label: str) -> int:
        return next(worker for worker in self.pipes if label in self.at(worker))

    def declines(self, label: str) -> None:
        """The worker takes it from the pipe and does not begin it."""
        worker = next(worker for worker in self.pipes if self.running(worker) == label)
        self.step(Said(worker, [Declined(self.pipes[worker].pop(0).task)]))
        self.turn()

    def finishes(self, label: str, *, took: float = 0.0, ok: bool = True) -> None:
        """The worker that runs it is done with it; the clock is the caller's business."""
        worker = next(worker for worker in self.pipes if self.running(worker) == label)
        run = self.pipes[worker].pop(0)
        self.step(Said(worker, [Done(run.task, run.attempt, ok, b"value", took)]))
        self.turn()

    def dies(self, worker: int, how: str = "killed by SIGKILL", remains: Remains = NOTHING_LEFT) -> None:
        runs = self.pipes.pop(worker)
        self.buried.append(worker)
        self.step(Exited(worker, self.pids.get(worker, 0), how, runs[1:], remains))
        self.turn()

    def feels_it(self, worker: int) -> None:
        """The interrupt has come to the worker."""
        self.says(worker, Interrupted())

    def prints(self, label: str, text: bytes) -> None:
        """The loop turns later."""
        run = self.runs[label]
        self.step(Printed([Words(run.task, run.attempt, self.worker_of(label), 1, 0, 0, text)], []))

    def waits(self, label: str) -> None:
        """Its task waits for others."""
        self.says(self.worker_of(label), Waits(task_id(label)))

    def goes_on(self, label: str) -> None:
        self.says(self.worker_of(label), GoesOn(task_id(label)))

    def says(self, worker: int, message: FromTask) -> None:
        self.step(Said(worker, [message]))
        self.turn()

    def gives_back(self, worker: int) -> None:
        """What lies in its pipe is taken out (for a sloth; others do it at once)."""
        untaken = self.pipes[worker][1:]
        del self.pipes[worker][1:]
        self.step(TakenBack(worker, untaken))
        self.turn()

    def measures(self, **sizes: int) -> None:
        """What the workers of these tasks take of the memory."""
        self.step(Measured({self.worker_of(label): size for label, size in sizes.items()}))
        self.turn()

    def leaves(self, *, drain: bool) -> None:
        self.step(Leave(drain, "SIGTERM"))
        self.turn()

    def reconnects(self) -> None:
        """What was cut is a connection again, a new one."""
        self.cut = False
        self.step(Reconnected())
        self.turn()

    # what the broker was told

    def all(self, kind: type[M]) -> list[M]:
        return [message for message in self.told if isinstance(message, kind)]

    @property
    def results(self) -> list[str]:
        return [label_of(outcome.task) for message in self.all(Results) for outcome in message.outcomes]

    @property
    def started(self) -> list[str]:
        return [label_of(attempt.task) for message in self.all(Progress) for attempt in message.started]

    @property
    def returned(self) -> list[str]:
        return [label_of(attempt.task) for message in self.all(Progress) for attempt in message.returned]

    @property
    def deaths(self) -> list[Death]:
        return [death for message in self.all(Progress) for death in message.deaths]

    @property
    def stopped(self) -> dict[str, str]:
        """Verdicts by label."""
        return {label_of(one.task): one.verdict for message in self.all(Progress) for one in message.stopped}

    @property
    def credits(self) -> list[int]:
        return [message.credit for message in self.all(Progress)]

    # the machinery

    def step(self, event: AgentEvent) -> None:
        for action in self._handled(event):
            match action:
                case ToBroker(envelope):
                    self._hear(over_the_wire(envelope))
                case Start(worker):
                    self.pipes[worker] = []
                    self.born.append(worker)
                    if self.workers_start:
                        self.pids[worker] = 1000 + worker
                        self.step(Born(worker, 1000 + worker))
                case Give(worker, runs):
                    self.pipes[worker].extend(runs)
                    self.given.extend((worker, label_of(run.task)) for run in runs)
                    self.runs.update((label_of(run.task), run) for run in runs)
                case TakeBack(worker):
                    if not self.sloth:
                        untaken = self.pipes[worker][1:]
                        del self.pipes[worker][1:]
                        self.step(TakenBack(worker, untaken))
                case AskStack(worker):
                    self.signals.append(("ask", worker))
                case TellStack(worker):
                    self.step(Stood(worker, self.stack))
                case Interrupt(worker):
                    self.signals.append(("interrupt", worker))
                case Kill(worker):
                    self.signals.append(("kill", worker))
                case Retire(worker):
                    self.retired.append(worker)
                    self.step(Exited(worker, self.pids[worker], "exit code 0", self.pipes.pop(worker)))
                case SendBeat(beat):
                    self.beats.append(beat)
                case Log(_, text):
                    self.log.append(text)
                case Quit(reason):
                    self.quit = reason

    def turn(self) -> None:
        """Everybody says what there is to say at this moment."""
        for _ in range(100):
            self.step(Tick())
            replies = [] if self.link is None or self.cut else self.link.flush(self.now)
            for envelope in replies:
                self._arrive(envelope)
            if not replies and self.agent.next_deadline() > self.now:
                return
        raise AssertionError("they never stop talking")

    def passes(self, seconds: float) -> None:
        end = self.now + seconds
        while self.now < end:
            # A clock never stands exactly on the deadline.
            self.now = min(end, max(self.agent.next_deadline() + 1e-6, self.now + 0.0005))
            self.turn()

    def _handled(self, event: AgentEvent) -> list[object]:
        actions = self.agent.handle(event, self.now)
        self.agent.sanity_check()
        return list(actions)

    def _arrive(self, envelope: Envelope) -> None:
        self.step(Reached(over_the_wire(envelope)))

    def _hear(self, envelope: Envelope) -> None:
        if self.cut:
            return
        if isinstance(envelope.body, NodeHello):
            self.hellos.append(envelope.body)
        elif self.link is not None and envelope.session == self.session:
            message = self.link.receive(envelope, self.now)
            if message is not None:
                self.told.append(message)


# --- around the client's brain ---------------------------------------------------------------------------------------


class Desk:
    """A client's brain and the broker it speaks to."""

    def __init__(self, *, lost_after_s: float = CLUSTER_LOST_AFTER_S, joins: bool = True) -> None:
        self.now = 100.0
        self.brain = Requests(ClientHello(token("client"), 1, Host("here", 1, PYTHON)), lost_after_s)
        self.link: Link | None = None
        self.session = 0
        self.cut = False
        self.told: list[Message] = []
        self.hellos: list[ClientHello] = []
        self.actions: list[ClientAction] = []
        self.turn()
        if joins:
            self.broker_welcomes()

    # the caller

    def asks(self, *labels: str, function: str = "f", **asked: object) -> None:
        shape = Shape(digest(function), options(**asked))
        tasks = [Asked(task_id(label), shape, b"call of " + label.encode()) for label in labels]
        self.step(Ask(tasks, {digest(function): blob(function)}))
        self.turn()

    def withdraws(self, *labels: str, force: bool = False) -> None:
        self.step(Withdraw([task_id(label) for label in labels], force))
        self.turn()

    def tells(self, message: object) -> None:
        self.step(Tell(message))  # type: ignore[arg-type]
        self.turn()

    # the broker

    def broker_welcomes(self, *answered: str, remembered: bool = False) -> None:
        """The answers that it has are right behind the welcome."""
        self.session += 1
        self.link = Link(self.session)
        welcome = Welcome(self.session, self.hellos[-1].life, 1, "cluster", 1.0, remembered=remembered)
        self._arrive(Envelope(self.session, 0, 0, welcome))
        if answered:
            self.link.send(Finals([Final(task_id(label), "ok", b"value") for label in answered]))
            for envelope in self.link.flush(self.now):
                self._arrive(envelope)
        self.turn()

    def broker_forgets(self) -> None:
        self._arrive(Envelope(self.session, 0, 0, SayHello()))
        self.link = None
        self.turn()

    def broker_says(self, *messages: Message) -> None:
        assert self.link is not None
        for message in messages:
            self.link.send(message)
        self.turn()

    def broker_refuses(self, text: str) -> None:
        self._arrive(Envelope(0, 0, 0, No("python", text)))
        self.turn()

    def broker_answers(self, *labels: str, value: bytes = b"value") -> None:
        self.broker_says(Finals([Final(task_id(label), "ok", value) for label in labels]))

    def reconnects(self) -> None:
        """What was cut is a connection again, a new one."""
        self.cut = False
        self.step(Reconnected())
        self.turn()

    # what came of it

    def all(self, kind: type[M]) -> list[M]:
        return [message for message in self.told if isinstance(message, kind)]

    @property
    def submitted(self) -> list[str]:
        return [label_of(spec.task) for message in self.all(Submit) for spec in message.tasks]

    @property
    def answered(self) -> list[str]:
        return [label_of(final.task) for action in self.acted(Finished) for final in action.finals]

    def acted(self, kind: type[M]) -> list[M]:
        return [action for action in self.actions if isinstance(action, kind)]

    # the machinery

    def step(self, event: ClientEvent) -> None:
        actions = self.brain.handle(event, self.now)
        self.brain.sanity_check()
        for action in actions:
            if isinstance(action, ToBroker):
                self._hear(over_the_wire(action.envelope))
            else:
                other = Began | Finished | NowRunning | Heard | Replied | TellNode | Warned | Broken | Quit
                assert isinstance(action, other)
                self.actions.append(action)

    def turn(self) -> None:
        for _ in range(100):
            if self.brain.next_deadline() <= self.now:
                self.step(Tick())
            replies = [] if self.link is None or self.cut else self.link.flush(self.now)
            for envelope in replies:
                self._arrive(envelope)
            if not replies and self.now < self.brain.next_deadline():
                return
        raise AssertionError("they never stop talking")

    def passes(self, seconds: float) -> None:
        end = self.now + seconds
        while self.now < end:
            self.now = min(end, max(self.brain.next_deadline(), self.now + MORE))
            self.turn()

    def sleeps(self, seconds: float) -> None:
        """The client's process is stopped."""
        self.now += seconds
        self.turn()

    def _arrive(self, envelope: Envelope) -> None:
        self.step(Reached(over_the_wire(envelope)))

    def _hear(self, envelope: Envelope) -> None:
        if self.cut:
            return
        if isinstance(envelope.body, ClientHello):
            self.hellos.append(envelope.body)
        elif self.link is not None and envelope.session == self.session:
            message = self.link.receive(envelope, self.now)
            if message is not None:
                self.told.append(message)


__all__ = [
    "Broker", "Client", "Desk", "Disk", "Node", "Workplace", "blob", "digest", "label_of", "options",
    "over_the_wire", "task_id", "token",
]  # fmt: skip
