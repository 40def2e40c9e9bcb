"""A client on a real cluster is what ``concurrent.futures`` promises, and what zmqsched adds to it."""

from __future__ import annotations

import asyncio
import concurrent.futures
import functools
import gc
import itertools
import math
import operator
import os
import threading
import time
import traceback
from collections.abc import Iterator
from fractions import Fraction

import numpy as np
import pytest
from conftest import Home, Scripts, eventually, interrupt_behind_call, told

import zmqsched
from zmqsched import Client, LocalCluster, errors
from zmqsched.config import CONNECTION_FILE, cluster_dir, find_cluster


@pytest.fixture(scope="module")
def single(clusters: Home) -> Iterator[LocalCluster]:
    """One slot, and the name that is found without asking."""
    with LocalCluster(1, name="default") as cluster:
        yield cluster


@pytest.fixture(scope="module")
def equipped(clusters: Home) -> Iterator[Client]:
    """Two slots, one widget, a tag, two GPUs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
        cluster = LocalCluster(2, resources={"widget": 1}, tags=["fast"])
    with cluster:
        client = Client(cluster)
        yield client
        client.shutdown(wait=False, cancel_futures=True)


def unfinished(client: Client) -> int:
    """Tasks of all clients that the broker holds. A cancellation is through when its tasks are gone from there."""
    return sum(client.status().tasks.values())


# --- futures ---------------------------------------------------------------------------------------------------------


def test_a_call_and_its_result(client):
    future = client.submit(pow, 2, 10)
    assert isinstance(future, concurrent.futures.Future)
    assert isinstance(future, zmqsched.Future)
    assert future.result(timeout=60) == 1024
    assert (future.done(), future.running(), future.cancelled(), future.exception()) == (True, False, False, None)


def test_a_client_is_an_executor(client):
    assert isinstance(client, concurrent.futures.Executor)
    assert client._max_workers == 2


def test_the_tasks_own_exception_with_the_line_that_raised_it(client):
    def divides(number):
        return number / 0  # the user's line

    future = client.submit(divides, 1)
    with pytest.raises(ZeroDivisionError, match="division by zero") as raised:
        future.result(timeout=60)
    assert raised.value is future.exception()
    shown = told(raised.value)
    assert "return number / 0  # the user's line" in shown
    assert "in divides" in shown
    assert "zmqsched/worker.py" not in shown


def test_chained_exceptions_are_in_the_traceback(client):
    def fails():
        try:
            {}["nothing"]
        except KeyError as error:
            raise ValueError("second") from error

    shown = told(client.submit(fails).exception(timeout=60))
    assert "KeyError: 'nothing'" in shown
    assert "direct cause" in shown


def test_results_wait_with_a_timeout(client, gate):
    future = client.submit(gate.task, "late")
    for timeout in (0, -1, 0.01):
        with pytest.raises(TimeoutError):
            future.result(timeout=timeout)
    gate.open()
    assert future.result(timeout=60) == "late"


def test_a_future_runs_once_a_worker_has_it(client, gate):
    future = client.submit(gate.task)
    gate.wait_until_begun()
    eventually(future.running)
    assert not future.cancel(), "what runs is not cancelled"
    gate.open()
    assert future.result(timeout=60) is None


def test_wait_and_as_completed(client, gate):
    blocked = client.submit(gate.task, "blocked")
    quick = [client.submit(abs, -number) for number in range(5)]
    done, not_done = concurrent.futures.wait([blocked, *quick], timeout=60, return_when="FIRST_COMPLETED")
    assert done <= set(quick)
    assert blocked in not_done
    assert concurrent.futures.wait([], timeout=0) == (set(), set())
    order = concurrent.futures.as_completed([blocked, *quick], timeout=60)
    assert {next(order).result() for _ in quick} == {0, 1, 2, 3, 4}
    gate.open()
    assert [future.result() for future in order] == ["blocked"]


def test_futures_of_two_clients_are_waited_for_together(client, cluster):
    with Client(cluster) as other:
        futures = [client.submit(abs, -1), other.submit(abs, -2)]
        assert {f.result() for f in concurrent.futures.as_completed(futures, timeout=60)} == {1, 2}


def test_wait_returns_at_the_first_exception(client, gate):
    futures = [client.submit(gate.task), client.submit(operator.truediv, 1, 0)]
    done, _ = concurrent.futures.wait(futures, timeout=60, return_when="FIRST_EXCEPTION")
    assert done == {futures[1]}
    gate.open()
    assert concurrent.futures.wait(futures, timeout=60).not_done == set()


def test_callbacks(client):
    seen = []
    called = threading.Event()

    def callback(future):
        seen.append((future.result(), threading.current_thread() is threading.main_thread()))
        called.set()

    future = client.submit(pow, 2, 3)
    future.add_done_callback(callback)
    assert called.wait(60)
    future.add_done_callback(callback)
    assert seen[-1] == (8, True)
    assert [value for value, _ in seen] == [8, 8]


def test_a_callback_may_submit_again(client):
    last: concurrent.futures.Future[int] = concurrent.futures.Future()

    def again(future):
        number = future.result()
        if number == 10:
            last.set_result(number)
        else:
            client.submit(operator.add, number, 1).add_done_callback(again)

    client.submit(int).add_done_callback(again)
    assert last.result(timeout=60) == 10


def test_futures_in_asyncio(client):
    async def main():
        assert await client.submit(pow, 2, 3) == 8
        assert await asyncio.wrap_future(client.submit(pow, 2, 4)) == 16
        assert await asyncio.gather(*(client.submit(abs, -n) for n in range(20))) == list(range(20))
        assert await asyncio.get_running_loop().run_in_executor(client, math.factorial, 5) == 120
        with pytest.raises(ZeroDivisionError):
            await client.submit(operator.truediv, 1, 0)

    asyncio.run(main())


def test_cancelling_an_awaiting_coroutine_cancels_the_task(client, gate):
    async def main():
        busy = [client.submit(gate.task) for _ in range(2)]
        gate.wait_until_begun(2)
        queued = client.submit(gate.task)

        async def wait_for_it():
            await queued

        waiting = asyncio.create_task(wait_for_it())
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert queued.cancelled()
        eventually(lambda: unfinished(client) == 2)
        gate.open()
        await asyncio.gather(*busy)

    asyncio.run(main())
    assert gate.begun() == 2


# --- map -------------------------------------------------------------------------------------------------------------


def test_map_keeps_the_order(client):
    def later_first(number):
        import time

        time.sleep((7 - number % 8) / 1000)
        return number

    assert list(client.map(later_first, range(40))) == list(range(40))


def test_map_is_lazy_but_submits_at_once(client, gate):
    results = client.map(gate.task, ["a", "b"])
    gate.wait_until_begun(2)
    gate.open()
    assert next(results) == "a"
    assert next(results) == "b"
    with pytest.raises(StopIteration):
        next(results)


def test_map_gives_a_result_while_the_next_is_not_there(client, gate):
    held = gate.task

    def one_of_them(number):
        return held(number) if number == 1 else number

    results = client.map(one_of_them, range(3))
    assert next(results) == 0
    gate.open()
    assert list(results) == [1, 2]


def test_maps_timeout_counts_from_the_call(client, gate):
    called = time.monotonic()
    results = client.map(gate.task, range(3), timeout=3)
    eventually(lambda: time.monotonic() > called + 3)
    asked = time.monotonic()
    with pytest.raises(TimeoutError):
        next(results)
    assert time.monotonic() - asked < 2.5
    gate.open()


def test_map_in_time(client):
    assert list(client.map(abs, [-1, -2], timeout=60)) == [1, 2]


def test_map_stops_at_the_first_exception_and_cancels_the_rest(client, gate):
    held = gate.task

    def fails_first(number):
        if number == 0:
            raise ValueError("item 0")
        return held(number)

    results = client.map(fails_first, range(30))
    with pytest.raises(ValueError, match="item 0"):
        next(results)
    eventually(lambda: unfinished(client) <= 2)
    gate.open()
    eventually(lambda: unfinished(client) == 0)
    assert gate.begun() <= 2, "the others were cancelled"


@pytest.mark.parametrize("chunksize", [1, 4])
def test_closing_the_iterator_cancels_the_rest(client, gate, chunksize):
    held = gate.task

    def first_is_free(number):
        return number if number < chunksize else held(number)

    results = client.map(first_is_free, range(40 * chunksize), chunksize=chunksize)
    assert next(results) == 0
    gate.wait_until_begun(2)
    run = client._last_run
    results.close()
    eventually(lambda: not run._in_hand and unfinished(client) == 2)  # what was about to be sent is cancelled after that
    gate.open()
    eventually(lambda: unfinished(client) == 0)
    assert gate.begun() == 2 * chunksize


@pytest.mark.parametrize("chunksize", [1, 2, 3, 7, 100])
def test_chunks_change_nothing_but_the_number_of_tasks(client, chunksize):
    before = client.status().counts["accepted"]
    assert list(client.map(pow, range(10), [2] * 10, chunksize=chunksize)) == [n * n for n in range(10)]
    assert client.status().counts["accepted"] - before == math.ceil(10 / chunksize)


def test_an_exception_in_a_chunk(client):
    results = client.map(operator.truediv, [1, 1, 1], [1, 0, 1], chunksize=3)
    with pytest.raises(ZeroDivisionError):
        list(results)


@pytest.mark.parametrize("chunksize", [0, -1])
def test_chunks_of_nothing(client, chunksize):
    with pytest.raises(ValueError, match="chunksize must be at least 1"):
        client.map(abs, [1], chunksize=chunksize)


@pytest.mark.parametrize("chunksize", [1, 2, 5])
def test_map_ends_with_the_shortest_iterable(client, chunksize):
    assert list(client.map(pow, range(100), iter([2, 2, 2]), chunksize=chunksize)) == [0, 1, 4]


@pytest.mark.parametrize("chunksize", [1, 2])
def test_map_of_nothing(client, chunksize):
    assert list(client.map(abs, [], chunksize=chunksize)) == []
    assert list(client.map(abs, [], [1, 2], chunksize=chunksize)) == []


@pytest.mark.parametrize("chunksize", [1, 2])
def test_an_iterable_that_raises(client, chunksize):
    def items():
        yield 1
        yield 2
        raise LookupError("no third item")

    with pytest.raises(LookupError, match="no third item"):
        list(client.map(abs, items(), chunksize=chunksize))
    assert client.submit(abs, -1).result(timeout=60) == 1


# --- functions -------------------------------------------------------------------------------------------------------


class Account:
    def __init__(self, balance):
        self.balance = balance

    def plus(self, amount):
        return self.balance + amount

    @classmethod
    def empty(cls):
        return cls(0)

    def __call__(self, amount):
        return self.balance - amount


def keyword_only(*, first, second=2):
    return first, second


@pytest.mark.parametrize(
    ("call", "result"),
    [
        (lambda submit: submit(len, "four"), 4),
        (lambda submit: submit(math.hypot, 3, 4), 5.0),
        (lambda submit: submit("a,b".split, ","), ["a", "b"]),
        (lambda submit: submit(Fraction, 2, 4), Fraction(1, 2)),
        (lambda submit: submit(dict, a=1), {"a": 1}),
        (lambda submit: submit(functools.partial(pow, 2), 5), 32),
        (lambda submit: submit(functools.partial(int, base=2), "101"), 5),
        (lambda submit: submit(operator.itemgetter(1), "ab"), "b"),
        (lambda submit: submit(Account(5).plus, 2), 7),
        (lambda submit: submit(Account(5), 2), 3),
        (lambda submit: submit(keyword_only, first=1), (1, 2)),
        (lambda submit: submit(lambda **given: sorted(given), fn=1, self=2, args=3, kwargs=4, name=5, priority=6),
         ["args", "fn", "kwargs", "name", "priority", "self"]),
        (lambda submit: submit(lambda self, fn: (self, fn), fn=1, self=2), (2, 1)),
    ],
)  # fmt: skip
def test_what_can_be_called(client, call, result):
    assert call(client.submit).result(timeout=60) == result
    assert call(client.options(priority=1).submit).result(timeout=60) == result


def test_closures_and_recursion(client):
    base = 3

    def adds(number):
        return base + number

    def factorial(n):
        return n * factorial(n - 1) if n else 1

    assert client.submit(adds, 4).result(timeout=60) == 7
    assert client.submit(factorial, 20).result(timeout=60) == math.factorial(20)


def test_a_closure_is_what_it_is_when_it_is_submitted(client, gate):
    seen = [1]
    busy = [client.submit(gate.task) for _ in range(2)]
    gate.wait_until_begun(2)
    first = client.submit(lambda: list(seen))
    seen.append(2)
    second = client.submit(lambda: list(seen))
    gate.open()
    assert (first.result(timeout=60), second.result(timeout=60)) == ([1], [1, 2])
    concurrent.futures.wait(busy, timeout=60)


def test_classes_come_back_as_themselves(client):
    made = client.submit(Account.empty).result(timeout=60)
    assert type(made) is Account


def test_functions_of_a_script(scripts: Scripts):
    out, err = scripts.run("""
        import dataclasses, functools, sys, traceback
        import zmqsched

        FACTOR = 3

        def times(x):
            return helper(x) * FACTOR

        def helper(x):
            return x + 1

        @dataclasses.dataclass
        class Point:
            x: int
            def moved(self, by, *, twice=False):
                return Point(self.x + by * (1 + twice))

        class Wrong(Exception):
            def __init__(self, code):
                super().__init__(f"wrong: {code}")
                self.code = code
            def __reduce__(self):
                return Wrong, (self.code,)

        def raises():
            raise Wrong(7)

        def closure(n):
            def add(x):
                return x + n
            return add

        with zmqsched.LocalCluster(2) as cluster, zmqsched.Client(cluster) as client:
            def run(*args, **kwargs):
                return client.submit(*args, **kwargs).result(60)
            assert run(times, 4) == 15
            FACTOR = 10
            assert run(times, 4) == 50, "globals as they are now"
            assert run(lambda x: x + FACTOR, 1) == 11
            assert run(closure(5), 1) == 6
            assert run(Point(1).moved, 2, twice=True) == Point(5)
            assert type(run(Point, 1)) is Point
            assert run(functools.partial(Point(1).moved, by=1)) == Point(2)
            assert run(print, "from a worker", file=None) is None
            error = client.submit(raises).exception(60)
            assert type(error) is Wrong and error.code == 7, error
            assert "raise Wrong(7)" in "".join(traceback.format_exception(error))
            assert list(client.map(times, range(5), chunksize=2)) == [10, 20, 30, 40, 50]
        print("all right")
    """)
    shown, last = out.splitlines()
    assert (shown.partition("] ")[2], last) == ("from a worker", "all right")
    assert err == ""


@pytest.mark.parametrize("size", [10, 1 << 17, 8 << 20], ids=["80 B", "1 MiB", "64 MiB"])
def test_arrays_there_and_back(client, size):
    def add_one(array):
        array += 1
        return array

    array = np.arange(size, dtype=np.float64)
    back = client.submit(add_one, array).result(timeout=60)
    assert (array[0], array[-1]) == (0, size - 1), "the caller's own is untouched"
    assert np.array_equal(back, array + 1)
    back[0] = -1


def test_many_arrays_in_one_call(client):
    arrays = [np.full(20_000, number) for number in range(10)]
    sums = client.submit(lambda *given, last: [int(a.sum()) for a in (*given, last)], *arrays[:-1], last=arrays[-1])
    assert sums.result(timeout=60) == [20_000 * number for number in range(10)]


# --- options ---------------------------------------------------------------------------------------------------------


def test_higher_priority_first_and_then_first_come(single, gate, tmp_path):
    log = tmp_path / "log"

    def note(number):
        with open(log, "a") as file:
            file.write(f"{number} ")

    with Client(single) as client:
        client.submit(gate.task)
        gate.wait_until_begun()
        for number, priority in enumerate([0, 5, -5, 5, 10, 0]):
            client.options(priority=priority).submit(note, number)
        eventually(lambda: client.status().tasks["queued"] == 6)
        gate.open()
    assert log.read_text().split() == ["4", "1", "3", "0", "5", "2"]


def flaky(counter):
    """A function that fails a number of times. It counts in a file, for attempts may run in different workers."""
    path = str(counter)

    def attempt(failures):
        with open(path, "a+") as file:
            file.write("x")
            file.seek(0)
            number = len(file.read())
        if number <= failures:
            raise OSError(f"attempt {number} fails")
        return number

    return attempt


def test_retries_until_it_succeeds(client, tmp_path):
    before = client.status().counts.get("retried", 0)
    assert client.options(retries=2).submit(flaky(tmp_path / "counter"), 2).result(timeout=60) == 3
    assert (tmp_path / "counter").read_text() == "xxx"
    assert client.status().counts["retried"] == before + 2


@pytest.mark.parametrize("retries", [0, 1, 3])
def test_retries_exhausted(client, tmp_path, retries):
    with pytest.raises(OSError, match=f"attempt {retries + 1} fails") as raised:
        client.options(retries=retries).submit(flaky(tmp_path / "counter"), 9).result(timeout=60)
    assert "raise OSError" in told(raised.value)
    assert (tmp_path / "counter").read_text() == "x" * (retries + 1)


class Flaw(Exception):
    """An error of this module's own."""


