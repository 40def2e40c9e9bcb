"""Cases 1 to 12 and what of 13 to 45 is about frames: bytes before and after the handshake, against a broker's socket.

Before each test's end an honest peer is served. What arrives at the socket is what the broker would be given.
"""

from __future__ import annotations

import resource
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest
import zmq
from conftest import eventually, from_afar, new_keys
from zmtp import Speaker, command, frame, greeting, ready

from zmqsched import Client, LocalCluster, errors, sockets
from zmqsched.authenticator import Authenticator
from zmqsched.broker import Broker
from zmqsched.codec import encode
from zmqsched.config import ipc_address
from zmqsched.core.events import Arrived, Malformed
from zmqsched.facts import MAX_SUBSCRIPTIONS, Facts
from zmqsched.intake import Intake
from zmqsched.keyring import Keyring
from zmqsched.protocol import Ack, Envelope, Fact
from zmqsched.sockets import Keys

SOON_MS = 60_000
HANDSHAKE_MS = 600
TCP = "tcp://127.0.0.1:*"


class Secured:
    """A router with CURVE on TCP, as a broker has it, but with less patience for handshakes."""

    def __init__(self, context: sockets.Context, keys: Keys) -> None:
        self.context = context
        self.keys = keys
        self.router, (self.address,) = sockets.bind_router(context, [TCP], keys)

    def serves(self) -> None:
        """An honest peer gets through, and nothing has come from anybody else."""
        with sockets.connect_dealer(self.context, [self.address], self.keys) as dealer:
            dealer.send(b"honest")
            assert self.router.poll(SOON_MS)
            _, body = self.router.recv_multipart()
            assert body == b"honest"
            assert not self.router.poll(0)


@pytest.fixture
def secured(monkeypatch: pytest.MonkeyPatch) -> Iterator[Secured]:
    monkeypatch.setattr(sockets, "_HANDSHAKE_MS", HANDSHAKE_MS)
    context = sockets.context()
    keys = new_keys()
    authenticator = Authenticator(context, {keys.client_public: "client:1"})
    authenticator.start()
    made = Secured(context, keys)
    yield made
    made.serves()
    made.router.close(linger=0)
    authenticator.stop()
    context.term()


OTHER_PROTOCOLS = {
    "HTTP": b"GET / HTTP/1.1\r\nHost: broker\r\n\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500),
    "SSH": b"SSH-2.0-OpenSSH_9.2\r\n",
}


@pytest.mark.parametrize("said", OTHER_PROTOCOLS.values(), ids=list(OTHER_PROTOCOLS))
def test_01_another_protocol_is_cut_off(secured: Secured, said: bytes):
    with Speaker(secured.address) as stranger:
        stranger.say(said)
        assert stranger.cut_off()


@pytest.mark.parametrize("size", [0, 1, 9, 64, 1_000, 1 << 20])
def test_02_random_bytes_are_cut_off(secured: Secured, size: int):
    with Speaker(secured.address) as stranger:
        try:
            stranger.say(Random(size).randbytes(size))
            stranger.socket.shutdown(socket.SHUT_WR)
        except OSError:  # before all of it was said
            pass
        assert stranger.cut_off()


def test_02_random_bytes_as_messages_are_no_messages(reader: Reader):
    random = Random(2)
    for size in [0, 1, 4, 100, 10_000, 1 << 20]:
        event = reader.reads(random.randbytes(size))
        assert isinstance(event, Malformed)


def test_03_a_peer_that_says_nothing_is_cut_off(secured: Secured):
    with Speaker(secured.address) as stranger:
        assert stranger.cut_off()


def test_04_a_greeting_of_a_byte_now_and_then_is_cut_off(secured: Secured):
    with Speaker(secured.address) as stranger:
        said = 0
        for byte in greeting(b"CURVE"):
            try:
                stranger.say(bytes((byte,)))
            except ConnectionError:
                break
            said += 1
            time.sleep(0.05)  # that is the attack
    assert said < 64, "it ended before the greeting did"


@pytest.mark.parametrize(
    "said",
    [b"\x01\x00" + frame(b"hello"), b"\xff" + bytes(8) + b"\x7f\x01\x05\x00\x00" + frame(b"hello"), greeting(b"NULL", 2, 0)],
    ids=["1.0", "2.0", "2.0 as long as 3.0"],
)
def test_05_an_older_protocol_has_no_encryption_and_is_cut_off(secured: Secured, said: bytes):
    with Speaker(secured.address) as stranger:
        stranger.say(said)
        assert stranger.cut_off()


