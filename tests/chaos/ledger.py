"""The ledger: a file to which every task appends a line when it begins and another when it ends.

Lines are written by one ``write`` to a file opened with O_APPEND, so those of many processes never mix; a process that is
killed leaves whole lines or none. All times are of the host's monotonic clock, which its processes share.
"""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass
class Run:
    """One execution of a task. ``ended`` is None while it runs, and for good if it was killed."""

    task: int
    pid: int
    began: float
    ended: float | None = None


class Ledger:
    def __init__(self, path: Path) -> None:
        self._path = path
        self._path.touch()
        self._lock = threading.Lock()
        self._read = 0
        self._runs: list[Run] = []
        self._last: dict[int, Run] = {}  # by pid

    def task(self, work: Callable[..., Any]) -> Callable[..., int]:
        """``task(number, *args)`` notes that it begins, calls ``work(*args)``, notes that it has ended, returns
        :func:`answer` of its number."""
        return _noted(str(self._path), work)

    def runs(self) -> list[Run]:
        """All executions so far, in the order they began."""
        with self._lock, self._path.open("rb") as file:
            file.seek(self._read)
            data = file.read()
            for line in data.splitlines():
                self._take(*line.split())
            self._read += len(data)
            return list(self._runs)

    def last_of(self, pid: int) -> Run | None:
        """The latest execution in this process."""
        self.runs()
        return self._last.get(pid)

    def began(self) -> int:
        return len(self.runs())

    def ratio(self) -> float:
        """Executions for each task that was executed; 1.0 is none twice."""
        runs = self.runs()
        return len(runs) / max(1, len({run.task for run in runs}))

    def completed(self) -> Counter[int]:
        """How often each task ran to its end."""
        return Counter(run.task for run in self.runs() if run.ended is not None)

    def assert_all_ran(self, tasks: Iterable[int]) -> None:
        missing = set(tasks) - self.completed().keys()
        assert not missing, f"{len(missing)} tasks never ran to their end, for instance {sorted(missing)[:5]}"

    def _take(self, what: bytes, task: bytes, pid: bytes, at: bytes) -> None:
        if what == b"began":
            run = Run(int(task), int(pid), float(at))
            self._runs.append(run)
            self._last[run.pid] = run
        else:
            run = self._last[int(pid)]
            assert run.task == int(task)
            run.ended = float(at)


def answer(number: int) -> int:
    """What a task of this number returns."""
    return 3 * number + 1


def nap(seconds: float) -> Callable[[], None]:
    """Work that only takes time. It travels by value, as all work here: workers cannot import this package."""

    def napping() -> None:
        time.sleep(seconds)

    return napping


def _noted(path: str, work: Callable[..., Any]) -> Callable[..., int]:
    def noted(number: int, *args: Any) -> int:
        def note(what: str) -> None:
            os.write(file, f"{what} {number} {os.getpid()} {time.monotonic()}\n".encode())

        file = os.open(path, os.O_WRONLY | os.O_APPEND)
        try:
            note("began")
            work(*args)
            note("ended")
        finally:
            os.close(file)
        return 3 * number + 1

    return noted
