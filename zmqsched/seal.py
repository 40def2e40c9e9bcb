"""Proof that a journal is as this user's brokers have written it: an HMAC of each row, with a key of its own.

Rules
-----
* The key lies beside the journal, ``FILE.key``, with mode 0600; made with the journal, removed with it. A checksum tells
  damage from what was written; only the key tells what was written from what somebody else has put there.
* A row's place is part of what is signed, so rows cannot change places. That some were taken off the end, or the whole file
  put back to what it was, the key does not tell.
"""

from __future__ import annotations

import contextlib
import hmac
import os
import secrets
from pathlib import Path

from .errors import JournalError

KEY_BYTES = 32


class Seal:
    """Of the journal in this file."""

    def __init__(self, journal: Path) -> None:
        """With its key, which is there.

        Raises
        ------
        JournalError
            It is not, or not private to this user.
        """
        path = key_path(journal)
        try:
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            with open(fd, "rb") as file:
                found, key = os.fstat(fd), file.read(KEY_BYTES + 1)
        except OSError as error:
            raise _unchecked(journal, f"its key {path} cannot be read ({error.strerror})") from None
        if found.st_uid != os.geteuid() or found.st_mode & 0o077 or len(key) != KEY_BYTES:
            raise _unchecked(journal, f"{path} is not a key that only this user can read")
        self._mac = hmac.new(key, digestmod="sha256")

    def of(self, place: bytes, body: bytes) -> bytes:
        mac = self._mac.copy()
        mac.update(place)
        mac.update(body)
        return mac.digest()

    def holds(self, mac: bytes, place: bytes, body: bytes) -> bool:
        return hmac.compare_digest(mac, self.of(place, body))


def _unchecked(journal: Path, why: str) -> JournalError:
    return JournalError(
        f"the journal {journal} cannot be checked: {why}; put it back, or move it away to begin without it: "
        f"mv {journal} {journal}.unchecked"
    )


def key_path(journal: Path) -> Path:
    return journal.with_name(f"{journal.name}.key")


def new_key(journal: Path) -> None:
    """For a journal that is about to be made. One that was left by another of this name is of no use any more.

    Raises
    ------
    OSError
        It cannot be written there.
    """
    path = key_path(journal)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as file:
            file.write(secrets.token_bytes(KEY_BYTES))
            file.flush()
            os.fsync(file.fileno())
        draft.rename(path)
    finally:
        with contextlib.suppress(OSError):
            draft.unlink()