def fails_as(kind, counter):
    """A function that always raises this, and counts in a file."""
    path = str(counter)

    def attempt():
        with open(path, "a") as file:
            file.write("x")
        raise kind("as always")

    return attempt


@pytest.mark.parametrize(
    ("retry_on", "raised", "times"),
    [
        (OSError, OSError, 3),
        (OSError, FileNotFoundError, 3),
        (OSError, ValueError, 1),
        ((ValueError, OSError), FileNotFoundError, 3),
        ((ValueError, TimeoutError), KeyError, 1),
        (BaseException, SystemExit, 3),
        (Exception, KeyboardInterrupt, 1),
        (Flaw, Flaw, 3),
        (Flaw, OSError, 1),
    ],
)
def test_only_the_named_exceptions_are_retried(client, tmp_path, retry_on, raised, times):
    view = client.options(retries=2, retry_on=retry_on)
    with pytest.raises(raised, match="as always") as caught:
        view.submit(fails_as(raised, tmp_path / "counter")).result(timeout=60)
    assert (tmp_path / "counter").read_text() == "x" * times
    assert "zmqsched" not in "".join(traceback.format_tb(caught.value.__traceback__)[-1:]), "no frame of ours"


def test_retries_of_named_exceptions_in_maps_and_views(client, tmp_path):
    view = client.options(retry_on=OSError).options(retries=1)
    assert list(view.map(flaky(tmp_path / "one"), [1])) == [2]
    # Of a chunk only the item that has failed is tried again.
    assert list(view.map(flaky(tmp_path / "two"), [1, 0], chunksize=2)) == [3, 2]
    with pytest.raises(OSError, match="attempt 1 fails"):
        view.options(retry_on=ValueError).submit(flaky(tmp_path / "three"), 1).result(timeout=60)
    group = zmqsched.WaitGroup(view)
    assert group.go(flaky(tmp_path / "four"), 1).result(timeout=60) == 2


