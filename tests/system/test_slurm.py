"""Clusters on a real Slurm: jobs are submitted, wait, run, end, are cancelled and requeued, and nothing of them is left."""

from __future__ import annotations

import math
import os
import shutil
import signal
import stat
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import Home, eventually, processes_knowing, site_on_loopback
from msgspec.structs import replace
from slurm import Slurm, running_slurm

from zmqsched import Client, Cluster, LocalCluster, SlurmCluster, cleaning
from zmqsched.__main__ import main
from zmqsched.clusterfile import BatchPart, ClusterFile, NodeGroup
from zmqsched.config import (
    CONNECTION_FILE,
    ConnectionFile,
    cluster_dir,
    is_held,
    make_private,
    remove_cluster_dir,
    shared_dir,
    this_host,
)
from zmqsched.errors import StartError
from zmqsched.launch.base import Launched, Site
from zmqsched.launch.jobs import NODE_FILE, Files, Job, cancel_recorded, directory_of, recorded_jobs
from zmqsched.launch.slurm import SlurmLauncher
from zmqsched.ranks import remove_left
from zmqsched.records import NodeInfo

pytestmark = pytest.mark.system
JOIN_S = 60.0


@pytest.fixture(scope="session")
def slurm_of_this_machine(clusters: Home) -> Iterator[Slurm]:
    yield from running_slurm()


@pytest.fixture
def slurm(slurm_of_this_machine: Slurm, monkeypatch: pytest.MonkeyPatch) -> Iterator[Slurm]:
    """With no job in it, before and after; programs started now find it."""
    for name, value in slurm_of_this_machine.environment.items():
        monkeypatch.setenv(name, value)
    yield slurm_of_this_machine
    slurm_of_this_machine.empty()


@pytest.fixture(scope="module")
def site(clusters: Home) -> Iterator[Site]:
    with site_on_loopback() as site:
        yield site


@pytest.fixture(scope="module")
def client(site: Site) -> Iterator[Client]:
    with Client(site.path) as client:
        yield client


@pytest.fixture
def launcher(slurm: Slurm, site: Site, client: Client) -> Iterator[Callable[..., SlurmLauncher]]:
    """Makes launchers, and closes them."""
    with ExitStack() as stack:

        def made(name: str, **settings: Any) -> SlurmLauncher:
            batch = {key: settings.pop(key) for key in settings.keys() & set(BatchPart.__struct_fields__)}
            launcher = SlurmLauncher(NodeGroup(name=name, slots=1, batch=BatchPart(**batch), **settings), site)
            stack.callback(launcher.close)
            return launcher

        yield made
    assert not shared_dir("jobs").exists()
    eventually(lambda: not nodes(client))


def launched(launcher: SlurmLauncher, label: str) -> Launched:
    """As of now, not of two seconds ago."""
    launcher._asked_at = -math.inf
    return {one.label: one for one in launcher.poll()}[label]


def nodes(client: Client) -> dict[str, str]:
    """Ids, by label, of those that Slurm has started."""
    return {node.label: node.id for node in started(client) if node.state == "alive"}


def started(client: Client) -> list[NodeInfo]:
    return [node for node in client.nodes() if not node.label.startswith("local-")]


def joined(client: Client, *labels: str) -> dict[str, str]:
    return eventually(lambda: (found := nodes(client)).keys() == set(labels) and found, JOIN_S)


def host() -> str | None:
    import time

    time.sleep(0.2)
    return os.environ.get("SLURMD_NODENAME")


@pytest.mark.parametrize("array", [False, True])
def test_nodes_are_submitted_joined_used_and_ended(slurm, site, client, launcher, array):
    many = launcher("many", array=array, time=600)
    many.start(["many-1", "many-2"])
    assert {node.state for node in many.poll()} <= {"pending", "starting", "running"}
    joined(client, "many-1", "many-2")
    assert len(slurm.jobs()) == (2 if array else 1)
    assert launched(many, "many-1").state == "running"
    placed = [client.submit(lambda: host()) for _ in range(6)]
    assert {future.result(timeout=60) for future in placed} >= {"zs1" if array else "zs2"}
    assert all(0 < node.leaves_in_s <= 600 for node in started(client) if node.state == "alive")
    assert {node.label: node.slots for node in started(client) if node.state == "alive"} == {"many-1": 1, "many-2": 1}
    many.close()
    assert slurm.jobs() == {}
    eventually(lambda: not nodes(client))


