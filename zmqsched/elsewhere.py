"""Clusters whose nodes are elsewhere, each with one group of nodes: short for what a ``cluster.toml`` says at length."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Mapping

from msgspec.structs import replace

from .cluster import Cluster
from .clusterfile import BatchPart, BrokerPart, ClusterFile, NodeGroup
from .options import duration_argument

_numbers = itertools.count(1)


class SSHCluster(Cluster):
    """A broker on this host, and a node on each of some others, started by the system's ``ssh``, as the user would log in
    there: keys, jump hosts and the like are said in ``~/.ssh/config``. Port 22 is all that is needed.

    Parameters
    ----------
    hosts
        Names as ``ssh`` takes them, in one text or several: ``["host1", "gpu[1-4]"]``.
    slots
        Workers of each node; 0 is one for each CPU that it may use.
    name
        To find the cluster by from other programs on this host, with ``Client(name)``; a made-up one by default.
    listen
        ``ADDRESS[:PORT]``, where the broker listens; by default the address of this host on the way to the others.
    resources, tags
        What each node offers besides its CPUs and memory, for tasks that ask for it.
    python
        The interpreter there; by default the first ``python3`` that has zmqsched, once ``prologue`` has run.
    env, cwd, prologue
        Variables, the working directory, and shell lines that run before the node does.
    ssh_options
        For ``ssh``, verbatim.
    min_nodes
        As for :class:`Cluster`.
    broker_host
        Where the broker is to run, by the same interpreter and with the same ``env``, ``prologue`` and ``ssh_options``; by
        default here.
    journal, echo
        As for :class:`LocalCluster`.

    Raises
    ------
    ClusterFileError
        An argument is off.
    ClusterExists
        A running cluster has that name.
    StartError
        Fewer than ``min_nodes`` nodes can start; their own words say why. Those that did not, while others did, are in
        ``failures``.
    """

    def __init__(
        self,
        hosts: str | Iterable[str],
        *,
        slots: int = 0,
        name: str | None = None,
        listen: str | None = None,
        resources: Mapping[str, float] | None = None,
        tags: Iterable[str] = (),
        python: str = "",
        env: Mapping[str, str] | None = None,
        cwd: str = "",
        prologue: Iterable[str] = (),
        ssh_options: Iterable[str] = (),
        min_nodes: int = 1,
        broker_host: str = "",
        journal: bool | str | None = None,
        echo: bool = False,
    ) -> None:
        group = NodeGroup(
            launcher="ssh", hosts=(hosts,) if isinstance(hosts, str) else tuple(hosts), slots=slots,
            resources=dict(resources or {}), tags=tuple(tags), python=python, env=dict(env or {}), cwd=cwd,
            prologue=tuple(prologue), ssh_options=tuple(ssh_options),
        )  # fmt: skip
        wanted = _of_one_group(group, name, listen, journal)
        if broker_host:
            broker = replace(
                wanted.broker, host=broker_host, python=python, env=group.env, prologue=group.prologue,
                ssh_options=group.ssh_options,
            )  # fmt: skip
            wanted = replace(wanted, broker=broker)
        super().__init__(wanted, min_nodes=min_nodes, echo=echo)


class SlurmCluster(Cluster):
    """A broker on this host, and nodes in jobs of Slurm. It is there when they are submitted; :meth:`Cluster.wait_for_nodes`
    waits for some of them, and says why they are not there yet.

    Parameters
    ----------
    nodes
        How many hosts to ask for, with a node on each.
    slots
        Workers of each node, and CPUs to ask for; 0 is as many as the site gives.
    time
        Seconds that each node may last, or ``"1h"``, ``"30m"``, ``"1-12:00:00"``; 0 is the site's default. Before they are
        over a node takes nothing that it could not finish.
    partition, account
        As ``sbatch`` takes them.
    array
        Submit a job for each node, as a job array, instead of one for all: those that can start need not wait for the rest.
    options
        For ``sbatch``, verbatim.
    name, listen, resources, tags, python, env, cwd, prologue, journal, echo
        As for :class:`SSHCluster`.

    Raises
    ------
    ClusterFileError
        An argument is off.
    ClusterExists
        A running cluster has that name.
    StartError
        Slurm did not take the jobs, and says why.
    """

    def __init__(
        self,
        nodes: int = 1,
        *,
        slots: int = 0,
        time: str | float = "1h",
        partition: str = "",
        account: str = "",
        array: bool = False,
        options: Iterable[str] = (),
        name: str | None = None,
        listen: str | None = None,
        resources: Mapping[str, float] | None = None,
        tags: Iterable[str] = (),
        python: str = "",
        env: Mapping[str, str] | None = None,
        cwd: str = "",
        prologue: Iterable[str] = (),
        journal: bool | str | None = None,
        echo: bool = False,
    ) -> None:
        batch = BatchPart(
            nodes=nodes, time=duration_argument(time) if isinstance(time, str) else time, partition=partition,
            account=account, array=array, options=tuple(options),
        )  # fmt: skip
        group = NodeGroup(
            launcher="slurm", slots=slots, resources=dict(resources or {}), tags=tuple(tags), python=python,
            env=dict(env or {}), cwd=cwd, prologue=tuple(prologue), batch=batch,
        )  # fmt: skip
        super().__init__(_of_one_group(group, name, listen, journal), echo=echo)


def _of_one_group(group: NodeGroup, name: str | None, listen: str | None, journal: bool | str | None) -> ClusterFile:
    """With a name it is to be found again, and so are its tasks, as with LocalCluster."""
    broker = BrokerPart(listen=() if listen is None else (listen,), journal=name is not None if journal is None else journal)
    return ClusterFile(name=name or f"{group.launcher}-{os.getpid()}-{next(_numbers)}", broker=broker, nodes=(group,))