def test_a_retry_waits_for_its_back_off(client, tmp_path):
    future = client.options(retries=1, backoff=1e6).submit(flaky(tmp_path / "counter"), 1)
    eventually(lambda: client.status().tasks["delayed"] == 1)
    assert client.options(retries=1, backoff=0.01).submit(flaky(tmp_path / "other"), 1).result(timeout=60) == 2
    assert future.cancel(force=True)  # its first run may be known here
    eventually(lambda: unfinished(client) == 0)
    assert (tmp_path / "counter").read_text() == "x"


def test_options_are_chained_and_leave_the_client_alone(client, tmp_path):
    view = client.options(retries=1, name="patient").options(priority=5)
    assert view.submit(flaky(tmp_path / "one"), 1).result(timeout=60) == 2
    with pytest.raises(OSError, match="attempt 1 fails"):
        client.submit(flaky(tmp_path / "two"), 1).result(timeout=60)
    assert list(view.map(abs, [-1, -2])) == [1, 2]


def test_a_view_is_an_executor_too(client):
    view = client.options(priority=1)
    assert isinstance(view, concurrent.futures.Executor)

    async def main():
        return await asyncio.get_running_loop().run_in_executor(view, pow, 2, 3)

    assert asyncio.run(main()) == 8


def test_a_resource_is_never_given_twice(equipped, gate, tmp_path):
    lock = str(tmp_path / "lock")

    def use_the_widget(number):
        import os
        import time

        os.close(os.open(lock, os.O_CREAT | os.O_EXCL))
        time.sleep(0.005)
        os.unlink(lock)
        return number

    assert sorted(equipped.options(resources={"widget": 1}).map(use_the_widget, range(12))) == list(range(12))
    # What asks for none runs at the same time.
    both = [equipped.options(resources={"widget": 1}).submit(gate.task, 1), equipped.submit(gate.task, 2)]
    gate.wait_until_begun(2)
    gate.open()
    assert [future.result(timeout=60) for future in both] == [1, 2]


