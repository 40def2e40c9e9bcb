"""Task records, their states, and the queues they wait in.

States
------
::

    WAITING ──► QUEUED ──► ASSIGNED ──► RUNNING
                 ▲  ▲          │           │
                 │  └──────────┼───────────┤      back to the queue: retry, node lost, worker died, handed back
                 └── DELAYED ◄─┴───────────┘      before a retry with back-off

    and from each of them to FINISHED

* A task is WAITING when it is accepted, or QUEUED if it waits for nothing.
* WAITING: its function has not arrived, or the result of a task that it has as an argument; or it may have run when the
  broker died, and must not run twice: what its node says decides. QUEUED: in its lane. ASSIGNED: one attempt lies at one
  node. RUNNING: that node said that a worker has it. DELAYED: it failed and is retried after a while. FINISHED: answered;
  the record is forgotten.
* Each step to ASSIGNED is a new attempt, numbered from 1; numbers only grow. An answer names its attempt, so a late one
  is recognised rather than reasoned about.
* A **lane** holds the queued tasks that ask for the same resources and tags, tasks of tasks in lanes of their own: they fit
  on the same nodes, so one look at the first tells about all. Within a lane: higher priority first, then first come,
  first served.
* A **kind** is what tasks of one function with equal options share. It lives as long as it has unfinished tasks.
"""

from __future__ import annotations

import math
from enum import IntEnum
from typing import TYPE_CHECKING

from ..protocol import Options, Payload, Shape, shape_bytes, wire_bytes
from .load import call_bytes
from .priorities import PriorityQueue

if TYPE_CHECKING:
    from .counting import Debts
    from .nodes import Node, Pool, Prospect
    from .owners import Owner


SHORT_S = 1.0  # what takes no longer may be given to a node that is about to leave, too
STEPS = 4  # lengths of tasks for each doubling: none is thought to take a fifth longer than it does
FORGETS = 0.02  # of the longest run, with each shorter one


class TaskState(IntEnum):
    WAITING = 0
    QUEUED = 1
    ASSIGNED = 2
    RUNNING = 3
    FINISHED = 4
    DELAYED = 5


WAITING, QUEUED, ASSIGNED, RUNNING, FINISHED, DELAYED = TaskState

MOVES: dict[TaskState, frozenset[TaskState]] = {
    WAITING: frozenset({QUEUED, DELAYED, FINISHED}),
    QUEUED: frozenset({ASSIGNED, FINISHED}),
    ASSIGNED: frozenset({RUNNING, QUEUED, DELAYED, FINISHED}),
    RUNNING: frozenset({QUEUED, DELAYED, FINISHED}),
    DELAYED: frozenset({QUEUED, FINISHED}),
    FINISHED: frozenset(),
}


class IllegalMove(AssertionError):
    """A bug of ours: the record is unchanged."""


class Task:
    """One unfinished task. ``node`` is the node that holds the current attempt, by id; ``failures`` counts the user's
    errors that were retried, ``deaths`` says how each worker died that was running this task, ``died_at`` when the first
    did. ``inputs``: the tasks whose results are arguments of the call, by id, of which ``lacks`` are not here yet.
    ``held_bytes``: what it counts for (``load.py``). ``debts``: what it has to do with WaitGroups, if anything. ``lent``: it
    waits for others, and what it needs for running is free."""

    __slots__ = (
        "attempt", "call", "cancelled", "deaths", "debts", "died_at", "failures", "held_bytes", "id", "inputs", "kind",
        "lacks", "lane", "lent", "node", "owner", "seq", "state",
    )  # fmt: skip

    def __init__(
        self,
        task_id: bytes,
        owner: Owner,
        kind: Kind,
        call: Payload,
        seq: int,
        inputs: tuple[bytes, ...] = (),
        state: TaskState = TaskState.WAITING,
    ) -> None:
        self.id = task_id
        self.owner = owner
        self.kind = kind
        self.lane = kind.lane  # it waits in, or waited in last
        self.call = call
        self.inputs = inputs
        self.held_bytes = call_bytes(call, inputs)
        self.lacks = 0
        self.lent = False
        self.seq = seq
        self.state = state
        self.attempt = 0
        self.node = ""
        self.failures = 0
        self.deaths: tuple[str, ...] = ()
        self.died_at: float | None = None
        self.cancelled = False
        self.debts: Debts | None = None

    def move(self, state: TaskState) -> None:
        if state not in MOVES[self.state]:
            raise IllegalMove(f"task {self.id.hex()}: {self.state.name} to {state.name}")
        self.state = state

    def __repr__(self) -> str:
        return f"<task {self.id.hex()[-6:]} {self.state.name} attempt {self.attempt} at {self.node or '-'}>"


class Lane:
    """The queue of one demand. ``nested``: of tasks of tasks, which some nodes take that take no others. ``step``: of how
    long its tasks take at most, ``length_s``; 0 if that is short, or not known.

    ``passed_over_since``: since when its first task finds no room while others do. ``unservable_since``: when it was noticed
    that no node could ever serve it.
    """

    __slots__ = (
        "demand", "kinds", "length_s", "nested", "passed_over_since", "pool", "step", "tags", "tasks", "unservable_since",
    )  # fmt: skip

    def __init__(
        self,
        demand: tuple[tuple[str, float], ...],
        tags: tuple[str, ...],
        pool: Pool,
        *,
        nested: bool = False,
        step: int = 0,
    ) -> None:
        self.nested = nested
        self.step = step
        self.length_s = 2.0 ** ((step - 1) / STEPS) if step else 0.0
        self.demand = demand
        self.tags = tags
        self.pool = pool
        self.kinds = 0
        self.tasks: PriorityQueue[Task] = PriorityQueue()
        self.passed_over_since: float | None = None
        self.unservable_since: float | None = None

    def may_pass(self, other: Lane) -> bool:
        """Whether a node kept free for the other lane may serve this one."""
        return self is other or not other.tasks or self.rank > other.rank

    def suits(self, node: Node | Prospect) -> bool:
        """Its tasks could be held there, if nothing else were."""
        return self.pool.suits(node) and node.could_hold(self.demand)

    @property
    def rank(self) -> int:
        """Of the first task."""
        return self.tasks.head().kind.rank


class Kind:
    """A function and the options it is to run with, shared by ``open`` unfinished tasks. ``bytes``: what the shape takes in
    a message, at most. ``rank``: higher goes first. ``lane``: for its next task; ``lanes``: all it ever had."""

    __slots__ = ("_longest_s", "bytes", "lane", "lanes", "open", "options", "rank", "shape")

    def __init__(self, shape: Shape, lane: Lane) -> None:
        self.shape = shape
        self.options: Options = shape.options
        self.rank = shape.options.rank
        self.bytes = shape_bytes(shape)
        self.lane = lane
        self.lanes = [lane]
        self.open = 0
        self._longest_s = 0.0

    def took(self, seconds: float) -> None:
        """A run has ended."""
        if seconds > self._longest_s:
            self._longest_s = seconds
        else:
            self._longest_s += FORGETS * (seconds - self._longest_s)

    @property
    def step(self) -> int:
        """Of how long a run will take: as long as it may, else as long as the longest of late did."""
        seconds = self.options.timeout or self._longest_s
        return 1 + math.ceil(STEPS * math.log2(seconds)) if seconds > SHORT_S else 0


def task_bytes(task: Task) -> int:
    """What the task takes in a message, without its function."""
    call = task.call
    size = len(call) if type(call) is bytes else wire_bytes(call)  # of nearly all a call less
    return size + task.kind.bytes + 60 * len(task.inputs)
