"""Commands for the nodes of a cluster that runs, with real processes."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from homes import PATIENCE_S, Home, eventually, new_home

from zmqsched import Client
from zmqsched.__main__ import main
from zmqsched.cli import look
from zmqsched.cli.logs import _Tail
from zmqsched.launch.output import MAX_LOG, Log
from zmqsched.records import NodeInfo, NodeList, Status, WorkerList

pytestmark = pytest.mark.system

TWO_NODES = """
name = "lab"
[[nodes]]
name = "a"
slots = 1
count = 2
[[nodes]]
name = "b"
slots = 1
scale = {max = 2}
"""


@pytest.fixture
def home() -> Iterator[Home]:
    with new_home() as home:
        yield home


@pytest.fixture
def lab(home: Home) -> Iterator[Home]:
    """A cluster of two nodes, a-1 and a-2, and a group that is empty."""
    (home.path / "c.toml").write_text(TWO_NODES)
    home.run("up", "c.toml", "--detach")
    (home.path / "c.toml").unlink()
    home.environment["ZMQSCHED_CLUSTER"] = "lab"
    yield home
    if home.processes():
        home.call("down")


def states(lab: Home) -> dict[str, str]:
    return {node["label"]: node["state"] for node in lab.ask("status")["nodes"]}


def test_nodes_are_paused_resumed_drained_and_retired(lab):
    assert lab.call("wait", "2") == "2 nodes there\n"
    assert lab.call("pause", "a-1", "a-2") == "node a-1 is paused\nnode a-2 is paused\n"
    eventually(lambda: states(lab) == {"a-1": "paused", "a-2": "paused"})
    ids = {node["label"]: node["id"] for node in lab.ask("status")["nodes"]}
    assert lab.call("resume", "a-1", ids["a-2"]) == f"node a-1 takes tasks\nnode {ids['a-2']} takes tasks\n"
    eventually(lambda: states(lab) == {"a-1": "alive", "a-2": "alive"})
    assert lab.compute("lab") == "1024"
    assert lab.call("drain", "a-1") == "node a-1 drains\nnode a-1 has left\n"
    assert lab.call("retire", "a-2", "--grace", "0") == "node a-2 retires\nnode a-2 has left\n"
    assert states(lab) == {"a-1": "gone", "a-2": "gone"}


def exists(path: str) -> None:
    while not os.path.exists(path):
        time.sleep(0.02)


def test_a_drain_lasts_until_the_tasks_have_ended_and_says_how_many_there_are(lab, tmp_path):
    with Client(lab.path / "lab" / "connection.json") as client:
        future = client.submit(exists, str(tmp_path / "gate"))
        eventually(future.running)
        (busy,) = [node.label for node in client.nodes() if node.assigned]
        late = f"zmqsched: node {busy} has not left after 0.1 s, and drains on: 1 task to finish\n"
        done = lab.run("drain", busy, "--timeout", "0.1", code=1)
        assert (done.stdout, done.stderr) == (f"node {busy} drains\n", late)
        assert lab.call("drain", busy, "--no-wait") == f"node {busy} drains\n"
        terminal, inside = os.openpty()
        words = [sys.executable, "-m", "zmqsched", "drain", busy]
        with (
            os.fdopen(terminal, "rb", buffering=0) as screen,
            subprocess.Popen(words, env=lab.environment, stdout=subprocess.PIPE, stderr=inside, text=True) as drain,
        ):
            os.close(inside)
            shown = b""
            while b"1 task to finish" not in shown:
                shown += screen.read(4096)
            assert not future.done()
            (tmp_path / "gate").touch()
            out, _ = drain.communicate(timeout=PATIENCE_S)
        assert (drain.returncode, out) == (0, f"node {busy} drains\nnode {busy} has left\n")
        future.result(timeout=PATIENCE_S)


def test_a_node_that_is_lost_while_it_drains_has_not_left_in_order(lab, tmp_path):
    with Client(lab.path / "lab" / "connection.json") as client:
        future = client.submit(exists, str(tmp_path / "gate"))
        eventually(future.running)
        (busy,) = [node for node in client.nodes() if node.assigned]
        with lab.start("drain", busy.id, until="drains") as drain:
            os.kill(busy.pid, signal.SIGKILL)
            code, _, err = drain.end()
        assert code == 1
        assert err == f"zmqsched: node {busy.id} was lost before it left: what it had not finished runs elsewhere\n"
        (tmp_path / "gate").touch()
        future.result(timeout=PATIENCE_S)


def test_of_several_nodes_each_that_cannot_be_is_told_of(lab):
    for command in ("pause", "resume", "drain"):
        done = lab.run(command, "nope", "a-1", "c-9", code=1)
        assert done.stdout.startswith("node a-1 ")
        first, second = done.stderr.splitlines()
        assert first.startswith("zmqsched: there is no node 'nope'")
        assert second.startswith("zmqsched: there is no node 'c-9'")


def test_scale_and_wait(lab):
    lab.call("wait", "2")
    assert lab.call("scale", "a=3").startswith("group a of cluster lab: 3 nodes from now on (now: 2 running, 1 ")
    assert lab.call("wait", "3", "--timeout", "60s") == "3 nodes there\n"
    [record] = lab.ask("ls")
    assert record["groups"] == {"a": 3}
    assert re.search(r" 3 a +\d$", lab.call("ls"), re.MULTILINE)
    asked: Any = lab.ask("scale", "a=1", "lab")
    assert (asked["cluster"], asked["group"], asked["n"]) == ("lab", "a", 1)
    eventually(lambda: list(states(lab).values()).count("alive") == 1)
    assert states(lab)["a-1"] == "alive"  # of equals the latest go first


def test_adapt(lab):
    assert lab.call("adapt", "b=1:2").startswith("group b of cluster lab: 1 to 2 nodes from now on (now: ")
    assert lab.call("scale", "b=1").startswith("group b of cluster lab: 1 node from now on (now: ")
    assert lab.call("wait", "3") == "3 nodes there\n"
    assert set(states(lab)) == {"a-1", "a-2", "b-1"}
    assert lab.ask("adapt", "b=0:1")["max"] == 1


def test_what_the_cluster_has_not(lab):
    says = {
        "wait 3 --timeout 0.3": "zmqsched: 2 of 3 nodes there after 0.3 s\n",
        "scale c=3": "there is no group of nodes 'c'; there are a, b",
        "scale a=10001": "n is a number of nodes from 0 to 10000, not 10001",
        "adapt a=3:2": "max is a number of nodes from 3 to 10000, not 2",
        "adapt c=1:2": "there is no group of nodes 'c'",
        "logs nope": "no node 'nope' of cluster 'lab' was started here; there are a-1, a-2",
    }
    for command, words in says.items():
        assert words in lab.fails(*command.split())


COMMANDS = ["scale a=1", "adapt a=1:2", "drain a-1", "pause a-1", "resume a-1", "retire a-1", "wait 1", "logs"]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_cluster_that_is_not_there(command, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("ZMQSCHED_DIR", str(tmp_path / "z"))
    words = command.split()
    words += ["nope"] if words[0] in ("scale", "adapt", "wait") else ["--name", "nope"]
    assert main(words) == 1
    printed = capsys.readouterr()
    assert "no cluster named 'nope' runs here" in printed.err
    assert (printed.err.count("\n"), printed.out) == (1, "")


def test_a_cluster_whose_nodes_nobody_holds(home):
    with home.start("broker", "--name", "alone", "--ready-fd=1", until="pid") as broker:
        for command in ("scale a=1 alone", "adapt a=1:2 alone", "logs --name alone"):
            assert "no process on this host holds its nodes" in home.fails(*command.split())
        assert home.fails("wait", "1", "alone", "--timeout", "0.2") == "zmqsched: 0 of 1 node there after 0.2 s\n"
        broker.end(signal.SIGTERM)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("scale", "Missing argument 'GROUP=N'"),
        ("scale a", "'a' is not GROUP=N, as in ssh=16"),
        ("scale a=-1", "'a=-1' is not GROUP=N"),
        ("scale a=many", "'a=many' is not GROUP=N"),
        ("scale a=1:2", "is not GROUP=N"),
        ("adapt a=3", "'a=3' is not GROUP=MIN:MAX, as in ssh=0:16"),
        ("adapt a=1:", "is not GROUP=MIN:MAX"),
        ("drain", "Missing argument 'NODE...'"),
        ("drain a-1 --no-wait --timeout 1", "--timeout does not go with --no-wait"),
        ("drain a-1 --timeout soon", "'soon' is not a duration"),
        ("retire a-1 --grace soon", "'soon' is not a duration"),
        ("retire a-1 --grace nan", "must be a finite number of seconds"),
        ("retire a-1 --grace=-1", "must be a finite number of seconds"),
        ("wait", "Missing argument 'N'"),
        ("wait -- -1", "-1 is not in the range"),
        ("wait 1 --timeout inf", "must be a finite number of seconds"),
    ],
)
def test_arguments_that_cannot_be(arguments, says, capsys):
    assert main(arguments.split()) == 2
    assert says in capsys.readouterr().err


# What nodes say.


def write(lab: Home, label: str, text: str) -> None:
    (lab.path / "lab" / "logs" / f"{label}.log").write_text(text)


def test_logs_of_one_node_and_of_all(lab):
    (lab.path / "lab" / "logs").mkdir(exist_ok=True)
    write(lab, "a-1", "one\ntwo\n")
    write(lab, "a-2", "three\n")
    write(lab, "a-2", "four\n")
    (lab.path / "lab" / "logs" / "a-2.log").rename(lab.path / "lab" / "logs" / "a-2.log.1")
    write(lab, "a-2", "five\n")
    ids = {node["label"]: node["id"] for node in lab.ask("status")["nodes"]}
    assert lab.call("logs", "a-1") == lab.call("logs", ids["a-1"]) == "one\ntwo\n"
    assert lab.call("logs", "a-2", "--name", "lab") == "four\nfive\n"
    assert lab.call("logs") == "a-1: one\na-1: two\na-2: four\na-2: five\n"


def test_what_a_node_has_said_while_it_started_is_in_its_log(home):
    (home.path / "c.toml").write_text('[[nodes]]\nslots = 1\nprologue = ["echo hello >&2"]\n')
    home.run("up", "c.toml", "--detach")
    (home.path / "c.toml").unlink()
    eventually(lambda: home.call("logs", "local-1") == "hello\n")
    assert home.call("logs") == "local-1: hello\n"
    home.call("scale", "local=0")
    eventually(lambda: [node["state"] for node in home.ask("status")["nodes"]] == ["gone"])
    assert home.call("logs", "local-1") == "hello\n"
    home.call("down")


def test_logs_are_followed_across_their_turns_until_the_cluster_ends(lab):
    (lab.path / "lab" / "logs").mkdir(exist_ok=True)
    log = Log(lab.path / "lab" / "logs" / "a-1.log")
    log.write(b"begin\n")
    with lab.start("logs", "-f", "a-1", until="begin") as follower:
        assert follower.process.stdout is not None
        line = "x" * 200_000
        for number in range(3 * MAX_LOG // 200_000):  # turns more than once; the reader is waited for
            log.write(f"{number} {line}\n".encode())
            assert follower.process.stdout.readline() == f"{number} {line}\n"
        assert Path(lab.path / "lab" / "logs" / "a-1.log.2").exists()
        log.write(b"the end\n")
        lab.run("down")
        code, out, err = follower.end()
        assert (code, out, err) == (0, "the end\n", "")
    log.close()


@pytest.mark.parametrize(("full", "missed"), [(1, 0), (2, 0), (3, 1), (5, 3)])
def test_what_a_follower_has_missed_is_said(tmp_path, capsys, full, missed):
    log, line = Log(tmp_path / "a.log"), b"x" * (MAX_LOG - 6)
    tail = _Tail(tmp_path / "a.log", "")
    log.write(b"begin\n")
    tail.copy()
    for number in range(full):  # each into a file of its own
        log.write(b"%d %s\n" % (number, line))
    log.close()
    tail.copy()
    tail.copy()
    os.close(tail._file)
    told = ["", f"zmqsched: up to {missed * MAX_LOG} bytes came too fast to be shown"] if missed else []
    shown = [f"{number} {line.decode()}" for number in range(missed, full)]
    assert capsys.readouterr().out.splitlines() == ["begin", *told, *shown]


def test_an_interrupt_ends_logs(lab):
    with lab.start("logs", "-f", until="") as follower:
        eventually(lambda: Path(f"/proc/{follower.process.pid}/wchan").exists() and b"logs" in cmdline(follower.process.pid))
        wait_for_pidfd(follower.process.pid)
        code, out, err = follower.end(signal.SIGINT)
        assert (code, out, err.strip()) == (130, "", "")


def cmdline(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()


def wait_for_pidfd(pid: int) -> None:
    """Until it watches the process that holds the cluster."""

    def watches() -> bool:
        for link in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(FileNotFoundError):  # closed since it was listed
                if os.readlink(link) == "anon_inode:[pidfd]":
                    return True
        return False

    until = time.monotonic() + PATIENCE_S
    while not watches():
        assert time.monotonic() < until
        time.sleep(0.02)


# Nodes that were asked for and are not there.


def test_status_says_who_is_to_come_and_why(home):
    tools = home.path / "tools"
    tools.mkdir()
    (tools / "c.toml").write_text(
        '[[nodes]]\nslots = 1\n[[nodes]]\nname = "bad"\nprologue = ["echo no licence >&2", "exit 3"]\n'
    )
    done = home.run("up", str(tools / "c.toml"), "--detach")
    assert "cluster default is up: 1 worker on 1 node\n" in done.stdout
    assert "no licence" in done.stderr
    [bad] = home.ask("status")["coming"]
    assert (bad["label"], bad["state"]) == ("bad-1", "ended")
    assert "no licence" in bad["why"]
    assert re.search(r"^bad-1 +ended .*no licence", home.call("status"), re.MULTILINE)
    assert "no licence" in home.run("wait", "2", code=1).stderr
    home.call("down")
    (tools / "c.toml").unlink()
    tools.rmdir()


def test_ls_says_how_many_of_each_group_and_when_the_first_has_to_leave():
    def node(label: str, state: str = "alive", leaves_in_s: float = 0.0) -> NodeInfo:
        return NodeInfo("n", "h", 1, "3.11", state, 1, 0, 0, {}, {}, (), 0.0, label, leaves_in_s)

    def shown(*nodes: NodeInfo) -> str:
        return look._nodes(Status("lab", "pack", 0, NodeList(nodes), WorkerList(), {}, {}, []))

    assert shown() == "none"
    assert shown(node("")) == "1"
    assert shown(node("a-b-1"), node("a-b-2", "paused"), node("a-b-3", "gone")) == "2 a-b"
    assert shown(node("a-1"), node("s-1", "alive", 600.4), node("s-2", "draining", 60.2)) == "1 a, 2 s, 60 s left"
    assert look._nodes(None) == ""
