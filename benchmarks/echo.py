"""The floor of a round trip: a bare ZeroMQ echo over the same four hops, client, broker, worker, broker, client.

Each role is a process of its own, as in zmqsched.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import TypeAlias

import zmq

Context: TypeAlias = "zmq.Context[zmq.Socket[bytes]]"
Role: TypeAlias = Callable[[Context, str], None]

MESSAGE = b"x" * 100  # about what a no-op's submission and answer take
WARM_UP = 200
# Nobody waits for ever for a peer that did not start.
PATIENCE_MS = 20_000
STOP = b"stop"


def round_trip_s(count: int) -> float:
    """The median of ``count`` round trips, in seconds."""
    return measured_s(__name__, ("broker", "worker"), count)


def measured_s(module: str, others: Sequence[str], count: int) -> float:
    """What the client of a module of such roles prints, once the others have been started."""
    with tempfile.TemporaryDirectory(prefix="zs-echo-") as directory:
        processes = [subprocess.Popen([sys.executable, "-m", module, role, directory]) for role in others]
        try:
            client = [sys.executable, "-m", module, "client", directory, str(count)]
            out = subprocess.run(client, check=True, stdout=subprocess.PIPE).stdout
        except BaseException:
            for process in processes:
                process.kill()
            raise
        finally:
            for process in processes:
                process.wait()
    return float(out)


def play(roles: Mapping[str, Role], client: Callable[[Context, str, int], list[float]]) -> None:
    """Be what the command line says, ``ROLE DIRECTORY [COUNT]``; the client prints the median of its round trips."""
    role, directory, *count = sys.argv[1:]
    address = f"ipc://{Path(directory) / 'echo'}"
    with zmq.Context() as ctx:
        if role in roles:
            roles[role](ctx, address)
        else:
            print(median(client(ctx, address, WARM_UP + int(count[0]))[WARM_UP:]))


def _broker(ctx: Context, address: str) -> None:
    with made(ctx, zmq.ROUTER) as router:
        router.bind(address)
        for _ in ("client", "worker"):
            router.recv_multipart()  # a ROUTER drops what is for somebody not there yet: wait for both
        router.send_multipart([b"client", b"ready"])
        message = b""
        while message != STOP:
            sender, message = router.recv_multipart()
            router.send_multipart([b"client" if sender == b"worker" else b"worker", message])


def _worker(ctx: Context, address: str) -> None:
    with made(ctx, zmq.DEALER, b"worker") as dealer:
        dealer.connect(address)
        dealer.send(b"hello")
        while (message := dealer.recv()) != STOP:
            dealer.send(message)


def _client(ctx: Context, address: str, count: int) -> list[float]:
    with made(ctx, zmq.DEALER, b"client") as dealer:
        dealer.connect(address)
        dealer.send(b"hello")
        dealer.recv()
        times = []
        for _ in range(count):
            began = perf_counter()
            dealer.send(MESSAGE)
            dealer.recv()
            times.append(perf_counter() - began)
        dealer.send(STOP)
    return times


def made(ctx: Context, kind: int, name: bytes = b"") -> zmq.Socket[bytes]:
    """A socket that ends, whatever the others do."""
    socket = ctx.socket(kind)
    socket.rcvtimeo = PATIENCE_MS
    socket.linger = 1000
    if name:
        socket.routing_id = name
    return socket


if __name__ == "__main__":
    play({"broker": _broker, "worker": _worker}, _client)
