"""The node's shell: one connection to the broker, one pipe to each worker, the agent between them.

One thread, one loop, as the broker's. The nursery is forked first, before ZeroMQ or any thread exists, and the workers
from it. This process never unpickles and never runs user code. What it says on standard error, and of its workers
what ``listening.py`` picks, is written by a thread that does nothing else: whoever does not read it must not stop the loop.
"""

from __future__ import annotations

import atexit
import math
import os
import secrets
from collections.abc import Iterable
from time import monotonic, sleep
from typing import TYPE_CHECKING

from msgspec.structs import replace

from . import host, origin, orphans
from .codec import decode, decode_pipe, encode, encode_pipe
from .config import ConnectionFile
from .core import events
from .core.agent import Agent
from .core.events import AgentAction, AgentEvent, FromTask, Reached, Said, Tick
from .core.settings import Care
from .errors import ProtocolError, Refused, StartError
from .listening import Listener
from .nursery import KILLED, Born, Exited, Gone, Nursery, Wires
from .protocol import (
    Advanced,
    Beat,
    Done,
    Envelope,
    NodeHello,
    Remains,
    Run,
    Waits,
    WorkerState,
)  # fmt: skip
from .shell import Relay, Starter, StopSignals, log, relay_logging, tune_garbage_collection

if TYPE_CHECKING:
    import psutil

MAX_MESSAGES_PER_TURN = 100
MAX_ANSWERS_PER_TURN = 64  # of each worker
LINGER_MS = 2_000
# While every worker has several short tasks in its pipe there is no hurry: rather than be woken for each answer, the node
# sleeps this long and takes all that have come (as a network driver does under load).
PACE_S = 0.001
MEASURE_S = 0.25  # how often to look at what workers take of the memory, if that is limited
# What runs is handed back so long before the batch system ends this process.
HAND_BACK_S = 3.0
_TICK = Tick()


