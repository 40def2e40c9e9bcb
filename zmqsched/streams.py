"""A worker's standard output and error: two pipes that its node reads, and whose task each byte is.

Rules
-----
* What is written to descriptors 1 and 2 while a worker runs a task is that task's, whoever writes: Python, C code, a child
  of the task, a thread that an earlier one left. What comes between two tasks is nobody's.
* Node and worker share a *page*. There the worker says what it runs, so the node knows whose bytes it has just read, and how
  far the task has come. And there the node says that it is reading.
* When a task ends and some of what was written is still unread, or is being read at this moment, the worker writes a *mark*
  into both pipes before it answers: what comes before it is that task's. A task that prints nothing pays one system call
  for this, and one that does, hardly more. The mark contains a number that nobody can guess.
* The node reads what is there and keeps of each task the last ``KEPT`` bytes that it has not passed on. Of running tasks
  it passes on ``RATE`` bytes a second and worker; of one that has ended, all that is kept. So a flood is read as fast as it
  comes, costs little memory, and nobody waits for it.
* C code that prints to a terminal line by line does so here too; without this a pipe gets 4 KiB at once.
"""

from __future__ import annotations

import ctypes
import io
import math
import mmap
import os
import re
import secrets
import select
import struct
import sys
import zlib
from collections import deque
from time import monotonic
from typing import Literal, NamedTuple

from .protocol import MAX_ADVANCE_TEXT, MAX_WORDS, Advance, Done, Words

KEPT = MAX_WORDS
RATE = 256 * 1024
EVERY_S = 0.1  # how often what a running task prints is passed on
MAX_STDERR = 4 * 1024  # bytes of standard error that a death certificate gets
_CHUNK = 64 * 1024  # as much as a pipe holds
_MAX_READS = 17  # one after the other: a pipe that its writer has enlarged holds at most 1 MiB

# The page: what runs, whether the node reads, the number in the marks, how far the task is (CRC, the attempt, length of the
# text, fraction; then the text).
_PAGE = 4096
_RUNS = struct.Struct("=16sQ")
_READING = 24
_SECRET = slice(32, 48)
_ADVANCE_AT = 64
_ADVANCE = struct.Struct("=I16sQHd")
_MARK_SIZE = 1 + 16 + _RUNS.size

_IOLBF = 1  # <stdio.h>
# Colours and the like, and what else would make an error message unreadable.
_CONTROL = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]|[\x00-\x08\x0b-\x1f\x7f]")


class Key(NamedTuple):
    """Names an attempt; NOBODY: no task."""

    task: bytes
    attempt: int


NOBODY = Key(bytes(16), 0)


Number = Literal[1, 2]


class _Stream:
    """One of the two pipes, at the node."""

    def __init__(self, number: Number, read: int) -> None:
        self.number: Number = number
        self.file = io.FileIO(read, "r")
        self.open = True
        self.undecided = bytearray()  # read, and not known whose
        self.ended = NOBODY  # the last attempt whose end is known
        self.marked: set[Key] = set()  # those whose mark was read, and that are not known to be answered


class _Said:
    """What an attempt has written and was not passed on, in the order in which it was read."""

    def __init__(self) -> None:
        self.size = 0
        self._pieces: deque[tuple[Number, bytearray]] = deque()
        self._at = {1: 0, 2: 0}  # of each stream, bytes that were passed on or dropped, and line ends among them
        self._lines = {1: 0, 2: 0}

    def add(self, number: Number, data: bytearray) -> None:
        if self._pieces and self._pieces[-1][0] == number:
            self._pieces[-1][1].extend(data)
        else:
            self._pieces.append((number, data))
        self.size += len(data)
        while self.size > KEPT:
            number, piece = self._pieces.popleft()
            excess = min(self.size - KEPT, len(piece))
            self._leave(number, piece[:excess])
            if excess < len(piece):
                self._pieces.appendleft((number, piece[excess:]))

    def take(self, key: Key, worker: int) -> list[Words]:
        taken = []
        for number, piece in self._pieces:
            taken.append(Words(*key, worker, number, self._at[number], self._lines[number], bytes(piece)))
            self._leave(number, piece)
        self._pieces.clear()
        return taken

    def _leave(self, number: Number, data: bytearray) -> None:
        self._at[number] += len(data)
        self._lines[number] += data.count(b"\n")
        self.size -= len(data)


