"""A WaitGroup that a simulated client counts on by hand: one is added for each task that it is sent to."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ..core.events import Asked, Tell
from ..core.groups import NEGATIVE
from ..protocol import GroupAdd, GroupDone, GroupWait, Options
from .world import SimulationFailed, World, named

FIRST_REQUEST = 3


class Debts:
    """The client's side. ``forgotten``: a broker that did not know the client may not know what it had counted either."""

    def __init__(self, world: World, client: bytes, post: Callable[[object], None], number: int = 0) -> None:
        self.group = (client + b"_%d" % number).ljust(16, b"_")
        self.request = FIRST_REQUEST + number
        self.forgotten = False
        self.settled = False
        # Tasks that have tasks hold it. These may count again when the wait is over, and their parents are.
        self.families = False
        self._world = world
        self._post = post
        self._sent: list[bytes] = []  # tasks that hold it
        self._waits_for: list[bytes] = []  # those that were asked for when the wait began
        self._answers: Mapping[bytes, str] = {}

    def asks(self, options: Mapping[bytes, Options], tasks: list[bytes]) -> None:
        """These are about to be asked for."""
        sent = [task for task in tasks if self.group in options[task].holds]
        if sent:
            self._sent += sent
            self._post(Tell(GroupAdd([(self.group, len(sent))])))

    def is_not_sent(self, entry: Asked) -> None:
        """An input of the task has failed before it was submitted."""
        if self.group in entry.shape.options.holds:
            self._post(Tell(GroupAdd([(self.group, 0)], failed="an input has failed")))

    def wait(self, answers: Mapping[bytes, str]) -> None:
        self._answers = answers
        self._waits_for = list(self._sent)
        self._post(Tell(GroupWait(self.request, self.group)))

    def replied(self, reply: GroupDone) -> None:
        """It is zero: each task has counted down, or ended without, which is told."""
        if not self.forgotten and not (self.families and self._world.counts_lost):
            self._check(reply.error)
        if all(task in self._answers for task in self._sent):
            self.settled = True
        else:  # an attempt has counted down and may be taken back yet
            self._world.at(0.5, lambda: self.wait(self._answers))

    def _check(self, error: str) -> None:
        if error == NEGATIVE:
            raise SimulationFailed("an attempt that was run again has counted down twice")
        failed = [task for task in self._waits_for if self._answers.get(task, "ok") != "ok"]
        accounts = self._world.accounts
        if error and not failed and not any(map(accounts.lost_any, self._waits_for)):
            raise SimulationFailed(f"all went well with those that hold the WaitGroup, and it is said: {error}")
        well = [task for task in self._waits_for if task not in failed]
        open_ = [named(task) for task in well if not accounts.settled(task, answered=task in self._answers, told=error)]
        if open_:
            raise SimulationFailed(f"the WaitGroup is zero before {open_} have counted down")
