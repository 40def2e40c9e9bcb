"""``zmqsched up`` for clusters that are not just here: from a file, over ssh, in jobs; what it says while they start."""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_batch import FakeBatch
from homes import Foreground, Home, eventually, new_home

from zmqsched.cli.progress import Progress
from zmqsched.cli.wanted import Options, of_options
from zmqsched.clusterfile import BatchPart, BrokerPart, ClusterFile, NodeGroup
from zmqsched.errors import ClusterFileError
from zmqsched.launch.base import Launched

pytestmark = pytest.mark.system


@pytest.fixture
def home() -> Iterator[Home]:
    with new_home() as home:
        yield home


@pytest.fixture
def tools(tmp_path: Path, home: Home) -> Path:
    """In front of PATH: an ssh that takes this machine for each host, and waits for "slow" while a file "slow" is here."""
    bin_ = tmp_path / "bin"
    bin_.mkdir()
    (bin_ / "ssh").write_text(f"""#!/bin/sh
for word; do host=$command; command=$word; done
if [ -e {tmp_path}/slow ] && [ "$host" = slow ]; then while [ -e {tmp_path}/slow ]; do sleep 0.1; done; fi
exec sh -c "$command"
""")
    (bin_ / "ssh").chmod(0o755)
    home.environment["PATH"] = f"{bin_}:{os.environ['PATH']}"
    return tmp_path


@pytest.fixture
def slurm(tmp_path: Path, home: Home) -> FakeBatch:
    fake = FakeBatch(tmp_path / "site", "slurm")
    home.environment["PATH"] = f"{fake.bin}:{os.environ['PATH']}"
    return fake


# A worker on each host, which is this one.
HERE = ("-n", "1", "--python", sys.executable, "--listen", "127.0.0.1", "--no-journal")


# What options ask for.


def sizes(options: Options) -> list[tuple[str, int, int]]:
    return [(group.name, group.size, group.slots) for group in of_options(options).nodes]


@pytest.mark.parametrize(
    ("options", "groups"),
    [
        (Options(workers=4), [("local", 1, 4)]),
        (Options(workers=4, nodes=2), [("local", 2, 2)]),
        (Options(workers=5, nodes=3), [("local", 1, 1), ("local-plus", 2, 2)]),
        (Options(ssh=("a", "b")), [("ssh", 2, 0)]),
        (Options(ssh=("a", "b"), workers=8), [("ssh", 2, 8)]),
        (Options(slurm=True, workers=64), [("slurm", 8, 8)]),
        (Options(slurm=True, workers=8), [("slurm", 1, 8)]),
        (Options(slurm=True, workers=9), [("slurm", 1, 4), ("slurm-plus", 1, 5)]),
        (Options(slurm=True, workers=64, nodes=4), [("slurm", 4, 16)]),
        (Options(slurm=True, nodes=3), [("slurm", 3, 0)]),
        (Options(slurm=True), [("slurm", 1, 0)]),
    ],
)
def test_how_workers_are_divided_among_nodes(options, groups):
    assert sizes(options) == groups


def test_options_of_nodes_reach_each_group():
    options = Options(workers=3, nodes=2, resources=(("gpu", 2.0),), tags=("t",), prologue=("a", "b"), python="/p")
    for group in of_options(options).nodes:
        assert (group.resources, group.tags, group.prologue, group.python) == ({"gpu": 2.0}, ("t",), ("a", "b"), "/p")
    [group] = of_options(Options(slurm=True, time=3600.0), ["-p", "short"]).nodes
    assert group.batch == BatchPart(time=3600.0, options=("-p", "short"))


def test_other_options_change_what_a_file_says():
    file = ClusterFile(name="a", broker=BrokerPart(policy="pack", journal="/j", max_queued=5), nodes=(NodeGroup(count=3),))
    assert of_options(Options(), file=file) == file.checked()
    broker = BrokerPart(policy="random", journal=False, max_queued=7, listen=("127.0.0.1",))
    changed = of_options(Options(name="b", policy="random", journal="", max_queued=7, listen="127.0.0.1"), file=file)
    assert changed == ClusterFile(name="b", broker=broker, nodes=file.nodes).checked()
    with pytest.raises(ClusterFileError, match="cannot name a cluster"):
        of_options(Options(name="a b"), file=file)


# What would be run.


