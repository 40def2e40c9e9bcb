"""Nodes as launchers start them, one by one: what they are called, when they leave, how they care for their workers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from zmqsched import Client

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
            process.wait(20)


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
        [*ZMQSCHED, "node", "--connect=x", argument], capture_output=True, text=True, timeout=30, check=False
    )
    assert done.returncode == 2
    assert said in done.stderr
