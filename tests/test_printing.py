"""The client's side of what tasks print: what the log keeps, what the screen shows and when."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zmqsched.printing import (
    ALL_BURST,
    LOG_BYTES,
    MAX_LINE,
    NOTE_EVERY_S,
    PARTIAL_S,
    REWRITTEN_S,
    TASK_BURST,
    TASK_RATE,
    Log,
    News,
    Screen,
    Source,
)  # fmt: skip
from zmqsched.protocol import Options, Shape, Words, tag_of

TASK = bytes(15) + b"\7"


def words(text: bytes, at: int = 0, lines: int = 0, *, stream: int = 1, attempt: int = 1) -> Words:
    return Words(TASK, attempt, 1, stream, at, lines, text)


# --- the log --------------------------------------------------------------------------------------------------------------


def test_a_log_has_both_streams_in_the_order_they_came():
    log = Log()
    for each in (words(b"a\n"), words(b"b\n", stream=2), words(b"c\n", 2, 1)):
        log.add(each)
    assert log.text() == "a\nb\nc\n"


def test_what_is_missing_is_noted_and_counted():
    log = Log()
    log.add(words(b"begin"))
    assert log.add(words(b"end\n", 105, 7)) == News(b"end\n", 7)
    assert log.text() == "begin\n[100 bytes skipped]\nend\n"


def test_what_came_before_is_dropped():
    log = Log()
    log.add(words(b"a line\n"))
    assert log.add(words(b"a line\n")) is None
    assert log.add(words(b"line\nand", 2)) == News(b"and", 0)
    assert log.text() == "a line\nand"


def test_a_text_left_out_at_the_end_is_noted():
    log = Log()
    log.add(words(b"a\n"))
    log.add(words(b"", 1_000, 30))
    assert log.text() == "a\n[998 bytes skipped]\n"


def test_gaps_one_after_the_other_are_one():
    log = Log()
    for number in range(1, 1_000):
        log.add(words(b"", number * 10, number))
    assert log.text() == "[9990 bytes skipped]\n"
    assert len(log._pieces) == 1


def test_attempts_follow_each_other_and_the_former_is_not_heard_again():
    log = Log()
    log.add(words(b"one"))
    log.add(words(b"two\n", attempt=2))
    assert log.add(words(b" more of one", 3)) is None
    assert log.text() == "one\n[attempt 2]\ntwo\n"


def test_only_the_end_is_kept_and_begins_with_a_whole_character():
    log = Log()
    text = "x\u4e2d" * LOG_BYTES
    data = text.encode()
    for start in range(0, len(data), 1_000):
        log.add(words(data[start : start + 1_000], start))
    head, _, kept = log.text().partition("\n")
    assert "\ufffd" not in kept
    assert text.endswith(kept)
    assert LOG_BYTES - 3 <= len(kept.encode()) <= LOG_BYTES
    assert head == f"[{len(data) - len(kept.encode())} bytes skipped]"


@given(st.lists(st.tuples(st.sampled_from([1, 2]), st.binary(max_size=9)), max_size=20))
def test_each_stream_is_whole_whatever_comes_between(parts):
    """Bytes of one stream never mix with those of the other: a character cut in two is put together."""
    log = Log()
    at = {1: 0, 2: 0}
    for stream, data in parts:
        log.add(words(data, at[stream], stream=stream))
        at[stream] += len(data)
    whole = [b"".join(data for number, data in parts if number == stream).decode(errors="replace") for stream in (1, 2)]
    assert sorted(log.text()) == sorted("".join(whole))


# --- the screen --------------------------------------------------------------------------------------------------------

OUT = Source("fit-7", "n1/2", 1)


class Shows:
    """A screen, and what was written on it."""

    def __init__(self) -> None:
        self.screen = Screen()
        self.now = 100.0
        self.lines: list[str] = []

    def says(self, text: bytes, source: Source = OUT, skipped: int = 0) -> None:
        self._write(self.screen.add(source, News(text, skipped), None, self.now))

    def passes(self, seconds: float) -> None:
        until = self.now + seconds
        while (due := self.screen.due()) <= until:
            self.now = max(self.now, due)
            self._write(self.screen.late(self.now))
        self.now = until

    def ends(self) -> None:
        self._write(self.screen.late(self.now, all_of_it=True))

    def _write(self, shown) -> None:
        self.lines += [line for each in shown for line in each.text.splitlines()]


def test_each_line_says_who_and_where():
    shows = Shows()
    shows.says(b"one\ntwo\n")
    assert shows.lines == ["[fit-7 n1/2] one", "[fit-7 n1/2] two"]


def test_a_line_in_pieces_is_one():
    shows = Shows()
    shows.says(b"one ")
    shows.passes(PARTIAL_S / 2)
    shows.says(b"line\n")
    shows.passes(10)
    assert shows.lines == ["[fit-7 n1/2] one line"]


def test_what_waits_too_long_for_its_end_is_shown():
    shows = Shows()
    shows.says(b"Loading...")
    shows.passes(PARTIAL_S - 0.01)
    assert shows.lines == []
    shows.passes(0.02)
    assert shows.lines == ["[fit-7 n1/2] Loading..."]
    shows.says(b" done\n")
    assert shows.lines[1:] == ["[fit-7 n1/2]  done"]


def test_what_is_left_at_the_end_is_shown():
    shows = Shows()
    shows.says(b"no end")
    shows.ends()
    assert shows.lines == ["[fit-7 n1/2] no end"]


def test_a_line_that_never_ends_is_cut():
    shows = Shows()
    shows.says(b"x" * (MAX_LINE + 1))
    assert shows.lines == ["[fit-7 n1/2] " + "x" * (MAX_LINE + 1)]


def test_a_bar_that_rewrites_itself_is_shown_now_and_then():
    shows = Shows()
    for percent in range(100):
        shows.says(b"\r%d %%" % percent)
        shows.passes(0.1)
    shows.says(b"\r100 %\n")
    assert 1 < len(shows.lines) <= 10 / REWRITTEN_S + 1
    assert shows.lines[-1] == "[fit-7 n1/2] 100 %"


@pytest.mark.parametrize(
    ("raw", "readable"),
    [
        (b"\x1b[31mred\x1b[0m", "\x1b[31mred\x1b[0m"),
        (b"\x1b[2J\x1b[Hgone\x07", "gone"),
        (b"tab\tnul\0\r", "tab\tnul"),
        (b"\xff\xfe", "\ufffd\ufffd"),
        (b"1 %\r2 %", "2 %"),
    ],
)
def test_a_screen_is_shown_text_and_colours(raw, readable):
    shows = Shows()
    shows.says(raw + b"\n")
    assert shows.lines == [f"[fit-7 n1/2] {readable}"]


def test_a_flood_is_shown_in_part_and_counted():
    shows = Shows()
    for _ in range(100):
        shows.says(b"line\n" * 1_000, skipped=9_000)
        shows.passes(0.1)
    shows.passes(2 * NOTE_EVERY_S)
    notes = [line for line in shows.lines if "not shown; future.log() has the end]" in line]
    hidden = sum(int(note.split()[1].replace(",", "")) for note in notes)
    assert hidden + len(shows.lines) - len(notes) == 1_000_000
    assert len(shows.lines) <= TASK_BURST + 10 * TASK_RATE + 12
    assert notes[0].startswith("[fit-7: ")


def test_who_floods_does_not_hide_the_others():
    shows = Shows()
    for _ in range(100):
        shows.says(b"line\n" * 10_000)
        shows.says(b"a word\n", Source("quiet-8", "n1/1", 1))
        shows.passes(0.1)
    assert shows.lines.count("[quiet-8 n1/1] a word") == 100


def test_of_very_many_tasks_it_is_said_in_one_line():
    shows = Shows()
    for number in range(10_000):
        shows.says(b"a word\n", Source(f"t-{number}", "n1/1", 1))
    assert len(shows.lines) == ALL_BURST
    shows.passes(2 * NOTE_EVERY_S)
    assert shows.lines[-1] == "[7,000 lines of 7,000 tasks not shown; future.log() has the end of each]"


def test_who_has_been_quiet_is_forgotten():
    shows = Shows()
    for number in range(10_000):
        shows.says(b"a word\n", Source(f"t-{number}", "n1/1", 1))
        shows.passes(0.01)
    assert len(shows.screen._buckets) <= 1_000


@pytest.mark.parametrize(
    ("shape", "tag"),
    [
        (Shape(bytes(16), label="module.fit"), "fit-7"),
        (Shape(bytes(16), label="<lambda>"), "lambda-7"),
        (Shape(bytes(16), label="f.<locals>.<lambda>"), "lambda-7"),
        (Shape(bytes(16), Options(name="training"), label="fit"), "training-7"),
        (Shape(bytes(16), Options(name="\x1b[2J\n" + "x" * 100)), "?[2J?" + "x" * 35 + "-7"),
        (Shape(bytes(16)), "task-7"),
        (None, "task-7"),
    ],
)
def test_a_tag_is_short_and_printable(shape, tag):
    assert tag_of(TASK, shape) == tag
