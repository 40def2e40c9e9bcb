"""The bar: what it counts, what it says when nothing moves, that it harms nobody, and that it ends."""

import concurrent.futures
import io
import os
import pty
import re
import signal
import subprocess
import sys
import termios
import textwrap
import threading
import types
from concurrent.futures import Future

import pytest
from conftest import eventually

import zmqsched
from zmqsched import progress
from zmqsched.errors import ClusterLost
from zmqsched.progress import STILL_S, Bar, Counts, FutureWork, Why, is_interactive, show
from zmqsched.protocol import Query, Report


class Work:
    """As much of a map as a bar looks at."""

    def __init__(self, total=None, done=0, failed=0, running=0, waiting=0, pause=""):
        self.total, self.done, self.failed, self.running, self.waiting = total, done, failed, running, waiting
        self.pause = pause

    def counts(self):
        return Counts(self.total, self.done, self.failed, self.running)

    @property
    def ended(self):
        return self.total == self.done + self.failed

    def open_tasks(self):
        return [bytes(16)]


class Cluster:
    """A client that keeps the questions, to be answered at will."""

    def __init__(self):
        self._held_back = False
        self.asked = []
        self.error = None

    def _request(self, make):
        if self.error is not None:
            raise self.error
        message, reply = make(7), Future()
        assert isinstance(message, Query)
        self.asked.append((message.tasks, reply))
        return 7, reply

    def answers(self, *waiting):
        self.asked[-1][1].set_result(Report(7, "lab", 1, "pack", [], [], [], 1, list(waiting)))


# --- why nothing moves -------------------------------------------------------------------------------------------------

GPU = (12, "need gpu, no node has one")


def still(why, work, now):
    return why.look(work.counts(), work, now)


def test_it_says_why_when_nothing_has_moved_for_three_seconds():
    cluster, work = Cluster(), Work(total=20, done=8, waiting=12)
    why = Why(cluster)
    assert [still(why, work, 100 + second) for second in (0, 1, 2.9)] == ["", "", ""]
    assert cluster.asked == []
    assert still(why, work, 103) == ""  # asked now
    cluster.answers(GPU)
    assert still(why, work, 103.1) == "12 waiting: need gpu, no node has one"


def test_it_asks_every_three_seconds_and_not_more():
    cluster, work = Cluster(), Work()
    why = Why(cluster)
    for tenth in range(100):
        still(why, work, tenth / 10)
        if cluster.asked and not cluster.asked[-1][1].done():
            cluster.answers(GPU)
    assert len(cluster.asked) == 3
    still(why, work, 12.0)
    assert len(cluster.asked) == 4


def test_what_moves_needs_no_reason():
    cluster, work = Cluster(), Work(total=20)
    why = Why(cluster)
    for second in range(100):
        work.done += second % 2
        assert still(why, work, second) == ""
    assert cluster.asked == []


def test_it_is_silent_again_when_something_moves():
    cluster, work = Cluster(), Work(total=20)
    why = Why(cluster)
    still(why, work, 0), still(why, work, STILL_S)
    cluster.answers(GPU)
    assert still(why, work, STILL_S + 1)
    work.done = 1
    assert [still(why, work, STILL_S + 2), still(why, work, STILL_S + 3)] == ["", ""]


def test_an_answer_from_before_something_moved_is_not_told():
    cluster, work = Cluster(), Work(total=20)
    why = Why(cluster)
    still(why, work, 0), still(why, work, STILL_S)
    work.done = 1
    still(why, work, STILL_S + 1)
    cluster.answers(GPU)
    assert still(why, work, STILL_S + 2) == ""


def test_two_reasons_at_most_and_the_number_is_of_all_that_wait():
    cluster, work = Cluster(), Work(waiting=5_000)
    why = Why(cluster)
    still(why, work, 0), still(why, work, STILL_S)
    cluster.answers((900, "all 8 slots are taken"), GPU, (3, "something else"))
    assert still(why, work, STILL_S) == "5,000 waiting: all 8 slots are taken; need gpu, no node has one"


