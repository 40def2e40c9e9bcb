"""Futures among the arguments of a call, on the client's side: what travels in their place, and what keeps a call back.

Rules
-----
* What is done travels as its value, packed as it came if nobody has asked for it yet. What is not travels as the task's id,
  and the broker puts the result there; the client is not asked.
* A future that has failed or was cancelled fails the call at once.
* A future of another client that is not done is refused: this cluster may know nothing of it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from .core.inputs import failed
from .errors import DependencyFailed, NotSerializable, PayloadTooLarge
from .futures import Future, Owner
from .payload import References
from .protocol import MAX_ITEMS, Final, Payload


def inputs_of(found: References, client: Owner) -> tuple[Future[Any], ...]:
    """The futures that the call refers to.

    Raises
    ------
    NotSerializable
        One is another client's.
    PayloadTooLarge
        They are too many for one task.
    """
    futures: tuple[Future[Any], ...] = tuple(found.inputs.values())
    if any(future._owner is not client and not future.done() for future in futures):
        raise NotSerializable(
            "a future among the arguments belongs to another client and is not done: wait for it, or submit both tasks with "
            "the same client"
        )
    if len(futures) > MAX_ITEMS:
        raise PayloadTooLarge(
            f"the call has {len(futures):,} unfinished futures among its arguments, over the limit of {MAX_ITEMS:,}; "
            "combine some of them in a task first"
        )
    return futures


def first_failed(futures: Iterable[Future[Any]]) -> Future[Any] | None:
    return next((future for future in futures if future.done() and not future._returned()), None)


def values_of(futures: Iterable[Future[Any]]) -> dict[bytes, Payload]:
    """What those have returned, by task, that are done; none of them has failed."""
    return {future._task: future._value() for future in futures if future.done()}


def fail(future: Future[Any], argument: Future[Any]) -> bool:
    """An argument of its call has failed. True if there are callbacks to run."""
    ended = Final(argument._task, "cancelled") if argument.cancelled() else argument._final
    if ended is not None:
        return future._answer(failed(future._task, ended, None))
    error = DependencyFailed(failed(future._task, Final(argument._task, "error"), None).text)
    error.__cause__ = argument._exception
    return future._fail(error)
