"""A program on many hosts at once: ``srun zmqsched run script.py``. The launcher starts the same command everywhere; of
these *ranks* the first is the cluster, the driver and a node, all others are nodes.

Rules
-----
* Which rank a process is, its launcher says in its environment: Slurm's ``srun``, Open MPI's ``mpirun``, others that speak
  PMI (MPICH, Intel MPI). Without any of them there is one rank: this machine.
* The first keeps a cluster for as long as the script runs. The script is a child of its own, with ``$ZMQSCHED_CLUSTER``; its
  exit code is the first rank's. It dies with it, however that ends, and so do broker and node.
* The others take the connection file of the role "node" (0600) from the directory that all hosts see, where it is named by
  what only these ranks have in common: the job, its step, how often it was restarted. They end, with exit code 0, when the
  broker says goodbye; by themselves when it has been silent for ``NODE_ALONE_S``.
* At the end the first waits for those that have not come yet: they would look for a cluster that has been.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from .config import (
    NODE_ALONE_S,
    ConnectionFile,
    cluster_dir,
    is_held,
    make_private,
    role_file,
    shared_dir,
    this_host,
)
from .errors import ConnectionFileError, StartError
from .host import usable_cpus

# How long the others look for the first, and the first waits for others when the script has ended: a crowd of interpreters
# that start from one file system takes its time.
MEET_TIMEOUT_S = 300.0
LATE_S = 30.0
SAY_AFTER_S = 10.0
_DIRECTORY = "ranks"
_LOOK_S, _LOOK_SELDOM_S = 0.02, 0.5
# Slurm's numbers for what is no step of srun: the batch script, an interactive shell.
_NO_STEP = 0xFFFFFFF0
# How many of the others' hosts tell which address of ours they reach.
_ASKED_HOSTS = 4
# Batch systems' numbers of a job, for launchers that tell their ranks nothing in common.
_JOB_IDS = ("SLURM_JOB_ID", "PBS_JOBID", "JOB_ID", "LSB_JOBID")
# Run by an interpreter that becomes the script's: the kernel kills it when its parent is gone.
_TIED = """
import ctypes, os, sys
ctypes.CDLL(None).prctl(1, 9, 0, 0, 0)
if os.getppid() == int(sys.argv[1]):
    os.execv(sys.argv[2], sys.argv[2:])
