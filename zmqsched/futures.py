"""The future that a client hands out: the standard's, awaitable as well."""

from __future__ import annotations

import asyncio
import concurrent.futures
from collections.abc import Callable, Generator
from typing import TypeVar

T = TypeVar("T")


class Future(concurrent.futures.Future[T]):
    """A ``concurrent.futures.Future``. It also works with ``await``, in any event loop.

    ``cancel`` has its standard meaning: a task that has not started never will, and one that runs is not touched. Whether
    it runs is known here some milliseconds after the fact; if a cancelled task turns out to have started, its result is
    dropped.
    """

    def __init__(self, task: bytes, withdraw: Callable[[bytes], None], check_may_wait: Callable[[], None]) -> None:
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

    def cancel(self) -> bool:
        if self.cancelled():
            return True
        if not super().cancel():
            return False
        self.set_running_or_notify_cancel()
        self._withdraw(self._task)
        return True

    def __await__(self) -> Generator[object, None, T]:
        return asyncio.wrap_future(self).__await__()
