"""What tasks print, at their client: kept for ``future.log()``, and shown.

Rules
-----
* The I/O thread only notes what has come. A thread of its own, started when first something has, writes to ``sys.stdout``
  and ``sys.stderr`` as they are then: one that blocks or raises holds up nobody but itself.
* What a task has printed is shown before its result is known, if the screen takes it within ``SETTLE_S``; one that does not
  is not waited for again until it has caught up.
* On screen each line begins with its task and worker, ``[fit-7 n1/2]``. A line that is not complete is shown when it has
  waited ``PARTIAL_S``; one that rewrites itself (progress bars do) now and then. Of control characters only colours remain.
* A task may show ``TASK_RATE`` lines a second and all together ``ALL_RATE``, at first more. What goes beyond is counted.
* In a Jupyter kernel the text appears in the cell that has submitted the task.
"""

from __future__ import annotations

import contextlib
import contextvars
import io
import math
import os
import re
import select
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from time import monotonic
from typing import Any, NamedTuple, TextIO

from .protocol import MAX_WORDS, Words

LOG_BYTES = MAX_WORDS
PARTIAL_S = 0.3
REWRITTEN_S = 5.0
NOTE_EVERY_S = 1.0
TASK_RATE, TASK_BURST = 200.0, 500.0  # lines a second, and at first; a long line counts as several
ALL_RATE, ALL_BURST = 1_000.0, 3_000.0
MAX_WAITING = 4 * 1024 * 1024  # bytes for a screen that is slow, or has stopped
MAX_LINE = 16 * 1024
MAX_NOTES = 5  # tasks of which it is said one by one that lines are not shown
CLOSE_S = 1.0
SETTLE_S = 0.1
_LINE = 1_000  # bytes that count as one line
_SGR_OR_CONTROL = re.compile(r"(\x1b\[[0-9;]*m)|\x1b\[[0-9;?]*[ -/]*[@-~]|[\x00-\x08\x0b-\x1f\x7f]")

Cell = dict[str, Any]


class News(NamedTuple):
    """What is new of a stream. ``skipped``: line ends before it that never came."""

    text: bytes
    skipped: int


