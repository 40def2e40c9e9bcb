"""Workers are born in milliseconds, die when told, and never outlive their node."""

from __future__ import annotations

import contextlib
import os
import random
import select
import signal
import subprocess
import sys
import textwrap
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from conftest import alive, eventually

from zmqsched.codec import decode_pipe, encode_pipe
from zmqsched.nursery import Born, Exited, Gone, Nursery, Wires
from zmqsched.payload import FunctionPickler, pack_call, unpack_value
from zmqsched.pipes import Pipe
from zmqsched.protocol import Run

ROOT = Path(__file__).parent.parent
PATIENCE_S = 60.0


class Watched(Nursery):
    """A nursery whose events are looked at one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.unseen: deque[Born | Exited | Gone] = deque()

    def next(self, kind: type) -> Born | Exited | Gone:
        """Waits for an event of this kind; those before it are passed over."""
        while True:
            while not self.unseen:
                assert select.select([self], [], [], PATIENCE_S)[0], f"no {kind.__name__}"
                self.unseen.extend(self.read())
            event = self.unseen.popleft()
            if isinstance(event, kind):
                return event


@pytest.fixture
def nursery() -> Iterator[Watched]:
    nursery = Watched()
    yield nursery
    nursery.close()


@pytest.fixture
def spawn(nursery: Watched) -> Iterator[Callable[[int], Pipe]]:
    spawned: list[Wires] = []

    def spawn(worker: int) -> Pipe:
        spawned.append(nursery.spawn(worker))
        return spawned[-1].pipe

    yield spawn
    for wires in spawned:
        wires.close()


def all_exits(nursery: Watched, count: int) -> set[str]:
    """Waits for this many exits of different workers; how they died."""
    exits = [nursery.next(Exited) for _ in range(count)]
    assert len({event.worker for event in exits}) == count
    return {event.how for event in exits}


def send(pipe: Pipe, fn, *args, task: bytes = b"") -> None:
    digest, blob = FunctionPickler().pack(fn)
    pipe.send(encode_pipe(Run(task[:16].ljust(16, b"\0"), 1, digest, blob, pack_call(args, {}))))


def ask(pipe: Pipe, fn, *args):
    send(pipe, fn, *args)
    assert select.select([pipe], [], [], PATIENCE_S)[0], "the worker does not answer"
    done = decode_pipe(pipe.receive(wait=False))
    assert done.ok
    return unpack_value(done.value)


def wait_until_dead(*pids: int) -> None:
    eventually(lambda: not any(map(alive, pids)))


def leaves_a_child() -> int:
    return subprocess.Popen(["sleep", "600"]).pid


def test_a_worker_is_born_works_and_is_told_apart(nursery, spawn):
    pipes = {number: spawn(number) for number in (1, 2, 2**40)}
    pids = {number: ask(pipe, os.getpid) for number, pipe in pipes.items()}
    events = [nursery.next(Born) for _ in pids]
    assert events == [Born(number, pid) for number, pid in pids.items()]
    assert len({nursery.pid, os.getpid(), *pids.values()}) == 5


def test_kill_reports_the_signal(nursery, spawn):
    ask(spawn(1), os.getpid)
    nursery.kill(1)
    assert nursery.next(Exited).how == "killed by SIGKILL"


def test_workers_killed_at_birth_are_reported_like_any_other(nursery, spawn):
    for number in range(10):
        spawn(number)
        nursery.kill(number)
    assert all_exits(nursery, 10) == {"killed by SIGKILL"}


@pytest.mark.parametrize(
    ("die", "how"),
    [
        (lambda: os._exit(3), "exit code 3"),
        (lambda: os.kill(os.getpid(), signal.SIGSEGV), "killed by SIGSEGV"),
        (lambda: os.kill(os.getpid(), signal.SIGTERM), "killed by SIGTERM"),
        (lambda: os.kill(os.getpid(), signal.SIGRTMIN + 3), f"killed by signal {signal.SIGRTMIN + 3}"),
    ],
)
def test_how_a_worker_died_is_a_phrase(nursery, spawn, die, how):
    send(spawn(1), die)
    assert nursery.next(Exited).how == how


def test_killing_the_dead_or_the_unknown_does_nothing(nursery, spawn):
    nursery.kill(77)
    ask(spawn(1), os.getpid)
    nursery.kill(1)
    nursery.next(Exited)
    nursery.kill(1)
    assert ask(spawn(1), lambda: "alive") == "alive"


@pytest.mark.parametrize("end", ["kill", "exit"])
def test_children_of_user_code_die_with_their_worker(nursery, spawn, end):
    pipe = spawn(1)
    child = ask(pipe, leaves_a_child)
    if end == "kill":
        nursery.kill(1)
    else:
        send(pipe, os._exit, 0)
    nursery.next(Exited)
    wait_until_dead(child)


@contextlib.contextmanager
def left_by_the(pipe: Pipe, how: Callable[[], int]) -> Iterator[int]:
    """The pid of what a task left; not left by a failed test."""
    pid = ask(pipe, how)
    yield pid
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def leaves_a_session() -> int:
    return subprocess.Popen(["sleep", "600"], start_new_session=True, env={}).pid


def leaves_a_daemon() -> int:
    """Forked twice, in a session of its own, without a common group, environment or parent."""
    read, write = os.pipe()
    if not (child := os.fork()):
        os.setsid()
        if os.fork():
            os._exit(0)
        os.write(write, b"%d" % os.getpid())
        os.execve("/bin/sleep", ["sleep", "600"], {})
    os.waitpid(child, 0)
    return int(os.read(read, 20))


def leaves_a_daemon_with_a_child() -> int:
    """The child of it is what counts."""
    script = "setsid sh -c 'setsid sleep 600 >&- & echo $!; exec >&-; wait' &"
    return int(subprocess.run(["/bin/sh", "-c", script], stdout=subprocess.PIPE, check=True).stdout)


LEAVES = [leaves_a_session, leaves_a_daemon, leaves_a_daemon_with_a_child]


@pytest.mark.parametrize("leaves", LEAVES)
def test_what_left_its_workers_session_dies_with_the_worker(nursery, spawn, leaves):
    pipe = spawn(1)
    with left_by_the(pipe, leaves) as pid:
        send(pipe, os._exit, 0)
        assert nursery.next(Exited).how == "exit code 0"
        assert not psutil.pid_exists(pid)  # before the exit was told


def test_what_a_living_worker_left_lives_when_another_dies(nursery, spawn):
    ask(other := spawn(1), os.getpid)
    with left_by_the(spawn(2), leaves_a_daemon) as pid:
        eventually(lambda: psutil.Process(pid).ppid() == nursery.pid)
        send(other, os._exit, 0)
        nursery.next(Exited)
        assert psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
        nursery.kill(2)
        nursery.next(Exited)
        assert not psutil.pid_exists(pid)


def test_orphans_that_end_by_themselves_are_buried(nursery, spawn):
    pipe = spawn(1)
    with left_by_the(pipe, leaves_a_daemon) as pid:
        eventually(lambda: psutil.Process(pid).ppid() == nursery.pid)
        os.kill(pid, signal.SIGTERM)
        eventually(lambda: not psutil.pid_exists(pid))
        assert ask(pipe, lambda: "alive") == "alive"


@pytest.mark.parametrize("leaves", LEAVES)
def test_what_left_its_workers_session_does_not_outlive_the_node(nursery, spawn, leaves):
    with left_by_the(spawn(1), leaves) as pid:
        nursery.close()
        assert not psutil.pid_exists(pid)


def test_what_breeds_while_it_is_killed_is_killed(nursery, spawn):
    """Each generation leaves the session of the one before; the line ends only when all of it is dead at once."""

    def breeds():
        if os.fork() == 0:
            for _ in range(10_000):
                if os.fork():
                    time.sleep(0.004)
                    os._exit(0)
                os.setsid()
            os._exit(0)

    pipe = spawn(1)
    ask(pipe, breeds)
    nursery.kill(1)
    nursery.next(Exited)
    assert psutil.Process(nursery.pid).children(recursive=True) == []


def test_a_worker_starts_clean(nursery, spawn):
    def look():
        return {
            "leads": os.getsid(0) == os.getpgid(0) == os.getpid(),
            "others": {signal.getsignal(number) for number in (signal.SIGCHLD, signal.SIGHUP)},
            "masked": signal.pthread_sigmask(signal.SIG_BLOCK, ()),
            "stdin": os.read(0, 10),
        }

    assert ask(spawn(1), look) == {
        "leads": True,
        "others": {signal.SIG_DFL},
        "masked": set(),
        "stdin": b"",
    }


def test_a_worker_has_no_open_descriptor_but_its_wires(spawn):
    def targets():
        known = {os.getcwd(), *(os.readlink(f"/proc/self/fd/{number}") for number in range(3))}
        fds = [entry.path for entry in os.scandir("/proc/self/fd")]
        return [target for fd in fds if os.path.lexists(fd) and (target := os.readlink(fd)) not in known]

    spawn(1)
    found = [target for target in ask(spawn(2), targets) if target != "/dev/null"]
    assert sorted(target.partition(":")[0] for target in found) == ["/memfd", "/memfd", "anon_inode", "socket"]


def test_workers_draw_different_random_numbers(nursery, spawn):
    random.random()
    assert len({ask(spawn(number), lambda: __import__("random").random()) for number in range(3)}) == 3


def test_an_interrupt_reaches_neither_nursery_nor_worker(nursery, spawn):
    pipe = spawn(1)
    ask(pipe, os.getpid)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        os.kill(nursery.pid, number)
    assert os.getsid(nursery.pid) == nursery.pid
    assert ask(pipe, lambda: 1) == 1
    assert ask(spawn(2), lambda: 2) == 2


def test_what_the_node_had_buffered_is_not_printed_by_workers():
    printed = run_script(
        """
        from test_nursery import *
        print("once")
        nursery = Nursery()
        wires = nursery.spawn(1)
        ask(wires.pipe, print, "from a task")
        wires.streams.read()
        print(wires.streams.take(0.0)[0].text)
        nursery.close()
        """
    )
    assert printed.split("\n") == ["once", "b'from a task\\n'", ""]


def test_close_leaves_no_process_and_may_be_repeated(nursery, spawn):
    pids = [ask(spawn(number), os.getpid) for number in range(3)]
    child = ask(spawn(9), leaves_a_child)
    nursery.close()
    assert not any(psutil.pid_exists(pid) for pid in (*pids, nursery.pid))
    wait_until_dead(child)
    nursery.close()


def test_closing_right_after_the_fork_is_fine():
    nursery = Nursery()
    nursery.close()
    assert not psutil.pid_exists(nursery.pid)


def test_a_killed_nursery_is_reported_and_takes_its_workers_along(nursery, spawn):
    pids = [ask(spawn(number), os.getpid) for number in range(3)]
    os.kill(nursery.pid, signal.SIGKILL)
    nursery.next(Gone)
    wait_until_dead(*pids)
    assert nursery.read() == [Gone()]
    spawn(8)
    nursery.kill(1)
    nursery.close()


def run_script(source: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(source)],
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
        stdout=subprocess.PIPE,
        text=True,
        timeout=60,
        check=False,
    )
    return done.stdout


def test_a_node_killed_outright_leaves_nobody():
    printed = run_script(
        """
        from test_nursery import *
        nursery = Nursery()
        wires = [nursery.spawn(number) for number in range(3)]
        pipes = [each.pipe for each in wires]
        pids = [ask(pipe, os.getpid) for pipe in pipes]
        children = [ask(pipe, leaves_a_child) for pipe in pipes]
        # Busy workers die as well.
        send(pipes[0], time.sleep, 600)
        print(nursery.pid, *pids, *children, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
        """
    )
    pids = [int(word) for word in printed.split()]
    assert len(pids) == 7
    wait_until_dead(*pids)


def test_many_workers_come_and_go(nursery, spawn):
    pipes = [spawn(number) for number in range(50)]
    assert len({ask(pipe, os.getpid) for pipe in pipes}) == 50
    for number in range(50):
        nursery.kill(number)
    assert all_exits(nursery, 50) == {"killed by SIGKILL"}


def test_a_nursery_never_waits_for_a_node_that_does_not_read(nursery):
    count = 200  # events that are not read: more than the control socket holds
    for number in range(count):
        nursery.spawn(number).close()
    assert all_exits(nursery, count) == {"exit code 0"}
