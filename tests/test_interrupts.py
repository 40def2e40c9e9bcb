"""Ctrl-C and the notebook's stop button: a real SIGINT to a program that waits.

The prompt is back in under two seconds, the workers are idle by then and the same as before, what was finished is kept.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from conftest import Scripts, eventually

from zmqsched import Client, LocalCluster
from zmqsched.config import CONNECTION_FILE, cluster_dir

# What is interrupted would go on for minutes. That it takes less than 2 s on a quiet machine, `make bench` measures.
BACK_WITHIN_S = 20.0

# A prompt: says that it evaluates a line, and what came of it; then reads the next.
PROMPT = """
    import asyncio, os, signal, sys, tempfile, time
    import zmqsched

    signal.signal(signal.SIGINT, signal.default_int_handler)
    directory = sys.argv[2]

    def spin(number=0):
        os.close(tempfile.mkstemp(dir=directory)[0])
        while True:
            pass

    def spin_or(number):
        return number if number < 5 else spin()

    def stubborn():
        os.close(tempfile.mkstemp(dir=directory)[0])
        while True:
            try:
                time.sleep(60)
            except KeyboardInterrupt:
                pass

    def count(fn, *args):
        group = zmqsched.WaitGroup(client)
        for _ in range(20):
            group.go(fn, *args)
        return group

    client = zmqsched.Client(sys.argv[1])
    for line in sys.stdin:
        print("begins", flush=True)
        try:
            exec(line)
            print("done", flush=True)
        except BaseException as error:
            print(type(error).__name__, flush=True)
