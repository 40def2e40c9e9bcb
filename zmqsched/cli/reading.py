"""What several commands read from their command lines."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import click

from ..config import find_cluster
from ..options import duration_argument, seconds

T = TypeVar("T")


def read(reads: Callable[[str], T], text: str, ctx: click.Context, parameter: click.Parameter) -> T:
    try:
        return reads(text)
    except ValueError as error:
        raise click.BadParameter(str(error), ctx, parameter) from None


def duration(ctx: click.Context, parameter: click.Parameter, text: str | None) -> float | None:
    return None if text is None else read(duration_argument, text, ctx, parameter)


def some_seconds(ctx: click.Context, parameter: click.Parameter, text: str | None) -> float | None:
    """Where nothing but seconds can be meant by a bare number."""
    return None if text is None else read(_seconds, text, ctx, parameter)


def _seconds(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        return duration_argument(text)
    return seconds("it", number)


def name_of(name: str | None) -> str:
    """The name of a cluster that runs.

    Raises
    ------
    ClusterNotFound, ConnectionFileError
        There is none.
    """
    return find_cluster(name).name


by_name = click.option("--name", metavar="NAME", help="The cluster.  [default: as for all commands]")
