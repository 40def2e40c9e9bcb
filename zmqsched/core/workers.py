"""What a node's agent keeps of each task that it holds, and of each of its workers."""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Literal

from msgspec import Struct

from ..protocol import LENT, Options, Payload, Shape
from .stops import Ending

REPORT_AFTER_S = 0.05  # a task that runs this long is reported as running


class Held(Struct, eq=False, gc=False):
    """A task at this node. ``number``: in the order they came; ``limit_s``: how long it may run.

    ``inputs``: whose results are its arguments, and their names among the functions; with its own function they are what it
    ``needs``, and of these it ``lacks`` so many. ``worker`` is 0 while it waits here; ``reported``: as running;
    ``counted``: on a WaitGroup; ``orphan``: the session that ordered it is over; ``revoked``: it is not wanted any more;
    ``unwanted``: not here, unless it runs; ``too_many`` wait for others.
    """

    number: int
    task: bytes
    attempt: int
    call: Payload
    shape: Shape
    options: Options
    rank: int
    limit_s: float
    needs: list[bytes]
    inputs: tuple[tuple[bytes, bytes], ...]
    lacks: int = 0
    worker: int = 0
    reported: bool = False
    counted: bool = False
    orphan: bool = False
    revoked: bool = False
    unwanted: bool = False
    too_many: bool = False


class Worker:
    """``runs``: what it was given and has not answered, in order; the first of them is running since ``since``. ``ending``:
    its task is brought to an end, or was, and the worker is not fit for another yet. ``waiting_since``: since when its task
    waits for others, if it does; ``waited_s``: how long it has in all; ``late``: it has gone on, perhaps beyond the slots;
    ``spare``: it is to end, for it is not needed. ``left``: how many more tasks it may take; ``worn``: none, for it
    has taken much memory; ``over``: how much, when it is killed for that. ``plain``: its task takes what any slot has, so
    that others like it may lie behind it."""

    __slots__ = (
        "done", "ending", "functions", "gpus", "id", "idle_since", "late", "left", "over", "pid", "plain", "runs", "since",
        "spare", "taking_back", "uses", "waited_s", "waiting_since", "worn",
    )  # fmt: skip

    def __init__(self, number: int, left: float = math.inf) -> None:
        self.id = number
        self.left = left
        self.worn = False
        self.over = ""
        self.pid = 0
        self.done = 0
        self.runs: OrderedDict[bytes, Held] = OrderedDict()
        self.since = 0.0
        self.functions: set[bytes] = set()
        self.uses: tuple[tuple[str, float], ...] = ()
        self.plain = False
        self.gpus: tuple[str, ...] = ()
        self.taking_back = False
        self.ending: Ending | None = None
        self.waiting_since: float | None = None
        self.waited_s = 0.0
        self.late = False
        self.idle_since = 0.0
        self.spare = False

    @property
    def state(self) -> Literal["starting", "idle", "busy", "waiting"]:
        if self.waits:
            return "waiting"
        return "starting" if not self.pid else "busy" if self.runs or self.ending else "idle"

    @property
    def waits(self) -> bool:
        """Its slot is lent."""
        return self.waiting_since is not None

    @property
    def active(self) -> bool:
        """It takes a slot."""
        return bool(self.runs) and self.waiting_since is None

    @property
    def fit(self) -> bool:
        """For another task."""
        return bool(self.pid) and self.ending is None and not self.spare and not self.is_worn

    @property
    def is_worn(self) -> bool:
        """To be replaced."""
        return self.worn or self.left <= 0

    @property
    def has_nothing_else(self) -> bool:
        """Nothing lies in its pipe behind the task it runs, if it runs one: what its ending waits for."""
        return len(self.runs) <= 1 and not self.taking_back

    @property
    def first(self) -> Held:
        """What it runs; there is something."""
        return next(iter(self.runs.values()))

    def due(self, stuck_after: float) -> float:
        """When something is to be done about what it has, unless it answers before: its task is at its end, or its limit; it
        is to be reported as running; or what has lain behind it for ``stuck_after`` is to be taken back."""
        at = self.ending.at if self.ending is not None and self.has_nothing_else else math.inf
        if not self.runs:
            return at
        first = self.first
        if len(self.runs) > 1 and not self.taking_back:
            at = min(at, self.since + stuck_after)
        if not first.reported:
            at = min(at, self.since + REPORT_AFTER_S)
        return at if self.ending is not None else min(at, self.since + first.limit_s)

    @property
    def booked(self) -> list[tuple[str, float]]:
        """What its task has of the node's resources now."""
        return [(name, amount) for name, amount in self.uses if not (self.waits and name in LENT)]