def test_a_dry_run_shows_all_and_starts_nothing(home, tools):
    (tools / "c.toml").write_text("""
name = "lab"
broker = {port = 5700}
[[nodes]]
slots = 2
count = 2
[[nodes]]
launcher = "ssh"
hosts = "alpha,beta"
ssh_options = ["-p", "2222"]
[[nodes]]
launcher = "slurm"
slots = 4
batch = {nodes = 3, time = "1h", options = ["--qos=high"]}
""")
    shown = home.run("up", str(tools / "c.toml"), "--dry-run")
    assert shown.stderr == ""
    for words in (
        "# 2 nodes of group local, 2 workers on each", "--label=local-1 --slots=2", "--label=local-2 --slots=2",
        "# 2 nodes of group ssh, a worker for each CPU", " -p 2222 ", "-- alpha ", "-- beta ",
        "# 3 nodes of group slurm, 4 workers on each", "sbatch ", "--nodes=3", "--cpus-per-task=4", "--qos=high",
        "zmqsched broker --name=lab",
    ):  # fmt: skip
        assert words in shown.stdout
    home.assert_nothing_left()


# Clusters.


def said(up: Foreground, *words: str) -> str:
    """The next line on standard error that has these words."""
    assert up.process.stderr is not None
    for line in up.process.stderr:
        if all(word in line for word in words):
            return line
    raise AssertionError("it ended")


def test_a_file_in_the_foreground(home, tools):
    (tools / "c.toml").write_text(
        'name = "lab"\n[[nodes]]\nslots = 1\ncount = 2\ntags = ["fast"]\nenv = {COLOUR = "blue"}\n'
    )
    with home.up(str(tools / "c.toml")) as lab:
        assert lab.printed.startswith("cluster lab is up: 2 workers on 2 nodes\n")
        assert [node["tags"] for node in home.ask("status", "lab")["nodes"]] == [["fast"], ["fast"]]
        assert lab.end(signal.SIGINT) == (0, "cluster lab is stopped (SIGINT)\n", "")


def test_nothing_of_a_file_is_in_arguments_or_environments_of_who_runs_detached(home, tools):
    (tools / "c.toml").write_text('name = "lab"\n[[nodes]]\nslots = 1\nenv = {PASSWORD = "s3cret"}\n')
    home.run("up", str(tools / "c.toml"), "--detach")
    for pid, command in home.processes().items():
        assert "s3cret" not in command
        if " up " in command:
            assert b"s3cret" not in Path(f"/proc/{pid}/environ").read_bytes()
    source = "import os, zmqsched\nwith zmqsched.Client('lab') as c: print(c.submit(os.getenv, 'PASSWORD').result(60))"
    (tools / "ask.py").write_text(source)
    assert home.run_python(tools / "ask.py") == "s3cret"
    home.call("down", "lab")


def test_hosts_over_ssh(home, tools):
    up = (
        "up",
        "--ssh",
        "h[1-2]",
        "-n",
        "1",
        "--python",
        sys.executable,
        "--listen",
        "127.0.0.1",
        "--no-journal",
        "--detach",
    )
    assert "cluster default is up: 2 workers on 2 nodes\n" in home.run(*up).stdout
    assert home.compute("default") == "1024"
    assert {node["label"] for node in home.ask("status")["nodes"]} == {"ssh-1", "ssh-2"}
    assert home.call("scale", "ssh=3").startswith("group ssh of cluster default: 3 nodes from now on")
    home.call("wait", "3")
    home.run("down")


def test_the_host_that_is_waited_for_is_told_of(home, tools):
    (tools / "slow").touch()
    with home.start("up", "--ssh", "fast,slow", *HERE, until="") as up:
        assert said(up, "ssh-2 (slow)", "not ready yet").startswith("zmqsched: ssh-")
        (tools / "slow").unlink()
        assert said(up, "ssh-2 (slow)", "joined").startswith("zmqsched: ssh-")
        assert "is up: 2 workers on 2 nodes" in up.process.stdout.readline()
        assert up.end(signal.SIGINT)[0] == 0


def test_an_interrupt_while_a_host_is_waited_for(home, tools):
    (tools / "slow").touch()
    with home.start("up", "--ssh", "fast,slow", *HERE, until="") as up:
        assert said(up, "ssh-2 (slow)", "not ready yet").startswith("zmqsched: ssh-")
        assert up.end(signal.SIGINT)[0] == 130
        (tools / "slow").unlink()
        eventually(lambda: not home.processes())


