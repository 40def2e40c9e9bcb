"""What ``client.nodes()``, ``workers()`` and ``status()`` return: plain records, made from the broker's report."""

from __future__ import annotations

from dataclasses import dataclass

from .protocol import NodeReport, Report


@dataclass(frozen=True)
class NodeInfo:
    """A node. ``state``: alive, suspect, draining, lost or gone. ``resources``: all it has; ``free``: not taken by tasks.

    ``assigned``: unfinished tasks there, running or next in line; ``done``: tasks it has answered. ``silent_s``: seconds
    since it was last heard of.
    """

    id: str
    host: str
    pid: int
    python: str
    state: str
    slots: int
    assigned: int
    done: int
    resources: dict[str, float]
    free: dict[str, float]
    tags: tuple[str, ...]
    silent_s: float


@dataclass(frozen=True)
class WorkerInfo:
    """A worker, as of its node's last beat (each second). ``state``: idle or busy; ``done``: tasks it has answered;
    ``cpu``: percent of one core; ``memory``: resident bytes."""

    id: str
    node: str
    host: str
    pid: int
    state: str
    done: int
    cpu: float
    memory: int


@dataclass(frozen=True)
class Status:
    """A cluster. ``tasks``: unfinished tasks by state; ``counts``: what has happened so far, by name."""

    name: str
    policy: str
    clients: int
    nodes: list[NodeInfo]
    workers: list[WorkerInfo]
    tasks: dict[str, int]
    counts: dict[str, int]


def node_infos(report: Report) -> list[NodeInfo]:
    return [_node_info(node) for node in report.nodes]


def worker_infos(report: Report) -> list[WorkerInfo]:
    return [
        WorkerInfo(f"{node.id}/{w.worker}", node.id, node.where.host, w.pid, w.state, w.done, w.cpu, w.memory)
        for node in report.nodes
        if node.state not in ("lost", "gone")
        for w in node.workers
        if w.pid  # one that is being born has none, and 0 is a dangerous number to send a signal to
    ]


def status_of(report: Report) -> Status:
    return Status(
        report.name, report.policy, report.clients, node_infos(report), worker_infos(report), dict(report.tasks),
        dict(report.counts),
    )  # fmt: skip


def _node_info(node: NodeReport) -> NodeInfo:
    return NodeInfo(
        node.id, node.where.host, node.where.pid, node.where.python, node.state, node.slots, node.assigned, node.done,
        dict(node.resources), dict(node.free), node.tags, node.silent_s,
    )  # fmt: skip
