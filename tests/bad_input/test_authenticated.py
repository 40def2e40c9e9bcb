"""Cases 13 to 43: what an authenticated peer may say that is out of place. Dropped, counted by reason, the session kept.

Bytes are in ../test_protocol.py, frames in test_wire.py, sequences nobody would think of in ../core/test_hostile.py and the
fuzzer. Here each case has its number.
"""

from __future__ import annotations

import logging
import time
import tracemalloc

import msgspec
import pytest
from core.builders import PYTHON, Broker, digest, task_id, token

from zmqsched.codec import decode, encode
from zmqsched.core.events import Arrived, BeatArrived, Send
from zmqsched.errors import ProtocolError, VersionMismatch
from zmqsched.protocol import (
    MAJOR,
    MAX_HEADER,
    MINOR,
    Ack,
    Attempt,
    Beat,
    Cancel,
    ClientHello,
    Command,
    Envelope,
    Function,
    Goodbye,
    NodeHello,
    Options,
    Outcome,
    Ping,
    Progress,
    Query,
    Results,
    SayHello,
    Shape,
    Shutdown,
    Submit,
    TaskSpec,
    WorkerState,
)  # fmt: skip
from zmqsched.shell import LINE

PREFIX = b"ZQ" + bytes((MAJOR, MINOR))
MEBIBYTE = 1 << 20


def pack(*parts: object) -> bytes:
    return PREFIX + msgspec.msgpack.encode([1, 1, 0, list(parts)])


def refused(frame: bytes, match: str | None = None) -> None:
    """In bounded time and memory, by a ProtocolError."""
    tracemalloc.start()
    began = time.process_time()
    try:
        with pytest.raises(ProtocolError, match=match):
            decode([frame])
        assert tracemalloc.get_traced_memory()[1] < 2 * MEBIBYTE + 4 * len(frame)
    finally:
        tracemalloc.stop()
    assert time.process_time() - began < 2


def goes_on(broker: Broker) -> None:
    """Those who behave are served."""
    client, node = broker.client("honest"), broker.node("honest-node", slots=1_000, resources={"honest": 1.0})
    client.submits("honest work", resources={"honest": 1.0})
    node.finishes("honest work")
    assert client.answers == {"honest work": "ok"}


# --- what is no message --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frames", [[], [b""], [b"", b""]], ids=["none", "one empty", "two empty"])
def test_13_no_frames_and_empty_ones(frames: list[bytes]):
    with pytest.raises(ProtocolError):
        decode(frames)


def test_14_magic_and_versions():
    refused(b"QZ" + pack(8)[2:], "not a zmqsched message")
    with pytest.raises(VersionMismatch, match=rf"protocol {MAJOR + 1}\.0, this side {MAJOR}\.{MINOR}"):
        decode([b"ZQ" + bytes((MAJOR + 1, 0))])
    newer = b"ZQ" + bytes((MAJOR, MINOR + 1)) + msgspec.msgpack.encode([1, 0, 0, [6, 1, 2, "new"], "new"])
    assert decode([newer]).body == Ping(1, 2)


@pytest.mark.parametrize("tag", [0, -1, 5_000, 2**63, "Ping", None, [6], 60, 61])
def test_15_an_unknown_type(tag: object):
    """60 and 61 are messages of the pipes, not of this link."""
    refused(pack(tag, 1, 2), "malformed")


@pytest.mark.parametrize("body", [Submit([], []), Cancel([]), Query(1), Shutdown(), Command("n1")])
def test_16_a_node_that_says_what_clients_say(body: object):
    """Dropped without an answer: who does so is no version of ours, and would not understand one."""
    broker = Broker()
    node = broker.node()
    heard = len(node.heard)
    node.says(body)
    assert broker.counts[f"dropped: {type(body).__name__} from a node"] == 1
    assert len(node.heard) == heard
    assert broker.quit is None
    assert node.holds == []
    node.asks_for(1)
    assert broker.counts.get("unknown session", 0) == 0, "its session is kept"
    goes_on(broker)


