"""Nodes as launchers start them, one by one: what they are called, when they leave, how they care for their workers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import eventually

import zmqsched
from zmqsched import Client
from zmqsched.errors import ClusterLost, CommandFailed, WorkerDied
from zmqsched.protocol import Options

ZMQSCHED = [sys.executable, "-m", "zmqsched"]


class Site:
    """A broker, and nodes as they are asked for."""

    def __init__(self, directory: Path) -> None:
        self.environment = {**os.environ, "ZMQSCHED_DIR": str(directory)}
        self.processes: list[subprocess.Popen[bytes]] = []

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen[bytes]:
        """A broker or a node; it is ready when this returns."""
        reads, writes = os.pipe()
        process = subprocess.Popen(
            [*ZMQSCHED, *arguments, "--until-eof", f"--ready-fd={writes}"], env=self.environment | environment,
            stdin=subprocess.PIPE, pass_fds=[writes],
        )  # fmt: skip
        self.processes.append(process)
        os.close(writes)
        with open(reads, encoding="utf-8") as ready:
            said = json.loads(ready.readline() or '{"error": "it ended"}')
        assert "error" not in said, said
        return process

    def broker(self, *arguments: str) -> subprocess.Popen[bytes]:
        process = self.start("broker", "--name=care", *arguments)
        (self.file,) = Path(self.environment["ZMQSCHED_DIR"]).rglob("connection.json")
        return process

    def node(self, *arguments: str, slots: int = 1, **environment: str) -> subprocess.Popen[bytes]:
        return self.start("node", f"--connect={self.file}", f"--slots={slots}", *arguments, **environment)

    def client(self) -> Client:
        return Client(self.file)

    def close(self) -> None:
        for process in reversed(self.processes):
            assert process.stdin
            process.stdin.close()
        for process in self.processes:
            process.wait(60)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    site = Site(tmp_path)
    try:
        yield site
    finally:
        site.close()


# --- what a launcher says of a node ------------------------------------------------------------------------------------


def test_a_node_is_called_as_its_launcher_says_and_tells_when_it_leaves(site):
    site.broker()
    site.node("--label=gpu-1", "--walltime=3600")
    with site.client() as client:
        (node,) = client.nodes()
        assert node.label == "gpu-1"
        assert 3000 < node.leaves_in_s <= 3600
        site.node()
        assert [(node.label, node.leaves_in_s) for node in client.nodes()[1:]] == [("", 0.0)]


def test_in_a_slurm_allocation_it_finds_its_end_itself(site):
    site.broker()
    soon = int(time.time()) + 3600
    site.node(SLURM_JOB_END_TIME=str(soon))
    with site.client() as client:
        assert 3000 < client.nodes()[0].leaves_in_s <= 3600


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("--walltime=0", "0.0 is not a finite number of seconds above 0"),
        ("--walltime=nan", "nan is not a finite number of seconds above 0"),
        ("--label=a\nb", "is not a short printable text"),
        ("--max-tasks-per-worker=0", "0 is not at least 1"),
        ("--memory-limit=much", "'much' is not a size"),
        ("--memory-soft=1.5", "1.5 is not above 0 and at most 1"),
    ],
)
def test_what_a_node_cannot_be_told_is_said(argument, said):
    done = subprocess.run(
        [*ZMQSCHED, "node", "--connect=x", argument], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2
    assert said in done.stderr


def test_before_its_walltime_ends_a_node_drains_and_what_still_runs_is_run_elsewhere(site, tmp_path):
    site.broker()
    first = site.node("--walltime=9")
    with site.client() as client:
        future = client.submit(stays_once, str(tmp_path / "marks"))
        eventually(lambda: (tmp_path / "marks").exists())
        site.node()
        assert client.options(timeout=60).submit(os.getpid).result(20)
        assert [node.done for node in client.nodes()] == [0, 1], "it might not have ended on the first"
        assert future.result(60) == 2
        assert first.wait(60) == 0
        assert client.status().counts.get("worker deaths", 0) == 0


def test_in_an_allocation_sigterm_hands_back_what_does_not_end_in_time(site, tmp_path):
    """As a batch system has it that preempts the job: SIGTERM, and later SIGKILL."""
    site.broker()
    first = site.node("--walltime=12")
    with site.client() as client:
        future = client.submit(stays_once, str(tmp_path / "marks"))
        eventually(lambda: (tmp_path / "marks").exists())
        first.terminate()
        eventually(lambda: states(client)["n1"] == "draining")
        site.node()
        assert future.result(60) == 2


# --- workers ------------------------------------------------------------------------------------------------------------


def test_a_worker_is_replaced_after_so_many_tasks_and_nothing_is_lost(site):
    site.broker()
    site.node("--max-tasks-per-worker=5")
    with site.client() as client:
        pids = [future.result(60) for future in [client.submit(os.getpid) for _ in range(50)]]
        assert max(pids.count(pid) for pid in pids) == 5
        assert client.status().counts.get("worker deaths", 0) == 0


def hoards(size: int) -> int:
    hoard = b"x" * size
    while True:
        time.sleep(len(hoard) and 0.05)


def test_a_task_that_takes_more_memory_than_a_worker_may_use_is_told_so(site):
    site.broker()
    site.node("--memory-limit=300M")
    with site.client() as client:
        with pytest.raises(WorkerDied, match=r"used \d+ MiB of the 300 MiB that a worker may use"):
            client.options(requeue=False).submit(hoards, 400 << 20).result(60)
        assert client.submit(abs, -1).result(60) == 1


def test_a_worker_that_takes_much_memory_is_replaced_when_its_task_has_ended(site, gate):
    site.broker()
    site.node("--memory-limit=800M", "--memory-soft=0.4")

    def keeps():
        import os
        import sys

        sys.modules["hoard"] = [b"x" * (400 << 20)]
        return os.getpid()

    with site.client() as client:
        future = client.submit(gate.task, keeps)
        eventually(lambda: [worker.worn for worker in client.workers()] == [True])
        assert "worn" in repr(client.workers())
        gate.open()
        pid = future.result(60)
        assert client.submit(os.getpid).result(60) != pid
        eventually(lambda: pid not in [worker.pid for worker in client.workers()])
        assert client.status().counts.get("worker deaths", 0) == 0


# --- what a broker is told ----------------------------------------------------------------------------------------------


def test_tasks_have_what_the_cluster_says_unless_they_say_otherwise(site):
    site.broker('--task-defaults={"retries": 2, "timeout": 60, "priority": 3}')
    with site.client() as client:
        assert client.options()._options == Options(3, 2, timeout=60.0)
        assert client.options(retries=0, timeout=5)._options == Options(3, 0, timeout=5.0)


def test_an_idle_cluster_ends_though_a_client_is_there(site):
    broker = site.broker("--idle-timeout=2", "--beat-interval=0.2", "--dead-after=1")
    with site.client() as client:
        asked = client.submit(abs, -1)  # at once: to start a node may take longer than the broker waits for somebody to ask
        node = site.node()
        assert asked.result(60) == 1
        assert broker.wait(60) == node.wait(60) == 0
        with pytest.raises(ClusterLost, match="nothing was asked of it for 2 s"):
            client.submit(abs, -1).result(60)


def test_a_silent_node_is_lost_as_soon_as_the_broker_was_told(site):
    site.broker("--beat-interval=0.1", "--dead-after=0.5")
    node = site.node()
    site.node()
    with site.client() as client:
        node.send_signal(signal.SIGSTOP)
        try:
            since = time.monotonic()
            eventually(lambda: states(client)["n1"] == "lost")
            assert time.monotonic() - since < 3.0, "before it would be by default"
            assert client.submit(abs, -1).result(60) == 1
        finally:
            node.send_signal(signal.SIGCONT)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--beat-interval=2", "--dead-after=5"], "--dead-after is at least three beat intervals, 6 s, not 5"),
        (["--beat-interval=7200"], "a beat interval is at most 3600 s, not 7200"),
        (['--task-defaults={"retires": 2}'], "unknown field `retires`"),
        (['--task-defaults={"retries": -2}'], "`$.retries`"),
        (["--idle-timeout=0"], "0.0 is not a finite number of seconds above 0"),
    ],
)
def test_what_a_broker_cannot_be_told_is_said(arguments, said):
    done = subprocess.run([*ZMQSCHED, "broker", *arguments], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert said in done.stderr


# --- drain, pause, resume, retire --------------------------------------------------------------------------------------


def states(client: Client) -> dict[str, str]:
    return {node.id: node.state for node in client.nodes()}


def test_a_paused_node_starts_nothing_until_it_is_resumed(site, gate):
    site.broker()
    site.node("--label=box-1")
    with site.client() as client:
        running = client.submit(gate.task)
        gate.wait_until_begun()
        client.pause("box-1")
        waiting = client.submit(abs, -2)
        assert states(client) == {"n1": "paused"}
        gate.open()
        running.result(60)
        eventually(lambda: client.status().waiting == [(1, "no node takes tasks: n1 is paused")])
        client.resume("n1")
        assert waiting.result(60) == 2
        with pytest.raises(CommandFailed, match=r"there is no node 'n9'; nodes: n1 \(box-1\)"):
            client.resume("n9")


def test_what_a_retired_node_has_not_finished_is_run_elsewhere_and_nobody_is_charged(site, tmp_path):
    site.broker()
    first = site.node()
    with site.client() as client:
        future = client.submit(stays_once, str(tmp_path / "marks"))
        eventually(lambda: (tmp_path / "marks").exists())
        site.node()
        client.retire("n1", grace=0.5)
        assert future.result(60) == 2
        first.wait(60)
        assert client.status().counts.get("worker deaths", 0) == 0


def stays_once(path: str) -> int:
    """Runs for ever the first time; how many times it has begun."""
    with open(path, "a+", encoding="utf-8") as marks:
        marks.write("x")
        marks.flush()
        marks.seek(0)
        begun = len(marks.read())
    while begun == 1:
        time.sleep(0.05)
    return begun


def parent() -> int:
    client = zmqsched.get_client()
    begun = client.submit(abs, -1).result(60)
    time.sleep(0.5)  # the node is told to drain meanwhile
    return begun + client.submit(abs, -2).result(60)


def test_the_only_node_drains_while_a_task_there_waits_for_its_own(site):
    site.broker()
    node = site.node()
    with site.client() as client:
        future = client.submit(parent)
        eventually(lambda: client.status().counts.get("ok", 0) >= 1)
        client.drain("n1")
        assert future.result(60) == 3
        node.wait(60)
