"""Functions as bytes named by digest, each packed once while it is what it was.

Rules
-----
* A function is not looked into again while everything it captures is provably what it was (``captures.py``): constants,
  modules, importable things, and functions of which the same is true. Correct first, fast second; annotations and
  docstrings are not looked at.
* Anything else is pickled anew for each call, and compared with what was sent: an equal function has the same digest, is the
  same bytes in memory, and is not sent again. Arrays are not copied for that but compared in place, with the copy that
  was sent: 0.1 to 0.2 ms for a megabyte. A change in place is thereby seen.
* What one function captures that is larger than ``LARGE`` is told of once: it is sent to each worker.
* The user's own modules that function and call need go with the function (``modules.py``).
"""

from __future__ import annotations

import functools
import hashlib
import pickle
import sys
import types
import warnings
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

from ..errors import NotSerializable
from ..protocol import Payload, payload_bytes
from .blame import blame, parts
from .captures import Capture, captures, importable, imported_in
from .modules import STACK_GLOBAL, Bundle, Modules
from .pickling import REGISTERED, check_size, dumps, pack, pickled_bytes, unpack
from .references import thread
from .shipped import Shipped
from .words import brief, name_of, type_name
from .wrappers import Wrapped, Wrapper

LARGE = 1_000_000
_MAX_WHOLE = 16
_MAX_STEPS = 5

_modules = Modules()


class Packed:
    """A callable. ``lazily``: what its code imports when it runs. ``whole``: what was made of it, by what it needs.
    ``groups``: the WaitGroups in it."""

    __slots__ = ("groups", "imported", "lazily", "named", "plain", "whole")

    def __init__(self, payload: Payload, lazily: frozenset[str]) -> None:
        self.plain = (_digest(payload), payload)
        self.lazily = lazily
        self.whole: dict[tuple[type[Wrapper] | None, bytes, bytes], tuple[bytes, Payload]] = {}
        self.imported = 0
        self.named: frozenset[str] = frozenset()
        self.groups = thread.captured

    def find_modules(self) -> None:
        """``named``: the user's own modules that it refers to, as far as so many (``imported``) are there."""
        self.imported = len(sys.modules)
        self.named = _modules.named_in(self.plain[1]) | _modules.own_among(self.lazily)


class _Known(NamedTuple):
    """What a callable was packed as, and what must hold for that to be right without looking; None if nothing could."""

    fn: weakref.ref[Any]
    packed: Packed
    captured: list[Capture] | None
    # cloudpickle also names the submodules of captured packages that are imported at the time.
    modules: int

    def unchanged(self) -> bool:
        if self.captured is None or (self.modules and self.modules != len(sys.modules)):
            return False
        for capture in self.captured:  # noqa: SIM110 - a generator would double the cost of a hit
            if not capture.holds():
                return False
        return True


class FunctionPickler:
    """Packs callables, remembering those that there still are. Safe to use from several threads."""

    def __init__(self) -> None:
        self._known: dict[int, _Known] = {}
        self._registry: set[str] = set()
        self._told: set[str] = set()

    def pack(self, fn: Callable[..., Any], retry_on: bytes = b"", call: Payload = b"") -> tuple[bytes, Payload]:
        """The function's digest (16 bytes) and its pickled form, with the user's own modules that it and ``call`` need; with
        ``retry_on``, packed exception types, as RetryOn.

        Raises
        ------
        NotSerializable
            Naming what the function captures that cannot be pickled, or the module that is none.
        PayloadTooLarge
        """
        kind = None
        known = self._known.get(id(fn))
        if known is not None and known.fn() is fn and known.unchanged() and self._registry == REGISTERED:
            packed = known.packed
        elif isinstance(fn, Wrapper):
            kind, packed = type(fn), fn.packed or self._packed(fn.fn)
        else:
            packed = self._packed(fn)
        thread.captured = packed.groups
        if packed.imported != len(sys.modules):
            packed.find_modules()
        names = packed.named
        if type(call) is not bytes or STACK_GLOBAL in call:
            names |= _modules.named_in(call)
        if retry_on:
            names |= _modules.named_in(retry_on)
        elif not names and kind is None:
            return packed.plain
        bundle = _modules.bundle(names) if names else None
        if kind is None and not retry_on and bundle is None:
            return packed.plain
        return _whole(packed, kind, retry_on, bundle)

    def keep(self, wrapper: Wrapper) -> None:
        """Pack the wrapper's function now, and do not look again whether it has changed."""
        wrapper.packed = self._packed(wrapper.fn)

    def _packed(self, fn: Callable[..., Any]) -> Packed:
        if self._registry != REGISTERED:
            self._known.clear()
            self._registry = set(REGISTERED)
        known = self._known.get(id(fn))
        if known is not None and known.fn() is fn:
            if known.unchanged():
                return known.packed
            before = known.packed
        else:
            before = None
        # Look first, pickle second: a change in between makes the next look fail, not this memory wrong.
        captured = captures(fn)
        payload = _pickled(fn)
        if before is not None and _equal(payload, before.plain[1]):
            packed = before
        else:
            packed = Packed(_copied(payload), imported_in(fn))
            if payload_bytes(payload) >= LARGE:
                self._tell(fn)
        self._remember(fn, packed, captured)
        return packed

    def _remember(self, fn: Callable[..., Any], packed: Packed, captured: list[Capture] | None) -> None:
        key, known = id(fn), self._known

        def forget(dead: weakref.ref[Any]) -> None:
            if (entry := known.get(key)) is not None and entry.fn is dead:
                del known[key]

        modules = len(sys.modules) if captured and any(capture.packages for capture in captured) else 0
        try:
            known[key] = _Known(weakref.ref(fn, forget), packed, captured, modules)
        except TypeError:  # no weak references to it: it is packed anew each time
            known.pop(key, None)

    def _tell(self, fn: Callable[..., Any]) -> None:
        """Warn of what is large, once for each function and variable."""
        path, value, size = _largest(fn)
        about = f"`{name_of(fn)}` captures {path}"
        if path and about not in self._told:
            self._told.add(about)
            warnings.warn(
                f"{about} ({type_name(type(value))}, {size / 1e6:.1f} MB); it is sent once to each worker, and again when "
                "it has changed. If that is too much, load it inside the task, from a path",
                UserWarning,
                stacklevel=_depth_of_caller(),
            )


