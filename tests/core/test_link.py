"""Two ends of a link, and a wire between them that does what wires do."""

from __future__ import annotations

import math
from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zmqsched.core.link import ACK_DELAY_S, PING_AFTER_S, WINDOW, Link
from zmqsched.protocol import Ack, Envelope, Notice, Ping, Pong

from .builders import over_the_wire


class Ends:
    """Left and right, and what is under way to each. Nothing arrives by itself."""

    def __init__(self) -> None:
        self.now = 10.0
        self.left, self.right = Link(7), Link(7)
        self.to: dict[Link, deque[Envelope]] = {self.left: deque(), self.right: deque()}
        self.got: dict[Link, list[str]] = {self.left: [], self.right: []}
        self.carried: list[Envelope] = []

    def other(self, end: Link) -> Link:
        return self.right if end is self.left else self.left

    def flush(self, end: Link) -> list[Envelope]:
        out = end.flush(self.now)
        end.sanity_check()
        self.to[self.other(end)].extend(out)
        self.carried += out
        return out

    def arrives(self, end: Link) -> None:
        """The next envelope under way to this end."""
        self.takes(end, self.to[end].popleft())

    def takes(self, end: Link, envelope: Envelope) -> None:
        message = end.receive(over_the_wire(envelope), self.now)
        end.sanity_check()
        if isinstance(message, Notice):
            self.got[end].append(message.text)

    def settle(self) -> None:
        """All that is under way arrives, and what that leads to."""
        while any(self.to.values()) or sum(len(self.flush(end)) for end in self.to):
            for end in self.to:
                while self.to[end]:
                    self.arrives(end)

    def passes(self, seconds: float) -> None:
        self.now += seconds
        self.settle()


def texts(count: int) -> list[str]:
    return [f"m{n}" for n in range(count)]


def send(end: Link, *what: str) -> None:
    for text in what:
        end.send(Notice(text))


def kinds(envelopes: list[Envelope]) -> list[str]:
    return [type(envelope.body).__name__ for envelope in envelopes]


Fate = st.sampled_from(["arrive", "arrive", "arrive", "lose", "double", "late", "reconnect", "left", "right", "time"])


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(Fate, st.booleans()), min_size=20, max_size=150))
def test_whatever_the_wire_does_all_arrives_once_and_in_order(fates):
    ends = Ends()
    sent: dict[Link, list[str]] = {ends.left: [], ends.right: []}
    late: list[tuple[Link, Envelope]] = []
    for fate, leftwards in fates:
        end = ends.left if leftwards else ends.right
        if fate in ("left", "right"):
            speaker = ends.left if fate == "left" else ends.right
            text = f"{fate}{len(sent[speaker])}"
            sent[speaker].append(text)
            send(speaker, text)
            ends.flush(speaker)
        elif fate == "time":
            ends.now += 1.1
            ends.flush(end)
        elif fate == "reconnect":
            ends.to[end].clear()
            ends.other(end).reconnected()
            ends.flush(ends.other(end))
        elif ends.to[end]:
            envelope = ends.to[end].popleft()
            if fate == "late":
                late.append((end, envelope))
            if fate in ("arrive", "double"):
                ends.takes(end, envelope)
            if fate == "double":
                ends.takes(end, envelope)
            ends.flush(end)
    for end, envelope in late:
        ends.takes(end, envelope)
    for _ in range(5):
        ends.passes(1.1)
    assert ends.got[ends.right] == sent[ends.left]
    assert ends.got[ends.left] == sent[ends.right]
    assert not ends.left.unfinished()
    assert not ends.right.unfinished()
    assert ends.left.deadline() == math.inf


def test_a_message_goes_out_at_once_and_is_numbered():
    ends = Ends()
    send(ends.left, "a", "b")
    assert ends.left.deadline() == 0.0
    assert [(envelope.session, envelope.seq) for envelope in ends.flush(ends.left)] == [(7, 1), (7, 2)]