def test_no_secret_is_where_others_can_read_it(slurm, site, client, launcher):
    many = launcher("many")
    many.start(["many-1"])
    joined(client, "many-1")
    directory = next(shared_dir("jobs").iterdir())
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert stat.S_IMODE((directory / NODE_FILE).stat().st_mode) == 0o600
    file = ConnectionFile.load(directory / NODE_FILE)
    (job,) = slurm.jobs()
    seen = slurm("scontrol", "show", "job", "--oneliner") + slurm("scontrol", "write", "batch_script", job, "-")
    for pid in processes_knowing(directory):
        seen += Path(f"/proc/{pid}/cmdline").read_text() + Path(f"/proc/{pid}/environ").read_text()
    assert str(directory / NODE_FILE) in seen
    assert file.client_secret
    assert file.client_secret not in seen


def test_why_a_job_is_pending_is_told(slurm, site, client, launcher):
    slurm("scontrol", "update", "PartitionName=short", "State=DOWN")
    many = launcher("many")
    many.start(["many-1"])
    pending = eventually(lambda: (now := launched(many, "many-1")).why == "PD: PartitionDown" and now)
    assert (pending.state, pending.where) == ("pending", "Slurm job " + next(iter(slurm.jobs())))
    slurm("scontrol", "update", "PartitionName=short", "State=UP")
    joined(client, "many-1")
    assert launched(many, "many-1").why == ""


def test_what_is_asked_for_beyond_what_is_free_waits_for_resources(slurm, site, client, launcher):
    first, second = launcher("first", options=("--nodes=2", "--exclusive")), launcher("second", options=("--exclusive",))
    first.start(["first-1"])
    eventually(lambda: launched(first, "first-1").state == "running")
    second.start(["second-1"])
    eventually(lambda: launched(second, "second-1").why == "PD: Resources")


def test_what_sbatch_refuses_is_told_in_its_words_and_nothing_is_left(slurm, site, launcher):
    many = launcher("many", partition="nosuch")
    with pytest.raises(StartError, match=r"sbatch failed.*invalid partition specified: nosuch"):
        many.start(["many-1"])
    assert many.poll() == []
    assert recorded_jobs() == []


def test_how_a_node_failed_to_start_is_told_in_its_own_words(slurm, site, launcher):
    many = launcher("many", prologue=("echo there is no module gcc/99 >&2", "exit 3"))
    many.start(["many-1"])
    ended = eventually(lambda: (now := launched(many, "many-1")).state == "ended" and now)
    assert ended.why == "FAILED, exit code 3\nthere is no module gcc/99"


def test_a_python_without_zmqsched_is_told(slurm, site, launcher):
    many = launcher("many", python="/usr/bin/python3", prologue=("unset PYTHONPATH",))
    many.start(["many-1"])
    ended = eventually(lambda: (now := launched(many, "many-1")).state == "ended" and now)
    assert "none of /usr/bin/python3 has zmqsched" in ended.why


def test_environment_directory_and_prologue_of_a_group(slurm, site, client, launcher, tmp_path):
    many = launcher("many", env={"COLOUR": "it's $HOME"}, cwd=str(tmp_path), prologue=("export SHAPE=$COLOUR!",))
    many.start(["many-1"])
    joined(client, "many-1")
    there = client.options(tags=()).submit(lambda: (host(), os.getcwd(), os.environ.get("SHAPE")))
    while (found := there.result(timeout=60))[0] is None:  # the node that is here
        there = client.submit(lambda: (host(), os.getcwd(), os.environ.get("SHAPE")))
    assert found[1:] == (str(tmp_path), "it's $HOME!")


def test_one_of_an_array_is_ended_alone(slurm, site, client, launcher):
    many = launcher("many", array=True)
    many.start(["many-1", "many-2", "many-3"])
    before = joined(client, "many-1", "many-2", "many-3")
    many.stop(["many-2"])
    assert joined(client, "many-1", "many-3").items() <= before.items()
    assert len(slurm.jobs()) == 2
    assert {one.label for one in many.poll()} == {"many-1", "many-3"}
    many.stop(["many-1", "many-3"], at_once=True)
    assert slurm.jobs() == {}
    assert many.poll() == []


