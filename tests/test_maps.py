"""Maps with real workers: order, errors, chunks, what is kept, and what a map leaves behind."""

from __future__ import annotations

import asyncio
import collections
import concurrent.futures
import gc
import itertools
import logging
import math
import operator
import os
import signal
import threading
import time
import weakref

import numpy as np
import pytest
from conftest import eventually

import zmqsched.mapping
import zmqsched.shelf
from zmqsched import Client, LocalCluster, Map, errors

MANY = 600
CHUNKS = [1, 7, "auto"]


def square(x):
    return x * x


def nap(seconds):
    time.sleep(seconds)
    return os.getpid()


def generated(items):
    yield from items


def fails_at(*bad):
    def fn(x):
        if x in bad:
            raise ValueError(f"bad row {x}")
        return x

    return fn


def tasks(client: Client) -> int:
    return client.status().counts["accepted"]


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("zmqsched map")]


@pytest.fixture(autouse=True)
def nothing_under_way(client: Client):
    yield
    try:
        eventually(lambda: not client._runs and not threads())
    finally:
        for run in list(client._runs):  # a failed test's, for the next to find nothing
            run.stop(force=True)


# --- results ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunksize", CHUNKS)
@pytest.mark.parametrize("make", [list, iter, set, generated, np.array], ids=lambda make: make.__name__)
def test_results_are_those_of_map_in_order(client, make, chunksize):
    assert list(client.map(square, make(range(MANY)), chunksize=chunksize)) == [x * x for x in range(MANY)]


@pytest.mark.parametrize("chunksize", CHUNKS)
def test_several_iterables_end_with_the_shortest(client, chunksize):
    assert list(client.map(pow, range(500), itertools.repeat(2), chunksize=chunksize)) == [x * x for x in range(500)]
    assert list(client.map(pow, range(500), [2, 2], chunksize=chunksize)) == [0, 1]
    assert list(client.map(pow, [], itertools.count(), chunksize=chunksize)) == []
    assert list(client.map(pow, chunksize=chunksize)) == []


@pytest.mark.parametrize("chunksize", CHUNKS)
def test_starmap(client, chunksize):
    pairs = [(x, 2) for x in range(100)]
    assert list(client.starmap(pow, pairs, chunksize=chunksize)) == [x * x for x in range(100)]
    assert list(client.starmap(pow, iter(pairs), chunksize=chunksize)) == [x * x for x in range(100)]
    with pytest.raises(TypeError, match="iterable"):
        list(client.starmap(pow, [(1, 2), 3], chunksize=chunksize))


@pytest.mark.parametrize("chunksize", CHUNKS)
def test_unordered_results_are_the_same_ones(client, chunksize):
    results = client.map(square, iter(range(MANY)), ordered=False, chunksize=chunksize)
    assert sorted(results) == [x * x for x in range(MANY)]


def test_unordered_results_come_as_they_are_finished(client, gate):
    released = client.map(lambda x, task=gate.task: task(x) if x == 0 else x, range(3), ordered=False)
    assert {next(released), next(released)} == {1, 2}
    gate.open()
    assert list(released) == [0]


def test_few_tasks_for_many_short_items(client):
    before = tasks(client)
    assert sum(client.map(abs, range(50_000))) == sum(range(50_000))
    assert tasks(client) - before < 150


def test_a_list_is_taken_as_it_is_at_the_call(client):
    items = list(range(MANY))
    results = client.map(square, items)
    items.clear()
    assert sum(1 for _ in results) == MANY


def test_large_results_and_arguments_travel_whole(client):
    arrays = [np.full(200_000, number) for number in range(40)]
    came = list(client.map(operator.neg, arrays))
    assert all((a == -b).all() for a, b in zip(came, arrays, strict=True))
    came[0][0] = 1


def test_a_long_batch_gives_back_what_it_has_not_begun(client):
    """The first items make believe that all are short."""
    durations = [0.0] * 2000 + [0.2] * 8
    assert len(set(list(client.map(nap, durations))[-8:])) == 2, "two workers have shared the long ones"


