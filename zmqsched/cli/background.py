"""``up --detach``: the same ``up`` in a session of its own, with a pipe on which it says that it is ready, or why not.
What it and the tasks print goes to a log."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Sequence

from ..cluster import STOP_TIMEOUT_S, check_free, wait_until_ready
from ..config import ConnectionFile
from ..errors import StartError, ZmqschedError
from .names import log_path, new_log


def start_detached(name: str, arguments: Sequence[str], timeout_s: float) -> ConnectionFile:
    """Run ``zmqsched`` with these arguments until it says that its cluster is ready."""
    check_free(name)
    read, write = os.pipe()
    with os.fdopen(write, "wb"), new_log(name) as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "zmqsched", *arguments, f"--ready-fd={write}"],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=[write], start_new_session=True,
        )  # fmt: skip
    try:
        return ConnectionFile.load(wait_until_ready(process, os.fdopen(read, "rb"), timeout_s)["file"])
    except BaseException as error:
        _end(process, at_once=not isinstance(error, ZmqschedError))
        if isinstance(error, StartError):
            sys.stderr.write(log_path(name).read_text(errors="replace"))
        log_path(name).unlink(missing_ok=True)
        raise


def _end(process: subprocess.Popen[bytes], *, at_once: bool) -> None:
    """One that has said why it cannot start is about to end; a signal then would only make it complain."""
    if not at_once:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_TIMEOUT_S)
    process.terminate()
    process.wait()
