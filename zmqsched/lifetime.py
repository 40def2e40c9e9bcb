"""The clients of this process: how long they last, and what becomes of them at its end and in its forks.

Rules
-----
* A client lasts as long as somebody has it or one of its futures, and until its last task is answered, or for as long as it
  has a cluster of its own.
* At the program's end, however it ends short of a signal that kills it, it is waited for what was submitted, as the
  standard's executors do; for the callbacks too. Nothing more can be submitted; maps go on to their end, but one that is
  being read, and still draws items, ends. What belongs to a job is not waited for. After a second the program says so.
* An interrupt (Ctrl-C) then cancels what is left, also what runs. So does the one that has ended the program: whoever
  pressed it does not want to wait.
* In a forked child the parent's clients are of no use: their sockets and their threads are the parent's. Their unfinished
  futures fail there, so that nobody waits for what cannot come, without their callbacks, which the parent will call. Locks
  are made anew: a thread that is not there may have held them.
"""

from __future__ import annotations

import atexit
import concurrent.futures
import contextlib
import math
import os
import sys
import time
import weakref
from typing import TYPE_CHECKING, Any

from .futures import unpackers
from .waiting import cancel_all

if TYPE_CHECKING:
    from .client import Client
    from .futures import Future

SAY_AFTER_S = 1.0
FORKED = "this zmqsched Client belongs to the process that made it; after a fork make a new one"

# All that are not closed; and those that last even if nobody has them.
opened: weakref.WeakSet[Client] = weakref.WeakSet()
needed: set[Client] = set()


def register(client: Client) -> None:
    """A client has begun."""
    opened.add(client)
    # At exit the last registered goes first: clients before any cluster of this process that they may be using.
    atexit.unregister(_at_exit)
    atexit.register(_at_exit)


def _at_exit() -> None:
    clients = list(opened)
    try:
        for client in clients:
            client._take_no_more("cannot schedule new futures after interpreter shutdown")
            for run in list(client._runs):
                run.leave()
        if _was_interrupted():
            cancel_all(_unfinished(clients), force=True)
        else:
            _wait_for(clients)
            for client in clients:
                client._callbacks.finish()
    except KeyboardInterrupt:
        cancel_all(_unfinished(clients), force=True)
    finally:
        for client in clients:
            client._close()


def _was_interrupted() -> bool:
    """An interrupt has ended the program. At a prompt it may have ended anything, some time ago."""
    return isinstance(getattr(sys, "last_value", None), KeyboardInterrupt) and not hasattr(sys, "ps1")


def _wait_for(clients: list[Client]) -> None:
    say_at = time.monotonic() + SAY_AFTER_S
    while True:
        left = _unfinished(clients)
        concurrent.futures.wait(left, SAY_AFTER_S)
        busy = [run for client in clients for run in list(client._runs) if not run.waits]
        if not busy and not (left := _unfinished(clients)):
            return
        if time.monotonic() >= say_at:
            say_at = math.inf
            with contextlib.suppress(Exception):  # its standard error is the user's to close or to replace
                sys.stderr.write(
                    f"zmqsched: the program has ended but for {len(left)} unfinished tasks, which it waits for; "
                    "an interrupt (Ctrl-C) cancels them\n"
                )
        if not left:
            time.sleep(0.001)  # a map is about to send more


def _unfinished(clients: list[Client]) -> list[Future[Any]]:
    return [
        future for client in clients for task, future in list(client._futures.items())
        if task not in client._kept and not future.done()
    ]  # fmt: skip


def _in_forked_child() -> None:
    for client in list(opened):
        client._disown(RuntimeError(FORKED))
    opened.clear()
    needed.clear()
    unpackers.clear()


os.register_at_fork(after_in_child=_in_forked_child)
