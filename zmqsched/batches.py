"""Items of a map that travel together, as one task."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .core.chunking import BUDGET_S
from .errors import TaskError
from .payload import Chunk, How, enclosed, generator, pack_call, references
from .plan import Plan
from .protocol import Options, payload_bytes

if TYPE_CHECKING:
    from .client import Client
    from .futures import Future

PARTS = 16  # into which a batch that failed is divided


class CannotTravel(Exception):
    """As it is; it has to be divided into so many."""

    def __init__(self, parts: int) -> None:
        self.parts = parts


@dataclass(order=True)
class Batch:
    first: int
    items: list[Any] = field(compare=False)
    alone: bool = field(compare=False)
    options: Options = field(compare=False)
    size: int = field(default=0, compare=False)  # bytes of the call

    def divided(self, parts: int, plan: Plan) -> Iterator[Batch]:
        size = -(-len(self.items) // parts)
        for start in range(0, len(self.items), size):
            options = plan.options if size == 1 else self.options
            yield Batch(self.first + start, self.items[start : start + size], size == 1, options)

    def submit(self, client: Client, plan: Plan, chunk: Chunk) -> Future[Any]:
        """
        Raises
        ------
        CannotTravel
            What is to blame is found by trying parts.
        """
        if plan.options.job:
            return self._for_the_job(client, plan)
        numbers: tuple[int, ...] = (self.first, len(self.items))
        if plan.numbers is not None:
            numbers = tuple(plan.numbers[self.first : self.first + len(self.items)])
        how = How(
            self.alone, plan.numbers is None, numbers, plan.spread, math.inf if plan.chunksize else BUDGET_S, plan.seed,
            plan.retry_on,
        )  # fmt: skip
        if self.alone:
            return client._submit(chunk, (self.items[0], *how), {}, self.options, plan.retry_on, accepted=True)
        try:
            packed = pack_call(tuple(self.items), {})
        except TaskError:
            raise CannotTravel(PARTS) from None
        if references() is not None:
            raise CannotTravel(len(self.items))
        self.size = payload_bytes(packed)
        return client._submit(chunk, (enclosed(packed), *how), {}, self.options, b"", accepted=True)

    def _for_the_job(self, client: Client, plan: Plan) -> Future[Any]:
        """As a task that whoever follows the job understands."""
        (item,) = self.items
        keywords = {} if plan.seed is None else {"rng": generator(plan.seed, plan.index(self.first))}
        args = tuple(item) if plan.spread else (item,)
        return client._submit(plan.fn, args, keywords, self.options, plan.retry_on)
