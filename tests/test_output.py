"""What tasks print comes back: to their future's log and to the screen, whoever prints and however the task ends.

``LONG=1`` has the flood be a gibibyte.
"""

import os
import re
import subprocess
import sys
import threading
import time

import psutil
import pytest
from conftest import PATIENCE_S, eventually

from zmqsched import Client

KB64 = 64 * 1024
FLOOD = 1 << 30 if os.environ.get("LONG") else 1 << 27


@pytest.fixture(scope="module")
def quiet(cluster):
    """A client that shows nothing."""
    client = Client(cluster, output=False)
    yield client
    client.shutdown(wait=False, cancel_futures=True)


def log_of(client, fn, *args) -> str:
    """What is in the log when the result is there."""
    future = client.submit(fn, *args)
    future.exception(timeout=PATIENCE_S)
    return future.log()


# --- who prints --------------------------------------------------------------------------------------------------------


def prints(text):
    print(text)


def test_what_is_printed_is_there_before_the_result(quiet):
    assert [log_of(quiet, prints, number) for number in range(20)] == [f"{number}\n" for number in range(20)]


def test_each_of_many_short_tasks_has_its_own(quiet):
    """They lie in their workers' pipes in batches, and those that print nothing are among them."""

    def says(number):
        if number % 3:
            print("number", number)
        if number % 5 == 0:
            os.write(2, b"fifth %d\n" % number)

    futures = [quiet.submit(says, number) for number in range(2_000)]
    for future in futures:
        future.result(timeout=PATIENCE_S)
    for number, future in enumerate(futures):
        expected = f"number {number}\n" * (number % 3 > 0), f"fifth {number}\n" * (number % 5 == 0)
        assert sorted(future.log().splitlines(True)) == sorted(filter(None, expected)), number


def test_a_task_that_prints_nothing_has_an_empty_log(quiet):
    future = quiet.submit(abs, -1)
    assert (future.result(timeout=PATIENCE_S), future.log(), future.progress) == (1, "", None)


@pytest.mark.parametrize("fd", [1, 2])
def test_c_code_is_heard(quiet, fd):
    def writes():
        import ctypes

        libc = ctypes.CDLL(None)
        libc.dprintf(fd, b"from C %d\n", 7)

    assert log_of(quiet, writes) == "from C 7\n"


def test_what_c_code_has_in_its_buffer_comes_too(quiet):
    def puts():
        import ctypes
        import time

        libc = ctypes.CDLL(None)
        libc.puts(b"a line is written at once")
        libc.printf(b"the rest at the end")
        time.sleep(0.005)

    assert log_of(quiet, puts) == "a line is written at once\nthe rest at the end"
    assert log_of(quiet, prints, "another task") == "another task\n"


def test_a_child_of_the_task_is_heard(quiet):
    log = log_of(quiet, subprocess.run, ["sh", "-c", "echo out; echo err >&2"])
    assert sorted(log.splitlines(True)) == ["err\n", "out\n"]


def test_warnings_and_log_records_are_heard_as_in_any_program(quiet):
    def warns():
        import logging
        import warnings

        warnings.warn("of something", stacklevel=1)
        logging.getLogger("library").info("not this")
        logging.getLogger("library").warning("of something else")

    log = log_of(quiet, warns)
    assert "UserWarning: of something" in log
    assert log.endswith("\nof something else\n")


def test_print_without_a_line_end_comes_with_the_result(quiet):
    def says():
        print("no end", end="")

    assert log_of(quiet, says) == "no end"


def test_what_cannot_be_decoded_is_replaced(quiet):
    binary = bytes(range(256))
    assert log_of(quiet, os.write, 1, binary) == binary.decode(errors="replace")


def test_any_text_can_be_printed(quiet):
    assert log_of(quiet, prints, "\u00e4\u4e2d\U0001f600\ud800") == "\u00e4\u4e2d\U0001f600\\ud800\n"


