"""The way from a client or a node to the broker: hello, session, keep-alive, and hello again.

Rules
-----
* Until a session is granted a hello goes out every second. A session ends when the broker says it does not know it
  (``SayHello``); the next hello has the next ``life`` number, and only the welcome that returns it counts.
* What the ended session had not delivered is in ``undelivered``: its owner says what of it still matters.
* A new connection is used at once: hello or ping, and again whatever the other end has not acknowledged.
* A ping goes out each ``keepalive_s``. The answer renews the *lease*: until ``lease_s`` after that ping was sent, the
  broker cannot have given this peer up, for it waits longer than that. Only with a lease does a node start work.
"""

from __future__ import annotations

import math

from msgspec.structs import replace

from ..protocol import Attempt, ClientHello, Envelope, Message, No, NodeHello, SayHello, Welcome
from .link import Link

HELLO_EVERY_S = 1.0


class Uplink:
    def __init__(self, hello: ClientHello | NodeHello, keepalive_s: float, lease_s: float) -> None:
        self.hello = hello
        self.link: Link | None = None
        self.heard_at = float("-inf")
        self.leaves_at = math.inf  # when this peer will be ended
        self.undelivered: list[Message] = []
        self._keepalive_s = keepalive_s
        self._lease_s = lease_s
        self._hello_at = 0.0
        self._ping_at = 0.0

    def pace(self, keepalive_s: float, lease_s: float) -> None:
        """As the broker of this session has it."""
        self._keepalive_s = keepalive_s
        self._lease_s = lease_s

    @property
    def lease_ends(self) -> float:
        return -math.inf if self.link is None else self.link.confirmed_at + self._lease_s

    def has_lease(self, now: float) -> bool:
        return now < self.lease_ends

    def hold(self, attempts: list[Attempt]) -> None:
        """Name these in the next hello: they were begun for the session that is over."""
        assert isinstance(self.hello, NodeHello), "a client runs nothing"
        self.hello = replace(self.hello, holding=attempts)

    @property
    def offered(self) -> list[Attempt]:
        """What the last hello has named."""
        return self.hello.holding if isinstance(self.hello, NodeHello) else []

    def send(self, body: Message) -> None:
        """Queue a message for this session; without one, for the owner to offer again at the next welcome."""
        if self.link is None:
            self.undelivered.append(body)
        else:
            self.link.send(body)

    def receive(self, envelope: Envelope, now: float) -> Message | None:
        """The message for the owner, if any: :class:`Welcome` when a session begins, :class:`No` when it is refused."""
        body = envelope.body
        if isinstance(body, Welcome):
            return self._welcomed(body, now)
        if isinstance(body, No):
            return body
        if self.link is None or envelope.session != self.link.session:
            return None
        self.heard_at = now
        if isinstance(body, SayHello):
            self.over()
            return body
        return self.link.receive(envelope, now)

    def reconnected(self) -> None:
        """Speak at once: the broker does not know of the new connection, and where to answer, until something comes."""
        self._hello_at = self._ping_at = 0.0
        if self.link is not None:
            self.link.reconnected()

    def over(self) -> None:
        """The session has ended; a hello for the next goes out with the next flush."""
        if self.link is not None:
            self.undelivered.extend(self.link.unfinished())
            self.link = None
            self.hello = replace(self.hello, life=self.hello.life + 1)
            self._hello_at = 0.0

    def flush(self, now: float) -> list[Envelope]:
        if self.link is not None:
            if now >= self._ping_at:
                self._ping_at = now + self._keepalive_s
                self.link.ping(now)
            return self.link.flush(now)
        if now < self._hello_at:
            return []
        self._hello_at = now + HELLO_EVERY_S
        hello = self.hello
        if isinstance(hello, NodeHello) and self.leaves_at < math.inf:
            hello = replace(hello, leaves_in_s=max(0.001, self.leaves_at - now))
        return [Envelope(0, 0, 0, hello)]

    def deadline(self) -> float:
        if self.link is None:
            return self._hello_at
        return min(self.link.deadline(), self._ping_at)

    def _welcomed(self, welcome: Welcome, now: float) -> Message | None:
        if self.link is not None or welcome.life != self.hello.life:
            return None  # a late copy
        self.heard_at = now
        self.link = Link(welcome.session)
        self._ping_at = 0.0
        return welcome
