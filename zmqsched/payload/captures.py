"""What a function captures, and whether that is still what it was when the function was packed."""

from __future__ import annotations

import contextlib
import dis
import functools
import itertools
import sys
import types
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from .pickling import by_value

ABSENT = object()


class Capture:
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
        """What to remember of a captured value; ABSENT if it could change in place."""
        if _constant(value):
            self.packages |= type(value) is types.ModuleType and hasattr(value, "__path__")
            return value
        if type(value) is types.FunctionType:
            self.functions.append(value)
            return weakref.ref(value)
        return ABSENT

    def holds(self) -> bool:
        fn = self.fn()
        if fn is None or fn.__code__ is not self.code or fn.__defaults__ is not self.defaults or fn.__dict__:
            return False
        if fn.__kwdefaults__ and not _same_items(fn.__kwdefaults__, self.kwdefaults):
            return False
        names = fn.__globals__
        for name, then in self.globals:
            now = names.get(name, ABSENT)
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


def captures(fn: Callable[..., Any]) -> list[Capture] | None:
    """What must hold for a packed form of this callable to stay right; None if nothing could assure it."""
    if importable(fn):
        return []
    if type(fn) is not types.FunctionType:
        return None
    captures: list[Capture] = []
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


def _capture(fn: types.FunctionType) -> Capture | None:
    capture = Capture(fn)
    if fn.__dict__ or not all(map(_constant, itertools.chain(fn.__defaults__ or (), capture.kwdefaults.values()))):
        return None
    for name in names(fn.__code__):
        value = fn.__globals__.get(name, ABSENT)
        kept = value if value is ABSENT else capture.add(value)
        if kept is ABSENT and value is not ABSENT:
            return None
        capture.globals.append((name, kept))
    for cell in fn.__closure__ or ():
        try:
            kept = capture.add(cell.cell_contents)
        except ValueError:  # still empty
            return None
        if kept is ABSENT:
            return None
        capture.cells.append(kept)
    return capture


def names(code: types.CodeType) -> Iterator[str]:
    """Every name the code could look up as a global, nested code included (attribute names among them do no harm)."""
    yield from code.co_names
    for constant in code.co_consts:
        if type(constant) is types.CodeType:
            yield from names(constant)


def imported_in(fn: Any) -> frozenset[str]:
    """What the code of a function by value, and of those it captures, imports when it runs: modules, or names in them."""
    found: set[str] = set()
    todo, seen = [fn], {id(fn)}
    while todo:
        value = todo.pop()
        if isinstance(value, functools.partial):
            inner = [value.func, *value.args, *value.keywords.values()]
        elif isinstance(value, types.MethodType):
            inner = [value.__func__]
        elif isinstance(value, types.FunctionType) and not importable(value):
            found.update(_imports(value.__code__, str(value.__globals__.get("__package__") or "")))
            inner = [value.__globals__.get(name) for name in names(value.__code__)]
            with contextlib.suppress(ValueError):  # a cell that is still empty
                inner += [cell.cell_contents for cell in value.__closure__ or ()]
        else:
            continue
        fresh = [part for part in inner if id(part) not in seen]
        seen.update(map(id, fresh))
        todo += fresh
    return frozenset(found)


@functools.lru_cache(maxsize=512)
def _imports(code: types.CodeType, package: str) -> frozenset[str]:
    found: set[str] = set()
    before: list[Any] = [None, None]
    for instruction in dis.get_instructions(code):
        if instruction.opname == "IMPORT_NAME":
            level, wanted = before
            base = package.rsplit(".", level - 1)[0] if level else ""
            name = ".".join(part for part in (base, instruction.argval) if part)
            found.add(name)
            found.update(f"{name}.{part}" for part in wanted or ())
        before = [before[1], instruction.argval]
    for constant in code.co_consts:
        if type(constant) is types.CodeType:
            found |= _imports(constant, package)
    return frozenset(found)


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
        return sys.modules.get(name) is value and not by_value(name)
    return importable(value)


def importable(value: Any) -> bool:
    """True for a function, builtin or class that its module has under its own name."""
    if not isinstance(value, types.FunctionType | types.BuiltinFunctionType | type):
        return False
    name, path = value.__module__, value.__qualname__
    if type(name) is not str or name == "__main__" or by_value(name):
        return False
    found: Any = sys.modules.get(name)
    for part in path.split("."):
        found = getattr(found, part, None)
    return found is value


def _same_items(now: Mapping[str, Any], then: Mapping[str, Any]) -> bool:
    return len(now) == len(then) and all(then.get(name, ABSENT) is value for name, value in now.items())
