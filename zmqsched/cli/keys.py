"""``keys``: who may come in over TCP, and how that is changed."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import click

from ..config import ROLES, find_cluster
from ..display import Table
from .tables import as_json, print_json, print_table

GRACE_S = 3600.0
MAX_GRACE_S = 365 * 86400.0

_name = click.argument("name", required=False)
_roles = click.option(
    "--role", "roles", multiple=True, type=click.Choice(ROLES), help="Of this role; may be repeated.  [default: all]"
)


@click.group()
def keys() -> None:
    """Show, replace or revoke the keys of a cluster on TCP.

    Each role has one: admin (connection.json: everything), client, node and observer (CLUSTER'S DIRECTORY/ROLE.json). The
    broker's own key is replaced by ending the cluster and starting it anew.
    """


@keys.command()
@_name
@_roles
@as_json
def show(name: str | None, roles: tuple[str, ...], output: str) -> int:
    """Show which keys are good. Secrets are shown nowhere."""
    return _print(_change(name, "show", roles), roles, output)


@keys.command()
@_name
@_roles
@click.option(
    "--grace", type=click.FloatRange(0.0, MAX_GRACE_S), default=GRACE_S, show_default=True, metavar="SECONDS",
    help="How long the old keys stay good.",
)  # fmt: skip
@as_json
def rotate(name: str | None, roles: tuple[str, ...], grace: float, output: str) -> int:
    """Replace keys. Who is there now is given the new ones and goes on; files that were passed on must be passed on anew
    before the grace time is over."""
    return _print(_change(name, "rotate", roles, grace), roles, output)


@keys.command()
@_name
@_roles
@as_json
def revoke(name: str | None, roles: tuple[str, ...], output: str) -> int:
    """Replace keys that strangers may have: the old ones are good for nothing at once. Who came with one is cut off, its
    nodes' tasks are run elsewhere, and what its clients had submitted is given up."""
    return _print(_change(name, "revoke", roles), roles, output)


@dataclass(frozen=True)
class _Report:
    keys: list[dict[str, Any]]
    directory: str
    warning: str


def _change(name: str | None, action: str, roles: tuple[str, ...], grace_s: float = 0.0) -> _Report:
    from ..client import Client
    from ..protocol import ChangeKeys, KeyReport

    with Client(find_cluster(name)) as client:
        wanted: Any = list(roles or ROLES)
        told: KeyReport = client._ask(lambda request: ChangeKeys(request, action, wanted, grace_s))  # type: ignore[arg-type]
    found = [
        {"role": each.role, "number": each.number, "public": each.public, "good_for_s": each.left_s or None}
        for each in told.keys
    ]
    return _Report(found, told.directory, told.warning)


def _print(report: _Report, roles: tuple[str, ...], output: str) -> int:
    shown = [key for key in report.keys if key["role"] in (roles or ROLES)]
    if output == "json":
        print_json({"keys": shown, "directory": report.directory, "warning": report.warning})
    elif shown:
        rows = [
            (key["role"], key["number"], key["public"], f"{key['good_for_s']:.0f} s more" if key["good_for_s"] else "in use")
            for key in shown
        ]
        print_table(Table(("role", "number", "public key", "good"), rows))
        print(f"\nfiles: {report.directory}")
    if report.warning:
        print(f"zmqsched: {report.warning}", file=sys.stderr)
    return 1 if report.warning else 0
