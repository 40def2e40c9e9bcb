"""Workers, nodes, brokers and programs are killed; tasks are not lost, nothing hangs, nothing is left behind."""

from __future__ import annotations

import concurrent.futures
import functools
import os
import re
import signal
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from conftest import Gate, alive, end_broker, eventually, processes_knowing

from zmqsched import Client, LocalCluster, WaitGroup, errors
from zmqsched.core.requests import Requests


def family(cluster: LocalCluster) -> list[psutil.Process]:
    """All processes of the cluster: broker, nodes, nurseries, workers, and what those have started."""
    heads = [psutil.Process(pid) for pid in (cluster.broker_pid, *cluster.node_pids)]
    return [*heads, *(child for head in heads for child in head.children(recursive=True))]


def wait_until_gone(processes: list[psutil.Process]) -> None:
    """Ended, if perhaps not yet buried: whose parent was killed is buried by init."""
    eventually(lambda: not any(process.is_running() and alive(process.pid) for process in processes))


def kill(pid: int) -> None:
    assert pid > 0, "0 would be this process's whole group"
    os.kill(pid, signal.SIGKILL)


def pids(client: Client) -> list[int]:
    """Of the workers that are born: one that is starting has none yet."""
    return [worker.pid for worker in client.workers() if worker.pid]


# --- workers ---------------------------------------------------------------------------------------------------------


def test_workers_killed_in_the_middle_of_a_map(client):
    def square(number):
        import time

        time.sleep(0.002)
        return number * number

    before = set(eventually(lambda: len(found := pids(client)) == 2 and found))
    deaths = client.status().counts.get("worker deaths", 0)
    results, victims = [], list(before)
    for result in client.map(square, range(300)):
        results.append(result)
        if len(results) in (50, 150):
            kill(victims.pop())
    assert results == [number * number for number in range(300)]
    eventually(lambda: len(found := pids(client)) == 2 and before.isdisjoint(found))
    eventually(lambda: client.status().counts["worker deaths"] - deaths == 2)


def dies_by_exit():
    os._exit(3)


def dies_by_segfault():
    import ctypes
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    ctypes.string_at(0)


def dies_by_signal():
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    ("dies", "how"),
    [(dies_by_exit, "exit code 3"), (dies_by_segfault, "killed by SIGSEGV"), (dies_by_signal, "killed by SIGKILL")],
)
def test_a_task_that_kills_its_workers_is_stopped_and_the_innocent_are_not(client, dies, how):
    def innocent(number):
        import time

        time.sleep(0.005)
        return number

    before = client.submit(innocent, -1)
    guilty = client.options(name="the guilty one").submit(dies)
    after = [client.submit(innocent, number) for number in range(30)]
    with pytest.raises(errors.WorkerDied) as raised:
        guilty.result(timeout=60)
    head, *deaths = str(raised.value).splitlines()
    assert head == "the guilty one failed: 3 workers died running it"
    assert deaths.pop(0) == f"  the call: {dies.__name__}(...)"
    deaths = [line for line in deaths if not line.startswith("    ")]
    assert len(deaths) == 3
    for death in deaths:
        assert re.fullmatch(rf"  worker n\d+/\d+ on {re.escape(os.uname().nodename)} \(pid \d+\): {how}", death)
    assert len(set(deaths)) == 3
    assert [before.result(timeout=60), *(future.result(timeout=60) for future in after)] == list(range(-1, 30))


def test_what_may_not_run_twice_does_not(client, tmp_path):
    path = str(tmp_path / "runs")

    def dies():
        with open(path, "a") as file:
            file.write("x")
        os._exit(3)

    with pytest.raises(errors.WorkerDied, match="requeue=False forbids another try"):
        client.options(requeue=False, retries=5).submit(dies).result(timeout=60)
    assert Path(path).read_text() == "x"


def test_a_death_is_no_failure_of_the_task(client, tmp_path):
    path = str(tmp_path / "killed")

    def dies_once():
        try:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return "alive"
        os.kill(os.getpid(), signal.SIGKILL)

    assert client.submit(dies_once).result(timeout=60) == "alive"


def test_an_idle_worker_that_dies_is_replaced(client):
    eventually(lambda: {worker.state for worker in client.workers()} == {"idle"})
    victim = client.workers()[0]
    kill(victim.pid)
    eventually(lambda: len(found := pids(client)) == 2 and victim.pid not in found)
    assert list(client.map(abs, range(-20, 0))) == list(range(20, 0, -1))


