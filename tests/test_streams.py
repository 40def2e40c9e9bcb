"""A worker's streams: each byte is told as that of the task that wrote it, wherever reads cut and whenever tasks end.

The worker is played here, by the rules that ``Voice`` keeps, so that its steps and the node's can be put in any order.
"""

import contextlib
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zmqsched import streams as module
from zmqsched.protocol import Done
from zmqsched.streams import _READING, _RUNS, EVERY_S, KEPT, RATE, Streams

KB64 = 64 * 1024


class Played:
    """A worker and its node."""

    def __init__(self) -> None:
        self.streams = Streams(3)
        self.now = 100.0
        self.told: dict[int, dict[int, bytes]] = {}  # by task and stream
        self.nobodys = b""
        self.task = 0

    def begins(self, task: int) -> None:
        self.task = task
        _RUNS.pack_into(self.streams._page, 0, self._id(task), 1)

    def writes(self, data: bytes, stream: int = 1) -> None:
        assert os.write(self.streams._theirs[stream - 1].fileno(), data) == len(data)

    def ends(self) -> Done:
        """It marks the end if something is unread; the answer is on its way."""
        wrote = bool(self.streams._unread.poll(0, 1)) or self.streams._page[_READING] == 1
        if wrote:
            for stream in (1, 2):
                self.writes(self.streams._mark + _RUNS.pack(self._id(self.task), 1), stream)
        return Done(self._id(self.task), 1, True, b"", 0.0, wrote=wrote)

    def reads(self) -> None:
        self.streams.read()

    def hears(self, done: Done) -> None:
        """The node has the answer; what the task has printed is to be known now."""
        self.streams.answered(done)
        self.takes()

    def takes(self) -> None:
        self.now += 1.0
        for words in self.streams.take(self.now):
            task, stream = int.from_bytes(words.task, "big"), words.stream
            before = self.told.setdefault(task, {}).get(stream, b"")
            assert (words.at, words.lines, words.worker) == (len(before), before.count(b"\n"), 3)
            self.told[task][stream] = before + words.text
        self.nobodys += self.streams.take_unclaimed()

    @staticmethod
    def _id(task: int) -> bytes:
        return task.to_bytes(16, "big")


@contextlib.contextmanager
def played():
    here = Played()
    try:
        yield here
    finally:
        here.streams.close()


steps = st.lists(
    st.one_of(
        st.tuples(st.just("writes"), st.sampled_from([1, 2]), st.binary(max_size=60)),
        st.sampled_from(["ends", "reads", "hears", "takes"]).map(lambda what: (what,)),
    ),
    max_size=60,
)


@settings(deadline=None, max_examples=300)
@given(steps, st.integers(20, 200))
def test_whatever_the_order(order, chunk):
    """Reads of a few bytes cut marks in pieces. What a task wrote is known, all of it, when its answer is."""
    with pytest.MonkeyPatch.context() as patch, played() as here:
        patch.setattr(module, "_CHUNK", chunk)
        patch.setattr(module, "_MAX_READS", 1_000)  # as many as make up for it
        wrote: dict[int, dict[int, bytes]] = {}
        answers: list[Done] = []
        here.begins(1)
        for what, *how in [*order, ("ends",), *[("hears",)] * 60]:
            if what == "writes":
                stream, data = how
                here.writes(data, stream)
                mine = wrote.setdefault(here.task, {})
                mine[stream] = mine.get(stream, b"") + data
            elif what == "ends":
                answers.append(here.ends())
                here.begins(here.task + 1)
            elif what == "hears" and answers:
                done = answers.pop(0)
                here.hears(done)
                task = int.from_bytes(done.task, "big")
                said = {stream: data for stream, data in wrote.get(task, {}).items() if data}
                assert here.told.get(task, {}) == said
            elif what == "reads":
                here.reads()
            elif what == "takes":
                here.takes()
        assert here.nobodys == b""


def test_while_the_node_reads_a_task_marks_its_end():
    """It cannot know whether its bytes were read before or after the node has looked who runs."""
    with played() as here:
        here.begins(1)
        here.streams._page[_READING] = 1
        assert here.ends().wrote


