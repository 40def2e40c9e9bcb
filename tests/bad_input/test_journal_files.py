"""Case 44: journals that are damaged, not ours, in use, or on a disk that is full or read-only.

Whatever was done to it, a journal gives exactly what it held, or is refused by a line that says what to do. Only what
SQLite's log beside it has lost at its end may be missing: whole commits.
"""

from __future__ import annotations

import contextlib
import os
import re
import resource
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import pytest
from journals import commit, labels, news_of, opened, read, settled

from zmqsched import journal as module
from zmqsched.broker import Broker
from zmqsched.config import cluster_dir, is_held
from zmqsched.core.events import Troubled, Written
from zmqsched.errors import JournalError
from zmqsched.journal import SCHEMA, Journal
from zmqsched.seal import Seal, key_path

ADVICE = re.compile(
    r"move it away|use the zmqsched that wrote it|of the cluster|another broker|put it elsewhere \(--journal\)|worth a copy"
)
SAMPLES = 10_000 if os.environ.get("LONG") else 300


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "lab.journal"


def filled(path: Path) -> list[str]:
    """A journal of commits of many sizes; what it holds."""
    held = [f"t{number}" for number in range(40)]
    with opened(path) as journal:
        journal.identity = b"who we are"
        settled(journal, *[commit(label, number=n + 1, size=n % 8 * 700) for n, label in enumerate(held)])
    return held


def killed(path: Path, directory: Path) -> list[str]:
    """The files that a broker leaves that was killed, in this directory; what they hold."""
    held = [f"t{number}" for number in range(40)]
    with opened(path) as journal:
        for number, label in enumerate(held):
            settled(journal, commit(label, number=number + 1, size=number % 8 * 700))
        directory.mkdir(mode=0o700)
        for entry in path.parent.iterdir():
            shutil.copy(entry, directory)
    return held


def attempt(path: Path) -> list[str] | str:
    """What it holds, or why it is refused: one line with its name that says what to do."""
    try:
        with opened(path, start=False) as journal:
            found = labels(journal)
            assert journal.identity in (b"", b"who we are")
            return found
    except JournalError as error:
        text = str(error)
        assert ADVICE.search(text), text
        assert str(path) in text
        assert "\n" not in text
        return text


def refused(path: Path, match: str, cluster: str = "lab") -> None:
    with pytest.raises(JournalError, match=match) as raised, opened(path, cluster, start=False) as journal:
        list(journal.read())
    assert ADVICE.search(str(raised.value))
    assert str(path) in str(raised.value)


def edited(path: Path, *statements: str) -> None:
    """Changed as no broker would; the rest is as SQLite wants it."""
    db = sqlite3.connect(path, isolation_level=None)
    for statement in statements:
        db.execute(statement)
    db.close()


# --- damage ------------------------------------------------------------------------------------------------------------


Damage = Callable[[bytes, Random], bytes]


def cut_off(content: bytes, random: Random) -> bytes:
    return content[: random.randrange(len(content))]


def a_bit_flipped(content: bytes, random: Random) -> bytes:
    damaged = bytearray(content)
    at = random.randrange(min(len(damaged), random.choice([120, 5_000, len(damaged)])))
    damaged[at] ^= 1 << random.randrange(8)
    return bytes(damaged)


def zeroes(content: bytes, random: Random) -> bytes:
    """A block that was never written."""
    at = random.randrange(len(content)) // 512 * 512
    return content[:at] + bytes(min(512, len(content) - at)) + content[at + 512 :]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("damage", [cut_off, a_bit_flipped, zeroes])
def test_44_a_damaged_file_is_refused_or_holds_what_it_held(path, tmp_path, damage: Damage):
    held = filled(path)
    content, random = path.read_bytes(), Random(44)
    copy = tmp_path / "copy" / "lab.journal"
    copy.parent.mkdir(mode=0o700)
    refusals = 0
    for _ in range(SAMPLES):
        for entry in copy.parent.iterdir():
            entry.unlink()
        shutil.copy(key_path(path), key_path(copy))
        copy.write_bytes(damage(content, random))
        found = attempt(copy)
        refusals += isinstance(found, str)
        assert isinstance(found, str) or found == held
    assert refusals > SAMPLES / 10, "most of the file matters"


