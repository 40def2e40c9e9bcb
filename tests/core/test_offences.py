"""What is said of what is dropped: little, and never what peers wrote."""

from __future__ import annotations

from collections import Counter

from zmqsched.core.events import Alarmed, BeatArrived, Malformed, Send, Unreadable
from zmqsched.core.offences import FLOOD, STRIKES, STRIKES_WITHIN_S, Offences, Strikes
from zmqsched.core.scheduler import ALARM_EVERY_S
from zmqsched.protocol import Beat, Cancel, Envelope, No, Query, Results

from .builders import Broker, Workplace, task_id

CANNOT_BE_READ = No("malformed", "cannot be read")


def test_a_line_tells_of_all_since_the_last():
    counts: Counter[str] = Counter()
    offences = Offences(counts)
    assert offences.line(0.0) == ""
    for number in range(1000):
        offences.note("Cancel from a node", f"node {number}")
    offences.note("malformed message", "client at 192.0.2.7")
    assert offences.line(1.0) == "dropped 1000 Cancel from a node, 1 malformed message; the last from client at 192.0.2.7"
    assert offences.line(2.0) == ""
    assert counts == {"dropped: Cancel from a node": 1000, "dropped: malformed message": 1}


def test_the_third_strike_within_ten_seconds_is_one_too_many():
    strikes = Strikes()
    assert [strikes.add(now) for now in (0.0, 5.0, 10.1, 14.9, 20.2)] == [False, False, False, True, False]
    assert not strikes.old(20.2 + STRIKES_WITHIN_S - 0.1)
    assert strikes.old(20.2 + STRIKES_WITHIN_S)


def test_who_struck_long_ago_is_forgotten():
    offences = Offences(Counter())
    for number in range(100):
        assert not offences.strike(b"%d" % number, 0.0)
    offences.line(STRIKES_WITHIN_S)
    assert offences._strikes == {}


def test_a_flood_is_one_line_a_second():
    broker = Broker()
    client, node = broker.client(), broker.node()
    broker.log.clear()
    for _ in range(100):
        node.says(Query(1))
        client.says(Results([]))
    broker.passes(3.0)
    assert [line for line in broker.log if "dropped" in line] == [
        "dropped 100 Query from a node, 100 Results from a client; the last from client client-host pid 100"
    ]


def test_a_peer_that_cannot_be_understood_is_told_so_and_its_tasks_run_elsewhere():
    broker = Broker()
    client = broker.client()
    mute = broker.node("mute")
    client.submits("a")
    assert mute.holds == ["a"]
    other = broker.node("other")
    garbage = Malformed(mute.address, "malformed message", CANNOT_BE_READ, "somebody")
    for _ in range(STRIKES - 1):
        assert broker.step(garbage) == []
    broker.passes(STRIKES_WITHIN_S)
    for _ in range(STRIKES - 1):
        assert broker.step(garbage) == [], "the earlier ones are forgiven"
    sent = broker.step(garbage)
    assert Send(mute.address, Envelope(0, 0, 0, CANNOT_BE_READ)) in sent
    broker.turn()
    assert other.holds == ["a"]
    assert broker.counts["dropped: malformed message"] == 5
    other.finishes("a")
    assert client.answers == {"a": "ok"}
    client.says(Cancel([task_id("a")]))
    assert broker.client("next").link is not None


def test_who_was_not_authenticated_is_counted_and_told_nothing():
    broker = Broker()
    for _ in range(10):
        assert broker.step(Malformed(b"stranger", "no authenticated sender")) == []
    assert broker.counts["dropped: no authenticated sender"] == 10


def test_a_node_begins_anew_when_the_broker_cannot_be_understood():
    place = Workplace()
    place.broker_orders("a", "b")
    for _ in range(STRIKES):
        place.step(Unreadable("nonsense"))
    place.turn()
    assert [hello.life for hello in place.hellos] == [1, 2]
    assert place.agent.held == 1, "what runs goes on"
    place.broker_welcomes()
    place.finishes("a")
    assert place.results == ["a"]
    assert place.agent.counts == {"dropped: malformed message": STRIKES}


# --- floods -----------------------------------------------------------------------------------------------------------


def test_who_floods_the_broker_without_a_session_is_answered_so_much_and_no_more():
    broker = Broker()
    client, node = broker.client(), broker.node()
    answers = sum([len(broker.hears(Envelope(12345, 1, 0, Cancel([])))) for _ in range(10 * FLOOD)])
    assert answers == FLOOD
    assert broker.counts["dropped: too many messages without a session"] == 9 * FLOOD
    client.submits("a")
    node.finishes("a")
    assert client.answers == {"a": "ok"}
    broker.passes(2.0)
    assert broker.hears(Envelope(12345, 1, 0, Cancel([]))), "a second later it is listened to again"


def test_nor_is_who_floods_it_with_what_cannot_be_read():
    broker = Broker()
    garbage = Malformed(b"mad", "malformed message", CANNOT_BE_READ)
    answers = sum([isinstance(action, Send) for _ in range(10 * FLOOD) for action in broker.step(garbage)])
    assert answers <= FLOOD
    assert broker.counts["dropped: malformed message"] == 10 * FLOOD


def test_beats_are_taken_in_as_often_as_anybody_needs():
    broker = Broker()
    node = broker.node()
    for number in range(1, 10 * FLOOD):
        broker.step(BeatArrived(Beat(node.hello.incarnation, number, [])))
    assert broker.counts["dropped: too many beats"] == 9 * FLOOD - 1
    broker.passes(10)
    assert broker.counts.get("requeued: node lost") is None


def test_an_alarm_is_counted_while_it_lasts_and_logged_now_and_then():
    broker = Broker()
    for _ in range(2 * int(ALARM_EVERY_S)):
        broker.step(Alarmed("no descriptors left", "raise the limit"))
        broker.passes(1.0)
    assert broker.counts["alarm: no descriptors left"] == 2 * int(ALARM_EVERY_S)
    assert broker.log.count("no descriptors left: raise the limit") in (2, 3)


def test_few_descriptors_for_so_many_workers_are_told_of():
    broker = Broker(max_connections=40)
    broker.node("one", slots=10)
    assert "alarm: few descriptors for so many workers" not in broker.counts
    broker.node("two", slots=1)
    assert broker.counts["alarm: few descriptors for so many workers"] == 1
    assert any("ulimit -n" in line for line in broker.log)
