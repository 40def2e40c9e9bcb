"""A broker and nodes as processes of their own, started one by one so that each can be killed, frozen and started anew."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

import psutil
from conftest import eventually, processes_knowing

from zmqsched import Client
from zmqsched.cluster import wait_until_ready
from zmqsched.config import CONNECTION_FILE
from zmqsched.shell import BROKER_ENVIRONMENT

from .ledger import Ledger

NAME = "chaos"
# Runs a part of zmqsched with constants of config.py that are not the default, set before anybody has read them.
WITH_CONFIG = """
import sys
from zmqsched import config
for setting in sys.argv.pop(1).split():
    name, _, value = setting.partition("=")
    assert hasattr(config, name), name
    setattr(config, name, float(value))
from zmqsched.__main__ import main
sys.exit(main())
"""


class Part:
    """A process of the fleet, in a session of its own."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process = process
        self.pid = process.pid

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def family(self) -> list[int]:
        """Its process, nursery and workers."""
        return [self.pid, *(child for one in _children(self.pid) for child in (one, *_children(one)))]

    def workers(self) -> list[int]:
        return [worker for nursery in _children(self.pid) for worker in _children(nursery)]

    def kill(self) -> float:
        """SIGKILL; when it was sent."""
        at = time.monotonic()
        self.signal(signal.SIGKILL)
        self.process.wait()
        self.close_input()
        return at

    def kill_family(self) -> float:
        """SIGKILL to all of it at once, as when its host loses power."""
        at = time.monotonic()
        for pid in self.family():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.kill()
        return at

    def close_input(self) -> None:
        """Its reason to end."""
        if self.process.stdin:
            self.process.stdin.close()


class Fleet:
    """``slots``: of each node that is started at once. ``listen``: the broker's address, TCP, instead of Unix sockets.

    ``config``: constants of ``zmqsched.config`` that the broker is to run with. ``prefix``: words before the command of each
    part, such as those that run it on another host.
    """

    def __init__(
        self,
        slots: Sequence[int] = (),
        *,
        listen: str | None = None,
        config: Mapping[str, float] | None = None,
        environment: Mapping[str, str] | None = None,
        journal: bool = False,
        prefix: Sequence[str] = (),
    ) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="zs", dir="/tmp"))
        self.home = self.root / "home"
        self.home.mkdir(mode=0o700)
        self.path = self.home / NAME / CONNECTION_FILE
        self.ledger = Ledger(self.root / "ledger")
        self._listen = listen
        self._config = config or {}
        self._journal = ["--journal", str(self.root / "journal")] if journal else []
        self._prefix = prefix
        # Workers must not find a test's modules by accident, nor another cluster.
        kept = {name: value for name, value in os.environ.items() if not name.startswith("ZMQSCHED_")}
        self._environment = {**kept, "ZMQSCHED_DIR": str(self.home), **(environment or {})}
        self._clients: list[Client] = []
        self._parts: list[Part] = []
        self.nodes: list[Part] = []
        try:
            # Nodes start beside the broker and wait for its file: a start costs one interpreter's time, not three.
            starting = [self._broker(), *(self._node(number) for number in slots)]
            self.broker, *self.nodes = [self._ready(*one) for one in starting]
        except BaseException:
            self._kill_all()
            raise

    def __enter__(self) -> Fleet:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            if kind is None:
                self._end_all()
            else:
                self._show_logs()
        finally:
            self._kill_all()

    def start_broker(self) -> Part:
        """Another one under the same name, when the first was killed."""
        self.broker = self._ready(*self._broker())
        return self.broker

    def start_node(self, slots: int, *options: str, file: Path | None = None, prefix: Sequence[str] | None = None) -> Part:
        """One more; what it is for is its starter's business, so it is not in ``nodes``."""
        return self._ready(*self._node(slots, *options, file=file, prefix=prefix))

    def client(self, file: Path | None = None, timeout: float = 10.0) -> Client:
        """Closed with the fleet."""
        client = Client(file or self.path, timeout=timeout)
        self._clients.append(client)
        return client

    def workers(self) -> list[int]:
        """The pids of all workers that are alive, as the kernel knows them."""
        return [pid for node in self.nodes for pid in node.workers()]

    def _broker(self) -> tuple[Part, IO[bytes]]:
        listen = [] if self._listen is None else ["--listen", self._listen]
        words = ["broker", "--name", NAME, *self._journal, *listen]
        return self._start("broker", words, {**self._environment, **BROKER_ENVIRONMENT})

    def _node(
        self, slots: int, *options: str, file: Path | None = None, prefix: Sequence[str] | None = None
    ) -> tuple[Part, IO[bytes]]:
        words = ["node", "--connect", str(file or self.path), "--slots", str(slots), "--wait=30", *options]
        return self._start(f"node{len(self._parts)}", words, self._environment, prefix)

    def _ready(self, part: Part, pipe: IO[bytes]) -> Part:
        wait_until_ready(part.process, pipe, 60.0)
        return part

    def _start(
        self, what: str, words: list[str], environment: Mapping[str, str], prefix: Sequence[str] | None = None
    ) -> tuple[Part, IO[bytes]]:
        read, write = os.pipe()
        config = " ".join(f"{name}={value}" for name, value in self._config.items())
        how = ["-c", WITH_CONFIG, config] if config else ["-m", "zmqsched"]
        with os.fdopen(write, "wb"), (self.root / f"{what}.log").open("ab") as log:
            process = subprocess.Popen(
                [*(self._prefix if prefix is None else prefix), sys.executable, *how, *words, "--until-eof",
                 f"--ready-fd={write}"],
                stdin=subprocess.PIPE, stdout=log, stderr=log, pass_fds=[write], start_new_session=True, env=environment,
                cwd=self.root,
            )  # fmt: skip
        self._parts.append(part := Part(process))
        return part, os.fdopen(read, "rb")

    def _end_all(self) -> None:
        """In order, and nothing is left: no process, no file."""
        for client in self._clients:
            client.shutdown(wait=False, cancel_futures=True)
        for part in reversed(self._parts):  # nodes first: they say goodbye
            part.close_input()
        for part in self._parts:
            part.process.wait(60)
        eventually(lambda: not processes_knowing(self.root))
        assert [str(path) for path in self.home.iterdir()] == []

    def _kill_all(self) -> None:
        for client in self._clients:
            client.shutdown(wait=False, cancel_futures=True)
        for pid in processes_knowing(self.root):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for part in self._parts:
            part.process.wait()
            part.close_input()
        shutil.rmtree(self.root, ignore_errors=True)

    def _show_logs(self) -> None:
        for path in sorted(self.root.glob("*.log")):
            print(f"--- {path.name}\n{path.read_text(errors='replace')[-3000:]}", file=sys.stderr)  # noqa: T201


@contextlib.contextmanager
def frozen(pids: Sequence[int]) -> Iterator[float]:
    """SIGSTOP, and at the end SIGCONT; whatever happens, nobody stays frozen. Gives when they were stopped."""
    at = time.monotonic()
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield at
    finally:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


def stopped(pid: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() == psutil.STATUS_STOPPED
    return False


def _children(pid: int) -> list[int]:
    """From the kernel's own list: a search through all processes takes longer than a task."""
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []
