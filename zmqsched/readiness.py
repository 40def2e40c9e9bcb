"""Waiting until nodes are there, with the reason of each that is not, or until one has left."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from .control import ask
from .display import counted
from .errors import CommandFailed, StartError, ZmqschedError
from .records import NodeInfo

LOOK_EVERY_S = 0.1
ANSWER_S = 2.0
# A broker that follows another has all nodes that are there back by then.
UNKNOWN_S = 5.0


class Asked(NamedTuple):
    """What is known of the nodes that somebody has asked for: each with ``label``, ``state``, ``why``, ``where`` and
    ``node``; and whether more may be asked for without anybody's saying so."""

    nodes: list[dict[str, Any]]
    may_grow: bool


def asked_here(name: str, cluster_id: str) -> Asked | None:
    """What the process says that has started nodes of this cluster, if there is one on this host."""
    try:
        said = ask(name, {"do": "nodes"}, ANSWER_S)
    except ZmqschedError:
        return None
    # A cluster on another host may have the name of one here.
    return Asked(said["nodes"], said["may_grow"]) if said["cluster_id"] == cluster_id else None


def wait_for_nodes(
    number: int, timeout: float | None, nodes: Callable[[], Iterable[NodeInfo]], asked: Callable[[], Asked | None]
) -> None:
    """Return when so many nodes are alive. ``nodes``: what the broker says; ``asked``: what the launching process says, None
    if there is none here.

    Raises
    ------
    TimeoutError
        They are not, after ``timeout`` seconds: says what is there, and of each missing node its state and reason.
    StartError
        So many nodes cannot come any more, for some have failed; their own words say why.
    """
    if isinstance(number, bool) or not isinstance(number, int) or number < 0:
        raise ValueError(f"n is a number of nodes, not {number!r}")
    _check_timeout(timeout)
    until = math.inf if timeout is None else time.monotonic() + timeout
    while True:
        launched = asked()  # before the broker is asked: who has failed by now has not joined later
        alive = [node for node in nodes() if node.state == "alive"]
        if len(alive) >= number:
            return
        if launched is not None and _out_of_reach(number, alive, launched):
            raise StartError(f"{_so_many(number, alive)}, and no more can come{_told(alive, launched.nodes)}")
        if (rest := until - time.monotonic()) <= 0:
            missing = _told(alive, launched.nodes) if launched else ""
            raise TimeoutError(f"{_so_many(number, alive)} after {timeout:g} s{missing}")
        time.sleep(min(LOOK_EVERY_S, rest))


def wait_until_left(
    name: str, timeout: float | None, nodes: Callable[[], Iterable[NodeInfo]], told: Callable[[NodeInfo], object]
) -> None:
    """Return when this node, named by its id or label, has left. ``nodes``: what the broker says; ``told`` is called with
    the node each time it was looked at and is still there.

    Raises
    ------
    TimeoutError
        It has not, after ``timeout`` seconds; says how many tasks it has.
    CommandFailed
        There is no such node, or it was lost.
    """
    _check_timeout(timeout)
    until = math.inf if timeout is None else time.monotonic() + timeout
    there = list(nodes())
    named = [one for one in there if one.id == name] or [one for one in there if name and one.label == name]
    if not named:
        raise CommandFailed(f"there is no node {name!r}")
    node, seen_at = _newest(named), time.monotonic()
    while node.state != "gone" and (now := time.monotonic()) - seen_at < UNKNOWN_S:
        if node.state == "lost":
            raise CommandFailed(f"node {name} was lost before it left: what it had not finished runs elsewhere")
        told(node)
        if now >= until:
            raise TimeoutError(f"node {name} has not left after {timeout:g} s: {counted(node.assigned, 'task')} to finish")
        time.sleep(min(LOOK_EVERY_S, until - now))
        # Its id is another if it has lost its broker meanwhile.
        if same := [one for one in nodes() if (one.host, one.pid) == (node.host, node.pid)]:
            node, seen_at = _newest(same), time.monotonic()


def _newest(nodes: Iterable[NodeInfo]) -> NodeInfo:
    """Of those that are there, if there are any."""
    return max(nodes, key=lambda node: (node.state not in ("lost", "gone"), int(node.id[1:])))


def _check_timeout(timeout: float | None) -> None:
    if timeout is not None and (isinstance(timeout, bool) or not isinstance(timeout, int | float) or not timeout >= 0):
        raise ValueError(f"timeout is None or a number of seconds, not {timeout!r}")


def _out_of_reach(number: int, alive: list[NodeInfo], launched: Asked) -> bool:
    joined = {node.label for node in alive}
    coming = [one for one in launched.nodes if one["state"] != "ended" and one["label"] not in joined]
    failed = any(one["state"] == "ended" and one["why"] for one in launched.nodes)
    return failed and not launched.may_grow and len(alive) + len(coming) < number


def _so_many(number: int, alive: list[NodeInfo]) -> str:
    return f"{len(alive)} of {counted(number, 'node')} there"


def _told(alive: list[NodeInfo], launched: Iterable[Mapping[str, Any]]) -> str:
    """Of each that is missing its state and reason, on lines of their own."""
    joined = {node.label for node in alive}
    lines = []
    for one in launched:
        if one["label"] not in joined:
            where = f" ({one['where']})" if one["where"] else ""
            why = f": {one['why']}" if one["why"] else ""
            lines.append(f"{one['label']}{where} {one['state']}{why}".replace("\n", "\n    "))
    return "\n  ".join([":", *lines]) if lines else ""
