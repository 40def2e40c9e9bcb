"""Clusters that this process starts: a broker, here or on another host, and groups of nodes, here or elsewhere.

Nothing is left behind: broker and nodes end when their standard input does, which this process holds, however it ends; a
batch system's jobs are ended by ids that were recorded. The children are sessions of their own, so a Ctrl-C in a terminal or
notebook does not reach them.

A broker that dies is followed by another (``brokers.py``). Who watches the nodes is in ``fleet.py``.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import os
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from shlex import join
from typing import Any, Self

import msgspec
from msgspec.structs import replace

from . import errors
from .brokers import START_TIMEOUT_S, STOP_TIMEOUT_S, KeptBroker, Start, check_free, wait_until_ready
from .clusterfile import BrokerPart, ClusterFile, HeartbeatPart, NodeGroup, TasksPart
from .config import CONNECTION_FILE, ConnectionFile, check_name, cluster_dir, file_name, remove_cluster_dir
from .core.policy import DEFAULT_POLICY, POLICIES
from .display import Sheet, Shown, as_line
from .errors import StartError
from .fleet import Fleet
from .host import thread_limits, usable_cpus
from .launch import remote
from .launch.base import Launched, Site
from .launch.local import LocalLauncher
from .launch.reach import LOOPBACK, own_addresses
from .launch.ssh import MAX_FIRST, ssh_words
from .options import amounts, boolean, integer, task_tags
from .readiness import wait_for_nodes
from .sockets import listen_address
from .version import PYTHON, __version__

__all__ = ["START_TIMEOUT_S", "STOP_TIMEOUT_S", "Cluster", "LocalCluster", "check_free", "wait_until_ready"]

# A host that is asked by ssh may have to be waited for.
ELSEWHERE_TIMEOUT_S = 60.0
MAX_WORKERS = 10_000
MAX_QUEUED = 1 << 60
# A broker on another host ends when it has not heard of this one for so long; it does so every 10 s.
LEASH_S = 60.0
# A broker that dies more often than so is not followed by another: whatever kills it would go on.
MAX_RESTARTS, RESTARTS_WITHIN_S = 5, 60.0

_numbers = itertools.count(1)
_running: weakref.WeakSet[Cluster] = weakref.WeakSet()


class Cluster(Shown):
    """A broker on this host, or on another that ssh reaches, and nodes wherever its file says; ends with this object or
    program.

    When it is made, the broker is ready and each node has joined that does not wait in a batch system's queue. Nodes that
    failed are in ``failures``, and told of in the log.

    Parameters
    ----------
    wanted
        What ``cluster.toml`` holds.
    min_nodes
        With fewer nodes it makes no sense to go on: as soon as so many cannot come any more, for others have failed,
        it is given up.
    echo
        What tasks write to standard error is on this program's, too: for a program that runs a cluster whose tasks come from
        others.
    told
        Called with what :meth:`nodes` gives whenever the nodes were looked at, while they start and each second afterwards;
        by another thread, and it must not wait.

    Raises
    ------
    ClusterFileError
        Something of it cannot be; says what.
    ValueError
        There is no such launcher.
    ClusterExists
        A running cluster has that name, here or where the broker is to run.
    StartError
        The broker did not start, or fewer than ``min_nodes`` nodes can; their own words say why.
    """

    # Whether each node must be there, and in time.
    _all_or_nothing = False

    def __init__(
        self, wanted: ClusterFile, *, min_nodes: int = 1, echo: bool = False,
        told: Callable[[Sequence[Launched]], None] | None = None,
    ) -> None:  # fmt: skip
        self.name = check_name(wanted.name)
        self.wanted = wanted = wanted.checked()
        asked = sum(group.size for group in wanted.nodes)
        least = asked if self._all_or_nothing else integer("min_nodes", min_nodes, 0, max(1, asked))
        self._pid = os.getpid()
        self._closed = False
        self._changed: Callable[[], None] = _nothing
        self._lock = threading.Lock()
        directory = cluster_dir(self.name)
        path = directory / (file_name("node") if _has_keys(wanted) else CONNECTION_FILE)
        check_free(self.name)
        left = path.exists()
        changed = _told(weakref.ref(self))
        self._broker = KeptBroker(self.name, _broker_start(wanted), MAX_RESTARTS, RESTARTS_WITHIN_S, changed)
        self._fleet: Fleet | None = None
        self._end: weakref.finalize[..., Cluster] | None = None
        try:
            site = Site(path, directory, boolean("echo", echo))
            self._fleet = Fleet(_sharing_cpus(wanted.nodes), site, self._broker, changed, told or _nothing, least)
            # Local nodes start beside the broker and wait for its file: a start costs one interpreter's time, not two.
            # Unless there is one that a broker left which was killed: they would find nobody behind it.
            if left:
                self._broker.wait_until_ready()
            self._fleet.start(local=True)
            if not left:
                self._broker.wait_until_ready()
            self._fleet.start(local=False)
            self._fleet.serve()
            self._fleet.wait_for_first(ELSEWHERE_TIMEOUT_S if _elsewhere(wanted) else START_TIMEOUT_S)
            if self._all_or_nothing and self._fleet.failures:
                raise self._fleet.cannot_start()
        except BaseException:
            self.close()
            raise
        self._end = weakref.finalize(self, _let_go, self._pid, self.name, self._broker, self._fleet)
        self._end.atexit = False
        _running.add(self)

    def close(self) -> None:
        """Stop everything, and wait for it: no process, file or socket is left. Idempotent; nothing in a forked child, whose
        cluster it is not."""
        if os.getpid() != self._pid:
            return
        with self._lock:
            if self._closed:
                return
            self._closed = True
        if self._end is not None:
            self._end.detach()
        _close(self.name, self._broker, self._fleet)

    @classmethod
    def from_file(cls, path: str | os.PathLike[str], *, echo: bool = False) -> Cluster:
        """The cluster that a ``cluster.toml`` describes.

        Raises
        ------
        ClusterFileError
            The file cannot be read, or holds what cannot be: names the key.
        """
        return Cluster(ClusterFile.load(path), echo=echo)

    # --- what is known of it --------------------------------------------------------------------------------------

    @property
    def file(self) -> ConnectionFile:
        """How to reach the broker, the one that is there now."""
        return self._broker.file

    @property
    def broker_pid(self) -> int:
        """The broker's process, the one that is there now; on its own host."""
        return self._broker.pid

    @property
    def broker_death(self) -> str:
        """How the broker ended, if it did and none has followed it; "" while one runs, and after :meth:`close`."""
        return self._broker.death

    @property
    def failures(self) -> list[Launched]:
        """The nodes started by this process that could not start, or ended unasked: ``label``, ``where``, and ``why`` with
        the end of what they wrote. The last hundred."""
        return list(self._nodes_here.failures)

    def nodes(self) -> list[Launched]:
        """The nodes that this process has started, each with its ``label``, ``state`` (pending, starting, running, ended),
        ``why``, ``where``, and as ``node`` its id at the broker, once that is known."""
        return self._nodes_here.now()

    # --- more and fewer nodes -------------------------------------------------------------------------------------

    def scale(self, group: str, n: int) -> None:
        """Have ``n`` nodes in this group from now on. New ones are asked for when this returns; those that are to go finish
        their tasks first, idle ones go before others.

        Raises
        ------
        ValueError
            There is no such group, or no such number.
        StartError
            None of the new ones can be started.
        """
        self._nodes_here.scale(group, n)

    def adapt(self, group: str, min: int, max: int) -> None:  # noqa: A002 - as they are called in cluster.toml
        """Keep between ``min`` and ``max`` nodes in this group from now on, by what is queued and who is idle
        (``core/adapting.py``); until ``scale`` is called."""
        self._nodes_here.adapt(group, min, max)

    def wait_for_nodes(self, n: int, timeout: float | None = None) -> None:
        """Return when ``n`` nodes are alive.

        Raises
        ------
        TimeoutError
            They are not, after ``timeout`` seconds; says of each missing node its state and the reason.
        StartError
            Nodes have failed, so that no ``n`` can come; their own words say why.
        """
        fleet = self._nodes_here
        wait_for_nodes(n, timeout, lambda: fleet.status().nodes, fleet.asked)

    @property
    def _nodes_here(self) -> Fleet:
        if self._fleet is None:
            raise StartError(f"the cluster {self.name!r} did not start")
        return self._fleet

    # --- as an object ---------------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    _repr_pretty_ = Shown._repr_pretty_  # beside __repr__, for IPython takes of each class what it finds there

    def __repr__(self) -> str:
        return as_line(self._sheet())

    def _sheet(self) -> Sheet:
        facts: list[tuple[str, object]] = [("state", self.broker_death or ("closed" if self._closed else "running"))]
        if not self._closed:
            facts += [("broker pid", self.broker_pid), *self._node_facts(), ("use it", f"zmqsched.Client({self.name!r})")]
        return Sheet(f"zmqsched.{type(self).__name__} {self.name!r}", facts=facts)

    def _node_facts(self) -> list[tuple[str, object]]:
        states = [one.state for one in self.nodes()]
        return [("nodes", ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states)) or "none")]

    def __reduce__(self) -> tuple[Any, ...]:
        raise TypeError(
            f"a {type(self).__name__} cannot be pickled: it owns processes; elsewhere use Client({self.name!r})"
        )


