"""Clients, of programs and of tasks, with the real core. They check every answer."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec

from ..core.events import (
    Ask,
    Asked,
    Began,
    Broken,
    Finished,
    Heard,
    Replied,
    Said,
    SetFence,
    Tell,
    TellNode,
    Tick,
    ToBroker,
    Withdraw,
)  # fmt: skip
from ..core.requests import Requests
from ..protocol import (
    ClientHello,
    Command,
    Fence,
    Follow,
    GroupDone,
    GroupWait,
    Host,
    JobTasks,
    Options,
    Payload,
    Shape,
    StillOpen,
    Submit,
    Words,
    nested_incarnation,
)  # fmt: skip
from .debts import Debts
from .peers import Peer, SimBroker
from .plans import FUNCTIONS, Plan, joined, number_of
from .world import SimulationFailed, World, named

if TYPE_CHECKING:
    from .nodes import SimWorker

GROUP = b"the-waitgroup-id"


class SimClient(Peer):
    """Asks for tasks over time, cancels a few, drains a node, waits on a WaitGroup, and checks every answer."""

    def __init__(self, world: World, name: bytes, broker: SimBroker, incarnation: bytes = b"") -> None:
        super().__init__(world, name, broker)
        hello = ClientHello(incarnation or world.random.randbytes(16), 1, Host("host", 2, "3.11.0"), bool(incarnation))
        self.core = Requests(hello, lost_after_s=1e9)
        self.plans: dict[bytes, Plan] = {}
        self.options: dict[bytes, Options] = {}
        self.cancelled: set[bytes] = set()
        self.answers: dict[bytes, str] = {}
        self.heard: set[bytes] = set()
        self.group_zero = False
        self.forgotten = False  # by a broker, once
        self.debts = [Debts(world, name, self.post)]
        self.finished_asking = False
        self._in_group: list[bytes] = []  # what the WaitGroup was asked about
        self._others: dict[bytes, tuple[Plan, Options]] = {}  # what others have asked for
        self._wake()

    def ask(self, plans: list[tuple[Plan, Options]]) -> None:
        entries: list[Asked] = []
        functions: dict[bytes, Payload] = {}
        for plan, options in plans:
            task = self.task(plan.number)
            digest = self.world.random.choice(list(FUNCTIONS))
            functions[digest] = FUNCTIONS[digest]
            self.plans[task] = plan
            self.options[task] = options
            inputs = tuple(map(self.task, plan.inputs))
            entries.append(Asked(task, Shape(digest, options), msgspec.msgpack.encode(plan), inputs))
        for debts in self.debts:
            debts.asks(self.options, [entry.task for entry in entries])
            debts.families |= any(plan.children and plan.group == debts.group for plan, _ in plans)
        self.post(Ask(entries, functions))

    def task(self, number: int) -> bytes:
        return self.name[:8].ljust(8, b".") + number.to_bytes(8, "big")

    def _handed_over(self, ask: Ask) -> Ask:
        """As the client's shell does it: with the results that are there; what has an input that failed ends at once."""
        tasks: list[Asked] = []
        values: dict[bytes, Payload] = {}
        for entry in ask.tasks:
            if self._input_failed(self.plans[entry.task]):
                self._answered(entry.task, "DependencyFailed", b"", "at once")
                for debts in self.debts:
                    debts.is_not_sent(entry)
                continue
            tasks.append(entry)
            values.update((each, msgspec.msgpack.encode(number_of(each))) for each in entry.inputs if each in self.answers)
        return Ask(tasks, ask.functions, values)

    def cancel_some(self) -> None:
        still = [task for task in self.plans if task not in self.answers]
        chosen = [task for task in still if self.world.random.random() < 0.1]
        self.cancelled.update(chosen)
        self.post(Withdraw(chosen, force=self.world.random.random() < 0.5))

    @property
    def life(self) -> int:
        return self.core._uplink.hello.life

    def accepted(self, owners: set[bytes]) -> set[bytes]:
        """The open tasks whose submission the broker has acknowledged."""
        link = self.core._uplink.link
        if link is None or b"c" + self.core._uplink.hello.incarnation not in owners:
            return set()
        on_their_way = {spec.task for body in link.unfinished() if isinstance(body, Submit) for spec in body.tasks}
        doubtful = {task for body in link.unfinished() if isinstance(body, StillOpen) for task in body.tasks}
        return self.core._open.keys() - self.core._fresh.keys() - on_their_way - doubtful

    def follow(self, job: str, asked_by: list[SimClient]) -> None:
        """Ask for the answers to the job's tasks, whoever has asked for them."""
        self._others = {task: (plan, one.options[task]) for one in asked_by for task, plan in one.plans.items()}
        self.cancelled.update(*(one.cancelled for one in asked_by))
        self.group_zero = True
        self.debts.clear()
        self.post(Tell(Follow(2, job)))

    def say(self, command: Command) -> None:
        self.post(Tell(command))

    def wait_group(self) -> None:
        self._in_group = [task for task in self.plans if self.options[task].group]
        self.post(Tell(GroupWait(1, GROUP)))
        for debts in self.debts:
            debts.wait(self.answers)

    def private_group(self) -> bytes:
        """Another WaitGroup to count on by hand."""
        self.debts.append(Debts(self.world, self.name, self.post, len(self.debts)))
        return self.debts[-1].group

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
                    self._group_done(reply)
                case TellNode(fence):
                    self._fence(fence)
                case Began(welcome) if welcome.life > 1 and not welcome.remembered:
                    self._is_forgotten()
                case Replied(JobTasks(_, _, tasks)):
                    self.plans.update((task, self._others[task][0]) for task in tasks)
                    self.options.update((task, self._others[task][1]) for task in tasks)
                    self.finished_asking = True
                case Broken(_, reason):
                    raise SimulationFailed(f"the client was cut off: {reason}")
                case _:
                    pass

    def _is_forgotten(self) -> None:
        """A broker does not know it: it is another, or has given it up."""
        self.forgotten = True
        for debts in self.debts:
            debts.forgotten = True

    def _group_done(self, reply: GroupDone) -> None:
        for debts in self.debts:
            if debts.request == reply.request:
                debts.replied(reply)

    def _fence(self, fence: Fence) -> None:
        raise SimulationFailed("a client that is in no task sets a fence")

    def _listen(self, words: Words) -> None:
        if words.task in self.answers:
            raise SimulationFailed(f"{named(words.task)} is heard of after its answer")
        if words.text != b"%d\n" % self.plans[words.task].number:
            raise SimulationFailed(f"{named(words.task)} is said to have printed what another has: {words.text!r}")
        self.heard.add(words.task)

    def _answered(self, task: bytes, verdict: str, value: Payload, text: str) -> None:
        self.world.say(f"= {self.name.decode()}: {named(task)} is {verdict} {text}")
        if task in self.answers:
            raise SimulationFailed(f"task {named(task)} was answered twice")
        self.answers[task] = verdict
        if verdict == "ok" and task not in self.heard and not self._others and self._nobody_began_anew():
            raise SimulationFailed(f"{named(task)} is answered, and what it printed has not come")
        plan = self.plans[task]
        if not self._may_end(task, plan, verdict, text):
            times = f"{self.world.executions[task]} executions, {self.world.deaths[task]} deaths"
            raise SimulationFailed(f"{named(task)} {plan} ended as {verdict!r} after {times}: {text}")
        if verdict == "ok" and msgspec.msgpack.decode(joined(value)) != plan.number:
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
                return self.name == b"follower" or self.life > 1  # whoever had the function was away
            case "NotAccepted":
                return self.broker.disk is not None and self.broker.disk.was_full
            case _:
                return False

    def _nobody_began_anew(self) -> bool:
        """Only between two sessions what is printed may be lost."""
        peers = [process for process in self.world.processes.values() if isinstance(process, Peer)]
        return not self.broker.crashes and all(peer.life == 1 for peer in peers)

    def _may_not_know(self, task: bytes, plan: Plan) -> bool:
        """How an input of this task has ended. Who follows a job hears nothing of others; a job's answers may come late;
        and the inputs of a job's task are gone with a client that was given up, be it back by now."""
        if task[:8] != self.task(0)[:8]:
            return True
        gone = bool(self.options[task].job) and self.life > 1
        return gone or any(self.options[each].job and each not in self.answers for each in map(self.task, plan.inputs))

    def _input_failed(self, plan: Plan) -> bool:
        inputs = map(self.task, plan.inputs)
        return any(each in self.cancelled or self.answers.get(each, "ok") != "ok" for each in inputs)

    def _group_is_zero(self, error: str) -> None:
        if error:
            raise SimulationFailed(f"the WaitGroup broke: {error}")
        if not self.answers.keys() >= set(self._in_group):
            raise SimulationFailed("the WaitGroup is zero before all of its tasks are answered")
        self.group_zero = True

    @property
    def done(self) -> bool:
        settled = all(debts.settled or (debts.families and self.world.counts_lost) for debts in self.debts)
        return self.finished_asking and len(self.answers) == len(self.plans) and self.group_zero and settled

    def deadline(self) -> float:
        return self.core.next_deadline()

    def check(self) -> None:
        self.core.sanity_check()


