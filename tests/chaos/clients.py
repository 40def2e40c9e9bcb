"""Programs that submit tasks are killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from conftest import eventually

from zmqsched.config import CLIENT_LEASE_S

from .figures import Figure
from .fleet import Fleet
from .ledger import nap
from .load import Load

# What the killed client runs: tasks of the same ledger, all longer than the moment at which it is killed.
VICTIM = """
import sys, time
sys.path.insert(0, sys.argv[3])
from pathlib import Path
from chaos.ledger import Ledger, nap
from zmqsched import Client
client = Client(sys.argv[1])
task = Ledger(Path(sys.argv[2])).task(nap(float(sys.argv[4])))
futures = [client.submit(task, -number) for number in range(1, 1001)]
time.sleep(600)
"""


def killed(lease_s: float = CLIENT_LEASE_S, running_s: float = 2.0) -> list[Figure]:
    """A client is SIGKILLed with tasks running and queued: what runs ends, and after its lease nothing of it starts. Another
    client's tasks are not touched."""
    with Fleet((4,), config={"CLIENT_LEASE_S": lease_s}) as fleet:
        load = Load(fleet.client(), fleet.ledger, nap(0.01))
        tests = Path(__file__).parent.parent
        words = [sys.executable, "-c", VICTIM, fleet.path, fleet.root / "ledger", tests, str(running_s)]
        with subprocess.Popen(words, stdin=subprocess.DEVNULL) as victim:
            try:
                eventually(lambda: _running(fleet) and load.client.status().tasks["queued"] > 900, 30)
            finally:
                os.kill(victim.pid, signal.SIGKILL)
        died = time.monotonic()
        load.submit(50)
        load.finish(lease_s + 30)  # they wait behind the victim's
        eventually(lambda: not _running(fleet), 20)
        runs = [run for run in fleet.ledger.runs() if run.task < 0]
        assert all(run.ended is not None for run in runs), "what runs is not interrupted"
        assert len(runs) < 1000
        last = max(run.began for run in runs)
        return [
            Figure("from its death to the last start of its tasks", "s", [max(0.0, last - died)], lease_s + 2),
            Figure("from its death until nothing of it runs", "s", [max(run.ended or 0.0 for run in runs) - died]),
        ]


def _running(fleet: Fleet) -> bool:
    """Whether a task of the victim is."""
    return any(run.task < 0 and run.ended is None for run in fleet.ledger.runs())
