"""The wall clock steps, as by NTP or an operator. Needs libfaketime (Debian: libfaketime)."""

from __future__ import annotations

import re
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from conftest import eventually

from .figures import Figure
from .fleet import Fleet
from .load import Load

HOUR_S = 3600


def why_not() -> str:
    """What is missing on this machine; "" if nothing is."""
    return "" if _libraries() else "needs libfaketime (Debian: libfaketime)"


def _libraries() -> list[Path]:
    return sorted(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"))


def _spin(seconds: float) -> Callable[[], None]:
    """Not a sleep: libfaketime makes one to an absolute time fail."""

    def spin() -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            pass

    return spin


def stepped(seconds: float = 10.0) -> list[Figure]:
    """The wall clock of the broker and of the nodes goes an hour ahead, then two hours back, while tasks run."""
    with tempfile.TemporaryDirectory() as directory:
        step = Path(directory, "step")
        step.write_text("+0")
        environment = {
            "LD_PRELOAD": str(_libraries()[0]), "FAKETIME_TIMESTAMP_FILE": str(step), "FAKETIME_NO_CACHE": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1", "DONT_FAKE_MONOTONIC": "1",
        }  # fmt: skip
        with Fleet((2, 2), environment=environment) as fleet:
            client = fleet.client()
            load = Load(client, fleet.ledger, _spin(0.002))
            load.keep_for(1.0, 100)
            before = {node.id for node in client.nodes()}
            for hours in (1, -1):
                step.write_text(f"{hours * HOUR_S:+d}")
                ahead = client.submit(time.time).result(60) - time.time()
                assert abs(ahead - hours * HOUR_S) < 60, "the step has not reached the workers"
                load.keep_for(seconds, 100)
            load.finish(60)
            load.assert_broker_agrees()
            counts = load.counts()
            eventually(lambda: {node.id for node in client.nodes() if node.state == "alive"} == before)
            false = counts["worker deaths"] + counts["requeued: node lost"]
            assert false == 0
            # A machine that is busy may keep the broker from running for some seconds, but not for an hour.
            absences = re.findall(r"did not run for ([\d.]+) s", (fleet.root / "broker.log").read_text())
            assert all(float(absence) < HOUR_S / 2 for absence in absences)
            assert fleet.ledger.ratio() == 1.0
            return [Figure("declared dead", "", [false], 0), load.executions()]
