"""The contract of ``concurrent.futures``, as the documentation of CPython 3.11 to 3.14 states it and as its own tests check
it of process pools; and what a client does where the standard's executors break: in forks, pickled, at the program's end.

Waiting is in test_waiting.py, interrupts in test_interrupts.py.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import copy
import functools
import gc
import os
import pickle
import signal
import threading
import time
import weakref
from concurrent.futures import CancelledError, InvalidStateError

import pytest
from conftest import Scripts, eventually

import zmqsched
from zmqsched import Client, errors
from zmqsched.config import CONNECTION_FILE, cluster_dir


@pytest.fixture
def path(cluster) -> str:
    """Of the connection file."""
    return str(cluster_dir(cluster.name) / CONNECTION_FILE)


@pytest.fixture
def busy(client, gate):
    """Both workers hold a task."""
    futures = [client.submit(gate.task, number) for number in range(2)]
    gate.wait_until_begun(2)
    for future in futures:
        eventually(future.running)
    return futures


# --- submit ----------------------------------------------------------------------------------------------------------


def test_submit_takes_the_callable_by_position_and_every_keyword_is_its_own(client):
    def capture(*args, **kwargs):
        return args, kwargs

    assert client.submit(capture, 1, self=2, fn=3, task=4).result(60) == ((1,), {"self": 2, "fn": 3, "task": 4})
    for wrong in ({"fn": capture, "arg": 1}, {"arg": 1}):
        with pytest.raises(TypeError):
            client.submit(**wrong)


def test_what_is_submitted_is_not_kept_here(client):
    class Holder:
        def method(self):
            return 1

    thing = Holder()
    ref = weakref.ref(thing)
    future = client.submit(thing.method)
    del thing
    gc.collect()
    assert ref() is None
    assert future.result(60) == 1


def test_a_result_lives_as_long_as_its_future(client):
    future = client.submit(functools.partial(set, [1]))
    ref = weakref.ref(future.result(60))
    assert ref() is future.result() == {1}
    del future
    eventually(lambda: gc.collect() is None or ref() is None)


def test_an_exception_does_not_keep_its_future(client):
    future = client.submit(divmod, 1, 0)
    with pytest.raises(ZeroDivisionError):
        future.result(60)
    ref = weakref.ref(future)
    gc.disable()
    try:
        del future
        eventually(lambda: ref() is None)
    finally:
        gc.enable()


# --- states ----------------------------------------------------------------------------------------------------------


def test_cancel(client, busy, gate):
    waiting = client.submit(gate.task)
    states = lambda future: (future.cancelled(), future.running(), future.done())  # noqa: E731
    assert states(waiting) == (False, False, False)
    assert states(busy[0]) == (False, True, False)
    assert (busy[0].cancel(), waiting.cancel(), waiting.cancel()) == (False, True, True)
    assert states(waiting) == (True, False, True)
    for ask in (waiting.result, waiting.exception):
        with pytest.raises(CancelledError):
            ask(timeout=60)
    gate.open()
    assert busy[0].result(60) == 0
    assert states(busy[0]) == (False, False, True)
    assert not busy[0].cancel()
    assert not busy[0].cancel(force=True)
    assert busy[0].result() == 0


def test_the_errors_are_the_standards(client, gate):
    future = client.submit(gate.task)
    with pytest.raises(concurrent.futures.TimeoutError) as raised:
        future.exception(timeout=0)
    assert type(raised.value) is TimeoutError
    gate.open()
    assert future.exception(timeout=60) is None
    for set_again in (lambda: future.set_result(1), lambda: future.set_exception(ValueError())):
        with pytest.raises(InvalidStateError):
            set_again()
    assert issubclass(errors.ClusterLost, concurrent.futures.BrokenExecutor)


def test_who_waits_is_woken_by_a_cancel(client, busy):
    waiting = client.submit(abs, -1)
    told = []

    def ask():
        try:
            waiting.result(60)
        except CancelledError as error:
            told.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    eventually(lambda: waiting._waiters)
    assert waiting.cancel()
    thread.join(60)
    assert told


def test_others_may_settle_a_future(client, busy):
    """joblib and distributed tests do; what the cluster says later comes too late."""
    future = client.submit(abs, -1)
    future.set_result("mine")
    assert (future.result(), future.exception()) == ("mine", None)
    failed = client.submit(abs, -1)
    failed.set_exception(KeyError("mine"))
    assert isinstance(failed.exception(), KeyError)


def test_the_repr(client, busy, gate):
    waiting = client.submit(abs, -1)
    assert "pending" in repr(waiting)
    assert "running" in repr(busy[0])
    waiting.cancel()
    assert "cancelled" in repr(waiting)
    gate.open()
    eventually(busy[0].done)
    assert "finished" in repr(busy[0])
    busy[0].result()
    assert "returned int" in repr(busy[0])


# --- callbacks -------------------------------------------------------------------------------------------------------


def test_callbacks_of_all_ends(client, busy, gate, caplog):
    waiting = client.submit(abs, -1)
    failing = client.submit(divmod, 1, 0)
    seen = []
    for future in (waiting, failing, busy[0]):
        future.add_done_callback(lambda future: 1 / 0)
        future.add_done_callback(lambda future: seen.append((future, future.cancelled())))
    waiting.cancel()
    assert seen == [(waiting, True)], "at once, by who cancels"
    gate.open()
    eventually(lambda: len(seen) == 3)
    assert set(seen) == {(waiting, True), (failing, False), (busy[0], False)}
    assert "exception calling callback" in caplog.text
    for future in (waiting, failing, busy[0]):
        future.add_done_callback(lambda future: seen.append(threading.current_thread()))
        assert seen.pop() is threading.current_thread(), "of one that is done: at once"
        future.add_done_callback(lambda future: 1 / 0)


# --- shutdown --------------------------------------------------------------------------------------------------------


def test_after_shutdown(cluster):
    client = Client(cluster)
    future = client.submit(abs, -1)
    for wait in (True, True, False):
        client.shutdown(wait)
    assert future.done()
    for submit in (client.submit, client.options(priority=1).submit, client.map):
        with pytest.raises(RuntimeError, match="cannot schedule new futures after shutdown"):
            submit(abs, [1])


def test_shutdown_of_several_threads_at_once(cluster, gate):
    client = Client(cluster)
    future = client.submit(gate.task, 1)
    threads = [threading.Thread(target=client.shutdown) for _ in range(3)]
    for thread in threads:
        thread.start()
    gate.open()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    assert future.result(timeout=0) == 1


def test_shutdown_returns_when_callbacks_have(cluster):
    seen = []
    with Client(cluster) as client:
        for number in range(5):
            client.submit(abs, -number).add_done_callback(lambda future: time.sleep(0.02) or seen.append(future.result()))
    assert sorted(seen) == [0, 1, 2, 3, 4]


def test_what_was_cancelled_a_moment_ago_does_not_hold_up_a_shutdown(cluster):
    client = Client(cluster)
    client.submit(int).cancel()
    client.shutdown()


def test_shutdown_without_waiting_finishes_what_runs_and_cancels_the_rest(cluster, gate):
    client = Client(cluster)
    running = [client.submit(gate.task, number) for number in range(2)]
    gate.wait_until_begun(2)
    for future in running:
        eventually(future.running)
    waiting = [client.submit(gate.task) for _ in range(20)]
    client.shutdown(wait=False, cancel_futures=True)
    assert all(future.cancelled() for future in waiting)
    gate.open()
    assert [future.result(timeout=60) for future in running] == [0, 1]


def test_a_client_that_nobody_has_finishes(cluster, gate):
    client = Client(cluster)
    futures = [client.submit(gate.task, number) for number in range(4)]
    ref = weakref.ref(client)
    del client
    gc.collect()
    gate.open()
    assert [future.result(timeout=60) for future in futures] == [0, 1, 2, 3]
    del futures
    eventually(lambda: gc.collect() is None or ref() is None)


# --- event loops -----------------------------------------------------------------------------------------------------


def test_in_an_event_loop(client):
    async def main():
        loop = asyncio.get_running_loop()
        assert await loop.run_in_executor(client, pow, 2, 3) == 8
        assert await loop.run_in_executor(client.options(priority=1), pow, 2, 4) == 16
        assert await asyncio.wrap_future(client.submit(pow, 2, 5)) == 32
        done = client.submit(abs, -1)
        done.result(60)
        assert await done == await done == 1, "more than once"
        many = [client.submit(pow, number, 2) for number in range(20)]
        assert await asyncio.gather(*many) == [number**2 for number in range(20)]
        failed = await asyncio.gather(client.submit(divmod, 1, 0), client.submit(abs, -1), return_exceptions=True)
        assert [type(one) for one in failed] == [ZeroDivisionError, int]
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(wait_for(client.submit(abs, -number))) for number in range(3)]
        assert [task.result() for task in tasks] == [0, 1, 2]
        async for future in zmqsched.as_completed([client.submit(abs, -1)] * 2, timeout=60):
            assert future.result() == 1

    async def wait_for(future):
        return await future

    asyncio.run(main())


def test_an_unpickling_that_takes_its_time_does_not_hold_up_the_loop(client, gate, tmp_path):
    here, waits = os.getpid(), gate.task

    class Slow:
        def __reduce__(self):
            return (lambda: waits(1) if os.getpid() == here else None), ()

    def slow():
        time.sleep(0.05)  # so that the loop waits for it
        return Slow()

    async def main():
        late = asyncio.ensure_future(asyncio.wrap_future(client.submit(slow)))
        await asyncio.to_thread(gate.wait_until_begun)
        assert await client.submit(abs, -1) == 1
        assert not late.done()
        gate.open()
        assert await late == 1

    asyncio.run(main())


@pytest.mark.parametrize("shielded", [False, True])
def test_in_time_or_cancelled_also_if_it_runs(client, gate, shielded):
    async def main():
        future = client.submit(gate.task, 5)
        await asyncio.to_thread(eventually, future.running)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.shield(future) if shielded else future, 0.01)
        assert future.cancelled() is not shielded
        if shielded:
            gate.open()
            assert await future == 5
        else:
            eventually(lambda: sum(client.status().tasks.values()) == 0)  # the worker is free

    asyncio.run(main())


# --- forks, pickles, copies ------------------------------------------------------------------------------------------

FORKS = """
    import concurrent.futures, os, signal, sys, time
    import zmqsched

    held, cluster = sys.argv[1:]
    client = zmqsched.Client(cluster)
    answered = client.submit(pow, 2, 3)
    concurrent.futures.wait([answered])

    def hold(path):
        while not os.path.exists(path):
            time.sleep(0.005)
        return 32

    called = []
    future = client.submit(hold, held)
    future.add_done_callback(lambda _: called.append(1))
    if not (child := os.fork()):
        signal.alarm(60)
        told = set()
        for use in (
            lambda: client.submit(pow, 2, 3), client.status, client.workers, lambda: client.map(abs, [1]),
            future.result, lambda: zmqsched.wait([future]).done.pop().result(),
            lambda: next(zmqsched.as_completed([future])).result(),
            lambda: concurrent.futures.wait([future]).done.pop().result(),
            lambda: zmqsched.WaitGroup(client).go(abs, 1), lambda: zmqsched.WaitGroup(client).wait(),
        ):
            try:
                use()
            except RuntimeError as error:
                told.add(str(error))
            else:
                told.add("not told")
        print(told, future.cancel(), called, answered.result(), client.usable)
        with zmqsched.Client(cluster) as mine:
            print(mine.submit(pow, 2, 4).result(60))
        client.shutdown()
        sys.exit(0)
    assert os.waitpid(child, 0)[1] == 0
    open(held, "x")
    print(future.result(60), called or "soon", client.submit(pow, 2, 6).result(60))