def pack_kinds(kinds: tuple[type[BaseException], ...]) -> bytes:
    """Exception types, for :meth:`FunctionPickler.pack`.

    Raises
    ------
    NotSerializable
    """
    try:
        return dumps(kinds)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise NotSerializable(f"cannot pickle the exception types of retry_on: {brief(error)}") from error


def load_function(payload: Payload) -> tuple[Callable[..., Any], Shipped | None]:
    """The callable, and the modules that have come with it: from here on imports find those. Raises whatever unpickling it
    raises."""
    found: Any = unpack(payload)
    if type(found) is not Wrapped:
        return found, None
    shipped = Shipped.of(found.modules) if found.modules else None
    if shipped is not None:
        shipped.activate()
    return found.load(), shipped


def _pickled(fn: Callable[..., Any]) -> Payload:
    thread.captured = set()
    try:
        payload = pack(fn, plain_first=type(fn) is not types.FunctionType or importable(fn))
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise NotSerializable(f"cannot pickle {blame([(f'`{name_of(fn)}`', fn)], error)}") from error
    check_size(payload, f"the function `{name_of(fn)}` with what it captures")
    return payload


def _whole(packed: Packed, kind: type[Wrapper] | None, retry_on: bytes, bundle: Bundle | None) -> tuple[bytes, Payload]:
    key = (kind, retry_on, bundle.digest if bundle else b"")
    whole = packed.whole.get(key)
    if whole is None:
        digest, payload = packed.plain
        buffers: list[Any] = []
        wrapped = Wrapped(payload, kind, retry_on, bundle.blob if bundle else b"")
        stream = pickle.dumps(wrapped, 5, buffer_callback=lambda buffer: buffers.append(buffer.raw()))
        # By what it is made of: what is large in it has been read once already.
        name = hashlib.blake2b(digest, digest_size=16)
        name.update(b"\0".join((str(kind).encode(), retry_on, key[2])))
        if len(packed.whole) >= _MAX_WHOLE:
            packed.whole.clear()
        whole = packed.whole[key] = (name.digest(), [stream, *buffers] if buffers else stream)
    return whole


def _digest(payload: Payload) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for part in (payload,) if isinstance(payload, bytes) else payload:
        digest.update(part)
    return digest.digest()


def _copied(payload: Payload) -> Payload:
    """The same in memory of its own. A bytearray compares itself with any buffer at the speed of memory; bytes do not."""
    return payload if isinstance(payload, bytes) else [payload[0], *map(bytearray, payload[1:])]


def _equal(payload: Payload, kept: Payload) -> bool:
    if isinstance(payload, bytes) or isinstance(kept, bytes):
        return payload == kept
    return len(payload) == len(kept) and all(bool(ours == theirs) for ours, theirs in zip(kept, payload, strict=True))


def _largest(fn: Any) -> tuple[str, Any, int]:
    """The largest thing that a callable captures: the way to it, itself, its size in bytes."""
    path: list[str] = []
    value, size = fn, 0
    while isinstance(value, types.FunctionType | types.MethodType | functools.partial) and len(path) < _MAX_STEPS:
        sized = [(pickled_bytes(part), step, part) for step, part in parts(value) if not isinstance(part, types.ModuleType)]
        size, step, value = max(sized, key=lambda entry: entry[0], default=(0, "", None))
        if size < LARGE:
            break
        path.append(step[step.index("`") :] if "`" in step else step)
    return " -> ".join(path), value, size


def _depth_of_caller() -> int:
    """The ``stacklevel`` for ``warnings.warn`` at which the user's code is."""
    frame, depth = sys._getframe(1), 1
    while frame.f_back is not None and str(frame.f_globals.get("__name__")).startswith("zmqsched."):
        frame, depth = frame.f_back, depth + 1
    return depth
