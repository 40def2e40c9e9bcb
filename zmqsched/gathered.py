"""What has come of the items of a map, packed, until it is read, and after that until the last of it is.

Rules
-----
* The state is under the map's one lock, which whoever changes it holds (``mapping.py``). Nobody does who unpickles.
* What was read is kept: an interrupt must not lose what was finished. On the shelf that is bounded (``KEPT_BYTES``); what
  was read first goes first, and when all is unread, items wait (``full``).
"""

from __future__ import annotations

import contextlib
import math
import pickle
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from typing import Any

from .errors import ResultDecodeError, TaskError
from .payload import (
    Origin,
    Outcome,
    entries_of,
    opened,
    origin_of,
    pack_call,
    unpack_call,
    unpack_exception,
    value_of,
    words_of,
)
from .plan import Plan
from .shelf import Piece, Shelf
from .tally import Tally

KEPT_BYTES = 1024 * 1024 * 1024
NOT_KEPT = object()  # instead of an item


@dataclass
class Part:
    """Results of ``count`` items from ``first`` on: the entries of ``piece`` from ``offset`` on, if ``plain`` the values
    themselves. ``failed``: errors and items of some of them, by position. ``error``: of the only one."""

    first: int
    count: int
    piece: Piece
    offset: int = 0
    plain: bool = False
    failed: Piece | None = None
    error: BaseException | None = None


