"""Clusters on this machine: a broker and nodes as child processes.

Nothing is left behind: the children read their standard input, which ends when this process does, however it ends; each
removes what it made. The children are sessions of their own, so a Ctrl-C in a terminal or notebook does not reach them.
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
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any

from . import errors
from .config import CONNECTION_FILE, ConnectionFile, check_name, cluster_dir, is_held, remove_cluster_dir
from .core.policy import DEFAULT_POLICY, POLICIES
from .errors import StartError, ZmqschedError
from .host import usable_cpus
from .options import amounts, integer, task_tags
from .shell import BROKER_ENVIRONMENT
from .sockets import listen_address

START_TIMEOUT_S = 20.0
MAX_WORKERS = 10_000
MAX_QUEUED = 1 << 60
STOP_TIMEOUT_S = 3.0

_numbers = itertools.count(1)
_running: weakref.WeakSet[LocalCluster] = weakref.WeakSet()


class LocalCluster:
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
        self._processes: list[subprocess.Popen[bytes]] = []
        self._lock = threading.Lock()
        offers = [f"--resource={key}={amount}" for key, amount in amounts(resources or {}).items()]
        offers += [f"--tag={tag}" for tag in task_tags(tags)]
        broker = ["broker", "--name", self.name, "--policy", policy, *(["--listen", listen] if listen is not None else [])]
        broker += [f"--max-queued={max_queued}"] if max_queued is not None else []
        starting: list[tuple[subprocess.Popen[bytes], IO[bytes]]] = []
        try:
            check_free(self.name)
            # Nodes start beside the broker and wait for its file: a start costs one interpreter's time, not two.
            starting.append(self._start(broker, {**os.environ, **BROKER_ENVIRONMENT}))
            for index in range(n_nodes):
                slots = n_workers // n_nodes + (index < n_workers % n_nodes)
                starting.append(self._start(_node_command(self._path, slots, offers), _node_environment()))
            ready = [wait_until_ready(process, pipe) for process, pipe in starting]
        except BaseException:
            self.close()
            raise
        finally:
            for _, pipe in starting:
                pipe.close()
        self.broker_pid: int = ready[0]["pid"]
        self.node_pids: list[int] = [facts["pid"] for facts in ready[1:]]
        self.file = ConnectionFile.load(self._path)
        _running.add(self)

    def close(self) -> None:
        """Stop everything, and wait for it: no process, file or socket is left. Idempotent."""
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
        """How the broker ended, if it did without being told to; "" while it runs, and after :meth:`close`."""
        processes = self._processes
        code = processes[0].poll() if processes else None
        if code is None:
            return ""
        return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"

    def wait(self) -> None:
        """Return when the broker has ended."""
        self._processes[0].wait()

    def __enter__(self) -> LocalCluster:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = f"broker pid {self.broker_pid}" if self._processes else "closed"
        return f"<zmqsched.LocalCluster {self.name!r}, {state}>"

    def __reduce__(self) -> tuple[Any, ...]:
        raise TypeError(f"a LocalCluster cannot be pickled: it owns processes; elsewhere use Client({self.name!r})")

    def _start(self, command: list[str], environment: dict[str, str]) -> tuple[subprocess.Popen[bytes], IO[bytes]]:
        read, write = os.pipe()
        with os.fdopen(write, "wb"):
            process = subprocess.Popen(
                [sys.executable, "-m", "zmqsched", *command, "--until-eof", "--log-level=error", f"--ready-fd={write}"],
                stdin=subprocess.PIPE,
                pass_fds=[write],
                start_new_session=True,
                env=environment,
            )
        self._processes.append(process)
        return process, os.fdopen(read, "rb")


def _node_command(path: Path, slots: int, offers: list[str]) -> list[str]:
    return ["node", "--connect", str(path), "--wait", str(START_TIMEOUT_S), "--slots", str(slots), *offers]


def _node_environment() -> dict[str, str]:
    """Workers must find the modules this program finds: its own directory, and what it added to ``sys.path``."""
    here = [entry or os.getcwd() for entry in sys.path if not entry.endswith(".zip")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(dict.fromkeys(here))}


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
