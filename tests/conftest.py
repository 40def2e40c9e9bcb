"""What the tests with real processes share: a private directory of clusters, gates that hold tasks, scripts that run as
a user's would, and the check that each module leaves no process and no file behind."""

from __future__ import annotations

import contextlib
import dis
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import psutil
import pytest
from msgspec.structs import replace

from zmqsched import Client, LocalCluster, sockets
from zmqsched.config import CONNECTION_FILE, STOPPING_FILE, ConnectionFile, cluster_dir
from zmqsched.launch.base import Site

# What is waited for comes within milliseconds; on a machine that does other things too, later. Nobody waits so long for
# what has to happen, only for what a bug keeps from happening.
PATIENCE_S = 60.0


def pytest_configure() -> None:
    """Who runs the tests in the background (`make test &`) hands an ignored SIGINT down to them, and to the programs that
    they start and interrupt. (Not at the module's import: workers import it too.)"""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@contextlib.contextmanager
def interrupt_behind_call(point: int, function: Callable[..., Any]) -> Iterator[list[int]]:
    """KeyboardInterrupt behind this many calls that the function itself makes, where the interpreter looks for signals. What
    is given holds where it was raised, and nothing if there are not so many."""
    code = function.__code__
    names = {each.offset: each.opname for each in dis.get_instructions(code)}
    calls, before = 0, ""
    interrupted: list[int] = []

    def trace(frame: FrameType, event: str, arg: object) -> Any:
        nonlocal calls, before
        if frame.f_code is not code:
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        if event == "opcode" and not interrupted:
            calls += before.startswith("CALL")
            before = names[frame.f_lasti]
            if calls == point:
                interrupted.append(frame.f_lineno)
                raise KeyboardInterrupt
        return trace

    tracer = sys.gettrace()
    sys.settrace(trace)
    try:
        yield interrupted
    except KeyboardInterrupt:
        assert interrupted, "somebody else's"
    finally:
        sys.settrace(tracer)


def eventually(fact: Callable[[], Any], timeout_s: float = PATIENCE_S) -> Any:
    """Wait until it is so, and return what it was then."""
    until = time.monotonic() + timeout_s
    while not (found := fact()):
        assert time.monotonic() < until, f"did not come true within {timeout_s:g} s"
        time.sleep(0.005)
    return found


def new_keys() -> sockets.Keys:
    """Of both sides, for a socket to bind and one to connect to it."""
    public, secret = sockets.key_pair()
    return sockets.Keys(public, *sockets.key_pair(), secret)


def from_afar(file: ConnectionFile, **changes: str) -> ConnectionFile:
    """As it serves elsewhere: the cluster is reached over TCP alone."""
    return replace(file, network="elsewhere", **changes)


def told(error: BaseException) -> str:
    """All that the interpreter prints of an exception that nobody catches."""
    return "".join(traceback.format_exception(error))


def alive(pid: int) -> bool:
    """The process runs; a zombie does not."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def end_broker(cluster: LocalCluster) -> None:
    """Kill the broker for good: no other follows it, as when somebody ends the cluster by force."""
    (cluster_dir(cluster.name) / STOPPING_FILE).touch()
    os.kill(cluster.broker_pid, signal.SIGKILL)


def processes_knowing(directory: Path) -> dict[int, str]:
    """Command lines, by pid, of the processes that have this directory in their command line or environment."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            command, environment = (entry / "cmdline").read_bytes(), (entry / "environ").read_bytes()
            if command and os.fsencode(directory) in command + environment and int(entry.name) != os.getpid():
                found[int(entry.name)] = command.replace(b"\0", b" ").decode(errors="replace")
    return found


def children() -> dict[int, str]:
    """Command lines, by pid, of this process's descendants."""
    found = {}
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            found[child.pid] = " ".join(child.cmdline()) or child.status()
    return found


