"""The broker's process, and those who have a connection to it. Each holds the real core and checks what it does."""

from __future__ import annotations

import itertools
import math
from abc import abstractmethod
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from random import Random

from ..core.events import (
    Arrived,
    Log,
    Reached,
    SchedulerEvent,
    Send,
    Undelivered,
    Write,
)  # fmt: skip
from ..core.ledger import Ledger
from ..core.scheduler import Scheduler
from ..core.settings import Settings
from ..protocol import (
    Envelope,
    Finals,
    Record,
    Unknown,
)  # fmt: skip
from .disk import Disk
from .watch import Watch
from .world import Deliver, Process, SimulationFailed, World, named

SETTLE_S = 2.0  # as the broker's shell has it
SLACK_BYTES = 5_000  # a journal is written anew after some fifty records
LAST_SENT = 8  # messages that may come late when their connection is replaced


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
            self.world.counts_lost = True
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
            if not isinstance(client, Peer):
                continue
            for task in client.accepted(owned) - follower.book.tasks.keys() - self._refused:
                if not any(owner.has_answered(task) for owner in follower.book.owners):
                    raise SimulationFailed(f"task {named(task)} was accepted, and the broker that follows does not know it")

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

    @property
    @abstractmethod
    def life(self) -> int:
        """Of its sessions the present one's number."""

    def accepted(self, owners: set[bytes]) -> set[bytes]:
        """Its open tasks that a broker has accepted, if it is one of the owners whom that has not given up."""
        return set()

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


def _owner(address: bytes) -> bytes:
    return address.split(b"#")[0]
