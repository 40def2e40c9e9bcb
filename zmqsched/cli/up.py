"""``up``: start a cluster, and stay until it is to end."""

from __future__ import annotations

import os
import select
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NoReturn

import click

from ..cluster import START_TIMEOUT_S, Cluster, broker_preview
from ..clusterfile import ClusterFile, NodeGroup
from ..config import CONNECTION_FILE, DEFAULT_CLUSTER, ConnectionFile, cluster_dir
from ..core.policy import DEFAULT_POLICY, POLICIES
from ..display import counted
from ..errors import ZmqschedError
from ..host import usable_cpus
from ..hostlist import hosts_of
from ..launch import find_launcher
from ..launch.base import Launched, Site
from ..options import resource_argument, size_argument
from ..shell import Starter, StopSignals
from .background import start_detached
from .names import log_path, path_of, remove_own_log
from .progress import Progress
from .reading import duration, read
from .wanted import WORKERS_OF_JOB, Options, load, of_options

MAX_COUNT = 10_000
# What an ssh that hangs may take, besides what each process has.
ELSEWHERE_S = 60.0


def _count(ctx: click.Context, parameter: click.Parameter, number: int | None) -> int | None:
    """As click.IntRange would, but for what that adds to the help."""
    if number is not None and not 1 <= number <= MAX_COUNT:
        raise click.BadParameter(f"{number} is not between 1 and {MAX_COUNT}", ctx, parameter)
    return number


def _listen(ctx: click.Context, _: click.Parameter, text: str | None) -> str | None:
    if text is not None:
        from ..sockets import listen_addresses  # ZeroMQ is loaded for those who need it

        try:
            listen_addresses(text, any_interface=ctx.params["insecure_any_interface"])
        except ValueError as error:
            raise click.UsageError(str(error), ctx) from None
    return text


def _resources(ctx: click.Context, parameter: click.Parameter, texts: tuple[str, ...]) -> tuple[tuple[str, float], ...]:
    return tuple(read(resource_argument, text, ctx, parameter) for text in texts)


def _size(ctx: click.Context, parameter: click.Parameter, text: str | None) -> int | None:
    return None if text is None else read(size_argument, text, ctx, parameter)


def _hosts(ctx: click.Context, parameter: click.Parameter, text: str | None) -> tuple[str, ...] | None:
    return None if text is None else read(hosts_of, text, ctx, parameter)


# What a file says itself.
OF_NODES = {
    "workers": "-n", "nodes": "--nodes", "ssh": "--ssh", "slurm": "--slurm", "time": "--time", "python": "--python",
    "prologue": "--prologue", "resources": "--resource", "tags": "--tag", "broker_host": "--broker-host",
}  # fmt: skip


@click.command(options_metavar="[OPTIONS]")
@click.argument("words", nargs=-1, metavar="[FILE] [-- SBATCH ARGS]")
@click.option(
    "-n", "--workers", type=int, callback=_count, metavar="N",
    help="Workers in all; with --ssh of each host.  [default: one for each CPU]",
)  # fmt: skip
@click.option("--name", metavar="NAME", help=f"To find the cluster by.  [default: {DEFAULT_CLUSTER}]")
@click.option(
    "--nodes", type=int, callback=_count, metavar="K",
    help=f"Spread them over K nodes.  [default: 1; with --slurm one for {WORKERS_OF_JOB} workers]",
)  # fmt: skip
@click.option("--ssh", metavar="HOSTS", callback=_hosts, help="Nodes on these hosts: host1,host2,gpu[1-4].")
@click.option("--broker-host", metavar="HOST", help="The broker runs there, over ssh.  [default: here]")
@click.option("--slurm", is_flag=True, help="Nodes in a job of Slurm; what follows -- goes to sbatch.")
@click.option("--time", metavar="TIME", callback=duration, help="How long a job may last: 30m, 1h, 1-12:00:00.")
@click.option("--python", metavar="PATH", help="The interpreter of the nodes.  [default: this one, or theirs with zmqsched]")
@click.option(
    "--prologue", multiple=True, metavar="LINE", help="For the shell, before a node or a broker elsewhere; may be repeated."
)
@click.option("--policy", type=click.Choice(sorted(POLICIES)), help=f"Which node gets a task.  [default: {DEFAULT_POLICY}]")
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
    "--insecure-any-interface", is_flag=True, is_eager=True,
    help="Let --listen 0.0.0.0 (or ::) mean every address of this host: all its networks can try to get in.",
)
@click.option(
    "--max-queued", metavar="SIZE", callback=_size,
    help="What the broker holds of tasks and results (500M, 2G) before clients wait.  [default: a quarter of the memory]",
)  # fmt: skip
@click.option(
    "--journal", metavar="FILE",
    help="Keep tasks and answers there, for when the broker dies.  [default: in your state directory]",
)  # fmt: skip
@click.option("--no-journal", "journal", flag_value="", help="Keep them in memory alone.")
@click.option("--dry-run", is_flag=True, help="Print what would be run, and start nothing.")
@click.option("--wait", is_flag=True, help="It is ready when all nodes are there, also those that wait in a queue.")
@click.option("--detach", is_flag=True, help="Return when it is ready; it runs on in the background.")
def up(
    words: tuple[str, ...],
    dry_run: bool,
    wait: bool,
    detach: bool,
    **given: Any,
) -> int:
    """Start a cluster, and stay until Ctrl-C: on this machine, or what FILE (cluster.toml), --ssh or --slurm say.

    A file says which nodes there are, so options for these do not go with one; other options change what it says.
    """
    wanted = _wanted(words, Options(**given))
    if dry_run:
        print("\n".join(_preview(wanted)))
        return 0
    if detach:
        return _up_detached(wanted, wait=wait)
    return _stay_up(wanted, Starter(None), wait=wait)