"""


def test_a_forked_child_is_told_and_ends_nothing(scripts: Scripts, path, tmp_path):
    out, err = scripts.run(FORKS, str(tmp_path / "held"), path, PYTHONWARNINGS="ignore::DeprecationWarning")
    told, theirs, ours = out.splitlines()
    reason = "this zmqsched Client belongs to the process that made it; after a fork make a new one"
    assert told == f"{ {reason} } False [] 8 False"
    assert (theirs, ours.split()[0], ours.split()[-1], err) == ("16", "32", "64", "")


def test_a_forked_child_does_not_end_its_parents_cluster(scripts: Scripts):
    _, err = scripts.run("""
        import os, signal, sys, time
        import zmqsched

        with zmqsched.LocalCluster(1) as cluster, zmqsched.Client(cluster) as client:
            future = client.submit(time.sleep, 0.3)
            if not (child := os.fork()):
                sys.exit(0)
            assert os.waitpid(child, 0)[1] == 0
            future.result(60)
            before = cluster.broker_pid
            os.kill(before, signal.SIGKILL)  # whoever looks after the broker still does
            assert client.submit(pow, 2, 5).result(60) == 32
            assert cluster.broker_pid != before
    """, PYTHONWARNINGS="ignore::DeprecationWarning")  # fmt: skip  # Python 3.12 and later advise against fork
    assert "follows it" in err


def test_pickled_a_client_connects_again(client, cluster, path, monkeypatch):
    monkeypatch.setenv("ZMQSCHED_CLUSTER", path)
    with Client(path) as one, Client(os.path.relpath(path)) as two, Client() as three:
        for made in (client, one, two, three, client.options(priority=2)):
            with pickle.loads(pickle.dumps(made)) as again:
                assert again is not made
                assert again._client.cluster_name == cluster.name
                assert again._options == made._options
                assert again.submit(abs, -1).result(60) == 1


def test_pickled_or_says_why_not(scripts: Scripts, client, cluster):
    packed = pickle.dumps(client).replace(cluster.name.encode(), b"x" * len(cluster.name))
    with pytest.raises(errors.ClusterNotFound, match="xxx"):
        pickle.loads(packed)
    with pytest.raises(TypeError, match=r"use Client\('local-"):
        pickle.dumps(cluster)
    out, _ = scripts.run("""
        import copy, pickle
        import zmqsched

        with zmqsched.Client() as client:
            try:
                pickle.dumps(client)
            except TypeError as error:
                print(error)
    """)
    assert "it has started a cluster for itself, which ends with it. Start a LocalCluster" in out


def test_a_copy_is_the_same_connection(client):
    class Model:
        def __init__(self):
            self.client, self.fitted = client, []

    model = Model()
    assert copy.copy(client) is client
    assert copy.deepcopy(model).client is client
    assert copy.deepcopy(model).fitted is not model.fitted


# --- threads and signals ---------------------------------------------------------------------------------------------


def test_threads_submit_wait_and_cancel_at_once(client):
    def work(thread):
        futures = [client.submit(pow, thread, number) for number in range(50)]
        cancelled = {future for future in futures[::7] if future.cancel()}
        wanted = [future for future in futures if future not in cancelled]
        zmqsched.wait(wanted, timeout=60)
        return [future.result(0) for future in wanted] == [
            thread**number for number, future in enumerate(futures) if future not in cancelled
        ]

    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        assert list(threads.map(work, range(8))) == [True] * 8


# --- the program's end -----------------------------------------------------------------------------------------------

WORK = """
    import sys, time
    import zmqsched

    def work(seconds, path):
        time.sleep(seconds)
        open(path, "x").close()
        return "done"

    client = zmqsched.Client(sys.argv[1])
    future = client.submit(work, {seconds}, sys.argv[2])
    future.add_done_callback(lambda future: print("called", future.result()))
    {then}
