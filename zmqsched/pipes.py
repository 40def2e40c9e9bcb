"""The pipe between a node and one of its workers: whole messages over an AF_UNIX socket that keeps their borders.

Rules
-----
* A message is a list of frames, and travels as one datagram in one of three forms, told apart by its first byte.
  ``SINGLE``: the one frame follows. ``SEVERAL``: count and sizes (``=I``, ``=Q`` each), then the frames. ``MEMFD``, for
  more than ``DATAGRAM_MAX`` bytes: the same lies in a memfd, whose descriptor the datagram carries. A memfd has no name, so
  whoever is killed leaves nothing on disk.
* The receiver is the only owner of what it receives, and bulk frames are writable: so are arrays built on them.
* The kernel gives each datagram to exactly one reader and never cuts or merges them. A node may therefore read from a
  copy of the worker's end, to take back what the worker has not yet read.
* That copy shares its file description with the worker, and ``O_NONBLOCK`` belongs to the description: blocking is
  chosen per call (``wait``), never set on a pipe.
* Sending is atomic, so threads may send without a lock. One thread at a time receives from a ``Pipe``.
"""

from __future__ import annotations

import array
import errno
import mmap
import os
import socket
import struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer as Buffer

# EX_SOFTWARE of sysexits.h: a task closed its worker's pipe, nobody can be answered any more.
EXIT_PIPE_LOST = 70

SINGLE, SEVERAL, MEMFD = b"\0", b"\1", b"\2"
# A memfd and its mapping cost 60 us and more, copying 128 KiB through a socket 30. It must fit into SO_SNDBUF as every
# kernel has it by default (208 KiB).
DATAGRAM_MAX = 128 * 1024
# Cache lines, and enough for any vector unit's loads.
ALIGN = 64
# Room for many short runs ahead of the worker; the kernel caps it at net.core.wmem_max.
SEND_BUFFER = 1 << 20

_ANCILLARY = socket.CMSG_SPACE(4)
_NO_WAIT = socket.MSG_DONTWAIT
_FLAGS = socket.MSG_CMSG_CLOEXEC
_FLAGS_NO_WAIT = socket.MSG_CMSG_CLOEXEC | socket.MSG_DONTWAIT
# MAP_POPULATE maps all pages at once; a fault per page would cost several times the copy.
_MAP = mmap.MAP_SHARED | mmap.MAP_POPULATE
# The kernel is out of room for now: the queue, its memory, or descriptors in flight (unix(7)).
_FULL = (errno.EAGAIN, errno.ENOBUFS, errno.ETOOMANYREFS)


class Pipe:
    """One end of a worker's pipe."""

    def __init__(self, end: socket.socket) -> None:
        self._end = end
        self._buffer = memoryview(bytearray(1 + DATAGRAM_MAX))
        self._into = [self._buffer]

    def send(self, frames: list[Buffer], wait: bool = True) -> bool:
        """Send one message.

        Returns
        -------
        bool
            False if the pipe is full and ``wait`` is false: nothing was sent.

        Raises
        ------
        BrokenPipeError
            The other end is closed.
        """
        frame = frames[0]
        try:
            if len(frames) == 1 and type(frame) is bytes and len(frame) <= DATAGRAM_MAX:
                self._end.send(SINGLE + frame, 0 if wait else _NO_WAIT)
            else:
                self._send_other(frames, 0 if wait else _NO_WAIT)
        except ConnectionResetError as error:
            raise BrokenPipeError(errno.EPIPE, "the other end of the pipe is closed") from error
        except OSError as error:
            if wait or error.errno not in _FULL:
                raise
            return False
        return True

    def receive(self, wait: bool = True) -> list[Buffer] | None:
        """One message, or None when the other end is closed and everything it sent was read.

        Raises
        ------
        BlockingIOError
            Nothing is there, and ``wait`` is false.
        """
        try:
            size, ancillary, _, _ = self._end.recvmsg_into(self._into, _ANCILLARY, _FLAGS if wait else _FLAGS_NO_WAIT)
        except ConnectionResetError:  # said once, and before what the other end sent and we have not read yet
            return self.receive(wait)
        if size == 0:
            return None
        form = self._buffer[0]
        if form == 0:
            return [self._buffer[1:size].tobytes()]
        if form == 1:
            sizes, at = _sizes(self._buffer[1:size])
            return _copied(self._buffer[1 + at : size], sizes)
        if not ancillary:
            raise OSError(errno.EMFILE, "a message's descriptor could not be received: too many open files")
        return _mapped(struct.unpack_from("i", ancillary[0][2])[0])

    def finish(self) -> None:
        """Send nothing more: the other end reads what is there, and then that there will be no more."""
        self._end.shutdown(socket.SHUT_WR)

    def fileno(self) -> int:
        return self._end.fileno()

    def close(self) -> None:
        self._end.close()

    def _send_other(self, frames: list[Buffer], flags: int) -> None:
        views = [memoryview(frame).cast("B") for frame in frames]
        sizes = [view.nbytes for view in views]
        head = struct.pack(f"=I{len(sizes)}Q", len(sizes), *sizes)
        if len(head) + sum(sizes) <= DATAGRAM_MAX:
            self._end.send(b"".join((SEVERAL, head, *views)), flags)
            return
        fd = _memfd([memoryview(head), *views])
        try:
            rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))
            self._end.sendmsg([MEMFD], [rights], flags)
        finally:
            os.close(fd)


def pair() -> tuple[Pipe, Pipe]:
    """Both ends of a new pipe."""
    ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for end in ends:
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
    return Pipe(ends[0]), Pipe(ends[1])


def _aligned(size: int) -> int:
    return -(-size // ALIGN) * ALIGN


def _memfd(views: list[memoryview]) -> int:
    fd = os.memfd_create("zmqsched", os.MFD_CLOEXEC)
    try:
        at = 0
        for view in views:
            written = 0
            while written < view.nbytes:  # the kernel writes at most 2 GiB at once
                written += os.pwrite(fd, view[written:], at + written)
            at += _aligned(view.nbytes)
        os.ftruncate(fd, max(at, 1))  # an empty file cannot be mapped
    except BaseException:
        os.close(fd)
        raise
    return fd


def _copied(data: memoryview, sizes: tuple[int, ...]) -> list[Buffer]:
    frames: list[Buffer] = []
    at = 0
    for size in sizes:
        frames.append(bytearray(data[at : at + size]))
        at += size
    return frames


def _sizes(head: memoryview) -> tuple[tuple[int, ...], int]:
    """The sizes of the frames, and where the head ends."""
    count: int = struct.unpack_from("=I", head)[0]
    return struct.unpack_from(f"={count}Q", head, 4), 4 + 8 * count


def _mapped(fd: int) -> list[Buffer]:
    try:
        whole = memoryview(mmap.mmap(fd, 0, _MAP, mmap.PROT_READ | mmap.PROT_WRITE))
    finally:
        os.close(fd)
    frames: list[Buffer] = []
    sizes, end = _sizes(whole)
    at = _aligned(end)
    for size in sizes:
        frames.append(whole[at : at + size])
        at += _aligned(size)
    return frames
