"""The floor of a round trip: a bare ZeroMQ echo over the same four hops, client, broker, worker, broker, client.

Each role is a process of its own, as in zmqsched: ``python -m benchmarks.echo ROLE DIRECTORY [COUNT]``.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from time import perf_counter

import zmq

MESSAGE = b"x" * 100  # about what a no-op's submission and answer take
WARM_UP = 200
# Nobody waits for ever for a peer that did not start.
PATIENCE_MS = 20_000
STOP = b"stop"


def round_trip_s(count: int) -> float:
    """The median of ``count`` round trips, in seconds."""
    with tempfile.TemporaryDirectory(prefix="zs-echo-") as directory:
        others = [subprocess.Popen(_command(role, directory)) for role in ("broker", "worker")]
        try:
            client = [*_command("client", directory), str(count)]
            out = subprocess.run(client, check=True, stdout=subprocess.PIPE).stdout
        except BaseException:
            for process in others:
                process.kill()
            raise
        finally:
            for process in others:
                process.wait()
    return float(out)


def _command(role: str, directory: str) -> list[str]:
    return [sys.executable, "-m", "benchmarks.echo", role, directory]


def _broker(ctx: zmq.Context[zmq.Socket[bytes]], address: str) -> None:
    with _socket(ctx, zmq.ROUTER) as router:
        router.bind(address)
        for _ in ("client", "worker"):
            router.recv_multipart()  # a ROUTER drops what is for somebody not there yet: wait for both
        router.send_multipart([b"client", b"ready"])
        message = b""
        while message != STOP:
            sender, message = router.recv_multipart()
            router.send_multipart([b"client" if sender == b"worker" else b"worker", message])


def _worker(ctx: zmq.Context[zmq.Socket[bytes]], address: str) -> None:
    with _socket(ctx, zmq.DEALER, b"worker") as dealer:
        dealer.connect(address)
        dealer.send(b"hello")
        while (message := dealer.recv()) != STOP:
            dealer.send(message)


def _client(ctx: zmq.Context[zmq.Socket[bytes]], address: str, count: int) -> None:
    with _socket(ctx, zmq.DEALER, b"client") as dealer:
        dealer.connect(address)
        dealer.send(b"hello")
        dealer.recv()
        times = []
        for _ in range(WARM_UP + count):
            began = perf_counter()
            dealer.send(MESSAGE)
            dealer.recv()
            times.append(perf_counter() - began)
        dealer.send(STOP)
    print(median(times[WARM_UP:]))


def _socket(ctx: zmq.Context[zmq.Socket[bytes]], kind: int, name: bytes = b"") -> zmq.Socket[bytes]:
    socket = ctx.socket(kind)
    socket.rcvtimeo = PATIENCE_MS
    socket.linger = 1000
    if name:
        socket.routing_id = name
    return socket


def main(role: str, directory: str, count: str = "0") -> None:
    address = f"ipc://{Path(directory) / 'echo'}"
    with zmq.Context() as ctx:
        if role == "broker":
            _broker(ctx, address)
        elif role == "worker":
            _worker(ctx, address)
        else:
            _client(ctx, address, int(count))


if __name__ == "__main__":
    main(*sys.argv[1:])
