"""``python -m benchmarks``: see the package."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import time
from dataclasses import asdict
from pathlib import Path
from statistics import median

import zmq

import zmqsched

from .measures import MEASURES, WORKERS, Row

COLUMNS = ("zmqsched", "ProcessPool", "echo")
LINE = "{:<42} {:>9} {:>9} {:>12} {:>6}   {:<12} {:<10} {}"


def main() -> None:
    options = _parser().parse_args()
    facts = _facts(options.repeat)
    print(
        f"zmqsched {facts['zmqsched']}, CPython {facts['python']}, pyzmq {facts['pyzmq']} (libzmq {facts['libzmq']}), "
        f"{facts['cpus']} CPUs, load {facts['load']:.1f}\n"
        f"{WORKERS} workers a side; ProcessPoolExecutor starts them by {facts['start_method']}, Python's default here\n"
        f"medians of {options.repeat} interleaved repeats (memory: 1); echo: bare ZeroMQ over the same four hops\n"
    )
    print(LINE.format("", "unit", *COLUMNS, "figure", "goal", "").rstrip())
    rows = []
    for name in options.only or MEASURES:
        for row in _measure(name, options.repeat):
            print(_line(row), flush=True)
            rows.append(row)
    if options.json:
        Path(options.json).write_text(json.dumps({**facts, "rows": [asdict(row) for row in rows]}, indent=1) + "\n")


def _measure(name: str, repeats: int) -> list[Row]:
    try:
        return MEASURES[name](repeats)
    except Exception as error:  # noqa: BLE001 - whatever breaks one measure, the others are still worth having
        return [Row(f"{name}: failed, {error!r}", "", {})]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Measure zmqsched on this machine.")
    parser.add_argument("--only", action="append", choices=MEASURES, help="this one; may be repeated")
    parser.add_argument("--repeat", type=_positive, default=5, help="how often (default: %(default)s)")
    parser.add_argument("--json", metavar="FILE", help="write all samples there as well")
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("at least 1")
    return number


def _facts(repeats: int) -> dict[str, object]:
    return {
        "when": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "zmqsched": zmqsched.__version__,
        "python": platform.python_version(),
        "pyzmq": zmq.__version__,
        "libzmq": zmq.zmq_version(),
        "kernel": platform.release(),
        "cpus": len(os.sched_getaffinity(0)),
        "load": os.getloadavg()[0],
        "start_method": multiprocessing.get_start_method(),
        "repeats": repeats,
    }


def _line(row: Row) -> str:
    cells = [_number(median(row.samples[side])) if side in row.samples else "" for side in COLUMNS]
    verdict = "" if row.met is None else "yes" if row.met else "no"
    return LINE.format(row.title, row.unit, *cells, row.figure, row.goal, verdict).rstrip()


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.2f}"


if __name__ == "__main__":
    main()
