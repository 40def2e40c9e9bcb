"""Which worker of a node gets which of its tasks next, how many at once, and how many more the node should have.

Rules
-----
* A worker's pipe is a queue that both ends can take from: the shell keeps the worker's end open as well. So short tasks
  are given several at once, which saves a wake-up each, and when the first of them turns out to be long the rest is
  taken back and given to others: what lies in a pipe is never stuck. And when a worker dies, what it had taken and not
  answered is exactly the task it was running.
* How many are given at once follows from how long tasks have taken lately: about ``BATCH_S`` of work.
* Tasks that ask for more than one CPU, or for anything else, are given alone.
* If the first in the queue does not fit, the others wait too: else a wide task would starve behind narrow ones. The
  broker sends only what fits apart from CPUs, so this lasts until running tasks end.
"""

from __future__ import annotations

import math

from ..protocol import Input, Payload, Run, payload_bytes
from .crew import Crew
from .events import AgentAction, Give, TakeBack
from .functions import FunctionStore
from .priorities import PriorityQueue
from .room import Demand, Room
from .workers import Held, Worker

LOOKAHEAD_S = 0.02
HAND_BACK_S = 2 * LOOKAHEAD_S  # what has waited here so long, and is beyond what is worth prefetching, is handed back
BATCH_S = 0.002
TASK_OVERHEAD_S = 20e-6  # what a task costs a worker besides the call itself
MAX_BATCH = 64  # a pipe holds about 270 small runs
MAX_BATCHED_BYTES = 2 * 1024  # of a call that joins a batch: the pipe must never be full, and large calls gain nothing
MAX_PREFETCH = 256  # for each slot
STUCK_AFTER_S = 0.005  # a batch whose first task takes this long, and three times as long as usual, is taken apart
MAX_WORKER_FUNCTIONS = 512


