"""Stopping a cluster, wherever and however it was started.

Its broker is asked. It tells the nodes, and ``zmqsched up`` ends when its broker does. What is still there on this host
some seconds later is killed. Whose a process is, is decided once, at the start: who has the cluster's lock open is its
broker or, if that is on another host, what holds it from here.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from .client import Client
from .cluster import STOP_TIMEOUT_S
from .config import (
    BADGE,
    CONNECTION_FILE,
    LOCK_FILE,
    STOPPING_FILE,
    ConnectionFile,
    cluster_dir,
    is_held,
    remove_cluster_dir,
)
from .core.events import Tell
from .errors import BrokerUnreachable, ClusterExists, ClusterLost, ConnectionFileError, Refused, ZmqschedError
from .fleet import CLOSE_TIMEOUT_S
from .protocol import Query, Shutdown

# A broker answers in milliseconds; one that is busy for so long is hung or stopped.
ASK_TIMEOUT_S = 2.0
# An `up` gives its nodes CLOSE_TIMEOUT_S, wherever they are, its broker STOP_TIMEOUT_S, and kills it then.
END_TIMEOUT_S = CLOSE_TIMEOUT_S + STOP_TIMEOUT_S + 1.0
# What is killed is gone when the kernel lets it: at once, unless a file system hangs.
KILL_TIMEOUT_S = 3.0
# How a command line of ours names what is run: `zmqsched`, installed or with -m, or its module.
_PROGRAMS = ("/zmqsched", "/zmqsched.__main__", "/zmqsched/__main__.py")


def stop_cluster(file: ConnectionFile) -> bool:
    """Stop the cluster; when this returns, no process, file or socket of it is left on this host. Returns whether it was
    held on this host.

    Raises
    ------
    BrokerUnreachable
        It does not react, and its processes are not here or cannot be killed.
    """
    processes = _processes(file)
    if not _ask(file):
        if not processes:
            raise BrokerUnreachable(
                f"the cluster {file.name!r} does not react, and its broker (process {file.pid} of host {file.host}) "
                "cannot be ended from here"
            )
        (cluster_dir(file.name) / STOPPING_FILE).touch(mode=0o600)
        with contextlib.suppress(psutil.Error):
            processes[0].terminate()
    for process in still_running(processes, END_TIMEOUT_S):
        with contextlib.suppress(psutil.Error):
            process.kill()
    if stuck := still_running(processes, KILL_TIMEOUT_S):
        pids = ", ".join(str(process.pid) for process in stuck)
        raise BrokerUnreachable(f"processes of the cluster {file.name!r} cannot be killed: {pids}")
    if processes:
        with contextlib.suppress(ClusterExists):  # somebody was quick to start the next one
            remove_cluster_dir(file.name)
    return bool(processes)


def _ask(file: ConnectionFile) -> bool:
    """Whether the broker said goodbye."""
    try:
        with Client(file, timeout=ASK_TIMEOUT_S) as client:
            client._post(Tell(Shutdown()))
            _, reply = client._request(Query)  # a question that the goodbye will end
            reply.result(ASK_TIMEOUT_S)
    except ClusterLost:
        return True
    except (ZmqschedError, TimeoutError) as error:
        if isinstance(error, Refused) and file.role != "admin":  # it is well, and not this key's to end
            raise
    return False


def _processes(file: ConnectionFile) -> list[psutil.Process]:
    """The cluster's processes on this host: the ``zmqsched up`` that started it, the broker or its tether, the nodes, their
    workers.

    None at all if neither broker nor tether is one of them.
    """
    directory = cluster_dir(file.name)
    if not is_held(directory) or cluster_id_in(directory) != file.cluster_id:
        return []
    try:
        broker = next(_holders(directory))
        parent = broker.parent()
    except (StopIteration, psutil.Error):
        return []
    starter = [parent] if parent is not None and is_zmqsched(parent, "up") else []
    # The nursery and the workers are a node's forks: they have its command line.
    nodes = [one for one in all_processes() if is_zmqsched(one, "node")]
    return [*starter, broker, *(one for one in nodes if (path := connection_path(one)) and path.parent == directory)]


def _holders(directory: Path) -> Iterator[psutil.Process]:
    """Who has the cluster's lock, which who only looks has for a moment: its broker, or a tether."""
    lock = str((directory / LOCK_FILE).resolve())
    for one in all_processes():
        with contextlib.suppress(psutil.Error):
            named = is_zmqsched(one, "broker") or is_zmqsched(one, "tether")
            if named and any(opened.path == lock for opened in one.open_files()):
                yield one


def cluster_id_in(directory: Path) -> str:
    """Of the cluster that runs there, or was the last that did; "" if nobody knows."""
    try:
        return ConnectionFile.load(directory / CONNECTION_FILE).cluster_id
    except ConnectionFileError:
        return ""


def all_processes() -> Iterator[psutil.Process]:
    """All that are there. ``psutil.process_iter`` remembers what it has seen, and takes a new process for the one that had
    its number before."""
    for pid in psutil.pids():
        with contextlib.suppress(psutil.Error):
            yield psutil.Process(pid)


def is_zmqsched(process: psutil.Process, command: str = "") -> bool:
    """Whether this user runs ``zmqsched COMMAND`` there; any command by default."""
    try:
        words = process.cmdline()
        mine = process.uids().effective == os.geteuid()
    except psutil.Error:
        return False
    following = [second for first, second in itertools.pairwise([*words, ""]) if f"/{first}".endswith(_PROGRAMS)]
    return mine and (command in following if command else bool(following))


def connection_path(node: psutil.Process) -> Path | None:
    """The connection file that a node was given, absolute; None if it was not by its path."""
    try:
        words, directory = node.cmdline(), node.cwd()
    except psutil.Error:
        return None
    for word, following in itertools.pairwise([*words, ""]):
        option, _, value = word.partition("=")
        if option == "--connect" and (path := value or following) != "-":
            return Path(directory, path)
    return None


def badge(node: psutil.Process) -> tuple[str, str]:
    """Id and name of the cluster of a node that was given its connection file by standard input; "" both if it was not."""
    with contextlib.suppress(OSError):
        for descriptor in os.listdir(f"/proc/{node.pid}/fd"):
            with contextlib.suppress(OSError):  # it was closed meanwhile
                opened = os.readlink(f"/proc/{node.pid}/fd/{descriptor}")
                _, found, told = opened.removesuffix(" (deleted)").partition(f"/memfd:{BADGE}")
                if found:
                    cluster_id, _, name = told.rpartition(":")
                    return cluster_id, name
    return "", ""


def still_running(processes: list[psutil.Process], timeout_s: float) -> list[psutil.Process]:
    """Those that have not ended by then."""
    until = time.monotonic() + timeout_s
    while (running := [process for process in processes if _runs(process)]) and time.monotonic() < until:
        time.sleep(0.01)
    return running


def _runs(process: psutil.Process) -> bool:
    """A zombie does not: its parent, a notebook perhaps, will bury it some day."""
    try:
        return bool(process.is_running()) and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