def test_a_broker_that_does_not_answer():
    cluster, work = Cluster(), Work()
    why = Why(cluster)
    still(why, work, 0), still(why, work, 3)
    assert [still(why, work, 5.9), still(why, work, 8)] == ["", "the broker has not answered for 5 s"]
    assert len(cluster.asked) == 1


def test_a_broker_that_takes_no_more():
    cluster, work = Cluster(), Work(waiting=4)
    cluster._held_back = True
    why = Why(cluster)
    still(why, work, 0), still(why, work, 3)
    cluster.answers()
    assert still(why, work, 3) == "4 waiting: the broker holds as much as it may, and takes no more for now"


def test_what_only_takes_long_has_no_reason():
    cluster, work = Cluster(), Work(running=4)
    why = Why(cluster)
    still(why, work, 0), still(why, work, 3)
    cluster.answers()
    assert still(why, work, 4) == ""


def test_work_that_waits_for_its_user_says_so_itself():
    why = Why(Cluster())
    work = Work(pause="the results are to be read first")
    still(why, work, 0)
    assert still(why, work, 3) == "the results are to be read first"


def test_a_client_that_is_gone_is_told():
    cluster, work = Cluster(), Work()
    cluster.error = ClusterLost("the cluster is gone")
    why = Why(cluster)
    still(why, work, 0)
    assert still(why, work, 3) == "the cluster is gone"


def test_a_question_that_fails_leaves_it_unsaid():
    cluster, work = Cluster(), Work()
    why = Why(cluster)
    still(why, work, 0), still(why, work, 3)
    cluster.asked[0][1].set_exception(ClusterLost("gone"))
    assert still(why, work, 3.1) == ""


# --- whether there is a bar --------------------------------------------------------------------------------------------


class Stream(io.StringIO):
    def __init__(self, terminal):
        super().__init__()
        self._terminal = terminal

    def isatty(self):
        return self._terminal


@pytest.mark.parametrize(
    ("prompt", "terminal", "expected"), [(True, True, True), (True, False, False), (False, True, False)]
)
def test_by_default_somebody_must_be_there_to_see_it(prompt, terminal, expected, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Stream(terminal))
    if prompt:
        monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
    else:
        monkeypatch.delattr(sys, "ps1", raising=False)
    assert is_interactive() is expected


def test_a_stderr_that_is_nothing_is_no_terminal(monkeypatch):
    monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
    for stream in (None, object()):
        monkeypatch.setattr(sys, "stderr", stream)
        assert not is_interactive()


def test_a_notebook_is_interactive(monkeypatch):
    shell = types.SimpleNamespace(kernel=object())
    monkeypatch.setitem(sys.modules, "ipykernel", types.ModuleType("ipykernel"))
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: shell))
    monkeypatch.setattr(sys, "stderr", Stream(terminal=False))
    assert is_interactive()
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: None))
    assert not is_interactive()


def test_it_is_true_false_or_none(monkeypatch):
    monkeypatch.setattr(progress, "is_interactive", lambda: False)
    assert show(False, Work(), "work", None) is None
    assert show(None, Work(), "work", None) is None
    with pytest.raises(TypeError, match="progress"):
        show("yes", Work(), "work", None)


# --- the bar -----------------------------------------------------------------------------------------------------------


def a_screen(monkeypatch):
    """What is drawn, as on a terminal. Not a fixture: between those and the test pytest sets standard error anew."""
    stream = Stream(terminal=True)
    monkeypatch.setattr(sys, "stderr", stream)
    return stream


def drawn(screen):
    """Everything that was drawn, in order."""
    return [line.strip() for line in re.split(r"[\r\n]|\x1b\[A", screen.getvalue()) if line.strip()]


def rows(text):
    """What stands on the screen after this, as a terminal shows it."""
    lines, at, column = [""], 0, 0
    for part in re.findall(r"\x1b\[A|[\r\n]|[^\r\n\x1b]+", text):
        if part == "\x1b[A":
            at -= 1
        elif part == "\r":
            column = 0
        elif part == "\n":
            at, column = at + 1, 0
            lines += [""] * (at + 1 - len(lines))
        else:
            line = lines[at].ljust(column)
            lines[at] = line[:column] + part + line[column + len(part) :]
            column += len(part)
    return [line.rstrip() for line in lines if line.strip()]


