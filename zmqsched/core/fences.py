"""The order of a task's program, which speaks on two ways: to its node, and through its client.

What a task counts on a WaitGroup goes with its node, for it belongs to the attempt (``counting.py``). What it submits and
waits for goes with its client, and may be quicker. A *fence* keeps the order: the client tells it to its node too, the node
passes it on to the broker, behind what it was told before, and the broker back to the client. Until then the client keeps
what is behind the fence. With a session what was on its way may have ended: the last fence is told again in the next.
"""

from __future__ import annotations

from collections import deque

from ..protocol import Fence, Query
from .events import Ask, ClientEvent, Tell, Withdraw


class Fences:
    def __init__(self, client: bytes) -> None:
        self._client = client
        self._number = 0
        self._behind: deque[Fence | ClientEvent] = deque()  # the first is a fence, if there is any

    def set(self) -> Fence:
        self._number += 1
        fence = Fence(self._client, self._number)
        self._behind.append(fence)
        return fence

    def keeps(self, event: ClientEvent) -> bool:
        """It has to wait, for what is before it waits."""
        if not self._behind or not isinstance(event, Ask | Withdraw | Tell):
            return False
        if isinstance(event, Tell) and isinstance(event.message, Query):
            return False
        self._behind.append(event)
        return True

    def passed(self, fence: Fence) -> list[ClientEvent]:
        """What may go now."""
        free: list[ClientEvent] = []
        while self._behind and not (isinstance(first := self._behind[0], Fence) and first.number > fence.number):
            self._behind.popleft()
            if not isinstance(first, Fence):
                free.append(first)
        return free

    @property
    def last(self) -> Fence | None:
        """The one that all others were before, if any has not been passed."""
        return Fence(self._client, self._number) if self._behind else None

    def sanity_check(self) -> None:
        assert not self._behind or isinstance(self._behind[0], Fence), "something waits behind no fence"
