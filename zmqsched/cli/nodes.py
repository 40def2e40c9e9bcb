"""``drain``, ``pause``, ``resume``, ``retire`` and ``wait``: what is asked of nodes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import click

from ..config import find_cluster
from ..display import counted
from ..errors import ZmqschedError
from .reading import by_name, some_seconds

if TYPE_CHECKING:
    from ..client import Client

# What a node is called by: its label or its id, as `zmqsched status` shows them.
_nodes = click.argument("nodes", nargs=-1, required=True, metavar="NODE...")


@click.command()
@_nodes
@by_name
def drain(nodes: tuple[str, ...], name: str | None) -> int:
    """Have nodes finish what they hold, take nothing new, and leave. NODE is a label or an id of `zmqsched status`."""
    return _each(nodes, name, "drains", lambda client, node: client.drain(node))


@click.command()
@_nodes
@by_name
def pause(nodes: tuple[str, ...], name: str | None) -> int:
    """Give nodes nothing new: they finish what runs, hand back what they have not started, and stay."""
    return _each(nodes, name, "is paused", lambda client, node: client.pause(node))


@click.command()
@_nodes
@by_name
def resume(nodes: tuple[str, ...], name: str | None) -> int:
    """Let paused nodes take tasks again."""
    return _each(nodes, name, "takes tasks", lambda client, node: client.resume(node))


@click.command()
@_nodes
@by_name
@click.option(
    "--grace", metavar="SECONDS", default="30", show_default=True, callback=some_seconds,
    help="What tasks have to finish before they are run elsewhere; 0 is at once.",
)  # fmt: skip
def retire(nodes: tuple[str, ...], name: str | None, grace: float) -> int:
    """As drain, but what has not finished soon is run elsewhere."""
    return _each(nodes, name, "retires", lambda client, node: client.retire(node, grace=grace))


def _each(nodes: Sequence[str], name: str | None, done: str, tell: Callable[[Client, str], None]) -> int:
    """Tell each of them; what cannot be is said of each."""
    from ..client import Client

    code = 0
    with Client(find_cluster(name)) as client:
        for node in nodes:
            try:
                tell(client, node)
                print(f"node {node} {done}")
            except ZmqschedError as error:
                print(f"zmqsched: {error}", file=sys.stderr)
                code = 1
    return code


@click.command()
@click.argument("number", type=click.IntRange(0, 10_000), metavar="N")
@click.argument("name", required=False)
@click.option("--timeout", metavar="SECONDS", callback=some_seconds, help="Fail if they are not there by then.")
def wait(number: int, name: str | None, timeout: float | None) -> int:
    """Wait until N nodes of a cluster are there. If they cannot come, or not in time, say of each that is missing why."""
    from ..client import Client

    with Client(find_cluster(name)) as client:
        try:
            client.wait_for_nodes(number, timeout)
        except TimeoutError as error:
            raise ZmqschedError(str(error)) from None
    print(f"{counted(number, 'node')} there")
    return 0
