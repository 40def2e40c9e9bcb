"""Plain data, as a TOML file holds it, into structs: with all that is wrong, each with the path of its key.

A field's type may carry ``Meta(extra={"reads": function})``: texts are first given to this function, whose ValueError says
what is wrong with them.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Sequence
from functools import cache
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

import msgspec
from msgspec import Struct

S = TypeVar("S", bound=Struct)

MAX_PROBLEMS = 100
MAX_ITEMS = 10_000


def read(data: object, kind: type[S]) -> tuple[S | None, list[str]]:
    """The struct, or what is wrong, each ``PATH: what``."""
    problems: list[str] = []
    cleaned = _walk(data, kind, "", problems)
    return (None if problems else msgspec.convert(cleaned, kind)), problems


def _walk(value: object, hint: Any, path: str, problems: list[str]) -> object:
    """The value with its texts read, as msgspec will take it unless something was wrong."""
    plain, reads = _plain(hint)
    if isinstance(value, str) and reads is not None:
        try:
            value = reads(value)
        except ValueError as error:
            problems.append(_at(path, str(error)))
            return None
    if len(problems) >= MAX_PROBLEMS:
        return None
    if isinstance(value, dict):
        if get_origin(plain) is dict:
            return {key: _walk(one, get_args(plain)[1], _under(path, key), problems) for key, one in value.items()}
        for kind in [plain] if isinstance(plain, type) else get_args(plain):  # itself, or of a union
            if _is_struct(kind) and get_origin(plain) is not tuple:
                return _walk_struct(value, kind, path, problems)
    if isinstance(value, list | tuple) and get_origin(plain) is tuple:
        if len(value) > MAX_ITEMS:
            problems.append(_at(path, f"holds {len(value)} items; at most {MAX_ITEMS}"))
            return None
        return [_walk(one, get_args(plain)[0], f"{path}[{index}]", problems) for index, one in enumerate(value)]
    try:
        return msgspec.convert(value, hint)
    except msgspec.ValidationError as error:
        problems.append(_at(path, _said(error, value)))
        return None


def _walk_struct(value: dict[str, object], kind: type[Struct], path: str, problems: list[str]) -> dict[str, object]:
    hints, walked = _hints(kind), {}
    for key, one in value.items():
        if key in hints:
            walked[key] = _walk(one, hints[key], _under(path, key), problems)
        elif len(problems) < MAX_PROBLEMS:
            problems.append(_at(_under(path, key), f"no such key; {_nearest(key, kind)}"))
    return walked


@cache
def _hints(kind: type[Struct]) -> dict[str, Any]:
    return get_type_hints(kind, include_extras=True)


def _plain(hint: Any) -> tuple[Any, Callable[[str], object] | None]:
    """The type itself, and what reads texts of it."""
    if get_origin(hint) is not Annotated:
        return hint, None
    plain, *metas = get_args(hint)
    found = [meta.extra["reads"] for meta in metas if meta.extra]
    return plain, found[0] if found else None


def _nearest(key: str, kind: type[Struct]) -> str:
    known = list(_hints(kind))
    inner = [
        f"{name}.{key}"
        for name, hint in _hints(kind).items()
        for one in (hint, *get_args(hint))
        if _is_struct(one) and key in _hints(one)
    ]
    if near := inner or difflib.get_close_matches(key[:80], known, 1):
        return f"did you mean `{near[0]}`?"
    return f"there are {', '.join(known)}"


def _is_struct(hint: object) -> bool:
    return isinstance(hint, type) and issubclass(hint, Struct)


def _said(error: msgspec.ValidationError, value: object) -> str:
    """msgspec's words without its own path; with the value, unless it was the type that was wrong."""
    text = str(error).partition(" - at `")[0].replace("`", "")
    text = text.replace("array", "an array").replace("object", "a table")
    return text[:1].lower() + text[1:] + ("" if "got" in text else f", not {short(value)}")


def short(value: object) -> str:
    return cut(repr(value), 60)


def cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[:limit] + "..."


def _under(path: str, key: str) -> str:
    name = key if re.fullmatch(r"[A-Za-z0-9_-]{1,80}", key) else short(key)
    return f"{path}.{name}" if path else name


def _at(path: str, what: str) -> str:
    return f"{path}: {what}" if path else what


def among(names: Sequence[str], name: str) -> str:
    """What to say of a name that is not among these."""
    near = difflib.get_close_matches(name[:80], names, 1)
    return f"did you mean {near[0]!r}?" if near else f"there are {', '.join(sorted(names))}"