def test_parts_of_a_resource_add_up(equipped, gate):
    half = equipped.options(resources={"widget": 0.5})
    futures = [half.submit(gate.task) for _ in range(2)]
    gate.wait_until_begun(2)
    eventually(lambda: equipped.nodes()[0].free["widget"] == 0)
    gate.open()
    concurrent.futures.wait(futures, timeout=60)
    eventually(lambda: equipped.nodes()[0].free["widget"] == 1)


def test_a_task_with_two_cpus_has_the_node_to_itself(equipped, gate):
    wide = equipped.options(resources={"cpu": 2}).submit(gate.task, "wide")
    gate.wait_until_begun()
    plain = equipped.submit(os.path.exists, "/")
    with pytest.raises(TimeoutError):
        plain.result(timeout=0.1)
    gate.open()
    assert (wide.result(timeout=60), plain.result(timeout=60)) == ("wide", True)


def test_tags(equipped):
    assert equipped.nodes()[0].tags == ("fast",)
    assert equipped.options(tags=["fast"]).submit(abs, -1).result(timeout=60) == 1


def test_a_gpu_for_each_that_asks(equipped, gate):
    one = equipped.options(resources={"gpu": 1})
    assert one.submit(os.getenv, "CUDA_VISIBLE_DEVICES").result(timeout=60) in {"3", "5"}
    at_once = [one.submit(gate.task, os.getenv, "CUDA_VISIBLE_DEVICES") for _ in range(2)]
    gate.wait_until_begun(2)
    gate.open()
    assert {future.result(timeout=60) for future in at_once} == {"3", "5"}


