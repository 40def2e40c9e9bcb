"""What is measured. Each function takes the number of repeats and returns what it found, one list of samples a side.

Repeats are interleaved (ours, theirs, ours, theirs), so that a neighbour on the machine disturbs both sides alike;
pools are made and warmed before, except where starting is what is measured.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import gc
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import psutil

from zmqsched import Client, LocalCluster

from . import echo, launch, maps, skeleton, stops, work

WORKERS = 2
TASKS = 10_000
TRIPS = 2_000
ITEMS = 1_000_000
SHORT_ITEMS = 100_000
CHUNK = 2_000
NAPS, NAP_S = 200, 0.010
QUEUED = 300_000
JOINS = 1_000

Executor = concurrent.futures.Executor


@dataclass(frozen=True)
class Row:
    """A line of the report. ``samples``: by side, in ``unit``, ours first. ``figure``: what the goal is about, in words
    ("2.1 x"); ``met`` is None where there is no goal."""

    title: str
    unit: str
    samples: dict[str, list[float]]
    figure: str = ""
    goal: str = ""
    met: bool | None = None


def submit_gather(repeats: int) -> list[Row]:
    with _pools() as (ours, theirs):
        samples = _interleaved(
            repeats, zmqsched=lambda: _gather_rate(ours, work.noop), ProcessPool=lambda: _gather_rate(theirs, work.noop)
        )
    ratio = _ratio(samples, "zmqsched", "ProcessPool")
    return [Row(f"submit + gather of {TASKS:,} no-ops", "tasks/s", samples, f"{ratio:.2f} x", ">= 3 x", ratio >= 3)]


def submit_closure(repeats: int) -> list[Row]:
    with _client() as ours:
        samples = _interleaved(repeats, zmqsched=lambda: _gather_rate(ours, work.closure()))
    return [Row(f"the same, a closure ({TASKS:,} times)", "tasks/s", samples)]


def submit_journal(repeats: int) -> list[Row]:
    """Both sides are ours: each task is on disk before it is acknowledged, or none is."""
    with tempfile.TemporaryDirectory(prefix="zs-bench-") as directory, _client(Path(directory, "j")) as on, _client() as off:
        samples = _interleaved(
            repeats, zmqsched=lambda: _gather_rate(on, work.noop), without=lambda: _gather_rate(off, work.noop)
        )
    ratio = _ratio(samples, "zmqsched", "without")
    title = f"the same, with a journal ({TASKS:,} times)"
    return [Row(title, "tasks/s", samples, f"{ratio:.2f} x without", ">= 0.5 x", ratio >= 0.5)]


def round_trip(repeats: int) -> list[Row]:
    with _pools() as (ours, theirs):
        samples = _interleaved(
            repeats,
            zmqsched=lambda: 1000 * _round_trip_s(ours),
            ProcessPool=lambda: 1000 * _round_trip_s(theirs),
            echo=lambda: 1000 * echo.round_trip_s(TRIPS),
            skeleton=lambda: 1000 * skeleton.round_trip_s(TRIPS),
        )
    bare = {"skeleton": samples.pop("skeleton"), "echo": samples["echo"]}
    ratio = _ratio(samples, "zmqsched", "echo")
    return [
        Row("round trip of one no-op, p50", "ms", samples, f"{ratio:.2f} x echo", "<= 2.5 x", ratio <= 2.5),
        Row("the same messages, nobody decides", "ms", bare, f"{_ratio(bare, 'skeleton', 'echo'):.2f} x echo"),
    ]


def big_map(repeats: int) -> list[Row]:
    with _pools() as (ours, theirs):
        samples = _interleaved(repeats, zmqsched=lambda: _map_rate(ours), ProcessPool=lambda: _map_rate(theirs))
    ratio = _ratio(samples, "zmqsched", "ProcessPool")
    title = f"map of {ITEMS:,} items, chunks of {CHUNK:,}"
    return [Row(title, "M items/s", samples, f"{ratio:.2f} x", ">= 0.9 x", ratio >= 0.9)]


def auto_map(repeats: int) -> list[Row]:
    """Nobody says how many items make a task."""
    with _pools() as (ours, theirs):
        samples = _interleaved(repeats, zmqsched=lambda: _short_map_rate(ours), ProcessPool=lambda: _short_map_rate(theirs))
    ratio = _ratio(samples, "zmqsched", "ProcessPool")
    title = f"map of {SHORT_ITEMS:,} no-ops, no chunksize"
    return [Row(title, "items/s", samples, f"{ratio:.0f} x", ">= 10 x", ratio >= 10)]


def uneven_map(repeats: int) -> list[Row]:
    naps = maps.uneven_naps(NAPS)
    with _client() as ours:
        shares = [maps.of_ideal(ours, naps, WORKERS) for _ in range(repeats)]
    share = median(shares)
    title = f"map of {NAPS} uneven items, 20 ms in the mean"
    return [Row(title, "of ideal", {"zmqsched": shares}, f"{share:.2f} x", "<= 1.2 x", share <= 1.2)]


def generated_map(_repeats: int) -> list[Row]:
    """Once each: memory hardly scatters."""
    rows = []
    for read in (True, False):
        with LocalCluster(WORKERS) as cluster, Client(cluster) as client:
            grown = maps.generated_mb(cluster, client, read=read)
        rows.append(_own(f"map of {maps.GENERATED:,} generated, {'' if read else 'not '}read", "MB", grown, 50))
    return rows


def naps(repeats: int) -> list[Row]:
    with _pools() as (ours, theirs):
        samples = _interleaved(repeats, zmqsched=lambda: _nap_share(ours), ProcessPool=lambda: _nap_share(theirs))
    share = median(samples["zmqsched"])
    title = f"{NAPS} tasks of 10 ms on {WORKERS} workers"
    return [Row(title, "of ideal", samples, f"{share:.2f}", ">= 0.95", share >= 0.95)]


def first_result(repeats: int) -> list[Row]:
    samples = _interleaved(repeats, zmqsched=lambda: _start_s(_OURS), ProcessPool=lambda: _start_s(_THEIRS))
    seconds = median(samples["zmqsched"])
    return [Row("new interpreter to first result", "s", samples, f"{seconds:.2f} s", "<= 1 s", seconds <= 1)]


def broker_memory(_repeats: int) -> list[Row]:
    """Measured once: memory hardly scatters, and a second round would begin with what the first has left."""
    with (
        tempfile.TemporaryDirectory(prefix="zs-bench-") as directory,
        LocalCluster(WORKERS) as cluster,
        Client(cluster) as client,
    ):
        broker = psutil.Process(cluster.broker_pid)
        gate = Path(directory) / "gate"
        _gather_rate(client, work.noop)  # what the broker takes in use, whatever is queued
        # Both workers are kept busy, so that everything behind stays with the broker.
        blockers = [client.submit(work.wait_for, str(gate)) for _ in range(WORKERS)]
        time.sleep(0.5)
        before = broker.memory_info().rss
        futures = [client.submit(work.identity, number) for number in range(QUEUED)]
        queued = _settled(lambda: client.status().tasks["queued"])
        full = broker.memory_info().rss
        gate.touch()
        concurrent.futures.wait([*blockers, *futures])
        after = _settled(lambda: broker.memory_info().rss)
    return [
        _own(f"broker per queued task ({queued:,})", "KB", (full - before) / queued / 1024, 1.5),
        _own("broker, more than before, all done", "MB", (after - before) / 2**20, 20),
    ]


def cancel(repeats: int) -> list[Row]:
    with _client() as ours:
        seconds = [stops.slot_free_s(ours, WORKERS) for _ in range(repeats)]
    return [Row("cancel of a running task: its slot is free", "s", {"zmqsched": seconds}, *_at_most(max(seconds), 1))]


def stop_button(repeats: int) -> list[Row]:
    with _client() as ours:
        pressed = [stops.stop_button_s(ours) for _ in range(repeats)]
    back, idle = ([times[which] for times in pressed] for which in (0, 1))
    return [
        Row("stop button: the prompt is back", "s", {"zmqsched": back}, *_at_most(max(back), 2)),
        Row("stop button: remote CPUs are idle", "s", {"zmqsched": idle}, *_at_most(max(idle), 2)),
    ]


def _at_most(longest: float, limit: float) -> tuple[str, str, bool]:
    return f"{longest:.2f} s at most", f"< {limit:g} s", longest < limit


def imports(repeats: int) -> list[Row]:
    samples = _interleaved(
        repeats, zmqsched=lambda: 1000 * stops.import_s("zmqsched"), zmq=lambda: 1000 * stops.import_s("zmq"),
        client=lambda: 1000 * stops.import_s("zmqsched.client"),
    )  # fmt: skip
    ratio, client = _ratio(samples, "zmqsched", "zmq"), _ratio(samples, "client", "zmq")
    title = "import zmqsched"
    return [Row(title, "ms", samples, f"{ratio:.2f} x zmq; Client {client:.1f} x", "<= 2.5 x", ratio <= 2.5)]


def _own(title: str, unit: str, value: float, limit: float) -> Row:
    return Row(title, unit, {"zmqsched": [value]}, f"{value:.2f} {unit}", f"<= {limit:g} {unit}", value <= limit)


def up_and_down(repeats: int) -> list[Row]:
    times = [launch.up_and_down_s(WORKERS) for _ in range(repeats)]
    return [
        _own("zmqsched up --detach, to ready", "s", median(up for up, _ in times), 1),
        _own("zmqsched down, nothing left", "s", median(down for _, down in times), 3),
    ]


def joins(_repeats: int) -> list[Row]:
    return [_own(f"{JOINS:,} nodes join at once, with CURVE", "s", launch.join_s(JOINS), 10)]


def submit_curve(repeats: int) -> list[Row]:
    """The same cluster; one client is on its host, the other comes as from elsewhere."""
    with (
        LocalCluster(WORKERS, listen="127.0.0.1") as cluster,
        Client(cluster) as near,
        Client(launch.by_tcp(cluster.file)) as far,
    ):
        _gather_rate(near, work.noop)
        rates = _interleaved(
            repeats, zmqsched=lambda: _gather_rate(far, work.noop), ipc=lambda: _gather_rate(near, work.noop)
        )
        bulks = _interleaved(repeats, zmqsched=lambda: launch.bulk_mbs(near), curve=lambda: launch.bulk_mbs(far))
    ratio, times = _ratio(rates, "zmqsched", "ipc"), _ratio(bulks, "zmqsched", "curve")
    return [
        Row(f"submit + gather of {TASKS:,} over CURVE", "tasks/s", rates, f"{ratio:.2f} x ipc", ">= 0.5 x", ratio >= 0.5),
        Row("16 MiB there and back, on the broker's host", "MB/s", bulks, f"{times:.1f} x CURVE", "> 1 x", times > 1),
    ]


MEASURES: dict[str, Callable[[int], list[Row]]] = {
    "submit": submit_gather,
    "closure": submit_closure,
    "journal": submit_journal,
    "roundtrip": round_trip,
    "map": big_map,
    "automap": auto_map,
    "uneven": uneven_map,
    "generator": generated_map,
    "naps": naps,
    "start": first_result,
    "memory": broker_memory,
    "cancel": cancel,
    "stop": stop_button,
    "import": imports,
    "up": up_and_down,
    "joins": joins,
    "curve": submit_curve,
}


# --- both sides -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _client(journal: Path | None = None) -> Iterator[Client]:
    with LocalCluster(WORKERS, journal=journal) as cluster, Client(cluster) as client:
        list(client.map(work.nap, [0.01] * WORKERS * 4))
        yield client


@contextlib.contextmanager
def _pools() -> Iterator[tuple[Client, Executor]]:
    # The pool first: it forks, as a user's would, a process without the client's threads.
    with concurrent.futures.ProcessPoolExecutor(WORKERS) as theirs:
        list(theirs.map(work.nap, [0.01] * WORKERS * 4))
        with _client() as ours:
            yield ours, theirs


def _interleaved(repeats: int, **sides: Callable[[], float]) -> dict[str, list[float]]:
    samples: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(repeats):
        for side, measure in sides.items():
            gc.collect()  # neither side pays for the other's rubbish
            samples[side].append(measure())
    return samples


def _ratio(samples: dict[str, list[float]], ours: str, other: str) -> float:
    """The median of the ratios within each repeat: what is slow for a while is slow for both."""
    return median(a / b for a, b in zip(samples[ours], samples[other], strict=True))


# --- single measurements ----------------------------------------------------------------------------------------------


def _gather_rate(pool: Executor, fn: Callable[[], object]) -> float:
    began = time.perf_counter()
    futures = [pool.submit(fn) for _ in range(TASKS)]
    for future in futures:
        future.result()
    return TASKS / (time.perf_counter() - began)


def _round_trip_s(pool: Executor) -> float:
    times = []
    for _ in range(TRIPS):
        began = time.perf_counter()
        pool.submit(work.noop).result()
        times.append(time.perf_counter() - began)
    return median(times)


def _map_rate(pool: Executor) -> float:
    began = time.perf_counter()
    count = sum(1 for _ in pool.map(work.identity, range(ITEMS), chunksize=CHUNK))
    seconds = time.perf_counter() - began
    if count != ITEMS:
        raise RuntimeError(f"{ITEMS - count} items are missing")
    return ITEMS / seconds / 1e6


def _short_map_rate(pool: Executor) -> float:
    began = time.perf_counter()
    count = sum(1 for _ in pool.map(work.identity, range(SHORT_ITEMS)))
    if count != SHORT_ITEMS:
        raise RuntimeError(f"{SHORT_ITEMS - count} items are missing")
    return SHORT_ITEMS / (time.perf_counter() - began)


def _nap_share(pool: Executor) -> float:
    began = time.perf_counter()
    for future in [pool.submit(work.nap, NAP_S) for _ in range(NAPS)]:
        future.result()
    return NAPS * NAP_S / WORKERS / (time.perf_counter() - began)


_OURS = f"""
from zmqsched import Client, LocalCluster
from benchmarks import work
with LocalCluster({WORKERS}) as cluster, Client(cluster) as client:
    client.submit(work.noop).result()
    print(flush=True)
"""
_THEIRS = f"""
from concurrent.futures import ProcessPoolExecutor
from benchmarks import work
with ProcessPoolExecutor({WORKERS}) as pool:
    pool.submit(work.noop).result()
    print(flush=True)
"""


def _start_s(program: str) -> float:
    """From starting an interpreter until it prints that it has its first result; the end is not counted."""
    began = time.perf_counter()
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        seconds = time.perf_counter() - began
    if not line:
        raise RuntimeError("the program ended without a result; see its words above")
    return seconds


def _settled(measure: Callable[[], int]) -> int:
    """The number, once it has stayed the same for half a second."""
    value = measure()
    while True:
        time.sleep(0.5)
        if (now := measure()) == value:
            return value
        value = now
