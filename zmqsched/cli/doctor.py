"""``doctor``: what keeps a cluster from working, here or on the way to other hosts."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import click
import msgspec

from ..config import ConnectionFile, find_cluster
from ..display import Table
from ..errors import ClusterNotFound
from ..hostlist import hosts_of
from .tables import as_json, print_json, print_table

if TYPE_CHECKING:
    from ..doctor import Finding

HERE = "here"
AT_ONCE = 16


@click.command()
@click.argument("hosts", nargs=-1)
@click.option("--name", metavar="NAME", help="The cluster whose broker the hosts are to reach.  [default: one that runs]")
@click.option("--python", default="", metavar="PATH", help="The interpreter there.  [default: the first with zmqsched]")
@click.option("--ssh-option", "ssh_options", multiple=True, metavar="WORD", help="A word for ssh; may be repeated.")
@click.option("--reach", multiple=True, hidden=True)
@as_json
def doctor(
    hosts: tuple[str, ...], name: str | None, python: str, ssh_options: tuple[str, ...], reach: tuple[str, ...], output: str
) -> int:
    """Look at this machine, or at the way to HOSTS (host1,gpu[1-4]) and back, and say what to do.

    Each step is ok, slow, or failed. With HOSTS it goes as ssh goes, without asking anything: resolve the name, reach the
    port, authenticate, the same versions, the clock, what the host allows, how fast it encrypts, whether it reaches the
    broker. The exit code is 1 if something failed.
    """
    from .. import doctor as here

    if reach:  # another host's doctor asks
        findings = [*here.look_at_host(), *([here.reaches(reach)] if any(reach) else [])]
        print(msgspec.json.encode({"findings": findings}).decode())
        return 0
    found = _hosts(hosts, name, python, ssh_options) if hosts else {HERE: list(here.look_here())}
    if output == "json":
        records = [{"host": host, **msgspec.to_builtins(one)} for host, findings in found.items() for one in findings]
        print_json(records)
    else:
        _print(found)
    return int(any(one.state == "failed" for findings in found.values() for one in findings))


def _hosts(texts: Iterable[str], name: str | None, python: str, ssh_options: tuple[str, ...]) -> dict[str, list[Finding]]:
    from ..hops import Hop, look_at

    try:
        hosts = hosts_of(",".join(texts))
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    cluster = _cluster(name)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        hops = [Hop(host, ssh_options, python) for host in hosts]
        return dict(zip(hosts, pool.map(lambda hop: list(look_at(hop, cluster)), hops), strict=True))


def _cluster(name: str | None) -> ConnectionFile | None:
    try:
        return find_cluster(name)
    except ClusterNotFound:
        if name is not None:
            raise
    return None


def _print(found: dict[str, list[Finding]]) -> None:
    for host, findings in found.items():
        print(f"{host}:" if host != HERE else "this machine:")
        print_table(Table(("step", "", "found"), [(one.hop, one.state, one.found) for one in findings]))
        for one in findings:
            if one.fix:
                print(f"{one.hop}: {one.fix}" if one.state == "ok" else f"{one.hop} {one.state}: {one.fix}")
        print()
