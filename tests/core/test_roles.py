"""What a peer may say, by the role of the key it came with, and what becomes of sessions whose key is replaced."""

from __future__ import annotations

import pytest

from zmqsched.core.events import KeysChanged, Rekey
from zmqsched.protocol import (
    ChangeKeys,
    ClientHello,
    Command,
    Envelope,
    Host,
    KeyReport,
    NewKeys,
    No,
    Outcome,
    Ping,
    Results,
    SayHello,
    Shutdown,
    Submit,
    Welcome,
    Workers,
    WorkerState,
    nested_incarnation,
)  # fmt: skip

from .builders import PYTHON, Broker, Client, task_id, token


def is_let_in(peer) -> bool:
    return bool(peer.all(Welcome))


@pytest.mark.parametrize(
    ("user", "client", "node"),
    [
        ("", True, True),
        ("admin:local", True, True),
        ("admin:7", True, True),
        ("client:1", True, False),
        ("node:1", False, True),
        ("observer:1", False, False),
    ],
)
def test_who_gets_which_session(user, client, node):
    broker = Broker()
    assert is_let_in(broker.client(user=user)) is client
    assert is_let_in(broker.node(user=user)) is node
    for peer, welcome in zip(broker.peers, (client, node), strict=True):
        if not welcome:
            (no,) = peer.all(No)
            assert no.code == "role"
            assert f"the role {user.partition(':')[0]!r} lets no {peer.name} in" in no.text
    assert broker.counts.get("refused: role", 0) == (not client) + (not node)


@pytest.mark.parametrize("message", [Command("n1"), Shutdown(), ChangeKeys(1, "revoke", ["admin"])])
def test_only_an_administrator_rules(message):
    broker = Broker()
    broker.node(user="node:1")
    client = broker.client(user="client:1")
    client.says(message)
    (no,) = client.all(No)
    assert (no.code, f"does not allow {type(message).__name__}" in no.text) == ("role", True)
    assert broker.counts[f"dropped: {type(message).__name__} from a client"] == 1
    broker.passes(5)
    assert broker.quit is None
    client.submits("a")
    assert broker.peers[0].holds == ["a"], "it neither drains nor is gone; and the client goes on"


def test_what_a_client_may_not_say_a_node_may_not_either():
    """Nor the other way round: a session is one thing."""
    broker = Broker()
    client, node = broker.client(user="client:1"), broker.node(user="node:1")
    client.submits("a")
    client.says(Results([Outcome(task_id("a"), 1, True, b"forged", 1)]))
    node.says(Submit([], []))
    assert broker.counts["dropped: Results from a client"] == 1
    assert broker.counts["dropped: Submit from a node"] == 1
    node.finishes("a")
    assert client.answers == {"a": "ok"}


def tasks_client(broker: Broker, node: str, worker: int, user: str = "node:1") -> Client:
    client = Client(broker, "nested", user=user)
    client.hello = ClientHello(nested_incarnation(token(node), worker, 1), 1, Host("h", 1, PYTHON), nested=True)
    broker.peers.append(client)
    client.says_hello()
    return client


def test_a_nodes_key_lets_the_clients_of_its_tasks_in():
    broker = Broker()
    broker.node("node", user="node:1").says(Workers([WorkerState(3, 77, "busy")]))
    nested = tasks_client(broker, "node", 3)
    assert is_let_in(nested)
    nested.submits("a")
    assert broker.peers[0].holds == ["a"]


def test_but_only_those_of_workers_that_a_node_says_it_has():
    """It is not told off: its node may be on the way back to a broker that is new, and the next hello finds it there."""
    broker = Broker()
    nested = tasks_client(broker, "node", 3)
    assert nested.heard == []
    broker.node("node", user="node:1").says(Workers([WorkerState(2, 77, "busy")]))
    nested.says_hello()
    assert nested.heard == []
    broker.peers[1].says(Workers([WorkerState(3, 78, "busy")]))
    nested.says_hello()
    assert is_let_in(nested)


def test_an_observers_key_is_no_tasks_client():
    broker = Broker()
    broker.node("node").says(Workers([WorkerState(3, 77, "busy")]))
    assert tasks_client(broker, "node", 3, user="observer:1").all(No)


def test_a_session_is_not_taken_over_with_a_key_of_another_role():
    broker = Broker()
    client = broker.client(user="admin:1")
    broker.hears(Envelope(0, 0, 0, client.hello), "thief", user="client:1")
    (reply,) = broker.hears(Envelope(client.link.session, 1, 0, Ping(0, 1)), "thief", user="client:1")
    assert isinstance(reply.envelope.body, SayHello)
    assert broker.counts["dropped: hello in the name of one with a key for admin"] == 1
    assert broker.scheduler._sessions.known(client.hello.incarnation).user == "admin:1"


# --- keys that change ----------------------------------------------------------------------------------------------------


def test_sessions_are_told_the_key_that_replaces_theirs_and_go_on_with_it():
    broker = Broker()
    client, node = broker.client(user="client:1"), broker.node(user="node:1")
    client.submits("a", "b")
    broker.step(KeysChanged({"node:1": ("p" * 40, "s" * 40)}, ()))
    broker.turn()
    assert [type(each) for each in client.heard if isinstance(each, NewKeys)] == []
    assert node.last(NewKeys) == NewKeys("p" * 40, "s" * 40)
    node.user, node.address = "node:2", b"node#2"
    node.finishes("a")
    broker.step(KeysChanged({}, {"node:1"}))
    node.finishes("b")
    assert client.answers == {"a": "ok", "b": "ok"}
    assert node.attempts == [("a", 1), ("b", 1)], "nothing was run twice"
    assert node.all(SayHello) == []


def test_sessions_whose_key_is_revoked_are_over_at_once_and_told_why():
    broker = Broker()
    revoked, kept = broker.client("one", user="client:1"), broker.client("two", user="admin:1")
    node = broker.node(user="node:1")
    kept.submits("a")
    broker.step(KeysChanged({}, {"client:1", "node:1"}))
    broker.turn()
    for peer in (revoked, node):
        (no,) = peer.all(No)
        assert (no.code, "revoked" in no.text) == ("key", True)
        assert broker.scheduler._sessions.known(peer.hello.incarnation) is None
    other = broker.node("other", user="node:2")
    assert other.attempts == [("a", 2)]
    other.finishes("a")
    assert kept.answers == {"a": "ok"}


def test_who_asks_for_new_keys_is_answered():
    broker = Broker()
    owner = broker.client(user="admin:1")
    owner.link.send(request := ChangeKeys(5, "rotate", ["node"], 60.0))
    seen = [action for envelope in owner.link.flush(broker.now) for action in broker.hears(envelope, "client#1", "admin:1")]
    assert [each for each in seen if isinstance(each, Rekey)] == [Rekey(owner.link.session, request)]
    broker.step(KeysChanged({}, (), owner.link.session, report := KeyReport(5, [], "/d")))
    broker.turn()
    assert owner.last(KeyReport) == report
    broker.step(KeysChanged({}, (), 12345, report))  # who asked is gone