class Node:
    """A node that runs until it is told to leave. ``slots``: workers; None is one for each usable CPU.

    ``resources`` are added to what is found here, or replace it; ``cpu`` is never below the number of slots, for a slot
    is what runs a task that asks for one. ``echo``: what tasks write to standard error is written to the node's as well.
    ``label``: what its launcher calls it. ``walltime_s``: it will be ended after so many seconds; 0 is what the batch system
    has set, if it runs in one. ``alone_s``: it ends when it has not heard of the broker for so many seconds.
    """

    def __init__(
        self,
        file: ConnectionFile,
        slots: int | None = None,
        resources: dict[str, float] | None = None,
        tags: Iterable[str] = (),
        *,
        echo: bool = True,
        label: str = "",
        walltime_s: float = 0.0,
        care: Care | None = None,
        alone_s: float = math.inf,
    ) -> None:
        orphans.adopt()
        slots = slots or host.usable_cpus()
        os.environ.update(host.thread_limits(slots, os.environ))
        incarnation = secrets.token_bytes(16)
        self._origin = origin.node = origin.Origin(file, incarnation)
        self._nursery = Nursery()
        host.allow_many_files()
        self._stderr = Relay()
        atexit.register(self._stderr.close)
        relay_logging(self._stderr)
        from . import sockets

        self._sockets = sockets
        self._ctx = sockets.context()
        keys = sockets.Keys.of(file)
        self._dealer = sockets.connect_dealer(self._ctx, file.reachable("work"), keys)
        self._connections = sockets.Connections(self._dealer)
        self._pub = sockets.connect_pub(self._ctx, file.reachable("beats"), keys)
        found, gpus = _resources(slots, resources or {})
        hello = NodeHello(
            incarnation, 1, host.where(), slots, slots, tuple(sorted(found.items())), tuple(sorted(set(tags))),
            label=label,
        )  # fmt: skip
        walltime_s = walltime_s or host.walltime(os.environ)
        leaves_at = monotonic() + walltime_s - min(HAND_BACK_S, walltime_s / 4) if walltime_s else math.inf
        care = care or Care()
        self._agent = Agent(hello, gpus, care, alone_s=alone_s, leaves_at=leaves_at)
        self._incarnation = hello.incarnation
        self._echo = echo
        self._wires: dict[int, Wires] = {}  # by worker
        self._pids: dict[int, int] = {}  # by worker
        self._readable: dict[int, int] = {}  # worker by descriptor, of its pipe
        self._nests = False  # tasks here submit tasks
        self._unsent: dict[int, list[Run]] = {}  # what could not be put into a dying worker's pipe
        self._measure_s = MEASURE_S if care.memory_limit else math.inf
        self._measure_at = 0.0 if care.memory_limit else math.inf
        self._measured: dict[int, psutil.Process] = {}
        self._oom_kills = host.OomKills()
        self._why = ""

    def run(self, starter: Starter, *, until_eof: bool) -> None:
        """Serve until told to leave.

        Raises
        ------
        Refused
            The broker does not take this node, and says why.
        """
        import zmq

        self._zmq = zmq
        stop = StopSignals(until_eof=until_eof)
        self._waiter = self._sockets.Waiter(self._dealer)
        self._listener = Listener(self._stderr.forward, self._waiter.add, self._waiter.remove, echo=self._echo)
        self._waiter.add(self._connections.descriptor)
        for descriptor in (self._nursery.fileno(), *stop.descriptors):
            self._waiter.add(descriptor)
        try:
            self._loop(stop, starter)
        finally:
            self._close()
        if self._why.startswith("refused"):
            raise Refused(self._why)
        log.info("node ends: %s", self._why)

    def _loop(self, stop: StopSignals, starter: Starter) -> None:
        tune_garbage_collection()
        self._step(_TICK)
        said = False
        seldom = {self._nursery.fileno(), self._connections.descriptor, *stop.descriptors}
        while not self._why:
            deadline = min(self._agent.next_deadline(), self._listener.due(), self._measure_at)
            if self._agent.has_plenty:
                sleep(PACE_S)
                deadline = 0.0
            ready = self._waiter.wait(deadline)
            if self._listener.listens_to(ready):
                self._listener.read(ready, monotonic())
            for descriptor in ready & self._readable.keys():
                self._read_worker(self._readable[descriptor])
            if not ready.isdisjoint(seldom):
                self._read_seldom(ready, stop)
            if self._waiter.socket in ready:
                self._read_broker()
            if self._listener.due() < math.inf:
                self._pass_on()
            if self._measure_at < math.inf and monotonic() >= self._measure_at:
                self._measure_at = monotonic() + self._measure_s
                self._step(events.Measured(self._sizes()))
            self._step(_TICK)
            if not said and self._agent.ready:
                said = True
                at = self._sockets.endpoint(self._dealer)
                log.info("node %s is ready, its broker at %s", self._agent.name, at)
                starter.ready({"pid": os.getpid(), "node": self._agent.name, "broker": at})

    def _read_seldom(self, ready: set[int], stop: StopSignals) -> None:
        for descriptor in stop.descriptors:
            if descriptor in ready and (why := stop.read(descriptor)):
                self._step(events.Leave(why == "SIGTERM", why))
        if self._nursery.fileno() in ready:
            self._read_nursery()
        if self._connections.descriptor in ready:
            self._look_at_connections()

    def _step(self, event: AgentEvent) -> None:
        for action in self._agent.handle(event, monotonic()):
            self._act(action)

    def _act(self, action: AgentAction) -> None:
        match action:
            case events.Give(worker, runs):
                self._give(worker, runs)
            case events.ToBroker():
                self._send(action.envelope)
            case events.TakeBack(worker):
                self._step(events.TakenBack(worker, self._untaken(worker)))
            case events.AskStack(worker):
                self._ask_stack(worker)
            case events.TellStack(worker):
                self._step(events.Stood(worker, self._stack_of(worker)))
            case events.Interrupt(worker):
                self._nursery.interrupt(worker)
            case events.Kill(worker):
                self._nursery.kill(worker)
            case events.Retire(worker):
                self._wires[worker].pipe.finish()
            case events.Start(worker):
                self._start(worker)
            case events.SendBeat(beat):
                self._send_beat(beat)
            case events.UseKeys(public, secret):
                self._use_keys(public, secret)
            case events.Log(level, text):
                getattr(log, level)(text)
            case events.Quit(reason):
                self._why = reason

    # --- workers ---------------------------------------------------------------------------------------------------

    def _start(self, worker: int) -> None:
        wires = self._wires[worker] = self._nursery.spawn(worker)
        self._readable[wires.pipe.fileno()] = worker
        self._waiter.add(wires.pipe.fileno())
        self._listener.add(worker, wires.streams)

    def _give(self, worker: int, runs: list[Run]) -> None:
        pipe = self._wires[worker].pipe
        for number, run in enumerate(runs):
            try:
                if pipe.send(encode_pipe(run), wait=False):
                    continue
            except BrokenPipeError:  # it is dying; its exit is about to be reported
                self._unsent.setdefault(worker, []).extend(runs[number:])
            else:
                self._step(events.TakenBack(worker, runs[number:]))
            return

    def _ask_stack(self, worker: int) -> None:
        """Have a live worker write where it is, even inside C code that holds the GIL; :meth:`_stack_of` then tells.

        Never waits. The dump is there within some milliseconds: let the loop turn, and read it some 20 ms later. A process
        that the kernel does not let run (stopped, or in an uninterruptible wait) writes nothing. If the worker is killed
        afterwards, the stack is still there when its death is reported.
        """
        box = self._wires[worker].box
        box.clear()
        box.asked = True
        self._nursery.dump(worker)

    def _stack_of(self, worker: int) -> str:
        """The worker's stack as of the last :meth:`_ask_stack`, or its crash: frames, the latest call first, without our
        own; "" if nothing was written. At most ``blackbox.MAX_STACK`` characters."""
        return self._wires[worker].box.stack()

    def _pass_on(self) -> None:
        """What tasks have printed: before the tick, which sends their results."""
        words, advances = self._listener.take(monotonic())
        if words or advances:
            self._step(events.Printed(words, advances))

    def _read_worker(self, worker: int, limit: int = MAX_ANSWERS_PER_TURN, *, to_the_end: bool = False) -> None:
        """What it has said. Unless ``to_the_end``, who has answered all it was given is not asked in vain for more: if there
        is, its pipe stays readable."""
        if messages := self._received(worker, limit, math.inf if to_the_end else self._agent.unanswered(worker)):
            self._step(Said(worker, messages))

    def _received(self, worker: int, limit: int, answers: float) -> list[FromTask]:
        """So many messages at most, or so many answers."""
        pipe, _, box, _ = self._wires[worker]
        messages: list[FromTask] = []
        for _ in range(limit):
            try:
                frames = pipe.receive(wait=False)
                if frames is None:
                    break
                message = decode_pipe(frames)
            except BlockingIOError:
                break
            except ProtocolError as error:
                log.warning("worker %d sent what is no message: %s", worker, error)
                continue
            if isinstance(message, Done):
                self._listener.answered(worker, message)
                if box.asked:
                    box.clear()  # or it would be told of the next task when that kills the worker
                messages.append(message)
                answers -= 1
                if answers <= 0:
                    break
                continue
            if isinstance(message, Waits) and not self._nests:
                self._nests = True
                self._nursery.teach_clients()
            elif isinstance(message, Advanced):
                self._listener.advanced(worker, monotonic())
            if isinstance(message, FromTask):
                messages.append(message)
        return messages

    def _untaken(self, worker: int) -> list[Run]:
        """The runs that lie in the worker's pipe, taken out again."""
        runs: list[Run] = []
        while True:
            try:
                frames = self._wires[worker].kept.receive(wait=False)
            except BlockingIOError:
                return runs
            if frames is None:
                return runs
            message = decode_pipe(frames)
            if isinstance(message, Run):
                runs.append(message)

    def _read_nursery(self) -> None:
        for event in self._nursery.read():
            match event:
                case Born(worker, pid):
                    self._pids[worker] = pid
                    self._step(events.Born(worker, pid))
                case Exited():
                    self._buried(event)
                case Gone():
                    raise StartError("this node's nursery process died: no worker can be started any more")

    def _buried(self, exited: Exited) -> None:
        worker, pid, how = exited.worker, exited.pid, exited.how
        self._read_worker(worker, limit=1_000_000, to_the_end=True)  # what it said before it died
        untaken = self._untaken(worker) + self._unsent.pop(worker, [])
        wires = self._wires.pop(worker)
        self._pids.pop(worker, None)  # it may not even have been born
        del self._readable[wires.pipe.fileno()]
        self._waiter.remove(wires.pipe.fileno())
        self._listener.bury(worker, monotonic())
        self._pass_on()
        self._measured.pop(pid, None)
        oom = how == KILLED and self._oom_kills.lately()
        remains = Remains(wires.box.stack(), wires.streams.last_words(), wires.box.memory, exited.peak, oom)
        wires.close()
        self._step(events.Exited(worker, pid, how, untaken, remains))

    # --- the broker ------------------------------------------------------------------------------------------------

    def _read_broker(self) -> None:
        for frames in self._sockets.receive_all(self._dealer, MAX_MESSAGES_PER_TURN):
            try:
                envelope = decode([frame.buffer for frame in frames])
            except ProtocolError as error:
                self._step(events.Unreadable(str(error)))
                continue
            self._step(Reached(envelope))

    def _look_at_connections(self) -> None:
        try:
            if self._connections.new():
                self._step(events.Reconnected())
        except Refused as error:
            self._why = f"refused: {error}"

    def _use_keys(self, public: str, secret: str) -> None:
        self._origin.renew(public, secret)
        for connected in (self._dealer, self._pub):
            self._sockets.use_keys(connected, public, secret)

    def _send(self, envelope: Envelope) -> None:
        frames = encode(envelope)
        try:
            self._sockets.send(self._dealer, frames)
        except self._zmq.Again:
            pass  # no connection now; the link sends again what is not acknowledged

    def _send_beat(self, beat: Beat) -> None:
        import psutil

        self._oom_kills.look()
        measured = Beat(
            beat.incarnation,
            beat.number,
            [self._measure(state) for state in beat.workers],
            psutil.cpu_percent(),
            psutil.virtual_memory().available,
        )
        try:
            self._sockets.send(self._pub, encode(Envelope(0, 0, 0, measured)))
        except self._zmq.Again:
            pass  # the next one comes in a second

    def _measure(self, state: WorkerState) -> WorkerState:
        import psutil

        if not state.pid:
            return state
        try:
            process = self._measured.get(state.pid)
            if process is None:
                process = self._measured[state.pid] = psutil.Process(state.pid)
            cpu, memory = process.cpu_percent(), process.memory_info().rss
        except psutil.Error:  # it died this very moment
            return state
        self._wires[state.worker].box.memory = memory
        return replace(state, cpu=cpu, memory=memory)

    def _sizes(self) -> dict[int, int]:
        """Of the memory of each worker, in bytes; for its death certificate too."""
        sizes = {}
        for worker, wires in self._wires.items():
            if (pid := self._pids.get(worker)) is not None and (size := host.resident(pid)):
                sizes[worker] = wires.box.memory = size
        return sizes

    def _close(self) -> None:
        self._nursery.close()
        orphans.end_all()  # this process is a node: it has no other children
        for wires in self._wires.values():
            wires.streams.read_rest()
            self._stderr.forward(wires.streams.take_unclaimed())
            wires.close()
        self._pub.close(linger=0)
        self._connections.close()
        self._dealer.close(linger=LINGER_MS)
        self._ctx.term()


def _resources(slots: int, given: dict[str, float]) -> tuple[dict[str, float], list[str]]:
    cpus = host.usable_cpus()
    gpus = host.gpus()
    found = {"cpu": float(max(cpus, slots)), "memory": float(host.usable_memory())}
    if gpus:
        found["gpu"] = float(len(gpus))
    offered = {**found, **given}
    return {**offered, "cpu": max(offered["cpu"], float(slots))}, gpus
