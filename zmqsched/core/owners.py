"""Whom tasks are answered to: the client process that submitted them, or a job, which any client may follow.

Rules
-----
* An owner outlives the sessions of its clients, as it outlives the broker if there is a journal. A client that is silent
  for its lease is gone: its tasks are cancelled, running ones too. A job waits for whoever asks for it.
* Answers of a client are kept until the client has acknowledged them. A client that comes back names what it still waits
  for, and is told what of it is not here (``StillOpen``, ``Unknown``). Answers of a job for ``keep_results_s`` after the
  last of its tasks was answered, and then the job is forgotten.
"""

from __future__ import annotations

from collections.abc import Iterator

from ..protocol import Final
from .sessions import Session

_CLIENT, _JOB = b"c", b"j"


class Owner:
    """``unwritten``: answers that are not in the journal yet, and so not to be told; ``open``: how many tasks have none."""

    __slots__ = ("answers", "id", "job", "open", "quiet_since", "sessions", "unwritten")

    def __init__(self, owner_id: bytes, job: str, now: float) -> None:
        self.id = owner_id
        self.job = job
        self.sessions: list[Session] = []  # of a client at most one, of a job its followers'
        self.answers: dict[bytes, Final] = {}
        self.unwritten: dict[bytes, Final] = {}
        self.open = 0
        self.quiet_since = now  # since when a client has no session, or all of a job is answered

    @property
    def incarnation(self) -> bytes:
        """Of a client."""
        return self.id[len(_CLIENT) :]

    def has_answered(self, task: bytes) -> bool:
        return task in self.answers or task in self.unwritten


class Owners:
    def __init__(self) -> None:
        self._owners: dict[bytes, Owner] = {}

    def __iter__(self) -> Iterator[Owner]:
        return iter(self._owners.values())

    def get(self, owner_id: bytes) -> Owner | None:
        return self._owners.get(owner_id)

    def find_client(self, incarnation: bytes) -> Owner | None:
        return self._owners.get(_CLIENT + incarnation)

    def find_job(self, name: str) -> Owner | None:
        return self._owners.get(_JOB + name.encode())

    def client(self, incarnation: bytes, now: float) -> Owner:
        return self._made(_CLIENT + incarnation, "", now)

    def job(self, name: str, now: float) -> Owner:
        return self._made(_JOB + name.encode(), name, now)

    def written(self, owner_id: bytes, now: float) -> Owner:
        """By an id that was written down."""
        return self._made(owner_id, owner_id[1:].decode() if owner_id.startswith(_JOB) else "", now)

    def knows(self, owner: Owner) -> bool:
        return self._owners.get(owner.id) is owner

    def forget(self, owner: Owner) -> None:
        del self._owners[owner.id]

    def silent_clients(self, lease_s: float, now: float) -> list[Owner]:
        return [o for o in self if not o.job and not o.sessions and now - o.quiet_since > lease_s]

    def old_jobs(self, keep_s: float, now: float) -> list[Owner]:
        return [o for o in self if o.job and not o.open and now - o.quiet_since > keep_s]

    def forgive(self, gap: float) -> None:
        for owner in self:
            owner.quiet_since += gap

    def _made(self, owner_id: bytes, job: str, now: float) -> Owner:
        owner = self._owners.get(owner_id)
        if owner is None:
            owner = self._owners[owner_id] = Owner(owner_id, job, now)
        return owner