def test_time_alone_sends_nothing_again_it_only_asks():
    ends = Ends()
    send(ends.left, "a", "b")
    ends.flush(ends.left)
    for n in range(1, 100):
        ends.now += PING_AFTER_S
        (asked,) = ends.flush(ends.left)
        assert asked.body == Ping(2, n)
    assert [envelope.seq for envelope in ends.carried if envelope.seq] == [1, 2]


def test_a_slow_wire_gets_no_copies():
    """All pings and all messages arrive at last, in order: nothing was lost, so nothing is sent again."""
    ends = Ends()
    send(ends.left, *texts(5))
    for _ in range(10):
        ends.flush(ends.left)
        ends.now += PING_AFTER_S
    ends.settle()
    ends.passes(10)
    assert [envelope.seq for envelope in ends.carried if isinstance(envelope.body, Notice)] == [1, 2, 3, 4, 5]


def test_what_a_pong_proves_lost_is_sent_again():
    ends = Ends()
    send(ends.left, *texts(4))
    ends.flush(ends.left)
    ends.arrives(ends.right)
    ends.to[ends.right].clear()
    ends.passes(PING_AFTER_S)
    assert ends.got[ends.right] == texts(4)
    seqs = [envelope.seq for envelope in ends.carried if isinstance(envelope.body, Notice)]
    assert seqs == [1, 2, 3, 4, 2, 3, 4]


def test_an_acknowledgement_of_some_puts_the_question_about_the_others_off():
    ends = Ends()
    send(ends.left, "a", "b")
    ends.flush(ends.left)
    ends.now += PING_AFTER_S / 2
    ends.takes(ends.left, Envelope(7, 0, 1, Ack()))
    assert ends.left.deadline() == ends.now + PING_AFTER_S
    ends.takes(ends.left, Envelope(7, 0, 2, Ack()))
    assert ends.left.deadline() == math.inf


def test_an_old_pong_proves_nothing_about_what_was_sent_after_its_ping():
    ends = Ends()
    ends.left.ping(ends.now)
    ends.flush(ends.left)
    send(ends.left, "a")
    ends.flush(ends.left)
    ends.arrives(ends.right)
    ends.flush(ends.right)
    ends.arrives(ends.left)
    assert ends.flush(ends.left) == []


def test_no_more_than_the_window_is_under_way():
    ends = Ends()
    send(ends.left, *texts(3 * WINDOW))
    assert len(ends.flush(ends.left)) == WINDOW
    assert ends.flush(ends.left) == []
    assert ends.left.deadline() == ends.now + PING_AFTER_S
    for _ in range(10):
        ends.arrives(ends.right)
    ends.now += ACK_DELAY_S
    ends.flush(ends.right)
    ends.arrives(ends.left)
    assert len(ends.flush(ends.left)) == 10
    for _ in range(3):
        ends.passes(ACK_DELAY_S)
    assert ends.got[ends.right] == texts(3 * WINDOW)


def test_an_acknowledgement_waits_a_moment_for_company():
    ends = Ends()
    send(ends.left, "a")
    ends.flush(ends.left)
    ends.arrives(ends.right)
    assert ends.flush(ends.right) == []
    assert ends.right.deadline() == ends.now + ACK_DELAY_S
    send(ends.right, "answer")
    (answer,) = ends.flush(ends.right)
    assert (answer.body, answer.ack) == (Notice("answer"), 1)
    ends.arrives(ends.left)
    assert not ends.left.unfinished()
    assert ends.right.deadline() == ends.now + PING_AFTER_S


def test_an_acknowledgement_without_company_goes_alone_and_once():
    ends = Ends()
    send(ends.left, "a", "b", "c")
    ends.flush(ends.left)
    for _ in range(3):
        ends.arrives(ends.right)
    ends.now += ACK_DELAY_S
    assert [(envelope.body, envelope.ack, envelope.seq) for envelope in ends.flush(ends.right)] == [(Ack(), 3, 0)]
    assert ends.flush(ends.right) == []
    assert ends.right.deadline() == math.inf


