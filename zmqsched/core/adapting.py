"""How many nodes a group should have, by what is asked of the cluster and how long its nodes are idle.

Rules
-----
* Up when tasks have found no slot for ``UP_AFTER_S``; at once if there is no node at all. No more nodes than such tasks
  fill, and at most twice as many as there were: the next look may find that a few were enough.
* Down by those that have been idle for ``IDLE_S`` while no task lacked a slot, the longest idle first; what has not come yet
  is called off before what is here.
* Between the two lies time, so that a node which starts slowly does not make the number swing.
* A node that failed is followed by a pause, twice as long after each failure without a success in between.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

UP_AFTER_S = 2.0
IDLE_S = 30.0
FIRST_PAUSE_S, LONGEST_PAUSE_S = 2.0, 60.0


@dataclass(frozen=True)
class Demand:
    """What the whole cluster is asked for, and has. ``tasks``: those that could run now or do; ``queued``: those of them
    that no node has; ``slots``: of the nodes that are there; ``coming``: of those that are on their way."""

    tasks: int
    queued: int
    slots: int
    coming: int

    @property
    def wanted(self) -> int:
        """Tasks that find no slot. What is queued finds none even where slots are free: it asks for what is not there."""
        return max(0, self.tasks - self.slots, self.queued)

    @property
    def lacking(self) -> int:
        """Tasks that will find no slot."""
        return max(0, self.wanted - self.coming)


@dataclass(frozen=True)
class Step:
    """What to do: how many nodes to start, and who is to leave."""

    start: int = 0
    leave: tuple[str, ...] = ()


class Adapting:
    """Keeps one group between ``least`` and ``most`` nodes. All times are monotonic seconds."""

    def __init__(self, least: int, most: int) -> None:
        self.least = least
        self.most = most
        self._lacking_since: float | None = None
        self._idle_since: dict[str, float] = {}
        self._pause_s = 0.0
        self._not_before = -math.inf

    def failed(self, now: float) -> None:
        """A node of the group could not start, or died."""
        self._pause_s = min(LONGEST_PAUSE_S, max(FIRST_PAUSE_S, 2 * self._pause_s))
        self._not_before = now + self._pause_s

    def joined(self) -> None:
        """A node of the group is there."""
        self._pause_s = 0.0

    def decide(self, now: float, demand: Demand, slots: int, here: Mapping[str, int], coming: Sequence[str]) -> Step:
        """``slots``: of a node of this group. ``here``: the tasks that each node has; ``coming``: those that are on their
        way, in the order they were asked for."""
        number = len(here) + len(coming)
        self._watch(now, demand, slots, here, coming)
        if now >= self._not_before and (start := self._more(now, demand, slots, number)):
            return Step(start=start)
        if number > self.most:
            surplus = [*coming, *sorted(here, key=lambda label: here[label])]
            return Step(leave=tuple(surplus[: number - self.most]))
        idle = [label for label, since in self._idle_since.items() if now - since >= IDLE_S]
        idle.sort(key=lambda label: (label in here, self._idle_since[label]))
        return Step(leave=tuple(idle[: max(0, number - self.least)]))

    def _watch(self, now: float, demand: Demand, slots: int, here: Mapping[str, int], coming: Sequence[str]) -> None:
        """Since when do tasks lack a slot, or nodes a task? Of those that are coming, who is more than the tasks want."""
        if not demand.lacking:
            self._lacking_since = None
        elif self._lacking_since is None:
            self._lacking_since = now
        wanted = math.ceil(demand.wanted / slots)
        idle = [] if demand.lacking else [label for label, tasks in here.items() if not tasks]
        self._idle_since = {label: self._idle_since.get(label, now) for label in [*idle, *coming[wanted:]]}

    def _more(self, now: float, demand: Demand, slots: int, number: int) -> int:
        if number < self.least:
            return self.least - number
        if self._lacking_since is None:
            return 0
        if demand.slots + demand.coming and now - self._lacking_since < UP_AFTER_S:
            return 0
        self._lacking_since = now
        return max(0, min(math.ceil(demand.lacking / slots), max(1, number), self.most - number))
