"""The simulator: the real scheduler, the real agents and the real clients, in one thread on a virtual clock, with faults.

Rules
-----
* Same seed, same run. Everything random comes from one ``random.Random(seed)``.
* The wire encodes and decodes each message as the real one does. Workers are simulated: a task's call says how long it
  runs and how it ends.
* Each seed switches on a random subset of the faults with random strength (all at once would mask bugs), for the first
  part of the run. A quiet tail follows, in which everything must finish: safety is not enough.
* After every step the cores' own ``sanity_check`` runs; at the end each task has had exactly one final answer, the right
  one, and nobody holds anything any more.
* A failure says its seed; ``python -m zmqsched.sim --start SEED --seeds 1 --verbose`` tells the story.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import sys
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

import msgspec

from .core.agent import Agent
from .core.events import (
    AgentAction,
    Arrived,
    Ask,
    BeatArrived,
    Born,
    Broken,
    Exited,
    Finished,
    Give,
    Log,
    Quit,
    Reached,
    Replied,
    Said,
    Send,
    SendBeat,
    Start,
    TakeBack,
    TakenBack,
    Tell,
    Tick,
    ToBroker,
    Undelivered,
    Withdraw,
)  # fmt: skip
from .core.policy import POLICIES
from .core.requests import Requests
from .core.scheduler import Scheduler, Settings
from .protocol import (
    Beat,
    ClientHello,
    Done,
    Envelope,
    GroupDone,
    GroupWait,
    Host,
    NodeHello,
    Options,
    Payload,
    Run,
    Shape,
    decode,
    encode,
)  # fmt: skip

DELAY_S = 0.0002
QUIET_AFTER_S = 30.0
LIMIT_S = 200.0
FUNCTION = b"function-digest!"
GROUP = b"the-waitgroup-id"
FAULTS = (
    "drop", "duplicate", "delay", "reconnect",
    "kill worker", "kill node", "pause node", "pause broker", "pause client",
)  # fmt: skip


class SimulationFailed(AssertionError):
    pass


class Plan(msgspec.Struct, array_like=True, frozen=True):
    """A task's call: runs ``seconds``, then returns ``number``, raises, or kills its worker."""

    number: int
    seconds: float
    ends: str


@dataclass
class World:
    """The clock, the wire and everybody on it."""

    seed: int
    verbose: bool = False
    random: Random = field(init=False)
    now: float = 0.0
    faults: dict[str, float] = field(default_factory=dict)
    executions: Counter[bytes] = field(default_factory=Counter)
    steps: int = 0

    def __post_init__(self) -> None:
        self.random = Random(self.seed)
        self._agenda: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()
        self.processes: dict[bytes, Process] = {}

    def at(self, delay: float, act: Callable[[], None]) -> None:
        heapq.heappush(self._agenda, (self.now + delay, next(self._numbers), act))

    def run_until(self, limit: float, done: Callable[[], bool]) -> bool:
        while self._agenda and not done():
            at, _, act = heapq.heappop(self._agenda)
            if at > limit:
                return False
            self.now = max(self.now, at)
            self.steps += 1
            act()
        return done()

    def say(self, text: str) -> None:
        if self.verbose:
            print(f"{self.now:9.4f}  {text}")

    def chance(self, fault: str) -> bool:
        return self.random.random() < self.faults.get(fault, 0.0)

    def send(self, envelope: Envelope, deliver: Callable[[Envelope], None], who: str) -> None:
        """Carry a message over the wire, with the wire's faults."""
        frames = [bytes(frame) for frame in encode(envelope)]
        self.say(f"{who} {type(envelope.body).__name__} seq={envelope.seq} ack={envelope.ack}")
        for _ in range(2 if self.chance("duplicate") else 1):
            if self.chance("drop"):
                continue
            delay = DELAY_S  # a connection keeps the order
            if self.chance("delay"):
                delay += self.random.expovariate(2.0)
            self.at(delay, lambda: deliver(decode(frames)))