def test_a_character_in_two_parts_is_one(quiet, gate):
    first, second = "\U0001f600".encode()[:2], "\U0001f600".encode()[2:]
    wait = gate.task

    def writes():
        os.write(1, first)
        wait()
        os.write(2, b"!")
        os.write(1, second)

    future = quiet.submit(writes)
    eventually(future.log)
    gate.open()
    future.result(timeout=PATIENCE_S)
    assert future.log() in {"!\U0001f600", "\U0001f600!"}


# --- when ---------------------------------------------------------------------------------------------------------------


def test_it_is_there_while_the_task_runs(quiet, gate):
    wait = gate.task

    def says():
        print("begun", flush=True)
        wait()
        print("ended")

    future = quiet.submit(says)
    eventually(lambda: future.log() == "begun\n")
    gate.open()
    future.result(timeout=PATIENCE_S)
    assert future.log() == "begun\nended\n"


def test_it_is_there_before_the_next_beat(quiet):
    """Once out of several times, for this machine may have other things to do; else within half a second."""

    def says():
        for number in range(5):
            print(time.monotonic(), number)
            time.sleep(0.25)

    future = quiet.submit(says)
    took = []
    for number in range(5):
        eventually(lambda number=number: future.log().count("\n") > number)
        took.append(time.monotonic() - float(future.log().splitlines()[number].split()[0]))
    assert min(took) < 1.0


def test_a_retry_says_that_it_is_one(quiet):
    def fails():
        import zmqsched

        print("attempt", zmqsched.get_task().attempt)
        raise ValueError

    future = quiet.options(retries=2).submit(fails)
    future.exception(timeout=PATIENCE_S)
    assert future.log() == "attempt 1\n[attempt 2]\nattempt 2\n[attempt 3]\nattempt 3\n"


# --- how tasks end ------------------------------------------------------------------------------------------------------


def exits():
    print("last words")
    os._exit(3)


def segfaults():
    import ctypes
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    print("last words")
    ctypes.string_at(0)


def is_killed():
    import signal

    print("last words")
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("end", [exits, segfaults, is_killed])
def test_the_last_words_of_the_dead(quiet, end):
    assert log_of(quiet.options(requeue=False), end) == "last words\n"


def test_what_is_said_while_it_is_ended_by_force(quiet, gate):
    wait = gate.task

    def says():
        try:
            wait()
        finally:
            print("interrupted")

    future = quiet.options(timeout=1).submit(says)
    future.exception(timeout=PATIENCE_S)
    assert future.log() == "interrupted\n"


# --- what tasks do to their streams ---------------------------------------------------------------------------------------


def closes():
    print("before")
    for number in (1, 2):
        os.close(number)


def closes_the_streams():
    print("before")
    sys.stdout.close()
    sys.stderr.close()


def redirects():
    print("before")
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    print("into nothing")


def replaces():
    import io

    print("before")
    sys.stdout = io.StringIO()
    print("into the string")


def does_not_block():
    print("before")
    os.set_blocking(1, False)


@pytest.mark.parametrize("damage", [closes, closes_the_streams, redirects, replaces, does_not_block])
def test_whatever_a_task_does_to_its_streams(quiet, damage):
    def then():
        import time

        damage()
        time.sleep(0.002)
        return os.getpid()

    def puts_back():
        sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
        os.set_blocking(1, True)
        time.sleep(0.05)  # the other one of two is the other worker's
        return os.getpid()

    for _ in range(4):  # on either worker
        damaged = quiet.submit(then)
        worker = damaged.result(timeout=PATIENCE_S)
        assert damaged.log() == "before\n"
        eventually(lambda worker=worker: worker in [back.result() for back in [quiet.submit(puts_back) for _ in range(2)]])
    for _ in range(4):
        assert log_of(quiet, os.write, 1, b"after") == "after"


