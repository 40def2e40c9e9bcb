"""Callables, calls, results and exceptions as bytes, and back. Only clients and workers import this module.

Rules
-----
* Plain pickle (protocol 5) first; it is several times faster. cloudpickle when that fails, or when the stream refers to
  ``__main__``: a reference to the user's ``__main__`` would be looked up in the worker's. Whatever an importable module
  defines travels as a reference to it, unless ``cloudpickle.register_pickle_by_value`` says otherwise.
* Buffers of at least ``OUT_OF_BAND`` bytes are not copied: a payload then is ``[stream, buffer, ...]``, and the buffers
  are the caller's own memory until they are sent. A caller who changes an array before that changes the argument.
* A packed function is remembered only while everything it captures is provably what it was: constants, modules,
  importable things, and functions of which the same is true. Anything that could change in place is pickled anew each
  time. Correct first, fast second; annotations and docstrings are not looked at.
* Failing to pickle is the caller's error and says which part cannot be pickled. Failing to unpickle is an answer too.
  User code (``__reduce__``, ``__setstate__``, ``__str__``) may raise anything; only KeyboardInterrupt passes through.
* An exception travels twice: pickled if it can be rebuilt, and always as text.
* A class that the client sent by value comes back as the client's own class, and as the client left it.
"""

from __future__ import annotations

import functools
import hashlib
import io
import itertools
import pickle
import sys
import traceback
import types
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

import cloudpickle
from cloudpickle.cloudpickle import _PICKLE_BY_VALUE_MODULES as _REGISTERED

from .errors import (
    NotSerializable,
    PayloadTooLarge,
    RemoteError,
    RemoteTraceback,
    ResultDecodeError,
    ResultNotSerializable,
)
from .protocol import MAX_PAYLOAD, MAX_TEXT, Payload, clipped, payload_bytes

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer as Buffer

# A buffer smaller than this is copied into the stream: a frame of its own costs more.
OUT_OF_BAND = 64 * 1024
# Buffers of one payload that may travel apart; a message has at most protocol.MAX_FRAMES frames for all its payloads.
MAX_BUFFERS = 200

Call: TypeAlias = tuple[tuple[Any, ...], dict[str, Any]]

# How protocol 5 writes the first mention of the module name "__main__": opcode, length, name, memoize. User data that
# happens to contain it costs a slower pickling, nothing else.
_MAIN = b"\x8c\x08__main__\x94"
_ABSENT = object()
_BLAME_DEPTH = 12
_BLAME_PARTS = 1_000


# --- calls and results ---------------------------------------------------------------------------------------------


# Nothing in these can be by value, out of band or too large. Most tiny tasks return one.
_SIMPLE = frozenset({int, float, bool, type(None)})


def pack_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Payload:
    """The arguments of a call.

    Raises
    ------
    NotSerializable
        Naming the argument, and the part of it, that cannot be pickled.
    PayloadTooLarge
    """
    try:
        payload = _pack((args, kwargs))
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        parts = [(f"argument {number}", value) for number, value in enumerate(args, 1)]
        parts += [(f"keyword `{name}`", value) for name, value in kwargs.items()]
        raise NotSerializable(f"cannot pickle the call: {_blame(parts, 'an argument', error)}; {_ADVICE}") from error
    if type(payload) is not bytes or len(payload) > MAX_PAYLOAD:
        _check_size(payload, "the arguments of this call")
    return payload


def unpack_call(payload: Payload) -> Call:
    """Arguments and keywords. Raises whatever unpickling them raises."""
    call: Call = _unpack(payload)
    return call


def pack_value(value: Any) -> Payload:
    """What a task returned.

    Raises
    ------
    ResultNotSerializable
        Naming the part of it that cannot be pickled.
    PayloadTooLarge
    """
    if type(value) in _SIMPLE:
        return pickle.dumps(value, 5)
    try:
        payload = _pack(value, _ResultPickler)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        culprit = _blame([("the result", value)], "the result", error)
        advice = "return plain data, or write it to a file and return the path"
        raise ResultNotSerializable(f"cannot pickle what the task returned: {culprit}; {advice}") from error
    if type(payload) is not bytes or len(payload) > MAX_PAYLOAD:
        _check_size(payload, "what the task returned")
    return payload


