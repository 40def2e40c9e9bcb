"""What a task may leave changed in its worker, and is put back: the working directory, and descriptors 0 to 2.

Rules
-----
* A closed or redirected standard descriptor is opened as it was. So is a closed ``sys.stdout`` or ``sys.stderr``; one that
  was replaced by another object stays, for modules do that once, when they are imported.
* After the task's answer, so that nobody waits for it, and at most once in ``EVERY_S``. Looking costs as much as putting
  back, two microseconds, a tenth of a short task: so tasks that begin within that time may still see what one has left.
* What cannot be put back ends the worker. Its task is answered, so nothing is charged; the node starts another.
* Signal handlers, limits, the environment, threads, modules' state: all that stays, as in any process pool.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from time import monotonic
from typing import TextIO

EVERY_S = 0.001
_STREAMS = (("stdout", 1), ("stderr", 2))


class Surroundings:
    """As they are now."""

    def __init__(self) -> None:
        self._kept: list[tuple[int, int]] = []
        for descriptor in range(3):
            with suppress(OSError):  # this process was started without it
                self._kept.append((os.dup(descriptor), descriptor))
        try:
            self._directory = os.open(".", os.O_PATH | os.O_CLOEXEC)
        except OSError:  # it is gone already
            self._directory = -1
        self._due = 0.0

    def restore(self) -> None:
        """Put back what was changed, unless that was done just now.

        Raises
        ------
        OSError
            It cannot be.
        """
        now = monotonic()
        if now < self._due:
            return
        self._due = now + EVERY_S
        for kept, descriptor in self._kept:
            os.dup2(kept, descriptor)
        if self._directory >= 0:
            os.fchdir(self._directory)
        for name, descriptor in _STREAMS:
            stream = getattr(sys, name)
            if getattr(stream, "closed", False):
                setattr(sys, name, _opened(descriptor, stream))


def _opened(descriptor: int, before: TextIO) -> TextIO:
    encoding, errors = getattr(before, "encoding", None), getattr(before, "errors", None)
    return open(descriptor, "w", buffering=1, encoding=encoding, errors=errors, closefd=False)
