"""Senseless input, in bulk: bytes for the codec, and valid messages that make no sense for the three cores.

    python -m tests.fuzz --messages 1000000 --seed 1        (make fuzz MESSAGES=... )

Rules
-----
* Messages are built from the struct definitions by looking at their types, so what is added to ``protocol.py`` is covered.
* Bytes become a message or a ProtocolError, and nothing else. A core never raises, its ``sanity_check`` holds after each
  event, and whatever it sends can be read by the other end: what cannot would stop that link for ever.
* The input is cut into stories. Each begins with a new core and depends on nothing but the seed and its number, so that
  a failure is run again by ``--story``.
* Memory may not grow: the peak of the whole process is compared with what it was after the first tenth.
"""

from __future__ import annotations

import argparse
import functools
import re
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any, get_args

import msgspec
from msgspec import inspect

from zmqsched import protocol
from zmqsched.codec import decode, decode_pipe, decode_record, encode, encode_pipe, encode_record
from zmqsched.core import events
from zmqsched.core.agent import Agent
from zmqsched.core.requests import Requests
from zmqsched.core.scheduler import Scheduler
from zmqsched.core.settings import Settings
from zmqsched.errors import ProtocolError
from zmqsched.protocol import (
    ClientHello,
    Dispatch,
    Done,
    Envelope,
    Host,
    NodeHello,
    Outcome,
    Results,
    Run,
    Shape,
    Welcome,
)

MESSAGES = get_args(protocol.Message)
PIPE_MESSAGES = get_args(protocol.PipeMessage)
# What a core hears seldom in these stories: what it says itself, and what ends it. All else, and all that is new, is likely.
OF_BROKER = (
    protocol.Welcome, protocol.No, protocol.SayHello, protocol.Finals, protocol.Running, protocol.GroupDone, protocol.Report,
    protocol.Notice, protocol.Dispatch, protocol.Revoke, protocol.Stop, protocol.Fact,
)  # fmt: skip
OF_PEERS = (
    protocol.ClientHello, protocol.NodeHello, protocol.Submit, protocol.Cancel, protocol.GroupAdd, protocol.GroupWait,
    protocol.GroupForget, protocol.Query, protocol.Shutdown, protocol.Command, protocol.Results, protocol.Progress,
    protocol.Workers, protocol.Draining, protocol.Beat,
)  # fmt: skip
ENDING = (protocol.Shutdown, protocol.Stop, protocol.No, protocol.Goodbye, protocol.ClientHello, protocol.NodeHello)
STORY = 200  # messages
GROWTH_LIMIT = 10 * 1024 * 1024
PYTHON = "3.11.4"
IDS = [letter * 16 for letter in (b"a", b"b", b"c", b"d", b"e", b"\0")]
NAMES = ["", "cpu", "gpu", "x", "n1", "n2", PYTHON, "\x1b[31mred\r\nline\0", "é" * 200]
HERE = Host("here", 1, PYTHON)


# --- any message, from its struct --------------------------------------------------------------------------------------


type_info = functools.cache(inspect.type_info)


