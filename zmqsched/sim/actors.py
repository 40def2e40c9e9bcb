"""Everybody on the wire: the broker, nodes with their workers, clients. Each holds the real core and checks what it does."""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from random import Random

import msgspec

from ..core.agent import Agent
from ..core.events import (
    AgentAction,
    Arrived,
    Ask,
    Asked,
    BeatArrived,
    Began,
    Born,
    Broken,
    Exited,
    Finished,
    Give,
    Heard,
    Interrupt,
    Kill,
    Leave,
    Log,
    Printed,
    Quit,
    Reached,
    Replied,
    Retire,
    Said,
    SchedulerEvent,
    Send,
    SendBeat,
    Start,
    Stood,
    TakeBack,
    TakenBack,
    Tell,
    TellStack,
    Tick,
    ToBroker,
    Undelivered,
    Withdraw,
    Write,
)  # fmt: skip
from ..core.ledger import Ledger
from ..core.requests import Requests
from ..core.scheduler import Scheduler
from ..core.settings import Care, Settings
from ..core.stops import GRACE_S, LOOK_S
from ..protocol import (
    Adopt,
    Beat,
    ClientHello,
    Command,
    Declined,
    Dispatch,
    Done,
    Envelope,
    Finals,
    Follow,
    GoesOn,
    GroupAdd,
    GroupDone,
    GroupWait,
    Host,
    Interrupted,
    JobTasks,
    NodeHello,
    Options,
    Payload,
    Progress,
    Record,
    Results,
    Revoke,
    Run,
    Shape,
    StillOpen,
    Submit,
    Unknown,
    Waits,
    Words,
)  # fmt: skip
from .debts import Debts
from .disk import Disk
from .watch import Watch
from .world import Deliver, Process, SimulationFailed, World

FUNCTIONS = {digest: b"code of " + digest for digest in (b"function-digest1", b"function-digest2", b"function-digest3")}
GROUP = b"the-waitgroup-id"
SIGNAL_S = 0.03  # at most, from the sending of a signal until it has come; long, so that tasks end meanwhile
SETTLE_S = 2.0  # as the broker's shell has it
SLACK_BYTES = 5_000  # a journal is written anew after some fifty records
LAST_SENT = 8  # messages that may come late when their connection is replaced


class Plan(msgspec.Struct, array_like=True, frozen=True):
    """A task's call: runs ``seconds``, then returns ``number``, raises, raises the first time only, or kills its worker.

    ``once``: it must not run twice. ``retried``: its exception is one of those that a retry may help against. ``limit_s``:
    its time limit, or 0. ``stubborn``: it ignores interrupts. ``inputs``: the numbers of the tasks of the same client whose
    results it has as arguments. ``group``: the WaitGroup that it is sent, if any; ``counts``: whether it counts down on that
    when it begins, when it ends, or never; "around": it adds when it begins, and counts that down when it ends. ``waits``:
    for the middle part of its time it waits for others.
    """

    number: int
    seconds: float
    ends: str
    once: bool = False
    retried: bool = True
    limit_s: float = 0.0
    stubborn: bool = False
    inputs: tuple[int, ...] = ()
    group: bytes = b""
    counts: str = ""
    waits: bool = False