def unpack_value(payload: Payload) -> Any:
    """What a task returned.

    Raises
    ------
    ResultDecodeError
        Unpickling it failed in this process; the reason is its cause.
    """
    try:
        return _unpack(payload)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise ResultDecodeError(
            f"the task's result arrived but cannot be unpickled here: {_brief(error)}; "
            "both sides need the same modules in the same versions"
        ) from error


def _pack(value: Any, pickler: type[cloudpickle.Pickler] = cloudpickle.Pickler) -> Payload:
    buffers: list[Buffer] = []

    def in_band(buffer: pickle.PickleBuffer) -> bool:
        raw = buffer.raw()
        if raw.nbytes < OUT_OF_BAND or len(buffers) == MAX_BUFFERS:
            return True
        buffers.append(raw)
        return False

    stream = _plain(value, in_band)
    if stream is None:
        buffers.clear()
        stream = _dumps_by_value(value, pickler, in_band)
    return [stream, *buffers] if buffers else stream


def _dumps(value: Any, pickler: type[cloudpickle.Pickler] = cloudpickle.Pickler) -> bytes:
    """Like _pack, with every buffer in the stream."""
    stream = _plain(value, None)
    return stream if stream is not None else _dumps_by_value(value, pickler, None)


_BufferCallback: TypeAlias = Callable[[pickle.PickleBuffer], Any] | None


def _plain(value: Any, in_band: _BufferCallback) -> bytes | None:
    """What plain pickle makes of it, unless that is nothing, or nothing a worker could read."""
    if _REGISTERED:
        return None
    try:
        stream = pickle.dumps(value, 5, buffer_callback=in_band)
    except (KeyboardInterrupt, RecursionError, MemoryError):
        raise
    except BaseException:  # noqa: BLE001 - cloudpickle can do more, and says what is wrong if it cannot
        return None
    return None if _MAIN in stream else stream


def _dumps_by_value(value: Any, pickler: type[cloudpickle.Pickler], in_band: _BufferCallback) -> bytes:
    file = io.BytesIO()
    pickler(file, 5, buffer_callback=in_band).dump(value)
    return file.getvalue()


def _unpack(payload: Payload) -> Any:
    if isinstance(payload, bytes):
        return pickle.loads(payload)
    # An array built on a read-only buffer could not be written to, though the caller's could: copy those.
    buffers = [part if not memoryview(part).readonly else bytearray(part) for part in payload[1:]]
    return pickle.loads(payload[0], buffers=buffers)


def _check_size(payload: Payload, what: str) -> None:
    size = payload_bytes(payload)
    if size > MAX_PAYLOAD:
        raise PayloadTooLarge(
            f"{what} takes {size:,} bytes pickled, over the limit of {MAX_PAYLOAD:,}; "
            "write it to a file both sides can reach and pass the path, or split the work"
        )


class _ResultPickler(cloudpickle.Pickler):  # type: ignore[misc]  # cloudpickle has no annotations
    """cloudpickle sends a class by value with its attributes, and the receiver sets them on the class it knows by that
    identity. Right for calls, where the client's class is the truth; for results it would undo the client's changes."""

    def reducer_override(self, obj: Any) -> Any:
        reduced = super().reducer_override(obj)
        if isinstance(obj, type) and type(reduced) is tuple and len(reduced) == 6:
            make, args, state, *rest, set_state = reduced
            return (make, args, (set_state, state), *rest, _fill_new_class)
        return reduced


_BARE = vars(type("_", (), {})).keys() | {"__slotnames__"}


def _fill_new_class(cls: type, how: tuple[Callable[[type, Any], object], Any]) -> None:
    set_state, state = how
    if not state[0].keys() - _BARE <= vars(cls).keys():
        set_state(cls, state)


# --- functions -----------------------------------------------------------------------------------------------------


class Chunk:
    """Calls a function for each of a list of argument tuples, as one task."""

    __slots__ = ("fn",)

    def __init__(self, fn: Callable[..., Any]) -> None:
        self.fn = fn

    def __call__(self, calls: list[tuple[Any, ...]]) -> list[Any]:
        fn = self.fn
        return [fn(*args) for args in calls]

    def __reduce__(self) -> tuple[type[Chunk], tuple[Callable[..., Any]]]:
        return Chunk, (self.fn,)


def _unpack_chunk(blob: bytes) -> Chunk:
    return Chunk(pickle.loads(blob))


