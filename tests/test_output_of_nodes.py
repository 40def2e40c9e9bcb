"""What nodes' processes say: drained for ever, kept within limits, its end at hand for whoever tells of a failure."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import eventually

from zmqsched.errors import StartError
from zmqsched.launch import output as module
from zmqsched.launch.children import Children
from zmqsched.launch.output import MAX_LOG, MAX_TAIL, Drain, Log, tail_of


@pytest.fixture
def children() -> Iterator[Children]:
    children = Children(lambda: None, echo=False)
    yield children
    children.close()


def start(children: Children, path: Path, program: str, label: str = "a-1", first: bytes = b"") -> None:
    children.start(label, [sys.executable, "-c", program], path, os.environ, first=first)


def state(children: Children) -> str:
    return children.poll()[0].state


READY = """
import sys
print("motd of some host")
print('{"pid": 7, "node": "n1"}', flush=True)
sys.stdin.read()
"""


def test_a_log_and_its_predecessor_stay_small(tmp_path):
    log = Log(tmp_path / "logs" / "a-1.log")
    for number in range(40):
        log.write(b"%05d" % number + b"x" * 99_994 + b"\n")
    log.close()
    names = ["a-1.log", "a-1.log.3"]
    assert all(0 < (tmp_path / "logs" / name).stat().st_size <= MAX_LOG for name in names)
    assert sorted(os.listdir(tmp_path / "logs")) == names
    assert (tmp_path / "logs" / "a-1.log").read_bytes().rstrip().endswith(b"x")
    assert b"00039" in (tmp_path / "logs" / "a-1.log").read_bytes()


def test_the_tail_is_the_end_without_a_line_cut_in_two(tmp_path):
    log = Log(tmp_path / "a.log")
    for number in range(2_000):
        log.write(f"line {number}\n".encode())
    assert log.tail.endswith("line 1998\nline 1999")
    assert log.tail.startswith("line ")
    assert len(log.tail) <= MAX_TAIL
    log.close()
    assert tail_of(tmp_path / "a.log") == log.tail
    assert tail_of(tmp_path / "none.log") == ""


def test_what_came_before_the_directory_was_there_is_in_the_log_too(tmp_path):
    home = tmp_path / "cluster"
    log = Log(home / "logs" / "a.log")
    log.write(b"early\n")
    home.mkdir()
    log.write(b"late\n")
    assert (home / "logs" / "a.log").read_text() == "early\nlate\n"
    log.close()


def test_what_came_before_the_directory_was_there_needs_no_more_to_get_into_the_log(tmp_path):
    home = tmp_path / "home"
    log = Log(home / "logs" / "a.log")
    log.write(b"early\n")
    log.settle()
    assert not home.exists()
    home.mkdir()
    log.settle()
    log.settle()
    log.close()
    assert (home / "logs" / "a.log").read_text() == "early\n"


def test_one_that_has_ended_before_leaves_no_descriptor_open(tmp_path):
    home = tmp_path / "home"
    log = Log(home / "logs" / "a.log")
    log.write(b"early\n")
    log.close()
    home.mkdir()
    before = len(os.listdir("/proc/self/fd"))
    log.settle()
    assert (home / "logs" / "a.log").read_text() == "early\n"
    assert len(os.listdir("/proc/self/fd")) == before


def test_no_directory_is_made_for_a_cluster_that_is_gone(tmp_path):
    log = Log(tmp_path / "gone" / "logs" / "a.log")
    log.write(b"last words\n")
    log.close()
    assert os.listdir(tmp_path) == []
    assert log.tail == "last words"


def test_a_child_is_running_when_it_has_said_its_line(children: Children, tmp_path):
    start(children, tmp_path / "a.log", READY)
    eventually(lambda: state(children) == "running")
    assert children.poll()[0].node == "n1"
    assert (tmp_path / "a.log").read_text() == "motd of some host\n"
    children.stop(["a-1"])
    assert children.poll() == []


def test_the_first_line_of_a_childs_input_is_given_to_it(children: Children, tmp_path):
    program = "import sys; print(sys.stdin.readline().strip(), file=sys.stderr, flush=True); sys.stdin.read()"
    start(children, tmp_path / "a.log", program, first=b"a secret\n")
    eventually(lambda: tail_of(tmp_path / "a.log") == "a secret")


def test_a_child_that_never_stops_writing_is_never_held_up(children: Children, tmp_path):
    flood = "import sys\nfor number in range(3000): sys.stderr.write('y' * 1000)\nsys.exit(3)"
    start(children, tmp_path / "a.log", flood)
    eventually(lambda: state(children) == "ended")
    assert (tmp_path / "a.log").stat().st_size <= MAX_LOG


@pytest.mark.parametrize(
    ("program", "why"),
    [
        ("import sys; sys.exit('no such licence')", "exit code 1 before it was ready: no such licence"),
        ("import os; os.kill(os.getpid(), 9)", "killed by SIGKILL before it was ready"),
        ("print('{\"error\": \"the key is refused\"}')", "exit code 0 before it was ready: the key is refused"),
        ("print('{\"node\": \"n1\"}')", ""),
        ("print('{\"node\": \"n1\"}', flush=True); raise SystemExit('lost my mind')", "exit code 1: lost my mind"),
    ],
)  # fmt: skip
def test_how_a_child_ended_is_told_in_its_own_words(children: Children, tmp_path, program, why):
    start(children, tmp_path / "a.log", program)
    eventually(lambda: state(children) == "ended")
    assert children.poll()[0].why == why


def test_a_child_that_refuses_to_stop_is_killed(children: Children, tmp_path, monkeypatch):
    monkeypatch.setattr("zmqsched.launch.children.STOP_TIMEOUT_S", 0.2)
    deaf = 'import signal, time; print(\'{"node": "n"}\', flush=True)\nwhile True: time.sleep(9)'
    start(children, tmp_path / "a.log", deaf)
    eventually(lambda: state(children) == "running")
    pid = children["a-1"].pid
    children.stop(["a-1"])
    assert not Path(f"/proc/{pid}").exists()


def test_who_has_ended_leaves_no_zombie_once_that_is_told(children: Children, tmp_path):
    start(children, tmp_path / "a.log", "exit(5)")
    pid = children["a-1"].pid
    eventually(lambda: state(children) == "ended")
    assert not Path(f"/proc/{pid}").exists()
    assert children.poll()[0].why == "exit code 5 before it was ready"
    children.stop(["a-1"])


def test_a_program_that_waits_for_all_children_takes_none_of_ours_along(children: Children, tmp_path):
    start(children, tmp_path / "a.log", 'print(\'{"node": "n"}\')')
    os.waitpid(children["a-1"].pid, 0)
    eventually(lambda: state(children) == "ended")
    children.stop(["a-1"])


def test_an_end_is_seen_though_somebody_else_holds_the_pipes_open(children: Children, tmp_path):
    program = "import subprocess; print(subprocess.Popen(['sleep', '60'], stdin=-3).pid, flush=True); exit(4)"
    start(children, tmp_path / "a.log", program)
    try:
        eventually(lambda: state(children) == "ended")
        assert children.poll()[0].why.startswith("exit code 4")
    finally:
        os.kill(int(eventually(lambda: tail_of(tmp_path / "a.log"))), 9)


def test_news_of_children_wake_who_waits(tmp_path):
    news: list[int] = []
    children = Children(lambda: news.append(1), echo=False)
    start(children, tmp_path / "a.log", READY)
    eventually(lambda: len(news) == 1)
    children["a-1"].kill()
    eventually(lambda: len(news) == 2)
    children.close()
    children.close()


def test_another_child_takes_the_place_of_one_that_ended(children: Children, tmp_path):
    start(children, tmp_path / "a.log", "exit(1)")
    eventually(lambda: state(children) == "ended")
    start(children, tmp_path / "a.log", READY)
    eventually(lambda: state(children) == "running")
    assert len(children.poll()) == 1


def test_a_command_that_is_not_there_is_named(children: Children, tmp_path):
    with pytest.raises(StartError, match="cannot start 'no-such-python': No such file"):
        children.start("a-1", ["no-such-python"], tmp_path / "a.log", os.environ)
    with pytest.raises(StartError, match="cannot start '/no/such/cwd': No such file"):
        children.start("a-1", [sys.executable], tmp_path / "a.log", os.environ, cwd="/no/such/cwd")


def test_with_echo_this_programs_standard_error_has_it_too(tmp_path):
    program = f"""
import os, sys
from pathlib import Path
from zmqsched.launch.children import Children
children = Children(lambda: None, echo=True)
says = "import sys; sys.stderr.write('hear, hear'); sys.exit(1)"
children.start("a-1", [sys.executable, "-c", says], Path({str(tmp_path / "a.log")!r}), os.environ)
children.close()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stderr == "hear, hear"


def test_a_descriptor_is_used_again_as_soon_as_it_is_closed(monkeypatch):
    """By another thread, while this one has not told yet that the first has ended."""
    drain, said, ends = Drain(), [], []

    def close(descriptor):
        before(descriptor)
        if descriptor == first and not ends:
            again, end = os.pipe()
            ends.append(end)
            assert again == first
            drain.add(again, said.append)
            os.write(end, b"the second")

    before = os.close
    first, end = os.pipe()
    monkeypatch.setattr(module.os, "close", close)
    drain.add(first, lambda data: None)
    before(end)
    eventually(lambda: said == [b"the second"])
    before(ends[0])
    eventually(lambda: said == [b"the second", b""])
    drain.close()