def test_all_gpus_for_one_task(equipped):
    both = equipped.options(resources={"gpu": 2}).submit(os.getenv, "CUDA_VISIBLE_DEVICES").result(timeout=60)
    assert set(both.split(",")) == {"3", "5"}
    # And the workers are afterwards as they were.
    assert set(equipped.map(os.getenv, ["CUDA_VISIBLE_DEVICES"] * 8)) == {"3,5"}


# --- cancelling and shutting down ------------------------------------------------------------------------------------


def test_cancelling_what_waits(client, gate):
    busy = [client.submit(gate.task) for _ in range(2)]
    gate.wait_until_begun(2)
    waiting = [client.submit(gate.task) for _ in range(10)]
    assert all(future.cancel() for future in waiting)
    assert all(future.cancel() for future in waiting), "as often as one likes"
    assert all(future.cancelled() for future in waiting)
    with pytest.raises(concurrent.futures.CancelledError):
        waiting[0].result(timeout=0)
    assert concurrent.futures.wait(waiting, timeout=0).not_done == set()
    eventually(lambda: unfinished(client) == 2)
    gate.open()
    assert [future.result(timeout=60) for future in busy] == [None, None]
    assert not busy[0].cancel()
    assert gate.begun() == 2


def test_shutdown_waits_for_what_was_submitted(cluster, gate):
    client = Client(cluster)
    future = client.submit(gate.task, "done")
    gate.wait_until_begun()
    opener = threading.Timer(0.05, gate.open)
    opener.start()
    client.shutdown()
    assert future.done()
    assert future.result() == "done"
    client.shutdown()
    client.shutdown(wait=False)
    opener.join()


