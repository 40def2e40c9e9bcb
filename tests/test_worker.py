"""A worker answers every run exactly once, whatever the run does to it."""

from __future__ import annotations

import os
import pathlib
import select
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator

import pytest

from zmqsched import worker
from zmqsched.codec import decode_pipe, encode_pipe
from zmqsched.errors import PayloadTooLarge, ProtocolError, ResultNotSerializable
from zmqsched.nursery import Exited, Nursery
from zmqsched.payload import FunctionPickler, pack_call, pickling, unpack_exception, unpack_value
from zmqsched.pipes import pair
from zmqsched.protocol import Declined, Done, GroupAdd, Run

TASK = bytes(15)
PATIENCE_S = 60.0


class Wired:
    """A node's hands on one real worker."""

    def __init__(self, nursery: Nursery, number: int) -> None:
        self.nursery, self.number = nursery, number
        self.wires = nursery.spawn(number)
        self.pipe = self.wires.pipe
        self.pickler = FunctionPickler()
        self.runs = 0

    def send(self, fn, *args, function=None, **options) -> None:
        digest, blob = self.pickler.pack(fn)
        self.runs += 1
        function = blob if function is None else function
        run = Run(TASK + b"t", self.runs, digest, function, pack_call(args, {}), **options)
        assert self.pipe.send(encode_pipe(run))

    def hear(self):
        readable, _, _ = select.select([self.pipe], [], [], PATIENCE_S)
        assert readable, "the worker does not answer"
        return decode_pipe(self.pipe.receive(wait=False))

    def run(self, fn, *args, **options) -> Done:
        self.send(fn, *args, **options)
        done = self.hear()
        assert isinstance(done, Done)
        assert (done.task, done.attempt) == (TASK + b"t", self.runs)
        return done

    def value(self, fn, *args, **options):
        done = self.run(fn, *args, **options)
        if not done.ok:
            raise unpack_exception(done.value)
        return unpack_value(done.value)

    def error(self, fn, *args, **options) -> BaseException:
        done = self.run(fn, *args, **options)
        assert not done.ok
        return unpack_exception(done.value)

    def death(self) -> str:
        while True:
            assert select.select([self.nursery], [], [], PATIENCE_S)[0], "the worker lives"
            for event in self.nursery.read():
                if isinstance(event, Exited) and event.worker == self.number:
                    return event.how

    def close(self) -> None:
        self.wires.close()


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    nursery = Nursery()
    yield nursery
    nursery.close()


@pytest.fixture
def wired(nursery: Nursery, request: pytest.FixtureRequest) -> Iterator[Wired]:
    wired = Wired(nursery, abs(hash(request.node.name)) % 2**50)
    yield wired
    nursery.kill(wired.number)
    wired.close()


def test_a_call_is_answered_with_its_value(wired):
    assert wired.value(lambda x: x + 1, 2) == 3


def test_runs_are_answered_in_order(wired):
    for number in range(100):
        wired.send(lambda x: x, number)
    assert [unpack_value(wired.hear().value) for _ in range(100)] == list(range(100))


def test_a_run_that_comes_too_late_is_not_begun_and_its_function_is_kept(wired):
    def identity(x):
        return x

    wired.send(identity, 1, until=time.monotonic() - 1.0)
    assert wired.hear() == Declined(TASK + b"t")
    assert wired.value(identity, 2, function=b"") == 2


def test_a_run_whose_function_was_taken_back_before_it_is_not_begun(wired):
    wired.send(abs, 1, function=b"")
    assert wired.hear() == Declined(TASK + b"t")
    assert wired.value(abs, -2) == 2


def test_what_has_not_started_can_be_taken_back(wired):
    def starts_and_stays():
        worker.tell(GroupAdd([]))
        time.sleep(600)

    for fn in (starts_and_stays, abs, abs):
        wired.send(fn)
    assert wired.hear() == GroupAdd([])
    assert [decode_pipe(wired.wires.kept.receive(wait=False)).attempt for _ in range(2)] == [2, 3]
    with pytest.raises(BlockingIOError):
        wired.wires.kept.receive(wait=False)


