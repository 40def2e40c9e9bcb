"""Jobs and journals with real processes: what outlives the client, the broker, and everybody."""

from __future__ import annotations

import concurrent.futures
import os
import shutil
import signal
from pathlib import Path

import pytest
from conftest import Scripts, eventually

from zmqsched import Client, LocalCluster, errors
from zmqsched.config import STOPPING_FILE, cluster_dir


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    return tmp_path / "state" / "journal"


def kill_broker(cluster: LocalCluster) -> None:
    """And wait until another follows."""
    killed = cluster.broker_pid
    os.kill(killed, signal.SIGKILL)
    eventually(lambda: cluster.broker_pid != killed)


# --- one broker after another ----------------------------------------------------------------------------------------


def test_over_tcp_the_next_broker_has_the_same_keys_and_addresses(clusters, journal, gate):
    with LocalCluster(1, listen="", journal=journal) as cluster, Client(cluster) as client:
        before = cluster.file
        running, queued = client.submit(gate.task, abs, -1), client.submit(abs, -2)
        gate.wait_until_begun()
        kill_broker(cluster)
        after = cluster.file
        assert after.pid != before.pid
        for field in ("addresses", "server_key", "client_public", "client_secret", "cluster_id"):
            assert getattr(after, field) == getattr(before, field)
        eventually(lambda: client.status().counts.get("adopted"))
        gate.open()
        assert (running.result(60), queued.result(60)) == (1, 2)
        assert gate.begun() == 1
        with Client(cluster) as another:
            assert another.submit(abs, -3).result(60) == 3


def test_a_relative_path_is_where_it_was_when_the_cluster_was_started(clusters, tmp_path, monkeypatch, gate):
    here, there = tmp_path / "here", tmp_path / "there"
    for directory in (here, there):
        directory.mkdir(mode=0o700)
    monkeypatch.chdir(here)
    with LocalCluster(1, journal="journal") as cluster, Client(cluster) as client:
        job = client.options(job="night")
        futures = [job.submit(gate.task), job.submit(abs, -1)]
        gate.wait_until_begun()
        monkeypatch.chdir(there)
        kill_broker(cluster)
        assert len(eventually(lambda: client.job("night"))) == 2
        assert ((here / "journal").exists(), (there / "journal").exists()) == (True, False)
        gate.open()
        assert futures[1].result(60) == 1


def test_one_that_dies_over_and_over_is_given_up(clusters, journal, monkeypatch):
    monkeypatch.setattr("zmqsched.cluster.MAX_RESTARTS", 2)
    with LocalCluster(1, journal=journal) as cluster:
        for _ in range(2):
            kill_broker(cluster)
        os.kill(cluster.broker_pid, signal.SIGKILL)
        assert "killed by SIGKILL, the 3th within 60 s" in eventually(lambda: cluster.broker_death)


def test_one_whose_journal_is_damaged_meanwhile_is_given_up_with_its_words(clusters, journal, capfd):
    with LocalCluster(1, journal=journal) as cluster:
        journal.write_bytes(b"")
        os.kill(cluster.broker_pid, signal.SIGKILL)
        assert "is damaged (it is empty); move it away" in eventually(lambda: cluster.broker_death)
    journal.unlink()
    capfd.readouterr()


# --- the journal's end ----------------------------------------------------------------------------------------------------


def test_no_journal_is_left_when_nobody_needs_it(clusters, journal):
    with LocalCluster(1, journal=journal) as cluster, Client(cluster) as client:
        assert client.submit(abs, -1).result(60) == 1
        assert journal.exists()
        client.submit(abs, -2)
    assert list(journal.parent.iterdir()) == []


def test_a_forced_end_leaves_the_journal(clusters, journal, gate):
    with LocalCluster(1, journal=journal) as cluster:
        client = Client(cluster)
        client.options(job="night").submit(gate.task).add_done_callback(lambda _: None)
        gate.wait_until_begun()
        (cluster_dir(cluster.name) / STOPPING_FILE).touch()
        os.kill(cluster.broker_pid, signal.SIGKILL)
        eventually(lambda: cluster.broker_death)
        client.shutdown(wait=False, cancel_futures=True)
    assert journal.exists()


