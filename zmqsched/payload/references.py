"""What a call refers to on the cluster besides its own bytes: noted while it is packed, found again where it runs.

Objects that stand for something on the cluster say so themselves, in their ``__reduce__``: so it does not matter how deep
inside an argument they lie. Only a call may refer to tasks: elsewhere (a closure, a result) ``noting`` is None, and the
object raises what its user is to do instead. To WaitGroups a function may refer too.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any, Literal

from ..protocol import Payload
from .pickling import unpack


class References:
    """``inputs``: the futures whose results are arguments of the call, by task id. ``groups``: the WaitGroups in it."""

    __slots__ = ("groups", "inputs")

    def __init__(self) -> None:
        self.inputs: dict[bytes, Any] = {}
        self.groups: set[bytes] = set()


class _Thread(threading.local):
    """``noting``: of the call that this thread is packing, None as long as it refers to nothing; False: it packs none.
    ``noted``: of the call that it packed last, if after its function. ``captured``: the WaitGroups in the function."""

    noting: References | Literal[False] | None = False
    noted: References | None = None
    captured: set[bytes] | None = None

    def __init__(self) -> None:
        self.values: Mapping[bytes, Payload] = {}
        self.unpacked: dict[bytes, Any] = {}


thread = _Thread()


def noting() -> References | None:
    """Where to note what the call that this thread is packing refers to; None if it is packing none."""
    if thread.noting is None:
        thread.noting = References()
    return thread.noting or None


def references() -> References | None:
    """What the call that this thread has packed last refers to, if to anything."""
    return thread.noted


def note_group(group: bytes) -> None:
    """What this thread is packing refers to this WaitGroup."""
    if (call := noting()) is not None:
        call.groups.add(group)
    elif thread.captured is not None:
        thread.captured.add(group)


def groups() -> tuple[bytes, ...]:
    """The WaitGroups that the function and the call that this thread has packed last refer to."""
    noted, captured = thread.noted, thread.captured
    if noted is None and not captured:
        return ()
    return tuple(sorted((captured or set()) | (noted.groups if noted is not None else set())))


def input_value(task: bytes) -> Any:
    """In a worker, while it unpacks a call: what this task has returned, the same object each time it is named."""
    if task not in thread.unpacked:
        thread.unpacked[task] = unpack(thread.values[task])
    return thread.unpacked[task]


def packed_value(*parts: Any) -> Any:
    """A value that was packed before it became part of a call."""
    return unpack(list(parts))


def as_it_is(value: Any) -> Any:
    """A value in the place of what stood for it."""
    return value
