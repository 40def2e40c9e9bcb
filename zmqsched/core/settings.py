"""What a scheduler is told once, at its start."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..config import BEAT_INTERVAL_S, CLIENT_LEASE_S, KEEP_RESULTS_S, PING_GRACE_S, SUSPECT_AFTER_BEATS
from .policy import DEFAULT_POLICY

DEAD_AFTER_S = BEAT_INTERVAL_S * SUSPECT_AFTER_BEATS + PING_GRACE_S


@dataclass(frozen=True)
class Settings:
    """``python`` is the "major.minor" that clients and nodes must share: functions by value are bytecode.

    A task that no node can ever hold fails after ``unservable_after_s``; a node lost less than ``await_lost_s`` ago counts
    as one that may be back. ``journal``: the shell keeps one. ``settle_s``: how long a broker that follows a crashed one
    waits for nodes before it places anything. Above ``max_queued_bytes`` of payloads clients are asked to hold back
    (``load.py``). When no task is unfinished, and no client has asked for anything but reports for ``idle_timeout_s``, the
    cluster is shut down; 0: it never is.
    """

    name: str = "cluster"
    epoch: int = 1
    python: str = "3.11"
    policy: str = DEFAULT_POLICY
    beat_interval_s: float = BEAT_INTERVAL_S
    suspect_after_s: float = BEAT_INTERVAL_S * SUSPECT_AFTER_BEATS
    ping_grace_s: float = PING_GRACE_S
    client_lease_s: float = CLIENT_LEASE_S
    unservable_after_s: float = 6.0
    await_lost_s: float = 60.0
    max_deaths: int = 3
    journal: bool = False
    keep_results_s: float = KEEP_RESULTS_S
    settle_s: float = 0.0
    max_queued_bytes: int = 1 << 30
    max_connections: float = math.inf
    idle_timeout_s: float = 0.0

    @property
    def round_s(self) -> float:
        """How often to look at what needs no hurry."""
        return min(BEAT_INTERVAL_S, self.beat_interval_s)


def patience(dead_after_s: float) -> tuple[float, float]:
    """``suspect_after_s`` and ``ping_grace_s`` of a broker that gives up nodes which were silent for so long."""
    grace_s = dead_after_s * PING_GRACE_S / DEAD_AFTER_S
    return dead_after_s - grace_s, grace_s


@dataclass(frozen=True)
class Care:
    """What a node's agent is told about its workers: after how many tasks one is replaced (0: never), and how many bytes it
    may use (0: any). Beyond ``memory_soft`` of these it is given no other task and is replaced when it is idle; beyond
    all of them it is killed."""

    max_tasks: int = 0
    memory_limit: int = 0
    memory_soft: float = 0.8
