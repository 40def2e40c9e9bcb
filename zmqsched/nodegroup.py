"""The nodes of one launcher, as they were asked for."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from .clusterfile import NodeGroup
from .core.adapting import Adapting
from .errors import StartError
from .launch import find_launcher
from .launch.base import Launched, Launcher, Site
from .options import MAX_AMOUNT
from .protocol import Prospect
from .records import NodeInfo
from .shell import log


@dataclass
class Member:
    """A node that was asked for. ``leaving``: it was told to. ``cut_off``: the connection to it broke, and the launcher is
    about to start another in its place. ``unknown_since``: a broker that has followed another does not know it yet."""

    launched: Launched
    joined: bool = False
    leaving: bool = False
    cut_off: bool = False
    unknown_since: float | None = None

    @property
    def ended(self) -> bool:
        return self.launched.state == "ended"


class Group:
    """By label. ``begun``: its first nodes were asked for."""

    def __init__(self, wanted: NodeGroup, site: Site) -> None:
        self.name = wanted.name
        self.wanted = wanted
        self.launcher: Launcher = find_launcher(wanted.launcher)(wanted, site)
        self.members: dict[str, Member] = {}
        self.adapting = Adapting(wanted.scale.min, wanted.scale.max) if wanted.scale else None
        self.begun = False
        self._cluster = site.directory.name
        self._offers: dict[str, float] = {}  # of its nodes, once there was one
        self._trouble = ""  # with its launcher
        self._numbers = itertools.count(1)

    def start(self, number: int) -> None:
        self.begun = True
        labels = [f"{self.name}-{next(self._numbers)}" for _ in range(number)]
        if not labels:
            return
        self.launcher.start(labels)
        for label in labels:
            self.members[label] = Member(Launched(label, "pending"))

    def stop(self, labels: Collection[str]) -> None:
        """What the launcher can neither end nor will tell of any more is none of these nodes either."""
        if not labels:
            return
        kept: set[str] = set()
        try:
            self.launcher.stop(labels)
        except StartError:
            kept = {one.label for one in self.poll()}
            raise
        finally:
            for label in set(labels) - kept:
                self.members.pop(label, None)

    def poll(self) -> list[Launched]:
        """A launcher may be anybody's: what is wrong with it is told, once, and the others go on."""
        try:
            found = self.launcher.poll()
        except Exception as error:  # noqa: BLE001 - of another package
            trouble = f"{type(error).__name__}: {error}"
            if trouble != self._trouble:
                log.exception("zmqsched: cluster %s: the launcher of group %s fails", self._cluster, self.name)
            self._trouble = trouble
            return []
        self._trouble = ""
        return found

    def staying(self) -> dict[str, Member]:
        members = list(self.members.items())  # for who looks from another thread
        return {label: one for label, one in members if not one.leaving and not one.ended}

    def number(self) -> int:
        """How many nodes it has or is about to ask for."""
        return len(self.staying()) if self.begun else self.wanted.size

    def prospect(self, nodes: Mapping[str, NodeInfo]) -> Prospect:
        """What a node of it would offer. What nobody can know before there is one is taken for enough. ``nodes``: those that
        are there, by label."""
        for label in list(self.members):
            if node := nodes.get(label):
                self._offers = node.resources
        found = self._offers or {"memory": MAX_AMOUNT, **self.wanted.resources, "cpu": self.wanted.slots or MAX_AMOUNT}
        return Prospect(tuple(sorted(found.items())), self.wanted.tags)

    def slots(self, nodes: Mapping[str, NodeInfo]) -> int:
        """Of each of its nodes, as far as one can know before there is one."""
        known = [nodes[label].slots for label in self.members if label in nodes]
        return self.wanted.slots or max(known, default=1)