def test_it_counts_what_is_done_failed_and_running(monkeypatch):
    screen = a_screen(monkeypatch)
    work = Work(total=10, done=3, failed=1, running=2)
    bar = Bar(work, "fit", None, 0.0)
    eventually(lambda: any("4/10" in line for line in drawn(screen)))
    assert re.match(r"fit:  40%\|.*\| 4/10 \[00:\d\d<.*it/s, 1 failed, 2 running\]", drawn(screen)[-1])
    work.done, work.running = 9, 0
    eventually(lambda: not bar._thread.is_alive())  # all is done: it ends by itself
    assert re.match(r"fit: 100%\|.*\| 10/10 \[00:\d\d<00:00, .*it/s, 1 failed\]", drawn(screen)[-1])
    assert screen.getvalue().endswith("\n")
    bar.close()


def test_without_a_length_it_counts_only_until_the_end_is_known(monkeypatch):
    screen = a_screen(monkeypatch)
    work = Work(done=3)
    bar = Bar(work, "fit", None, 0.0)
    eventually(lambda: any(line.startswith("fit: 3it [00:0") for line in drawn(screen)))
    work.total = 5
    eventually(lambda: "3/5" in drawn(screen)[-1])
    work.done = 5
    bar.close()
    assert "5/5" in drawn(screen)[-1]


def test_after_close_nothing_is_drawn(monkeypatch):
    screen = a_screen(monkeypatch)
    work = Work(total=10)
    bar = Bar(work, "fit", None, 0.0)
    eventually(lambda: drawn(screen))
    work.done = 5
    bar.close()
    assert "5/10" in drawn(screen)[-1]
    before = screen.getvalue()
    assert before.endswith("\n")
    work.done = 6
    bar.close()
    assert not bar._thread.is_alive()
    assert screen.getvalue() == before


def test_short_work_has_no_bar_that_nobody_asked_for(monkeypatch):
    screen = a_screen(monkeypatch)
    monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
    bar = show(None, Work(total=1, done=1), "fit", None)
    bar.close()
    assert screen.getvalue() == ""


def test_longer_work_has_one(monkeypatch):
    screen = a_screen(monkeypatch)
    monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
    work = Work(total=2)
    bar = show(None, work, "fit", None)
    eventually(lambda: "0/2" in screen.getvalue())
    bar.close()


def test_the_reason_stands_where_the_bar_was(monkeypatch):
    screen = a_screen(monkeypatch)
    monkeypatch.setattr(progress, "STILL_S", 0.1)
    cluster, work = Cluster(), Work(total=20, failed=1, waiting=12)
    bar = Bar(work, "fit", cluster, 0.0)
    eventually(lambda: cluster.asked)
    cluster.answers((12, "need {braces}, no node has one"))
    eventually(lambda: "{braces}" in drawn(screen)[-1])
    assert re.fullmatch(
        r"fit: 1/20 \[00:\d\d<\d\d:\d\d, 1 failed\] 12 waiting: need {braces}, no node has one", drawn(screen)[-1]
    )
    bar.close()
    assert "waiting" not in drawn(screen)[-1]


@pytest.mark.parametrize("stderr", [None, io.TextIOWrapper(io.BytesIO()), object()])
def test_what_cannot_be_drawn_on_harms_nobody(stderr, monkeypatch):
    if isinstance(stderr, io.TextIOWrapper):
        stderr.close()
    monkeypatch.setattr(sys, "stderr", stderr)
    bar = Bar(Work(total=1), "fit", None, 0.0)
    bar.close()
    assert not bar._thread.is_alive()


def test_work_that_raises_ends_the_bar_only(monkeypatch):
    screen = a_screen(monkeypatch)
    class Broken(Work):
        def open_tasks(self):
            raise RuntimeError("a bug")

    monkeypatch.setattr(progress, "STILL_S", 0.1)
    bar = Bar(Broken(total=1), "fit", Cluster(), 0.0)
    eventually(lambda: not bar._thread.is_alive())
    assert rows(screen.getvalue()) == [drawn(screen)[-1]]


