"""Node records, their states, and the index that finds a node for a task without looking at all of them.

States
------
::

    ALIVE ◄──► SUSPECT
      ▲           ▲
      └──► PAUSED ┘      from each of them to DRAINING, LOST and GONE, and from DRAINING to LOST and GONE

* ALIVE: heard of within the last beats. SUSPECT: three beats missing, asked by a ping; given nothing new meanwhile.
  LOST: silent to the ping as well; it holds nothing any more. DRAINING: finishes what it has, takes nothing new. PAUSED: so
  too, but it stays.
  GONE: left in order. A node that comes back from LOST says hello again and is a new record with a new id.
* Any message of a node counts as a sign of life, by beat or by work channel.
* ``credit`` is the node's own word for how many unfinished tasks it takes; the broker never goes beyond it.
* A pool holds the nodes that have certain resource names and tags. Its heaps are ordered by the policy's rank; entries of
  nodes that have changed since are recognised by ``version`` and dropped when they come up. There is one for each length of
  tasks that is asked for, so that nodes which end too soon for some are dropped there, and not looked at again.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Iterable
from enum import StrEnum
from random import Random
from typing import TYPE_CHECKING

from ..protocol import LENT, Host, NodeHello, WorkerState
from .policy import Policy
from .tasks import IllegalMove, Lane

if TYPE_CHECKING:
    from .tasks import Task

Demand = tuple[tuple[str, float], ...]


class NodeState(StrEnum):
    ALIVE = "alive"
    SUSPECT = "suspect"
    PAUSED = "paused"
    DRAINING = "draining"
    LOST = "lost"
    GONE = "gone"


ALIVE, SUSPECT, PAUSED, DRAINING, LOST, GONE = NodeState

NODE_MOVES: dict[NodeState, frozenset[NodeState]] = {
    ALIVE: frozenset({SUSPECT, PAUSED, DRAINING, LOST, GONE}),
    SUSPECT: frozenset({ALIVE, PAUSED, DRAINING, LOST, GONE}),
    PAUSED: frozenset({ALIVE, SUSPECT, DRAINING, LOST, GONE}),
    DRAINING: frozenset({LOST, GONE}),
    LOST: frozenset(),
    GONE: frozenset(),
}


class Node:
    __slots__ = (
        "beat", "credit", "done", "functions", "heard_at", "id", "incarnation", "label", "leaves_at", "lent", "nested",
        "pinged_at", "pools", "reserved", "session", "slots", "state", "tags", "tasks", "total", "turn", "used", "version",
        "where", "workers",
    )  # fmt: skip

    def __init__(self, node_id: str, session: int, hello: NodeHello, now: float) -> None:
        self.id = node_id
        self.label = hello.label
        self.leaves_at = now + hello.leaves_in_s if hello.leaves_in_s else math.inf
        self.session = session
        self.incarnation = hello.incarnation
        self.where: Host = hello.where
        self.slots = hello.slots
        self.credit = hello.credit
        self.total = dict(hello.resources)
        self.used = dict.fromkeys(self.total, 0.0)
        self.tags = frozenset(hello.tags)
        self.state = PAUSED if hello.paused else ALIVE
        self.tasks: dict[bytes, Task] = {}
        self.functions: set[bytes] = set()
        self.workers: list[WorkerState] = []
        self.heard_at = now
        self.pinged_at: float | None = None
        self.beat = 0
        self.done = 0
        self.turn = 0
        self.version = 0
        self.lent = 0  # tasks that wait for others
        self.pools: list[Pool] = []
        self.nested: dict[int, int] = {}  # sessions of the clients that its tasks have made: the worker of each
        self.reserved: Lane | None = None  # kept free for this lane's first task, which needs much room

    @property
    def assigned(self) -> int:
        return len(self.tasks)

    @property
    def open(self) -> bool:
        """Takes new tasks now."""
        return self.state is ALIVE and len(self.tasks) < self.credit

    @property
    def takes_nested(self) -> bool:
        """Takes tasks of tasks, though it takes no others: what it holds may wait for them."""
        return self.lent > 0 and self.state in (PAUSED, DRAINING) and len(self.tasks) < self.credit

    def move(self, state: NodeState) -> None:
        if state not in NODE_MOVES[self.state]:
            raise IllegalMove(f"node {self.id}: {self.state} to {state}")
        self.state = state

    def room(self, demand: Demand) -> float:
        """For how many more such tasks. Prefetched tasks wait for a slot, so they may overbook ``cpu`` and nothing else."""
        room = math.inf
        for name, amount in demand:
            limit = self.total.get(name, 0.0) + 1e-9
            if name == "cpu" and amount <= limit and self.credit > self.slots:
                limit += self.credit - self.slots
            spare = limit - self.used.get(name, 0.0)
            if amount > spare:
                return 0
            if amount:
                room = min(room, spare // amount)
        return room

    def fits(self, demand: Demand) -> bool:
        return self.room(demand) > 0

    def lasts(self, seconds: float, now: float) -> bool:
        """A task that takes so long would end here."""
        return now + seconds <= self.leaves_at

    def could_hold(self, demand: Demand) -> bool:
        """Would fit if the node were empty."""
        return _holds(self.total, demand)

    def take(self, task: Task, turn: int) -> None:
        """To be called with a new ``version``, one for all tasks that it takes at once."""
        assert len(self.tasks) < self.credit, f"{self.id} would exceed its credit"
        self.tasks[task.id] = task
        for name, amount in task.kind.options.resources:
            if amount:
                self.used[name] += amount
        self.turn = turn

    def drop(self, task: Task) -> None:
        if task.lent:
            self.reclaim(task)
        del self.tasks[task.id]
        for name, amount in task.kind.options.resources:
            if amount:
                self.used[name] -= amount
        self.version += 1

    def lend(self, task: Task) -> None:
        """The task waits for others: they may have what it does not need meanwhile."""
        if not task.lent:
            task.lent = True
            self.lent += 1
            self._use(task, -1)

    def reclaim(self, task: Task) -> None:
        """It goes on at once, whether there is room or not."""
        if task.lent:
            task.lent = False
            self.lent -= 1
            self._use(task, 1)

    def _use(self, task: Task, times: int) -> None:
        for name, amount in task.kind.options.resources:
            if name in LENT and amount:
                self.used[name] += times * amount
        self.version += 1


class Prospect:
    """A node that somebody starts when it is wanted."""

    __slots__ = ("tags", "total")

    def __init__(self, resources: Iterable[tuple[str, float]], tags: Iterable[str]) -> None:
        self.total = dict(resources)
        self.tags = frozenset(tags)

    def could_hold(self, demand: Demand) -> bool:
        return _holds(self.total, demand)


def _holds(total: dict[str, float], demand: Demand) -> bool:
    return all(amount <= total.get(name, 0.0) + 1e-9 for name, amount in demand)


class Pool:
    """The nodes with these resource names and tags, best first. ``blocked``: lanes that found no room here."""

    def __init__(self, names: frozenset[str], tags: frozenset[str], policy: Policy, random: Random) -> None:
        self.names = names
        self.tags = tags
        self.nodes: dict[str, Node] = {}
        self.blocked: dict[int, Lane] = {}
        self._policy = policy
        self._random = random
        self._heaps: dict[int, list[tuple[float, int, int, Node]]] = {}  # by the step of the lanes' lengths
        self._nesting: dict[str, Node] = {}  # those that take tasks of tasks alone, or did
        self._count = itertools.count()
        self._last = 0.0  # the rank of the node found last
        self._next = math.inf  # and at which rank another's turn may come

    def suits(self, node: Node | Prospect) -> bool:
        return self.tags <= node.tags and all(node.total.get(name, 0.0) > 0 for name in self.names)

    def join(self, node: Node) -> None:
        self.nodes[node.id] = node
        node.pools.append(self)
        self.offer(node)

    def leave(self, node: Node) -> None:
        del self.nodes[node.id]
        self._nesting.pop(node.id, None)

    def offer(self, node: Node) -> None:
        """Enter the node at its present rank; to be called after each change of it."""
        if node.lent and node.takes_nested:
            self._nesting[node.id] = node
        if node.open:
            self._enter(self._entry(node))

    def _enter(self, entry: tuple[float, int, int, Node]) -> None:
        for heap in self._heaps.values():
            heapq.heappush(heap, entry)
            if len(heap) > 64 + 4 * len(self.nodes):
                heap[:] = [one for one in heap if one[2] == one[3].version and one[3].id in self.nodes]
                heapq.heapify(heap)

    def serve(self, lane: Lane) -> None:
        """From now on it may be looked for nodes for this lane."""
        if lane.step not in self._heaps:
            self._heaps[lane.step] = [self._entry(node) for node in self.nodes.values() if node.open]
            heapq.heapify(self._heaps[lane.step])

    def _entry(self, node: Node) -> tuple[float, int, int, Node]:
        return self._policy.rank(node, self._random, self._last), next(self._count), node.version, node

    def find(self, lane: Lane, now: float) -> Node | None:
        """The best node that has room for this lane's first task now, and time. Who has not that never has again."""
        heap = self._heaps[lane.step]
        skipped = []
        found = None
        self._next = math.inf
        while heap:
            rank, _, version, node = heap[0]
            gone = version != node.version or not node.open or node.id not in self.nodes
            if gone or not node.lasts(lane.length_s, now):
                heapq.heappop(heap)
                continue
            if node.fits(lane.demand) and (node.reserved is None or lane.may_pass(node.reserved)):
                found = node
                self._last = rank
                if len(heap) > 1:
                    self._next = min(heap[1:3])[0]
                break
            skipped.append(heapq.heappop(heap))
        for entry in skipped:
            heapq.heappush(heap, entry)
        return found or (self._find_nesting(lane, now) if lane.nested else None)

    def finds_again(self, node: Node) -> bool:
        """The node that was found last has got a task: whether it is the best nevertheless. Else it is entered."""
        if self._next == math.inf:
            return True
        entry = self._entry(node)
        if entry[0] < self._next:
            self._last = entry[0]
            return True
        self._enter(entry)
        return False

    def _find_nesting(self, lane: Lane, now: float) -> Node | None:
        """A node that takes nothing but what its tasks may wait for; few are ever there."""
        for node in list(self._nesting.values()):
            if not node.takes_nested:
                del self._nesting[node.id]
            elif node.fits(lane.demand) and node.lasts(lane.length_s, now):
                return node
        return None
