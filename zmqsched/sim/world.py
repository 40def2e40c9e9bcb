"""The virtual clock, the wire and its faults, and what a process is."""

from __future__ import annotations

import heapq
import itertools
import math
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Callable
from random import Random
from typing import Literal

from ..codec import decode, encode
from ..core.events import Tick
from ..protocol import Dispatch, Envelope, Finals, GroupAdd, GroupDone, GroupWait, Message, Progress, Results, Revoke, Submit
from .accounts import Accounts

DELAY_S = 0.0002
MOST_STEPS = 30_000  # of a run; usual are 1,000
SELDOM = 8  # turns from one sanity check to the next, in a seed that is not thorough

Deliver = Callable[[Envelope], None]
Way = Literal["up", "down"]  # to the broker, from the broker


class SimulationFailed(AssertionError):
    pass


class World:
    """The clock, the wire and everybody on it.

    ``faults``: how likely each is to strike, when it may. ``executions`` and ``deaths`` count, by task, how often one was
    really started, and how often a worker really died running it. ``overran``: tasks that were interrupted over their limit.
    ``accounts``: what tasks have counted on WaitGroups. ``counts_lost``: those of families need not be right any more:
    another broker does not know whose tasks are whose, or what was given up with a client in a task is run again.
    ``ragged``: what is sent together may arrive in parts, and be answered in parts.
    """

    def __init__(self, seed: int, *, verbose: bool = False, thorough: bool = True, ragged: bool = False) -> None:
        self.seed = seed
        self.verbose = verbose
        self.thorough = thorough
        self.random = Random(seed)
        self.now = 0.0
        self.steps = 0
        self.faults: dict[str, float] = {}
        self.executions: Counter[bytes] = Counter()
        self.deaths: Counter[bytes] = Counter()
        self.overran: set[bytes] = set()
        self.accounts = Accounts()
        self.counts_lost = False
        self.inner_clients = itertools.count()  # of workers
        self.processes: dict[bytes, Process] = {}
        self._cut: dict[tuple[bytes, Way], float] = {}  # until when
        self._parts = Random(seed) if ragged else None
        self._arrives: dict[tuple[bytes, Way], float] = {}  # when the last part does
        self._agenda: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()

    def at(self, delay: float, act: Callable[[], None]) -> None:
        heapq.heappush(self._agenda, (self.now + delay, next(self._numbers), act))

    def run_until(self, limit: float, done: Callable[[], bool]) -> bool:
        while self._agenda and not done():
            at, _, act = heapq.heappop(self._agenda)
            if at > limit:
                return False
            self.now = max(self.now, at)
            self.steps += 1
            if self.steps > MOST_STEPS:
                raise SimulationFailed(f"{MOST_STEPS} steps: somebody never stops talking")
            act()
        return done()

    def say(self, text: str) -> None:
        if self.verbose:
            print(f"{self.now:9.4f}  {text}")

    def chance(self, fault: str, share: float = 1.0) -> bool:
        strength = self.faults.get(fault)
        return strength is not None and self.random.random() < strength * share

    def cut(self, peer: bytes, way: Way, seconds: float) -> None:
        """What goes this way vanishes for a while; the other way is open."""
        self.say(f"= {peer.decode()} cut off {way} for {seconds:.2f} s")
        self._cut[peer, way] = max(self.now + seconds, self._cut.get((peer, way), 0.0))

    def heal(self) -> None:
        self._cut.clear()

    def is_cut(self, peer: bytes, way: Way) -> bool:
        return self.now < self._cut.get((peer, way), 0.0)

    def send(self, envelope: Envelope, deliver: Deliver, peer: bytes, way: Way, who: str) -> None:
        """Carry a message over the wire, with the wire's faults."""
        if self.verbose:
            self.say(f"{who} {_words(envelope.body)} seq={envelope.seq} ack={envelope.ack}")
        if self._cut and self.is_cut(peer, way):
            return
        delay_s = DELAY_S if self._parts is None else self._apart(self._parts, peer, way)
        if not self.faults:
            self.carry(envelope, deliver, delay_s)
            return
        for _ in range(2 if self.chance("duplicate") else 1):
            if self.chance("drop") or (isinstance(envelope.body, Results | Finals) and self.chance("lose answers")):
                continue
            late = self.random.expovariate(2.0) if self.chance("delay") else 0.0
            self.carry(envelope, deliver, delay_s + late)  # without the delay: a connection keeps the order

    def _apart(self, random: Random, peer: bytes, way: Way) -> float:
        arrives = self.now + DELAY_S
        if (last := self._arrives.get((peer, way), 0.0)) > arrives:
            arrives = last + 1e-9
        if random.random() < 0.2:
            arrives += random.uniform(0.0, 5 * DELAY_S)
        self._arrives[peer, way] = arrives
        return arrives - self.now

    def carry(self, envelope: Envelope, deliver: Deliver, delay: float) -> None:
        if self.thorough:
            frames = [bytes(frame) for frame in encode(envelope)]
            self.at(delay, lambda: deliver(decode(frames)))
        else:
            self.at(delay, lambda: deliver(envelope))


