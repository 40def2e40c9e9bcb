"""A WaitGroup counts what its tasks do, wherever they run and however they end."""

from __future__ import annotations

import copy
import os
import pickle
import re
import signal
import threading
import time

import psutil
import pytest
from conftest import eventually

import zmqsched
from zmqsched import Client, LocalCluster, WaitGroup, errors


@pytest.fixture(scope="module")
def cluster(clusters):
    with LocalCluster(2, n_nodes=2) as cluster:
        yield cluster


@pytest.fixture
def group(client):
    return WaitGroup(client)


def test_go_and_wait(group, tmp_path):
    futures = [group.go((tmp_path / str(number)).touch) for number in range(10)]
    group.wait(timeout=60)
    assert len(list(tmp_path.iterdir())) == 10
    assert all(future.done() for future in futures), "the results came before the news that all is done"


def test_go_gives_the_future(group):
    assert group.go(pow, 2, exp=3).result(timeout=60) == 8
    group.wait(timeout=60)


def test_waiting_for_nothing(group):
    group.wait()
    group.wait(timeout=60)


def test_a_wait_may_time_out_and_be_tried_again(group, gate):
    group.go(gate.task)
    for timeout in (0, 0.05):
        with pytest.raises(TimeoutError, match=f"not done within {timeout} s"):
            group.wait(timeout=timeout)
    gate.open()
    group.wait(timeout=60)


def test_counting_by_hand(group):
    group.add(2)
    group.done()
    with pytest.raises(TimeoutError):
        group.wait(timeout=0.05)
    group.done()
    group.wait(timeout=60)
    group.add(5)
    group.add(-5)
    group.wait(timeout=60)


def test_tasks_on_both_nodes_count(client, group, gate):
    def work(group, held):
        held()
        group.done()

    group.add(2)
    for _ in range(2):
        client.submit(work, group, gate.task)
    gate.wait_until_begun(2)
    assert sorted(node.assigned for node in client.nodes()) == [1, 1]
    with pytest.raises(TimeoutError):
        group.wait(timeout=0.05)
    gate.open()
    group.wait(timeout=60)


def test_tasks_may_add(client, group):
    def spreads(group):
        group.add(3)
        for _ in range(4):
            group.done()

    group.add()
    client.submit(spreads, group)
    group.wait(timeout=60)


def test_a_group_captured_by_a_closure(client, group):
    group.add(3)
    for _ in range(3):
        client.submit(lambda: group.done())
    group.wait(timeout=60)


@pytest.mark.parametrize("by_hand", [True, False])
def test_more_done_than_added(client, group, by_hand):
    if by_hand:
        group.done()
    else:
        client.submit(lambda: group.done()).result(timeout=60)
    with pytest.raises(errors.WaitGroupError, match="below zero"):
        group.wait(timeout=60)
    group.wait(timeout=60)
    group.go(abs, -1)
    group.wait(timeout=60)


def test_a_wait_that_is_on_its_way_is_told(client, group):
    told = []

    def wait():
        try:
            group.wait(timeout=60)
        except errors.WaitGroupError as error:
            told.append(str(error))

    group.add()
    waiting = threading.Thread(target=wait)
    waiting.start()
    eventually(lambda: client._requests)
    group.add(-2)
    waiting.join(60)
    assert "more done() than add()" in told[0]


def test_many_may_wait(group, gate):
    group.go(gate.task)
    waiting = [threading.Thread(target=group.wait, args=(60,)) for _ in range(4)]
    for thread in waiting:
        thread.start()
    gate.open()
    for thread in waiting:
        thread.join(60)
    assert not any(thread.is_alive() for thread in waiting)


def test_use_again_after_a_wait(group):
    for _ in range(5):
        futures = [group.go(abs, -1) for _ in range(10)]
        group.wait(timeout=60)
        assert all(future.done() for future in futures)


def test_a_task_that_fails_counts_down_as_well(group):
    future = group.go(divmod, 1, 0)
    group.wait(timeout=60)
    assert isinstance(future.exception(timeout=0), ZeroDivisionError)


