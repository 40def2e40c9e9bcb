"""The future that a client hands out: the standard's, awaitable as well, which unpickles when it is asked.

Rules
-----
* The I/O thread brings a task's final answer as it came, packed: the state changes, who waits is woken. Nothing of the
  user's runs there.
* ``result()`` and ``exception()`` unpickle, in the thread that asks, once; then the packed form is dropped. Of several that
  ask, one unpickles and the others wait for it, each as long as its timeout allows. An unpickling that raises, exits or
  never returns is thus the business of who asks for that result.
* Before its callbacks a result is unpickled in their thread (``callbacks.py``): most ask for it, and an event loop that
  does (``await``) would stand still meanwhile. What a callback raises there is logged, as the standard does it; SystemExit
  too, for there is nobody else whom it could reach.
* An interrupt (KeyboardInterrupt in the main thread) of an unpickling leaves the future as it was before; one of a wait for
  the task cancels the task, also if it runs.
* As an argument of a call it stands for what its task returns (``arguments.py``); then the packed form is kept.
* What of the standard looks into a future finds there what it knows: ``_state``, ``_waiters``, ``_condition``. The condition
  is made when somebody wants it, for it costs half as much as all else of a submission and most futures never need one.
  As long as there is none, the state changes under the lock under which it would be made; then under the condition alone.
* A thread that waits for a result is a waiter too, with a lock of its own to sleep on. It enters itself without the
  condition, and looks at the state after that: whoever changes the state looks for waiters after that.
  ``concurrent.futures.wait`` asks for exceptions while it holds the locks of all its futures: then the verdict answers.
"""

from __future__ import annotations

import concurrent.futures
import logging
import os
import pickle
import threading
import time
from collections.abc import Callable, Generator
from concurrent.futures._base import _STATE_TO_DESCRIPTION_MAP, CANCELLED_AND_NOTIFIED, FINISHED, PENDING, RUNNING, _Waiter
from contextlib import nullcontext
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from . import errors, nesting
from .callbacks import Callbacks
from .display import Sheet, Shown, cell
from .payload import as_it_is, input_value, noting, packed_value, unpack_exception, unpack_value
from .protocol import Final, Payload, payload_bytes

if TYPE_CHECKING:
    from .printing import Log

T = TypeVar("T")

_OPEN = (PENDING, RUNNING)
# A signal that comes in the instant before a thread blocks on a lock is only seen when that has woken (CPython): so that
# Ctrl-C is never lost, nothing blocks longer in one go.
ALERT_S = 0.5
# Who unpickles which future's answer now: a thread's number, in an object of its own, by the future's id. Entered by
# ``setdefault``, which is one step for all threads, and so much cheaper than a lock for each future.
unpackers: dict[int, tuple[int]] = {}
# Held for an instant, while a state changes or a condition is made. A signal's handler may cancel what it has interrupted.
_settling = threading.RLock()
os.register_at_fork(after_in_child=_settling._at_fork_reinit)  # type: ignore[attr-defined]  # as the standard's pools do


class Sleeper(_Waiter):
    """A thread that waits until there is news of a future."""

    lends = True  # the slot of a task; it sees to that itself

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lock.acquire()

    def sleep(self, seconds: float) -> None:
        self._lock.acquire(timeout=seconds)

    def add_result(self, future: concurrent.futures.Future[Any]) -> None:
        try:
            self._lock.release()
        except RuntimeError:  # it is awake already
            pass

    add_exception = add_cancelled = add_result


class Owner(Protocol):
    """What a future, and who works on several, needs of its client."""

    _callbacks: Callbacks
    _nested: bool

    @property
    def _held_back(self) -> bool: ...
    def _request(self, make: Callable[[int], Any]) -> tuple[int, concurrent.futures.Future[Any]]: ...
    def _withdraw(self, tasks: list[bytes], *, force: bool) -> None: ...


