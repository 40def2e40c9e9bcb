"""Where the workers of this node come from: what a task needs to become a client of the same cluster.

Set in the node before it forks its nursery, and inherited by every worker. The key pair may be replaced while they run, so
it lies in memory that all of them share.
"""

from __future__ import annotations

import mmap

from msgspec.structs import replace

from .config import ConnectionFile

_KEY = 40  # bytes, in Z85


class Origin:
    """``node``: the incarnation of its process."""

    def __init__(self, file: ConnectionFile, node: bytes) -> None:
        self.node = node
        self._file = file
        # How often it was replaced, and room for two pairs in turn: who reads meanwhile reads the one before.
        self._renewed = mmap.mmap(-1, 1 + 4 * _KEY)

    @property
    def file(self) -> ConnectionFile:
        """As it was given, with the key pair of today."""
        times = self._renewed[0]
        if not times:
            return self._file
        place = self._place(times)
        pair = self._renewed[place : place + 2 * _KEY].decode()
        return replace(self._file, client_public=pair[:_KEY], client_secret=pair[_KEY:])

    def renew(self, public: str, secret: str) -> None:
        """To be called in the node."""
        times = self._renewed[0] % 254 + 1
        place = self._place(times)
        self._renewed[place : place + 2 * _KEY] = (public + secret).encode()
        self._renewed[0] = times

    def _place(self, times: int) -> int:
        return 1 + times % 2 * 2 * _KEY


node: Origin | None = None
worker = 0  # in a worker: its number
