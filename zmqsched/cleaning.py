"""What is left where everything of a cluster died at once, found and removed (``zmqsched clean``).

Rules
-----
* A cluster is dead if nobody holds its lock and nobody answers at its control socket (whoever holds a cluster starts another
  broker when one dies), and that for ``STALE_AFTER_S``: it may be on its way up.
* A node is a dead cluster's if its connection file is, or was, in its directory; the node's workers have the same command
  line. One that has the file from standard input (over ``ssh``) bears a badge with the cluster's id: it is a dead cluster's
  if the last one in its directory was of this id. Whether a cluster of another host is dead, nobody here knows; its nodes
  end by themselves when it is silent for a minute, or here when the user names it.
* What tasks have started bears the mark of its worker (``orphans.py``) and descends from a process of ours, as long as the
  node or its nursery lives. Where both died in the same moment, the mark is all that is left.
* Jobs of batch systems are those that were recorded on this host (``launch/jobs.py``).
* The end here of a node's way back through ``ssh`` is a Unix socket; nobody listens there when sshd has ended.
* A directory and a journal are removed by one who holds the cluster's lock: nobody starts it meanwhile.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import NamedTuple

import psutil

from .config import (
    STALE_AFTER_S,
    ClusterLock,
    cluster_dir,
    is_held,
    journal_path,
    remove_cluster_dir,
    runtime_dir,
    this_host,
)
from .control import is_served
from .errors import ConnectionFileError, StartError
from .journal import Journal
from .launch.jobs import Job, cancel_recorded, recorded_jobs
from .launch.remote import dead_tunnels
from .orphans import is_marked
from .stopping import KILL_TIMEOUT_S, all_processes, badge, cluster_id_in, connection_path, is_zmqsched, still_running

_Nodes = dict[str, list[psutil.Process]]
_LOG, _JOURNAL = ".log", ".journal"
_LOOK_EVERY_S = 0.1


class Leftover(NamedTuple):
    """``what`` it is, in words. ``remove`` raises a ZmqschedError if it cannot be."""

    what: str
    remove: Callable[[], None]


def find(named: Collection[str] = (), *, journals: bool = False, watch_s: float = STALE_AFTER_S) -> list[Leftover]:
    """All that is left of this user's dead clusters on this host, in the order in which it is to be removed. ``named``:
    clusters of other hosts whose nodes here are to end too. ``journals``: those too, with the tasks that the next cluster of
    their name would go on with. ``watch_s``: for how long a cluster must be dead; if none is, nobody waits."""
    home = runtime_dir()
    directories = {entry.name for entry in home.iterdir() if entry.is_dir() and _is_name(entry.name)}
    logs = {entry.name[1 : -len(_LOG)]: entry for entry in home.glob(f".*{_LOG}")}
    nodes, strangers = _nodes_by_cluster(home)
    jobs = _jobs_by_cluster()
    kept = {path.stem: path for path in journal_path("any").parent.glob(f"*{_JOURNAL}")} if journals else {}
    dead = _dead(directories | logs.keys() | nodes.keys() | jobs.keys() | kept.keys(), watch_s)
    return [
        *(_nodes(f"dead cluster {name}", nodes[name]) for name in sorted(dead & nodes.keys())),
        *(_nodes(f"cluster {name} of another host", strangers[name]) for name in sorted(strangers.keys() & set(named))),
        *_started_by_tasks(),
        *(_batch_jobs(name, jobs[name]) for name in sorted(dead & jobs.keys())),
        *(_directory(name) for name in sorted(dead & directories)),
        *(_file("log", logs[name]) for name in sorted(dead & logs.keys())),
        *(_journal(name, kept[name]) for name in sorted(dead & kept.keys())),
        *(_file("end of a connection back through ssh:", end) for end in dead_tunnels()),
    ]


def _file(what: str, path: Path) -> Leftover:
    def remove() -> None:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise StartError(f"cannot remove {path}: {error.strerror}") from None

    return Leftover(f"{what} {path}", remove)


def _is_name(name: str) -> bool:
    with contextlib.suppress(ConnectionFileError):
        return bool(cluster_dir(name))
    return False


def _dead(names: set[str], watch_s: float) -> set[str]:
    until = time.monotonic() + watch_s
    while (names := {name for name in names if _is_dead(cluster_dir(name))}) and time.monotonic() < until:
        time.sleep(_LOOK_EVERY_S)
    return names


def _is_dead(directory: Path) -> bool:
    return not is_held(directory) and not is_served(directory)


def _nodes_by_cluster(home: Path) -> tuple[_Nodes, _Nodes]:
    """Processes of nodes by their cluster's name: of clusters that have, or had, a directory of ours, and of others."""
    ours: _Nodes = {}
    others: _Nodes = {}
    for process in [process for process in all_processes() if is_zmqsched(process, "node")]:
        cluster_id, name = badge(process)
        if cluster_id and _is_name(name):
            here = cluster_id_in(cluster_dir(name)) == cluster_id
            (ours if here else others).setdefault(name, []).extend([process, *_forks_of(process)])
        elif (path := connection_path(process)) is not None and path.parent.parent == home and _is_name(path.parent.name):
            ours.setdefault(path.parent.name, []).append(process)
    return ours, others


