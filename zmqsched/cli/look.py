"""``ls`` and ``status``: which clusters there are, and how one is."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from datetime import datetime
from typing import Any

import click

from ..config import ConnectionFile, find_cluster, running_clusters
from ..display import Table, sheet_of
from ..errors import ZmqschedError
from .names import path_of
from .tables import as_json, print_json, print_sheet, print_table

# For `ls`, of each cluster: a broker answers in milliseconds, or something is wrong with it.
ANSWER_TIMEOUT_S = 2.0


@click.command()
@as_json
def ls(output: str) -> None:
    """List your clusters that run on this machine."""
    files = running_clusters()
    with ThreadPoolExecutor(max_workers=16) as pool:  # together: one that does not answer costs no more than all
        found = list(zip(files, pool.map(_workers_of, files), strict=True))
    if output == "json":
        print_json([_as_record(file, workers) for file, workers in found])
    elif not found:
        print("no cluster is running; start one: zmqsched up", file=sys.stderr)
    else:
        rows = [
            (file.name, file.host, file.pid, _since(file), _where(file), "no answer" if workers is None else workers)
            for file, workers in found
        ]
        print_table(Table(("name", "host", "broker pid", "since", "where", "workers"), rows))


def _workers_of(file: ConnectionFile) -> int | None:
    """How many workers it has; None: it did not answer."""
    from ..client import Client

    try:
        with Client(file, timeout=ANSWER_TIMEOUT_S) as client:
            return len(client.workers())
    except ZmqschedError:
        return None


def _as_record(file: ConnectionFile, workers: int | None) -> dict[str, Any]:
    return {
        "name": file.name, "host": file.host, "pid": file.pid, "since": file.created, "work": file.addresses.work,
        "file": str(path_of(file)), "workers": workers,
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
    if output == "json":
        print_json(asdict(found))
    else:
        print_sheet(sheet_of(replace(found, clients=found.clients - 1)))  # this very command is one
