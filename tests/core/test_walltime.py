"""Nodes that are to end at some time: what they are given, when they drain, what becomes of what still runs."""

from __future__ import annotations

import pytest

from zmqsched.core import placement
from zmqsched.core.agent import DRAIN_BEFORE_S, TERM_GRACE_S
from zmqsched.protocol import Draining, Goodbye, Progress, Stop

from .builders import Broker, Client, Workplace


def verdicts(client: Client) -> set[str]:
    return set(client.answers.values())


# --- the broker ------------------------------------------------------------------------------------------------------------


def test_a_task_that_may_take_longer_than_a_node_lasts_goes_to_one_that_lasts():
    broker = Broker()
    client, short = broker.client(), broker.node("short", leaves_in_s=600.0)
    client.submits("long", timeout=900.0)
    client.submits("brief", timeout=60.0)
    client.submits("unknown")
    assert short.holds == ["brief"]
    short.finishes("brief")
    assert short.holds == ["unknown"]
    assert client.asks_why("long") == {"may take 1024 s, and the nodes leave before: n1 in 600 s": 1}
    for_ever = broker.node("for ever")
    assert for_ever.holds == ["long"]
    late = broker.node("long enough", leaves_in_s=1100.0)
    client.submits("longer", timeout=900.0)
    assert late.holds == ["longer"]


def test_it_is_not_hopeless():
    broker = Broker(unservable_after_s=5.0)
    client = broker.client()
    broker.node(leaves_in_s=100.0)
    client.submits("long", timeout=900.0)
    broker.passes(60.0)
    assert client.answers == {}


def test_time_passes():
    broker = Broker()
    client, node = broker.client(), broker.node(leaves_in_s=100.0)
    client.submits("a", timeout=60.0)
    node.finishes("a")
    broker.passes(50.0)
    client.submits("b", timeout=60.0)
    assert node.holds == []
    client.submits("c", timeout=30.0)
    assert node.holds == ["c"]


def test_how_long_tasks_take_is_learnt_from_those_that_ran():
    broker = Broker()
    client, node = broker.client(), broker.node(leaves_in_s=100.0)
    client.submits("a", "b", "c", function="slow")
    node.finishes("a", took=200.0)
    assert node.holds == [], "b and c were thought to be short"
    for_ever = broker.node("for ever", slots=2)
    assert for_ever.holds == ["b", "c"], "first come, first served"
    client.submits("d", function="slow")
    client.submits("e", function="fast")
    assert node.holds == ["e"]
    for_ever.finishes("b", "c", took=200.0)
    assert for_ever.holds == ["d"]


def test_one_long_run_is_forgotten_in_time():
    broker = Broker()
    client, node = broker.client(), broker.node(leaves_in_s=1_000.0)
    client.submits("a", function="f")
    node.finishes("a", took=2_000.0)
    for_ever = broker.node("for ever")
    for number in range(100):
        client.submits(f"b{number}", function="f")
        if node.holds:
            break
        for_ever.finishes(f"b{number}", took=0.1)
    assert 10 < number < 99


def test_a_queue_that_turns_out_to_be_long_is_moved_a_part_at_a_time(monkeypatch):
    monkeypatch.setattr(placement, "MAX_MOVES", 10)
    broker = Broker()
    client, node = broker.client(), broker.node(leaves_in_s=100.0)
    labels = [f"t{number:02}" for number in range(50)]
    client.submits(*labels, function="slow")
    node.finishes("t00", took=200.0)
    assert node.holds == []
    for_ever = broker.node("for ever", slots=49)
    broker.passes(0.1)
    assert for_ever.holds == labels[1:]


def test_a_short_task_is_not_kept_waiting_by_long_ones():
    broker = Broker()
    client, node = broker.client(), broker.node(leaves_in_s=100.0)
    client.submits(*[f"long{number}" for number in range(20)], timeout=500.0, priority=5)
    client.submits("short", timeout=20.0)
    assert node.holds == ["short"]