class Home:
    """A directory of clusters. Short, for a Unix socket's path has 107 bytes."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="zs", dir="/tmp"))

    def processes(self) -> dict[int, str]:
        return processes_knowing(self.path)

    def files(self) -> set[str]:
        return {str(path.relative_to(self.path)) for path in self.path.rglob("*")}

    def left(self) -> object:
        return self.processes() or self.files()

    def assert_nothing_left(self, within_s: float = PATIENCE_S) -> None:
        until = time.monotonic() + within_s
        while self.left() and time.monotonic() < until:
            time.sleep(0.01)
        assert (self.processes(), self.files()) == ({}, set())

    def remove(self) -> None:
        """Also what a failed test left."""
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        shutil.rmtree(self.path, ignore_errors=True)


@pytest.fixture(scope="session")
def clusters() -> Iterator[Home]:
    """The directory of all clusters of the tests in this process, and of what they start."""
    home = Home()
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("ZMQSCHED_")]:
            patch.delenv(name)
        patch.setenv("ZMQSCHED_DIR", str(home.path))
        yield home
    home.remove()


@pytest.fixture(scope="module", autouse=True)
def nothing_left(clusters: Home) -> Iterator[None]:
    """No test module leaves a process, or a file of a cluster."""
    before = children().keys()
    yield
    clusters.assert_nothing_left()
    until = time.monotonic() + PATIENCE_S
    while (left := {pid: what for pid, what in children().items() if pid not in before}) and time.monotonic() < until:
        time.sleep(0.01)
    assert not left


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch) -> Iterator[Home]:
    """A directory of clusters for one test alone, which may leave something there."""
    home = Home()
    monkeypatch.setenv("ZMQSCHED_DIR", str(home.path))
    yield home
    home.remove()


@contextlib.contextmanager
def site_on_loopback() -> Iterator[Site]:
    """A broker with one node of its own, that others can join over loopback."""
    with LocalCluster(1, listen="127.0.0.1") as cluster:
        directory = cluster_dir(cluster.name)
        yield Site(directory / CONNECTION_FILE, directory)


@pytest.fixture(scope="module")
def cluster(clusters: Home) -> Iterator[LocalCluster]:
    with LocalCluster(n_workers=2) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def client(cluster: LocalCluster) -> Iterator[Client]:
    client = Client(cluster)
    yield client
    client.shutdown(wait=False, cancel_futures=True)


class Gate:
    """Holds tasks until it is opened, and knows which have begun. Both are facts on disk, so no test sleeps and hopes.

    ``task(fn, *args)`` computes, says that it has begun, waits for the gate, returns ``fn(*args)``; or ``fn`` itself if
    that cannot be called.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        directory.mkdir()
        self.task = _gated(str(directory))

    def begun(self) -> int:
        """How often the task has begun."""
        return len(list(self._directory.glob("begun-*")))

    def wait_until_begun(self, number: int = 1) -> None:
        eventually(lambda: self.begun() >= number)

    def wait(self) -> None:
        """Until it is opened."""
        eventually((self._directory / "open").exists)

    def open(self) -> None:
        (self._directory / "open").touch()


def _gated(directory: str) -> Callable[..., Any]:
    # A closure travels by value: the workers need not import this module, and pytest with it.
    def gated(fn: Any = None, *args: Any) -> Any:
        import os
        import time
        import uuid

        result = fn(*args) if callable(fn) else fn
        with open(f"{directory}/begun-{os.getpid()}-{uuid.uuid4().hex}", "x"):
            pass
        while not os.path.exists(f"{directory}/open"):
            time.sleep(0.002)
        return result

    return gated


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Gate]:
    gate = Gate(tmp_path / "gate")
    yield gate
    gate.open()  # whatever a failed test left behind it


class Scripts:
    """Runs Python files as a user does, with a directory of clusters of their own."""

    def __init__(self, directory: Path) -> None:
        self.home = Home()
        self._directory = directory
        self._started: list[subprocess.Popen[str]] = []
        self._environment = {k: v for k, v in os.environ.items() if not k.startswith(("ZMQSCHED_", "PYTHON"))}
        self._environment |= {"ZMQSCHED_DIR": str(self.home.path), "TMPDIR": str(directory)}

    def start(
        self, source: str, *arguments: str, stdin: int = subprocess.DEVNULL, **environment: str
    ) -> subprocess.Popen[str]:
        path = self._directory / f"script{len(self._started)}.py"
        path.write_text(textwrap.dedent(source))
        process = subprocess.Popen(
            [sys.executable, path, *arguments], env=self._environment | environment, cwd=self._directory, text=True,
            stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        self._started.append(process)
        return process

    def run(
        self, source: str, *arguments: str, code: int = 0, timeout_s: float = 120, **environment: str
    ) -> tuple[str, str]:
        """Run to its end; what it printed, and its errors."""
        process = self.start(source, *arguments, **environment)
        out, err = process.communicate(timeout=timeout_s)
        assert process.returncode == code, f"exit code {process.returncode}: {out}{err}"
        return out, err

    def end(self) -> None:
        try:
            assert [p.pid for p in self._started if p.poll() is None] == [], "a script is still running"
            self.home.assert_nothing_left()
        finally:
            for process in self._started:  # first: what still runs would make its directory anew
                with process:
                    process.kill()
            self.home.remove()


@pytest.fixture
def scripts(tmp_path: Path) -> Iterator[Scripts]:
    scripts = Scripts(tmp_path)
    yield scripts
    scripts.end()
