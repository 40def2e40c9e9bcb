"""What a scenario measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Literal


def quantile(samples: Sequence[float], share: float) -> float:
    """The smallest sample that at least this share of all are not above."""
    ordered = sorted(samples)
    return ordered[max(0, -(-int(share * 1000) * len(ordered) // 1000) - 1)]


@dataclass
class Figure:
    """Samples of one quantity. ``goal``: what the stated one of median, p99 and worst should not exceed."""

    title: str
    unit: str
    samples: list[float] = field(default_factory=list)
    goal: float | None = None
    of: Literal["median", "p99", "worst"] = "worst"

    @property
    def median(self) -> float:
        return median(self.samples)

    @property
    def p99(self) -> float:
        return quantile(self.samples, 0.99)

    @property
    def worst(self) -> float:
        return max(self.samples)

    @property
    def met(self) -> bool | None:
        """Whether the goal is reached; None if there is no goal, or nothing was measured."""
        return None if self.goal is None or not self.samples else getattr(self, self.of) <= self.goal


def merged(runs: Sequence[Sequence[Figure]]) -> list[Figure]:
    """The figures of several runs of one scenario, by title."""
    together: dict[str, Figure] = {}
    for figure in (figure for run in runs for figure in run):
        known = together.setdefault(figure.title, Figure(figure.title, figure.unit, [], figure.goal, figure.of))
        known.samples.extend(figure.samples)
    return list(together.values())