class Process(ABC):
    """One process: an inbox, a core, a clock of its own, and turns.

    What arrives together is taken in by one turn. Paused, it gathers what comes and handles it at once on waking.
    """

    def __init__(self, world: World, name: bytes) -> None:
        self.world = world
        self.name = name
        self.alive = True
        self.paused = False
        self.pauses = 0  # so far
        self.absent_s = 0.0  # for how long in all
        self._clock = world.random.uniform(0.0, 1e5)
        self._inbox: deque[object] = deque()
        self._turn_due = False
        self._turns = 0
        self._paused_at = 0.0
        self._wakes_at = math.inf
        world.processes[name] = self

    def post(self, event: object) -> None:
        if self.alive:
            self._inbox.append(event)
            self._wake()

    def pause(self, seconds: float) -> None:
        if self.alive and not self.paused:
            self.world.say(f"= {self.name.decode()} paused for {seconds:.2f} s")
            self.paused = True
            self._paused_at = self.world.now
            self.pauses += 1
            number = self.pauses
            self.world.at(seconds, lambda: self.resume(number))

    def kill(self) -> None:
        self.world.say(f"= {self.name.decode()} ends")
        self.alive = False
        self._inbox.clear()
        self.world.processes.pop(self.name, None)

    def _wake(self) -> None:
        if not self._turn_due:
            self._turn_due = True
            self.world.at(0.0, self._turn)

    def resume(self, number: int) -> None:
        """The end of this pause, unless it has ended already."""
        if self.paused and number == self.pauses:
            self.world.say(f"= {self.name.decode()} resumed")
            self.paused = False
            self.absent_s += self.world.now - self._paused_at
            self.resumed()
            self._wake()

    def resumed(self) -> None:  # noqa: B027 - most have nothing more to do
        """For whoever has more to do then."""

    def _turn(self) -> None:
        self._turn_due = False
        if self.paused or not self.alive:
            return
        now = self.world.now + self._clock
        while self._inbox:
            self.step(self._inbox.popleft(), now)
        if self.alive:
            self.step(Tick(), now)
        if self.alive:
            self._turns += 1
            if self.world.thorough or self._turns % SELDOM == 0:
                self.check()
            self._arm()

    def _arm(self) -> None:
        now = self.world.now
        wake = max(self.deadline() - self._clock, now + 1e-5)
        if wake < self._wakes_at or self._wakes_at <= now:
            self._wakes_at = wake
            if wake < math.inf:
                self.world.at(wake - now, self._wake)

    @abstractmethod
    def step(self, event: object, now: float) -> None:
        """Hand the core an event, and do what it says."""

    @abstractmethod
    def deadline(self) -> float:
        """Of the core, by its own clock."""

    @abstractmethod
    def check(self) -> None:
        """Of the core: its ``sanity_check``."""


def named(task: bytes) -> str:
    """The client that has asked for a simulated task, and its number."""
    return f"{task[:8].rstrip(b'.').decode(errors='replace')}.{int.from_bytes(task[8:], 'big')}" if task else ""


def _words(body: Message) -> str:
    """A message in a line: its name, and the tasks it is about."""
    match body:
        case Dispatch(_, tasks) | Results(tasks) | Revoke(tasks) | Progress(_, _, tasks):
            about = [f"{named(task.task)}#{task.attempt}" for task in tasks]
        case Submit(_, tasks) | Finals(tasks):
            about = [named(task.task) for task in tasks]
        case GroupAdd(deltas, _, task, failed, _):
            about = [named(task), *(f"{group!r} {delta:+}" for group, delta in deltas), failed]
        case GroupWait(_, group, task):
            about = [named(task), repr(group)]
        case GroupDone(request, error):
            about = [str(request), error]
        case _:
            about = []
    return " ".join([type(body).__name__, *about])
