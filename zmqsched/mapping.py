"""A map while it runs: items become tasks, a bounded number at a time, and what comes of them is kept until it is read.

Rules
-----
* An item is in one place: at its source, in ``_again`` or ``_later`` (given back, divided, to be retried), in a batch in
  hand or on its way, in ``_ready``, or read. ``_taken`` counts those that left the source, ``_read`` those that were read.
* The I/O thread only says which batches are answered. The answers are taken in by the thread that sends batches; if there
  is none, or if it waits for the broker to take a batch, by whoever reads or asks.
* The state is under one lock. It is entered itself, not by its condition ``changed``: that is Python code, where an
  interrupt may leave it locked. Nobody holds it while he pickles a call, unpickles a result, waits for the broker, or takes
  the lock of a future or of the client.
* A batch that failed as a whole, because its worker died or its call could not be read, is divided until only the items that
  are to blame fail.
* What was read is kept too, packed, until the last result has been read: an interrupt must not lose what was finished. On
  the shelf that is bounded (``KEPT_BYTES``); what was read first goes first.
* What the garbage collector calls takes no lock.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import contextvars
import heapq
import math
import os
import pickle
import random
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures._base import FINISHED, _Waiter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from msgspec.structs import replace

from . import errors, nesting
from .core.chunking import BUDGET_S, ITEMS, Chunking
from .errors import ClusterError, NotAccepted, ResultDecodeError, TaskError, TaskTimeout, Unschedulable
from .futures import ALERT_S
from .lifetime import FORKED
from .payload import (
    Chunk,
    How,
    Origin,
    Outcome,
    Seed,
    all_plain,
    as_entry,
    enclosed,
    entries_of,
    generator,
    opened,
    origin_of,
    pack_call,
    references,
    unpack_call,
    unpack_exception,
    unpack_value,
    value_of,
    words_of,
)
from .progress import Counts
from .protocol import Options, Query, payload_bytes
from .shelf import Piece, Shelf
from .sources import Source
from .tally import Tally
from .waiting import cancel_all

if TYPE_CHECKING:
    from .client import Client
    from .futures import Future

SMALL = 32  # so many tasks are submitted at the call, without a thread
TASKS = 1_024  # on their way, of which each is of a given number of items
BYTES = 32 * 1024 * 1024  # of calls on their way; each slot has its batch, whatever that takes
KEPT_BYTES = 1024 * 1024 * 1024
LOOKAHEAD = 20_000  # items drawn and not sent, unless a batch is larger
PARTS = 16  # into which a batch that failed is divided
FIRST_LOOK_S = 0.5
LOOK_S = 2.0  # how often the slots are counted
MAX_BACKOFF_S = 60.0  # as the broker's
NOT_KEPT = object()  # instead of an item

# What is said of all items of a batch alike, or may not be tried again.
_HOPELESS = (TaskTimeout, Unschedulable, NotAccepted)


@dataclass(frozen=True)
class Plan:
    """What was asked for. ``chunksize`` 0: automatic. ``limit``: items taken and not read. ``returns``: errors in the place
    of results. ``until``: by the monotonic clock. ``numbers``: the items' indices, if they are not just counted."""

    fn: Callable[..., Any]
    options: Options
    retry_on: bytes
    spread: bool
    chunksize: int = 0
    limit: float = math.inf
    ordered: bool = True
    returns: bool = False
    seed: Seed | None = None
    timeout: float | None = None
    until: float | None = None
    numbers: Sequence[int] | None = None
    progress: bool | None = False

    def index(self, position: int) -> int:
        return position if self.numbers is None else self.numbers[position]


@dataclass(order=True)
class _Batch:
    first: int
    items: list[Any] = field(compare=False)
    alone: bool = field(compare=False)
    options: Options = field(compare=False)
    size: int = field(default=0, compare=False)  # bytes of the call


@dataclass
class _Part:
    """Results of ``count`` items from ``first`` on: the entries of ``piece`` from ``offset`` on. ``failed``: errors and
    items of some of them, by position. ``error``: of the only one."""

    first: int
    count: int
    piece: Piece
    offset: int = 0
    failed: Piece | None = None
    error: BaseException | None = None


class _Arrivals(_Waiter):
    """What a future calls, with its lock held, when it is done."""

    def __init__(self, changed: threading.Condition) -> None:
        super().__init__()
        self.done: deque[Future[Any]] = deque()
        self._changed = changed

    def add_result(self, future: Future[Any]) -> None:  # type: ignore[override]  # ours are the only ones
        self.done.append(future)
        with self._changed:
            self._changed.notify_all()

    add_exception = add_cancelled = add_result  # type: ignore[assignment]

    def expect(self, future: Future[Any]) -> None:
        with future._condition:
            if future.done():
                self.add_result(future)
            else:
                future._waiters.append(self)