@pytest.mark.parametrize("body", [Ack(), Ping(1, 1), Submit([], []), Results([]), Progress(1), Goodbye(), Query(1)])
def test_17_anything_before_hello(body: object):
    """Told to say hello, which is all that helps; Parsl's interchange died of such a message (its issue 3262)."""
    broker = Broker()
    for session in (0, 1, 2**53):
        (sent,) = broker.hears(Envelope(session, 1, 0, body))
        assert isinstance(sent.envelope.body, SayHello)
    assert broker.counts["unknown session"] == 3
    assert broker.hears(Envelope(7, 0, 0, SayHello())) == [], "that would go to and fro for ever"
    goes_on(broker)


def test_18_hello_twice():
    broker = Broker()
    client, node = broker.client(), broker.node()
    client.submits("a")
    first = node.link
    node.says_hello()
    assert node.link is first
    assert node.holds == ["a"], "nothing was requeued"
    node.says_hello(life=2)
    assert node.link is not first
    assert broker.counts["requeued: node lost"] == 1
    assert node.attempts == [("a", 1), ("a", 2)]


def test_19_a_node_that_says_it_is_another_ones():
    """The same incarnation under another key: not taken over, counted, and the one that is there keeps its session."""
    broker = Broker()
    node = broker.node(user="admin:1")
    broker.hears(Envelope(0, 0, 0, msgspec.structs.replace(node.hello, life=9)), user="node:1")
    assert broker.counts["dropped: hello in the name of one with a key for admin"] == 1
    assert broker.scheduler._sessions.known(node.hello.incarnation).user == "admin:1"  # type: ignore[union-attr]
    goes_on(broker)


HELLO = [2, token("n"), 1, ["host", 1, PYTHON], 2, 2, [["cpu", 2.0]], ["tag"]]


IMPOSSIBLE = {
    "no slots": (4, 0),
    "slots below zero": (4, -1),
    "a billion slots": (4, 10**9),
    "slots NaN": (4, float("nan")),
    "half a slot": (4, 0.5),
    "no token": (1, b""),
    "a host of a mebibyte": (3, ["h" * MEBIBYTE, 1, PYTHON]),
    "a host in no UTF-8": (3, [b"\xff\xfe", 1, PYTHON]),
    "a host that writes its own log line": (3, ["h\n12:00:00 zmqsched all is well", 1, PYTHON]),
    "a host in red": (3, ["\x1b[31mhost", 1, PYTHON]),
    "a Python that rings the bell": (3, ["host", 1, "3.11\a"]),
    "a library that turns the text around": (3, ["host", 1, PYTHON, [["numpy", "1\u202e2"]]]),
    "a tag with a null": (7, ["t\0"]),
    "a resource with a line break": (6, [["cpu\r", 1.0]]),
    "resources NaN": (6, [["cpu", float("nan")]]),
    "resources without end": (6, [["cpu", float("inf")]]),
    "a resource named twice": (6, [["cpu", 1.0], ["cpu", 2.0]]),
}


@pytest.mark.parametrize(("field", "value"), IMPOSSIBLE.values(), ids=list(IMPOSSIBLE))
def test_20_a_hello_that_cannot_be(field: int, value: object):
    assert isinstance(decode([pack(*HELLO)]).body, NodeHello)
    refused(pack(*HELLO[:field], value, *HELLO[field + 1 :]))


def test_20_what_is_logged_is_one_line():
    """Texts that peers may send elsewhere (why a worker died) are escaped where they are written."""
    record = logging.LogRecord("zmqsched", logging.INFO, "", 0, "said: %s", ("\x1b[31mred\nall is well\0é",), None)
    assert LINE.format(record).partition("zmqsched ")[2] == r"said: \x1b[31mred\nall is well\x00é"


OPEN = b"\x94\x01\x01\x00"
HUGE = b"\xff" * 4