def test_items_of_a_slow_iterable_do_not_wait_for_more(client):
    go_on = threading.Event()

    def slowly():
        yield from range(100)
        go_on.wait(60)
        yield 100

    results = client.map(square, slowly())
    assert [next(results) for _ in range(100)] == [x * x for x in range(100)]
    go_on.set()
    assert list(results) == [10_000]


# --- what is under way -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunksize", CHUNKS)
def test_an_iterable_is_consumed_whether_or_not_results_are_read(client, chunksize):
    taken = []

    def items():
        for x in range(MANY):
            taken.append(x)
            yield x

    results = client.map(square, items(), chunksize=chunksize)
    eventually(lambda: results.done == MANY)
    assert len(taken) == results.total == MANY
    assert sum(results) == sum(x * x for x in range(MANY))


@pytest.mark.parametrize("chunksize", CHUNKS)
def test_endless_iterables_are_taken_a_bounded_number_at_a_time(client, gate, chunksize):
    taken = itertools.count()
    results = client.map(lambda x, task=gate.task: task(x) if x >= 5 else x, taken, chunksize=chunksize)
    gate.wait_until_begun(2)
    there = next(taken)
    assert there < zmqsched.mapping.ITEMS + 2 * zmqsched.mapping.LOOKAHEAD
    gate.open()
    assert list(itertools.islice(results, 100)) == [*range(there), *range(there + 1, 101)][:100]
    results.close()


@pytest.mark.parametrize("chunksize", [1, "auto"])
@pytest.mark.parametrize("buffersize", [1, 2, 5, 1000])
def test_buffersize_bounds_what_is_taken_and_not_read(client, buffersize, chunksize):
    drawn = []

    def items():
        for x in range(60):
            drawn.append(x)
            yield x

    results = client.map(square, items(), buffersize=buffersize, chunksize=chunksize)
    eventually(lambda: results.done == min(buffersize, 60))
    assert len(drawn) == min(buffersize, 60)
    for number, result in enumerate(results, 1):
        assert result == (number - 1) ** 2
        assert len(drawn) <= number + buffersize


def test_buffersize_counts_chunks_of_a_given_size(client):
    items = iter(range(100))
    results = client.map(square, items, buffersize=2, chunksize=5)
    eventually(lambda: results.done == 10)
    assert next(items) == 10
    assert sum(1 for _ in results) == 99


def test_unread_results_beyond_what_memory_is_for_lie_in_files(client, monkeypatch):
    monkeypatch.setattr(zmqsched.shelf, "MEMORY_BYTES", 10_000)
    results = client.map(lambda x: os.urandom(500), range(500))
    assert {len(value) for value in results} == {500}


def test_the_memory_of_a_map_over_a_generator_is_bounded(client, cluster):
    """Half a million here; ten million in the benchmarks."""
    import psutil

    both = [psutil.Process(), psutil.Process(cluster.broker_pid)]
    list(client.map(square, iter(range(300_000))))
    before = [process.memory_info().rss for process in both]
    results = client.map(float, iter(range(500_000)))
    eventually(lambda: results.done == 500_000, 60)
    grown = [process.memory_info().rss - rss for process, rss in zip(both, before, strict=True)]
    assert sum(grown) < 40 * 2**20, grown
    assert sum(results) == sum(range(500_000))


def test_progress_is_counted(client, gate):
    results = client.map(gate.task, range(3))
    gate.wait_until_begun(2)
    assert (results.total, results.done, results.failed) == (3, 0, 0)
    eventually(lambda: results.running == 2)
    assert "0 of 3 done, 0 failed, 2 running" in repr(results)
    gate.open()
    eventually(lambda: results.done == 3)
    assert (list(results), results.running) == ([0, 1, 2], 0)
    endless = client.map(abs, itertools.count())
    assert endless.total is None
    endless.close()


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunksize", CHUNKS)
def test_an_error_is_raised_in_its_place_and_ends_the_map(client, chunksize):
    results = client.map(fails_at(50, 60), range(100), chunksize=chunksize)
    assert [next(results) for _ in range(50)] == list(range(50))
    with pytest.raises(ValueError, match="bad row 50") as raised:
        next(results)
    assert "(item 50 of a map)" in raised.value.__notes__
    assert list(results) == []


