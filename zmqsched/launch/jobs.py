"""Jobs of batch systems: how one is recorded, found again and ended, whoever submitted it.

Rules
-----
* A submission is recorded before its command runs, under a job name that no other has, and again with its id before
  ``start`` returns; on the disk both times. So whoever is killed, and when: :func:`cancel_recorded` finds the jobs.
* Records, scripts, what jobs write, and a copy (0600) of the connection file of the role "node" lie in a directory of
  mode 0700 that all hosts must see (``config.shared_dir``).
"""

from __future__ import annotations

import os
import subprocess
import time
import zlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import ClassVar, NamedTuple

import msgspec
from msgspec import Struct

from .. import config
from ..clusterfile import NodeGroup, State
from ..errors import StartError
from ..shell import log

# A batch system's server that is busy answers late; one that is gone makes its commands wait for minutes.
COMMAND_TIMEOUT_S = 30.0
# Slurm, for one, gives what it ends 30 seconds before it kills.
STOP_TIMEOUT_S = 60.0
KILL_TIMEOUT_S = 20.0
NODE_FILE = "node.json"
_DIRECTORY = "jobs"
_RECORD = ".job"


class Job(Struct, frozen=True, kw_only=True):
    """A submission as it is recorded. ``name``: the job's at the batch system; ``id``: "" until that has said it. ``host``
    and ``pid``: of the process that submitted it. ``array``: it is several jobs, one for each of its nodes."""

    launcher: str
    cluster: str
    host: str
    pid: int
    name: str
    labels: tuple[str, ...]
    array: bool = False
    id: str = ""


class Seen(NamedTuple):
    """What the batch system says of a job. ``why``: why it is pending."""

    state: State
    why: str = ""


class BatchSystem(ABC):
    """The commands of one kind of site. ``joint``: one submission may be for several nodes."""

    title: ClassVar[str]
    submit: ClassVar[str]
    joint: ClassVar[bool] = False

    @abstractmethod
    def submit_command(self, group: NodeGroup, job: Job, files: Files) -> list[str]:
        """What submits the script; the group's options are the last before it."""

    def environment(self, ours: Mapping[str, str]) -> Mapping[str, str]:
        """What the submit command is run with."""
        return ours

    @abstractmethod
    def id_in(self, said: str) -> str:
        """The job's id in what the submit command has said; "" if there is none."""

    def ids(self, job: Job) -> list[str]:
        """What each of its nodes runs in, in the order of its labels: the same for all, or elements of an array."""
        return [job.id] * len(job.labels)

    def head(self, group: NodeGroup, job: Job, files: Files) -> list[str]:
        """The script's first lines."""
        return []

    def index(self, job: Job) -> str:
        """Which of the job's nodes this is, from 0, for the shell."""
        return "0"

    def node_options(self, group: NodeGroup) -> list[str]:
        """What a node of it is told besides, quoted for the shell."""
        return []

    @abstractmethod
    def states(self, ids: Sequence[str]) -> dict[str, Seen]:
        """Of those that it knows. Raises CommandFailed."""

    @abstractmethod
    def fate(self, job_id: str) -> str | None:
        """How a job ended that has ended; "" in order, None if nobody knows any more. Raises CommandFailed."""

    @abstractmethod
    def cancel(self, ids: Sequence[str], *, at_once: bool) -> None:
        """End these; one that has ended is fine. Raises CommandFailed."""

    @abstractmethod
    def named(self, name: str) -> list[str]:
        """The ids of this user's jobs of this name. Raises CommandFailed."""


class CommandFailed(StartError):
    """A command of the batch system failed; its own words say why."""


def run(*words: str, environment: Mapping[str, str] | None = None, forgiven: str = "") -> str:
    """What the command says on standard output. ``forgiven``: what it says on standard error of jobs that it no longer
    knows; of the others it has said something all the same.

    Raises
    ------
    CommandFailed
        It is not there, does not end, or says why it fails.
    """
    try:
        done = subprocess.run(
            words, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", check=False,
            timeout=COMMAND_TIMEOUT_S, env=environment,
        )  # fmt: skip
    except FileNotFoundError:
        raise CommandFailed(
            f"there is no command {words[0]!r} on this host: start the cluster where the batch system's commands are, on a "
            "login host; perhaps a module must be loaded first"
        ) from None
    except OSError as error:
        raise CommandFailed(f"{words[0]} cannot be run: {error.strerror}") from None
    except subprocess.TimeoutExpired:
        raise CommandFailed(f"{words[0]} did not answer within {COMMAND_TIMEOUT_S:.0f} s") from None
    if done.returncode and not (forgiven and forgiven in done.stderr):
        said = (done.stderr.strip() or done.stdout.strip() or "it did not say why")[-2000:]
        raise CommandFailed(f"{words[0]} failed (exit code {done.returncode}): {said}")
    return done.stdout


