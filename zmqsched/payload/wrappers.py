"""Callables of ours around the user's: a batch of calls as one task, a task that is retried after some errors only."""

from __future__ import annotations

import functools
import pickle
from collections.abc import Callable
from typing import Any


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


class Chunked:
    """Pickles into a Chunk of a function that is already pickled."""

    def __init__(self, blob: bytes) -> None:
        self.blob = blob

    def __reduce__(self) -> tuple[Callable[[bytes], Chunk], tuple[bytes]]:
        return _unpack_chunk, (self.blob,)


class Retried:
    """Pickles into a RetryOn of a function and of types that are already pickled."""

    def __init__(self, blob: bytes, kinds: bytes) -> None:
        self.blob = blob
        self.kinds = kinds

    def __reduce__(self) -> tuple[Callable[[bytes, bytes], RetryOn], tuple[bytes, bytes]]:
        return _unpack_retry_on, (self.blob, self.kinds)
