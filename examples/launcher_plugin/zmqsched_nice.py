"""A launcher of another package: nodes on this machine whose workers give way to everything else (``nice``).

It becomes ``launcher = "nice"`` in a ``cluster.toml`` by the entry point in ``pyproject.toml`` beside this file, once it is
installed (``pip install examples/launcher_plugin``). A launcher for containers, or for a site's own command, looks the same:
only the words before the node's command differ.

A launcher starts nodes, says how they are, and ends them. What it must keep to is in ``zmqsched.launch.base``; ``Children``
does most of it for nodes that run as children of this process, or at the other end of one.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Collection, Sequence

from zmqsched.clusterfile import NodeGroup
from zmqsched.launch.base import Launched, Launcher, Site, node_command
from zmqsched.launch.children import Children


class NiceLauncher(Launcher):
    """``batch.options`` of the group go to ``nice``: ``["-n", "15"]``."""

    def __init__(self, group: NodeGroup, site: Site) -> None:
        super().__init__(group, site)
        self._children = Children(site.wake, echo=site.echo)

    def start(self, labels: Sequence[str]) -> None:
        # The connection file goes to the node as the first line of its standard input, whose end ends it: no secret is on a
        # command line, and no node is left when this process dies.
        line = self.site.file.line()
        for label in labels:
            environment = {**os.environ, **self.group.env}
            self._children.start(label, self._command(label), self.site.log_path(label), environment, first=line)

    def poll(self) -> list[Launched]:
        return self._children.poll()

    def stop(self, labels: Collection[str], *, at_once: bool = False) -> None:
        self._children.stop(labels, at_once=at_once)

    def preview(self, labels: Sequence[str]) -> list[str]:
        return [shlex.join(self._command(label)) for label in labels]

    def close(self) -> None:
        self._children.close()

    def _command(self, label: str) -> list[str]:
        node = node_command(self.group, label, "-", self.group.python or sys.executable)
        # By --ready-fd=1 the node says on its standard output that it has joined, or why not.
        return ["nice", *self.group.batch.options, *node, "--ready-fd=1", "--log-level=error"]