class Gathered:
    """``ready``: not read, by the first position of each. ``done``: how many items have succeeded; ``read``: how many were
    read, if that is limited. ``dropped``: nobody has the iterator any more."""

    def __init__(self, plan: Plan, changed: threading.Condition, lock: threading.RLock) -> None:
        self.ready: dict[int, Part] = {}
        self.read = 0
        self.done = 0
        self.tally = Tally()
        self.dropped = False
        self._plan = plan
        self._changed = changed
        self._lock = lock
        self._position = 0  # of the next to be read
        self._shelf = Shelf()
        self._kept: deque[Part] = deque()  # read
        self._failed: list[Piece] = []  # by position: error and item, packed
        self._failed_alone: dict[int, tuple[BaseException, Any]] = {}

    # --- what comes ------------------------------------------------------------------------------------------------------

    def have(self, first: int, outcome: Outcome, failures: list[tuple[int, bytes, Any]], again: list[int]) -> None:
        """Of a batch from ``first`` on. ``failures``: position, error and item of those that have failed for good;
        ``again``: offsets of those that are to be tried once more."""
        errors = None
        if failures:
            failed = {position: (error, _packed_item(item)) for position, error, item in failures}
            errors = self._shelf.put(pickle.dumps(failed))
            self._failed.append(errors)
            for position, error, _ in failures:
                self.count_failure(position, error)
        self._lay_out(first, outcome, again, errors)
        self.done += outcome.begun - len(outcome.failures)

    def _lay_out(self, first: int, outcome: Outcome, again: list[int], errors: Piece | None) -> None:
        piece = self._shelf.put(outcome.entries)
        start = 0
        for stop in [*again, outcome.begun]:
            if stop > start:
                piece.users += 1
                self.ready[first + start] = Part(first + start, stop - start, piece, start, outcome.plain, errors)
            start = stop + 1
        self._shelf.drop(piece)  # it is the parts' from here on
        self.make_room()

    def make_room(self) -> None:
        """Forget what was read first; then, if nobody reads, what was finished first."""
        while self._shelf.size > KEPT_BYTES and len(self._kept) > 1:
            self._shelf.drop(self._kept.popleft().piece)
        while self._shelf.size > KEPT_BYTES and self.dropped and self.ready:
            self._shelf.drop(self.ready.pop(next(iter(self.ready))).piece)

    def fail(self, position: int, item: Any, error: bytes | BaseException) -> None:
        """An item that was alone on its way, or what became of all items of a batch."""
        piece = self._shelf.put(b"")
        if isinstance(error, bytes):
            errors = self._shelf.put(pickle.dumps({position: (error, _packed_item(item))}))
            self._failed.append(errors)
            self.ready[position] = Part(position, 1, piece, failed=errors)
        else:
            self._failed_alone[position] = (error, item)
            self.ready[position] = Part(position, 1, piece, error=error)
        self.count_failure(position, error)

    def count_failure(self, position: int, error: bytes | BaseException) -> None:
        if isinstance(error, bytes):
            origin, words = origin_of(error), words_of(error)
        else:
            kind = type(error).__name__
            origin, words = Origin(kind, "", 0, ""), f"{kind}: {error}"
        self.tally.add(self._plan.index(position), origin, words)

    @property
    def full(self) -> bool:
        """There is no room for more until somebody reads."""
        return bool(not self.dropped and self.ready and not self._kept and self._shelf.size > KEPT_BYTES)

    # --- what is read ----------------------------------------------------------------------------------------------------

    def take_off(self) -> Part | None:
        """The next to be read, if it is here."""
        at = self._position if self._plan.ordered else next(iter(self.ready), -1)
        part = self.ready.pop(at, None)
        if part is not None:
            self._kept.append(part)
            self._position = part.first + part.count
            if self._plan.limit == math.inf:
                self.read += part.count
            self._changed.notify_all()  # there is room
        return part

    def values(self, part: Part, stop: Callable[[], None]) -> Iterable[Any]:
        """Of a part that was taken off. ``stop``: the map is to end, for what is read is an error."""
        entries, errors = self._entries(part)
        if part.plain and self._plan.limit == math.inf:
            return entries
        return self._values(part, entries, errors, stop)

    def _values(
        self, part: Part, entries: list[Any], errors: dict[int, BaseException], stop: Callable[[], None]
    ) -> Generator[Any, None, None]:
        for position, entry in enumerate(entries, part.first):
            if self._plan.limit < math.inf:
                with self._lock:
                    self.read += 1
                    self._changed.notify_all()
            error = errors.get(position)
            try:
                value = value_of(entry) if error is None else error
            except ResultDecodeError as failure:
                value = error = failure
                self._cannot_be_read(position, failure)
            if error is not None and not self._plan.returns:
                stop()
                _note(error, self._plan.index(position))
                raise error
            yield value

    def _entries(self, part: Part) -> tuple[list[Any], dict[int, BaseException]]:
        """Entries, and errors by position."""
        if part.error is not None:
            return [None], {part.first: part.error}
        packed = self._shelf.look(part.piece)
        entries = entries_of(packed)[part.offset : part.offset + part.count] if packed else [None]
        if part.failed is None:
            return entries, {}
        within = range(part.first, part.first + part.count)
        failed = pickle.loads(opened(self._shelf.look(part.failed)))  # type: ignore[arg-type]  # it was bytes
        return entries, {at: unpack_exception(error) for at, (error, _) in failed.items() if at in within}

    def _cannot_be_read(self, position: int, error: BaseException) -> None:
        with self._lock:
            self.done -= 1
            self._failed_alone[position] = (error, NOT_KEPT)
            self.count_failure(position, error)

    def forget_what_was_read(self) -> None:
        while self._kept:
            self._shelf.drop(self._kept.popleft().piece)

    # --- afterwards ------------------------------------------------------------------------------------------------------

    def results(self) -> dict[int, Any]:
        """Values by index, of what is finished and not read to the end."""
        with self._lock:
            parts = [*self._kept, *self.ready.values()]
        found: dict[int, Any] = {}
        for part in parts:
            with contextlib.suppress(LookupError):  # there was no room for it
                entries, errors = self._entries(part)
                for position, entry in enumerate(entries, part.first):
                    if position not in errors:
                        with contextlib.suppress(ResultDecodeError):
                            found[self._plan.index(position)] = value_of(entry)
        return dict(sorted(found.items()))

    def failures(self) -> dict[int, tuple[BaseException, Any]]:
        """By position: the error, and the item or NOT_KEPT."""
        with self._lock:
            pieces, found = list(self._failed), dict(self._failed_alone)
        for piece in pieces:
            for position, (error, packed) in pickle.loads(self._shelf.look(piece)).items():  # type: ignore[arg-type]
                found[position] = (unpack_exception(error), _unpacked_item(packed))
        return dict(sorted(found.items()))


def _packed_item(item: Any) -> Any:
    """For another try: a call of this item alone, or None. It was packed before, in its batch."""
    try:
        packed = pack_call((item,), {})
    except TaskError:
        return None
    return packed if isinstance(packed, bytes) else tuple(map(bytes, packed))


def _unpacked_item(packed: Any) -> Any:
    try:
        return NOT_KEPT if packed is None else unpack_call(opened(packed))[0][0]
    except KeyboardInterrupt:
        raise
    except BaseException:  # noqa: BLE001 - the user's code; it may be what made the item fail
        return NOT_KEPT


def _note(error: BaseException, index: int) -> None:
    with contextlib.suppress(Exception):  # an exception can be anything
        error.add_note(f"(item {index} of a map)")
