"""TaskGroup: tasks that belong together. All have ended when its ``with`` has, and when one fails the rest is cancelled.

Rules
-----
* As ``asyncio.TaskGroup``, for code that blocks: the first task to fail cancels the others, those that run by force. So does
  an exception in the body. What failed is raised together at the end, as an ExceptionGroup.
* A body cannot be interrupted as a coroutine can. After a failure ``submit`` raises CancelledError in it, and so does
  ``result()`` of a task that was cancelled: that is how such a body ends, and not a failure of its own.
* KeyboardInterrupt and SystemExit, in the body or while it waits, cancel everything and go on up at once.
* A group that is made in another's body, in the same thread, is cancelled with it.
* Who failed is learned in the I/O thread, without unpickling anything, and acted upon in the thread of callbacks.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from concurrent.futures import CancelledError
from concurrent.futures import Future as StandardFuture
from concurrent.futures._base import _Waiter
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

from .errors import DependencyFailed
from .futures import ALERT_S
from .waiting import DONE, cancel_all

if TYPE_CHECKING:
    from collections.abc import Callable

    from .futures import Future
    from .tasks import Tasks

T = TypeVar("T")



class _Bodies(threading.local):
    """The groups whose bodies this thread is in, the innermost last."""

    def __init__(self) -> None:
        self.groups: list[TaskGroup] = []


_bodies = _Bodies()


class TaskGroup:
    """Made by ``client.task_group()``, for ``with``.

    Leaving the ``with`` waits for all of its tasks. It raises an ExceptionGroup of what tasks, and the body, have raised, a
    BaseExceptionGroup if one of them is no Exception. Cancelled tasks are no failures; nor is one whose input has failed, if
    that failure is among the others.
    """

    def __init__(self, tasks: Tasks) -> None:
        self._tasks = tasks
        self._changed = threading.Condition()
        self._pending: dict[Future[Any], int] = {}  # which of the group's tasks each is
        self._failed: dict[int, Future[Any]] = {}
        self._inner: list[TaskGroup] = []
        self._outer: TaskGroup | None = None
        self._number = 0
        self._watch = _Watch(self)
        self._state = "new"  # then "open", at the end "closed"
        self._cancelled = False

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        """Run ``fn(*args, **kwargs)`` as one of the group's tasks. Any thread may call this until the ``with`` has ended.

        Raises
        ------
        RuntimeError
            The group is not open: outside its ``with``.
        concurrent.futures.CancelledError
            A task of the group has failed, or the group was cancelled: nothing new is started.
        """
        self._check_open()
        future = self._tasks.submit(fn, *args, **kwargs)
        with self._changed:
            refused = self._cancelled or self._state != "open"
            if not refused:
                self._number += 1
                self._pending[future] = self._number
        if refused:
            cancel_all([future], force=True)
            self._check_open()
        self._watch.over(future)
        return future

    def map(self, fn: Callable[..., T], *iterables: Iterable[Any]) -> list[Future[T]]:
        """A task of the group for each item, or each tuple of items as ``zip`` makes them; their futures, in order."""
        return [self.submit(fn, *items) for items in zip(*iterables, strict=False)]

    def _cancel(self) -> None:
        """Cancel what has not ended, those that run too, and start nothing new."""
        with self._changed:
            self._cancelled = True
            pending, inner = list(self._pending), list(self._inner)
        cancel_all(pending, force=True)
        for group in inner:
            group._cancel()

    def __enter__(self) -> TaskGroup:
        if self._state != "new":
            raise RuntimeError("a TaskGroup is for one `with`; make another")
        self._state = "open"
        if _bodies.groups:
            outer = self._outer = _bodies.groups[-1]
            with outer._changed:
                outer._inner.append(self)
                self._cancelled = outer._cancelled
        _bodies.groups.append(self)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if error is not None:
                self._cancel()
            if error is None or isinstance(error, Exception):
                self._wait()
        except BaseException:
            self._cancel()
            raise
        finally:
            self._close()
        failures = self._failures()
        if error is not None and not isinstance(error, Exception):
            return
        if error is not None and not isinstance(error, CancelledError):
            failures.insert(0, error)
        if failures:
            raise BaseExceptionGroup("unhandled errors in a TaskGroup", failures) from None
        if error is None and self._outer is not None and self._outer._cancelled:
            raise CancelledError("the TaskGroup around this one was cancelled")

    def __repr__(self) -> str:
        with self._changed:
            facts = f"{self._number} tasks, {len(self._pending)} unfinished, {len(self._failed)} failed"
        return f"<zmqsched.TaskGroup, state: {'cancelled' if self._cancelled else self._state}, {facts}>"

    def _check_open(self) -> None:
        if self._state != "open":
            when = "before its `with` has begun" if self._state == "new" else "after its `with` has ended"
            raise RuntimeError(f"nothing can be submitted to a TaskGroup {when}")
        if self._cancelled:
            raise CancelledError("the TaskGroup was cancelled, or one of its tasks has failed: nothing new is started")

    def _wait(self) -> None:
        with self._changed:
            while self._pending and not (self._failed and not self._cancelled):
                self._changed.wait(ALERT_S)
        if self._pending:  # the thread of callbacks may be busy
            self._cancel()
            self._wait()

    def _close(self) -> None:
        with self._changed:
            self._state = "closed"
        _bodies.groups.remove(self)
        if self._outer is not None:
            with self._outer._changed:
                self._outer._inner.remove(self)

    def _failures(self) -> list[BaseException]:
        """In the order in which the tasks were submitted."""
        with self._changed:
            failed = [self._failed[number] for number in sorted(self._failed)]
        errors = [error for future in failed if (error := future.exception()) is not None]
        return [error for error in errors if not isinstance(error, DependencyFailed)] or errors

    def _ended(self, future: StandardFuture[Any], *, failed: bool) -> None:
        """In any thread, which holds the future's lock."""
        with self._changed:
            number = self._pending.pop(future, None)  # type: ignore[call-overload]  # it is one of ours
            if number is None:
                return
            if failed:
                self._failed[number] = future  # type: ignore[assignment]
            if failed or not self._pending:
                self._changed.notify_all()
        if failed and not self._cancelled:
            self._tasks._client._callbacks.put(self._cancel)


class _Watch(_Waiter):
    """Hears of each future's end, as ``concurrent.futures.wait`` does."""

    def __init__(self, group: TaskGroup) -> None:
        self._group = group

    def over(self, future: Future[Any]) -> None:
        with future._condition:
            if future._state not in DONE:
                future._waiters.append(self)
                return
        self._group._ended(future, failed=not future.cancelled() and not future._returned())

    def add_result(self, future: StandardFuture[Any]) -> None:
        self._group._ended(future, failed=False)

    def add_exception(self, future: StandardFuture[Any]) -> None:
        self._group._ended(future, failed=True)

    def add_cancelled(self, future: StandardFuture[Any]) -> None:
        self._group._ended(future, failed=False)
