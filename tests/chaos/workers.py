"""Workers are killed, kill themselves, or hold the GIL."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import time
from collections import Counter
from random import Random
from typing import NamedTuple

import pytest
from conftest import alive, eventually

from zmqsched import errors

from .figures import Figure
from .fleet import Fleet, stopped
from .ledger import Ledger, nap
from .load import Load


class Kill(NamedTuple):
    task: int
    pid: int
    at: float


def killed_often(tasks: int = 10_000, every_s: float = 0.2, seconds: float = 0.005) -> list[Figure]:
    """A worker out of eight is SIGKILLed again and again. The killer spares tasks that it has hit twice: a third death would
    rightly fail them."""
    kills: list[Kill] = []
    random = Random(1)
    with Fleet(slots=(4, 4)) as fleet:
        load = Load(fleet.client(), fleet.ledger, nap(seconds))
        began = time.monotonic()
        load.submit(tasks)
        next_at = began + every_s
        while load.unfinished:
            time.sleep(max(0.0, min(next_at - time.monotonic(), 0.02)))
            if time.monotonic() >= next_at:
                next_at += every_s
                kills += _kill_one(fleet, random, Counter(kill.task for kill in kills))
        took = time.monotonic() - began
        load.finish(60)
        load.assert_broker_agrees()
        deaths = load.counts()["worker deaths"]
        assert deaths == len(kills), f"{deaths} deaths were told of, {len(kills)} workers killed"
        assert kills, "nobody was killed: the test shows nothing"
        return [
            Figure("workers killed", "", [len(kills)]),
            Figure("from kill to the next start of that task", "s", _restarts(fleet.ledger, kills), 0.5, "p99"),
            load.executions(),
            Figure("tasks a second", "", [tasks / took]),
        ]


def _kill_one(fleet: Fleet, random: Random, hits: Counter[int]) -> list[Kill]:
    """A worker that is in the middle of a task. It is stopped first, so that what it is doing is certain."""
    pids = fleet.workers()
    random.shuffle(pids)
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGSTOP)
            eventually(lambda pid=pid: stopped(pid) or not alive(pid))
            run = fleet.ledger.last_of(pid)
            if stopped(pid) and run is not None and run.ended is None and hits[run.task] < 2:
                at = time.monotonic()
                os.kill(pid, signal.SIGKILL)
                return [Kill(run.task, pid, at)]
            os.kill(pid, signal.SIGCONT)
    return []


def _restarts(ledger: Ledger, kills: list[Kill]) -> list[float]:
    runs = ledger.runs()
    return [min(run.began for run in runs if run.task == kill.task and run.began > kill.at) - kill.at for kill in kills]


def poison(innocents: int = 1_000) -> list[Figure]:
    """One task that kills its worker, in the middle of many that do not."""

    def die(guilty: bool = False) -> None:
        if guilty:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.002)

    with Fleet(slots=(2, 2)) as fleet:
        client = fleet.client()
        load = Load(client, fleet.ledger, die)
        load.submit(innocents // 2)
        guilty = client.options(name="poison").submit(fleet.ledger.task(die), -1, True)
        load.submit(innocents - innocents // 2)
        with pytest.raises(errors.WorkerDied, match="poison failed: 3 workers died running it"):
            guilty.result(60)
        load.finish(60)
        counts = load.counts()
        deaths = [run.pid for run in fleet.ledger.runs() if run.task == -1]
        assert len(set(deaths)) == len(deaths) == 3
        assert counts["worker deaths"] == 3
        assert counts["ok"] == innocents
        return [
            Figure("workers that the task killed", "", [len(deaths)], 3),
            Figure("other tasks failed", "", [innocents - counts["ok"]], 0),
            load.executions(),
        ]


def holding_the_gil(seconds: float = 30.0) -> list[Figure]:
    """All workers are in C code that never lets go of the GIL: they are busy, not dead."""

    def hold() -> None:
        ctypes.PyDLL(None).usleep(int(seconds * 1e6))

    with Fleet(slots=(1, 1)) as fleet:
        client = fleet.client()
        load = Load(client, fleet.ledger, hold)
        load.submit(2)
        states = set()
        while load.unfinished:
            states |= {node.state for node in client.nodes()}
            time.sleep(0.1)
        load.finish(60)
        counts = load.counts()
        assert "lost" not in states
        assert fleet.ledger.ratio() == 1.0
        false = counts["worker deaths"] + counts["requeued: node lost"]
        assert false == 0
        return [Figure("declared dead", "", [false], 0), load.executions()]
