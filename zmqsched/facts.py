"""The broker's voice for observers: sockets that facts are published on.

Rules
-----
* libzmq keeps every topic that a peer subscribes to, and never takes a subscription back by itself. So they are taken by
  hand: there is one, to everything, for those whose key is good. What else is asked for is counted and not served, and
  whoever asks for a long one is cut off.
* When a key is good no more, or there are too many subscriptions, the TCP socket is made anew: that cuts everybody off, and
  those who may come back do, by themselves.
* Subscriptions are looked at before each fact, so at least once a second.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence

import zmq

from . import sockets
from .codec import encode
from .core.events import Malformed
from .errors import StartError
from .keyring import Keyring
from .protocol import Envelope, Fact

EVERYTHING, NOTHING = b"\x01", b"\x00"
MAX_SUBSCRIPTIONS = 5_000
# What the system takes to free a port of a socket that was closed.
RENEW_S = 2.0


class Facts:
    """Bound, one socket for each address. ``keyring``: who may subscribe, unless there are Unix sockets only."""

    def __init__(self, ctx: sockets.Context, addresses: Sequence[str], keyring: Keyring | None) -> None:
        self._ctx = ctx
        self._keyring = keyring
        self._subscriptions = 0
        self._offences: list[Malformed] = []
        self._sockets: list[sockets.Socket] = []
        self.addresses: list[str] = []
        for address in addresses:
            bound, (got,) = sockets.bind_xpub(ctx, [address], keyring.keys if keyring else None)
            self._sockets.append(bound)
            self.addresses.append(got)

    def publish(self, fact: Fact) -> list[Malformed]:
        """Tell everybody; a slow observer misses some. Returns who has asked for what he may not."""
        for bound in self._sockets:
            self._take_subscriptions(bound)
        if self._subscriptions > MAX_SUBSCRIPTIONS:
            self._offences.append(Malformed(b"", "too many subscriptions to facts: all were cut off"))
            self.cut_off()
        for bound in self._sockets:
            with contextlib.suppress(zmq.Again):
                bound.send_multipart(encode(Envelope(0, 0, 0, fact)), zmq.NOBLOCK)
        offences, self._offences = self._offences, []
        return offences

    def cut_off(self) -> None:
        """Everybody but those on Unix sockets, who are the cluster's owner's."""
        for index, address in enumerate(self.addresses):
            if address.startswith("tcp://"):
                self._sockets[index].close(linger=0)
                self._sockets[index] = self._bound_again(address)
        self._subscriptions = 0

    def close(self) -> None:
        for bound in self._sockets:
            bound.close(linger=0)

    def _take_subscriptions(self, bound: sockets.Socket) -> None:
        for _ in range(MAX_SUBSCRIPTIONS + 1):
            if not (messages := sockets.receive_all(bound, 1)):  # what is granted is granted to who was read last
                return
            frames = messages[0]
            said = frames[0].bytes
            if said[:1] == NOTHING:
                self._subscriptions = max(0, self._subscriptions - 1)
                continue
            self._subscriptions += 1
            if self._keyring is not None and (why := self._keyring.refusal(sockets.user_id(frames[0]))):
                self._offences.append(Malformed(b"", f"subscription: {why}", sender=sockets.address_of(frames[0])))
            elif said == EVERYTHING:
                bound.setsockopt(zmq.SUBSCRIBE, b"")
            else:
                self._offences.append(Malformed(b"", "subscription to a topic", sender=sockets.address_of(frames[0])))

    def _bound_again(self, address: str) -> sockets.Socket:
        assert self._keyring is not None, "TCP without keys"
        until = time.monotonic() + RENEW_S
        while True:
            try:
                return sockets.bind_xpub(self._ctx, [address], self._keyring.keys).socket
            except StartError:
                if time.monotonic() > until:
                    raise
                time.sleep(0.005)
