"""Any of our processes are killed outright, in any order; whoever started the cluster is the last of them at the latest.
Within ten seconds, or half a minute on a machine that does other things too, none of our processes runs, and none that a
task has started, whatever it did to be on its own.

Node and nursery watch each other. Where both are to die, the second dies only when the first was seen to be dead: killed
within the same few milliseconds, nobody is left who knows what their tasks have started.

``LONG=1`` tries all orders of two and of three; without it, some.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from random import Random

import psutil
import pytest
from conftest import Home, alive, eventually

from zmqsched.config import CONNECTION_FILE

WITHIN_S = 30.0
GUARDS = {"node", "nursery"}
VICTIMS = ("client", "broker", "node", "launcher", "nursery", "worker")
ORDERS = [order for number in (2, 3) for order in itertools.permutations(VICTIMS, number)]
CASES = [(launcher, order) for launcher in ("program", "up") for order in ORDERS]
SOME = 8

PROGRAM = """
import signal
from zmqsched import LocalCluster
with LocalCluster(n_workers=1, name="doomed"):
    print("up", flush=True)
    signal.pause()
"""

CLIENT = """
import sys
from zmqsched import Client

def has_a_family(path):
    import json, os, subprocess, time
    sleep = ["sleep", "600"]
    child = subprocess.Popen(sleep).pid
    session = subprocess.Popen(sleep, start_new_session=True, env={}).pid
    script = "setsid sh -c 'echo $$; exec >&-; exec sleep 600' &"
    daemon = int(subprocess.run(["/bin/sh", "-c", script], stdout=subprocess.PIPE, env={}).stdout)
    with open(path + ".part", "w") as file:
        json.dump([os.getpid(), child, session, daemon], file)
    os.rename(path + ".part", path)
    while True:
        time.sleep(60)

Client("doomed").submit(has_a_family, sys.argv[1]).result()
"""


class Doomed:
    """A cluster with one worker, whose task has a child, a child with a session of its own, and a daemon."""

    def __init__(self) -> None:
        self.home = Home()
        self.pids: dict[str, int] = {}
        self.family: list[int] = []
        self._started: list[subprocess.Popen[str]] = []
        self._environment = {k: v for k, v in os.environ.items() if not k.startswith("ZMQSCHED_")}
        self._environment["ZMQSCHED_DIR"] = str(self.home.path)

    def begin(self, launcher: str, path: Path) -> None:
        """``path`` is where the task says whom it has started."""
        starts = ["-c", PROGRAM] if launcher == "program" else ["-m", "zmqsched", "up", "-n1", "--name=doomed"]
        first = self._start(starts, stdout=subprocess.PIPE)
        assert first.stdout is not None
        first.stdout.readline()
        client = self._start(["-c", CLIENT, str(path)])
        eventually(path.exists)
        worker, *self.family = json.loads(path.read_text())
        nursery = psutil.Process(worker).ppid()
        self.pids = {
            "launcher": first.pid,
            "client": client.pid,
            "broker": json.loads((self.home.path / "doomed" / CONNECTION_FILE).read_text())["pid"],
            "node": psutil.Process(nursery).ppid(),
            "nursery": nursery,
            "worker": worker,
        }

    def kill(self, *order: str) -> None:
        for number, victim in enumerate(order):
            if victim in GUARDS and GUARDS.intersection(order[:number]):
                eventually(lambda: not alive(self.pids["node"]) and not alive(self.pids["nursery"]), WITHIN_S)
            with contextlib.suppress(ProcessLookupError):  # the death of another has ended it
                os.kill(self.pids[victim], signal.SIGKILL)

    def living(self) -> dict[int, str]:
        """Processes that are not to be left, by pid. The client is the user's own program."""
        family = {pid: "of the task" for pid in self.family if alive(pid)}
        ours = {pid: what for pid, what in self.home.processes().items() if pid != self.pids.get("client") and alive(pid)}
        return {**family, **ours}

    def end(self) -> None:
        for pid in self.living():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for process in self._started:
            with process:
                process.kill()
        self.home.remove()

    def _start(self, words: list[str], **how: int) -> subprocess.Popen[str]:
        command = [sys.executable, *words]
        process = subprocess.Popen(
            command, env=self._environment, text=True, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **how
        )
        self._started.append(process)
        return process


@pytest.fixture
def cluster() -> Iterator[Doomed]:
    cluster = Doomed()
    yield cluster
    cluster.end()


@pytest.mark.parametrize(("launcher", "order"), CASES if os.environ.get("LONG") else Random(0).sample(CASES, SOME))
def test_nobody_is_left(cluster: Doomed, tmp_path: Path, launcher: str, order: tuple[str, ...]):
    cluster.begin(launcher, tmp_path / "family")
    eventually(lambda: len(cluster.living()) == 8)
    cluster.kill(*order, *(["launcher"] if "launcher" not in order else []))
    with contextlib.suppress(AssertionError):
        eventually(lambda: not cluster.living(), WITHIN_S)
    assert cluster.living() == {}