def _forks_of(node: psutil.Process) -> list[psutil.Process]:
    """Its nursery and its workers."""
    with contextlib.suppress(psutil.Error):
        return [process for process in node.children(recursive=True) if is_zmqsched(process, "node")]
    return []


def _nodes(whose: str, processes: list[psutil.Process]) -> Leftover:
    pids = {process.pid for process in processes}

    def remove() -> None:
        # The nodes first: the nursery of one that dies ends its workers, and whatever their tasks have started.
        with contextlib.suppress(StartError):
            _kill([process for process in processes if _parent(process) not in pids], processes)
        _kill(processes, processes)

    return Leftover(f"nodes and workers of the {whose}: {_listed(processes)}", remove)


def _started_by_tasks() -> list[Leftover]:
    marked = still_running([process for process in all_processes() if is_marked(process.pid)], 0)
    orphans = [process for process in marked if not any(is_zmqsched(one) for one in [process, *_ancestors(process)])]
    what = f"processes that tasks of dead nodes have started: {_listed(orphans)}"
    return [Leftover(what, lambda: _kill(orphans, orphans))] if orphans else []


def _kill(chosen: list[psutil.Process], until_gone: list[psutil.Process]) -> None:
    for process in still_running(chosen, 0):
        with contextlib.suppress(psutil.Error):
            process.kill()
    if stuck := still_running(until_gone, KILL_TIMEOUT_S):
        raise StartError(f"processes cannot be killed: {_listed(stuck)}")


def _listed(processes: list[psutil.Process]) -> str:
    return ", ".join(str(process.pid) for process in processes)


def _parent(process: psutil.Process) -> int:
    with contextlib.suppress(psutil.Error):
        return int(process.ppid())
    return 0


def _ancestors(process: psutil.Process) -> list[psutil.Process]:
    with contextlib.suppress(psutil.Error):
        return list(process.parents())
    return []


def _jobs_by_cluster() -> dict[str, list[Job]]:
    """Recorded jobs of clusters that were started on this host."""
    found: dict[str, list[Job]] = {}
    for job in recorded_jobs():
        if job.host == this_host():
            found.setdefault(job.cluster, []).append(job)
    return found


def _batch_jobs(name: str, jobs: list[Job]) -> Leftover:
    ids = ", ".join(f"{job.launcher} {job.id or job.name}" for job in jobs)
    return Leftover(f"jobs of the dead cluster {name}: {ids}", functools.partial(_cancel, name))


def _cancel(name: str) -> None:
    cancel_recorded(name)


def _directory(name: str) -> Leftover:
    return Leftover(f"directory {cluster_dir(name)}", lambda: remove_cluster_dir(name))


def _journal(name: str, path: Path) -> Leftover:
    def remove() -> None:
        lock = ClusterLock.acquire(name)
        try:
            Journal(path, name).close(remove=True)
        finally:
            lock.remove()

    return Leftover(f"journal {path}", remove)
