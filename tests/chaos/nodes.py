"""Whole nodes are killed, frozen, or told to leave."""

from __future__ import annotations

import signal
import time

from conftest import eventually

from zmqsched import Client
from zmqsched.config import BEAT_INTERVAL_S, PING_GRACE_S, SUSPECT_AFTER_BEATS

from .figures import Figure
from .fleet import Fleet, frozen
from .ledger import nap
from .load import Load

LOST_AFTER_S = BEAT_INTERVAL_S * SUSPECT_AFTER_BEATS + PING_GRACE_S


def killed(held: int = 1_000) -> list[Figure]:
    """A node that holds many tasks dies with all its processes, as when its host loses power. It is frozen just before, so
    that it holds all of them for certain."""
    with Fleet(slots=(8,)) as fleet:
        client = fleet.client()
        node = fleet.nodes[0]
        load = Load(client, fleet.ledger, nap(0))
        _learn_that_tasks_are_short(client, held)
        with frozen(node.family()):
            load.submit(held)
            eventually(lambda: client.nodes()[0].assigned == held)
            died = node.kill_family()
        fleet.start_node(2)
        lost = eventually(lambda: (client.nodes()[0].state == "lost" or "lost" in _states(client)) and time.monotonic())
        load.finish(60)
        load.assert_broker_agrees()
        starts = [run.began for run in fleet.ledger.runs()]
        assert load.counts()["requeued: node lost"] == held
        return [
            Figure("tasks it held", "", [held]),
            Figure("from death to the verdict", "s", [lost - died], LOST_AFTER_S),
            Figure("from death to the start of the first of its tasks", "s", [min(starts) - died], LOST_AFTER_S + 0.2),
            Figure("from death to the start of the last of them", "s", [max(starts) - died]),
            load.executions(),
        ]


def _learn_that_tasks_are_short(client: Client, held: int) -> None:
    """Only then does a node take more of them than it has workers."""

    def ready() -> bool:
        list(client.map(abs, range(500)))
        return client._report().nodes[0].credit >= held

    eventually(ready)


def _states(client: Client) -> list[str]:
    return [node.state for node in client.nodes()]


def frozen_and_back(times: int = 5, seconds: float = 10.0, *, whole: bool = False) -> list[Figure]:
    """A node is frozen for longer than the broker waits, then goes on. ``whole``: with its workers, as a suspended host."""
    back, zombie_starts = [], 0
    with Fleet(slots=(2, 2)) as fleet:
        client = fleet.client()
        load = Load(client, fleet.ledger, nap(0.01))
        load.keep_for(1.0, 100)
        sleeper = fleet.nodes[0]
        workers = sleeper.workers()
        for _ in range(times):
            with frozen(sleeper.family() if whole else [sleeper.pid]) as stopped_at:
                load.keep_for(seconds, 100)
                eventually(lambda: load.keep(100) or "lost" in _states(client))
            woke = time.monotonic()
            answered = eventually(lambda woke=woke: load.keep(100) or _first_answered(fleet, load, workers, woke))
            back.append(answered - woke)
            load.keep_for(1.0, 100)
            zombie_starts += _zombie_starts(fleet, workers, stopped_at + LOST_AFTER_S)
        load.finish(60)
        load.assert_broker_agrees()
        assert sleeper.workers() == workers, "its workers have survived"
        eventually(lambda: all(run.ended for run in fleet.ledger.runs()))
        twice = sum(fleet.ledger.completed().values()) - len(load.futures)
        eventually(lambda: load.counts()["zombie results"] >= twice)
        counts = load.counts()
        assert counts["zombie results"] == twice, "each second result of a task is counted, and dropped"
        return [
            Figure("from SIGCONT to the first answer of a new task from there", "s", back, 2.0),
            Figure("tasks completed twice", "", [counts["ok"] - len(load.futures)], 0),
            Figure("second results, dropped and counted", "", [counts["zombie results"]]),
            Figure("started by the sleeper when they were another's already", "", [zombie_starts], 0),
            load.executions(),
        ]


def _first_answered(fleet: Fleet, load: Load, workers: list[int], woke: float) -> float | None:
    """When the first task that only the woken node has run was answered; None before."""
    here = [run.task for run in fleet.ledger.runs() if run.pid in workers and run.began > woke]
    elsewhere = {run.task for run in fleet.ledger.runs() if run.pid not in workers}
    return min((load.done_at[task] for task in here if task not in elsewhere and task in load.done_at), default=None)


def _zombie_starts(fleet: Fleet, workers: list[int], since: float) -> int:
    """How many tasks the sleeper began that had already begun elsewhere."""
    runs = fleet.ledger.runs()
    first = {run.task: run for run in reversed(runs)}
    return sum(run.pid in workers and run.began > since and first[run.task] is not run for run in runs)


def drained(tasks: int = 2_000) -> list[Figure]:
    """SIGTERM to a node in the middle of work: it finishes or hands back what it has, and nobody is blamed."""
    with Fleet(slots=(2, 2)) as fleet:
        client = fleet.client()
        load = Load(client, fleet.ledger, nap(0.005))
        load.submit(tasks)
        eventually(lambda: fleet.ledger.began() > 100)
        leaver = fleet.nodes[0]
        at = time.monotonic()
        leaver.signal(signal.SIGTERM)
        eventually(lambda: load.keep(tasks) or leaver.process.poll() is not None)  # it leaves while there is work
        left = time.monotonic() - at
        assert leaver.process.returncode == 0
        load.finish(60)
        load.assert_broker_agrees()
        counts = load.counts()
        assert fleet.ledger.ratio() == 1.0
        assert counts["worker deaths"] + counts["requeued: node lost"] + counts["requeued: node gone"] == 0
        return [Figure("from SIGTERM to its end", "s", [left]), load.executions()]