class Maker:
    """Random instances of structs, of few distinct ids, numbers and names, so that they meet."""

    def __init__(self, random: Random) -> None:
        self.random = random
        self.numbers: list[int] = []  # sessions and the like, worth being named again
        self._makers: dict[Any, Callable[[], Any]] = {}

    def message(self, kinds: tuple[type, ...] = MESSAGES) -> Any:
        made = self.make(self.random.choice(kinds))
        if hasattr(made, "shapes") and self.random.random() < 0.95:
            made = with_indices_in_range(made)
        return made

    def make(self, kind: type) -> Any:
        return self._of(type_info(kind))() if kind not in self._makers else self._makers[kind]()

    def _of(self, info: Any) -> Callable[[], Any]:
        match info:
            case inspect.StructType(cls, fields):
                if cls not in self._makers:
                    makers = [self._of(field.type) for field in fields]
                    least = sum(field.required for field in fields)
                    self._makers[cls] = lambda: cls(*[make() for make in makers[: self._fields(least, len(makers))]])
                return self._makers[cls]
            case inspect.UnionType(types) if {type(one) for one in types} == {inspect.BytesType, inspect.IntType}:
                return self._payload
            case inspect.UnionType(types):
                makers = [self._of(one) for one in types]
                return lambda: self.random.choice(makers)()
            case inspect.ListType(item, _, most) | inspect.VarTupleType(item, _, most):
                kind = list if isinstance(info, inspect.ListType) else tuple
                make = self._of(item)
                return lambda: kind(make() for _ in range(self._length(most)))
            case inspect.TupleType(items):
                makers = [self._of(item) for item in items]
                return lambda: tuple(make() for make in makers)
            case inspect.LiteralType(values):
                return lambda: self.random.choice(values)
            case inspect.IntType():
                return lambda: self._int(info)
            case inspect.FloatType():
                return lambda: self._float(info)
            case inspect.BytesType():
                return lambda: self._bytes(info)
            case inspect.StrType(_, most):
                return lambda: self._text(most)
            case inspect.BoolType():
                return lambda: self.random.random() < 0.5
            case inspect.NoneType():
                return lambda: None
        raise NotImplementedError(f"a wire type that the fuzzer cannot make: {info}")

    def _fields(self, least: int, most: int) -> int:
        """How many of a struct's fields are given; the others have defaults."""
        return most if self.random.random() < 0.5 else self.random.randint(least, most)

    def _length(self, most: int | None) -> int:
        rolled = self.random.random()
        length = int(4 * self.random.random()) if rolled < 0.99 else self.random.randrange(100)
        return min(length, length if most is None else most)

    def _int(self, info: inspect.IntType) -> int:
        least = info.ge if info.ge is not None else 0 if info.gt is None else info.gt + 1
        most = info.le if info.le is not None else 2**63 if info.lt is None else info.lt - 1
        rolled = self.random.random()
        if rolled < 0.8:
            return min(max(int(4 * self.random.random()), least), most)
        if rolled < 0.9 and self.numbers:
            return min(max(self.random.choice(self.numbers), least), most)
        return self.random.choice([least, most, self.random.randint(least, most)])

    def _float(self, info: inspect.FloatType) -> float:
        least = info.ge if info.ge is not None else info.gt if info.gt is not None else -1e300
        most = info.le if info.le is not None else 1e300
        if self.random.random() < 0.9:
            return self.random.choice([1.0, 1.0, 1.0, 0.5, 2.0, 0.0, 1e-10])
        return self.random.choice([float(least), float(most), float("nan"), float("inf")])

    def _bytes(self, info: inspect.BytesType) -> bytes:
        if info.min_length == info.max_length and info.min_length is not None:
            return self.random.choice(IDS).ljust(info.min_length, b"!")[: info.min_length]
        if info.max_length == 16:  # an id, or none
            return self.random.choice([b"", *IDS])
        return self.random.randbytes(self._length(info.max_length))

    def _text(self, most: int | None) -> str:
        if self.random.random() < 0.01:
            return "x" * (most or 100)
        return self.random.choice(["cpu", *NAMES])[:most]

    def _payload(self) -> protocol.Payload:
        rolled = self.random.random()
        if rolled < 0.8:
            return self.random.randbytes(8)
        if rolled < 0.9:
            return bytes(protocol.INLINE_MAX + self.random.randrange(2))
        return [b"part"] * (1 if rolled < 0.98 else 200)


def with_indices_in_range(message: Any) -> Any:
    """As often as not they are not, and such a message goes no further than the codec."""
    field = "tasks" if hasattr(message, "tasks") else "orders"
    shapes = message.shapes or [Shape(IDS[0])]
    items = [msgspec.structs.replace(item, shape=item.shape % len(shapes)) for item in getattr(message, field)]
    return msgspec.structs.replace(message, shapes=shapes, **{field: items})


