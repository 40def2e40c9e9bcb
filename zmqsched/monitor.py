"""The monitor's ear: a SUB socket that the nodes' PUB sockets connect to, turned into events for the scheduler.

It decides nothing: who is alive, suspect or lost is the core's verdict (``core/nodes.py``, ``core/scheduler.py``). Beats
are read within the broker's own loop, after the work channel, so that a broker that was away hears what was said
meanwhile before it judges anybody.
"""

from __future__ import annotations

from collections.abc import Sequence

import zmq

from . import sockets
from .codec import decode
from .core.events import BeatArrived, Malformed
from .core.roles import BEATERS, role_of
from .errors import ProtocolError
from .intake import Intake
from .keyring import Keyring
from .protocol import Beat

MAX_BEATS_PER_TURN = 1_000


class Monitor:
    def __init__(self, ctx: sockets.Context, addresses: Sequence[str], keyring: Keyring | None, intake: Intake) -> None:
        self.socket, self.addresses = sockets.bind_sub(ctx, addresses, keyring.keys if keyring else None)
        self.descriptor = sockets.descriptor(self.socket)
        self._keyring = keyring
        self._intake = intake

    def read(self) -> list[BeatArrived | Malformed]:
        """The beats that have come in; never waits."""
        return [self._event(frames) for frames in sockets.receive_all(self.socket, MAX_BEATS_PER_TURN)]

    def _event(self, frames: list[zmq.Frame]) -> BeatArrived | Malformed:
        if self._keyring is not None:
            self._intake.heard(frames[0])
            user = sockets.user_id(frames[0])
            if refusal := self._keyring.refusal(user):
                return Malformed(b"", f"beat: {refusal}", sender=sockets.address_of(frames[0]))
            if role_of(user) not in BEATERS:
                return Malformed(b"", f"beat from a {role_of(user)}", sender=sockets.address_of(frames[0]))
        try:
            body = decode([frame.buffer for frame in frames]).body
        except ProtocolError as error:
            return Malformed(b"", type(error).__name__)
        return BeatArrived(body) if isinstance(body, Beat) else Malformed(b"", "no beat on the beats channel")