class Streams:
    """The node's side of one worker's streams."""

    def __init__(self, worker: int) -> None:
        self._worker = worker
        self._page_file = io.FileIO(os.memfd_create("zmqsched-page", os.MFD_CLOEXEC), "r+")
        self._page_file.truncate(_PAGE)
        self._page = mmap.mmap(self._page_file.fileno(), _PAGE)
        self._mark = b"\0" + secrets.token_bytes(16)  # what a mark begins with; the attempt follows
        self._page[_SECRET] = self._mark[1:]
        self._unread = select.epoll()
        self._streams: list[_Stream] = []
        self._theirs: list[io.FileIO] = []
        numbers: tuple[Number, ...] = (1, 2)
        for number in numbers:
            read, write = os.pipe2(os.O_CLOEXEC)
            os.set_blocking(read, False)
            self._unread.register(read, select.EPOLLIN)
            self._streams.append(_Stream(number, read))
            self._theirs.append(io.FileIO(write, "w"))
        self._said: dict[Key, _Said] = {}  # by those that have written something and were not answered
        self._answered: Done | None = None  # the last
        self._finished: list[Words] = []  # of attempts that have ended
        self._unclaimed = bytearray()
        self._allowance = float(RATE)
        self._taken_at = -math.inf
        self._tail = bytearray()
        self._tail_of = NOBODY

    @property
    def descriptors(self) -> list[int]:
        """What the worker needs, for :class:`Voice`."""
        return [self._page_file.fileno(), self._unread.fileno(), *(file.fileno() for file in self._theirs)]

    def handed_over(self) -> None:
        """The worker has its side, and only the worker: else the pipes would not end with it."""
        for file in self._theirs:
            file.close()

    def fileno(self) -> int:
        """Readable when something can be read, or one of the pipes has ended."""
        return self._unread.fileno()

    def read(self) -> int:
        """Take in all that is there; never waits. Returns about how much it was, in bytes."""
        self._page[_READING] = 1
        before = self._runs()
        had = sum([len(stream.undecided) for stream in self._streams])
        sizes = [self._read(stream) for stream in self._streams]
        while (after := self._runs()) != before:  # if what came last is the former's, its mark is there by now
            before = after
            sizes = [self._read(stream) for stream in self._streams]
        self._page[_READING] = 0
        size = sum([len(stream.undecided) for stream in self._streams]) - had
        for stream, last in zip(self._streams, sizes, strict=True):
            self._sort(stream, after, cut=last == _CHUNK)
        return size

    def read_rest(self) -> None:
        """The worker is dead. The pipes' end may never come: somebody else may have them open still."""
        for _ in range(_MAX_READS):
            if not self.read():
                break
        for key in list(self._said):
            self._finish(key)

    def answered(self, done: Done) -> bool:
        """Of this attempt nothing more comes, but what lies in the pipes before its mark. True: something is to be taken."""
        self._answered = done
        if not done.wrote and not self._said:
            return False
        self._end(Key(done.task, done.attempt), wrote=done.wrote)
        return True

    def take(self, now: float) -> list[Words]:
        """What is to be passed on now."""
        words, self._finished = self._finished, []
        self._allowance = min(RATE, self._allowance + RATE * (now - self._taken_at))
        self._taken_at = now
        if self._allowance > 0:
            for key, said in self._said.items():
                words += said.take(key, self._worker)
        self._allowance = max(-RATE, self._allowance - sum([len(each.text) for each in words]))
        return words

    def take_unclaimed(self) -> bytes:
        """The last ``KEPT`` bytes of what no task has written."""
        data, self._unclaimed = bytes(self._unclaimed), bytearray()
        return data

    def due(self) -> float:
        """When :meth:`take` has something; 0.0 is at once."""
        if self._finished:
            return 0.0
        if not self._unclaimed and not any(said.size for said in self._said.values()):
            return math.inf
        return max(0.0, self._taken_at + max(EVERY_S, -self._allowance / RATE))

    def last_words(self) -> str:
        """The end of what was written to standard error by the task that runs, or by nobody if none does: at most
        ``MAX_STDERR`` bytes of it, without control characters."""
        if self._tail_of != self._owner(self._streams[1], self._runs()):
            return ""
        text = self._tail[-MAX_STDERR:].decode(errors="replace").replace("\r\n", "\n").replace("\r", "\n")
        return "[...] " * (len(self._tail) > MAX_STDERR) + _CONTROL.sub("", text)

    def advance(self) -> Advance | None:
        """How far a task has come, as the last has said that said so."""
        for _ in range(3):  # the worker may be writing just now
            data = self._page[_ADVANCE_AT : _ADVANCE_AT + _ADVANCE.size + 4 * MAX_ADVANCE_TEXT]
            crc, task, attempt, size, fraction = _ADVANCE.unpack_from(data)
            if zlib.crc32(data[4 : _ADVANCE.size + size]) == crc:
                return Advance(task, attempt, fraction, data[_ADVANCE.size :][:size].decode(errors="replace"))
        return None

    def close(self) -> None:
        for file in (self._page_file, *self._theirs, *(stream.file for stream in self._streams)):
            file.close()
        self._unread.close()
        self._page.close()

    def _runs(self) -> Key:
        return Key(*_RUNS.unpack_from(self._page))

    def _read(self, stream: _Stream) -> int:
        """Until nothing is left, or so much has come that all was read that was there at first: where a mark is missing
        then, there is none. Returns how much the last read gave."""
        size = 0
        for _ in range(_MAX_READS if stream.open else 0):
            data = stream.file.read(_CHUNK)
            size = len(data or b"")
            stream.undecided += data or b""
            if data == b"":  # whoever had it open has closed it
                stream.open = False
                self._unread.unregister(stream.file.fileno())
            if size < _CHUNK:
                break
        return size

    def _sort(self, stream: _Stream, runs: Key, *, cut: bool) -> None:
        """What comes before a mark is that task's; what comes behind the last, that of the one that ``runs``. ``cut``: at
        the end may be the first half of a mark, for which all before it waits."""
        data = stream.undecided
        start = 0
        while (at := data.find(self._mark, start)) >= 0 and at + _MARK_SIZE <= len(data):
            key = Key(*_RUNS.unpack_from(data, at + len(self._mark)))
            self._claim(stream, key, data[start:at])
            stream.marked.add(key)
            stream.ended = key
            start = at + _MARK_SIZE
        if not cut or not self._has_half_a_mark(data, start):
            self._claim(stream, self._owner(stream, runs), data[start:])
            start = len(data)
        del data[:start]

    def _has_half_a_mark(self, data: bytearray, start: int) -> bool:
        at = data.find(0, max(start, len(data) - _MARK_SIZE + 1))
        while at >= 0 and not self._mark.startswith(data[at : at + len(self._mark)]):
            at = data.find(0, at + 1)
        return at >= 0

    def _owner(self, stream: _Stream, runs: Key) -> Key:
        """Whose it is what is written while the page says that this attempt runs: it says so until the next begins."""
        answered = self._answered is not None and (self._answered.task, self._answered.attempt) == runs
        return NOBODY if answered or stream.ended == runs else runs

    def _claim(self, stream: _Stream, owner: Key, data: bytearray) -> None:
        if not data:
            return
        if stream.number == 2:
            if owner != self._tail_of:
                self._tail_of = owner
                self._tail.clear()
            self._tail += data[-MAX_STDERR - 1 :]  # one more than is told, to know that there was more
            del self._tail[: -MAX_STDERR - 1]
        if owner == NOBODY:
            self._unclaimed += data
            del self._unclaimed[:-KEPT]
        else:
            self._said.setdefault(owner, _Said()).add(stream.number, data)

    def _end(self, key: Key, *, wrote: bool) -> None:
        for _ in range(_MAX_READS if wrote else 0):
            if all(key in stream.marked or not stream.open for stream in self._streams) or not self.read():
                break
        for stream in self._streams:
            stream.marked.discard(key)
        self._finish(key)

    def _finish(self, key: Key) -> None:
        if (said := self._said.pop(key, None)) is not None:
            self._finished += said.take(key, self._worker)