@pytest.mark.parametrize("mechanism", [b"NULL", b"PLAIN", b"GSSAPI", b""])
def test_06_another_mechanism_is_cut_off(secured: Secured, mechanism: bytes):
    hello = {b"PLAIN": command(b"HELLO", b"\x04user\x04pass")}.get(mechanism, ready(b"DEALER"))
    with Speaker(secured.address) as stranger:
        stranger.say(greeting(mechanism), hello, frame(b"hello"))
        assert stranger.cut_off()


@pytest.fixture(scope="module")
def guarded(clusters) -> Iterator[LocalCluster]:
    with LocalCluster(1, listen="127.0.0.1") as cluster:
        yield cluster


def refused(cluster: LocalCluster, says: str, **keys: bytes) -> None:
    """A client with the cluster's connection file and other keys is told so, and others go on."""
    with pytest.raises(errors.Refused, match=says) as raised:
        Client(from_afar(cluster.file, **{name: key.decode() for name, key in keys.items()}))
    assert "get the present one" in str(raised.value)
    with Client(cluster) as client:
        assert client.submit(abs, -1).result(timeout=60) == 1


def test_07_the_wrong_server_key_is_told(guarded: LocalCluster):
    refused(guarded, "server key mismatch", server_key=zmq.curve_keypair()[0])


def test_08_an_unknown_client_key_is_told(guarded: LocalCluster):
    public, secret = zmq.curve_keypair()
    refused(guarded, "does not know this side's key", client_public=public, client_secret=secret)


def test_09_without_an_authenticator_what_comes_in_is_dropped_and_not_answered(monkeypatch: pytest.MonkeyPatch):
    """libzmq lets everybody in then. And the broker ends when it sees that nobody new can be let in (broker.py)."""
    context, keys = sockets.context(), new_keys()
    router, addresses = sockets.bind_router(context, [TCP], keys)
    public, secret = zmq.curve_keypair()
    with router, sockets.connect_dealer(context, addresses, Keys(keys.server_public, public, secret)) as stranger:
        stranger.send(b"ZQ\x01\x00")
        assert router.poll(SOON_MS)
        broker = Broker.__new__(Broker)
        broker._keyring = Keyring()
        broker._intake = Intake(1 << 40)
        event = broker._event(router.recv_multipart(copy=False))
        assert isinstance(event, Malformed)
        assert (event.reason, event.answer) == ("no authenticated sender", None)
        assert event.sender == "127.0.0.1"
    context.term()


@pytest.mark.parametrize(
    "said",
    [
        command(b"HELLO", bytes(194)[:100]),
        command(b"HELLO", bytes(195)),
        command(b"HELLO", bytes(194)),
        command(b"INITIATE", bytes(300)),
        command(b"READY", b""),
        b"\x04\xff" + bytes(20),
        b"\x06" + b"\xff" * 8,
        command(b"HELLO", bytes(194)) + command(b"INITIATE", bytes(40)),
    ],
    ids=["short HELLO", "long HELLO", "empty HELLO", "INITIATE first", "READY", "cut", "2**64", "short INITIATE"],
)
def test_10_a_handshake_that_is_not_one_is_cut_off(secured: Secured, said: bytes):
    with Speaker(secured.address) as stranger:
        stranger.say(greeting(b"CURVE"), said)
        stranger.hears(64)
        stranger.socket.shutdown(socket.SHUT_WR)
        assert stranger.cut_off()


def test_10_a_handshake_said_again_lets_nobody_in(secured: Secured):
    """All that a good client said, replayed: the server's nonces and short-term key are new each time."""
    said = recorded(secured)
    with Speaker(secured.address) as stranger:
        try:
            stranger.say(said)
        except ConnectionError:
            pass
        assert stranger.cut_off()