def test_one_of_a_joint_job_cannot_be_killed_alone(slurm, site, client, launcher):
    many = launcher("many")
    many.start(["many-1", "many-2"])
    joined(client, "many-1", "many-2")
    with pytest.raises(StartError, match="many-2 cannot be killed alone"):
        many.stop(["many-2"], at_once=True)
    many.stop(["many-2"])
    assert set(slurm.jobs().values()) == {"RUNNING"}
    assert [one.label for one in many.poll()] == ["many-1"]
    many.stop(["many-1"], at_once=True)
    assert slurm.jobs() == {}


def test_a_job_that_somebody_else_cancels_is_told_and_its_tasks_run_elsewhere(slurm, site, client, launcher, gate):
    many = launcher("many")
    many.start(["many-1"])
    joined(client, "many-1")
    held = [client.submit(gate.task, str(number)) for number in range(2)]
    gate.wait_until_begun(2)
    (job,) = slurm.jobs()
    slurm("scancel", "--full", "--signal=KILL", job)
    ended = eventually(lambda: (now := launched(many, "many-1")).state == "ended" and now)
    assert ended.where == f"Slurm job {job}"
    assert ended.why
    gate.open()
    assert [future.result(timeout=60) for future in held] == ["0", "1"]


def test_a_requeued_job_comes_back_as_a_new_node_of_its_label(slurm, site, client, launcher):
    many = launcher("many")
    many.start(["many-1"])
    before = joined(client, "many-1")
    (job,) = slurm.jobs()
    slurm("scontrol", "requeue", job)
    eventually(lambda: slurm.jobs().get(job) == "PENDING")
    assert launched(many, "many-1").state == "pending"
    slurm.begin(job)
    eventually(lambda: (now := nodes(client)) and now != before, JOIN_S)
    assert nodes(client).keys() == {"many-1"}
    assert launched(many, "many-1").state == "running"


def dies_of_sigterm(directory: str) -> None:
    """Says in which job it runs, and waits for a file."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    number = len(os.listdir(directory))
    Path(directory, "new").write_text(os.environ["SLURM_ARRAY_JOB_ID"] + "_" + os.environ["SLURM_ARRAY_TASK_ID"])
    os.rename(f"{directory}/new", f"{directory}/{number}")
    while not Path(directory, "open").exists():
        time.sleep(0.01)


def test_however_often_slurm_ends_its_job_a_task_is_neither_lost_nor_charged(slurm, site, client, launcher, gate, tmp_path):
    there = tmp_path / "there"
    there.mkdir()
    here = client.submit(gate.task)  # so that nothing else runs on the node that is here
    gate.wait_until_begun()
    labels = [f"many-{number}" for number in range(4)]
    many = launcher("many", array=True)
    many.start(labels)
    before = joined(client, *labels)
    held = client.submit(dies_of_sigterm, str(there))
    hit = []
    for number, ended_by in enumerate(("cancelled", "requeued", "cancelled", "preempted")):
        eventually((there / str(number)).exists, JOIN_S)
        hit.append((there / str(number)).read_text())
        match ended_by:
            case "cancelled":
                slurm("scancel", hit[-1])
            case "requeued":
                slurm("scontrol", "requeue", hit[-1])
            case "preempted":
                slurm("sbatch", "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=true")
    assert len(set(hit)) == 4
    eventually(lambda: slurm.jobs() == {hit[1]: "PENDING", hit[3]: "PENDING"}, JOIN_S)
    for job in slurm.jobs():
        slurm.begin(job)
    eventually((there / "4").exists, JOIN_S)
    assert not nodes(client).items() & before.items(), "those that come back are new nodes"
    (there / "open").touch()
    gate.open()
    assert (held.result(timeout=60), here.result(timeout=60)) == (None, None)


@pytest.mark.parametrize("array", [False, True])
def test_what_can_end_between_slurms_sigterm_and_its_sigkill_ends_there(slurm, site, client, launcher, gate, array):
    many = launcher("many", array=array, tags=("of-slurm",))
    labels = [f"{array}-1", f"{array}-2"]  # no others were called so
    many.start(labels)
    joined(client, *labels)
    held = [client.options(tags=["of-slurm"]).submit(gate.task, number) for number in range(2)]
    gate.wait_until_begun(2)
    slurm("scancel", *slurm.jobs())
    eventually(lambda: {node.state for node in started(client) if node.label in labels} == {"draining"})
    gate.open()
    assert [future.result(timeout=60) for future in held] == [0, 1]
    assert gate.begun() == 2
    eventually(lambda: slurm.jobs() == {})


def test_commands_that_are_not_there_are_named(site, launcher, monkeypatch):
    many = launcher("many")
    with monkeypatch.context() as patch:
        patch.setenv("PATH", "/nowhere")
        with pytest.raises(StartError, match="no command 'sbatch' on this host: start the cluster where"):
            many.start(["many-1"])


KILLED = """
    import sys, os, signal
    from pathlib import Path
    from zmqsched import LocalCluster
    from zmqsched.clusterfile import BatchPart, NodeGroup
    from zmqsched.config import cluster_dir
    from zmqsched.launch.base import Site
    from zmqsched.launch.slurm import SlurmLauncher

    with LocalCluster(1, listen="127.0.0.1", name="doomed") as cluster:
        directory = cluster_dir(cluster.name)
        group = NodeGroup(name="many", slots=1, batch=BatchPart(array=True))
        SlurmLauncher(group, Site(directory / "connection.json", directory)).start(["many-1", "many-2"])
        os.kill(os.getpid(), signal.SIGKILL)
