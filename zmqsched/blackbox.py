"""A worker's black box, its last stack: what is read when the worker is dead, or does not answer.

Rules
-----
* The node makes it and keeps it open, so it outlives the worker however that ends. Nobody else reads it.
* The **stack** is a memfd that ``faulthandler`` writes into, without Python's help: on a fatal signal (SIGSEGV, SIGFPE,
  SIGABRT, SIGBUS, SIGILL), and on ``STACK_SIGNAL``, which the node sends (through the nursery) to see where a live worker
  is, whether or not its code holds the GIL.
* Both sides share one file description, hence one offset. :meth:`BlackBox.clear` rewinds it, so that each dump is seen
  alone; what a dump writes at that very moment may be lost in part.
* The box is the worker's alone: a child that a task forks tells of its crash on standard error.
* A task may call ``faulthandler.enable`` itself: its choice of file stands from then on. What it disables is enabled again
  before the worker's next task.
"""

from __future__ import annotations

import faulthandler
import io
import os
import re
import signal

# Real-time, because libraries take SIGUSR1 and 2, SIGPROF, SIGURG and SIGQUIT for themselves; counted from the end, because
# those who take just any real-time signal begin at SIGRTMIN. Its default action kills, so the nursery ignores it from the
# start and workers inherit that until they are armed.
STACK_SIGNAL = signal.SIGRTMAX - 9
# Of a dump, which may go through a hundred threads; the one that matters is not always the first.
_MAX_DUMP = 64 * 1024
MAX_STACK = 8 * 1024  # characters of the stack as it is told
# Where the worker's own frames begin; what it calls on a task's behalf (unpickling, a WaitGroup) is of interest.
_WORKER = re.escape(os.path.join(os.path.dirname(os.path.abspath(__file__)), "worker.py"))
_OURS = re.compile(rf'  File "{_WORKER}", line \d+ in (_attempt|run_worker)')


class BlackBox:
    """The node's side."""

    def __init__(self) -> None:
        self.asked = False  # the worker was asked for its stack, and has not finished that task yet
        self.memory = 0  # bytes of resident set, as the node measured them last
        self._stack = io.FileIO(os.memfd_create("zmqsched-stack", os.MFD_CLOEXEC), "r+")

    @property
    def descriptor(self) -> int:
        """What the worker needs, for :func:`arm`."""
        return self._stack.fileno()

    def clear(self) -> None:
        """Forget the dumps so far."""
        self.asked = False
        self._stack.truncate(0)
        self._stack.seek(0)

    def stack(self) -> str:
        """The stack of the last dump, see :func:`readable_stack`; "" if there is none."""
        return readable_stack(os.pread(self._stack.fileno(), _MAX_DUMP, 0).decode(errors="replace"))

    def close(self) -> None:
        self._stack.close()


def arm(stack: int) -> None:
    """Have this process, a worker, write its stack into the box."""
    faulthandler.enable(stack)
    faulthandler.register(STACK_SIGNAL, stack, all_threads=True, chain=False)
    os.register_at_fork(after_in_child=_disarm)


def _disarm() -> None:
    faulthandler.unregister(STACK_SIGNAL)
    faulthandler.enable(2)


def readable_stack(dump: str) -> str:
    """What faulthandler wrote, without our own frames: the thread that runs the task first, its latest call first.

    Returns
    -------
    str
        One frame a line, at most ``MAX_STACK`` characters. Other threads follow, each under a line of its own.
    """
    current: list[str] = []
    others: list[str] = []
    for block in dump.split("\n\n"):
        head, *frames = block.strip("\n").split("\n")
        frames = _of_the_task([frame for frame in frames if frame.startswith("  ")])
        if head.startswith("Current thread"):
            current = frames
        elif head.startswith("Thread") and frames:
            others += ["another thread:", *frames]
    return "\n".join([*current, *others])[:MAX_STACK]


def _of_the_task(frames: list[str]) -> list[str]:
    for index, frame in enumerate(frames):
        if _OURS.fullmatch(frame):
            return frames[:index]
    return frames
