"""How a node ends a task that runs: at its time limit, or because it was cancelled by force.

Steps
-----
::

    BEGUN ──► LOOKING ──► INTERRUPTED ──► KILLED
      └───────────────────────▲

* BEGUN: what lies behind the task in its worker's pipe is taken back first, so the worker has this task and no other.
  LOOKING, for time limits: the worker was asked for its stack. INTERRUPTED: SIGINT, so that ``finally`` blocks run.
  KILLED, after ``GRACE_S``: SIGKILL.
* Until it is interrupted the task may still end by itself; then nothing has happened. Afterwards a value still counts (the
  task may catch KeyboardInterrupt and return what it has), an error does not: it is the interrupt's doing.
* **A signal never hits another task.** An interrupted worker gets nothing new until it has answered *and* said that the
  signal has come (``Interrupted``): signals wait while they are blocked, and another thread may take them. One that does
  not say so in time, because the task has put a handler of its own in place, is killed too, if the task has ended or not.
* The death of an interrupted worker is ours: nobody is charged with it, and the worker is replaced at once.
"""

from __future__ import annotations

import math
from enum import IntEnum

from .events import AgentAction, AskStack, Interrupt, Kill, TellStack

LOOK_S = 0.05  # for the stack to be written
GRACE_S = 0.4  # for ``finally`` blocks


class Step(IntEnum):
    BEGUN = 0
    LOOKING = 1
    INTERRUPTED = 2
    KILLED = 3


BEGUN, LOOKING, INTERRUPTED, KILLED = Step


class Ending:
    """Of the task that one worker runs. ``at``: when the next step is due. ``acknowledged``: the signal has come."""

    __slots__ = ("acknowledged", "at", "look", "stack", "step")

    def __init__(self, now: float, *, look: bool) -> None:
        self.step = BEGUN
        self.at = now
        self.look = look
        self.stack = ""
        self.acknowledged = False

    @property
    def interrupted(self) -> bool:
        return self.step >= INTERRUPTED

    @property
    def over(self) -> bool:
        """The task has been answered: the worker may be given others."""
        return self.step < INTERRUPTED or (self.acknowledged and self.step < KILLED)

    def advance(self, worker: int, now: float) -> list[AgentAction]:
        """The next step, if it is due. The worker must have nothing in its pipe but the task."""
        if now < self.at:
            return []
        if self.step is BEGUN and self.look:
            self.step, self.at = LOOKING, now + LOOK_S
            return [AskStack(worker)]
        if not self.interrupted:
            looked: list[AgentAction] = [TellStack(worker)] if self.look else []
            self.step, self.at = INTERRUPTED, now + GRACE_S
            return [*looked, Interrupt(worker)]
        self.step, self.at = KILLED, math.inf
        return [Kill(worker)]
