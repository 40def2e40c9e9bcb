"""Nodes in the jobs of a batch system: what Slurm, PBS and SGE have in common.

Rules
-----
* What is submitted is recorded (``jobs.py``). A job is told the path of a copy of the connection file of the role "node";
  no secret is in a script, on a command line or in an environment.
* A job's nodes end when the broker says goodbye, and by themselves when it has said nothing for ``NODE_ALONE_S``: then its
  host has died, or nobody followed it.
* The site is asked about all jobs in one command, and at most every ``ASK_EVERY_S``.
"""

from __future__ import annotations

import math
import os
import secrets
import shlex
import sys
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import ClassVar

import msgspec

from .. import config
from ..clusterfile import NodeGroup
from ..config import ConnectionFile
from ..errors import ConnectionFileError, StartError
from .base import Launched, Launcher, Site, node_command
from .jobs import (
    NODE_FILE,
    STOP_TIMEOUT_S,
    BatchSystem,
    CommandFailed,
    Files,
    Job,
    Seen,
    cancel_and_wait,
    directory_of,
    end_predecessors,
    remove_if_empty,
    run,
)
from .output import tail_of

ASK_EVERY_S = 2.0
# When the site does not answer: it has enough to do.
ASK_AGAIN_S = 20.0
CLOSE_TIMEOUT_S = 4.0
# With six digits, as long as the shortest limit among batch systems, 15 characters.
_JOB_NAME = "zmqsched-"


