"""A queue by priority, first come first served within one, from which anything can be taken out in constant time."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import Generic, TypeVar

Item = TypeVar("Item")


class PriorityQueue(Generic[Item]):
    """Items by key; ``count`` is how many, which ``len`` says at the price of a call. An OrderedDict for each priority: a
    plain dict would scan what was deleted at its front."""

    __slots__ = ("_priorities", "_queues", "count")

    def __init__(self) -> None:
        self._queues: dict[int, OrderedDict[bytes, Item]] = {}
        self._priorities: list[int] = []  # highest last
        self.count = 0

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Item]:
        for priority in reversed(self._priorities):
            yield from self._queues[priority].values()

    def push(self, key: bytes, item: Item, priority: int, *, first: bool = False) -> None:
        """Queue an item; ``first`` puts it before its equals, for one that was taken out before."""
        queue = self._queues.get(priority)
        if queue is None:
            queue = self._queues[priority] = OrderedDict()
            self._priorities = sorted(self._queues)
        queue[key] = item
        if first:
            queue.move_to_end(key, last=False)
        self.count += 1

    def head(self) -> Item:
        queue = self._queues[self._priorities[-1]]
        return queue[next(iter(queue))]

    def pop(self) -> Item:
        priority = self._priorities[-1]
        queue = self._queues[priority]
        item = queue.popitem(last=False)[1]
        self.count -= 1
        if not queue:
            self._end(priority)
        return item

    def pop_last(self) -> Item:
        priority = self._priorities[0]
        queue = self._queues[priority]
        item = queue.popitem()[1]
        self.count -= 1
        if not queue:
            self._end(priority)
        return item

    def remove(self, key: bytes, priority: int) -> None:
        queue = self._queues[priority]
        del queue[key]
        self.count -= 1
        if not queue:
            self._end(priority)

    def _end(self, priority: int) -> None:
        del self._queues[priority]
        self._priorities.remove(priority)