class RetryOn:
    """A function whose task is retried after these exceptions only. The broker cannot know types: the worker looks."""

    __slots__ = ("fn", "kinds")

    def __init__(self, fn: Callable[..., Any], kinds: tuple[type[BaseException], ...]) -> None:
        self.fn = fn
        self.kinds = kinds

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.fn(*args, **kwargs)


def pack_kinds(kinds: tuple[type[BaseException], ...]) -> bytes:
    """Exception types, for :meth:`FunctionPickler.pack`.

    Raises
    ------
    NotSerializable
    """
    try:
        return _dumps(kinds)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise NotSerializable(f"cannot pickle the exception types of retry_on: {_brief(error)}") from error


def may_retry(fn: Callable[..., Any] | None, error: BaseException) -> bool:
    """Whether a task of this function is to be retried after this error, if it has retries left."""
    # As ``except`` does it, which asks no __instancecheck__: that is the user's and may raise.
    return not isinstance(fn, RetryOn) or any(kind in fn.kinds for kind in type(error).__mro__)


def _unpack_retry_on(blob: bytes, kinds: bytes) -> RetryOn:
    return RetryOn(pickle.loads(blob), pickle.loads(kinds))


def short_form(fn: Callable[..., Any]) -> str:
    """A function's name for messages, at most 255 characters."""
    name = getattr(fn, "__qualname__", None)
    if not isinstance(name, str):
        inner = fn.fn if type(fn) is Chunk else fn.func if isinstance(fn, functools.partial) else None
        name = type(fn).__qualname__ if inner is None else short_form(inner)
    return name[:255] if name.isascii() else name.encode(errors="replace").decode()[:255]


class FunctionPickler:
    """Packs callables, remembering those that provably have not changed. Safe to use from several threads."""

    def __init__(self) -> None:
        self._known: dict[int, _Known] = {}
        self._registry: set[str] = set()

    def pack(self, fn: Callable[..., Any], retry_on: bytes = b"") -> tuple[bytes, bytes]:
        """The function's digest (16 bytes) and its pickled form; with ``retry_on``, packed exception types, as RetryOn.

        Raises
        ------
        NotSerializable
            Naming what the function captures that cannot be pickled.
        PayloadTooLarge
        """
        if self._registry != _REGISTERED:
            self._known.clear()
            self._registry = set(_REGISTERED)
        known = self._known.get(id(fn))
        remembered = known is not None and known.fn() is fn and known.unchanged()
        packed = known.packed if known is not None and remembered else self._pack_anew(fn)
        return _named(pickle.dumps(_Retried(packed[1], retry_on), 5)) if retry_on else packed

    def _pack_anew(self, fn: Callable[..., Any]) -> tuple[bytes, bytes]:
        if type(fn) is Chunk:
            return _named(pickle.dumps(_Chunked(self.pack(fn.fn)[1]), 5))
        # Look first, pickle second: a change in between makes the next look fail, not this memory wrong.
        captured = _captures(fn)
        packed = _named(_pack_function(fn))
        if captured is not None:
            self._remember(fn, packed, captured)
        else:
            self._known.pop(id(fn), None)
        return packed

    def _remember(self, fn: Callable[..., Any], packed: tuple[bytes, bytes], captured: list[_Capture]) -> None:
        key, known = id(fn), self._known

        def forget(dead: weakref.ref[Any]) -> None:
            if (entry := known.get(key)) is not None and entry.fn is dead:
                del known[key]

        try:
            known[key] = _Known(weakref.ref(fn, forget), packed, captured)
        except TypeError:  # no weak references to it: it is packed anew each time
            known.pop(key, None)


def unpack_function(payload: Payload) -> Callable[..., Any]:
    """The callable. Raises whatever unpickling it raises."""
    fn: Callable[..., Any] = _unpack(payload)
    return fn


class _Chunked:
    """Pickles into a Chunk of a function that is already pickled."""

    def __init__(self, blob: bytes) -> None:
        self.blob = blob

    def __reduce__(self) -> tuple[Callable[[bytes], Chunk], tuple[bytes]]:
        return _unpack_chunk, (self.blob,)


class _Retried:
    """Pickles into a RetryOn of a function and of types that are already pickled."""

    def __init__(self, blob: bytes, kinds: bytes) -> None:
        self.blob = blob
        self.kinds = kinds

    def __reduce__(self) -> tuple[Callable[[bytes, bytes], RetryOn], tuple[bytes, bytes]]:
        return _unpack_retry_on, (self.blob, self.kinds)


