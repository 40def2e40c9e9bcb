"""``drain``, ``pause``, ``resume``, ``retire`` and ``wait``: what is asked of nodes."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import click

from ..config import find_cluster
from ..display import counted
from ..errors import ZmqschedError
from .reading import by_name, some_seconds

if TYPE_CHECKING:
    from ..client import Client
    from ..records import NodeInfo

# What a node is called by: its label or its id, as `zmqsched status` shows them.
_nodes = click.argument("nodes", nargs=-1, required=True, metavar="NODE...")


_no_wait = click.option("--no-wait", is_flag=True, help="Return when they were told, not when they have left.")
_timeout = click.option(
    "--timeout", metavar="SECONDS", callback=some_seconds, help="Fail if they have not left by then; they drain on."
)


@click.command()
@_nodes
@by_name
@_no_wait
@_timeout
def drain(nodes: tuple[str, ...], name: str | None, no_wait: bool, timeout: float | None) -> int:
    """Have nodes finish what they hold, take nothing new, and leave, and wait until they have. NODE is a label or an id of
    `zmqsched status`."""
    return _send_off(nodes, name, "drains", lambda client, node: client.drain(node), no_wait, timeout)


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
@_no_wait
@_timeout
def retire(nodes: tuple[str, ...], name: str | None, grace: float, no_wait: bool, timeout: float | None) -> int:
    """As drain, but what has not finished soon is run elsewhere."""
    return _send_off(nodes, name, "retires", lambda client, node: client.retire(node, grace=grace), no_wait, timeout)


def _each(nodes: Sequence[str], name: str | None, done: str, tell: Callable[[Client, str], None]) -> int:
    from ..client import Client

    with Client(find_cluster(name)) as client:
        return int(len(_told(client, nodes, done, tell)) < len(nodes))


def _told(client: Client, nodes: Sequence[str], done: str, tell: Callable[[Client, str], None]) -> list[str]:
    """Tell each of them, and return those that were; what cannot be is said of each."""
    told = []
    for node in nodes:
        try:
            tell(client, node)
            print(f"node {node} {done}", flush=True)
            told.append(node)
        except ZmqschedError as error:
            print(f"zmqsched: {error}", file=sys.stderr)
    return told


def _send_off(
    nodes: Sequence[str], name: str | None, done: str, tell: Callable[[Client, str], None], no_wait: bool,
    timeout: float | None,
) -> int:  # fmt: skip
    """Tell each of them, and unless nobody is to wait see it leave."""
    if no_wait:
        if timeout is not None:
            raise click.UsageError("--timeout does not go with --no-wait")
        return _each(nodes, name, done, tell)
    from ..client import Client

    until = math.inf if timeout is None else time.monotonic() + timeout
    with Client(find_cluster(name)) as client:
        left = [node for node in _told(client, nodes, done, tell) if _has_left(client, node, timeout, until)]
    return int(len(left) < len(nodes))


def _has_left(client: Client, node: str, timeout: float | None, until: float) -> bool:
    """Wait for it, and show meanwhile on a terminal what is left to do."""
    from ..readiness import wait_until_left

    tasks = ""

    def show(there: NodeInfo) -> None:
        nonlocal tasks
        tasks = f"{counted(there.assigned, 'task')} to finish"
        _overwrite(f"node {node}: {tasks}")

    why = ""
    try:
        wait_until_left(node, None if timeout is None else max(0.0, until - time.monotonic()), client.nodes, show)
    except TimeoutError:
        why = f"node {node} has not left after {timeout:g} s, and drains on: {tasks}"
    except ZmqschedError as error:
        why = str(error)
    finally:
        _overwrite("")
    if why:
        print(f"zmqsched: {why}", file=sys.stderr)
    else:
        print(f"node {node} has left", flush=True)
    return not why


def _overwrite(line: str) -> None:
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\x1b[K{line}")
        sys.stderr.flush()


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
