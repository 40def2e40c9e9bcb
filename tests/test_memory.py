"""Memory is bounded by what is queued, and what is queued is bounded: at the cap ``submit`` waits, and nothing is lost.

``LONG=1`` makes the rounds of the last test as long as the promise says.
"""

from __future__ import annotations

import collections
import concurrent.futures
import gc
import itertools
import os
import re
import signal
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import Gate, Home, eventually

import zmqsched.client
from zmqsched import Client, LocalCluster, WaitGroup, errors
from zmqsched.client import MAX_WAITING_BYTES
from zmqsched.core.requests import WINDOW_BYTES

MIB = 1 << 20
ROUND = 50_000 if os.environ.get("LONG") else 15_000


def peak(pid: int) -> int:
    """The most resident memory a process ever had, in bytes."""
    text = Path(f"/proc/{pid}/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", text)[1]) * 1024


class Submitter(threading.Thread):
    """Submits in a thread of its own, which may be blocked; what it got, or what was raised there."""

    def __init__(self, submits: Callable[[], Any]) -> None:
        super().__init__()
        self._submits = submits
        self.got: Any = None
        self.error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self.got = self._submits()
        except BaseException as error:  # noqa: BLE001 - raised again by end()
            self.error = error

    def end(self) -> Any:
        self.join(60)
        assert not self.is_alive(), "it is still blocked"
        if self.error is not None:
            raise self.error
        return self.got


def is_blocked(client: Client) -> bool:
    return client._blocked > 0


def test_the_broker_stays_within_its_cap_and_nothing_is_lost(clusters: Home, gate: Gate):
    cap, size, count = 16 * MIB, MIB, 200
    with LocalCluster(1, max_queued=cap) as cluster, Client(cluster) as client:
        before = peak(cluster.broker_pid)
        client.submit(gate.task)
        gate.wait_until_begun()
        pushed = itertools.count()
        submitter = Submitter(lambda: [client.submit(len, bytes(size + next(pushed))) for _ in range(count)])
        eventually(lambda: is_blocked(client))
        blocked_at = next(pushed)
        assert MAX_WAITING_BYTES < blocked_at * size < MAX_WAITING_BYTES + WINDOW_BYTES + 2 * cap
        gate.open()
        futures = submitter.end()
        sizes = [future.result(timeout=60) for future in futures]
        assert len(set(sizes)) == count
        assert min(sizes) == size
        assert client.status().counts["clients held back"] >= 1
        # Frames that libzmq has read and the broker has not are part of the window.
        assert peak(cluster.broker_pid) - before < cap + WINDOW_BYTES + 16 * MIB


@pytest.fixture(scope="module")
def small(clusters: Home) -> Iterator[LocalCluster]:
    """One worker, and a broker that is full with one task."""
    with LocalCluster(1, max_queued=600) as cluster:
        yield cluster


def held_client(cluster: LocalCluster, gate: Gate) -> tuple[Client, list[concurrent.futures.Future[None]]]:
    client = Client(cluster)
    first = [client.submit(gate.task) for _ in range(3)]
    gate.wait_until_begun()
    eventually(lambda: client._core._held)
    return client, first


@pytest.fixture
def held(small: LocalCluster, gate: Gate, monkeypatch: pytest.MonkeyPatch) -> Iterator[Client]:
    """A client that has been told to hold back, and itself takes no more than 20 tasks or so."""
    monkeypatch.setattr(zmqsched.client, "MAX_WAITING_BYTES", 20 * 600)
    client, first = held_client(small, gate)
    yield client
    gate.open()
    if client.usable:
        concurrent.futures.wait(first, timeout=60)
    client.shutdown(wait=False, cancel_futures=True)


def push(client: Client, count: int) -> list[concurrent.futures.Future[int]]:
    return [client.submit(abs, -number) for number in range(count)]