def _named(blob: bytes) -> tuple[bytes, bytes]:
    return hashlib.blake2b(blob, digest_size=16).digest(), blob


def _pack_function(fn: Callable[..., Any]) -> bytes:
    try:
        if type(fn) is types.FunctionType and not _importable(fn):
            blob: bytes = cloudpickle.dumps(fn, 5)
        else:
            blob = _dumps(fn)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise NotSerializable(
            f"cannot pickle `{_name_of(fn)}`: {_blame(_some_parts(fn, _BLAME_PARTS), 'it', error, fn)}; {_ADVICE}"
        ) from error
    _check_size(blob, f"the function `{_name_of(fn)}` with what it captures")
    return blob


class _Known:
    """A packed callable and the state it was packed in."""

    __slots__ = ("captured", "fn", "modules", "packed")

    def __init__(self, fn: weakref.ref[Any], packed: tuple[bytes, bytes], captured: list[_Capture]) -> None:
        self.fn = fn
        self.packed = packed
        self.captured = captured
        # cloudpickle also names the submodules of captured packages that are imported at the time.
        self.modules = len(sys.modules) if any(capture.packages for capture in captured) else 0

    def unchanged(self) -> bool:
        if self.modules and self.modules != len(sys.modules):
            return False
        for capture in self.captured:  # noqa: SIM110 - a generator would double the cost of a hit
            if not capture.holds():
                return False
        return True


class _Capture:
    """What one function captures. Functions are referred to weakly: a remembered one may refer to itself."""

    __slots__ = ("cells", "code", "defaults", "fn", "functions", "globals", "kwdefaults", "packages")

    def __init__(self, fn: types.FunctionType) -> None:
        self.fn = weakref.ref(fn)
        self.code = fn.__code__
        self.defaults = fn.__defaults__
        self.kwdefaults = dict(fn.__kwdefaults__ or ())
        self.cells: list[Any] = []
        self.globals: list[tuple[str, Any]] = []
        self.functions: list[types.FunctionType] = []
        self.packages = False

    def add(self, value: Any) -> Any:
        """What to remember of a captured value; _ABSENT if it could change in place."""
        if _constant(value):
            self.packages |= type(value) is types.ModuleType and hasattr(value, "__path__")
            return value
        if type(value) is types.FunctionType:
            self.functions.append(value)
            return weakref.ref(value)
        return _ABSENT

    def holds(self) -> bool:
        fn = self.fn()
        if fn is None or fn.__code__ is not self.code or fn.__defaults__ is not self.defaults or fn.__dict__:
            return False
        if fn.__kwdefaults__ and not _same_items(fn.__kwdefaults__, self.kwdefaults):
            return False
        names = fn.__globals__
        for name, then in self.globals:
            now = names.get(name, _ABSENT)
            if now is not then and not (type(then) is weakref.ref and then() is now):
                return False
        if not self.cells:
            return True
        try:
            for cell, then in zip(fn.__closure__ or (), self.cells, strict=True):
                now = cell.cell_contents
                if now is not then and not (type(then) is weakref.ref and then() is now):
                    return False
        except ValueError:  # a cell was emptied
            return False
        return True


def _captures(fn: Callable[..., Any]) -> list[_Capture] | None:
    """What must hold for a packed form of this callable to stay right; None if nothing could assure it."""
    if _importable(fn):
        return []
    if type(fn) is not types.FunctionType:
        return None
    captures: list[_Capture] = []
    todo, seen = [fn], {id(fn)}
    while todo:
        capture = _capture(todo.pop())
        if capture is None:
            return None
        captures.append(capture)
        for inner in capture.functions:
            if id(inner) not in seen:
                seen.add(id(inner))
                todo.append(inner)
        capture.functions.clear()  # weak references from here on
    return captures


def _capture(fn: types.FunctionType) -> _Capture | None:
    capture = _Capture(fn)
    if fn.__dict__ or not all(map(_constant, itertools.chain(fn.__defaults__ or (), capture.kwdefaults.values()))):
        return None
    for name in _names(fn.__code__):
        value = fn.__globals__.get(name, _ABSENT)
        kept = value if value is _ABSENT else capture.add(value)
        if kept is _ABSENT and value is not _ABSENT:
            return None
        capture.globals.append((name, kept))
    for cell in fn.__closure__ or ():
        try:
            kept = capture.add(cell.cell_contents)
        except ValueError:  # still empty
            return None
        if kept is _ABSENT:
            return None
        capture.cells.append(kept)
    return capture


