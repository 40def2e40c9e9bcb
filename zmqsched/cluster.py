"""Clusters on this machine: a broker and nodes as child processes.

Nothing is left behind: the children read their standard input, which ends when this process does, however it ends; each
removes what it made. The children are sessions of their own, so a Ctrl-C in a terminal or notebook does not reach them.

A broker that dies is followed by another: with a journal that one knows the tasks, without one the clients submit again
what is unanswered. One that keeps dying is given up.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import IO, Any

from . import errors
from .config import CONNECTION_FILE, STOPPING_FILE, ConnectionFile, check_name, cluster_dir, is_held, remove_cluster_dir
from .core.policy import DEFAULT_POLICY, POLICIES
from .display import Sheet, Shown, as_line
from .errors import StartError, ZmqschedError
from .host import thread_limits, usable_cpus
from .options import amounts, boolean, integer, task_tags
from .shell import BROKER_ENVIRONMENT, log
from .sockets import listen_address

START_TIMEOUT_S = 20.0
MAX_WORKERS = 10_000
MAX_QUEUED = 1 << 60
STOP_TIMEOUT_S = 3.0
# A broker that dies more often than so is not followed by another: whatever kills it would go on.
MAX_RESTARTS, RESTARTS_WITHIN_S = 5, 60.0

_numbers = itertools.count(1)
_running: weakref.WeakSet[LocalCluster] = weakref.WeakSet()


class LocalCluster(Shown):
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
        self.name = check_name(name or f"local-{os.getpid()}-{next(_numbers)}")
        self._path = cluster_dir(self.name) / CONNECTION_FILE
        self._pid = os.getpid()
        self._processes: list[subprocess.Popen[bytes]] = []
        self._lock = threading.Lock()
        self._fate = ""
        self._changed: Callable[[], None] = _nothing
        self._closing = os.eventfd(0, os.EFD_CLOEXEC)
        weakref.finalize(self, os.close, self._closing).atexit = False  # close() still needs it then
        offers = [f"--resource={key}={amount}" for key, amount in amounts(resources or {}).items()]
        offers += [f"--tag={tag}" for tag in task_tags(tags)]
        offers += [] if boolean("echo", echo) else ["--no-echo"]
        self._broker = ["broker", f"--name={self.name}", f"--policy={policy}"]
        self._broker += ["--listen", listen] if listen is not None else []
        self._broker += _journal_option(name is not None if journal is None else journal)
        self._broker += [f"--max-queued={max_queued}"] if max_queued is not None else []
        starting: list[tuple[subprocess.Popen[bytes], IO[bytes]]] = []
        try:
            check_free(self.name)
            # Nodes start beside the broker and wait for its file: a start costs one interpreter's time, not two.
            left = self._path.exists()
            starting.append(self._start_broker())
            self._processes.append(starting[-1][0])
            # Unless there is one that a broker left which was killed: they would find nobody behind it.
            ready = [wait_until_ready(*starting[0])] if left else []
            for index in range(n_nodes):
                slots = n_workers // n_nodes + (index < n_workers % n_nodes)
                starting.append(_start(_node_command(self._path, slots, offers), _node_environment(n_workers)))
                self._processes.append(starting[-1][0])
            ready += [wait_until_ready(process, pipe) for process, pipe in starting[len(ready) :]]
        except BaseException:
            self.close()
            raise
        finally:
            for _, pipe in starting:
                pipe.close()
        self.broker_pid: int = ready[0]["pid"]
        self.node_pids: list[int] = [facts["pid"] for facts in ready[1:]]
        self.file = ConnectionFile.load(self._path)
        threading.Thread(target=_supervise, args=(weakref.ref(self),), name="zmqsched cluster", daemon=True).start()
        _running.add(self)

    def close(self) -> None:
        """Stop everything, and wait for it: no process, file or socket is left. Idempotent; nothing in a forked child, whose
        cluster it is not."""
        if os.getpid() != self._pid:
            return
        os.eventfd_write(self._closing, 1)
        with self._lock:
            processes, self._processes = self._processes, []
        for process in reversed(processes):  # nodes first: they say goodbye
            _close_input(process)
        until = time.monotonic() + STOP_TIMEOUT_S
        for process in processes:
            try:
                process.wait(max(0.1, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if processes and processes[0].returncode < 0:  # a broker that was killed leaves its directory
            with contextlib.suppress(errors.ClusterExists):
                remove_cluster_dir(self.name)

    @property
    def broker_death(self) -> str:
        """How the broker ended, if it did and none has followed it; "" while one runs, and after :meth:`close`."""
        return self._fate if self._processes else ""

    def __enter__(self) -> LocalCluster:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    _repr_pretty_ = Shown._repr_pretty_  # beside __repr__, for IPython takes of each class what it finds there

    def __repr__(self) -> str:
        return as_line(self._sheet())

    def _sheet(self) -> Sheet:
        facts: list[tuple[str, object]] = [("state", self._fate or ("running" if self._processes else "closed"))]
        if self._processes:
            nodes = ", ".join(map(str, self.node_pids))
            facts += [("broker pid", self.broker_pid), ("node pids", nodes), ("use it", f"zmqsched.Client({self.name!r})")]
        return Sheet(f"zmqsched.LocalCluster {self.name!r}", facts=facts)

    def __reduce__(self) -> tuple[Any, ...]:
        raise TypeError(f"a LocalCluster cannot be pickled: it owns processes; elsewhere use Client({self.name!r})")

    def _start_broker(self) -> tuple[subprocess.Popen[bytes], IO[bytes]]:
        return _start(self._broker, {**os.environ, **BROKER_ENVIRONMENT})

    def _follow(self, died: str) -> None:
        """The broker died: start the next, or say why there is none."""
        process, pipe = self._start_broker()
        with self._lock:
            if not self._processes:  # closed meanwhile
                pipe.close()
                _close_input(process)
                process.kill()
                process.wait()
                return
            _close_input(self._processes[0])
            self._processes[0] = process
        try:
            facts = wait_until_ready(process, pipe)
        except ZmqschedError as error:
            if process.returncode is None or process.returncode >= 0:  # killed before it was ready, it is one death more
                self._give_up(f"{died}, and no other could be started: {error}")
            return
        self.broker_pid = facts["pid"]
        self.file = ConnectionFile.load(self._path)
        log.warning("zmqsched: the broker of cluster %s died (%s); pid %d follows it", self.name, died, self.broker_pid)
        self._changed()

    def _give_up(self, why: str) -> None:
        self._fate = why
        self._changed()


def _supervise(reference: weakref.ref[LocalCluster]) -> None:
    """Until the cluster is closed, given up, or forgotten."""
    deaths: deque[float] = deque(maxlen=MAX_RESTARTS)
    while (cluster := reference()) is not None and (processes := cluster._processes):
        broker, closing = processes[0], cluster._closing
        del cluster, processes
        closed = _wait_for_end(broker.pid, closing)
        cluster = reference()
        if closed or cluster is None:
            return
        code = broker.wait()
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        often = len(deaths) == MAX_RESTARTS and time.monotonic() - deaths[0] < RESTARTS_WITHIN_S
        if code == 0 or often or (cluster_dir(cluster.name) / STOPPING_FILE).exists():
            cluster._give_up(f"{how}, the {MAX_RESTARTS + 1}th within {RESTARTS_WITHIN_S:.0f} s" if often else how)
            return
        deaths.append(time.monotonic())
        cluster._follow(how)


def _wait_for_end(child: int, closing: int) -> bool:
    """Wait until the child has ended, or (True) the cluster is closed."""
    process = os.pidfd_open(child)
    try:
        return closing in select.select([process, closing], [], [])[0]
    finally:
        os.close(process)


def _nothing() -> None:
    """Nobody else wants to know."""


def _journal_option(journal: bool | str | os.PathLike[str]) -> list[str]:
    if not isinstance(journal, bool | str | os.PathLike):
        raise TypeError(f"journal is True, False or a file's path, not {journal!r}")
    if journal is True:
        return ["--journal"]
    # Absolute: a broker that follows another is started where this program is by then.
    return [f"--journal={os.path.abspath(journal)}"] if journal else []


def _start(command: list[str], environment: dict[str, str]) -> tuple[subprocess.Popen[bytes], IO[bytes]]:
    read, write = os.pipe()
    with os.fdopen(write, "wb"):
        process = subprocess.Popen(
            [sys.executable, "-m", "zmqsched", *command, "--until-eof", "--log-level=error", f"--ready-fd={write}"],
            stdin=subprocess.PIPE,
            pass_fds=[write],
            start_new_session=True,
            env=environment,
        )
    return process, os.fdopen(read, "rb")


def _node_command(path: Path, slots: int, offers: list[str]) -> list[str]:
    return ["node", "--connect", str(path), "--wait", str(START_TIMEOUT_S), "--slots", str(slots), *offers]


def _node_environment(n_workers: int) -> dict[str, str]:
    """Workers must find the modules this program finds: its own directory, and what it added to ``sys.path``. A node knows
    nothing of the others here, so how the CPUs are divided among all of their workers is said here as well."""
    here = [entry or os.getcwd() for entry in sys.path if not entry.endswith(".zip")]
    threads = thread_limits(n_workers, os.environ)
    return {**os.environ, **threads, "PYTHONPATH": os.pathsep.join(dict.fromkeys(here))}


def check_free(name: str) -> None:
    """Raise ClusterExists if a running cluster has this name."""
    if is_held(cluster_dir(name)):
        raise errors.ClusterExists(
            f"a cluster named {name!r} is running already: stop it (zmqsched down {name}) or choose another name"
        )


def wait_until_ready(
    process: subprocess.Popen[bytes], pipe: IO[bytes], timeout_s: float = START_TIMEOUT_S
) -> dict[str, Any]:
    """The line by which a child says that it is ready, or the exception that says why it is not."""
    with pipe:
        if not select.select([pipe], [], [], timeout_s)[0]:
            raise StartError(f"{process.args!r} was not ready within {timeout_s:.0f} s")
        line = pipe.readline()
    if not line:
        raise StartError(f"{process.args!r} ended with exit code {process.wait()} before it was ready; see its words above")
    facts: dict[str, Any] = json.loads(line)
    if "error" in facts:
        kind = getattr(errors, facts["type"], StartError)
        raise kind(facts["error"]) if issubclass(kind, ZmqschedError) else StartError(facts["error"])
    return facts


def _close_input(process: subprocess.Popen[bytes]) -> None:
    if process.stdin:
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()


@atexit.register
def _close_all() -> None:
    for cluster in list(_running):
        cluster.close()
