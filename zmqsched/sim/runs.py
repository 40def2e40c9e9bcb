"""One run: who is there, what is asked for, what breaks, and what must be true when all is quiet again."""

from __future__ import annotations

import itertools
import math
from random import Random

from msgspec.structs import replace

from ..core.nodes import ALIVE
from ..core.policy import POLICIES
from ..core.settings import Settings
from ..core.stops import LOOK_S
from ..protocol import Command, Options
from .clients import GROUP, InnerClient, SimClient
from .nodes import SIGNAL_S, SimNode
from .peers import SimBroker
from .plans import Plan
from .world import SimulationFailed, World

THOROUGH = 4  # each so manieth seed is
RAGGED = 4  # so is another
STRIKE_EVERY_S = 0.5
LOOK_EVERY_S = 0.25
TAIL_S = 150.0  # of quiet, after which a run has failed
JOB = "a-job"
FORGETFUL_BYTES = 40  # room for two of three functions
FAULTS = (
    # of messages
    "drop", "duplicate", "delay", "lose answers",
    # of connections
    "reconnect", "late messages", "cut up", "cut down", "cut off",
    # of processes
    "kill worker", "kill node", "pause node", "drain node", "hold node", "storm", "walltime",
    "kill client", "pause client", "pause broker", "crash broker",
    # of memory and disk
    "forget functions", "slow disk", "full disk",
)  # fmt: skip


def simulate(seed: int, *, verbose: bool = False, policy: str | None = None) -> World:
    """One run. Raises :class:`SimulationFailed` (or an AssertionError of a core) if a promise is broken."""
    world = World(seed, verbose=verbose, thorough=seed % THOROUGH == 0, ragged=seed % RAGGED == 1)
    cluster = Cluster(world, policy or world.random.choice(sorted(POLICIES)))
    world.run_until(cluster.quiet_at + TAIL_S, lambda: cluster.finished)
    if not cluster.finished:
        raise SimulationFailed(f"not finished {TAIL_S} s after the last fault: {cluster.complaint()}")
    for process in world.processes.values():
        process.check()
    return world