class Files:
    """Where one submission's files lie."""

    def __init__(self, directory: Path, name: str) -> None:
        self.directory = directory
        self.record = directory / f"{name}{_RECORD}"
        self.script = directory / f"{name}.sh"
        self.job_output = directory / f"{name}.out"  # where not all of it is one node's
        self._name = name

    def output(self, index: int | str) -> Path:
        """What the node of this index writes, or the batch system's own word for the index."""
        return self.directory / f"{self._name}.{index}.out"

    def write(self, job: Job) -> None:
        config.replace_private(self.record, msgspec.json.encode(job))

    def remove(self) -> None:
        for path in (self.record, self.script, self.job_output, *self.directory.glob(f"{self._name}.*.out")):
            path.unlink(missing_ok=True)


# --- what is recorded --------------------------------------------------------------------------------------------------


def recorded_jobs(cluster: str = "") -> list[Job]:
    """The jobs that were submitted on this host for this cluster, or for all of this user's, and were not seen to end. Those
    of a cluster that runs are among them."""
    found = []
    for directory in [directory_of(cluster)] if cluster else _directories():
        for record in sorted(directory.glob(f"*{_RECORD}")):
            with suppress(OSError, msgspec.MsgspecError):  # it went away this moment
                found.append(msgspec.json.decode(record.read_bytes(), type=Job))
    return found


def cancel_recorded(cluster: str) -> list[str]:
    """End what is left of the jobs of a cluster of this name that was started on this host and has died: whoever calls this
    knows that it does. Returns what was cancelled, in words. Idempotent.

    Raises
    ------
    StartError
        The batch system cannot be asked, or a job does not end: the records stay.
    """
    return [said for job in recorded_jobs(cluster) for said in _cancel_job(job)]


def _cancel_job(job: Job) -> list[str]:
    system = _system_of(job)
    directory = directory_of(job.cluster)
    ids = [job.id] if job.id else system.named(job.name)
    going = sorted(job_id for job_id, seen in system.states(ids).items() if seen.state != "ended") if ids else []
    cancel_and_wait(system, going, at_once=False)
    Files(directory, job.name).remove()
    remove_if_empty(directory)
    return [f"{system.title} job {job_id}" for job_id in going]


def _system_of(job: Job) -> BatchSystem:
    from . import find_launcher

    system = getattr(find_launcher(job.launcher), "system", None)
    if not isinstance(system, BatchSystem):
        raise StartError(f"the launcher {job.launcher!r} of the recorded job {job.id or job.name} has no batch system")
    return system


def end_predecessors(cluster: str) -> None:
    """Of a cluster of this name that was killed: this one has the name now."""
    for job in recorded_jobs(cluster):
        if job.pid != os.getpid():
            try:
                for said in _cancel_job(job):
                    log.warning("cancelled %s, left by a cluster %s that was killed", said, cluster)
            except StartError as error:
                log.warning("job %s, left by a cluster %s that was killed, stays: %s", job.id or job.name, cluster, error)


def cancel_and_wait(
    system: BatchSystem, ids: Sequence[str], *, at_once: bool, within_s: float = STOP_TIMEOUT_S
) -> None:
    """End these jobs, and wait until they have ended; in order, they have ``within_s`` for that.

    Raises
    ------
    StartError
        Some have not; or the batch system cannot be asked.
    """
    if not ids:
        return
    system.cancel(ids, at_once=at_once)
    if left := _left(system, ids, KILL_TIMEOUT_S if at_once else within_s):
        raise StartError(f"{system.title} was told to end the jobs {', '.join(left)}, but they have not ended yet")


def _left(system: BatchSystem, ids: Sequence[str], timeout_s: float) -> list[str]:
    """Those that have not ended by then."""
    until = time.monotonic() + timeout_s
    pause_s = 0.1
    while True:
        found = system.states(ids)
        left = [job_id for job_id, seen in found.items() if seen.state != "ended"]
        if not left or time.monotonic() > until:
            return left
        time.sleep(pause_s)
        pause_s = min(1.0, 1.5 * pause_s)


# --- where it lies ---------------------------------------------------------------------------------------------------


def directory_of(cluster: str) -> Path:
    """Hosts that share a home may each have a cluster of this name; so may the directories of clusters of one host."""
    return config.shared_dir(_DIRECTORY) / f"{config.check_name(cluster)}{_here()}"


def _here() -> str:
    return f"@{config.this_host()}-{zlib.crc32(os.fsencode(config.runtime_dir())):08x}"


def _directories() -> list[Path]:
    try:
        return sorted(path for path in config.shared_dir(_DIRECTORY).iterdir() if path.name.endswith(_here()))
    except FileNotFoundError:
        return []


def remove_if_empty(directory: Path) -> None:
    """Unless there are jobs in it."""
    if any(directory.glob(f"*{_RECORD}")):
        return
    (directory / NODE_FILE).unlink(missing_ok=True)
    with suppress(OSError):  # another is making something there
        for each in (directory, directory.parent, directory.parent.parent):
            each.rmdir()
