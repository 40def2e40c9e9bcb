"""Which queued task goes to which node next: lanes of tasks, pools of nodes, and the policy's rank between them.

Rules
-----
* The task with the highest priority goes first, among equals the oldest; a task that finds no room lets the next pass
  (no free resource waits behind a task that cannot use it).
* A lane that found no room is *blocked* until a node of its pool has changed: a turn costs time for what is new, not
  for what is waiting.
* A task that needs much room could be passed over for ever by small ones. Once it has been for ``RESERVE_AFTER_S``, one
  node is *reserved*: it takes nothing else of that priority or below until the task is placed.
* The cost per task is one heap step among the nodes of a pool and one among the lanes that are ready.
"""

from __future__ import annotations

import heapq
from random import Random

from ..protocol import Shape
from .nodes import ALIVE, SUSPECT, Demand, Node, Pool
from .policy import Policy
from .tasks import ASSIGNED, QUEUED, Kind, Lane, Task

MAX_IDLE_KINDS = 256
RESERVE_AFTER_S = 5.0


class Placement:
    def __init__(self, policy: Policy, random: Random) -> None:
        self._policy = policy
        self._random = random
        self._kinds: dict[Shape, Kind] = {}
        self._lanes: dict[tuple[Demand, tuple[str, ...], bool], Lane] = {}
        self._pools: dict[tuple[frozenset[str], frozenset[str]], Pool] = {}
        self._idle: dict[Shape, Kind] = {}  # without tasks, or lately so; the longest idle first
        self._nodes: dict[str, Node] = {}
        self._ready: dict[int, Lane] = {}
        self._reserved: dict[str, Node] = {}
        self._changed: dict[str, Node] = {}
        self._turn = 0
        self._newest_placed = 0  # the highest number of a task that was placed

    @property
    def pending(self) -> bool:
        """``place`` has something to look at."""
        return bool(self._ready or self._changed)

    def queued(self) -> int:
        return sum(len(lane.tasks) for lane in self._lanes.values())

    def kind(self, shape: Shape) -> Kind:
        kind = self._kinds.get(shape)
        if kind is None:
            key = (shape.options.resources, shape.options.tags, shape.options.depth > 0)
            lane = self._lanes.get(key)
            if lane is None:
                demand, tags, nested = key
                lane = self._lanes[key] = Lane(demand, tags, self._pool(demand, tags), nested=nested)
            lane.kinds += 1
            kind = self._kinds[shape] = Kind(shape, lane)
        return kind

    def retire(self, kind: Kind) -> None:
        """Its last task is finished. The next is likely of a kind seen lately, so some are kept."""
        self._idle.pop(kind.shape, None)
        self._idle[kind.shape] = kind
        if len(self._idle) > MAX_IDLE_KINDS:
            oldest = self._idle.pop(next(iter(self._idle)))
            if not oldest.open:
                self._forget(oldest)

    def _forget(self, kind: Kind) -> None:
        lane = kind.lane
        del self._kinds[kind.shape]
        lane.kinds -= 1
        if not lane.kinds:
            del self._lanes[lane.demand, lane.tags, lane.nested]
            self._ready.pop(id(lane), None)
            lane.pool.blocked.pop(id(lane), None)
            self._drop_if_unused(lane.pool)

    def enqueue(self, task: Task, *, first: bool = False) -> None:
        lane = task.kind.lane
        lane.tasks.push(task.id, task, task.kind.options.rank, first=first)
        if id(lane) not in lane.pool.blocked:
            self._ready[id(lane)] = lane
        if self._reserved:
            self._reconsider()

    def withdraw(self, task: Task) -> None:
        task.kind.lane.tasks.remove(task.id, task.kind.options.rank)
        if self._reserved:
            self._reconsider()

    def join(self, node: Node) -> None:
        self._nodes[node.id] = node
        for pool in self._pools.values():
            if pool.suits(node):
                pool.join(node)
        self.changed(node)

    def leave(self, node: Node) -> None:
        del self._nodes[node.id]
        for pool in node.pools:
            pool.leave(node)
        self._changed.pop(node.id, None)
        self._reserved.pop(node.id, None)

    def changed(self, node: Node) -> None:
        """The node may have room that it had not."""
        self._changed[node.id] = node

    def place(self) -> list[tuple[Task, Node]]:
        """Assign all that can be assigned now: each pair is a new attempt."""
        self._enter_changed()
        heap = []
        for lane in self._ready.values():
            if lane.tasks:
                head = lane.tasks.head()
                heap.append((-head.kind.options.rank, head.seq, lane))
        heapq.heapify(heap)
        self._ready.clear()
        pairs = []
        while heap:
            lane = heap[0][2]
            node = lane.pool.find(lane)
            if node is None:
                heapq.heappop(heap)
                lane.pool.blocked[id(lane)] = lane
                continue
            if node.reserved is lane:
                self._release(node)
            lane.passed_over_since = None
            task = lane.tasks.pop()
            task.move(ASSIGNED)
            task.attempt += 1
            self._newest_placed = max(self._newest_placed, task.seq)
            task.node = node.id
            self._turn += 1
            node.take(task, self._turn)
            for pool in node.pools:
                pool.offer(node)
            pairs.append((task, node))
            if lane.tasks:
                head = lane.tasks.head()
                heapq.heapreplace(heap, (-head.kind.options.rank, head.seq, lane))
            else:
                heapq.heappop(heap)
        if pairs and self._reserved:
            self._reconsider()
        return pairs

    def adopt(self, task: Task, node: Node, attempt: int) -> None:
        """The node runs this queued task already."""
        self.withdraw(task)
        task.move(ASSIGNED)
        task.attempt = attempt
        task.node = node.id
        node.credit = max(node.credit, node.assigned + 1)  # it did not count what it ran for nobody
        self._turn += 1
        node.take(task, self._turn)
        self.changed(node)

    def reserve(self, now: float) -> None:
        """Keep a node free for each lane that was passed over for long; to be called now and then."""
        for node in list(self._reserved.values()):
            if node.reserved is None or not node.reserved.tasks or node.state not in (ALIVE, SUSPECT):
                self._release(node)
        taken = {id(node.reserved) for node in self._reserved.values()}
        for lane in self._lanes.values():
            if not lane.tasks:
                lane.passed_over_since = None
            elif lane.tasks.head().seq > self._newest_placed:
                lane.passed_over_since = None  # not passed over: its turn has not come
            elif lane.passed_over_since is None:
                lane.passed_over_since = now
            elif now - lane.passed_over_since >= RESERVE_AFTER_S and id(lane) not in taken:
                self._reserve_for(lane)

    def _reserve_for(self, lane: Lane) -> None:
        free = [node for node in lane.pool.nodes.values() if node.reserved is None and node.state is ALIVE]
        able = [node for node in free if node.could_hold(lane.demand)]
        if able:
            node = min(able, key=lambda node: node.assigned)
            node.reserved = lane
            self._reserved[node.id] = node

    def _release(self, node: Node) -> None:
        self._reconsider()
        node.reserved = None
        del self._reserved[node.id]

    def _reconsider(self) -> None:
        """Who may use a reserved node depends on the first tasks of lanes, so while there is one, blocked lanes are tried
        again whenever a lane has changed."""
        for pool in self._pools.values():
            self._ready.update(pool.blocked)
            pool.blocked.clear()

    def hopeless(self, expected: list[Node]) -> list[Lane]:
        """Lanes with tasks that no node, here or expected back, could hold even if it were empty."""
        return [
            lane
            for lane in self._lanes.values()
            if lane.tasks
            and not any(node.could_hold(lane.demand) for node in lane.pool.nodes.values())
            and not any(lane.pool.suits(node) and node.could_hold(lane.demand) for node in expected)
        ]

    def lanes(self) -> list[Lane]:
        return list(self._lanes.values())

    def open_kinds(self) -> dict[Shape, int]:
        return {shape: kind.open for shape, kind in self._kinds.items()}

    def check_nothing_waits(self) -> None:
        for lane in self._lanes.values():
            if lane.tasks:
                idle = [n.id for n in self._nodes.values() if lane.pool.suits(n) and n.open and n.fits(lane.demand)
                        and (n.reserved is None or lane.may_pass(n.reserved))]  # fmt: skip
                if lane.nested:
                    idle += [n.id for n in lane.pool.nodes.values() if n.takes_nested and n.fits(lane.demand)]
                assert not idle, f"tasks wait for {lane.demand} while {idle} have room"

    def sanity_check(self) -> None:
        for lane in self._lanes.values():
            tasks = list(lane.tasks)
            assert len(tasks) == len(lane.tasks), "a lane's count is off"
            assert all(task.state is QUEUED and task.kind.lane is lane for task in tasks), "a lane holds a stranger"
            if tasks and id(lane) not in self._ready:
                assert id(lane) in lane.pool.blocked, "a lane with tasks is neither ready nor blocked"
        for pool in self._pools.values():
            assert {n.id for n in self._nodes.values() if pool.suits(n)} == pool.nodes.keys(), "a pool misses a node"

    def _enter_changed(self) -> None:
        for node in self._changed.values():
            for pool in node.pools:
                pool.offer(node)
                if pool.blocked and (node.open or node.takes_nested):
                    self._ready.update(pool.blocked)
                    pool.blocked.clear()
        self._changed.clear()

    def _pool(self, demand: Demand, tags: tuple[str, ...]) -> Pool:
        key = (frozenset(name for name, amount in demand if amount), frozenset(tags))
        pool = self._pools.get(key)
        if pool is None:
            pool = self._pools[key] = Pool(*key, self._policy, self._random)
            for node in self._nodes.values():
                if pool.suits(node):
                    pool.join(node)
        return pool

    def _drop_if_unused(self, pool: Pool) -> None:
        if not any(lane.pool is pool for lane in self._lanes.values()):
            del self._pools[pool.names, pool.tags]
            for node in pool.nodes.values():
                node.pools.remove(pool)