"""


class Prompt:
    def __init__(self, process: subprocess.Popen[str], begun: Path, observer: Client) -> None:
        self.process = process
        self._begun = begun
        self._observer = observer
        self._pids: set[int] = set()

    def type(self, line: str, begin: int = 0) -> None:
        """Return when the line is being evaluated; with ``begin``, when so many tasks have begun and it waits."""
        self._pids = {worker.pid for worker in self._observer.workers()}
        for path in self._begun.iterdir():
            path.unlink()
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        assert self.says() == "begins"
        if begin:
            eventually(lambda: len(list(self._begun.iterdir())) == begin)
            eventually(self._waits)

    def says(self) -> str:
        return self.process.stdout.readline().strip()

    def evaluate(self, line: str) -> str:
        self.type(line)
        return self.says()

    def _waits(self) -> bool:
        """Its main thread sleeps, and has not woken up meanwhile."""
        first = self._sleeps()
        time.sleep(0.05)
        return first is not None and first == self._sleeps()

    def _sleeps(self) -> str | None:
        pid = self.process.pid
        status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/task/{pid}/status").read_text().splitlines())
        return status["voluntary_ctxt_switches"] if status["State"].split()[0] == "S" else None

    def interrupt(self) -> float:
        """Seconds until the prompt is back."""
        began = time.monotonic()
        self.process.send_signal(signal.SIGINT)
        assert self.says() == "KeyboardInterrupt"
        return time.monotonic() - began

    def wait_until_idle(self, tasks: int = 0) -> None:
        """By the broker's word and by the kernel's."""
        eventually(lambda: sum(self._observer.status().tasks.values()) == tasks)
        eventually(lambda: all(psutil.Process(pid).status() == psutil.STATUS_SLEEPING for pid in self._pids))

    def assert_workers_are_the_same(self) -> None:
        assert {worker.pid for worker in self._observer.workers()} == self._pids


@pytest.fixture(scope="module")
def program(tmp_path_factory, clusters) -> Iterator[Scripts]:
    scripts = Scripts(tmp_path_factory.mktemp("prompt"))
    yield scripts
    scripts.end()


@pytest.fixture(scope="module")
def prompt(program: Scripts, client: Client, cluster: LocalCluster, tmp_path_factory) -> Iterator[Prompt]:
    begun = tmp_path_factory.mktemp("begun")
    path = cluster_dir(cluster.name) / CONNECTION_FILE
    process = program.start(PROMPT, str(path), str(begun), stdin=subprocess.PIPE)
    eventually(lambda: all(worker.pid for worker in client.workers()))
    yield Prompt(process, begun, client)
    process.communicate(timeout=60)


@pytest.mark.parametrize(
    ("begin", "call"),
    [
        (1, "client.submit(spin).result()"),
        (1, "client.submit(spin).exception(timeout=60)"),
        (2, "f = [client.submit(spin) for _ in range(30)]; zmqsched.wait(f)"),
        (2, "f = [client.submit(spin) for _ in range(30)]; zmqsched.wait(f, 50, 'FIRST_EXCEPTION')"),
        (2, "f = [client.submit(spin) for _ in range(30)]; list(zmqsched.as_completed(f))"),
        (2, "list(client.map(spin, range(100)))"),
        (2, "list(client.map(spin, range(100), chunksize=10))"),
        (2, "g = count(spin); g.wait()"),
        (1, "asyncio.run(asyncio.wait_for(client.submit(spin), 50))"),
        (1, "other = zmqsched.Client(sys.argv[1]); other.submit(spin); other.shutdown()"),
    ],
    ids=["result", "exception", "wait", "wait first", "as_completed", "map", "map chunks", "wg.wait", "await", "shutdown"],
)
def test_the_prompt_is_back_and_the_workers_are_idle_and_warm(prompt: Prompt, begin: int, call: str):
    prompt.type(call, begin)
    began = time.monotonic()
    assert prompt.interrupt() < BACK_WITHIN_S
    prompt.wait_until_idle()
    assert time.monotonic() - began < BACK_WITHIN_S
    prompt.assert_workers_are_the_same()
    assert prompt.evaluate("assert client.submit(pow, 2, 3).result(60) == 8") == "done"


def test_what_was_finished_is_kept_and_what_others_do_goes_on(prompt: Prompt, client: Client, gate):
    other = client.submit(gate.task, "other")
    gate.wait_until_begun()
    prompt.type("f = [client.submit(spin_or, number) for number in range(20)]; zmqsched.wait(f)", 1)
    assert prompt.interrupt() < BACK_WITHIN_S
    prompt.wait_until_idle(tasks=1)
    assert prompt.evaluate("assert [one.result() for one in f[:5]] == [0, 1, 2, 3, 4]") == "done"
    assert prompt.evaluate("assert all(one.cancelled() for one in f[5:])") == "done"
    gate.open()
    assert other.result(timeout=60) == "other"
    prompt.assert_workers_are_the_same()


def test_a_task_that_will_not_be_interrupted_is_killed_with_its_worker(prompt: Prompt, client: Client):
    prompt.type("client.submit(stubborn).result()", 1)
    began = time.monotonic()
    assert prompt.interrupt() < BACK_WITHIN_S
    eventually(lambda: sum(client.status().tasks.values()) == 0)
    assert time.monotonic() - began < BACK_WITHIN_S
    assert prompt.evaluate("assert client.submit(pow, 2, 3).result(60) == 8") == "done"
    eventually(lambda: len({worker.pid for worker in client.workers() if worker.pid}) == 2)


def test_the_second_interrupt_gives_the_prompt_back_whatever_happens(prompt: Prompt, client: Client):
    """The first leaves the call; the client's end then waits for what other calls have submitted."""
    prompt.type("with zmqsched.Client(sys.argv[1]) as other: other.submit(spin); other.submit(spin).result()", 2)
    prompt.process.send_signal(signal.SIGINT)
    eventually(lambda: sum(client.status().tasks.values()) == 1)
    eventually(prompt._waits)
    assert prompt.interrupt() < BACK_WITHIN_S
    prompt.wait_until_idle()
    prompt.assert_workers_are_the_same()


def test_the_prompt_is_back_also_if_the_broker_hangs(prompt: Prompt, cluster: LocalCluster):
    prompt.type("client.submit(spin).result()", 1)
    os.kill(cluster.broker_pid, signal.SIGSTOP)
    try:
        assert prompt.interrupt() < BACK_WITHIN_S
    finally:
        os.kill(cluster.broker_pid, signal.SIGCONT)
    prompt.wait_until_idle()
    prompt.assert_workers_are_the_same()