def _names(code: types.CodeType) -> Iterator[str]:
    """Every name the code could look up as a global, nested code included (attribute names among them do no harm)."""
    yield from code.co_names
    for constant in code.co_consts:
        if type(constant) is types.CodeType:
            yield from _names(constant)


_SCALARS = frozenset({type(None), bool, int, float, complex, str, bytes, range, type(Ellipsis), type(NotImplemented)})


def _constant(value: Any) -> bool:
    """True if the value cannot change in place, or travels as a reference."""
    kind = type(value)
    if kind in _SCALARS:
        return True
    if kind is tuple or kind is frozenset:
        try:
            return all(map(_constant, value))
        except RecursionError:
            return False
    if kind is types.ModuleType:
        name: str = value.__name__
        return sys.modules.get(name) is value and not _by_value(name)
    return _importable(value)


def _importable(value: Any) -> bool:
    """True for a function, builtin or class that its module has under its own name."""
    if not isinstance(value, types.FunctionType | types.BuiltinFunctionType | type):
        return False
    name, path = value.__module__, value.__qualname__
    if type(name) is not str or name == "__main__" or _by_value(name):
        return False
    found: Any = sys.modules.get(name)
    for part in path.split("."):
        found = getattr(found, part, None)
    return found is value


def _by_value(module: str) -> bool:
    return bool(_REGISTERED) and any(module == name or module.startswith(f"{name}.") for name in list(_REGISTERED))


def _same_items(now: Mapping[str, Any], then: Mapping[str, Any]) -> bool:
    return len(now) == len(then) and all(then.get(name, _ABSENT) is value for name, value in now.items())


# --- whose fault it is ---------------------------------------------------------------------------------------------

_ADVICE = "pass plain data (a path, an address, a number) and make the object inside the task"


def _blame(parts: list[tuple[str, Any]], whole: str, error: BaseException, owner: Any = _ABSENT) -> str:
    """Which part cannot be pickled, as a path and a type. Bounded: it tries parts until the budget is spent."""
    path: list[str] = []
    passed: list[Any] = []
    culprit, budget = owner, _BLAME_PARTS
    while len(path) < _BLAME_DEPTH:
        reasons = ((step, part, _why_not(part)) for step, part in parts)
        found = next((entry for entry in reasons if entry[2] is not None), None)
        if found is None or any(found[1] is part for part in passed):  # the latter: it refers to itself
            break
        step, culprit, reason = found
        passed.append(culprit)
        path.append(step)
        error = reason or error
        if isinstance(error, RecursionError):
            return f"{' -> '.join(path)} is nested too deeply, or refers to itself through __reduce__"
        budget -= 1 + next(index for index, (name, _) in enumerate(parts) if name == step)
        parts = _some_parts(culprit, budget)
    where = " -> ".join(path) or whole
    what = f" is {_a(culprit)}" if culprit is not _ABSENT else ""
    return f"{where}{what} ({_brief(error)})"


def _why_not(value: Any) -> BaseException | None:
    try:
        _dumps(value)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # noqa: BLE001 - user code may raise anything
        return error.__cause__ if isinstance(error.__cause__, RecursionError) else error
    return None


def _some_parts(value: Any, limit: int) -> list[tuple[str, Any]]:
    try:
        return list(itertools.islice(_parts(value), limit))
    except Exception:  # noqa: BLE001 - the user's __getattr__ or property; the culprit is then the value itself
        return []


def _parts(value: Any) -> Iterator[tuple[str, Any]]:
    """The parts that pickling this value would pickle too, named as a reader of the user's code would name them."""
    if isinstance(value, Chunk):
        yield from _parts(value.fn)
    elif isinstance(value, types.FunctionType):
        yield from _function_parts(value)
    elif isinstance(value, types.MethodType):
        yield "its `self`", value.__self__
        yield "its function", value.__func__
    elif isinstance(value, functools.partial):
        yield "the partial's function", value.func
        yield from ((f"the partial's argument {number}", part) for number, part in enumerate(value.args, 1))
        yield from ((f"the partial's keyword `{name}`", part) for name, part in value.keywords.items())
    elif isinstance(value, dict):
        for key, part in value.items():
            yield f"[{_short(key)}]", part
            yield f"key {_short(key)}", key
    elif isinstance(value, list | tuple):
        yield from ((f"[{index}]", part) for index, part in enumerate(value))
    elif isinstance(value, set | frozenset):
        yield from (("an item", part) for part in value)
    if not isinstance(value, types.FunctionType | type) and not isinstance(type(value).__reduce__, types.FunctionType):
        yield from _attributes(value)


