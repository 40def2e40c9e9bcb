"""``up --detach``: the same ``up`` in a session of its own, with a pipe on which it says that it is ready, or why not.
What it and the tasks print goes to a log."""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import IO, Any

from ..cluster import STOP_TIMEOUT_S, check_free, wait_until_ready
from ..errors import StartError, ZmqschedError
from .names import log_path, new_log

COPY_EVERY_S = 0.2


def start_detached(name: str, arguments: Sequence[str], wanted: bytes, timeout_s: float | None) -> dict[str, Any]:
    """Run ``zmqsched`` with these arguments until it says that its cluster is ready; what it says.

    What it writes meanwhile is written here too. ``wanted`` it reads from a descriptor: everybody sees arguments, and an
    environment may be in it.
    """
    check_free(name)
    read, write = os.pipe()
    with os.fdopen(write, "wb"), os.fdopen(os.memfd_create("zmqsched"), "wb") as memory, new_log(name) as log:
        memory.write(wanted)
        memory.seek(0)
        words = [*arguments, f"--ready-fd={write}", f"--wanted-fd={memory.fileno()}", f"--name={name}"]
        process = subprocess.Popen(
            [sys.executable, "-m", "zmqsched", *words],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=[write, memory.fileno()], start_new_session=True,
        )  # fmt: skip
    with log_path(name).open("rb") as said, os.fdopen(read, "rb") as ready:
        try:
            _copy_until(ready, said, timeout_s)
            return wait_until_ready(process, ready, 0.0)
        except BaseException as error:
            _end(process, at_once=not isinstance(error, ZmqschedError))
            if isinstance(error, StartError):
                _copy(said)
            log_path(name).unlink(missing_ok=True)
            raise


def _copy_until(ready: IO[bytes], said: IO[bytes], timeout_s: float | None) -> None:
    """Until it says that it is ready, or the time is over."""
    until = None if timeout_s is None else time.monotonic() + timeout_s
    while not select.select([ready], [], [], COPY_EVERY_S)[0]:
        _copy(said)
        if until is not None and time.monotonic() > until:
            raise StartError(f"the cluster was not ready within {timeout_s:.0f} s")


def _copy(said: IO[bytes]) -> None:
    sys.stderr.write(said.read().decode(errors="replace"))
    sys.stderr.flush()


def _end(process: subprocess.Popen[bytes], *, at_once: bool) -> None:
    """One that has said why it cannot start is about to end; a signal then would only make it complain."""
    if not at_once:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_TIMEOUT_S)
    process.terminate()
    process.wait()
