"""Checks of what users write: each wrong value gets an error at once that says what would be right."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping

MAX_NAMES = 64
MAX_AMOUNT = 2.0**60
_SECONDS = {"d": 86400, "h": 3600, "m": 60, "s": 1}
_DURATIONS = [
    re.compile("(?=.)" + "".join(rf"(?:(?P<{unit}>[0-9]{{1,9}}(\.[0-9]{{1,9}})?){unit})?" for unit in _SECONDS)),
    re.compile(r"(?:(?P<h>[0-9]{1,9}):)?(?P<m>[0-9]{1,9}):(?P<s>[0-9]{1,2})"),
    re.compile(r"(?P<d>[0-9]{1,9})-(?P<h>[0-9]{1,2})(?::(?P<m>[0-9]{1,2}))?(?::(?P<s>[0-9]{1,2}))?"),
]


def integer(name: str, value: int, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, not {type(value).__name__}")
    if not low <= value <= high:
        raise ValueError(f"{name} must be between {low} and {high}, not {value}")
    return value


def boolean(name: str, value: bool) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name} is True or False, not {value!r}")
    return value


def seconds(name: str, value: float) -> float:
    """A finite number of at least 0."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} is a number of seconds, not {type(value).__name__}")
    if not 0 <= value < MAX_AMOUNT:
        raise ValueError(f"{name} must be a finite number of seconds of at least 0, not {value}")
    return float(value)


def time_limit(name: str, value: float) -> float:
    """A finite number above 0."""
    if not isinstance(value, bool) and isinstance(value, int | float) and value <= 0:
        raise ValueError(f"{name} must be above 0, not {value}; without {name} there is no limit")
    return seconds(name, value)


def exception_types(types: type[BaseException] | tuple[type[BaseException], ...]) -> tuple[type[BaseException], ...]:
    """One or several, as ``except`` takes them."""
    given = types if isinstance(types, tuple) else (types,)
    for kind in given:
        if not (isinstance(kind, type) and issubclass(kind, BaseException)):
            raise TypeError(f"retry_on is an exception type or a tuple of such, not {kind!r}")
    if not given:
        raise ValueError("retry_on names at least one exception type; for none leave retries at 0")
    return given


def amounts(resources: Mapping[str, float]) -> dict[str, float]:
    """Resources by name: finite numbers of at least 0."""
    if not isinstance(resources, Mapping):
        raise TypeError(f"resources is a mapping from names to amounts, not {type(resources).__name__}")
    checked = {}
    for name, amount in resources.items():
        if not isinstance(name, str) or not 0 < len(name) < 256 or "=" in name or not name.isprintable():
            raise TypeError(f"a resource's name is a short printable text without '=', not {name!r}")
        if isinstance(amount, bool) or not isinstance(amount, int | float):
            raise TypeError(f"resources[{name!r}] must be a number, not {type(amount).__name__}")
        if not math.isfinite(amount) or not 0 <= amount < MAX_AMOUNT:
            raise ValueError(f"resources[{name!r}] must be a finite number of at least 0, not {amount}")
        checked[name] = float(amount)
    return checked


def task_resources(resources: Mapping[str, float]) -> tuple[tuple[str, float], ...]:
    """What a task asks for: one CPU unless it says otherwise."""
    asked = {"cpu": 1.0, **amounts(resources)}
    if len(asked) > MAX_NAMES:
        raise ValueError(f"a task may name {MAX_NAMES} resources, not {len(asked)}")
    return tuple(sorted(asked.items()))


def resource_argument(text: str) -> tuple[str, float]:
    """"NAME=AMOUNT" of a command line. Raises ValueError."""
    name, _, amount = text.partition("=")
    try:
        number = float(amount)
    except ValueError:
        number = -1.0
    if not 0 < len(name) < 256 or not name.isprintable() or not 0 <= number < MAX_AMOUNT:
        raise ValueError(f"{text!r} is not NAME=AMOUNT with a number of at least 0")
    return name, number


def size_argument(text: str) -> int:
    """Bytes of a command line: a number, with K, M, G or T (of 1024) behind it or without. Raises ValueError."""
    number, unit = (text[:-1], text[-1].upper()) if text[-1:].isalpha() else (text, "")
    try:
        size = float(number) * 1024 ** " KMGT".index(unit or " ")
    except ValueError:
        size = 0.0
    if not 1 <= size < MAX_AMOUNT:
        raise ValueError(f"{text!r} is not a size: write it as 500M or 2G")
    return int(size)


def duration_argument(text: str) -> float:
    """Seconds of a command line: with units (90s, 30m, 1h30m, 2d), or as Slurm writes them with colons (MM:SS, HH:MM:SS) or
    days before a dash (D-HH, D-HH:MM, D-HH:MM:SS). A bare number is refused: Slurm's are minutes, others' seconds. Raises
    ValueError."""
    match = next((match for form in _DURATIONS if (match := form.fullmatch(text))), None)
    if match is not None:
        return sum(float(number) * _SECONDS[unit] for unit, number in match.groupdict().items() if number)
    shown = _short(text)
    if re.fullmatch(r"[0-9]+(\.[0-9]*)?", text):
        raise ValueError(f"{shown} has no unit: write it as 90s, 30m, 1h or 2d")
    raise ValueError(f"{shown} is not a duration: write it as 90s, 30m, 1h, 2d or 1-12:00:00")


def task_tags(tags: Iterable[str]) -> tuple[str, ...]:
    if isinstance(tags, str):
        raise TypeError(f"tags is a list of names; write tags=[{tags!r}]")
    names = tuple(sorted({short_name(tag) for tag in tags}))
    if len(names) > MAX_NAMES:
        raise ValueError(f"a task may have {MAX_NAMES} tags, not {len(names)}")
    return names


def short_name(name: str) -> str:
    if not isinstance(name, str):
        raise TypeError(f"a name is a text, not {type(name).__name__}")
    if not name:
        raise ValueError("a name is not empty")
    if not name.isprintable():
        raise ValueError(f"a name is printable text on one line, not {name[:40]!r}")
    return name[:255]


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:40] + "...")