def test_a_task_that_is_cancelled_counts_down_as_well(client, group, gate):
    busy = [client.submit(gate.task) for _ in range(2)]
    gate.wait_until_begun(2)
    future = group.go(abs, -1)
    with pytest.raises(TimeoutError):
        group.wait(timeout=0.05)
    assert future.cancel()
    group.wait(timeout=60)
    gate.open()
    assert [future.result(timeout=60) for future in busy] == [None, None]


def test_what_cannot_be_sent_counts_nothing(group):
    future = group.go(abs, threading.Lock())
    assert isinstance(future.exception(timeout=0), errors.NotSerializable)
    group.wait(timeout=60)


def test_a_task_that_is_run_again_counts_once(group, tmp_path):
    path = str(tmp_path / "killed")

    def dies_once():
        import os
        import signal

        try:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return "second time"
        os.kill(os.getpid(), signal.SIGKILL)

    futures = [group.go(dies_once), group.go(abs, -1)]
    group.wait(timeout=60)
    assert [future.result(timeout=0) for future in futures] == ["second time", 1]
    group.wait(timeout=60)  # it raises if anything was counted twice


def test_retries_count_once(client, tmp_path):
    group = WaitGroup(client.options(retries=3))
    path = str(tmp_path / "attempts")

    def fails_twice():
        with open(path, "a+") as file:
            file.write("x")
            file.seek(0)
            if len(file.read()) < 3:
                raise OSError

    future = group.go(fails_twice)
    group.wait(timeout=60)
    assert future.result(timeout=0) is None
    group.wait(timeout=60)


def test_groups_do_not_mix(client, gate):
    one, other = WaitGroup(client), WaitGroup(client)
    one.go(gate.task)
    other.go(abs, -1)
    other.wait(timeout=60)
    gate.open()
    one.wait(timeout=60)


def test_a_group_of_another_client(cluster):
    with Client(cluster) as client:
        group = WaitGroup(client)
        group.go(abs, -1)
        group.wait(timeout=60)
    for use in (group.wait, group.add, lambda: group.go(abs, -1)):
        with pytest.raises(RuntimeError, match="after shutdown"):
            use()


def test_inside_a_task_it_starts_and_waits_with_the_client_of_the_task(client, group):
    def starts():
        futures = [group.go(abs, number) for number in (-1, -2)]
        group.wait(60)
        return [future.result(0) for future in futures]

    assert client.submit(starts).result(timeout=60) == [1, 2]


def test_a_task_that_dies_when_its_child_has_counted_down_does_it_all_again(client, group, tmp_path):
    def parent(group, path):
        group.add()
        zmqsched.get_client().submit(WaitGroup.done, group).result(timeout=20)
        die_once(path)
        group.done()

    group.add()
    future = client.submit(parent, group, str(tmp_path / "died"))
    group.wait(timeout=30)
    assert (tmp_path / "died").exists()
    future.result(timeout=20)
    group.wait(timeout=10)  # it raises if anything was counted twice


# --- the order of a task's program -------------------------------------------------------------------------------------


def stop_the_node():
    """In a task: what it tells its node arrives late, what it says through its client does not. Returns what is set when
    that is over."""
    zmqsched.get_client()
    node = psutil.Process().parent().parent()
    over = threading.Event()

    def goes_on():
        node.resume()
        over.set()

    node.suspend()
    threading.Timer(0.7, goes_on).start()
    return over


def test_what_a_task_adds_counts_when_it_waits(client, group):
    def waits(group):
        stop_the_node()
        group.add()
        try:
            group.wait(timeout=0.2)
        except TimeoutError:
            group.done()
            group.wait(timeout=10)
            return "waited"

    assert client.submit(waits, group).result(timeout=20) == "waited"


def test_what_a_task_adds_counts_before_what_it_submits(client, group, tmp_path):
    def parent(group, ended):
        over = stop_the_node()
        group.add()
        zmqsched.get_client().submit(WaitGroup.done, group)
        over.wait(10)
        ended.touch()
        group.done()

    group.add()
    client.submit(parent, group, tmp_path / "ended")
    group.wait(timeout=20)
    assert (tmp_path / "ended").exists()


