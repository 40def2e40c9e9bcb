"""A cluster that nobody uses ends by itself, if it was told to; and how often nodes beat is the broker's word."""

from __future__ import annotations

import pytest

from zmqsched.core.settings import DEAD_AFTER_S, patience
from zmqsched.protocol import Command, Goodbye, Query, Welcome

from .builders import Broker, Workplace


def test_a_cluster_nobody_uses_ends():
    broker = Broker(idle_timeout_s=60.0)
    client, _ = broker.client(), broker.node()
    broker.passes(59.0)
    assert broker.quit is None
    broker.passes(5.0)
    assert broker.quit == "nothing was asked of it for 60 s"
    assert client.last(Goodbye).reason == "the cluster was shut down: nothing was asked of it for 60 s"


def test_unfinished_tasks_keep_it_alive_and_the_time_counts_from_the_last_of_them():
    broker = Broker(idle_timeout_s=60.0)
    client, node = broker.client(), broker.node()
    broker.passes(50.0)
    client.submits("a")
    broker.passes(200.0)
    node.finishes("a")
    broker.passes(58.0)
    assert broker.quit is None
    broker.passes(6.0)
    assert broker.quit


@pytest.mark.parametrize(("message", "ends"), [(Query(1), True), (Command("n1", 1, "pause"), False)])
def test_who_only_looks_keeps_no_cluster_alive(message, ends):
    broker = Broker(idle_timeout_s=60.0)
    client, _ = broker.client(), broker.node()
    for _ in range(4):
        broker.passes(20.0)
        client.says(message)
    assert bool(broker.quit) == ends


def test_without_a_timeout_it_stays():
    broker = Broker()
    broker.client()
    broker.passes(7_200.0)
    assert broker.quit is None


def test_a_broker_that_was_suspended_was_not_idle():
    broker = Broker(idle_timeout_s=60.0)
    broker.client()
    broker.sleeps(600.0)
    broker.passes(50.0)
    assert broker.quit is None


def test_patience():
    suspect_after_s, grace_s = patience(DEAD_AFTER_S)
    assert (suspect_after_s, grace_s) == pytest.approx((3.0, 0.5))
    assert sum(patience(35.0)) == pytest.approx(35.0)


def test_a_node_beats_and_keeps_its_lease_as_its_broker_says():
    broker = Broker(beat_interval_s=5.0, suspect_after_s=15.0)
    node = broker.node()
    welcome = node.last(Welcome)
    assert (welcome.beat_interval_s, welcome.lease_s) == (5.0, 15.0)
    node.freezes()
    broker.passes(14.0)
    assert not broker.facts_of("suspect")
    broker.passes(3.0)
    assert (broker.facts_of("suspect"), broker.facts_of("lost")) == (["n1"], ["n1"])

    place = Workplace(joins=False)
    place.broker_welcomes(beat_interval_s=5.0, lease_s=15.0)
    beats = len(place.beats)
    place.passes(20.0)
    assert 3 <= len(place.beats) - beats <= 5
    place.cut = True
    place.passes(9.0)
    assert place.agent._uplink.has_lease(place.now), "one of three seconds would be over"
    place.passes(7.0)
    assert not place.agent._uplink.has_lease(place.now)
