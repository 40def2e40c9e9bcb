"""What a node's workers print, gathered from all their streams (``streams.py``) for the agent to pass on.

Rules
-----
* Streams that gave less than ``MUCH`` are left alone for ``REST_S``: whoever prints byte by byte would otherwise wake the
  node for each. A flood is read as fast as it comes, and when a task is answered nobody rests.
* What tasks write to standard error is passed on, and with ``echo`` also written to the node's own, as far as it is passed
  on: a flood must not fill a log file either. What is nobody's is written there in any case.
* Of how far a task has come only the latest is passed on: when the worker says that there is something, and once more when
  it may have said the next without telling.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from .protocol import Advance, Done, Words
from .streams import EVERY_S, Streams

REST_S = 0.001
MUCH = 16 * 1024
_LOOK_AGAIN_S = 1.2 * EVERY_S


class Listener:
    """``forward`` writes to the node's own standard error; ``listen`` and ``ignore`` tell its loop of a descriptor."""

    def __init__(
        self, forward: Callable[[bytes], None], listen: Callable[[int], None], ignore: Callable[[int], None], *, echo: bool
    ) -> None:
        self._forward = forward
        self._listen = listen
        self._ignore = ignore
        self._echo = echo
        self._streams: dict[int, Streams] = {}  # by worker
        self._workers: dict[int, int] = {}  # by descriptor
        self._resting: dict[int, float] = {}  # by descriptor, until when
        self._full: set[int] = set()  # the workers of whose words some may not have been taken
        self._looks: dict[int, float] = {}  # by worker: when to look again how far its task is
        self._seen: dict[int, Advance] = {}  # by worker: how far it was
        self._words: list[Words] = []
        self._advances: list[Advance] = []

    def add(self, worker: int, streams: Streams) -> None:
        self._streams[worker] = streams
        self._workers[streams.fileno()] = worker
        self._listen(streams.fileno())

    def bury(self, worker: int, now: float) -> None:
        """Read what a dead worker has left."""
        streams = self._streams[worker]
        streams.read_rest()
        self._take(streams, now)
        del self._streams[worker], self._workers[streams.fileno()]
        if self._resting.pop(streams.fileno(), None) is None:
            self._ignore(streams.fileno())
        self._full.discard(worker)
        self._looks.pop(worker, None)
        self._seen.pop(worker, None)

    def listens_to(self, ready: set[int]) -> bool:
        """One of these descriptors is to be read, or will be again."""
        return bool(self._resting) or not ready.isdisjoint(self._workers)

    def read(self, ready: set[int], now: float) -> None:
        for descriptor in ready & self._workers.keys():
            worker = self._workers[descriptor]
            self._full.add(worker)
            if self._streams[worker].read() < MUCH:
                self._ignore(descriptor)
                self._resting[descriptor] = now + REST_S
        if self._resting:
            for descriptor in [each for each, until in self._resting.items() if until <= now]:
                del self._resting[descriptor]
                self._listen(descriptor)

    def answered(self, worker: int, done: Done) -> None:
        """To be told before anybody else is."""
        if self._streams[worker].answered(done):
            self._full.add(worker)
        if self._looks.pop(worker, None) is not None:
            self._look(worker)

    def advanced(self, worker: int, now: float) -> None:
        """The worker's task has said how far it is."""
        self._look(worker)
        self._looks[worker] = now + _LOOK_AGAIN_S

    def take(self, now: float) -> tuple[list[Words], list[Advance]]:
        """What is to be passed on now."""
        for worker in list(self._full):
            streams = self._streams[worker]
            if streams.due() <= now:
                self._take(streams, now)
            if streams.due() == math.inf:
                self._full.discard(worker)
        for worker in [worker for worker, at in self._looks.items() if at <= now]:
            del self._looks[worker]
            self._look(worker)
        words, self._words = self._words, []
        advances, self._advances = self._advances, []
        return words, advances

    def due(self) -> float:
        """When there is something to take, or to listen to again; 0.0 is at once."""
        if self._words or self._advances:
            return 0.0
        if not self._full and not self._resting and not self._looks:
            return math.inf
        times = [self._streams[worker].due() for worker in self._full]
        return min([math.inf, *times, *self._resting.values(), *self._looks.values()])

    def _take(self, streams: Streams, now: float) -> None:
        for words in streams.take(now):
            self._words.append(words)
            if self._echo and words.stream == 2:
                self._forward(words.text)
        if data := streams.take_unclaimed():
            self._forward(data)

    def _look(self, worker: int) -> None:
        advance = self._streams[worker].advance()
        if advance is not None and advance != self._seen.get(worker):
            self._seen[worker] = advance
            self._advances.append(advance)
