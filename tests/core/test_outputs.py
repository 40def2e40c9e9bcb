"""What tasks print and how far they have come, on its way from the node to whoever waits for them."""

from __future__ import annotations

from zmqsched.core.events import Heard
from zmqsched.core.outputs import MAX_ON_THE_WAY
from zmqsched.protocol import MAX_WORDS, Advance, Finals, Output, Results, Shape, Words

from .builders import Broker, Client, Desk, Workplace, digest, task_id

KB64 = b"x" * (MAX_WORDS - 1) + b"\n"


def order_of(peer: Client, *kinds: type) -> list[str]:
    return [type(message).__name__ for message in peer.heard if isinstance(message, kinds)]


# --- the broker ----------------------------------------------------------------------------------------------------------


def test_what_a_task_prints_is_told_to_its_client_and_nobody_else():
    broker = Broker()
    alice, bob, node = broker.client("alice"), broker.client("bob"), broker.node("n", slots=2)
    alice.submits("a")
    bob.submits("b")
    node.prints("a", b"hello\n")
    node.prints("b", b"hi\n")
    assert (alice.printed, bob.printed) == ({"a": b"hello\n"}, {"b": b"hi\n"})
    assert [message.node for message in alice.all(Output)] == [node.id], "by the broker's word, not by its own"


def test_it_comes_before_the_answer():
    broker = Broker()
    client, node = broker.client(), broker.node("n")
    client.submits("a")
    node.prints("a", b"hello\n")
    node.finishes("a")
    assert order_of(client, Output, Finals) == ["Output", "Finals"]


def test_what_is_said_of_an_answered_task_is_nobodys():
    broker = Broker()
    client, node = broker.client(), broker.node("n", slots=2)
    client.submits("a", "b")
    node.finishes("a")
    node.prints("b", b"late\n", task="a")
    node.prints("b", b"hello\n")
    assert client.printed == {"b": b"hello\n"}
    assert broker.counts["printed by what nobody waits for"] == 1


def test_all_who_follow_a_job_hear_its_tasks():
    broker = Broker()
    owner, node = broker.client("owner"), broker.node("n")
    owner.submits("a", job="nightly")
    follower = broker.client("follower")
    follower.follows("nightly")
    node.prints("a", b"hello\n")
    assert owner.printed == follower.printed == {"a": b"hello\n"}


def test_a_job_that_nobody_follows_prints_for_nobody():
    broker = Broker()
    owner, node = broker.client("owner"), broker.node("n")
    owner.submits("a", job="nightly")
    owner.leaves()
    node.prints("a", b"hello\n")
    node.finishes("a")
    assert broker.client("another").follows("nightly") == ["a"]


def test_how_far_it_has_come_is_told():
    broker = Broker()
    client, node = broker.client(), broker.node("n")
    client.submits("a")
    node.advances("a", 0.4, "epoch 3")
    assert client.last(Output).advances == [Advance(task_id("a"), 1, 0.4, "epoch 3")]


def test_of_too_much_for_a_slow_client_the_text_is_left_out():
    broker = Broker()
    client, node = broker.client(), broker.node("n")
    client.submits("a")
    client.freezes()
    number = 3 * MAX_ON_THE_WAY // len(KB64)
    for index in range(number):
        node.prints("a", KB64, at=index * len(KB64), lines=index)
    session = next(session for session in broker.scheduler._sessions if not session.node)
    assert session.link.printed <= MAX_ON_THE_WAY + len(KB64)
    node.finishes("a")
    client.thaws()
    broker.passes(3.0)
    words = [each for message in client.all(Output) for each in message.words]
    assert sum(len(each.text) for each in words) <= MAX_ON_THE_WAY + len(KB64)
    assert (words[-1].at, words[-1].lines, words[-1].text) == (number * len(KB64), number, b""), "what is missing is told"
    assert client.answers == {"a": "ok"}
    assert session.link.printed == 0


# --- the node --------------------------------------------------------------------------------------------------------------


def test_a_node_says_it_before_the_result_of_the_same_turn():
    place = Workplace()
    place.broker_orders("a")
    place.prints("a", b"hello\n")
    place.finishes("a")
    told = [message for message in place.told if isinstance(message, Output | Results)]
    assert [type(message) for message in told] == [Output, Results]
    assert told[0].words == [Words(task_id("a"), 1, 1, 1, 0, 0, b"hello\n")]


def test_a_node_without_a_broker_keeps_what_it_may():
    place = Workplace()
    place.broker_orders("a")
    place.cut = True
    for _ in range(3 * MAX_ON_THE_WAY // len(KB64)):
        place.prints("a", KB64)
    link = place.agent._uplink.link
    assert link.printed <= MAX_ON_THE_WAY + len(KB64)
    place.reconnects()
    place.finishes("a")
    assert place.results == ["a"]
    assert sum(len(words.text) for message in place.all(Output) for words in message.words) > MAX_ON_THE_WAY / 2


def test_between_two_sessions_it_is_lost():
    place = Workplace()
    place.broker_orders("a")
    place.broker_forgets()
    place.prints("a", b"hello\n")
    place.broker_welcomes()
    assert place.all(Output) == []


# --- the client --------------------------------------------------------------------------------------------------------


def test_a_client_hears_of_its_own_tasks():
    desk = Desk()
    desk.asks("a", name="fit")
    words, others = (Words(task_id(label), 1, 3, 1, 0, 0, b"hello\n") for label in ("a", "b"))
    desk.broker_says(Output([words, others], [Advance(task_id("a"), 1, 0.5), Advance(task_id("b"), 1, 0.5)], "n1"))
    [heard] = desk.acted(Heard)
    [(said, shape)] = heard.words
    assert (said, shape.options.name, heard.node) == (words, "fit", "n1")
    assert heard.advances == [Advance(task_id("a"), 1, 0.5)]
    assert isinstance(shape, Shape)
    assert shape.function == digest("f")


def test_a_client_hears_nothing_of_what_is_answered():
    desk = Desk()
    desk.asks("a")
    desk.broker_answers("a")
    desk.broker_says(Output([Words(task_id("a"), 1, 3, 1, 0, 0, b"hello\n")], [], "n1"))
    assert desk.acted(Heard) == []
