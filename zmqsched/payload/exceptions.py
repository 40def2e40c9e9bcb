"""What tasks raise, as bytes: pickled if it can be rebuilt, and always as text."""

from __future__ import annotations

import pickle
import traceback

from ..errors import RemoteError, RemoteTraceback
from ..protocol import MAX_PAYLOAD, MAX_TEXT, Payload, clipped
from .blame import a, brief
from .pickling import ResultPickler, dumps, unpack

# Frames of ours that lie between the worker's loop and the user's function.
_MACHINERY = frozenset({f"{__package__}.wrappers", "zmqsched.worker"})
# A larger exception travels as text alone.
_MAX_PICKLED = MAX_PAYLOAD - 4 * MAX_TEXT


def pack_exception(exc: BaseException) -> Payload:
    """What a task raised: the exception if it can be rebuilt to the same type, and its text. Never raises."""
    text = clipped(_formatted(exc))
    # What is written here holds builtin types alone, so reading it cannot fail for the user's reasons.
    return pickle.dumps((_rebuildable(exc), clipped(brief(exc)), text), 5)


def unpack_exception(payload: Payload) -> BaseException:
    """The exception a task raised, with its remote traceback as cause; RemoteError if it cannot be rebuilt here."""
    try:
        stream, words, text = unpack(payload)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # noqa: BLE001 - the future needs an answer
        return RemoteError(f"the task raised, but its exception arrived damaged: {brief(error)}")
    if stream is not None:
        try:
            exc = pickle.loads(stream)
            if not isinstance(exc, BaseException):
                raise pickle.UnpicklingError(f"it became {a(exc)}")
            _set_cause(exc, text)
            return exc
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # noqa: BLE001 - user code may raise anything
            words = f"{words} (the exception cannot be rebuilt here: {brief(error)})"
    remote = RemoteError(words)
    _set_cause(remote, text)
    return remote


def _set_cause(exc: BaseException, text: str) -> None:
    # Past the class's own __setattr__: an exception can be a frozen dataclass.
    object.__setattr__(exc, "__cause__", RemoteTraceback(text))


def _rebuildable(exc: BaseException) -> bytes | None:
    try:
        stream = dumps(exc, ResultPickler)
        if len(stream) > _MAX_PICKLED:
            return None
        return stream if type(pickle.loads(stream)) is type(exc) else None
    except BaseException:  # noqa: BLE001 - KeyboardInterrupt too: it is the task's, and the answer is what matters
        return None


def _formatted(exc: BaseException) -> str:
    try:
        trace = exc.__traceback__
        while trace is not None and trace.tb_frame.f_globals.get("__name__") in _MACHINERY:
            trace = trace.tb_next
        return "".join(traceback.format_exception(type(exc), exc, trace))
    except BaseException as error:  # noqa: BLE001 - user code may raise anything
        return f"{brief(exc)}\n(its traceback cannot be shown: {brief(error)})\n"