"""


class Ranks(NamedTuple):
    """Which of how many this is. ``here``: how many are on this host; ``key``: what all of them, and nobody else, are
    known by; ``cpus``: of this one, 0 if the launcher does not say; ``hosts``: some of theirs."""

    rank: int = 0
    size: int = 1
    here: int = 1
    key: str = ""
    cpus: int = 0
    hosts: tuple[str, ...] = ()

    @property
    def on_one_host(self) -> bool:
        return self.here == self.size

    @property
    def slots(self) -> int:
        return self.cpus or max(1, usable_cpus() // self.here)


def find_ranks(environment: Mapping[str, str], key: str = "") -> Ranks:
    """What the launcher says. ``key``: to be used instead of what it says of the job.

    Raises
    ------
    StartError
        It has started several ranks and does not say what they have in common.
    """
    found = _of_open_mpi(environment) or _of_slurm(environment) or _of_pmi(environment) or Ranks()
    found = found._replace(key=re.sub(r"[^A-Za-z0-9._-]", "-", key or found.key)[:80])
    if found.size > 1 and not found.key:
        raise StartError("this launcher does not tell its ranks what they have in common: give them a word, with --id WORD")
    return found


def run(words: Sequence[str], slots: int = 0, key: str = "") -> int:
    """Be one rank of the program ``words`` (a script and its arguments). Returns the exit code of this process.

    Raises
    ------
    ZmqschedError
        The cluster cannot be started or found.
    """
    ranks = find_ranks(os.environ, key)
    path = shared_dir(_DIRECTORY) / f"{ranks.key}.json"
    if ranks.rank == 0:
        return _lead(words, ranks, slots or ranks.slots, path)
    return _follow(ranks, slots or ranks.slots, path)


# --- the first -----------------------------------------------------------------------------------------------------------


def _lead(words: Sequence[str], ranks: Ranks, slots: int, path: Path) -> int:
    from .cluster import LocalCluster
    from .launch.reach import own_addresses

    listen = None
    if not ranks.on_one_host:
        listen = own_addresses(host for host in ranks.hosts if host != this_host())[0]
    remove_left()
    with LocalCluster(slots, name=f"run-{os.getpid()}", listen=listen, journal=False) as cluster:
        if ranks.size == 1:
            return _run_script(words, cluster.name)
        directory = cluster_dir(cluster.name)
        make_private(path.parent)
        try:
            ConnectionFile.load(role_file(directory, "node")).write(path)
            code = _run_script(words, cluster.name)
            with contextlib.suppress(StartError, TimeoutError):
                cluster.wait_for_nodes(ranks.size, LATE_S)
        finally:
            _remove(path)
    return code


def _run_script(words: Sequence[str], cluster: str) -> int:
    command = [sys.executable, "-ISc", _TIED, str(os.getpid()), sys.executable, *words]
    signal.signal(signal.SIGINT, _nothing)  # the script has it too, and this one waits for what it makes of it
    process = subprocess.Popen(command, env={**os.environ, "ZMQSCHED_CLUSTER": cluster})
    signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    code = process.wait()
    return 128 - code if code < 0 else code


def _nothing(*_: object) -> None:
    """Go on waiting."""


# --- the others ----------------------------------------------------------------------------------------------------------


def _follow(ranks: Ranks, slots: int, path: Path) -> int:
    from .__main__ import main

    _meet(path)
    words = [f"--connect={path}", f"--slots={slots}", f"--label=rank-{ranks.rank}", f"--give-up-after={NODE_ALONE_S:g}"]
    return main(["node", *words, "--no-echo", "--log-level=warning"])


def _meet(path: Path) -> None:
    """Wait for the file. The directory is read, for what a network file system remembers of a single name may be old."""
    began = time.monotonic()
    pause_s, said = _LOOK_S, False
    while path.name not in _names(path.parent):
        waited_s = time.monotonic() - began
        if waited_s > MEET_TIMEOUT_S:
            raise StartError(
                f"rank 0 has not written {path} within {MEET_TIMEOUT_S:.0f} s: it has failed, or this host does not see its "
                "home directory (then set ZMQSCHED_DIR or XDG_STATE_HOME to a directory that all hosts see)"
            )
        if waited_s > SAY_AFTER_S and not said:
            said = True
            sys.stderr.write(f"zmqsched: waiting for rank 0 to write {path}\n")
        time.sleep(pause_s)
        pause_s = min(_LOOK_SELDOM_S, 1.2 * pause_s)


def _names(directory: Path) -> set[str]:
    try:
        return set(os.listdir(directory))
    except FileNotFoundError:
        return set()


# --- files ---------------------------------------------------------------------------------------------------------------


def remove_left() -> None:
    """The files of first ranks on this host that were killed."""
    directory = shared_dir(_DIRECTORY)
    for name in _names(directory):
        with contextlib.suppress(ConnectionFileError):
            file = ConnectionFile.load(directory / name)
            if file.host == this_host() and not is_held(cluster_dir(file.name)):
                _remove(directory / name)


def _remove(path: Path) -> None:
    path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # others meet there
        path.parent.rmdir()
        path.parent.parent.rmdir()


# --- what launchers say --------------------------------------------------------------------------------------------------


def _of_open_mpi(environment: Mapping[str, str]) -> Ranks | None:
    if "OMPI_COMM_WORLD_RANK" not in environment:
        return None
    return Ranks(
        int(environment["OMPI_COMM_WORLD_RANK"]), int(environment["OMPI_COMM_WORLD_SIZE"]),
        int(environment.get("OMPI_COMM_WORLD_LOCAL_SIZE", "1")),
        environment.get("PMIX_NAMESPACE") or environment.get("OMPI_MCA_ess_base_jobid", ""),
    )  # fmt: skip


def _of_slurm(environment: Mapping[str, str]) -> Ranks | None:
    step = environment.get("SLURM_STEP_ID", "")
    if not step.isdigit() or int(step) >= _NO_STEP:
        return None
    rank, size = environment["SLURM_PROCID"], environment["SLURM_STEP_NUM_TASKS"]
    if (environment.get("PMI_RANK", rank), environment.get("PMI_SIZE", size)) != (rank, size):
        return None  # another launcher has started its own through srun: these numbers are not ours
    here = _tasks_of(environment["SLURM_STEP_TASKS_PER_NODE"], int(environment["SLURM_NODEID"]))
    cpus = environment.get("SLURM_CPUS_PER_TASK", "")
    names = (environment.get("SLURM_CLUSTER_NAME", ""), environment["SLURM_JOB_ID"], step)
    return Ranks(
        int(rank), int(size), here, "-".join((*names, environment.get("SLURM_RESTART_COUNT", "0"))),
        int(cpus) if cpus.isdigit() else max(1, int(environment.get("SLURM_CPUS_ON_NODE", "1")) // here),
        _hosts_of(environment.get("SLURM_STEP_NODELIST", "")),
    )  # fmt: skip


def _of_pmi(environment: Mapping[str, str]) -> Ranks | None:
    if "PMI_RANK" not in environment:
        return None
    job = next((environment[name] for name in _JOB_IDS if environment.get(name)), "")
    here = environment.get("MPI_LOCALNRANKS", "1")
    return Ranks(int(environment["PMI_RANK"]), int(environment["PMI_SIZE"]), int(here), job)


def _tasks_of(text: str, node: int) -> int:
    """Of ``4(x2),3`` (four tasks on each of two nodes, three on the next) those of one node."""
    counts: list[int] = []
    for part in text.split(","):
        number, _, times = part.rstrip(")").partition("(x")
        counts += [int(number)] * int(times or 1)
    return counts[node]


def _hosts_of(text: str) -> tuple[str, ...]:
    from .hostlist import hosts_of

    try:
        return hosts_of(text)[:_ASKED_HOSTS]
    except ValueError:
        return ()
