"""What a connection has brought since its last message is counted, and too much of it ends the connection. These are plain
connections, as it is the kernel that counts; a broker under attack is in ``test_attacks.py``."""

import contextlib
import os
import resource
import socket
from collections.abc import Iterator

import pytest
from conftest import PATIENCE_S

from zmqsched import intake
from zmqsched.intake import MEMORY_PER_BYTE, Intake

MIB = 1 << 20
PLENTY = 1 << 50


class Peer:
    """Both ends of a connection, in this process."""

    def __init__(self, server: socket.socket) -> None:
        self.far = socket.create_connection(server.getsockname())
        self.near, _ = server.accept()
        self.far.settimeout(PATIENCE_S)
        self.near.settimeout(PATIENCE_S)

    def get(self, _: int) -> int:
        """As a frame of it says where it came from."""
        return self.near.fileno()

    def brings(self, size: int) -> None:
        """Returns when all of it was taken in, as libzmq takes it in."""
        for _ in range(size // MIB):
            self.far.sendall(bytes(MIB))
            left = MIB
            while left:
                left -= len(self.near.recv(left))

    def cut_off(self) -> bool:
        """Then this end is closed, as libzmq would."""
        said = self.far.recv(1)
        self.near.close()
        return said == b""

    def close(self) -> None:
        self.far.close()
        self.near.close()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    monkeypatch.setattr(intake, "LARGEST", 3 * MIB)
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


@pytest.fixture
def peer(server: socket.socket) -> Iterator[Peer]:
    peer = Peer(server)
    yield peer
    peer.close()


@pytest.fixture
def other(server: socket.socket) -> Iterator[Peer]:
    peer = Peer(server)
    yield peer
    peer.close()


def test_who_brings_more_than_any_message_takes_is_ended_and_nobody_else(peer: Peer, other: Peer):
    watched = Intake(PLENTY)
    peer.brings(2 * MIB)
    other.brings(2 * MIB)
    assert watched.look() == []
    peer.brings(2 * MIB)
    (offence,) = watched.look()
    assert (offence.reason, offence.sender) == ("message without an end", "127.0.0.1")
    assert peer.cut_off()
    other.brings(MIB)
    assert watched.look() == []


def test_what_was_a_message_is_not_held_against_anybody(peer: Peer):
    watched = Intake(PLENTY)
    for _ in range(10):
        peer.brings(2 * MIB)
        watched.heard(peer)
        assert watched.look() == []
        peer.brings(MIB)
        assert watched.look() == []


def test_a_descriptor_that_is_used_again_is_another_connection(peer: Peer, other: Peer):
    watched = Intake(PLENTY)
    peer.brings(4 * MIB)
    watched.heard(peer)
    assert watched.look() == []
    other.brings(4 * MIB)
    os.dup2(other.near.fileno(), peer.near.fileno())
    other.near.close()
    (offence,) = watched.look()
    assert offence.sender == "127.0.0.1"
    assert other.cut_off()


def test_when_memory_is_short_who_brings_most_is_ended_until_that_is_not_the_cause(
    peer: Peer, other: Peer, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(intake, "resident", lambda pid: 2 * MEMORY_PER_BYTE * 5 * MIB // 2)
    watched = Intake(MIB)
    other.brings(MIB)
    assert watched.look() == [], "it is not the cause"
    peer.brings(2 * MIB)
    assert Intake(PLENTY).look() == [], "memory is not short"
    assert len(watched.look()) == 1
    assert peer.cut_off()
    other.brings(MIB)
    assert watched.look() == []


def test_who_left_by_himself_is_not_looked_at(peer: Peer):
    watched = Intake(PLENTY)
    peer.brings(4 * MIB)
    peer.close()
    assert watched.look() == []


def test_a_descriptor_that_is_none_any_more_is_left_alone(peer: Peer, monkeypatch: pytest.MonkeyPatch):
    """libzmq may close one between two questions."""
    found = Intake(PLENTY)._unfinished()
    gone = max(descriptor for _, descriptor in found) + 1_000
    monkeypatch.setattr(Intake, "_unfinished", lambda self: [(4 * MIB, gone)])
    (offence,) = Intake(PLENTY).look()
    assert offence.sender == "somebody who left"


def test_when_no_descriptor_is_left_it_is_counted_all_the_same(peer: Peer):
    watched = Intake(PLENTY)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    last = max(map(int, os.listdir("/proc/self/fd")))
    free = []
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (last + 1, limits[1]))
        with contextlib.suppress(OSError):
            while True:
                free.append(os.open("/dev/null", os.O_RDONLY))
        assert watched.look() == []
        peer.brings(4 * MIB)
        (offence,) = watched.look()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        for descriptor in free:
            os.close(descriptor)
    assert offence.sender == "127.0.0.1"
    assert peer.cut_off()
