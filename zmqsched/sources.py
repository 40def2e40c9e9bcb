"""Where the items of a map come from: containers, counted and copied at the call, or iterators, drawn in the background.

A source is asked under its map's lock. Iterators are the user's code, which may take long, raise or wait for ever: each is
drawn by a thread of its own, which holds the lock only to say that there is something, and to wait while there is enough.
"""

from __future__ import annotations

import contextvars
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

_FIXED = (tuple, str, bytes, range, frozenset)
_NO_KEYS: dict[object, object] = {}
_CHANGING = (list, dict, set, bytearray, deque, type(_NO_KEYS.keys()), type(_NO_KEYS.values()), type(_NO_KEYS.items()))


class Listed:
    """Items of which it is known how many they are."""

    wanted = capacity = 0
    error: BaseException | None = None
    paused = False

    def __init__(self, items: Iterator[Any], total: int) -> None:
        self._items = items
        self.total: int | None = total
        self.left: int | None = total  # None: it is not known

    def begin(self, changed: threading.Condition, may_draw: Callable[[], bool]) -> None:
        """Nothing is drawn: everything is there."""

    @property
    def ready(self) -> int:
        return self.left or 0

    def take(self, count: int) -> list[Any]:
        taken = list(islice(self._items, count))
        self.left = (self.left or 0) - len(taken)
        return taken

    def stop(self) -> None:
        self._items, self.left = iter(()), 0


class Drawn:
    """Items of an iterator. ``wanted``: so many are waited for; ``capacity``: so many are enough. ``error``: what the
    iterator raised, after the items that it gave. ``paused``: no more are drawn now."""

    error: BaseException | None = None
    paused = False

    def __init__(self, items: Iterator[Any], hint: int | None) -> None:
        self._items: Iterator[Any] | None = items
        self._buffer: deque[Any] = deque()
        self._ended = False
        self.total = hint
        self.wanted = 1
        self.capacity = 8
        self._count = 0

    def begin(self, changed: threading.Condition, may_draw: Callable[[], bool]) -> None:
        """Start drawing; ``may_draw`` says, under the lock, whether another item may be."""
        self._changed = changed
        self._may_draw = may_draw
        run = contextvars.copy_context().run
        threading.Thread(target=run, args=(self._draw,), name="zmqsched map: items", daemon=True).start()

    @property
    def ready(self) -> int:
        return len(self._buffer)

    @property
    def left(self) -> int | None:
        return len(self._buffer) if self._ended else None

    def take(self, count: int) -> list[Any]:
        taken = [self._buffer.popleft() for _ in range(min(count, len(self._buffer)))]
        if self.paused:
            self._changed.notify_all()
        return taken

    def stop(self) -> None:
        self._ended = True
        self._buffer.clear()

    def _draw(self) -> None:
        items, self._items = self._items, None
        assert items is not None
        try:
            for item in items:
                if self._ended:
                    return
                # First put in, then look: who waits has said first how many it wants, and looked second.
                self._buffer.append(item)
                self._count += 1
                if len(self._buffer) >= self.wanted and self._is_over_after_a_pause():
                    return
        except BaseException as error:  # noqa: BLE001 - whoever reads the results gets it, in its place
            self.error = error
        finally:
            del items  # a generator ends here, not when the last result is read
            with self._changed:
                if not self._ended:
                    self.total = self._count
                self._ended = True
                self._changed.notify_all()

    def _is_over_after_a_pause(self) -> bool:
        with self._changed:
            self._changed.notify_all()
            while not self._ended and (len(self._buffer) >= self.capacity or not self._may_draw()):
                self.paused = True
                self._changed.wait()
            self.paused = False
            return self._ended


Source = Listed | Drawn


def source_of(iterables: tuple[Iterable[Any], ...]) -> Source:
    """One iterable's items, or tuples of several's, as many as the shortest has.

    Raises
    ------
    TypeError
        One of them cannot be iterated.
    """
    fixed = [tuple(one) if type(one) in _CHANGING else one for one in iterables]
    items: Iterator[Any] = iter(fixed[0]) if len(fixed) == 1 else zip(*fixed, strict=False)
    lengths = [_length(one) for one in fixed]
    total = min((length for length in lengths if length is not None), default=None if fixed else 0)
    if all(type(one) in _FIXED for one in fixed):
        return Listed(items, total or 0)
    return Drawn(items, total if None not in lengths else None)


def _length(iterable: Any) -> int | None:
    try:
        return len(iterable)
    except Exception:  # noqa: BLE001 - it has none, or the user's code does not know
        return None
