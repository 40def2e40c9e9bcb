"""What a user wants of a cluster: ``cluster.toml`` read and checked, or the same built from a command line.

Rules
-----
* Every key is optional. One that is unknown or of the wrong type is an error that names its path (``nodes[1].slots``).
* Durations are seconds as a number, or text: ``"90s"``, ``"30m"``, ``"1h"``, ``"2d"``, ``"1h30m"``, or as Slurm writes them,
  ``"30:00"``, ``"1-12:00:00"``; sizes bytes as a number or ``"500M"``, ``"2G"``. Here they are seconds and bytes already.
* ``hosts`` may be one text: ``"host1,gpu[1-4]"``.
* Nothing secret is in it: keys are made by the broker and never leave their own files.
* :meth:`ClusterFile.checked` is the one place where it is decided what can be; what comes from a command line or from Python
  passes it too.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct, structs

from .config import DEFAULT_CLUSTER, check_name, this_host
from .core.policy import DEFAULT_POLICY, POLICIES
from .errors import ClusterFileError, ConnectionFileError
from .hostlist import MAX_HOSTS, hosts_of
from .options import amounts, duration_argument, short_name, size_argument
from .schema import MAX_PROBLEMS, among, cut, read, short

# Ten thousand hosts by name are 300 KB; a mistaken path to something huge should not be read whole.
MAX_FILE = 1024 * 1024
MAX_SECONDS = 10 * 365 * 86400.0
MAX_SLEEP_S = 3600.0

Count = Annotated[int, Meta(ge=0, le=10_000)]
Text = Annotated[str, Meta(max_length=4096)]
Seconds = Annotated[float, Meta(ge=0, le=MAX_SECONDS, extra={"reads": duration_argument})]
Bytes = Annotated[int, Meta(ge=0, le=1 << 60, extra={"reads": size_argument})]
Hosts = Annotated[tuple[str, ...], Meta(extra={"reads": hosts_of})]

MAX_DOTS = 16
# Strings and comments, in which dots mean nothing.
_OPAQUE = re.compile(
    r"""\"{3}(?:\\.|[^\\])*?(?:\"{3}|\Z) | '{3}.*?(?:'{3}|\Z) | "(?:\\.|[^"\\\n])*+"? | '[^'\n]*+'? | \#[^\n]*+""",
    re.DOTALL | re.VERBOSE,
)
_DOTTED = re.compile(r"[\w\-. \t]+")
# What becomes a part of a node's label, and so of a file's name.
_GROUP = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,39}")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


