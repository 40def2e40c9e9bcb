"""Nodes in jobs of Slurm: one job for all of them, with ``srun`` inside, or an array with a job for each.

* What has ended, ``squeue`` still knows for some minutes; how it ended, ``sacct`` says where there is accounting, else
  ``scontrol``.
* Jobs are submitted with ``--requeue``: one that was preempted, or lost its host, is started again by Slurm, and its nodes
  join again under their labels.
* A node knows when Slurm will end it and leaves before (older Slurms do not tell jobs, so the script asks). If the limit is
  lowered meanwhile, Slurm's SIGTERM makes the node drain for as long as the site's KillWait; no other signal is asked for.
"""

from __future__ import annotations

import getpass
import shlex
from collections.abc import Mapping, Sequence

from ..clusterfile import NodeGroup, State
from .batch import BatchLauncher, in_hours
from .jobs import BatchSystem, CommandFailed, Files, Job, Seen, run

# squeue's %T; whatever is not here has ended.
_STATES: dict[str, State] = {
    **dict.fromkeys(("PENDING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "RESV_DEL_HOLD", "SPECIAL_EXIT"), "pending"),
    "CONFIGURING": "starting",
    **dict.fromkeys(
        ("RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "RESIZING", "POWER_UP_NODE"), "running"
    ),
}


class Slurm(BatchSystem):
    title = "Slurm"
    submit = "sbatch"
    joint = True

    def submit_command(self, group: NodeGroup, job: Job, files: Files) -> list[str]:
        batch = group.batch
        last = len(job.labels) - 1
        words = ["sbatch", "--parsable", f"--job-name={job.name}", "--requeue", "--ntasks-per-node=1"]
        if job.array:
            words += ["--nodes=1", f"--array=0-{last}", f"--output={files.output('%a')}"]
        elif last:
            words += [f"--nodes={last + 1}", "--no-kill", f"--output={files.job_output}"]
        else:
            words += ["--nodes=1", f"--output={files.output(0)}"]
        words += [f"--cpus-per-task={group.slots}"] if group.slots else []
        words += [f"--time={in_hours(batch.time)}"] if batch.time else []
        words += [f"--partition={batch.partition}"] if batch.partition else []
        words += [f"--account={batch.account}"] if batch.account else []
        return [*words, *batch.options, str(files.script)]

    def environment(self, ours: Mapping[str, str]) -> Mapping[str, str]:
        """In a job of Slurm its variables describe that job, and would be handed down to ours."""
        return {name: value for name, value in ours.items() if not name.startswith("SLURM_") or name == "SLURM_CONF"}

    def id_in(self, said: str) -> str:
        number = said.strip().partition(";")[0]
        return number if number.isdigit() else ""

    def ids(self, job: Job) -> list[str]:
        return [f"{job.id}_{index}" if job.array else job.id for index in range(len(job.labels))]

    def head(self, group: NodeGroup, job: Job, files: Files) -> list[str]:
        lines = [  # alone the number of an array's last job means all of them
            'job="${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}"',
            'if [ -z "$SLURM_JOB_END_TIME" ]; then',
            '    end=$(squeue --noheader --jobs="$job" --format=%e)',
            '    case "$end" in',  # it is not known, or there is none: to `date` nothing means today
            '        [0-9]*) export SLURM_JOB_END_TIME=$(date --date="$end" +%s) ;;',
            "    esac",
            "fi",
        ]
        if len(job.labels) > 1 and not job.array:  # srun has not taken over the job's CPUs for each task since 22.05
            words = "--ntasks-per-node=1 --mpi=none --no-kill --kill-on-bad-exit=0 --wait=0"
            words += ' ${SLURM_CPUS_PER_TASK:+"--cpus-per-task=$SLURM_CPUS_PER_TASK"}'
            rest = shlex.join([f"--output={files.output('%t')}", "/bin/bash", str(files.script), "node"])
            lines += ['if [ "$1" != node ]; then', f"    exec srun {words} {rest}", "fi"]
        return lines

    def index(self, job: Job) -> str:
        if job.array:
            return '"$SLURM_ARRAY_TASK_ID"'
        return '"$SLURM_PROCID"' if len(job.labels) > 1 else "0"

    def node_options(self, group: NodeGroup) -> list[str]:
        """Without cgroups a process sees all CPUs of its host; Slurm says how many are its own."""
        return [] if group.slots else ['--slots="${SLURM_CPUS_PER_TASK:-$SLURM_CPUS_ON_NODE}"']

    def states(self, ids: Sequence[str]) -> dict[str, Seen]:
        said = run(
            "squeue", "--noheader", "--array", "--states=all", f"--jobs={','.join(ids)}", "--format=%i|%T|%r",
            forgiven="Invalid job id",
        )  # fmt: skip
        return dict(_seen(line) for line in said.splitlines())

    def fate(self, job_id: str) -> str | None:
        try:
            said = run("sacct", "--noheader", "--allocations", "--parsable2", f"--jobs={job_id}", "--format=State,ExitCode")
        except CommandFailed:  # without accounting
            said = ""
        if said.strip():
            state, code, reason = *said.splitlines()[-1].split("|"), ""
        else:
            said = run("scontrol", "show", "job", "--oneliner", job_id, forgiven="Invalid job id")
            facts = dict(word.partition("=")[::2] for word in said.split())
            state, code, reason = facts.get("JobState", ""), facts.get("ExitCode", ""), facts.get("Reason", "")
        return _in_words(state, code, reason)

    def cancel(self, ids: Sequence[str], *, at_once: bool) -> None:
        if at_once:
            run("scancel", "--quiet", "--full", "--signal=KILL", *ids)
        run("scancel", "--quiet", *ids)

    def named(self, name: str) -> list[str]:
        said = run("squeue", "--noheader", f"--name={name}", f"--user={getpass.getuser()}", "--format=%F")
        return sorted(set(said.split()))


class SlurmLauncher(BatchLauncher):
    name = "slurm"
    system = Slurm()


def _seen(line: str) -> tuple[str, Seen]:
    job_id, word, reason = line.strip().split("|")
    state = _STATES.get(word, "ended")
    return job_id, Seen(state, f"PD: {reason}" if state == "pending" else "")


def _in_words(state: str, code: str, reason: str) -> str | None:
    number, _, signal = code.partition(":")
    if not state:
        return None
    if state == "COMPLETED" and number == "0":
        return ""
    words = [state]
    words += [f"exit code {number}"] if number not in ("", "0") else []
    words += [f"signal {signal}"] if signal not in ("", "0") else []
    words += [reason] if reason not in ("", "None", "NonZeroExitCode") else []
    return ", ".join(words)
