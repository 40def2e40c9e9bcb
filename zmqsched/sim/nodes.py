"""Nodes, with the real core, and their workers, which are simulated. They check what is run."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable

import msgspec

from ..core.agent import Agent
from ..core.events import (
    AgentAction,
    BeatArrived,
    Born,
    Exited,
    Give,
    Interrupt,
    Kill,
    Leave,
    Log,
    Printed,
    Quit,
    Reached,
    Retire,
    Said,
    SendBeat,
    Start,
    Stood,
    TakeBack,
    TakenBack,
    TellStack,
    ToBroker,
)  # fmt: skip
from ..core.settings import Care
from ..core.stops import GRACE_S, LOOK_S
from ..protocol import (
    Adopt,
    Beat,
    Declined,
    Dispatch,
    Done,
    Envelope,
    GoesOn,
    GroupAdd,
    Host,
    Interrupted,
    NodeHello,
    Progress,
    Results,
    Revoke,
    Run,
    Waits,
    Words,
)  # fmt: skip
from .accounts import Account
from .clients import InnerClient
from .families import Family
from .peers import Peer, SimBroker
from .plans import Plan, joined, number_of
from .world import SimulationFailed, World, named

SIGNAL_S = 0.03  # at most, from the sending of a signal until it has come; long, so that tasks end meanwhile


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
        self._account = Account()  # of what runs
        self._family: Family | None = None
        self._client: InnerClient | None = None

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
        plan = msgspec.msgpack.decode(joined(run.call), type=Plan)
        world.executions[run.task] += 1
        given = {number_of(each.task): msgspec.msgpack.decode(joined(each.value)) for each in run.inputs}
        if given != {number: number for number in plan.inputs}:
            raise SimulationFailed(f"task {named(run.task)} needs the results of {plan.inputs} and has {given}")
        if plan.once and world.executions[run.task] > 1:
            raise SimulationFailed(f"task {named(run.task)} must not run twice and does")
        self._began = world.now
        self._pauses = self.node.pauses
        self._account = world.accounts.begin(run.task)
        self._family = None
        if plan.children:
            self._family = Family(self, run, plan, self._account, lambda: self.finish(run, plan))
            self.then(run, plan.seconds * 0.5, self._family.begin)
            return
        if plan.counts == "early":
            self.counts(run, plan, *((2, -3) if plan.number % 3 == 0 else (-1,)))
        elif plan.counts == "around":
            self.counts(run, plan, 2)
        self.then(run, plan.seconds, lambda: self.finish(run, plan))
        if plan.waits:
            world.at(plan.seconds * 0.25, lambda: self.waits(run))
            world.at(plan.seconds * 0.75, lambda: self.goes_on(run))

    def then(self, run: Run, delay: float, act: Callable[[], None]) -> None:
        """The task goes on so much later, if nobody has ended it by then."""

        def goes_on() -> None:
            if not self.alive or not self.node.alive or run is not self.running:
                return
            if self.node.paused:  # the whole host is frozen; it goes on where it stood
                self.node.at_thaw(goes_on)
            else:
                act()

        self.node.world.at(delay, goes_on)

    def waits(self, run: Run) -> None:
        self._turns(run, Waits(run.task))

    def goes_on(self, run: Run) -> None:
        self._turns(run, GoesOn(run.task))

    def _turns(self, run: Run, message: Waits | GoesOn) -> None:
        if self.alive and self.node.alive and run is self.running:
            self.node.post(Said(self.number, [message]))

    def inner_client(self) -> InnerClient:
        """The client of its tasks, made when one asks for it first."""
        if self._client is None:
            self._client = InnerClient(self)
        return self._client

    def finish(self, run: Run, plan: Plan) -> None:
        self._check_time(plan)
        if plan.ends == "death":
            self.die("killed by SIGSEGV")
            return
        ok = plan.ends == "value" or (plan.ends == "flaky" and self.node.world.executions[run.task] > 1)
        if plan.counts == "late":
            self.counts(run, plan, -1)
        elif plan.counts == "around":
            self.counts(run, plan, -3)
        self._account.ended = True
        self._answer(run, plan, ok=ok)

    def counts(self, run: Run, plan: Plan, *deltas: int) -> None:
        for delta in deltas:
            self._account.paid |= delta < 0
            self.node.post(Said(self.number, [GroupAdd([(plan.group, delta)])]))
        if self._client is not None:
            self._client.has_counted = True

    def interrupt(self) -> None:
        """SIGINT is on its way, and meant for what runs now."""
        world, meant = self.node.world, self.running
        if meant is not None:
            plan = msgspec.msgpack.decode(joined(meant.call), type=Plan)
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
            raise SimulationFailed(f"an interrupt was meant for another task and hit {named(run.task)}")
        self.node.post(Said(self.number, [Interrupted()]))
        if run is not None:
            plan = msgspec.msgpack.decode(joined(run.call), type=Plan)
            if not plan.stubborn:
                if self._family is not None:
                    self._family.interrupted()
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
            if self._client is not None:
                self._client.kill()
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

    @property
    def life(self) -> int:
        return self.core._uplink.hello.life

    def pause(self, seconds: float) -> None:
        """The whole host."""
        super().pause(seconds)
        for client in self.inner_clients():
            client.pause(seconds)

    def kill(self) -> None:
        super().kill()
        for client in self.inner_clients():
            client.kill()

    def inner_clients(self) -> list[InnerClient]:
        return [worker._client for worker in self.workers.values() if worker._client is not None and worker._client.alive]

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
        for client in self.inner_clients():
            client.resume(client.pauses)

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
                raise SimulationFailed(f"task {named(death.task)} is blamed for a death and was not running")

    def _gives(self, run: Run) -> None:
        if self.core.name in self.broker.watch.lost:
            raise SimulationFailed(f"{self.core.name} was given up and starts task {named(run.task)}")
        if (run.task, run.attempt) in self._handed_back:
            raise SimulationFailed(f"task {named(run.task)} attempt {run.attempt} was handed back and is started")

    def _beat_arrives(self, envelope: Envelope) -> None:
        if isinstance(envelope.body, Beat):
            self.broker.post(BeatArrived(envelope.body))

    def deadline(self) -> float:
        return self.core.next_deadline()

    def check(self) -> None:
        self.core.sanity_check()
