"""How much the broker holds, and how clients are made to hold back."""

from __future__ import annotations

import gc

import pytest

from zmqsched.core.events import Ask, Asked, Finished
from zmqsched.core.load import RECORD_BYTES
from zmqsched.core.requests import WINDOW_BYTES
from zmqsched.core.tasks import Task
from zmqsched.protocol import Function, Functions, GroupForget, GroupWait, Hold, Payload, Query, Shape, Submit

from .builders import Broker, Client, Desk, blob, digest, options, task_id, token

CAP = 5 * (RECORD_BYTES + 100)  # five tasks, and the code of their function


def tasks(count: int, first: int = 0) -> list[str]:
    return [f"t{number}" for number in range(first, first + count)]


def told(client: Client) -> list[bool]:
    return [message.on for message in client.all(Hold)]


# --- the broker ------------------------------------------------------------------------------------------------------


def test_clients_are_held_over_the_cap_and_let_go_well_below_it():
    broker = Broker(max_queued_bytes=CAP)
    client, other, node = broker.client(), broker.client("other"), broker.node(slots=10, credit=0)
    client.submits(*tasks(5))
    assert (told(client), told(other)) == ([], [])
    client.submits("one more")
    assert (told(client), told(other)) == ([True], [True])
    assert not node.all(Hold)
    node.asks_for(10)
    node.finishes("t0")
    broker.passes(0.1)
    assert told(client) == [True]  # what is below the cap, but not well below it
    node.finishes("t1", "t2")
    broker.passes(0.1)
    assert (told(client), told(other)) == ([True, False], [True, False])
    assert broker.counts["clients held back"] == 1


def test_a_client_in_a_task_is_not_held_for_others_wait_for_what_it_asks():
    desk = Desk()
    desk.brain._nested = True
    desk.broker_says(Hold(True))
    desk.asks("a")
    assert desk.submitted == ["a"]


def test_what_was_sent_before_the_hold_was_heard_is_taken():
    broker = Broker(max_queued_bytes=CAP)
    client = broker.client()
    node = broker.node(slots=50)
    client.submits(*tasks(50))
    node.finishes(*tasks(50))
    assert set(client.answers.values()) == {"ok"}


def test_a_task_larger_than_the_cap_is_run():
    broker = Broker(max_queued_bytes=100)
    client = broker.client()
    client.submits("large")
    broker.node().finishes("large")
    broker.passes(0.1)
    assert client.answers == {"large": "ok"}
    assert told(client) == [True, False]


def test_who_comes_while_others_are_held_is_held():
    broker = Broker(max_queued_bytes=CAP)
    broker.client().submits(*tasks(10))
    assert told(broker.client("late")) == [True]
    early = broker.peers[0]
    early.says_hello(life=2)
    assert told(early) == [True, True]


def test_waiting_tasks_count_from_when_they_are_accepted():
    broker = Broker(max_queued_bytes=CAP)
    client = broker.client()
    client.submits(*tasks(6), with_code=False)
    assert told(client) == [True]
    client.cancels(*tasks(6))
    broker.passes(0.1)
    assert told(client) == [True, False]


def test_a_large_function_counts_and_is_kept_only_while_it_is_needed():
    broker = Broker(max_queued_bytes=CAP)
    client = broker.client()
    client.submits("a", with_code=False)
    client.says(Functions([Function(digest("f"), b"x" * CAP)]))
    assert told(client) == [True]
    broker.node().finishes("a")
    assert told(client) == [True, False]


def test_answers_count_until_they_are_acknowledged():
    broker = Broker(max_queued_bytes=CAP)
    client, other = broker.client(), broker.client("other")
    node = broker.node(slots=4)
    client.submits("a")
    client.freezes()
    node.finishes("a", value=b"x" * CAP)
    assert told(other) == [True]
    client.thaws()
    assert told(other) == [True, False]


def test_answers_that_nobody_reads_stop_the_placing_until_their_client_is_gone():
    broker = Broker(max_queued_bytes=CAP, client_lease_s=60.0)
    client, other = broker.client(), broker.client("other")
    node = broker.node(slots=1)
    client.submits("a")
    client.freezes()
    node.finishes("a", value=b"x" * CAP)
    other.submits("b")
    broker.passes(30.0)
    assert node.holds == []
    broker.passes(31.0)
    assert node.holds == ["b"]
    assert told(other) == [True, False]


