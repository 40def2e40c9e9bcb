"""``down``: stop clusters."""

from __future__ import annotations

import os
import sys

import click

from ..config import DEFAULT_CLUSTER, ConnectionFile, find_cluster, running_clusters, this_host
from ..errors import ClusterNotFound, ZmqschedError
from .names import log_path


@click.command()
@click.argument("name", required=False)
@click.option("--all", "everything", is_flag=True, help="Stop all your clusters that run on this machine.")
def down(name: str | None, everything: bool) -> int:
    """Stop a cluster, wherever it was started. Its unfinished tasks are given up."""
    if everything and name is not None:
        raise click.UsageError("give a name or --all, not both")
    files = running_clusters() if everything else [_find(name)]
    if not files:
        print("no cluster is running")
    return max([_stop(file) for file in files], default=0)


def _find(name: str | None) -> ConnectionFile:
    try:
        return find_cluster(name)
    except ClusterNotFound:
        # Killed outright, a detached `up` leaves its log.
        log_path(name or os.environ.get("ZMQSCHED_CLUSTER") or DEFAULT_CLUSTER).unlink(missing_ok=True)
        raise


def _stop(file: ConnectionFile) -> int:
    from ..launch.jobs import cancel_recorded
    from ..stopping import stop_cluster

    try:
        if stop_cluster(file) or file.host == this_host():
            for job in cancel_recorded(file.name):  # what its `up` could not cancel
                print(f"cancelled {job}")
    except ZmqschedError as error:
        print(f"zmqsched: {error}", file=sys.stderr)
        return 1
    log_path(file.name).unlink(missing_ok=True)
    print(f"cluster {file.name} is stopped")
    return 0
