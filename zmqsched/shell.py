"""What the broker's and the node's loops share: waiting for a stop, logging, and the line that says ready.

A process that is started by another says when it is ready, or why it is not, by one JSON line on a descriptor given to it
(``--ready-fd``; 1 is standard output). With ``--until-eof`` it ends when its standard input does: the starter holds the
other end, so it ends with the starter, however that ends. With ``--connect -`` the starter gives it the connection file
there, too, as the first line.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import logging
import os
import resource
import select
import signal
import socket
import sys
import threading
import time
from types import FrameType

from .config import MAX_FILE, ConnectionFile
from .errors import ConnectionFileError, ZmqschedError

log = logging.getLogger("zmqsched")
# What a broker is started with; see __main__.py.
BROKER_ENVIRONMENT = {"PYTHONMALLOC": "malloc"}
LEVELS = ("debug", "info", "warning", "error")
RELAY_MAX = 4 << 20
RELAY_CLOSE_S = 1.0
# Whoever starts a node has its connection file at hand.
FIRST_LINE_S = 4.0


class StopSignals:
    """SIGTERM, SIGINT and (if asked) the end of standard input, as readable descriptors for a poll loop."""

    def __init__(self, *, until_eof: bool) -> None:
        self._read, self._write = socket.socketpair()
        self._read.setblocking(False)
        self._write.setblocking(False)
        signal.set_wakeup_fd(self._write.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGTERM, _nothing)
        signal.signal(signal.SIGINT, _nothing)
        self.descriptors = [self._read.fileno(), *([0] if until_eof else [])]

    def wake(self) -> None:
        """From another thread: make the first descriptor readable, with no reason to stop."""
        with contextlib.suppress(BlockingIOError):  # it is
            self._write.send(b"\0")

    def read(self, descriptor: int) -> str:
        """Why to stop: "SIGTERM", "SIGINT", "end of input", or "" if there is no reason."""
        if descriptor == 0:
            return "" if os.read(0, 4096) else "end of input"
        numbers = set(self._read.recv(64))
        stops = [sig.name for sig in (signal.SIGINT, signal.SIGTERM) if sig in numbers]
        return stops[0] if stops else ""


def file_from_input() -> ConnectionFile:
    """The connection file that is the first line of standard input.

    Raises
    ------
    ConnectionFileError
        As :func:`first_line`, or the line is none.
    """
    line = first_line("--connect - wants the connection file as one line there")
    return ConnectionFile.parse(line, "the first line of standard input")


def first_line(wanted: str) -> bytes:
    """The first line of standard input, without its end. What follows it is of no meaning, and is dropped. ``wanted``: who
    wants what, for the error.

    Raises
    ------
    ConnectionFileError
        It is not complete within ``FIRST_LINE_S`` seconds or ``MAX_FILE`` bytes, or input ends before.
    """
    until = time.monotonic() + FIRST_LINE_S
    data = b""
    while b"\n" not in data and len(data) <= MAX_FILE:
        if not select.select([0], [], [], max(0.0, until - time.monotonic()))[0]:
            raise ConnectionFileError(f"no line came from standard input within {FIRST_LINE_S:g} s; {wanted}")
        if not (more := os.read(0, MAX_FILE)):
            raise ConnectionFileError(f"standard input ended before its first line did; {wanted}")
        data += more
    return data.partition(b"\n")[0]


def _nothing(number: int, frame: FrameType | None) -> None:
    """A Python-level handler, so that the wake-up descriptor is written."""


def tune_garbage_collection() -> None:
    """Records here make no cycles; counting in the collector, which looks at all of them again and again, costs a third
    of the time with 100,000 tasks queued. What exists already is left alone, the rest is looked at a hundred times less."""
    gc.freeze()
    gc.set_threshold(70_000, 20, 100)


def allow_many_connections() -> None:
    """Use all the descriptors this process may have: a node takes two, and the usual limit of 1,024 is only there for
    programs that call select. Past it, libzmq leaves whoever knocks outside."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def return_memory() -> None:
    """Give freed memory back to the system: glibc keeps what lies between blocks that are in use."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError):
        log.debug("this C library has no malloc_trim")


class Relay:
    """A process's standard error, written by a thread of its own: a reader that is slow, or has stopped, holds up nobody.

    Of what is not yet written, ``RELAY_MAX`` bytes are kept. What comes beyond is dropped, and how much is said.
    """

    def __init__(self, descriptor: int = 2) -> None:
        # A process that was started without it has something else of that number.
        self._descriptor = -1 if descriptor == 2 and sys.stderr is None else descriptor
        self._changed = threading.Condition()
        self._chunks: list[bytes] = []
        self._kept = 0
        self._dropped = 0
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="zmqsched-stderr", daemon=True)
        self._thread.start()

    def forward(self, data: bytes) -> None:
        with self._changed:
            if self._kept + len(data) > RELAY_MAX:
                self._dropped += len(data)
                return
            self._chunks.append(data)
            self._kept += len(data)
            self._changed.notify()

    def write(self, text: str) -> None:
        """For a ``logging.StreamHandler``."""
        self.forward(text.encode(errors="replace"))

    def flush(self) -> None:
        """For a ``logging.StreamHandler``: nothing here waits."""

    def close(self) -> None:
        """Have the rest written, if that takes less than ``RELAY_CLOSE_S`` seconds."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(RELAY_CLOSE_S)

    def _run(self) -> None:
        while chunks := self._taken():
            for chunk in chunks:
                self._write(chunk)
                with self._changed:
                    self._kept -= len(chunk)

    def _taken(self) -> list[bytes]:
        """What is to be written; empty when all is, and closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._chunks or self._dropped or self._closed)
            chunks, self._chunks = self._chunks, []
            if self._dropped:
                chunks.append(b"zmqsched: %d bytes dropped here: standard error is not read fast enough\n" % self._dropped)
                self._kept += len(chunks[-1])
                self._dropped = 0
            return chunks

    def _write(self, chunk: bytes) -> None:
        rest = memoryview(chunk)
        while rest and self._descriptor >= 0:
            try:
                rest = rest[os.write(self._descriptor, rest) :]
            except BlockingIOError:  # who started this process has made it so
                select.select([], [self._descriptor], [])
            except OSError:  # nobody reads it any more
                self._descriptor = -1


class OneLine(logging.Formatter):
    """What peers said of themselves may be in a message: no line break or escape sequence of theirs gets onto a terminal."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - the standard's name
        line = super().formatMessage(record)
        return line if line.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)