def test_a_waiting_broker_does_not_spin():
    broker = Broker(max_queued_bytes=CAP)
    client = broker.client()
    node = broker.node(slots=1)
    client.submits("a", "b")
    client.freezes()
    node.finishes("a", value=b"x" * CAP)
    assert broker.scheduler.next_deadline() > broker.now


def test_when_all_is_done_the_broker_holds_nothing():
    gc.collect()
    before = sum(isinstance(each, Task) for each in gc.get_objects())  # what tracebacks of other tests hold
    broker = Broker()
    client = broker.client()
    node = broker.node(slots=100)
    for n in range(20):
        client.submits(*(labels := tasks(50, 50 * n)), function=f"f{n % 3}", group="g")
        node.finishes(*labels[:40])
        client.cancels(*labels[40:])
        node.hands_back(*labels[40:])
    assert len(client.answers) == 1000
    broker.passes(1.0)
    assert broker.scheduler.book.open_counts() == {}
    gc.collect()
    assert sum(isinstance(each, Task) for each in gc.get_objects()) == before


# --- the client ------------------------------------------------------------------------------------------------------


def ask(desk: Desk, label: str, call: Payload) -> None:
    desk.step(Ask([Asked(task_id(label), Shape(digest("f"), options()), call)], {digest("f"): blob("f")}))
    desk.turn()


def test_a_held_client_keeps_new_tasks_back_until_it_is_let_go():
    desk = Desk()
    desk.asks("before")
    desk.broker_says(Hold(True))
    desk.asks("a", "b")
    desk.asks("c")
    desk.passes(5.0)
    assert desk.submitted == ["before"]
    assert desk.brain.waiting > 3 * RECORD_BYTES
    assert desk.brain.next_deadline() > desk.now
    desk.broker_says(Hold(False))
    assert desk.submitted == ["before", "a", "b", "c"]
    assert desk.brain.waiting == 0


def test_a_new_session_begins_without_a_hold():
    desk = Desk()
    desk.broker_says(Hold(True))
    desk.asks("a")
    desk.broker_forgets()
    desk.broker_welcomes()
    assert desk.submitted == ["a"]


def test_what_is_kept_back_can_be_withdrawn():
    desk = Desk()
    desk.broker_says(Hold(True))
    desk.asks("a", "b")
    desk.withdraws("a")
    assert desk.answered == ["a"]
    assert desk.acted(Finished)[0].finals[0].verdict == "cancelled"
    desk.broker_says(Hold(False))
    assert desk.submitted == ["b"]


def test_waits_do_not_overtake_the_tasks_they_wait_for():
    desk = Desk()
    desk.broker_says(Hold(True))
    desk.asks("a", group="g")
    desk.tells(GroupWait(1, token("g")))
    desk.tells(Query(2))
    assert desk.all(Query)
    assert not desk.all(GroupWait)
    desk.broker_says(Hold(False))
    assert [type(message) for message in desk.told if isinstance(message, Submit | GroupWait)] == [Submit, GroupWait]


def test_what_waited_behind_tasks_is_said_once_in_the_next_session():
    desk = Desk()
    desk.broker_says(Hold(True))
    desk.asks("a", group="g")
    desk.tells(GroupWait(1, token("g")))
    desk.broker_forgets()
    desk.broker_welcomes()
    assert desk.all(GroupWait) == [GroupWait(1, token("g"))]
    assert desk.submitted == ["a"]


def test_a_wait_that_was_given_up_is_not_asked_for_again():
    desk = Desk()
    desk.tells(GroupWait(1, token("g")))
    desk.tells(GroupForget(1))
    desk.broker_forgets()
    desk.told.clear()
    desk.broker_welcomes()
    assert not desk.all(GroupWait)


def test_what_waits_behind_tasks_goes_when_they_are_withdrawn():
    desk = Desk()
    desk.broker_says(Hold(True))
    desk.asks("a", group="g")
    desk.tells(GroupWait(1, token("g")))
    desk.withdraws("a")
    assert desk.all(GroupWait)


@pytest.mark.parametrize("again", [False, True])
def test_no_more_is_on_the_way_than_the_window(again):
    desk = Desk()
    if again:
        desk.asks("x")
        desk.broker_forgets()
        desk.broker_welcomes()
    desk.cut = True
    large = [b"x" * (WINDOW_BYTES // 4)]
    for label in "abcdef":
        ask(desk, label, large)
    assert desk.brain.waiting == 2 * (WINDOW_BYTES // 4 + RECORD_BYTES)
    desk.cut = False
    desk.passes(3.0)
    assert desk.submitted[-6:] == list("abcdef")
    assert desk.brain.waiting == 0
