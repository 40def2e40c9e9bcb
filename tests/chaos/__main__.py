"""``make chaos``: run scenarios in their long form and print what was measured."""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
import traceback

import zmqsched

from .figures import Figure, merged
from .scenarios import SCENARIOS, Scenario

LINE = "{:<22} {:<6} {:<58} {:>9} {:>9} {:>9} {:<3} {}"


def main() -> int:
    options = _parser().parse_args()
    print(
        f"zmqsched {zmqsched.__version__}, CPython {platform.python_version()}, {len(os.sched_getaffinity(0))} CPUs, "
        f"load {os.getloadavg()[0]:.1f}; {options.repeat} run{'s' * (options.repeat > 1)} of each\n"
    )
    print(LINE.format("", "", "", "median", "p99", "worst", "", "goal").rstrip())
    failed = [name for name in options.scenarios or SCENARIOS if not _measure(name, SCENARIOS[name], options)]
    if failed:
        print(f"\nbroken promises: {', '.join(failed)}")
    return bool(failed)


def _measure(name: str, scenario: Scenario, options: argparse.Namespace) -> bool:
    if scenario.why_not is not None and (why_not := scenario.why_not()):
        print(LINE.format(name, scenario.promise, f"skipped: {why_not}", *[""] * 5).rstrip())
        return True
    arguments = scenario.short if options.short else scenario.long
    began = time.monotonic()
    try:
        figures = merged([scenario.run(**arguments) for _ in range(options.repeat)])
    except Exception:  # noqa: BLE001 - whatever breaks one scenario, the others are still worth running
        traceback.print_exc()
        print(LINE.format(name, scenario.promise, "FAILED, see above", *[""] * 5).rstrip(), flush=True)
        return False
    for figure in figures:
        print(_line(name, scenario.promise, figure))
    print(f"{'':<22} took {time.monotonic() - began:.0f} s, load then {os.getloadavg()[0]:.1f}", flush=True)
    return True


def _line(name: str, promise: str, figure: Figure) -> str:
    unit = f" ({figure.unit})" if figure.unit else ""
    numbers = [_number(number) for number in (figure.median, figure.p99, figure.worst)] if figure.samples else ["-"] * 3
    goal = "" if figure.goal is None else f"{figure.of} <= {figure.goal:g}: {'yes' if figure.met else 'NO'}"
    return LINE.format(name, promise, figure.title + unit, *numbers, "", goal).rstrip()


def _number(value: float) -> str:
    return f"{value:,.0f}" if value == int(value) or value >= 100 else f"{value:.3f}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="make chaos", description="Break things while tasks run, and measure.")
    parser.add_argument("scenarios", nargs="*", choices=[[], *SCENARIOS], metavar="SCENARIO", help=", ".join(SCENARIOS))
    parser.add_argument("--repeat", type=int, default=1, help="how often each (default: %(default)s)")
    parser.add_argument("--short", action="store_true", help="the form that the tests run")
    return parser


if __name__ == "__main__":
    sys.exit(main())
