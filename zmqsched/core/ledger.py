"""What must be in the journal before it may be said: the pure half of the journal.

Rules
-----
* A broker with a journal acknowledges a message, and gives a client its answer, only after what follows from it is on
  disk. So each turn's facts are one *commit*: a numbered :class:`~zmqsched.core.events.Write`, with all that waits for
  it. ``Written`` says that it is on disk, commits one after the other.
* What a turn has received waits for the last commit begun, also if nothing came of it.
* That tasks are forgotten matters to nobody but the size of the journal, so it is written with the next commit that there
  is a reason for, or when the owner asks (``hurry``).
* The journal is a log; ``restore`` plays it again. When it has grown to several times what is still alive in it, the
  owner writes it anew (``snapshot``) in one commit that replaces all before it.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

from ..protocol import MAX_ITEMS, Attempt, Final, Finals, Forgotten, Left, Record, RecordMessage, batches, wire_bytes
from .events import Write
from .groups import Waiter

SLACK_BYTES = 64 * 1024 * 1024  # a journal is not written anew before it has grown by this much
IDLE_BYTES = 1024 * 1024  # or by this, if nothing is alive in it
GROWTH = 4


class Answered(NamedTuple):
    """An answer that its owner's followers may have."""

    owner: bytes
    final: Final


class Counted(NamedTuple):
    """A wait on a WaitGroup is over."""

    waiter: Waiter
    error: str


class Placed(NamedTuple):
    """These tasks, which may be started only once, are for this node."""

    node: str
    attempts: list[Attempt]


Consequence = Answered | Counted | Placed


class _Commit(NamedTuple):
    number: int
    received: dict[int, int]  # the highest number received, by session
    consequences: list[Consequence]


class Ledger:
    def __init__(self, slack_bytes: int = SLACK_BYTES) -> None:
        self._slack_bytes = slack_bytes
        self._records: list[Record] = []
        self._finals: dict[bytes, list[Final]] = {}  # by owner, in the order of this turn
        self._forgotten: list[bytes] = []
        self._received: dict[int, int] = {}
        self._consequences: list[Consequence] = []
        self._commits: deque[_Commit] = deque()
        self._number = 0
        self._anew = 0  # the commit that writes the journal anew, while it is under way
        self._bytes = 0
        self._base = 0  # how large the journal was when it was last written anew
        self.trouble = ""  # why it cannot be written now

    @property
    def busy(self) -> bool:
        """Something is to be written, or is being written."""
        return bool(self._records or self._finals or self._commits)

    def record(self, owner: bytes, body: RecordMessage) -> None:
        self._records.append(Record(owner, body))

    def answer(self, owner: bytes, final: Final) -> None:
        self._finals.setdefault(owner, []).append(final)
        self._consequences.append(Answered(owner, final))

    def leave(self, owner: bytes) -> None:
        """The owner is gone, with its answers of this turn too."""
        self._finals.pop(owner, None)
        self.record(owner, Left())

    def then(self, consequence: Consequence) -> None:
        """To happen when all that was recorded so far is on disk."""
        self._consequences.append(consequence)

    def forget(self, task: bytes) -> None:
        self._forgotten.append(task)

    def received(self, session: int, number: int) -> None:
        self._received[session] = number

    def has_outgrown(self, *, idle: bool) -> bool:
        limit = min(IDLE_BYTES, self._slack_bytes) if idle else self._slack_bytes + GROWTH * self._base
        return not self._anew and self._bytes > self._base + limit

    def commit(self, *, hurry: bool = False) -> Write | None:
        """End the turn: what is to be written, if anything. What waits for nothing comes out of ``due``."""
        if not self._records and not self._finals and not (hurry and self._forgotten):
            self._attach_to_last()
            return None
        starts = range(0, len(self._forgotten), MAX_ITEMS)
        records = [Record(b"", Forgotten(self._forgotten[start : start + MAX_ITEMS])) for start in starts]
        records += self._records
        for owner, finals in self._finals.items():
            records += [Record(owner, Finals(batch)) for batch in batches(finals, final_bytes)]
        return self._begin(records, anew=False)

    def replace(self, snapshot: list[Record]) -> Write:
        """Write the journal anew; ``snapshot`` holds all that was ever recorded and still matters."""
        return self._begin(snapshot, anew=True)

    def due(self) -> tuple[dict[int, int], list[Consequence]]:
        """What waits for no commit: receipts by session, and consequences."""
        if self._commits:
            return {}, []
        received, self._received = self._received, {}
        consequences, self._consequences = self._consequences, []
        return received, consequences

    def written(self, number: int, size: int) -> tuple[dict[int, int], list[Consequence]]:
        """All commits up to this one are on disk; ``size`` is the journal's, in bytes."""
        received: dict[int, int] = {}
        consequences: list[Consequence] = []
        while self._commits and self._commits[0].number <= number:
            commit = self._commits.popleft()
            received.update(commit.received)
            consequences.extend(commit.consequences)
        self._bytes = size
        if self._anew and number >= self._anew:
            self._base, self._anew = size, 0
        self.trouble = ""
        return received, consequences

    def _begin(self, records: list[Record], *, anew: bool) -> Write:
        self._number += 1
        self._commits.append(_Commit(self._number, self._received, self._consequences))
        self._records, self._finals, self._forgotten = [], {}, []
        self._received, self._consequences = {}, []
        if anew:
            self._anew = self._number
        return Write(self._number, records, anew)

    def _attach_to_last(self) -> None:
        if self._commits and (self._received or self._consequences):
            last = self._commits[-1]
            last.received.update(self._received)
            last.consequences.extend(self._consequences)
            self._received, self._consequences = {}, []


def final_bytes(final: Final) -> int:
    value = final.value
    size = len(value) if type(value) is bytes else wire_bytes(value)  # of nearly all a call less
    return size + len(final.text) + len(final.why) + 40
