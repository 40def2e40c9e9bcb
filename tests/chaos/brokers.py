"""The broker is killed and started anew, or frozen."""

from __future__ import annotations

import time
from random import Random
from typing import NamedTuple

from conftest import eventually

from .figures import Figure
from .fleet import Fleet, frozen
from .ledger import nap
from .load import Load


def killed_without_journal(times: int = 10, queued: int = 5_000) -> list[Figure]:
    """SIGKILL at random moments, and a new broker under the same name at once: clients submit again what has no answer."""
    return _killed(times, queued, journal=False)[1]


def killed_with_journal(times: int = 50, queued: int = 100_000) -> list[Figure]:
    """The same with a journal: the new broker knows all that the old one had accepted, and adopts what runs."""
    again, figures = _killed(times, queued, journal=True)
    assert again.run <= again.running, f"{again.run} tasks ran again, {again.running} ran at the kills"
    return figures


class Again(NamedTuple):
    """Tasks that ran again; executions that were under way at the kills."""

    run: int
    running: int


def _killed(times: int, queued: int, *, journal: bool) -> tuple[Again, list[Figure]]:
    random = Random(1)
    down, kills, restarts = [], [], []
    with Fleet((2, 2), journal=journal) as fleet:
        client = fleet.client()
        load = Load(client, fleet.ledger, nap(0.002))
        load.submit(queued)
        for _ in range(times):
            load.keep_for(random.uniform(0.2, 1.5), queued)
            kills.append(fleet.broker.kill())
            restarted = time.monotonic()
            fleet.start_broker()
            restarts.append((restarted, time.monotonic()))
            answered = len(load.done_at)
            eventually(lambda answered=answered: load.keep(queued) or len(load.done_at) > answered)
            down.append(time.monotonic() - restarted)
        load.finish(600)
        runs = fleet.ledger.runs()
        running = sum(run.began <= at and (run.ended is None or run.ended > at) for run in runs for at in kills)
        # What nodes had in hand is begun long before the new broker is ready: after that, it is what it has given them.
        starts = [min(run.began for run in runs if run.began > ready) - began for began, ready in restarts]
        again = Again(len(runs) - len(load.futures), running)
        return again, [
            Figure("from restart to the first start of a task", "s", starts, 3.0),
            Figure("from restart to the first answer", "s", down),
            Figure("tasks run again, for each kill", "", [again.run / times]),
            Figure("tasks running, at each kill", "", [again.running / times]),
            load.executions(),
        ]


def frozen_for_long(seconds: float = 30.0) -> list[Figure]:
    """A broker that sleeps knows on waking that it was not the nodes that were silent."""
    with Fleet(slots=(2, 2)) as fleet:
        client = fleet.client()
        load = Load(client, fleet.ledger, nap(0.02))
        load.keep_for(1.0, 200)
        before = {node.id for node in client.nodes()}
        with frozen([fleet.broker.pid]):
            time.sleep(seconds)
        woke = time.monotonic()
        answered = len(load.done_at)
        eventually(lambda: len(load.done_at) > answered)
        back = time.monotonic() - woke
        load.finish(60)
        load.assert_broker_agrees()
        counts = load.counts()
        assert counts["requeued: node lost"] == 0
        eventually(lambda: {node.id for node in client.nodes() if node.state == "alive"} == before)
        assert fleet.ledger.ratio() == 1.0
        return [
            Figure("healthy nodes' tasks queued again", "", [counts["requeued: node lost"]], 0),
            Figure("from SIGCONT to the next answer", "s", [back]),
            load.executions(),
        ]
