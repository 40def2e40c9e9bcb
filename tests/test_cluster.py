"""Clusters of groups of nodes: their beginning and end, more and fewer nodes, and what is told of nodes that fail."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import logging
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import ClassVar

import psutil
import pytest
from conftest import Gate, Home, alive, children, eventually

from zmqsched import Client, Cluster, SlurmCluster, SSHCluster, control
from zmqsched.clusterfile import BatchPart, BrokerPart, ClusterFile, HeartbeatPart, NodeGroup, Scale, TasksPart
from zmqsched.config import cluster_dir
from zmqsched.errors import (
    ClusterExists,
    ClusterFileError,
    ClusterNotFound,
    CommandFailed,
    StartError,
    TaskTimeout,
    Unschedulable,
)
from zmqsched.launch import LAUNCHERS
from zmqsched.launch.base import Launched, Launcher, Site
from zmqsched.readiness import wait_until_left
from zmqsched.records import NodeInfo, NodeList, Status


class Queue(Launcher):
    """A batch system in which nobody's turn ever comes."""

    queues: ClassVar[bool] = True
    asked: ClassVar[list[str]] = []

    def __init__(self, group: NodeGroup, site: Site) -> None:
        super().__init__(group, site)
        self._labels: list[str] = []

    def start(self, labels: Sequence[str]) -> None:
        if "unknown" in self.group.tags:
            raise StartError("sbatch: no such partition: give --partition one that sinfo shows")
        self._labels += labels
        self.asked.extend(labels)

    def poll(self) -> list[Launched]:
        return [Launched(label, "pending", "PD: Resources", "job 7") for label in self._labels]

    def stop(self, labels: Collection[str], *, at_once: bool = False) -> None:
        self._labels = [label for label in self._labels if label not in labels]

    def preview(self, labels: Sequence[str]) -> list[str]:
        return []


class Faulty(Queue):
    """Somebody's first attempt."""

    def poll(self) -> list[Launched]:
        raise KeyError("queue-1")

    def close(self) -> None:
        raise ValueError("never tried")


class Stubborn(Queue):
    """Its nodes cannot be ended."""

    def stop(self, labels: Collection[str], *, at_once: bool = False) -> None:
        if labels:
            raise StartError("scancel: the controller does not answer; try again: scancel 7")


class Hung(Queue):
    """The site's commands hang."""

    release: ClassVar[threading.Event] = threading.Event()

    def stop(self, labels: Collection[str], *, at_once: bool = False) -> None:
        self.release.wait(60)


@pytest.fixture(autouse=True)
def launchers(monkeypatch: pytest.MonkeyPatch, clusters: Home) -> Iterator[None]:
    for kind in (Queue, Faulty, Stubborn, Hung):
        monkeypatch.setitem(LAUNCHERS, kind.__name__.lower(), f"{__name__}:{kind.__name__}")
    Queue.asked.clear()
    Hung.release.clear()
    yield
    Hung.release.set()


def wanted(*groups: NodeGroup, name: str = "lab") -> ClusterFile:
    return ClusterFile(name=name, broker=BrokerPart(listen=(), journal=False), nodes=groups)


def local(**settings: object) -> NodeGroup:
    return NodeGroup(**{"slots": 1, **settings})  # type: ignore[arg-type]


@pytest.fixture
def broken(tmp_path: Path) -> str:
    """An interpreter whose nodes die with words of their own."""
    path = tmp_path / "python"
    path.write_text("#!/bin/sh\necho loading modules >&2\necho 'no licence for this host' >&2\nexit 3\n")
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def deaf(tmp_path: Path) -> str:
    """An interpreter whose nodes neither join nor listen to anybody."""
    path = tmp_path / "python-deaf"
    path.write_text("#!/bin/sh\ntrap '' TERM INT\nwhile :; do sleep 0.1; done\n")
    path.chmod(0o755)
    return str(path)


def labels(cluster: Cluster, state: str = "running") -> list[str]:
    return sorted(one.label for one in cluster.nodes() if one.state == state)


# --- beginning and ending -------------------------------------------------------------------------------------------------