"""


@pytest.mark.parametrize(
    ("then", "code"),
    [("pass", 0), ("client.shutdown(wait=False)", 0), ("del future, client", 0), ("sys.exit(3)", 3), ("1 / 0", 1)],
    ids=["ends", "shut down", "dropped", "sys.exit", "raises"],
)
def test_a_program_finishes_what_it_has_submitted(scripts: Scripts, path, tmp_path, then, code):
    out, err = scripts.run(WORK.format(seconds=0.2, then=then), path, str(tmp_path / "made"), code=code)
    assert (tmp_path / "made").exists()
    assert out == "called done\n"
    assert err == "" if code != 1 else "ZeroDivisionError" in err


def test_a_program_that_is_ended_by_an_interrupt_cancels_what_is_left(scripts: Scripts, client, path, tmp_path):
    process = scripts.start(
        WORK.format(seconds=600, then="import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"),
        path, str(tmp_path / "made"),
    )  # fmt: skip
    told = process.stderr.readline()
    assert "the program has ended but for 1 unfinished tasks, which it waits for; an interrupt (Ctrl-C) cancels them" in told
    interrupted = time.monotonic()
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert time.monotonic() - interrupted < 20
    eventually(lambda: sum(client.status().tasks.values()) == 0)
    assert process.returncode == 0


def test_a_program_that_an_interrupt_ends_does_not_wait(scripts: Scripts, client, path, tmp_path):
    process = scripts.start(
        WORK.format(
            seconds=600,
            then="import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
            "print('ready', flush=True); [time.sleep(0.1) for _ in range(600)]",
        ), path, str(tmp_path / "made"),
    )  # fmt: skip
    assert process.stdout.readline() == "ready\n"
    interrupted = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert time.monotonic() - interrupted < 20
    assert "KeyboardInterrupt" in err
    assert "waits for" not in err
    eventually(lambda: sum(client.status().tasks.values()) == 0)


def test_submitting_after_the_interpreters_shutdown(scripts: Scripts, path):
    out, err = scripts.run("""
        import atexit, sys

        @atexit.register
        def last():
            try:
                client.submit(abs, -1)
            except RuntimeError as error:
                print(error)

        import zmqsched
        client = zmqsched.Client(sys.argv[1])
    """, path)  # fmt: skip
    assert (out, err) == ("cannot schedule new futures after interpreter shutdown\n", "")


def test_a_callback_that_submits_at_the_end_is_told(scripts: Scripts, path):
    out, _ = scripts.run("""
        import sys, time
        import zmqsched

        def again(future):
            try:
                client.submit(abs, -1)
            except RuntimeError as error:
                print(error)

        client = zmqsched.Client(sys.argv[1])
        client.submit(time.sleep, 0.2).add_done_callback(again)
    """, path)  # fmt: skip
    assert out == "cannot schedule new futures after interpreter shutdown\n"