@pytest.mark.parametrize("chunksize", CHUNKS)
@pytest.mark.parametrize("ordered", [True, False])
def test_errors_in_the_place_of_results(client, chunksize, ordered, caplog):
    bad = range(0, 400, 7)
    with caplog.at_level(logging.WARNING, "zmqsched"):
        results = client.map(fails_at(*bad), range(400), chunksize=chunksize, on_error="return", ordered=ordered)
        came = list(results)
    wrong = [value for value in came if isinstance(value, ValueError)]
    assert sorted(value for value in came if value not in wrong) == sorted(set(range(400)) - set(bad))
    assert sorted(map(str, wrong)) == sorted(f"bad row {x}" for x in bad)
    if ordered:
        assert [type(came[x]) for x in bad] == [ValueError] * len(bad)
    assert (results.done, results.failed) == (400 - len(bad), len(bad))
    first, line = results.summary().splitlines()
    assert first == "58 items of 400 have failed"
    assert line.startswith("  58 x ValueError at test_maps.py:")
    assert line.endswith(".fn ('bad row 0', first at item 0)")
    assert caplog.messages == [results.summary()]


def test_failures_are_summed_up_by_type_and_place(client):
    def fn(x):
        if x % 3 == 1:
            raise KeyError(x)
        if x == 2:
            return threading.Lock()
        return int("no") if x % 50 == 0 else x

    results = client.map(fn, range(300), on_error="return")
    collections.deque(results, maxlen=0)
    lines = results.summary().splitlines()
    assert lines[0] == "105 items of 300 have failed"
    assert [line.split()[:3] for line in lines[1:]] == [
        ["100", "x", "KeyError"], ["4", "x", "ValueError"], ["1", "x", "zmqsched.errors.ResultNotSerializable"]
    ]  # fmt: skip
    assert list(results.failures) == sorted([*range(1, 300, 3), 0, 2, 50, 150, 200])
    assert isinstance(results.failures[4], KeyError)


def test_what_has_failed_can_be_tried_again(client, tmp_path):
    def flaky(x, directory=str(tmp_path)):
        if x % 10 == 0:
            try:
                open(f"{directory}/{x}", "x").close()
            except FileExistsError:
                return -x
            raise OSError("the first time")
        return x

    results = client.map(flaky, iter(range(200)), on_error="return")
    collections.deque(results, maxlen=0)
    again = results.retry_failed()
    assert list(again) == [-x for x in range(0, 200, 10)]
    assert list(results.failures) == list(range(0, 200, 10))
    assert (again.failed, list(again.retry_failed())) == (0, [])


def test_indices_stay_what_they_were(client):
    first = client.map(fails_at(3, 5), range(10), on_error="return")
    collections.deque(first, maxlen=0)
    second = first.retry_failed()
    collections.deque(second, maxlen=0)
    assert list(second.failures) == [3, 5]
    assert second.results() == {}


@pytest.mark.parametrize("chunksize", CHUNKS)
def test_what_cannot_be_pickled_is_one_failure(client, chunksize):
    items = [threading.Lock() if x == 100 else x for x in range(300)]
    came = list(client.map(lambda x: x, items, chunksize=chunksize, on_error="return"))
    assert isinstance(came.pop(100), errors.NotSerializable)
    assert came == [x for x in range(300) if x != 100]


class OnlyHere:
    """Rebuilt where it was made only."""

    def __init__(self) -> None:
        self.pid = os.getpid()

    def __reduce__(self):
        return _only_here, (self.pid,)


def _only_here(pid):
    if os.getpid() != pid:
        raise LookupError("not here")
    return OnlyHere()


@pytest.mark.parametrize("chunksize", CHUNKS)
def test_a_call_that_cannot_be_read_is_one_failure(client, chunksize):
    items = [OnlyHere() if x == 100 else x for x in range(300)]
    came = list(client.map(type, items, chunksize=chunksize, on_error="return"))
    assert isinstance(came.pop(100), LookupError)
    assert came == [int] * 299


