"""All scenarios by name, each with the arguments of its short form; the long form is the function's defaults."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from . import brokers, nodes, workers
from .figures import Figure


@dataclass(frozen=True)
class Scenario:
    """``promise``: the numbers it has in the table of promises. ``system``: needs root and network namespaces."""

    promise: str
    run: Callable[..., list[Figure]]
    short: Mapping[str, Any] = field(default_factory=dict)
    long: Mapping[str, Any] = field(default_factory=dict)
    system: bool = False

    @property
    def title(self) -> str:
        return (self.run.__doc__ or "").partition("\n")[0]


SCENARIOS: dict[str, Scenario] = {
    "worker-killed": Scenario("P1", workers.killed_often, {"tasks": 800, "every_s": 0.1}),
    "node-killed": Scenario("P2", nodes.killed),
    "node-frozen": Scenario("P3", nodes.frozen_and_back, {"times": 1, "seconds": 4.5}),
    "host-frozen": Scenario("P3", nodes.frozen_and_back, {"times": 1, "seconds": 4.5, "whole": True}, {"whole": True}),
    "gil-held": Scenario("P4", workers.holding_the_gil, {"seconds": 4.5}),
    "broker-killed": Scenario("P5", brokers.killed_without_journal, {"times": 2, "queued": 500}),
    "poison": Scenario("P12", workers.poison, {"innocents": 300}),
    "broker-frozen": Scenario("P22", brokers.frozen_for_long, {"seconds": 4.5}),
    "node-drained": Scenario("P25", nodes.drained, {"tasks": 600}),
}
