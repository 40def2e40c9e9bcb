"""However often clusters start, work and end, and whoever of them is killed: no process and no file is left.

``LONG=1`` does it fifty times, without it ten; see also tests/test_nobody_left.py.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterable

import psutil
import pytest
from conftest import Home, alive, eventually

from zmqsched import Client, cleaning
from zmqsched.__main__ import main
from zmqsched.config import find_cluster
from zmqsched.orphans import is_marked

pytestmark = [pytest.mark.system, pytest.mark.timeout(600)]

ZMQSCHED = [sys.executable, "-m", "zmqsched"]
TIMES = 50 if os.environ.get("LONG") else 10


def zmqsched(*words: str, code: int = 0) -> None:
    done = subprocess.run([*ZMQSCHED, *words], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == code, done.stderr


def family(client: Client) -> list[int]:
    """Of a task that is at work: a child, and one that has left for a session and an environment of its own."""

    def begets() -> list[int]:
        import subprocess

        sleep = ["sleep", "600"]
        return [subprocess.Popen(sleep).pid, subprocess.Popen(sleep, start_new_session=True, env={}).pid]

    return client.submit(begets).result()


def work(client: Client) -> None:
    assert list(client.map(pow, range(100), [2] * 100)) == [number**2 for number in range(100)]


def nobody(pids: list[int]) -> bool:
    return not any(map(alive, pids))


def test_up_work_down_again_and_again(home: Home):
    for _ in range(TIMES):
        zmqsched("up", "--detach", "-n2")
        with Client() as client:
            work(client)
            pids = family(client)
        zmqsched("down")
        assert home.left() == set(), "when `down` returns, nothing is left"
        assert nobody(pids)


def kill(pids: Iterable[int]) -> None:
    """At once: each is stopped before the first is killed, so nobody can react."""
    for number in (signal.SIGSTOP, signal.SIGKILL):
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)


class Up:
    """A cluster whose tasks have left a family; ``pids`` of who may be killed."""

    def __init__(self, home: Home) -> None:
        zmqsched("up", "--detach", "-n2")
        self.home = home
        with Client() as client:
            self.family = family(client)
            nursery = psutil.Process(client.workers()[0].pid).parent()
        self.broker = find_cluster().pid
        self.driver = psutil.Process(self.broker).ppid()
        self.node = nursery.ppid()

    def assert_nothing_left(self) -> None:
        assert self.home.left() == set()
        eventually(lambda: nobody(self.family))


def test_after_the_drivers_death_all_end_by_themselves(home: Home):
    up = Up(home)
    kill([up.driver])
    eventually(lambda: not home.processes())
    zmqsched("down", code=1)  # there is nothing to stop, but a log to remove
    up.assert_nothing_left()


def test_after_the_brokers_death_another_is_stopped(home: Home):
    up = Up(home)
    with Client() as client:
        kill([up.broker])
        work(client)
    assert find_cluster().pid != up.broker
    zmqsched("down")
    up.assert_nothing_left()


def test_after_a_nodes_death_the_rest_is_stopped(home: Home):
    up = Up(home)
    kill([up.node])
    zmqsched("down")
    up.assert_nothing_left()


def test_after_the_death_of_all_cleaning_leaves_nothing(home: Home, monkeypatch: pytest.MonkeyPatch):
    up = Up(home)
    kill(list(home.processes()))
    eventually(lambda: not home.processes())
    monkeypatch.setattr(cleaning, "is_marked", lambda pid: pid in up.family and is_marked(pid))  # not of other tests' tasks
    assert main(["clean", "--journals"]) == 0
    up.assert_nothing_left()