# --- jobs --------------------------------------------------------------------------------------------------------------


def test_a_job_nobody_knows(client):
    with pytest.raises(errors.JobNotFound, match="no task of a job 'night'"):
        client.job("night")


def test_a_job_is_followed_and_cancelled_by_another_client(clusters, gate):
    with LocalCluster(1) as cluster, Client(cluster) as client, Client(cluster) as other:
        job = client.options(job="night")
        mine = [job.submit(gate.task, abs, -1), job.submit(abs, -2), job.submit(abs, -3)]
        gate.wait_until_begun()
        theirs = eventually(lambda: len(found := other.job("night")) == 3 and found)
        assert theirs[1].cancel()
        with pytest.raises(concurrent.futures.CancelledError):
            mine[1].result(60)
        gate.open()
        assert [theirs[0].result(60), theirs[2].result(60)] == [mine[0].result(60), mine[2].result(60)] == [1, 3]


SUBMITS = """
import os, signal, sys
from zmqsched import Client

client = Client(sys.argv[1])
before = client.status().counts["accepted"]
job = client.options(job=sys.argv[2])
for number in range(500):
    job.submit(pow, number, 2)
if sys.argv[2] == "killed":
    while client.status().counts["accepted"] < before + 500:
        pass
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize(("end", "code"), [("leaves", 0), ("killed", -signal.SIGKILL)])
def test_a_jobs_tasks_are_accepted_before_their_client_leaves_and_go_on_without_it(
    clusters, scripts: Scripts, gate, end, code
):
    with LocalCluster(1) as cluster, Client(cluster) as client:
        holding = client.submit(gate.task)
        gate.wait_until_begun()
        _, err = scripts.run(SUBMITS, str(cluster_dir(cluster.name) / "connection.json"), end, code=code)
        assert err == "", "of a job's tasks nothing is said"
        futures = client.job(end)
        assert len(futures) == 500
        gate.open()
        assert [future.result(60) for future in futures] == [number**2 for number in range(500)]
        holding.result(60)


EVENING = """
import os, signal, sys, time
from zmqsched import Client, LocalCluster

def wait_for(path):
    while not os.path.exists(path):
        time.sleep(0.01)
    return "morning"

cluster = LocalCluster(1, name="lab")
client = Client(cluster)
job = client.options(job="night")
assert job.submit(abs, -1).result(60) == 1
job.submit(wait_for, sys.argv[1])
for number in range(5):
    job.submit(pow, 2, number)
while client.status().counts["accepted"] < 7 or not client._core._delivered:
    time.sleep(0.01)
if sys.argv[2] == "killed":
    os.kill(cluster.broker_pid, signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)
"""

MORNING = """
from zmqsched import Client, LocalCluster
with LocalCluster(1, name="lab") as cluster, Client(cluster) as client:
    print([future.result(60) for future in client.job("night")])
    print(sum(client.status().tasks.values()))
"""


@pytest.mark.parametrize("end", ["ends", "killed"])
def test_a_job_goes_on_in_the_next_cluster_of_that_name(scripts: Scripts, tmp_path, end):
    gate = tmp_path / "gate"
    _, err = scripts.run(EVENING, str(gate), end, code=-signal.SIGKILL if end == "killed" else 0)
    assert "unfinished" not in err, "a job is not waited for"
    eventually(lambda: not scripts.home.processes())
    journals = scripts.home.path / ".journals"
    assert (journals / "lab.journal").exists()
    gate.touch()
    for _ in range(2):  # results are kept for whoever asks
        out, _ = scripts.run(MORNING)
        assert out.splitlines()[0] == "[1, 'morning', 1, 2, 4, 8, 16]"
    shutil.rmtree(journals)