class LocalCluster(Cluster):
    """A broker and its nodes on this machine, over Unix sockets that only this user can reach.

    Parameters
    ----------
    n_workers
        Workers in all; one for each usable CPU by default.
    name
        To find it by from other programs, with ``Client(name)``; a made-up one by default.
    n_nodes
        Over how many nodes the workers are spread.
    policy
        ``least-loaded``, ``round-robin``, ``random`` or ``pack``.
    resources, tags
        What each node offers besides its CPUs and memory, for tasks that ask for it.
    listen
        ``ADDRESS[:PORT]``: TCP, encrypted, instead of Unix sockets, so that nodes and clients on other hosts can join with
        the connection file; "" is loopback.
    max_queued
        Bytes of tasks and results that the broker holds before ``submit`` waits; by default a quarter of the memory, at
        least 256 MiB.
    journal
        Whether tasks and answers survive the broker's death by themselves: True (if the cluster is given a name), False,
        or a file to keep them in, instead of one in the user's state directory.
    echo
        The nodes' standard error, which is this program's, has what tasks write to theirs, too: for a program that runs a
        cluster whose tasks come from others.

    Raises
    ------
    ValueError, TypeError
        An argument is off.
    ClusterExists
        A running cluster has that name.
    StartError
        A process did not start; its own words say why.
    """

    _all_or_nothing = True

    def __init__(
        self,
        n_workers: int | None = None,
        *,
        name: str | None = None,
        n_nodes: int = 1,
        policy: str = DEFAULT_POLICY,
        resources: Mapping[str, float] | None = None,
        tags: Iterable[str] = (),
        listen: str | None = None,
        max_queued: int | None = None,
        journal: bool | str | os.PathLike[str] | None = None,
        echo: bool = False,
    ) -> None:
        n_workers = usable_cpus() if n_workers is None else n_workers
        integer("n_workers", n_workers, 1, MAX_WORKERS)
        integer("n_nodes", n_nodes, 1, MAX_WORKERS)
        if max_queued is not None:
            integer("max_queued", max_queued, 1, MAX_QUEUED)
        if n_nodes > n_workers:
            raise ValueError(f"{n_nodes} nodes need at least as many workers, not {n_workers}")
        if listen is not None:
            listen_address(listen)
        if not isinstance(policy, str) or policy not in POLICIES:
            raise ValueError(f"there is no policy {policy!r}; there are {', '.join(sorted(POLICIES))}")
        broker = BrokerPart(
            listen=() if listen is None else (listen,), policy=policy, max_queued=max_queued or 0,
            journal=_journal(name is not None if journal is None else journal),
        )  # fmt: skip
        offers = NodeGroup(resources=amounts(resources or {}), tags=tuple(task_tags(tags)))
        # Where the workers cannot be divided evenly, some nodes have one more.
        slots, more = divmod(n_workers, n_nodes)
        groups = [replace(offers, name="local", count=n_nodes - more, slots=slots)]
        groups += [replace(offers, name="local-plus", count=more, slots=slots + 1)] if more else []
        name = name or f"local-{os.getpid()}-{next(_numbers)}"
        super().__init__(ClusterFile(name=name, broker=broker, nodes=tuple(groups)), echo=echo)
        self.node_pids: list[int] = [
            group.launcher.pid(label)
            for group in self._nodes_here.groups.values()
            if isinstance(group.launcher, LocalLauncher)
            for label in group.members
        ]

    def _node_facts(self) -> list[tuple[str, object]]:
        return [("node pids", ", ".join(map(str, self.node_pids)))]


