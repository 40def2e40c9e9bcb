"""What a worker leaves when it dies, and what the task's error says of it."""

from __future__ import annotations

import faulthandler
import logging
import os
import re
import resource
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import psutil
import pytest
from conftest import eventually
from test_nursery import Watched, ask, send

from zmqsched import Client, LocalCluster, errors, host, worker
from zmqsched.blackbox import MAX_STACK, STACK_SIGNAL, readable_stack
from zmqsched.nursery import Exited, Wires
from zmqsched.payload import Chunk, short_form
from zmqsched.protocol import Words
from zmqsched.shell import RELAY_MAX, Relay, log, relay_logging
from zmqsched.streams import MAX_STDERR


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
        stack = wires.box.stack()
        wires.box.clear()
        nursery.dump(1)
        return so(stack)

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


def test_a_forked_childs_crash_is_not_the_workers(nursery, spawn):
    def forks():
        if (pid := os.fork()) == 0:
            without_core(segfaults)()
        os.waitpid(pid, 0)
        os._exit(3)

    wires = spawn(1)
    send(wires.pipe, forks)
    assert b"Fatal Python error: Segmentation fault" in b"".join(said.text for said in heard(nursery, wires))
    assert wires.box.stack() == ""


def test_the_stack_is_not_for_the_childrens_eyes(spawn):
    def memfds_of_a_child():
        import subprocess

        listed = subprocess.run(["ls", "-l", "/proc/self/fd"], capture_output=True, text=True, check=True).stdout
        return listed.count("memfd")

    assert ask(spawn(1).pipe, memfds_of_a_child) == 0


# --- standard error ----------------------------------------------------------------------------------------------------


def heard(nursery: Watched, wires: Wires) -> list[Words]:
    """Its streams, read as a node does until the worker is dead."""
    while not any(isinstance(event, Exited) for event in nursery.read()):
        wires.streams.read()
        assert select.select([nursery, wires.streams], [], [], 60)[0], "it does not end"
    wires.streams.read_rest()
    return wires.streams.take(time.monotonic())


def test_what_a_dead_worker_said_last_is_kept(nursery, spawn):
    def speaks():
        os.write(2, b"loading\n")
        os.write(2, b"failed")
        os._exit(1)

    wires = spawn(1)
    send(wires.pipe, speaks)
    (said,) = heard(nursery, wires)
    assert (said.stream, said.text) == (2, b"loading\nfailed")
    assert wires.streams.last_words() == "loading\nfailed"


def test_of_much_only_the_end_is_kept(nursery, spawn):
    def floods():
        os.write(2, b"x" * 10_000_000)
        os.write(2, b"\nthe end")
        os._exit(1)

    wires = spawn(1)
    send(wires.pipe, floods)
    (said,) = heard(nursery, wires)
    assert (said.at + len(said.text), said.lines + said.text.count(b"\n")) == (10_000_008, 1)
    assert wires.streams.last_words() == "[...] " + "x" * (MAX_STDERR - 8) + "\nthe end"


def test_what_is_told_is_readable(nursery, spawn):
    wires = spawn(1)
    send(wires.pipe, lambda: os.write(2, b"\x1b[31mred\x1b[0m\t10 %\r20 %\r\nb\xff\x00d\x07\n") and os._exit(1))
    heard(nursery, wires)
    assert wires.streams.last_words() == "red\t10 %\n20 %\nb\ufffdd\n"


def test_nothing_said_is_nothing_read(nursery, spawn):
    wires = spawn(1)
    ask(wires.pipe, os.getpid)
    assert (wires.streams.read(), wires.streams.last_words()) == (0, "")


def test_the_certificate_has_only_what_that_task_has_said(nursery, spawn):
    wires = spawn(1)
    ask(wires.pipe, lambda: os.write(2, b"of another task\n"))
    send(wires.pipe, os._exit, 1, task=b"another task's id")
    heard(nursery, wires)
    assert wires.streams.last_words() == ""


def test_the_end_of_standard_error_is_in_the_certificate(client):
    def aborts():
        import resource
        import sys

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        sys.stderr.write("the tensor has shape (3,)\n")
        os.write(2, b"assertion failed: n > 0\n")
        os.abort()

    text = certificate(client, aborts)
    assert text.count(": killed by SIGABRT\n") == 3
    assert text.count("the end of its stderr:\n      the tensor has shape (3,)\n      assertion failed: n > 0\n") == 3
    assert "in aborts" in text


def test_a_fatal_error_of_the_interpreter_is_told(client):
    def fails():
        import ctypes
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        ctypes.pythonapi.Py_FatalError(b"the objects are lost")

    assert "Fatal Python error: the objects are lost" in certificate(client, fails)