def recorded(secured: Secured) -> bytes:
    """What a client says until its first message is through."""
    said = b""
    host, port = secured.address.removeprefix("tcp://").split(":")
    with socket.create_server(("127.0.0.1", 0)) as between:
        address = f"tcp://127.0.0.1:{between.getsockname()[1]}"
        dealer = secured.context.socket(zmq.DEALER)
        with dealer:
            sockets._use_curve(dealer, secured.keys)
            dealer.setsockopt(zmq.LINGER, 0)
            dealer.connect(address)
            dealer.send(b"recorded")
            ours, _ = between.accept()
            with ours, socket.create_connection((host, int(port))) as theirs:
                ours.settimeout(0.02)
                theirs.settimeout(0.02)
                while not secured.router.poll(0):
                    for source, target in ((ours, theirs), (theirs, ours)):
                        try:
                            part = source.recv(1 << 16)
                        except TimeoutError:
                            continue
                        target.sendall(part)
                        said += part if source is ours else b""
                assert secured.router.recv_multipart()[1] == b"recorded"
    return said


def test_11_a_thousand_connections_at_once_and_those_who_are_there_are_served(secured: Secured):
    """10,000 are more than a test may ask of a machine; beyond the descriptors there are, they wait in the kernel."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    number = min(1_000, soft // 4)
    with sockets.connect_dealer(secured.context, [secured.address], secured.keys) as dealer:
        strangers = [Speaker(secured.address) for _ in range(number)]
        dealer.send(b"still here")
        assert secured.router.poll(SOON_MS)
        identity, body = secured.router.recv_multipart()
        assert body == b"still here"
        secured.router.send_multipart([identity, b"and served"])
        assert dealer.poll(SOON_MS)
        assert dealer.recv() == b"and served"
        for stranger in strangers:
            assert stranger.cut_off()
            stranger.socket.close()


class Reader:
    """A broker's router on a Unix socket, and the broker's own way from frames to events."""

    def __init__(self, context: sockets.Context, address: str) -> None:
        self.address = address
        self.router, _ = sockets.bind_router(context, [address], None)
        self.broker = Broker.__new__(Broker)
        self.broker._keyring = None

    def event(self) -> object:
        assert self.router.poll(SOON_MS)
        return self.broker._event(self.router.recv_multipart(copy=False))

    def reads(self, *frames: bytes) -> object:
        """What a DEALER's message of these frames is to the broker."""
        with Speaker(self.address) as speaker:
            speaker.say(greeting(), ready(b"DEALER"))
            speaker.hears(64)
            last = len(frames) - 1
            speaker.say(*(frame(body, more=index < last) for index, body in enumerate(frames)))
            return self.event()


@pytest.fixture
def reader() -> Iterator[Reader]:
    directory = Path(tempfile.mkdtemp(prefix="zs-", dir="/tmp"))
    context = sockets.context()
    made = Reader(context, ipc_address(directory, "work"))
    yield made
    made.router.close(linger=0)
    context.term()
    shutil.rmtree(directory)


@pytest.mark.parametrize("kind", [b"PUB", b"SUB", b"PUSH", b"PULL", b"PAIR", b"STREAM", b"", b"DEALER\0"])
def test_12_a_socket_of_another_type_is_cut_off(reader: Reader, kind: bytes):
    with Speaker(reader.address) as stranger:
        stranger.say(greeting(), ready(kind), frame(b"hello"))
        assert stranger.cut_off()
    assert not reader.router.poll(0)
    assert isinstance(reader.reads(b"ZQ"), Malformed)


@pytest.mark.parametrize("kind", [b"REQ", b"ROUTER"])
def test_12_a_socket_that_a_router_talks_to_sends_frames_that_are_no_message(reader: Reader, kind: bytes):
    """libzmq lets these in: their empty delimiter, or routing id, is no header of ours."""
    header = bytes(encode(Envelope(1, 1, 0, Ack()))[0])
    with Speaker(reader.address) as stranger:
        stranger.say(greeting(), ready(kind))
        stranger.hears(64)
        stranger.say(frame(b"", more=True), frame(header))
        assert isinstance(reader.event(), Malformed)
    assert isinstance(reader.reads(header), Arrived)


def test_13_an_empty_frame_is_no_message(reader: Reader):
    assert isinstance(reader.reads(b""), Malformed)
    assert isinstance(reader.reads(b"", b""), Malformed)


def test_22_too_many_frames_and_too_large_a_header(reader: Reader):
    assert isinstance(reader.reads(*[b"x"] * 1_025), Malformed)
    assert isinstance(reader.reads(b"ZQ\x01\x00" + bytes(4 * 1024 * 1024)), Malformed)


