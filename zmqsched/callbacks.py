"""Runs the callbacks of a client's futures, away from its I/O thread.

Rules
-----
* One at a time, in the order in which the futures were done, in a daemon thread that is started when the first is due and
  ends when there has been nothing to do for a while. Whoever cancels a future runs its callbacks, as in the standard.
* A callback may do what it likes: submit, wait for other futures, shut the client down, never return. When it takes longer
  than ``PATIENCE_S`` and others are due, a further thread goes on with them.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable

PATIENCE_S = 0.05
IDLE_S = 2.0
# Callbacks that never return take a thread each; beyond so many, those that follow wait for one of them after all.
MAX_THREADS = 200


class Callbacks:
    def __init__(self) -> None:
        self._lock = threading.RLock()  # a signal handler may have interrupted who holds it
        self._work = threading.Condition(self._lock)
        self._done = threading.Condition(self._lock)
        self._due: deque[Callable[[], None]] = deque()
        self._threads: set[threading.Thread] = set()
        self._waiting = 0  # threads that have nothing to do, or wait for the one whose turn it is
        self._busy = 0
        self._turn: threading.Thread | None = None  # whose turn it is, and since when
        self._since = 0.0
        self._closed = False

    def put(self, call: Callable[[], None]) -> None:
        """Have this called, which never raises: the callbacks of one future. Does not wait."""
        with self._lock:
            self._due.append(call)
            if not self._waiting:
                self._start()
            elif len(self._due) == 1:
                self._work.notify()

    def finish(self) -> None:
        """Return when all callbacks that were due have returned. At exit, when no thread can be started, runs them here."""
        while True:
            with self._lock:
                while self._threads and (self._due or self._busy):
                    self._done.wait()
                if not self._due:
                    return
                call = self._due.popleft()
            call()

    def close(self) -> None:
        """The threads end as soon as there is nothing to do."""
        with self._lock:
            self._closed = True
            self._work.notify_all()

    def are_mine(self, thread: threading.Thread) -> bool:
        """Whether this thread runs callbacks here."""
        with self._lock:
            return thread in self._threads

    def _start(self) -> None:
        if len(self._threads) == MAX_THREADS:
            return
        thread = threading.Thread(target=self._run, name="zmqsched callbacks", daemon=True)
        self._threads.add(thread)
        try:
            thread.start()
        except RuntimeError:  # the program ends, or the system has no more
            self._threads.discard(thread)

    def _run(self) -> None:
        me = threading.current_thread()
        while (call := self._next(me)) is not None:
            call()
            del call
            with self._lock:
                self._busy -= 1
                if self._turn is me:
                    self._turn = None
                if not self._due and not self._busy:
                    self._done.notify_all()

    def _next(self, me: threading.Thread) -> Callable[[], None] | None:
        """The next call, when it is this thread's turn; None when there has been nothing to do for a while."""
        with self._lock:
            idle_until = time.monotonic() + IDLE_S
            while True:
                now = time.monotonic()
                if not self._due:
                    left = 0.0 if self._closed else idle_until - now
                else:
                    left = 0.0 if self._turn is None else self._since + PATIENCE_S - now
                if left <= 0:
                    break
                self._waiting += 1
                self._work.wait(left)
                self._waiting -= 1
            if not self._due:
                self._threads.discard(me)
                self._done.notify_all()
                return None
            call = self._due.popleft()
            self._turn, self._since = me, now
            self._busy += 1
            if self._due and not self._waiting:
                self._start()
            return call