class NotHere:
    def __reduce__(self):
        return _not_here, (os.getpid(),)


def _not_here(pid):
    if os.getpid() != pid:
        raise LookupError("not here")
    return 0


@pytest.mark.parametrize("chunksize", CHUNKS)
def test_a_result_that_cannot_be_read_is_one_failure(client, chunksize):
    results = client.map(lambda x: NotHere() if x == 100 else x, range(300), chunksize=chunksize, on_error="return")
    came = list(results)
    assert isinstance(came.pop(100), errors.ResultDecodeError)
    assert came == [x for x in range(300) if x != 100]
    assert (results.done, results.failed) == (299, 1)
    assert list(results.retry_failed()) == []


def test_a_function_that_cannot_be_pickled_is_the_error_of_the_first_result(client):
    lock = threading.Lock()
    results = client.map(lambda x: lock, range(1000), on_error="return")
    with pytest.raises(errors.NotSerializable, match="lock"):
        next(results)


@pytest.mark.parametrize("chunksize", [40, "auto"])
def test_only_the_item_that_kills_its_workers_fails(client, chunksize):
    def fn(x):
        if x == 217:
            os.kill(os.getpid(), signal.SIGKILL)
        return x

    came = list(client.map(fn, iter(range(400)), chunksize=chunksize, on_error="return"))
    assert isinstance(came.pop(217), errors.WorkerDied)
    assert came == [x for x in range(400) if x != 217]


def test_workers_killed_in_the_middle_lose_nothing(client):
    results = client.map(lambda x: time.sleep(0.002) or (x, os.getpid()), iter(range(600)))
    came = []
    for value, pid in results:
        came.append(value)
        if value in (100, 300):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
    assert came == list(range(600))


@pytest.mark.parametrize("chunksize", CHUNKS)
def test_only_items_that_fail_are_retried(client, tmp_path, chunksize):
    def flaky(x, directory=str(tmp_path)):
        with open(f"{directory}/{x}", "a") as log:
            log.write("x")
        size = os.path.getsize(f"{directory}/{x}")
        if x == 7 and size < 3:
            raise OSError("not yet")
        if x == 8:
            raise ValueError("never")
        return x

    view = client.options(retries=2, retry_on=OSError, backoff=0.01)
    came = list(view.map(flaky, range(50), chunksize=chunksize, on_error="return"))
    assert isinstance(came[8], ValueError)
    assert [value for value in came if not isinstance(value, ValueError)] == [x for x in range(50) if x != 8]
    assert {x: os.path.getsize(tmp_path / str(x)) for x in range(50)} == {x: 3 if x == 7 else 1 for x in range(50)}


def test_a_time_limit_is_each_items_own(client):
    view = client.options(timeout=0.5)
    came = list(view.map(time.sleep, [0.02] * 50 + [30], on_error="return"))
    assert came[:50] == [None] * 50
    assert isinstance(came[50], errors.TaskTimeout)


def test_at_most_once_is_each_items_own(client):
    def fn(x):
        if x == 40:
            os._exit(3)
        return x

    came = list(client.options(requeue=False).map(fn, range(60), on_error="return"))
    assert isinstance(came.pop(40), errors.WorkerDied)
    assert came == [x for x in range(60) if x != 40]


@pytest.mark.parametrize("chunksize", CHUNKS)
def test_what_an_iterable_raises_comes_behind_its_items(client, chunksize):
    def items():
        yield from range(200)
        raise LookupError("no more")

    for options in ({}, {"on_error": "return"}, {"ordered": False}):
        results = client.map(square, items(), chunksize=chunksize, **options)
        assert sorted(next(results) for _ in range(200)) == [x * x for x in range(200)]
        with pytest.raises(LookupError, match="no more"):
            next(results)