def test_what_comes_after_a_task_is_nobodys_or_the_nexts(quiet):
    """A thread that goes on, here after its task was answered and before there is another."""

    def leaves(path):
        import threading
        import time

        def waits():
            while not os.path.exists(path):
                time.sleep(0.001)
            os.write(1, b"late\n")

        thread = threading.Thread(target=waits)
        thread.start()
        return os.getpid()

    import tempfile

    with tempfile.TemporaryDirectory() as directory:
        future = quiet.submit(leaves, f"{directory}/go")
        worker = psutil.Process(future.result(timeout=PATIENCE_S))
        threads = worker.num_threads()
        open(f"{directory}/go", "w").close()
        eventually(lambda: worker.num_threads() < threads)
    for number in range(20):  # on either worker
        assert log_of(quiet, prints, number) == f"{number}\n"
    assert future.log() == ""


# --- much --------------------------------------------------------------------------------------------------------------


def test_of_a_flood_the_end_is_there_and_nobody_has_waited(quiet, cluster):

    def floods(size):
        chunk = b"x" * 99 + b"\n"
        for _ in range(size // (100 * 1000)):
            os.write(1, chunk * 1000)
        os.write(1, b"the end\n")

    nodes = [psutil.Process(pid) for pid in (*cluster.node_pids, cluster.broker_pid)]
    before = [node.memory_info().rss for node in nodes]
    flood = quiet.submit(floods, FLOOD)
    assert [quiet.submit(abs, number).result(timeout=PATIENCE_S) for number in range(20)] == list(range(20))
    flood.result(timeout=60)
    head, _, log = flood.log().partition("\n")
    assert int(re.fullmatch(r"\[(\d+) bytes skipped\]", head)[1]) + len(log) == FLOOD // 100_000 * 100_000 + 8
    assert len(log) == KB64
    assert log.endswith("x\nthe end\n")
    assert "skipped" not in log
    assert all(node.memory_info().rss - rss < 40 << 20 for node, rss in zip(nodes, before, strict=True))
    eventually(lambda: quiet.nodes()[0].state == "alive")


def test_both_streams_share_the_log(quiet):
    def says():
        for number in range(2_000):
            print("x" * 60, number)
            print("y" * 60, number, file=sys.stderr)

    log = log_of(quiet, says)
    assert KB64 <= len(log) < KB64 + 2_000  # with some notes in between
    assert {line[0] for line in log.splitlines()} >= {"x", "y"}


# --- on screen -----------------------------------------------------------------------------------------------------------


def test_it_is_shown_with_its_task_and_worker(scripts):
    out, err = scripts.run(
        """
        import sys, time
        from zmqsched import Client, LocalCluster

        def fit(number):
            print("one\\n\\ntwo")
            print("oops", file=sys.stderr)
            print("no end", end="", flush=True)

        with LocalCluster(1) as cluster, Client(cluster) as client:
            client.submit(fit, 1).result(timeout=60)
            client.options(name="a name").submit(fit, 2).result(timeout=60)
            with Client(cluster, output=False) as silent:
                future = silent.submit(fit, 3)
                future.result(timeout=60)
                assert "oops" in future.log()
        """
    )
    said = [f"[{task} n1/1] {line}" for task in ("fit-1", "a name-2") for line in ("one", "", "two", "no end")]
    assert sorted(out.splitlines()) == sorted(said)
    assert err.splitlines() == ["[fit-1 n1/1] oops", "[a name-2 n1/1] oops"]


def test_a_million_lines_are_shown_in_part_and_counted(scripts):
    out, err = scripts.run(
        """
        import time
        from zmqsched import Client, LocalCluster

        def floods():
            for number in range(200):
                print("\\n".join(str(line) for line in range(number * 5000, (number + 1) * 5000)))

        with LocalCluster(2) as cluster, Client(cluster) as client:
            flood = client.submit(floods)
            for number in range(20):
                client.submit(print, "a word").result(timeout=60)
            flood.result(timeout=60)
            assert flood.log().endswith("\\n999998\\n999999\\n")
        """
    )
    lines = out.splitlines()
    notes = re.findall(r"\[floods-1: ([\d,]+) lines not shown; future.log\(\) has the end\]", err)
    hidden = [int(number.replace(",", "")) for number in notes]
    shown = sum(line.startswith("[floods-1 ") for line in lines)
    assert shown + sum(hidden) == 1_000_000
    assert 100 < shown < 10_000
    assert sum(line.endswith("] a word") for line in lines) == 20


def test_a_screen_that_nobody_reads_holds_up_nobody(scripts, tmp_path):
    """Nor the end of the program."""
    process = scripts.start(
        """
        import sys
        from pathlib import Path
        from zmqsched import Client, LocalCluster

        def floods():
            for _ in range(2_000):
                print("x" * 1_000)

        client = Client(LocalCluster(2))
        for future in [client.submit(floods) for _ in range(4)]:
            future.result(timeout=60)
            assert len(future.log()) > 60_000
        Path(sys.argv[1]).touch()
        """,
        str(tmp_path / "ends"),
    )
    assert process.wait(timeout=60) == 0
    assert (tmp_path / "ends").exists()


def test_a_screen_that_is_gone_holds_up_nobody(scripts):
    _, err = scripts.run(
        """
        import os, sys, time
        from zmqsched import Client, LocalCluster

        class Raises:
            def write(self, text):
                raise KeyError("not here")

            def flush(self):
                pass

        closed = open(os.devnull, "w")
        closed.close()
        with LocalCluster(1) as cluster, Client(cluster) as client:
            os.close(1)
            for sys.stdout in (sys.stdout, None, closed, Raises()):
                futures = [client.submit(print, number) for number in range(10)]
                assert [future.result(timeout=60) for future in futures] == [None] * 10
                assert futures[3].log() == "3\\n"
                while client._printer._busy:
                    time.sleep(0.001)
            sys.stdout = sys.stderr
            client.submit(print, "heard again").result(timeout=60)
        """
    )
    assert err.splitlines() == ["[print-41 n1/1] heard again"]


def test_lines_and_a_bar_do_not_run_into_each_other(scripts):
    out, err = scripts.run(
        """
        import sys
        from tqdm import tqdm
        from zmqsched import Client, LocalCluster

        with LocalCluster(1) as cluster, Client(cluster) as client, tqdm(total=2, file=sys.stderr) as bar:
            client.submit(print, "a line", file=None).result(timeout=60)
            bar.update()
        """
    )
    assert out == "[print-1 n1/1] a line\n"
    assert re.search(r"0/2.*\n +\n+ *\d+%.*\d/2", err), "the bar was not put aside and drawn again"


def test_no_thread_is_started_while_nobody_prints(cluster):
    with Client(cluster) as client:
        client.submit(abs, 1).result(timeout=PATIENCE_S)
        assert client._printer._thread is None
        client.submit(os.write, 1, b"x\n").result(timeout=PATIENCE_S)
        thread = client._printer._thread
        assert thread in threading.enumerate()
    assert not thread.is_alive()


def test_whether_to_show_it_is_yes_or_no(cluster):
    with pytest.raises(TypeError, match="output"):
        Client(cluster, output="never")


# --- nodes -----------------------------------------------------------------------------------------------------------------


def test_a_node_writes_what_tasks_say_on_standard_error_into_its_own(scripts):
    """But not in a cluster of the same program, which shows it already."""
    process = scripts.start(
        """
        import sys
        from zmqsched.__main__ import main
        sys.exit(main(["up", "--name", "echo", "--workers", "1"]))
        """
    )
    out, err = scripts.run(
        """
        import os, sys, time
        from zmqsched import Client
        from zmqsched.errors import ClusterNotFound

        for _ in range(3000):
            try:
                client = Client("echo")
                break
            except ClusterNotFound:
                time.sleep(0.02)
        client.submit(os.write, 2, b"to both\\n").result(timeout=60)
        client.submit(os.write, 1, b"to the client\\n").result(timeout=60)
        client.shutdown()
        """
    )
    assert (out, err) == ("[write-2 n1/1] to the client\n", "[write-1 n1/1] to both\n")
    process.terminate()
    _, err = process.communicate(timeout=60)
    assert err.count("to both\n") == 1
    assert "to the client" not in err
