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
from .ledger import Run, nap
from .load import Load

# What the killed client runs: tasks of the same ledger, of ten minutes each.
VICTIM = """
import sys, time
sys.path.insert(0, sys.argv[3])
from pathlib import Path
from chaos.ledger import Ledger, nap
from zmqsched import Client
client = Client(sys.argv[1])
task = Ledger(Path(sys.argv[2])).task(nap(600))
futures = [client.submit(task, -number) for number in range(1, 1001)]
time.sleep(600)
"""


def killed(lease_s: float = CLIENT_LEASE_S) -> list[Figure]:
    """A client is SIGKILLed with tasks running and queued: after its lease nothing of it starts, and what runs is ended.
    Another client's tasks are not touched."""
    slots = 4
    with Fleet((slots,), config={"CLIENT_LEASE_S": lease_s}) as fleet:
        load = Load(fleet.client(), fleet.ledger, nap(0.01))
        tests = Path(__file__).parent.parent
        words = [sys.executable, "-c", VICTIM, fleet.path, fleet.root / "ledger", tests]
        with subprocess.Popen(words, stdin=subprocess.DEVNULL) as victim:
            try:
                eventually(lambda: len(_of_victim(fleet)) == slots and load.counts()["accepted"] == 1_000)
            finally:
                os.kill(victim.pid, signal.SIGKILL)
        died = time.monotonic()
        load.submit(50)
        load.finish(lease_s + 30)  # they wait behind the victim's
        load.assert_broker_agrees(cancelled=1_000)
        assert len(_of_victim(fleet)) == slots, "none of its queued tasks started"
        assert fleet.ledger.ratio() == 1.0
        free = min(run.began for run in fleet.ledger.runs() if run.task >= 0)
        return [Figure("from its death until its workers serve others", "s", [free - died], lease_s + 2)]


def _of_victim(fleet: Fleet) -> list[Run]:
    return [run for run in fleet.ledger.runs() if run.task < 0]
