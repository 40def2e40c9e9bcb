"""Each example keeps what its docstring promises, and leaves no process behind."""

import os
import re
import subprocess
import sys
import time
import uuid
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
# Processes end after those that stop them; on a busy machine some moments after.
GONE_AFTER_S = 60.0


@pytest.fixture
def run(home, tmp_path):
    """Run an example as its reader does, and give the lines it printed."""
    mark = uuid.uuid4().hex  # inherited by every process it starts, of whatever session
    # Unbuffered, Python writes a line and its end apart, and those of workers that print at once would mix.
    env = {key: value for key, value in os.environ.items() if not key.startswith("ZMQSCHED_")}
    env |= {"EXAMPLE_RUN": mark, "ZMQSCHED_DIR": str(home.path), "TMPDIR": str(tmp_path)}

    def run(name):
        command = [sys.executable, "-W", "error", str(EXAMPLES / name)]
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=200, check=False)
        assert done.stderr == ""
        assert done.returncode == 0
        return done.stdout.splitlines()

    yield run
    assert_none_left(mark)
    home.assert_nothing_left()


def assert_none_left(mark):
    until = time.monotonic() + GONE_AFTER_S
    while (left := processes_with(mark)) and time.monotonic() < until:
        time.sleep(0.05)
    assert not left, f"left behind: {[process.cmdline() for process in left]}"


def processes_with(mark):
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("EXAMPLE_RUN") == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def test_the_search_for_processes_left_behind_finds_them():
    mark = uuid.uuid4().hex
    with subprocess.Popen(["sleep", "60"], env={**os.environ, "EXAMPLE_RUN": mark}) as process:
        assert [found.pid for found in processes_with(mark)] == [process.pid]
        process.kill()


def test_every_example_is_run_here():
    tested = set(re.findall(r'run\("(\w+\.py)"\)', Path(__file__).read_text()))
    assert {path.name for path in EXAMPLES.glob("*.py")} == tested


def test_parallel_map(run):
    assert run("parallel_map.py") == [
        "zmqsched.map: 33860 primes below 400000",
        "client.map:   33860 primes below 400000",
        "the same as map() finds, stretch by stretch: True",
    ]


def untagged(line):
    """What a task has printed, without its name and worker."""
    return re.fullmatch(r"\[\w+-\d+ n\d+/\d+\] (.*)", line)[1]


def test_waitgroup_10_tasks(run):
    *tasks, last = run("waitgroup_10_tasks.py")
    assert sorted(map(untagged, tasks)) == sorted(f"Task {number}" for number in range(1, 11))
    assert last == "All tasks finished"


def test_waitgroup_3_workers(run):
    *lines, last = run("waitgroup_3_workers.py")
    took = [re.fullmatch(r"Worker ([123]) processing task (\d+)", untagged(line)).groups() for line in lines]
    assert sorted(int(task) for _, task in took) == list(range(1, 11))
    assert {worker for worker, _ in took} == {"1", "2", "3"}
    assert last == "All tasks finished"


def test_priorities(run):
    assert run("priorities.py") == ["submitted: 0, 10, -5", "ran:       10, 0, -5"]


def test_worker_killed(run):
    killed, right, counts = run("worker_killed.py")
    assert re.fullmatch(r"killed worker n1/\d+ \(pid \d+\) after 50 of 200 results", killed)
    assert right == "all 200 results are right: True"
    # None ran again if the worker was killed in the instant between two tasks.
    assert re.fullmatch(r"workers that died: 1, tasks that ran again: [01]", counts)


def test_demo(run):
    lines = run("demo.py")
    text = "\n".join(lines)
    assert re.match(r"The standard library of Python \d+\.\d+\.\d+\S*, \d+\.\d MB\n[\d,]+ files, ", text)
    assert re.search(r"serially \d+\.\d s, in parallel \d+\.\d s with \d+ workers: \d+\.\d\d times as fast", text)
    assert re.search(r"killed half way: worker n1/\d+ \(pid \d+\).*; tasks that ran again because of it: [1-9]", text)
    assert lines[-1] == "nothing is missing: both ways found the same"
    longest = table(lines, "The 10 longest functions")
    assert len(longest) == 10
    shares = table(lines, "Who did how much")
    assert len(shares) >= 2
    files = int(re.search(r"([\d,]+) files", text)[1].replace(",", ""))
    assert sum(int(row[2]) for row in shares) == files
    assert "\r" not in text, "a progress bar without a terminal"
    assert "\x1b" not in text, "colours without a terminal"


def table(lines, title):
    """The cells of the rows of the table of that title."""
    start = next(number for number, line in enumerate(lines) if line.startswith(title))
    rows = []
    for line in lines[start + 4 :]:
        if not line.startswith("│"):
            return rows
        rows.append([cell.strip() for cell in line.strip("│").split("│")])
    raise AssertionError(f"the table {title!r} does not end")


@pytest.mark.system
def test_optuna_search(run):
    assert run("optuna_search.py") == ["100 trials, 5 failed", "the loss is below 10: True"]
