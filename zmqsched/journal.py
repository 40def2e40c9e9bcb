"""The journal: what a broker must still know when it has died, in one SQLite file that only its user can read.

Rules
-----
* A log of records (``protocol.Record``), each commit one row or a few, numbered without a gap, each with its CRC and an HMAC
  (``seal.py``), which is checked before anything else is made of the row. The core decides what is written and when it is
  written anew (``core/ledger.py``); nothing here knows what a task is.
* One thread writes, off the broker's loop. It takes all commits that have gathered and makes one transaction of them
  (group commit); so under load many tasks share one ``fsync``. SQLite's WAL with ``synchronous=FULL``: what was said to
  be written survives a power failure, and a commit torn by one is no commit.
* Rows, not tasks, are what SQLite is given: for each row the sqlite3 module gives up and takes back the interpreter's
  lock, which costs a busy loop far more than the row.
* What cannot be written now (the disk is full) is tried again each second, in order, and said once.
* A journal that is damaged, held by another broker, of another cluster or of a later version is refused and left alone.
  A tail that was torn off is recognised by SQLite's own checksums and dropped: it was never acknowledged.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sqlite3
import stat
import struct
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path
from queue import SimpleQueue

from .codec import decode_record, encode_record
from .config import journal_path, make_private
from .core.events import Troubled, Write, Written
from .errors import JournalError, ProtocolError
from .protocol import Record
from .seal import Seal, key_path, new_key

SCHEMA = 2
RETRY_S = 1.0
ROW_BYTES = 64 * 1024 * 1024  # a longer commit is cut into rows of this size: SQLite's limit for one is 10**9
CLOSE_TIMEOUT_S = 2.0
KEEP_TIMEOUT_S = 2.0

_CREATE = """
CREATE TABLE about (name TEXT PRIMARY KEY, value BLOB NOT NULL);
CREATE TABLE log (number INTEGER PRIMARY KEY, more INTEGER NOT NULL, crc INTEGER NOT NULL, mac BLOB NOT NULL,
    body BLOB NOT NULL)