class Future(Shown, concurrent.futures.Future[T]):
    """A ``concurrent.futures.Future``. It also works with ``await``, in any event loop: when the coroutine that awaits it is
    cancelled (``asyncio.wait_for`` in time, Ctrl-C), so is the task, also if it runs; ``asyncio.shield`` protects it.

    ``cancel()`` has its standard meaning: a task that has not started never will, and one that runs is not touched. Whether
    it runs is known here some milliseconds after the fact; if a cancelled task turns out to have started, its result is
    dropped. ``cancel(force=True)`` ends a task that runs.
    """

    _final: Final | None = None  # the answer that is not unpickled yet
    _wanted = False  # by several threads
    _is_argument = False
    _kept: Payload | None = None  # what the task returned, packed, of one that is an argument

    # Of most futures there is nothing to keep.
    _trace: tuple[TracebackType | None] | None = None  # what the exception came with
    _log: Log | None = None
    _progress: tuple[float, str] | None = None
    _cell: dict[str, Any] | None = None  # where in a notebook it was made

    _made: threading.Condition | None = None

    def __init__(self, task: bytes, owner: Owner) -> None:
        self._state = PENDING  # in place of the standard's __init__, which makes a condition
        self._result = self._exception = None
        self._waiters = nesting.Waiters() if owner._nested else []
        self._done_callbacks: list[Callable[[Future[T]], object]] = []
        self._task = task
        self._owner = owner

    @property
    def _condition(self) -> threading.Condition:  # type: ignore[override]  # that nobody else sets
        if self._made is None:
            with _settling:
                if self._made is None:
                    self._made = threading.Condition()
        return self._made

    def result(self, timeout: float | None = None) -> T:
        """What the task returned; waits for it, at most ``timeout`` seconds.

        KeyboardInterrupt while it waits cancels the task, also if it runs.

        Raises
        ------
        concurrent.futures.CancelledError
            The future was cancelled.
        TimeoutError
            The task has not ended in time.
        ResultDecodeError
            What it returned cannot be unpickled here.
        Exception
            What the task raised.
        """
        __tracebackhide__ = True  # IPython and pytest leave this frame out
        try:
            self._await_answer(timeout)
            if self._state != FINISHED:
                return super().result(0)
            if self._exception is not None:
                if self._trace is None:
                    self._trace = (self._exception.__traceback__,)
                raise self._exception.with_traceback(self._trace[0])  # not longer each time it is asked for
            return self._result  # type: ignore[return-value]  # None is a result
        finally:
            del self  # it holds the exception, whose traceback holds this frame

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """What the task raised, or the :class:`~zmqsched.errors.ResultDecodeError`; None if it returned. Waits, and is
        interrupted, as :meth:`result`."""
        final = self._final
        if final is not None and self._made is not None and self._made._is_owned():  # type: ignore[attr-defined]
            return None if final.verdict == "ok" else errors.TaskError("not unpickled yet")
        try:
            self._await_answer(timeout)
            return super().exception(0)
        finally:
            del self

    def cancel(self, *, force: bool = False) -> bool:
        """Cancel the task unless it is done; without ``force``, also unless it runs.

        With ``force`` a task that runs gets a KeyboardInterrupt, so that its ``finally`` blocks run; if it has not ended
        half a second later, its worker is killed. The future is cancelled at once, and what the task still does is
        ignored.

        Returns
        -------
        bool
            Whether the future is cancelled now.
        """
        if self.cancelled():
            if force:  # it may have started nevertheless
                self._owner._withdraw([self._task], force=True)
            return True
        if not self._turn_cancelled(_OPEN if force else (PENDING,)):
            return False
        self._invoke_callbacks()  # type: ignore[attr-defined]  # typeshed leaves it out
        self._owner._withdraw([self._task], force=force)
        return True

    def __await__(self) -> Generator[object, None, T]:
        import asyncio  # heavy, and a program that awaits has it

        try:
            with nesting.waiting() if self._state in _OPEN else nullcontext():
                return (yield from asyncio.wrap_future(self).__await__())
        except asyncio.CancelledError:
            self.cancel(force=True)  # asyncio has cancelled it by now, but not what may run
            raise

    def __reduce__(self) -> tuple[Any, ...]:
        """In the arguments of a call, however deep: what the task returns. Nowhere else.

        Raises
        ------
        TypeError
            It is pickled otherwise.
        """
        found = noting()
        if found is None:
            raise TypeError(
                "a Future can only be pickled among the arguments of submit or map, and its task's result takes its place; "
                "pass it as an argument, or what future.result() returns"
            )
        self._is_argument = True  # before looking: whatever comes later is kept
        if not self.done() or not self._returned():
            found.inputs[self._task] = self
            return input_value, (self._task,)
        value = self._packed() or self._kept
        if value is None:
            return as_it_is, (self.result(0),)
        parts = [value] if isinstance(value, bytes) else value
        return packed_value, tuple(pickle.PickleBuffer(part) for part in parts)

    def __repr__(self) -> str:
        (_, state), *facts = self._facts()
        return f"<{self._name()} state={state}{''.join(f' {name} {cell(value)}' for name, value in facts)}>"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(repr(self))  # on one line: futures come in lists

    def _sheet(self) -> Sheet:
        return Sheet(self._name(), facts=self._facts())

    def _name(self) -> str:
        return f"{type(self).__name__} at {id(self):#x}"

    def _facts(self) -> list[tuple[str, object]]:
        """What is known without unpickling anything; the state first."""
        with self._condition:
            final, error, state = self._final, self._exception, self._state
        facts: list[tuple[str, object]] = [("state", _STATE_TO_DESCRIPTION_MAP[state])]
        if final is not None:
            what = "returned" if final.verdict == "ok" else "raised"
            facts.append((what, f"{payload_bytes(final.value):,} bytes, not unpickled yet"))
        elif state == FINISHED:
            facts.append(("raised", type(error).__name__) if error else ("returned", type(self._result).__name__))
        elif state in _OPEN and self._progress is not None:
            fraction, text = self._progress
            facts.append(("at", f"{100 * fraction:.0f} % {text}".rstrip()))
        return facts

    # --- for the I/O thread and for what of zmqsched works on futures -------------------------------------------------

    def _answer(self, final: Final) -> bool:
        """The final answer has come. True if there are callbacks to run."""
        if final.verdict == "cancelled":
            return self._turn_cancelled(_OPEN) and bool(self._done_callbacks)
        return self._end(FINISHED, final, None, _OPEN) and bool(self._done_callbacks)

    def _fail(self, error: BaseException) -> bool:
        """No answer will come, and why. True if there are callbacks to run."""
        return self._end(FINISHED, None, error, _OPEN) and bool(self._done_callbacks)

    def _turn_cancelled(self, states: tuple[str, ...]) -> bool:
        """What the standard's future does when it is cancelled, callbacks apart; if it is in one of these states."""
        return self._end(CANCELLED_AND_NOTIFIED, None, None, states)

    def _end(self, state: str, final: Final | None, error: BaseException | None, states: tuple[str, ...]) -> bool:
        """It is over, unless it is in none of these states: say so, and tell who waits."""
        with _settling:
            if (made := self._made) is None:
                if self._state not in states:
                    return False
                self._final, self._exception, self._state = final, error, state
        if made is None:
            if self._waiters:
                self._tell_waiters()
            return True
        with made:
            if self._state not in states:
                return False
            self._final, self._exception, self._state = final, error, state
            self._tell_waiters()
        return True

    def _tell_waiters(self) -> None:
        final = self._final
        for waiter in list(self._waiters):  # some may be leaving
            if self._state == CANCELLED_AND_NOTIFIED:
                waiter.add_cancelled(self)
            elif final is not None and final.verdict == "ok":
                waiter.add_result(self)
            else:
                waiter.add_exception(self)

    def log(self) -> str:
        """The end of what the task has printed so far, at most 64 KiB: standard output and error, of all its attempts. Where
        something is missing it says ``[N bytes skipped]``."""
        return "" if self._log is None else self._log.text()

    @property
    def progress(self) -> tuple[float, str] | None:
        """What the task has last said of how far it is (``zmqsched.get_task().progress``): a fraction and a text."""
        return self._progress

    def _call_back(self) -> None:
        """Run the callbacks. Never raises."""
        self._await_answer(None)
        for callback in self._done_callbacks:
            try:
                callback(self)
            except BaseException:
                logging.getLogger("concurrent.futures").exception("exception calling callback for %r", self)

    def _disown(self, error: RuntimeError) -> None:
        """This process is a fork of the future's: whoever asks is told."""
        self._made = None
        self._waiters = []
        if self._state in _OPEN:
            self._exception, self._state = error, FINISHED

    def _returned(self) -> bool:
        """Of one that is done: its task has returned; whether that can be unpickled here or not."""
        final = self._final
        if final is not None:
            return final.verdict == "ok"
        return not self.cancelled() and (self._kept is not None or self._exception is None)

    def _value(self) -> Payload:
        """What the task returned, packed, of one that was an argument before it was done."""
        value = self._packed() or self._kept
        assert value is not None, "what an argument's task returned is not kept"
        return value

    def _packed(self) -> Payload | None:
        """What the task returned, pickled; None unless it has returned, and nobody has asked for the result yet."""
        final = self._final
        return final.value if final is not None and final.verdict == "ok" else None

    def _get_snapshot(self) -> tuple[bool, bool, Any, BaseException | None]:
        """What ``asyncio.wrap_future`` asks a done future for, from Python 3.14 on."""
        if self._state == FINISHED:
            self._await_answer(None)
        snapshot: tuple[bool, bool, Any, BaseException | None] = super()._get_snapshot()  # type: ignore[misc]
        return snapshot

    # --- unpickling ----------------------------------------------------------------------------------------------------

    def _await_answer(self, timeout: float | None) -> None:
        """Return when the future is done and, unless it is cancelled, its result or exception unpickled.

        Raises
        ------
        TimeoutError
        """
        if self._state == FINISHED and self._final is None:
            return
        mine = (threading.get_ident(),)
        try:
            final = self._final
            if final is None or unpackers.setdefault(id(self), mine) is not mine:
                final = self._wait_for_turn(mine, timeout)
            if final is not None and self._final is final:
                result, error = _unpacked(final)
                if self._final is final:  # not unpacked meanwhile, further up this thread's stack
                    if self._is_argument and final.verdict == "ok":
                        self._kept = final.value
                    self._result, self._exception, self._final = result, error, None
        except KeyboardInterrupt:
            self.cancel(force=True)
            raise
        finally:
            if unpackers.get(id(self)) is mine:
                del unpackers[id(self)]
                if self._wanted:
                    for waiter in list(self._waiters):
                        if isinstance(waiter, Sleeper):
                            waiter.add_result(self)

    def _wait_for_turn(self, mine: tuple[int], timeout: float | None) -> Final | None:
        """Wait until there is an answer for this thread to unpack (its own unpacking may have asked for it), or nothing to
        unpack."""
        until = None if timeout is None else time.monotonic() + timeout
        sleeper = Sleeper()
        self._waiters.append(sleeper)
        try:
            with nesting.waiting() if self._state in _OPEN else nullcontext():
                while True:
                    if self._state not in _OPEN:
                        if self._final is None or unpackers.setdefault(id(self), mine) == mine:
                            return self._final
                        if not self._wanted:
                            self._wanted = True  # and look again: it may have ended before this could be seen
                            continue
                    # The standard's futures, too, take a timeout that is no number for none at all.
                    if not (left := ALERT_S if until is None else until - time.monotonic()) > 0:
                        raise TimeoutError
                    sleeper.sleep(min(left, ALERT_S))
        except BaseException:
            with self._condition:  # for who changes the state goes through the waiters
                self._waiters.remove(sleeper)
            raise


def _unpacked(final: Final) -> tuple[Any, BaseException | None]:
    """Result and exception that this answer stands for.

    Raises
    ------
    KeyboardInterrupt
        In the main thread, where it is the user's.
    """
    try:
        if final.verdict == "ok":
            return unpack_value(final.value), None
        if final.verdict == "error":
            return None, unpack_exception(final.value)
    except errors.TaskError as error:
        return None, error
    except KeyboardInterrupt:
        if threading.current_thread() is threading.main_thread():
            raise
        return None, errors.ResultDecodeError("unpickling the task's result raised KeyboardInterrupt")
    if final.verdict == "DependencyFailed":
        return None, _dependency_failed(final)
    kind: type[Exception] = getattr(errors, final.verdict)
    return None, kind(final.text)


def _dependency_failed(final: Final) -> BaseException:
    error = errors.DependencyFailed(final.text)
    if final.cause == "cancelled":
        error.__cause__ = concurrent.futures.CancelledError(final.why)
    elif final.cause != "error":
        kind: type[Exception] = getattr(errors, final.cause, errors.TaskError)
        error.__cause__ = kind(final.why)
    elif final.value:
        error.__cause__ = unpack_exception(final.value)
    return error