def test_after_shutdown_nothing_is_taken(cluster):
    client = Client(cluster)
    view = client.options(priority=1)
    client.shutdown()
    for use in (
        lambda: client.submit(abs, -1),
        lambda: client.map(abs, [-1]),
        lambda: view.submit(abs, -1),
        client.status,
        client.workers,
    ):
        with pytest.raises(RuntimeError, match="after shutdown"):
            use()
    assert "closed" in repr(client)


def test_shutdown_without_waiting_lets_tasks_finish(cluster, gate):
    client = Client(cluster)
    futures = [client.submit(gate.task, number) for number in range(4)]
    gate.wait_until_begun(2)
    client.shutdown(wait=False)
    assert not any(future.done() for future in futures)
    with pytest.raises(RuntimeError, match="after shutdown"):
        client.submit(abs, -1)
    gate.open()
    assert [future.result(timeout=60) for future in futures] == [0, 1, 2, 3]
    client.shutdown()


def test_shutdown_cancels_what_waits_if_told_to(client, cluster, gate):
    observer, client = client, Client(cluster)
    busy = [client.submit(gate.task, number) for number in range(2)]
    gate.wait_until_begun(2)
    for future in busy:
        eventually(future.running)
    waiting = [client.submit(gate.task) for _ in range(5)]
    closing = threading.Thread(target=client.shutdown, kwargs={"cancel_futures": True})
    closing.start()
    eventually(lambda: all(future.cancelled() for future in waiting))
    assert closing.is_alive(), "the running ones are waited for"
    eventually(lambda: unfinished(observer) == 2)
    gate.open()
    closing.join(60)
    assert not closing.is_alive()
    assert [future.result(timeout=0) for future in busy] == [0, 1]
    assert gate.begun() == 2