def _function_parts(fn: types.FunctionType) -> Iterator[tuple[str, Any]]:
    for name, cell in zip(fn.__code__.co_freevars, fn.__closure__ or (), strict=False):
        try:
            yield f"closure variable `{name}`", cell.cell_contents
        except ValueError:
            continue
    for part in fn.__defaults__ or ():
        yield "a default argument", part
    for name, part in (fn.__kwdefaults__ or {}).items():
        yield f"the default of `{name}`", part
    for name in _names(fn.__code__):
        if name in fn.__globals__:
            yield f"global `{name}`", fn.__globals__[name]
    for name, part in fn.__dict__.items():
        yield f"attribute `{name}`", part


def _attributes(value: Any) -> Iterator[tuple[str, Any]]:
    attributes = getattr(value, "__dict__", None)
    if isinstance(attributes, dict):
        yield from ((f"attribute `{name}`", part) for name, part in attributes.items())
    for cls in type(value).__mro__:
        slots = vars(cls).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            part = getattr(value, name, _ABSENT)
            if part is not _ABSENT:
                yield f"attribute `{name}`", part


def _short(value: Any) -> str:
    try:
        text = repr(value)
    except Exception:  # noqa: BLE001 - user code may raise anything
        text = f"<{_type_name(type(value))}>"
    return text if len(text) <= 60 else f"{text[:57]}..."


def _a(value: Any) -> str:
    name = _type_name(type(value))
    return f"{'an' if name[0] in 'aeiouAEIOU' else 'a'} {name}"


def _type_name(cls: type) -> str:
    return cls.__qualname__ if cls.__module__ in ("builtins", "__main__") else f"{cls.__module__}.{cls.__qualname__}"


def _name_of(fn: Any) -> str:
    if isinstance(fn, Chunk | functools.partial):
        return _name_of(fn.fn if isinstance(fn, Chunk) else fn.func)
    return str(getattr(fn, "__name__", None) or type(fn).__name__)


def _brief(error: BaseException) -> str:
    try:
        text = str(error)
    except Exception:  # noqa: BLE001 - user code may raise anything
        text = "its message cannot be shown"
    return f"{_type_name(type(error))}: {text[:500]}" if text else _type_name(type(error))


# --- exceptions ----------------------------------------------------------------------------------------------------

# Frames of ours that lie between the worker's loop and the user's function.
_MACHINERY = frozenset({__name__, f"{__package__}.worker"})


def pack_exception(exc: BaseException) -> Payload:
    """What a task raised: the exception if it can be rebuilt to the same type, and its text. Never raises."""
    text = clipped(_formatted(exc))
    # What is written here holds builtin types alone, so reading it cannot fail for the user's reasons.
    return pickle.dumps((_rebuildable(exc), clipped(_brief(exc)), text), 5)


def unpack_exception(payload: Payload) -> BaseException:
    """The exception a task raised, with its remote traceback as cause; RemoteError if it cannot be rebuilt here."""
    try:
        stream, brief, text = _unpack(payload)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # noqa: BLE001 - the future needs an answer
        return RemoteError(f"the task raised, but its exception arrived damaged: {_brief(error)}")
    if stream is not None:
        try:
            exc = pickle.loads(stream)
            if not isinstance(exc, BaseException):
                raise pickle.UnpicklingError(f"it became {_a(exc)}")
            _set_cause(exc, text)
            return exc
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # noqa: BLE001 - user code may raise anything
            brief = f"{brief} (the exception cannot be rebuilt here: {_brief(error)})"
    remote = RemoteError(brief)
    _set_cause(remote, text)
    return remote


def _set_cause(exc: BaseException, text: str) -> None:
    # Past the class's own __setattr__: an exception can be a frozen dataclass.
    object.__setattr__(exc, "__cause__", RemoteTraceback(text))


def _rebuildable(exc: BaseException) -> bytes | None:
    try:
        stream = _dumps(exc, _ResultPickler)
        if len(stream) > MAX_PAYLOAD - 4 * MAX_TEXT:
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
        return f"{_brief(exc)}\n(its traceback cannot be shown: {_brief(error)})\n"
