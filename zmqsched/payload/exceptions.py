"""What tasks raise, as bytes, and back.

Rules
-----
* Each exception of a chain (causes, contexts, members of a group) travels by itself: pickled if it can be rebuilt, and as
  text with its type in any case. So one that cannot be rebuilt takes none of the others along: it alone is a RemoteError.
* Each has the traceback it had in the worker, from the user's first frame on (``tracebacks.py``). There is no second copy
  of it as a ``__cause__``, as process pools have it: nobody wants to read it twice, and an exception keeps its own cause.
* A note on the outermost exception says where it ran.
* What is written here holds builtin types alone, so reading it cannot fail for the user's reasons; the user's own pickles
  lie in it as bytes.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any, NamedTuple

from ..errors import RemoteError
from ..protocol import MAX_PAYLOAD, MAX_TEXT, Payload, clipped
from .pickling import ResultPickler, dumps, unpack
from .tracebacks import Stack, innermost, put_together, taken_apart
from .words import a, brief, type_name

# A larger exception travels as text alone.
_MAX_PICKLED = MAX_PAYLOAD - 4 * MAX_TEXT
# Exceptions of one chain or group that travel with their tracebacks.
_MAX_EXCEPTIONS = 100
_MAX_NOTES = 20
_GROUPS: dict[type, str] = {BaseExceptionGroup: "BaseExceptionGroup", ExceptionGroup: "ExceptionGroup"}


class Origin(NamedTuple):
    """What a task raised and where: the deepest line of the user's own code."""

    kind: str
    file: str
    line: int
    function: str

    def __str__(self) -> str:
        return f"{self.kind} at {self.file}:{self.line} in {self.function}" if self.file else self.kind


class _Account(NamedTuple):
    """An exception. ``stream``: pickled, or None and ``why``; ``group``: its class, if it is a plain group."""

    stream: bytes | None
    why: str
    words: str
    notes: tuple[str, ...]
    stack: Stack
    cause: tuple[Any, ...] | None
    context: tuple[Any, ...] | None
    suppress: bool
    group: str
    members: tuple[tuple[Any, ...], ...]


# Says where this code runs. A worker puts its own here.
_place: Callable[[], str] = str


def know_place(place: Callable[[], str]) -> None:
    """From now on packed exceptions say that they come from there."""
    global _place  # noqa: PLW0603 - a process is in one place
    _place = place


def pack_exception(exc: BaseException) -> Payload:
    """What a task raised. Never raises."""
    try:
        account = _account(exc, _Budget(exc))
    except BaseException as error:  # noqa: BLE001 - user code may raise anything, and the answer is what matters
        why = f"it cannot be described: {brief(error)}"
        account = _Account(None, why, brief(exc), (), (), None, None, False, "", ())
    frame = innermost(account.stack)
    at = (frame.file, frame.line, frame.qualname) if frame else ("", 0, "")
    return pickle.dumps(((type_name(type(exc)), *at), _place(), tuple(account)), 5)


def unpack_exception(payload: Payload) -> BaseException:
    """The exception a task raised, with its traceback there; RemoteError if it cannot be rebuilt here."""
    try:
        _, place, account = unpack(payload)
        exc = _rebuilt(_Account(*account))
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # noqa: BLE001 - the future needs an answer
        return RemoteError(f"the task raised, but its exception arrived damaged: {brief(error)}")
    if place:
        _add_note(exc, place)
    return exc


def origin_of(payload: Payload) -> Origin:
    """What a packed exception is and where it was raised, without rebuilding it.

    Raises
    ------
    pickle.UnpicklingError
        And whatever else reading something that :func:`pack_exception` has not made may raise.
    """
    return Origin(*unpack(payload)[0])


def words_of(payload: Payload) -> str:
    """Type and message of a packed exception, without rebuilding it. Raises as :func:`origin_of`."""
    return _Account(*unpack(payload)[2]).words


