"""``zmqsched.map`` and ``starmap``: a parallel map without making anything first."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from .client import Client
from .nesting import get_client
from .worker import in_worker

if TYPE_CHECKING:
    from numpy.random import SeedSequence

T = TypeVar("T")

_lock = threading.Lock()
_shared: Client | None = None
_shared_pid = 0


def map(  # noqa: A001 - the module's function is meant to read as zmqsched.map
    fn: Callable[..., T],
    *iterables: Iterable[Any],
    timeout: float | None = None,
    chunksize: int | Literal["auto"] = "auto",
    ordered: bool = True,
    on_error: Literal["raise", "return"] = "raise",
    seed: int | SeedSequence | None = None,
    progress: bool | None = None,
) -> list[T]:
    """The list of ``fn(*items)`` for the items of the iterables, computed in parallel; see :meth:`zmqsched.Client.map`.

    Uses this user's running cluster, found as :class:`~zmqsched.Client` finds it, or starts a local one, which serves later
    calls too and ends with the program. In a task it is the task's own cluster.
    """
    return list(
        _client().map(
            fn, *iterables, timeout=timeout, chunksize=chunksize, ordered=ordered, on_error=on_error, seed=seed,
            progress=progress,
        )
    )


def starmap(
    fn: Callable[..., T],
    iterable: Iterable[Iterable[Any]],
    *,
    timeout: float | None = None,
    chunksize: int | Literal["auto"] = "auto",
    ordered: bool = True,
    on_error: Literal["raise", "return"] = "raise",
    seed: int | SeedSequence | None = None,
    progress: bool | None = None,
) -> list[T]:
    """As :func:`map`, for an iterable of tuples of arguments, as ``itertools.starmap``."""
    return list(
        _client().starmap(
            fn, iterable, timeout=timeout, chunksize=chunksize, ordered=ordered, on_error=on_error, seed=seed,
            progress=progress,
        )
    )


def _client() -> Client:
    if in_worker():
        return get_client()
    global _shared, _shared_pid
    with _lock:
        if _shared is None or _shared_pid != os.getpid() or not _shared.usable:
            _shared, _shared_pid = Client(), os.getpid()
        return _shared