def test_several_at_once_have_a_line_each(monkeypatch):
    screen = a_screen(monkeypatch)
    works = [Work(total=10), Work(total=20), Work(total=30)]
    bars = [Bar(work, f"work{work.total}", None, 0.0) for work in works]
    eventually(lambda: all(f"work{work.total}: " in screen.getvalue() for work in works))
    assert "\x1b[A" in screen.getvalue()
    for bar in bars:
        bar.close()
    assert sorted(line.split(":")[0] for line in rows(screen.getvalue())) == ["work10", "work20", "work30"]


def test_in_a_dumb_terminal_one_after_the_other_and_in_ascii(monkeypatch):
    screen = a_screen(monkeypatch)
    monkeypatch.setenv("TERM", "dumb")
    works = [Work(total=10, done=5), Work(total=20, done=5)]
    first = Bar(works[0], "first", None, 0.0)
    eventually(lambda: "first" in screen.getvalue())
    second = Bar(works[1], "second", None, 0.0)
    unseen = Bar(Work(total=1), "unseen", None, 0.0)
    unseen.close()  # while it waits for its turn
    first.close()
    eventually(lambda: "second" in screen.getvalue())
    second.close()
    text = screen.getvalue()
    assert text.isascii()
    assert "\x1b" not in text
    assert "unseen" not in text
    assert [line.split(":")[0] for line in drawn(screen)] == sorted(line.split(":")[0] for line in drawn(screen))


def test_who_prints_aside_is_not_overwritten(monkeypatch):
    screen = a_screen(monkeypatch)
    from tqdm import tqdm

    work = Work(total=10)
    bar = Bar(work, "fit", None, 0.0)
    eventually(lambda: drawn(screen))
    for number in range(50):
        with tqdm.external_write_mode(file=sys.stderr):
            sys.stderr.write(f"line {number}\n")
        work.done = number % 10
    bar.close()
    *lines, last = rows(screen.getvalue())
    assert lines == [f"line {number}" for number in range(50)]
    assert "9/10" in last


# --- of futures --------------------------------------------------------------------------------------------------------


def futures(number):
    return [Future() for _ in range(number)]


def test_futures_of_any_executor_are_counted():
    some = futures(6)
    work = FutureWork(some)
    assert (work.counts(), work.waiting) == (Counts(6, 0, 0, 0), 6)
    some[0].set_running_or_notify_cancel()
    some[1].set_result(1)
    some[2].set_exception(ValueError())
    some[3].cancel()
    work._look_again_at = 0.0
    assert (work.counts(), work.waiting, work.ended) == (Counts(6, 1, 2, 1), 2, False)
    assert work.open_tasks() == []


def test_ours_are_counted_without_being_unpickled(client):
    some = [client.submit(abs, -1), client.submit(divmod, 1, 0), client.submit(abs, -3)]
    concurrent.futures.wait(some)
    work = FutureWork(some)
    assert work.counts() == Counts(3, 2, 1, 0)
    assert work.ended
    assert some[0]._final is not None
    assert [some[0].result(), some[2].result()] == [1, 3]


def test_many_are_not_looked_at_all_the_time(monkeypatch):
    some = futures(1)
    work = FutureWork(some)
    clock = iter([100.0, 100.02, 100.1, 101.0, 101.0])
    monkeypatch.setattr(progress, "time", types.SimpleNamespace(monotonic=lambda: next(clock)))
    assert work.counts().done == 0
    some[0].set_result(1)
    assert work.counts().done == 0  # it has taken 20 ms, so for 0.4 s nothing new is known
    assert work.counts().done == 1


def test_wait_shows_a_bar_and_takes_it_away(client, monkeypatch):
    screen = a_screen(monkeypatch)
    some = [client.submit(abs, -number) for number in range(5)]
    done, _ = zmqsched.wait(some, progress=True)
    assert len(done) == 5
    assert "futures: 100%" in drawn(screen)[-1]
    assert "5/5" in drawn(screen)[-1]
    assert bars() == []
    before = screen.getvalue()
    zmqsched.wait(some)
    assert screen.getvalue() == before