def test_a_group_goes_nowhere_but_to_tasks(client, group):
    with pytest.raises(RuntimeError, match="can be sent to tasks, not to other programs"):
        pickle.loads(pickle.dumps(group))
    with pytest.raises(RuntimeError, match="can be sent to tasks"):
        copy.copy(group)
    with pytest.raises(errors.ResultDecodeError, match="can be sent to tasks"):
        client.submit(lambda: group).result(timeout=60)


@pytest.mark.parametrize(("number", "error"), [(1.5, TypeError), ("1", TypeError), (True, TypeError), (2**40, ValueError)])
def test_what_cannot_be_added(group, number, error):
    with pytest.raises(error):
        group.add(number)
    group.wait(timeout=60)


def test_it_needs_a_client(cluster, client):
    for wrong in (None, cluster, client.submit, "name"):
        with pytest.raises(TypeError, match="a WaitGroup needs a Client"):
            WaitGroup(wrong)
    WaitGroup(client.options(priority=1)).wait(timeout=10)


# --- debts of tasks that die, fail or cannot be sent -----------------------------------------------------------------


def die_once(path):
    import os
    import signal

    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_task_that_dies_after_done_and_is_run_again_counts_once(client, group, gate, tmp_path):
    def work(group, path):
        group.done()
        die_once(path)

    group.add(2)
    late = client.submit(lambda group: (gate.task(), group.done()), group)
    assert client.submit(work, group, str(tmp_path / "died")).result(timeout=60) is None
    with pytest.raises(TimeoutError):
        group.wait(timeout=0.1)
    gate.open()
    late.result(timeout=60)
    group.wait(timeout=60)
    group.wait(timeout=60)  # it raises if anything was counted twice


def test_a_task_that_dies_before_done_is_run_again_and_counts(client, group, tmp_path):
    def work(group, path):
        die_once(path)
        group.done()

    group.add()
    client.submit(work, group, str(tmp_path / "died"))
    group.wait(timeout=60)
    group.wait(timeout=60)


def test_a_retry_counts_what_it_counts_itself(client, group, tmp_path):
    def work(group, path):
        group.done()
        try:
            open(path, "x").close()
        except FileExistsError:
            return
        raise OSError

    group.add()
    client.options(retries=1).submit(work, group, str(tmp_path / "tried")).result(timeout=60)
    group.wait(timeout=60)
    group.wait(timeout=60)


def kill_itself(*_):
    import os
    import signal

    os.kill(os.getpid(), signal.SIGKILL)


def sleep_long(*_):
    time.sleep(600)


def test_a_task_that_dies_for_good_is_named(client, group):
    group.add(2)
    client.options(name="train", requeue=False).submit(kill_itself, group)
    client.submit(lambda found: found["deep"][0].done(), {"deep": [group]})
    with pytest.raises(errors.WaitGroupError, match=r"ended without done\(\): train-\d+: its worker died"):
        group.wait(timeout=60)
    group.wait(timeout=60)
    group.go(abs, -1)
    group.wait(timeout=60)


def test_what_it_had_added_itself_is_owed_too(client, group):
    def adds(group, end):
        group.add(3)
        group.done()
        end()

    group.add(3)
    once = client.options(requeue=False)
    once.submit(adds, group, kill_itself)
    client.submit(adds, group, lambda: 1 / 0)
    running = client.options(timeout=1).submit(adds, group, sleep_long)
    with pytest.raises(errors.WaitGroupError, match=r"3 tasks that held this WaitGroup have ended without done\(\)"):
        group.wait(timeout=60)
    assert running.done()
    group.wait(timeout=60)


def test_what_a_task_has_started_and_left_is_missed_when_its_worker_dies(client, group):
    def parent(group):
        own = zmqsched.get_client()
        own.options(tags=["nowhere"]).submit(abs, group)
        own.nodes()  # the broker has answered, so it has the task
        return os.getpid()

    group.add()
    os.kill(client.submit(parent, group).result(timeout=60), signal.SIGKILL)
    with pytest.raises(errors.WaitGroupError, match=r"abs-\d+: whoever had submitted it is gone"):
        group.wait(timeout=60)