@pytest.mark.timeout(300)
@pytest.mark.parametrize("damage", [cut_off, a_bit_flipped, zeroes])
def test_44_a_damaged_log_beside_it_gives_whole_commits_from_the_first_on(path, tmp_path, damage: Damage):
    held = killed(path, tmp_path / "killed")
    assert read(Path(shutil.copytree(tmp_path / "killed", tmp_path / "whole")) / path.name) == held
    random = Random(44)
    lengths = set()
    for number in range(SAMPLES):
        copy = Path(shutil.copytree(tmp_path / "killed", tmp_path / f"copy{number}"))
        log = copy / f"{path.name}-wal"
        log.write_bytes(damage(log.read_bytes(), random))
        found = attempt(copy / path.name)
        assert isinstance(found, str) or found == held[: len(found)]
        lengths.add(len(found) if isinstance(found, list) else -1)
        shutil.rmtree(copy)
    assert len(lengths) > 10


def test_44_a_journal_of_no_bytes(path):
    path.parent.mkdir(mode=0o700)
    path.touch(0o600)
    refused(path, r"damaged \(it is empty\)")


@pytest.mark.parametrize("content", [b"not a database, but long enough to be one" * 100, bytes(8_192), b"SQLite format 3\0"])
def test_44_a_file_that_is_no_journal(path, content):
    path.parent.mkdir(mode=0o700)
    path.write_bytes(content)
    refused(path, "damaged")
    assert path.read_bytes() == content


def test_44_a_database_that_is_no_journal(path):
    path.parent.mkdir(mode=0o700)
    edited(path, "CREATE TABLE t (x)")
    refused(path, "schema 0")


def test_44_a_directory_of_that_name(path):
    path.mkdir(parents=True, mode=0o700)
    path.parent.chmod(0o700)
    refused(path, "cannot be written")


@pytest.mark.parametrize(
    "statement",
    {
        "a row twice": "INSERT INTO log SELECT number + 100, more, crc, mac, body FROM log WHERE number = 40",
        "the last row twice": "INSERT INTO log SELECT max(number) + 1, more, crc, mac, body FROM log",
        "a row less": "DELETE FROM log WHERE number = 20",
        "the first row less": "DELETE FROM log WHERE number = 1",
        "rows exchanged": "UPDATE log SET body = (SELECT body FROM log WHERE number = 8) WHERE number = 16",
        "a commit without an end": "UPDATE log SET more = 1 WHERE number = 40",
        "bytes that are text": "UPDATE log SET body = CAST(x'6162' AS TEXT) WHERE number = 7",
        "bytes that are a number": "UPDATE log SET body = 7 WHERE number = 7",
        "a crc that is text": "UPDATE log SET crc = 'x' WHERE number = 7",
        "more that is text": "UPDATE log SET more = 'x' WHERE number = 7",
        "a beginning that is no number": "UPDATE about SET value = 'x' WHERE name = 'first'",
        "no beginning": "DELETE FROM about WHERE name = 'first'",
        "no log": "DROP TABLE log",
        "another identity": "UPDATE about SET value = x'0102030405' WHERE name = 'identity'",
    }.items(),
    ids=lambda pair: pair[0],
)
def test_44_rows_that_were_not_written_so(path, statement):
    filled(path)
    edited(path, statement[1])
    assert isinstance(found := attempt(path), str)
    assert "damaged" in found


def test_44_a_record_that_cannot_be_read(path):
    """Its bytes are those that were written: by another version, say."""
    filled(path)
    body = b"\x01\0\0\0\x03\0\0\0\0\0\0\0abc"
    crc, mac = module._crc(41, False, body), Seal(path).of(module._PLACE.pack(41, False), body)
    edited(path, f"INSERT INTO log VALUES (41, 0, {crc}, x'{mac.hex()}', x'{body.hex()}')")
    assert "damaged" in attempt(path)


# --- changed by somebody -------------------------------------------------------------------------------------------------


def rows_of(path: Path, numbers: str) -> list[tuple[int, bytes]]:
    with contextlib.closing(sqlite3.connect(path)) as db:
        return db.execute(f"SELECT number, body FROM log WHERE number IN ({numbers})").fetchall()


