"""Which tasks of a map are answered, and what their answers say."""

from __future__ import annotations

import concurrent.futures
import pickle
import threading
from collections import deque
from concurrent.futures._base import FINISHED, _Waiter
from typing import TYPE_CHECKING, Any

from . import errors
from .errors import TaskError
from .payload import Outcome, as_entry, unpack_value

if TYPE_CHECKING:
    from .futures import Future


class Arrivals(_Waiter):
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


def answer_of(future: Future[Any], *, job: bool) -> Outcome | bytes | BaseException:
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
    return error or Outcome(pickle.dumps([as_entry(future.result())]), [], 1, 0.0, plain=False)
