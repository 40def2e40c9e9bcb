"""``zmqsched exec``: what becomes of templates and arguments, and the command with real processes."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import Home, alive, eventually

from zmqsched import Client, LocalCluster
from zmqsched.commands import CommandFailed, Template, run_command, split
from zmqsched.errors import TaskTimeout

EXEC = [sys.executable, "-m", "zmqsched", "exec"]


def made(*words: str, shell: bool = False, number: int = 1) -> list[str]:
    """The command of a line's first combination of arguments."""
    template, lists = split(words)
    return Template(template, len(lists), shell=shell).command(number, [one[0] for one in lists])


@pytest.mark.parametrize(
    ("words", "command"),
    [
        (["convert", "{}", "{.}.png", ":::", "a/b.c.jpg"], ["convert", "a/b.c.jpg", "a/b.c.png"]),
        (["x", "{/}", "{//}", "{/.}", ":::", "a/b/c.txt"], ["x", "c.txt", "a/b", "c"]),
        (["x", "{//}", "{.}", ":::", ".hidden"], ["x", ".", ".hidden"]),
        (["x", "{#}-{}", ":::", "a"], ["x", "7-a"]),
        (["x", "y", ":::", "a b"], ["x", "y", "a b"]),  # appended, as one word
        (["x", "{#}", ":::", "a"], ["x", "7", "a"]),
        (["x", "{2}", "{1.}", ":::", "a.b", ":::", "c"], ["x", "c", "a"]),
        (["x", "{}", ":::", "a", ":::", "b"], ["x", "a", "b"]),
        (["x", "--all={}", ":::", "a", ":::", "b"], ["x", "--all=a b"]),
        (["awk", "{print}", "{", "}", ":::", "a"], ["awk", "{print}", "{", "}", "a"]),
        (["echo", "$(id)", "{}", ":::", "; rm -rf *"], ["echo", "$(id)", "; rm -rf *"]),
    ],
)
def test_what_stands_for_an_argument_is_replaced(words: list[str], command: list[str]):
    assert made(*words, number=7) == command


def test_for_a_shell_arguments_are_quoted_and_the_command_is_not():
    assert made("cat {} | wc", ":::", "it's; rm *", shell=True) == ["/bin/sh", "-c", "cat 'it'\"'\"'s; rm *' | wc"]
    assert made("echo", "$HOME", ":::", "$x", shell=True)[-1] == "echo $HOME '$x'"


def test_a_list_that_is_not_there_and_no_command_are_errors():
    with pytest.raises(ValueError, match=r"\{3\} names a list of arguments that is not there: there are 2"):
        Template(["x", "{3}"], 2, shell=False)
    with pytest.raises(ValueError, match="no command"):
        Template([], 1, shell=False)


def test_a_command_answers_with_all_that_it_wrote(tmp_path: Path):
    outcome = run_command(["sh", "-c", "pwd; echo no >&2"], str(tmp_path))
    assert (outcome.code, outcome.out, outcome.err) == (0, f"{tmp_path}\n".encode(), b"no\n")
    with pytest.raises(CommandFailed) as failed:
        run_command(["sh", "-c", "echo so far; kill -9 $$"], str(tmp_path))
    assert (failed.value.outcome.code, failed.value.outcome.out) == (-9, b"so far\n")


def test_one_that_leaves_something_running_is_not_waited_for(tmp_path: Path):
    outcome = run_command(["sh", "-c", "sleep 600 & echo $!"], str(tmp_path))
    os.kill(int(outcome.out), signal.SIGKILL)


@pytest.mark.parametrize(
    ("words", "directory", "code", "said"),
    [
        (["no-such-program"], "/", 127, "cannot run no-such-program on .*: No such file"),
        (["/etc/passwd"], "/", 126, "cannot run /etc/passwd on .*: Permission denied"),
        (["true"], "/no/such/directory", 127, "no directory /no/such/directory on .*"),
    ],
)
def test_what_cannot_be_run_fails_as_in_a_shell(words: list[str], directory: str, code: int, said: str):
    with pytest.raises(CommandFailed) as failed:
        run_command(words, directory)
    outcome = failed.value.outcome
    assert outcome.code == code
    assert re.fullmatch(f"zmqsched: {said}.*\n", outcome.err.decode())


FAMILY = "sleep 600 & echo $$ $! > {}.part; mv {}.part {}; sleep 600"


def family_of(path: Path) -> list[int]:
    eventually(path.exists)
    return [int(word) for word in path.read_text().split()]