# --- bytes -------------------------------------------------------------------------------------------------------------


HUGE = [marker + b"\xff\xff\xff\xff" for marker in (b"\xdd", b"\xc6", b"\xdb", b"\xdf", b"\xc9")]
MARKERS = [b"\xc0", b"\xc1", b"\x90", b"\x80", b"\xcb\x7f\xf8\0\0\0\0\0\0", b"\xcf" + b"\xff" * 8, b"\xd3\x80" + bytes(7)]


def mutated(random: Random, frames: list[bytes], others: list[bytes]) -> list[bytes]:
    """Another list of frames, damaged once or a few times."""
    frames = list(frames)
    for _ in range(random.choice([1, 1, 1, 2, 5])):
        place = random.randrange(len(frames)) if random.random() < 0.2 else 0
        frame = bytearray(frames[place])
        at = random.randrange(len(frame) + 1)
        match random.randrange(9):
            case 0 | 1 if frame:
                frame[at % len(frame)] ^= 1 << random.randrange(8)
            case 2 if frame:
                frame[at % len(frame)] = random.randrange(256)
            case 3:
                del frame[at:]
            case 4:
                frame[at:at] = random.choice(HUGE)
            case 5:
                frame[at : at + random.randrange(4)] = random.choice(MARKERS)
            case 6:
                other = random.choice(others)
                frame[at:] = other[random.randrange(len(other) + 1) :]
            case 7:
                frame[at:at] = random.choice([b"\x91", b"\x81\xa1k"]) * random.choice([1, 30, 2_000])
            case _:
                frames.insert(random.randrange(len(frames) + 1), random.randbytes(random.randrange(40)))
                continue
        frames[place] = bytes(frame)
    return frames


class Bytes:
    """Stories of bytes for the codec."""

    def __init__(self, random: Random, counts: Counter[str]) -> None:
        self.random = random
        self.maker = Maker(random)
        self.counts = counts
        self.last = [b"ZQ"]

    def step(self) -> bool:
        random = self.random
        pipe = random.random() < 0.3
        if random.random() < 0.05:
            frames = [random.choice([b"", b"ZQ", b"ZQ\x01\x00"]) + random.randbytes(random.choice([0, 1, 9, 100, 4_000]))]
        elif pipe:
            frames = [bytes(frame) for frame in encode_pipe(self.maker.message(PIPE_MESSAGES))]
        else:
            frames = [bytes(frame) for frame in encode(Envelope(1, 1, 0, self.maker.message()))]
        damaged = mutated(random, frames, self.last)
        self.last = frames
        try:
            message = decode_pipe(damaged) if pipe else decode(damaged)
        except ProtocolError as error:
            self.counts[f"codec: {reason_of(error)}"] += 1
        else:
            self.counts["codec: still a message"] += 1
            (encode_pipe if pipe else encode)(message)
        return True


def reason_of(error: ProtocolError) -> str:
    """What msgspec says, without the place and the numbers."""
    return re.sub(r"\d+", "N", str(error).partition(" - at")[0])[:60]


# --- the cores -------------------------------------------------------------------------------------------------------------


def over_the_wire(envelope: Envelope) -> Envelope:
    return decode([bytes(frame) for frame in encode(envelope)])