class Voice:
    """The worker's side: it makes the pipes this process's standard output and error."""

    def __init__(self, page: int, unread: int, out: int, err: int) -> None:
        self._page = mmap.mmap(page, _PAGE)
        os.close(page)
        self._find_unread = select.epoll.fromfd(unread).poll
        self._ours = (out, err)  # to write marks to, whatever becomes of 1 and 2
        self._mark = b"\0" + self._page[_SECRET]
        self._libc = ctypes.CDLL(None)
        self._stdout = ctypes.c_void_p.in_dll(self._libc, "stdout")
        self._told_at = -math.inf
        for number, (name, descriptor) in enumerate((("stdout", out), ("stderr", err)), 1):
            os.dup2(descriptor, number)
            _speak(name, number)
        self._libc.setvbuf(self._stdout, None, _IOLBF, 0)

    def begin(self, task: bytes, attempt: int) -> None:
        _RUNS.pack_into(self._page, 0, task, attempt)
        self._told_at = -math.inf

    def end(self, task: bytes, attempt: int, *, short: bool) -> bool:
        """The attempt has ended. What C code has not written yet of a line is written, unless the task was ``short``.

        Returns
        -------
        bool
            Whether its end is marked in the streams.

        Raises
        ------
        OSError
            The task has closed what the worker needs.
        """
        if not short:
            self._libc.fflush(self._stdout)
        # In this order: what is read between the two looks is read by a node that says so.
        if not self._find_unread(0, 1) and not self._page[_READING]:
            return False
        mark = self._mark + _RUNS.pack(task, attempt)
        for descriptor in self._ours:
            _write_whole(descriptor, mark)
        return True

    def advance(self, task: bytes, attempt: int, fraction: float, text: str) -> bool:
        """Note how far the task is. True: the node is to be told to look, which it does now and a while later."""
        data = text[:MAX_ADVANCE_TEXT].encode(errors="replace")
        noted = _ADVANCE.pack(0, task, attempt, len(data), fraction) + data
        self._page[_ADVANCE_AT : _ADVANCE_AT + len(noted)] = zlib.crc32(noted[4:]).to_bytes(4, sys.byteorder) + noted[4:]
        now = monotonic()
        if now - self._told_at < EVERY_S:
            return False
        self._told_at = now
        return True


def _speak(name: str, number: int) -> None:
    """UTF-8, line by line: whatever this process was started with, and though it may believe that it can seek there."""
    raw = io.FileIO(number, "w", closefd=False)
    stream = io.TextIOWrapper(io.BufferedWriter(raw), "utf-8", "backslashreplace", line_buffering=True)
    setattr(sys, name, stream)
    setattr(sys, f"__{name}__", stream)


def _write_whole(descriptor: int, mark: bytes) -> None:
    """At once or not at all: a mark is shorter than PIPE_BUF."""
    while True:
        try:
            os.write(descriptor, mark)
            return
        except BlockingIOError:  # a task, or what it has started, made it so
            select.select([], [descriptor], [])
