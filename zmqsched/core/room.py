"""What a node has, and what of it the tasks have that run there: CPUs, GPUs, memory, and whatever else it offers."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from ..protocol import LENT
from .workers import Worker

Demand = tuple[tuple[str, float], ...]


class Room:
    def __init__(self, total: Mapping[str, float], gpus: Iterable[str]) -> None:
        self._total = dict(total)
        self._used = dict.fromkeys(self._total, 0.0)
        self._gpu_load = dict.fromkeys(gpus, 0.0)

    def fits(self, demand: Demand) -> bool:
        for name, amount in demand:  # noqa: SIM110 - a generator would double the cost
            if self._used.get(name, 0.0) + amount > self._total.get(name, 0.0) + 1e-9:
                return False
        return True

    def take(self, worker: Worker, demand: Demand) -> None:
        worker.uses = demand
        for name, amount in demand:
            if name in self._used:  # it may ask for nothing, or next to nothing, of what is not here
                self._used[name] += amount
        worker.gpus = self._pin(demand)

    def release(self, worker: Worker) -> None:
        wanted = dict(worker.uses).get("gpu", 0.0)
        for gpu in worker.gpus:
            self._gpu_load[gpu] -= wanted / len(worker.gpus)
        for name, amount in worker.uses:
            if name in self._used:
                self._used[name] -= amount
        worker.uses = ()
        worker.gpus = ()

    def lend(self, worker: Worker) -> None:
        """Its task waits for others: they may have what it does not need meanwhile."""
        self._book(worker, -1)

    def reclaim(self, worker: Worker) -> None:
        """It goes on at once, whether there is room or not."""
        self._book(worker, 1)

    def sanity_check(self, workers: Collection[Worker]) -> None:
        for name, used in self._used.items():
            uses = sum(dict(worker.booked).get(name, 0.0) for worker in workers if worker.runs)
            assert abs(used - uses) < 1e-6, f"{name} in use is off"
            late = [worker for worker in workers if worker.late and worker.active]
            back = sum(dict(worker.uses).get(name, 0.0) for worker in late)
            assert used - back <= self._total[name] + 1e-6, f"{name} is overbooked"

    def _book(self, worker: Worker, times: int) -> None:
        for name, amount in worker.uses:
            if name in LENT and name in self._used:
                self._used[name] += times * amount

    def _pin(self, demand: Demand) -> tuple[str, ...]:
        """The least loaded GPUs for this task: whole ones, or a share of one."""
        wanted = dict(demand).get("gpu", 0.0)
        if not wanted or not self._gpu_load:
            return ()
        number = max(1, int(wanted))
        chosen = sorted(self._gpu_load, key=lambda gpu: self._gpu_load[gpu])[:number]
        for gpu in chosen:
            self._gpu_load[gpu] += wanted / number
        return tuple(chosen)
