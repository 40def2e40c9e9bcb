"""What is told while a cluster's nodes start: who is waited for, and why."""

from __future__ import annotations

import time
from collections.abc import Sequence

from ..launch.base import Launched
from ..shell import Relay

# A node elsewhere that has not joined by then is worth a line.
LATE_S = 3.0
SHOWN = 4


class Progress:
    """Lines on standard error, each time that something is new. ``tell`` may be called from any thread, one at a time, and
    waits for no reader."""

    def __init__(self) -> None:
        self._relay = Relay()
        self._late_at = time.monotonic() + LATE_S
        self._told: dict[str, str] = {}
        self._joined: set[str] = set()

    def tell(self, nodes: Sequence[Launched]) -> None:
        news: dict[str, list[Launched]] = {}
        for one in nodes:
            words = self._words(one)
            if words and words != self._told.get(one.label):
                self._told[one.label] = words
                news.setdefault(words, []).append(one)
        for words, some in news.items():
            self._relay.write(f"zmqsched: {_names(some)} {words}\n")

    def _words(self, one: Launched) -> str:
        if one.state == "ended" or (one.label in self._joined and not one.node):  # the cluster says why
            return ""
        if one.node:
            self._joined.add(one.label)
            return "joined" if one.label in self._told else ""
        if one.state == "pending" and one.why:
            return f"pending: {one.why}"
        late = one.where and time.monotonic() >= self._late_at
        return "not ready yet" + (f": {one.why}" if one.why else "") if late else ""

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._relay.close()


def _names(nodes: Sequence[Launched]) -> str:
    names = [f"{one.label} ({one.where})" if one.where else one.label for one in nodes[:SHOWN]]
    more = f" and {len(nodes) - SHOWN} more" if len(nodes) > SHOWN else ""
    return f"{', '.join(names)}{more}:"