LINE = OneLine("%(asctime)s zmqsched %(message)s", "%H:%M:%S")


def set_up_logging(level: str) -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(LINE)
    log.addHandler(handler)
    log.setLevel(level.upper())
    log.propagate = False


def relay_logging(relay: Relay) -> None:
    """Let the relay write what is logged."""
    for handler in log.handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setStream(relay)


class Starter:
    """Whoever started this process and waits for its word, given once: ready, or why not."""

    def __init__(self, descriptor: int | None) -> None:
        self._descriptor = descriptor

    def ready(self, facts: dict[str, object]) -> None:
        if self._descriptor is None:
            return
        descriptor, self._descriptor = self._descriptor, None
        line = json.dumps(facts) + "\n"
        if descriptor == 1:
            print(line, end="", flush=True)
            return
        with contextlib.suppress(BrokenPipeError):  # the starter is gone; the end of input will say so
            os.write(descriptor, line.encode())
        os.close(descriptor)

    def failed(self, error: ZmqschedError) -> int:
        """Say why this process did not start, or ends: to its starter, who tells the user, else to the user. Returns the
        exit code."""
        if self._descriptor is None:
            print(f"zmqsched: {error}", file=sys.stderr)
        else:
            self.ready({"error": str(error), "type": type(error).__name__})
        return 1