class World:
    """Around one core: what it is told is what the codec lets through; what it says must be readable. ``own``: what it says
    itself, and hears seldom."""

    own: tuple[type, ...] = OF_PEERS

    def __init__(self, random: Random, counts: Counter[str]) -> None:
        self.random = random
        self.maker = Maker(random)
        self.counts = counts
        self.now = 100.0
        self.core: Any = None
        self.over = False

    def step(self) -> bool:
        """One event; False when the core has ended."""
        self.now += self.random.choice([0.0, 0.0, 0.0, 0.001, 0.02, 0.3, 1.0])
        if self.random.random() < 0.005:
            self.now += self.random.choice([5.0, 70.0])
        self.handle(self.event())
        if self.random.random() < 0.5:
            self.handle(events.Tick())
        return not self.over

    def event(self) -> Any:
        raise NotImplementedError

    def act(self, action: Any) -> None:
        raise NotImplementedError

    def handle(self, event: Any) -> None:
        if event is None or self.over:
            return
        actions = self.core.handle(event, self.now)
        self.core.sanity_check()
        self.core.next_deadline()
        for action in actions:
            self.act(action)

    def envelope(self, session: int, following: int, body: Any = None) -> Envelope | None:
        """An envelope as the wire lets it through, usually one that the link takes."""
        while body is None or (isinstance(body, (*ENDING, *self.own)) and self.random.random() < 0.95):
            body = self.maker.message()
        seq = self.random.choice([following, following, following, 0, 0, self.random.randrange(5)])
        made = Envelope(session, seq, self.random.choice([0, 1, 2, 2**53]), body)
        try:
            return over_the_wire(made)
        except ProtocolError as error:
            self.counts[f"codec: {reason_of(error)}"] += 1
            return None


class AroundScheduler(World):
    own = OF_BROKER

    def __init__(self, random: Random, counts: Counter[str]) -> None:
        super().__init__(random, counts)
        self.settings = Settings(journal=random.random() < 0.5)
        self.core = Scheduler(self.settings, Random(1))
        self.journal: list[protocol.Record] = []
        self.commits: list[events.Write] = []  # on their way into the journal
        self.received: Counter[int] = Counter()  # numbered messages that each session has taken
        self.orders: list[tuple[int, Any]] = []
        self.lives = 0
        for number in range(4):
            self.handle(self.hello(number))

    def hello(self, number: int) -> events.Arrived:
        """Of one of two clients or two nodes."""
        self.lives += 1
        if number < 2:
            return events.Arrived(b"client", "", Envelope(0, 0, 0, ClientHello(IDS[number], self.lives, HERE)))
        hello = NodeHello(IDS[number], self.lives, HERE, 2, 3, (("cpu", 2.0), ("gpu", 1.0), ("x", 1.0)), ("x",))
        return events.Arrived(b"node", "", Envelope(0, 0, 0, hello))

    def event(self) -> Any:
        if self.random.random() < 0.03:
            return self.hello(self.random.randrange(4))
        rolled = self.random.random()
        if rolled < 0.02:
            beat = self.envelope(0, 0, self.maker.make(protocol.Beat))
            return beat and events.BeatArrived(beat.body)
        if rolled < 0.03:
            return events.Undelivered(self.random.choice([b"client", b"node", b""]), "full")
        if rolled < 0.04:
            no = self.random.choice([None, protocol.No("malformed", "no"), protocol.No("version", "other")])
            return events.Malformed(self.random.choice([b"client", b"node", b""]), "malformed message", no)
        if rolled < 0.045 and self.settings.journal:
            return self.begins_again()
        if rolled < 0.15 and self.commits:
            return self.writes()
        session, body = self.random.choice(self.maker.numbers or [0]), None
        if rolled < 0.15 and self.orders:
            session, order = self.random.choice(self.orders)
            body = Results([Outcome(order.task, order.attempt, self.random.random() < 0.7, b"value", 1)])
        elif rolled < 0.2:
            session = self.random.randrange(2**53)
        envelope = self.envelope(session, self.received[session] + 1, body)
        if envelope is None:
            return None
        if envelope.seq == self.received[session] + 1:
            self.received[session] += 1
        peer = self.random.choice([b"client", b"node", b"node", b"other"])
        return events.Arrived(peer, "" if rolled > 0.1 else self.random.choice(["", "client"]), envelope)

    def writes(self) -> events.Written | events.Troubled:
        if self.random.random() < 0.2:
            return events.Troubled("no space left")
        for commit in self.commits:
            kept = [] if commit.anew else self.journal
            self.journal = kept + [decode_record([bytes(part) for part in encode_record(one)]) for one in commit.records]
        number = self.commits[-1].number
        self.commits.clear()
        return events.Written(number, 1_000 * len(self.journal))

    def begins_again(self) -> events.Tick:
        """The broker was killed, and the next has what was written."""
        self.core = Scheduler(self.settings, Random(1))
        self.core.restore(self.journal, self.now)
        self.commits.clear()
        return events.Tick()

    def act(self, action: Any) -> None:
        match action:
            case events.Send(_, envelope):
                body = over_the_wire(envelope).body
                if isinstance(body, Welcome):
                    self.maker.numbers = [*self.maker.numbers, body.session][-8:]
                elif isinstance(body, protocol.SayHello) and envelope.session in self.maker.numbers:
                    self.maker.numbers.remove(envelope.session)
                elif isinstance(body, Dispatch):
                    self.orders = [*self.orders, *((envelope.session, order) for order in body.orders)][-20:]
            case events.Write():
                self.commits.append(action)
            case events.Publish(fact):
                over_the_wire(Envelope(0, 0, 0, fact))
            case events.Quit():
                self.over = True


