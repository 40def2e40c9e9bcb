"""``zmqsched run``: a script with a cluster for its time, on one rank and on several. A real srun is in tests/system."""

from __future__ import annotations

import os
import shutil
import signal
import stat
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import Home, alive, eventually

from zmqsched.config import ConnectionFile, shared_dir
from zmqsched.errors import StartError
from zmqsched.ranks import Ranks, find_ranks, remove_left

pytestmark = pytest.mark.system

SLURM = {
    "SLURM_JOB_ID": "12", "SLURM_STEP_ID": "3", "SLURM_PROCID": "2", "SLURM_NTASKS": "7", "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_TASKS_PER_NODE": "1(x2),2", "SLURM_NODEID": "2", "SLURM_STEP_NODELIST": "a[1-2],b",
    "SLURM_CPUS_ON_NODE": "8", "SLURM_CLUSTER_NAME": "big",
}  # fmt: skip
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "6", "OMPI_COMM_WORLD_LOCAL_SIZE": "3",
    "PMIX_NAMESPACE": "prterun-a-77@1",
}  # fmt: skip
SCRIPT = """
    import sys, time
    from zmqsched import Client
    with Client() as client:
        while len(client.nodes()) < int(sys.argv[1]):
            time.sleep(0.01)
        print(sum(client.map(abs, range(-10, 0))), *sys.argv[1:])
        print(sorted(node.label for node in client.nodes()))
"""


