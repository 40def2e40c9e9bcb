"""Functions by digest, bounded: what open tasks need stays, of the rest the least recently used goes."""

from __future__ import annotations

from collections import OrderedDict

from ..protocol import Function, Payload, payload_bytes, wire_bytes

CAP_BYTES = 256 * 1024 * 1024


class FunctionStore:
    def __init__(self, cap_bytes: int = CAP_BYTES) -> None:
        self._cap: float = cap_bytes
        self._blobs: OrderedDict[bytes, Payload] = OrderedDict()
        self._held: dict[bytes, int] = {}
        self.bytes = 0

    def __contains__(self, digest: bytes) -> bool:
        return digest in self._blobs

    def __getitem__(self, digest: bytes) -> Payload:
        self._blobs.move_to_end(digest)
        return self._blobs[digest]

    def items(self) -> list[tuple[bytes, Payload]]:
        return list(self._blobs.items())

    def add(self, digest: bytes, blob: Payload) -> None:
        if digest not in self._blobs:
            self._blobs[digest] = blob
            self.bytes += payload_bytes(blob)
            self._evict()

    def limit(self, cap_bytes: float) -> None:
        """From now on, what nobody holds is dropped beyond so much."""
        self._cap = cap_bytes
        self._evict()

    def hold(self, digest: bytes, times: int = 1) -> bool:
        """Keep it from now on, also when it is yet to come. Returns whether it is here."""
        self._held[digest] = self._held.get(digest, 0) + times
        return digest in self._blobs

    def release(self, digest: bytes, times: int = 1) -> None:
        left = self._held[digest] - times
        if left:
            self._held[digest] = left
        else:
            del self._held[digest]
            self._evict()

    def held(self) -> dict[bytes, int]:
        return dict(self._held)

    def _evict(self) -> None:
        if self.bytes <= self._cap:
            return
        for digest in [d for d in self._blobs if d not in self._held]:
            self.bytes -= payload_bytes(self._blobs.pop(digest))
            if self.bytes <= self._cap:
                return


def function_bytes(function: Function) -> int:
    return wire_bytes(function.blob) + 20