"""


def test_jobs_of_a_driver_that_was_killed_are_cancelled_from_the_records(slurm, tmp_path):
    slurm("scontrol", "update", "PartitionName=short", "State=DOWN")
    script = tmp_path / "killed.py"
    script.write_text(textwrap.dedent(KILLED))
    assert subprocess.run([sys.executable, script], check=False, timeout=60).returncode == -signal.SIGKILL
    assert len(slurm.jobs()) == 2
    (job,) = recorded_jobs("doomed")
    assert job.labels == ("many-1", "many-2")
    assert recorded_jobs("other") == []
    assert cancel_recorded("other") == []
    assert cancel_recorded("doomed") == [f"Slurm job {job.id}_0", f"Slurm job {job.id}_1"]
    assert slurm.jobs() == {}
    assert cancel_recorded("doomed") == []
    remove_cluster_dir("doomed")
    assert not shared_dir("jobs").exists()


def test_the_next_cluster_of_the_name_cancels_what_its_predecessor_left(slurm, tmp_path):
    slurm("scontrol", "update", "PartitionName=short", "State=DOWN")
    script = tmp_path / "killed.py"
    script.write_text(textwrap.dedent(KILLED))
    assert subprocess.run([sys.executable, script], check=False, timeout=60).returncode == -signal.SIGKILL
    before = slurm.jobs().keys()
    eventually(lambda: not is_held(cluster_dir("doomed")))
    with LocalCluster(1, listen="127.0.0.1", name="doomed") as cluster:
        directory = cluster_dir(cluster.name)
        next_one = SlurmLauncher(NodeGroup(name="many"), Site(directory / CONNECTION_FILE, directory))
        next_one.start(["many-1"])
        assert not before & slurm.jobs().keys()
        assert len(slurm.jobs()) == 1
        next_one.close()


def test_a_submission_that_was_recorded_but_not_answered_is_found_by_its_name(slurm):
    """The driver was killed between the submission and its record."""
    slurm("scontrol", "update", "PartitionName=short", "State=DOWN")
    directory = directory_of("doomed")
    make_private(directory)
    labels = ("many-1", "many-2")
    job = Job(
        launcher="slurm", cluster="doomed", host=this_host(), pid=1, name="zmqsched-abc123", labels=labels, array=True
    )  # fmt: skip
    Files(directory, job.name).write(job)
    number = slurm("sbatch", "--parsable", f"--job-name={job.name}", "--array=0-1", "--wrap=sleep 100")
    assert cancel_recorded("doomed") == [f"Slurm job {number}_0", f"Slurm job {number}_1"]
    assert slurm.jobs() == {}
    assert not shared_dir("jobs").exists()


def test_a_driver_that_is_killed_before_sbatch_has_answered_leaves_a_job_that_is_found(slurm, tmp_path):
    slurm("scontrol", "update", "PartitionName=short", "State=DOWN")
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.parent.mkdir()
    sbatch.write_text(f'#!/bin/sh\n{shutil.which("sbatch")} "$@" >/dev/null && kill -9 $PPID\n')
    sbatch.chmod(0o755)
    script = tmp_path / "killed.py"
    script.write_text(textwrap.dedent(KILLED))
    environment = {**os.environ, "PATH": f"{sbatch.parent}:{os.environ['PATH']}"}
    done = subprocess.run([sys.executable, script], check=False, timeout=60, env=environment)
    assert done.returncode == -signal.SIGKILL
    assert len(slurm.jobs()) == 2
    (job,) = recorded_jobs("doomed")
    assert job.id == ""
    eventually(lambda: not is_held(cluster_dir("doomed")))
    assert len(cancel_recorded("doomed")) == 2
    assert slurm.jobs() == {}
    remove_cluster_dir("doomed")
    assert not shared_dir("jobs").exists()


ALL_KILLED = """
    import os, signal
    from zmqsched import Cluster, config
    from zmqsched.clusterfile import BrokerPart, ClusterFile, NodeGroup

    config.NODE_ALONE_S = 6.0  # not a minute
    broker = BrokerPart(listen=("127.0.0.1",), journal=False)
    with Cluster(ClusterFile(name="doomed", broker=broker, nodes=(NodeGroup(launcher="slurm", slots=1),))) as cluster:
        cluster.wait_for_nodes(1, timeout=60)
        os.kill(os.getpid(), signal.SIGSTOP)
