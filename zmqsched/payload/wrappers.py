"""Callables of ours around the user's: what they have in common, and a task that is retried after some errors only."""

from __future__ import annotations

import functools
import pickle
from collections.abc import Callable
from typing import Any, cast

from ..protocol import Payload
from .pickling import enclosed, unpack


class Wrapper:
    """A callable of ours around the user's function, which is packed by itself and remembered as such.

    ``packed``: the function, if it is not to be looked at again (:meth:`FunctionPickler.keep`).
    """

    __slots__ = ("fn", "packed")

    def __init__(self, fn: Callable[..., Any]) -> None:
        self.fn = fn
        self.packed: Any = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.fn(*args, **kwargs)

    def __reduce__(self) -> tuple[type[Wrapper], tuple[Callable[..., Any]]]:
        return type(self), (self.fn,)


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


def short_form(fn: Callable[..., Any]) -> str:
    """A function's name for messages, at most 255 characters."""
    name = getattr(fn, "__qualname__", None)
    if not isinstance(name, str):
        inner = fn.fn if isinstance(fn, Wrapper) else fn.func if isinstance(fn, functools.partial) else None
        name = type(fn).__qualname__ if inner is None else short_form(inner)
    return name[:255] if name.isascii() else name.encode(errors="replace").decode()[:255]


class Wrapped:
    """How a function travels that needs more than its own pickle: ``load`` makes a callable of it again.

    ``kind``: the wrapper to put around it. ``kinds``: packed types of the exceptions that are retried; empty: any.
    ``modules``: those of the user's own that it needs, packed.
    """

    def __init__(self, inner: Payload | tuple[Any, ...], kind: type[Wrapper] | None, kinds: bytes, modules: bytes) -> None:
        self.inner = inner
        self.kind = kind
        self.kinds = kinds
        self.modules = modules

    def load(self) -> Callable[..., Any]:
        fn: Callable[..., Any] = unpack(self.inner)
        if self.kind is not None:
            fn = self.kind(fn)
        return RetryOn(fn, pickle.loads(self.kinds)) if self.kinds else fn

    def __reduce__(self) -> tuple[Any, ...]:
        return Wrapped, (enclosed(cast(Payload, self.inner)), self.kind, self.kinds, self.modules)