def test_a_duplicate_is_acknowledged_again_and_not_delivered_again():
    ends = Ends()
    send(ends.left, "a")
    (envelope,) = ends.flush(ends.left)
    ends.takes(ends.right, envelope)
    ends.now += ACK_DELAY_S
    ends.flush(ends.right)
    ends.takes(ends.right, envelope)
    assert kinds(ends.flush(ends.right)) == ["Ack"]
    assert ends.got[ends.right] == ["a"]


def test_what_lies_behind_a_gap_is_ignored():
    ends = Ends()
    send(ends.left, "a", "b")
    first, second = ends.flush(ends.left)
    ends.takes(ends.right, second)
    assert ends.got[ends.right] == []
    ends.takes(ends.right, first)
    ends.takes(ends.right, second)
    assert ends.got[ends.right] == ["a", "b"]


def test_a_ping_is_returned_with_its_numbers():
    ends = Ends()
    ends.left.ping(ends.now)
    (ping,) = ends.flush(ends.left)
    ends.arrives(ends.right)
    assert ends.right.deadline() == 0.0
    (pong,) = ends.flush(ends.right)
    assert (ping.body, pong.body) == (Ping(0, 1), Pong(0, 1))


def test_confirmed_is_when_the_answered_ping_was_sent_not_when_the_answer_came():
    ends = Ends()
    assert ends.left.confirmed_at == float("-inf")
    ends.left.ping(ends.now)
    asked = ends.now
    ends.flush(ends.left)
    ends.now += 100
    ends.settle()
    assert ends.left.confirmed_at == asked


def test_other_messages_and_strange_pongs_confirm_nothing():
    ends = Ends()
    ends.left.ping(ends.now)
    send(ends.right, "hello")
    ends.flush(ends.right)
    ends.arrives(ends.left)
    ends.takes(ends.left, Envelope(7, 0, 0, Pong(0, 99)))
    assert ends.left.confirmed_at == float("-inf")


def test_answers_out_of_order_do_not_turn_the_confirmation_back():
    ends = Ends()
    ends.left.ping(10.0)
    ends.left.ping(11.0)
    ends.takes(ends.left, Envelope(7, 0, 0, Pong(0, 2)))
    ends.takes(ends.left, Envelope(7, 0, 0, Pong(0, 1)))
    assert ends.left.confirmed_at == 11.0


def test_a_new_connection_sends_again_what_is_not_acknowledged():
    ends = Ends()
    send(ends.left, *texts(3))
    ends.flush(ends.left)
    ends.to[ends.right].clear()
    ends.left.reconnected()
    assert ends.left.deadline() == 0.0
    assert [envelope.seq for envelope in ends.flush(ends.left)] == [1, 2, 3]
    ends.settle()
    assert ends.got[ends.right] == texts(3)
    ends.left.reconnected()
    ends.passes(1)
    ends.left.reconnected()
    assert ends.flush(ends.left) == []


@pytest.mark.parametrize("ack", [1, 5, 2**53])
def test_an_acknowledgement_of_what_was_never_sent_is_ignored(ack):
    ends = Ends()
    send(ends.left, *texts(WINDOW + 1))
    if ack < 5:
        ends = Ends()
    else:
        ack += WINDOW
        ends.flush(ends.left)
    waiting = len(ends.left.unfinished())
    ends.takes(ends.left, Envelope(7, 0, min(ack, 2**53), Ack()))
    assert len(ends.left.unfinished()) == waiting


def test_what_is_left_over_is_told_oldest_first():
    ends = Ends()
    send(ends.left, *texts(WINDOW + 2))
    ends.flush(ends.left)
    ends.takes(ends.left, Envelope(7, 0, 1, Ack()))
    assert ends.left.unfinished() == [Notice(text) for text in texts(WINDOW + 2)[1:]]


def test_a_message_without_a_number_may_be_lost_and_needs_no_acknowledgement():
    ends = Ends()
    ends.takes(ends.left, Envelope(7, 0, 0, Notice("by the way")))
    assert ends.got[ends.left] == ["by the way"]
    assert ends.left.deadline() == math.inf
