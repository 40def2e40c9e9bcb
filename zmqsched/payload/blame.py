"""Which part of a value cannot be pickled, as a path that a reader of the user's code understands."""

from __future__ import annotations

import functools
import itertools
import types
from collections.abc import Iterator
from typing import Any

from ..protocol import clipped
from .captures import ABSENT, names
from .pickling import dumps
from .wrappers import Chunk

MAX_DEPTH = 12
MAX_PARTS = 1_000

ADVICE = "pass plain data (a path, an address, a number) and make the object inside the task"


def blame(parts: list[tuple[str, Any]], whole: str, error: BaseException, owner: Any = ABSENT) -> str:
    """Which part cannot be pickled, as a path and a type. Bounded: it tries parts until the budget is spent."""
    path: list[str] = []
    passed: list[Any] = []
    culprit, budget = owner, MAX_PARTS
    while len(path) < MAX_DEPTH:
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
        parts = some_parts(culprit, budget)
    where = " -> ".join(path) or whole
    what = f" is {a(culprit)}" if culprit is not ABSENT else ""
    return f"{where}{what} ({brief(error)})"


def _why_not(value: Any) -> BaseException | None:
    try:
        dumps(value)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # noqa: BLE001 - user code may raise anything
        return error.__cause__ if isinstance(error.__cause__, RecursionError) else error
    return None


def some_parts(value: Any, limit: int) -> list[tuple[str, Any]]:
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
    for name in names(fn.__code__):
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
            part = getattr(value, name, ABSENT)
            if part is not ABSENT:
                yield f"attribute `{name}`", part


def _short(value: Any) -> str:
    try:
        text = repr(value)
    except Exception:  # noqa: BLE001 - user code may raise anything
        text = f"<{type_name(type(value))}>"
    return text if len(text) <= 60 else f"{text[:57]}..."


def a(value: Any) -> str:
    name = type_name(type(value))
    return f"{'an' if name[0] in 'aeiouAEIOU' else 'a'} {name}"


def type_name(cls: type) -> str:
    return cls.__qualname__ if cls.__module__ in ("builtins", "__main__") else f"{cls.__module__}.{cls.__qualname__}"


def name_of(fn: Any) -> str:
    if isinstance(fn, Chunk | functools.partial):
        return name_of(fn.fn if isinstance(fn, Chunk) else fn.func)
    return str(getattr(fn, "__name__", None) or type(fn).__name__)


def brief(error: BaseException, limit: int = 500) -> str:
    """An exception's type and message."""
    try:
        text = str(error)
    except Exception:  # noqa: BLE001 - user code may raise anything
        text = "its message cannot be shown"
    return f"{type_name(type(error))}: {clipped(text, limit)}" if text else type_name(type(error))
