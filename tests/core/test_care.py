"""What becomes of workers that have run as many tasks as they may, or take more memory than is good, or than they may."""

from __future__ import annotations

import pytest

from zmqsched.core.events import Measured
from zmqsched.core.settings import Care
from zmqsched.protocol import Workers

from .builders import Workplace

GIB = 2**30
LIMITED = Care(memory_limit=2 * GIB, memory_soft=0.5)


def test_a_worker_is_replaced_after_so_many_tasks():
    place = Workplace(care=Care(max_tasks=2))
    for label in ("a", "b", "c"):
        place.broker_orders(label)
        place.finishes(label)
    assert [worker for worker, _ in place.given] == [1, 1, 2]
    assert place.retired == [1]
    assert place.deaths == []


def test_of_a_batch_it_gets_no_more_than_it_may_run():
    place = Workplace(care=Care(max_tasks=3))
    place.broker_orders("quick")
    place.finishes("quick", took=0.0001)
    place.broker_orders("a", "b", "c", "d")
    assert place.at(1) == ["a", "b"]
    for label in ("a", "b", "c", "d"):
        place.finishes(label, took=0.0001)
    assert sorted(place.results) == ["a", "b", "c", "d", "quick"]
    assert [worker for worker, _ in place.given] == [1, 1, 1, 2, 2]


def test_a_worker_that_takes_much_memory_is_given_no_other_task_and_replaced():
    place = Workplace(care=LIMITED)
    place.broker_orders("quick")
    place.finishes("quick", took=0.0001)
    place.broker_orders("a", "b")
    assert place.at(1) == ["a", "b"]
    place.measures(a=int(1.2 * GIB))
    assert place.at(1) == ["a"], "what lay behind is taken back"
    assert place.all(Workers)[-1].workers[0].worn
    assert "uses 1.20 GiB of 2.00 GiB: it is replaced" in place.log[-1]
    place.finishes("a")
    assert (place.retired, place.running(2)) == ([1], "b")
    assert (place.signals, place.deaths) == ([], [])


def test_one_that_takes_more_than_it_may_is_killed_and_its_task_is_told_why():
    place = Workplace(care=LIMITED)
    place.broker_orders("a")
    place.measures(a=2 * GIB + 2**25)
    place.measures(a=3 * GIB)
    assert place.signals == [("kill", 1)]
    place.dies(1)
    (death,) = place.deaths
    assert death.how == "used 2.03 GiB of the 2.00 GiB that a worker may use"
    place.broker_orders("b")
    assert place.running(2) == "b"


def test_one_that_ends_its_task_before_it_is_killed_charges_nobody():
    place = Workplace(care=LIMITED)
    place.broker_orders("a")
    place.measures(a=3 * GIB)
    place.finishes("a")
    place.broker_orders("b")
    assert (place.retired, place.signals) == ([1], [("kill", 1)])
    assert (place.results, place.deaths) == (["a"], [])
    assert [worker for worker, _ in place.given] == [1, 2]


@pytest.mark.parametrize("size", [int(1.5 * GIB), 3 * GIB])
def test_one_that_has_run_nothing_yet_is_let_be(size):
    place = Workplace(care=LIMITED)
    place.step(Measured({1: size}))
    place.turn()
    assert (place.retired, place.signals) == ([], [])
