"""Nodes in jobs of Slurm, PBS and SGE, with fake commands of theirs; a real Slurm is in tests/system."""

from __future__ import annotations

import math
import os
import shlex
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from conftest import Home, eventually, processes_knowing, site_on_loopback
from fake_batch import FakeBatch
from msgspec.structs import replace

from zmqsched import Client, LocalCluster
from zmqsched.clusterfile import BatchPart, NodeGroup
from zmqsched.config import CONNECTION_FILE, ConnectionFile, cluster_dir, make_private, shared_dir, this_host
from zmqsched.errors import StartError
from zmqsched.launch import find_launcher
from zmqsched.launch.base import Launched, Site
from zmqsched.launch.batch import BatchLauncher, in_hours
from zmqsched.launch.jobs import NODE_FILE, Files, Job, cancel_recorded, directory_of, recorded_jobs
from zmqsched.launch.slurm import _in_words

pytestmark = pytest.mark.system

KINDS = ("slurm", "pbs", "sge")
FAILED = {"slurm": "FAILED, exit code 3", "pbs": "exit code 3", "sge": "exit code 3"}
WAITS = {"slurm": "PD: no room", "pbs": "PD: no room", "sge": "PD: error reason    1:      no room"}


@pytest.fixture(scope="module")
def site(clusters: Home) -> Iterator[Site]:
    with site_on_loopback() as site:
        yield site


@pytest.fixture(scope="module")
def client(site: Site) -> Iterator[Client]:
    with Client(site.path) as client:
        yield client


@pytest.fixture(params=KINDS)
def batch(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeBatch]:
    """Each of the batch systems in turn."""
    fake = FakeBatch(tmp_path / "site", request.param)
    fake.kind = request.param
    monkeypatch.setenv("PATH", f"{fake.bin}:{os.environ['PATH']}")
    yield fake
    eventually(lambda: not processes_knowing(tmp_path / "site"))


@pytest.fixture
def launcher(batch: FakeBatch, site: Site) -> Iterator[Callable[..., BatchLauncher]]:
    """Makes launchers, and closes them."""
    with ExitStack() as stack:

        def made(**settings: Any) -> BatchLauncher:
            part = {key: settings.pop(key) for key in settings.keys() & set(BatchPart.__struct_fields__)}
            group = NodeGroup(name="many", batch=BatchPart(**part), **settings)
            launcher = find_launcher(batch.kind)(group, site)
            assert isinstance(launcher, BatchLauncher)
            stack.callback(launcher.close)
            return launcher

        yield made
    assert batch.going() == []
    assert not shared_dir("jobs").exists()


def launched(launcher: BatchLauncher, label: str) -> Launched:
    launcher._asked_at = -math.inf
    return {one.label: one for one in launcher.poll()}[label]


def ended(launcher: BatchLauncher, label: str) -> Launched:
    return eventually(lambda: (now := launched(launcher, label)).state == "ended" and now)


def nodes(client: Client) -> set[str]:
    return {node.label for node in client.nodes() if node.state == "alive" and node.label.startswith("many")}


def test_nodes_join_from_jobs_and_end_with_them(batch, launcher, client):
    many = launcher(array=True)
    many.start(["many-1", "many-2"])
    eventually(lambda: nodes(client) == {"many-1", "many-2"})
    assert launched(many, "many-1").state == "running"
    assert len(batch.going()) == 2
    many.stop(["many-1"])
    assert len(batch.going()) == 1
    assert [one.label for one in many.poll()] == ["many-2"]
    many.close()
    eventually(lambda: not nodes(client))


def test_why_a_job_waits_and_that_it_begins(batch, launcher, client):
    batch.hold("no room")
    many = launcher(slots=1)
    many.start(["many-1"])
    pending = launched(many, "many-1")
    assert (pending.state, pending.why) == ("pending", WAITS[batch.kind])
    batch.release()
    eventually(lambda: launched(many, "many-1").state == "running")


def test_what_is_refused_is_told_and_not_recorded(batch, launcher):
    batch.refuse("you have no account")
    many = launcher()
    command = "sbatch" if batch.kind == "slurm" else "qsub"
    with pytest.raises(StartError, match=rf"{command} failed \(exit code 1\): you have no account"):
        many.start(["many-1"])
    assert (many.poll(), recorded_jobs()) == ([], [])


@pytest.mark.parametrize("batch", ["pbs", "sge"], indirect=True)  # to Slurm all of a call is one submission
def test_a_refusal_half_way_takes_back_what_was_accepted(batch, launcher, monkeypatch):
    many = launcher(prologue=("sleep 100",))
    submit = many._submit

    def once(job: Job) -> Job:
        submitted = submit(job)
        batch.refuse("that is enough")
        return submitted

    monkeypatch.setattr(many, "_submit", once)
    with pytest.raises(StartError, match="that is enough"):
        many.start(["many-1", "many-2"])
    assert (batch.going(), recorded_jobs()) == ([], [])


def test_how_a_job_failed_is_told_in_its_own_words(batch, launcher):
    many = launcher(prologue=("echo no module gcc/99 >&2", "exit 3"))
    many.start(["many-1"])
    assert ended(many, "many-1").why == f"{FAILED[batch.kind]}\nno module gcc/99"


