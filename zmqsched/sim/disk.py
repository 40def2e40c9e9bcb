"""The disk under a broker's journal: what is written is there some time later, in order; a crash loses what is not.

It lives as long as the run. A crash may cut between two commits that were on their way: the first are there all the same,
though nobody was told. ``fill`` makes every attempt fail for a while, as the real journal finds a full disk.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from ..codec import decode_record, encode_record
from ..core.events import Troubled, Write, Written
from ..protocol import Record
from .world import World

SYNC_S = 0.002
SLOW_S = 2.0
RETRY_S = 1.0


class Disk:
    def __init__(self, world: World, tell: Callable[[Written | Troubled], None]) -> None:
        self.records: list[Record] = []
        self.was_full = False
        self._world = world
        self._tell = tell
        self._coming: deque[Write] = deque()
        self._syncs = False
        self._life = 0
        self._full_until = 0.0

    def write(self, commit: Write) -> None:
        self._coming.append(commit)
        if not self._syncs:
            self._begin()

    def fill(self, seconds: float) -> None:
        self._world.say(f"= the disk is full for {seconds:.2f} s")
        self._full_until = self._world.now + seconds
        self.was_full = True

    def crash(self) -> None:
        for _ in range(self._world.random.randint(0, len(self._coming))):
            self._put(self._coming.popleft())
        self._coming.clear()
        self._syncs = False
        self._life += 1

    def _begin(self) -> None:
        self._syncs = True
        slow = self._world.random.uniform(0.0, SLOW_S) if self._world.chance("slow disk") else SYNC_S
        life, count = self._life, len(self._coming)
        self._world.at(slow, lambda: self._end(life, count))

    def _end(self, life: int, count: int) -> None:
        if life != self._life:
            return
        if self._world.now < self._full_until:
            self._tell(Troubled("the disk is full"))
            self._world.at(RETRY_S, lambda: self._end(life, count))
            return
        for _ in range(count):
            last = self._coming.popleft()
            self._put(last)
        self._tell(Written(last.number, 100 * len(self.records)))
        self._syncs = False
        if self._coming:
            self._begin()

    def _put(self, commit: Write) -> None:
        if commit.anew:
            self.records.clear()
        if self._world.thorough:
            self.records += [decode_record([bytes(frame) for frame in encode_record(r)]) for r in commit.records]
        else:
            self.records += commit.records