@pytest.mark.parametrize(
    ("wrong", "error", "words"),
    [
        ({"chunksize": 0}, ValueError, "chunksize must be at least 1, not 0"),
        ({"chunksize": -1}, ValueError, "at least 1, not -1"),
        ({"chunksize": True}, TypeError, 'a number of items, or "auto", not True'),
        ({"chunksize": "many"}, TypeError, 'or "auto", not \'many\''),
        ({"chunksize": 2.0}, TypeError, "not 2.0"),
        ({"buffersize": 0}, ValueError, "buffersize must be None or > 0"),
        ({"buffersize": -1}, ValueError, "buffersize must be None or > 0"),
        ({"buffersize": "foo"}, TypeError, "buffersize must be an integer or None"),
        ({"buffersize": 2.0}, TypeError, "buffersize must be an integer or None"),
        ({"on_error": "ignore"}, ValueError, 'on_error is "raise" or "return", not \'ignore\''),
        ({"timeout": "1"}, TypeError, "timeout is a number of seconds, not str"),
        ({"timeout": math.nan}, ValueError, "not nan"),
        ({"seed": -1}, ValueError, "seed must be at least 0"),
        ({"seed": "abc"}, TypeError, "an int or a numpy.random.SeedSequence, not str"),
        ({"seed": True}, TypeError, "not a bool"),
    ],
    ids=str,
)
def test_wrong_arguments_are_an_error_at_once(client, wrong, error, words):
    with pytest.raises(error, match=words):
        client.map(lambda x, rng=None: x, [1], **wrong)


def test_wrong_functions_and_iterables_are_an_error_at_once(client):
    with pytest.raises(TypeError, match="map needs a callable, not int"):
        client.map(5, [1])
    with pytest.raises(TypeError, match="not iterable"):
        client.map(abs, 5)
    with pytest.raises(TypeError, match="takes no argument rng"):
        client.map(lambda x: x, [1], seed=1)


def test_after_a_shutdown(cluster):
    with Client(cluster) as client:
        results = client.map(square, iter(range(1000)))
    assert list(results) == [x * x for x in range(1000)], "what was accepted goes on to its end"
    with pytest.raises(RuntimeError, match="after shutdown"):
        client.map(abs, [1])


def test_a_shutdown_that_cancels(cluster, gate):
    client = Client(cluster)
    results = client.map(gate.task, itertools.count())
    gate.wait_until_begun(2)
    client.shutdown(wait=False, cancel_futures=True)
    with pytest.raises(concurrent.futures.CancelledError):
        list(results)


def test_a_shutdown_does_not_wait_for_somebody_to_read(cluster):
    client = Client(cluster)
    items = iter(range(4))
    client.map(str, items, buffersize=2)
    client.shutdown()
    assert next(items) == 2


def test_a_shutdown_waits_for_what_nobody_reads(cluster, tmp_path):
    def fn(x, directory=str(tmp_path)):
        open(f"{directory}/{x}", "x").close()

    client = Client(cluster)
    client.map(fn, range(20))
    client.map(fn, range(20, 40), chunksize=5)
    client.map(fn, iter(range(40, 300)))
    gc.collect()
    client.shutdown()
    assert len(os.listdir(tmp_path)) == 300


def test_a_lost_cluster_is_the_error_behind_what_has_come(clusters):
    with LocalCluster(1) as cluster:
        client = Client(cluster)
        results = client.map(square, itertools.count())
        assert next(results) == 0
        cluster.close()
        with pytest.raises(errors.ClusterLost):
            collections.deque(results, maxlen=0)
        with pytest.raises(errors.ClusterLost):
            client.map(abs, [1])
        client.shutdown()


# --- ends ------------------------------------------------------------------------------------------------------------


def test_a_timeout_counts_from_the_call_and_ends_the_map(client, gate):
    results = client.map(lambda x, task=gate.task: task(x) if x == 5 else x, itertools.count(), timeout=1)
    came = []
    with pytest.raises(TimeoutError):
        came.extend(results)
    assert list(results) == []
    gate.open()


@pytest.mark.parametrize("chunksize", CHUNKS)
def test_closing_cancels_what_has_not_begun(client, gate, chunksize):
    results = client.map(gate.task, range(1000), chunksize=chunksize)
    gate.wait_until_begun(2)
    results.close()
    assert list(results) == []
    eventually(lambda: sum(client.status().tasks.values()) <= 2)
    gate.open()
    eventually(lambda: not any(client.status().tasks.values()))
    assert gate.begun() < 50


