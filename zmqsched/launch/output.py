"""What started nodes say, drained for ever: nobody who writes waits for a reader.

Rules
-----
* One thread reads the pipes of all children of a launcher, each to its end. It never waits for a child, a disk's reader or
  this program's standard error.
* A log has at most ``MAX_LOG`` bytes, and one older file beside it has no more. That is ``LABEL.log.N``, the Nth that was
  full: who follows the log knows if one was missed.
* The directory of logs is the cluster's: it is never made anew here, so nothing is left once the broker has removed it.
* The end of what was said is kept in memory, for the exception that tells of a failure.
"""

from __future__ import annotations

import contextlib
import glob
import os
import select
import threading
from collections.abc import Callable
from pathlib import Path

from ..shell import Relay

MAX_LOG = 1 << 20
MAX_TAIL = 4096
_READ = 1 << 16
# Who ended has written all that it will; whoever has inherited its pipe may hold that open for ever.
_REST_S = 0.2


def text_of(tail: bytes) -> str:
    """The end of an output as text, without a line that was cut in two."""
    if len(tail) >= MAX_TAIL:
        tail = tail[-MAX_TAIL:].partition(b"\n")[2] or tail[-MAX_TAIL:]
    return tail.decode(errors="replace").strip()


def tail_of(path: Path) -> str:
    """The end of a log that somebody else writes (a batch system); "" if there is none."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - MAX_TAIL))
            return text_of(file.read())
    except OSError:
        return ""


def full_logs(path: Path) -> int:
    """How many files of this log are full by now: the number of the last of them."""
    numbers = (other.suffix[1:] for other in path.parent.glob(f"{glob.escape(path.name)}.*"))
    return max((int(number) for number in numbers if number.isdecimal()), default=0)


def full_log(path: Path, number: int) -> Path:
    return path.with_name(f"{path.name}.{number}")


class Log:
    """The output of one node, as a file of limited size."""

    def __init__(self, path: Path, relay: Relay | None = None) -> None:
        self._path = path
        self._relay = relay
        self._descriptor = -1
        self._size = 0
        self._tail = b""
        self._lock = threading.Lock()
        self._closed = False
        self._early = True  # all there was is in _tail, for want of a directory

    def write(self, data: bytes) -> None:
        if self._relay is not None:
            self._relay.forward(data)
        with self._lock:
            before, self._tail = self._tail, (self._tail + data)[-MAX_TAIL:]
            self._keep(before + data if self._early else data)

    def settle(self) -> None:
        """Once in a while, from any thread: there may be a directory now for what came before."""
        with self._lock:
            if self._early and self._tail:
                self._keep(self._tail)
                if self._closed:
                    self._close()

    def _keep(self, data: bytes) -> None:
        with contextlib.suppress(OSError):  # a full disk must not stop what reads the pipes
            if self._descriptor < 0:
                self._open()
                self._early = False
            if self._size + len(data) > MAX_LOG:
                self._turn()
            self._size += os.write(self._descriptor, data[-MAX_LOG:])

    @property
    def tail(self) -> str:
        return text_of(self._tail)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._close()

    def _close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _open(self) -> None:
        with contextlib.suppress(FileExistsError, FileNotFoundError):  # not its parents: see above
            self._path.parent.mkdir(mode=0o700)
        self._descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self._size = os.fstat(self._descriptor).st_size

    def _turn(self) -> None:
        self._close()
        number = full_logs(self._path)
        self._path.replace(full_log(self._path, number + 1))
        full_log(self._path, number).unlink(missing_ok=True)
        self._open()


class Drain:
    """A thread that reads descriptors, begun with the first of them."""

    def __init__(self) -> None:
        self._poll = select.epoll()
        self._takers: dict[int, Callable[[bytes], None]] = {}
        self._wake = os.eventfd(0, os.EFD_CLOEXEC)
        self._poll.register(self._wake, select.EPOLLIN)
        self._thread: threading.Thread | None = None

    def add(self, descriptor: int, take: Callable[[bytes], None]) -> None:
        """Read it from now on, and close it at its end. ``take`` is given what was read, and b"" at the end, by the
        drain's thread."""
        os.set_blocking(descriptor, False)
        self._takers[descriptor] = take
        self._poll.register(descriptor, select.EPOLLIN)
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="zmqsched output", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Read what there is of those that have ended, and let go of everything. Not to be used again."""
        if self._thread is not None:
            os.eventfd_write(self._wake, 1)
            self._thread.join()
        self._poll.close()
        os.close(self._wake)

    def _run(self) -> None:
        closing = False
        while not closing or self._takers:
            ready = [descriptor for descriptor, _ in self._poll.poll(_REST_S if closing else None)]
            if closing and not ready:
                break
            for descriptor in ready:
                if descriptor == self._wake:
                    closing = True
                    self._poll.unregister(self._wake)
                else:
                    self._read(descriptor)
        for descriptor in list(self._takers):
            self._end(descriptor)

    def _read(self, descriptor: int) -> None:
        try:
            data = os.read(descriptor, _READ)
        except BlockingIOError:
            return
        if data:
            self._takers[descriptor](data)
        else:
            self._end(descriptor)

    def _end(self, descriptor: int) -> None:
        self._poll.unregister(descriptor)
        take = self._takers.pop(descriptor)
        os.close(descriptor)  # from here on the number may be another's, whom another thread adds
        take(b"")