def test_each_group_has_its_nodes_and_they_say_their_labels():
    groups = [local(count=2), local(name="big", slots=2, tags=("big",), resources={"widget": 3})]
    with Cluster(wanted(*groups)) as cluster, Client(cluster) as client:
        nodes = {node.label: node for node in client.nodes()}
        assert {label: node.slots for label, node in nodes.items()} == {"local-1": 1, "local-2": 1, "big-1": 2}
        assert nodes["big-1"].tags == ("big",)
        assert nodes["big-1"].resources["widget"] == 3
        assert {one.label: one.node for one in cluster.nodes()} == {label: node.id for label, node in nodes.items()}
        assert labels(cluster) == ["big-1", "local-1", "local-2"]
        assert "3 running" in repr(cluster)
    assert "closed" in repr(cluster)


def test_environment_directory_and_prologue_are_the_groups(tmp_path: Path):
    group = local(env={"COLOUR": "red"}, cwd=str(tmp_path), prologue=("export SHAPE=round",))
    with Cluster(wanted(group)) as cluster, Client(cluster) as client:
        assert client.submit(os.getenv, "COLOUR").result() == "red"
        assert client.submit(os.getenv, "SHAPE").result() == "round"
        assert client.submit(os.getcwd).result() == str(tmp_path)


