"""What a user wants of a cluster: ``cluster.toml`` read and checked, or the same built from a command line.

Rules
-----
* Every key is optional. One that is unknown or of the wrong type is an error that names its path (``nodes[1].slots``).
* Durations are seconds as a number, or text: ``"90s"``, ``"30m"``, ``"1h"``, ``"2d"``; sizes bytes as a number or
  ``"500M"``, ``"2G"``. Here they are seconds and bytes already.
* Nothing secret is in it: keys are made by the broker and never leave their own files.
"""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, Struct

from .config import DEFAULT_CLUSTER

Count = Annotated[int, Meta(ge=0, le=10_000)]
Text = Annotated[str, Meta(max_length=4096)]


class BrokerPart(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """``host``: where the broker runs, by the name that ``ssh`` takes; "" is here. ``listen``: the addresses to bind;
    none is Unix sockets, unless a group of nodes is elsewhere. ``port``: the first of three in a row, 0 any that are free.
    ``journal``: as LocalCluster takes it. ``idle_timeout``: the cluster ends when nothing has been asked of it for so many
    seconds; 0 is never. ``max_queued``: bytes; 0 is what the host has room for."""

    host: Text = ""
    listen: tuple[Text, ...] = ()
    port: Annotated[int, Meta(ge=0, le=65533)] = 0
    journal: bool | str = True
    idle_timeout: float = 0.0
    max_queued: int = 0
    policy: Text = "least-loaded"


class HeartbeatPart(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Seconds: how often a node beats, and how long it may be silent before it is lost."""

    interval: float = 1.0
    dead_after: float = 3.5


class TasksPart(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What tasks of this cluster's clients have unless they say otherwise, as ``Client.options`` takes it."""

    retries: Count = 0
    timeout: float = 0.0
    priority: int = 0
    requeue: bool = True


class Scale(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Between how many nodes the group is kept, by what is queued and how long nodes are idle."""

    min: Count = 0
    max: Count = 1


class BatchPart(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a batch system is asked for. ``nodes``: how many; ``time``: seconds that each may last, 0 is the site's default;
    ``array``: one job for each node, as a job array, instead of one job for all. ``options`` go verbatim to the site's
    submit command."""

    nodes: Count = 1
    time: float = 0.0
    partition: Text = ""
    account: Text = ""
    array: bool = False
    options: tuple[Text, ...] = ()


class NodeGroup(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Nodes of one kind, started by one launcher.

    ``name``: for ``zmqsched scale NAME=N`` and in the nodes' labels; the launcher's by default. ``hosts``: one node on each
    (more, in turn, when it is scaled beyond them). ``slots``: workers of each node; 0 is one for each CPU that it may use.
    ``count``: how many nodes; 0 is as many as ``hosts`` or ``batch.nodes``, else 1. ``prologue``: shell lines that run
    before the node. ``python``: the interpreter there; "" is this one for local nodes, else the first ``python3`` of the
    prologue's PATH that has zmqsched. ``ssh_options`` go verbatim to ``ssh``. ``memory_limit``: bytes that a worker may use;
    at ``memory_soft`` of it it is given no other task and is replaced when it is idle.
    """

    name: Text = ""
    launcher: Text = "local"
    hosts: tuple[Text, ...] = ()
    count: Count = 0
    slots: Count = 0
    resources: dict[str, float] = {}
    tags: tuple[Text, ...] = ()
    env: dict[str, str] = {}
    cwd: Text = ""
    prologue: tuple[Text, ...] = ()
    python: Text = ""
    ssh_options: tuple[Text, ...] = ()
    batch: BatchPart = BatchPart()
    max_tasks_per_worker: Count = 0
    memory_limit: int = 0
    memory_soft: Annotated[float, Meta(gt=0, le=1)] = 0.8
    scale: Scale | None = None


class ClusterFile(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The whole of it."""

    name: Text = DEFAULT_CLUSTER
    broker: BrokerPart = BrokerPart()
    heartbeat: HeartbeatPart = HeartbeatPart()
    tasks: TasksPart = TasksPart()
    nodes: tuple[NodeGroup, ...] = (NodeGroup(),)


State = Literal["pending", "starting", "running", "ended"]