def _nothing(*_: object) -> None:
    """Nobody else wants to know."""


def _told(reference: weakref.ref[Cluster]) -> Callable[[], None]:
    """What tells a cluster of a change, without keeping it."""

    def changed() -> None:
        if (cluster := reference()) is not None:
            cluster._changed()

    return changed


def _journal(journal: bool | str | os.PathLike[str]) -> bool | str:
    if not isinstance(journal, bool | str | os.PathLike):
        raise TypeError(f"journal is True, False or a file's path, not {journal!r}")
    return journal if isinstance(journal, bool) else os.fspath(journal)


def _broker_start(wanted: ClusterFile) -> Start:
    part = wanted.broker
    run = [sys.executable, "-m", "zmqsched"]
    if not part.is_elsewhere:
        return Start([*run, "broker", *_broker_options(wanted), *_journal_option(part), "--log-level=error"])
    script = remote.line(_broker_script(wanted))
    if len(script) > MAX_FIRST:
        raise StartError(f"broker.env and broker.prologue are over {MAX_FIRST} bytes; put them into a file there")
    words = [f"--ssh-option={word}" for word in part.ssh_options]
    return Start([*run, "tether", f"--name={wanted.name}", f"--host={part.host}", *words, "--log-level=warning"], script)


def broker_preview(wanted: ClusterFile) -> list[str]:
    """What the broker is started with, as lines for a shell."""
    part = wanted.broker
    if not part.is_elsewhere:
        return ["# the broker", join(_broker_start(wanted).command)]
    lines = [f"# the broker, on {part.host}, fed over standard input:"]
    lines += [f"#   {text}" for text in _broker_script(wanted).splitlines()]
    return [*lines, join([*ssh_words(part.ssh_options), "--", part.host, remote.COMMAND])]