def test_the_cpus_are_divided_among_all_local_workers(monkeypatch: pytest.MonkeyPatch):
    for name in [name for name in os.environ if name.endswith("_NUM_THREADS")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr("zmqsched.host.usable_cpus", lambda: 8)
    with Cluster(wanted(local(count=2), local(name="more", slots=2))) as cluster, Client(cluster) as client:
        assert client.submit(os.getenv, "OMP_NUM_THREADS").result() == "2"


def test_over_tcp_nodes_have_their_own_key(tmp_path: Path):
    file = wanted(local(count=1), NodeGroup(launcher="queue"))
    broker = BrokerPart(listen=("127.0.0.1",), journal=False)
    with Cluster(ClusterFile(name="lab", broker=broker, nodes=file.nodes)) as cluster, Client(cluster) as client:
        (node,) = client.nodes()
        assert f"--connect={cluster_dir('lab') / 'node.json'}" in psutil.Process(node.pid).cmdline()
        assert cluster.file.addresses.work[0].startswith("tcp://127.0.0.1:")
        assert client.submit(pow, 2, 3).result(60) == 8


@pytest.mark.parametrize("journal", [False, True])
def test_the_broker_listens_at_each_address_and_so_does_who_follows_it(journal: bool, tmp_path: Path):
    listen = ("127.0.0.1", "127.0.0.2")
    broker = BrokerPart(listen=listen, journal=str(tmp_path / "journal") if journal else False)
    with Cluster(ClusterFile(name="lab", broker=broker, nodes=(local(),))) as cluster:
        before, pid = cluster.file.addresses, cluster.broker_pid
        assert [address.rpartition(":")[0] for address in before.work] == ["tcp://127.0.0.1", "tcp://127.0.0.2", "ipc"]
        os.kill(pid, signal.SIGKILL)
        eventually(lambda: cluster.broker_pid != pid)
        assert len(cluster.file.addresses.work) == 3
        assert (cluster.file.addresses == before) is journal
        for address in cluster.file.addresses.work[:2]:
            host, _, port = address.removeprefix("tcp://").rpartition(":")
            socket.create_connection((host, int(port)), 60).close()


def test_a_file_is_a_cluster(tmp_path: Path):
    path = tmp_path / "cluster.toml"
    path.write_text('name = "filed"\n[broker]\njournal = false\n[[nodes]]\nname = "few"\nslots = 1\ncount = 2\n')
    with Cluster.from_file(path) as cluster:
        assert cluster.name == "filed"
        assert labels(cluster) == ["few-1", "few-2"]
    path.write_text("[[nodes]]\nslots = 'many'\n")
    with pytest.raises(ClusterFileError, match=r"nodes\[0\].slots"):
        Cluster.from_file(path)


def test_heartbeat_and_what_tasks_have_by_default_are_the_files():
    file = ClusterFile(
        name="lab", broker=BrokerPart(journal=False, idle_timeout=6.0), nodes=(local(),),
        heartbeat=HeartbeatPart(interval=0.2, dead_after=0.8), tasks=TasksPart(timeout=0.5),
    )  # fmt: skip
    with Cluster(file) as cluster, Client(cluster) as client:
        with pytest.raises(TaskTimeout):
            client.submit(time.sleep, 60).result(60)
        words = psutil.Process(cluster.broker_pid).cmdline()
        assert {"--beat-interval=0.2", "--dead-after=0.8"} <= set(words)
        eventually(lambda: cluster.broker_death == "exit code 0")  # idle


def test_a_launcher_that_is_not_there_is_named_with_those_that_are():
    with pytest.raises(ValueError, match=r"no launcher 'teleport'; there are .*local.*slurm.*ssh"):
        Cluster(wanted(local(launcher="teleport")))


def test_a_name_is_one_clusters(clusters: Home):
    with Cluster(wanted(local())), pytest.raises(ClusterExists, match="lab"):
        Cluster(wanted(local()))
    clusters.assert_nothing_left()


def test_a_cluster_that_nobody_has_any_more_ends_by_itself(clusters: Home):
    cluster = Cluster(wanted(local()))
    pids = [cluster.broker_pid, *(node.pid for node in clusters_nodes())]
    del cluster
    gc.collect()
    eventually(lambda: not any(alive(pid) for pid in pids))
    clusters.assert_nothing_left()


def clusters_nodes() -> list[psutil.Process]:
    mine = [pid for pid, command in children().items() if "-m zmqsched node" in command]
    return [psutil.Process(pid) for pid in mine]


def test_nodes_that_do_not_listen_are_killed_at_the_end(deaf: str, clusters: Home, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("zmqsched.cluster.ELSEWHERE_TIMEOUT_S", 1.0)
    with Cluster(wanted(NodeGroup(launcher="queue"), local(name="deaf", python=deaf))) as cluster:
        assert [(one.label, one.why) for one in cluster.failures] == [("deaf-1", "was not ready within 1 s")]
    clusters.assert_nothing_left()


def test_the_end_says_what_a_launcher_could_not_end(caplog: pytest.LogCaptureFixture, clusters: Home):
    with Cluster(wanted(local(), NodeGroup(launcher="stubborn"))), caplog.at_level(logging.WARNING, "zmqsched"):
        pass
    assert "group stubborn: scancel: the controller does not answer; try again: scancel 7" in caplog.text
    clusters.assert_nothing_left()


def test_a_launcher_that_hangs_holds_up_nothing_else(caplog, clusters: Home, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("zmqsched.fleet.CLOSE_TIMEOUT_S", 0.5)
    with Cluster(wanted(local(), NodeGroup(launcher="hung"))):
        pass
    assert "some nodes do not end; left behind" in caplog.text
    clusters.assert_nothing_left()


DRIVER = """
import os, signal
from zmqsched import Cluster
from zmqsched.clusterfile import ClusterFile, NodeGroup
Cluster(ClusterFile(name="doomed", nodes=(NodeGroup(slots=1, count=2),)))
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_the_death_of_the_program_ends_everything(scripts):
    scripts.run(DRIVER, code=-signal.SIGKILL)
    scripts.home.assert_nothing_left()


# --- nodes that fail ------------------------------------------------------------------------------------------------------


def test_when_all_nodes_fail_their_own_words_are_in_the_exception(broken: str, clusters: Home, monkeypatch):
    monkeypatch.setattr("zmqsched.cluster.ELSEWHERE_TIMEOUT_S", 6000.0)  # nobody waits for it
    with pytest.raises(StartError) as failed:
        Cluster(wanted(local(python=broken, count=2), NodeGroup(launcher="queue", tags=("unknown",))))
    words = str(failed.value)
    assert "local-1: exit code 3 before it was ready: loading modules\nno licence for this host" in words
    assert "local-2: exit code 3 before it was ready" in words
    assert "queue: sbatch: no such partition: give --partition one that sinfo shows" in words
    clusters.assert_nothing_left()


def test_when_some_nodes_fail_the_others_serve_and_it_is_told(broken: str, caplog: pytest.LogCaptureFixture):
    with Cluster(wanted(local(), local(name="bad", python=broken))) as cluster, Client(cluster) as client:
        assert client.submit(pow, 2, 3).result() == 8
        (failure,) = cluster.failures
        assert (failure.label, failure.state) == ("bad-1", "ended")
        assert "no licence for this host" in failure.why
        assert "node bad-1 of cluster lab ended: exit code 3 before it was ready" in caplog.text


def test_a_node_that_dies_is_told_of_and_scale_makes_up_for_it(caplog: pytest.LogCaptureFixture):
    with Cluster(wanted(local(count=2))) as cluster, Client(cluster) as client:
        victim = next(node for node in client.nodes() if node.label == "local-2")
        os.kill(victim.pid, signal.SIGKILL)
        eventually(lambda: "node local-2 of cluster lab ended: killed by SIGKILL (1 left)" in caplog.text)
        assert [(one.label, one.why) for one in cluster.failures] == [("local-2", "killed by SIGKILL")]
        assert labels(cluster) == ["local-1"]
        cluster.scale("local", 2)
        cluster.wait_for_nodes(2, 60)
        eventually(lambda: labels(cluster) == ["local-1", "local-3"])


def test_a_group_that_adapts_replaces_who_died():
    with Cluster(wanted(local(scale=Scale(min=1, max=2)))) as cluster, Client(cluster) as client:
        (node,) = client.nodes()
        os.kill(node.pid, signal.SIGKILL)
        eventually(lambda: labels(cluster) == ["local-2"])
        assert [one.label for one in cluster.failures] == ["local-1"]


def test_a_launcher_that_is_wrong_is_told_once_and_the_others_go_on(caplog: pytest.LogCaptureFixture):
    with Cluster(wanted(local(count=2), NodeGroup(launcher="faulty"))) as cluster, Client(cluster) as client:
        os.kill(next(node.pid for node in client.nodes() if node.label == "local-2"), signal.SIGKILL)
        eventually(lambda: cluster.failures)
        cluster.scale("local", 2)
        cluster.wait_for_nodes(2, 60)
    told = [record for record in caplog.records if "the launcher of group faulty fails" in record.message]
    assert len(told) == 2
    assert "KeyError: 'queue-1'" in caplog.text
    assert "ValueError: never tried" in caplog.text


def test_what_is_submitted_is_enough_though_others_fail():
    with Cluster(wanted(NodeGroup(launcher="queue"), NodeGroup(name="bad", launcher="queue", tags=("unknown",)))) as cluster:
        assert [one.label for one in cluster.failures] == ["bad"]
        assert labels(cluster, "pending") == ["queue-1"]


def test_a_node_that_leaves_in_order_is_no_failure():
    with Cluster(wanted(local(count=2))) as cluster, Client(cluster) as client:
        with pytest.raises(TimeoutError, match=r"^node local-1 has not left after 0 s: 0 tasks to finish$"):
            client.wait_until_left("local-1", 0)
        client.drain("local-1")
        client.wait_until_left("local-1", 60)
        with pytest.raises(CommandFailed, match="there is no node 'local-9'"):
            client.wait_until_left("local-9")
        eventually(lambda: labels(cluster) == ["local-2"])
        assert cluster.failures == []


def reported(node: str, state: str, pid: int = 7) -> NodeInfo:
    return NodeInfo(node, "host", pid, "3.11", state, 1, 2, 0, {}, {}, (), 0.0, "a-1")


def test_a_node_that_leaves_is_known_by_its_process_not_by_the_broker_it_has(monkeypatch: pytest.MonkeyPatch):
    """A broker that follows another may not know it at first, and gives it another id."""
    looks = [[reported("n2", "draining")], [], [reported("n2", "alive", 9), reported("n1", "draining")]]
    looks.append([reported("n3", "gone"), reported("n1", "lost"), reported("n2", "alive", 9)])
    told: list[str] = []
    with pytest.raises(CommandFailed, match="node n2 was lost before it left"):
        wait_until_left("n2", 60, iter([*looks[:3], [reported("n1", "lost")]]).__next__, lambda node: told.append(node.id))
    assert told == ["n2", "n2", "n1"]
    wait_until_left("n2", 60, iter(looks).__next__, lambda _: None)
    monkeypatch.setattr("zmqsched.readiness.UNKNOWN_S", 0.2)
    wait_until_left("a-1", 60, itertools.chain([looks[0]], itertools.repeat([])).__next__, lambda _: None)


# --- waiting for nodes ----------------------------------------------------------------------------------------------------


def test_a_cluster_is_there_when_jobs_are_submitted_and_waiting_says_why_they_pend():
    with Cluster(wanted(NodeGroup(launcher="queue", count=2), local())) as cluster:
        assert Queue.asked == ["queue-1", "queue-2"]
        cluster.wait_for_nodes(1, 60)
        with pytest.raises(TimeoutError) as waited:
            cluster.wait_for_nodes(3, 0.3)
        assert str(waited.value) == (
            "1 of 3 nodes there after 0.3 s:\n  queue-1 (job 7) pending: PD: Resources\n"
            "  queue-2 (job 7) pending: PD: Resources"
        )


def test_a_wait_ends_at_once_when_so_many_cannot_come(broken: str):
    with Cluster(wanted(local(), local(name="bad", python=broken, count=2))) as cluster:
        with pytest.raises(StartError, match="1 of 2 nodes there, and no more can come") as failed:
            cluster.wait_for_nodes(2, 600)
        assert "no licence for this host" in str(failed.value)
        cluster.wait_for_nodes(1, 0)


def test_a_wait_goes_on_while_others_are_on_their_way(broken: str):
    with Cluster(wanted(local(), local(name="bad", python=broken), NodeGroup(launcher="queue"))) as cluster:
        with pytest.raises(TimeoutError, match="bad-1 ended: exit code 3"):
            cluster.wait_for_nodes(2, 0.3)
        with pytest.raises(StartError):
            cluster.wait_for_nodes(3, 600)


def test_clients_wait_too_and_are_told_what_the_program_knows_that_has_started_the_nodes(broken: str):
    with Cluster(wanted(local(), local(name="bad", python=broken), name="lab")) as cluster, Client("lab") as client:
        client.wait_for_nodes(1)
        with pytest.raises(StartError, match="no licence for this host"):
            client.wait_for_nodes(2, 600)
        cluster.scale("local", 2)
        client.wait_for_nodes(2, 60)


def test_a_client_alone_says_what_is_there(clusters: Home):
    """Nodes that were started by hand may be followed by others."""
    command = [sys.executable, "-m", "zmqsched", "broker", "--name=lab", "--ready-fd=1", "--log-level=error", "--until-eof"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as broker:
        assert broker.stdout is not None
        broker.stdout.readline()
        with Client("lab") as client, pytest.raises(TimeoutError, match=r"^0 of 2 nodes there after 0\.2 s$"):
            client.wait_for_nodes(2, 0.2)
        assert broker.stdin is not None
        broker.stdin.close()


def test_a_cluster_elsewhere_of_the_same_name_is_another(monkeypatch: pytest.MonkeyPatch):
    with Cluster(wanted(NodeGroup(launcher="queue"))), Client("lab") as client:
        client._cluster_id = "of the other"
        with pytest.raises(TimeoutError) as waited:
            client.wait_for_nodes(1, 0.2)
        assert "queue-1" not in str(waited.value)


@pytest.mark.parametrize(("n", "timeout"), [(-1, 1), (True, 1), ("2", 1), (1, -1), (1, "soon"), (1, float("nan"))])
def test_waits_that_make_no_sense(n, timeout):
    with Cluster(wanted(NodeGroup(launcher="queue"))) as cluster, pytest.raises(ValueError, match="is"):
        cluster.wait_for_nodes(n, timeout)


# --- more and fewer -------------------------------------------------------------------------------------------------------


def test_scaling_down_ends_the_idle_and_waits_for_the_busy(gate: Gate):
    with Cluster(wanted(local(count=3))) as cluster, Client(cluster) as client:
        cluster.wait_for_nodes(3, 60)
        future = client.submit(gate.task, os.getpid)
        gate.wait_until_begun()
        busy = next(node.label for node in client.nodes() if node.assigned)
        cluster.scale("local", 1)
        eventually(lambda: labels(cluster) == [busy])
        cluster.scale("local", 0)
        eventually(lambda: [node.state for node in client.nodes() if node.label == busy] == ["draining"])
        assert labels(cluster) == [busy]
        assert not future.done()
        gate.open()
        future.result(60)
        eventually(lambda: cluster.nodes() == [])
        assert gate.begun() == 1
        assert cluster.failures == []


def test_what_pends_is_called_off_first():
    with Cluster(wanted(local(), NodeGroup(launcher="queue", batch=BatchPart(nodes=3)))) as cluster:
        cluster.scale("queue", 1)
        assert labels(cluster, "pending") == ["queue-1"]
        cluster.scale("queue", 2)
        eventually(lambda: labels(cluster, "pending") == ["queue-1", "queue-4"])


def test_scaling_what_is_not_there():
    with Cluster(wanted(local(), NodeGroup(launcher="queue", tags=("unknown",)))) as cluster:
        with pytest.raises(ValueError, match="no group of nodes 'gpu'; there are local, queue"):
            cluster.scale("gpu", 2)
        for number in (-1, 10_001, True, 2.5, "3"):
            with pytest.raises(ValueError, match="n is a number of nodes from 0 to 10000"):
                cluster.scale("local", number)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="max is a number of nodes from 3"):
            cluster.adapt("local", 3, 2)
        with pytest.raises(StartError, match="no such partition"):
            cluster.scale("queue", 2)
    with pytest.raises(StartError, match="closed"):
        cluster.scale("local", 2)


def test_a_group_adapts_to_what_is_asked_of_it(gate: Gate, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("zmqsched.core.adapting.IDLE_S", 1.0)
    with Cluster(wanted(local(scale=Scale(min=0, max=2)))) as cluster, Client(cluster) as client:
        assert cluster.nodes() == []
        futures = [client.submit(gate.task) for _ in range(6)]
        gate.wait_until_begun(2)
        cluster.wait_for_nodes(2, 60)
        gate.open()
        for future in futures:
            future.result(60)
        eventually(lambda: cluster.nodes() == [])
        assert gate.begun() == 6
        cluster.adapt("local", 1, 1)
        cluster.wait_for_nodes(1, 60)
        cluster.scale("local", 0)
        eventually(lambda: cluster.nodes() == [])


def test_nobody_with_work_is_ended_because_a_new_broker_does_not_know_it_yet(gate: Gate, monkeypatch: pytest.MonkeyPatch):
    with Cluster(wanted(local())) as cluster, Client(cluster) as client:
        future = client.submit(gate.task, os.getpid)
        gate.wait_until_begun()
        fleet = cluster._nodes_here
        status, asked = fleet.status, []

        def knows_nobody() -> Status:
            asked.append(1)
            return dataclasses.replace(status(), nodes=NodeList())

        monkeypatch.setattr(fleet, "status", knows_nobody)
        cluster.scale("local", 0)
        eventually(lambda: len(asked) > 2)
        assert labels(cluster) == ["local-1"]
        monkeypatch.setattr(fleet, "status", status)
        eventually(lambda: client.nodes()[0].state == "draining")
        gate.open()
        future.result(60)
        eventually(lambda: cluster.nodes() == [])
        assert gate.begun() == 1


def test_tasks_that_ask_for_what_is_not_there_yet_make_it_come_and_nothing_else():
    """It takes longer than the broker has patience with tasks that no node can hold."""
    scale = Scale(min=0, max=1)
    slow = local(name="gpu", tags=("gpu",), scale=scale, prologue=("sleep 8",))
    groups = [local(), local(name="other", tags=("other",), scale=scale), slow]
    with Cluster(wanted(*groups)) as cluster, Client(cluster) as client:
        assert client.options(tags=["gpu"]).submit(pow, 2, 3).result(60) == 8
        eventually(lambda: labels(cluster) == ["gpu-1", "local-1"])
        with pytest.raises(Unschedulable):
            client.options(tags=["tpu"]).submit(pow, 2, 3).result(60)
        assert labels(cluster) == ["gpu-1", "local-1"]


def test_the_death_of_the_broker_ends_neither_nodes_nor_control(caplog: pytest.LogCaptureFixture):
    with Cluster(wanted(local(count=2))) as cluster, Client(cluster) as client:
        before = cluster.broker_pid
        os.kill(before, signal.SIGKILL)
        eventually(lambda: cluster.broker_pid != before)
        assert client.submit(pow, 2, 3).result(60) == 8
        control.ask("lab", {"do": "scale", "group": "local", "n": 3})
        cluster.wait_for_nodes(3, 60)
        assert cluster.failures == []


# --- logs, and what other processes ask -------------------------------------------------------------------------------


def test_what_nodes_write_is_in_their_logs_while_the_cluster_is_there(clusters: Home):
    def complain() -> None:
        sys.stderr.write("a task complains\n")

    with Cluster(wanted(local()), echo=True) as cluster, Client(cluster, output=False) as client:
        client.submit(complain).result(60)
        path = Path(control.ask("lab", {"do": "log", "label": "local-1"})["path"])
        assert path == cluster_dir("lab") / "logs" / "local-1.log"
        eventually(lambda: path.exists() and "a task complains" in path.read_text())
        assert path.parent.stat().st_mode & 0o077 == 0
        with pytest.raises(Exception, match="no node 'local-9' was started here; there are local-1"):
            control.ask("lab", {"do": "log", "label": "local-9"})
    clusters.assert_nothing_left()


def test_another_process_scales_and_looks(clusters: Home):
    program = """
        from zmqsched import control
        control.ask("lab", {"do": "scale", "group": "local", "n": 2})
        control.ask("lab", {"do": "adapt", "group": "local", "min": 2, "max": 2})
        print(control.ask("lab", {"do": "nodes"})["nodes"][0]["label"], control.ask("lab", {"do": "facts"})["groups"])
    """
    with Cluster(wanted(local())) as cluster:
        assert control.ask("lab", {"do": "facts"})["pid"] == os.getpid()  # from the first moment on
        command = [sys.executable, "-c", textwrap.dedent(program)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        assert done.stdout == "local-1 {'local': 2}\n"
        cluster.wait_for_nodes(2, 60)
    with pytest.raises(ClusterNotFound, match="no cluster named 'lab' was started here"):
        control.ask("lab", {"do": "nodes"})


# --- those that are short for a file -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: SSHCluster([]), "hosts: the launcher ssh needs some"),
        (lambda: SSHCluster(["a"], slots=-1), "slots"),
        (lambda: SSHCluster("a b c"), "hosts"),
        (lambda: SlurmCluster(nodes=0, tags=["with space\n"]), "tags"),
        (lambda: SlurmCluster(time="soon"), "soon"),
    ],
)
def test_arguments_that_cannot_be(make, says):
    with pytest.raises(ValueError, match=says):
        make()


def test_a_cluster_elsewhere_is_what_a_file_would_say(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(LAUNCHERS, "ssh", f"{__name__}:Queue")
    monkeypatch.setitem(LAUNCHERS, "slurm", f"{__name__}:Queue")
    with SSHCluster(["gpu[1-2]", "host"], slots=3, listen="127.0.0.1", prologue=["module load python"]) as cluster:
        (group,) = cluster.wanted.nodes
        assert (group.hosts, group.slots, group.prologue) == (("gpu1", "gpu2", "host"), 3, ("module load python",))
        assert cluster.file.addresses.work[0].startswith("tcp://127.0.0.1:")
        assert Queue.asked == ["ssh-1", "ssh-2", "ssh-3"]
    with SlurmCluster(nodes=2, time="1h", partition="short", options=["--qos=high"], listen="127.0.0.1") as cluster:
        (group,) = cluster.wanted.nodes
        assert group.batch == BatchPart(nodes=2, time=3600.0, partition="short", options=("--qos=high",))
