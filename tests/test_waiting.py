"""``zmqsched.wait`` and ``as_completed``: the standard's, also asynchronous; an interrupt cancels what is waited for.

Real interrupts of real programs are in test_interrupts.py; here the clients are a stand-in that notes what it is told.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import gc
import signal
import sys
import threading
import time
import weakref
from collections.abc import Iterator

import pytest
from conftest import eventually

import zmqsched
from zmqsched.callbacks import Callbacks
from zmqsched.futures import Future
from zmqsched.payload import pack_exception, pack_value
from zmqsched.protocol import Final
from zmqsched.waiting import cancel_all


class Owner:
    """What a future knows of its client."""

    _nested = False

    def __init__(self) -> None:
        self._callbacks = Callbacks()
        self.withdrawn: list[tuple[list[bytes], bool]] = []

    def _withdraw(self, tasks: list[bytes], *, force: bool) -> None:
        self.withdrawn.append((tasks, force))

    def future(self, name: str) -> Future[int]:
        return Future(name.encode(), self)

    def futures(self, names: str) -> list[Future[int]]:
        return [self.future(name) for name in names]

    def answer(self, future: Future[int], value: int | Exception) -> None:
        if isinstance(value, Exception):
            final = Final(future._task, "error", pack_exception(value))
        else:
            final = Final(future._task, "ok", pack_value(value))
        if future._answer(final):
            self._callbacks.put(future._call_back)


@pytest.fixture
def owner() -> Iterator[Owner]:
    owner = Owner()
    yield owner
    owner._callbacks.close()


class Interrupter:
    """Sends SIGINT to the main thread when that waits for one of these futures."""

    def __init__(self, *futures: concurrent.futures.Future[int]) -> None:
        self._futures = futures

    def __enter__(self) -> None:
        self._before = signal.signal(signal.SIGINT, signal.default_int_handler)
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._thread.join()
        signal.signal(signal.SIGINT, self._before)

    def _run(self) -> None:
        eventually(lambda: any(f._waiters or f._condition._waiters for f in self._futures))
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)


def runs(future: Future[int]) -> Future[int]:
    future.set_running_or_notify_cancel()
    return future


# --- as the standard -------------------------------------------------------------------------------------------------


def test_wait(owner):
    done, late = owner.futures("ab")
    owner.answer(done, 1)
    assert zmqsched.wait([done, late], timeout=0) == ({done}, {late})
    assert zmqsched.wait(iter([done, late, done]), return_when="FIRST_COMPLETED") == ({done}, {late})
    assert zmqsched.wait([done]).not_done == set()
    assert zmqsched.wait([]) == (set(), set())
    with pytest.raises(ValueError, match="return condition"):
        zmqsched.wait([late], return_when="SOON")


@pytest.mark.parametrize("wait", [zmqsched.wait, concurrent.futures.wait])
@pytest.mark.parametrize("before", [True, False])
def test_wait_for_the_first_exception_unpickles_nothing(owner, wait, before):
    good, bad, late = owner.futures("abc")

    def answer():
        owner.answer(good, 1)
        owner.answer(bad, KeyError("x"))

    timer = threading.Timer(0.0 if before else 0.05, answer)
    timer.start()
    if before:
        timer.join()
    assert wait([good, bad, late], return_when="FIRST_EXCEPTION", timeout=60) == ({good, bad}, {late})
    assert good._packed() == pack_value(1), "not unpickled yet"
    assert "not unpickled yet" in repr(bad)
    assert (good.result(), good.exception(), good._packed()) == (1, None, None)
    assert isinstance(bad.exception(), KeyError)
    assert "KeyError" in repr(bad)
    assert bad._packed() is None


def test_as_completed_gives_each_once_in_the_order_of_their_end(owner):
    first, second, third, cancelled = owner.futures("abcd")
    owner.answer(first, 1)
    completed = zmqsched.as_completed([second, first, third, first, cancelled], timeout=60)
    assert next(completed) is first
    owner.answer(third, 3)
    owner.answer(second, 2)
    cancelled.cancel()
    assert list(completed) == [third, second, cancelled]
    assert list(zmqsched.as_completed([])) == []


def test_as_completed_in_time(owner):
    done, *late = owner.futures("abc")
    owner.answer(done, 1)
    completed = zmqsched.as_completed([done, *late], timeout=0)
    assert next(completed) is done
    with pytest.raises(TimeoutError, match=r"2 \(of 3\) futures unfinished"):
        next(completed)
    assert list(completed) == []
    assert [future._waiters for future in late] == [[], []]


def test_as_completeds_timeout_counts_from_the_call(owner):
    completed = zmqsched.as_completed(owner.futures("a"), timeout=1)
    time.sleep(1)
    began = time.monotonic()
    with pytest.raises(TimeoutError):
        next(completed)
    assert time.monotonic() - began < 0.9


@pytest.mark.parametrize("timeout", [-1, float("nan"), float("inf")])
def test_odd_timeouts(owner, timeout):
    done, late = owner.futures("ab")
    owner.answer(done, 1)
    assert next(zmqsched.as_completed([done, late], timeout=timeout)) is done
    if timeout != float("inf"):
        with pytest.raises(TimeoutError):
            list(zmqsched.as_completed([late], timeout=timeout))
        with pytest.raises(TimeoutError):
            late.result(timeout=timeout)


def test_as_completed_keeps_nothing_it_has_given(owner):
    futures = owner.futures("abc")
    completed = zmqsched.as_completed(futures)
    for future in futures:
        owner.answer(future, 1)
    refs = [weakref.ref(future) for future in futures]
    del future, futures
    given = next(completed)
    assert given in [ref() for ref in refs]
    del given
    gc.collect()
    assert sum(ref() is None for ref in refs) == 1


def test_an_iteration_that_is_dropped_leaves_nothing_in_the_futures(owner):
    futures = owner.futures("abc")
    completed = zmqsched.as_completed(futures)
    owner.answer(futures[0], 1)
    for _ in completed:
        break
    del completed
    assert [future._waiters for future in futures[1:]] == [[], []]
    assert not futures[1].done()


def test_other_executors_futures_may_be_among_them(owner):
    mine = owner.future("a")
    with concurrent.futures.ThreadPoolExecutor() as threads:
        theirs = threads.submit(abs, -1)
        owner.answer(mine, 1)
        assert set(zmqsched.as_completed([mine, theirs])) == zmqsched.wait([mine, theirs]).done == {mine, theirs}


def test_as_completed_of_what_is_no_future():
    with pytest.raises(AttributeError):
        zmqsched.as_completed([1])


# --- async for -------------------------------------------------------------------------------------------------------


def test_async_for(owner):
    futures = owner.futures("abc")
    owner.answer(futures[1], 1)

    async def main():
        seen = []
        async for future in zmqsched.as_completed(futures, timeout=60):
            seen.append(future)
            if len(seen) < 3:
                left = next(future for future in futures if future not in seen)
                threading.Thread(target=owner.answer, args=(left, 2)).start()
        return seen

    assert asyncio.run(main()) == [futures[1], futures[0], futures[2]]


def test_async_for_in_time(owner):
    async def main():
        with pytest.raises(TimeoutError, match=r"1 \(of 1\)"):
            async for _ in zmqsched.as_completed(owner.futures("a"), timeout=0.02):
                pass

    asyncio.run(main())


def test_an_async_for_that_is_cancelled_cancels_what_it_waits_for(owner):
    futures = [runs(owner.future("a")), owner.future("b")]

    async def loop():
        async for _ in zmqsched.as_completed(futures):
            pass

    async def main():
        task = asyncio.create_task(loop())
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert [future.cancelled() for future in futures] == [True, True]
    assert [(sorted(tasks), force) for tasks, force in owner.withdrawn] == [([b"a", b"b"], True)]


@pytest.mark.parametrize("known_to_run", [False, True])
def test_an_await_that_is_cancelled_cancels_also_what_runs(owner, known_to_run):
    future = runs(owner.future("a")) if known_to_run else owner.future("a")

    async def main():
        task = asyncio.ensure_future(asyncio.wait_for(future, 20))
        for _ in range(5):  # turns of the loop, until it is awaited
            await asyncio.sleep(0)
        assert future._done_callbacks
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert future.cancelled()
    assert owner.withdrawn[-1] == ([b"a"], True)


# --- interrupts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wait",
    [zmqsched.wait, lambda futures: list(zmqsched.as_completed(futures)), lambda futures: futures[1].result(),
     lambda futures: futures[1].exception(timeout=60)],
    ids=["wait", "as_completed", "result", "exception"],
)  # fmt: skip
def test_an_interrupt_cancels_what_was_waited_for(owner, wait):
    done, running, waiting, other = futures = owner.futures("abcd")
    owner.answer(done, 1)
    runs(running)
    called = threading.Event()
    running.add_done_callback(lambda _: called.set())
    with Interrupter(running), pytest.raises(KeyboardInterrupt):
        wait(futures[:3])
    assert running.cancelled()
    assert called.wait(60)
    assert done.result() == 1
    assert not other.done()
    [(tasks, force)] = owner.withdrawn
    assert force
    assert waiting.cancelled() == (len(tasks) == 2)


def test_interrupted_twice_the_cluster_knows_already(owner, monkeypatch):
    futures = owner.futures("ab")

    def again(self, states):
        raise KeyboardInterrupt("the second")

    monkeypatch.setattr(Future, "_turn_cancelled", again)
    with Interrupter(*futures), pytest.raises(KeyboardInterrupt, match="the second"):
        zmqsched.wait(futures)
    assert [sorted(tasks) for tasks, _ in owner.withdrawn] == [[b"a", b"b"]]


def test_cancelling_many_is_one_message_for_each_client(owner):
    another = Owner()
    mine, theirs = [runs(owner.future("a")), *owner.futures("bc")], another.futures("d")
    standard: concurrent.futures.Future[int] = concurrent.futures.Future()
    cancel_all([*mine, *theirs, standard])
    assert [future.cancelled() for future in [*mine, *theirs, standard]] == [False, True, True, True, True]
    assert (owner.withdrawn, another.withdrawn) == ([([b"b", b"c"], False)], [([b"d"], False)])
    cancel_all(mine, force=True)
    assert mine[0].cancelled()
    assert owner.withdrawn[1:] == [([b"a"], True)]


def test_an_interrupt_of_an_unpickling_leaves_the_future_whole(owner, monkeypatch):
    future = owner.future("a")
    owner.answer(future, 7)

    def interrupted(_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("zmqsched.futures.unpack_value", interrupted)
        with pytest.raises(KeyboardInterrupt):
            future.result()
    assert future.result() == 7
    assert owner.withdrawn == []


def test_of_two_that_ask_one_unpickles_and_the_other_waits_as_long_as_it_may(owner, monkeypatch):
    future = owner.future("a")
    owner.answer(future, 7)
    begun, go_on, times = threading.Event(), threading.Event(), []

    def slow(_):
        times.append(1)
        begun.set()
        assert go_on.wait(60)
        return 7

    monkeypatch.setattr("zmqsched.futures.unpack_value", slow)
    with concurrent.futures.ThreadPoolExecutor() as threads:
        first = threads.submit(future.result)
        assert begun.wait(60)
        with pytest.raises(TimeoutError):
            future.result(timeout=0.01)
        assert future.done()
        second = threads.submit(future.result, 60)
        go_on.set()
        assert (first.result(), second.result(), len(times)) == (7, 7, 1)


def test_many_threads_ask_for_the_same_results(owner, monkeypatch):
    """Each is unpickled once, and nobody waits for one that is there."""
    futures = owner.futures("abcdefgh" * 200)
    times = []

    def unpack(payload):
        times.append(payload)
        time.sleep(0)  # another thread's turn
        return len(times)

    monkeypatch.setattr("zmqsched.futures.unpack_value", unpack)
    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        asked = [threads.submit(lambda: [future.result(timeout=60) for future in futures]) for _ in range(8)]
        for future in futures:
            owner.answer(future, 1)
        first, *others = [one.result(timeout=60) for one in asked]
    assert all(results == first for results in others)
    assert len(times) == len(futures)


def test_a_signal_handler_may_ask_for_the_result_that_its_thread_unpickles(owner, monkeypatch):
    future = owner.future("a")
    owner.answer(future, 7)
    depth = []

    def unpack(_):
        depth.append(1)
        return future.result(60) if len(depth) == 1 else len(depth)

    monkeypatch.setattr("zmqsched.futures.unpack_value", unpack)
    assert future.result(60) == future.result() == 2


# --- callbacks -------------------------------------------------------------------------------------------------------


def test_callbacks_are_called_in_order_and_in_their_own_thread(owner):
    futures = owner.futures("abcdefgh")
    seen = []
    for future in futures:
        for number in range(2):
            future.add_done_callback(lambda future, n=number: seen.append((future, n, threading.current_thread())))
    for future in futures:
        owner.answer(future, 1)
    owner._callbacks.finish()
    assert [(future, number) for future, number, _ in seen] == [(future, number) for future in futures for number in (0, 1)]
    assert {thread.name for _, _, thread in seen} == {"zmqsched callbacks"}


def test_who_cancels_runs_the_callbacks(owner):
    future = owner.future("a")
    seen = []
    future.add_done_callback(lambda future: seen.append(threading.current_thread()))
    assert future.cancel()
    assert seen == [threading.current_thread()]


def test_callbacks_that_block_take_a_thread_each_and_it_ends(owner):
    release = threading.Event()
    futures = owner.futures("abcdefgh")
    seen = []
    for future in futures[:4]:
        future.add_done_callback(lambda _: release.wait(60))
    for future in futures[4:]:
        future.add_done_callback(seen.append)
    for future in futures:
        owner.answer(future, 1)
    eventually(lambda: seen == futures[4:])
    threads = set(owner._callbacks._threads)
    assert 4 <= len(threads) <= 9
    release.set()
    owner._callbacks.finish()
    owner._callbacks.close()
    for thread in threads:
        thread.join(60)
    assert not owner._callbacks._threads


def test_callbacks_when_no_thread_can_be_had(owner, monkeypatch):
    """So it is at the interpreter's exit, from Python 3.12 on."""

    def refuse(self):
        raise RuntimeError("can't create new thread at interpreter shutdown")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    future = owner.future("a")
    seen = []
    future.add_done_callback(seen.append)
    owner.answer(future, 1)
    assert seen == []
    owner._callbacks.finish()
    assert seen == [future]


@pytest.mark.parametrize(
    "waits",
    [Future.result, lambda future: zmqsched.wait([future]), lambda future: next(zmqsched.as_completed([future]))],
    ids=["result", "wait", "as_completed"],
)
def test_an_interrupt_that_wakes_another_thread_is_seen_soon(owner, waits):
    """As one is that comes in the instant before a thread blocks: nothing ends its wait."""
    future = owner.future("a")
    me, begins = threading.get_ident(), threading.Event()

    def interrupt() -> None:
        begins.wait()
        eventually(lambda: sys._current_frames()[me].f_code.co_name in ("sleep", "wait", "_arrived"))
        signal.pthread_kill(threading.get_ident(), signal.SIGINT)

    interrupter = threading.Thread(target=interrupt)
    interrupter.start()
    begins.set()
    with pytest.raises(KeyboardInterrupt):
        waits(future)
    interrupter.join()
    assert future.cancelled()
