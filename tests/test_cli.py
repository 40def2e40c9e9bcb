"""The command line, with real processes. Each test has a directory of clusters of its own and leaves nothing behind."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import alive
from homes import PATIENCE_S, ZMQSCHED, Home, eventually, new_home, pid_of

from zmqsched.__main__ import main
from zmqsched.cluster import MAX_RESTARTS
from zmqsched.version import __version__

COMMANDS = [
    "up", "config", "ls", "status", "logs", "wait", "scale", "adapt", "drain", "pause", "resume", "retire", "down", "exec",
    "run", "doctor", "clean", "keys", "broker", "node",
]  # fmt: skip



@pytest.fixture
def home() -> Iterator[Home]:
    with new_home() as home:
        yield home


# Help and arguments: nothing is started.


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_help_lists_all_commands_in_the_order_of_need(arguments, capsys):
    assert main(arguments) == 0
    printed = capsys.readouterr().out.split("Commands:\n")[1]
    assert [line.split()[0] for line in printed.splitlines()] == COMMANDS


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_help(command, capsys):
    try:
        code = main([command, "--help"])
    except SystemExit as stop:  # argparse's way
        code = stop.code
    assert code == 0
    assert f"zmqsched {command}" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["broker", "node"])
def test_what_is_started_by_the_dozen_imports_no_click(command, home):
    source = f"import sys, zmqsched.__main__ as m\ntry: m.main([{command!r}, '--help'])\nexcept SystemExit: pass\n"
    source += "assert not {'click', 'rich'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", source], env=home.environment, stdout=subprocess.DEVNULL, check=True)


def test_the_installed_command(home):
    script = Path(sys.executable).with_name("zmqsched")
    done = subprocess.run([script, "--version"], env=home.environment, capture_output=True, text=True, check=True)
    assert done.stdout == f"zmqsched {__version__}\n"
    assert subprocess.run([script, "status"], env=home.environment, capture_output=True, check=False).returncode == 1


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("up -n 0", "0 is not between 1 and 10000"),
        ("up -n -1", "-1 is not between 1 and 10000"),
        ("up -n 1000000", "not between"),
        ("up -n many", "'many' is not a valid integer"),
        ("up --nodes 0", "0 is not between"),
        ("up -n 2 --nodes 3", "3 nodes need at least as many workers, not 2"),
        ("up --policy nonsense", "'nonsense' is not one of 'least-loaded'"),
        ("up --resource gpu", "'gpu' is not NAME=AMOUNT"),
        ("up --resource gpu=-1", "at least 0"),
        ("up --resource gpu=nan", "at least 0"),
        ("up --max-queued much", "'much' is not a size"),
        ("up --max-queued 0", "is not a size"),
        ("up --listen 0.0.0.0", "every interface"),
        ("up --listen 127.0.0.1:99999", "port"),
        ("up --listen no.such.host.invalid", "is not an address"),
        ("up --detach -n 0", "0 is not between"),
        ("up a.toml b.toml", "unexpected extra arguments (b.toml)"),
        ("up a.toml -n 2", "-n does not go with a file: a.toml says which nodes there are"),
        ("up a.toml --ssh h", "--ssh does not go with a file"),
        ("up a.toml --tag t", "--tag does not go with a file"),
        ("up --ssh h --slurm", "give --ssh or --slurm; for both write a file"),
        ("up --ssh h --nodes 2", "--nodes does not go with --ssh"),
        ("up --ssh gpu[1-", "'gpu[1-': brackets are written as in gpu[1-4]"),
        ("up --ssh -oProxyCommand=x", "cannot name a host"),
        ("up --ssh gpu[1-999999999]", "names 999999999 hosts; a list may name 10000"),
        ("up --time 1h", "--time goes with --slurm"),
        ("up --slurm --time 30", "'30' has no unit: write it as 90s, 30m, 1h or 2d"),
        ("up --slurm --time soon", "'soon' is not a duration"),
        ("up --slurm --time -1h", "'-1h' is not a duration"),
        ("up --slurm a.toml", "'a.toml' is neither an option nor behind a --"),
        ("up --slurm -n 2 --nodes 3", "3 nodes need at least as many workers, not 2"),
        ("up --listen *", "every interface"),
        ("ls -o xml", "'xml' is not one of"),
        ("down lab --all", "not both"),
        ("fly", "No such command 'fly'"),
    ],
)
def test_arguments_that_cannot_be(arguments, says, capsys):
    assert main(arguments.split()) == 2
    printed = capsys.readouterr()
    assert says in printed.err
    assert printed.out == ""


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["up", "--name", "a b"], "'a b' cannot name a cluster"),
        (["up", "--detach", "--name", "a b"], "'a b' cannot name a cluster"),
        (["status", "a b"], "'a b' cannot name a cluster"),
        (["down", "a b"], "'a b' cannot name a cluster"),
        (["status"], "no cluster named 'mine' runs here"),
        (["down"], "no cluster named 'mine' runs here"),
        (["status", "nope"], "no cluster named 'nope' runs here"),
        (["down", "nope"], "no cluster named 'nope' runs here"),
        (["status", "/nowhere/x.json"], "there is no connection file /nowhere/x.json"),
        (["down", "/nowhere/x.json"], "there is no connection file /nowhere/x.json"),
    ],
)
def test_a_cluster_that_is_not_there(arguments, says, home, monkeypatch, capsys):
    monkeypatch.setenv("ZMQSCHED_DIR", str(home.path))
    monkeypatch.setenv("ZMQSCHED_CLUSTER", "mine")
    assert main(arguments) == 1
    printed = capsys.readouterr()
    assert says in printed.err
    assert printed.err.startswith("zmqsched: ")
    assert (printed.err.count("\n"), printed.out) == (1, "")


def test_the_default_cluster_is_not_there(home):
    assert "no cluster named 'default' runs here" in home.fails("status")


def test_no_cluster_is_no_error_for_those_that_take_all(home):
    assert "start one: zmqsched up" in home.run("ls").stderr
    assert home.ask("ls") == []
    assert "no cluster is running" in home.call("down", "--all")


def test_a_reader_that_has_seen_enough(home):
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [*ZMQSCHED, "--help"], env=home.environment, stdout=write, stderr=subprocess.PIPE, check=False, text=True
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (1, "")


# In the foreground.


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_up_says_how_to_use_it_and_ends_at_a_signal(number, home):
    with home.up("-n", "2", "--name", "lab") as lab:
        assert lab.printed.splitlines() == [
            "cluster lab is up: 2 workers on 1 node",
            '  use it:    zmqsched.Client("lab")',
            "  stop it:   zmqsched down lab",
        ]
        assert lab.end(number) == (0, f"cluster lab is stopped ({number.name})\n", "")
        home.assert_nothing_left()


def test_status_and_ls_of_a_cluster(home):
    with home.up("-n", "3", "--nodes", "2", "--policy", "pack", "--resource", "disk=2", "--tag", "fast") as lab:
        assert home.compute("default") == "1024"
        status = home.ask("status")
        assert (status["name"], status["policy"], status["counts"]["ok"]) == ("default", "pack", 1)
        assert sorted(node["slots"] for node in status["nodes"]) == [1, 2]
        assert {(node["resources"]["disk"], *node["tags"]) for node in status["nodes"]} == {(2.0, "fast")}
        assert len(status["workers"]) == 3
        assert not any(status["tasks"].values())

        table = home.call("status", "default")
        assert "cluster default: policy pack, 0 clients" in table
        assert "disk=2 fast" in table
        assert "1 ok" in table
        assert all(line == line.rstrip() for line in table.splitlines())

        [record] = home.ask("ls")
        assert (record["name"], record["workers"], record["pid"]) == ("default", 3, pid_of(home, "zmqsched broker"))
        assert record["work"] == [f"ipc://{home.path}/default/work"]
        heads, row = home.call("ls").splitlines()
        assert heads.split() == ["name", "host", "broker", "pid", "since", "where", "nodes", "workers"]
        assert [*row.split()[:3], *row.split()[-6:]] == [
            "default", record["host"], str(record["pid"]), "ipc", "1", "local,", "1", "local-plus", "3",
        ]  # fmt: skip
        assert record["groups"] == {"local": 1, "local-plus": 1}

        home.run("down")
        home.assert_nothing_left()
        assert lab.end() == (0, "cluster default is stopped (zmqsched down)\n", "")


def test_a_name_is_taken_once(home):
    with home.up("-n", "1", "--name", "lab") as lab:
        assert "a cluster named 'lab' is running already" in home.fails("up", "--name", "lab")
        assert "a cluster named 'lab' is running already" in home.fails("up", "--name", "lab", "--detach")
        assert home.run("down", ZMQSCHED_CLUSTER="lab").stdout == "cluster lab is stopped\n"
        assert lab.end()[0] == 0


def test_up_killed_outright_leaves_no_process(home):
    with home.up("-n", "2", "--nodes", "2") as lab:
        assert len(home.ask("status")["workers"]) == 2
        eventually(lambda: len(home.processes()) == 8)  # up, the broker, and twice a node, its nursery and its worker
        lab.process.kill()
        eventually(lambda: not home.processes())
        home.assert_nothing_left()


def test_up_says_that_a_node_died(home):
    with home.up("-n", "2", "--nodes", "2") as lab:
        victim = home.ask("status")["nodes"][0]["pid"]
        os.kill(victim, signal.SIGKILL)
        words = lab.process.stderr.readline()
        assert re.fullmatch(r"zmqsched: node local-[12] of cluster default ended: killed by SIGKILL \(1 left\)\n", words)
        assert lab.end(signal.SIGINT) == (0, "cluster default is stopped (SIGINT)\n", "")


def test_up_follows_a_broker_that_dies_but_not_one_that_keeps_dying(home):
    with home.up("-n", "1", "--no-journal") as lab:
        for _ in range(MAX_RESTARTS + 1):
            # Its file may still be that of the broker before.
            found: list[dict[str, Any]] = []
            eventually(lambda found=found: found or found.extend(r for r in home.ask("ls") if alive(r["pid"])))
            os.kill(found[0]["pid"], signal.SIGKILL)
            eventually(lambda found=found: not alive(found[0]["pid"]))
        code, _, err = lab.end()
        assert code == 1
        assert "the broker of cluster default died (killed by SIGKILL, the 6th within 60 s); the cluster is gone" in err
        home.assert_nothing_left()


def test_an_interrupt_while_it_starts(home):
    with home.start("up", "-n", "2", until="") as lab:
        eventually(lambda: any("zmqsched broker" in command for command in home.processes().values()))
        code, _, err = lab.end(signal.SIGINT)
        assert code in (0, 130)
        assert err.strip() == ""  # click ends the line after the terminal's ^C
        home.assert_nothing_left()


@pytest.mark.parametrize("detach", [[], ["--detach"]])
def test_an_address_that_cannot_be_had(detach, home):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        assert f"cannot listen at tcp://{address}" in home.fails("up", "-n", "1", "--listen", address, *detach)
        home.assert_nothing_left()


# In the background.


def test_detached_it_can_be_used_by_others_until_it_is_told(home):
    done = home.run("up", "-n", "2", "--name", "lab", "--detach", "--max-queued", "600K", "--listen")
    assert "cluster lab is up: 2 workers on 1 node" in done.stdout
    log = home.path / ".lab.log"
    assert f"log:       {log}" in done.stdout
    assert stat.S_IMODE(log.stat().st_mode) == 0o600
    starter = pid_of(home, "zmqsched up")
    assert os.getsid(starter) == starter  # no signal and no end of a terminal reaches it
    assert {os.readlink(f"/proc/{starter}/fd/{fd}") for fd in range(3)} == {"/dev/null", str(log)}

    [record] = home.ask("ls")
    assert (record["name"], record["workers"]) == ("lab", 2)
    assert record["work"][0].startswith("tcp://127.0.0.1:")
    assert home.compute("lab") == "1024"
    assert home.ask("status", record["file"])["counts"]["ok"] == 1

    pids = home.processes()
    assert [command for command in pids.values() if "zmqsched broker" in command and "--max-queued=614400 " in command]
    assert home.run("down", "lab").stdout == "cluster lab is stopped\n"
    assert not any(map(alive, pids))
    home.assert_nothing_left()


def test_down_all(home):
    with home.up("-n", "1", "--name", "a") as a, home.up("-n", "1", "--name", "b") as b:
        assert home.call("down", "--all") == "cluster a is stopped\ncluster b is stopped\n"
        assert (a.end()[0], b.end()[0]) == (0, 0)
    home.assert_nothing_left()


def test_the_log_of_one_that_was_killed_outright_goes_with_the_next_down(home):
    home.run("up", "-n", "1", "--detach")
    os.kill(pid_of(home, "zmqsched up"), signal.SIGKILL)
    eventually(lambda: not home.processes())
    home.fails("down")
    home.assert_nothing_left()


def test_a_broker_that_does_not_react(home, monkeypatch):
    home.run("up", "-n", "1", "--detach")
    os.kill(pid_of(home, "zmqsched broker"), signal.SIGSTOP)
    monkeypatch.setattr("zmqsched.cli.look.ANSWER_TIMEOUT_S", 0.2)
    assert "no answer" in home.call("ls")
    monkeypatch.setattr("zmqsched.stopping.ASK_TIMEOUT_S", 0.2)
    home.call("down")
    assert home.processes() == {}
    journal = ".journals/default.journal"  # nobody knows what is in it, so the next broker is to have it
    assert home.files() == {".journals", journal, f"{journal}-wal", f"{journal}.key"}
    home.run("up", "-n", "1", "--detach")
    home.call("down")
    home.assert_nothing_left()


def test_down_spares_the_program_that_started_the_cluster(home):
    source = "import zmqsched\ncluster = zmqsched.LocalCluster(1, name='nb')\nprint(flush=True)\nprint(input())"
    with subprocess.Popen(
        [sys.executable, "-c", source], env=home.environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as program:
        program.stdout.readline()
        home.call("down", "nb")
        assert home.files() == set()
        assert list(home.processes()) == [program.pid]
        assert program.communicate("still here\n", timeout=PATIENCE_S)[0] == "still here\n"


# By hand.


def test_a_broker_and_a_node_by_hand(home):
    file = home.path / "lab" / "connection.json"
    with (
        home.start("broker", "--name", "lab", "--listen", "--ready-fd", "1", until="pid") as broker,
        home.start("node", "--connect", str(file), "-n", "1", "--ready-fd", "1", until="pid") as node,
    ):
        assert home.compute(str(file)) == "1024"
        home.call("down", str(file))
        assert (broker.end()[0], node.end()[0]) == (0, 0)
        home.assert_nothing_left()


def test_a_node_with_a_wrong_key_is_told_so(home):
    file = home.path / "lab" / "connection.json"
    with home.start("broker", "--name", "lab", "--listen", "--ready-fd", "1", until="pid") as broker:
        right = json.loads(file.read_text()) | {"network": "elsewhere"}
        wrong = {
            "stranger": {"client_secret": right["server_key"]},  # any 32 bytes are a key
            "stale": {"server_key": right["client_public"]},
        }
        with contextlib.ExitStack() as stack:
            nodes = []
            for name, keys in wrong.items():
                copy = home.path / f"{name}.json"
                copy.touch(0o600)
                copy.write_text(json.dumps(right | keys))
                nodes.append(stack.enter_context(home.start("node", "--connect", str(copy), "-n", "1", until="")))
            for node in nodes:
                code, _, err = node.end()
                assert (code, err.count("\n")) == (1, 1)
                assert "does not know this side's key" in err or "server key mismatch" in err
        for name in wrong:
            (home.path / f"{name}.json").unlink()
        assert broker.end(signal.SIGTERM)[0] == 0


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda path: None, "there is no connection file"),
        (lambda path: path.touch(0o600), "is empty"),
        (lambda path: path.touch(0o644), "open to other users"),
        (lambda path: (path.touch(0o600), path.write_text("{")), "is not JSON"),
        (lambda path: path.mkdir(), "is not a regular file"),
        (lambda path: path.symlink_to("/dev/null"), "is a symlink"),
    ],
    ids=["missing", "empty", "readable by others", "damaged", "directory", "symlink"],
)
def test_a_node_whose_file_is_not_good(make, says, home):
    path = home.path / "x.json"
    make(path)
    assert says in home.fails("node", "--connect", str(path))
    if path.is_dir():
        path.rmdir()
    path.unlink(missing_ok=True)