class Process:
    """One process: an inbox, a core, and turns. Paused, it gathers what comes and handles it at once on waking."""

    def __init__(self, world: World, name: bytes) -> None:
        self.world = world
        self.name = name
        self.alive = True
        self.paused = False
        self._inbox: deque[object] = deque()
        self._wakes_at = float("inf")
        world.processes[name] = self

    def post(self, event: object) -> None:
        if self.alive:
            self._inbox.append(event)
            self._turn()

    def pause(self, seconds: float) -> None:
        if self.alive and not self.paused:
            self.world.say(f"= {self.name.decode()} paused for {seconds:.2f} s")
            self.paused = True
            self.world.at(seconds, self._resume)

    def _resume(self) -> None:
        self.world.say(f"= {self.name.decode()} resumed")
        self.paused = False
        self._turn()

    def kill(self) -> None:
        self.alive = False
        self.world.processes.pop(self.name, None)

    def _turn(self) -> None:
        if self.paused or not self.alive:
            return
        now = self.world.now
        while self._inbox:
            self.step(self._inbox.popleft(), now)
        if self.alive:
            self.step(Tick(), now)
            self.check()
        if self.alive:
            self._arm()

    def _arm(self) -> None:
        wake = max(self.deadline() or 0.0, self.world.now + 1e-5)
        if wake < self._wakes_at or self._wakes_at <= self.world.now:
            self._wakes_at = wake
            self.world.at(wake - self.world.now, self._turn)

    def step(self, event: object, now: float) -> None:
        raise NotImplementedError

    def deadline(self) -> float | None:
        raise NotImplementedError

    def check(self) -> None:
        raise NotImplementedError


class SimBroker(Process):
    def __init__(self, world: World, policy: str) -> None:
        super().__init__(world, b"broker")
        cap = world.random.choice((2_000, 10_000, 1 << 30))  # 3 tasks, 15, no limit
        self.core = Scheduler(Settings(policy=policy, max_queued_bytes=cap), Random(world.random.random()))

    def step(self, event: object, now: float) -> None:
        for action in self.core.handle(event, now):  # type: ignore[arg-type]
            match action:
                case Send(peer, envelope):
                    target = self.world.processes.get(_owner(peer))
                    if not isinstance(target, Peer) or target.address != peer:
                        self.step(Undelivered(peer, "unreachable"), now)
                        continue
                    self.world.send(envelope, target.reached, f"broker > {peer.decode()}")
                case Log(_, text):
                    self.world.say(f"= broker: {text}")
                case _:
                    pass

    def deadline(self) -> float | None:
        return self.core.next_deadline()

    def check(self) -> None:
        self.core.sanity_check()


class Peer(Process):
    """A process with a connection to the broker. ``address`` is its routing id there, new with each connection."""

    def __init__(self, world: World, name: bytes, broker: SimBroker) -> None:
        super().__init__(world, name)
        self.broker = broker
        self._connections = itertools.count(1)
        self.reconnect()

    def reconnect(self) -> None:
        self.address = self.name + b"#%d" % next(self._connections)

    def reached(self, envelope: Envelope) -> None:
        self.post(Reached(envelope))

    def to_broker(self, envelope: Envelope) -> None:
        address = self.address
        who = f"{address.decode()} > broker"
        self.world.send(envelope, lambda e: self.broker.post(Arrived(address, "", e)), who)


