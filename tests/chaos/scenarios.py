"""All scenarios by name, each with the arguments of its short form; the long form is the function's defaults."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from . import brokers, clients, clocks, crowds, hosts, networks, nodes, workers
from .figures import Figure


@dataclass(frozen=True)
class Scenario:
    """``promise``: its number in the table of promises. ``system``: needs root or packages; ``why_not`` says what lacks."""

    promise: str
    run: Callable[..., list[Figure]]
    short: Mapping[str, Any] = field(default_factory=dict)
    long: Mapping[str, Any] = field(default_factory=dict)
    why_not: Callable[[], str] | None = None

    @property
    def system(self) -> bool:
        return self.why_not is not None

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
    "broker-killed-journal": Scenario("P5", brokers.killed_with_journal, {"times": 2, "queued": 1_000}),
    "client-killed": Scenario("P7", clients.killed, {"lease_s": 5.0}),
    "node-cut-off": Scenario(
        "P8", networks.partitioned_node, {"seconds": [1.0, 4.5], "directions": ["in", "both"]}, why_not=hosts.why_not
    ),
    "client-cut-off": Scenario(
        "P9", networks.partitioned_client, {"seconds": [3.0], "directions": ["in", "both"]}, why_not=hosts.why_not
    ),
    "slow-line": Scenario("P10", networks.bad_line, {"tasks": 50, "min_s": 3.0}),
    "broken-line": Scenario(
        "P10", networks.bad_line, {"rtt_s": 0.02, "reset_every_s": 2.0, "tasks": 50, "min_s": 3.0},
        {"rtt_s": 0.02, "reset_every_s": 1.0},
    ),
    "poison": Scenario("P12", workers.poison, {"innocents": 300}),
    "clock-stepped": Scenario("P21", clocks.stepped, {"seconds": 4.0}, why_not=clocks.why_not),
    "silent-peers": Scenario("P18", crowds.silent_connections, {"number": 60, "seconds": 2.0}),
    "broker-frozen": Scenario("P22", brokers.frozen_for_long, {"seconds": 4.5}),
    "crowd": Scenario("P23", crowds.nodes_come_and_go, {"number": 200, "tasks": 2_000}),
    "node-drained": Scenario("P25", nodes.drained, {"tasks": 600}),
}
