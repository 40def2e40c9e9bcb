"""A cluster's broker as a child process, followed by another when it dies.

With a journal the next one knows the tasks, without one the clients submit again what is unanswered. One that keeps dying
is given up. It reads its standard input, which ends when this process does, however that ends, and removes what it made.

For a broker on another host the child is its tether (``tether.py``). When that is lost, so is the broker, and none follows.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from typing import IO, Any, NamedTuple

from . import errors
from .config import CONNECTION_FILE, STOPPING_FILE, ConnectionFile, cluster_dir, is_held
from .errors import StartError, ZmqschedError
from .shell import BROKER_ENVIRONMENT, log

START_TIMEOUT_S = 20.0
STOP_TIMEOUT_S = 3.0
# A tether's exit codes: the broker at its other end died, or the connection did.
DIED, LOST = 3, 4


class Start(NamedTuple):
    """``command``: the broker's, or its tether's; ``first``: what a tether reads first."""

    command: list[str]
    first: bytes = b""


class KeptBroker:
    """``deaths`` within ``within_s`` seconds are survived; whatever causes more would go on. ``changed`` is called, from
    another thread, when the broker was followed by another or given up."""

    def __init__(self, name: str, start: Start, deaths: int, within_s: float, changed: Callable[[], None]) -> None:
        self.name = name
        self.fate = ""
        self.pid = 0
        self.file: ConnectionFile
        self._how_to_start = start
        self._deaths: deque[float] = deque(maxlen=deaths)
        self._within_s = within_s
        self._changed = changed
        self._lock = threading.Lock()
        self._closed = False
        self._closing = os.eventfd(0, os.EFD_CLOEXEC)
        weakref.finalize(self, os.close, self._closing).atexit = False  # close() still needs it then
        self._process, self._pipe = self._start()

    def wait_until_ready(self) -> None:
        """For the first one; from then on it is followed.

        Raises
        ------
        StartError, ClusterExists, JournalError
            It did not start; its own words say why.
        """
        self._ready(self._process, self._pipe)
        threading.Thread(target=self._supervise, name="zmqsched broker", daemon=True).start()

    @property
    def death(self) -> str:
        """How it ended, if it did and none has followed it; "" while one runs, and when it was closed."""
        return "" if self._closed else self.fate

    def begin_to_close(self) -> None:
        """Tell it to end, and no other to follow it."""
        with self._lock:
            self._closed = True
        os.eventfd_write(self._closing, 1)
        _close_input(self._process)

    def close(self) -> None:
        """Wait for its end, three seconds at most; then it is killed."""
        self.begin_to_close()
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._pipe.close()

    def _start(self) -> tuple[subprocess.Popen[bytes], IO[bytes]]:
        read, write = os.pipe()
        command, first = self._how_to_start
        with os.fdopen(write, "wb"):
            process = subprocess.Popen(
                [*command, "--until-eof", f"--ready-fd={write}"],
                stdin=subprocess.PIPE,
                pass_fds=[write],
                start_new_session=True,
                env={**os.environ, **BROKER_ENVIRONMENT},
                bufsize=0,
            )
        if first and process.stdin:
            with contextlib.suppress(BrokenPipeError):  # it has ended; why, it has said
                process.stdin.write(first)
        return process, os.fdopen(read, "rb")

    def _ready(self, process: subprocess.Popen[bytes], pipe: IO[bytes]) -> None:
        pid = wait_until_ready(process, pipe)["pid"]
        self.file = ConnectionFile.load(cluster_dir(self.name) / CONNECTION_FILE)
        self.pid = pid  # last: who sees the next broker's pid finds the next broker's file

    def _supervise(self) -> None:
        """Until it is closed or given up."""
        while not _wait_for_end(self._process, self._closing):
            code = self._process.wait()
            how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
            deaths = self._deaths
            often = len(deaths) == deaths.maxlen and time.monotonic() - deaths[0] < self._within_s
            lost = code != DIED if self._how_to_start.first else code == 0
            if lost or often or (cluster_dir(self.name) / STOPPING_FILE).exists():
                self._give_up(f"{how}, the {len(deaths) + 1}th within {self._within_s:.0f} s" if often else how)
                return
            deaths.append(time.monotonic())
            self._follow(how)
            if self.fate:
                return

    def _follow(self, died: str) -> None:
        """The broker died: start the next, or say why there is none."""
        process, pipe = self._start()
        with self._lock:
            if self._closed:
                pipe.close()
                _close_input(process)
                process.kill()
                process.wait()
                return
            _close_input(self._process)
            self._process = process
        try:
            self._ready(process, pipe)
        except ZmqschedError as error:
            if process.returncode is None or process.returncode >= 0:  # killed before it was ready, it is one death more
                self._give_up(f"{died}, and no other could be started: {error}")
            return
        log.warning("zmqsched: the broker of cluster %s died (%s); pid %d follows it", self.name, died, self.pid)
        self._changed()

    def _give_up(self, why: str) -> None:
        self.fate = why
        self._changed()


def check_free(name: str) -> None:
    """Raise ClusterExists if a running cluster has this name."""
    if is_held(cluster_dir(name)):
        raise errors.ClusterExists(
            f"a cluster named {name!r} is running already: stop it (zmqsched down {name}) or choose another name"
        )


def wait_until_ready(
    process: subprocess.Popen[bytes], pipe: IO[bytes], timeout_s: float = START_TIMEOUT_S
) -> dict[str, Any]:
    """The line by which a child says that it is ready, or the exception that says why it is not."""
    with pipe:
        if not select.select([pipe], [], [], timeout_s)[0]:
            raise StartError(f"{process.args!r} was not ready within {timeout_s:.0f} s")
        line = pipe.readline()
    if not line:
        raise StartError(f"{process.args!r} ended with exit code {process.wait()} before it was ready; see its words above")
    return facts_of(line)


def facts_of(line: bytes) -> dict[str, Any]:
    """What a process says when it is ready, or the exception that says why it is not."""
    facts: dict[str, Any] = json.loads(line)
    if "error" in facts:
        kind = getattr(errors, facts["type"], StartError)
        raise kind(facts["error"]) if issubclass(kind, ZmqschedError) else StartError(facts["error"])
    return facts


def _wait_for_end(child: subprocess.Popen[bytes], closing: int) -> bool:
    """Wait until the child has ended, or (True) the cluster is closed."""
    if child.returncode is not None:  # its pid may be another's by now
        return False
    process = os.pidfd_open(child.pid)
    try:
        waiter = select.poll()  # select() takes no descriptor beyond 1,023
        for descriptor in (process, closing):
            waiter.register(descriptor, select.POLLIN)
        return closing in {descriptor for descriptor, _ in waiter.poll()}
    finally:
        os.close(process)


def _close_input(process: subprocess.Popen[bytes]) -> None:
    if process.stdin:
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
