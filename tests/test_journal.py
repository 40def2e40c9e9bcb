"""The journal's file, with a real SQLite: what is read is what was written, and never more than what was on disk.

Damage is in ``bad_input/test_journal_files.py``.
"""

from __future__ import annotations

import select
import shutil
import sqlite3
import stat
from pathlib import Path

import pytest
from core.builders import digest, task_id, token
from journals import commit, news_of, opened, read, settled, shape

from zmqsched import journal as module
from zmqsched.config import journal_path
from zmqsched.core.events import Troubled, Write, Written
from zmqsched.errors import JournalError
from zmqsched.journal import Journal
from zmqsched.protocol import (
    Charged,
    Final,
    Finals,
    Forgotten,
    Function,
    Functions,
    GroupAdd,
    Left,
    Present,
    Record,
    Submit,
    TaskSpec,
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "lab.journal"


EVERY_KIND = [
    Record(b"", Functions([Function(digest("f"), b"code"), Function(digest("g"), [b"large " * 9_000, b"code"])])),
    Record(
        b"cann", Submit([shape()], [TaskSpec(task_id("a"), 0, b"call"), TaskSpec(task_id("b"), 0, [b"", bytes(9**6)])])
    ),
    Record(b"jjob", Submit([shape(job="job")], [TaskSpec(task_id("c"), 0, b"")])),
    Record(b"", Charged(task_id("a"), 3, 1, ("how it died",))),
    Record(b"ann", GroupAdd([(token("g"), -2)], 7)),
    Record(b"cann", Finals([Final(task_id("a"), "ok", [b"p", bytes(100_000)]), Final(task_id("b"), "error", b"e", "why")])),
    Record(b"", Forgotten([task_id("a")])),
    Record(b"cben", Left()),
    Record(b"", Present([token("n1"), token("n2")])),
]


def plain(record: Record) -> object:
    """To compare by: payloads are bytes, whatever holds them."""

    def flat(value: object) -> object:
        if isinstance(value, (bytes, bytearray, memoryview)):
            return bytes(value)
        if isinstance(value, (list, tuple)):
            return [flat(item) for item in value]
        fields = getattr(value, "__struct_fields__", None)
        return [type(value).__name__, *(flat(getattr(value, field)) for field in fields)] if fields else value

    return flat(record)


def test_every_kind_of_record_comes_back(path):
    with opened(path) as journal:
        settled(journal, Write(1, EVERY_KIND, False))
    with opened(path, start=False) as journal:
        assert [plain(record) for record in journal.read()] == [plain(record) for record in EVERY_KIND]


@pytest.mark.parametrize("row_bytes", [1, 7, 1_000, 10**9])
def test_a_commit_is_cut_into_rows_and_put_together_again(path, monkeypatch, row_bytes):
    monkeypatch.setattr(module, "ROW_BYTES", row_bytes)
    records = [Record(b"cann", Finals([Final(task_id(f"t{n}"), "ok", bytes(n))])) for n in range(10)]
    with opened(path) as journal:
        settled(journal, Write(1, records[:5], False))
        settled(journal, Write(2, records[5:], False))
        size = journal.bytes
    with opened(path, start=False) as journal:
        assert [plain(record) for record in journal.read()] == [plain(record) for record in records]
        assert journal.bytes == size


def test_commits_keep_their_order_and_a_broker_goes_on_where_the_last_one_ended(path):
    for broker in range(3):
        with opened(path) as journal:
            settled(journal, *[commit(f"t{broker}{n}", number=n + 1) for n in range(20)])
    assert read(path) == [f"t{broker}{n}" for broker in range(3) for n in range(20)]


def test_what_has_gathered_is_one_transaction(path, monkeypatch):
    """So many tasks share one fsync."""
    with opened(path, start=False) as journal:
        list(journal.read())
        begun: list[str] = []
        journal._db.set_trace_callback(lambda sql: begun.append(sql) if sql.startswith(("BEGIN", "COMMIT")) else None)
        for number in range(50):
            journal.write(commit(f"t{number}", number=number + 1))
        journal.start()
        news = news_of(journal, 50)
        journal._db.set_trace_callback(None)
    assert [type(each) for each in news] == [Written]
    assert begun == ["BEGIN IMMEDIATE", "COMMIT"]
    assert len(read(path)) == 50


def test_written_says_how_large_the_journal_is(path):
    with opened(path) as journal:
        (first,) = settled(journal, commit("a"))
        (second,) = settled(journal, commit("b", number=2))
        assert isinstance(first, Written)
        assert isinstance(second, Written)
        assert 0 < first.size < second.size == journal.bytes


def test_a_journal_written_anew_replaces_all_before_it_and_gives_the_room_back(path):
    with opened(path) as journal:
        for number in range(20):
            settled(journal, commit(f"t{number}", number=number + 1, size=200_000))
        settled(journal, commit("before", number=21), commit("anew", number=22, anew=True), commit("after", number=23))
        assert journal.bytes < 1_000
    assert path.stat().st_size < 200_000
    assert read(path) == ["anew", "after"]
    with opened(path) as journal:
        settled(journal, commit("again", number=1))
    assert read(path) == ["anew", "after", "again"]


def test_only_its_user_can_read_it(path):
    with opened(path) as journal:
        settled(journal, commit("a"))
        modes = {entry.name: stat.S_IMODE(entry.stat().st_mode) for entry in path.parent.iterdir()}
        assert modes == dict.fromkeys(["lab.journal", "lab.journal-wal", "lab.journal.key"], 0o600)
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_nothing_is_left_of_one_that_is_done(path):
    with opened(path, remove=True) as journal:
        settled(journal, commit("a"))
    assert [entry.name for entry in path.parent.iterdir()] == []


def test_the_directory_of_all_journals_goes_with_the_last(tmp_path, monkeypatch):
    monkeypatch.setenv("ZMQSCHED_DIR", str(tmp_path / "home"))
    one, two = journal_path("one"), journal_path("two")
    with opened(one, "one", remove=True), opened(two, "two", remove=True):
        pass
    assert not one.parent.exists()


@pytest.mark.parametrize("mode", [0o755, 0o1777])
def test_it_is_kept_where_others_may_look_but_not_write(tmp_path, mode):
    directory = tmp_path / "open"
    directory.mkdir()
    directory.chmod(mode)
    Journal(directory / "j", "lab").close(remove=False)
    assert stat.S_IMODE((directory / "j").stat().st_mode) == 0o600
    assert stat.S_IMODE(directory.stat().st_mode) == mode


def test_it_is_not_kept_where_others_may_put_files(tmp_path):
    directory = tmp_path / "open"
    directory.mkdir()
    directory.chmod(0o777)
    with pytest.raises(JournalError, match=r"others may put files into .*chmod go-w"):
        Journal(directory / "j", "lab")
    assert not list(directory.iterdir())


def test_a_directory_of_the_users_own_stays(tmp_path):
    (tmp_path / "mine").mkdir(mode=0o700)
    with opened(tmp_path / "mine" / "j", remove=True):
        pass
    assert (tmp_path / "mine").is_dir()


def test_one_that_holds_something_stays_when_it_is_closed(path):
    with opened(path) as journal:
        settled(journal, commit("a"))
    left = {entry.name for entry in path.parent.iterdir()}
    assert left == {"lab.journal", "lab.journal.key"}, "what was in the log beside it is in it"
    assert read(path) == ["a"]


def test_what_was_handed_over_before_the_end_is_written_at_the_end(path):
    with opened(path) as journal:
        for number in range(100):
            journal.write(commit(f"t{number}", number=number + 1))
    assert len(read(path)) == 100


def test_the_identity_is_kept(path):
    with opened(path, start=False) as journal:
        assert journal.identity == b""
        journal.identity = b"first"
        journal.identity = b"\0 second"
    with opened(path, start=False) as journal:
        assert journal.identity == b"\0 second"


# --- power failures -----------------------------------------------------------------------------------------------------


def test_what_was_said_to_be_written_survives_a_power_failure(path, tmp_path):
    """At each moment after an acknowledgement the files hold that commit and all before it, in order."""
    copies = []
    with opened(path) as journal:
        for number in range(1, 30):
            settled(journal, commit(f"t{number}", number=number, size=number * 300, anew=number % 7 == 0))
            copies.append(copied(path, tmp_path / f"copy{number}"))
    for number, copy in enumerate(copies, 1):
        first = max(1, number // 7 * 7)
        assert read(copy) == [f"t{n}" for n in range(first, number + 1)]


def copied(path: Path, directory: Path) -> Path:
    directory.mkdir(mode=0o700)
    for entry in path.parent.iterdir():
        shutil.copy(entry, directory)
    return directory / path.name


# --- what cannot be written now --------------------------------------------------------------------------------------------


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RETRY_S", 0.02)


class Full:
    """A connection to a disk that has no space while ``full``: at the commit, or at what the pragma asks for."""

    def __init__(self, db: sqlite3.Connection, at: str) -> None:
        self._db = db
        self.at = at
        self.full = True

    def __getattr__(self, name: str) -> object:
        return getattr(self._db, name)

    def execute(self, sql: str, *arguments: object) -> object:
        self._check(sql)
        return self._db.execute(sql, *arguments)  # type: ignore[arg-type]

    def executescript(self, sql: str) -> object:
        self._check(sql)
        return self._db.executescript(sql)

    def _check(self, sql: str) -> None:
        if self.full and sql.startswith(self.at):
            raise sqlite3.OperationalError("database or disk is full")


@pytest.mark.usefixtures("brief")
@pytest.mark.parametrize("at", ["BEGIN", "INSERT", "COMMIT"])
def test_it_is_tried_again_until_there_is_space(path, at):
    with opened(path, start=False) as journal:
        list(journal.read())
        full = journal._db = Full(journal._db, at)  # type: ignore[assignment]
        journal.start()
        journal.write(commit("a"))
        (trouble,) = news_of(journal, None)
        assert isinstance(trouble, Troubled)
        assert "full" in trouble.reason
        assert str(path) in trouble.reason
        journal.write(commit("b", number=2))
        full.full = False
        assert [each.number for each in news_of(journal, 2)] == [1, 2]  # type: ignore[union-attr]
    assert read(path) == ["a", "b"]


@pytest.mark.usefixtures("brief")
def test_room_that_cannot_be_given_back_is_no_trouble(path, monkeypatch):
    monkeypatch.setattr(module, "ROW_BYTES", 10)
    with opened(path, start=False) as journal:
        list(journal.read())
        journal._db = Full(journal._db, "PRAGMA incremental_vacuum")  # type: ignore[assignment]
        journal.write(commit("a", number=1, size=100))
        journal.write(commit("b", number=2, size=100, anew=True))
        journal.start()
        assert [type(each) for each in news_of(journal, 2)] == [Written]
        settled(journal, commit("c", number=3))
    assert read(path) == ["b", "c"]


@pytest.mark.usefixtures("brief")
def test_at_the_end_what_could_not_be_written_is_not_followed_by_what_can(path):
    """A journal is a prefix of what was handed over, also when its disk has space again at the last moment."""
    with opened(path, start=False) as journal:
        list(journal.read())
        full = journal._db = Full(journal._db, "INSERT")  # type: ignore[assignment]
        journal.start()
        journal.write(commit("a"))
        news_of(journal, None)
        journal.write(commit("b", number=2))

        def wait(_: float) -> bool:
            full.full = False
            return True

        journal._ends.wait = wait  # type: ignore[assignment, method-assign]
        journal._thread.join(0.1)
    assert read(path) in ([], ["a", "b"])


def test_its_descriptor_is_readable_when_there_is_news(path):
    with opened(path) as journal:
        assert select.select([journal], [], [], 0)[0] == []
        journal.write(commit("a"))
        assert select.select([journal], [], [], 10)[0] == [journal]
        assert len(journal.news()) == 1
        assert select.select([journal], [], [], 0)[0] == []
