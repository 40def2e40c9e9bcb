"""Tasks that submit tasks and wait for them: :func:`get_client`, and what the node is told of waits.

Rules
-----
* A worker has one client, made when a task asks for it first, and used by all its tasks. Its incarnation says which worker
  it is in, so the broker can end its tasks when that has died.
* While any thread of a task waits for the cluster, and only if it really has to, its slot is lent (``core/agent.py``). So
  tasks may wait for tasks to any depth, on a single slot. A time limit goes on counting.
* What a task submits goes before other tasks of the same priority, the deeper the sooner: recursion runs depth first, and
  the number of waiting workers stays near depth times slots.
* What a task submits and waits for comes behind what it has counted on WaitGroups before (``core/fences.py``).
* What it submits with a WaitGroup has been accepted before its own result goes out: were it lost with the worker, the
  counter would never be zero.
* What a task has submitted and not waited for goes on when the task has ended, and ends with its worker.
"""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import TYPE_CHECKING, Any

from . import origin, worker
from .protocol import MAX_DEPTH, Attempt, GoesOn, GroupAdd, Waits, nested_incarnation

if TYPE_CHECKING:
    from .client import Client

_lock = threading.RLock()  # an interrupt may come while it is held
_numbers = itertools.count(1)
_client: Client | None = None
_client_pid = 0
_waits: dict[bytes, int] = {}  # by task: how many of its threads wait
_counted = threading.Event()  # on a WaitGroup, since the last fence


def get_client() -> Client:
    """A client of the cluster that this code runs in.

    In a task: the worker's own client, of the cluster that runs the task. Submit with it and wait: the task's slot serves
    others meanwhile. Tasks that it has submitted and not waited for go on when the task ends, but end with its worker.

    Elsewhere: the client that ``zmqsched.map`` uses, of this user's running cluster or of one that is started locally.
    """
    if not worker.in_worker():
        from .easy import _client as shared

        return shared()
    global _client, _client_pid
    with _lock:
        if _client is None or not _client.usable or _client_pid != os.getpid():
            from .client import Client

            assert origin.node is not None, "a worker of no node"
            _client, _client_pid = Client(origin.node), os.getpid()
            worker.before_result = _client._deliver_groups
        return _client


def incarnation() -> bytes:
    """Of a new client in this worker."""
    assert origin.node is not None, "a worker of no node"
    return nested_incarnation(origin.node.node, origin.worker, next(_numbers) % (1 << 16))


def depth() -> int:
    """How deep a task is that is submitted here: 0 outside of tasks."""
    now = worker.now()
    run = None if now is None else now.run
    return 0 if run is None else min(MAX_DEPTH, run.depth + 1)


def attempt() -> Attempt | None:
    """Whose code this is part of, if a task's."""
    now = worker.now()
    run = None if now is None else now.run
    return None if run is None else Attempt(run.task, run.attempt)


def count(addition: GroupAdd) -> None:
    """The task counts on a WaitGroup that it was sent."""
    with _lock:
        worker.tell(addition)
        _counted.set()


def keep_order(set_fence: Callable[[], None]) -> None:
    """What is said next through the worker's client is to come behind what tasks here have counted."""
    with _lock:
        if _counted.is_set():
            _counted.clear()
            set_fence()


def waiting() -> AbstractContextManager[object]:
    """Around whatever waits for the cluster: in a task its slot is lent meanwhile."""
    now = worker.now()
    run = None if now is None else now.run
    return nullcontext() if run is None else _Wait(run.task)


class _Wait:
    __slots__ = ("_task",)

    def __init__(self, task: bytes) -> None:
        self._task = task

    def __enter__(self) -> None:
        with _lock:
            number = _waits[self._task] = _waits.get(self._task, 0) + 1
            if number == 1:
                worker.tell(Waits(self._task))

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with _lock:
            number = _waits[self._task] = _waits[self._task] - 1
            if not number:
                del _waits[self._task]
                worker.tell(GoesOn(self._task))


class Waiters(list[Any]):
    """Whom a future wakes, in a task. While the standard's ``wait`` and ``as_completed`` are among them, the slot is lent;
    a waiter with ``lends`` sees to that itself."""

    def __init__(self) -> None:
        super().__init__()
        self._lent: list[tuple[object, AbstractContextManager[object]]] = []

    def append(self, waiter: Any) -> None:
        super().append(waiter)
        if not getattr(waiter, "lends", False):
            wait = waiting()
            wait.__enter__()
            self._lent.append((waiter, wait))

    def remove(self, waiter: Any) -> None:
        super().remove(waiter)
        for index, (entered, wait) in enumerate(self._lent):
            if entered is waiter:
                del self._lent[index]
                wait.__exit__(None, None, None)
                return
