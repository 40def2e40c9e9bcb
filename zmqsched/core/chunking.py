"""How many items of a map go into one task: as many as take about 75 ms, fewer near the end.

Rules
-----
* Nothing is known at first: one item a chunk. Then a chunk is what takes ``TARGET_S`` by the durations of late, but at most
  ``GROWTH`` times the longest that was ever finished: a first item says little about the next thousand.
* A worker ends a chunk after ``BUDGET_S`` and gives back what it has not begun, so a wrong guess costs little.
* Two chunks a slot are on their way, so that no worker waits for the client. Of what is left each gets its share at most
  (factoring: Hummel, Schonberg, Flynn 1992), so that all workers end together. Below ``FLOOR_S`` that gains nothing.
* Calls and results of a chunk stay below ``CHUNK_BYTES`` or so, and all items on their way below ``ITEMS``.
"""

from __future__ import annotations

TARGET_S = 0.075
BUDGET_S = 0.1
FLOOR_S = 0.005
GROWTH = 16
CHUNK_BYTES = 1024 * 1024
ITEMS = 160_000
_MEMORY = 0.7  # how much of what was known still counts after the next chunk


class Chunking:
    """``slots``: how many tasks can run at once, as far as is known."""

    def __init__(self, slots: int = 1) -> None:
        self.slots = slots
        self._items = 0.0
        self._seconds = 0.0
        self._bytes = 0.0  # an item's, the larger of call and result
        self._longest = 0

    def learn(self, items: int, seconds: float, size: int) -> None:
        """A chunk was run: ``seconds`` for its ``items``, ``size`` the bytes of its call or of its results."""
        self._items = self._items * _MEMORY + items
        self._seconds = self._seconds * _MEMORY + max(seconds, 0.0)
        self._bytes = max(self._bytes * _MEMORY, size / max(1, items))
        self._longest = max(self._longest, items)

    @property
    def depth(self) -> int:
        """How many chunks are to be on their way."""
        return 2 * max(1, self.slots)

    def size(self, left: int | None = None) -> int:
        """How many items the next chunk takes, at least 1; ``left``: how many there are, None if nobody knows."""
        if not self._items:
            return 1
        most = min(GROWTH * max(1, self._longest), ITEMS // self.depth, CHUNK_BYTES / max(1.0, self._bytes))
        most = min(most, self._worth(TARGET_S))
        if left is not None:
            most = min(most, max(-(-left // self.depth), self._worth(FLOOR_S)))
        return max(1, int(most))

    def _worth(self, seconds: float) -> float:
        """How many items take so long."""
        return seconds * self._items / max(self._seconds, 1e-9)
