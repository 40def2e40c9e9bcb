"""What the broker holds of others' bytes, and when it asks clients to hold back.

Rules
-----
* What counts: the call of each unfinished task, the results that unfinished tasks have as arguments (each once), the
  functions kept, and the answers that their client has not acknowledged; not those kept for a job, which may wait for a
  day. A task and an answer count for ``RECORD_BYTES`` besides, so that very many small ones have a limit too.
* Over the cap clients are told to hold back, below ``EASE`` of it to go on. Nothing is dropped: what they had sent before
  they heard is taken. Beyond the cap that is at most what a client has on its way (``requests.WINDOW_BYTES`` and one
  message), times the clients.
* Answers over the cap, of clients that do not read theirs, stop the placing of tasks: what was accepted could otherwise grow
  without end by being done. A client that is silent for its lease takes its answers with it, so that ends.
* Kept functions that nobody needs are at most a quarter of the cap, so when all is done nobody is held.
"""

from __future__ import annotations

from collections.abc import Sized

from ..protocol import Final, Payload, payload_bytes

RECORD_BYTES = 512  # about what the records of a task take in memory, apart from its payload
INPUT_BYTES = 256  # and what each of its inputs adds
EASE = 0.8
FUNCTIONS_SHARE = 4  # what is kept of functions that nobody needs: one part in so many


def call_bytes(call: Payload, inputs: Sized = ()) -> int:
    """What a task counts for, besides the results that it has as arguments."""
    size = len(call) if type(call) is bytes else payload_bytes(call)  # of nearly all a call less
    return size + RECORD_BYTES + INPUT_BYTES * len(inputs)


def answer_bytes(final: Final) -> int:
    """What an answer counts for."""
    value = final.value
    size = len(value) if type(value) is bytes else payload_bytes(value)
    return size + len(final.text) + len(final.why) + RECORD_BYTES


class Load:
    """``tasks`` and ``answers`` are in bytes and counted by the owner; ``full`` says whether clients are to hold back."""

    __slots__ = ("answers", "cap", "full", "tasks")

    def __init__(self, cap_bytes: int) -> None:
        self.cap = cap_bytes
        self.tasks = 0
        self.answers = 0
        self.full = False

    def turns(self, others_bytes: int) -> bool:
        """Look again: whether ``full`` has changed. ``others_bytes``: functions and inputs."""
        held = self.tasks + self.answers + others_bytes
        before = self.full
        self.full = held > self.cap * (EASE if before else 1.0)
        return self.full != before

    @property
    def unread(self) -> bool:
        """Answers alone are over the cap."""
        return self.answers > self.cap