def test_24_a_frame_over_the_limit_cuts_the_link_and_others_go_on(reader: Reader):
    with Speaker(reader.address) as stranger:
        stranger.say(greeting(), ready(b"DEALER"))
        stranger.hears(64)
        stranger.say(b"\x02" + ((1 << 30) + 2_000).to_bytes(8, "big"))
        assert stranger.cut_off()
    assert not reader.router.poll(0)
    assert isinstance(reader.reads(b"ZQ"), Malformed)


def test_23_a_message_without_end_is_not_read_and_delays_nobody(reader: Reader):
    """libzmq hands over whole messages only. What it has gathered is freed with the connection."""
    with Speaker(reader.address) as stranger:
        stranger.say(greeting(), ready(b"DEALER"))
        stranger.hears(64)
        for _ in range(100):
            stranger.say(frame(bytes(10_000), more=True))
        assert isinstance(reader.reads(b"ZQ"), Malformed)
    assert not reader.router.poll(100)


def test_42_two_connections_can_not_claim_one_routing_id(reader: Reader):
    """No handover: the second that asks for a taken id is not served under it; and a message says itself whose it is."""
    named = command(b"READY", b"\x0bSocket-Type\x00\x00\x00\x06DEALER\x08Identity\x00\x00\x00\x04mine")
    with Speaker(reader.address) as first, Speaker(reader.address) as second:
        first.say(greeting(), named)
        first.hears(64)
        first.say(frame(b"ZQ one"))
        assert reader.event().peer == b"mine"  # type: ignore[attr-defined]
        second.say(greeting(), named, frame(b"ZQ two"))
        assert not reader.router.poll(100)
        first.say(frame(b"ZQ three"))
        assert reader.event().peer == b"mine"  # type: ignore[attr-defined]


def test_45_subscriptions_by_the_thousand_and_a_topic_of_a_mebibyte():
    """To the facts' socket, from one who is let in: nobody gets a topic of his own, and the others hear as ever."""
    directory = Path(tempfile.mkdtemp(prefix="zs-", dir="/tmp"))
    context = sockets.context()
    facts = Facts(context, [ipc_address(directory, "status")], None)
    offences: list[Malformed] = []
    with Speaker(facts.addresses[0]) as greedy, sockets.connect_sub(context, facts.addresses, None) as honest:
        greedy.say(greeting(), ready(b"SUB"))
        greedy.hears(64)

        def heard() -> bool:
            offences.extend(facts.publish(Fact("counts", "lab")))
            return bool(honest.poll(10))

        topics = [b"topic %d" % number for number in range(2 * MAX_SUBSCRIPTIONS)]
        saying = threading.Thread(target=greedy.say, args=[frame(b"\x01" + topic) for topic in topics])
        saying.start()
        eventually(lambda: heard() and not saying.is_alive())
        assert eventually(lambda: heard() and len(offences) > MAX_SUBSCRIPTIONS)
        assert {offence.reason for offence in offences} <= {
            "subscription to a topic", "too many subscriptions to facts: all were cut off"
        }  # fmt: skip
        assert "too many subscriptions to facts: all were cut off" in {offence.reason for offence in offences}
        greedy.say(frame(b"\x01" + bytes(1 << 20))[:600])
        assert greedy.cut_off()
        assert heard()
    facts.close()
    context.term()
    shutil.rmtree(directory)


def test_45_and_facts_are_for_those_whose_key_is_good():
    context, keyring = sockets.context(), Keyring()
    authenticator = Authenticator(context, keyring.users)
    authenticator.start()
    facts = Facts(context, [TCP], keyring)
    pair = keyring._current["observer"]
    keys = Keys(keyring.keys.server_public, pair.public.encode(), pair.secret.encode())
    with sockets.connect_sub(context, facts.addresses, keys) as observer:

        def heard() -> list[Malformed] | None:
            offences = facts.publish(Fact("counts", "lab"))
            return offences if observer.poll(10) else None

        assert eventually(lambda: heard() is not None)
        authenticator.admit({})
        keyring.revoke(["observer"])
        facts.cut_off()
        while observer.poll(100):
            observer.recv_multipart()
        for _ in range(20):
            assert heard() is None
    authenticator.stop()
    public, secret = sockets.key_pair()  # now libzmq lets everybody in
    rogue = Keys(keys.server_public, public, secret)
    with sockets.connect_sub(context, facts.addresses, rogue) as observer:
        (offence,) = eventually(lambda: facts.publish(Fact("counts", "lab")))
        assert offence.reason == "subscription: no authenticated sender"
        assert not observer.poll(100)
    facts.close()
    context.term()