class Run:
    def __init__(self, client: Client, plan: Plan, source: Source) -> None:
        self.plan = plan
        self.lock = threading.RLock()
        self.changed = threading.Condition(self.lock)
        self._client = weakref.ref(client)  # which keeps its runs until they are over
        self._pid = os.getpid()
        self._context = contextvars.copy_context()  # a notebook knows its cell by it
        self._source = source
        self._chunk = Chunk(plan.fn)
        self._policy = Chunking()
        # A batch of several has no meaning for what these say of a task.
        of_one = plan.options.timeout or not plan.options.requeue
        self._alone = plan.chunksize == 1 or (not plan.chunksize and bool(of_one))
        self._batch_options = replace(plan.options, retries=0, backoff=0.0)
        self._taken = 0
        self._again: list[_Batch] = []
        self._later: list[tuple[float, _Batch]] = []
        self._in_hand = 0  # batches that somebody is sending
        self._on_the_way: dict[Future[Any], _Batch] = {}
        self._bytes = 0  # of the calls on their way
        self._arrivals = _Arrivals(self.changed)
        self._ready: dict[int, _Part] = {}
        self._position = 0  # of the next to be read
        self._read = 0
        self._shelf = Shelf()
        self._kept: deque[_Part] = deque()  # read
        self._failed: list[Piece] = []  # by position: error and item, packed
        self._failed_alone: dict[int, tuple[BaseException, Any]] = {}
        self._done = 0
        self._tally = Tally()
        self._sender: threading.Thread | None = None
        self._slots_asked = -math.inf
        self._slots: concurrent.futures.Future[Any] | None = None
        self._end: BaseException | None = None  # why the map cannot go on
        self._stopped = False
        self._forced = False
        self._reading = False
        self._dropped = False

    # --- the caller's side -----------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Send what there is, if it is little; else a thread does it."""
        client = self._owner()
        client._last_run = self
        try:
            client._functions.keep(self._chunk)
            if self._is_small:
                self._alone = True
                while (batch := self._batch(1)) is not None:
                    self._submit(batch)
            else:
                client._take_on(self)
                self._source.begin(self.changed, lambda: self._allowed() > self._source.ready)
                self._wake_sender()
        except TaskError as error:
            self.stop(error)
        except BaseException:
            self.stop(force=True)
            raise

    @property
    def _is_small(self) -> bool:
        """All items can be sent at once, each alone, so that there is nothing more to do."""
        if self.plan.options.job:
            return True
        left = self._source.left
        return left is not None and self.plan.chunksize <= 1 and left <= min(SMALL, self.plan.limit)

    def stop(self, error: BaseException | None = None, *, force: bool = False) -> None:
        """Nothing more is sent, what has not started never will; with ``force`` what runs is ended. ``error``: what the
        reader gets behind the results that are ready."""
        if os.getpid() != self._pid:
            return
        with self.lock:
            if not self._stopped:
                self._end = error
            self._stopped = True
            self._forced |= force
            self._source.stop()
            self._again.clear()
            self._later.clear()
            mine = list(self._on_the_way)
            self.changed.notify_all()
        cancel_all(mine, force=force)
        self._look_if_over()

    def drop(self) -> None:
        """Nobody has the iterator any more. One that was never read goes on, as the standard's does."""
        self._dropped = True
        if self._reading and not self._stopped:
            self._stopped = True
            if (client := self._client()) is not None:
                client._withdraw([future._task for future in list(self._on_the_way)], force=False)

    def leave(self) -> None:
        """The program ends. Nobody reads any more: what was read and may have no end ends here."""
        if self._reading and self._source.left is None:
            self.stop()

    def counts(self) -> Counts:
        self._check_process()
        self._take_answers()
        running = sum(future.running() for future in list(self._on_the_way))
        return Counts(self.total, self._done, self._tally.count, running)

    @property
    def total(self) -> int | None:
        return self._source.total

    def open_tasks(self) -> list[bytes]:
        """Ids of the tasks that are on their way."""
        return [future._task for future in list(self._on_the_way)]

    @property
    def waiting(self) -> int:
        """Items that no worker has, of those that are known."""
        on_the_way = list(self._on_the_way.items())
        begun = sum(len(batch.items) for future, batch in on_the_way if future.running())
        if self.total is not None:
            return self.total - self._done - self._tally.count - begun
        return sum(len(batch.items) for _, batch in on_the_way) - begun

    @property
    def waits(self) -> bool:
        """Nothing is under way, and nothing will be unless somebody reads."""
        busy = self._on_the_way or self._in_hand or self._again or self._later
        return self.ended or (not busy and self._allowed() <= 0 and not self._source.ready)

    # --- sending ---------------------------------------------------------------------------------------------------------

    def _owner(self) -> Client:
        client = self._client()
        if client is None:
            raise RuntimeError("the client of this map is gone")
        return client

    def _check_process(self) -> None:
        """Before any lock: in a fork one may be held by a thread that is not there."""
        if os.getpid() != self._pid:
            raise RuntimeError(FORKED)

    def _wake_sender(self) -> None:
        with self.lock:
            self.changed.notify_all()
            if self._sender is not None or self._stopped:
                return
            run = self._context.copy().run
            self._sender = threading.Thread(target=run, args=(self._send,), name="zmqsched map", daemon=True)
        self._sender.start()

    def _send(self) -> None:
        self._count_slots()
        if self._slots is not None:
            concurrent.futures.wait([self._slots], FIRST_LOOK_S)
        try:
            while self._sender is not None:
                self._send_one()
        except BaseException as error:
            self.stop(error)  # or its reader would wait for ever
            raise
        if self._stopped:
            self.stop()  # dropped: who draws is told too
        self._look_if_over()

    def _send_one(self) -> None:
        self._take_answers(sending=True)
        self._count_slots()
        with self.lock:
            batch = self._next()
            if batch is None and self.ended:
                self._sender = None
            elif batch is None and not self._arrivals.done:
                self.changed.wait(self._patience())
            elif self._arrivals.done:
                self.changed.notify_all()  # who reads takes them while this waits for the broker
        if batch is not None:
            self._submit(batch)

    def _next(self) -> _Batch | None:
        """What to send now, if anything."""
        now = time.monotonic()
        while self._later and self._later[0][0] <= now:
            heapq.heappush(self._again, heapq.heappop(self._later)[1])
        if self._stopped:
            return None
        if not self._has_room():
            self._source.wanted = self._source.capacity
            return None
        return self._batch(self._size())

    def _batch(self, size: int) -> _Batch | None:
        batch = self._first_of(heapq.heappop(self._again), size) if self._again else self._fresh(size)
        if batch is not None:
            self._in_hand += 1
        return batch

    def _fresh(self, size: int) -> _Batch | None:
        source = self._source
        hungry = not self.plan.chunksize and len(self._on_the_way) < self._policy.slots
        source.capacity = max(2 * size, min(LOOKAHEAD, size * self._policy.depth))
        # Said before looking how many there are: who draws puts in first, and looks at this second.
        source.wanted = 1 if hungry or self.plan.limit < math.inf else size
        ready = int(min(source.ready, max(0, self._allowed())))
        if ready < size and source.left is None and not source.paused and not hungry:
            return None
        items = source.take(min(size, ready))
        if not items:
            return None
        first, self._taken = self._taken, self._taken + len(items)
        return _Batch(first, items, self._alone, self.plan.options if self._alone else self._batch_options)

    def _first_of(self, batch: _Batch, size: int) -> _Batch:
        """Not more than ``size`` of what was given back."""
        if not self.plan.chunksize and len(batch.items) > size:
            heapq.heappush(self._again, _Batch(batch.first + size, batch.items[size:], False, batch.options))
            del batch.items[size:]
        return batch

    def _size(self) -> int:
        if self._alone or self.plan.chunksize:
            return self.plan.chunksize or 1
        left = self._source.left
        if left is not None:
            left += sum(len(batch.items) for batch in self._again)
        if self.plan.limit < math.inf:
            left = int(self.plan.limit if left is None else min(self.plan.limit, left))
        return self._policy.size(left)

    def _has_room(self) -> bool:
        many, depth = len(self._on_the_way), self._policy.depth
        if self._alone or self.plan.chunksize:
            depth = max(depth, min(TASKS, ITEMS // (self.plan.chunksize or 1)))
        return many < depth and (self._bytes < BYTES or many <= self._policy.slots)

    def _allowed(self) -> float:
        """How many items may leave the source."""
        if not self._dropped and self._ready and not self._kept and self._shelf.size > KEPT_BYTES:
            return 0
        return self.plan.limit - (self._taken - self._read)

    def _submit(self, batch: _Batch) -> None:
        future = None
        try:
            future = self._submitted(batch)
        except (RuntimeError, ClusterError) as error:
            self.stop(error)
        finally:
            with self.lock:
                self._in_hand -= 1
                if future is not None:
                    self._on_the_way[future] = batch
                    self._bytes += batch.size
        if future is not None:
            self._arrivals.expect(future)
            if self._stopped:
                future.cancel(force=self._forced)

    def _submitted(self, batch: _Batch) -> Future[Any] | None:
        """None: it cannot travel as it is, and is divided."""
        plan, client = self.plan, self._owner()
        if plan.options.job:
            return self._for_the_job(batch)
        numbers: tuple[int, ...] = (batch.first, len(batch.items))
        if plan.numbers is not None:
            numbers = tuple(plan.numbers[batch.first : batch.first + len(batch.items)])
        how = How(
            batch.alone, plan.numbers is None, numbers, plan.spread, math.inf if plan.chunksize else BUDGET_S, plan.seed,
            plan.retry_on,
        )  # fmt: skip
        if batch.alone:
            return client._submit(self._chunk, (batch.items[0], *how), {}, batch.options, plan.retry_on, accepted=True)
        try:
            packed = pack_call(tuple(batch.items), {})
        except TaskError:
            self._divide(batch, PARTS)
            return None
        if references() is not None:
            self._divide(batch, len(batch.items))
            return None
        batch.size = payload_bytes(packed)
        return client._submit(self._chunk, (enclosed(packed), *how), {}, batch.options, b"", accepted=True)

    def _for_the_job(self, batch: _Batch) -> Future[Any]:
        """As a task that whoever follows the job understands."""
        plan = self.plan
        (item,) = batch.items
        keywords = {} if plan.seed is None else {"rng": generator(plan.seed, plan.index(batch.first))}
        args = tuple(item) if plan.spread else (item,)
        return self._owner()._submit(plan.fn, args, keywords, batch.options, plan.retry_on)

    def _count_slots(self) -> None:
        """Ask how many tasks can run at once, now and then; the answer is looked at when it is there."""
        now = time.monotonic()
        if self._slots is not None and self._slots.done():
            with contextlib.suppress(ClusterError):  # the batches tell
                nodes = self._slots.result().nodes
                self._policy.slots = max(1, sum(node.slots for node in nodes if node.state == "alive"))
            self._slots = None
        if self._slots is None and now - self._slots_asked >= LOOK_S:
            self._slots_asked = now
            with contextlib.suppress(RuntimeError, ClusterError):  # shut down, and what was accepted goes on
                self._slots = self._owner()._request(Query)[1]

    def _patience(self) -> float:
        due = self._later[0][0] - time.monotonic() if self._later else LOOK_S
        return max(0.0, min(due, LOOK_S))

    # --- answers ---------------------------------------------------------------------------------------------------------

    def _take_answers(self, *, sending: bool = False) -> None:
        """Unless the thread that sends does; it may be kept waiting while it has a batch in hand."""
        arrived = self._arrivals.done
        while arrived and (sending or not self._sender_takes):
            try:
                future = arrived.popleft()
            except IndexError:  # another thread has taken it
                return
            try:
                self._take_answer(future)
            except BaseException:  # an interrupt
                if future in self._on_the_way:
                    arrived.appendleft(future)
                raise
        self._look_if_over()

    @property
    def _sender_takes(self) -> bool:
        return self._sender is not None and not self._in_hand

    def _take_answer(self, future: Future[Any]) -> None:
        batch = self._on_the_way[future]
        answer = _answer_of(future, job=bool(self.plan.options.job))
        if isinstance(answer, ClusterError | concurrent.futures.CancelledError):
            self.stop(answer)
        with self.lock:
            del self._on_the_way[future]
            self._bytes -= batch.size
            if not self._stopped:
                self._take_in(batch, answer)
            self.changed.notify_all()
        if self._again or self._later:
            self._wake_sender()

    def _take_in(self, batch: _Batch, answer: Outcome | bytes | BaseException) -> None:
        if isinstance(answer, Outcome):
            self._have(batch, answer)
        elif batch.alone or isinstance(answer, _HOPELESS) or not self.plan.options.requeue:
            for position, item in enumerate(batch.items, batch.first):
                self._fail(position, item, answer)
        else:
            self._divide(batch, PARTS)

    def _divide(self, batch: _Batch, parts: int) -> None:
        """Those of its items that are to blame are found by trying parts of it, down to single ones."""
        size = -(-len(batch.items) // parts)
        with self.lock:
            for start in range(0, len(batch.items), size):
                options = self.plan.options if size == 1 else batch.options
                items = batch.items[start : start + size]
                heapq.heappush(self._again, _Batch(batch.first + start, items, size == 1, options))

    def _have(self, batch: _Batch, outcome: Outcome) -> None:
        """Put the results down; give back what was not begun, and what is to be tried again."""
        self._policy.learn(outcome.begun, outcome.seconds, max(batch.size, payload_bytes(opened(outcome.entries))))
        again: list[int] = []
        failed: dict[int, tuple[bytes, Any]] = {}
        for offset, error, retry in outcome.failures:
            position, item = batch.first + offset, batch.items[offset]
            if retry and self.plan.options.retries:
                again.append(offset)
                self._retry(position, item)
            else:
                failed[position] = (error, _packed_item(item))
                self._count_failure(position, error)
        errors = self._shelf.put(pickle.dumps(failed)) if failed else None
        if errors is not None:
            self._failed.append(errors)
        self._lay_out(batch.first, outcome, again, errors)
        self._done += outcome.begun - len(outcome.failures)
        if rest := batch.items[outcome.begun :]:
            heapq.heappush(self._again, _Batch(batch.first + outcome.begun, rest, False, batch.options))

    def _lay_out(self, first: int, outcome: Outcome, again: list[int], errors: Piece | None) -> None:
        piece = self._shelf.put(outcome.entries)
        start = 0
        for stop in [*again, outcome.begun]:
            if stop > start:
                piece.users += 1
                self._ready[first + start] = _Part(first + start, stop - start, piece, start, errors)
            start = stop + 1
        self._shelf.drop(piece)  # it is the parts' from here on
        self._make_room()

    def _make_room(self) -> None:
        """Forget what was read first; then, if nobody reads, what was finished first."""
        while self._shelf.size > KEPT_BYTES and len(self._kept) > 1:
            self._shelf.drop(self._kept.popleft().piece)
        while self._shelf.size > KEPT_BYTES and self._dropped and self._ready:
            self._shelf.drop(self._ready.pop(next(iter(self._ready))).piece)

    def _retry(self, position: int, item: Any) -> None:
        """As the broker does it: this was the first attempt."""
        asked = self.plan.options
        wait_s = min(MAX_BACKOFF_S, asked.backoff) * (1.0 - random.random() / 2)
        options = replace(asked, retries=asked.retries - 1, backoff=min(MAX_BACKOFF_S, 2 * asked.backoff))
        heapq.heappush(self._later, (time.monotonic() + wait_s, _Batch(position, [item], True, options)))

    def _fail(self, position: int, item: Any, error: bytes | BaseException) -> None:
        """An item that was alone on its way, or what became of all items of a batch."""
        piece = self._shelf.put(b"")
        if isinstance(error, bytes):
            errors = self._shelf.put(pickle.dumps({position: (error, _packed_item(item))}))
            self._failed.append(errors)
            self._ready[position] = _Part(position, 1, piece, failed=errors)
        else:
            self._failed_alone[position] = (error, item)
            self._ready[position] = _Part(position, 1, piece, error=error)
        self._count_failure(position, error)

    def _count_failure(self, position: int, error: bytes | BaseException) -> None:
        if isinstance(error, bytes):
            origin, words = origin_of(error), words_of(error)
        else:
            kind = type(error).__name__
            origin, words = Origin(kind, "", 0, ""), f"{kind}: {error}"
        self._tally.add(self.plan.index(position), origin, words)

    @property
    def pause(self) -> str:
        return "the results are to be read first" if self.waits else ""

    @property
    def ended(self) -> bool:
        """Nothing is sent any more."""
        if self._stopped:
            return True
        if self._source.left != 0 or self._again or self._later:
            return False
        return not self._in_hand and not self._on_the_way

    def _look_if_over(self) -> None:
        client = self._client()
        if client is None or self not in client._runs:
            return
        if self.ended:
            client._runs.discard(self)
        if self.ended or (client._closed and self.waits):
            client._wake_if_idle()

    # --- reading ---------------------------------------------------------------------------------------------------------

    def read(self) -> Generator[Any, None, None]:
        """The results; behind them whatever keeps the map from going on."""
        while (part := self._next_part()) is not None:
            yield from self._values(part)
        with self.lock:
            while self.ended and not self._stopped and self._kept:
                self._shelf.drop(self._kept.popleft().piece)

    def _next_part(self) -> _Part | None:
        self._check_process()
        self._reading = True
        while True:
            self._take_answers()
            with self.lock:
                if self._stopped and self._end is None:
                    return None
                at = self._position if self.plan.ordered else next(iter(self._ready), -1)
                if at in self._ready:
                    return self._taken_off(at)
                if self._end is not None:
                    raise self._end
                if self.ended and self._source.error is not None:
                    raise self._source.error
                if self.ended:
                    return None
                if self._sender_takes or not self._arrivals.done:
                    self._wait()
            if self.plan.until is not None and time.monotonic() >= self.plan.until:
                self.stop()
                raise TimeoutError

    def _wait(self) -> None:
        left = math.inf if self.plan.until is None else self.plan.until - time.monotonic()
        if left > 0:
            with nesting.waiting():
                self.changed.wait(min(left, ALERT_S))

    def _taken_off(self, at: int) -> _Part:
        part = self._ready.pop(at)
        self._kept.append(part)
        self._position = part.first + part.count
        if self.plan.limit == math.inf:
            self._read += part.count
        self.changed.notify_all()  # there is room
        return part

    def _values(self, part: _Part) -> Generator[Any, None, None]:
        entries, errors = self._entries(part)
        if not errors and self.plan.limit == math.inf and all_plain(entries):
            yield from entries
            return
        for position, entry in enumerate(entries, part.first):
            if self.plan.limit < math.inf:
                with self.lock:
                    self._read += 1
                    self.changed.notify_all()
            error = errors.get(position)
            try:
                value = value_of(entry) if error is None else error
            except ResultDecodeError as failure:
                value = error = failure
                self._cannot_be_read(position, failure)
            if error is not None and not self.plan.returns:
                self.stop()
                _note(error, self.plan.index(position))
                raise error
            yield value

    def _entries(self, part: _Part) -> tuple[list[Any], dict[int, BaseException]]:
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
        with self.lock:
            self._done -= 1
            self._failed_alone[position] = (error, NOT_KEPT)
            self._count_failure(position, error)

    # --- afterwards ------------------------------------------------------------------------------------------------------

    def results(self) -> dict[int, Any]:
        """Values by index, of what is finished and not read to the end."""
        self._check_process()
        self._take_answers()
        with self.lock:
            parts = [*self._kept, *self._ready.values()]
        found: dict[int, Any] = {}
        for part in parts:
            with contextlib.suppress(LookupError):  # there was no room for it
                entries, errors = self._entries(part)
                for position, entry in enumerate(entries, part.first):
                    if position not in errors:
                        with contextlib.suppress(ResultDecodeError):
                            found[self.plan.index(position)] = value_of(entry)
        return dict(sorted(found.items()))

    def failures(self) -> dict[int, tuple[BaseException, Any]]:
        """By position: the error, and the item or NOT_KEPT."""
        self._check_process()
        self._take_answers()
        with self.lock:
            pieces, found = list(self._failed), dict(self._failed_alone)
        for piece in pieces:
            for position, (error, packed) in pickle.loads(self._shelf.look(piece)).items():  # type: ignore[arg-type]
                found[position] = (unpack_exception(error), _unpacked_item(packed))
        return dict(sorted(found.items()))

    def summary(self) -> list[str]:
        self._take_answers()
        with self.lock:
            return self._tally.lines()


def _answer_of(future: Future[Any], *, job: bool) -> Outcome | bytes | BaseException:
    """What a done future brings, without its lock: an outcome, a packed error of the task's, or an error about the task."""
    final = future._final
    if future._state != FINISHED:
        return concurrent.futures.CancelledError()
    if final is None and future._exception is not None:
        return future._exception
    try:
        if job:  # whoever follows it may have unpacked the answer
            return _as_outcome(future)
        assert final is not None
        if final.verdict == "error":
            return final.value if isinstance(final.value, bytes) else b"".join(final.value)
        if final.verdict == "ok":
            outcome = unpack_value(final.value)
            return outcome if isinstance(outcome, Outcome) else TaskError(f"a batch returned a {type(outcome).__name__}")
    except TaskError as error:
        return error
    kind: type[Exception] = getattr(errors, final.verdict)
    return kind(final.text)


def _as_outcome(future: Future[Any]) -> Outcome | BaseException:
    error = future.exception()
    return error or Outcome(pickle.dumps([as_entry(future.result())]), [], 1, 0.0)


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