class Log:
    """The last ``LOG_BYTES`` that a task has printed to both of its streams, of all its attempts."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._attempt = 0
        self._seen = {1: (0, 0), 2: (0, 0)}  # bytes and lines of each stream
        self._pieces: deque[tuple[int, bytes]] = deque()  # stream and text; 0: a note of ours
        self._gaps: deque[int] = deque()  # bytes missing at each of the notes
        self._size = 0
        self._left_out = 0

    def add(self, words: Words) -> News | None:
        """What of this is new; None if it was here before, or belongs to an attempt that was given up."""
        if words.attempt < self._attempt:
            return None
        with self._lock:
            if words.attempt > self._attempt:
                if self._attempt:
                    self._pieces.append((0, b"[attempt %d]\n" % words.attempt))
                    self._gaps.append(0)
                self._attempt = words.attempt
                self._seen = {1: (0, 0), 2: (0, 0)}
            at, lines = self._seen[words.stream]
            end = words.at + len(words.text)
            if end <= at:
                return None
            text = words.text[max(0, at - words.at) :]
            self._seen[words.stream] = (end, words.lines + words.text.count(b"\n"))
            if words.at > at:
                self._note_gap(words.at - at)
            if text:
                self._pieces.append((words.stream, text))
                self._size += len(text)
            while self._size > LOG_BYTES:
                self._leave_out(self._size - LOG_BYTES)
            if self._left_out and self._pieces[0][0] == 0:  # a note of what is missing there as well
                self._leave_out(0)
            return News(text, max(0, words.lines - lines))

    def text(self) -> str:
        with self._lock:
            pieces = list(self._pieces)
            left_out = self._left_out
        if left_out:
            pieces.insert(0, (0, _gap(left_out)))
        whole: list[str] = []
        for stream, text in _joined(pieces):
            if stream == 0 and whole and not whole[-1].endswith("\n"):
                whole.append("\n")
            whole.append(text.decode(errors="replace"))
        return "".join(whole)

    def _note_gap(self, size: int) -> None:
        if self._pieces and self._pieces[-1][0] == 0 and self._gaps[-1]:
            self._pieces.pop()
            size += self._gaps.pop()
        self._pieces.append((0, _gap(size)))
        self._gaps.append(size)

    def _leave_out(self, excess: int) -> None:
        stream, text = self._pieces.popleft()
        if stream == 0:
            self._left_out += self._gaps.popleft()
            return
        cut = min(excess, len(text))
        while cut < len(text) and text[cut] & 0xC0 == 0x80:  # in the middle of a character
            cut += 1
        self._size -= cut
        self._left_out += cut
        if cut < len(text):
            self._pieces.appendleft((stream, text[cut:]))


def _gap(size: int) -> bytes:
    return b"[%d bytes skipped]\n" % size


def _joined(pieces: list[tuple[int, bytes]]) -> Iterable[tuple[int, bytes]]:
    """Neighbours of one stream as one, for a character may have come in two parts; also with something else in between."""
    rest = {1: b"", 2: b""}
    run: list[bytes] = []
    for index, (stream, text) in enumerate(pieces):
        run.append(text)
        if index + 1 < len(pieces) and pieces[index + 1][0] == stream:
            continue
        data = b"".join(run)
        run = []
        if stream:
            data = rest[stream] + data
            cut = _whole_characters(data)
            data, rest[stream] = data[:cut], data[cut:]
        yield stream, data
    for stream, data in rest.items():
        if data:
            yield stream, data


def _whole_characters(data: bytes) -> int:
    """The length without the beginning of a UTF-8 character at the end."""
    for back in range(1, min(4, len(data) + 1)):
        byte = data[-back]
        if byte & 0xC0 != 0x80:
            length = 2 if byte & 0xE0 == 0xC0 else 3 if byte & 0xF0 == 0xE0 else 4 if byte & 0xF8 == 0xF0 else 1
            return len(data) - back if length > back else len(data)
    return len(data)


# --- on screen -----------------------------------------------------------------------------------------------------------


class Source(NamedTuple):
    """Who says something, and in which stream."""

    tag: str
    where: str
    stream: int


class Shown(NamedTuple):
    """Lines for a stream, each with its end."""

    stream: int
    cell: Cell | None
    text: str


class _Bucket:
    def __init__(self, rate: float, burst: float, now: float) -> None:
        self._rate = rate
        self._burst = burst
        self._left = burst
        self._at = now

    def fill(self, now: float) -> float:
        self._left = min(self._burst, self._left + self._rate * (now - self._at))
        self._at = now
        return self._left

    def take(self, cost: float) -> None:
        self._left -= cost


class Screen:
    """What is to be shown, line by line, and when: it takes the time, and writes nothing."""

    def __init__(self) -> None:
        self._partial: dict[Source, tuple[bytes, float, Cell | None]] = {}
        self._buckets: dict[str, _Bucket] = {}  # of those that have shown something of late
        self._look_through_at = 0.0
        self._all = _Bucket(ALL_RATE, ALL_BURST, 0.0)
        self._hidden: dict[str, tuple[int, Cell | None]] = {}
        self._note_at = math.inf

    def add(self, source: Source, news: News, cell: Cell | None, now: float) -> list[Shown]:
        before, since, _ = self._partial.pop(source, (b"", now, None))
        if news.skipped:
            self._hide(source, news.skipped, cell, now)
        *lines, rest = (before + news.text).split(b"\n")
        if len(rest) > MAX_LINE:
            lines, rest = [*lines, rest], b""
        if rest:
            self._partial[source] = (rest, since if not lines else now, cell)
        return self._show(source, lines, cell, now)

    def due(self) -> float:
        times = [since + _patience(rest) for rest, since, _ in self._partial.values()]
        return min([self._note_at, *times])

    def late(self, now: float, *, all_of_it: bool = False) -> list[Shown]:
        """What has waited long enough, or ``all_of_it``."""
        shown: list[Shown] = []
        for source, (rest, since, cell) in list(self._partial.items()):
            if all_of_it or now >= since + _patience(rest):
                del self._partial[source]
                shown += self._show(source, [rest], cell, now)
        if now >= self._note_at or (all_of_it and self._hidden):
            shown += self._notes()
        return shown

    def _show(self, source: Source, lines: list[bytes], cell: Cell | None, now: float) -> list[Shown]:
        if not lines:
            return []
        bucket = self._buckets.get(source.tag)
        if bucket is None:
            if now >= self._look_through_at:
                self._forget_the_quiet(now)
            bucket = self._buckets[source.tag] = _Bucket(TASK_RATE, TASK_BURST, now)
        room = min(bucket.fill(now), self._all.fill(now))
        out = []
        cost = 0.0
        for number, line in enumerate(lines):
            if cost >= room:
                self._hide(source, len(lines) - number, cell, now)
                break
            cost += 1 + len(line) // _LINE
            out.append(f"[{source.tag} {source.where}] {_readable(line)}\n")
        bucket.take(cost)
        self._all.take(cost)
        return [Shown(source.stream, cell, "".join(out))] if out else []

    def _hide(self, source: Source, lines: int, cell: Cell | None, now: float) -> None:
        self._hidden[source.tag] = (self._hidden.get(source.tag, (0, None))[0] + lines, cell)
        self._note_at = min(self._note_at, now + NOTE_EVERY_S)

    def _notes(self) -> list[Shown]:
        hidden, self._hidden, self._note_at = self._hidden, {}, math.inf
        if len(hidden) > MAX_NOTES:
            total = sum(lines for lines, _ in hidden.values())
            text = f"[{total:,} lines of {len(hidden):,} tasks not shown; future.log() has the end of each]\n"
            return [Shown(2, None, text)]
        return [
            Shown(2, cell, f"[{tag}: {lines:,} lines not shown; future.log() has the end]\n")
            for tag, (lines, cell) in hidden.items()
        ]

    def _forget_the_quiet(self, now: float) -> None:
        self._look_through_at = now + TASK_BURST / TASK_RATE
        self._buckets = {tag: bucket for tag, bucket in self._buckets.items() if bucket.fill(now) < TASK_BURST}


def _patience(rest: bytes) -> float:
    return REWRITTEN_S if b"\r" in rest else PARTIAL_S


def _readable(line: bytes) -> str:
    text = line.decode(errors="replace").rstrip("\r")
    return _SGR_OR_CONTROL.sub(lambda found: found[1] or "", text.rsplit("\r", 1)[-1])


class Printer:
    """The thread that shows what tasks print."""

    def __init__(self) -> None:
        self._screen = Screen()
        self._changed = threading.Condition()
        self._items: list[tuple[Source, News, Cell | None]] = []
        self._waiting = 0
        self._dropped: dict[Source, tuple[int, Cell | None]] = {}  # lines for which there was no room
        self._busy = False  # not all that has come is written
        self._slow = False  # nor will be soon
        self._closed = False
        self._thread: threading.Thread | None = None

    def show(self, source: Source, news: News, cell: Cell | None) -> None:
        """Any thread; never waits for the screen."""
        with self._changed:
            if self._waiting > MAX_WAITING:
                before = self._dropped.get(source, (0, None))[0]
                self._dropped[source] = (before + news.skipped + news.text.count(b"\n"), cell)
                return
            self._items.append((source, news, cell))
            self._waiting += len(news.text)
            self._busy = True
            self._changed.notify_all()
            if self._thread is None:
                thread = threading.Thread(target=self._run, name="zmqsched output", daemon=True)
                with contextlib.suppress(RuntimeError):  # CPython 3.12 starts none while the program ends: see join()
                    thread.start()
                    self._thread = thread

    def settle(self) -> None:
        """Wait until all lines are written, but ``SETTLE_S`` at most, and not again before the screen has caught up."""
        if self._busy and not self._slow:
            with self._changed:
                self._slow = not self._changed.wait_for(lambda: not self._busy, SETTLE_S)

    def close(self) -> None:
        """Nothing more comes."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def join(self) -> None:
        """Wait until all is shown, or ``CLOSE_S`` seconds."""
        if self._thread is not None:
            self._thread.join(CLOSE_S)
        elif self._closed:
            self._run()

    def _run(self) -> None:
        closed = False
        while not closed:
            due = self._screen.due()
            with self._changed:
                timeout = None if due == math.inf else max(0.0, due - monotonic())
                self._changed.wait_for(lambda: self._items or self._closed, timeout)
                items, self._items = self._items, []
                dropped, self._dropped = self._dropped, {}
                closed = self._closed
            items += [(source, News(b"", lines), cell) for source, (lines, cell) in dropped.items()]
            for shown in _together(self._lines(items, all_of_it=closed)):
                _write(shown)
            with self._changed:
                self._waiting -= sum(len(news.text) for _, news, _ in items)
                if not self._items:
                    self._busy = self._slow = False
                    self._changed.notify_all()

    def _lines(self, items: list[tuple[Source, News, Cell | None]], *, all_of_it: bool) -> list[Shown]:
        now = monotonic()
        shown: list[Shown] = []
        for source, news, cell in items:
            shown += self._screen.add(source, news, cell, now)
        return shown + self._screen.late(now, all_of_it=all_of_it)


