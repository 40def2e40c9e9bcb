"""``broker`` and ``node``, for the list of commands: __main__ takes these words before this package is loaded."""

from __future__ import annotations

from typing import Any

import click

from ..__main__ import main

_as_is: dict[str, Any] = {"ignore_unknown_options": True, "help_option_names": []}


@click.command(context_settings=_as_is)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def broker(arguments: tuple[str, ...]) -> int:
    """Run a cluster's broker by hand."""
    return main(["broker", *arguments])


@click.command(context_settings=_as_is)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def node(arguments: tuple[str, ...]) -> int:
    """Add this machine to a cluster: run a node."""
    return main(["node", *arguments])