def test_a_node_that_drains_takes_no_tasks_of_tasks_that_would_not_end_there_either():
    broker = Broker()
    client, node = broker.client(), broker.node(leaves_in_s=100.0)
    client.submits("parent")
    node.credit += 2
    node.says(Progress(node.credit, waiting=[node._attempt("parent")]), Draining())
    client.submits("long", depth=1, timeout=500.0)
    client.submits("short", depth=1, timeout=20.0)
    assert node.holds == ["parent", "short"]


def test_nodes_that_end_too_soon_are_not_looked_at_again():
    broker = Broker()
    client = broker.client()
    short = [broker.node(f"short{number}", leaves_in_s=100.0) for number in range(20)]
    client.submits("long", timeout=500.0)
    (lane,) = [lane for lane in broker.scheduler.book.placement.lanes() if lane.tasks]
    assert not lane.pool._heaps[lane.step]
    client.submits(*[f"short{number}" for number in range(20)], timeout=20.0)
    assert all(node.holds for node in short)


def test_what_is_handed_back_at_the_end_is_no_death():
    broker = Broker(max_deaths=1)
    client, node = broker.client(), broker.node(leaves_in_s=10.0)
    client.submits("a")
    node.says(Goodbye("its time here is over; 1 task is run elsewhere"))
    second = broker.node("second")
    assert second.attempts == [("a", 2)]
    second.finishes("a")
    assert client.answers == {"a": "ok"}
    assert "worker deaths" not in broker.counts


# --- the node --------------------------------------------------------------------------------------------------------------


def test_a_node_says_how_long_it_has_at_each_hello():
    place = Workplace(leaves_in_s=100.0)
    assert place.hellos[-1].leaves_in_s == pytest.approx(100.0)
    place.passes(40.0)
    place.broker_forgets()
    assert place.hellos[-1].leaves_in_s == pytest.approx(60.0, abs=0.1)
    assert Workplace().hellos[-1].leaves_in_s == 0.0


def test_it_drains_before_its_end_and_hands_back_what_runs_then():
    place = Workplace(leaves_in_s=100.0)
    place.broker_orders("a")
    place.passes(100.0 - DRAIN_BEFORE_S - 0.1)
    assert not place.all(Draining)
    place.passes(0.2)
    assert place.all(Draining)
    assert place.credits[-1] == 0
    place.passes(DRAIN_BEFORE_S - 0.2)
    assert place.quit is None
    place.passes(0.2)
    assert place.quit == "its time here is over; 1 task is run elsewhere"
    assert place.all(Goodbye)
    assert (place.deaths, place.stopped) == ([], {})


def test_what_it_can_finish_it_finishes():
    place = Workplace(leaves_in_s=100.0)
    place.broker_orders("a")
    place.passes(98.0)
    place.finishes("a")
    place.passes(0.1)
    assert (place.results, place.quit) == (["a"], "its time here is over")


@pytest.mark.parametrize(("leaves_in_s", "stays_s"), [(3600.0, TERM_GRACE_S), (10.0, 10.0)])
def test_when_the_batch_system_ends_it_early_what_runs_is_handed_back_before_it_is_killed(leaves_in_s, stays_s):
    place = Workplace(leaves_in_s=leaves_in_s)
    place.broker_orders("a")
    place.leaves(drain=True)
    place.passes(stays_s - 0.5)
    assert place.quit is None
    place.passes(1.0)
    assert place.quit == "SIGTERM; 1 task is run elsewhere"


def test_one_that_was_told_to_drain_goes_when_its_time_is_over_all_the_same():
    place = Workplace(leaves_in_s=100.0)
    place.broker_orders("a")
    place.broker_says(Stop(drain=True))
    place.passes(99.5)
    assert place.quit is None
    place.passes(1.0)
    assert place.quit == "told by the broker; 1 task is run elsewhere"


def test_a_node_without_an_end_drains_as_long_as_it_takes():
    place = Workplace()
    place.broker_orders("a")
    place.leaves(drain=True)
    place.passes(1_000.0)
    assert place.quit is None
