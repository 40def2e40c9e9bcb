"""How messages speak of the user's objects, whatever those do when they are asked. Nothing here raises."""

from __future__ import annotations

import functools
from typing import Any

from ..protocol import clipped
from .wrappers import Wrapper


def short(value: Any) -> str:
    """Its repr, at most 60 characters."""
    try:
        text = repr(value)
    except Exception:  # noqa: BLE001 - user code may raise anything
        text = f"<{type_name(type(value))}>"
    return text if len(text) <= 60 else f"{text[:57]}..."


def a(value: Any) -> str:
    """Its type, with the article."""
    name = type_name(type(value))
    return f"{'an' if name[0] in 'aeiouAEIOU' else 'a'} {name}"


def type_name(cls: type) -> str:
    return cls.__qualname__ if cls.__module__ in ("builtins", "__main__") else f"{cls.__module__}.{cls.__qualname__}"


def name_of(fn: Any) -> str:
    """A callable's own name; of one that calls another, the other's."""
    if isinstance(fn, Wrapper | functools.partial):
        return name_of(fn.fn if isinstance(fn, Wrapper) else fn.func)
    return str(getattr(fn, "__name__", None) or type(fn).__name__)


def brief(error: BaseException, limit: int = 500) -> str:
    """An exception's type and message."""
    try:
        text = str(error)
    except Exception:  # noqa: BLE001 - user code may raise anything
        text = "its message cannot be shown"
    return f"{type_name(type(error))}: {clipped(text, limit)}" if text else type_name(type(error))
