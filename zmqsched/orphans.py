"""What tasks leave behind: descendants of workers that have left their worker's session, found again and ended.

Rules
-----
* Nursery and node are *subreapers*: a process whose parent died becomes the child of the nearest of them, instead of init's.
  So whatever a worker's death orphans is the nursery's child, and what the nursery's own death orphans is the node's.
* A worker bears a *mark* that its descendants inherit through fork and exec, whatever session, group or environment they
  make for themselves: the soft limit RLIMIT_RTTIME, which binds real-time processes only, set to an amount (100,000 years)
  that none of them can reach. So the nursery can tell whose orphan a child of its own is.
* What a task started lives on while its worker does, as with ``ProcessPoolExecutor``; with the worker it is killed.
* Only children are killed: nobody but their parent, who is here, can free their pids for others.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
from collections.abc import Callable, Container
from time import monotonic, sleep

_PR_SET_CHILD_SUBREAPER = 36  # <linux/prctl.h>
_MARK = 1 << 62
# What forks faster than it can be killed, or may not be killed (it is another user's by now), is left after this long.
PATIENCE_S = 2.0
_PAUSE_S = 0.001


def adopt() -> None:
    """From now on orphans among this process's descendants become its children. Its own children do not inherit this."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def mark(worker: int) -> None:
    """Mark this process, and all that will descend from it. Where that cannot be, its orphans end with the node."""
    with contextlib.suppress(ValueError, OSError):
        hard = resource.getrlimit(resource.RLIMIT_RTTIME)[1]
        resource.setrlimit(resource.RLIMIT_RTTIME, (_MARK + worker, hard))


def is_marked(pid: int) -> bool:
    """Whether this process descends from a worker, one that lives or not. False for other users' processes."""
    try:
        return resource.prlimit(pid, resource.RLIMIT_RTTIME)[0] >= _MARK
    except (OSError, ValueError):
        return False


def end_orphans(worker: int, others: Container[int]) -> None:
    """Kill and bury the children of this process that descend from the worker of this number; ``others`` never do."""
    _end(lambda pid: pid not in others and _bears(pid, worker))


def end_all() -> None:
    """Kill and bury all children of this process, and theirs."""
    _end(bool)


def _end(chosen: Callable[[int], bool]) -> None:
    """The chosen children, then those of theirs that thereby become ours, until none is left."""
    until = monotonic() + PATIENCE_S
    none_seen = 0
    while none_seen < 2 and monotonic() < until:  # the kernel's list may lack a child when another ends while it is read
        found = [pid for pid in _children() if chosen(pid)]
        none_seen = 0 if found else none_seen + 1
        for pid in found:
            with contextlib.suppress(PermissionError):
                os.kill(pid, signal.SIGKILL)
        for pid in found:
            os.waitpid(pid, os.WNOHANG)
        if found:
            sleep(_PAUSE_S)


def _bears(pid: int, worker: int) -> bool:
    try:
        return resource.prlimit(pid, resource.RLIMIT_RTTIME)[0] == _MARK + worker
    except OSError:  # another user's by now
        return False


def _children() -> list[int]:
    """Of this process's first thread, the one that orphans are given to. Dead ones that are not buried are among them."""
    pid = os.getpid()
    try:
        with open(f"/proc/{pid}/task/{pid}/children", "rb") as file:
            return [int(word) for word in file.read().split()]
    except FileNotFoundError:  # a kernel without CONFIG_PROC_CHILDREN
        return []