def forged(path: Path, number: int, body: bytes) -> None:
    """A row with a checksum that is right."""
    edited(path, f"UPDATE log SET body = x'{body.hex()}', crc = {module._crc(number, False, body)} WHERE number = {number}")


def test_44_a_row_that_was_changed_is_refused_before_it_is_read(path, monkeypatch):
    filled(path)
    [(_, held)] = rows_of(path, "20")
    forged(path, 20, held.replace(b"t19", b"t99"))
    seen, decode = [], module.decode_record

    def seeing(frames):
        seen.append(bytes(frames[0]))
        return decode(frames)

    monkeypatch.setattr(module, "decode_record", seeing)
    assert "changed by somebody who does not have its key: row 20" in attempt(path)
    assert len(seen) == 19
    assert not any(b"t99" in frame for frame in seen)


def test_44_so_are_rows_that_have_changed_places(path):
    filled(path)
    edited(path, "UPDATE log SET number = -1 WHERE number = 8", "UPDATE log SET number = 8 WHERE number = 16")
    edited(path, "UPDATE log SET number = 16 WHERE number = -1")
    for number, body in rows_of(path, "8, 16"):
        edited(path, f"UPDATE log SET crc = {module._crc(number, False, body)} WHERE number = {number}")
    assert "changed by somebody" in attempt(path)


def test_44_and_an_identity_that_is_anothers(path):
    """Who could put his own keys there would be let in."""
    filled(path)
    value = b"who they are"
    checked = zlib.crc32(value).to_bytes(4, "little") + bytes(32) + value
    edited(path, f"UPDATE about SET value = x'{checked.hex()}' WHERE name = 'identity'")
    assert "changed by somebody who does not have its key: the cluster's identity" in attempt(path)


@pytest.mark.parametrize("what", ["gone", "another", "short", "open to others", "a symlink"])
def test_44_without_its_key_a_journal_is_refused(path, what):
    held = filled(path)
    key = key_path(path)
    right = key.read_bytes()
    match what:
        case "gone":
            key.unlink()
        case "another":
            key.write_bytes(bytes(32))
        case "short":
            key.write_bytes(right[:31])
        case "open to others":
            key.chmod(0o644)
        case "a symlink":
            key.rename(path.with_name("elsewhere"))
            key.symlink_to(path.with_name("elsewhere"))
    assert "changed by somebody" in attempt(path) if what == "another" else "cannot be checked" in attempt(path)
    key.unlink(missing_ok=True)
    key.write_bytes(right)
    key.chmod(0o600)
    assert read(path) == held, "it was left alone"


# --- not ours ------------------------------------------------------------------------------------------------------------


def test_44_the_journal_of_another_cluster(path):
    held = filled(path)
    refused(path, "that of the cluster 'lab', not of 'other'", "other")
    assert read(path) == held


def test_44_a_later_schema(path):
    filled(path)
    edited(path, f"PRAGMA user_version = {SCHEMA + 1}")
    refused(path, f"schema {SCHEMA + 1}, this zmqsched knows {SCHEMA}")


HOLDS = """
import sys
from pathlib import Path
from zmqsched.journal import Journal
journal = Journal(Path(sys.argv[1]), "lab")
print("open", flush=True)
sys.stdin.read()
journal.close(remove=False)
"""