def test_submit_goes_on_when_there_is_room(held: Client, gate: Gate):
    submitter = Submitter(lambda: push(held, 100))
    eventually(lambda: is_blocked(held))
    gate.open()
    assert [future.result(timeout=60) for future in submitter.end()] == list(range(100))


def test_several_blocked_threads_all_go_on(held: Client, gate: Gate):
    submitters = [Submitter(lambda: push(held, 50)) for _ in range(4)]
    eventually(lambda: held._blocked == 4)
    gate.open()
    assert [sum(future.result(timeout=60) for future in each.end()) for each in submitters] == [sum(range(50))] * 4


def test_map_of_an_endless_iterable_pauses(held: Client, gate: Gate):
    taken = itertools.count()
    results = held.map(abs, taken, chunksize=1)
    eventually(lambda: is_blocked(held))
    assert next(taken) < 60
    results.close()
    gate.open()
    eventually(lambda: not is_blocked(held))
    assert next(taken) < 60


def test_a_shutdown_wakes_who_is_blocked(held: Client, gate: Gate):
    submitter = Submitter(lambda: push(held, 100))
    eventually(lambda: is_blocked(held))
    held.shutdown(wait=False, cancel_futures=True)
    with pytest.raises(RuntimeError, match="cannot schedule new futures after shutdown"):
        submitter.end()


def test_ctrl_c_ends_a_blocked_submit(held: Client, gate: Gate):
    def interrupts() -> None:
        eventually(lambda: is_blocked(held))
        os.kill(os.getpid(), signal.SIGINT)

    interrupter = Submitter(interrupts)
    with pytest.raises(KeyboardInterrupt):
        push(held, 100)
    interrupter.end()
    assert not is_blocked(held)
    gate.open()
    assert held.submit(abs, -7).result(timeout=60) == 7


def test_a_callback_is_never_blocked(held: Client, gate: Gate):
    many: list[concurrent.futures.Future[int]] = []
    done = threading.Event()

    def callback(_: object) -> None:
        many.extend(push(held, 100))
        done.set()

    future = held.submit(abs, -1)
    future.add_done_callback(callback)
    gate.open()
    assert done.wait(60)
    assert [each.result(timeout=60) for each in many] == list(range(100))


def test_what_is_held_back_is_cancelled_at_once(held: Client, gate: Gate):
    before = held._waiting  # of the fixture's own tasks, those that came after the broker had said to hold back
    futures = push(held, 10)
    assert all(future.cancel() for future in futures)
    eventually(lambda: held._waiting == before)
    assert gate.begun() == 1


def test_a_waitgroup_waits_for_what_is_held_back(held: Client, gate: Gate):
    group = WaitGroup(held)
    futures = [group.go(abs, -number) for number in range(10)]
    waiter = Submitter(lambda: group.wait(timeout=60))
    eventually(lambda: held._core._asked)
    assert held.status().tasks  # it does not wait behind the tasks
    gate.open()
    waiter.end()
    assert all(future.done() for future in futures)


def test_a_lost_cluster_wakes_who_is_blocked(clusters: Home, gate: Gate, monkeypatch):
    monkeypatch.setattr(zmqsched.client, "MAX_WAITING_BYTES", 20 * 600)
    with LocalCluster(1, max_queued=600) as cluster:
        client, _ = held_client(cluster, gate)
        submitter = Submitter(lambda: push(client, 100))
        eventually(lambda: is_blocked(client))
        cluster.close()
        with pytest.raises(errors.ClusterLost):
            submitter.end()
        client.shutdown(wait=False)


def test_submit_waits_for_a_broker_that_is_away(clusters: Home, monkeypatch):
    monkeypatch.setattr(zmqsched.client, "MAX_WAITING_BYTES", 8 * MIB)
    monkeypatch.setattr(zmqsched.core.requests, "WINDOW_BYTES", MIB)
    with LocalCluster(1) as cluster, Client(cluster) as client:
        client.submit(abs, 1).result(timeout=60)
        os.kill(cluster.broker_pid, signal.SIGSTOP)
        try:
            submitter = Submitter(lambda: [client.submit(len, bytes(MIB)) for _ in range(30)])
            eventually(lambda: is_blocked(client))
        finally:
            os.kill(cluster.broker_pid, signal.SIGCONT)
        assert [future.result(timeout=60) for future in submitter.end()] == [MIB] * 30