NO_HEADERS = {
    "not msgpack": b"\xc1",
    "truncated": OPEN + b"\x92\x17\x91\xc4\x10short",
    "trailing bytes": OPEN + b"\x91\x08\x00",
    "depth 10,000": OPEN + b"\x92\x08" + b"\x91" * 10_000,
    "a map of a million keys": OPEN + b"\x92\x08" + msgspec.msgpack.encode(dict.fromkeys(range(10**6)))[:MAX_HEADER - 20],
    "duplicate keys": OPEN + b"\x92\x08\x82\xa1k\x01\xa1k\x02\x00",
    "an extension": OPEN + b"\x92\x06\xd6\x05abcd",
    "an array of 2**32": OPEN + b"\x92\x17\xdd" + HUGE,
    "bytes of 2**32": OPEN + b"\x92\x17\x91\xc6" + HUGE,
    "text of 2**32": OPEN + b"\x92\x09\xdb" + HUGE,
    "NaN": OPEN + b"\x93\x06\xcb\x7f\xf8" + bytes(6) + b"\x01",
    "infinity": OPEN + b"\x93\x06\xcb\x7f\xf0" + bytes(6) + b"\x01",
    "2**64 - 1": OPEN + b"\x93\x06\xcf" + b"\xff" * 8 + b"\x01",
}


@pytest.mark.parametrize("rest", NO_HEADERS.values(), ids=list(NO_HEADERS))
def test_21_a_header_that_is_none(rest: bytes):
    refused(PREFIX + rest)


@pytest.mark.parametrize("bad", [b"", b"short", b"x" * 17, "text of 16 chars", 5, None], ids=str)
def test_25_a_task_id_that_is_none(bad: object):
    refused(pack(23, [bad]), "malformed")


def test_25_an_id_of_zeros_is_an_id():
    broker = Broker()
    client, node = broker.client(), broker.node()
    client.says(Submit([Shape(digest("f"))], [TaskSpec(bytes(16), 0, b"")], [Function(digest("f"), b"code")]))
    node.says(Results([Outcome(bytes(16), 1, True, b"value", 1)]))
    assert [final.verdict for final in client.finals] == ["ok"]


# --- tasks -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ended", ["queued", "at a node", "running", "done", "failed", "cancelled"])
def test_26_submitted_again(ended: str):
    """Never a second run of what is open, and one answer. An answer that the client has acknowledged is forgotten, and only
    the client's own link could bring the submission again: it does not, as it numbers its messages."""
    broker = Broker()
    client, node = broker.client(), broker.node()
    if ended == "queued":
        client.submits("first")
    client.submits("a")
    if ended == "running":
        node.starts("a")
    client.submits("a")
    client.submits("a")
    assert broker.counts["submitted again"] == 2
    if ended == "queued":
        node.finishes("first")
    if ended == "failed":
        node.fails("a")
    elif ended == "cancelled":
        client.cancels("a")
        node.hands_back("a")
    else:
        node.finishes("a")
    assert client.answers["a"] == {"failed": "error", "cancelled": "cancelled"}.get(ended, "ok")
    assert [label for label, _ in node.attempts].count("a") == 1


def test_27_the_same_id_with_another_call():
    """The first is run and answered. Ids are 8 random and 8 counted bytes of the client's; who repeats one with another
    call lies to itself alone."""
    broker = Broker()
    client, node = broker.client(), broker.node()
    client.submits("a")
    client.says(Submit([Shape(digest("f"))], [TaskSpec(task_id("a"), 0, b"another call")]))
    assert node.orders["a"].call == b"call of a"
    node.finishes("a")
    assert client.answers == {"a": "ok"}
    assert broker.counts["submitted again"] == 1


def test_28_no_payload_and_an_empty_one():
    refused(pack(20, [[digest("f")]], [[task_id("a"), 0]]), "malformed")
    refused(pack(20, [[digest("f")]], [[task_id("a"), 0, 1]]), "more bulk frames")
    broker = Broker()
    client, node = broker.client(), broker.node()
    client.says(Submit([Shape(digest("f"))], [TaskSpec(task_id("a"), 0, b"")], [Function(digest("f"), b"")]))
    assert node.orders["a"].call == b"", "it is the worker that cannot unpickle it, and says so"


NUMBERS = {"retries": [-1, 10**9, "3", 1.5], "priority": [float("nan"), 2**40, "1", 0.5]}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in NUMBERS.items() for value in values])
def test_29_numbers_that_are_none(name: str, value: object):
    fields = {**msgspec.structs.asdict(Options()), name: value}
    refused(pack(20, [[digest("f"), list(fields.values())]], [[task_id("a"), 0, b""]]), "malformed|finite")