class SimBroker(Process):
    """The broker's process. ``crash`` ends it as SIGKILL would; another follows at the same address."""

    def __init__(self, world: World, settings: Settings) -> None:
        super().__init__(world, b"broker")
        self.settings = settings
        self.crashes = 0
        self.disk = Disk(world, self.post) if settings.journal else None
        self.watch: Watch
        self._refused: set[bytes] = set()
        self._knocking: list[Callable[[], None]] = []
        self._begin()

    def _begin(self) -> None:
        """A new process: it remembers nothing but its journal, if there is one."""
        before = self.watch if self.crashes else None
        settle_s = SETTLE_S if self.crashes else 0.0
        settings = replace(self.settings, epoch=1 + self.crashes, settle_s=settle_s)
        self.core = Scheduler(settings, Random(self.world.random.random()))
        if self.disk is not None:
            self.core.book.ledger = Ledger(SLACK_BYTES)
            self.core.restore(self.disk.records, self.world.now + self._clock)
        self.watch = Watch(self.core, before if self.disk else None)
        self._pauses_before = self.pauses

    def crash(self, down_s: float) -> None:
        """What was in memory, in the inbox and on its way is gone."""
        if self.alive:
            self.world.say(f"= broker crashes; another follows in {down_s:.2f} s")
            self.alive = self.paused = False
            self.crashes += 1
            self._inbox.clear()
            self._owned = self._owners()
            if self.disk is not None:
                self.disk.crash()
            self.world.at(down_s, self._restart)

    def _restart(self) -> None:
        self.world.say("= broker starts")
        self.alive = True
        self._clock = self.world.random.uniform(0.0, 1e5)
        self._wakes_at = math.inf
        self._begin()
        if self.disk is not None:
            self._check_kept(self.core, self._owned)
        for process in list(self.world.processes.values()):
            if isinstance(process, Peer):
                process.reconnect()
        knocking, self._knocking = self._knocking, []
        for knock in knocking:
            if self.world.random.random() < 0.5:
                knock()
        self._wake()

    def _owners(self) -> set[bytes]:
        return {owner.id for owner in self.core.book.owners}

    def _check_kept(self, follower: Scheduler, owned: set[bytes]) -> None:
        """What clients were told is accepted is there in the broker that follows, if this one had not given them up."""
        for client in self.world.processes.values():
            if not isinstance(client, SimClient) or b"c" + client.core._uplink.hello.incarnation not in owned:
                continue
            for task in client.accepted() - follower.book.tasks.keys() - self._refused:
                if not any(owner.has_answered(task) for owner in follower.book.owners):
                    raise SimulationFailed(f"task {task.hex()} was accepted, and the broker that follows does not know it")

    def _check_snapshot(self, records: list[Record]) -> None:
        """It is enough to go on with, if the broker ends as soon as it is written."""
        follower = Scheduler(replace(self.settings, epoch=2 + self.crashes), Random(0))
        follower.restore(records, self.core.book.now)
        self._check_kept(follower, self._owners())

    def knock(self, again: Callable[[], None]) -> None:
        """While nobody listens a connection keeps some of what it is to send."""
        self._knocking.append(again)

    def step(self, event: object, now: float) -> None:
        self._handle(event, now)  # type: ignore[arg-type]

    def _handle(self, event: SchedulerEvent, now: float) -> None:
        listened = self.world.now - self.absent_s
        self.watch.before(event, listened)
        actions = self.core.handle(event, now)
        self.watch.after(event, actions, listened)
        for action in actions:
            match action:
                case Send(address, envelope):
                    if isinstance(envelope.body, Finals):
                        self._refused.update(f.task for f in envelope.body.finals if f.verdict == "NotAccepted")
                    elif isinstance(envelope.body, Unknown):
                        self._refused.update(envelope.body.tasks)
                    target = self.world.processes.get(_owner(address))
                    if isinstance(target, Peer) and target.address == address:
                        target.reach(envelope)
                    else:
                        self._handle(Undelivered(address, "unreachable"), now)
                case Write() if self.disk is not None:
                    if action.anew:
                        self._check_snapshot(action.records)
                    self.disk.write(action)
                case Log(_, text):
                    self.world.say(f"= broker: {text}")
                case _:
                    pass

    def deadline(self) -> float:
        return self.core.next_deadline()

    def check(self) -> None:
        self.core.sanity_check()
        if self.pauses == self._pauses_before:
            self.watch.overdue(self.world.now + self._clock)


class Peer(Process):
    """A process with a connection to the broker. ``address`` is its routing id there, new with each connection."""

    def __init__(self, world: World, name: bytes, broker: SimBroker) -> None:
        super().__init__(world, name)
        self.broker = broker
        self._connections = itertools.count(1)
        self._last_sent: deque[tuple[Envelope, Deliver]] = deque(maxlen=LAST_SENT)
        self.reconnect()

    def reconnect(self, *, late: bool = False) -> None:
        """``late``: some of what was on the old connection, either way, comes after what goes over the new one."""
        self.address = self.name + b"#%d" % next(self._connections)
        for envelope, deliver in self._last_sent if late else ():
            self.world.carry(envelope, deliver, self.world.random.expovariate(1.0))
        self._last_sent.clear()

    def reach(self, envelope: Envelope) -> None:
        self._last_sent.append((envelope, self.reached))
        self.world.send(envelope, self.reached, self.name, "down", f"broker > {self.address.decode()}")

    def reached(self, envelope: Envelope) -> None:
        self.post(Reached(envelope))

    def to_broker(self, envelope: Envelope) -> None:
        if not self.broker.alive:
            self.broker.knock(lambda: self.to_broker(envelope))
            return
        address, crashes = self.address, self.broker.crashes

        def deliver(arrived: Envelope) -> None:
            if self.broker.crashes == crashes:
                self.broker.post(Arrived(address, "", arrived))

        self._last_sent.append((envelope, deliver))
        self.world.send(envelope, deliver, self.name, "up", f"{address.decode()} > broker")


