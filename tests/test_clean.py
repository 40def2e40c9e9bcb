"""``zmqsched clean``: nothing is left of a cluster that died as a whole, and nothing is done to one that lives."""

from __future__ import annotations

import contextlib
import functools
import io
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from unittest import mock

import psutil
import pytest
from conftest import Home, alive, end_broker, eventually
from fake_batch import FakeBatch

from zmqsched import Client, LocalCluster, cleaning
from zmqsched.__main__ import main
from zmqsched.config import CONNECTION_FILE, ClusterLock, ConnectionFile
from zmqsched.control import SOCKET
from zmqsched.errors import StartError
from zmqsched.launch import remote
from zmqsched.orphans import is_marked
from zmqsched.stopping import is_zmqsched

pytestmark = pytest.mark.system

ZMQSCHED = [sys.executable, "-m", "zmqsched"]


@pytest.fixture(autouse=True)
def ours(home: Home, monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """Pids of what this test's tasks have started: other tests, which may be running right now, are to be left alone."""
    pids: set[int] = set()
    monkeypatch.setattr(cleaning, "is_marked", lambda pid: pid in pids and is_marked(pid))
    monkeypatch.setattr(remote, "TUNNEL", str(home.path / "{token}.{role}"))
    return pids


def run(*words: str) -> str:
    """The command, in this process: what it prints. It looks for a moment only."""
    quick = functools.partial(cleaning.find, watch_s=0.2)
    with contextlib.redirect_stdout(io.StringIO()) as out, mock.patch.object(cleaning, "find", quick):
        assert main(list(words)) == 0
    return out.getvalue()


def up(*words: str) -> None:
    subprocess.run([*ZMQSCHED, "up", "--detach", *words], stdout=subprocess.DEVNULL, timeout=60, check=True)


def kill_all(pids: Collection[int]) -> None:
    """At once: each is stopped before the first is killed, so nobody can react."""
    for number in (signal.SIGSTOP, signal.SIGKILL):
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
    eventually(lambda: not any(map(alive, pids)))


def test_ends_of_connections_through_ssh_that_are_no_more(home: Home):
    ends = [Path(remote.tunnel_path("token", role)) for role in remote.ROLES]
    with socket.socket(socket.AF_UNIX) as alive_one, socket.socket(socket.AF_UNIX) as dead_one:
        for end, made in zip(ends, (alive_one, dead_one), strict=True):
            made.bind(str(end))
            made.listen()
        dead_one.close()
        try:
            assert f"end of a connection back through ssh: {ends[1]}" in run("clean")
            assert [end.exists() for end in ends] == [True, False]
        finally:
            for end in ends:
                end.unlink(missing_ok=True)


def test_without_leftovers_there_is_nothing_to_do(home: Home):
    assert run("clean") == "nothing is left to clean\n"


def test_of_a_cluster_that_was_killed_as_a_whole_nothing_is_left(home: Home):
    up("-n2")
    kill_all(home.processes())
    assert {"default", "default/lock", ".default.log", ".journals/default.journal"} <= home.files()
    directory, log = home.path / "default", home.path / ".default.log"
    assert f"would remove directory {directory}\nwould remove log {log}\n" in run("clean", "--dry-run")
    assert f"removed directory {directory}\nremoved log {log}\n" in run("clean")
    assert {name for name in home.files() if not name.startswith(".journals")} == set()
    assert "default.journal" in run("clean", "--journals")
    assert home.left() == set()


HAS_A_CHILD = """
import subprocess, sys
from zmqsched import Client

def has_a_child(path):
    import os, subprocess, time
    child = subprocess.Popen(["sleep", "600"], start_new_session=True, env={})
    open(path + ".part", "w").write(f"{os.getpid()} {child.pid}")
    os.rename(path + ".part", path)
    time.sleep(600)

Client().submit(has_a_child, sys.argv[1]).result()
"""


def test_a_node_whose_cluster_has_died_is_ended_with_all_that_its_tasks_have_started(home: Home, tmp_path: Path):
    """Started by hand it waits for the next broker, for ever."""
    environment = {**os.environ, "ZMQSCHED_DIR": str(home.path)}
    up("-n1")
    others = home.processes().keys()
    connect = ["node", "-n1", "--connect", str(home.path / "default" / CONNECTION_FILE), "--tag=mine"]
    quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen([*ZMQSCHED, *connect], env=environment, **quiet) as node:
        with Client() as client:
            eventually(lambda: any("mine" in one.tags for one in client.nodes()))
        script = HAS_A_CHILD.replace("Client().", 'Client().options(tags=["mine"]).')
        with subprocess.Popen([sys.executable, "-c", script, tmp_path / "family"], env=environment, **quiet) as user:
            eventually((tmp_path / "family").exists)
            user.kill()
        family = [int(word) for word in (tmp_path / "family").read_text().split()]
        kill_all(others)
        assert f"removed nodes and workers of the dead cluster default: {node.pid}" in run("clean")
        assert node.wait(60) == -signal.SIGKILL
    eventually(lambda: not any(map(alive, family)))


@pytest.fixture
def fed(home: Home) -> Iterator[subprocess.Popen[bytes]]:
    """A node of the cluster "fed" that has its connection file from standard input, which stays open."""
    up("-n1", "--name=fed")
    words = [*ZMQSCHED, "node", "-n1", "--connect", "-", "--ready-fd=1"]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as node:
        assert node.stdin is not None
        assert node.stdout is not None
        node.stdin.write(ConnectionFile.load(home.path / "fed" / CONNECTION_FILE).line())
        node.stdin.flush()
        assert b'"node"' in node.stdout.readline()
        yield node
        node.kill()


def test_a_node_that_was_fed_its_connection_file_is_ended_when_its_cluster_is_dead(home: Home, fed: subprocess.Popen[bytes]):
    family = [fed.pid, *(child.pid for child in psutil.Process(fed.pid).children(recursive=True))]
    assert str(fed.pid) not in run("clean", "fed"), "it runs"
    kill_all(home.processes().keys() - set(family))
    assert f"nodes and workers of the dead cluster fed: {fed.pid}, " in run("clean")
    assert fed.wait(10) == -signal.SIGKILL
    eventually(lambda: not any(map(alive, family)))


def test_a_node_of_a_cluster_that_nobody_here_knows_is_ended_only_by_name(
    home: Home, fed: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    with monkeypatch.context() as elsewhere:
        elsewhere.setenv("ZMQSCHED_DIR", str(tmp_path))
        assert str(fed.pid) not in run("clean", "another")
        assert f"nodes and workers of the cluster fed of another host: {fed.pid}, " in run("clean", "fed")
    assert fed.wait(10) == -signal.SIGKILL
    with Client("fed") as client:
        assert client.submit(abs, -1).result(20) == 1
    assert main(["down", "fed"]) == 0


def test_what_tasks_started_is_ended_when_nobody_else_is_left_who_knows_it(home: Home, tmp_path: Path, ours: set[int]):
    up("-n1")
    script = HAS_A_CHILD + "\n"
    with subprocess.Popen([sys.executable, "-c", script, tmp_path / "family"], stderr=subprocess.DEVNULL) as user:
        eventually((tmp_path / "family").exists)
        ours.update(map(int, (tmp_path / "family").read_text().split()))
        child = int((tmp_path / "family").read_text().split()[1])
        assert str(child) not in run("clean", "--dry-run"), "while its node lives"
        kill_all(home.processes())
        user.kill()
    assert alive(child)
    assert str(child) in next(line for line in run("clean").splitlines() if "tasks of dead nodes have started" in line)
    assert not alive(child)


WITH_A_JOB = """
import signal
from zmqsched.cluster import Cluster
from zmqsched.clusterfile import BrokerPart, ClusterFile, NodeGroup

group = NodeGroup(name="many", launcher="slurm", slots=1)
broker = BrokerPart(listen=("127.0.0.1",), journal=False)
with Cluster(ClusterFile(name="doomed", broker=broker, nodes=(group,))):
    print("up", flush=True)
    signal.pause()
"""


def test_jobs_that_wait_in_a_queue_are_cancelled(home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    batch = FakeBatch(tmp_path, "slurm")
    batch.hold("no room")
    monkeypatch.setenv("PATH", f"{batch.bin}:{os.environ['PATH']}")
    with subprocess.Popen([sys.executable, "-c", WITH_A_JOB], stdout=subprocess.PIPE) as program:
        assert program.stdout is not None
        assert program.stdout.readline() == b"up\n"
        kill_all(home.processes())
    (job,) = batch.going()
    assert f"removed jobs of the dead cluster doomed: slurm {job}\n" in run("clean")
    assert batch.going() == []
    assert home.left() == set()


def test_what_lives_is_left_alone(home: Home):
    with LocalCluster(1, name="lives"), Client("lives") as client:
        before = home.files()
        assert "lives" not in run("clean", "--journals")
        assert home.files() == before
        assert client.submit(pow, 2, 5).result() == 32


def test_a_cluster_without_a_broker_is_dead_only_if_it_stays_so(home: Home):
    """Between two brokers nobody holds the lock."""
    ClusterLock.acquire("one").release()
    began: list[Callable[[], None]] = []

    def another_follows(_: float) -> None:
        if not began:
            began.append(ClusterLock.acquire("one").remove)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("zmqsched.cleaning.time.sleep", another_follows)
        assert cleaning.find() == []
    began[0]()


def test_one_that_lost_its_broker_for_good_is_its_holders_as_long_as_that_is_there(home: Home):
    with LocalCluster(1, name="headless") as cluster:
        end_broker(cluster)
        eventually(lambda: cluster.broker_death)
        assert "headless" not in run("clean")


def test_one_whose_holder_answers_is_not_dead(home: Home):
    ClusterLock.acquire("held").release()
    assert len(cleaning.find(watch_s=0)) == 1
    with socket.socket(socket.AF_UNIX) as control:
        control.bind(str(home.path / "held" / SOCKET))
        control.listen()
        assert cleaning.find(watch_s=0) == []


@pytest.mark.parametrize(
    ("words", "ours"),
    [
        (["-m", "zmqsched", "node"], True),
        (["/x/bin/zmqsched", "node"], True),
        (["-m", "zmqsched.__main__", "node"], True),
        (["/x/zmqsched/__main__.py", "node"], True),
        (["/x/notzmqsched", "node"], False),
        (["zmqsched", "up"], False),
    ],
)
def test_our_processes_are_known_however_they_were_started(words: list[str], ours: bool):
    program = "import time; print(flush=True); time.sleep(600)"
    with subprocess.Popen([sys.executable, "-c", program, *words], stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        assert is_zmqsched(psutil.Process(process.pid), "node") == ours
        process.kill()


def test_what_comes_alive_meanwhile_is_left_alone_and_said(home: Home):
    ClusterLock.acquire("quick").release()
    (left,) = cleaning.find(watch_s=0)
    with ClusterLock.acquire("quick") as lock:
        with pytest.raises(Exception, match="'quick' is running already"):
            left.remove()
        lock.remove()


def test_what_cannot_be_killed_is_an_error(home: Home, monkeypatch: pytest.MonkeyPatch):
    path = str(home.path / "gone" / CONNECTION_FILE)
    program = "import sys, time; print(flush=True); time.sleep(600)"
    words = [sys.executable, "-c", program, "zmqsched", "node", f"--connect={path}"]
    with subprocess.Popen(words, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        (left,) = cleaning.find(watch_s=0)
        assert left.what.endswith(f"of the dead cluster gone: {process.pid}")
        with monkeypatch.context() as patch:
            patch.setattr("psutil.Process.kill", lambda _: None)
            patch.setattr(cleaning, "KILL_TIMEOUT_S", 0.1)
            with pytest.raises(StartError, match=f"cannot be killed: {process.pid}"):
                left.remove()
        left.remove()
        assert process.wait(60) == -signal.SIGKILL
