"""The keys of a cluster over TCP: who may come in, under what User-Id, and how that changes while it runs.

Rules
-----
* A key pair for each role, made before any socket is open. The broker takes a peer's role from the key it came with, never
  from what it says. Its User-Id is ``ROLE:NUMBER``; each new key of a role has the next number.
* A key that was replaced is good for a grace time, so that whoever has it can be given the next one. After that, or when it
  is revoked, its User-Id is in no table any more: nobody comes in with it, and what its holders still say is dropped.
* The server's secret key is in no connection file. All of it is in the journal, if there is one, for the next broker.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from pathlib import Path

from msgspec import Struct
from msgspec.structs import replace

from .config import ROLES, ConnectionFile, Role
from .protocol import KeyInfo
from .sockets import LOCAL_USER, Keys, key_pair


class Pair(Struct, frozen=True):
    number: int
    public: str
    secret: str

    def __repr__(self) -> str:
        return f"Pair({self.number}, {self.public!r})"


class Retiring(Struct, frozen=True):
    """A key that was replaced. ``until``: by the monotonic clock of this broker; ``grace_s``: as it was asked for."""

    role: Role
    number: int
    public: str
    grace_s: float
    until: float


class Stored(Struct, frozen=True):
    """All of them, as they lie in the journal."""

    server: Pair
    current: dict[Role, Pair]
    retiring: list[Retiring] = []


class Keyring:
    """``users``: the User-Id of each public key that is good; ``live``: the User-Ids whose messages are let through."""

    def __init__(self, stored: Stored | None = None, now: float = 0.0) -> None:
        """New ones, or those of a broker that died: no clock says how long ago, so grace times begin anew."""
        if stored is None:
            stored = Stored(_pair(0), {role: _pair(1) for role in ROLES})
        self._server = stored.server
        self._current = dict(stored.current)
        self._retiring = [replace(old, until=now + old.grace_s) for old in stored.retiring]
        self._settle()

    @property
    def stored(self) -> Stored:
        return Stored(self._server, self._current, self._retiring)

    @property
    def keys(self) -> Keys:
        """To bind with."""
        return Keys(self._server.public.encode(), server_secret=self._server.secret.encode())

    def refusal(self, user: str) -> str:
        """Why what comes from this User-Id is dropped; "" if it is let through."""
        return "" if user in self.live else "a key that is not good any more" if user else "no authenticated sender"

    @property
    def deadline(self) -> float:
        """When the next of the replaced keys has been good for long enough."""
        return min([old.until for old in self._retiring], default=math.inf)

    def rotate(self, roles: Collection[Role], grace_s: float, now: float) -> dict[str, tuple[str, str]]:
        """New keys. Returns, for each User-Id whose key is replaced, the pair to go on with."""
        moved = {}
        for role in roles:
            old = self._current[role]
            new = self._current[role] = _pair(old.number + 1)
            self._retiring.append(Retiring(role, old.number, old.public, grace_s, now + grace_s))
            before = [_user(role, each.number) for each in self._retiring if each.role == role]
            moved.update(dict.fromkeys(before, (new.public, new.secret)))
        self._settle()
        return moved

    def revoke(self, roles: Collection[Role]) -> frozenset[str]:
        """New keys; those before are good for nothing from now on. Returns the User-Ids that are no more."""
        before = self.live
        for role in roles:
            self._current[role] = _pair(self._current[role].number + 1)
        self._retiring = [old for old in self._retiring if old.role not in roles]
        self._settle()
        return before - self.live

    def expire(self, now: float) -> frozenset[str]:
        """The User-Ids that are no more, because their grace time is over."""
        before = self.live
        self._retiring = [old for old in self._retiring if old.until > now]
        self._settle()
        return before - self.live

    def files(self, file: ConnectionFile) -> list[ConnectionFile]:
        """The connection file of each role, the owner's last."""
        pairs = [(role, self._current[role]) for role in reversed(ROLES)]
        key = self._server.public
        return [
            replace(file, role=role, server_key=key, client_public=pair.public, client_secret=pair.secret)
            for role, pair in pairs
        ]

    def write_files(self, file: ConnectionFile, directory: Path) -> None:
        """When the owner's is there, all are."""
        for each in self.files(file):
            each.write_into(directory)

    def info(self, now: float) -> list[KeyInfo]:
        """What may be told of them."""
        current = [KeyInfo(role, pair.number, pair.public) for role, pair in self._current.items()]
        old = [KeyInfo(old.role, old.number, old.public, max(0.001, old.until - now)) for old in self._retiring]
        return current + old

    def _settle(self) -> None:
        good = [(role, pair.number, pair.public) for role, pair in self._current.items()]
        good += [(old.role, old.number, old.public) for old in self._retiring]
        self.users = {public.encode(): _user(role, number) for role, number, public in good}
        self.live = frozenset({*self.users.values(), LOCAL_USER})


def _user(role: Role, number: int) -> str:
    return f"{role}:{number}"


def _pair(number: int) -> Pair:
    public, secret = key_pair()
    return Pair(number, public.decode(), secret.decode())