def untagged(printed: str) -> list[str]:
    return [re.fullmatch(r"\[\w+-\d+ n1/\d+\] (.*)", line)[1] for line in printed.splitlines()]


def test_what_a_task_says_comes_out_of_its_client(scripts):
    out, err = scripts.run(
        """
        import os, sys
        from zmqsched import Client, LocalCluster

        def says(number):
            print("on stdout", number)
            print("on stderr", number, file=sys.stderr)

        def dies():
            print("last words", file=sys.stderr)
            os._exit(1)

        with LocalCluster(2) as cluster, Client(cluster) as client:
            list(client.map(says, range(100)))
            client.options(requeue=False).submit(dies).exception(timeout=60)
        """,
        PYTHONUNBUFFERED="1",
    )
    assert sorted(untagged(out)) == sorted(f"on stdout {number}" for number in range(100))
    assert sorted(untagged(err)) == sorted([f"on stderr {number}" for number in range(100)] + ["last words"])


def test_a_node_says_no_more_than_its_reader_takes():
    read, write = os.pipe()
    relay = Relay(write)
    for number in range(100):
        relay.forward(b"%02d" % number + b"x" * 99_998)
    relay.close()  # it cannot get rid of it, and does not wait for ever
    assert relay._kept <= RELAY_MAX
    with open(read, "rb") as pipe:
        said = b""
        while b"dropped here" not in said:
            said += pipe.read1()
    relay.close()
    os.close(write)


def test_a_relay_writes_all_in_order_and_what_is_logged(tmp_path):
    with open(tmp_path / "errors", "wb") as file:
        relay = Relay(file.fileno())
        handler = logging.StreamHandler(relay)
        for number in range(100):
            relay.forward(b"%d\n" % number)
        handler.handle(logging.makeLogRecord({"msg": "logg\u00e9d"}))
        relay.close()
    assert (tmp_path / "errors").read_text().split() == [*map(str, range(100)), "logg\u00e9d"]


def test_a_relay_without_standard_error_writes_to_no_other_file(tmp_path):
    script = (
        "import os, sys; from zmqsched.shell import Relay\n"
        "assert os.open(sys.argv[1], os.O_CREAT | os.O_WRONLY) == 2\n"
        "relay = Relay(); relay.forward(b'x'); relay.close()"
    )
    command = ["sh", "-c", 'exec "$0" -c "$1" "$2" 2>&-', sys.executable, script, str(tmp_path / "other")]
    subprocess.run(command, check=True, timeout=60)
    assert (tmp_path / "other").read_bytes() == b""


def test_what_a_node_logs_goes_through_its_relay(monkeypatch):
    handler = logging.StreamHandler()
    monkeypatch.setattr(log, "handlers", [handler])
    relay = Relay()
    relay_logging(relay)
    assert handler.stream is relay
    relay.close()


def test_a_relay_whose_reader_is_gone_goes_on():
    read, write = os.pipe()
    os.close(read)
    relay = Relay(write)
    for _ in range(100):
        relay.forward(b"x" * 100_000)
    relay.close()
    eventually(lambda: not relay._thread.is_alive())
    os.close(write)


def test_a_relay_waits_for_a_reader_that_asked_not_to_be_waited_for():
    read, write = os.pipe()
    os.set_blocking(write, False)
    relay = Relay(write)
    for _ in range(10):
        relay.forward(b"x" * 50_000)
    with open(read, "rb") as pipe:
        assert len(pipe.read(500_000)) == 500_000
    relay.close()
    os.close(write)


def test_a_node_may_open_more_files_than_its_workers(clusters):
    def limit():
        import resource

        return resource.getrlimit(resource.RLIMIT_NOFILE)

    with LocalCluster(1) as cluster, Client(cluster) as client:
        soft, hard = client.submit(limit).result(timeout=60)
        (node,) = client.nodes()
        assert (soft, hard) == resource.getrlimit(resource.RLIMIT_NOFILE)
        assert psutil.Process(node.pid).rlimit(psutil.RLIMIT_NOFILE) == (hard, hard)


# --- what a task leaves changed ------------------------------------------------------------------------------------------