"""


def test_a_node_in_a_job_ends_by_itself_when_broker_and_driver_were_killed(slurm, tmp_path):
    script = tmp_path / "killed.py"
    script.write_text(textwrap.dedent(ALL_KILLED))
    with subprocess.Popen([sys.executable, script]) as driver:
        try:
            eventually(lambda: psutil.Process(driver.pid).status() == psutil.STATUS_STOPPED, JOIN_S)
            assert set(slurm.jobs().values()) == {"RUNNING"}
            os.kill(ConnectionFile.load(cluster_dir("doomed") / CONNECTION_FILE).pid, signal.SIGKILL)
        finally:
            driver.kill()
    eventually(lambda: slurm.jobs() == {}, JOIN_S)
    assert cancel_recorded("doomed") == []
    remove_cluster_dir("doomed")
    assert not shared_dir("jobs").exists()


SRUN = """
    import os, sys, time
    from zmqsched import Client

    with Client() as client:
        while len(client.nodes()) < 3:
            time.sleep(0.01)
        futures = [client.submit(lambda: time.sleep(0.3) or os.environ["SLURM_PROCID"]) for _ in range(6)]
        print(*sorted({future.result() for future in futures}), [node.slots for node in client.nodes()])
        sys.exit(int(sys.argv[1]))
"""


@pytest.mark.parametrize(("hosts", "code"), [(2, 0), (1, 5)])
def test_srun_makes_a_cluster_of_all_its_ranks_for_one_script(slurm, tmp_path, hosts, code):
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SRUN))
    words = ["srun", "--mpi=none", f"--nodes={hosts}", "--ntasks=3", "--kill-on-bad-exit=0"]
    done = subprocess.run(
        [*words, sys.executable, "-m", "zmqsched", "run", script, str(code)], capture_output=True, text=True, timeout=120,
        check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (code, "0 1 2 [1, 1, 1]\n"), done.stderr
    eventually(lambda: slurm.jobs() == {})
    assert not shared_dir("ranks").exists()


UP = """
    import time
    from zmqsched import Client

    with Client() as client:
        while len(client.nodes()) < 2:  # a rank that has not joined yet would wait for the first for a minute
            time.sleep(0.01)
        print("up", flush=True)
        time.sleep(1000)