class SimWorker:
    def __init__(self, node: SimNode, number: int, pid: int) -> None:
        self.node = node
        self.number = number
        self.pid = pid
        self.alive = True
        self.pipe: deque[Run] = deque()
        self.running: Run | None = None

    def give(self, run: Run) -> None:
        self.pipe.append(run)
        if self.running is None:
            self.next()

    def next(self) -> None:
        if not self.pipe:
            return
        self.running = self.pipe.popleft()
        plan = msgspec.msgpack.decode(_joined(self.running.call), type=Plan)
        self.node.world.executions[self.running.task] += 1
        self.node.world.at(plan.seconds, lambda: self.finish(plan))

    def finish(self, plan: Plan) -> None:
        run = self.running
        if not self.alive or not self.node.alive or run is None:
            return
        if self.node.paused:  # the whole host is frozen; it goes on where it stood
            self.node.world.at(0.01, lambda: self.finish(plan))
            return
        if plan.ends == "death":
            self.die("killed by SIGSEGV")
            return
        value = msgspec.msgpack.encode(plan.number)
        self.running = None
        self.next()
        done = Done(run.task, run.attempt, plan.ends == "value", value, plan.seconds, retry=plan.number % 4 > 0)
        self.node.post(Said(self.number, done))

    def die(self, how: str) -> None:
        if self.alive:
            self.alive = False
            self.node.post(Exited(self.number, self.pid, how, list(self.pipe)))


class SimNode(Peer):
    def __init__(self, world: World, name: bytes, broker: SimBroker, slots: int, resources: dict[str, float]) -> None:
        super().__init__(world, name, broker)
        self.slots = slots
        self.resources = resources
        self.workers: dict[int, SimWorker] = {}
        incarnation = world.random.randbytes(16)
        where = Host("host", 1, "3.11.0")
        self.core = Agent(NodeHello(incarnation, 1, where, slots, slots, tuple(resources.items())))
        self.post(Tick())

    def step(self, event: object, now: float) -> None:
        if isinstance(event, Exited | Said | TakenBack | Born) and event.worker not in self.workers:
            return
        if isinstance(event, Exited):
            del self.workers[event.worker]
        for action in self.core.handle(event, now):  # type: ignore[arg-type]
            self._act(action, now)

    def _act(self, action: AgentAction, now: float) -> None:
        match action:
            case ToBroker(envelope):
                self.to_broker(envelope)
            case Start(number):
                worker = self.workers[number] = SimWorker(self, number, 1000 + number)
                self.world.at(0.005, lambda: self.post(Born(number, worker.pid)))
            case Give(number, run):
                if (worker := self.workers[number]).alive:
                    worker.give(run)
                else:  # it died while this was on its way: the pipe still holds it
                    worker.pipe.append(run)
            case TakeBack(number):
                runs = list(self.workers[number].pipe)
                self.workers[number].pipe.clear()
                self._inbox.append(TakenBack(number, runs))
                self.world.at(0.0, self._turn)
            case SendBeat(beat):
                self.world.send(Envelope(0, 0, 0, beat), self._beat_arrives, f"{self.name.decode()} beat")
            case Log(_, text):
                self.world.say(f"= {self.name.decode()}: {text}")
            case Quit():
                self.kill()

    def _beat_arrives(self, envelope: Envelope) -> None:
        if isinstance(envelope.body, Beat):
            self.broker.post(BeatArrived(envelope.body))

    def deadline(self) -> float | None:
        return self.core.next_deadline()

    def check(self) -> None:
        self.core.sanity_check()