def test_a_job_that_has_vanished_has_ended_and_nobody_knows_how(batch, launcher):
    many = launcher(prologue=("echo the last words", "exit 3"))
    many.start(["many-1"])
    eventually(lambda: not batch.going())
    batch.forget(next(iter(many._nodes().values())))
    assert ended(many, "many-1").why == f"how, {many.system.title} does not say\nthe last words"


def test_what_the_site_cannot_say_now_is_asked_again(batch, launcher, monkeypatch):
    many = launcher(prologue=("sleep 100",))
    many.start(["many-1"])
    before = launched(many, "many-1")
    assert before.state == "running"
    with monkeypatch.context() as patch:
        patch.setenv("PATH", "/nowhere")
        trouble = launched(many, "many-1")
    assert trouble.state == "running"
    assert "no command" in trouble.why
    assert launched(many, "many-1") == before


def test_jobs_are_found_by_name_if_their_driver_died_before_their_id_was_recorded(batch):
    batch.hold("no room")
    directory = directory_of("doomed")
    make_private(directory)
    job = Job(launcher=batch.kind, cluster="doomed", host=this_host(), pid=1, name="zmqsched-abc123", labels=("many-1",))
    Files(directory, job.name).write(job)
    system = find_launcher(batch.kind).system
    files = Files(directory, job.name)
    files.script.write_text("sleep 100")
    os.system(f"{shlex.join(system.submit_command(NodeGroup(), job, files))} >/dev/null")
    (number,) = batch.going()
    assert cancel_recorded("doomed") == [f"{system.title} job {number}"]
    assert batch.going() == []
    assert not shared_dir("jobs").exists()


@pytest.mark.parametrize("where", ["doomed@elsewhere-00000000", "doomed@{host}-00000000"])
def test_jobs_of_another_host_or_another_directory_of_clusters_are_not_touched(batch, where):
    """Of a cluster of the same name, that is."""
    directory = shared_dir("jobs") / where.format(host=this_host())
    make_private(directory)
    job = Job(
        launcher=batch.kind, cluster="doomed", host="elsewhere", pid=1, name="zmqsched-abc123", labels=("many-1",), id="1"
    )  # fmt: skip
    files = Files(directory, job.name)
    files.write(job)
    try:
        assert cancel_recorded("doomed") == []
        assert recorded_jobs("doomed") == recorded_jobs() == []
        assert files.record.exists()
    finally:
        files.remove()
        directory.rmdir()
        directory.parent.rmdir()
        directory.parent.parent.rmdir()


def test_a_broker_that_only_this_host_can_reach_is_said(batch, clusters):
    with LocalCluster(1) as cluster:
        directory = cluster_dir(cluster.name)
        launcher = find_launcher(batch.kind)(NodeGroup(), Site(directory / CONNECTION_FILE, directory))
        with pytest.raises(StartError, match=r"need a broker that listens on TCP: give broker\.listen an address"):
            launcher.start(["many-1"])


def test_the_options_of_a_group_go_to_the_submit_command(batch, launcher):
    many = launcher(slots=4, time=90.5, partition="long", account="acct", options=("--mail=a b",))
    (submit, *script) = many.preview(["many-1"])
    words = shlex.split(submit)
    expected = {
        "slurm": {"--cpus-per-task=4", "--time=0:01:31", "--partition=long", "--account=acct", "--mail=a b", "--requeue"},
        "pbs": {"select=1:ncpus=4", "walltime=0:01:31", "long", "acct", "--mail=a b"},
        "sge": {"h_rt=91", "long", "acct", "--mail=a b"},
    }
    assert set(words) >= expected[batch.kind]
    assert any("--slots=4" in line for line in script)


def test_durations_as_batch_systems_write_them():
    assert [in_hours(seconds) for seconds in (0.2, 60, 3600, 90061)] == ["0:00:01", "0:01:00", "1:00:00", "25:01:01"]


@pytest.mark.parametrize(
    ("said", "words"),
    [
        (("COMPLETED", "0:0", ""), ""),
        (("FAILED", "3:0", "NonZeroExitCode"), "FAILED, exit code 3"),
        (("TIMEOUT", "0:15", "TimeLimit"), "TIMEOUT, signal 15, TimeLimit"),
        (("CANCELLED by 0", "0:0", ""), "CANCELLED by 0"),
        (("", "", ""), None),
    ],
)
def test_how_slurm_says_that_a_job_has_ended(said, words):
    assert _in_words(*said) == words


def test_a_job_that_waits_is_handed_the_keys_that_are_good_when_it_begins(batch, site, tmp_path):
    """A broker that follows another may have others, and keys are rotated."""
    handed = tmp_path / "node.json"
    old = replace(site.file, created="before")
    old.write(handed)
    batch.hold("no room")
    many = find_launcher(batch.kind)(NodeGroup(name="many"), Site(handed, tmp_path))
    try:
        many.start(["many-1"])
        copy = directory_of(site.file.name) / NODE_FILE
        assert ConnectionFile.load(copy) == old
        site.file.write(handed)
        assert launched(many, "many-1").state == "pending"
        assert ConnectionFile.load(copy) == site.file
    finally:
        many.close()


@pytest.mark.parametrize("batch", ["slurm"], indirect=True)
def test_a_cluster_that_is_started_in_a_job_of_slurm_does_not_hand_that_jobs_facts_down(batch, launcher, monkeypatch):
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "7")
    many = launcher(prologue=("echo cpus: $SLURM_CPUS_PER_TASK.", "exit 3"))
    many.start(["many-1"])
    assert ended(many, "many-1").why.endswith("\ncpus: .")