def test_dropping_what_is_being_read_cancels_the_rest(client, gate):
    results = client.map(lambda x, task=gate.task: task(x) if x > 5 else x, itertools.count())
    assert next(results) == 0
    gate.wait_until_begun(2)
    dropped = weakref.ref(results)
    del results
    gc.collect()
    assert dropped() is None
    gate.open()
    eventually(lambda: not client._runs and not any(client.status().tasks.values()))


def test_what_nobody_reads_is_computed_all_the_same(client, tmp_path):
    def fn(x, directory=str(tmp_path)):
        open(f"{directory}/{x}", "x").close()

    client.map(fn, iter(range(100)))
    gc.collect()
    eventually(lambda: not client._runs)
    assert len(os.listdir(tmp_path)) == 100


def test_results_are_kept_until_the_last_is_read(client):
    results = client.map(fails_at(150), range(200), on_error="return")
    for _ in range(120):
        next(results)
    eventually(lambda: results.done == 199)
    assert results.results() == {x: x for x in range(200) if x != 150}
    collections.deque(results, maxlen=0)
    assert results.results() == {}


def interrupted(fn) -> None:
    """Runs it and interrupts it when it waits."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            fn()
    finally:
        signal.signal(signal.SIGINT, before)


def interrupt_when(fact) -> threading.Thread:
    def run() -> None:
        eventually(fact)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    thread = threading.Thread(target=run)
    thread.start()
    return thread


def test_an_interrupt_ends_what_runs_and_keeps_what_is_finished(client, gate):
    def call():
        list(client.map(lambda x, task=gate.task: task(x) if x >= 30_000 else x, itertools.count()))

    thread = interrupt_when(lambda: gate.begun() >= 2 and client.last_map.done >= 300)
    interrupted(call)
    thread.join()
    eventually(lambda: not any(client.status().tasks.values()))
    results = client.last_map.results()
    assert results == {x: x for x in range(len(results))}
    assert len(results) >= 300
    assert client.submit(abs, -1).result(timeout=60) == 1, "its workers are there"


def test_last_map_is_the_last(client):
    first = client.map(square, range(3))
    assert client.last_map.results().keys() <= {0, 1, 2}
    assert list(first) == [0, 1, 4]
    second = client.starmap(pow, [(2, 3)])
    assert list(client.last_map) == [8]
    assert list(second) == []


def test_a_client_and_its_maps_are_dropped_together(cluster):
    client = Client(cluster)
    assert list(client.map(square, iter(range(100)))) == [x * x for x in range(100)]
    thread, dropped = client._thread, weakref.ref(client)
    del client
    eventually(lambda: gc.collect() is not None and dropped() is None)
    thread.join(60)
    assert not thread.is_alive()


# --- everywhere ------------------------------------------------------------------------------------------------------


def noise(x, rng):
    return float(rng.normal()) + x


def test_random_numbers_depend_on_seed_and_index_alone(client):
    expected = [np.random.default_rng(np.random.SeedSequence(42, spawn_key=(x,))).normal() + x for x in range(200)]
    for chunksize in CHUNKS:
        assert list(client.map(noise, range(200), seed=42, chunksize=chunksize)) == expected
    assert list(client.map(noise, range(200), seed=np.random.SeedSequence(42))) == expected
    with LocalCluster(1) as other, Client(other) as alone:
        assert list(alone.map(noise, iter(range(200)), seed=42)) == expected
    assert next(client.map(noise, [0], seed=43)) != expected[0]
    child = np.random.SeedSequence(42).spawn(1)[0]
    assert next(client.map(noise, [0], seed=child)) == np.random.default_rng(child.spawn(1)[0]).normal()


def test_random_numbers_of_a_retry_are_the_same(client, tmp_path):
    def fn(x, rng, directory=str(tmp_path)):
        number = float(rng.random())
        if x % 5 == 0:
            try:
                open(f"{directory}/{x}-{number}", "x").close()
            except FileExistsError:
                return number
            raise OSError("the first time")
        return number

    expected = list(client.map(lambda x, rng: float(rng.random()), range(50), seed=1))
    assert list(client.options(retries=1).map(fn, range(50), seed=1)) == expected
    for file in tmp_path.iterdir():
        file.unlink()
    results = client.map(fn, range(50), seed=1, on_error="return")
    collections.deque(results, maxlen=0)
    assert list(results.retry_failed()) == expected[::5]


def test_several_maps_at_once_from_several_threads(client):
    sums = {}

    def use(number):
        sums[number] = sum(client.map(square, iter(range(number, number + 2000))))

    users = [threading.Thread(target=use, args=(number,)) for number in range(6)]
    for user in users:
        user.start()
    for user in users:
        user.join(60)
    assert sums == {number: sum(x * x for x in range(number, number + 2000)) for number in range(6)}


def test_maps_of_maps(client):
    inner = client.map(square, iter(range(1000)))
    outer = client.map(operator.neg, inner)
    assert list(outer) == [-x * x for x in range(1000)]


def test_in_an_event_loop_and_in_a_callback(client):
    async def main():
        return await asyncio.to_thread(list, client.map(square, range(100)))

    assert asyncio.run(main()) == [x * x for x in range(100)]
    came = []
    client.submit(abs, 1).add_done_callback(lambda _: came.extend(client.map(square, range(100))))
    eventually(lambda: len(came) == 100)


def test_the_tasks_of_a_jobs_map_are_its_items(client):
    view = client.options(job="squares")
    assert list(view.map(square, iter(range(5)))) == [0, 1, 4, 9, 16]
    assert sorted(future.result(timeout=60) for future in client.job("squares")) == [0, 1, 4, 9, 16]
    results = client.options(job="draws").map(noise, range(5), seed=1, on_error="return")
    assert list(results) == list(client.map(noise, range(5), seed=1))


def test_futures_as_items(client):
    assert list(client.map(operator.neg, [client.submit(abs, -x) for x in range(50)])) == [-x for x in range(50)]
    mixed = [[client.submit(abs, -x), 1] if x % 20 == 0 else [x, 1] for x in range(100)]
    assert list(client.map(sum, mixed)) == [x + 1 for x in range(100)]


def test_in_a_fork_a_map_says_where_it_belongs(client):
    results = client.map(abs, itertools.count())
    assert next(results) == 0
    read, write = os.pipe()
    if not (child := os.fork()):
        try:
            collections.deque(results, maxlen=0)
        except RuntimeError as error:
            os.write(write, str(error).encode())
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        assert b"belongs to the process that made it" in pipe.read()
    assert os.waitpid(child, 0)[1] == 0
    assert next(results) == 1
    results.close()


def test_at_the_programs_end_what_nobody_reads_is_computed(scripts, tmp_path):
    made = tmp_path / "made"
    made.mkdir()
    _, err = scripts.run(
        """
        import itertools, sys
        from zmqsched import Client

        def leave(x, directory=sys.argv[1]):
            open(f"{directory}/{x}", "x").close()

        client = Client()
        first = client.map(leave, (x for x in range(300)))
        client.map(leave, range(300, 320))
        endless = client.map(abs, itertools.count())
        assert next(endless) == 0
        """,
        str(made),
    )
    assert err == ""
    assert len(list(made.iterdir())) == 320


def test_the_maps_of_the_module(scripts):
    out, _ = scripts.run("""
        import zmqsched
        print(zmqsched.starmap(pow, [(2, 3), (3, 2)]))
        print([type(x).__name__ for x in zmqsched.map(abs, [-1, "a"], on_error="return", chunksize=2)])
        print(zmqsched.map(lambda x, rng: int(rng.integers(1000)), range(3), seed=7, timeout=60))
    """)
    draws = [int(np.random.default_rng(np.random.SeedSequence(7, spawn_key=(x,))).integers(1000)) for x in range(3)]
    assert out.splitlines() == ["[8, 9]", "['int', 'TypeError']", str(draws)]


def test_map_is_an_iterator_that_can_be_closed(client):
    results = client.map(square, range(5))
    assert isinstance(results, Map)
    assert iter(results) is results
    results.close()
    results.close()
    with pytest.raises(StopIteration):
        next(results)
