"""Sessions of the broker's peers: who is behind an envelope, and what is to go to whom.

Rules
-----
* A peer asks for a session with a hello that names its incarnation (one process) and the number of its session there
  (``life``). The same hello again gets the same session; a higher life ends the session before it; a lower one is a
  late copy and is ignored.
* An envelope names its session by a random token; the routing id it came with is where answers go from then on. A new
  routing id means a new connection: what was not acknowledged on the old one is sent again.
* An envelope for a session that does not exist is answered ``SayHello``.
"""

from __future__ import annotations

from collections.abc import Iterator
from random import Random
from typing import TYPE_CHECKING

from ..protocol import ClientHello, Envelope, Final, Host, Message, NodeHello
from .link import Link
from .roles import role_of
from .timers import Timers

if TYPE_CHECKING:
    from .nodes import Node, Prospect
    from .owners import Owner


class Session:
    """``finals`` and ``running`` collect what the next flush tells a client, so that many go as one message. ``follows``:
    its own tasks' owner, and those of the jobs it asked for; ``remembered``: its tasks were known when it came;
    ``prospects``: nodes that it starts when they are wanted."""

    __slots__ = (
        "finals", "follows", "heard_at", "incarnation", "life", "link", "node", "peer", "prospects", "remembered", "role",
        "running", "token", "user", "where",
    )  # fmt: skip

    def __init__(
        self, token: int, hello: ClientHello | NodeHello, peer: bytes, user: str, now: float, *, cautious: bool
    ) -> None:
        self.token = token
        self.incarnation = hello.incarnation
        self.life = hello.life
        self.where: Host = hello.where
        self.peer = peer
        self.user = user
        self.role = role_of(user)
        self.link = Link(token, cautious=cautious)
        self.heard_at = now
        self.node = ""  # the node's id, if this is a node
        self.follows: list[Owner] = []
        self.remembered = False
        self.finals: list[Final] = []
        self.running: list[bytes] = []
        self.prospects: list[Prospect] = []


class Sessions:
    def __init__(self, random: Random, *, cautious: bool = False) -> None:
        self._random = random
        self._cautious = cautious  # see Link
        self._by_token: dict[int, Session] = {}
        self._by_incarnation: dict[bytes, Session] = {}
        self._dirty: dict[int, Session] = {}
        self._timers: Timers[int] = Timers()

    def __iter__(self) -> Iterator[Session]:
        return iter(self._by_token.values())

    @property
    def empty(self) -> bool:
        return not self._by_token

    def get(self, token: int) -> Session | None:
        return self._by_token.get(token)

    def of(self, node: Node) -> Session:
        return self._by_token[node.session]

    def known(self, incarnation: bytes) -> Session | None:
        return self._by_incarnation.get(incarnation)

    def open(self, hello: ClientHello | NodeHello, peer: bytes, user: str, now: float) -> Session:
        session = Session(self._random.getrandbits(52) + 1, hello, peer, user, now, cautious=self._cautious)
        self._by_token[session.token] = session
        self._by_incarnation[session.incarnation] = session
        return session

    def close(self, session: Session) -> None:
        del self._by_token[session.token]
        del self._by_incarnation[session.incarnation]
        self._dirty.pop(session.token, None)
        self._timers.set(session.token, None)

    def has_new_key(self, session: Session, user: str) -> bool:
        """The same peer, as it knows the token, with the key that has replaced the one it came with."""
        if role_of(user) != session.role:
            return False
        session.user = user
        return True

    def receive(self, session: Session, peer: bytes, envelope: Envelope, now: float) -> Message | None:
        session.heard_at = now
        link = session.link
        if session.peer != peer:
            session.peer = peer
            link.reconnected()
        message = link.receive(envelope, now)
        if (at := link.deadline()) <= now:
            self._dirty[session.token] = session
        else:
            self._timers.no_later(session.token, at)
        return message

    def touch(self, session: Session) -> None:
        """Something is to be sent to this peer; the next flush looks."""
        self._dirty[session.token] = session

    def send(self, session: Session, body: Message) -> None:
        session.link.send(body)
        self._dirty[session.token] = session

    def due(self, now: float) -> list[Session]:
        """The peers that something is to be sent to now; each is then flushed by the caller."""
        if self._timers.soonest <= now:
            for token in self._timers.due(now):
                self._dirty[token] = self._by_token[token]
        return list(self._dirty.values())

    def flush(self, session: Session, now: float) -> list[Envelope]:
        del self._dirty[session.token]
        out = session.link.flush(now)
        self._timers.no_later(session.token, session.link.deadline())
        return out

    def deadline(self) -> float:
        return 0.0 if self._dirty else self._timers.soonest

    def forgive(self, gap: float) -> None:
        """The broker itself was away for ``gap`` seconds: nobody was silent meanwhile."""
        for session in self._by_token.values():
            session.heard_at += gap

    def sanity_check(self) -> None:
        assert {s.token for s in self._by_incarnation.values()} == self._by_token.keys(), "two indices of sessions differ"
        for session in self._by_token.values():
            session.link.sanity_check()
