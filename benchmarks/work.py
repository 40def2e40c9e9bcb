"""The calls that both sides run; importable, so that both send them by name."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path


def noop() -> None:
    pass


def identity(item: int) -> int:
    return item


def nap(seconds: float) -> None:
    time.sleep(seconds)


def spin(_: object = None) -> None:
    while True:
        pass


def wait_for(path: str) -> None:
    """Occupy a worker until there is such a file."""
    while not Path(path).exists():
        time.sleep(0.01)


def closure() -> Callable[[], int]:
    """A function that cannot be imported: it travels by value, as one written in a notebook or ``__main__`` does."""
    number = 42
    return lambda: number
