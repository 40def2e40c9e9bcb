"""Where a map keeps what it has got until it is read: packed, in memory up to 16 MiB, beyond that in files without a name.

A piece that has been put down can be looked at any number of times until it is dropped. Memory is for what came first, since
that is read first. Where no file can be written everything stays in memory. Not safe for threads: its owner has a lock.
"""

from __future__ import annotations

import os
import tempfile
from typing import Any

from .payload import Enclosed

MEMORY_BYTES = 16 * 1024 * 1024
FILE_BYTES = 64 * 1024 * 1024  # then another is begun; one is gone when all that lay in it is dropped
_PIECE_BYTES = 256  # what a piece takes besides its payload


class _File:
    """Without a name; closed with its last piece."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile(prefix="zmqsched-", buffering=0)  # noqa: SIM115 - closed below
        self.descriptor = self._file.fileno()
        self.written = 0

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            self._file.close()


class Piece:
    """A payload on a shelf. It lies in ``file`` from ``offset`` on, or in memory."""

    __slots__ = ("file", "offset", "part", "size", "sizes", "users")

    def __init__(self, part: Enclosed) -> None:
        self.part: Enclosed | None = part
        self.sizes = [memoryview(one).nbytes for one in _parts(part)]
        self.size = sum(self.sizes) + _PIECE_BYTES
        self.users = 1  # how many have not dropped it
        self.file: _File | None = None
        self.offset = 0


class Shelf:
    def __init__(self, memory: int = MEMORY_BYTES) -> None:
        self._memory = memory
        self.size = 0  # bytes of all that lies here
        self._held = 0  # of those, in memory
        self._file: _File | None = None

    def put(self, part: Enclosed) -> Piece:
        piece = Piece(part)
        self.size += piece.size
        if self._held + piece.size <= self._memory or not self._write(piece):
            self._held += piece.size
        return piece

    def look(self, piece: Piece) -> Enclosed:
        """Raises LookupError if it was dropped by all."""
        if piece.part is not None:
            return piece.part
        if piece.file is None:
            raise LookupError("dropped")
        parts = []
        offset = piece.offset
        for size in piece.sizes:
            parts.append(_read(piece.file.descriptor, size, offset))
            offset += size
        return parts[0] if len(parts) == 1 else tuple(parts)

    def drop(self, piece: Piece) -> None:
        """It is gone when each of its users has dropped it."""
        piece.users -= 1
        if piece.users:
            return
        self.size -= piece.size
        if piece.part is not None:
            self._held -= piece.size
        piece.part = piece.file = None

    def _write(self, piece: Piece) -> bool:
        assert piece.part is not None
        try:
            if self._file is None or self._file.written >= FILE_BYTES:
                self._file = _File()
            piece.offset = self._file.written
            for one in _parts(piece.part):
                view = memoryview(one).cast("B")
                while view.nbytes:
                    done = os.pwrite(self._file.descriptor, view, self._file.written)
                    self._file.written += done
                    view = view[done:]
        except OSError:  # no room there
            return False
        piece.file, piece.part = self._file, None
        return True


def _parts(part: Enclosed) -> tuple[Any, ...]:
    return (part,) if isinstance(part, bytes) else part


def _read(descriptor: int, size: int, offset: int) -> bytes:
    chunks = []
    while size:
        chunk = os.pread(descriptor, size, offset)
        if not chunk:
            raise OSError("the file of a map's results was cut short")
        chunks.append(chunk)
        size -= len(chunk)
        offset += len(chunk)
    return chunks[0] if len(chunks) == 1 else b"".join(chunks)