class _Budget:
    """Exceptions may refer to each other in circles."""

    def __init__(self, exc: BaseException) -> None:
        self.left = _MAX_EXCEPTIONS
        self.seen = [exc]

    def takes(self, exc: BaseException) -> bool:
        if self.left == 0 or any(exc is other for other in self.seen):
            return False
        self.left -= 1
        self.seen.append(exc)
        return True


def _account(exc: BaseException, budget: _Budget) -> _Account:
    group = _GROUPS.get(type(exc), "")
    stream, why = (None, "") if group else _pickled(exc)
    members = exc.exceptions if isinstance(exc, BaseExceptionGroup) else ()
    return _Account(
        stream,
        why,
        clipped(exc.message if group and isinstance(exc, BaseExceptionGroup) else brief(exc, MAX_TEXT)),
        _notes(exc),
        taken_apart(exc.__traceback__),
        _linked(exc.__cause__, budget),
        _linked(exc.__context__, budget),
        exc.__suppress_context__,
        group,
        tuple(tuple(_account(member, budget)) for member in members if group or budget.takes(member)),
    )


def _linked(exc: BaseException | None, budget: _Budget) -> tuple[Any, ...] | None:
    return tuple(_account(exc, budget)) if exc is not None and budget.takes(exc) else None


def _notes(exc: BaseException) -> tuple[str, ...]:
    notes = getattr(exc, "__notes__", None)
    return tuple(clipped(note) for note in notes[:_MAX_NOTES] if isinstance(note, str)) if isinstance(notes, list) else ()


def _pickled(exc: BaseException) -> tuple[bytes | None, str]:
    """A pickle that was rebuilt here to the same type; or None and the reason."""
    try:
        stream = dumps(exc, ResultPickler)
        if len(stream) > _MAX_PICKLED:
            return None, f"it takes {len(stream):,} bytes pickled"
        again = pickle.loads(stream)
    except BaseException as error:  # noqa: BLE001 - KeyboardInterrupt too: it is the task's, and the answer is what matters
        return None, f"pickling it fails: {brief(error)}"
    return (stream, "") if type(again) is type(exc) else (None, f"pickling makes {a(again)} of it")


def _rebuilt(account: _Account) -> BaseException:
    members = [_Account(*member) for member in account.members]
    exc: BaseException
    if account.group:
        kind = ExceptionGroup if account.group == "ExceptionGroup" else BaseExceptionGroup
        exc = kind(account.words, [_rebuilt(member) for member in members])  # type: ignore[type-var]
    else:
        exc = _itself(account)
        if isinstance(exc, BaseExceptionGroup):
            for member, theirs in zip(exc.exceptions, members, strict=False):
                _dress(member, theirs)
    _dress(exc, account)
    return exc


def _itself(account: _Account) -> BaseException:
    why = account.why
    if account.stream is not None:
        try:
            exc = pickle.loads(account.stream)
            if isinstance(exc, BaseException):
                return exc
            why = f"it became {a(exc)}"
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # noqa: BLE001 - user code may raise anything
            why = f"it cannot be rebuilt here: {brief(error)}"
    remote = RemoteError(account.words)
    for note in (*account.notes, f"({account.words.partition(':')[0]} arrives as text: {why})"):
        remote.add_note(note)
    return remote


def _dress(exc: BaseException, account: _Account) -> None:
    """Give it what pickling leaves out. Past the class's own __setattr__: an exception can be a frozen dataclass."""
    give: Callable[[BaseException, str, Any], None] = BaseException.__setattr__
    give(exc, "__cause__", _rebuilt(_Account(*account.cause)) if account.cause else None)
    give(exc, "__context__", _rebuilt(_Account(*account.context)) if account.context else None)
    give(exc, "__suppress_context__", account.suppress)
    give(exc, "__traceback__", put_together(account.stack))
    if account.notes and not getattr(exc, "__notes__", None):
        give(exc, "__notes__", list(account.notes))


def _add_note(exc: BaseException, note: str) -> None:
    notes = getattr(exc, "__notes__", None)
    BaseException.__setattr__(exc, "__notes__", [*(notes if isinstance(notes, list) else ()), note])
