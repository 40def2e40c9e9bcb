"""Nodes that are children of this process, or at the other end of one (``ssh``): they end when their standard input does.

Rules
-----
* A child is ready when it has written its one JSON line to standard output (``--ready-fd=1``), or it says there why it is
  not. All else that it writes goes to its log.
* It has a session of its own, so a Ctrl-C in a terminal or notebook does not reach it.
* One that has ended stays a zombie until that was told: its pid is nobody else's as long as it may be believed to run.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import StartError
from ..shell import Relay
from .base import Launched
from .output import Drain, Log

# What a node's goodbye may take; then it is killed, and that takes as long as the kernel needs.
STOP_TIMEOUT_S = 3.0
KILL_TIMEOUT_S = 1.0
# From a child's end on: for whoever has inherited its pipes, as the master of shared ssh connections does.
_LAST_WORDS_S = 0.5
_MAX_LINE = 1 << 16


class Children:
    """The children of one launcher, by label. ``wake``: called, from another thread, when one is ready or has ended.
    ``echo``: what they write goes to this program's standard error too."""

    def __init__(self, wake: Callable[[], None], *, echo: bool) -> None:
        self._wake = wake
        self._relay = Relay() if echo else None
        self._drain = Drain()
        self._children: dict[str, Child] = {}
        self._closed = False

    def start(
        self, label: str, command: Sequence[str], log: Path, environment: Mapping[str, str], *, first: bytes = b"",
        where: str = "", cwd: str = "",
    ) -> None:  # fmt: skip
        """Start one; in the place of one of this label that has ended, if there is one. ``first``: what it reads first,
        before its standard input is held open; less than a pipe holds (64 KiB).

        Raises
        ------
        StartError
            There is no such command.
        """
        try:
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
                env=dict(environment), cwd=cwd or None, bufsize=0,
            )  # fmt: skip
        except OSError as error:
            raise StartError(f"cannot start {error.filename or command[0]!r}: {error.strerror}") from None
        if (before := self._children.pop(label, None)) is not None:
            before.bury()
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        if first:
            with contextlib.suppress(BrokenPipeError):  # it has ended; how is about to be known
                process.stdin.write(first)
        child = self._children[label] = Child(label, process, Log(log, self._relay), self._wake, where)
        self._drain.add(_taken_over(process.stdout), child.said)
        self._drain.add(_taken_over(process.stderr), child.wrote)

    def __getitem__(self, label: str) -> Child:
        return self._children[label]

    def poll(self) -> list[Launched]:
        return [child.now() for child in self._children.values()]

    def stop(self, labels: Collection[str], *, at_once: bool = False) -> None:
        """As :meth:`Launcher.stop`."""
        children = [self._children[label] for label in labels if label in self._children]
        for child in children:
            child.kill() if at_once else child.close_input()
        left = children if at_once else running(children, STOP_TIMEOUT_S)
        for child in left:
            child.kill()
        stuck = {child.label for child in running(left, KILL_TIMEOUT_S)}
        for child in children:
            if child.label not in stuck:
                child.bury()
                del self._children[child.label]
        if stuck:
            raise StartError(f"processes of {', '.join(sorted(stuck))} cannot be killed")

    def close(self) -> None:
        """Stop all of them and let go of everything. Idempotent."""
        if self._closed:
            return
        self._closed = True
        try:
            self.stop(list(self._children))
        finally:
            self._drain.close()
            if self._relay is not None:
                self._relay.close()


class Child:
    """One child and what it has said. ``facts``: its line of readiness, empty before; ``spoke``: it has written anything to
    standard output."""

    def __init__(self, label: str, process: subprocess.Popen[bytes], log: Log, wake: Callable[[], None], where: str) -> None:
        self.label = label
        self.pid = process.pid
        self.facts: dict[str, Any] = {}
        self.spoke = False
        self._process = process
        self._log = log
        self._wake = wake
        self._where = where
        self._line = b""
        self._open = 2  # pipes
        self._ended_at: float | None = None

    def said(self, data: bytes) -> None:
        """On standard output, where the first JSON object is its line. Called by the drain's thread, as ``wrote``."""
        self.spoke = self.spoke or bool(data)
        if self.facts:
            self.wrote(data)
            return
        self._line += data
        while not self.facts and b"\n" in self._line:
            line, _, self._line = self._line.partition(b"\n")
            self.facts = _facts(line)
            if self.facts:
                self._wake()
            elif line:  # an empty one says that the other end of ssh is there
                self._log.write(line + b"\n")
        if self.facts or not data or len(self._line) > _MAX_LINE:
            if self._line:
                self._log.write(self._line)
            self._line = b""
        if not data:
            self.wrote(data)

    def wrote(self, data: bytes) -> None:
        if data:
            self._log.write(data)
            return
        self._open -= 1
        if not self._open:
            self._log.close()
            self._wake()

    def now(self) -> Launched:
        node = str(self.facts.get("node", ""))
        code = self.code()
        self._log.settle()
        if code is None or (self._open and time.monotonic() < self._last_words_until()):
            return Launched(self.label, "running" if node else "starting", "", self._where, node)
        self.bury()
        return Launched(self.label, "ended", self._how(code), self._where, node)

    @property
    def tail(self) -> str:
        """The end of what it wrote, without its line."""
        return self._log.tail

    def _how(self, code: int) -> str:
        """How it ended, with its own words; "" if in order."""
        if code == 0 and "node" in self.facts:
            return ""
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        words = "\n".join(filter(None, [str(self.facts.get("error", "")), self._log.tail]))
        how += "" if "node" in self.facts else " before it was ready"
        return f"{how}: {words}" if words else how

    def code(self) -> int | None:
        """Its exit code, without burying it; None while it runs."""
        if self._process.returncode is not None:
            return self._process.returncode
        try:
            found = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:  # this program waits for all children, whoever started them
            return self._process.wait()
        if found is None:
            return None
        return found.si_status if found.si_code == os.CLD_EXITED else -found.si_status

    def _last_words_until(self) -> float:
        if self._ended_at is None:
            self._ended_at = time.monotonic()
        return self._ended_at + _LAST_WORDS_S

    # --- ending ---------------------------------------------------------------------------------------------------

    def close_input(self) -> None:
        if self._process.stdin is not None:
            with contextlib.suppress(OSError):
                self._process.stdin.close()

    def kill(self) -> None:
        self._process.kill()

    def runs(self) -> bool:
        return self.code() is None

    def bury(self) -> None:
        self.close_input()
        self._process.wait()


def running(children: Collection[Child], timeout_s: float) -> list[Child]:
    """Those that have not ended by then."""
    until = time.monotonic() + timeout_s
    left = list(children)
    while (left := [child for child in left if child.runs()]) and (rest := until - time.monotonic()) > 0:
        descriptor = os.pidfd_open(left[0].pid)
        try:
            waiter = select.poll()  # select() takes no descriptor beyond 1,023
            waiter.register(descriptor, select.POLLIN)
            waiter.poll(1000 * rest)
        finally:
            os.close(descriptor)
    return left


def _taken_over(pipe: Any) -> int:
    """The descriptor of a pipe, which from now on is the caller's."""
    with pipe:
        return os.dup(pipe.fileno())


def _facts(line: bytes) -> dict[str, Any]:
    """The line by which a process says that it is ready, or why not; empty if it is another."""
    with contextlib.suppress(ValueError, RecursionError):
        facts = json.loads(line)
        if isinstance(facts, dict) and ("node" in facts or "error" in facts):
            return facts
    return {}
