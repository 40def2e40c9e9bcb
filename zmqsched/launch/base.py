"""What a launcher is: it starts the nodes of one group somewhere, says how they are, and ends them.

To add one: one file with a subclass of :class:`Launcher`, and one line in ``LAUNCHERS`` (``launch/__init__.py``), or, in
another package, an entry point of the group ``zmqsched.launchers``.

Rules
-----
* A launcher starts processes or asks a batch system to; it knows nothing of tasks. Whether a node has joined, the
  broker says: it names itself by its *label* (``GROUP-NUMBER``), which the launcher is given.
* All launchers start the same command, :func:`node_command`. Secrets are neither in it nor in the environment: the
  connection file of the role "node" travels over standard input, or lies where the node can read it.
* Both of a child's pipes are drained for ever, into ``log_path(label)``; nothing is learned by parsing them but the one
  JSON line of readiness.
* What would be left if this process died now is recorded before ``start`` returns (batch jobs' ids), or ends by itself
  (standard input ends).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from ..clusterfile import NodeGroup, State
from ..config import ConnectionFile


def _nothing() -> None:
    """Nobody waits for news."""


@dataclass(frozen=True)
class Site:
    """The cluster that nodes are started for. ``path``: where the connection file of the role "node" lies, or will when the
    broker is up; ``directory``: private, of this cluster, on this host: for logs (``logs/LABEL.log``) and sockets.
    ``echo``: what tasks write to standard error, and what nodes say, goes to this program's standard error too. ``wake``:
    for a launcher to call, from any thread, when its ``poll`` has news; without it they are seen a second later."""

    path: Path
    directory: Path
    echo: bool = False
    wake: Callable[[], None] = _nothing

    @property
    def file(self) -> ConnectionFile:
        """As it is now: a broker that follows another may have other keys.

        Raises
        ------
        ConnectionFileError
            There is none: no broker is up.
        """
        return ConnectionFile.load(self.path)

    def log_path(self, label: str) -> Path:
        return self.directory / "logs" / f"{label}.log"


@dataclass(frozen=True)
class Launched:
    """A node that was asked for. ``why``: why it is pending, or how it ended, with the end of what it wrote to standard
    error; readable, for an exception; "" if it ended in order. ``where``: host, job id. ``node``: its id at the broker, once
    it has said that it is ready, if the launcher hears it; otherwise the broker is asked for the label."""

    label: str
    state: State
    why: str = ""
    where: str = ""
    node: str = ""


class Launcher(ABC):
    """Starts and ends the nodes of one group. Called from one thread at a time. ``queues``: its nodes wait for their turn,
    perhaps for days, so a cluster is ready when they are asked for, not when they have joined."""

    queues: ClassVar[bool] = False

    def __init__(self, group: NodeGroup, site: Site) -> None:
        self.group = group
        self.site = site

    @abstractmethod
    def start(self, labels: Sequence[str]) -> None:
        """Ask for these nodes. Returns as soon as they are asked for, with all that ends them again recorded.

        Raises
        ------
        StartError
            None of them can be: no such command, no such host; one line that says what to do.
        """

    @abstractmethod
    def poll(self) -> list[Launched]:
        """How the nodes are that were started and not stopped; never waits long. One that was running and is "starting" is
        cut off, and the launcher will have another in its place."""

    @abstractmethod
    def stop(self, labels: Collection[str], *, at_once: bool = False) -> None:
        """End these nodes: in order (they were told by the broker to drain, or are to leave now), or by force. What has
        ended may be forgotten. Returns when nothing of them is left, or raises StartError saying what is."""

    @abstractmethod
    def preview(self, labels: Sequence[str]) -> list[str]:
        """What ``start`` would run, as lines for a shell (``zmqsched up --dry-run``)."""

    def close(self) -> None:
        """End all of them, and let go of everything. Idempotent."""
        self.stop([one.label for one in self.poll()])


def node_command(group: NodeGroup, label: str, connect: str, python: str) -> list[str]:
    """The command line of a node. ``connect``: the path of its connection file, or "-" for standard input, of which the file
    is the first line (as compact JSON) and whose end ends the node."""
    words = [python, "-m", "zmqsched", "node", f"--connect={connect}", f"--label={label}"]
    words += [f"--slots={group.slots}"] if group.slots else []
    words += [f"--resource={name}={amount}" for name, amount in group.resources.items()]
    words += [f"--tag={tag}" for tag in group.tags]
    words += [f"--max-tasks-per-worker={group.max_tasks_per_worker}"] if group.max_tasks_per_worker else []
    if group.memory_limit:
        words += [f"--memory-limit={group.memory_limit}", f"--memory-soft={group.memory_soft:g}"]
    return words