class BrokerPart(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """``host``: where it runs; "" is here, another than this one is reached by ``ssh``. For such a one ``python``, ``env``,
    ``prologue`` and ``ssh_options`` are what they are for a group of nodes, and a relative ``journal`` lies in the home
    directory there.
    ``listen``: the addresses to bind; none is Unix sockets, unless a group of nodes is elsewhere. ``port``: the first of
    three in a row, 0 any that are free. ``journal``: as LocalCluster takes it. ``idle_timeout``: the cluster ends when
    nothing has been asked of it for so many seconds; 0 is never. ``max_queued``: bytes; 0 is what the host has room for.
    ``insecure_any_interface``: ``listen`` may be 0.0.0.0 or ::, every address of the host."""

    host: Text = ""
    listen: tuple[Text, ...] = ()
    insecure_any_interface: bool = False
    port: Annotated[int, Meta(ge=0, le=65533)] = 0
    journal: bool | str = True
    idle_timeout: Seconds = 0.0
    max_queued: Bytes = 0
    policy: Text = DEFAULT_POLICY
    env: dict[str, str] = {}
    prologue: tuple[Text, ...] = ()
    python: Text = ""
    ssh_options: tuple[Text, ...] = ()

    @property
    def is_elsewhere(self) -> bool:
        return self.host not in ("", "localhost", this_host())


class HeartbeatPart(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Seconds: how often a node beats, and how long it may be silent before it is lost."""

    interval: Seconds = 1.0
    dead_after: Seconds = 3.5


class TasksPart(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What tasks of this cluster's clients have unless they say otherwise, as ``Client.options`` takes it."""

    retries: Count = 0
    timeout: Seconds = 0.0
    priority: Annotated[int, Meta(ge=-(2**31), le=2**31)] = 0
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
    time: Seconds = 0.0
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
    hosts: Hosts = ()
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
    memory_limit: Bytes = 0
    memory_soft: Annotated[float, Meta(gt=0, le=1)] = 0.8
    scale: Scale | None = None

    @property
    def size(self) -> int:
        """With how many nodes it starts: with ``scale`` as few as may be, unless ``count`` says how many."""
        if self.count:
            return self.count
        return self.scale.min if self.scale else len(self.hosts) or self.batch.nodes


class ClusterFile(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The whole of it."""

    name: Text = DEFAULT_CLUSTER
    broker: BrokerPart = BrokerPart()
    heartbeat: HeartbeatPart = HeartbeatPart()
    tasks: TasksPart = TasksPart()
    nodes: tuple[NodeGroup, ...] = (NodeGroup(),)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ClusterFile:
        """Read a TOML file.

        Raises
        ------
        ClusterFileError
            It cannot be read, or holds what cannot be: ``args`` are all the problems, each with its path.
        """
        return _checked(_toml(Path(path)), os.fspath(path))

    def checked(self) -> ClusterFile:
        """The same, with hosts listed one by one and each group named.

        Raises
        ------
        ClusterFileError
            Something of it cannot be; as for :meth:`load`.
        """
        try:
            data = msgspec.to_builtins(self)
        except TypeError as error:
            raise ClusterFileError(str(error)) from None
        return _checked(data, "")


State = Literal["pending", "starting", "running", "ended"]


def _toml(path: Path) -> dict[str, Any]:
    try:
        with open(path, "rb") as file:
            text = file.read(MAX_FILE + 1)
    except OSError as error:
        raise ClusterFileError(f"{path}: {(error.strerror or str(error)).lower()}") from None
    if len(text) > MAX_FILE:
        raise ClusterFileError(f"{path}: is larger than {MAX_FILE} bytes; is this the right file?")
    try:
        return _parsed(text.decode())
    except UnicodeDecodeError as error:
        raise ClusterFileError(f"{path}: is not UTF-8 text (byte {error.start}); is this the right file?") from None
    except ValueError as error:
        raise ClusterFileError(f"{path}: is not TOML: {cut(str(error), 200)}") from None
    except RecursionError:
        raise ClusterFileError(f"{path}: is nested too deeply") from None


def _parsed(text: str) -> dict[str, Any]:
    # tomllib keeps each beginning of a dotted key: one of 600 KB takes gigabytes.
    for run in _DOTTED.findall(_OPAQUE.sub("s", text)):
        if run.count(".") > MAX_DOTS:
            raise ValueError(f"a key of {run.count('.') + 1} parts: {cut(run.strip(), 60)}")
    return tomllib.loads(text)


def _checked(data: dict[str, Any], source: str) -> ClusterFile:
    file, problems = read(data, ClusterFile)
    if file is not None:
        problems = list(islice(_problems(file), MAX_PROBLEMS))
        if not problems:
            return structs.replace(file, nodes=tuple(_complete(group) for group in file.nodes))
    raise ClusterFileError(*(f"{source}: {problem}" if source else problem for problem in problems))


def _complete(group: NodeGroup) -> NodeGroup:
    return structs.replace(group, name=group.name or group.launcher, hosts=_hosts(group.hosts))


def _hosts(texts: tuple[str, ...]) -> tuple[str, ...]:
    return hosts_of(",".join(texts)) if texts else ()


# --- what the types do not say: each problem with its path --------------------------------------------------------------


def _problems(file: ClusterFile) -> Iterator[str]:
    yield from _said("name", check_name, file.name)
    yield from _problems_of_broker(file.broker)
    if not 0 < file.heartbeat.interval <= MAX_SLEEP_S:
        yield f"heartbeat.interval: must be above 0 and at most {MAX_SLEEP_S:.0f} s, not {file.heartbeat.interval:g}"
    elif file.heartbeat.dead_after < 3 * file.heartbeat.interval:
        beat, dead = file.heartbeat.interval, file.heartbeat.dead_after
        yield f"heartbeat.dead_after: must be at least three times heartbeat.interval ({beat:g} s), not {dead:g}"
    names: dict[str, str] = {}
    for index, group in enumerate(file.nodes):
        path = f"nodes[{index}]"
        name = group.name or group.launcher
        if name in names:
            yield f"{path}.name: {names[name]} is called {short(name)} already; give each group a name"
        names.setdefault(name, path)
        for problem in _problems_of_group(group):
            yield f"{path}.{problem}"
    if sum(group.size for group in file.nodes) > MAX_HOSTS:
        yield f"nodes: are more than {MAX_HOSTS} in all"


def _problems_of_broker(broker: BrokerPart) -> Iterator[str]:
    if broker.host:
        yield from _said("broker.host", _one_host, broker.host)
    if broker.policy not in POLICIES:
        yield f"broker.policy: there is no policy {short(broker.policy)}; {among(list(POLICIES), broker.policy)}"
    if isinstance(broker.journal, str) and "\0" in broker.journal:
        yield "broker.journal: is not a path"
    yield from (f"broker.{problem}" for problem in _problems_of_shell(broker, ("python", "prologue", "ssh_options")))
    for key in ("env", "prologue", "python", "ssh_options"):
        if getattr(broker, key) and not broker.host:
            yield f"broker.{key}: is for a broker on another host; say which (broker.host), or leave it out"


def _problems_of_group(group: NodeGroup) -> Iterator[str]:
    name = group.name or group.launcher
    if not _GROUP.fullmatch(name):
        yield f"name: {short(name)} cannot name a group: use 1 to 40 letters, digits, '.', '_' or '-'"
    yield from _problems_of_launcher(group)
    yield from _said("resources", amounts, group.resources)
    for index, tag in enumerate(group.tags):
        yield from _said(f"tags[{index}]", short_name, tag)
    yield from _problems_of_shell(group, ("cwd", "python", "prologue", "ssh_options"))
    if group.scale:
        if group.scale.min > group.scale.max:
            yield f"scale: min is {group.scale.min}, more than max, {group.scale.max}"
        elif group.count and not group.scale.min <= group.count <= group.scale.max:
            yield f"count: {group.count} is not between scale.min and scale.max"


def _problems_of_shell(part: BrokerPart | NodeGroup, keys: tuple[str, ...]) -> Iterator[str]:
    for key, value in part.env.items():
        if not _VARIABLE.fullmatch(key):
            yield f"env: {short(key)} cannot name a variable"
        elif "\0" in value:
            yield f"env.{key}: holds a zero byte"
    for key in keys:
        if any("\0" in text for text in getattr(part, key)):
            yield f"{key}: holds a zero byte"


def _problems_of_launcher(group: NodeGroup) -> Iterator[str]:
    """Those that come with zmqsched. What another package's launcher takes, it says itself."""
    batch = group.launcher in ("slurm", "pbs", "sge")
    if group.launcher == "ssh" and not group.hosts:
        yield "hosts: the launcher ssh needs some"
    if group.hosts and (batch or group.launcher == "local"):
        yield f"hosts: the launcher {group.launcher} takes none; {'see batch.options' if batch else 'did you mean ssh?'}"
    if group.ssh_options and (batch or group.launcher == "local"):
        yield f"ssh_options: the launcher {group.launcher} takes none"
    if group.batch != BatchPart() and group.launcher in ("local", "ssh"):
        yield f"batch: the launcher {group.launcher} asks no batch system"
    if any("\0" in text for text in (group.batch.partition, group.batch.account, *group.batch.options)):
        yield "batch: holds a zero byte"
    yield from _said("hosts", _hosts, group.hosts)


def _said(path: str, check: Any, value: object) -> Iterator[str]:
    """What the check has against it."""
    try:
        check(value)
    except (ValueError, TypeError, ConnectionFileError) as error:
        yield f"{path}: {error}"


def _one_host(text: str) -> None:
    if len(hosts_of(text)) != 1:
        raise ValueError(f"{short(text)} is not one host")
