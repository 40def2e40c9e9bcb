"""Very many peers: nodes that all come and go at once, connections that say nothing."""

from __future__ import annotations

import contextlib
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from conftest import eventually

from zmqsched import Client
from zmqsched.config import ConnectionFile, split_tcp

from .figures import Figure
from .fleet import Fleet
from .ledger import nap
from .load import Load

USUAL_DESCRIPTORS = 1024  # the soft limit that most systems give a process


def nodes_come_and_go(number: int = 1_000, tasks: int = 10_000) -> list[Figure]:
    """So many nodes join at once, work, and leave at once; then as many vanish at once."""
    with _soft_limit(min(USUAL_DESCRIPTORS, number)):  # each node has two connections
        fleet = Fleet()
    with fleet:
        client = fleet.client()
        with _crowd(fleet, number) as crowd:
            began = time.monotonic()
            crowd.stdin.write(b"stay\n")
            eventually(lambda: _present(client) == number, 60)
            joined = time.monotonic() - began
            load = Load(client, fleet.ledger, nap(0))
            load.submit(tasks)
            load.finish(60)
            crowd.stdin.write(b"leave\n")
            began = time.monotonic()
            eventually(lambda: _present(client) == 0, 60)
            left = time.monotonic() - began
        counts = load.counts()
        assert counts["requeued: node lost"] + counts["requeued: node gone"] == 0
        with _crowd(fleet, number) as crowd:
            eventually(lambda: _present(client) == number, 60)
            crowd.kill()
            began = time.monotonic()
            eventually(lambda: _present(client) == 0, 60)
            lost = time.monotonic() - began
        load.assert_broker_agrees()
        assert fleet.ledger.ratio() == 1.0
        return [
            Figure("nodes", "", [number]),
            Figure("until all have joined", "s", [joined], 10.0),
            Figure("until all have left, in order", "s", [left], 10.0),
            Figure("until all that vanished are given up", "s", [lost], 10.0),
            load.executions(),
        ]


@contextlib.contextmanager
def _soft_limit(descriptors: int) -> Iterator[None]:
    """What is started meanwhile may have so many descriptors, until it asks for more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@contextlib.contextmanager
def _crowd(fleet: Fleet, number: int) -> Iterator[subprocess.Popen[bytes]]:
    """Nodes that are about to join."""
    command = [sys.executable, "-m", "chaos.crowd", str(fleet.path), str(number)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "bufsize": 0}
    with subprocess.Popen(command, cwd=Path(__file__).parent.parent, **pipes) as process:
        try:
            assert process.stdout.readline() == b"ready\n"
            yield process
        finally:
            process.kill()


def _present(client: Client) -> int:
    return sum(node.state not in ("lost", "gone") for node in client.nodes())


def silent_connections(number: int = 200, seconds: float = 10.0) -> list[Figure]:
    """More TCP connections that say nothing than the broker has descriptors for: who is in is served, who comes later
    gets in when they are gone."""
    with Fleet(slots=(2,), listen="127.0.0.1") as fleet, contextlib.ExitStack() as stack:
        load = Load(fleet.client(), fleet.ledger, nap(0.005))
        load.keep_for(0.5, 100)
        limit = len(list(Path(f"/proc/{fleet.broker.pid}/fd").iterdir())) + number // 2
        resource.prlimit(fleet.broker.pid, resource.RLIMIT_NOFILE, (limit, limit))
        address = split_tcp(ConnectionFile.load(fleet.path).addresses.work[0])
        for _ in range(number):
            one = stack.enter_context(socket.socket())
            one.setblocking(False)
            one.connect_ex(address)
        answered = len(load.done_at)
        load.keep_for(seconds, 100)
        served = (len(load.done_at) - answered) / seconds
        stack.close()
        began = time.monotonic()
        Load(fleet.client(timeout=60), fleet.ledger, nap(0), first=1_000_000).submit(1)
        load.finish(30)
        load.assert_broker_agrees()
        assert load.counts()["requeued: node lost"] == 0
        return [
            Figure("tasks a second meanwhile", "", [served]),
            Figure("until a new client is let in, once they are gone", "s", [time.monotonic() - began]),
            load.executions(),
        ]
