"""zmqsched.get_task(): what a task knows of itself, and says of how far it is."""

import os
import pickle

import pytest
from conftest import PATIENCE_S, eventually

import zmqsched
from zmqsched import errors


def describe():
    task = zmqsched.get_task()
    return task.id, task.attempt, task.name, task.cancelled, repr(task)


def test_a_task_knows_who_it_is(client):
    future = client.submit(describe)
    task_id, attempt, name, cancelled, text = future.result(timeout=PATIENCE_S)
    assert task_id == future._task.hex()
    assert (attempt, name, cancelled) == (1, "describe", False)
    assert text == f"<zmqsched task describe {task_id}, attempt 1>"


def test_a_name_that_was_given_is_its_name(client):
    assert client.options(name="training").submit(describe).result(timeout=PATIENCE_S)[2] == "training"


def test_attempts_are_counted(client):
    def fails():
        task = zmqsched.get_task()
        if task.attempt < 3:
            raise ValueError
        return task.attempt

    assert client.options(retries=5).submit(fails).result(timeout=PATIENCE_S) == 3


def test_threads_of_a_task_know_it_too(client):
    def starts():
        from concurrent.futures import ThreadPoolExecutor

        with ThreadPoolExecutor(1) as pool:
            return pool.submit(describe).result()[0]

    future = client.submit(starts)
    assert future.result(timeout=PATIENCE_S) == future._task.hex()


def test_outside_of_a_task_there_is_none():
    with pytest.raises(RuntimeError, match="code that runs in a task"):
        zmqsched.get_task()


def test_it_stays_in_its_process(client):
    def sends():
        return zmqsched.get_task()

    failure = client.submit(sends).exception(timeout=PATIENCE_S)
    assert "send its id" in str(failure) or "Task" in str(failure)


# --- progress ------------------------------------------------------------------------------------------------------------


def test_how_far_it_is(client, gate):
    wait = gate.task

    def works():
        task = zmqsched.get_task()
        task.progress(0.25, "epoch 1")
        task.progress(0.5, "epoch 2")  # too soon after the first to be told of, but the last for a while
        wait()
        task.progress(1)

    future = client.submit(works)
    eventually(lambda: future.progress == (0.5, "epoch 2"))
    gate.open()
    future.result(timeout=PATIENCE_S)
    assert future.progress == (1.0, "")


def test_a_million_times_is_not_too_often(client):
    def works():
        task = zmqsched.get_task()
        for number in range(100_000):
            task.progress(number / 100_000, "x" * 300)

    future = client.submit(works)
    future.result(timeout=PATIENCE_S)
    fraction, text = eventually(lambda: future.progress)
    assert fraction > 0.9
    assert text == "x" * 200


def test_a_task_is_heard_however_soon_it_follows_another(client):
    def works(fraction):
        zmqsched.get_task().progress(fraction)

    for number in range(1, 20):  # on either worker, within the time in which one is told of once
        future = client.submit(works, number / 20)
        future.result(timeout=PATIENCE_S)
        assert future.progress == (number / 20, "")


def test_numbers_that_were_added_up_may_be_a_little_off(client):
    def works():
        import numpy as np

        zmqsched.get_task().progress(np.float32(0.5))
        zmqsched.get_task().progress(sum([0.1] * 10) + 1e-12)

    future = client.submit(works)
    future.result(timeout=PATIENCE_S)
    assert future.progress == (1.0, "")


@pytest.mark.parametrize("fraction", [-0.1, 1.1, float("nan"), "0.5", None, True, 50])
def test_what_is_no_fraction_is_an_error(client, fraction):
    def works():
        zmqsched.get_task().progress(fraction)

    with pytest.raises(ValueError, match="a number from 0 to 1"):
        client.submit(works).result(timeout=PATIENCE_S)


def test_what_is_no_text_is_an_error(client):
    def works():
        zmqsched.get_task().progress(0.5, 7)

    with pytest.raises(TypeError, match="a str, not int"):
        client.submit(works).result(timeout=PATIENCE_S)


# --- its end --------------------------------------------------------------------------------------------------------------


def test_a_thread_sees_that_the_end_was_asked_for(client, tmp_path):
    def works(path):
        import threading
        import time

        task = zmqsched.get_task()

        def watches():
            while not task.cancelled:
                time.sleep(0.001)
            open(path, "w").close()

        thread = threading.Thread(target=watches)
        thread.start()
        try:
            while True:  # one long sleep would not end by a signal just before it
                time.sleep(0.01)
        except KeyboardInterrupt:
            thread.join()
            return "ended by itself", task.cancelled

    future = client.options(timeout=1).submit(works, str(tmp_path / "seen"))
    assert future.result(timeout=PATIENCE_S) == ("ended by itself", True)
    assert os.path.exists(tmp_path / "seen")
    assert client.submit(describe).result(timeout=PATIENCE_S)[3] is False


def test_what_outlives_its_task_is_cancelled_and_says_nothing(client, gate):
    def leaves():
        import threading

        task = zmqsched.get_task()
        zmqsched.kept = task
        return threading.get_ident()

    def looks():
        task = zmqsched.kept
        task.progress(0.5, "of the other")
        return task.cancelled, task.name, task.id

    for _ in range(4):  # until both run in one worker
        left = client.submit(leaves)
        left.result(timeout=PATIENCE_S)
        future = client.submit(looks)
        if future.exception(timeout=PATIENCE_S) is None:
            assert future.result()[:2] == (True, "")
            assert future.progress is None


def test_a_task_is_not_for_pickles():
    from zmqsched.context import Task

    with pytest.raises(TypeError, match="send its id"):
        pickle.dumps(Task.__new__(Task))
    assert issubclass(errors.NotSerializable, errors.TaskError)