@contextlib.contextmanager
def another_broker(path: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", HOLDS, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "open\n"
        try:
            yield process
        finally:
            process.communicate()


@pytest.mark.parametrize("new", [False, True])
def test_44_two_brokers(path, new):
    held = [] if new else filled(path)
    with another_broker(path):
        refused(path, "in use by another broker")
    assert read(path) == held


def test_44_the_broker_before_was_killed(path):
    held = filled(path)
    with another_broker(path) as process:
        process.kill()
    assert read(path) == held


def test_44_a_broker_that_may_not_have_its_journal_leaves_nothing(path, clusters):
    filled(path)
    with pytest.raises(JournalError, match="not of 'other'"):
        Broker("other", "least-loaded", journal=path)
    assert not is_held(cluster_dir("other"))
    assert not cluster_dir("other").exists()


# --- read-only -------------------------------------------------------------------------------------------------------------

AS_NOBODY = """
import os, sys
from pathlib import Path
from zmqsched.errors import ZmqschedError
from zmqsched.journal import Journal
import encodings.idna
if os.geteuid() == 0:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
try:
    Journal(Path(sys.argv[1]), "lab")
except ZmqschedError as error:
    print(type(error).__name__, error)
"""


@pytest.fixture
def public() -> Iterator[Path]:
    """A directory that somebody else can reach."""
    directory = Path(tempfile.mkdtemp(prefix="zsj", dir="/tmp"))
    directory.chmod(0o755)
    yield directory
    shutil.rmtree(directory)


@pytest.mark.parametrize(
    ("file", "directory", "exists"),
    [(0o400, 0o700, True), (0o000, 0o700, True), (0o600, 0o500, True), (0o600, 0o500, False)],
)
def test_44_a_journal_that_cannot_be_written(public, file, directory, exists):
    path = public / "state" / "lab.journal"
    path.parent.mkdir(mode=0o700)
    if exists:
        filled(path)
        path.chmod(file)
    if os.geteuid() == 0:
        for entry in (path.parent, *path.parent.iterdir()):
            os.chown(entry, 65534, 65534)
    path.parent.chmod(directory)
    try:
        ran = subprocess.run([sys.executable, "-c", AS_NOBODY, str(path)], capture_output=True, text=True, check=True)
    finally:
        path.parent.chmod(0o700)
    assert ran.stdout.startswith("JournalError")
    assert "cannot be written by this user" in ran.stdout
    assert str(path) in ran.stdout


# --- a full disk -------------------------------------------------------------------------------------------------------


@pytest.fixture
def tiny(public: Path) -> Iterator[Path]:
    """A disk of a megabyte."""
    disk = public / "disk"
    disk.mkdir(mode=0o700)
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m,mode=0700", "tmpfs", str(disk)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("no right to mount a small disk")
    yield disk
    subprocess.run(["umount", disk], check=True)


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RETRY_S", 0.02)


@pytest.mark.usefixtures("brief")
def test_44_a_disk_that_fills_up_and_has_space_again(tiny):
    path = tiny / "lab.journal"
    ballast = tiny / "ballast"
    ballast.write_bytes(bytes(600_000))
    with opened(path) as journal:
        becomes_full(journal, ballast.unlink)
    assert read(path) == ["first", "large", "small"]


@pytest.mark.usefixtures("brief")
def test_44_files_that_may_not_grow_and_then_may(path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with opened(path) as journal:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
        try:
            becomes_full(journal, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limits))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert read(path) == ["first", "large", "small"]


def becomes_full(journal: Journal, space: Callable[[], object]) -> None:
    settled(journal, commit("first"))
    journal.write(commit("large", number=2, size=500_000))
    (trouble,) = news_of(journal, None)
    assert isinstance(trouble, Troubled)
    assert re.search(r"cannot be written \(.*(full|disk I/O error)", trouble.reason)
    journal.write(commit("small", number=3))
    assert journal.news() == [], "it is said once, and what came later does not overtake"
    space()
    assert isinstance(news_of(journal, 3)[-1], Written)


def test_44_no_space_to_begin_with(tiny):
    (tiny / "ballast").write_bytes(bytes(2**20 - 4096))
    refused(tiny / "lab.journal", "no space for the journal")
    assert [entry.name for entry in tiny.iterdir()] == ["ballast"]


@pytest.mark.usefixtures("brief")
def test_44_no_space_to_go_on_with(tiny):
    """What a broker held is more than nothing: it goes on, and takes nothing new."""
    held = filled(tiny / "lab.journal")
    ballast = tiny / "ballast"
    with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(4096)):
            pass
    with opened(tiny / "lab.journal", start=False) as journal:
        assert labels(journal) == held
        journal.start()
        journal.write(commit("new"))
        assert isinstance(news_of(journal, None)[0], Troubled)
        ballast.unlink()
        assert isinstance(news_of(journal, 1)[-1], Written)
    assert read(tiny / "lab.journal") == [*held, "new"]