@pytest.mark.parametrize(
    "exc", [ValueError("x"), SystemExit(3), KeyboardInterrupt(), GeneratorExit(), StopIteration(1)], ids=repr
)
def test_whatever_a_task_raises_is_its_answer(wired, exc):
    def fail():
        raise exc

    back = wired.error(fail)
    assert type(back) is type(exc)
    assert back.args == exc.args
    assert wired.value(os.getpid) > 0


def test_the_traceback_begins_in_the_users_code(wired):
    def fail():
        raise ValueError("words")

    frames = traceback.extract_tb(wired.error(fail).__traceback__)
    assert [(frame.name, frame.line) for frame in frames] == [("fail", 'raise ValueError("words")')]


@pytest.mark.parametrize("make", [lambda: (i for i in ()), threading.Lock])
def test_a_result_that_cannot_be_pickled_is_an_error(wired, make):
    assert isinstance(wired.error(make), ResultNotSerializable)


def test_an_async_function_is_told_apart(wired):
    async def later():
        return 1

    def quiet():
        import warnings

        warnings.simplefilter("ignore")

    wired.value(quiet)
    assert "coroutine" in str(wired.error(later))


def test_a_result_over_the_limit_is_an_error(wired):
    def shrink():
        pickling.MAX_PAYLOAD = 1_000_000

    wired.value(shrink)
    assert isinstance(wired.error(lambda: b"x" * 2_000_000), PayloadTooLarge)


@pytest.mark.parametrize("size", [100_000, 3_000_000])
def test_arrays_go_and_come_writable(wired, size):
    numpy = pytest.importorskip("numpy")

    def double(array):
        array *= 2
        return array

    back = wired.value(double, numpy.arange(size))
    assert numpy.array_equal(back, 2 * numpy.arange(size))
    assert back.flags.writeable


def test_functions_are_kept_by_digest(wired):
    def fn():
        return 5

    assert wired.value(fn) == 5
    assert wired.value(fn, function=b"") == 5
    wired.send(fn, function=b"", fresh=True)
    assert wired.hear() == Declined(TASK + b"t")
    assert wired.value(fn, fresh=True) == 5


def test_a_large_function_is_kept_as_well(wired):
    big = b"x" * 900_000

    def fn():
        return len(big)

    assert wired.value(fn) == 900_000
    assert wired.value(fn, function=b"") == 900_000


def test_a_function_that_cannot_be_loaded_says_why_each_time(wired):
    missing = b"cnowhere_to_be_found\nfn\n."
    for function in (missing, b""):
        error = wired.error(len, function=function)
        assert isinstance(error, ModuleNotFoundError)
        assert error.name == "nowhere_to_be_found"
        assert "while it loaded the task's function" in error.__notes__[0]


class Unloadable:
    def __reduce__(self):
        return int, ("not a number",)


def test_arguments_that_cannot_be_loaded_say_so(wired):
    error = wired.error(len, Unloadable())
    assert isinstance(error, ValueError)
    assert "arguments" in error.__notes__[0]


def test_the_environment_is_the_tasks_alone(wired):
    def look():
        return os.environ.get("ZQ_NEW"), os.environ.get("HOME")

    before = wired.value(look)
    assert wired.value(look, env=(("ZQ_NEW", "1"), ("HOME", "/nowhere"))) == ("1", "/nowhere")
    assert wired.value(look) == before

    def fail():
        raise ValueError(os.environ["ZQ_NEW"])

    assert wired.error(fail, env=(("ZQ_NEW", "2"),)).args == ("2",)
    assert wired.value(look) == before


def test_seconds_are_the_calls(wired):
    done = wired.run(lambda: time.sleep(0.05))
    assert 0.05 <= done.seconds < 50
    assert min(wired.run(lambda: None).seconds for _ in range(20)) < 0.05


@pytest.mark.parametrize("stream", [None, "closed", 5])
def test_broken_streams_do_not_break_the_worker(wired, stream):
    def breaks():
        if stream == "closed":
            sys.stdout.close()
        else:
            sys.stdout = stream

    wired.value(breaks)
    assert wired.value(lambda: 1) == 1


