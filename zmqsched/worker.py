"""A worker: reads one Run from its pipe, runs it, answers with Done, until the pipe ends.

Rules
-----
* One Run is taken at a time and answered at once. So what a dead worker had taken and not answered is exactly the task
  it was running, and no result waits behind the next task.
* A run is declined after its ``until``: its node may have been frozen, and the task be another's by now. And without its
  function: the node takes back from the front of the pipe while this worker does, perhaps the run that brought it.
* Whatever a task raises is its answer: SystemExit and KeyboardInterrupt too. Only losing the pipe ends a worker.
* SIGINT raises KeyboardInterrupt in code of the task's, and nowhere else: a worker that is between two tasks ignores it, and
  so does one that imports a module. The node is told that it came, in any case.
* SIGTERM waits for the task, then ends the worker: a batch system sends it to every process of a job, and what can still end
  there the node decides. A task that fails after it, perhaps since its own children had it too, is not answered.
* A function is kept by its digest, pickled if it could not be loaded, so that a later Run may try again.
* A crash in a task's native code leaves a stack (``blackbox.py``); a task cannot switch that off for the next.
* A task's working directory and standard streams are its own: what it leaves is put back (``surroundings.py``).
* What a task prints is its own (``streams.py``), and handed over before its answer. Nothing else is set up for it: as in any
  program, ``warnings`` and, until somebody configures ``logging``, records from WARNING on go to standard error.
* A task that ends well does so behind what it has submitted with a WaitGroup (``before_result``): nobody else would miss it.
* Code inside a task reaches the node through :func:`tell`, from any thread, and learns of the task in ``context.py``.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from time import monotonic, perf_counter
from types import FrameType
from typing import Any

from .codec import decode_pipe, encode_pipe
from .errors import ProtocolError
from .payload import (
    Shipped,
    know_place,
    load_function,
    may_retry,
    pack_exception,
    pack_value,
    short_form,
    unpack_call,
)
from .pipes import EXIT_PIPE_LOST, Pipe
from .protocol import Declined, Done, Interrupted, Payload, PipeMessage, Run
from .streams import Voice
from .surroundings import Surroundings

# A task that takes less is not worth a look at what its C code has not written out.
SHORT_S = 0.001

_pipe: Pipe | None = None
_now: Now | None = None
before_result: Callable[[], None] | None = None  # set by nesting.py, which knows the client


class Now:
    """What this worker runs, for ``context.py``: ``run`` is None between two tasks. ``cancelled``: the end of this one was
    asked for."""

    __slots__ = ("cancelled", "function", "run", "voice")

    def __init__(self, voice: Voice) -> None:
        self.voice = voice
        self.run: Run | None = None
        self.function: Callable[..., Any] | None = None
        self.cancelled = False


def now() -> Now | None:
    """None in a process that is no worker."""
    return _now


def in_worker() -> bool:
    """True in a process that runs tasks."""
    return _pipe is not None


def tell(message: PipeMessage) -> None:
    """Send a message to this worker's node. Any thread of a task may call this.

    Raises
    ------
    RuntimeError
        This process is not a worker.
    """
    if _pipe is None:
        raise RuntimeError("only code that runs inside a task can send messages to its node")
    _pipe.send(encode_pipe(message))


def run_worker(pipe: Pipe, stack: int, voice: Voice) -> None:
    """Run what comes out of the pipe. Returns when the node has closed its end.

    ``stack`` is the descriptor for faulthandler.

    Raises
    ------
    SystemExit
        With ``EXIT_PIPE_LOST``: a task closed the pipe, or what else the worker needs.
    """
    global _pipe, _now  # noqa: PLW0603 - a process is a worker or it is not
    _pipe = pipe
    now = _now = Now(voice)
    functions = _Functions()
    surroundings = Surroundings()
    interrupts = _Interrupts(pipe, now)
    terminations = _Terminations()
    know_place(_Place(functions, now))
    before = signal.signal(signal.SIGINT, interrupts), signal.signal(signal.SIGTERM, terminations)
    try:
        while (frames := pipe.receive()) is not None:
            message = decode_pipe(frames)
            if not isinstance(message, Run):
                raise ProtocolError(f"a worker is sent runs, not {type(message).__name__}")
            if not functions.accept(message) or monotonic() > message.until:
                pipe.send(encode_pipe(Declined(message.task)))
                continue
            if not faulthandler.is_enabled():
                faulthandler.enable(stack)
            terminations.wait = True
            done = _attempt(message, functions, interrupts, now)
            if terminations.came and not done.ok:
                terminations.die()
            pipe.send(encode_pipe(done))
            surroundings.restore()
            terminations.wait = False
            if terminations.came:
                terminations.die()
    except BrokenPipeError:
        return
    except OSError as error:
        with suppress(OSError):  # past sys.stderr, which the task may have closed as well
            os.write(2, f"zmqsched worker {os.getpid()}: a task closed what this worker needs ({error})\n".encode())
        raise SystemExit(EXIT_PIPE_LOST) from error
    finally:
        signal.signal(signal.SIGINT, before[0])
        signal.signal(signal.SIGTERM, before[1])
        _pipe = _now = None


class _Functions:
    """The callables this worker has been given, by digest, and the modules that have come with them."""

    def __init__(self) -> None:
        self._loaded: dict[bytes, tuple[Callable[..., Any], Shipped | None]] = {}
        self._pickled: dict[bytes, Payload] = {}

    def accept(self, run: Run) -> bool:
        """Keep what has come with it. False: its function is not here."""
        if run.fresh:
            self._loaded.clear()
            self._pickled.clear()
        if run.digest in self._loaded:
            return True
        if run.function:
            self._pickled[run.digest] = run.function
        return run.digest in self._pickled

    def get(self, digest: bytes) -> Callable[..., Any]:
        """Ready to be called: its modules are those that imports find."""
        fn, modules = self._loaded.get(digest) or self._load(digest)
        if modules is not None:
            modules.activate()
        return fn

    def name(self, digest: bytes) -> str:
        known = self._loaded.get(digest)
        return short_form(known[0]) if known is not None else "unknown"

    def _load(self, digest: bytes) -> tuple[Callable[..., Any], Shipped | None]:
        try:
            loaded = load_function(self._pickled[digest])
        except BaseException as error:
            error.add_note("(raised in the worker while it loaded the task's function, before the call)")
            raise
        self._loaded[digest] = loaded
        del self._pickled[digest]
        return loaded


class _Place:
    """Where an exception comes from, in the words that its reader gets."""

    def __init__(self, functions: _Functions, now: Now) -> None:
        self._functions = functions
        self._now = now

    def __call__(self) -> str:
        run = self._now.run
        if run is None:
            return ""
        name = f"{self._functions.name(run.digest)}-{int.from_bytes(run.task[-8:], 'big')}"
        return f"(ran on {socket.gethostname()}, worker {os.getpid()}, task {name}, attempt {run.attempt})"


class _Interrupts:
    """The handler of SIGINT. ``wanted``: code of a task's runs. ``pid``: the worker's, which a child that a task forks has
    not."""

    def __init__(self, pipe: Pipe, now: Now) -> None:
        self.wanted = False
        self._pipe = pipe
        self._now = now
        self.pid = os.getpid()

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self.pid:  # a child that the task has forked
            signal.default_int_handler(number, frame)
        with suppress(OSError):
            self._pipe.send(encode_pipe(Interrupted()))
        if self.wanted:
            self._now.cancelled = True
            if not _imports(frame):
                raise KeyboardInterrupt


class _Terminations:
    """The handler of SIGTERM. ``wait``: a task runs; ``came``: meanwhile."""

    def __init__(self) -> None:
        self.wait = False
        self.came = False
        os.register_at_fork(after_in_child=self._leave_child)

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.came = True
        if not self.wait:
            self.die()

    def die(self) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTERM)

    def _leave_child(self) -> None:
        """A child that the task has forked ends at once, whatever it is doing."""
        if signal.getsignal(signal.SIGTERM) is self:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _imports(frame: FrameType | None) -> bool:
    """A module is being imported. Left half way it, and what it imports, may never be importable again in this process; so
    the task goes on, and if it has not ended when the node's patience has, the worker does."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def _attempt(run: Run, functions: _Functions, interrupts: _Interrupts, now: Now) -> Done:
    """Run one attempt; whatever happens is its answer."""
    seconds = 0.0
    started = 0.0
    fn = None
    retry = True
    now.voice.begin(run.task, run.attempt)
    now.run = run
    try:
        before = _set_environment(run.env) if run.env else None
        interrupts.wanted = True
        try:
            fn = now.function = functions.get(run.digest)
            args, kwargs = _arguments(run)
            started = perf_counter()
            result = fn(*args, **kwargs)
            if before_result is not None:
                before_result()
        finally:
            interrupts.wanted = False
            if started:
                seconds = perf_counter() - started
            if before is not None:
                _restore_environment(before)
            if os.getpid() != interrupts.pid:  # a child the task forked came back from it; there must be one answer
                os._exit(0)
        ok, value = True, pack_value(result)
    except BaseException as error:  # noqa: BLE001 - whatever a task raises is its answer
        ok, value = False, pack_exception(error)
        retry = may_retry(fn, error)
    _flush()
    now.run = now.function = None
    now.cancelled = False
    wrote = now.voice.end(run.task, run.attempt, short=seconds < SHORT_S)
    return Done(run.task, run.attempt, ok, value, seconds, retry, wrote)


def _arguments(run: Run) -> tuple[tuple[Any, ...], dict[str, Any]]:
    try:
        return unpack_call(run.call, {each.task: each.value for each in run.inputs} if run.inputs else None)
    except BaseException as error:
        error.add_note("(raised in the worker while it loaded the task's arguments, before the call)")
        raise


def _set_environment(env: tuple[tuple[str, str], ...]) -> list[tuple[str, str | None]]:
    before = [(name, os.environ.get(name)) for name, _ in env]
    os.environ.update(env)
    return before


def _restore_environment(before: list[tuple[str, str | None]]) -> None:
    for name, value in before:
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def _flush() -> None:
    """What a task printed is out before its answer is. The streams are the user's to close or to replace."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except Exception:  # noqa: BLE001 - closed, None, or without flush: nothing of ours to report
            continue
