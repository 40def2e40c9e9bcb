"""What ``up`` is asked for, as a cluster's file: read from one, or made of options; and checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from msgspec.structs import replace

from ..clusterfile import BatchPart, BrokerPart, ClusterFile, NodeGroup
from ..errors import ClusterFileError
from ..host import usable_cpus
from ..launch import launcher_names
from ..schema import among
from ..sockets import listen_addresses

# Hosts of so many CPUs there are at every site.
WORKERS_OF_JOB = 8


@dataclass(frozen=True)
class Options:
    """As they are given; None and () were not."""

    name: str | None = None
    workers: int | None = None
    nodes: int | None = None
    ssh: tuple[str, ...] | None = None
    broker_host: str | None = None
    slurm: bool = False
    time: float | None = None
    python: str | None = None
    prologue: tuple[str, ...] = ()
    policy: str | None = None
    resources: tuple[tuple[str, float], ...] = ()
    tags: tuple[str, ...] = ()
    listen: str | None = None
    insecure_any_interface: bool = False
    max_queued: int | None = None
    journal: str | None = None


def load(path: str | Path) -> ClusterFile:
    """The file, with those names looked up that mean something here.

    Raises
    ------
    ClusterFileError
        Something is wrong with it.
    """
    file = ClusterFile.load(path)
    if problems := _problems(file):
        raise ClusterFileError(*(f"{path}: {problem}" for problem in problems))
    return file


def of_options(options: Options, sbatch: Sequence[str] = (), file: ClusterFile | None = None) -> ClusterFile:
    """What the options ask for; with a file, what they change of it.

    Raises
    ------
    ClusterFileError, ValueError
        That cannot be.
    """
    if file is None:
        file = ClusterFile(broker=_broker(options), nodes=tuple(_groups(options, sbatch)))
    given = {"policy": options.policy, "max_queued": options.max_queued}
    broker = replace(file.broker, **{key: value for key, value in given.items() if value is not None})
    if options.listen is not None:
        broker = replace(broker, listen=(options.listen,))
    if options.insecure_any_interface:
        broker = replace(broker, insecure_any_interface=True)
    if options.journal is not None:  # an empty one is none
        broker = replace(broker, journal=options.journal or False)
    return replace(file, name=options.name or file.name, broker=broker).checked()


def _broker(options: Options) -> BrokerPart:
    """The hosts of a site are alike."""
    if not options.broker_host:
        return BrokerPart()
    return BrokerPart(host=options.broker_host, prologue=options.prologue, python=options.python or "")


def _groups(options: Options, sbatch: Sequence[str]) -> list[NodeGroup]:
    common = NodeGroup(
        resources=dict(options.resources), tags=options.tags, prologue=options.prologue, python=options.python or ""
    )
    if options.ssh is not None:
        return [replace(common, name="ssh", launcher="ssh", hosts=options.ssh, slots=options.workers or 0)]
    if options.slurm:
        batch = BatchPart(time=options.time or 0.0, options=tuple(sbatch))
        nodes = options.nodes or -(-(options.workers or 1) // WORKERS_OF_JOB)
        if options.workers is None:  # as many as each host of the job gives it
            return [replace(common, name="slurm", launcher="slurm", batch=replace(batch, nodes=nodes))]
        return [
            replace(common, name=name, launcher="slurm", slots=slots, batch=replace(batch, nodes=count))
            for name, count, slots in _divided("slurm", options.workers, nodes)
        ]
    workers = usable_cpus() if options.workers is None else options.workers
    return [
        replace(common, name=name, count=count, slots=slots)
        for name, count, slots in _divided("local", workers, options.nodes or 1)
    ]


def _divided(name: str, workers: int, nodes: int) -> list[tuple[str, int, int]]:
    """Groups of nodes: name, how many, workers of each. Where they cannot be divided evenly, some nodes have one more."""
    if nodes > workers:
        raise ValueError(f"{nodes} nodes need at least as many workers, not {workers}: give -n {nodes} or more")
    slots, more = divmod(workers, nodes)
    return [(name, nodes - more, slots), *([(f"{name}-plus", more, slots + 1)] if more else [])]


def _problems(file: ClusterFile) -> list[str]:
    names = launcher_names()
    problems = [
        f"nodes[{index}].launcher: there is no launcher {group.launcher!r}; {among(names, group.launcher)}"
        for index, group in enumerate(file.nodes)
        if group.launcher not in names
    ]
    for index, address in enumerate(file.broker.listen):
        try:
            listen_addresses(address, any_interface=file.broker.insecure_any_interface)
        except ValueError as error:
            problems.append(f"broker.listen[{index}]: {str(error).removeprefix('--listen ')}")
    return problems