def test_wait_refuses_other_words(client):
    with pytest.raises(TypeError, match="progress"):
        zmqsched.wait([client.submit(abs, 1)], progress=1)


# --- of maps -----------------------------------------------------------------------------------------------------------


def test_a_map_is_counted_to_its_end(client, monkeypatch):
    screen = a_screen(monkeypatch)
    assert list(client.map(abs, range(-50, 0), progress=True)) == list(range(50, 0, -1))
    (row,) = rows(screen.getvalue())
    assert re.match(r"abs: 100%\|#+\| 50/50 \[", row)
    assert bars() == []


def bars():
    """Threads that draw."""
    return [thread for thread in threading.enumerate() if thread.name == "zmqsched progress"]


def test_a_generator_is_counted_until_its_length_is_known(client, gate, monkeypatch):
    screen = a_screen(monkeypatch)

    def numbers():
        yield from range(100)
        gate.wait()
        yield 100

    results = client.map(abs, numbers(), progress=True)
    eventually(lambda: "abs: 100it [" in screen.getvalue())
    gate.open()
    assert len(list(results)) == 101
    assert "101/101" in rows(screen.getvalue())[-1]


def test_a_map_tells_what_has_failed(client, monkeypatch):
    screen = a_screen(monkeypatch)
    list(client.map(divmod, [1, 1, 1], [1, 0, 1], on_error="return", progress=True))
    assert re.search(r"3/3 \[.*, 1 failed\]", rows(screen.getvalue())[-1])


def ways_to_end():
    def raised(results):
        with pytest.raises(ZeroDivisionError):
            list(results)

    def late(results):
        with pytest.raises(TimeoutError):
            list(results)

    return [lambda results: results.close(), lambda results: (next(results), results.close()), raised, late]


@pytest.mark.parametrize("end", ways_to_end(), ids=["closed", "closed while read", "an error", "too late"])
def test_however_a_map_ends_its_bar_does(client, gate, end, request, monkeypatch):
    screen = a_screen(monkeypatch)
    what = request.node.callspec.id
    last = gate.task if what != "an error" else (lambda: 1 / 0)
    timeout = 0.3 if what == "too late" else None
    results = client.map(lambda fn: fn(), [int, last], chunksize=1, timeout=timeout, progress=True)
    end(results)
    assert bars() == []
    before = screen.getvalue()
    assert before.endswith("\n")
    gate.open()
    results.close()
    assert screen.getvalue() == before


def test_a_map_that_is_dropped_takes_its_bar_along(client, gate, monkeypatch):
    screen = a_screen(monkeypatch)
    results = client.map(lambda fn: fn(), [int, gate.task], chunksize=1, progress=True)
    next(results)
    del results
    eventually(lambda: bars() == [])
    assert screen.getvalue().endswith("\n")


def test_a_map_says_what_it_waits_for(client, monkeypatch):
    screen = a_screen(monkeypatch)
    monkeypatch.setattr(progress, "STILL_S", 0.2)
    results = client.options(resources={"gpu": 1}).map(abs, range(12), progress=True)
    eventually(lambda: "abs: 0/12 [00:0" in screen.getvalue())
    eventually(lambda: "] 12 waiting: need gpu, no node has one" in screen.getvalue())
    results.close()


def test_a_map_that_waits_for_its_reader_says_so(client, monkeypatch):
    screen = a_screen(monkeypatch)
    monkeypatch.setattr(progress, "STILL_S", 0.2)
    results = client.map(abs, iter(range(10)), buffersize=2, progress=True)
    eventually(lambda: "the results are to be read first" in screen.getvalue())
    results.close()


def test_a_map_in_a_script_has_none(client, monkeypatch):
    screen = a_screen(monkeypatch)
    assert zmqsched.Client.map.__kwdefaults__["progress"] is None
    assert list(client.map(abs, [1])) == [1]
    assert screen.getvalue() == ""
    with pytest.raises(TypeError, match="progress"):
        client.map(abs, [1], progress="yes")


