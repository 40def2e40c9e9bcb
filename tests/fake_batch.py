"""Batch systems for tests: the commands of Slurm, PBS and SGE as one small program, which runs a job as soon as it is
submitted, unless it is told to hold or to refuse it.

Each job is a file ``ID.json`` in ``$FAKE_BATCH``, beside ``ID.exit`` when it has ended.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

COMMANDS = {
    "slurm": ("sbatch", "squeue", "scancel", "scontrol"),
    "pbs": ("qsub", "qstat", "qdel", "qselect", "qsig"),
    "sge": ("qsub", "qstat", "qdel", "qacct"),
}


class FakeBatch:
    """For tests: ``bin`` goes to the front of PATH."""

    def __init__(self, directory: Path, kind: str) -> None:
        self.directory = directory / "jobs"
        self.bin = directory / "bin"
        self.directory.mkdir(parents=True)
        self.bin.mkdir()
        for name in COMMANDS[kind]:
            path = self.bin / name
            run = f'{sys.executable} -SE {__file__} {kind} {name} "$@"'
            path.write_text(f"#!/bin/sh\nFAKE_BATCH={self.directory} exec {run}\n")
            path.chmod(0o755)

    def refuse(self, why: str) -> None:
        """From now on nothing is accepted."""
        (self.directory / "refuse").write_text(why)

    def hold(self, why: str) -> None:
        """What is submitted from now on waits."""
        (self.directory / "hold").write_text(why)

    def release(self) -> None:
        (self.directory / "hold").unlink()
        for job in _jobs(self.directory):
            if job["held"]:
                _start(self.directory, {**job, "held": ""})

    def forget(self, job_id: str) -> None:
        """As systems do with jobs that have ended."""
        for suffix in ("json", "exit"):
            (self.directory / f"{job_id}.{suffix}").unlink()

    def going(self) -> list[str]:
        return [job["id"] for job in _jobs(self.directory) if not _ended(self.directory, job)]


def _jobs(directory: Path) -> Iterator[dict]:
    for path in sorted(directory.glob("*.json")):
        with suppress(FileNotFoundError):
            yield json.loads(path.read_text())


def _write(directory: Path, job: dict) -> None:
    draft = directory / f".{job['id']}.{os.getpid()}"
    draft.write_text(json.dumps(job))
    draft.replace(directory / f"{job['id']}.json")


def _ended(directory: Path, job: dict) -> str:
    """Its exit code, "" before."""
    with suppress(FileNotFoundError):
        return (directory / f"{job['id']}.exit").read_text().strip()
    return ""


def _start(directory: Path, job: dict) -> None:
    exit_file = directory / f"{job['id']}.exit"
    line = f'"$@" >{job["output"]} 2>&1 </dev/null; echo $? >{exit_file}.new; mv {exit_file}.new {exit_file}'
    process = subprocess.Popen(
        ["/bin/sh", "-c", line, "sh", "/bin/bash", job["script"]], start_new_session=True, stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, **job["env"]},
    )  # fmt: skip
    process.returncode = 0  # it is nobody's child to wait for
    _write(directory, {**job, "pid": process.pid})


def _end(directory: Path, job: dict, number: int) -> None:
    """To what the job runs, as to a process group; a job that waits is over."""
    if job["held"]:
        _write(directory, {**job, "held": ""})
        (directory / f"{job['id']}.exit").write_text("271")
        return
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError, IndexError):
            after = (entry / "stat").read_text().rpartition(")")[2].split()
            if int(after[3]) == job["pid"] and int(entry.name) != job["pid"]:  # all of its session but the shell that waits
                os.kill(int(entry.name), number)


def main(kind: str, command: str, words: list[str]) -> int:
    directory = Path(os.environ["FAKE_BATCH"])
    jobs = {job["id"]: job for job in _jobs(directory)}
    chosen = [job_id for word in words for job_id in word.removeprefix("--jobs=").split(",") if job_id[:1].isdigit()]
    if command in ("qsub", "sbatch"):
        return _submit(directory, kind, words)
    if command in ("qdel", "scancel", "qsig"):
        number = signal.SIGKILL if command == "qsig" or "--signal=KILL" in words or kind == "sge" else signal.SIGTERM
        for job_id in chosen:
            if job_id in jobs and not _ended(directory, jobs[job_id]):
                _end(directory, jobs[job_id], number)
            elif kind == "pbs":
                print(f"{command}: Unknown Job Id {job_id}", file=sys.stderr)
        return 0
    if command == "qselect":
        print(*(job["id"] for job in jobs.values() if job["name"] == words[1] and not _ended(directory, job)), sep="\n")
        return 0
    return {"slurm": _slurm, "pbs": _pbs, "sge": _sge}[kind](directory, command, words, chosen, jobs)


def _submit(directory: Path, kind: str, words: list[str]) -> int:
    if (directory / "refuse").exists():
        print((directory / "refuse").read_text(), file=sys.stderr)
        return 1
    held = (directory / "hold").read_text() if (directory / "hold").exists() else ""
    number = 100 + len(list(directory.glob("*.json")))
    if kind == "slurm":
        options = dict(word.partition("=")[::2] for word in words[:-1])
        name, output = options["--job-name"], options["--output"]
        last = options.get("--array", "").rpartition("-")[2]
        ids = {f"{number}_{index}": str(index) for index in range(int(last) + 1)} if last else {str(number): ""}
    else:
        name, output = words[words.index("-N") + 1], words[words.index("-o") + 1]
        ids = {f"{number}.server" if kind == "pbs" else str(number): ""}
    for job_id, index in ids.items():
        job = {
            "id": job_id, "name": name, "script": words[-1], "output": output.replace("%a", index), "held": held, "pid": 0,
            "words": words, "env": {"SLURM_JOB_ID": job_id, "SLURM_ARRAY_TASK_ID": index, "SLURM_CPUS_ON_NODE": "1"},
        }  # fmt: skip
        _write(directory, job) if held else _start(directory, job)
    print(f"{number}.server" if kind == "pbs" else number)
    return 0


def _slurm(directory: Path, command: str, words: list[str], chosen: list[str], jobs: dict) -> int:
    if command == "scontrol":
        code = _ended(directory, jobs[chosen[0]])
        state = "FAILED" if code != "0" else "COMPLETED"
        print(f"JobId={chosen[0]} JobState={state} Reason=NonZeroExitCode ExitCode={code}:0")
        return 0
    name = next((word.partition("=")[2] for word in words if word.startswith("--name=")), "")
    if name:
        print(*{job["id"].partition("_")[0] for job in jobs.values() if job["name"] == name}, sep="\n")
        return 0
    known = [job for job in jobs.values() if job["id"] in chosen or job["id"].partition("_")[0] in chosen]
    if not known:
        print("slurm_load_jobs error: Invalid job id specified", file=sys.stderr)
        return 1
    if "--format=%e" in words:  # jobs without a limit have no end
        print("N/A")
        return 0
    for job in known:
        state = "PENDING" if job["held"] else "FAILED" if _ended(directory, job) else "RUNNING"
        print(f"{job['id']}|{state}|{job['held'] or 'None'}")
    return 0


def _pbs(directory: Path, command: str, words: list[str], chosen: list[str], jobs: dict) -> int:
    """As OpenPBS: what has ended is shown with -x only."""
    for job_id in chosen:
        code = _ended(directory, jobs[job_id]) if job_id in jobs else "gone"
        if code and (code == "gone" or "-x" not in words):
            print(f"qstat: Unknown Job Id {job_id}", file=sys.stderr)
            continue
        job = jobs[job_id]
        state = "F" if code else "Q" if job["held"] else "R"
        print(f"Job Id: {job_id}\n    Job_Name = {job['name']}\n    job_state = {state}")
        if job["held"]:
            middle = len(job["held"]) // 2
            print(f"    comment = {job['held'][:middle]}\n\t{job['held'][middle:]}")
        if code:
            print(f"    Exit_status = {code}")
        print()
    return 153 if any(job_id not in jobs for job_id in chosen) else 0


def _sge(directory: Path, command: str, words: list[str], chosen: list[str], jobs: dict) -> int:
    if command == "qacct":
        code = _ended(directory, jobs[chosen[0]]) if chosen and chosen[0] in jobs else ""
        if not code:
            print(f"error: job id {chosen[0]} not found", file=sys.stderr)
            return 1
        print(f"{'=' * 60}\nqname        all.q\nfailed       0\nexit_status  {code}")
        return 0
    if "-j" in words:
        print(f"job_number:                 {chosen[0]}\nerror reason    1:      {jobs[chosen[0]]['held']}")
        return 0
    going = [job for job in jobs.values() if not _ended(directory, job)]
    if going:
        print("job-ID  prior   name       user         state submit/start at     queue      slots ja-task-ID\n" + "-" * 80)
    for job in going:
        state = "Eqw" if job["held"] else "r"
        print(f"{job['id']:>7} 0.55500 {job['name'][:10]} root {state:>6} 11/22/2026 17:00:00 all.q@host 1")
        if "-r" in words:
            print(f"       Full jobname:     {job['name']}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2], sys.argv[3:]))