class SimWorker:
    def __init__(self, node: SimNode, number: int, pid: int) -> None:
        self.node = node
        self.number = number
        self.pid = pid
        self.alive = True
        self.pipe: deque[Run] = deque()
        self.running: Run | None = None
        self._began = 0.0
        self._pauses = 0  # of its node, when it began
        self._ran = 0

    def give(self, run: Run) -> None:
        self.pipe.append(run)
        if self.running is None:
            self.next()

    def next(self) -> None:
        world = self.node.world
        while self.pipe and world.now > self.pipe[0].until:
            self.node.post(Said(self.number, [Declined(self.pipe.popleft().task)]))
        if not self.pipe:
            return
        run = self.running = self.pipe.popleft()
        self._ran += 1
        if 0 < self.node.max_tasks < self._ran:
            raise SimulationFailed(f"worker {self.number} runs {self._ran} tasks and may run {self.node.max_tasks}")
        plan = msgspec.msgpack.decode(_joined(run.call), type=Plan)
        world.executions[run.task] += 1
        given = {_number(each.task): msgspec.msgpack.decode(_joined(each.value)) for each in run.inputs}
        if given != {number: number for number in plan.inputs}:
            raise SimulationFailed(f"task {run.task.hex()} needs the results of {plan.inputs} and has {given}")
        if plan.once and world.executions[run.task] > 1:
            raise SimulationFailed(f"task {run.task.hex()} must not run twice and does")
        self._began = world.now
        self._pauses = self.node.pauses
        if plan.counts == "early":
            self._counts(run, plan, *((2, -3) if plan.number % 3 == 0 else (-1,)))
        elif plan.counts == "around":
            self._counts(run, plan, 2)
        world.at(plan.seconds, lambda: self.finish(run, plan))
        if plan.waits:
            world.at(plan.seconds * 0.25, lambda: self._turns(run, Waits(run.task)))
            world.at(plan.seconds * 0.75, lambda: self._turns(run, GoesOn(run.task)))

    def _turns(self, run: Run, message: Waits | GoesOn) -> None:
        if self.alive and self.node.alive and run is self.running:
            self.node.post(Said(self.number, [message]))

    def finish(self, run: Run, plan: Plan) -> None:
        if not self.alive or not self.node.alive or run is not self.running:
            return
        if self.node.paused:  # the whole host is frozen; it goes on where it stood
            self.node.at_thaw(lambda: self.finish(run, plan))
            return
        self._check_time(plan)
        if plan.ends == "death":
            self.die("killed by SIGSEGV")
            return
        ok = plan.ends == "value" or (plan.ends == "flaky" and self.node.world.executions[run.task] > 1)
        if plan.counts == "late":
            self._counts(run, plan, -1)
        elif plan.counts == "around":
            self._counts(run, plan, -3)
        self._answer(run, plan, ok=ok)

    def _counts(self, run: Run, plan: Plan, *deltas: int) -> None:
        for delta in deltas:
            if delta < 0:
                self.node.world.counted_down.add(run.task)
            self.node.post(Said(self.number, [GroupAdd([(plan.group, delta)])]))

    def interrupt(self) -> None:
        """SIGINT is on its way, and meant for what runs now."""
        world, meant = self.node.world, self.running
        if meant is not None:
            plan = msgspec.msgpack.decode(_joined(meant.call), type=Plan)
            if plan.limit_s and world.now - self._began >= plan.limit_s - 1e-6:
                world.overran.add(meant.task)
        world.at(SIGNAL_S * world.random.random(), lambda: self._interrupted(meant))

    def retire(self) -> None:
        """It ends when it has read all that is in its pipe, which is nothing."""
        if self.running is not None or self.pipe:
            raise SimulationFailed(f"worker {self.number} has something to do and is to end")
        self.node.world.at(SIGNAL_S * self.node.world.random.random(), lambda: self.die("exit code 0"))

    def kill(self) -> None:
        """SIGKILL is on its way."""
        self.node.world.at(SIGNAL_S * self.node.world.random.random(), lambda: self.die("killed by its node"))

    def _interrupted(self, meant: Run | None) -> None:
        if not self.alive or not self.node.alive:
            return
        if self.node.paused:
            self.node.at_thaw(lambda: self._interrupted(meant))
            return
        run = self.running
        if run is not None and run is not meant:
            raise SimulationFailed(f"an interrupt was meant for another task and hit {run.task.hex()}")
        self.node.post(Said(self.number, [Interrupted()]))
        if run is not None:
            plan = msgspec.msgpack.decode(_joined(run.call), type=Plan)
            if not plan.stubborn:
                self._answer(run, plan, ok=False)

    def _check_time(self, plan: Plan) -> None:
        ran_s = self.node.world.now - self._began
        longest_s = plan.limit_s + LOOK_S + (GRACE_S if plan.stubborn else 0.0) + 2 * SIGNAL_S
        if plan.limit_s and ran_s > longest_s and self.node.pauses == self._pauses:
            raise SimulationFailed(f"{plan} ran for {ran_s:.3f} s")

    def _answer(self, run: Run, plan: Plan, *, ok: bool) -> None:
        value = msgspec.msgpack.encode(plan.number)
        self.running = None
        self.node.post(Printed([Words(run.task, run.attempt, self.number, 1, 0, 0, b"%d\n" % plan.number)], []))
        done = Done(run.task, run.attempt, ok, value, plan.seconds, retry=plan.retried)
        self.node.post(Said(self.number, [done]))
        self.next()

    def die(self, how: str) -> None:
        if self.alive:
            self.alive = False
            if self.running is not None and how != "killed by its node":
                self.node.world.deaths[self.running.task] += 1
            self.node.post(Exited(self.number, self.pid, how, list(self.pipe)))


