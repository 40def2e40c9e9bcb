"""Time limits and cancels by force on a real cluster: whatever a task does, its slot is free again soon, and nobody else is
hurt."""

from __future__ import annotations

import asyncio
import concurrent.futures
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import Gate, Home, alive, eventually

from zmqsched import Client, Future, LocalCluster, WaitGroup, errors
from zmqsched.core.stops import GRACE_S

# On a machine that does other things too; without those it is some milliseconds, or GRACE_S and some.
SOON_S = 60.0


@pytest.fixture(scope="module")
def cluster(clusters: Home) -> Iterator[LocalCluster]:
    """One slot: what is not free again is missed."""
    with LocalCluster(n_workers=1) as cluster:
        yield cluster


def spins() -> None:
    while True:
        pass


def sleeps() -> None:
    import time

    time.sleep(10**6)


def holds_the_gil() -> None:
    import collections
    import itertools

    collections.deque(itertools.repeat(1), maxlen=0)


def matches_for_ever() -> None:
    import re

    re.match("(a+)+$", "a" * 60 + "b")


def sleeps_in_c() -> None:
    import ctypes

    while True:
        ctypes.PyDLL(None).sleep(1000)


def insists() -> None:
    import time

    while True:
        try:
            time.sleep(10**6)
        except KeyboardInterrupt:
            pass


def masks_it() -> None:
    import signal
    import time

    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    while True:
        time.sleep(0.01)


def handles_it() -> None:
    import signal
    import time

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    time.sleep(10**6)


def waits_for_a_lock() -> None:
    import threading

    lock = threading.Lock()
    lock.acquire()
    lock.acquire()


def runs_a_loop() -> None:
    import asyncio

    asyncio.run(asyncio.sleep(10**6))


def fails_on_interrupt() -> None:
    import time

    try:
        time.sleep(10**6)
    except KeyboardInterrupt:
        raise ValueError("of its own") from None


STUBBORN = [holds_the_gil, insists, masks_it, handles_it]
OBEDIENT = [spins, sleeps, matches_for_ever, sleeps_in_c, waits_for_a_lock, runs_a_loop, fails_on_interrupt]


def by_value(task):
    """As a user's own script has it: workers need not import this module, and pytest with it."""
    import types

    return types.FunctionType(task.__code__, {"__builtins__": __builtins__, "__name__": "__main__"}, task.__name__)


def ready() -> int:
    import asyncio  # noqa: F401
    import ctypes  # noqa: F401
    import os

    return os.getpid()


def worker_of(client: Client) -> int:
    """It has imported what tasks here do: imports are not interrupted, and take a busy machine longer than the grace."""
    pid = client.submit(by_value(ready)).result(timeout=SOON_S)
    assert isinstance(pid, int)
    return pid


def running(client: Client, task, *args) -> Future[object]:
    """Submitted, and known to run."""
    future: Future[object] = client.submit(by_value(task), *args)
    eventually(future.running)
    return future


@pytest.mark.parametrize("task", [*OBEDIENT, *STUBBORN], ids=lambda task: task.__name__)
def test_a_task_over_its_limit_fails_and_its_slot_is_free(client, task):
    before = worker_of(client)
    deaths = client.status().counts.get("worker deaths", 0)
    view = client.options(timeout=0.2, retries=3, name="the long one")
    future = view.submit(by_value(task))
    with pytest.raises(errors.TaskTimeout, match=r"the long one was stopped at its time limit of 0\.2 s") as raised:
        future.result(timeout=SOON_S)
    assert isinstance(raised.value, TimeoutError)
    assert f"(pid {before}) on {os.uname().nodename}" in str(raised.value)
    after = worker_of(client)
    assert (after == before) == (task in OBEDIENT), "killed only if it does not obey"
    counts = client.status().counts
    assert counts.get("worker deaths", 0) == deaths
    assert counts.get("retried", 0) == 0


@pytest.mark.parametrize("task", [spins, holds_the_gil], ids=lambda task: task.__name__)
def test_the_stack_says_where_it_stood(client, task):
    with pytest.raises(errors.TaskTimeout, match="latest call first") as raised:
        client.options(timeout=0.2).submit(by_value(task)).result(timeout=SOON_S)
    assert f"in {task.__name__}" in str(raised.value)


