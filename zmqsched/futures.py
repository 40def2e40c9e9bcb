"""The future that a client hands out: the standard's, awaitable as well."""

from __future__ import annotations

import asyncio
import concurrent.futures
from collections.abc import Callable, Generator
from concurrent.futures._base import CANCELLED_AND_NOTIFIED, RUNNING
from typing import TypeVar

T = TypeVar("T")


class Future(concurrent.futures.Future[T]):
    """A ``concurrent.futures.Future``. It also works with ``await``, in any event loop.

    ``cancel()`` has its standard meaning: a task that has not started never will, and one that runs is not touched. Whether
    it runs is known here some milliseconds after the fact; if a cancelled task turns out to have started, its result is
    dropped. ``cancel(force=True)`` ends a task that runs.
    """

    def __init__(
        self, task: bytes, withdraw: Callable[[bytes, bool], None], check_may_wait: Callable[[], None]
    ) -> None:
        super().__init__()
        self._task = task
        self._withdraw = withdraw
        self._check_may_wait = check_may_wait

    def result(self, timeout: float | None = None) -> T:
        """As the standard's; RuntimeError where waiting would be for ever: in a callback of the same client's futures."""
        if not self.done():
            self._check_may_wait()
        return super().result(timeout)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """As :meth:`result`."""
        if not self.done():
            self._check_may_wait()
        return super().exception(timeout)

    def cancel(self, *, force: bool = False) -> bool:
        """Cancel the task unless it is done; without ``force``, also unless it runs.

        With ``force`` a task that runs gets a KeyboardInterrupt, so that its ``finally`` blocks run; if it has not ended
        half a second later, its worker is killed. The future is cancelled at once, and what the task still does is
        ignored.

        Returns
        -------
        bool
            Whether the future is cancelled now.
        """
        if self.cancelled():
            if force:  # it may have started nevertheless
                self._withdraw(self._task, True)
            return True
        if super().cancel():
            self.set_running_or_notify_cancel()
        elif not (force and self._cancel_running()):
            return False
        self._withdraw(self._task, force)
        return True

    def _cancel_running(self) -> bool:
        """What the standard's future does when it is cancelled, from a state in which it refuses to be."""
        with self._condition:
            if self._state != RUNNING:
                return False
            self._state = CANCELLED_AND_NOTIFIED
            for waiter in self._waiters:
                waiter.add_cancelled(self)
            self._condition.notify_all()
        self._invoke_callbacks()  # type: ignore[attr-defined]  # typeshed leaves it out
        return True

    def __await__(self) -> Generator[object, None, T]:
        return asyncio.wrap_future(self).__await__()
