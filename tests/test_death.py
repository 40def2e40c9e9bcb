"""What a worker leaves when it dies, and what the task's error says of it."""

from __future__ import annotations

import faulthandler
import os
import re
import signal
from collections.abc import Callable, Iterator

import pytest
from conftest import eventually
from test_nursery import Watched, ask, send

from zmqsched import worker
from zmqsched.blackbox import MAX_STACK, STACK_SIGNAL, readable_stack
from zmqsched.nursery import Exited, Wires


@pytest.fixture
def nursery() -> Iterator[Watched]:
    nursery = Watched()
    yield nursery
    nursery.close()


@pytest.fixture
def spawn(nursery: Watched) -> Iterator[Callable[[int], Wires]]:
    spawned: list[Wires] = []

    def spawn(number: int) -> Wires:
        spawned.append(nursery.spawn(number))
        return spawned[-1]

    yield spawn
    for wires in spawned:
        wires.close()


def without_core(fn: Callable[[], object]) -> Callable[[], object]:
    def quietly():
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        return fn()

    return quietly


def segfaults():
    import ctypes

    ctypes.string_at(0)


def holds_the_gil():
    import collections
    import itertools

    collections.deque(itertools.repeat(0), maxlen=0)  # in C, for ever


def spins():
    while True:
        pass


def names(stack: str) -> list[str]:
    """The functions in it."""
    return re.findall(r"^  File .* in (\S+)$", stack, re.MULTILINE)


# --- the stack -------------------------------------------------------------------------------------------------------

OURS = worker.__file__


def test_a_stack_is_read_without_our_frames_and_the_tasks_thread_comes_first():
    dump = f"""Fatal Python error: Segmentation fault

Thread 0x00007fa9dc2786c0 (most recent call first):
  File "/lib/threading.py", line 982 in run

Thread 0x00007fa9dc2786c1 (most recent call first):
  <no Python frame>

Current thread 0x00007fa9dce1db80 (most recent call first):
  File "/home/me/model.py", line 7 in step
  File "{OURS}", line 12 in tell
  File "/home/me/model.py", line 5 in train
  File "{OURS}", line 118 in _attempt
  File "{OURS}", line 60 in run_worker
  File "/x/zmqsched/nursery.py", line 300 in _work

Extension modules: numpy.core._multiarray_umath (total: 1)
"""
    assert readable_stack(dump).splitlines() == [
        '  File "/home/me/model.py", line 7 in step',
        f'  File "{OURS}", line 12 in tell',
        '  File "/home/me/model.py", line 5 in train',
        "another thread:",
        '  File "/lib/threading.py", line 982 in run',
        "another thread:",
        "  <no Python frame>",
    ]


@pytest.mark.parametrize("dump", ["", "\n", "Fatal Python error: Aborted\n\n", "\0\0\0", "Current thread 0x1 (most rec"])
def test_a_stack_that_is_none_is_empty(dump):
    assert readable_stack(dump) == ""


def test_a_stack_is_cut_at_its_end():
    frames = "".join(f'  File "/home/me/deep.py", line {line} in deeper\n' for line in range(10_000))
    stack = readable_stack(f"Current thread 0x1 (most recent call first):\n{frames}")
    assert len(stack) == MAX_STACK
    assert stack.startswith('  File "/home/me/deep.py", line 0 in deeper\n')


@pytest.mark.parametrize("crash", [segfaults, os.abort, lambda: os.kill(os.getpid(), signal.SIGFPE)])
def test_a_crash_leaves_its_stack(nursery, spawn, crash):
    wires = spawn(1)
    send(wires.pipe, without_core(crash))
    nursery.next(Exited)
    assert names(wires.box.stack())[-1] == "quietly"


@pytest.mark.parametrize("busy", [holds_the_gil, lambda: __import__("time").sleep(600), spins])
def test_a_live_worker_tells_where_it_is(nursery, spawn, gate, busy):
    wires = spawn(1)
    send(wires.pipe, gate.task, busy)
    ask_until(nursery, wires, lambda stack: names(stack)[-1:] == ["gated"] and len(names(stack)) > 1)


def ask_until(nursery: Watched, wires: Wires, so: Callable[[str], bool]) -> None:
    """Asks worker 1, which may not have begun yet, until its stack is so."""

    def found() -> bool:
        nursery.dump(1)
        return so(wires.box.stack())

    eventually(found)


def test_each_stack_is_seen_alone(nursery, spawn):
    wires = spawn(1)
    assert ask(wires.pipe, lambda: os.kill(os.getpid(), STACK_SIGNAL)) is None
    assert names(wires.box.stack()) == ["<lambda>"]
    wires.box.clear()
    assert wires.box.stack() == ""
    send(wires.pipe, without_core(os.abort))
    nursery.next(Exited)
    assert names(wires.box.stack()) == ["quietly"]


def test_a_worker_that_is_asked_goes_on(nursery, spawn):
    wires = spawn(1)
    nursery.dump(1)  # it may not even be armed yet
    pid = ask(wires.pipe, os.getpid)
    for _ in range(50):
        nursery.dump(1)
    assert ask(wires.pipe, os.getpid) == pid


def test_the_dead_and_the_unknown_are_not_asked(nursery, spawn):
    nursery.dump(77)
    spawn(1)
    nursery.kill(1)
    nursery.next(Exited)
    nursery.dump(1)
    assert ask(spawn(2).pipe, lambda: "alive") == "alive"


def test_a_task_cannot_take_the_stack_from_the_next(nursery, spawn):
    wires = spawn(1)
    ask(wires.pipe, faulthandler.disable)
    send(wires.pipe, without_core(segfaults))
    nursery.next(Exited)
    assert names(wires.box.stack())[-1] == "quietly"


def test_a_task_may_have_its_stack_where_it_wants(nursery, spawn, tmp_path):
    path = str(tmp_path / "stack")

    def enables():
        faulthandler.enable(open(path, "w"))  # noqa: SIM115 - it is to stay open

    wires = spawn(1)
    ask(wires.pipe, enables)
    send(wires.pipe, without_core(segfaults))
    nursery.next(Exited)
    assert wires.box.stack() == ""
    assert "in quietly" in (tmp_path / "stack").read_text()


def test_the_stack_is_not_for_the_childrens_eyes(spawn):
    def memfds_of_a_child():
        import subprocess

        listed = subprocess.run(["ls", "-l", "/proc/self/fd"], capture_output=True, text=True, check=True).stdout
        return listed.count("memfd")

    assert ask(spawn(1).pipe, memfds_of_a_child) == 0
