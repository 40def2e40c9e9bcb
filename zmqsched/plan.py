"""What a map was asked for."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .protocol import Options

if TYPE_CHECKING:
    from .payload import Seed


@dataclass(frozen=True)
class Plan:
    """``chunksize`` 0: automatic. ``limit``: items taken and not read. ``returns``: errors in the place
    of results. ``until``: by the monotonic clock. ``numbers``: the items' indices, if they are not just counted."""

    fn: Callable[..., Any]
    options: Options
    retry_on: bytes
    spread: bool
    chunksize: int = 0
    limit: float = math.inf
    ordered: bool = True
    returns: bool = False
    seed: Seed | None = None
    timeout: float | None = None
    until: float | None = None
    numbers: Sequence[int] | None = None
    progress: bool | None = False

    def index(self, position: int) -> int:
        return position if self.numbers is None else self.numbers[position]