"""
_CRC = struct.Struct("<I")
_COUNT = struct.Struct("<I")
_LENGTH = struct.Struct("<Q")
_PLACE = struct.Struct("<Q?")
_IDENTITY, _MAC_BYTES = b"identity", 32


class _Identity:
    """On its way to the thread."""

    def __init__(self, value: bytes) -> None:
        self.value = value
        self.kept = threading.Event()


class Journal:
    """An open journal; this process is its only user.

    Raises
    ------
    JournalError
        It cannot be used, and why; the file is as it was.
    """

    def __init__(self, path: Path, cluster: str) -> None:
        self.path = path
        self._cluster = cluster
        try:
            _make_directory(path.parent, journal_path(cluster).parent)
            if not path.exists():
                _create(path, cluster)
            self._db = _connect(path)
        except (sqlite3.Error, OSError, UnicodeDecodeError) as error:  # Unicode: SQLite quotes what it found
            raise _refusal(path, error) from None
        try:
            self._check(cluster)
            self._seal = Seal(path)
        except BaseException as error:
            self._db.close()
            if isinstance(error, sqlite3.Error | UnicodeDecodeError):
                raise _refusal(path, error) from None
            raise
        self.bytes = 0
        self._next = 0  # the next row's number
        self._queue: SimpleQueue[Write | _Identity | None] = SimpleQueue()
        self._news: SimpleQueue[Written | Troubled] = SimpleQueue()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="zmqsched journal", daemon=True)

    @property
    def identity(self) -> bytes:
        """What its cluster is known by, in the broker's words; empty at first.

        Raises
        ------
        JournalError
            It is damaged; or, when it is set, cannot be written.
        """
        found = self._about("identity")
        crc, mac, value = found[: _CRC.size], found[_CRC.size : _CRC.size + _MAC_BYTES], found[_CRC.size + _MAC_BYTES :]
        if found and crc != _CRC.pack(zlib.crc32(value)):
            raise _damaged(self.path, "the cluster's identity is not what was written there")
        if found and not self._seal.holds(mac, _IDENTITY, value):
            raise _changed(self.path, "the cluster's identity")
        return value

    @identity.setter
    def identity(self, value: bytes) -> None:
        if self._thread.is_alive():
            self._have_kept(_Identity(value))
            return
        try:
            self._keep(value)
        except sqlite3.Error as error:
            raise _refusal(self.path, error) from None

    def _keep(self, identity: bytes) -> None:
        checked = _CRC.pack(zlib.crc32(identity)) + self._seal.of(_IDENTITY, identity) + identity
        self._db.execute("INSERT OR REPLACE INTO about VALUES ('identity', ?)", (checked,))

    def _have_kept(self, identity: _Identity) -> None:
        """By the thread, whose the file is; this is rare and worth a wait."""
        self._queue.put(identity)
        if not identity.kept.wait(KEEP_TIMEOUT_S):
            raise JournalError(f"the journal {self.path} cannot be written now: a broker that follows would not know of it")

    def read(self) -> Iterator[Record]:
        """All records, oldest first; to be read to the end before ``start``.

        Raises
        ------
        JournalError
            The journal is damaged.
        """
        try:
            self._next = int(self._about("first"))
            parts = []
            rows = self._db.execute("SELECT number, more, crc, mac, body FROM log ORDER BY number")
            for number, more, crc, mac, part in rows:
                if number != self._next or _crc(number, more, part) != crc:
                    raise _damaged(self.path, f"row {number} is not what was written there")
                if not self._seal.holds(mac, _PLACE.pack(number, more), part):
                    raise _changed(self.path, f"row {number}")
                self._next += 1
                self.bytes += len(part)
                parts.append(part)
                if not more:
                    yield from _unpacked(b"".join(parts))
                    parts = []
            if parts:
                raise _damaged(self.path, "the last commit has no end")
        except (ProtocolError, struct.error, TypeError, ValueError) as error:  # of another type: it is no bytes any more
            raise _damaged(self.path, str(error)) from None
        except sqlite3.Error as error:
            raise _refusal(self.path, error) from None

    def start(self) -> None:
        """From now on what is written is written by a thread, which owns the file."""
        self._thread.start()

    def fileno(self) -> int:
        """Readable when there is ``news``."""
        return self._wake

    def news(self) -> list[Written | Troubled]:
        """What became of commits, in order; never waits."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wake)
        return [self._news.get() for _ in range(self._news.qsize())]

    def write(self, commit: Write) -> None:
        """Commits reach the disk in the order of these calls."""
        self._queue.put(commit)

    def close(self, *, remove: bool) -> None:
        """Write what is left, and let go; ``remove``: nothing in it is of use to anybody."""
        self._ends.set()
        if self._thread.is_alive():
            self._queue.put(None)
            self._thread.join(CLOSE_TIMEOUT_S)
        if self._thread.is_alive():  # the disk hangs; so would closing
            return
        self._db.close()
        os.close(self._wake)
        if remove:
            for path in (self.path, self.path.with_name(f"{self.path.name}-wal"), key_path(self.path)):
                path.unlink(missing_ok=True)
            if self.path == journal_path(self._cluster):  # else the directory is the user's
                with contextlib.suppress(OSError):  # another cluster's journal is in there
                    self.path.parent.rmdir()

    # --- the thread --------------------------------------------------------------------------------------------------

    def _serve(self) -> None:
        commit = self._queue.get()
        while commit is not None:
            commits = [commit]
            while not self._queue.empty() and (commit := self._queue.get()) is not None:
                commits.append(commit)
            if not self._write(commits):
                return  # and nothing after them: what is there is a beginning of what was handed over
            if commit is not None:
                commit = self._queue.get()

    def _write(self, commits: list[Write | _Identity]) -> bool:
        """Whether they are on disk; if not, the journal is being closed."""
        told = False
        while True:
            try:
                self._transact(commits)
            except sqlite3.Error as error:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                if not told:
                    told = True
                    self._tell(Troubled(f"the journal {self.path} cannot be written ({error})"))
                if self._ends.wait(RETRY_S):
                    return False
            else:
                for commit in commits:
                    if isinstance(commit, _Identity):
                        commit.kept.set()
                if numbers := [commit.number for commit in commits if isinstance(commit, Write)]:
                    self._tell(Written(numbers[-1], self.bytes))
                return True

    def _transact(self, commits: list[Write | _Identity]) -> None:
        number, size = self._next, self.bytes
        self._db.execute("BEGIN IMMEDIATE")
        for commit in commits:
            if isinstance(commit, _Identity):
                self._keep(commit.value)
                continue
            if commit.anew:
                self._db.execute("DELETE FROM log")
                self._db.execute("UPDATE about SET value = ? WHERE name = 'first'", (str(number),))
                size = 0
            body = _packed(commit.records)
            for start in range(0, len(body), ROW_BYTES):
                part = body[start : start + ROW_BYTES]
                more = start + ROW_BYTES < len(body)
                mac = self._seal.of(_PLACE.pack(number, more), part)
                row = (number, more, _crc(number, more, part), mac, part)
                self._db.execute("INSERT INTO log VALUES (?, ?, ?, ?, ?)", row)
                number += 1
                size += len(part)
        self._db.execute("COMMIT")
        self._next, self.bytes = number, size
        if any(isinstance(commit, Write) and commit.anew for commit in commits):
            with contextlib.suppress(sqlite3.Error):  # it takes space to give space back; the next time, then
                self._db.executescript("PRAGMA incremental_vacuum")  # execute() gives back but one page

    def _tell(self, news: Written | Troubled) -> None:
        self._news.put(news)
        os.eventfd_write(self._wake, 1)

    # --- what is in the file -----------------------------------------------------------------------------------------

    def _about(self, name: str) -> bytes:
        row = self._db.execute("SELECT value FROM about WHERE name = ?", (name,)).fetchone()
        if row is None:
            return b""
        return row[0] if isinstance(row[0], bytes) else str(row[0]).encode()

    def _check(self, cluster: str) -> None:
        """Ours, undamaged as far as one look tells, and not read-only."""
        (schema,) = self._db.execute("PRAGMA user_version").fetchone()
        if schema != SCHEMA:
            raise JournalError(
                f"the journal {self.path} has schema {schema}, this zmqsched knows {SCHEMA}: use the zmqsched that wrote "
                "it, or move the file away to begin without it"
            )
        if (damage := self._db.execute("PRAGMA quick_check(1)").fetchone()[0]) != "ok":
            raise _damaged(self.path, str(damage))
        if (theirs := self._about("cluster").decode(errors="replace")) != cluster:
            raise JournalError(f"the journal {self.path} is that of the cluster {theirs!r}, not of {cluster!r}")
        self._db.execute("UPDATE about SET value = value WHERE name = 'cluster'")