def test_the_rest_of_a_batch_is_not_blamed(client):
    """Short tasks are given several at once; only the one that ran when the worker died is counted a death."""
    assert list(client.map(abs, range(2000))) == list(range(2000))  # now tasks are known to be short

    def may_die(number):
        if number % 500 == 250:
            os._exit(1)
        return number

    futures = [client.submit(may_die, number) for number in range(1000)]
    results = [f.exception(timeout=60) or f.result() for f in futures]
    assert [number for number, result in enumerate(results) if result != number] == [250, 750]
    assert {type(results[250]), type(results[750])} == {errors.WorkerDied}


# --- nodes -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def two_nodes(clusters):
    with LocalCluster(2, n_nodes=2) as cluster:
        yield cluster


def test_a_node_is_killed(two_nodes, gate):
    with Client(two_nodes) as client:
        group = WaitGroup(client)
        futures = [group.go(gate.task, number) for number in range(6)]
        gate.wait_until_begun(2)
        lost = client.nodes()[0]
        theirs = psutil.Process(lost.pid).children(recursive=True)
        kill(lost.pid)
        eventually(lambda: next(n for n in client.nodes() if n.id == lost.id).state == "lost")
        wait_until_gone(theirs)
        assert client.status().counts["requeued: node lost"] == 1
        gate.open()
        assert [future.result(timeout=60) for future in futures] == list(range(6))
        group.wait(timeout=60)
        assert {worker.node for worker in client.workers()} == {n.id for n in client.nodes() if n.state == "alive"}


def test_a_node_sleeps_and_comes_back(two_nodes, gate):
    with Client(two_nodes) as client:
        futures = [client.submit(gate.task, number) for number in range(6)]
        gate.wait_until_begun(2)
        sleeper = client.nodes()[0]
        os.kill(sleeper.pid, signal.SIGSTOP)
        try:
            eventually(lambda: next(n for n in client.nodes() if n.id == sleeper.id).state == "lost")
            gate.open()
            # The workers of the sleeper ran on, but their answers lie in pipes: the other node does all.
            assert [future.result(timeout=60) for future in futures] == list(range(6))
        finally:
            os.kill(sleeper.pid, signal.SIGCONT)
        back = eventually(lambda: [n for n in client.nodes() if n.pid == sleeper.pid and n.state == "alive"])
        assert back[0].id != sleeper.id
        eventually(lambda: client.status().counts.get("zombie results", 0) == 1)
        eventually(lambda: len(client.workers()) == 2)
        assert list(client.map(abs, range(-50, 0))) == list(range(50, 0, -1))
        eventually(lambda: {worker.state for worker in client.workers()} == {"idle"})


def test_a_short_sleep_loses_nothing(two_nodes, gate):
    with Client(two_nodes) as client:
        futures = [client.submit(gate.task, number) for number in range(4)]
        gate.wait_until_begun(2)
        os.kill(two_nodes.node_pids[0], signal.SIGSTOP)
        threading.Timer(1.0, os.kill, (two_nodes.node_pids[0], signal.SIGCONT)).start()
        gate.open()
        assert [future.result(timeout=60) for future in futures] == [0, 1, 2, 3]
        eventually(lambda: {node.state for node in client.nodes()} == {"alive"})
        assert client.status().counts.get("requeued: node lost", 0) == 0


def test_a_lost_node_and_a_task_that_may_not_run_twice(two_nodes, gate):
    with Client(two_nodes) as client:
        once = client.options(requeue=False)
        futures = [once.submit(gate.task, number) for number in range(2)]
        gate.wait_until_begun(2)
        kill(two_nodes.node_pids[0])
        done, _ = concurrent.futures.wait(futures, timeout=60, return_when="FIRST_COMPLETED")
        with pytest.raises(errors.WorkerDied, match=r"node n\d .*requeue=False forbids another try"):
            done.pop().result()
        gate.open()
        concurrent.futures.wait(futures, timeout=60)
        assert gate.begun() == 2


def test_the_workers_of_a_node_whose_nursery_dies_are_lost_with_it(capfd, clusters, gate):
    with LocalCluster(2, n_nodes=2) as cluster, Client(cluster) as client:  # here, so that capfd has its stderr
        futures = [client.submit(gate.task, number) for number in range(4)]
        gate.wait_until_begun(2)
        node = psutil.Process(cluster.node_pids[0])
        [nursery] = node.children()
        workers = nursery.children()
        nursery.kill()
        wait_until_gone([node, *workers])
        gate.open()
        assert [future.result(timeout=60) for future in futures] == [0, 1, 2, 3]
    assert "nursery process died" in capfd.readouterr().err


# --- brokers ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients give a silent broker four seconds instead of sixty."""
    monkeypatch.setattr("zmqsched.client.Requests", functools.partial(Requests, lost_after_s=4.0))