class Cluster:
    """Everybody in one run, and what befalls them until it is quiet."""

    def __init__(self, world: World, policy: str) -> None:
        random = world.random
        self.world = world
        self.finished = False
        self.quiet_at = random.uniform(3.0, 12.0)
        settings = Settings(
            policy=policy,
            client_lease_s=random.choice((2.0, 6.0)),  # a minute would make long runs
            max_queued_bytes=random.choice((2_000, 10_000, 1 << 30)),  # 3 tasks, 15, no limit
            journal=random.random() < 0.5,
        )
        self.broker = SimBroker(world, settings)
        world.faults = {fault: random.random() ** 2 * 0.5 for fault in FAULTS if random.random() < 0.5}
        world.say(f"= faults: {world.faults}")
        self._numbers = itertools.count()
        self.nodes = [
            self._node(random.randint(1, 3), {"cpu": 3.0, **({"gpu": 1.0} if n == 0 else {})})
            for n in range(random.choice((1, 2, 3, 4, 6)))
        ]
        self.leaving: list[SimNode] = []
        self.kinds = _kinds(random)
        # How many are asked for at once, at most, and how long they take: what is left when it is quiet is soon done.
        self._burst, self._seconds = random.choice(
            ((15, (0.001, 0.005, 0.01)), (10, (0.0001, 0.02, 0.3)), (3, (0.1, 1.0, 2.0)))
        )
        self._waiting = random.choice((0.0, 0.3))  # how many wait for others, as tasks with tasks of their own do
        self._dependent = random.choice((0.0, 0.2, 0.6))  # how many have others' results as arguments
        self._with_families = random.choice((0.0, 0.3, 0.6))  # how many of those that count have tasks of their own
        self.clients = [self._client() for _ in range(random.randint(1, 2))]
        self._asked_by = list(self.clients)
        if "forget functions" in world.faults:
            self._forget()
        world.at(STRIKE_EVERY_S, self._strike)
        world.at(self.quiet_at, self._calm)

    # --- what is asked for -----------------------------------------------------------------------------------------

    def _client(self) -> SimClient:
        """Its last tasks are asked for shortly before it becomes quiet, so that faults hit all there is."""
        random = self.world.random
        client = SimClient(self.world, b"client%d" % next(self._numbers), self.broker)
        left = self.quiet_at - self.world.now

        def burst() -> None:
            client.ask(self._plans(client, random.randint(1, self._burst)))

        for _ in range(random.randint(2, 6)):
            self.world.at(random.random() * left * 0.8, burst)
        self.world.at(random.random() * left, client.cancel_some)

        def last() -> None:
            client.ask(self._plans(client, 2))
            client.finished_asking = True
            client.wait_group()

        self.world.at(left * 0.9, last)
        return client

    def _plans(self, client: SimClient, count: int) -> list[tuple[Plan, Options]]:
        random = self.world.random
        plans = []
        for number in range(len(client.plans), len(client.plans) + count):
            options = random.choice(self.kinds)
            ends = random.choices(("value", "error", "flaky", "death"), (76, 10, 8, 6))[0]
            seconds = random.choice(self._seconds) * (0.5 + random.random())
            if options.timeout and random.random() < 0.5:  # it ends about when it is interrupted
                seconds = options.timeout + LOOK_S + random.uniform(-SIGNAL_S, SIGNAL_S)
            once = not options.requeue and not options.retries
            retried, stubborn = random.random() < 0.75, random.random() < 0.3
            inputs = self._inputs(number) if random.random() < self._dependent else ()
            group, counts, awaits = b"", "", ""
            children: tuple[Plan, ...] = ()
            if not options.job and random.random() < 0.3:
                group = client.debts[0].group
                counts = _counts(random, ends)
                if random.random() < self._with_families:
                    children, awaits, counts = self._children(), random.choice(("answers", "group", "")), "late"
                    if awaits == "group":
                        group, counts = client.private_group(), "early"
                options = replace(options, holds=(group,))
            waits = random.random() < self._waiting and not children
            plan = Plan(number, seconds, ends, once, retried, options.timeout, stubborn, inputs, group, counts, waits)
            plan = replace(plan, children=children, awaits=awaits)
            plans.append((plan, options))
        return plans

    def _children(self, depth: int = 1) -> tuple[Plan, ...]:
        random = self.world.random
        plans = []
        for _ in range(random.randint(1, 3)):
            ends = random.choices(("value", "error", "flaky", "death"), (85, 5, 5, 5))[0]
            seconds = random.choice(self._seconds) * random.random()
            plan = Plan(0, seconds, ends, retried=random.random() < 0.75, counts=_counts(random, ends))
            if depth == 1 and random.random() < 0.2:
                plan = replace(plan, children=self._children(2), awaits=random.choice(("answers", "")), counts="late")
            plans.append(plan)
        return tuple(plans)

    def _inputs(self, number: int) -> tuple[int, ...]:
        """Of the tasks asked for before, of late mostly."""
        random = self.world.random
        first = max(0, number - random.choice((3, 10, 1_000)))
        return tuple(random.sample(range(first, number), min(number - first, random.choice((1, 1, 2, 4)))))

    # --- what breaks -------------------------------------------------------------------------------------------------

    def _strike(self) -> None:
        """Twice a second, each fault strikes with its own chance."""
        if not self.world.faults:
            return
        self.world.at(STRIKE_EVERY_S, self._strike)
        self._strike_connections()
        self._strike_nodes()
        self._strike_clients()
        world, random = self.world, self.world.random
        if world.chance("pause broker"):  # shorter ones it may take for a busy moment
            self.broker.pause(2.0 + random.expovariate(0.5))
        if world.chance("crash broker", 0.3):
            self.broker.crash(random.choice((0.01, 0.5, 4.0)))
        if world.chance("forget functions"):
            self._forget()
        if self.broker.disk is not None and world.chance("full disk", 0.3):
            self.broker.disk.fill(random.uniform(0.5, 4.0))

    def _strike_connections(self) -> None:
        world, random = self.world, self.world.random
        inner = [client for node in (*self.nodes, *self.leaving) for client in node.inner_clients()]
        peers = [*self.nodes, *self.leaving, *self.clients, *inner]
        if world.chance("reconnect"):
            random.choice(peers).reconnect(late=world.chance("late messages", 2.0))
        if world.chance("cut up"):
            world.cut(random.choice(peers).name, "up", random.uniform(0.5, 8.0))
        if world.chance("cut down"):
            world.cut(random.choice(peers).name, "down", random.uniform(0.5, 8.0))
        if world.chance("cut off"):
            self._cut_off(random.choice(peers).name, random.uniform(0.5, 8.0))

    def _cut_off(self, name: bytes, seconds: float) -> None:
        self.world.cut(name, "up", seconds)
        self.world.cut(name, "down", seconds)

    def _strike_nodes(self) -> None:
        world, random = self.world, self.world.random
        node = random.choice(self.nodes)
        if world.chance("kill worker") and node.workers:
            random.choice(list(node.workers.values())).die("killed by SIGKILL")
        if world.chance("kill node"):
            node.kill()
        if world.chance("pause node"):
            random.choice(self.nodes).pause(random.uniform(0.5, 8.0))
        if world.chance("drain node"):
            leaver = random.choice(self.nodes)
            name = leaver.core.name
            retire = Command(name, 0, "retire", random.choice((0.0, 0.02, 0.2)))
            if random.random() < 0.3:
                leaver.drain("SIGTERM")
            else:
                random.choice(self.clients).say(random.choice((Command(name), retire)))
        if world.chance("hold node"):
            name = random.choice(self.nodes).core.name
            random.choice(self.clients).say(Command(name, 0, "pause" if random.random() < 0.7 else "resume"))
        if world.chance("storm", 0.3):
            self._storm()
        self._replace()

    def _storm(self) -> None:
        """Most nodes go at once: they die, or the switch between them and the broker does for a while."""
        seconds = self.world.random.uniform(1.0, 8.0)
        die = self.world.random.random() < 0.5
        for node in self.nodes:
            if self.world.random.random() < 0.8:
                if die:
                    node.kill()
                else:
                    self._cut_off(node.name, seconds)

    def _replace(self) -> None:
        """Another node for each that is dead or leaves."""
        self.leaving = [node for node in self.leaving if node.alive]
        for index, node in enumerate(self.nodes):
            if node.leaving or not node.alive:
                if node.alive:
                    self.leaving.append(node)
                self.nodes[index] = self._node(node.slots, node.resources, node.label)

    def _node(self, slots: int, resources: dict[str, float], label: str = "") -> SimNode:
        """Another in the place of one that has gone, if it has its label."""
        number = next(self._numbers)
        lasts_s = self.world.random.uniform(5.2, 11.0) if self.world.chance("walltime", 4.0) else math.inf
        label = label or f"local-{number}"
        most = self.world.random.choice((0, 0, 1, 4))
        return SimNode(self.world, b"node%d" % number, self.broker, slots, resources, label, lasts_s, most)

    def _strike_clients(self) -> None:
        world, random = self.world, self.world.random
        index = random.randrange(len(self.clients))
        if world.chance("pause client"):
            self.clients[index].pause(min(20.0, random.expovariate(0.2)))
        if world.chance("kill client", 0.3):
            self.clients[index].kill()
            self.clients[index] = self._client()
            self._asked_by.append(self.clients[index])

    def _forget(self) -> None:
        """Stores of functions with little room: what no open task needs is soon gone."""
        for store in [self.broker.core.book.functions, *(node.core._functions for node in self.nodes)]:
            store._cap = FORGETFUL_BYTES

    # --- when all is quiet -------------------------------------------------------------------------------------------

    def _calm(self) -> None:
        """No fault strikes any more, and who was cut off or paused is back; the broker after no less than its 2 s."""
        self.world.faults = {}
        self.world.say("= quiet")
        self.world.heal()
        for peer in (*self.nodes, *self.leaving, *self.clients):
            peer.resume(peer.pauses)
        if any(options.job for client in self._asked_by for options in client.options.values()):
            follower = SimClient(self.world, b"follower", self.broker)
            follower.follow(JOB, self._asked_by)
            self.clients.append(follower)
        self._look()

    def _look(self) -> None:
        self._replace()
        for node in self.nodes:
            if node.core._paused:
                self.clients[0].say(Command(node.core.name, 0, "resume"))
        self.finished = not self.complaint()
        self.world.at(LOOK_EVERY_S, self._look)

    def complaint(self) -> str:
        """What is not as it must be in the end, if anything."""
        inner = [process for process in self.world.processes.values() if isinstance(process, InnerClient)]
        for client in (*self.clients, *inner):
            if not client.done:
                missing = [plan for task, plan in client.plans.items() if task not in client.answers]
                return (
                    f"{client.name.decode()} has no answer to {missing}, WaitGroup zero: {client.group_zero}, "
                    f"debts settled: {[debts.settled for debts in client.debts]}"
                )
            if client.core.open:
                return f"{client.name.decode()} keeps what is answered"
        left = dict(self.broker.core.book.open_counts())
        groups = self.broker.core.book.counting.groups
        debts = [debts for client in self.clients for debts in client.debts if not client.forgotten]
        wanted = [GROUP, *(each.group for each in debts if not each.families)]
        if not any(group in groups for group in wanted):  # those of clients that were killed are nobody's
            left.pop("groups", None)
        if left:
            return f"all is answered and the scheduler still holds {left}"
        if self.broker.core.book.unacknowledged():
            return "all is answered and the scheduler does not know"
        if self.leaving:
            return f"{self.leaving[0].name.decode()} does not leave"
        for node in self.nodes:
            if why := self._node_complaint(node):
                return f"{node.name.decode()} ({node.core.name}) {why}"
        if strangers := len(list(self.broker.core._sessions)) - len(self.nodes) - len(self.clients) - len(inner):
            return f"the scheduler keeps {strangers} sessions of nobody"
        return ""

    def _node_complaint(self, node: SimNode) -> str:
        record = self.broker.core._nodes.get(node.core.name)
        if record is None or record.incarnation != node.core._uplink.hello.incarnation:
            return "has not joined again"
        if record.state is not ALIVE or node.core.held:
            return f"is {record.state} and holds {node.core.held} tasks"
        if any(worker.ending is not None for worker in node.core._workers.values()):
            return "does not let go of a worker that it has interrupted"
        if record.credit != node.core._reports.credit or record.credit < record.slots:
            return f"offers {node.core._reports.credit} and is thought to offer {record.credit} for its {record.slots} slots"
        return ""


def _counts(random: Random, ends: str) -> str:
    return random.choice(("early", "late", "around", "never" if ends in ("error", "death") else "late"))


def _kinds(random: Random) -> list[Options]:
    kinds = [Options(priority=random.randint(-1, 1), retries=random.choice((0, 1, 3)), group=GROUP) for _ in range(3)]
    kinds.append(Options(resources=(("cpu", 1.0), ("gpu", 1.0)), group=GROUP))
    kinds.append(Options(resources=(("cpu", 2.0),), group=GROUP))
    kinds.append(Options(retries=2, backoff=random.choice((0.01, 3.0)), group=GROUP))
    kinds.append(Options(retries=1, timeout=random.choice((0.01, 0.3, 1.0, 8.0)), group=GROUP))
    kinds.append(Options(depth=1, group=GROUP))
    kinds += [Options(requeue=False), Options(requeue=False, priority=1), Options(job=JOB), Options(job=JOB, retries=1)]
    return kinds
