"""``up``: start a cluster, and stay until it is to end."""

from __future__ import annotations

import os
import select
import signal
import sys
from dataclasses import dataclass
from typing import Any, NoReturn

import click

from ..cluster import START_TIMEOUT_S, LocalCluster
from ..config import DEFAULT_CLUSTER, ConnectionFile
from ..core.policy import DEFAULT_POLICY, POLICIES
from ..errors import ZmqschedError
from ..host import usable_cpus
from ..options import resource_argument, size_argument
from ..shell import Starter, StopSignals
from .background import start_detached
from .names import log_path, path_of, remove_own_log

MAX_COUNT = 10_000


@dataclass(frozen=True)
class _Wanted:
    """What ``up`` was asked for."""

    name: str
    workers: int
    nodes: int
    policy: str
    resources: dict[str, float]
    tags: tuple[str, ...]
    listen: str | None
    max_queued: int | None
    journal: str | None

    @property
    def keeps_journal(self) -> bool | str:
        """As LocalCluster takes it. No word of it is the usual place, an empty one none."""
        return True if self.journal is None else self.journal or False


def _count(ctx: click.Context, parameter: click.Parameter, number: int | None) -> int | None:
    """As click.IntRange would, but for what that adds to the help."""
    if number is not None and not 1 <= number <= MAX_COUNT:
        raise click.BadParameter(f"{number} is not between 1 and {MAX_COUNT}", ctx, parameter)
    return number


def _listen(ctx: click.Context, _: click.Parameter, text: str | None) -> str | None:
    if text is not None:
        from ..sockets import listen_address  # ZeroMQ is loaded for those who need it

        try:
            listen_address(text)
        except ValueError as error:
            raise click.UsageError(str(error), ctx) from None
    return text


def _resources(ctx: click.Context, parameter: click.Parameter, texts: tuple[str, ...]) -> dict[str, float]:
    try:
        return dict(resource_argument(text) for text in texts)
    except ValueError as error:
        raise click.BadParameter(str(error), ctx, parameter) from None


def _size(ctx: click.Context, parameter: click.Parameter, text: str | None) -> int | None:
    try:
        return None if text is None else size_argument(text)
    except ValueError as error:
        raise click.BadParameter(str(error), ctx, parameter) from None


@click.command()
@click.option(
    "-n", "--workers", type=int, callback=_count, metavar="N",
    help="Workers in all.  [default: one for each CPU]",
)  # fmt: skip
@click.option("--name", default=DEFAULT_CLUSTER, show_default=True, help="To find the cluster by.")
@click.option(
    "--nodes", type=int, callback=_count, metavar="K", default=1, show_default=True,
    help="Spread them over K nodes.",
)  # fmt: skip
@click.option(
    "--policy", type=click.Choice(sorted(POLICIES)), default=DEFAULT_POLICY, show_default=True,
    help="Which node gets a task.",
)  # fmt: skip
@click.option(
    "--resource", "resources", multiple=True, metavar="NAME=AMOUNT", callback=_resources,
    help="What each node offers to tasks that ask for it; may be repeated.",
)  # fmt: skip
@click.option("--tag", "tags", multiple=True, metavar="TAG", help="A tag of each node; may be repeated.")
@click.option(
    "--listen", is_flag=False, flag_value="", metavar="[ADDRESS[:PORT]]", callback=_listen,
    help="Use TCP, encrypted, so that other hosts can join; without an address on loopback.",
)  # fmt: skip
@click.option(
    "--max-queued", metavar="SIZE", callback=_size,
    help="What the broker holds of tasks and results (500M, 2G) before clients wait.  [default: a quarter of the memory]",
)  # fmt: skip
@click.option(
    "--journal", metavar="FILE",
    help="Keep tasks and answers there, for when the broker dies.  [default: in your state directory]",
)  # fmt: skip
@click.option("--no-journal", "journal", flag_value="", help="Keep them in memory alone.")
@click.option("--detach", is_flag=True, help="Return when it is ready; it runs on in the background.")
@click.option("--ready-fd", type=int, hidden=True)
def up(workers: int | None, nodes: int, detach: bool, ready_fd: int | None, **settings: Any) -> int:
    """Start a cluster on this machine, and stay until Ctrl-C."""
    workers = usable_cpus() if workers is None else workers
    if nodes > workers:
        raise click.UsageError(f"{nodes} nodes need at least as many workers, not {workers}: give -n {nodes} or more")
    wanted = _Wanted(workers=workers, nodes=nodes, **settings)
    if detach:
        return _up_detached(wanted)
    starter = Starter(ready_fd)
    try:
        return _stay_up(wanted, starter)
    except ZmqschedError as error:
        return starter.failed(error)