"""


def test_when_the_first_rank_of_srun_is_killed_nothing_is_left(slurm, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(UP))
    words = ["srun", "--mpi=none", "--nodes=2", "--kill-on-bad-exit=0", sys.executable, "-m", "zmqsched", "run", script]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as srun:
        assert srun.stdout.readline() == "up\n"
        ranks = [pid for pid, words in processes_knowing(tmp_path).items() if "zmqsched run" in words]
        first = next(pid for pid in ranks if b"SLURM_PROCID=0\0" in Path(f"/proc/{pid}/environ").read_bytes())
        os.kill(first, signal.SIGKILL)
        srun.communicate(timeout=60)
        assert srun.returncode == 137
    eventually(lambda: slurm.jobs() == {})
    remove_left()


def test_a_slurm_cluster_says_why_its_nodes_are_not_there_and_scales_when_they_are(slurm):
    slurm("scontrol", "update", "PartitionName=short", "State=DOWN")
    with SlurmCluster(nodes=1, slots=1, time="10m", array=True, listen="127.0.0.1") as cluster:
        with pytest.raises(TimeoutError, match=r"0 of 1 node .*\n  slurm-1 \(Slurm job \d+\) pending: PD: PartitionDown"):
            cluster.wait_for_nodes(1, timeout=10)
        slurm("scontrol", "update", "PartitionName=short", "State=UP")
        cluster.wait_for_nodes(1, timeout=JOIN_S)
        with Client(cluster) as client:
            assert sum(client.map(abs, range(-10, 0))) == 55
        cluster.scale("slurm", 3)
        cluster.wait_for_nodes(3, timeout=JOIN_S)
        assert len(slurm.jobs()) >= 2
        cluster.scale("slurm", 1)
        eventually(lambda: len(slurm.jobs()) == 1, JOIN_S)
        eventually(lambda: {one.state for one in cluster.nodes()} == {"running"})  # squeue is asked every other second
        assert cluster.failures == []
    eventually(lambda: slurm.jobs() == {})


def test_what_only_nodes_in_the_queue_offer_waits_for_them_also_when_slurm_requeues_their_job(slurm):
    with SlurmCluster(slots=1, time="10m", tags=["of-slurm"], listen="127.0.0.1") as cluster, Client(cluster) as client:
        there = client.options(tags=["of-slurm"])
        cluster.wait_for_nodes(1, timeout=JOIN_S)
        assert there.submit(host).result(timeout=60)
        (job,) = slurm.jobs()
        slurm("scontrol", "requeue", job)
        eventually(lambda: {node.state for node in client.nodes()} <= {"gone", "lost"})  # "pending" may come first
        eventually(lambda: [one.state for one in cluster.nodes()] == ["pending"])
        waits = there.submit(host)
        with pytest.raises(TimeoutError):
            waits.result(timeout=8)  # longer than a wish is hopeless
        slurm.begin(job)
        assert waits.result(timeout=JOIN_S)
        assert cluster.failures == []


def test_what_sbatch_refuses_is_what_the_cluster_raises(slurm):
    with pytest.raises(StartError, match="invalid partition specified: nosuch"):
        SlurmCluster(nodes=1, partition="nosuch", listen="127.0.0.1")


def test_a_job_that_fails_is_told_to_who_waits_for_its_node(slurm):
    cluster = SlurmCluster(slots=1, listen="127.0.0.1", prologue=["echo no module gcc/99 >&2; exit 3"])
    told = r"no more can come:\n.*FAILED, exit code 3\n\s+no module gcc/99"
    with cluster, pytest.raises(StartError, match=told):
        cluster.wait_for_nodes(1, timeout=JOIN_S)


def test_a_cluster_says_that_somebody_has_cancelled_its_job(slurm, caplog):
    with SlurmCluster(slots=1, listen="127.0.0.1") as cluster:
        cluster.wait_for_nodes(1, timeout=JOIN_S)
        (job,) = slurm.jobs()
        slurm("scancel", job)
        (failure,) = eventually(lambda: cluster.failures)
        assert (failure.label, failure.where) == ("slurm-1", f"Slurm job {job}")
        assert failure.why.startswith("CANCELLED")
    assert f"node slurm-1 (Slurm job {job}) of cluster {cluster.name} ended: CANCELLED" in caplog.text


def test_a_node_leaves_before_slurm_ends_it_and_begins_nothing_that_it_could_not_finish(slurm, gate):
    """A minute is the shortest limit there is; the node is told of less."""
    sooner = ["export SLURM_JOB_END_TIME=$(($(date +%s) + 14))"]
    with ExitStack() as stack:
        cluster = stack.enter_context(SlurmCluster(slots=2, time="1m", listen="127.0.0.1", prologue=sooner))
        client = stack.enter_context(Client(cluster))
        stack.callback(gate.open)  # the client waits for its tasks, whatever happens here
        cluster.wait_for_nodes(1, timeout=JOIN_S)
        (first,) = slurm.jobs()
        too_long = client.options(timeout=100).submit(abs, -1)
        held = client.submit(gate.task, "held")
        gate.wait_until_begun()
        eventually(lambda: [one.state for one in cluster.nodes()] == ["ended"], JOIN_S)
        assert "JobState=COMPLETED" in slurm("scontrol", "show", "job", first)
        assert not too_long.done()
        too_long.cancel()
        cluster.scale("slurm", 1)
        eventually(lambda: gate.begun() == 2, JOIN_S)
        gate.open()
        assert held.result(timeout=60) == "held"
        assert cluster.failures == []


def zmqsched(*words: str, timeout_s: float = 90) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "zmqsched", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=timeout_s, stdin=subprocess.DEVNULL)


def test_a_cluster_on_slurm_from_the_command_line(slurm):
    words = ("-n", "2", "--nodes", "2", "--name", "lined", "--listen", "127.0.0.1", "--detach", "--wait")
    up = zmqsched("up", "--slurm", "--time", "10m", *words, "--", "--partition=short")
    assert up.returncode == 0, up.stderr
    try:
        assert "Partition=short" in slurm("scontrol", "show", "job", next(iter(slurm.jobs())))
        with Client("lined") as client:
            assert sum(client.map(abs, range(-10, 0))) == 55
        status = zmqsched("status", "lined")
        assert "slurm-1" in status.stdout
        assert "slurm-2" in status.stdout
    finally:
        down = zmqsched("down", "lined")
    assert down.returncode == 0, down.stderr
    eventually(lambda: slurm.jobs() == {})
    assert not shared_dir("jobs").exists()


def test_what_would_be_submitted_is_shown_and_nothing_is(slurm):
    shown = zmqsched("up", "--slurm", "--time", "1h", "-n", "4", "--dry-run", "--", "--qos=high").stdout
    assert "sbatch" in shown
    assert "--time=1:00:00" in shown
    assert "--qos=high" in shown
    assert slurm.jobs() == {}


EXAMPLES = Path(__file__).parents[2] / "examples"


def test_the_example_of_a_cluster_file_grows_with_what_is_queued_and_shrinks(slurm):
    wanted = ClusterFile.load(EXAMPLES / "cluster-slurm.toml")
    wanted = replace(wanted, broker=replace(wanted.broker, listen=("127.0.0.1",), journal=False))
    with Cluster(wanted) as cluster, Client(cluster) as client:
        cluster.wait_for_nodes(1, timeout=JOIN_S)
        (job,) = slurm.jobs()
        assert "Comment=zmqsched" in slurm("scontrol", "show", "job", "--oneliner", job)
        many = [client.submit(lambda: time.sleep(0.5) or os.environ.get("OMP_NUM_THREADS")) for _ in range(60)]
        eventually(lambda: len(slurm.jobs()) > 1, JOIN_S)
        assert {future.result(timeout=90) for future in many} == {"1"}
        cluster.adapt("small", 0, 1)
        eventually(lambda: len(slurm.jobs()) <= 1, 90)


def test_the_example_of_a_job_with_a_cluster_of_its_own(slurm, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SRUN).replace("< 3", "< 2"))
    slurm("sbatch", f"--output={tmp_path}/out", str(EXAMPLES / "srun.sh"), str(script), "0")
    eventually(lambda: slurm.jobs() == {}, JOIN_S)  # sbatch --wait asks ever more seldom
    assert (tmp_path / "out").read_text() == "0 1 [2, 2]\n"


def test_what_a_killed_up_has_left_in_the_queue_clean_cancels(slurm, monkeypatch, capsys):
    words = ("--slurm", "-n", "1", "--name", "lined", "--listen", "127.0.0.1", "--detach", "--no-journal")
    slurm("scontrol", "update", "PartitionName=short", "State=DOWN")
    up = zmqsched("up", *words)
    assert up.returncode == 0, up.stderr
    (job,) = slurm.jobs()
    broker = ConnectionFile.load(cluster_dir("lined") / CONNECTION_FILE).pid
    os.kill(psutil.Process(broker).ppid(), signal.SIGKILL)
    eventually(lambda: not is_held(cluster_dir("lined")))
    assert slurm.jobs().keys() == {job}
    monkeypatch.setattr(cleaning, "is_marked", lambda pid: False)  # what other tests' tasks have started is to be left alone
    assert main(["clean"]) == 0
    assert f"slurm {job}" in capsys.readouterr().out
    assert slurm.jobs() == {}
    assert not shared_dir("jobs").exists()