def nobody_of(family: list[int]) -> None:
    eventually(lambda: not any(map(alive, family)))


def test_an_interrupt_kills_the_commands_whole_group(tmp_path: Path):
    """Here, without a worker whose death would end it as well."""
    family = tmp_path / "family"
    command = Template([FAMILY], 1, shell=True).command(1, [str(family)])
    interrupt = threading.Thread(
        target=lambda: (family_of(family), signal.pthread_kill(threading.main_thread().ident, signal.SIGINT))
    )
    interrupt.start()
    with pytest.raises(KeyboardInterrupt):
        run_command(command, "/")
    interrupt.join()
    nobody_of(family_of(family))


def test_a_command_that_is_cancelled_dies_with_its_children(client: Client, tmp_path: Path):
    command = Template([FAMILY], 1, shell=True).command(1, [str(tmp_path / "family")])
    future = client.submit(run_command, command, "/")
    family = family_of(tmp_path / "family")
    assert len(family) == 2
    assert all(map(alive, family))
    future.cancel(force=True)
    nobody_of(family)


def test_so_does_one_that_takes_too_long(client: Client, tmp_path: Path):
    command = Template([FAMILY], 1, shell=True).command(1, [str(tmp_path / "family")])
    future = client.options(timeout=2.0).submit(run_command, command, "/")
    family = family_of(tmp_path / "family")
    assert isinstance(future.exception(60), TaskTimeout)
    nobody_of(family)


def test_so_does_one_whose_worker_is_killed(client: Client, tmp_path: Path):
    command = Template([FAMILY], 1, shell=True).command(1, [str(tmp_path / "family")])
    future = client.options(requeue=False).submit(run_command, command, "/")
    family = family_of(tmp_path / "family")
    worker = next(one for one in client.workers() if one.pid == parent_of(family[0]))
    os.kill(worker.pid, signal.SIGKILL)
    assert future.exception(60) is not None
    nobody_of(family)


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def home() -> Iterator[Home]:
    home = Home()
    yield home
    try:
        home.assert_nothing_left()
    finally:
        home.remove()


