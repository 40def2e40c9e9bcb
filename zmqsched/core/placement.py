"""Which queued task goes to which node next: lanes of tasks, pools of nodes, and the policy's rank between them.

Rules
-----
* The task with the highest priority goes first, among equals the oldest; a task that finds no room lets the next pass
  (no free resource waits behind a task that cannot use it).
* A lane that found no room is *blocked* until a node of its pool has changed: a turn costs time for what is new, not
  for what is waiting.
* A task that needs much room could be passed over for ever by small ones. Once it has been for ``RESERVE_AFTER_S``, one
  node is *reserved*: it takes nothing else of that priority or below until the task is placed.
* Nodes that are to end at some time get no task that takes longer. While there are such, lanes are divided by how long their
  tasks take (``Kind.step``); what turns out to be longer, or shorter, than was thought is moved when its turn comes.
* A node that was found takes the lane's tasks in one *run*, until it has no room or another lane's or another node's turn
  has come. So where there is nobody to choose from a task costs no step of a heap, else one among the nodes of a pool and
  one among the lanes that are ready.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from random import Random

from ..protocol import Options, Shape
from .nodes import ALIVE, SUSPECT, Demand, Node, Pool, Prospect
from .policy import Policy
from .tasks import ASSIGNED, QUEUED, Kind, Lane, Task

MAX_IDLE_KINDS = 256
RESERVE_AFTER_S = 5.0
MAX_MOVES = 1_000  # of tasks to other lanes, in a turn


class Placement:
    def __init__(self, policy: Policy, random: Random) -> None:
        self._policy = policy
        self._random = random
        self._kinds: dict[Shape, Kind] = {}
        self._lanes: dict[tuple[Demand, tuple[str, ...], bool, int], Lane] = {}
        self._pools: dict[tuple[frozenset[str], frozenset[str]], Pool] = {}
        self._idle: dict[Shape, Kind] = {}  # without tasks, or lately so; the longest idle first
        self._nodes: dict[str, Node] = {}
        self._ready: dict[int, Lane] = {}
        self._reserved: dict[str, Node] = {}
        self._changed: dict[str, Node] = {}
        self._ending = 0  # nodes that do not last for ever
        self._turn = 0
        self.queued = 0
        self._newest_placed = 0  # the highest number of a task that was placed

    @property
    def pending(self) -> bool:
        """``place`` has something to look at. Which nodes have changed is not looked at while nothing is queued."""
        return self.queued > 0 and bool(self._ready or self._changed)

    def kind(self, shape: Shape) -> Kind:
        kind = self._kinds.get(shape)
        if kind is None:
            lane = self._lane(shape.options, 0)
            lane.kinds += 1
            kind = self._kinds[shape] = Kind(shape, lane)
        return kind

    def _lane(self, options: Options, step: int) -> Lane:
        key = (options.resources, options.tags, options.depth > 0, step)
        lane = self._lanes.get(key)
        if lane is None:
            pool = self._pool(options.resources, options.tags)
            lane = self._lanes[key] = Lane(options.resources, options.tags, pool, nested=options.depth > 0, step=step)
            pool.serve(lane)
        return lane

    def _lane_of(self, kind: Kind) -> Lane:
        """As long as all nodes last for ever, it does not matter how long tasks take."""
        step = kind.step if self._ending else 0
        if kind.lane.step != step:
            kind.lane = self._lane(kind.options, step)
            if kind.lane not in kind.lanes:
                kind.lanes.append(kind.lane)
                kind.lane.kinds += 1
        return kind.lane

    def retire(self, kind: Kind) -> None:
        """Its last task is finished. The next is likely of a kind seen lately, so some are kept."""
        self._idle.pop(kind.shape, None)
        self._idle[kind.shape] = kind
        if len(self._idle) > MAX_IDLE_KINDS:
            oldest = self._idle.pop(next(iter(self._idle)))
            if not oldest.open:
                self._forget(oldest)

    def _forget(self, kind: Kind) -> None:
        del self._kinds[kind.shape]
        for lane in kind.lanes:
            lane.kinds -= 1
            if not lane.kinds:
                del self._lanes[lane.demand, lane.tags, lane.nested, lane.step]
                self._ready.pop(id(lane), None)
                lane.pool.blocked.pop(id(lane), None)
                self._drop_if_unused(lane.pool)

    def enqueue(self, task: Task, *, first: bool = False) -> None:
        kind = task.kind
        lane = kind.lane
        self._push(task, self._lane_of(kind) if self._ending or lane.step else lane, first=first)
        if self._reserved:
            self._reconsider()

    def _push(self, task: Task, lane: Lane, *, first: bool = False) -> None:
        task.lane = lane
        lane.tasks.push(task.id, task, task.kind.rank, first=first)
        self.queued += 1
        if id(lane) not in lane.pool.blocked:
            self._ready[id(lane)] = lane

    def withdraw(self, task: Task) -> None:
        task.lane.tasks.remove(task.id, task.kind.rank)
        self.queued -= 1
        if self._reserved:
            self._reconsider()

    def join(self, node: Node) -> None:
        self._nodes[node.id] = node
        self._ending += node.leaves_at < math.inf
        for pool in self._pools.values():
            if pool.suits(node):
                pool.join(node)
        self.changed(node)

    def leave(self, node: Node) -> None:
        del self._nodes[node.id]
        self._ending -= node.leaves_at < math.inf
        for pool in node.pools:
            pool.leave(node)
        self._changed.pop(node.id, None)
        self._reserved.pop(node.id, None)

    def changed(self, node: Node) -> None:
        """The node may have room that it had not."""
        self._changed[node.id] = node

    def place(self, now: float) -> list[tuple[Node, list[Task]]]:
        """Assign all that can be assigned now: each task is a new attempt."""
        self._enter_changed()
        runs: list[tuple[Node, list[Task]]] = []
        moves = self._place_ready(runs, now, MAX_MOVES)
        while self._ready and 0 < moves < MAX_MOVES:  # else it goes on in the next turn
            if not (more := self._place_ready(runs, now, MAX_MOVES - moves)):
                break
            moves += more
        if runs and self._reserved:
            self._reconsider()
        return runs

    def _place_ready(self, runs: list[tuple[Node, list[Task]]], now: float, most: int) -> int:
        """Returns how many tasks were moved to other lanes, at most so many; they are not looked at yet."""
        moved = 0
        heap = []
        for lane in self._ready.values():
            if lane.tasks.count:
                head = lane.tasks.head()
                heap.append((-head.kind.rank, head.seq, lane))
        heapq.heapify(heap)
        self._ready.clear()
        while heap:
            lane = heap[0][2]
            node = lane.pool.find(lane, now)
            if self._ending and (right := self._better_lane(lane, node, now)) is not None:
                heapq.heappop(heap)
                if moved < most:
                    moved += 1
                    self.queued -= 1
                    self._push(lane.tasks.pop(), right)
                if lane.tasks:
                    self._ready[id(lane)] = lane
                continue
            if node is None:
                heapq.heappop(heap)
                lane.pool.blocked[id(lane)] = lane
                continue
            if node.reserved is lane:
                self._release(node)
            lane.passed_over_since = None
            others = min(heap[1:3]) if len(heap) > 1 else None
            runs.append((node, self._run(lane, node, others)))
            if not lane.tasks.count:
                heapq.heappop(heap)
            elif others is not None:
                head = lane.tasks.head()
                heapq.heapreplace(heap, (-head.kind.rank, head.seq, lane))
        return moved

    def _run(self, lane: Lane, node: Node, others: tuple[int, int, Lane] | None) -> list[Task]:
        """Assign the lane's first tasks to the node that was found for it, as long as it would be found again. ``others``:
        the best first task of another lane."""
        queue = lane.tasks
        most = min(node.room(lane.demand), node.credit - len(node.tasks), queue.count)
        if self._ending or node.reserved is not None:
            most = 1  # whether the node may take the next one, too, depends on that
        run: list[Task] = []
        entered = None
        node.version += 1
        while True:
            task = queue.pop()
            task.move(ASSIGNED)
            task.attempt += 1
            task.node = node.id
            self._turn += 1
            node.take(task, self._turn)
            run.append(task)
            if len(run) >= most:
                break
            if others is not None:
                head = queue.head()
                if (-head.kind.rank, head.seq) > others[:2]:
                    break
            if not lane.pool.finds_again(node):
                entered = lane.pool
                break
        self.queued -= len(run)
        self._newest_placed = max(self._newest_placed, *[task.seq for task in run])
        for pool in node.pools:
            if pool is not entered:
                pool.offer(node)
        return run

    def _better_lane(self, lane: Lane, node: Node | None, now: float) -> Lane | None:
        """Where the first task of this lane belongs, as is known by now, if it matters: it would not end at the node that
        was found, or it is not as long as was thought and none was found."""
        kind = lane.tasks.head().kind
        right = self._lane_of(kind)
        if right is lane:
            return None
        misplaced = right.step < lane.step if node is None else not node.lasts(right.length_s, now)
        return right if misplaced else None

    def adopt(self, task: Task, node: Node, attempt: int) -> None:
        """The node runs this queued task already."""
        self.withdraw(task)
        task.move(ASSIGNED)
        task.attempt = attempt
        task.node = node.id
        node.credit = max(node.credit, node.assigned + 1)  # it did not count what it ran for nobody
        self._turn += 1
        node.version += 1
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
                self._reserve_for(lane, now)

    def _reserve_for(self, lane: Lane, now: float) -> None:
        free = [node for node in lane.pool.nodes.values() if node.reserved is None and node.state is ALIVE]
        able = [node for node in free if node.could_hold(lane.demand) and node.lasts(lane.length_s, now)]
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

    def hopeless(self, expected: Sequence[Node | Prospect]) -> list[Lane]:
        """Lanes with tasks that no node, here or expected, could hold even if it were empty."""
        return [
            lane
            for lane in self._lanes.values()
            if lane.tasks
            and not any(node.could_hold(lane.demand) for node in lane.pool.nodes.values())
            and not any(lane.suits(node) for node in expected)
        ]

    def suited(self, prospect: Prospect) -> int:
        """How many queued tasks such a node could hold."""
        return sum(len(lane.tasks) for lane in self._lanes.values() if lane.tasks and lane.suits(prospect))

    def lanes(self) -> list[Lane]:
        return list(self._lanes.values())

    def open_kinds(self) -> dict[Shape, int]:
        return {shape: kind.open for shape, kind in self._kinds.items()}

    def check_nothing_waits(self, now: float) -> None:
        for lane in self._lanes.values():
            if lane.tasks:
                idle = [n.id for n in self._nodes.values() if lane.pool.suits(n) and n.open and n.fits(lane.demand)
                        and n.lasts(lane.length_s, now) and (n.reserved is None or lane.may_pass(n.reserved))]  # fmt: skip
                if lane.nested:
                    nesting = [node for node in lane.pool.nodes.values() if node.takes_nested and node.fits(lane.demand)]
                    idle += [node.id for node in nesting if node.lasts(lane.length_s, now)]
                assert not idle, f"tasks wait for {lane.demand} while {idle} have room"

    def sanity_check(self) -> None:
        assert self.queued == sum(len(lane.tasks) for lane in self._lanes.values()), "the count of queued tasks is off"
        for lane in self._lanes.values():
            tasks = list(lane.tasks)
            assert len(tasks) == len(lane.tasks), "a lane's count is off"
            assert all(task.state is QUEUED and task.lane is lane for task in tasks), "a lane holds a stranger"
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
