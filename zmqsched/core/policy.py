"""Placement policies: which of the nodes that could take a task gets it.

A policy is one class with one method, ``rank``: the node with the lowest rank is asked first. It is called each time a
node changes, not for each task and node, so it looks at that node alone (``last`` is the rank of the node that got the
last task). To add one: write the class, add a line to
``POLICIES``; the property tests and the simulation pick it up from there.
"""

from __future__ import annotations

from random import Random
from typing import Protocol


class Rankable(Protocol):
    """What a policy may look at: unfinished tasks at the node, its slots, and when it last got a task."""

    @property
    def assigned(self) -> int: ...
    @property
    def slots(self) -> int: ...
    @property
    def turn(self) -> int: ...


class Policy(Protocol):
    def rank(self, node: Rankable, random: Random, last: float) -> float: ...


class LeastLoaded:
    """The node with the fewest unfinished tasks per slot."""

    def rank(self, node: Rankable, random: Random, last: float) -> float:
        return node.assigned / node.slots


class RoundRobin:
    """The node that has waited longest for its turn."""

    def rank(self, node: Rankable, random: Random, last: float) -> float:
        return node.turn


class RandomChoice:
    """Any node, evenly, whatever was chosen before.

    A rank stays until its node changes, so a plain random number would keep unlucky nodes back. Instead each node draws
    the time of its next turn from an exponential distribution: that has no memory, so whose turn is next is always even.
    """

    def rank(self, node: Rankable, random: Random, last: float) -> float:
        return last + random.expovariate(1.0)


class Pack:
    """Fill one node before the next is touched, so that the others can be given back."""

    def rank(self, node: Rankable, random: Random, last: float) -> float:
        load = node.assigned / node.slots
        return -load if load < 1 else load


DEFAULT_POLICY = "least-loaded"
POLICIES: dict[str, type[Policy]] = {
    DEFAULT_POLICY: LeastLoaded,
    "round-robin": RoundRobin,
    "random": RandomChoice,
    "pack": Pack,
}