class Giving:
    """``queue``: tasks that wait here, and lack nothing. ``task_s``: how long a task takes, smoothed; None until one was
    timed. ``came_at``: when the last tasks came; the broker may have nowhere else to send them."""

    def __init__(self, crew: Crew, room: Room, functions: FunctionStore, out: list[AgentAction]) -> None:
        self.queue: PriorityQueue[Held] = PriorityQueue()
        self.task_s: float | None = None
        self.came_at = -math.inf
        self._crew = crew
        self._room = room
        self._functions = functions
        self._out = out

    def took(self, seconds: float) -> None:
        """A task has ended."""
        took = seconds + TASK_OVERHEAD_S
        self.task_s = took if self.task_s is None else self.task_s + 0.1 * (took - self.task_s)

    @property
    def has_plenty(self) -> bool:
        """Short tasks wait here, and lie in every worker's pipe: nobody runs dry if answers are read a little later."""
        return self._depth() == MAX_BATCH and all(len(w.runs) > 1 for w in self._crew.workers.values())

    def stuck_after(self) -> float:
        return max(STUCK_AFTER_S, 3 * (self.task_s or 0.0))

    def stall(self, now: float) -> float:
        """For how long no worker has finished anything, if all are busy."""
        since = self._since()
        return now - max(since) if len(since) >= self._crew.slots else 0.0

    def prefetch(self, stall: float) -> int:
        """How many more than run are to lie here."""
        slots = self._crew.slots
        return 0 if self.task_s is None else min(MAX_PREFETCH * slots, int(slots * LOOKAHEAD_S / max(self.task_s, stall)))

    def excess(self, now: float) -> int:
        """How many of those that wait here will not start for long."""
        if not self.queue.count or now < self.came_at + HAND_BACK_S or (stall := self.stall(now)) < HAND_BACK_S:
            return 0
        return self.queue.count - self.prefetch(stall)

    def excess_at(self) -> float:
        """When there may be an excess: the queue, in which something waits, is longer than what is worth prefetching at such
        a stall."""
        since = self._since()
        if len(since) < self._crew.slots:
            return math.inf
        stalled_at = max(since) + max(HAND_BACK_S, self._crew.slots * LOOKAHEAD_S / self.queue.count + 0.001)
        return max(stalled_at, self.came_at + HAND_BACK_S)

    def _since(self) -> list[float]:
        """Since when each of those that take a slot has had its present task."""
        return [worker.since for worker in self._crew.workers.values() if worker.active]

    def take_back(self, worker: Worker) -> None:
        """Whatever lies in its pipe behind the task it runs."""
        if len(worker.runs) > 1 and not worker.taking_back:
            worker.taking_back = True
            self._out.append(TakeBack(worker.id))

    def share_the_last(self) -> None:
        """A worker has nothing to do while another has runs in its pipe: take those back and share them."""
        longest = max(self._crew.workers.values(), key=_length, default=None)
        if longest is None or (len(longest.runs) - 1) * (self.task_s or 0.0) <= BATCH_S:
            return
        if any(worker.state == "idle" and not worker.spare for worker in self._crew.workers.values()):
            self.take_back(longest)

    def give(self, now: float, until: float) -> list[Worker]:
        """Fill idle workers first, then all of them up to a batch. Nothing is to be begun after ``until``. Returns those
        that were given something."""
        depth = self._depth()
        stuck_after = self.stuck_after()
        free = self._crew.slots
        idle, others = [], []
        for worker in self._crew.workers.values():
            free -= worker.active
            if not worker.fit:
                continue
            if not worker.runs:
                idle.append(worker)
            elif worker.active and len(worker.runs) < min(depth, worker.left) and now - worker.since < stuck_after:
                others.append(worker)
        ready = [*idle[: max(0, free)], *sorted(others, key=_length)]
        given = []
        for index, worker in enumerate(ready):
            share = -(-self.queue.count // (len(ready) - index))
            most = min(share, min(depth, worker.left) - len(worker.runs))
            if runs := self._runs_for(worker, most, now, until):
                self._out.append(Give(worker.id, runs))
                given.append(worker)
        return given

    def _runs_for(self, worker: Worker, most: float, now: float, until: float) -> list[Run]:
        runs: list[Run] = []
        while len(runs) < most and self.queue.count and self._may_run(self.queue.head(), worker):
            runs.append(self._start(self.queue.pop(), worker, now, until))
        return runs

    def _depth(self) -> int:
        """How many runs a worker's pipe may hold: a batch of short ones; of longer ones the next, so that the worker
        does not wait for this process in between."""
        if self.task_s is None:
            return 1
        return max(min(MAX_BATCH, 1 + int(BATCH_S / self.task_s)), 2 if self.task_s <= LOOKAHEAD_S else 1)

    def _may_run(self, held: Held, worker: Worker) -> bool:
        demand = held.options.resources
        if not worker.runs:
            return self._room.fits(demand)
        joins = worker.plain and demand == worker.uses and not worker.taking_back
        return joins and self._size(held) <= MAX_BATCHED_BYTES

    def _size(self, held: Held) -> int:
        size = payload_bytes(held.call)
        return size + sum([payload_bytes(self._functions[name]) for _, name in held.inputs]) if held.inputs else size

    def _start(self, held: Held, worker: Worker, now: float, until: float) -> Run:
        options = held.options
        if not worker.runs:
            worker.since = now
            worker.late = False
            worker.plain = _is_plain(options.resources)
            self._room.take(worker, options.resources)
        held.worker = worker.id
        worker.runs[held.task] = held
        digest = held.shape.function
        function: Payload = b""
        fresh = False
        if digest not in worker.functions:
            function = self._functions[digest]
            fresh = len(worker.functions) >= MAX_WORKER_FUNCTIONS
            if fresh:
                worker.functions.clear()
            worker.functions.add(digest)
        env = (("CUDA_VISIBLE_DEVICES", ",".join(worker.gpus)),) if worker.gpus else ()
        inputs = [Input(task, self._functions[each]) for task, each in held.inputs] if held.inputs else []
        return Run(
            held.task, held.attempt, digest, function, held.call, fresh, env, until, options.name, inputs, options.depth,
        )  # fmt: skip


def _length(worker: Worker) -> int:
    return len(worker.runs)


def _is_plain(demand: Demand) -> bool:
    """One CPU at most, and nothing else: the usual task, which any slot can run."""
    return len(demand) == 1 and demand[0][0] == "cpu" and demand[0][1] <= 1