class SimNode(Peer):
    def __init__(
        self,
        world: World,
        name: bytes,
        broker: SimBroker,
        slots: int,
        resources: dict[str, float],
        label: str,
        leaves_in_s: float = math.inf,
        max_tasks: int = 0,
    ) -> None:
        super().__init__(world, name, broker)
        self.slots = slots
        self.label = label
        self.max_tasks = max_tasks  # of each worker
        self.resources = resources
        self.workers: dict[int, SimWorker] = {}
        self._ran: dict[int, bytes] = {}  # what each dead worker was running
        self._handed_back: set[tuple[bytes, int]] = set()
        self._revoked: set[bytes] = set()  # what nobody waits for any more, though it may run
        self._adopted: set[bytes] = set()
        self._answered: set[tuple[bytes, int]] = set()  # in this session
        self._told_credit = slots  # the most it told in this session
        self._thaw: list[Callable[[], None]] = []
        incarnation = world.random.randbytes(16)
        where = Host("host", 1, "3.11.0")
        hello = NodeHello(incarnation, 1, where, slots, slots, tuple(resources.items()), label=label)
        self.core = Agent(hello, (), Care(max_tasks), leaves_at=world.now + self._clock + leaves_in_s)
        self._link = self.core._uplink.link
        self._wake()

    def drain(self, why: str) -> None:
        self.post(Leave(True, why))

    @property
    def leaving(self) -> bool:
        return bool(self.core._leaving)

    def at_thaw(self, act: Callable[[], None]) -> None:
        self._thaw.append(act)

    def resumed(self) -> None:
        thaw, self._thaw = self._thaw, []
        for act in thaw:
            self.world.at(0.0, act)

    def step(self, event: object, now: float) -> None:
        if isinstance(event, Exited | Said | TakenBack | Stood | Born) and event.worker not in self.workers:
            return
        if isinstance(event, Exited):
            running = self.workers.pop(event.worker).running
            self._ran[event.worker] = b"" if running is None else running.task
        elif isinstance(event, Reached):
            self._notes(event.envelope)
        actions = self.core.handle(event, now)  # type: ignore[arg-type]
        if self.core._uplink.link is not self._link:
            self._link = self.core._uplink.link
            self._told_credit = self.slots
            self._answered.clear()
        for action in actions:
            self._act(action)
        if (wanted := self._wanted()) > self._told_credit:
            raise SimulationFailed(f"{self.core.name} holds {wanted} tasks, its credit was {self._told_credit}")
        if self.alive and now > self.core._leaves_at + 0.1 and not self.pauses:
            raise SimulationFailed(f"{self.core.name} stays beyond its time")

    def _wanted(self) -> int:
        """How many tasks it holds, except those that the broker rightly takes for finished, or has adopted."""
        return sum(
            not (held.orphan or held.task in self._revoked | self._adopted or (held.task, held.attempt) in self._answered)
            for held in self.core._held.values()
        )

    def _notes(self, envelope: Envelope) -> None:
        match envelope.body:
            case Dispatch(_, orders):
                self._revoked -= {order.task for order in orders}
                self._handed_back -= {(order.task, order.attempt) for order in orders}
            case Adopt(attempts):  # it ran already: the broker books it on top of what it may have sent before
                self._adopted |= {attempt.task for attempt in attempts}
            case Revoke(attempts):
                self._revoked |= {attempt.task for attempt in attempts}
            case _:
                pass

    def _act(self, action: AgentAction) -> None:
        match action:
            case ToBroker(envelope):
                if isinstance(envelope.body, Progress):
                    self._reports(envelope.body)
                elif isinstance(envelope.body, Results):
                    self._answered |= {(outcome.task, outcome.attempt) for outcome in envelope.body.outcomes}
                self.to_broker(envelope)
            case Start(number):
                worker = self.workers[number] = SimWorker(self, number, 1000 + number)
                self.world.at(0.005, lambda: self.post(Born(number, worker.pid)))
            case Give(number, runs):
                worker = self.workers[number]
                for run in runs:
                    self._gives(run)
                    if worker.alive:
                        worker.give(run)
                    else:  # it died while this was on its way: the pipe still holds it
                        worker.pipe.append(run)
            case TakeBack(number):
                runs = list(self.workers[number].pipe)
                self.workers[number].pipe.clear()
                self.post(TakenBack(number, runs))
            case TellStack(number):
                self.post(Stood(number, "somewhere"))
            case Interrupt(number):
                self.workers[number].interrupt()
            case Kill(number):
                self.workers[number].kill()
            case Retire(number):
                self.workers[number].retire()
            case SendBeat(beat):
                envelope = Envelope(0, 0, 0, beat)
                self.world.send(envelope, self._beat_arrives, self.name, "up", f"{self.name.decode()} beat")
            case Log(_, text):
                self.world.say(f"= {self.name.decode()}: {text}")
            case Quit():
                self.kill()

    def _reports(self, progress: Progress) -> None:
        self._told_credit = max(self._told_credit, progress.credit)
        self._handed_back.update((attempt.task, attempt.attempt) for attempt in progress.returned)
        self._answered |= {(stopped.task, stopped.attempt) for stopped in progress.stopped}
        for death in progress.deaths:
            if self._ran[death.worker] != death.task:
                raise SimulationFailed(f"task {death.task.hex()} is blamed for a death and was not running")

    def _gives(self, run: Run) -> None:
        if self.core.name in self.broker.watch.lost:
            raise SimulationFailed(f"{self.core.name} was given up and starts task {run.task.hex()}")
        if (run.task, run.attempt) in self._handed_back:
            raise SimulationFailed(f"task {run.task.hex()} attempt {run.attempt} was handed back and is started")

    def _beat_arrives(self, envelope: Envelope) -> None:
        if isinstance(envelope.body, Beat):
            self.broker.post(BeatArrived(envelope.body))

    def deadline(self) -> float:
        return self.core.next_deadline()

    def check(self) -> None:
        self.core.sanity_check()


