"""What a client asks for while things break, and the check that all of it was answered, once and rightly."""

from __future__ import annotations

import concurrent.futures
import itertools
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from conftest import eventually

from zmqsched import Client

from .figures import Figure
from .ledger import Ledger, answer


class Load:
    """Numbered tasks of one kind, submitted through one client."""

    def __init__(self, client: Client, ledger: Ledger, work: Callable[..., Any], first: int = 0) -> None:
        self.client = client
        self.ledger = ledger
        self.futures: dict[int, concurrent.futures.Future[int]] = {}
        self.done_at: dict[int, float] = {}
        self._task = ledger.task(work)
        self._numbers = itertools.count(first)
        self._answers: Counter[int] = Counter()

    def submit(self, number: int, *args: Any) -> None:
        """So many tasks more, all with these arguments."""
        for task in itertools.islice(self._numbers, number):
            self.futures[task] = future = self.client.submit(self._task, task, *args)
            future.add_done_callback(lambda _, task=task: self._answered(task))

    def keep(self, number: int) -> None:
        """As many unfinished tasks as this, from now until the next call."""
        self.submit(max(0, number - self.unfinished))

    def keep_for(self, seconds: float, number: int) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            self.keep(number)
            time.sleep(0.01)

    @property
    def unfinished(self) -> int:
        return len(self.futures) - len(self.done_at)

    def finish(self, timeout_s: float) -> None:
        """Wait for all answers, and check them: none lost, none wrong, none twice, each from a task that ran to its end."""
        _, late = concurrent.futures.wait(self.futures.values(), timeout_s)
        assert not late, f"{len(late)} of {len(self.futures)} tasks have no answer after {timeout_s:g} s"
        assert {task: future.result() for task, future in self.futures.items()} == {
            task: answer(task) for task in self.futures
        }
        assert set(self._answers.values()) <= {1}, "a future was completed twice"
        assert self.client.usable
        self.ledger.assert_all_ran(self.futures)

    def assert_broker_agrees(self, cancelled: int = 0) -> None:
        """The count of a broker that was not restarted: each accepted task has had one answer."""

        def agrees() -> bool:
            counts = self.counts()
            return counts["accepted"] == counts["ok"] + cancelled

        eventually(agrees)  # what was ended by force is reported a moment later than its slot is free

    def counts(self) -> Counter[str]:
        return Counter(self.client.status().counts)

    def executions(self) -> Figure:
        return Figure("executions of each task", "", [self.ledger.ratio()])

    def _answered(self, task: int) -> None:
        self._answers[task] += 1
        self.done_at[task] = time.monotonic()
