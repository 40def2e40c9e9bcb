"""Nodes on this machine, as children of this process."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Collection, Sequence

from ..clusterfile import NodeGroup
from .base import Launched, Launcher, Site, node_command
from .children import Children

# For the broker's file: nodes are started beside it, so that a start costs one interpreter's time, not two.
BROKER_WITHIN_S = 20.0


class LocalLauncher(Launcher):
    """Each node is a child. What it says goes to its log and to this program's standard error; what its tasks write there
    only with ``site.echo``."""

    def __init__(self, group: NodeGroup, site: Site) -> None:
        super().__init__(group, site)
        self._children = Children(site.wake, echo=True)

    def start(self, labels: Sequence[str]) -> None:
        for label in labels:
            log = self.site.log_path(label)
            self._children.start(label, self._command(label), log, self._environment(), cwd=self.group.cwd)

    def poll(self) -> list[Launched]:
        return self._children.poll()

    def stop(self, labels: Collection[str], *, at_once: bool = False) -> None:
        self._children.stop(labels, at_once=at_once)

    def preview(self, labels: Sequence[str]) -> list[str]:
        changed = [f"{name}={shlex.quote(value)}" for name, value in self.group.env.items()]
        before = [f"cd {shlex.quote(self.group.cwd)} &&"] if self.group.cwd else []
        return [" ".join([*before, *changed, shlex.join(self._command(label))]) for label in labels]

    def close(self) -> None:
        self._children.close()

    def pid(self, label: str) -> int:
        """The node's process."""
        return self._children[label].pid

    def _command(self, label: str) -> list[str]:
        words = node_command(self.group, label, str(self.site.path), self.group.python or sys.executable)
        words += ["--until-eof", "--log-level=error", "--ready-fd=1", f"--wait={BROKER_WITHIN_S:g}"]
        words += [] if self.site.echo else ["--no-echo"]
        if not self.group.prologue:
            return words
        # The shell becomes the node: its input and its end are the node's.
        return ["/bin/sh", "-c", "\n".join([*self.group.prologue, f"exec {shlex.join(words)}"])]

    def _environment(self) -> dict[str, str]:
        """Workers must find the modules that this program finds: its own directory, and what it added to ``sys.path``."""
        here = [entry or os.getcwd() for entry in sys.path if not entry.endswith(".zip")]
        return {**os.environ, "PYTHONPATH": os.pathsep.join(dict.fromkeys(here)), **self.group.env}
