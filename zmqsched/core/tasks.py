"""Task records, their states, and the queues they wait in.

States
------
::

    WAITING ──► QUEUED ──► ASSIGNED ──► RUNNING
                 ▲  ▲          │           │
                 │  └──────────┼───────────┤      back to the queue: retry, node lost, worker died, handed back
                 └── DELAYED ◄─┴───────────┘      before a retry with back-off

    and from each of them to FINISHED

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

from enum import IntEnum
from typing import TYPE_CHECKING

from ..protocol import Options, Payload, Shape, shape_bytes, wire_bytes
from .priorities import PriorityQueue

if TYPE_CHECKING:
    from .counting import Debts
    from .nodes import Pool
    from .owners import Owner


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
    ``debts``: what it has to do with WaitGroups, if anything. ``lent``: it waits for others, and what it needs for
    running is free."""

    __slots__ = (
        "attempt", "call", "cancelled", "deaths", "debts", "died_at", "failures", "id", "inputs", "kind", "lacks", "lent",
        "node", "owner", "seq", "state",
    )  # fmt: skip

    def __init__(
        self, task_id: bytes, owner: Owner, kind: Kind, call: Payload, seq: int, inputs: tuple[bytes, ...] = ()
    ) -> None:
        self.id = task_id
        self.owner = owner
        self.kind = kind
        self.call = call
        self.inputs = inputs
        self.lacks = 0
        self.lent = False
        self.seq = seq
        self.state = WAITING
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
    """The queue of one demand. ``nested``: of tasks of tasks, which some nodes take that take no others.

    ``passed_over_since``: since when its first task finds no room while others do. ``unservable_since``: when it was noticed
    that no node could ever serve it.
    """

    __slots__ = ("demand", "kinds", "nested", "passed_over_since", "pool", "tags", "tasks", "unservable_since")

    def __init__(
        self, demand: tuple[tuple[str, float], ...], tags: tuple[str, ...], pool: Pool, *, nested: bool = False
    ) -> None:
        self.nested = nested
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

    @property
    def rank(self) -> int:
        """Of the first task."""
        return self.tasks.head().kind.options.rank


class Kind:
    """A function and the options it is to run with, shared by ``open`` unfinished tasks. ``bytes``: what the shape takes in
    a message, at most."""

    __slots__ = ("bytes", "lane", "open", "options", "shape")

    def __init__(self, shape: Shape, lane: Lane) -> None:
        self.shape = shape
        self.options: Options = shape.options
        self.bytes = shape_bytes(shape)
        self.lane = lane
        self.open = 0


def task_bytes(task: Task) -> int:
    """What the task takes in a message, without its function."""
    return wire_bytes(task.call) + task.kind.bytes + 60 * len(task.inputs)