class SimClient(Peer):
    """Asks for tasks over time, cancels a few, waits on a WaitGroup, and checks every answer."""

    def __init__(self, world: World, name: bytes, broker: SimBroker) -> None:
        super().__init__(world, name, broker)
        self.core = Requests(ClientHello(world.random.randbytes(16), 1, Host("host", 2, "3.11.0")), lost_after_s=1e9)
        self.plans: dict[bytes, Plan] = {}
        self.retries: dict[bytes, int] = {}
        self.cancelled: set[bytes] = set()
        self.answers: dict[bytes, str] = {}
        self.group_zero = False
        self.group_asked = False
        self.finished_asking = False
        self.post(Tick())

    def ask(self, count: int, kinds: list[Options]) -> None:
        entries: list[tuple[bytes, Shape, Payload]] = []
        for _ in range(count):
            task = self.name[:8].ljust(8, b".") + len(self.plans).to_bytes(8, "big")
            ends = self.world.random.choices(("value", "error", "death"), (90, 7, 3))[0]
            seconds = self.world.random.choice((0.0001, 0.001, 0.02, 0.3, 2.0)) * (0.5 + self.world.random.random())
            plan = self.plans[task] = Plan(len(self.plans), seconds, ends)
            options = self.world.random.choice(kinds)
            entries.append((task, Shape(FUNCTION, options), msgspec.msgpack.encode(plan)))
        self.post(Ask(entries, {FUNCTION: b"the function"}))

    def cancel_some(self) -> None:
        still = [task for task in self.plans if task not in self.answers]
        chosen = [task for task in still if self.world.random.random() < 0.1]
        self.cancelled.update(chosen)
        self.post(Withdraw(chosen))

    def wait_group(self) -> None:
        self.group_asked = True
        self.post(Tell(GroupWait(1, GROUP)))

    def step(self, event: object, now: float) -> None:
        for action in self.core.handle(event, now):  # type: ignore[arg-type]
            match action:
                case ToBroker(envelope):
                    self.to_broker(envelope)
                case Finished(finals):
                    for final in finals:
                        self._answered(final.task, final.verdict, final.value, final.text)
                case Replied(GroupDone(_, error)):
                    if error:
                        raise SimulationFailed(f"the WaitGroup broke: {error}")
                    self._group_is_zero()
                case Broken(_, reason):
                    raise SimulationFailed(f"the client was cut off: {reason}")
                case _:
                    pass

    def _answered(self, task: bytes, verdict: str, value: Payload, text: str) -> None:
        self.world.say(f"= {self.name.decode()}: {task.hex()[-4:]} is {verdict} {text}")
        if task in self.answers:
            raise SimulationFailed(f"task {task.hex()} was answered twice")
        self.answers[task] = verdict
        plan = self.plans[task]
        expected = {"value": "ok", "error": "error", "death": "WorkerDied"}[plan.ends]
        if verdict == "WorkerDied" and plan.ends != "death" and text.count("SIGKILL") == text.count("\n  worker "):
            return  # an innocent that was hit by the simulated killer as often as the cap allows
        if verdict != expected and not (verdict == "cancelled" and task in self.cancelled):
            raise SimulationFailed(f"task {plan} ended as {verdict!r}: {text}")
        if verdict == "ok" and msgspec.msgpack.decode(_joined(value)) != plan.number:
            raise SimulationFailed(f"task {plan} got somebody else's value {value!r}")

    def _group_is_zero(self) -> None:
        self.group_zero = True

    @property
    def done(self) -> bool:
        return self.finished_asking and len(self.answers) == len(self.plans) and self.group_zero

    def deadline(self) -> float | None:
        return self.core.next_deadline()

    def check(self) -> None:
        self.core.sanity_check()


def _joined(payload: Payload) -> bytes:
    return payload if isinstance(payload, bytes) else b"".join(payload)


def _owner(address: bytes) -> bytes:
    return address.split(b"#")[0]


