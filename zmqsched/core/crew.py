"""A node's workers: how many there are to be, when they are started, which of them are to end.

Rules
-----
* There are as many as slots, and one more for each slot that is lent. Those beyond are ended when they have been idle for
  ``SPARE_S``.
* One that has run as many tasks as it may, or has taken more memory than is good, is *worn*: it is given no other, ends when
  it is idle, and another is started. One that takes more than it may is killed. One that has not run anything yet is let be:
  the next would be the same.
* Workers that die before their first task are replaced with a growing delay.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from ..protocol import WorkerState
from .events import AgentAction, Kill, Log, Retire, Start
from .settings import Care
from .workers import Worker

MAX_LENT = 128  # slots: each is one more process
SPARE_S = 1.0
RESTART_BACKOFF_S = 0.1  # doubled with each worker in a row that dies before its first task


class Crew:
    """``changed``: since the broker was told who is there. ``lent``: how many workers wait for others."""

    def __init__(self, slots: int, care: Care) -> None:
        self.slots = slots
        self._care = care
        self.workers: dict[int, Worker] = {}
        self.changed = False
        self.lent = 0
        self._numbers = 0
        self._spares = 0  # that are to end
        self._worn: dict[int, Worker] = {}
        self._start_at = 0.0
        self._early_deaths = 0

    def sanity_check(self) -> None:
        workers = self.workers.values()
        assert self.lent == sum(worker.waits for worker in workers), "the count of lent slots is off"
        assert self._spares == sum(worker.spare for worker in workers), "the count of spare workers is off"
        assert sum(worker.active and not worker.late for worker in workers) <= self.slots, "too many run"
        assert self._worn.keys() == {worker.id for worker in workers if worker.is_worn}, "the worn workers are off"
        assert not any(worker.waits and not worker.runs for worker in workers), "a worker without a task waits"
        assert not any(worker.spare and worker.runs for worker in workers), "a worker that is to end was given a task"

    @property
    def complete(self) -> bool:
        return len(self.workers) >= self.slots and all(worker.pid for worker in self.workers.values())

    @property
    def useful_lent(self) -> int:
        """For so many lent slots there is another worker."""
        return min(MAX_LENT, self.lent)

    @property
    def settled(self) -> bool:
        """There is one worker for each slot, and none of them is to end."""
        return len(self.workers) == self.slots and not (self.lent or self._spares or self._worn)

    def deadlines(self) -> list[float]:
        if len(self.workers) < self._wanted:
            return [self._start_at]
        if self._idle_and_worn():
            return [0.0]
        return [worker.idle_since + SPARE_S for worker in self._surplus()]

    def adjust(self, now: float) -> list[AgentAction]:
        """Start who is missing, and end who is not needed."""
        actions: list[AgentAction] = [self._retire(worker) for worker in self._idle_and_worn()]
        while len(self.workers) < self._wanted and now >= self._start_at:
            self._numbers += 1
            self.workers[self._numbers] = Worker(self._numbers, self._care.max_tasks or math.inf)
            actions.append(Start(self._numbers))
        bored = [worker for worker in self._surplus() if now >= worker.idle_since + SPARE_S]
        return [*actions, *(self._retire(worker) for worker in bored)]

    def measured(self, sizes: Mapping[int, int]) -> list[AgentAction]:
        """What workers take of the memory, in bytes."""
        actions: list[AgentAction] = []
        limit = self._care.memory_limit
        for worker in [worker for number in sizes if (worker := self.workers.get(number)) is not None]:
            size = sizes[worker.id]
            if not worker.done and not worker.runs:
                continue
            if size > limit and not worker.over:
                worker.over = f"used {_amount(size)} of the {_amount(limit)} that a worker may use"
                self._wear(worker)
                actions.append(Kill(worker.id))
            elif size > limit * self._care.memory_soft and not worker.worn:
                self._wear(worker)
                text = f"worker {worker.id} uses {_amount(size)} of {_amount(limit)}: it is replaced when its task has ended"
                actions.append(Log("warning", text))
        return actions

    def _idle_and_worn(self) -> list[Worker]:
        return [worker for worker in self._worn.values() if worker.state == "idle" and not worker.spare]

    def _wear(self, worker: Worker) -> None:
        worker.worn = self.changed = True
        self._worn[worker.id] = worker

    def _retire(self, worker: Worker) -> Retire:
        worker.spare = True
        self._spares += 1
        return Retire(worker.id)

    def has_done(self, worker: Worker, tasks: int) -> None:
        worker.done += tasks
        worker.left -= tasks
        if worker.left <= 0:
            self._worn[worker.id] = worker
        self._early_deaths = 0

    def bury(self, worker: Worker, now: float, *, early: bool) -> None:
        """``early``: it died by itself and before its first task."""
        if early:
            self._start_at = now + RESTART_BACKOFF_S * 2 ** min(6, self._early_deaths)
            self._early_deaths += 1
        self._spares -= worker.spare
        del self.workers[worker.id]
        self._worn.pop(worker.id, None)
        self.changed = True

    def states(self) -> list[WorkerState]:
        return [WorkerState(w.id, w.pid, w.state, w.done, worn=w.is_worn) for w in self.workers.values()]

    @property
    def _wanted(self) -> int:
        return self.slots + self.useful_lent + self._spares

    def _surplus(self) -> list[Worker]:
        """Idle workers beyond those that are wanted."""
        number = len(self.workers) - self._wanted
        if number <= 0:
            return []
        return [worker for worker in self.workers.values() if worker.state == "idle" and not worker.spare][:number]


def _amount(size: float) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"