@pytest.mark.parametrize("journal", [False, True])
def test_a_broker_is_killed_and_followed(journal, clusters, gate, tmp_path):
    with LocalCluster(1, journal=tmp_path / "journal" if journal else False) as cluster, Client(cluster) as client:
        running, queued = client.submit(gate.task, abs, -1), client.submit(abs, -2)
        group = WaitGroup(client)
        group.go(abs, -1)
        gate.wait_until_begun()
        killed = cluster.broker_pid
        kill(killed)
        eventually(lambda: cluster.broker_pid != killed)
        eventually(lambda: client.status().counts.get("adopted"))
        eventually(lambda: client.status().counts.get("submitted again" if journal else "accepted") == 3)
        gate.open()
        assert (running.result(60), queued.result(60)) == (1, 2)
        group.wait(timeout=60)
        assert gate.begun() == 1, "the running task was adopted, not run again"
        assert client.submit(abs, -3).result(60) == 3


def test_answers_that_came_while_the_broker_was_dead(clusters, gate, tmp_path):
    with LocalCluster(2, journal=tmp_path / "journal") as cluster, Client(cluster) as client:
        futures = [client.submit(gate.task, abs, -n) for n in range(2)]
        gate.wait_until_begun(2)
        os.kill(cluster.broker_pid, signal.SIGSTOP)
        gate.open()
        kill(cluster.broker_pid)
        assert [future.result(60) for future in futures] == [0, 1]
        assert gate.begun() == 2


@pytest.mark.usefixtures("impatient")
def test_a_broker_is_killed_for_good(clusters, gate):
    with LocalCluster(1) as cluster:
        client = Client(cluster)
        running, queued = client.submit(gate.task), client.submit(abs, -1)
        group = WaitGroup(client)
        group.go(abs, -1)
        outcome: list[object] = []
        waiting = threading.Thread(target=lambda: outcome.append(_outcome(lambda: group.wait(timeout=60))))
        waiting.start()
        gate.wait_until_begun()
        end_broker(cluster)
        for future in (running, queued):
            with pytest.raises(errors.ClusterLost, match=r"silent|SIGKILL") as raised:
                future.result(timeout=60)
            assert isinstance(raised.value, concurrent.futures.BrokenExecutor)
        waiting.join(60)
        assert isinstance(outcome[0], errors.ClusterLost)
        for use in (lambda: client.submit(abs, -1), client.status, lambda: list(client.map(abs, [1])), group.wait):
            with pytest.raises(errors.ClusterLost):
                use()
        assert "broken" in repr(client)
        client.shutdown()
        processes = family_without_broker(cluster)
    wait_until_gone(processes)


def family_without_broker(cluster: LocalCluster) -> list[psutil.Process]:
    heads = [psutil.Process(pid) for pid in cluster.node_pids]
    return [*heads, *(child for head in heads for child in head.children(recursive=True))]


def _outcome(call: Callable[[], object]) -> object:
    try:
        return call()
    except Exception as error:  # noqa: BLE001 - whatever it is, the test looks at it
        return error


@pytest.mark.usefixtures("impatient")
def test_a_client_that_is_closed_when_the_broker_is_gone(clusters):
    with LocalCluster(1) as cluster:
        client = Client(cluster)
        client.submit(abs, -1).result(timeout=60)
        future = client.submit(time.sleep, 30)
        kill(cluster.broker_pid)
        began = time.monotonic()
        client.shutdown(wait=False, cancel_futures=True)
        assert time.monotonic() - began < 20
        assert future.done() or future.running()


def test_a_broker_sleeps_and_nothing_is_lost(two_nodes, gate):
    with Client(two_nodes) as client:
        futures = [client.submit(gate.task, number) for number in range(6)]
        gate.wait_until_begun(2)
        os.kill(two_nodes.broker_pid, signal.SIGSTOP)
        gate.open()
        threading.Timer(4.0, os.kill, (two_nodes.broker_pid, signal.SIGCONT)).start()
        assert [future.result(timeout=60) for future in futures] == list(range(6))
        counts = client.status().counts
        assert counts.get("requeued: node lost", 0) == 0
        eventually(lambda: {node.state for node in client.nodes()} == {"alive"})
        assert gate.begun() == 6


def test_futures_of_a_cluster_that_is_closed_know_it_at_once(clusters, gate):
    cluster = LocalCluster(1)
    client = Client(cluster)
    futures = [client.submit(gate.task), client.submit(abs, -1)]
    gate.wait_until_begun()
    began = time.monotonic()
    cluster.close()
    assert time.monotonic() - began < 20
    try:
        for future in futures:
            with pytest.raises(errors.ClusterLost):
                future.result(timeout=60)
    finally:
        client.shutdown(wait=False, cancel_futures=True)


@pytest.fixture
def quick_to_warn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zmqsched.core.requests.WARN_AFTER_S", 0.2)


