"""Maps: single measurements for measures.py."""

from __future__ import annotations

import random
import time
from collections import deque

import psutil

from zmqsched import Client, LocalCluster

from . import work

GENERATED = 10_000_000
WATCH_S = 0.1


def uneven_naps(count: int) -> list[float]:
    """Seconds, log-normal, 20 ms in the mean; the same ones each time."""
    draw = random.Random(1)
    return [draw.lognormvariate(-0.5, 1.0) * 0.02 for _ in range(count)]


def of_ideal(client: Client, naps: list[float], workers: int) -> float:
    """How many times as long as workers that never wait."""
    began = time.perf_counter()
    deque(client.map(work.nap, naps), maxlen=0)
    return (time.perf_counter() - began) / max(sum(naps) / workers, *naps)


def generated_mb(cluster: LocalCluster, client: Client, *, read: bool) -> float:
    """What client and broker need more at any time while ten million items of a generator are mapped."""
    both = [psutil.Process(), psutil.Process(cluster.broker_pid)]
    deque(client.map(abs, iter(range(200_000))), maxlen=0)  # what is taken in use for any map
    before = sum(process.memory_info().rss for process in both)
    most, results = 0, client.map(abs, iter(range(GENERATED)))
    while results.done < GENERATED:
        most = max(most, sum(process.memory_info().rss for process in both) - before)
        until = time.perf_counter() + WATCH_S
        if not read:
            time.sleep(WATCH_S)
        while read and time.perf_counter() < until and next(results, None) is not None:
            pass
    deque(results, maxlen=0)
    return most / 2**20
