"""A node's workers: how many there are to be, when they are started, which of them are to end.

Rules
-----
* There are as many as slots, and one more for each slot that is lent. Those beyond are ended when they have been idle for
  ``SPARE_S``.
* Workers that die before their first task are replaced with a growing delay.
"""

from __future__ import annotations

from ..protocol import WorkerState
from .events import AgentAction, Retire, Start
from .workers import Worker

MAX_LENT = 128  # slots: each is one more process
SPARE_S = 1.0
RESTART_BACKOFF_S = 0.1  # doubled with each worker in a row that dies before its first task


class Crew:
    """``changed``: since the broker was told who is there. ``lent``: how many workers wait for others."""

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.workers: dict[int, Worker] = {}
        self.changed = False
        self.lent = 0
        self._numbers = 0
        self._spares = 0  # that are to end
        self._start_at = 0.0
        self._early_deaths = 0

    def sanity_check(self) -> None:
        workers = self.workers.values()
        assert self.lent == sum(worker.waits for worker in workers), "the count of lent slots is off"
        assert self._spares == sum(worker.spare for worker in workers), "the count of spare workers is off"
        assert sum(worker.active and not worker.late for worker in workers) <= self.slots, "too many run"
        assert not any(worker.waits and not worker.runs for worker in workers), "a worker without a task waits"
        assert not any(worker.spare and worker.runs for worker in workers), "a worker that is to end was given a task"

    @property
    def complete(self) -> bool:
        return len(self.workers) >= self.slots and all(worker.pid for worker in self.workers.values())

    @property
    def useful_lent(self) -> int:
        """For so many lent slots there is another worker."""
        return min(MAX_LENT, self.lent)

    def deadlines(self) -> list[float]:
        if len(self.workers) < self._wanted:
            return [self._start_at]
        return [worker.idle_since + SPARE_S for worker in self._surplus()]

    def adjust(self, now: float) -> list[AgentAction]:
        """Start who is missing, and end who is not needed."""
        actions: list[AgentAction] = []
        while len(self.workers) < self._wanted and now >= self._start_at:
            self._numbers += 1
            self.workers[self._numbers] = Worker(self._numbers)
            actions.append(Start(self._numbers))
        for worker in self._surplus():
            if now >= worker.idle_since + SPARE_S:
                worker.spare = True
                self._spares += 1
                actions.append(Retire(worker.id))
        return actions

    def has_done(self, worker: Worker) -> None:
        worker.done += 1
        self._early_deaths = 0

    def bury(self, worker: Worker, now: float, *, early: bool) -> None:
        """``early``: it died by itself and before its first task."""
        if early:
            self._start_at = now + RESTART_BACKOFF_S * 2 ** min(6, self._early_deaths)
            self._early_deaths += 1
        self._spares -= worker.spare
        del self.workers[worker.id]
        self.changed = True

    def states(self) -> list[WorkerState]:
        return [WorkerState(worker.id, worker.pid, worker.state, worker.done) for worker in self.workers.values()]

    @property
    def _wanted(self) -> int:
        return self.slots + self.useful_lent + self._spares

    def _surplus(self) -> list[Worker]:
        """Idle workers beyond those that are wanted."""
        number = len(self.workers) - self._wanted
        if number <= 0:
            return []
        return [worker for worker in self.workers.values() if worker.state == "idle" and not worker.spare][:number]