def test_the_context_manager_waits(cluster):
    with Client(cluster) as client:
        futures = [client.submit(abs, -number) for number in range(50)]
    assert all(future.done() for future in futures)
    with pytest.raises(RuntimeError):
        client.submit(abs, -1)


# --- what is there ---------------------------------------------------------------------------------------------------


def test_the_records(client, cluster):
    [node] = client.nodes()
    assert (node.pid, node.state, node.slots) == (cluster.node_pids[0], "alive", 2)
    assert node.host == os.uname().nodename
    assert node.resources["cpu"] >= 2
    assert node.resources["memory"] > 1 << 20
    eventually(lambda: all(worker.state == "idle" for worker in client.workers()))
    workers = client.workers()
    assert {worker.node for worker in workers} == {node.id}
    assert client.submit(os.getpid).result(timeout=60) in {worker.pid for worker in workers}
    status = client.status()
    assert (status.name, status.policy) == (cluster.name, "least-loaded")
    assert status.clients >= 1
    assert status.tasks.keys() == {"waiting", "queued", "delayed", "assigned"}
    assert [n.id for n in status.nodes] == [node.id]
    assert len(status.workers) == 2
    assert str(cluster.broker_pid) in repr(cluster)
    assert client.cluster_name == cluster.name in repr(client)


def test_busy_workers_are_seen(client, gate):
    futures = [client.submit(gate.task, os.getpid) for _ in range(2)]
    gate.wait_until_begun(2)
    eventually(lambda: {worker.state for worker in client.workers()} == {"busy"})
    assert client.nodes()[0].assigned == 2
    gate.open()
    assert {future.result(timeout=60) for future in futures} == {worker.pid for worker in client.workers()}


def test_closing_a_cluster_twice(clusters):
    cluster = LocalCluster(1)
    pids = [cluster.broker_pid, *cluster.node_pids]
    cluster.close()
    assert [pid for pid in pids if os.path.exists(f"/proc/{pid}")] == []
    cluster.close()
    assert "closed" in repr(cluster)
    with pytest.raises(errors.BrokerUnreachable):
        Client(cluster)


def test_workers_are_spread_over_nodes(clusters):
    with LocalCluster(3, n_nodes=2) as cluster, Client(cluster) as client:
        assert sorted(node.slots for node in client.nodes()) == [1, 2]
        assert {node.pid for node in client.nodes()} == set(cluster.node_pids)
        eventually(lambda: len({worker.pid for worker in client.workers() if worker.pid}) == 3)


# --- threads, processes, other clients --------------------------------------------------------------------------------