@pytest.mark.usefixtures("quick_to_warn")
def test_a_silent_broker_is_told_of(cluster):
    with Client(cluster) as client:
        os.kill(cluster.broker_pid, signal.SIGSTOP)
        try:
            future = client.submit(abs, -1)
            with pytest.warns(RuntimeWarning, match=r"the broker has been silent for .*still trying") as told:
                eventually(lambda: told.list)
        finally:
            os.kill(cluster.broker_pid, signal.SIGCONT)
        assert future.result(timeout=60) == 1


@pytest.mark.usefixtures("quick_to_warn")
def test_warnings_that_are_errors_do_not_end_a_client(cluster):
    with warnings.catch_warnings(), Client(cluster) as client:
        warnings.simplefilter("error")
        os.kill(cluster.broker_pid, signal.SIGSTOP)
        threading.Timer(0.5, os.kill, (cluster.broker_pid, signal.SIGCONT)).start()
        assert client.submit(abs, -1).result(timeout=60) == 1
        assert client.usable


# --- nothing is left -------------------------------------------------------------------------------------------------


def test_close_leaves_nothing(clusters, gate):
    cluster = LocalCluster(2, n_nodes=2)
    client = Client(cluster)
    for _ in range(4):
        client.submit(gate.task)
    gate.wait_until_begun(2)
    processes = family(cluster)
    assert len(processes) >= 7, "a broker, two nodes, each with a nursery and a worker"
    directory = clusters.path / cluster.name
    assert directory.is_dir()
    client.shutdown(wait=False, cancel_futures=True)
    cluster.close()
    wait_until_gone(processes)
    assert not directory.exists()


def test_what_tasks_have_started_is_gone_after_close(clusters, tmp_path):
    path = str(tmp_path / "pid")

    def starts_a_process():
        import subprocess

        process = subprocess.Popen(["sleep", "600"])
        with open(path, "w") as file:
            file.write(str(process.pid))
        process.returncode = 0  # not our concern any more
        return process.pid

    with LocalCluster(1) as cluster, Client(cluster) as client:
        lingering = [psutil.Process(client.submit(starts_a_process).result(timeout=60))]
        eventually(lambda: lingering[0].cmdline() == ["sleep", "600"])  # it is between fork and exec until then
    wait_until_gone(lingering)


OWNER = """
    import sys, time
    import zmqsched

    cluster = zmqsched.LocalCluster(2, n_nodes=2)
    client = zmqsched.Client(cluster)
    futures = [client.submit(time.sleep, 60) for _ in range(4)]
    while sum(future.running() for future in futures) < 2:
        time.sleep(0.01)
    print("ready", flush=True)
    while True:  # not one long sleep: a signal just before it would be seen at its end
        time.sleep(0.1)
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_program_that_owns_a_cluster_is_ended(scripts, how):
    owner = scripts.start(OWNER)
    assert owner.stdout.readline() == "ready\n"
    processes = psutil.Process(owner.pid).children(recursive=True)
    assert len(processes) >= 7
    known = scripts.home.processes()
    assert {process.pid for process in processes} <= known.keys()
    owner.send_signal(how)
    owner.wait(60)
    wait_until_gone(processes)
    scripts.home.assert_nothing_left()
    owner.communicate()


def test_a_cluster_whose_broker_was_killed_with_its_owner(scripts):
    """Nobody is there to clean up after a killed broker; the next who looks does."""
    owner = scripts.start(OWNER)
    assert owner.stdout.readline() == "ready\n"
    processes = psutil.Process(owner.pid).children(recursive=True)
    broker = next(process for process in processes if "broker" in process.cmdline())
    owner.send_signal(signal.SIGSTOP)  # or it would start another broker
    broker.kill()
    owner.kill()
    owner.communicate()
    wait_until_gone(processes)
    [left] = scripts.home.path.iterdir()
    os.utime(left, (0, 0))  # long ago
    out, _ = scripts.run("from zmqsched.config import running_clusters\nprint(running_clusters())")
    assert out == "[]\n"
    assert scripts.home.files() == set()


def test_the_search_for_what_is_left_finds_it(clusters):
    with LocalCluster(1) as cluster:
        pids = {process.pid for process in family(cluster)}
        assert pids <= processes_knowing(clusters.path).keys()
        assert cluster.name in clusters.files()


def test_a_gate_holds(gate: Gate, client):
    futures = [client.submit(gate.task, number) for number in range(2)]
    gate.wait_until_begun(2)
    assert not any(future.done() for future in futures)
    gate.open()
    assert [future.result(timeout=60) for future in futures] == [0, 1]


def test_a_local_clusters_client_learns_soon_how_its_broker_died():
    with LocalCluster(1) as cluster, Client(cluster) as client:
        future = client.submit(time.sleep, 30)
        end_broker(cluster)
        with pytest.raises(errors.ClusterLost, match="SIGKILL"):
            future.result(timeout=60)