def simulate(seed: int, *, verbose: bool = False, policy: str | None = None) -> World:
    """One run. Raises :class:`SimulationFailed` (or an AssertionError of a core) if a promise is broken."""
    world = World(seed, verbose)
    random = world.random
    broker = SimBroker(world, policy or random.choice(sorted(POLICIES)))
    nodes = [
        SimNode(world, b"node%d" % n, broker, random.randint(1, 3), {"cpu": 3.0, **({"gpu": 1.0} if n == 0 else {})})
        for n in range(random.randint(1, 4))
    ]
    clients = [SimClient(world, b"client%d" % n, broker) for n in range(random.randint(1, 2))]
    kinds = [Options(priority=random.randint(-1, 1), retries=random.randint(0, 2), group=GROUP) for _ in range(3)]
    kinds.append(Options(retries=2, backoff=random.choice((0.01, 3.0)), group=GROUP))
    kinds.append(Options(resources=(("cpu", 1.0), ("gpu", 1.0)), group=GROUP))
    kinds.append(Options(resources=(("cpu", 2.0),), group=GROUP))
    world.faults = {fault: random.random() ** 2 * 0.5 for fault in FAULTS if random.random() < 0.5}
    world.say(f"= faults: {world.faults}")
    for client in clients:
        _schedule_client(world, client, kinds)
    _schedule_chaos(world, broker, nodes, clients)

    def calm() -> None:
        world.faults = {}
        world.say("= quiet")

    world.at(QUIET_AFTER_S, calm)
    if not world.run_until(LIMIT_S, lambda: all(client.done for client in clients) and world.now > QUIET_AFTER_S):
        missing = {c.name: [p for t, p in c.plans.items() if t not in c.answers] for c in clients}
        raise SimulationFailed(f"not finished after {LIMIT_S} s: {missing}, {broker.core.counts}")
    world.run_until(world.now + 5.0, lambda: not broker.core.unacknowledged())
    if (left := dict(broker.core.open_counts())) or broker.core.unacknowledged():
        raise SimulationFailed(f"all is answered and the scheduler still holds {left or 'answers'}")
    return world


def _schedule_client(world: World, client: SimClient, kinds: list[Options]) -> None:
    bursts = world.random.randint(1, 4)
    for n in range(bursts):
        world.at(n * world.random.random() * 4, lambda: client.ask(world.random.randint(1, 25), kinds))
    world.at(world.random.random() * 15, client.cancel_some)

    def last() -> None:
        client.ask(3, kinds)
        client.finished_asking = True
        client.wait_group()

    world.at(20.0, last)


def _schedule_chaos(world: World, broker: SimBroker, nodes: list[SimNode], clients: list[SimClient]) -> None:
    """Twice a second, each fault of processes strikes with its own chance."""
    spare = itertools.count(len(nodes))

    def strike() -> None:
        index = world.random.randrange(len(nodes))
        node = nodes[index]
        if world.chance("kill worker") and node.workers:
            world.random.choice(list(node.workers.values())).die("killed by SIGKILL")
        if world.chance("kill node"):
            world.say(f"= {node.name.decode()} killed")
            node.kill()
            nodes[index] = SimNode(world, b"node%d" % next(spare), broker, node.slots, node.resources)
        if world.chance("pause node"):
            nodes[index].pause(world.random.expovariate(0.3))
        if world.chance("pause broker"):
            broker.pause(world.random.expovariate(0.5))
        if world.chance("pause client"):
            world.random.choice(clients).pause(min(90.0, world.random.expovariate(0.02)))
        if world.chance("reconnect"):
            world.random.choice([*nodes, *clients]).reconnect()
        if world.now < QUIET_AFTER_S:
            world.at(0.5, strike)

    world.at(0.5, strike)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m zmqsched.sim", description="Simulate clusters with faults.")
    parser.add_argument("--seeds", type=int, default=1000, help="how many")
    parser.add_argument("--start", type=int, default=0, help="the first")
    parser.add_argument("--policy", choices=sorted(POLICIES), help="default: by seed")
    parser.add_argument("--verbose", action="store_true", help="print every message")
    options = parser.parse_args(arguments)
    steps = executions = tasks = 0
    for seed in range(options.start, options.start + options.seeds):
        try:
            world = simulate(seed, verbose=options.verbose, policy=options.policy)
        except Exception:
            print(f"seed {seed} failed; see it: python -m zmqsched.sim --start {seed} --seeds 1 --verbose", file=sys.stderr)
            raise
        steps += world.steps
        executions += sum(world.executions.values())
        tasks += len(world.executions)
    ratio = executions / max(1, tasks)
    print(f"{options.seeds} seeds, {steps} steps, {tasks} tasks, {ratio:.2f} executions a task: every promise held")
    return 0


if __name__ == "__main__":
    sys.exit(main())
