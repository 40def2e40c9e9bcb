"""Starting, joining, stopping, and what encryption costs: single measurements for measures.py."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random

import msgspec
import zmq

from zmqsched import Client, sockets
from zmqsched.codec import decode, encode
from zmqsched.config import CONNECTION_FILE, DEFAULT_CLUSTER, Addresses, ConnectionFile, role_file
from zmqsched.core import events
from zmqsched.core.agent import Agent
from zmqsched.errors import ProtocolError
from zmqsched.host import allow_many_files
from zmqsched.protocol import Beat, Envelope, Host, NodeHello

from . import work

ZMQSCHED = [sys.executable, "-m", "zmqsched"]
# Nodes that connect at the same moment: as many processes would.
AT_ONCE = 64
PATIENCE_S = 120.0
BULK, BULKS = 16 * 1024 * 1024, 4


@contextlib.contextmanager
def home() -> Iterator[dict[str, str]]:
    """The environment of commands that have a directory of clusters of their own, which is empty in the end."""
    with tempfile.TemporaryDirectory(prefix="zs-bench-", dir="/tmp") as directory:
        yield {**os.environ, "ZMQSCHED_DIR": directory}
        if left := os.listdir(directory):
            raise RuntimeError(f"files are left: {left}")


def up_and_down_s(workers: int) -> tuple[float, float]:
    """``zmqsched up --detach`` until it returns, with the cluster ready, and ``zmqsched down`` likewise."""
    with home() as environment:
        up = _run_s(["up", "--detach", f"-n{workers}"], environment)
        return up, _run_s(["down"], environment)


def _run_s(words: list[str], environment: dict[str, str]) -> float:
    began = time.perf_counter()
    subprocess.run([*ZMQSCHED, *words], env=environment, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


@contextlib.contextmanager
def tcp_broker() -> Iterator[Path]:
    """The directory of a broker alone, on TCP with CURVE."""
    with home() as environment:
        command = [*ZMQSCHED, "broker", "--listen", "127.0.0.1", "--until-eof", "--ready-fd=1", "--log-level=error"]
        process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert process.stdin is not None
        assert process.stdout is not None
        with process, process.stdin:
            process.stdout.readline()
            yield Path(environment["ZMQSCHED_DIR"], DEFAULT_CLUSTER)


class _Node:
    """A node's core, on a link and with beats of its own, and without workers."""

    def __init__(self, number: int, ctx: sockets.Context, file: ConnectionFile) -> None:
        keys = sockets.Keys.of(file)
        self.dealer = sockets.connect_dealer(ctx, file.addresses.work, keys, PATIENCE_S)
        self.pub = sockets.connect_pub(ctx, file.addresses.beats, keys, PATIENCE_S)
        host = Host(f"host{number}", 1, sys.version.split()[0], ())
        hello = NodeHello(Random(number).randbytes(16), 1, host, 1, 1, (("cpu", 1.0),))
        self._agent = Agent(hello)

    def turn(self) -> None:
        now = time.monotonic()
        for frames in sockets.receive_all(self.dealer, 100):
            with contextlib.suppress(ProtocolError):
                self._act(self._agent.handle(events.Reached(decode([frame.buffer for frame in frames])), now))
        if now >= self._agent.next_deadline():
            self._act(self._agent.handle(events.Tick(), now))

    def _act(self, actions: list[events.AgentAction]) -> None:
        for action in actions:
            match action:
                case events.ToBroker(envelope):
                    with contextlib.suppress(zmq.Again):
                        sockets.send(self.dealer, encode(envelope))
                case events.SendBeat(beat):
                    self._beat(beat)

    def _beat(self, beat: Beat) -> None:
        with contextlib.suppress(zmq.Again):
            self.pub.send_multipart(encode(Envelope(0, 0, 0, beat)), zmq.NOBLOCK)


def join_s(count: int) -> float:
    """So many nodes connect with CURVE at once and say hello: seconds until a client sees them all alive."""
    allow_many_files()
    with tcp_broker() as directory, zmq.Context(io_threads=2) as ctx, ThreadPoolExecutor(AT_ONCE) as pool:
        ctx.set(zmq.MAX_SOCKETS, 8 * count)
        file = by_tcp(ConnectionFile.load(role_file(directory, "node")))
        with Client(directory / CONNECTION_FILE) as client:
            began = time.perf_counter()
            nodes = list(pool.map(lambda number: _Node(number, ctx, file), range(count)))
            while sum(node.state == "alive" for node in client.nodes()) < count:
                if time.perf_counter() - began > PATIENCE_S:
                    raise RuntimeError(f"only {len(client.nodes())} of {count} nodes have joined")
                for node in nodes:
                    node.turn()
            seconds = time.perf_counter() - began
        ctx.destroy(linger=0)
    return seconds


def by_tcp(file: ConnectionFile) -> ConnectionFile:
    """As a client on another host has it: without the Unix sockets."""
    addresses = file.addresses
    found = {
        role: [address for address in getattr(addresses, role) if address.startswith("tcp://")]
        for role in addresses.__struct_fields__
    }
    return msgspec.structs.replace(file, addresses=Addresses(**found))


def bulk_mbs(client: Client) -> float:
    """Megabytes a second of large arguments and results, there and back."""
    block = bytes(BULK)
    began = time.perf_counter()
    for _ in range(BULKS):
        client.submit(work.identity, block).result()
    return 2 * BULK * BULKS / (time.perf_counter() - began) / 1e6