def _make_directory(directory: Path, ours: Path) -> None:
    """The usual one is private. One that the user has named is as it is, unless others may put files there."""
    if directory == ours:
        make_private(directory)
        return
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    mode = directory.stat().st_mode
    if mode & 0o022 and not mode & stat.S_ISVTX:
        raise JournalError(f"others may put files into {directory}, where the journal is to be: chmod go-w {directory}")


def _create(path: Path, cluster: str) -> None:
    """A new journal appears under its name when it is whole, so an empty or half file of that name is damage."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.unlink(missing_ok=True)
    try:
        os.close(os.open(draft, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600))
        with contextlib.closing(sqlite3.connect(draft, isolation_level=None)) as db:
            db.execute("PRAGMA auto_vacuum = INCREMENTAL")
            db.executescript(f"BEGIN; {_CREATE}; PRAGMA user_version = {SCHEMA}; COMMIT")
            db.executemany("INSERT INTO about VALUES (?, ?)", [("cluster", cluster), ("first", "1")])
        new_key(path)
        draft.rename(path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


def _connect(path: Path) -> sqlite3.Connection:
    if path.stat().st_size == 0:
        raise sqlite3.DatabaseError("it is empty")
    if not os.access(path, os.R_OK | os.W_OK):  # SQLite would speak of a disk that fails
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    there = f"{path.absolute().as_uri()}?mode=rw"  # and not made if it is not
    db = sqlite3.connect(there, timeout=0.5, isolation_level=None, check_same_thread=False, uri=True)
    try:
        db.execute("PRAGMA locking_mode = EXCLUSIVE")
        db.execute("PRAGMA journal_mode = WAL").fetchall()
        db.execute("PRAGMA synchronous = FULL")
        db.execute("PRAGMA journal_size_limit = 4194304").fetchall()
    except BaseException:
        db.close()
        raise
    return db


def _refusal(path: Path, error: sqlite3.Error | OSError | UnicodeDecodeError) -> JournalError:
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT) & 0xFF  # without what kind of such an error it is
    if isinstance(error, OSError):
        code = sqlite3.SQLITE_FULL if error.errno in (errno.ENOSPC, errno.EDQUOT) else sqlite3.SQLITE_PERM
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return JournalError(f"the journal {path} is in use by another broker")
    if code in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM):
        return JournalError(f"the journal {path} cannot be written by this user ({error}); put it elsewhere (--journal)")
    if code == sqlite3.SQLITE_IOERR:
        return JournalError(f"the disk fails that holds the journal {path} ({error}); what it still gives is worth a copy")
    if code == sqlite3.SQLITE_FULL:
        return JournalError(f"there is no space for the journal {path}: free some, or put it elsewhere (--journal)")
    return _damaged(path, str(error))


def _damaged(path: Path, how: str) -> JournalError:
    how = " ".join(how.split())
    return JournalError(f"the journal {path} is damaged ({how}); move it away to begin without it: mv {path} {path}.damaged")


def _changed(path: Path, what: str) -> JournalError:
    return JournalError(
        f"the journal {path} was changed by somebody who does not have its key: {what} is not signed with {key_path(path)}; "
        f"move it away to begin without it: mv {path} {path}.changed"
    )


def _crc(number: int, more: bool, part: bytes) -> int:
    return zlib.crc32(part, number * 2 + more & 0xFFFFFFFF)


def _packed(records: list[Record]) -> bytes:
    pieces: list[bytes] = []
    for record in records:
        frames = encode_record(record)
        pieces.append(_COUNT.pack(len(frames)))
        for frame in frames:
            whole = bytes(frame)
            pieces += (_LENGTH.pack(len(whole)), whole)
    return b"".join(pieces)


def _unpacked(body: bytes) -> Iterator[Record]:
    at = 0
    while at < len(body):
        (count,) = _COUNT.unpack_from(body, at)
        at += _COUNT.size
        frames = []
        for _ in range(count):
            (length,) = _LENGTH.unpack_from(body, at)
            at += _LENGTH.size
            frames.append(body[at : at + length])
            at += length
        if at > len(body):
            raise ProtocolError("a record is longer than its commit")
        yield decode_record(frames)
