"""Networks that are slow, narrow, or break again and again (through a proxy); hosts that cannot hear each other (by packet
filters between network namespaces)."""

from __future__ import annotations

import contextlib
import itertools
import time
import warnings
from collections.abc import Iterator, Sequence

import pytest
from conftest import eventually

from .figures import Figure
from .fleet import Fleet
from .hosts import HERE, Direction, Hosts
from .ledger import nap
from .load import Load
from .proxy import Proxy

BOTH_WAYS: tuple[Direction, ...] = ("in", "out", "both")


def bad_line(
    tasks: int = 500, rtt_s: float = 0.2, bits_per_s: float = 1e6, reset_every_s: float = 2.0, min_s: float = 20.0
) -> list[Figure]:
    """A client and a node behind a line that is slow and narrow, and whose connections are reset again and again.

    To make an encrypted connection takes 0.8 s at a round trip of 200 ms, so there a reset each second leaves no time.
    """
    with Fleet(listen="127.0.0.1") as fleet, Proxy(fleet.path) as proxy:
        node = fleet.start_node(4, file=proxy.file)
        client = fleet.client(proxy.file)
        fleet.nodes.append(node)
        load = Load(client, fleet.ledger, nap(0.005))
        proxy.delay_s, proxy.bits_per_s = rtt_s / 2, bits_per_s
        began = time.monotonic()
        load.submit(tasks)
        while load.unfinished or time.monotonic() < began + min_s:
            time.sleep(reset_every_s)
            proxy.reset()
            if time.monotonic() < began + min_s:
                load.keep(1)
            assert time.monotonic() < began + 120, f"{load.unfinished} tasks unfinished after two minutes"
        took = time.monotonic() - began
        proxy.delay_s, proxy.bits_per_s = 0.0, float("inf")
        load.finish(30)
        load.assert_broker_agrees()
        return [
            Figure("connections reset", "", [proxy.resets]),
            Figure("tasks done", "", [len(load.futures)]),
            Figure("it took", "s", [took]),
            load.executions(),
        ]


def partitioned_node(seconds: Sequence[float] = (1, 10, 30), directions: Sequence[Direction] = BOTH_WAYS) -> list[Figure]:
    """The host of one of two nodes is cut off from the broker's, one way and both ways, and heals."""
    back = []
    with Hosts() as hosts, Fleet((2,), listen=HERE, prefix=hosts.on("here")) as fleet:
        away = fleet.start_node(2, prefix=hosts.on("there"))
        with hosts.inside("here"):
            client = fleet.client()
        load = Load(client, fleet.ledger, nap(0.01))
        load.keep_for(2.0, 200)
        for direction, duration in itertools.product(directions, seconds):
            before = _share(fleet, away.workers())
            with hosts.cut("there", direction):
                load.keep_for(duration, 200)
            healed = time.monotonic()
            eventually(lambda before=before: load.keep(200) or _share(fleet, away.workers()) >= 0.9 * before)
            back.append(max(0.0, time.monotonic() - 1.0 - healed))
        load.finish(60)
        load.assert_broker_agrees()
        assert away.workers(), "its workers have survived"
        return [
            Figure("from healing to 90 % of its share of the work before", "s", back, 5.0),
            Figure("second results, dropped and counted", "", [load.counts()["zombie results"]]),
            load.executions(),
        ]


def _share(fleet: Fleet, workers: list[int]) -> float:
    """Of the tasks that have begun in the last second: how many of them in these workers."""
    last = [run.pid for run in fleet.ledger.runs() if run.began >= time.monotonic() - 1.0]
    return sum(pid in workers for pid in last) / max(1, len(last))


def partitioned_client(seconds: Sequence[float] = (1, 10, 30), directions: Sequence[Direction] = BOTH_WAYS) -> list[Figure]:
    """The client's host is cut off from the broker's while it submits and waits."""
    back = []
    with Hosts() as hosts, Fleet((4,), listen=HERE, prefix=hosts.on("here")) as fleet:
        with hosts.inside("there"):
            client = fleet.client()
        load = Load(client, fleet.ledger, nap(0.01))
        load.keep_for(1.0, 200)
        for direction, duration in itertools.product(directions, seconds):
            with _silence_is_told(), hosts.cut("there", direction):
                load.submit(200)
                with pytest.raises(TimeoutError):
                    load.futures[max(load.futures)].result(0.5)
                time.sleep(duration)
            healed = time.monotonic()
            last = load.futures[max(load.futures)]
            last.result(60)
            back.append(time.monotonic() - healed)
        load.finish(60)
        load.assert_broker_agrees()
        assert fleet.ledger.ratio() == 1.0, "what is submitted again is recognised"
        return [Figure("from healing to the answer of what was asked for last", "s", back, 5.0), load.executions()]


@contextlib.contextmanager
def _silence_is_told() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "zmqsched: the broker has been silent")
        yield
