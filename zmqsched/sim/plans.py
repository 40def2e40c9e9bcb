"""What a simulated task does, which is its call."""

from __future__ import annotations

import msgspec

from ..protocol import Payload

FUNCTIONS = {digest: b"code of " + digest for digest in (b"function-digest1", b"function-digest2", b"function-digest3")}


class Plan(msgspec.Struct, array_like=True, frozen=True):
    """A task's call: runs ``seconds``, then returns ``number``, raises, raises the first time only, or kills its worker.

    ``once``: it must not run twice. ``retried``: its exception is one of those that a retry may help against. ``limit_s``:
    its time limit, or 0. ``stubborn``: it ignores interrupts. ``inputs``: the numbers of the tasks of the same client whose
    results it has as arguments. ``group``: the WaitGroup that it is sent, if any; ``counts``: whether it counts down on that
    when it begins, when it ends, or never; "around": it adds when it begins, and counts that down when it ends. ``waits``:
    for the middle part of its time it waits for others. ``children``: tasks that it submits halfway, with its WaitGroup, on
    which it adds one for each; ``awaits``: whether it waits for their "answers" then, or for the "group", or for neither.
    """

    number: int
    seconds: float
    ends: str
    once: bool = False
    retried: bool = True
    limit_s: float = 0.0
    stubborn: bool = False
    inputs: tuple[int, ...] = ()
    group: bytes = b""
    counts: str = ""
    waits: bool = False
    children: tuple[Plan, ...] = ()
    awaits: str = ""


def number_of(task: bytes) -> int:
    return int.from_bytes(task[8:], "big")


def joined(payload: Payload) -> bytes:
    return payload if isinstance(payload, bytes) else b"".join(payload)