class BatchLauncher(Launcher):
    """Nodes of one group as jobs of a batch system."""

    queues: ClassVar[bool] = True
    name: ClassVar[str]
    system: ClassVar[BatchSystem]

    def __init__(self, group: NodeGroup, site: Site) -> None:
        super().__init__(group, site)
        self._jobs: dict[str, Job] = {}  # by name
        self._stopped: set[str] = set()  # labels
        self._ended: dict[str, Launched] = {}  # by label
        self._seen: dict[str, Seen] = {}  # by id
        self._trouble = ""  # why the batch system could not be asked
        self._asked_at = float("-inf")
        self._patience_s = STOP_TIMEOUT_S
        self._directory: Path | None = None
        self._file: ConnectionFile | None = None  # that is in it

    # --- start -----------------------------------------------------------------------------------------------------

    def start(self, labels: Sequence[str]) -> None:
        file = self.site.file
        if all(address.startswith("ipc://") for address in file.addresses.work):
            raise StartError(
                f"nodes in jobs of {self.system.title} need a broker that listens on TCP: give broker.listen an address of "
                "this host that theirs can reach"
            )
        if self._directory is None:
            end_predecessors(file.name)
        self._directory, self._file = directory_of(file.name), None
        config.make_private(self._directory)
        self._hand_on()
        begun: list[Job] = []
        try:
            begun.extend(self._submit(job) for job in self._planned(labels, file.name))
        except BaseException:
            cancel_and_wait(self.system, [job_id for job in begun for job_id in self.system.ids(job)], at_once=True)
            for job in begun:
                self._forget(job)
            raise
        self._asked_at = float("-inf")

    def _planned(self, labels: Sequence[str], cluster: str) -> Iterator[Job]:
        whole = [tuple(labels)] if self.system.joint else [(label,) for label in labels]
        array = self.group.batch.array or self.group.scale is not None
        for some in whole:
            yield Job(
                launcher=self.name, cluster=cluster, host=config.this_host(), pid=os.getpid(),
                name=f"{_JOB_NAME}{secrets.token_hex(3)}", labels=some, array=self.system.joint and array and len(some) > 1,
            )  # fmt: skip

    def _submit(self, job: Job) -> Job:
        files = self._files(job)
        files.write(job)
        try:
            config.replace_private(files.script, self._script(job, files).encode())
            said = run(*self.system.submit_command(self.group, job, files), environment=self.system.environment(os.environ))
            if not (found := self.system.id_in(said)):
                raise CommandFailed(f"{self.system.submit} did not say a job's id but {said[:200]!r}")
            job = msgspec.structs.replace(job, id=found)
            files.write(job)
        except BaseException:  # also an interrupt: it may have been submitted
            with suppress(StartError):
                if left := self.system.named(job.name):
                    self.system.cancel(left, at_once=True)
            files.remove()
            raise
        self._jobs[job.name] = job
        for index, label in enumerate(job.labels):
            self._ended.pop(label, None)
            self._stopped.discard(label)
            _link(self.site.log_path(label), files.output(index))
        return job

    def _script(self, job: Job, files: Files) -> str:
        group = self.group
        command = node_command(group, "", str(files.directory / NODE_FILE), "")
        words = [shlex.quote(word) for word in command[1:] if word != "--label="]
        words += ['--label="$1"', f"--give-up-after={config.NODE_ALONE_S:g}", *self.system.node_options(group)]
        pythons = [group.python] if group.python else ["python3", sys.executable]
        return "\n".join([
            "#!/bin/bash",
            f"# Of the zmqsched cluster {job.cluster}: nodes {', '.join(job.labels)}.",
            *self.system.head(group, job, files),
            f"set -- {shlex.join(job.labels)}",
            f"shift {self.system.index(job)}",
            f"cd {shlex.quote(group.cwd)} || exit 1" if group.cwd else f"cd {shlex.quote(os.getcwd())} 2>/dev/null",
            *(f"export {name}={shlex.quote(value)}" for name, value in group.env.items()),
            *group.prologue,
            f"for python in {shlex.join(pythons)}; do",
            '    "$python" -c "import msgspec, zmq, zmqsched" >/dev/null 2>&1 && break',
            "    python=",
            "done",
            'if [ -z "$python" ]; then',
            f"    echo {shlex.quote(_no_python(pythons))} >&2",
            "    exit 1",
            "fi",
            f"if [ ! -r {shlex.quote(str(files.directory / NODE_FILE))} ]; then",
            f"    echo {shlex.quote(_not_shared(files.directory))} >&2",
            "    exit 1",
            "fi",
            f'exec "$python" {" ".join(words)}',
            "",
        ])  # fmt: skip

    def preview(self, labels: Sequence[str]) -> list[str]:
        lines = []
        name = self.site.path.parent.name
        for job in self._planned(labels, name):
            files = Files(directory_of(name), job.name)
            lines += [shlex.join(self.system.submit_command(self.group, job, files)), "# with the script"]
            lines += [f"#   {line}" for line in self._script(job, files).splitlines()]
        return lines

    # --- poll ------------------------------------------------------------------------------------------------------

    def poll(self) -> list[Launched]:
        if self._jobs and time.monotonic() >= self._asked_at + (ASK_AGAIN_S if self._trouble else ASK_EVERY_S):
            self._ask()
        return [self._launched(label, job_id) for label, job_id in self._nodes().items()]

    def _nodes(self) -> dict[str, str]:
        """Job ids by label, of all that were not stopped."""
        return {
            label: job_id for job in self._jobs.values()
            for label, job_id in zip(job.labels, self.system.ids(job), strict=True) if label not in self._stopped
        }  # fmt: skip

    def _hand_on(self) -> None:
        """The connection file for those that will begin: a broker that follows another may have other keys, and keys are
        rotated."""
        with suppress(ConnectionFileError):  # no broker is up
            file = self.site.file
            if file != self._file and self._directory is not None:
                self._file = file
                file.write(self._directory / NODE_FILE)

    def _ask(self) -> None:
        self._hand_on()
        going = {job_id for label, job_id in self._nodes().items() if label not in self._ended}
        try:
            found = self.system.states(sorted(going)) if going else {}
            self._trouble = ""
        except CommandFailed as error:
            self._trouble = str(error)
        else:
            self._seen = found
            for label, job_id in self._nodes().items():
                if label not in self._ended and (job_id not in found or found[job_id].state == "ended"):
                    self._ended[label] = self._ending(label, job_id)
        self._asked_at = time.monotonic()

    def _launched(self, label: str, job_id: str) -> Launched:
        if label in self._ended:
            return self._ended[label]
        seen = self._seen.get(job_id, Seen("pending"))
        return Launched(label, seen.state, self._trouble or seen.why, self._where(job_id))

    def _ending(self, label: str, job_id: str) -> Launched:
        """How it ended, with what it wrote last; "" if in order."""
        try:
            fate = self.system.fate(job_id)
        except CommandFailed:
            fate = None
        why = f"how, {self.system.title} does not say" if fate is None else fate
        tail = self._tail(label) if why else ""
        return Launched(label, "ended", f"{why}\n{tail}" if tail else why, self._where(job_id))

    def _tail(self, label: str) -> str:
        job = self._job_of(label)
        files = self._files(job)
        tails = [tail_of(files.output(job.labels.index(label))), tail_of(files.job_output)]
        return "\n".join(dict.fromkeys(filter(None, tails)))

    def _where(self, job_id: str) -> str:
        return f"{self.system.title} job {job_id}"

    # --- stop ------------------------------------------------------------------------------------------------------

    def stop(self, labels: Collection[str], *, at_once: bool = False) -> None:
        """As of the base. A node that is one of several in a job cannot be ended alone: what it has of the job ends with the
        others; by force that is an error."""
        nodes = self._nodes()
        chosen = {label: nodes[label] for label in labels if label in nodes}
        others = {job_id for label, job_id in nodes.items() if label not in chosen}
        shared = [label for label, job_id in chosen.items() if job_id in others]
        if at_once and shared:
            where = self._where(chosen[shared[0]])
            raise StartError(f"{', '.join(shared)} cannot be killed alone: others are in {where} too; use an array of jobs")
        going = {job_id for label, job_id in chosen.items() if label not in shared and label not in self._ended}
        cancel_and_wait(self.system, sorted(going), at_once=at_once, within_s=self._patience_s)
        self._stopped.update(chosen)
        for job in list(self._jobs.values()):
            if self._stopped.issuperset(job.labels):
                self._forget(job)

    def _forget(self, job: Job) -> None:
        self._jobs.pop(job.name, None)
        self._files(job).remove()
        for label in job.labels:
            self._ended.pop(label, None)
            self._stopped.discard(label)

    def close(self) -> None:
        """What the batch system has not ended after a moment, it was told to end: that is an error, but not for long."""
        self._patience_s = CLOSE_TIMEOUT_S
        self.stop(list(self._nodes()))
        if self._directory is not None and not self._jobs:
            remove_if_empty(self._directory)
            self._directory = None

    def _job_of(self, label: str) -> Job:
        return next(job for job in self._jobs.values() if label in job.labels)

    def _files(self, job: Job) -> Files:
        assert self._directory is not None
        return Files(self._directory, job.name)


def _link(path: Path, target: Path) -> None:
    """So that a node's output is found where that of all nodes is."""
    with suppress(FileNotFoundError):  # the cluster's directory is gone
        path.parent.mkdir(mode=0o700, exist_ok=True)
        path.unlink(missing_ok=True)
        path.symlink_to(target)


def _no_python(pythons: Sequence[str]) -> str:
    return (
        f"zmqsched: on this host none of {', '.join(pythons)} has zmqsched: say which one does (python = ...), or load it "
        "in the prologue"
    )


def _not_shared(directory: Path) -> str:
    return (
        f"zmqsched: this host does not see {directory}, which the cluster's host has written: set ZMQSCHED_DIR or "
        "XDG_STATE_HOME there to a directory of a file system that both have"
    )


def in_hours(seconds: float) -> str:
    """``H:MM:SS``, as all batch systems take it; rounded up."""
    whole = math.ceil(seconds)
    return f"{whole // 3600}:{whole % 3600 // 60:02}:{whole % 60:02}"
