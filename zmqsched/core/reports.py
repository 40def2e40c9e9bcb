"""What a node has to report, gathered until its turn ends: results, and what else has become of the attempts it holds."""

from __future__ import annotations

from ..protocol import (
    Attempt,
    Death,
    GroupAdd,
    Outcome,
    Progress,
    Results,
    Stopped,
    batches,
    wire_bytes,
)  # fmt: skip
from .uplink import Uplink
from .workers import Held


class Reports:
    """``credit``: as the broker was told."""

    def __init__(self, uplink: Uplink, credit: int) -> None:
        self.credit = credit
        self.outcomes: list[Outcome] = []
        self.started: list[Attempt] = []
        self.returned: list[Attempt] = []
        self.deaths: list[Death] = []
        self.stopped: list[Stopped] = []
        self.waiting: list[Attempt] = []
        self.resumed: list[Attempt] = []
        self._uplink = uplink
        self._taken_down: list[tuple[bytes, int]] = []  # attempts that had counted on WaitGroups, and died or were stopped
        self._additions = 0  # to WaitGroups, by tasks

    @property
    def due(self) -> bool:
        news = self.outcomes or self.started or self.returned or self.deaths or self.stopped
        return bool(news or self.waiting or self.resumed or self._taken_down)

    def session_over(self) -> None:
        """What is nobody's business any more."""
        for what in (self.started, self.returned, self.stopped, self.waiting, self.resumed):
            what.clear()

    def session_begins(self) -> None:
        """Perhaps with another broker, which numbers attempts anew."""
        self._taken_down = [(task, 0) for task, _ in self._taken_down]

    def counted(self, message: GroupAdd, task: bytes) -> None:
        """A task adds to WaitGroups."""
        self._additions += 1
        self._uplink.send(GroupAdd(message.deltas, self._additions, task))

    def no_longer_counts(self, held: Held) -> None:
        """Its attempt has ended and has no result. The report of that may end with the session; this does not."""
        if held.counted:
            self._taken_down.append((held.task, 0 if held.orphan else held.attempt))

    def send(self, credit: int) -> None:
        if self.outcomes:
            for batch in batches(self.outcomes, _outcome_bytes) if len(self.outcomes) > 1 else [self.outcomes]:
                self._uplink.send(Results(batch))
            self.outcomes = []
        if self.waiting or self.resumed:
            self._uplink.send(Progress(credit, waiting=self.waiting, resumed=self.resumed))
            self.waiting, self.resumed = [], []
            self.credit = credit
        if credit != self.credit or self.started or self.returned:
            self.credit = credit
            for message in self._progress(credit):
                self._uplink.send(message)
            self.started, self.returned = [], []
        if self.deaths:
            for deaths in batches(self.deaths, _death_bytes):
                self._uplink.send(Progress(credit, deaths=deaths))
            self.deaths = []
        if self.stopped:
            for stopped in batches(self.stopped, _stopped_bytes):
                self._uplink.send(Progress(credit, stopped=stopped))
            self.stopped = []
        for task, attempt in self._taken_down:  # behind the report, which may say that it was the last attempt
            self._additions += 1
            self._uplink.send(GroupAdd([], self._additions, task, attempt=attempt))
        self._taken_down.clear()

    def _progress(self, credit: int) -> list[Progress]:
        """One message, unless very much was returned: that goes last part first, as the broker puts each before what waits
        there."""
        last, *earlier = list(batches(self.returned, _attempt_bytes))[::-1] or [[]]
        return [Progress(credit, self.started, last), *(Progress(credit, returned=part) for part in earlier)]


def _outcome_bytes(outcome: Outcome) -> int:
    return wire_bytes(outcome.value) + 60


def _attempt_bytes(attempt: Attempt) -> int:
    return len(attempt.task) + 20


def _death_bytes(death: Death) -> int:
    return 4 * (len(death.how) + len(death.remains.stack) + len(death.remains.stderr)) + 100  # 4: what a character may take


def _stopped_bytes(stopped: Stopped) -> int:
    return 4 * len(stopped.text) + 60
