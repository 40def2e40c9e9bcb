"""What TCP connections have brought that is no message yet, and the end of those that bring too much of it.

libzmq hands over whole messages. Until a message's last frame has come it keeps the others, however many, and no limit of
its own counts them: whoever has a key could fill the broker's memory with a message that never ends.

Rules
-----
* Only TCP: whoever is at a Unix socket is the cluster's owner.
* The kernel knows how many bytes a connection has received, and each message says which connection it came from. What was
  received since a connection's last message is unfinished. A connection that was heard within the last round has nothing
  unfinished; so up to a round's worth is overlooked, once.
* A connection is ended when it has more unfinished than any message takes. When the process has outgrown its memory, those
  with the most are ended, but only if what is unfinished may be the cause.
* To end one is to shut its descriptor down: libzmq then frees what it has kept. Whoever is ended wrongly connects again and
  loses nothing, as links are numbered. (It can be: messages that wait to be read count as unfinished.)
"""

from __future__ import annotations

import contextlib
import os
import resource
import socket
import stat
import struct
from collections.abc import Iterable, Iterator

import zmq

from .core.events import Malformed
from .host import resident
from .protocol import MAX_HEADER, MAX_PAYLOAD

# A call and its function, each as large as may be. libzmq and CURVE add some bytes to each frame.
LARGEST = 2 * MAX_PAYLOAD + 2 * MAX_HEADER
# Of memory, for each byte received: frames of a byte or two take that much of libzmq's records.
MEMORY_PER_BYTE = 4

_SOURCE = int(zmq.SRCFD)
_RECEIVED = struct.Struct("=128xQ")  # tcpi_bytes_received, of struct tcp_info in linux/tcp.h


class Intake:
    """``memory_limit``: bytes that this process may have before what is unfinished is held against anybody."""

    def __init__(self, memory_limit: int) -> None:
        self._memory_limit = memory_limit
        self._heard: set[int] = set()
        self._finished: dict[int, tuple[int, int]] = {}  # by descriptor: which socket it is, bytes up to its last message

    def heard(self, frame: zmq.Frame) -> None:
        """A message came in, with this frame."""
        self._heard.add(frame.get(_SOURCE))

    def look(self) -> list[Malformed]:
        """To be called once a round. Returns who was cut off."""
        unfinished = self._unfinished()
        total = sum(size for size, _ in unfinished)
        memory = resident(os.getpid()) or self._memory_limit + 1  # if no descriptor is left to read it by
        ended = []
        for size, descriptor in sorted(unfinished, reverse=True):
            cause = memory > self._memory_limit and 2 * MEMORY_PER_BYTE * total > memory
            if size <= LARGEST and not cause:
                break
            ended.append(Malformed(b"", "message without an end", sender=_end(descriptor)))
            total -= size
        return ended

    def _unfinished(self) -> list[tuple[int, int]]:
        """Bytes and descriptor of each TCP connection that this process has."""
        found = []
        before, self._finished = self._finished, {}
        for descriptor in _descriptors():
            try:
                status = os.fstat(descriptor)
                if not stat.S_ISSOCK(status.st_mode):
                    continue
                received = _received(descriptor)
            except OSError:  # it is no TCP connection, or closed by now
                continue
            which, finished = before.get(descriptor, (0, 0))
            if descriptor in self._heard:
                finished = received
            elif which != status.st_ino:
                finished = 0
            self._finished[descriptor] = status.st_ino, finished
            found.append((received - finished, descriptor))
        self._heard.clear()
        return found


def _descriptors() -> Iterable[int]:
    try:
        return [int(name) for name in os.listdir("/proc/self/fd")]
    except OSError:  # none is left to list them by: all up to the limit are in use
        return range(resource.getrlimit(resource.RLIMIT_NOFILE)[0])


def _received(descriptor: int) -> int:
    with _borrowed(descriptor) as connection:
        return int(_RECEIVED.unpack(connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _RECEIVED.size))[0])


def _end(descriptor: int) -> str:
    """Returns whose connection it was."""
    try:
        with _borrowed(descriptor) as connection:
            address = str(connection.getpeername()[0])
            connection.shutdown(socket.SHUT_RDWR)
    except OSError:  # it has gone by itself
        return "somebody who left"
    return address


@contextlib.contextmanager
def _borrowed(descriptor: int) -> Iterator[socket.socket]:
    """libzmq's socket as one of Python's, which does not close it. The kind is stated so that nobody asks for it."""
    connection = socket.socket(socket.AF_INET, socket.SOCK_STREAM, 0, descriptor)
    try:
        yield connection
    finally:
        connection.detach()
