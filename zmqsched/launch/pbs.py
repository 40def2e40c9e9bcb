"""Nodes in jobs of PBS (OpenPBS, PBS Pro, Torque), each in one of its own.

Where CPUs are not asked for by ``select`` (Torque), the group's options say how (``-l nodes=1:ppn=8``), and it has no
``slots``: a node then has as many as its job.
"""

from __future__ import annotations

import getpass
import re
from collections.abc import Sequence

from ..clusterfile import NodeGroup, State
from .batch import BatchLauncher, in_hours
from .jobs import BatchSystem, Files, Job, Seen, run

_UNKNOWN = "Unknown Job"
# qstat's job_state; whatever is not here has ended.
_STATES: dict[str, State] = {
    **dict.fromkeys("QHWTM", "pending"),
    **dict.fromkeys("RESBU", "running"),
}


class PBS(BatchSystem):
    title = "PBS"
    submit = "qsub"

    def submit_command(self, group: NodeGroup, job: Job, files: Files) -> list[str]:
        batch = group.batch
        words = ["qsub", "-N", job.name, "-S", "/bin/bash", "-j", "oe", "-o", str(files.output(0))]
        words += ["-l", f"select=1:ncpus={group.slots}"] if group.slots else []
        words += ["-l", f"walltime={in_hours(batch.time)}"] if batch.time else []
        words += ["-q", batch.partition] if batch.partition else []
        words += ["-A", batch.account] if batch.account else []
        return [*words, *batch.options, str(files.script)]

    def id_in(self, said: str) -> str:
        found = said.split()
        return found[-1] if found and re.match(r"\d+(\.|\Z)", found[-1]) else ""

    def node_options(self, group: NodeGroup) -> list[str]:
        slots = [] if group.slots else ['--slots="${NCPUS:-${PBS_NUM_PPN:-1}}"']
        limit = f"--walltime={group.batch.time:g}" if group.batch.time else '${PBS_WALLTIME:+"--walltime=$PBS_WALLTIME"}'
        return [*slots, limit]

    def states(self, ids: Sequence[str]) -> dict[str, Seen]:
        found = {_number(facts["Job Id"]): _seen(facts) for facts in _facts(run("qstat", "-f", *ids, forgiven=_UNKNOWN))}
        return {job_id: found[_number(job_id)] for job_id in ids if _number(job_id) in found}

    def fate(self, job_id: str) -> str | None:
        for options in (["-f"], ["-x", "-f"]):  # Torque shows what has ended; the others do when they are asked to
            for facts in _facts(run("qstat", *options, job_id, forgiven=_UNKNOWN)):
                if code := facts.get("Exit_status"):
                    return "" if code == "0" else f"exit code {code}"
        return None

    def cancel(self, ids: Sequence[str], *, at_once: bool) -> None:
        if at_once:
            run("qsig", "-s", "SIGKILL", *ids, forgiven="qsig: ")  # one that waits has nothing to kill
        run("qdel", *ids, forgiven=_UNKNOWN)

    def named(self, name: str) -> list[str]:
        return run("qselect", "-N", name, "-u", getpass.getuser()).split()


class PBSLauncher(BatchLauncher):
    name = "pbs"
    system = PBS()


def _number(job_id: str) -> str:
    """Without the server, which is cut or left out here and there."""
    return job_id.partition(".")[0]


def _facts(said: str) -> list[dict[str, str]]:
    """Of each job that ``qstat -f`` tells of. Long values go on in lines that begin with a tab."""
    jobs: list[dict[str, str]] = []
    for line in said.replace("\n\t", "").splitlines():
        if line.startswith("Job Id:"):
            jobs.append({"Job Id": line.removeprefix("Job Id:").strip()})
        elif jobs and " = " in line:
            name, _, value = line.strip().partition(" = ")
            jobs[-1][name] = value
    return jobs


def _seen(facts: dict[str, str]) -> Seen:
    word = facts.get("job_state", "")
    state = _STATES.get(word, "ended")
    return Seen(state, f"PD: {facts.get('comment', word)}" if state == "pending" else "")