def test_the_next_task_has_its_streams(scripts):
    """Whatever the task before, which took a while, has closed or redirected."""
    out, err = scripts.run(
        """
        import os, sys, time
        from zmqsched import Client, LocalCluster

        def closes_the_descriptors():
            for number in range(3):
                os.close(number)
            time.sleep(0.01)

        def redirects_the_descriptors():
            null = os.open("/dev/zero", os.O_RDWR)
            for number in range(3):
                os.dup2(null, number)
            time.sleep(0.01)

        def closes_the_streams():
            sys.stdout.close()
            sys.stderr.close()
            time.sleep(0.01)

        def says(number):
            print("on stdout", number)
            print("on stderr", number, file=sys.stderr)
            return os.getpid(), [os.readlink(f"/proc/self/fd/{number}") for number in range(3)]

        with LocalCluster(1) as cluster, Client(cluster) as client:
            before = client.submit(says, 0).result(timeout=60)
            for number, damages in enumerate((closes_the_descriptors, redirects_the_descriptors, closes_the_streams), 1):
                client.submit(damages).result(timeout=60)
                assert client.submit(says, number).result(timeout=60) == before
        """
    )
    assert untagged(out) == [f"on stdout {number}" for number in range(4)]
    assert untagged(err) == [f"on stderr {number}" for number in range(4)]


def test_the_next_task_is_where_the_first_was(spawn, tmp_path):
    def moves(path):
        os.chdir(path)
        time.sleep(0.01)

    wires = spawn(1)
    before = ask(wires.pipe, os.getcwd)
    ask(wires.pipe, moves, str(tmp_path))
    assert ask(wires.pipe, os.getcwd) == before


def test_a_stream_that_was_replaced_stays(spawn):
    def replaces():
        import io
        import sys

        sys.stdout = io.StringIO()
        time.sleep(0.01)

    wires = spawn(1)
    ask(wires.pipe, replaces)
    assert ask(wires.pipe, lambda: type(__import__("sys").stdout).__name__) == "StringIO"


def test_what_cannot_be_put_back_ends_the_worker_uncharged(nursery, spawn):
    def closes_what_is_kept():
        here = os.stat(".")
        for name in os.listdir("/proc/self/fd"):
            fd = int(name)
            if fd > 2 and os.path.samestat(os.stat(f"/proc/self/fd/{name}"), here):
                os.close(fd)
                return True

    wires = spawn(1)
    assert ask(wires.pipe, closes_what_is_kept) is True
    send(wires.pipe, time.sleep, 0.01)
    assert "exit code 70" in nursery.next(Exited).how


# --- memory ------------------------------------------------------------------------------------------------------------


def test_the_peak_of_memory_is_told_with_the_death(nursery, spawn):
    def grows():
        bytearray(b"x" * (200 << 20))
        os._exit(0)

    send(spawn(1).pipe, grows)
    assert 200 << 20 < nursery.next(Exited).peak < 1 << 30


@pytest.fixture
def bare(monkeypatch, tmp_path) -> Path:
    """A host whose kernel tells nothing but what the test writes there."""
    monkeypatch.setattr(host, "CGROUP", tmp_path / "cgroup")
    monkeypatch.setattr(host, "PROC", tmp_path / "proc")
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "proc" / "vmstat").write_text("nr_free_pages 5\noom_kill 7\n")
    return tmp_path


def counter(bare: Path, cgroup: str, path: str) -> Path:
    (bare / "proc" / "self" / "cgroup").write_text(cgroup)
    file = bare / path
    file.parent.mkdir(parents=True, exist_ok=True)
    return file


@pytest.mark.parametrize(
    ("cgroup", "path", "text"),
    [
        ("0::/user.slice/me\n", "cgroup/user.slice/me/memory.events", "low 0\noom 3\noom_kill {}\noom_group_kill 0\n"),
        ("5:cpu:/a\n4:hugetlb,memory:/b/c\n0::/\n", "cgroup/memory/b/c/memory.oom_control", "under_oom 0\noom_kill {}\n"),
        ("0::/\n", "proc/vmstat", "nr_free_pages 5\noom_kill {}\n"),
        ("", "proc/vmstat", "oom_kill {}\n"),
    ],
)
def test_the_kernels_count_of_killings_grows_or_not(bare, cgroup, path, text):
    file = counter(bare, cgroup, path)
    file.write_text(text.format(7))
    kills = host.OomKills()
    assert not kills.lately()
    file.write_text(text.format(8))
    assert kills.lately()
    kills.look()
    assert kills.lately(), "within the last two looks"
    kills.look()
    assert not kills.lately()


def test_a_kernel_that_does_not_count_kills_nobody(bare):
    (bare / "proc" / "vmstat").unlink()
    kills = host.OomKills()
    kills.look()
    assert not kills.lately()


def limited_cgroup(size: int) -> Path | None:
    """A new cgroup of so much memory; None where this user may not make one."""
    for parent, limit in (("memory", "memory.limit_in_bytes"), ("", "memory.max")):
        group = host.CGROUP / parent / f"zmqsched-test-{os.getpid()}"
        try:
            group.mkdir()
            (group / limit).write_text(str(size))
        except OSError:
            if group.exists():
                group.rmdir()
            continue
        return group
    return None


