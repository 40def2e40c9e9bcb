"""A map while it runs: items become tasks, a bounded number at a time; what comes of them is in ``gathered.py``.

Rules
-----
* An item is in one place: at its source, in ``_again`` or ``_later`` (given back, divided, to be retried), in a batch in
  hand or on its way, or gathered. ``_taken`` counts those that left the source.
* The I/O thread only says which batches are answered. The answers are taken in by the thread that sends batches; if there
  is none, or if it waits for the broker to take a batch, by whoever reads or asks.
* The state is under one lock. It is entered itself, not by its condition ``changed``: that is Python code, where an
  interrupt may leave it locked. Nobody holds it while he pickles a call, unpickles a result, waits for the broker, or takes
  the lock of a future or of the client.
* A batch that failed as a whole, because its worker died or its call could not be read, is divided until only the items that
  are to blame fail.
* What the garbage collector calls takes no lock.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import contextvars
import heapq
import math
import os
import random
import threading
import time
import weakref
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from msgspec.structs import replace

from . import nesting
from .answers import Arrivals, answer_of
from .batches import PARTS, Batch, CannotTravel
from .core.chunking import ITEMS, Chunking
from .errors import ClusterError, NotAccepted, TaskError, TaskTimeout, Unschedulable
from .futures import ALERT_S
from .gathered import Gathered, Part
from .lifetime import FORKED
from .payload import Chunk, Outcome, opened
from .plan import Plan
from .progress import Counts
from .protocol import Query, payload_bytes
from .sources import Source
from .waiting import cancel_all

if TYPE_CHECKING:
    from .client import Client
    from .futures import Future

SMALL = 32  # so many tasks are submitted at the call, without a thread
TASKS = 1_024  # on their way, of which each is of a given number of items
BYTES = 32 * 1024 * 1024  # of calls on their way; each slot has its batch, whatever that takes
LOOKAHEAD = 20_000  # items drawn and not sent, unless a batch is larger
FIRST_LOOK_S = 0.5
LOOK_S = 2.0  # how often the slots are counted
MAX_BACKOFF_S = 60.0  # as the broker's

# What is said of all items of a batch alike, or may not be tried again.
_HOPELESS = (TaskTimeout, Unschedulable, NotAccepted)


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
        self._again: list[Batch] = []
        self._later: list[tuple[float, Batch]] = []
        self._in_hand = 0  # batches that somebody is sending
        self._on_the_way: dict[Future[Any], Batch] = {}
        self._bytes = 0  # of the calls on their way
        self._arrivals = Arrivals(self.changed)
        self._gathered = Gathered(plan, self.changed, self.lock)
        self._sender: threading.Thread | None = None
        self._slots_asked = -math.inf
        self._slots: concurrent.futures.Future[Any] | None = None
        self._end: BaseException | None = None  # why the map cannot go on
        self._stopped = False
        self._forced = False
        self._reading = False

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
        self._gathered.dropped = True
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
        return Counts(self.total, self._gathered.done, self._gathered.tally.count, running)

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
            return self.total - self._gathered.done - self._gathered.tally.count - begun
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

    def _next(self) -> Batch | None:
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

    def _batch(self, size: int) -> Batch | None:
        batch = self._first_of(heapq.heappop(self._again), size) if self._again else self._fresh(size)
        if batch is not None:
            self._in_hand += 1
        return batch

    def _fresh(self, size: int) -> Batch | None:
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
        return Batch(first, items, self._alone, self.plan.options if self._alone else self._batch_options)

    def _first_of(self, batch: Batch, size: int) -> Batch:
        """Not more than ``size`` of what was given back."""
        if not self.plan.chunksize and len(batch.items) > size:
            heapq.heappush(self._again, Batch(batch.first + size, batch.items[size:], False, batch.options))
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
        if self._gathered.full:
            return 0
        return self.plan.limit - (self._taken - self._gathered.read)

    def _submit(self, batch: Batch) -> None:
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

    def _submitted(self, batch: Batch) -> Future[Any] | None:
        """None: it cannot travel as it is, and is divided."""
        try:
            return batch.submit(self._owner(), self.plan, self._chunk)
        except CannotTravel as cannot:
            self._divide(batch, cannot.parts)
            return None

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
        answer = answer_of(future, job=bool(self.plan.options.job))
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

    def _take_in(self, batch: Batch, answer: Outcome | bytes | BaseException) -> None:
        if isinstance(answer, Outcome):
            self._have(batch, answer)
        elif batch.alone or isinstance(answer, _HOPELESS) or not self.plan.options.requeue:
            for position, item in enumerate(batch.items, batch.first):
                self._gathered.fail(position, item, answer)
        else:
            self._divide(batch, PARTS)

    def _divide(self, batch: Batch, parts: int) -> None:
        """Those of its items that are to blame are found by trying parts of it, down to single ones."""
        with self.lock:
            for part in batch.divided(parts, self.plan):
                heapq.heappush(self._again, part)

    def _have(self, batch: Batch, outcome: Outcome) -> None:
        """Put the results down; give back what was not begun, and what is to be tried again."""
        self._policy.learn(outcome.begun, outcome.seconds, max(batch.size, payload_bytes(opened(outcome.entries))))
        again: list[int] = []
        failures: list[tuple[int, bytes, Any]] = []
        for offset, error, retry in outcome.failures:
            position, item = batch.first + offset, batch.items[offset]
            if retry and self.plan.options.retries:
                again.append(offset)
                self._retry(position, item)
            else:
                failures.append((position, error, item))
        self._gathered.have(batch.first, outcome, failures, again)
        if rest := batch.items[outcome.begun :]:
            heapq.heappush(self._again, Batch(batch.first + outcome.begun, rest, False, batch.options))

    def _retry(self, position: int, item: Any) -> None:
        """As the broker does it: this was the first attempt."""
        asked = self.plan.options
        wait_s = min(MAX_BACKOFF_S, asked.backoff) * (1.0 - random.random() / 2)
        options = replace(asked, retries=asked.retries - 1, backoff=min(MAX_BACKOFF_S, 2 * asked.backoff))
        heapq.heappush(self._later, (time.monotonic() + wait_s, Batch(position, [item], True, options)))

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

    def next_values(self) -> Iterable[Any] | None:
        """The next results, which it waits for; None behind the last. Raises whatever keeps the map from going on."""
        part = self._next_part()
        if part is not None:
            return self._gathered.values(part, self.stop)
        with self.lock:
            if self.ended and not self._stopped:
                self._gathered.forget_what_was_read()
        return None

    def _next_part(self) -> Part | None:
        self._check_process()
        self._reading = True
        while True:
            self._take_answers()
            with self.lock:
                if self._stopped and self._end is None:
                    return None
                if (part := self._gathered.take_off()) is not None:
                    return part
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

    # --- afterwards ------------------------------------------------------------------------------------------------------

    def results(self) -> dict[int, Any]:
        """Values by index, of what is finished and not read to the end."""
        self._check_process()
        self._take_answers()
        return self._gathered.results()

    def failures(self) -> dict[int, tuple[BaseException, Any]]:
        """By position: the error, and the item or NOT_KEPT."""
        self._check_process()
        self._take_answers()
        return self._gathered.failures()

    def summary(self) -> list[str]:
        self._take_answers()
        with self.lock:
            return self._gathered.tally.lines()