def _broker_script(wanted: ClusterFile) -> str:
    options = [*_broker_options(wanted), "--log-level=error", f"--give-up-after={LEASH_S:g}"]
    return remote.broker_script(wanted.broker, options, PYTHON, __version__)


def _broker_options(wanted: ClusterFile) -> list[str]:
    part, beats = wanted.broker, wanted.heartbeat
    options = [f"--name={wanted.name}", f"--policy={part.policy}"]
    if beats != HeartbeatPart():
        options += [f"--beat-interval={beats.interval}", f"--dead-after={beats.dead_after}"]
    options += [f"--idle-timeout={part.idle_timeout}"] if part.idle_timeout else []
    if wanted.tasks != TasksPart():
        options.append(f"--task-defaults={msgspec.json.encode(wanted.tasks).decode()}")
    options += [f"--listen={address}" for address in _listens(wanted)]
    options += ["--insecure-any-interface"] if part.insecure_any_interface else []
    options += [f"--max-queued={part.max_queued}"] if part.max_queued else []
    return options


def _journal_option(part: BrokerPart) -> list[str]:
    if part.journal is True:
        return ["--journal"]
    # Absolute: a broker that follows another is started where this program is by then.
    return [f"--journal={os.path.abspath(part.journal)}"] if part.journal else []


def _elsewhere(wanted: ClusterFile) -> list[NodeGroup]:
    return [group for group in wanted.nodes if group.launcher != "local"]


def _has_keys(wanted: ClusterFile) -> bool:
    """Whether the broker is to listen on TCP."""
    return bool(wanted.broker.listen or wanted.broker.port or wanted.broker.is_elsewhere or _elsewhere(wanted))


def _listens(wanted: ClusterFile) -> list[str]:
    """The addresses where the broker is to listen for other hosts, as far as they are known here."""
    part = wanted.broker
    addresses = list(part.listen)
    if not addresses and part.is_elsewhere:
        return []
    if not addresses and (elsewhere := _elsewhere(wanted)):
        addresses = own_addresses(host for group in elsewhere for host in group.hosts)
    if not addresses and part.port:
        addresses = [LOOPBACK]
    if not part.port:
        return addresses
    return [f"[{address}]:{part.port}" if ":" in address else f"{address or LOOPBACK}:{part.port}" for address in addresses]


def _sharing_cpus(groups: Iterable[NodeGroup]) -> list[NodeGroup]:
    """A node knows nothing of the others here, so how the CPUs are divided among the threads of all local workers is said in
    the environment."""
    groups = list(groups)
    local = [group for group in groups if group.launcher == "local"]
    workers = sum((group.slots or usable_cpus()) * max(1, group.count) for group in local)
    return [
        replace(group, env={**thread_limits(workers, {**os.environ, **group.env}), **group.env}) if group in local else group
        for group in groups
    ]


def _close(name: str, broker: KeptBroker, fleet: Fleet | None) -> None:
    if fleet is not None:  # nodes first: they say goodbye
        fleet.begin_to_close()
    broker.begin_to_close()
    if fleet is not None:
        fleet.close()
    broker.close()
    with contextlib.suppress(errors.ClusterExists):  # what a broker that was killed has left
        remove_cluster_dir(name)


def _let_go(pid: int, name: str, broker: KeptBroker, fleet: Fleet) -> None:
    """Nobody has the cluster any more: it ends, and nobody waits for that."""
    if os.getpid() == pid:
        threading.Thread(target=_close, args=(name, broker, fleet), name="zmqsched close", daemon=True).start()


@atexit.register
def _close_all() -> None:
    for cluster in list(_running):
        cluster.close()
