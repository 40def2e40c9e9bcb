"""What the broker's shell looks at once a second: whether anybody new can still come in, who was not let in, and who brings
too much.

Descriptors are looked at themselves, not libzmq's word of connections that it could not accept: without any left it tries
again and again, and would say so a hundred thousand times a second to a monitor, which it waits for.
"""

from __future__ import annotations

import os
import resource

from .authenticator import Authenticator
from .core.events import Alarmed, Malformed
from .intake import Intake

EVERY_S = 1.0
FEW = 0.9  # of the descriptors there are, used


class Lookout:
    def __init__(self, authenticator: Authenticator | None, intake: Intake) -> None:
        self._authenticator = authenticator
        self._intake = intake
        self._refused = 0
        self._next = 0.0

    def look(self, now: float) -> list[Alarmed | Malformed]:
        """The news, if it is time."""
        if now < self._next:
            return []
        self._next = now + EVERY_S
        if self._authenticator is None:  # no TCP
            return [*descriptors()]
        return [*descriptors(), *self._refusals(*self._authenticator.refused), *self._intake.look()]

    def _refusals(self, refused: int, where: str) -> list[Malformed]:
        new, self._refused = refused - self._refused, refused
        return [Malformed(b"", "handshake with an unknown key", sender=where)] * min(new, 1_000)


def descriptors() -> list[Alarmed]:
    """An alarm if there are few or none left. The system gives the lowest that is free."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    advice = f"this process may have {limit} (ulimit -n); raise that, or see who connects (ss -tnp)"
    try:
        lowest = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        return [Alarmed("no descriptors left", f"nobody new can connect: {error.strerror}; {advice}")]
    os.close(lowest)
    return [Alarmed("few descriptors left", f"{lowest} are in use; {advice}")] if lowest > FEW * limit else []