def test_31_a_result_that_is_nobodys():
    """Of an unknown task, an attempt there never was, another node's task, or one that is done: acknowledged, so that its
    sender stops, counted as a zombie, and nothing is upset. A value, but not an error, of an open task is taken."""
    broker = Broker()
    client, node, other = broker.client(), broker.node(), broker.node("other")
    client.submits("a", "b")
    node.says(Results([Outcome(task_id("unknown"), 1, True, b"", 1)]))
    node.says(Results([Outcome(task_id("a"), 99, False, b"", 1)]))
    other.says(Results([Outcome(task_id("a"), 1, False, b"", 1)]))
    assert broker.counts["zombie results"] == 3
    assert client.answers == {}
    for peer in (node, other):
        assert peer.link is not None
        broker.passes(0.2)
        assert peer.link.unfinished() == [], "acknowledged"
    node.finishes("a")
    node.says(Results([Outcome(task_id("a"), 1, True, b"again", 1)]))
    other.finishes("b")
    assert client.answers == {"a": "ok", "b": "ok"}
    assert broker.counts["zombie results"] == 4


@pytest.mark.parametrize("first", [True, False], ids=["value first", "error first"])
def test_32_two_outcomes_of_one_attempt(first: bool):
    broker = Broker()
    client, node = broker.client(), broker.node()
    client.submits("a")
    for ok in (first, not first, first):
        node.says(Results([Outcome(task_id("a"), 1, ok, b"value", 1)]))
    assert client.answers == {"a": "ok" if first else "error"}


def test_33_34_a_result_without_a_start_and_a_start_after_the_result():
    broker = Broker()
    client, node = broker.client(), broker.node()
    client.submits("a")
    node.finishes("a")
    assert client.answers == {"a": "ok"}
    node.says(Progress(1, started=[Attempt(task_id("a"), 1)]))
    assert client.told_running == []
    assert broker.counts["late reports"] == 1


def test_35_an_acknowledgement_of_what_was_never_sent():
    broker = Broker()
    client, node = broker.client(), broker.node()
    for peer in (client, node):
        assert peer.link is not None
        for ack in (5, 2**53):
            broker.hears(Envelope(peer.link.session, 0, ack, Ack()), peer.address.decode())
    client.submits("a")
    node.finishes("a")
    assert client.answers == {"a": "ok"}


def test_36_beats_that_go_back_and_a_flood_of_them():
    """A flood costs a count each; how many come per second is bounded by the socket's high-water mark."""
    broker = Broker()
    node = broker.node()
    node.beats(10)
    for number in (9, 10, 0):
        node.beats(number)
    assert broker.counts["beats of nobody or out of order"] == 3
    for number in range(11, 2_011):
        node.beats(number)
    assert broker.counts["dropped: too many beats"] > 1_000
    assert len(broker.scheduler.counts) < 20
    goes_on(broker)


def test_37_a_beat_that_claims_workers_that_are_not_there():
    """Beats name no tasks: what a node holds, the numbered channel says, and a session's end clears it."""
    broker = Broker()
    client, node = broker.client(), broker.node()
    client.submits("a")
    before = broker.scheduler._nodes[node.id].workers
    broker.step(BeatArrived(Beat(node.hello.incarnation, 99, [WorkerState(77, 1, "busy")] * 100)))
    assert broker.scheduler._nodes[node.id].workers == before
    node.finishes("a")
    assert client.answers == {"a": "ok"}


@pytest.mark.parametrize("credit", [2**63, -1, 100_001, 1.5, "5"])
def test_38_credit_that_is_none(credit: object):
    refused(pack(44, credit), "malformed")


def test_39_a_cancellation_of_what_is_not_ones_own():
    """No answer in any case: whether a task exists is not told."""
    broker = Broker()
    owner, other, node = broker.client("owner"), broker.client("other"), broker.node()
    owner.submits("a", "b")
    heard = len(other.heard)
    other.cancels("a", "b", "unknown")
    assert len(other.heard) == heard
    node.finishes("a")
    node.finishes("b")
    owner.cancels("a")
    assert owner.answers == {"a": "ok", "b": "ok"}