def test_a_retry_of_a_map_has_one_too(client, monkeypatch):
    screen = a_screen(monkeypatch)
    results = client.map(divmod, [1, 1], [0, 1], on_error="return", progress=True)
    list(results)
    list(results.retry_failed())
    assert len(rows(screen.getvalue())) == 2


# --- terminals ---------------------------------------------------------------------------------------------------------


class Terminal:
    """A script on a terminal of its own, which does not know its size unless that is given."""

    def __init__(self, scripts, path, source, columns=0, **environment):
        path.write_text(textwrap.dedent(source))
        self._master, slave = pty.openpty()
        termios.tcsetwinsize(slave, (24 if columns else 0, columns))
        self._output = b""
        self.process = subprocess.Popen(
            [sys.executable, path], stdin=slave, stdout=slave, stderr=slave, start_new_session=True,
            env=scripts._environment | {"PYTHONPATH": os.getcwd(), "TERM": "xterm"} | environment,
        )  # fmt: skip
        scripts._started.append(self.process)
        os.close(slave)
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self):
        try:
            while more := os.read(self._master, 65536):
                self._output += more
        except OSError:  # nobody writes there any more
            pass
        finally:
            os.close(self._master)

    @property
    def text(self):
        return self._output.decode(errors="replace")

    def ends(self):
        code = self.process.wait(timeout=60)
        self._reader.join()
        return code


def test_at_a_prompt_the_bar_says_what_is_missing_and_an_interrupt_ends_it(scripts, tmp_path):
    terminal = Terminal(
        scripts,
        tmp_path / "session.py",
        """
        import sys, time
        import zmqsched

        def talk(number):
            for line in range(20):
                print("task", number, "says", line, flush=True)
                time.sleep(0.01)

        sys.ps1 = ">>> "  # as in an interactive session
        with zmqsched.LocalCluster(2, resources={"gpu": 1}) as cluster, zmqsched.Client(cluster) as client:
            fs = [client.options(resources={"gpu": 1}).submit(time.sleep, 60) for n in range(13)]
            fs += [client.options(name="talk").submit(talk, n) for n in range(3)]
            try:
                zmqsched.wait(fs)
            except KeyboardInterrupt:
                print("INTERRUPTED", sum(f.cancelled() for f in fs), flush=True)
        """,
        columns=100,
    )
    eventually(lambda: "3/16" in terminal.text)
    eventually(lambda: ", 1 running] 12 waiting: need gpu, the only one is taken" in terminal.text)
    terminal.process.send_signal(signal.SIGINT)
    assert terminal.ends() == 0
    *said, bar, rest = rows(terminal.text)
    assert (bar.partition(":")[0], rest) == ("futures", "INTERRUPTED 13")
    assert [line.partition("] ")[2] for line in said] == [f"task {n} says {line}" for n in range(3) for line in range(20)]


def test_a_terminal_that_does_not_know_its_size(scripts, tmp_path):
    terminal = Terminal(
        scripts,
        tmp_path / "script.py",
        """
        import concurrent.futures, threading, zmqsched
        future = concurrent.futures.Future()
        threading.Timer(0.3, future.set_result, [1]).start()
        zmqsched.wait([future], progress=True)
        """,
    )
    assert terminal.ends() == 0
    assert re.match(r"futures: 100%\|█+\| 1/1 \[", rows(terminal.text)[0])


@pytest.mark.parametrize("source", ["", "sys.ps1 = '>>> '"])
def test_in_a_script_or_a_pipe_there_is_no_bar(scripts, source):
    _, err = scripts.run(
        f"""
        import sys, threading, concurrent.futures, zmqsched
        {source}
        future = concurrent.futures.Future()
        threading.Timer(1.0, future.set_result, [1]).start()
        zmqsched.wait([future])
        assert "tqdm" not in sys.modules
        """
    )
    assert err == ""


def test_at_exit_the_bar_is_closed(scripts):
    _, err = scripts.run(
        """
        import concurrent.futures
        from zmqsched.progress import FutureWork, show
        work = FutureWork([concurrent.futures.Future()])
        show(True, work, "fit", None)
        """
    )
    assert err.endswith("\n")
    assert "fit:   0%" in err.rpartition("\r")[2]
