"""The arguments of calls, and what tasks return."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from typing import Any, TypeAlias

from ..errors import NotSerializable, ResultDecodeError, ResultNotSerializable
from ..protocol import Payload
from .blame import blame
from .pickling import OUT_OF_BAND, ResultPickler, check_size, pack, unpack
from .references import thread
from .words import brief

Call: TypeAlias = tuple[tuple[Any, ...], dict[str, Any]]

# Nothing in these can be by value, out of band or too large, or refer to anything. Most tiny tasks take and return such.
_SIMPLE = frozenset({int, float, bool, type(None)})
_NONE = pickle.dumps(None, 5)
# To look at more arguments, one by one, costs more than what it saves.
_FEW = 32


def pack_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Payload:
    """The arguments of a call. :func:`~zmqsched.payload.references` then says what it refers to.

    Raises
    ------
    NotSerializable
        Naming the argument, and the part of it, that cannot be pickled.
    PayloadTooLarge
    """
    if not kwargs and len(args) <= _FEW and _SIMPLE.issuperset(map(type, args)):
        thread.noted = thread.captured = None
        return pickle.dumps((args, kwargs), 5)
    outer, thread.noting, thread.captured = thread.noting, None, None
    try:
        payload = pack((args, kwargs))
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        parts = [(f"argument {number}", value) for number, value in enumerate(args, 1)]
        parts += [(f"keyword `{name}`", value) for name, value in kwargs.items()]
        raise NotSerializable(f"cannot pickle {blame(parts, error)}") from error
    finally:
        thread.noted, thread.noting = thread.noting or None, outer
    if type(payload) is not bytes or len(payload) > OUT_OF_BAND:
        check_size(payload, "the arguments of this call")
    return payload


def unpack_call(payload: Payload, inputs: Mapping[bytes, Payload] | None = None) -> Call:
    """Arguments and keywords; ``inputs``: results of the tasks that it refers to. Raises whatever unpickling them raises."""
    call: Call
    if inputs is None:
        call = unpack(payload)
        return call
    thread.values = inputs
    try:
        call = unpack(payload)
        return call
    finally:
        thread.values = {}
        thread.unpacked.clear()


def pack_value(value: Any) -> Payload:
    """What a task returned.

    Raises
    ------
    ResultNotSerializable
        Naming the part of it that cannot be pickled.
    PayloadTooLarge
    """
    if value is None:
        return _NONE
    if type(value) in _SIMPLE:
        return pickle.dumps(value, 5)
    try:
        payload = pack(value, ResultPickler)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        culprit = blame([("the result", value)], error, results=True)
        raise ResultNotSerializable(f"cannot pickle what the task returned: {culprit}") from error
    if type(payload) is not bytes or len(payload) > OUT_OF_BAND:
        check_size(payload, "what the task returned")
    return payload


def unpack_value(payload: Payload) -> Any:
    """What a task returned.

    Raises
    ------
    ResultDecodeError
        Unpickling it failed in this process; the reason is its cause.
    """
    try:
        return unpack(payload)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise ResultDecodeError(
            f"the task's result arrived but cannot be unpickled here: {brief(error)}; "
            "both sides need the same modules in the same versions"
        ) from error