# --- what is forgotten -----------------------------------------------------------------------------------------------


def nothing_open(client: Client) -> bool:
    return not client._futures and client._core.open == 0 and not any(client.status().tasks.values())


def test_a_done_future_that_is_dropped_leaves_nothing(client: Client):
    future = client.submit(collections.Counter, "abc")
    result = weakref.ref(future.result(timeout=60))
    dropped = weakref.ref(future)
    del future
    gc.collect()
    assert (dropped(), result()) == (None, None)
    assert nothing_open(client)


def test_an_unfinished_future_that_is_dropped_runs_calls_back_and_leaves_nothing(client: Client, gate: Gate):
    heard: list[int] = []
    argument = collections.Counter("abc")
    dropped_argument = weakref.ref(argument)
    future = client.submit(gate.task, sum, [3, 4])
    other = client.submit(len, argument)
    future.add_done_callback(lambda done: heard.append(done.result()))
    dropped = [weakref.ref(future), weakref.ref(other)]
    del future, other, argument
    gate.wait_until_begun()
    gate.open()
    eventually(lambda: nothing_open(client))
    eventually(lambda: gc.collect() is not None and not any(ref() for ref in dropped))
    assert heard == [7]
    assert dropped_argument() is None


def test_a_client_that_is_dropped_leaves_by_itself(client: Client, cluster: LocalCluster):
    eventually(lambda: client.status().clients == 1)  # those of the tests before have left
    descriptors = len(os.listdir("/proc/self/fd"))
    other = Client(cluster)
    assert other.submit(abs, -1).result(timeout=60) == 1
    thread, dropped = other._thread, weakref.ref(other)
    assert client.status().clients == 2
    del other
    # More than once: while its thread is in a turn, the thread has it.
    eventually(lambda: gc.collect() is not None and not thread.is_alive())
    assert dropped() is None
    eventually(lambda: client.status().clients == 1)
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_a_client_that_is_dropped_stays_for_its_unfinished_tasks(client: Client, cluster: LocalCluster, gate: Gate):
    heard: list[int] = []
    other = Client(cluster)
    other.submit(gate.task, sum, [3, 4]).add_done_callback(lambda done: heard.append(done.result()))
    thread = other._thread
    del other
    gc.collect()
    gate.wait_until_begun()
    assert thread.is_alive()
    gate.open()
    eventually(lambda: heard == [7])
    eventually(lambda: gc.collect() is not None and not thread.is_alive())


def test_the_broker_does_not_grow_with_what_was_run(clusters: Home):
    with LocalCluster(2) as cluster, Client(cluster) as client:
        broker = psutil.Process(cluster.broker_pid)
        sizes = []
        for _ in range(3):
            assert sum(client.map(abs, range(ROUND), chunksize=1)) == sum(range(ROUND))
            eventually(lambda: nothing_open(client))
            sizes.append(broker.memory_info().rss)
        assert client.status().counts["ok"] == 3 * ROUND
        # The first round has made what stays: arenas, buffers, the table's room.
        assert eventually(lambda: broker.memory_info().rss - sizes[0] < 4 * MIB) is True, sizes


# --- callbacks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ask", ["result", "exception"])
def test_a_callback_may_wait_for_another_future(client: Client, gate: Gate, ask: str):
    later = client.submit(gate.task, 1)
    told: list[object] = []

    def callback(finished: concurrent.futures.Future[int]) -> None:
        told.append(getattr(finished, ask)())
        gate.open()
        told.append(getattr(later, ask)())

    client.submit(abs, -1).add_done_callback(callback)
    eventually(lambda: len(told) == 2)
    assert told == ([1, 1] if ask == "result" else [None, None])