class AroundAgent(World):
    """With a nursery and pipes that are as they should be; what comes out of the pipes may be anything."""

    def __init__(self, random: Random, counts: Counter[str]) -> None:
        super().__init__(random, counts)
        self.pipes: dict[int, list[Run]] = {}
        self.session = 0
        self.received = 0
        self.core = Agent(NodeHello(IDS[0], 1, HERE, 2, 2, (("cpu", 2.0), ("gpu", 1.0))), ["0"])
        self.handle(events.Tick())

    def event(self) -> Any:
        rolled = self.random.random()
        worker = self.random.choice(sorted(self.pipes)) if self.pipes else 0
        pipe = self.pipes.get(worker, [])
        if rolled < 0.25 and pipe:
            run = pipe.pop(0)
            took = self.random.choice([0.0, 0.0, 0.001, 0.1])
            return events.Said(worker, [Done(run.task, run.attempt, rolled < 0.2, b"value", took)])
        if rolled < 0.35 and self.pipes:
            message = self.maker.message((Done, Done, protocol.GroupAdd))
            if isinstance(message, Done):  # what takes long would put an end to batches
                message = msgspec.structs.replace(message, seconds=self.random.choice([0.0, 0.0, message.seconds]))
            try:
                return events.Said(worker, [decode_pipe(encode_pipe(message))])
            except ProtocolError as error:
                self.counts[f"codec: {reason_of(error)}"] += 1
                return None
        if rolled < 0.40 and self.pipes:
            untaken = self.pipes.pop(worker)[1:]
            return events.Exited(worker, 1000 + worker, "killed by SIGKILL", untaken)
        if rolled < 0.41:
            return events.Unreadable("nonsense")
        following = self.received + 1
        body = self.maker.message((Dispatch,)) if rolled < 0.6 else None
        envelope = self.envelope(self.session if rolled < 0.95 else 7, following, body)
        if envelope is not None and (envelope.session, envelope.seq) == (self.session, following):
            self.received += 1
        return envelope and events.Reached(envelope)

    def act(self, action: Any) -> None:
        match action:
            case events.ToBroker(envelope):
                body = over_the_wire(envelope).body
                if isinstance(body, NodeHello):
                    self.session, self.received = self.session + 1, 0
                    self.handle(events.Reached(Envelope(self.session, 0, 0, Welcome(self.session, body.life, 1, "n1", 1.0))))
                elif isinstance(body, protocol.Ping):  # without an answer it has no lease and starts nothing
                    self.handle(events.Reached(Envelope(self.session, 0, 0, protocol.Pong(body.high, body.number))))
            case events.Start(worker):
                self.pipes[worker] = []
                self.handle(events.Born(worker, 1000 + worker))
            case events.Give(worker, runs):
                for run in runs:
                    decode_pipe([bytes(frame) for frame in encode_pipe(run)])
                self.pipes[worker].extend(runs)
            case events.TakeBack(worker):
                untaken = self.pipes[worker][1:]
                del self.pipes[worker][1:]
                self.handle(events.TakenBack(worker, untaken))
            case events.SendBeat(beat):
                over_the_wire(Envelope(0, 0, 0, beat))
            case events.Quit():
                self.over = True


