"""zmqsched without a thought: its processes, threads, sockets and messages, and nothing that decides.

What a round trip takes here is what the architecture costs on this machine, with each message validated; what it takes
beyond that is for the scheduler, the agent and the client to save. :mod:`.echo` carries bytes without node or threads.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping
from time import monotonic, perf_counter

import zmq

from zmqsched import sockets
from zmqsched.codec import decode, decode_pipe, encode, encode_pipe
from zmqsched.pipes import Pipe, pair
from zmqsched.protocol import (
    Dispatch,
    Done,
    Envelope,
    Final,
    Finals,
    Message,
    Order,
    Outcome,
    Results,
    Run,
    Shape,
    Submit,
    TaskSpec,
)

from . import echo

SHAPE = Shape(b"f" * 16)
CALL = b"c" * 16  # about what no arguments are pickled to
NONE = b"\x80\x05N."
CLIENT, NODE, STOP = b"client", b"node", b"stop"
MAX_MESSAGES = 200


def round_trip_s(count: int) -> float:
    """The median of ``count`` round trips, in seconds."""
    return echo.measured_s(__name__, ("broker", "node"), count)


def _serve(
    on: sockets.Socket, take: Callable[[list[bytes]], bool], others: Mapping[int, Callable[[], bool]] | None = None
) -> None:
    """A loop as zmqsched's are. What is called with what has come, or can be read, says whether to end."""
    others = others or {}
    waiter = sockets.Waiter(on)
    for descriptor in others:
        waiter.add(descriptor)
    ended = False
    while not ended:
        ready = waiter.wait(monotonic() + echo.PATIENCE_MS / 1000)
        if not ready:
            raise TimeoutError("nobody says anything any more")
        for descriptor in ready & others.keys():
            ended = others[descriptor]()
        if waiter.socket in ready:
            for frames in sockets.receive_all(on, MAX_MESSAGES):
                ended = take([frame.bytes for frame in frames])


def _send(on: sockets.Socket, message: Message, *to: bytes) -> None:
    sockets.send(on, [*to, *encode(Envelope(1, 1, 1, message))])


def _broker(ctx: sockets.Context, address: str) -> None:
    peers: dict[bytes, bytes] = {}

    def take(frames: list[bytes]) -> bool:
        peer, first = frames[:2]
        if first in (CLIENT, NODE):
            peers[first] = peer
            if len(peers) == 2:
                sockets.send(router, [peers[CLIENT], b"ready"])
        elif first == STOP:
            sockets.send(router, [peers[NODE], STOP])
            return True
        else:
            to, answer = _answer(decode(frames[1:]).body)
            _send(router, answer, peers[to])
        return False

    with echo.made(ctx, zmq.ROUTER) as router:
        router.bind(address)
        _serve(router, take)


def _answer(message: Message) -> tuple[bytes, Message]:
    match message:
        case Submit(shapes, [task, *_]):
            return NODE, Dispatch(shapes, [Order(task.task, 1, 0, task.call)])
        case Results([outcome, *_]):
            return CLIENT, Finals([Final(outcome.task, "ok", outcome.value)])
    raise ValueError(f"not of a round trip: {message}")


def _worker(pipe: Pipe) -> None:
    while (frames := pipe.receive()) is not None:
        run = decode_pipe(frames)
        assert isinstance(run, Run), "nothing else is sent"
        pipe.send(encode_pipe(Done(run.task, run.attempt, True, NONE, 0.0)))


def _node(ctx: sockets.Context, address: str) -> None:
    ours, theirs = pair()
    worker = os.fork()  # before there is a socket
    if not worker:
        ours.close()
        _worker(theirs)
        os._exit(0)
    theirs.close()

    def give(frames: list[bytes]) -> bool:
        if frames == [STOP]:
            return True
        message = decode(frames).body
        assert isinstance(message, Dispatch), "nothing else is sent"
        order = message.orders[0]
        ours.send(encode_pipe(Run(order.task, order.attempt, SHAPE.function, b"", order.call, until=monotonic())))
        return False

    def tell() -> bool:
        done = decode_pipe(ours.receive() or [])
        assert isinstance(done, Done), "nothing else is answered"
        _send(dealer, Results([Outcome(done.task, done.attempt, done.ok, done.value, 1)]))
        return False

    try:
        with echo.made(ctx, zmq.DEALER) as dealer:
            dealer.connect(address)
            dealer.send(NODE)
            _serve(dealer, give, {ours.fileno(): tell})
    finally:
        ours.close()
        os.waitpid(worker, 0)


def _client(ctx: sockets.Context, address: str, count: int) -> list[float]:
    tasks: list[bytes] = []
    nudge = os.eventfd(0)
    answered = threading.Semaphore(0)

    def submit() -> bool:
        os.eventfd_read(nudge)
        if (task := tasks.pop()) == STOP:
            dealer.send(STOP)
            return True
        _send(dealer, Submit([SHAPE], [TaskSpec(task, 0, CALL)]))
        return False

    def answer(frames: list[bytes]) -> bool:
        assert isinstance(decode(frames).body, Finals), "nothing else is answered"
        answered.release()
        return False

    def ask(task: bytes) -> None:
        tasks.append(task)
        os.eventfd_write(nudge, 1)

    with echo.made(ctx, zmq.DEALER) as dealer:
        dealer.connect(address)
        dealer.send(CLIENT)
        dealer.recv()
        loop = threading.Thread(target=_serve, args=(dealer, answer, {nudge: submit}))
        loop.start()
        times = []
        for number in range(count):
            began = perf_counter()
            ask(number.to_bytes(16))
            answered.acquire()
            times.append(perf_counter() - began)
        ask(STOP)
        loop.join()
    os.close(nudge)
    return times


if __name__ == "__main__":
    echo.play({"broker": _broker, "node": _node}, _client)