def test_so_it_is_when_its_worker_dies_at_the_very_end(client, group):
    """What it has submitted is at the broker before its own answer is."""

    def parent(group):
        own = zmqsched.get_client()
        own._nudge = lambda: None  # its thread finds out when it looks again, within a second
        group.add()
        own.options(tags=["nowhere"]).submit(abs, group)
        group.done()
        return os.getpid()

    group.add()
    os.kill(client.submit(parent, group).result(timeout=20), signal.SIGKILL)
    with pytest.raises(errors.WaitGroupError, match=r"abs-\d+: whoever had submitted it is gone"):
        group.wait(timeout=20)


def test_one_that_raises_is_named(client, group):
    group.add()
    future = client.submit(lambda group: 1 / 0, group)
    with pytest.raises(errors.WaitGroupError, match=r"lambda-\d+: it raised an exception"):
        group.wait(timeout=60)
    assert isinstance(future.exception(timeout=60), ZeroDivisionError)


def test_one_that_raises_and_has_counted_down_is_all_right(client, group):
    def work(group):
        try:
            return 1 / 0
        finally:
            group.done()

    group.add()
    client.submit(work, group)
    group.wait(timeout=60)


def test_one_that_takes_too_long_is_named(client, group):
    group.add()
    client.options(timeout=0.2).submit(sleep_long, group)
    with pytest.raises(errors.WaitGroupError, match=r"sleep_long-\d+: .*time limit"):
        group.wait(timeout=60)


def test_one_that_is_cancelled_is_named(client, group, gate):
    group.add(2)
    running = client.submit(lambda group: gate.task(), group)
    gate.wait_until_begun(1)
    waiting = client.options(tags=["nowhere"]).submit(abs, group)
    assert waiting.cancel()
    assert running.cancel(force=True)
    with pytest.raises(errors.WaitGroupError, match=r"2 tasks that held this WaitGroup have ended without done\(\)"):
        group.wait(timeout=60)


def test_one_that_cannot_be_sent_is_named(client, group):
    group.add(2)
    client.submit(abs, threading.Lock(), group)
    client.submit(abs, group, threading.Lock())
    group.add(-1)  # the one that the WaitGroup was not reached in
    with pytest.raises(errors.WaitGroupError, match="cannot pickle"):
        group.wait(timeout=60)


def test_one_whose_function_has_captured_it_is_named(client, group):
    def work():
        group.add(0)
        raise OSError

    group.add()
    client.submit(work)
    with pytest.raises(errors.WaitGroupError, match=r"work-\d+: it raised an exception"):
        group.wait(timeout=60)


def test_a_task_that_waits_for_the_group_it_was_sent_is_told_too(client, group):
    def parent(group):
        def child(group):
            raise OSError

        zmqsched.get_client().submit(child, group)
        try:
            group.wait(timeout=60)
        except errors.WaitGroupError as error:
            return str(error)

    group.add()
    assert re.search(r"child-\d+: it raised an exception", client.submit(parent, group).result(timeout=60))


def test_a_node_that_dies_takes_its_counts_along(clusters, gate):
    """A cluster of its own: what a node's death leaves behind concerns nobody else."""
    with LocalCluster(2, n_nodes=2) as cluster, Client(cluster) as client:
        group = WaitGroup(client)
        group.add()

        def work(group):
            group.add(5)
            group.add(-5)
            gate.task()
            group.done()

        future = client.submit(work, group)
        gate.wait_until_begun(1)
        (busy,) = [node for node in client.nodes() if node.assigned]
        os.kill(busy.pid, signal.SIGKILL)
        gate.wait_until_begun(2)
        with pytest.raises(TimeoutError):
            group.wait(timeout=0.1)
        gate.open()
        group.wait(timeout=60)
        future.result(timeout=60)
        group.wait(timeout=60)