class AroundRequests(World):
    def __init__(self, random: Random, counts: Counter[str]) -> None:
        super().__init__(random, counts)
        self.session = 0
        self.received = 0
        self.core = Requests(ClientHello(IDS[0], 1, HERE))
        self.handle(events.Tick())

    def event(self) -> Any:
        rolled = self.random.random()
        if rolled < 0.1:
            task, shape = self.random.choice(IDS), Shape(self.random.choice(IDS))
            inputs = tuple(one for one in self.core._open if self.random.random() < 0.5)
            asked = events.Asked(task, shape, b"call", inputs)
            return None if task in self.core._open else events.Ask([asked], {shape.function: b"code"})
        if rolled < 0.15:
            return events.Withdraw([self.random.choice(IDS)])
        if rolled < 0.2:
            kinds = get_args(events.Tell.__annotations__["message"]) or (protocol.Query, protocol.GroupWait)
            try:  # its owner says what can be said
                return events.Tell(over_the_wire(Envelope(1, 1, 0, self.maker.message(kinds))).body)
            except ProtocolError:
                return None
        if rolled < 0.21:
            return events.Unreadable("nonsense")
        following = self.received + 1
        envelope = self.envelope(self.session if rolled < 0.95 else 7, following)
        if envelope is not None and (envelope.session, envelope.seq) == (self.session, following):
            self.received += 1
        return envelope and events.Reached(envelope)

    def act(self, action: Any) -> None:
        match action:
            case events.ToBroker(envelope):
                body = over_the_wire(envelope).body
                if isinstance(body, ClientHello):
                    self.session, self.received = self.session + 1, 0
                    self.handle(events.Reached(Envelope(self.session, 0, 0, Welcome(self.session, body.life, 1, "c", 1.0))))
            case events.Broken():
                self.over = True


KINDS: list[Callable[[Random, Counter[str]], Any]] = [Bytes, AroundScheduler, AroundAgent, AroundRequests]


# --- the run ------------------------------------------------------------------------------------------------------------


def tell_story(seed: int, number: int, counts: Counter[str]) -> int:
    """Returns how many messages it had."""
    random = Random(f"{seed}/{number}")
    world = KINDS[number % len(KINDS)](random, counts)
    told = 1
    while world.step() and told < STORY:
        told += 1
    counts.update(getattr(getattr(world, "core", None), "counts", {}))
    return told


def peak_bytes() -> int:
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--messages", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--story", type=int, help="run this one only")
    asked = parser.parse_args(arguments)
    counts: Counter[str] = Counter()
    began = time.monotonic()
    told = base = 0
    number = asked.story or 0
    while told < asked.messages:
        try:
            told += tell_story(asked.seed, number, counts)
        except Exception:  # noqa: BLE001 - whatever it is, it is what was looked for
            traceback.print_exc()
            print(f"failed: python -m tests.fuzz --seed {asked.seed} --story {number}", file=sys.stderr)
            return 1
        if asked.story is not None:
            break
        number += 1
        if not base and told >= asked.messages // 10:
            base = peak_bytes()
    for reason, times in sorted(counts.items()):
        print(f"{times:>10,}  {reason}")
    grown = peak_bytes() - (base or peak_bytes())
    print(f"seed {asked.seed}: {told:,} messages in {number} stories, {time.monotonic() - began:.0f} s; "
          f"peak memory grew by {grown / 2**20:.1f} MiB")  # fmt: skip
    return int(grown >= GROWTH_LIMIT)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
