"""A TaskGroup ends with all of its tasks, and one failure ends them all."""

# ruff: noqa: PT012 - what a group raises comes at the end of its body

from __future__ import annotations

import os
import signal
import threading
import time
from concurrent.futures import CancelledError

import pytest
from conftest import eventually

from zmqsched import LocalCluster


@pytest.fixture(scope="module")
def cluster(clusters):
    with LocalCluster(3) as cluster:
        yield cluster


def fail(text="broken"):
    raise ValueError(text)


def sleep_long():
    time.sleep(600)


def leaf_errors(group):
    return [repr(error) for error in group.exceptions]


def idle(client):
    return eventually(lambda: sum(node.assigned for node in client.nodes()) == 0)


def test_the_end_waits_for_all(client, gate):
    with client.task_group() as group:
        slow = group.submit(gate.task)
        futures = group.map(pow, [2, 3], [2, 2])
        gate.wait_until_begun(1)
        threading.Timer(0.1, gate.open).start()
    assert slow.done()
    assert [future.result(timeout=0) for future in futures] == [4, 9]


def test_an_empty_group(client):
    with client.task_group() as group:
        assert "open, 0 tasks, 0 unfinished" in repr(group)
    assert "state: closed" in repr(group)


def test_the_first_failure_cancels_the_rest(client):
    with pytest.raises(ExceptionGroup, match="unhandled errors in a TaskGroup") as caught, client.task_group() as group:
        running = group.submit(sleep_long)
        waiting = [group.submit(sleep_long), *group.map(abs, [running] * 3)]
        eventually(running.running)
        group.submit(fail)
    assert leaf_errors(caught.value) == ["ValueError('broken')"]
    assert running.cancelled()
    assert all(future.cancelled() for future in waiting)
    idle(client)


def test_what_had_ended_stays(client):
    with pytest.raises(ExceptionGroup), client.task_group() as group:
        done = group.submit(abs, -1)
        assert done.result(timeout=60) == 1
        group.submit(fail)
    assert done.result(timeout=0) == 1


def test_all_that_failed_is_raised_in_the_order_of_submission(client, gate):
    def fails(text):
        gate.task()
        raise KeyError(text)

    with pytest.raises(ExceptionGroup) as caught, client.task_group() as group:
        futures = [client.submit(abs, 1), *[group.submit(fails, text) for text in "ab"]]
        gate.wait_until_begun(2)
        gate.open()
        eventually(lambda: all(future.done() for future in futures))
    assert leaf_errors(caught.value) in (["KeyError('a')", "KeyError('b')"], ["KeyError('a')"], ["KeyError('b')"])


def test_a_failure_is_heard_of_though_a_callback_blocks(client):
    """The end of the group needs no thread but its own."""
    held = threading.Event()
    blocked = client.submit(abs, 1)
    blocked.add_done_callback(lambda _: held.wait(60))
    try:
        with pytest.raises(ExceptionGroup), client.task_group() as group:
            running = group.submit(sleep_long)
            group.submit(fail)
        assert running.cancelled()
    finally:
        held.set()


def test_a_body_that_goes_on_after_a_failure_is_ended_by_its_next_submit(client):
    with pytest.raises(ExceptionGroup) as caught, client.task_group() as group:
        failed = group.submit(fail)
        eventually(failed.done)
        eventually(lambda: "cancelled" in repr(group))
        group.submit(abs, 1)
        pytest.fail("it was accepted")
    assert leaf_errors(caught.value) == ["ValueError('broken')"]


def test_a_body_that_waits_for_a_task_that_is_cancelled(client):
    with pytest.raises(ExceptionGroup) as caught, client.task_group() as group:
        slow = group.submit(sleep_long)
        group.submit(fail)
        slow.result(timeout=60)
    assert leaf_errors(caught.value) == ["ValueError('broken')"]


def test_an_exception_of_the_body_cancels_all_and_comes_first(client):
    with pytest.raises(ExceptionGroup) as caught, client.task_group() as group:
        slow = group.submit(sleep_long)
        failed = group.submit(fail)
        eventually(failed.done)
        raise KeyError("body")
    assert leaf_errors(caught.value) == ["KeyError('body')", "ValueError('broken')"]
    assert caught.value.__cause__ is None
    assert slow.cancelled()
    idle(client)


def test_except_star(client):
    seen = []
    try:
        with client.task_group() as group:
            group.submit(fail)
    except* ValueError as errors:
        seen += errors.exceptions
    assert str(seen[0]) == "broken"


