"""``clean``: remove what clusters have left that died as a whole."""

from __future__ import annotations

import sys

import click

from ..errors import ZmqschedError


@click.command()
@click.argument("clusters", nargs=-1, metavar="[CLUSTER]...")
@click.option("--journals", is_flag=True, help="Also what dead clusters have kept on disk: their tasks and answers.")
@click.option("--dry-run", is_flag=True, help="Say what would be removed, and leave it.")
def clean(clusters: tuple[str, ...], journals: bool, dry_run: bool) -> int:
    """Remove what clusters left behind that died as a whole: files, nodes and workers of yours on this machine.

    Clusters that run here are left alone, and so are those that are on their way up: it looks for five seconds. Of a CLUSTER
    that is on another host the nodes here are ended only if it is named: whether it runs, this machine does not know.
    """
    from ..cleaning import find

    code = 0
    found = find(clusters, journals=journals)
    for one in found:
        try:
            if not dry_run:
                one.remove()
            print(f"{'would remove' if dry_run else 'removed'} {one.what}")
        except ZmqschedError as error:
            print(f"zmqsched: {error}", file=sys.stderr)
            code = 1
    if not found:
        print("nothing is left to clean")
    return code