def test_why_a_job_waits_is_told_and_down_cancels_it(home, slurm):
    slurm.hold("Resources")
    words = ("--slurm", "-n", "1", "--time", "10m", "--listen", "127.0.0.1", "--no-journal", "--", "-p", "short")
    with home.up(*words) as up:
        assert up.printed.startswith("cluster default is up: 0 nodes, 1 to come\n")
        assert re.fullmatch(r"zmqsched: slurm-1 \(\S.*\): pending: .*Resources.*\n", said(up, "slurm-1"))
        [coming] = home.ask("status")["coming"]
        assert (coming["label"], coming["state"]) == ("slurm-1", "pending")
        assert "Resources" in coming["why"]
        assert "Resources" in home.call("status")
        assert "Resources" in home.run("wait", "1", "--timeout", "0.2", code=1).stderr
        assert slurm.going()
        home.run("down")
        assert not slurm.going()
        assert up.end()[0] == 0


def test_with_wait_it_is_ready_when_the_job_has_begun(home, slurm):
    slurm.hold("Priority")
    words = ("--slurm", "-n", "1", "--listen", "127.0.0.1", "--no-journal", "--wait", "--python", sys.executable)
    with home.start("up", *words, until="") as up:
        assert said(up, "slurm-1", "Priority")
        slurm.release()
        assert up.process.stdout.readline() == "cluster default is up: 1 worker on 1 node\n"
        assert up.end(signal.SIGTERM)[0] == 0


def test_down_cancels_what_up_could_not(home, slurm):
    slurm.hold("Resources")
    words = ("--slurm", "-n", "1", "--listen", "127.0.0.1", "--no-journal")
    with home.up(*words) as up:
        os.kill(up.process.pid, signal.SIGSTOP)
        assert "cancelled Slurm job" in home.run("down").stdout
        assert not slurm.going()
        up.end()


@pytest.mark.parametrize("words", [("-n", "1"), ("--ssh", "a"), ("--slurm", "-n", "1")])
def test_a_directory_that_cannot_be_written(words, home):
    (home.path / "file").touch()
    try:
        for more in ((), ("--detach",)):
            said = home.fails("up", *words, *more, ZMQSCHED_DIR=str(home.path / "file" / "z"))
            assert "set ZMQSCHED_DIR to a directory of yours" in said
    finally:
        (home.path / "file").unlink()


# What is told while nodes start.


@pytest.fixture
def told(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    """What is told of such nodes."""
    now = [100.0]
    monkeypatch.setattr("zmqsched.cli.progress.time.monotonic", lambda: now[0])

    def told(*steps: tuple[float, list[Launched]]) -> list[str]:
        with Progress() as progress:
            for at, nodes in steps:
                now[0] = 100.0 + at
                progress.tell(nodes)
        return capfd.readouterr().err.splitlines()

    return told


def test_who_is_there_in_time_is_not_worth_a_line(told):
    starting, here = Launched("ssh-1", "starting", where="a"), Launched("ssh-1", "running", where="a", node="n1")
    assert told((0, [starting]), (2, [starting]), (9, [here])) == []


def test_each_thing_is_told_once_and_together(told):
    nodes = [Launched(f"slurm-{number}", "pending", "PD: Priority", f"1_{number}") for number in range(1, 7)]
    changed = [*nodes[:5], Launched("slurm-6", "pending", "PD: Resources", "1_6")]
    assert told((0, nodes), (1, nodes), (2, changed), (3, [Launched("slurm-6", "running", "", "1_6", "n1")])) == [
        "zmqsched: slurm-1 (1_1), slurm-2 (1_2), slurm-3 (1_3), slurm-4 (1_4) and 2 more: pending: PD: Priority",
        "zmqsched: slurm-6 (1_6): pending: PD: Resources",
        "zmqsched: slurm-6 (1_6): joined",
    ]


def test_of_who_is_cut_off_the_cluster_tells(told):
    here, cut = Launched("ssh-1", "running", "", "a", "n1"), Launched("ssh-1", "starting", "a: timed out", "a")
    assert told((0, [here]), (9, [cut]), (20, [here])) == []
