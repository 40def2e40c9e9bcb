"""``ls`` and ``status``: which clusters there are, and how one is."""

from __future__ import annotations

import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from datetime import datetime
from typing import TYPE_CHECKING, Any

import click

from ..config import ConnectionFile, find_cluster, running_clusters
from ..display import Table, sheet_of
from ..errors import ZmqschedError
from .names import path_of
from .tables import as_json, print_json, print_sheet, print_table

if TYPE_CHECKING:
    from ..records import NodeInfo, Status

# For `ls`, of each cluster: a broker answers in milliseconds, or something is wrong with it.
ANSWER_TIMEOUT_S = 2.0


@click.command()
@as_json
def ls(output: str) -> None:
    """List your clusters that run on this machine."""
    files = running_clusters()
    with ThreadPoolExecutor(max_workers=16) as pool:  # together: one that does not answer costs no more than all
        found = list(zip(files, pool.map(_status_of, files), strict=True))
    if output == "json":
        print_json([_as_record(file, status) for file, status in found])
    elif not found:
        print("no cluster is running; start one: zmqsched up", file=sys.stderr)
    else:
        heads = ("name", "host", "broker pid", "since", "where", "nodes", "workers")
        rows = [
            (file.name, file.host, file.pid, _since(file), _where(file), _nodes(status), _workers(status))
            for file, status in found
        ]
        print_table(Table(heads, rows))


def _status_of(file: ConnectionFile) -> Status | None:
    """None: it did not answer."""
    from ..client import Client

    try:
        with Client(file, timeout=ANSWER_TIMEOUT_S) as client:
            return client.status()
    except ZmqschedError:
        return None


def _workers(status: Status | None) -> object:
    return "no answer" if status is None else len(status.workers)


def _nodes(status: Status | None) -> str:
    """How many of each group, and when the first of them has to leave."""
    if status is None:
        return ""
    here = _here(status)
    leaving = min((node.leaves_in_s for node in here if node.leaves_in_s), default=0.0)
    groups = ", ".join(f"{count} {name}".strip() for name, count in _groups(status).items())
    return (groups or "none") + (f", {leaving:.0f} s left" if leaving else "")


def _groups(status: Status) -> dict[str, int]:
    """How many nodes of each group are there, by name; "" for those that were started by hand."""
    return dict(sorted(Counter(node.label.rpartition("-")[0] for node in _here(status)).items()))


def _here(status: Status) -> list[NodeInfo]:
    return [node for node in status.nodes if node.state not in ("lost", "gone")]


def _as_record(file: ConnectionFile, status: Status | None) -> dict[str, Any]:
    return {
        "name": file.name, "host": file.host, "pid": file.pid, "since": file.created, "work": file.addresses.work,
        "file": str(path_of(file)), "workers": None if status is None else len(status.workers),
        "groups": None if status is None else _groups(status),
    }  # fmt: skip


def _since(file: ConnectionFile) -> str:
    try:
        return datetime.fromisoformat(file.created).astimezone().strftime("%Y-%m-%d %H:%M")
    except ValueError:  # the file's format leaves it open
        return file.created


def _where(file: ConnectionFile) -> str:
    kind, _, address = file.addresses.work[0].partition("://")
    return kind if kind == "ipc" else f"{kind} {address}"


@click.command()
@click.argument("name", required=False)
@as_json
def status(name: str | None, output: str) -> None:
    """Show a cluster's nodes, workers and tasks. NAME may be a connection file's path too."""
    from ..client import Client

    file = find_cluster(name)  # never starts one, as Client() may
    with Client(file) as client:
        found = client.status()
    coming = _coming(file, found)
    if output == "json":
        print_json({**asdict(found), "coming": coming})
        return
    print_sheet(sheet_of(replace(found, clients=found.clients - 1)))  # this very command is one
    if coming:
        print()
        rows = [(one["label"], one["state"], one["where"], one["why"]) for one in coming]
        print_table(Table(("asked for", "state", "where", "why"), rows))


def _coming(file: ConnectionFile, status: Status) -> list[dict[str, str]]:
    """The nodes that have been asked for and are not there, with the reason."""
    from ..control import ask

    known = {node.label for node in _here(status)}
    try:
        return [one for one in ask(file.name, {"do": "nodes"}, ANSWER_TIMEOUT_S)["nodes"] if one["label"] not in known]
    except ZmqschedError:  # nobody holds them, or not here
        return []