def _together(shown: list[Shown]) -> Iterable[Shown]:
    """Neighbours that go to the same place as one."""
    texts: list[str] = []
    for index, each in enumerate(shown):
        texts.append(each.text)
        following = shown[index + 1] if index + 1 < len(shown) else None
        if following is None or following.stream != each.stream or following.cell is not each.cell:
            yield Shown(each.stream, each.cell, "".join(texts))
            texts = []


def _write(shown: Shown) -> None:
    """Whatever the stream is, and whatever it does."""
    target = sys.stdout if shown.stream == 1 else sys.stderr
    # Closed, None, or somebody's own: nothing to do about it here, and future.log() has the text.
    with contextlib.suppress(Exception), _bars_aside(target):
        if type(target) is io.TextIOWrapper:
            _write_descriptor(target, shown.text)
        else:
            in_notebook = shown.cell is not None and _choose_cell(target, shown.cell)
            target.write(shown.text)
            if not in_notebook:  # which sends what it has every 0.2 s, and would have this thread wait for that
                target.flush()


def _write_descriptor(target: TextIO, text: str) -> None:
    """Past the buffer: a thread that waits with its lock in hand would keep the whole program from printing, or ending."""
    target.flush()
    descriptor = target.fileno()
    data = memoryview(text.encode(target.encoding, errors="replace"))
    while data:
        try:
            data = data[os.write(descriptor, data) :]
        except BlockingIOError:
            select.select([], [descriptor], [])


