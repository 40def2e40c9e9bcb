"""Tasks that submit tasks and wait for them."""

from __future__ import annotations

import concurrent.futures
import os
import signal
from concurrent.futures import CancelledError

import pytest
from conftest import Gate, eventually

import zmqsched
from zmqsched import Client, LocalCluster, WaitGroup
from zmqsched.errors import DependencyFailed


def descend(levels):
    return 0 if not levels else 1 + zmqsched.get_client().submit(descend, levels - 1).result()


def fib(n):
    if n < 2:
        return n
    client = zmqsched.get_client()
    parts = [client.submit(fib, n - 1), client.submit(fib, n - 2)]
    return sum(part.result() for part in parts)


def double(x):
    return 2 * x


def relay(fn, *args):
    """Have a task of one's own do it."""
    return zmqsched.get_client().submit(fn, *args).result()


@pytest.fixture(scope="module")
def single(clusters):
    """The client of a cluster with one slot."""
    with LocalCluster(n_workers=1) as cluster, Client(cluster) as client:
        yield client


def test_recursion_of_depth_ten_finishes_on_one_slot(single: Client):
    assert single.submit(descend, 10).result(60) == 10
    eventually(lambda: len(single.workers()) == 1)


def test_a_tree_of_tasks_goes_depth_first_on_few_processes(client: Client):
    """Breadth first, it would be a hundred."""
    future = client.submit(fib, 8)
    most = 0
    while not concurrent.futures.wait([future], 0.05).done:
        most = max(most, len(client.workers()))
    assert future.result(0) == 21
    assert 2 < most <= 2 + 2 * 9


def test_each_way_to_wait_lends_the_slot(single: Client):
    def waits(how):
        import asyncio

        client = zmqsched.get_client()
        if how == "map":
            return list(client.map(double, [1, 2], chunksize=1))
        if how == "the list":
            return zmqsched.map(double, [1, 2])
        futures = [client.submit(double, 1), client.submit(double, 2)]
        if how == "wait":
            zmqsched.wait(futures)
        elif how == "the standard's wait":
            concurrent.futures.wait(futures)
        elif how == "the standard's as_completed":
            return sorted(future.result() for future in concurrent.futures.as_completed(futures))
        elif how == "as_completed":
            return sorted(future.result() for future in zmqsched.as_completed(futures))
        elif how == "await":

            async def both():
                return [await future for future in futures]

            return asyncio.run(both())
        return [future.result(0) for future in futures]

    for how in ("map", "the list", "wait", "as_completed", "the standard's wait", "the standard's as_completed", "await"):
        assert single.submit(waits, how).result(60) == [2, 4], how


def test_futures_of_a_task_are_arguments_of_its_tasks(single: Client):
    def chain():
        client = zmqsched.get_client()
        first = client.submit(double, 1)
        return client.submit(double, client.submit(double, first)).result()

    assert single.submit(chain).result(60) == 8


def test_a_failure_comes_up_through_all_levels(single: Client):
    def fails():
        client = zmqsched.get_client()
        client.submit(double, client.submit(int, "no number")).result()

    with pytest.raises(DependencyFailed) as raised:
        single.submit(relay, fails).result(60)
    assert isinstance(raised.value.__cause__, ValueError) or "invalid literal" in str(raised.value.__notes__)


def test_a_waitgroup_starts_and_waits_inside_a_task(single: Client):
    group = WaitGroup(single)

    def starts(group):
        group.go(double, 1)

    def waits(group):
        for _ in range(3):
            group.go(double, 1)
        group.wait(60)
        return "done"

    assert single.submit(waits, WaitGroup(single)).result(60) == "done"
    group.go(starts, group).result(60)
    group.wait(60)  # for what was started in the task too


def test_a_client_that_is_sent_to_a_task_is_the_tasks(single: Client):
    assert (
        single.submit(lambda client: client is zmqsched.get_client() and client.submit(double, 4).result(), single).result(
            30
        )
        == 8
    )


def test_a_client_is_not_made_in_a_task(single: Client):
    with pytest.raises(RuntimeError, match=r"zmqsched\.get_client\(\)"):
        single.submit(Client).result(60)


def test_outside_of_tasks_it_is_the_client_that_map_uses(monkeypatch):
    monkeypatch.setattr("zmqsched.easy._client", lambda: "the shared one")
    assert zmqsched.get_client() == "the shared one"


def test_what_a_dead_worker_waited_for_is_ended_and_its_task_runs_again(client: Client, gate: Gate, tmp_path):
    def parent(path):
        import pathlib

        try:
            with open(f"{path}/first", "x") as file:
                file.write(str(os.getpid()))
        except FileExistsError:
            return "second"
        pathlib.Path(path, "begun").touch()
        return zmqsched.get_client().submit(gate_task).result()

    gate_task = gate.task
    future = client.submit(parent, str(tmp_path))
    gate.wait_until_begun()
    eventually(lambda: "waiting" in {worker.state for worker in client.workers()})
    os.kill(int((tmp_path / "first").read_text()), signal.SIGKILL)
    assert future.result(60) == "second"
    eventually(lambda: dict(client.status().tasks).get("assigned", 0) == 0)  # though the gate is closed
    eventually(lambda: len(client.workers()) == 2)


def test_cancelling_a_task_that_waits_cancels_what_it_waits_for(client: Client, gate: Gate):
    future = client.submit(relay, gate.task)
    gate.wait_until_begun()
    assert future.cancel(force=True)
    with pytest.raises(CancelledError):
        future.result(0)
    eventually(lambda: dict(client.status().tasks).get("assigned", 0) == 0)
    assert not list(gate._directory.glob("open"))
