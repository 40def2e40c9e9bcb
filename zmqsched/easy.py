"""``zmqsched.map``: a parallel map without making anything first."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from .client import Client

T = TypeVar("T")

_lock = threading.Lock()
_shared: Client | None = None
_shared_pid = 0


def map(  # noqa: A001 - the module's function is meant to read as zmqsched.map
    fn: Callable[..., T], *iterables: Iterable[Any], timeout: float | None = None, chunksize: int = 1
) -> list[T]:
    """The list of ``fn(*items)`` for the items of the iterables, in order, computed in parallel.

    Uses this user's running cluster, found as :class:`~zmqsched.Client` finds it, or starts a local one, which serves later
    calls too and ends with the program. ``timeout`` is in seconds; ``chunksize`` is how many items go as one task.
    """
    return list(_client().map(fn, *iterables, timeout=timeout, chunksize=chunksize))


def _client() -> Client:
    global _shared, _shared_pid
    with _lock:
        if _shared is None or _shared_pid != os.getpid() or not _shared.usable:
            _shared, _shared_pid = Client(), os.getpid()
        return _shared