@pytest.mark.parametrize("task", [*OBEDIENT, *STUBBORN], ids=lambda task: task.__name__)
def test_a_task_cancelled_by_force_is_gone_and_its_slot_is_free(client, task):
    before = worker_of(client)
    future = running(client, task)
    assert not future.cancel()
    assert future.cancel(force=True)
    assert future.cancelled()
    with pytest.raises(concurrent.futures.CancelledError):
        future.result(timeout=0)
    assert (worker_of(client) == before) == (task in OBEDIENT)
    eventually(lambda: sum(client.status().tasks.values()) == 0)


def test_within_a_second_if_nothing_else_keeps_the_machine(client):
    """Of what the promise says, the part that a test can say on a busy machine: the grace is all that is waited for."""
    assert GRACE_S <= 0.5
    future = running(client, spins)
    began = time.monotonic()
    future.cancel(force=True)
    worker_of(client)
    assert time.monotonic() - began < SOON_S


def test_finally_blocks_run(client, tmp_path):
    trace = str(tmp_path / "trace")

    def tidies_up():
        import pathlib
        import time

        try:
            time.sleep(10**6)
        finally:
            pathlib.Path(trace).write_text("tidy")

    with pytest.raises(errors.TaskTimeout):
        client.options(timeout=1).submit(tidies_up).result(timeout=SOON_S)
    assert Path(trace).read_text() == "tidy"


def test_a_task_may_return_what_it_has(client):
    def gives_what_it_has():
        import time

        try:
            time.sleep(10**6)
        except KeyboardInterrupt:
            return "so far"

    assert client.options(timeout=1).submit(gives_what_it_has).result(timeout=SOON_S) == "so far"


def test_waiting_is_not_running(client, gate):
    first = client.submit(gate.task)
    gate.wait_until_begun()
    second = client.options(timeout=0.3).submit(abs, -2)
    time.sleep(0.5)  # longer than the limit: the fact to be seen is that nothing happens
    assert not second.done()
    gate.open()
    assert (first.result(timeout=SOON_S), second.result(timeout=SOON_S)) == (None, 2)


def test_children_of_a_killed_task_are_gone(client, tmp_path):
    told = str(tmp_path / "pid")

    def has_a_child():
        import pathlib
        import subprocess
        import time

        child = subprocess.Popen(["sleep", "600"])
        pathlib.Path(told + ".part").write_text(str(child.pid))
        pathlib.Path(told + ".part").rename(told)
        while True:
            try:
                time.sleep(10**6)
            except KeyboardInterrupt:
                pass

    future = client.submit(has_a_child)
    eventually(Path(told).exists)
    pid = int(Path(told).read_text())
    future.cancel(force=True)
    eventually(lambda: not alive(pid))


# --- nobody else is hurt ---------------------------------------------------------------------------------------------


def test_an_interrupt_never_hits_another_task(client):
    """Limits and cancels around the moment at which tasks end, and neighbours in the same pipe."""

    def takes(seconds):
        import time

        time.sleep(seconds)
        return seconds

    futures = []
    for number in range(150):
        seconds = 0.002 * (number % 5)
        hunted = client.options(timeout=0.004) if number % 3 == 0 else client
        future = hunted.submit(takes, seconds)
        futures.append((future, seconds, number % 3))
        futures.append((client.submit(pow, number, 2), number**2, 2))
        if number % 3 == 1:
            future.cancel(force=True)
    for future, value, sort in futures:
        try:
            assert future.result(timeout=60) == value
        except errors.TaskTimeout:
            assert sort == 0
        except concurrent.futures.CancelledError:
            assert sort == 1
    assert client.status().counts.get("worker deaths", 0) == 0


def test_a_cancelled_task_behind_another_never_runs(client, gate, tmp_path):
    path = str(tmp_path / "ran")

    def leaves_a_trace():
        import pathlib

        pathlib.Path(path).touch()

    for _ in range(50):
        client.submit(abs, 1).result(timeout=SOON_S)  # short tasks make the node put several into a pipe
    first = client.submit(gate.task)
    behind = [client.submit(leaves_a_trace) for _ in range(3)]
    assert all(future.cancel() for future in behind)
    eventually(lambda: sum(client.status().tasks.values()) == 1)  # what lay in the pipe has been taken back
    gate.open()
    first.result(timeout=SOON_S)
    worker_of(client)
    assert not os.path.exists(path)


def test_an_interrupt_of_the_tasks_own_is_the_tasks_own(client):
    def interrupts_itself():
        import os
        import signal
        import time

        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(10)

    before = worker_of(client)
    with pytest.raises(KeyboardInterrupt):
        client.submit(interrupts_itself).result(timeout=SOON_S)
    assert worker_of(client) == before


