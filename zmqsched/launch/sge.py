"""Nodes in jobs of Grid Engine (SGE, UGE, Son of Grid Engine), each in one of its own.

How several CPUs are asked for is every site's own: the group's options name its parallel environment (``-pe smp 8``), and
a node has as many slots as its job. ``qdel`` kills at once; a node that was told to drain has left by then.
"""

from __future__ import annotations

import getpass
import math
from collections.abc import Sequence

from ..clusterfile import NodeGroup
from .batch import BatchLauncher
from .jobs import BatchSystem, CommandFailed, Files, Job, Seen, run


class SGE(BatchSystem):
    title = "SGE"
    submit = "qsub"

    def submit_command(self, group: NodeGroup, job: Job, files: Files) -> list[str]:
        batch = group.batch
        words = ["qsub", "-terse", "-N", job.name, "-S", "/bin/bash", "-j", "y", "-o", str(files.output(0))]
        words += ["-l", f"h_rt={math.ceil(batch.time)}"] if batch.time else []
        words += ["-q", batch.partition] if batch.partition else []
        words += ["-A", batch.account] if batch.account else []
        return [*words, *batch.options, str(files.script)]

    def id_in(self, said: str) -> str:
        number = said.strip()
        return number if number.isdigit() else ""

    def node_options(self, group: NodeGroup) -> list[str]:
        slots = [] if group.slots else ['--slots="${NSLOTS:-1}"']
        return [*slots, *([f"--walltime={group.batch.time:g}"] if group.batch.time else [])]

    def states(self, ids: Sequence[str]) -> dict[str, Seen]:
        lines = [line.split() for line in run("qstat", "-u", getpass.getuser()).splitlines()]
        return {words[0]: _seen(words[0], words[4]) for words in lines if len(words) > 4 and words[0] in ids}

    def fate(self, job_id: str) -> str | None:
        try:
            said = run("qacct", "-j", job_id)
        except CommandFailed:  # without accounting, or it comes later
            return None
        facts = dict(line.split(None, 1) for line in said.splitlines() if len(line.split(None, 1)) == 2)
        failed, code = facts.get("failed", "0").strip(), facts.get("exit_status", "").strip()
        if not code:
            return None
        words = [f"exit code {code}"] if code != "0" else []
        return ", ".join(words + ([f"failed {failed}"] if failed != "0" else []))

    def cancel(self, ids: Sequence[str], *, at_once: bool) -> None:
        run("qdel", *ids, forgiven="does not exist")

    def named(self, name: str) -> list[str]:
        found, number = [], ""
        for line in run("qstat", "-u", getpass.getuser(), "-r").splitlines():
            words = line.split()
            if words and words[0].isdigit():
                number = words[0]
            elif words[:2] == ["Full", "jobname:"] and words[2:] == [name]:
                found.append(number)
        return found


class SGELauncher(BatchLauncher):
    name = "sge"
    system = SGE()


def _seen(job_id: str, letters: str) -> Seen:
    """``qw``, ``hqw``, ``Eqw``, ``r``, ``t``, ``dr``, ..."""
    if "q" not in letters:
        return Seen("running")
    return Seen("pending", f"PD: {_error(job_id) if 'E' in letters else letters}")


def _error(job_id: str) -> str:
    """Why the job cannot be started: it waits until somebody clears that, or cancels it."""
    lines = [line.strip() for line in run("qstat", "-j", job_id, forgiven="do not exist").splitlines()]
    return next((line for line in lines if line.startswith("error reason")), "Eqw")
