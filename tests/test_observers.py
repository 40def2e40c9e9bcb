"""What others can see of a running cluster: the facts on the status channel, and what beats carry."""

import os
import signal
import time

import pytest
from conftest import eventually

from zmqsched import Client, LocalCluster, sockets
from zmqsched.codec import decode
from zmqsched.protocol import Fact

DEADLINE_S = 60.0


@pytest.fixture
def cluster():
    with LocalCluster(n_workers=2) as cluster:
        yield cluster


class Observer:
    """Listens on the status channel, as a dashboard would."""

    def __init__(self, cluster):
        self._ctx = sockets.context()
        self._sub = sockets.connect_sub(self._ctx, cluster.file.addresses.status, sockets.Keys.of(cluster.file))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._sub.close()
        self._ctx.term()

    def next(self, kind):
        """The next fact of this kind."""
        until = time.monotonic() + DEADLINE_S
        while time.monotonic() < until:
            if self._sub.poll(200):
                fact = decode(self._sub.recv_multipart()).body
                assert isinstance(fact, Fact)
                if fact.kind == kind:
                    return fact
        raise AssertionError(f"no fact of kind {kind!r} in {DEADLINE_S:.0f} s")


def test_counts_are_told_each_second(cluster):
    with Observer(cluster) as observer:
        fact = observer.next("counts")
    assert fact.about == cluster.name
    assert {name for name, _ in fact.counts} >= {"queued", "assigned"}


def test_a_dead_worker_and_a_frozen_node_are_told(cluster):
    with Client(cluster) as client, Observer(cluster) as observer:
        observer.next("counts")  # now the subscription stands
        worker = client.workers()[0]
        os.kill(worker.pid, signal.SIGKILL)
        fact = observer.next("worker died")
        assert fact.about == worker.node
        assert "SIGKILL" in fact.text
        os.kill(cluster.node_pids[0], signal.SIGSTOP)
        try:
            assert observer.next("suspect").about == worker.node
            assert observer.next("lost").about == worker.node
        finally:
            os.kill(cluster.node_pids[0], signal.SIGCONT)
        assert observer.next("joined").about != worker.node, "it comes back by itself, under a new name"


def test_beats_carry_each_workers_state_cpu_and_memory(cluster, gate):
    with Client(cluster) as client:
        busy = client.submit(gate.task)
        eventually(lambda: sorted(worker.state for worker in client.workers()) == ["busy", "idle"])
        eventually(lambda: all(worker.memory > 2**20 for worker in client.workers()))
        node = client.nodes()[0]
        assert node.resources["cpu"] >= 2
        assert node.resources["memory"] > 2**20
        gate.open()
        busy.result(timeout=60)