def test_a_stray_interrupt_does_not_end_an_idle_worker(client):
    pid = worker_of(client)
    os.kill(pid, signal.SIGINT)
    assert worker_of(client) == pid


# --- futures ---------------------------------------------------------------------------------------------------------


def test_those_who_wait_are_told(client):
    future = running(client, sleeps)
    told: list[Future[object]] = []
    future.add_done_callback(told.append)
    waiters = concurrent.futures.ThreadPoolExecutor(5)
    with waiters:
        kinds = ("ALL_COMPLETED", "FIRST_COMPLETED")
        waits = [waiters.submit(concurrent.futures.wait, [future], 30, kind) for kind in kinds]
        completed = waiters.submit(lambda: list(concurrent.futures.as_completed([future], 30)))
        results = waiters.submit(future.result, 30)
        others = waiters.submit(future.exception, 30)
        eventually(lambda: len(future._waiters) == 5)
        assert future.cancel(force=True)
        assert [wait.result(60).done for wait in waits] == [{future}] * 2
        assert completed.result(60) == [future]
        for waiting in (results, others):
            with pytest.raises(concurrent.futures.CancelledError):
                waiting.result(60)
    assert told == [future]
    assert (future.done(), future.running(), future.cancelled()) == (True, False, True)
    assert "cancelled" in repr(future)


def test_a_cancelled_future_is_no_exception_to_those_who_wait_for_one(client):
    first, second = running(client, sleeps), client.submit(pow, 2, 5)
    threading.Timer(0.05, first.cancel, kwargs={"force": True}).start()
    done = concurrent.futures.wait([first, second], 30, "FIRST_EXCEPTION").done
    assert done == {first, second}


def test_who_awaits_it_is_cancelled(client):
    async def main() -> None:
        future = running(client, sleeps)
        wrapped = asyncio.wrap_future(future)
        future.cancel(force=True)
        with pytest.raises(asyncio.CancelledError):
            await wrapped
        with pytest.raises(asyncio.CancelledError):
            await future

    asyncio.run(asyncio.wait_for(main(), 30))


def test_force_on_one_that_waits_is_a_cancel_and_on_one_that_is_done_nothing(client, gate):
    first, second = client.submit(gate.task), client.submit(abs, -1)
    assert second.cancel(force=True)
    gate.open()
    first.result(timeout=SOON_S)
    assert not first.cancel(force=True)
    assert not first.cancelled()
    assert second.cancel(force=True)


def test_a_cancelled_task_that_runs_nevertheless_can_be_ended(client):
    started = client.submit(by_value(sleeps))
    eventually(lambda: client.status().tasks["assigned"] == 1)
    if started.cancel():  # not yet known to run
        started.cancel(force=True)
    else:
        assert started.cancel(force=True)
    worker_of(client)


def test_a_wait_group_is_done_with_what_is_cancelled(client):
    group = WaitGroup(client)
    future = group.go(by_value(sleeps))
    eventually(future.running)
    future.cancel(force=True)
    group.wait(timeout=SOON_S)


def test_many_at_once(client, tmp_path):
    """Waiting ones, running ones, and again."""
    gate = Gate(tmp_path / "many")
    futures = [client.submit(gate.task) for _ in range(200)]
    gate.wait_until_begun()
    eventually(lambda: any(future.running() for future in futures))
    assert all(future.cancel(force=True) for future in reversed(futures))  # the running one last
    worker_of(client)
    assert gate.begun() == 1
    eventually(lambda: sum(client.status().tasks.values()) == 0)


def test_a_module_is_not_left_half_imported(client: Client, tmp_path: Path) -> None:
    """As those with registries are: its second import would fail, in whatever task comes next."""
    (tmp_path / "registry.py").write_text("names = []\n")
    (tmp_path / "registering.py").write_text(
        "import pathlib, time, registry\n"
        "if registry.names: raise ValueError('registered already')\n"
        "registry.names.append(__name__)\n"
        "pathlib.Path(__file__).with_name('begun').touch()\n"
        "time.sleep(0.2)\n"
    )

    def imports(directory: str, seconds: float) -> str:
        import sys
        import time

        sys.path.insert(0, directory)
        import registering  # type: ignore[import-not-found]

        time.sleep(seconds)
        return str(registering.__name__)

    stopped = client.submit(imports, str(tmp_path), 60)
    eventually((tmp_path / "begun").exists)
    stopped.cancel(force=True)
    assert client.submit(imports, str(tmp_path), 0).result(SOON_S) == "registering"
