"""``up --detach``: this very process goes on in the background, as a child in a session of its own, with a pipe on which it
says that it is ready, or why not. What it and the tasks print goes to a log.

It is a fork and not a new interpreter, which would take a third of a second more, and to which all that was asked for had to
be told where nobody else reads it. Nothing here has started a thread before.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import time
from collections.abc import Callable
from typing import IO, Any, NoReturn, TextIO

from ..brokers import STOP_TIMEOUT_S, check_free, facts_of
from ..errors import StartError, ZmqschedError
from ..shell import Starter
from .names import log_path, new_log

COPY_EVERY_S = 0.2


def start_detached(name: str, run: Callable[[Starter], int], timeout_s: float | None) -> dict[str, Any]:
    """Run it in the background until it says that it is ready; what it says. What it writes meanwhile is written here."""
    check_free(name)
    read, write = os.pipe()
    with new_log(name) as log:
        sys.stdout.flush()
        sys.stderr.flush()
        child = os.fork()
        if not child:
            _go_on(run, write, log)
    os.close(write)
    with log_path(name).open("rb") as said, os.fdopen(read, "rb") as ready:
        try:
            _copy_until(ready, said, timeout_s)
            if not (line := ready.readline()):
                raise StartError("it ended before it was ready")
            return facts_of(line)
        except BaseException as error:
            _end(child, at_once=not isinstance(error, ZmqschedError))
            if isinstance(error, StartError):
                _copy(said)
            log_path(name).unlink(missing_ok=True)
            raise


def _go_on(run: Callable[[Starter], int], ready: int, log: TextIO) -> NoReturn:
    """The child: of what its starter has open it keeps the pipe alone."""
    code = 1
    try:
        os.setsid()
        with open(os.devnull, "rb") as nothing:
            os.dup2(nothing.fileno(), 0)
        for descriptor in (1, 2):
            os.dup2(log.fileno(), descriptor)
        for descriptor in sorted(map(int, os.listdir("/proc/self/fd"))):
            if descriptor not in (0, 1, 2, ready):
                with contextlib.suppress(OSError):  # the one that listed them
                    os.close(descriptor)
        code = run(Starter(ready))
    except KeyboardInterrupt:  # its starter has given it up
        code = 128 + signal.SIGINT
    except BaseException:  # noqa: BLE001 - as the interpreter does with what nobody catches
        sys.excepthook(*sys.exc_info())
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)  # nobody above this frame knows that there are two


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


def _end(child: int, *, at_once: bool) -> None:
    """One that has said why it cannot start is about to end; a signal then would only make it complain."""
    if not at_once:
        process = os.pidfd_open(child)
        try:
            select.select([process], [], [], STOP_TIMEOUT_S)
        finally:
            os.close(process)
    os.kill(child, signal.SIGTERM)
    os.waitpid(child, 0)