def _wanted(words: tuple[str, ...], options: Options) -> ClusterFile:
    if options.ssh and options.slurm:
        raise click.UsageError("give --ssh or --slurm; for both write a file: zmqsched config init")
    if options.ssh and options.nodes:
        raise click.UsageError("--nodes does not go with --ssh: there is one on each host")
    if options.time is not None and not options.slurm:
        raise click.UsageError("--time goes with --slurm")
    if options.slurm:
        if words and not words[0].startswith("-"):
            raise click.UsageError(
                f"{words[0]!r} is neither an option nor behind a --: a file says itself where its nodes are"
            )
        return _checked(options, words)
    if len(words) > 1:
        raise click.UsageError(f"got unexpected extra arguments ({' '.join(words[1:])}); what follows -- goes with --slurm")
    if not words:
        return _checked(options)
    for name, option in OF_NODES.items():
        if getattr(options, name) not in (None, (), False):
            raise click.UsageError(f"{option} does not go with a file: {words[0]} says which nodes there are")
    return _checked(options, file=load(words[0]))


def _checked(options: Options, sbatch: tuple[str, ...] = (), file: ClusterFile | None = None) -> ClusterFile:
    try:
        return of_options(options, sbatch, file)
    except ValueError as error:
        if isinstance(error, ZmqschedError):
            raise
        raise click.UsageError(str(error)) from None


def _preview(wanted: ClusterFile) -> list[str]:
    directory = cluster_dir(wanted.name)
    site = Site(directory / CONNECTION_FILE, directory)
    lines = broker_preview(wanted)
    for group in wanted.nodes:
        launcher = find_launcher(group.launcher)(group, site)
        try:
            workers = f"{counted(_slots(group), 'worker')} on each" if _slots(group) else "a worker for each CPU"
            lines += ["", f"# {counted(group.size, 'node')} of group {group.name}, {workers}"]
            lines += launcher.preview([f"{group.name}-{number}" for number in range(1, group.size + 1)])
        finally:
            launcher.close()
    return lines


def _stay_up(wanted: ClusterFile, starter: Starter, *, wait: bool, detached: bool = False) -> int:
    try:
        return _run(wanted, starter, wait=wait, detached=detached)
    except ZmqschedError as error:
        return starter.failed(error)


def _run(wanted: ClusterFile, starter: Starter, *, wait: bool, detached: bool) -> int:
    signal.signal(signal.SIGTERM, _interrupt)
    sure = sum(group.size for group in wanted.nodes if not group.scale)  # who adapts tries again
    least = sure if wait else 1
    with Progress() as progress, Cluster(wanted, min_nodes=least, echo=True, told=progress.tell) as cluster:
        if wait:
            cluster.wait_for_nodes(sum(group.size for group in wanted.nodes))
        stop = StopSignals(until_eof=False)  # from here on nothing is interrupted, the clean-up least of all
        cluster._changed = stop.wake
        nodes = [replace(one, state="running") if wait else one for one in cluster.nodes()]  # its queue may say so later
        greeting = _greeting(wanted, cluster.file, nodes)
        if not detached:
            print("\n".join(greeting), flush=True)
        starter.ready({"pid": os.getpid(), "file": str(path_of(cluster.file)), "greeting": greeting})
        why = _watch(cluster, stop)
    if why.startswith(("killed", "exit code")):  # the log stays: now it is wanted
        print(f"zmqsched: the broker of cluster {wanted.name} died ({why}); the cluster is gone", file=sys.stderr)
        return 1
    remove_own_log(wanted.name)
    print(f"cluster {wanted.name} is stopped ({why})")
    return 0


def _interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def _greeting(wanted: ClusterFile, file: ConnectionFile, nodes: Sequence[Launched]) -> list[str]:
    slots = {group.name: _slots(group) for group in wanted.nodes}
    here = [slots[one.label.rpartition("-")[0]] for one in nodes if one.state == "running"]
    coming = sum(one.state in ("pending", "starting") for one in nodes)
    lines = [
        f"cluster {wanted.name} is up: {_so_many(here)}" + (f", {coming} to come" if coming else ""),
        f'  use it:    zmqsched.Client("{wanted.name}")',
        f"  stop it:   zmqsched down {wanted.name}",
    ]
    if wanted.broker.listen:
        lines.append(f"  add to it: zmqsched node --connect {path_of(file)}")
    return lines


def _so_many(workers: Sequence[int]) -> str:
    """Of each node; 0 where only the node knows."""
    nodes = counted(len(workers), "node")
    return f"{counted(sum(workers), 'worker')} on {nodes}" if workers and all(workers) else nodes


def _slots(group: NodeGroup) -> int:
    return group.slots or (usable_cpus() if group.launcher == "local" else 0)


def _watch(cluster: Cluster, stop: StopSignals) -> str:
    """Until the cluster is to end: a signal's name, or how the broker ended."""
    while not (how := cluster.broker_death):
        for descriptor in select.select(stop.descriptors, [], [])[0]:
            if why := stop.read(descriptor):
                return why
    return "zmqsched down" if how == "exit code 0" else how


def _up_detached(wanted: ClusterFile, *, wait: bool) -> int:
    # It has a limit of its own for each process it starts; this one is for a machine that does not even start it.
    timeout_s = None if wait else START_TIMEOUT_S * (2 + sum(group.size for group in wanted.nodes)) + ELSEWHERE_S
    facts = start_detached(wanted.name, partial(_stay_up, wanted, wait=wait, detached=True), timeout_s)
    print("\n".join(facts["greeting"]))
    print(f"  log:       {log_path(wanted.name)}")
    return 0