def test_the_oom_killer_is_named(scripts):
    group = limited_cgroup(500 << 20)
    if group is None:
        pytest.skip("needs a cgroup of its own, which takes root and a memory controller")
    try:
        out, _ = scripts.run(
            """
            import os, sys
            open(sys.argv[1], "w").write(str(os.getpid()))
            from zmqsched import Client, LocalCluster

            def hoards():
                kept = []
                while True:
                    kept.append(bytearray(b"x" * (16 << 20)))

            with LocalCluster(1) as cluster, Client(cluster) as client:
                print(client.options(requeue=False).submit(hoards).exception(timeout=60))
            """,
            str(group / "cgroup.procs"),
        )
    finally:
        eventually(lambda: not (group / "cgroup.procs").read_text())
        group.rmdir()
    assert "killed by SIGKILL\n    by the kernel's OOM killer (likely)\n" in out
    assert 100 < int(re.search(r"(\d+) MiB at most", out)[1]) < 500


# --- the certificate ---------------------------------------------------------------------------------------------------


def certificate(client: Client, task: Callable[..., object], *args: object, **options: object) -> str:
    with pytest.raises(errors.WorkerDied) as raised:
        client.options(**options).submit(task, *args).result(timeout=60)
    return str(raised.value)


def test_a_segfault_is_told_with_its_stack(client):
    text = certificate(client, without_core(segfaults))
    head, call, *entries = text.split("\n  ")
    assert head == "without_core.<locals>.quietly failed: 3 workers died running it"
    assert call == "the call: without_core.<locals>.quietly(...)"
    assert text.count("\n  worker ") == 3
    assert text.count(": killed by SIGSEGV\n") == 3
    assert [re.search(r"attempt (\d) ran for \d", line)[1] for line in entries if "ran for" in line] == ["1", "2", "3"]
    assert text.count("after the first worker that died") == 2
    assert text.count(" MiB at most") == 3
    assert re.search(r"call first:\n.*ctypes/__init__.py.* in string_at\n.* in segfaults\n.* in quietly\n", text)
    assert text.count("the same Python stack as before") == 2
    assert "worker.py" not in text


def test_a_death_without_another_try_has_its_certificate(client):
    text = certificate(client, without_core(segfaults), requeue=False)
    assert text.startswith("without_core.<locals>.quietly failed: its worker died, and requeue=False forbids another try\n")
    assert text.count("\n  worker ") == 1
    assert "in string_at" in text


def test_an_exit_leaves_no_stack(client):
    text = certificate(client, os._exit, 3, name="leaver")
    assert text.startswith("leaver failed: 3 workers died running it\n  the call: _exit(...)\n  worker ")
    assert text.count(": exit code 3\n") == 3
    assert "stack" not in text


def test_the_memory_was_measured(client, gate):
    def holds(path):
        import time

        kept = bytearray(b"x" * (200 << 20))
        until = time.monotonic() + 60
        while not os.path.exists(path):
            assert time.monotonic() < until
            time.sleep(0.01)
        os._exit(len(kept) and 3)

    go = str(gate._directory / "go")
    future = client.options(requeue=False).submit(holds, go)
    eventually(lambda: max(worker.memory for worker in client.workers()) > 200 << 20)
    Path(go).touch()
    text = str(future.exception(timeout=60))
    found = re.search(r"memory: (\d+) MiB when last measured, (\d+) MiB at most", text)
    assert found, text
    measured, peak = found.groups()
    assert 200 < int(measured) <= int(peak) < 600


def test_the_innocent_are_neither_charged_nor_failed(client):
    before = [client.submit(abs, number) for number in range(50)]
    guilty = client.submit(without_core(segfaults))
    after = [client.submit(abs, number) for number in range(50, 100)]
    assert [future.result(timeout=60) for future in before + after] == list(range(100))
    assert type(guilty.exception(timeout=60)) is errors.WorkerDied


class Weird:
    def __call__(self) -> None: ...


@pytest.mark.parametrize(
    ("fn", "name"),
    [
        (os.getpid, "getpid"),
        (Client.map, "Tasks.map"),
        (partial(partial(segfaults), 1), "segfaults"),
        (Chunk(segfaults), "segfaults"),
        (Weird(), "Weird"),
    ],
)
def test_the_short_form_of_a_call(fn, name):
    assert short_form(fn) == name


@pytest.mark.parametrize(("name", "short"), [("x" * 300, "x" * 255), ("\ud800", "?"), (5, "Weird")])
def test_the_short_form_is_always_a_short_text(name, short):
    fn = Weird()
    fn.__qualname__ = name
    assert short_form(fn) == short
