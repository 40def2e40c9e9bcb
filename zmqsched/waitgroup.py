"""WaitGroup: wait for any group of tasks across the cluster, as Go's ``sync.WaitGroup``.

The counter lives in the broker. A WaitGroup can be passed to tasks, on any node: ``add`` and ``done`` work there too.

Rules
-----
* What a task adds counts once, however often it has to be run: what an attempt has added is taken back when the task is run
  again, because a worker or a node died or for a retry, and the next attempt adds it anew.
* A task that was sent the WaitGroup, in its arguments or captured by its function, is taken to owe one ``done``, and one
  more for each that it adds. If it ends otherwise than with a result (cancelled, timed out, dead, by an exception), what it
  has not counted down of these is counted down for it, and ``wait`` raises a WaitGroupError that names it when all others
  are done. So is the debt of a task that could not be pickled or was not accepted, and of one that ends unfinished with the
  task that had submitted it.
* That is not done while there are tasks enough that hold the WaitGroup and may still call ``done``: those that it was to
  start may have been started, and one which owes nothing may fail. A task that waits for this WaitGroup itself is none of
  them.
* A task that ends well and forgot its ``done`` is waited for: as in Go, another may have taken over its debt.
* A counter below zero is an error; while a task that holds the WaitGroup runs, it may still rise again.
"""

from __future__ import annotations

import concurrent.futures
import secrets
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Executor
from typing import TYPE_CHECKING, Any, TypeVar

from . import nesting, worker
from .core.events import Tell
from .errors import WaitGroupError
from .payload import note_group
from .protocol import MAX_DELTA, GroupAdd, GroupForget, GroupWait
from .waiting import cancel_all, wait_alert

if TYPE_CHECKING:
    from .futures import Future
    from .tasks import Tasks

T = TypeVar("T")


class WaitGroup:
    """A counter that can be waited on.

    ``go(fn, ...)`` is the usual way: it adds one, submits the task, and counts down when the task is answered, whether with
    a result or an error, exactly once, however often it had to be run. ``add`` and ``done`` are for counting by hand.
    """

    def __init__(self, client: Tasks) -> None:
        if not isinstance(getattr(client, "_client", None), Executor):
            raise TypeError(f"a WaitGroup needs a Client, or what its options() gives, not {type(client).__name__}")
        self._tasks: Tasks | None = client
        self._group = secrets.token_bytes(16)
        self._started: weakref.WeakSet[Future[Any]] = weakref.WeakSet()  # by go() here
        self._lock = threading.RLock()  # of that: it may not grow while it is walked

    def go(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        """Add one, submit the task, count down at its end. Returns its future."""
        future = self._here()._in_group(self._group).submit(fn, *args, **kwargs)
        with self._lock:
            self._started.add(future)
        return future

    def add(self, n: int = 1) -> None:
        """Add ``n``, which may be negative, to the counter."""
        if isinstance(n, bool) or not isinstance(n, int):
            raise TypeError(f"add needs an int, not {type(n).__name__}")
        if abs(n) > MAX_DELTA:
            raise ValueError(f"add takes numbers up to {MAX_DELTA}, not {n}")
        message = GroupAdd([(self._group, n)])
        if self._tasks is None:
            nesting.count(message)
        else:
            self._tasks._client._check_usable()
            self._tasks._client._post(Tell(message))

    def done(self) -> None:
        """Count down by one."""
        self.add(-1)

    def wait(self, timeout: float | None = None) -> None:
        """Return when the counter is zero. What was added before, in this process, is counted.

        KeyboardInterrupt while it waits cancels the tasks that :meth:`go` has started here and that have not ended, also
        those that run.

        Raises
        ------
        TimeoutError
            It was not zero within ``timeout`` seconds.
        WaitGroupError
            It went below zero: more ``done`` than ``add``. Or tasks that held it ended without ``done``: which, and why. The
            counter is zero after that, and the WaitGroup can be used again.
        """
        client = self._here()._client
        now = worker.now()
        task = b"" if now is None or now.run is None else now.run.task
        if client._nested:
            client._keep_order()
        request, reply = client._request(lambda number: GroupWait(number, self._group, task))
        try:
            wait_alert({reply}, timeout)
            error = reply.result(0).error
        except concurrent.futures.TimeoutError:
            self._give_up(request)
            raise TimeoutError(f"the WaitGroup was not done within {timeout} s") from None
        except KeyboardInterrupt:
            self._give_up(request)
            with self._lock:
                cancel_all(self._started, force=True)
            raise
        if error:
            raise WaitGroupError(error)

    def _give_up(self, request: int) -> None:
        client = self._here()._client
        client._requests.pop(request, None)
        client._post(Tell(GroupForget(request)))

    def __reduce__(self) -> tuple[Any, ...]:
        note_group(self._group)
        return _arrived, (self._group,)

    def __repr__(self) -> str:
        return f"<zmqsched.WaitGroup {self._group.hex()[:8]}>"

    def _here(self) -> Tasks:
        """The client to submit and to wait with; in a task, the worker's."""
        return nesting.get_client() if self._tasks is None else self._tasks


def _arrived(group: bytes) -> WaitGroup:
    """A WaitGroup unpickled in a task."""
    if not worker.in_worker():
        raise RuntimeError("a WaitGroup can be sent to tasks, not to other programs")
    made = WaitGroup.__new__(WaitGroup)
    made._tasks = None
    made._group = group
    made._started = weakref.WeakSet()
    made._lock = threading.RLock()
    return made
