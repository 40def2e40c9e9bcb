"""Futures as arguments of calls: the cluster joins tasks, the client is not asked."""

from __future__ import annotations

import concurrent.futures
import time
import traceback

import numpy as np
import pytest
from conftest import Gate, eventually

from zmqsched import Client, LocalCluster
from zmqsched.errors import DependencyFailed, NotSerializable, PayloadTooLarge, TaskTimeout
from zmqsched.futures import Future


def double(x):
    return 2 * x


def add(*numbers):
    return sum(numbers)


def fail(text="no"):
    raise ValueError(text)


def test_a_future_becomes_what_its_task_returns_wherever_it_lies(client: Client, gate: Gate):
    held = client.submit(gate.task, 21)
    whole = client.submit(lambda *args, **named: (args, named), held, [held, (1, {"deep": held})], by_name={held: held})
    assert not whole.done()
    gate.open()
    assert whole.result(60) == ((21, [21, (1, {"deep": 21})]), {"by_name": {21: 21}})


def test_what_is_done_goes_along_as_its_value_unpickled_or_not(client: Client):
    asked, unasked = client.submit(double, 1), client.submit(double, 2)
    assert asked.result(60) == 2
    eventually(unasked.done)
    assert client.submit(add, asked, unasked).result(60) == 6
    assert unasked.result(0) == 4


def test_done_futures_of_another_client_are_values_and_unfinished_ones_are_refused(
    cluster: LocalCluster, client: Client, gate: Gate
):
    other = Client(cluster)
    done, held = other.submit(double, 4), other.submit(gate.task, 1)
    assert done.result(60) == 8
    assert client.submit(double, done).result(60) == 16
    with pytest.raises(NotSerializable, match="another client"):
        client.submit(double, held).result(60)
    gate.open()
    other.shutdown()


def test_a_future_elsewhere_than_in_arguments_is_refused_and_told_what_to_do(client: Client, gate: Gate):
    held = client.submit(gate.task, 1)
    with pytest.raises(NotSerializable, match=r"closure variable `held`.*among the arguments"):
        client.submit(lambda: held).result(60)
    with pytest.raises(NotSerializable, match=r"argument 1 \(concurrent\.futures\S*Future\)"):
        client.submit(double, concurrent.futures.Future()).result(60)
    gate.open()


def test_a_diamond_and_a_deep_chain(client: Client, gate: Gate):
    top = client.submit(gate.task, 1)
    left, right = client.submit(add, top, 1), client.submit(add, top, 2)
    last = client.submit(add, left, right)
    for _ in range(200):
        last = client.submit(add, last, 1)
    gate.open()
    assert last.result(60) == 205


def test_large_inputs_travel_out_of_band(client: Client, gate: Gate):
    array = client.submit(np.arange, 1_000_000)
    held = client.submit(gate.task, 2)

    def scaled(numbers, by):
        numbers *= by  # it is the task's own, and can be written to
        return numbers

    first, second = client.submit(scaled, array, held), client.submit(scaled, array, held)
    gate.open()
    assert first.result(60).sum() == second.result(60).sum() == 999_999_000_000


def test_very_many_inputs_and_too_many(client: Client, gate: Gate):
    held = client.submit(gate.task, 0)
    many = [client.submit(add, held, number) for number in range(3_000)]
    total = client.submit(add, *many)
    too_many = client.submit(sum, [Future(number.to_bytes(16, "big"), client) for number in range(10_001)])
    with pytest.raises(PayloadTooLarge, match=r"10,001 unfinished futures.*10,000"):
        too_many.result(0)
    gate.open()
    assert total.result(60) == sum(range(3_000))


def test_a_map_over_futures(client: Client, gate: Gate):
    held = [client.submit(gate.task, number) for number in range(2)]
    gate.open()
    assert list(client.map(double, held, chunksize=2)) == [0, 2]
    assert list(client.map(add, held, [10, 20])) == [10, 21]


# --- what fails --------------------------------------------------------------------------------------------------------


def test_a_failed_input_fails_its_dependents_with_the_cause_chained(client: Client, gate: Gate):
    held = client.submit(gate.task, "no")
    failed = client.submit(fail, held)
    direct = client.submit(double, failed)
    second = client.submit(add, direct, 1)
    gate.open()
    with pytest.raises(DependencyFailed, match=r"its input fail-\d+ failed") as caught:
        direct.result(60)
    assert type(caught.value.__cause__) is ValueError
    assert "in fail" in "".join(traceback.format_exception(caught.value)), "the remote traceback"
    with pytest.raises(DependencyFailed, match=r"its input double-\d+ was not run; its input fail-\d+ failed") as caught:
        second.result(60)
    assert type(caught.value.__cause__) is ValueError
    with pytest.raises(ValueError, match="no"):
        failed.result(0)


def test_what_has_failed_already_fails_a_call_at_once(client: Client):
    failed = client.submit(fail)
    eventually(failed.done)
    unasked = client.submit(double, failed)
    assert unasked.done()
    assert isinstance(failed.exception(0), ValueError)
    asked = client.submit(double, failed)
    for future in (asked, unasked):
        assert isinstance(future.exception(0), DependencyFailed)
        assert isinstance(future.exception(0).__cause__, ValueError)


def test_a_cancelled_input(client: Client, gate: Gate):
    held = client.submit(gate.task)
    gate.wait_until_begun()
    never = client.options(resources={"cpu": 2}).submit(double, 1)
    first = client.submit(double, never)
    running = client.submit(double, held)
    assert never.cancel()
    assert held.cancel(force=True)
    for future in (first, running, client.submit(double, never)):
        error = future.exception(60)
        assert isinstance(error, DependencyFailed)
        assert isinstance(error.__cause__, concurrent.futures.CancelledError)


def test_a_cancelled_dependent_leaves_its_inputs_alone(client: Client, gate: Gate):
    held = client.submit(gate.task, 5)
    dependent = client.submit(double, held)
    assert dependent.cancel()
    gate.open()
    assert held.result(60) == 5


def test_other_ends_of_inputs_are_causes_too(client: Client):
    late = client.options(timeout=0.05).submit(time.sleep, 30)
    error = client.submit(double, late).exception(60)
    assert isinstance(error, DependencyFailed)
    assert isinstance(error.__cause__, TaskTimeout)
    assert "ended with TaskTimeout" in str(error)


def test_dependents_wait_while_an_input_is_retried(client: Client, tmp_path):
    def flaky():
        try:
            (tmp_path / "tried").touch(exist_ok=False)
        except FileExistsError:
            return 4
        raise OSError

    assert client.submit(double, client.options(retries=1).submit(flaky)).result(60) == 8


def test_a_waitgroup_counts_dependents(client: Client, gate: Gate):
    from zmqsched import WaitGroup

    group = WaitGroup(client)
    held = group.go(gate.task, 3)
    futures = [group.go(double, held), group.go(fail, held)]
    futures.append(group.go(double, futures[1]))
    with pytest.raises(TimeoutError):
        group.wait(0.05)
    gate.open()
    group.wait(60)
    assert all(future.done() for future in futures)


# --- what outlives a broker ----------------------------------------------------------------------------------------------


def test_dependents_of_a_job_wait_at_the_broker_for_its_tasks(cluster: LocalCluster, client: Client, gate: Gate):
    leaver = Client(cluster)
    job = leaver.options(job="chain")
    job.submit(double, job.submit(gate.task, 7))
    gate.wait_until_begun()
    leaver._close()  # as at exit
    gate.open()
    assert sorted(future.result(60) for future in client.job("chain")) == [7, 14]