def test_what_is_no_exception_makes_a_base_exception_group(client):
    def leave():
        raise SystemExit(3)

    with pytest.raises(BaseExceptionGroup) as caught, client.task_group() as group:
        group.submit(leave)
    assert not isinstance(caught.value, ExceptionGroup)
    assert leaf_errors(caught.value) == ["SystemExit(3)"]


@pytest.mark.parametrize("where", ["body", "end"])
def test_ctrl_c_cancels_all_and_comes_through_at_once(client, where):
    started = threading.Event()

    def interrupt():
        started.wait(60)
        os.kill(os.getpid(), signal.SIGINT)

    interrupter = threading.Thread(target=interrupt)
    interrupter.start()
    with pytest.raises(KeyboardInterrupt), client.task_group() as group:
        futures = [group.submit(sleep_long) for _ in range(5)]
        eventually(futures[0].running)
        started.set()
        while where == "body":  # not one long sleep: a signal just before it would be seen at its end
            time.sleep(0.01)
    interrupter.join(60)
    assert all(future.cancelled() for future in futures)
    idle(client)


def test_a_cancelled_task_is_no_failure(client):
    with client.task_group() as group:
        slow = group.submit(sleep_long)
        other = group.submit(abs, -1)
        eventually(slow.running)
        assert slow.cancel(force=True)
    assert other.result(timeout=0) == 1


def test_a_task_whose_input_failed_is_not_told_besides(client):
    with pytest.raises(ExceptionGroup) as caught, client.task_group() as group:
        group.submit(abs, group.submit(fail))
    assert leaf_errors(caught.value) == ["ValueError('broken')"]


def test_groups_in_groups(client):
    with client.task_group() as outer:
        first = outer.submit(abs, -1)
        with client.task_group() as inner:
            second = inner.submit(abs, -2)
        assert second.done()
        third = outer.submit(abs, -3)
    assert [future.result(timeout=0) for future in (first, second, third)] == [1, 2, 3]


def test_a_failure_inside_is_one_of_the_bodys_outside(client):
    with pytest.raises(ExceptionGroup) as caught, client.task_group() as outer:
        slow = outer.submit(sleep_long)
        with client.task_group() as inner:
            inner.submit(fail)
    (within,) = caught.value.exceptions
    assert leaf_errors(within) == ["ValueError('broken')"]
    assert slow.cancelled()


def test_a_failure_outside_cancels_the_group_inside(client):
    with pytest.raises(ExceptionGroup) as caught, client.task_group() as outer:
        with client.task_group() as inner:
            slow = inner.submit(sleep_long)
            eventually(slow.running)
            outer.submit(fail)
        pytest.fail("the body goes on")
    assert leaf_errors(caught.value) == ["ValueError('broken')"]
    assert slow.cancelled()


def test_a_group_is_open_in_its_with_and_nowhere_else(client):
    group = client.task_group()
    with pytest.raises(RuntimeError, match="before its `with` has begun"):
        group.submit(abs, 1)
    with group:
        pass
    with pytest.raises(RuntimeError, match="after its `with` has ended"):
        group.submit(abs, 1)
    with pytest.raises(RuntimeError, match="make another"), group:
        pass


def test_callbacks_and_threads_may_submit_while_the_end_waits(client, gate):
    more = []
    with client.task_group() as group:
        first = group.submit(gate.task)
        first.add_done_callback(lambda _: None)
        gate.wait_until_begun(1)

        def submit_and_open():
            more.append(group.submit(abs, -7))
            more[0].add_done_callback(lambda _: (more.append(group.submit(abs, -8)), gate.open()))

        threading.Timer(0.1, submit_and_open).start()
    assert [future.result(timeout=0) for future in more] == [7, 8]


def test_options(client):
    with client.options(name="named", retries=1).task_group() as group:
        future = group.submit(abs, -1)
    assert future.result(timeout=0) == 1


def test_what_cannot_be_submitted(client):
    with pytest.raises(ExceptionGroup) as caught, client.task_group() as group:
        slow = group.submit(sleep_long)
        group.submit(abs, threading.Lock())
    assert "NotSerializable" in leaf_errors(caught.value)[0]
    assert slow.cancelled()
    with pytest.raises(ExceptionGroup) as caught, client.task_group() as group:
        group.submit("no function")
    assert "needs a callable" in leaf_errors(caught.value)[0]


def test_submit_in_a_cancelled_group_says_so(client):
    with pytest.raises(ExceptionGroup), client.task_group() as group:
        group.submit(fail)
        with pytest.raises(CancelledError, match="one of its tasks has failed"):
            while True:
                group.submit(abs, 1).result(timeout=60)