class Started:
    """Ranks of one program, as a launcher starts them."""

    def __init__(self, home: Home, directory: Path) -> None:
        self.home = home
        self.directory = directory
        self.processes: list[subprocess.Popen[str]] = []

    def script(self, source: str) -> Path:
        path = self.directory / "script.py"
        path.write_text(textwrap.dedent(source))
        return path

    def start(self, words: list[object], rank: int = 0, size: int = 1) -> subprocess.Popen[str]:
        """As Open MPI does, all on this host, if there are several."""
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "OMPI_", "PMI"))}
        if size > 1:
            clean |= {
                "OMPI_COMM_WORLD_RANK": str(rank), "OMPI_COMM_WORLD_SIZE": str(size),
                "OMPI_COMM_WORLD_LOCAL_SIZE": str(size), "PMIX_NAMESPACE": f"test@{os.getpid()}",
            }  # fmt: skip
        process = subprocess.Popen(
            [sys.executable, "-m", "zmqsched", "run", *map(str, words)], env=clean, cwd=self.directory, text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        self.processes.append(process)
        return process

    def end(self) -> None:
        for process in self.processes:
            with process:
                process.kill()


@pytest.fixture
def ranks(clusters: Home, tmp_path: Path) -> Iterator[Started]:
    started = Started(clusters, tmp_path)
    yield started
    started.end()
    clusters.assert_nothing_left()


def outcome(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def test_without_a_launcher_the_script_has_a_cluster_of_this_machine(ranks):
    code, out, err = outcome(ranks.start(["-n", 2, ranks.script(SCRIPT), 1, "--flag"]))
    assert (code, out.splitlines()) == (0, ["55 1 --flag", "['local-1']"]), err


def test_all_ranks_but_the_first_are_nodes_and_all_end_with_the_script(ranks):
    words = ["-n", 1, ranks.script(SCRIPT), 3]
    started = [ranks.start(words, rank, 3) for rank in (2, 1, 0)]
    assert outcome(started[2])[:2] == (0, "55 3\n['local-1', 'rank-1', 'rank-2']\n")
    assert [outcome(process) for process in started[:2]] == [(0, "", "")] * 2


def test_the_first_rank_has_the_exit_code_and_the_traceback_of_the_script_and_the_others_none(ranks):
    words = ["-n", 1, ranks.script("raise SystemExit(7)")]
    first, second = ranks.start(words, 0, 2), ranks.start(words, 1, 2)
    assert [outcome(first)[0], outcome(second)] == [7, (0, "", "")]
    code, _, err = outcome(ranks.start(["-n", 1, ranks.script("print(1 // 0)")]))
    assert code == 1
    assert err.endswith("ZeroDivisionError: integer division or modulo by zero\n")


def test_a_script_that_is_killed_is_told_as_a_shell_does(ranks):
    assert outcome(ranks.start(["-n", 1, ranks.script("import os; os.kill(os.getpid(), 9)")]))[0] == 137


def test_a_rank_that_comes_when_the_script_has_ended_is_waited_for(ranks):
    words = ["-n", 1, ranks.script("print('done', flush=True)")]
    first = ranks.start(words, 0, 2)
    assert first.stdout.readline() == "done\n"
    second = ranks.start(words, 1, 2)
    assert [outcome(first)[0], outcome(second)] == [0, (0, "", "")]


WAITS = """
    import os, sys, time
    from zmqsched import Client
    client = Client()
    while len(client.nodes()) < int(sys.argv[1]):  # a rank that has not joined yet would wait for the first for a minute
        time.sleep(0.01)
    client.submit(abs, -1).result()
    print(os.getpid(), flush=True)
    time.sleep(1000)
"""


def test_when_the_first_rank_is_killed_all_end(ranks):
    words = ["-n", 1, ranks.script(WAITS), 2]
    first, second = ranks.start(words, 0, 2), ranks.start(words, 1, 2)
    script = int(first.stdout.readline())
    (file,) = shared_dir("ranks").iterdir()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    cluster = ConnectionFile.load(file).name
    first.kill()
    first.wait()
    eventually(lambda: not alive(script))
    assert second.wait(timeout=60) in (0, 1)
    eventually(lambda: not (ranks.home.path / cluster).exists())
    remove_left()  # as the next one on this host does


def test_an_interrupt_and_a_termination_reach_the_script(ranks):
    first = ranks.start(["-n", 1, ranks.script(WAITS), 1])
    first.stdout.readline()
    first.send_signal(signal.SIGTERM)
    assert outcome(first)[0] == 128 + signal.SIGTERM


@pytest.mark.skipif(not shutil.which("mpirun"), reason="no mpirun (Debian: openmpi-bin)")
@pytest.mark.parametrize("code", [0, 7])
def test_a_real_mpirun(ranks, code):
    words = ["mpirun", "--allow-run-as-root", "--oversubscribe", "-n", 3, sys.executable, "-m", "zmqsched", "run", "-n", 1]
    script = ranks.script(SCRIPT + f"    sys.exit({code})\n")
    words += [script, 3]
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, timeout=90, check=False)
    assert (done.returncode, done.stdout) == (code, "55 3\n['local-1', 'rank-1', 'rank-2']\n"), done.stderr


def test_what_launchers_say():
    assert find_ranks({}) == Ranks()
    assert find_ranks(SLURM) == Ranks(2, 4, 2, "big-12-3-0", 4, ("a1", "a2", "b"))
    assert find_ranks({**SLURM, "SLURM_CPUS_PER_TASK": "3", "SLURM_RESTART_COUNT": "1"}).cpus == 3
    assert find_ranks({**SLURM, "SLURM_RESTART_COUNT": "1"}).key == "big-12-3-1"
    assert find_ranks({**SLURM, "PMI_RANK": "2", "PMI_SIZE": "4"}).key == "big-12-3-0"
    assert find_ranks(OPEN_MPI) == Ranks(1, 6, 3, "prterun-a-77-1")
    assert find_ranks({**SLURM, **OPEN_MPI}).size == 6
    assert find_ranks({**SLURM, "PMI_RANK": "5", "PMI_SIZE": "9"}) == Ranks(5, 9, 1, "12")
    assert find_ranks({"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALNRANKS": "2"}, "my run") == Ranks(1, 2, 2, "my-run")


@pytest.mark.parametrize("step", ["4294967291", "4294967290", ""])
def test_a_batch_script_or_a_shell_in_an_allocation_is_no_rank(step):
    assert find_ranks({**SLURM, "SLURM_STEP_ID": step}) == Ranks()


def test_ranks_without_anything_in_common_are_told_what_to_do():
    with pytest.raises(StartError, match="give them a word, with --id WORD"):
        find_ranks({"PMI_RANK": "0", "PMI_SIZE": "2"})


def test_ranks_share_the_cpus_of_their_host():
    assert Ranks(0, 4, 1000).slots == 1
    assert Ranks(0, 4, 2, cpus=3).slots == 3