class InnerClient(SimClient):
    """The client of a worker's tasks, which ends with the worker. ``has_counted``: a task has, since the last fence."""

    def __init__(self, worker: SimWorker) -> None:
        world, node = worker.node.world, worker.node
        name = b"in%d" % next(world.inner_clients)
        self._worker = worker
        self.has_counted = True
        super().__init__(world, name, node.broker, nested_incarnation(node.core._uplink.hello.incarnation, worker.number, 1))
        self.debts.clear()
        self.group_zero = self.finished_asking = True
        self._requests = itertools.count(1_000)
        self._waits: dict[int, Callable[[GroupDone], None]] = {}
        self._awaited: list[tuple[list[bytes], Callable[[], None]]] = []

    def keep_order(self) -> None:
        if self.has_counted:
            self.has_counted = False
            self.post(SetFence())

    def wait(self, group: bytes, task: bytes, then: Callable[[GroupDone], None]) -> int:
        request = next(self._requests)
        self._waits[request] = then
        self.post(Tell(GroupWait(request, group, task)))
        return request

    def when_answered(self, tasks: list[bytes], then: Callable[[], None]) -> None:
        self._awaited.append((tasks, then))

    def has_answer(self, task: bytes) -> bool:
        return task in self.answers

    def went_well(self, task: bytes) -> bool:
        return self.answers.get(task) == "ok"

    def may_lose(self, task: bytes) -> bool:
        """What the task counts, or the task. That it has failed may be known here later than to one who waits elsewhere."""
        if self.answers.get(task, "ok") != "ok" or task in self.broker.watch.failed:
            return True
        return (task not in self.answers and not self.alive) or self.forgotten

    @property
    def orphans(self) -> bool:
        node = self._worker.node
        return node.life > 1 or node.core.name in self.broker.watch.lost

    def may_have_lost_counts(self, group: bytes) -> bool:
        """Or who has made the WaitGroup was given up, or has ended: what was answered may run again, what runs count for
        nothing."""
        maker = self.world.processes.get(group.partition(b"_")[0])
        return self.world.counts_lost or not isinstance(maker, SimClient) or maker.forgotten

    def _is_forgotten(self) -> None:
        super()._is_forgotten()
        self.world.counts_lost = True

    def _group_done(self, reply: GroupDone) -> None:
        if (then := self._waits.pop(reply.request, None)) is not None:
            then(reply)

    def _fence(self, fence: Fence) -> None:
        if self._worker.alive:
            self._worker.node.post(Said(self._worker.number, [fence]))

    def _answered(self, task: bytes, verdict: str, value: Payload, text: str) -> None:
        super()._answered(task, verdict, value, text)
        for tasks, then in list(self._awaited):
            if self.answers.keys() >= set(tasks):
                self._awaited.remove((tasks, then))
                then()