@pytest.fixture(scope="module")
def running(home: Home) -> Iterator[None]:
    """A cluster that ``exec`` finds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ZMQSCHED_DIR", str(home.path))
        with LocalCluster(2, name="default", journal=False):
            yield


def start(home: Home, *words: str, **how: int) -> subprocess.Popen[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("ZMQSCHED_")}
    return subprocess.Popen(
        [*EXEC, *words], env={**environment, "ZMQSCHED_DIR": str(home.path)}, text=True, cwd=home.path.parent,
        **{"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **how},
    )  # fmt: skip


def run(home: Home, *words: str, stdin: str = "") -> tuple[int, str, str]:
    process = start(home, *words, stdin=subprocess.PIPE)
    out, err = process.communicate(stdin, timeout=60)
    return process.returncode, out, err


def test_without_a_cluster_one_is_started_for_the_commands(home: Home):
    code, out, err = run(home, "-n2", "--", "echo", "{}-{}", ":::", "a", "b")
    assert (code, sorted(out.splitlines()), err) == (0, ["a-a", "b-b"], "")
    home.assert_nothing_left()


@pytest.mark.usefixtures("running")
def test_arguments_are_lines_of_standard_input_and_output_comes_in_their_order(home: Home):
    code, out, err = run(home, "-k", "--shell", "sleep 0.{}; echo {} a; echo {} b", stdin="3\n\n1\n2\n")
    assert (code, out, err) == (0, "3 a\n3 b\n1 a\n1 b\n2 a\n2 b\n", "")


@pytest.mark.usefixtures("running")
def test_what_ends_first_is_printed_first_and_while_others_run(home: Home, tmp_path: Path):
    gate = tmp_path / "gate"
    wait = "test {} = fast || while ! test -e " + str(gate) + "; do sleep 0.01; done; echo {}"
    process = start(home, "--shell", wait, ":::", "slow", "fast")
    assert process.stdout is not None
    assert process.stdout.readline() == "fast\n"
    gate.touch()
    out, err = process.communicate(timeout=60)
    assert (out, err, process.returncode) == ("slow\n", "", 0)


@pytest.mark.usefixtures("running")
def test_a_line_is_run_before_the_next_is_there(home: Home):
    process = start(home, "echo", stdin=subprocess.PIPE)
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("first\n")
    process.stdin.flush()
    assert process.stdout.readline() == "first\n"
    out, _ = process.communicate("second\n", timeout=60)
    assert (out, process.returncode) == ("second\n", 0)


@pytest.mark.usefixtures("running")
def test_the_exit_code_counts_failures_and_the_job_log_has_them(home: Home, tmp_path: Path):
    log = tmp_path / "log"
    code, out, err = run(home, f"--joblog={log}", "--", "sh", "-c", "echo $0 >&2; exit $0", ":::", "0", "3", "4")
    assert (code, out, sorted(err)) == (2, "", sorted("0\n3\n4\n"))
    head, *rows = [line.split("\t") for line in log.read_text().splitlines()]
    assert head == ["Seq", "Host", "Starttime", "JobRuntime", "Send", "Receive", "Exitval", "Signal", "Command"]
    found = sorted((row[0], row[1], row[6], row[7], row[8]) for row in rows)
    words = "sh -c 'echo $0 >&2; exit $0'"
    assert found == [(str(n), os.uname().nodename, c, "0", f"{words} {c}") for n, c in enumerate("034", 1)]


@pytest.mark.usefixtures("running")
def test_more_failures_than_an_exit_code_holds_are_101(home: Home):
    assert run(home, "false", stdin="".join(f"{n}\n" for n in range(105)))[0] == 101


@pytest.mark.usefixtures("running")
def test_what_fails_is_retried_and_what_takes_too_long_is_killed(home: Home, tmp_path: Path):
    once = f"test -e {tmp_path}/{{}} || {{ touch {tmp_path}/{{}}; exit 1; }}; echo again"
    assert run(home, "--retries=1", "--shell", once, ":::", "x") == (0, "again\n", "")
    code, out, err = run(home, "--timeout=0.3", "--", "sleep", ":::", "600")
    assert (code, out, err) == (1, "", "zmqsched: sleep 600: killed at its time limit\n")


@pytest.mark.usefixtures("running")
@pytest.mark.parametrize("halt", ["soon", "now"])
def test_after_a_failure_nothing_more_is_started(home: Home, tmp_path: Path, halt: str):
    """The first fails when the second runs; the third waits for room and is never run."""
    runs, gate = tmp_path / "runs", tmp_path / "gate"
    script = f"""case {{}} in
        1) while ! test -e {runs}; do sleep 0.01; done; exit 1;;
        2) touch {runs}; while ! test -e {gate}; do sleep 0.01; done; echo ended;;
        3) echo started;;
    esac"""
    process = start(home, "-n2", f"--halt={halt}", "--shell", script, ":::", "1", "2", "3")
    if halt == "soon":
        eventually(runs.exists)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.5)  # not a moment to wait for: that it waits for the second is what is asked
        assert process.poll() is None
        gate.touch()
    out, _ = process.communicate(timeout=60)
    assert (process.returncode, out) == (1, "ended\n" if halt == "soon" else "")


@pytest.mark.usefixtures("running")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_the_commands(home: Home, tmp_path: Path, number: signal.Signals):
    process = start(home, "--shell", FAMILY, ":::", str(tmp_path / "family"))
    family = family_of(tmp_path / "family")
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err.strip()) == (130, "", "")
    nobody_of(family)


@pytest.mark.usefixtures("running")
def test_n_is_how_many_run_at_once(home: Home, tmp_path: Path):
    alone = f": {{}}; mkdir {tmp_path}/lock && sleep 0.02 && rmdir {tmp_path}/lock"
    assert run(home, "-n1", "--shell", alone, stdin="1\n2\n3\n4\n5\n6\n") == (0, "", "")


def test_a_dry_run_prints_what_would_be_run(home: Home):
    assert run(home, "--dry-run", "cp", "{}", "{.}.b", ":::", "x y.a") == (0, "cp 'x y.a' 'x y.b'\n", "")
    assert run(home, "--dry-run", "--shell", "cat {} | wc", stdin="x y\n") == (0, "cat 'x y' | wc\n", "")


def test_wrong_arguments_are_said(home: Home):
    for words, said in [
        (["--", "{2}", ":::", "a"], r"\{2\} names a list"),
        ([":::", "a"], "there is no command"),
        (["--name=nobody", "--", "true", ":::", "a"], "no cluster named 'nobody' runs here"),
        (["--joblog=/no/where", "true", ":::", "a"], "cannot write /no/where: No such file or directory"),
    ]:
        code, out, err = run(home, *words)
        assert code in {1, 2}
        assert out == ""
        assert re.search(said, err)
