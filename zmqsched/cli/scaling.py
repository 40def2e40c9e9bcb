"""``scale`` and ``adapt``: how many nodes there are to be."""

from __future__ import annotations

import re
from typing import Any

import click

from ..display import counted
from .reading import name_of
from .tables import as_json, print_json

_NUMBER = r"\d{1,9}"


@click.command()
@click.argument("wish", metavar="GROUP=N")
@click.argument("name", required=False)
@as_json
def scale(wish: str, name: str | None, output: str) -> None:
    """Have N nodes in a group of a cluster from now on. Idle ones go before others, and all finish their tasks."""
    group, (number,) = _wish(wish, "GROUP=N", rf"({_NUMBER})")
    _ask(name, {"do": "scale", "group": group, "n": number}, counted(number, "node"), output)


@click.command()
@click.argument("wish", metavar="GROUP=MIN:MAX")
@click.argument("name", required=False)
@as_json
def adapt(wish: str, name: str | None, output: str) -> None:
    """Keep a group between MIN and MAX nodes from now on, by what is queued and who is idle."""
    group, (least, most) = _wish(wish, "GROUP=MIN:MAX", rf"({_NUMBER}):({_NUMBER})")
    _ask(name, {"do": "adapt", "group": group, "min": least, "max": most}, f"{least} to {counted(most, 'node')}", output)


def _wish(text: str, form: str, numbers: str) -> tuple[str, list[int]]:
    match = re.fullmatch(rf"([^=]+)={numbers}", text, re.ASCII)
    if match is None:
        raise click.UsageError(f"{text[:60]!r} is not {form}, as in {'ssh=0:16' if ':' in form else 'ssh=16'}")
    return match[1], [int(number) for number in match.groups()[1:]]


def _ask(name: str | None, request: dict[str, Any], range_: str, output: str) -> None:
    from ..control import ask

    cluster = name_of(name)
    ask(cluster, request)
    group = request["group"]
    nodes = [one for one in ask(cluster, {"do": "nodes"})["nodes"] if one["label"].rpartition("-")[0] == group]
    states = [one["state"] for one in nodes if one["state"] != "ended"]
    if output == "json":
        wanted = {key: value for key, value in request.items() if key != "do"}
        print_json({"cluster": cluster, **wanted, "nodes": nodes})
    else:
        now = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states)) or "none"
        print(f"group {group} of cluster {cluster}: {range_} from now on (now: {now})")