def test_40_goodbye_and_then_more():
    broker = Broker()
    client, node = broker.client(), broker.node()
    session = node.link.session  # type: ignore[union-attr]
    node.leaves()
    for body in (Results([Outcome(task_id("a"), 1, True, b"", 1)]), Progress(5), Goodbye()):
        (sent,) = broker.hears(Envelope(session, 9, 0, body))
        assert isinstance(sent.envelope.body, SayHello)
    client.leaves()
    goes_on(broker)


def test_41_messages_of_a_session_with_an_earlier_broker():
    """Sessions are random tokens, new with each broker: what was said to another is answered SayHello, not taken."""
    old, new = Broker(), Broker(epoch=2)
    node = old.node()
    new.scheduler._sessions._random.seed(99)
    (sent,) = new.hears(Envelope(node.link.session, 1, 0, Results([])))  # type: ignore[union-attr]
    assert isinstance(sent.envelope.body, SayHello)
    assert new.counts == {"unknown session": 1}


def test_42_two_sessions_on_one_connection():
    """A message says itself whose it is; the routing id is only where the answer goes."""
    broker = Broker()
    one, two = broker.client("one"), broker.client("two")
    one.submits("a")
    assert two.link is not None
    submit = Submit([Shape(digest("f"))], [TaskSpec(task_id("b"), 0, b"")])
    broker.hears(Envelope(two.link.session, 0, 0, submit), address=one.address.decode())
    node = broker.node(slots=2)
    node.finishes("a", "b")
    assert (one.answers, two.answers) == ({"a": "ok"}, {})
    two.says(Query(1))  # from where it is now
    assert (one.answers, two.answers) == ({"a": "ok"}, {"b": "ok"})


@pytest.mark.parametrize(
    "body",
    [
        Results([Outcome(task_id("a"), 1, True, b"value", 1)]),
        Submit([Shape(digest("f"))], [TaskSpec(task_id("a"), 0, b"call")], [Function(digest("f"), b"code")]),
    ],
    ids=["Results", "Submit"],
)
def test_43_every_bit_flipped_once(body: object):
    """A message or a ProtocolError; and if it is a message the core takes it or drops it."""
    frame = bytes(encode(Envelope(1, 1, 0, body))[0])
    broker = Broker()
    peer = broker.node() if isinstance(body, Results) else broker.client()
    assert peer.link is not None
    for bit in range(8 * len(frame)):
        flipped = bytearray(frame)
        flipped[bit // 8] ^= 1 << bit % 8
        try:
            message = decode([bytes(flipped)])
        except ProtocolError:
            continue
        broker.hears(Envelope(peer.link.session, 0, 0, message.body), peer.address.decode())
    goes_on(broker)


def test_62_two_clients_with_one_id_and_a_thousand_with_their_own():
    """An incarnation is 16 random bytes. Who repeats one takes that session over, as after a reconnect; not so under another
    key."""
    broker = Broker()
    first = broker.client("one", user="client:1")
    broker.hears(Envelope(0, 0, 0, first.hello), address="another key's", user="admin:1")
    assert broker.scheduler._sessions.known(first.hello.incarnation).peer == first.address  # type: ignore[union-attr]
    node = broker.node(slots=1_000)
    where = first.hello.where
    for number in range(1_000):
        peer, hello = b"client %d" % number, ClientHello(b"%016d" % number, 1, where)
        sent = broker.scheduler.handle(Arrived(peer, "", Envelope(0, 0, 0, hello)), broker.now)
        (session,) = [action.envelope.session for action in sent if isinstance(action, Send)]
        submit = Submit([Shape(digest("f"))], [TaskSpec(b"%016d" % number, 0, b"")], [Function(digest("f"), b"code")])
        broker.scheduler.handle(Arrived(peer, "", Envelope(session, 1, 0, submit)), broker.now)
    broker.turn()
    assert len(node.orders) == 1_000
    outcomes = [Outcome(order.task, order.attempt, True, b"value", 1) for order in node.orders.values()]
    node.says(Results(outcomes))
    assert broker.counts["ok"] == 1_000
