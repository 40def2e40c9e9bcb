"""The monitor's ear: a SUB socket that the nodes' PUB sockets connect to, turned into events for the scheduler.

It decides nothing: who is alive, suspect or lost is the core's verdict (``core/nodes.py``, ``core/scheduler.py``). Beats
are read within the broker's own loop, after the work channel, so that a broker that was away hears what was said
meanwhile before it judges anybody.
"""

from __future__ import annotations

from collections.abc import Sequence

import zmq

from . import sockets
from .core.events import BeatArrived, Malformed
from .errors import ProtocolError
from .protocol import Beat, decode

MAX_BEATS_PER_TURN = 1_000


class Monitor:
    def __init__(self, ctx: sockets.Context, addresses: Sequence[str], keys: sockets.Keys | None) -> None:
        self.socket, self.addresses = sockets.bind_sub(ctx, addresses, keys)
        self.descriptor = sockets.descriptor(self.socket)
        self._gated = keys is not None

    def read(self) -> list[BeatArrived | Malformed]:
        """The beats that have come in; never waits."""
        return [self._event(frames) for frames in sockets.receive_all(self.socket, MAX_BEATS_PER_TURN)]

    def _event(self, frames: list[zmq.Frame]) -> BeatArrived | Malformed:
        if self._gated and not sockets.user_id(frames[0]):
            return Malformed(b"", "beat without an authenticated sender")
        try:
            body = decode([frame.buffer for frame in frames]).body
        except ProtocolError as error:
            return Malformed(b"", type(error).__name__)
        return BeatArrived(body) if isinstance(body, Beat) else Malformed(b"", "no beat on the beats channel")
