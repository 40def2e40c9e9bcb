"""``zmqsched config``: the file it writes, and what it says of files."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from msgspec.structs import fields

from zmqsched.__main__ import main
from zmqsched.cli.config import TEMPLATE
from zmqsched.clusterfile import BatchPart, BrokerPart, ClusterFile, HeartbeatPart, NodeGroup, Scale, TasksPart


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def everything() -> str:
    """The file that init writes, with all that is commented out."""
    return re.sub(r"^# (?=\[\[|[a-z_]+ = )", "", TEMPLATE, flags=re.MULTILINE)


def test_what_init_writes_is_what_there_is_without_a_file(capsys):
    assert main(["config", "init"]) == 0
    assert capsys.readouterr().out == "wrote cluster.toml; start what it says: zmqsched up cluster.toml\n"
    assert ClusterFile.load("cluster.toml") == ClusterFile().checked()
    assert main(["config", "check", "cluster.toml"]) == 0
    assert re.search(r"^local +local +1 +one for each CPU +here$", capsys.readouterr().out, re.MULTILINE)


def test_all_that_is_commented_out_loads_too():
    Path("c.toml").write_text(everything())
    assert main(["config", "check", "c.toml"]) == 0
    assert [group.launcher for group in ClusterFile.load("c.toml").nodes] == ["local", "ssh", "slurm"]


def test_each_key_is_in_it_and_what_is_called_a_default_is_one():
    for part in (ClusterFile, BrokerPart, HeartbeatPart, TasksPart, NodeGroup, Scale, BatchPart):
        for field in fields(part):
            assert re.search(rf"\b{field.name}\b( =|\])", TEMPLATE), f"{part.__name__}.{field.name}"
    Path("c.toml").write_text(everything())
    file = ClusterFile.load("c.toml")
    assert (file.heartbeat, file.tasks, file.broker.policy) == (HeartbeatPart(), TasksPart(), BrokerPart().policy)


def test_init_overwrites_nothing(capsys):
    Path("c.toml").write_text("mine")
    assert main(["config", "init", "c.toml"]) == 1
    assert capsys.readouterr().err == "zmqsched: there is c.toml already: give another path, or remove it\n"
    assert Path("c.toml").read_text() == "mine"
    assert main(["config", "init", "no/such/c.toml"]) == 1
    assert capsys.readouterr().err == "zmqsched: cannot write no/such/c.toml: no such file or directory\n"


def test_check_says_all_that_is_wrong(capsys):
    Path("c.toml").write_text("name = 3\n[[nodes]]\nslots = 'x'\nsloots = 1\n")
    assert main(["config", "check", "c.toml"]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.splitlines() == [
        "zmqsched: c.toml: name: expected str, got int",
        "zmqsched: c.toml: nodes[0].slots: expected int, got str",
        "zmqsched: c.toml: nodes[0].sloots: no such key; did you mean `slots`?",
    ]


@pytest.mark.parametrize("command", [["config", "check"], ["up"], ["up", "--dry-run"], ["up", "--detach"]])
@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[[nodes]]\nlauncher = 'shh'\nname = 'a'", "nodes[0].launcher: there is no launcher 'shh'; did you mean 'ssh'?"),
        ("broker = {listen = ['*']}", "broker.listen[0]: *"),
        ("broker = {listen = ['127.0.0.1', '127.0.0.1:99999']}", "broker.listen[1]: 127.0.0.1:99999: the port must be"),
        ("nodes = [{launcher = 'ssh'}]", "nodes[0].hosts: the launcher ssh needs some"),
    ],
)
def test_what_cannot_be_started_is_said_before_anything_starts(command, text, says, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("ZMQSCHED_DIR", str(tmp_path / "z"))
    Path("c.toml").write_text(text)
    assert main([*command, "c.toml"]) == 1
    printed = capsys.readouterr()
    assert printed.err.startswith(f"zmqsched: c.toml: {says}")
    assert (printed.err.count("\n"), printed.out) == (1, "")


def test_check_for_programs(capsys):
    Path("c.toml").write_text(
        "name = 'lab'\n[[nodes]]\nlauncher = 'ssh'\nhosts = 'a[1-3]'\nslots = 4\nscale = {min = 1, max = 5}\n"
    )
    assert main(["config", "check", "c.toml", "-o", "json"]) == 0
    group = {"name": "ssh", "launcher": "ssh", "nodes": 1, "slots": 4, "hosts": ["a1", "a2", "a3"]}
    assert json.loads(capsys.readouterr().out) == {"name": "lab", "groups": [group]}
    assert main(["config", "check", "c.toml"]) == 0
    assert re.search(r"^ssh +ssh +1 to 5, now 1 +4 +a1, a2, a3$", capsys.readouterr().out, re.MULTILINE)
