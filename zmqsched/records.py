"""What ``client.nodes()``, ``workers()`` and ``status()`` return: plain records, made from the broker's report, and shown as
tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .display import Row, Sheet, Shown, Table, as_text, counted
from .protocol import NodeReport, Report


@dataclass(frozen=True)
class NodeInfo:
    """A node. ``state``: alive, suspect, paused, draining, lost or gone.

    ``resources``: all it has; ``free``: not taken by tasks. ``assigned``: unfinished tasks there, running or next in line;
    ``done``: tasks it has answered. ``silent_s``: seconds since it was last heard of. ``label``: what its launcher calls it,
    "" if nobody has named it. ``leaves_in_s``: seconds until its allocation ends, 0 if it has no end.
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
    label: str = ""
    leaves_in_s: float = 0.0


@dataclass(frozen=True)
class WorkerInfo:
    """A worker, as of its node's last beat (each second). ``state``: idle or busy; ``done``: tasks it has answered;
    ``cpu``: percent of one core; ``memory``: resident bytes. ``worn``: it gets no other task, and is replaced when it
    is idle."""

    id: str
    node: str
    host: str
    pid: int
    state: str
    done: int
    cpu: float
    memory: int
    worn: bool = False


class NodeList(Shown, list[NodeInfo]):
    """A list that is printed as a table."""

    def __repr__(self) -> str:
        return as_text(self._sheet())

    def _sheet(self) -> Sheet:
        return Sheet(counted(len(self), "node"), [nodes_table(self)] if self else [])


class WorkerList(Shown, list[WorkerInfo]):
    """A list that is printed as a table."""

    def __repr__(self) -> str:
        return as_text(self._sheet())

    def _sheet(self) -> Sheet:
        return Sheet(counted(len(self), "worker"), [workers_table(self)] if self else [])


@dataclass(frozen=True, repr=False)
class Status(Shown):
    """A cluster; printed as tables.

    ``tasks``: unfinished tasks by state. ``waiting``: how many tasks have not started for what reason, most first; the
    last one adds up what is left when there are many reasons. ``counts``: what has happened so far, by name.
    """

    name: str
    policy: str
    clients: int
    nodes: NodeList
    workers: WorkerList
    tasks: dict[str, int]
    counts: dict[str, int]
    waiting: list[tuple[int, str]]

    def __repr__(self) -> str:
        return as_text(self._sheet())

    def _sheet(self) -> Sheet:
        tables = [nodes_table(self.nodes)] if self.nodes else []
        if self.workers:
            tables.append(workers_table(self.workers))
        title = f"cluster {self.name}: policy {self.policy}, {counted(self.clients, 'client')}"
        return Sheet(title, tables, task_facts(self))


def node_infos(report: Report) -> NodeList:
    return NodeList(_node_info(node) for node in report.nodes)


def worker_infos(report: Report) -> WorkerList:
    return WorkerList(
        WorkerInfo(f"{node.id}/{w.worker}", node.id, node.where.host, w.pid, w.state, w.done, w.cpu, w.memory, w.worn)
        for node in report.nodes
        if node.state not in ("lost", "gone")
        for w in node.workers
        if w.pid  # one that is being born has none, and 0 is a dangerous number to send a signal to
    )


def status_of(report: Report) -> Status:
    return Status(
        report.name, report.policy, report.clients, node_infos(report), worker_infos(report), dict(report.tasks),
        dict(report.counts), list(report.waiting),
    )  # fmt: skip


def _node_info(node: NodeReport) -> NodeInfo:
    return NodeInfo(
        node.id, node.where.host, node.where.pid, node.where.python, node.state, node.slots, node.assigned, node.done,
        dict(node.resources), dict(node.free), node.tags, node.silent_s, node.label, node.leaves_in_s,
    )  # fmt: skip


# --- as they are shown -------------------------------------------------------------------------------------------------


def nodes_table(nodes: Sequence[NodeInfo]) -> Table:
    columns = ["node", "label", "host", "pid", "state", "slots", "tasks", "done", "offers"]
    rows = [_node_row(node) for node in nodes]
    if not any(node.label for node in nodes):
        columns.remove("label")
        rows = [(row[0], *row[2:]) for row in rows]
    return Table(tuple(columns), rows)


def workers_table(workers: Sequence[WorkerInfo]) -> Table:
    return Table(("worker", "host", "pid", "state", "done", "cpu", "memory"), [_worker_row(worker) for worker in workers])


def task_facts(status: Status) -> list[tuple[str, object]]:
    """What is unfinished, why what waits does, and what has happened so far."""
    return [
        ("unfinished", _listed(status.tasks) or "no tasks"),
        *(("waiting", f"{count}: {reason}") for count, reason in status.waiting),
        ("so far", _listed(status.counts) or "nothing"),
    ]


def _node_row(node: NodeInfo) -> Row:
    offers = [f"{name}={amount:g}" for name, amount in sorted(node.resources.items()) if name not in ("cpu", "memory")]
    state = node.state if node.state in ("alive", "paused", "draining") else f"{node.state} for {node.silent_s:.0f} s"
    if node.leaves_in_s and node.state not in ("lost", "gone"):
        state += f", {node.leaves_in_s:.0f} s left"
    offers += node.tags
    return node.id, node.label, node.host, node.pid, state, node.slots, node.assigned, node.done, " ".join(offers)


def _worker_row(worker: WorkerInfo) -> Row:
    memory = f"{worker.memory / 2**20:.0f} MiB" if worker.memory else ""  # measured with the first beat
    state = f"{worker.state}, worn" if worker.worn else worker.state
    return worker.id, worker.host, worker.pid, state, worker.done, f"{worker.cpu:.0f} %", memory


def _listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(counts.items()) if count)