def _stay_up(wanted: _Wanted, starter: Starter) -> int:
    signal.signal(signal.SIGTERM, _interrupt)
    with LocalCluster(
        wanted.workers, name=wanted.name, n_nodes=wanted.nodes, policy=wanted.policy, resources=wanted.resources,
        tags=wanted.tags, listen=wanted.listen, journal=wanted.keeps_journal, max_queued=wanted.max_queued, echo=True,
    ) as cluster:  # fmt: skip
        stop = StopSignals(until_eof=False)  # from here on nothing is interrupted, the clean-up least of all
        cluster._changed = stop.wake
        _greet(wanted, cluster.file)
        starter.ready({"pid": os.getpid(), "file": str(path_of(cluster.file))})
        why = _watch(cluster, stop)
    if why.startswith(("killed", "exit code")):  # the log stays: now it is wanted
        print(f"zmqsched: the broker of cluster {wanted.name} died ({why}); the cluster is gone", file=sys.stderr)
        return 1
    remove_own_log(wanted.name)
    print(f"cluster {wanted.name} is stopped ({why})")
    return 0


def _up_detached(wanted: _Wanted) -> int:
    # It has a limit of its own for each process it starts; this one is for a machine that does not even start it.
    file = start_detached(wanted.name, _arguments(wanted), START_TIMEOUT_S * (2 + wanted.nodes))
    _greet(wanted, file)
    print(f"  log:       {log_path(wanted.name)}")
    return 0


def _arguments(wanted: _Wanted) -> list[str]:
    """The command line that ``wanted`` was read from."""
    arguments = ["up", f"-n{wanted.workers}", f"--nodes={wanted.nodes}", f"--policy={wanted.policy}"]
    arguments += [f"--resource={name}={amount}" for name, amount in wanted.resources.items()]
    arguments += [f"--tag={tag}" for tag in wanted.tags]
    if wanted.journal is not None:
        arguments.append(f"--journal={wanted.journal}" if wanted.journal else "--no-journal")
    if wanted.listen is not None:  # bare, it would take a word that follows for its address
        arguments.append(f"--listen={wanted.listen}" if wanted.listen else "--listen")
    if wanted.max_queued is not None:
        arguments.append(f"--max-queued={wanted.max_queued}")
    return [*arguments, f"--name={wanted.name}"]


def _interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def _greet(wanted: _Wanted, file: ConnectionFile) -> None:
    nodes = "1 node" if wanted.nodes == 1 else f"{wanted.nodes} nodes"
    workers = "1 worker" if wanted.workers == 1 else f"{wanted.workers} workers"
    lines = [
        f"cluster {wanted.name} is up: {workers} on {nodes}",
        f'  use it:    zmqsched.Client("{wanted.name}")',
        f"  stop it:   zmqsched down {wanted.name}",
    ]
    if wanted.listen is not None:
        lines.append(f"  add to it: zmqsched node --connect {path_of(file)}")
    print("\n".join(lines), flush=True)


def _watch(cluster: LocalCluster, stop: StopSignals) -> str:
    """Until the cluster is to end: a signal's name, or how the broker ended."""
    while not (how := cluster.broker_death):
        for descriptor in select.select(stop.descriptors, [], [])[0]:
            if why := stop.read(descriptor):
                return why
    return "zmqsched down" if how == "exit code 0" else how