def test_what_a_task_prints_is_out_before_its_answer(wired, tmp_path):
    path = str(tmp_path / "printed")

    def prints():
        sys.stdout = open(path, "w")  # noqa: SIM115 - it stays open on purpose
        sys.stdout.write("words")

    wired.value(prints)
    assert (tmp_path / "printed").read_text() == "words"


def test_tell_reaches_the_node_before_the_answer(wired):
    def tells():
        assert worker.in_worker()
        threads = [threading.Thread(target=lambda: worker.tell(GroupAdd([(bytes(16), -1)]))) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    wired.send(tells)
    assert [wired.hear() for _ in range(4)] == [GroupAdd([(bytes(16), -1)])] * 4
    assert wired.hear().ok


def test_outside_a_worker_there_is_nobody_to_tell():
    assert not worker.in_worker()
    with pytest.raises(RuntimeError, match="inside a task"):
        worker.tell(GroupAdd([]))


def test_a_child_forked_by_a_task_does_not_answer_for_it(wired):
    def forks():
        pid = os.fork()
        if pid:
            os.waitpid(pid, 0)
        return "parent" if pid else "child"

    assert wired.value(forks) == "parent"
    assert wired.value(lambda: "next") == "next"


def terminates(result=None):
    os.kill(os.getpid(), signal.SIGTERM)
    if isinstance(result, Exception):
        raise result
    return result


def test_sigterm_waits_for_the_task_then_ends_the_worker(wired):
    assert wired.value(terminates, 7) == 7
    assert wired.death() == "killed by SIGTERM"


def test_what_fails_after_sigterm_is_not_answered(wired):
    wired.send(terminates, ValueError("the command that I ran was killed"))
    assert wired.death() == "killed by SIGTERM"
    with pytest.raises(BlockingIOError):
        wired.pipe.receive(wait=False)


def test_an_idle_worker_ends_at_sigterm(wired):
    os.kill(wired.value(os.getpid), signal.SIGTERM)
    assert wired.death() == "killed by SIGTERM"


def test_a_task_may_have_a_handler_of_sigterm_of_its_own(wired):
    def handles():
        came = []
        signal.signal(signal.SIGTERM, lambda number, _: came.append(number))
        terminates()
        return came

    assert wired.value(handles) == [signal.SIGTERM]
    assert wired.value(abs, -1) == 1


def test_a_child_forked_by_a_task_ends_at_sigterm_whatever_it_does(wired):
    def forks():
        if (pid := os.fork()) == 0:
            terminates()
            os._exit(1)
        return os.WTERMSIG(os.waitpid(pid, 0)[1])

    assert wired.value(forks) == signal.SIGTERM
    assert wired.value(lambda: signal.getsignal(signal.SIGTERM) != signal.SIG_DFL)


def test_a_task_that_closes_the_pipe_ends_the_worker_with_70(wired):
    wired.send(lambda: os.closerange(3, 1000))
    assert wired.death() .startswith("exit code 70")


def test_a_worker_ends_quietly_with_its_pipe_and_runs_exit_handlers(wired, tmp_path):
    path = str(tmp_path / "said goodbye")

    def register():
        import atexit

        atexit.register(lambda: pathlib.Path(path).touch())

    wired.value(register)
    wired.close()
    assert wired.death() == "exit code 0"
    assert os.path.exists(path)


def test_the_worker_needs_no_zmq_and_the_nursery_no_payload():
    source = (
        "import sys, zmqsched.nursery; print('cloudpickle' in sys.modules, 'zmqsched.payload' in sys.modules)\n"
        "import zmqsched.worker; print('zmq' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.split() == ["False"] * 3


def test_a_message_that_is_no_run_is_refused():
    ours, theirs = pair()
    ours.send(encode_pipe(GroupAdd([])))
    with pytest.raises(ProtocolError, match="GroupAdd"):
        worker.run_worker(theirs, stack=-1, voice=None)
    assert not worker.in_worker()
    ours.close()
    theirs.close()