def test_two_tasks_that_end_while_the_node_reads(monkeypatch):
    """The second begins after the first look, writes before the second, and ends after that."""
    with played() as here:
        here.begins(1)
        answers = []
        looks = 0
        read, second = here.streams._read, here.streams._streams[1]

        def reads_and_then(stream):
            nonlocal looks
            if stream is second:
                looks += 1
            if stream is not second and looks == 1:
                here.writes(b"of the second")
            size = read(stream)
            if stream is second and looks < 3:
                answers.append(here.ends())
                here.begins(looks + 1)
            return size

        monkeypatch.setattr(here.streams, "_read", reads_and_then)
        here.reads()
        for done in answers:
            here.hears(done)
        assert here.told == {2: {1: b"of the second"}}


def test_a_task_that_ends_while_the_node_reads(monkeypatch):
    with played() as here:
        here.begins(1)
        here.writes(b"of the first")
        answers = []
        read = here.streams._read

        def reads_and_then(stream):
            size = read(stream)
            if size and not answers:
                answers.append(here.ends())
                here.begins(2)
                here.writes(b"of the second")
            return size

        monkeypatch.setattr(here.streams, "_read", reads_and_then)
        here.reads()
        here.hears(answers[0])
        here.takes()
        assert here.told == {1: {1: b"of the first"}, 2: {1: b"of the second"}}


def test_what_comes_between_two_tasks_is_nobodys():
    with played() as here:
        here.begins(1)
        here.writes(b"a word")
        here.reads()
        here.hears(here.ends())
        here.writes(b"late")
        here.reads()
        here.takes()
        assert (here.told, here.nobodys) == ({1: {1: b"a word"}}, b"late")


def test_what_comes_before_the_first_task_is_nobodys():
    with played() as here:
        here.writes(b"starting", 2)
        here.reads()
        assert here.streams.last_words() == "starting"
        here.takes()
        assert (here.told, here.nobodys) == ({}, b"starting")


def test_a_part_of_a_mark_that_is_none_is_text():
    with played() as here:
        here.begins(1)
        here.writes(here.streams._mark[:9])
        here.reads()
        here.takes()
        assert here.told == {1: {1: here.streams._mark[:9]}}


def test_of_a_flood_the_end_is_kept_and_what_was_dropped_is_counted():
    with played() as here:
        here.begins(1)
        for number in range(100):
            here.writes(b"%05d\n" % number * 5_000)
            here.reads()
        here.reads()
        [words] = here.streams.take(here.now)
        assert (len(words.text), words.at + len(words.text), words.lines) == (KEPT, 100 * 30_000, words.at // 6)
        assert words.text.endswith(b"00099\n")


def test_a_task_that_runs_is_told_of_so_much_a_second():
    with played() as here:
        here.begins(1)
        told = 0
        for _ in range(100):
            for _ in range(4):
                here.writes(b"x" * KB64)
                here.reads()
            here.now += 0.1
            if here.streams.due() <= here.now:
                told += sum(len(words.text) for words in here.streams.take(here.now))
        assert told <= 11 * RATE + KEPT
        assert told > 8 * RATE


def test_what_has_ended_waits_for_no_allowance():
    with played() as here:
        for task in range(1, 50):
            here.begins(task)
            here.writes(b"x" * KB64)
            here.reads()
            here.streams.answered(here.ends())
            assert here.streams.due() == 0.0
            assert sum(len(words.text) for words in here.streams.take(here.now)) == KB64


def test_a_first_word_is_told_at_once_and_the_next_soon():
    with played() as here:
        here.begins(1)
        here.writes(b"one")
        here.reads()
        assert here.streams.due() <= here.now
        here.streams.take(here.now)
        here.writes(b"two")
        here.reads()
        assert here.streams.due() == pytest.approx(here.now + EVERY_S)


def test_both_streams_are_told_in_the_order_they_came():
    with played() as here:
        here.begins(1)
        for stream, text in ((1, b"a"), (2, b"b"), (1, b"c"), (1, b"d")):
            here.writes(text, stream)
            here.reads()
        assert [(words.stream, words.text) for words in here.streams.take(here.now)] == [(1, b"a"), (2, b"b"), (1, b"cd")]