class SimClient(Peer):
    """Asks for tasks over time, cancels a few, drains a node, waits on a WaitGroup, and checks every answer."""

    def __init__(self, world: World, name: bytes, broker: SimBroker) -> None:
        super().__init__(world, name, broker)
        self.core = Requests(ClientHello(world.random.randbytes(16), 1, Host("host", 2, "3.11.0")), lost_after_s=1e9)
        self.plans: dict[bytes, Plan] = {}
        self.options: dict[bytes, Options] = {}
        self.cancelled: set[bytes] = set()
        self.answers: dict[bytes, str] = {}
        self.heard: set[bytes] = set()
        self.group_zero = False
        self.debts = Debts(world, name, self.post)
        self.finished_asking = False
        self._in_group: list[bytes] = []  # what the WaitGroup was asked about
        self._others: dict[bytes, tuple[Plan, Options]] = {}  # what others have asked for
        self._wake()

    def ask(self, plans: list[tuple[Plan, Options]]) -> None:
        entries: list[Asked] = []
        functions: dict[bytes, Payload] = {}
        for plan, options in plans:
            task = self._task(plan.number)
            digest = self.world.random.choice(list(FUNCTIONS))
            functions[digest] = FUNCTIONS[digest]
            self.plans[task] = plan
            self.options[task] = options
            inputs = tuple(map(self._task, plan.inputs))
            entries.append(Asked(task, Shape(digest, options), msgspec.msgpack.encode(plan), inputs))
        self.debts.asks(self.options, [entry.task for entry in entries])
        self.post(Ask(entries, functions))

    def _task(self, number: int) -> bytes:
        return self.name[:8].ljust(8, b".") + number.to_bytes(8, "big")

    def _handed_over(self, ask: Ask) -> Ask:
        """As the client's shell does it: with the results that are there; what has an input that failed ends at once."""
        tasks: list[Asked] = []
        values: dict[bytes, Payload] = {}
        for entry in ask.tasks:
            if self._input_failed(self.plans[entry.task]):
                self._answered(entry.task, "DependencyFailed", b"", "at once")
                self.debts.is_not_sent(entry)
                continue
            tasks.append(entry)
            values.update((each, msgspec.msgpack.encode(_number(each))) for each in entry.inputs if each in self.answers)
        return Ask(tasks, ask.functions, values)

    def cancel_some(self) -> None:
        still = [task for task in self.plans if task not in self.answers]
        chosen = [task for task in still if self.world.random.random() < 0.1]
        self.cancelled.update(chosen)
        self.post(Withdraw(chosen, force=self.world.random.random() < 0.5))

    def accepted(self) -> set[bytes]:
        """The open tasks whose submission the broker has acknowledged."""
        link = self.core._uplink.link
        if link is None:
            return set()
        on_their_way = {spec.task for body in link.unfinished() if isinstance(body, Submit) for spec in body.tasks}
        doubtful = {task for body in link.unfinished() if isinstance(body, StillOpen) for task in body.tasks}
        return self.core._open.keys() - self.core._fresh.keys() - on_their_way - doubtful

    def follow(self, job: str, asked_by: list[SimClient]) -> None:
        """Ask for the answers to the job's tasks, whoever has asked for them."""
        self._others = {task: (plan, one.options[task]) for one in asked_by for task, plan in one.plans.items()}
        self.cancelled.update(*(one.cancelled for one in asked_by))
        self.group_zero = self.debts.settled = True
        self.post(Tell(Follow(2, job)))

    def say(self, command: Command) -> None:
        self.post(Tell(command))

    def wait_group(self) -> None:
        self._in_group = [task for task in self.plans if self.options[task].group]
        self.post(Tell(GroupWait(1, GROUP)))
        self.debts.wait(self.answers)

    def step(self, event: object, now: float) -> None:
        if isinstance(event, Ask):
            event = self._handed_over(event)
        elif isinstance(event, Tick) and now < self.core.next_deadline():
            return  # as the client's shell does it
        for action in self.core.handle(event, now):  # type: ignore[arg-type]
            match action:
                case ToBroker(envelope):
                    self.to_broker(envelope)
                case Finished(finals):
                    for final in finals:
                        self._answered(final.task, final.verdict, final.value, final.text)
                case Heard(words, _, _):
                    for said, _ in words:
                        self._listen(said)
                case Replied(GroupDone(1, error)):
                    self._group_is_zero(error)
                case Replied(GroupDone() as reply):
                    self.debts.replied(reply)
                case Began(welcome):
                    self.debts.forgotten |= welcome.life > 1 and not welcome.remembered
                case Replied(JobTasks(_, _, tasks)):
                    self.plans.update((task, self._others[task][0]) for task in tasks)
                    self.options.update((task, self._others[task][1]) for task in tasks)
                    self.finished_asking = True
                case Broken(_, reason):
                    raise SimulationFailed(f"the client was cut off: {reason}")
                case _:
                    pass

    def _listen(self, words: Words) -> None:
        if words.task in self.answers:
            raise SimulationFailed(f"{words.task.hex()[-4:]} is heard of after its answer")
        if words.text != b"%d\n" % self.plans[words.task].number:
            raise SimulationFailed(f"{words.task.hex()[-4:]} is said to have printed what another has: {words.text!r}")
        self.heard.add(words.task)

    def _answered(self, task: bytes, verdict: str, value: Payload, text: str) -> None:
        self.world.say(f"= {self.name.decode()}: {task.hex()[-4:]} is {verdict} {text}")
        if task in self.answers:
            raise SimulationFailed(f"task {task.hex()} was answered twice")
        self.answers[task] = verdict
        if verdict == "ok" and task not in self.heard and not self._others and self._nobody_began_anew():
            raise SimulationFailed(f"{task.hex()[-4:]} is answered, and what it printed has not come")
        plan = self.plans[task]
        if not self._may_end(task, plan, verdict, text):
            times = f"{self.world.executions[task]} executions, {self.world.deaths[task]} deaths"
            raise SimulationFailed(f"{task.hex()[-4:]} {plan} ended as {verdict!r} after {times}: {text}")
        if verdict == "ok" and msgspec.msgpack.decode(_joined(value)) != plan.number:
            raise SimulationFailed(f"{plan} got somebody else's value {value!r}")

    def _may_end(self, task: bytes, plan: Plan, verdict: str, text: str) -> bool:
        retries = self.options[task].retries if plan.retried and task not in self.cancelled else 0
        match verdict:
            case "ok":
                return plan.ends == "value" or (plan.ends == "flaky" and self.world.executions[task] > 1)
            case "error":
                enough = self.world.executions[task] > retries
                return enough if plan.ends == "error" else plan.ends == "flaky" and not retries
            case "WorkerDied":
                return plan.once or self.world.deaths[task] >= self.broker.settings.max_deaths
            case "cancelled":
                return task in self.cancelled
            case "TaskTimeout":
                return task in self.world.overran
            case "DependencyFailed":
                return self._input_failed(plan) or (bool(plan.inputs) and self._may_not_know(task, plan))
            case "Unschedulable":
                return "gpu" in dict(self.options[task].resources)  # its only node may have been away for too long
            case "NotAccepted" if self.options[task].job and not text.startswith("the broker"):
                return self.name == b"follower" or self.core._uplink.hello.life > 1  # whoever had the function was away
            case "NotAccepted":
                return self.broker.disk is not None and self.broker.disk.was_full
            case _:
                return False

    def _nobody_began_anew(self) -> bool:
        """Only between two sessions what is printed may be lost."""
        peers = [process for process in self.world.processes.values() if isinstance(process, SimNode | SimClient)]
        return not self.broker.crashes and all(peer.core._uplink.hello.life == 1 for peer in peers)

    def _may_not_know(self, task: bytes, plan: Plan) -> bool:
        """How an input of this task has ended. Who follows a job hears nothing of others; a job's answers may come late;
        and the inputs of a job's task are gone with a client that was given up, be it back by now."""
        if task[:8] != self._task(0)[:8]:
            return True
        gone = bool(self.options[task].job) and self.core._uplink.hello.life > 1
        return gone or any(self.options[each].job and each not in self.answers for each in map(self._task, plan.inputs))

    def _input_failed(self, plan: Plan) -> bool:
        inputs = map(self._task, plan.inputs)
        return any(each in self.cancelled or self.answers.get(each, "ok") != "ok" for each in inputs)

    def _group_is_zero(self, error: str) -> None:
        if error:
            raise SimulationFailed(f"the WaitGroup broke: {error}")
        if not self.answers.keys() >= set(self._in_group):
            raise SimulationFailed("the WaitGroup is zero before all of its tasks are answered")
        self.group_zero = True

    @property
    def done(self) -> bool:
        return self.finished_asking and len(self.answers) == len(self.plans) and self.group_zero and self.debts.settled

    def deadline(self) -> float:
        return self.core.next_deadline()

    def check(self) -> None:
        self.core.sanity_check()


def _number(task: bytes) -> int:
    return int.from_bytes(task[8:], "big")


def _joined(payload: Payload) -> bytes:
    return payload if isinstance(payload, bytes) else b"".join(payload)


def _owner(address: bytes) -> bytes:
    return address.split(b"#")[0]
