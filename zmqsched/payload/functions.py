"""Functions as bytes named by digest, each packed once while nothing it captures can have changed."""

from __future__ import annotations

import hashlib
import pickle
import types
import weakref
from collections.abc import Callable
from typing import Any

import cloudpickle

from ..errors import NotSerializable
from ..protocol import Payload
from .blame import blame
from .captures import Capture, Known, captures, importable
from .pickling import REGISTERED, check_size, dumps, unpack
from .words import brief, name_of
from .wrappers import Chunk, Chunked, Retried


class FunctionPickler:
    """Packs callables, remembering those that provably have not changed. Safe to use from several threads."""

    def __init__(self) -> None:
        self._known: dict[int, Known] = {}
        self._registry: set[str] = set()

    def pack(self, fn: Callable[..., Any], retry_on: bytes = b"") -> tuple[bytes, bytes]:
        """The function's digest (16 bytes) and its pickled form; with ``retry_on``, packed exception types, as RetryOn.

        Raises
        ------
        NotSerializable
            Naming what the function captures that cannot be pickled.
        PayloadTooLarge
        """
        if self._registry != REGISTERED:
            self._known.clear()
            self._registry = set(REGISTERED)
        known = self._known.get(id(fn))
        remembered = known is not None and known.fn() is fn and known.unchanged()
        packed = known.packed if known is not None and remembered else self._pack_anew(fn)
        return _named(pickle.dumps(Retried(packed[1], retry_on), 5)) if retry_on else packed

    def _pack_anew(self, fn: Callable[..., Any]) -> tuple[bytes, bytes]:
        if type(fn) is Chunk:
            return _named(pickle.dumps(Chunked(self.pack(fn.fn)[1]), 5))
        # Look first, pickle second: a change in between makes the next look fail, not this memory wrong.
        captured = captures(fn)
        packed = _named(_pack_function(fn))
        if captured is not None:
            self._remember(fn, packed, captured)
        else:
            self._known.pop(id(fn), None)
        return packed

    def _remember(self, fn: Callable[..., Any], packed: tuple[bytes, bytes], captured: list[Capture]) -> None:
        key, known = id(fn), self._known

        def forget(dead: weakref.ref[Any]) -> None:
            if (entry := known.get(key)) is not None and entry.fn is dead:
                del known[key]

        try:
            known[key] = Known(weakref.ref(fn, forget), packed, captured)
        except TypeError:  # no weak references to it: it is packed anew each time
            known.pop(key, None)


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


def unpack_function(payload: Payload) -> Callable[..., Any]:
    """The callable. Raises whatever unpickling it raises."""
    fn: Callable[..., Any] = unpack(payload)
    return fn


def _named(blob: bytes) -> tuple[bytes, bytes]:
    return hashlib.blake2b(blob, digest_size=16).digest(), blob


def _pack_function(fn: Callable[..., Any]) -> bytes:
    try:
        if type(fn) is types.FunctionType and not importable(fn):
            blob: bytes = cloudpickle.dumps(fn, 5)
        else:
            blob = dumps(fn)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise NotSerializable(f"cannot pickle {blame([(f'`{name_of(fn)}`', fn)], error)}") from error
    check_size(blob, f"the function `{name_of(fn)}` with what it captures")
    return blob
