"""Given two ends of a pipe, whole messages come out as they went in, and each exactly once."""

from __future__ import annotations

import gc
import os
import socket
from collections.abc import Iterator

import pytest

from zmqsched.pipes import DATAGRAM_MAX, Pipe, pair


@pytest.fixture
def ends() -> Iterator[tuple[Pipe, Pipe]]:
    left, right = pair()
    yield left, right
    left.close()
    right.close()


def through(ends: tuple[Pipe, Pipe], frames: list) -> list[bytes]:
    assert ends[0].send(frames)
    received = ends[1].receive()
    assert received is not None
    return [bytes(frame) for frame in received]


def open_descriptors() -> int:
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize(
    "sizes",
    [
        [0],
        [1],
        [DATAGRAM_MAX],
        [DATAGRAM_MAX + 1],
        [10, 0],
        [0, 0, 0],
        [10, 100, 1000],
        [10, DATAGRAM_MAX - 10],
        [10, DATAGRAM_MAX - 9],
        [100, 3_000_001, 0, 63, 64, 65],
        [200_000, 0],
        [1] * 1024,
        [500] * 1024,
    ],
)
def test_frames_arrive_as_they_were_sent(ends, sizes):
    frames = [os.urandom(size) for size in sizes]
    assert through(ends, frames) == frames


@pytest.mark.parametrize("kind", [bytearray, memoryview])
@pytest.mark.parametrize("size", [10, 1_000_000])
def test_any_buffer_is_a_frame(ends, kind, size):
    assert through(ends, [kind(b"x" * size)]) == [b"x" * size]


def test_a_frame_of_wider_items_is_sent_as_bytes(ends):
    assert through(ends, [memoryview(b"12345678").cast("Q"), b"z"]) == [b"12345678", b"z"]


def test_small_messages_stay_valid_while_later_ones_arrive(ends):
    ends[0].send([b"first"])
    ends[0].send([b"second", b"bulk"])
    ends[0].send([b"third", b"more"])
    first, second, third = (ends[1].receive() for _ in range(3))
    assert first == [b"first"]
    assert second == [b"second", b"bulk"]
    assert third == [b"third", b"more"]


@pytest.mark.parametrize("size", [1_000, 1_000_000])
def test_bulk_frames_are_writable(ends, size):
    ends[0].send([b"head", b"x" * size])
    received = ends[1].receive()
    assert received is not None
    view = memoryview(received[1])
    assert not view.readonly
    view[0:1] = b"y"


def test_mapped_frames_are_aligned(ends):
    numpy = pytest.importorskip("numpy")
    ends[0].send([b"head", b"a" * 100_001, b"b" * 100_000])
    received = ends[1].receive()
    assert received is not None
    assert [numpy.frombuffer(frame, "u1").ctypes.data % 64 for frame in received] == [0, 0, 0]


def test_messages_keep_their_order_whatever_their_form(ends):
    messages = [[b"1"], [b"2", b"x" * 300_000], [b"3", b"y"], [b"4"]]
    for message in messages:
        ends[0].send(message)
    assert [[bytes(frame) for frame in ends[1].receive() or ()] for _ in messages] == messages


def test_nothing_there_is_not_the_end(ends):
    with pytest.raises(BlockingIOError):
        ends[1].receive(wait=False)


def test_the_end_comes_after_everything_sent(ends):
    ends[0].send([b"last"])
    ends[0].close()
    assert ends[1].receive() == [b"last"]
    assert ends[1].receive() is None
    assert ends[1].receive(wait=False) is None


@pytest.mark.parametrize("wait", [True, False])
@pytest.mark.parametrize("frames", [[b"x"], [b"x", b"y"], [b"x" * 1_000_000]])
def test_sending_to_a_closed_end_raises(ends, wait, frames):
    ends[0].send([b"never read"])
    ends[1].close()
    with pytest.raises(BrokenPipeError):
        ends[0].send(frames, wait=wait)


def test_an_end_that_left_without_reading_reads_as_the_end(ends):
    ends[0].send([b"never read"])
    ends[1].send([b"sent before"])
    ends[1].close()
    assert ends[0].receive() == [b"sent before"]
    assert ends[0].receive() is None


@pytest.mark.parametrize("frames", [[b"x" * 1000], [b"x", b"y" * 1000], [b"x" * 200_000]])
def test_a_full_pipe_refuses_without_losing_or_duplicating(ends, frames):
    before = open_descriptors()
    sent = 0
    while ends[0].send(frames, wait=False):
        sent += 1
    assert sent > 10
    for _ in range(sent):
        assert [bytes(frame) for frame in ends[1].receive(wait=False) or ()] == frames
    with pytest.raises(BlockingIOError):
        ends[1].receive(wait=False)
    assert ends[0].send(frames, wait=False)
    assert open_descriptors() == before


def test_a_copy_of_an_end_takes_messages_back_exactly_once(ends):
    copy = Pipe(socket.socket(fileno=os.dup(ends[1].fileno())))
    for number in range(4):
        ends[0].send([b"%d" % number])
    assert ends[1].receive() == [b"0"]
    assert copy.receive(wait=False) == [b"1"]
    assert copy.receive(wait=False) == [b"2"]
    assert ends[1].receive() == [b"3"]
    with pytest.raises(BlockingIOError):
        copy.receive(wait=False)
    copy.close()


def test_not_waiting_does_not_change_how_the_copy_waits(ends):
    copy = Pipe(socket.socket(fileno=os.dup(ends[1].fileno())))
    with pytest.raises(BlockingIOError):
        copy.receive(wait=False)
    assert os.get_blocking(ends[1].fileno())
    copy.close()


def test_no_descriptor_is_left_behind(ends):
    before = open_descriptors()
    for _ in range(20):
        through(ends, [b"head", b"x" * 500_000])
    assert open_descriptors() == before


def test_an_unread_big_message_leaves_nothing_behind():
    before = open_descriptors()
    left, right = pair()
    left.send([b"x" * 1_000_000])
    left.close()
    right.close()
    assert open_descriptors() == before
