"""Waiting for many futures: ``wait`` and ``as_completed`` as the standard's, and what an interrupt does.

Rules
-----
* An interrupt (KeyboardInterrupt: Ctrl-C, a notebook's stop button) of a wait cancels what was waited for and has not ended,
  also what runs, and goes on up at once. What has ended stays as it is.
* Nothing on that way waits: the cluster is told in one message per client before anything else is done, the rest is
  bookkeeping here, and callbacks run in their own thread. Interrupted again in the middle of it, the cluster knows already.
* Futures of other executors may be among them; those are cancelled as far as they let themselves.
"""

from __future__ import annotations

import concurrent.futures
import math
import queue
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ALL_COMPLETED
from concurrent.futures._base import CANCELLED_AND_NOTIFIED, FINISHED, PENDING, RUNNING, DoneAndNotDoneFutures, _Waiter
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from . import nesting
from .futures import ALERT_S, Future
from .progress import FutureWork, show

if TYPE_CHECKING:
    import asyncio

    from .futures import Owner

T = TypeVar("T")
StandardFuture = concurrent.futures.Future

DONE = (CANCELLED_AND_NOTIFIED, FINISHED)


def wait(
    fs: Iterable[StandardFuture[T]],
    timeout: float | None = None,
    return_when: str = ALL_COMPLETED,
    *,
    progress: bool | None = None,
) -> DoneAndNotDoneFutures[T]:
    """As ``concurrent.futures.wait``: the sets ``done`` and ``not_done``, when all are done, the first is done
    (``FIRST_COMPLETED``) or has failed (``FIRST_EXCEPTION``), or ``timeout`` seconds are over.

    KeyboardInterrupt while it waits cancels those that are not done, also those that run.

    ``progress``: whether to show a bar of how many are done, failed and running, which says why when nothing has moved for
    three seconds; by default in interactive sessions, if it takes longer than half a second.
    """
    fs = set(fs)
    work = FutureWork(fs)
    bar = show(progress, work, "futures", next((future._owner for future in fs if isinstance(future, Future)), None))
    try:
        return wait_alert(fs, timeout, return_when)
    except KeyboardInterrupt:
        cancel_all(fs, force=True)
        raise
    finally:
        if bar is not None:
            bar.close()


def wait_alert(
    fs: set[StandardFuture[T]], timeout: float | None, return_when: str = ALL_COMPLETED
) -> DoneAndNotDoneFutures[T]:
    """As ``concurrent.futures.wait``, but no signal is lost on it."""
    if (timeout is not None and not timeout > ALERT_S) or all(future.done() for future in fs):
        return concurrent.futures.wait(fs, timeout, return_when)
    until = math.inf if timeout is None else time.monotonic() + timeout
    with nesting.waiting():
        while (now := time.monotonic()) + ALERT_S < until:
            found = concurrent.futures.wait(fs, ALERT_S, return_when)
            if time.monotonic() - now < ALERT_S:  # it was not the time that ended it
                return found
        return concurrent.futures.wait(fs, until - now, return_when)


def as_completed(fs: Iterable[StandardFuture[T]], timeout: float | None = None) -> AsCompleted[T]:
    """As ``concurrent.futures.as_completed``, for ``for`` and for ``async for``: each future when it is done, once, however
    often it was given. ``timeout`` is in seconds from this call on; then the iteration ends with TimeoutError.

    KeyboardInterrupt while it waits cancels those that are not done, also those that run; so does the cancellation of an
    ``async for``.
    """
    return AsCompleted(fs, timeout)


def cancel_all(futures: Iterable[StandardFuture[Any]], *, force: bool = False) -> None:
    """Cancel many futures at once; with ``force`` also tasks that run. Waits for nothing."""
    found: dict[Owner, list[Future[Any]]] = {}
    others = []
    for future in futures:
        if not isinstance(future, Future):
            others.append(future)
        elif future._state == PENDING or (force and future._state == RUNNING):
            found.setdefault(future._owner, []).append(future)
    for owner, theirs in found.items():
        owner._withdraw([future._task for future in theirs], force=force)
    for owner, theirs in found.items():
        for future in theirs:
            if future._turn_cancelled((PENDING, RUNNING)) and future._done_callbacks:
                owner._callbacks.put(future._call_back)
    for other in others:
        other.cancel()