def _bars_aside(target: TextIO) -> AbstractContextManager[None]:
    """Without this a tqdm bar and the lines would run into each other."""
    tqdm = getattr(sys.modules.get("tqdm"), "tqdm", None)
    if tqdm is None or not getattr(tqdm, "_instances", None):
        return contextlib.nullcontext()
    aside: AbstractContextManager[None] = tqdm.external_write_mode(file=target)
    return aside


# --- Jupyter ---------------------------------------------------------------------------------------------------------------


def cell_reader() -> Callable[[], Cell | None] | None:
    """What tells in which cell this code runs; None outside of a Jupyter kernel."""
    return _cell if "ipykernel" in sys.modules else None


def _cell() -> Cell | None:
    header = getattr(sys.stdout, "parent_header", None)
    return header if isinstance(header, dict) else None


def _choose_cell(target: Any, cell: Cell) -> bool:
    """What this thread writes to the target goes there, if it is a kernel's. ipykernel keeps the cell in a context variable,
    which each thread has for itself; since 7 there is a method for it."""
    if hasattr(target, "set_thread_parent"):
        target.set_thread_parent(cell)
    elif isinstance(variable := getattr(target, "_parent_header", None), contextvars.ContextVar):
        variable.set(cell)
    return hasattr(target, "parent_header")