def test_many_threads_submit(client):
    results: dict[int, list[int]] = {}

    def work(thread):
        futures = [client.submit(operator.add, thread * 1000, number) for number in range(100)]
        results[thread] = [future.result(timeout=60) for future in futures]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert results == {thread: [thread * 1000 + number for number in range(100)] for thread in range(8)}


def test_two_clients_on_one_cluster(client, cluster):
    with Client(cluster) as other:
        assert other.status().clients >= 2
        for number in range(20):
            mine, theirs = client.submit(abs, -number), other.submit(abs, number + 100)
            assert (mine.result(timeout=60), theirs.result(timeout=60)) == (number, number + 100)
    assert client.submit(abs, -1).result(timeout=60) == 1


def test_a_client_that_leaves_takes_its_tasks_along(client, cluster, gate):
    other = Client(cluster)
    for _ in range(2):
        other.submit(gate.task)
    gate.wait_until_begun(2)
    waiting = [other.submit(gate.task) for _ in range(5)]
    other.shutdown(wait=False, cancel_futures=True)
    assert all(future.cancelled() for future in waiting)
    eventually(lambda: unfinished(client) == 2)
    gate.open()
    eventually(lambda: unfinished(client) == 0)
    assert gate.begun() == 2


# --- finding a cluster ------------------------------------------------------------------------------------------------


def works(client: Client) -> str:
    with client:
        assert client.submit(pow, 2, 3).result(timeout=60) == 8
        return client.cluster_name


def test_ways_to_name_a_cluster(cluster, monkeypatch):
    path = cluster_dir(cluster.name) / CONNECTION_FILE
    for where in (cluster, cluster.name, path, str(path), find_cluster(cluster.name)):
        assert works(Client(where)) == cluster.name
    for where in (cluster.name, str(path)):
        monkeypatch.setenv("ZMQSCHED_CLUSTER", where)
        assert works(Client()) == cluster.name


def test_the_default_cluster_is_found(single):
    assert works(Client()) == "default"


def test_without_a_cluster_one_is_started_and_stopped(scripts: Scripts):
    out, err = scripts.run("""
        import os
        import zmqsched

        with zmqsched.Client() as client:
            print(client.submit(pow, 2, 5).result(60))
            print(client.cluster_name in os.listdir(os.environ["ZMQSCHED_DIR"]))
        print(os.listdir(os.environ["ZMQSCHED_DIR"]))
        left_open = zmqsched.Client()
        print(left_open.submit(pow, 2, 6).result(60))
    """)
    assert (out, err) == ("32\nTrue\n[]\n64\n", "")


def test_the_map_of_the_module(scripts: Scripts):
    out, err = scripts.run("""
        import zmqsched
        print(zmqsched.map(pow, [2, 3], [10, 10]))
        print(zmqsched.map(lambda x: x * 2, range(5), chunksize=2))
    """)
    assert (out, err) == ("[1024, 59049]\n[0, 2, 4, 6, 8]\n", "")


def test_a_program_that_ends_by_an_exception(scripts: Scripts):
    _, err = scripts.run(
        """
        import zmqsched
        client = zmqsched.Client()
        client.submit(pow, 2, 3).result(60)
        raise SystemError("the user's")
        """,
        code=1,
    )
    assert err.count("Traceback") == 1
    assert "SystemError: the user's" in err


def test_an_interrupt_within_submit_leaves_nothing_that_never_ends(cluster):
    with Client(cluster) as client:
        for point in itertools.count(1):
            anew = client.options(name=str(point))  # nothing is as the last task's
            with interrupt_behind_call(point, Client._submit) as interrupted:
                anew.submit(abs, -1)
            eventually(lambda: not client._futures)
            if not interrupted:
                break
    assert point > 10


def test_nothing_is_left_open_by_clients(cluster):
    def opened():
        gc.collect()
        return len(os.listdir("/proc/self/fd")), threading.active_count()

    def use():
        with Client(cluster) as client:
            client.submit(abs, -1).result(timeout=60)

    use()
    descriptors, threads = opened()
    for _ in range(5):
        use()
    eventually(lambda: opened() <= (descriptors, threads) and opened()[1] <= threads)