class AsCompleted(Generic[T]):
    """Futures as they complete: an iterator, and an asynchronous one. Made by :func:`as_completed`.

    It keeps no reference to a future that it has given.
    """

    def __init__(self, fs: Iterable[StandardFuture[T]], timeout: float | None) -> None:
        self._waiter = _Arrivals()
        self._pending: set[StandardFuture[T]] = set()
        self._until = None if timeout is None else time.monotonic() + timeout
        for future in set(fs):
            with future._condition:
                self._pending.add(future)
                if future._state in DONE:
                    self._waiter.done.put(future)
                else:
                    future._waiters.append(self._waiter)
        self._total = len(self._pending)

    def __iter__(self) -> Iterator[StandardFuture[T]]:
        return self

    def __next__(self) -> StandardFuture[T]:
        if not self._pending:
            raise StopIteration
        try:
            with nesting.waiting() if self._waiter.done.empty() else nullcontext():
                future = self._arrived()
        except KeyboardInterrupt:
            cancel_all(self._pending, force=True)
            raise
        return self._given(future)

    def __aiter__(self) -> AsCompleted[T]:
        return self

    async def __anext__(self) -> StandardFuture[T]:
        import asyncio  # heavy, and a program that uses it has it

        if not self._pending:
            raise StopAsyncIteration
        arrived = asyncio.Event()
        self._waiter.wake = (asyncio.get_running_loop(), arrived)
        try:
            while self._waiter.done.empty():
                with nesting.waiting():
                    async with asyncio.timeout(self._left()):
                        await arrived.wait()
                arrived.clear()
        except TimeoutError:
            raise self._late() from None
        except asyncio.CancelledError:
            cancel_all(self._pending, force=True)
            raise
        return self._given(self._waiter.done.get())

    def close(self) -> None:
        """End the iteration. What is not done goes on."""
        # Without the iteration's last reference this may run anywhere, also where another such lock is held: a waiter that
        # cannot be removed at once stays, and forgets what it is told.
        self._waiter.dropped = True
        for future in self._pending:
            if future._condition.acquire(blocking=False):
                if self._waiter in future._waiters:
                    future._waiters.remove(self._waiter)
                future._condition.release()
        self._pending.clear()

    def __del__(self) -> None:
        self.close()

    def _arrived(self) -> StandardFuture[T]:
        while True:
            left = self._left()
            try:
                return self._waiter.done.get(timeout=ALERT_S if left is None else min(left, ALERT_S))
            except queue.Empty:
                if left is not None and left <= ALERT_S:
                    raise self._late() from None

    def _left(self) -> float | None:
        return None if self._until is None else min(max(0.0, self._until - time.monotonic()), threading.TIMEOUT_MAX)

    def _given(self, future: StandardFuture[T]) -> StandardFuture[T]:
        self._pending.discard(future)
        return future

    def _late(self) -> TimeoutError:
        error = TimeoutError(f"{len(self._pending)} (of {self._total}) futures unfinished")
        self.close()
        return error


class _Arrivals(_Waiter):
    """What a future calls, with its lock held, when it is done."""

    lends = True  # the slot of a task, and only while it really waits

    def __init__(self) -> None:
        super().__init__()
        self.done: queue.SimpleQueue[StandardFuture[Any]] = queue.SimpleQueue()
        self.wake: tuple[asyncio.AbstractEventLoop, asyncio.Event] | None = None
        self.dropped = False

    def add_result(self, future: StandardFuture[Any]) -> None:
        if self.dropped:
            return
        self.done.put(future)
        if self.wake is not None:
            loop, arrived = self.wake
            try:
                loop.call_soon_threadsafe(arrived.set)
            except RuntimeError:  # that loop is closed
                self.wake = None

    def add_exception(self, future: StandardFuture[Any]) -> None:
        self.add_result(future)

    def add_cancelled(self, future: StandardFuture[Any]) -> None:
        self.add_result(future)
