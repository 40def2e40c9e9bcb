"""The nursery: a clean process with one thread that forks a node's workers in milliseconds.

Rules
-----
* ``Nursery()`` forks at once. The node calls it before it starts a thread or imports zmq, so nothing half-held is
  inherited. The child never returns into the node's code; it ends by ``os._exit``.
* The nursery is the workers' parent. It alone waits for them and signals them, so no pid is used after it was reaped.
* A worker leads a session and process group of its own. Before a dead worker is reaped, while nobody else can be given
  its pid, the rest of its group is killed, and those of its descendants that have left the group (``orphans.py``).
* Nobody outlives the node: when it is gone, even by SIGKILL, the nursery reads the end of its control socket, kills all
  groups and orphans and exits. When the nursery is killed, the kernel kills the workers (PR_SET_PDEATHSIG), and the node
  reads :class:`Gone` and ends what they leave.
* Descriptors inherited from the node are pointed at /dev/null, not closed: a stale file object of the node can then
  neither write into nor close what has its number.
* This module imports nothing that unpickles; the forked child imports the worker itself.
"""

from __future__ import annotations

import array
import atexit
import ctypes
import gc
import os
import select
import signal
import socket
import struct
import sys
import traceback
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from types import FrameType
from typing import NamedTuple, NoReturn

from . import origin, orphans
from .blackbox import STACK_SIGNAL, BlackBox, arm
from .pipes import EXIT_PIPE_LOST, Pipe, pair
from .streams import Streams, Voice

# Control datagrams, both ways: kind, worker, pid, peak memory, then text. A spawn carries what the worker is to have: its
# end of the pipe, and its side of the black box and of the streams.
_CONTROL = struct.Struct("=cQQQ")
_SPAWN, _KILL, _INTERRUPT, _DUMP, _TEACH = b"S", b"K", b"I", b"D", b"T"
_SIGNALS = {_INTERRUPT: signal.SIGINT, _DUMP: STACK_SIGNAL}
_BORN, _EXITED = b"B", b"X"
_CONTROL_MAX = 1024
_RIGHTS = 6
_ANCILLARY = socket.CMSG_SPACE(4 * _RIGHTS)

KILLED = f"killed by {signal.SIGKILL.name}"
_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
# How long close() waits for the killed workers before it kills the nursery as well. A process in an uninterruptible
# wait (a hanging network file system) dies when the kernel lets it.
CLOSE_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class Born:
    """A worker was forked."""

    worker: int
    pid: int


@dataclass(frozen=True, slots=True)
class Exited:
    """A worker is dead and reaped; ``how`` is a phrase. A pid of 0: it could not be forked.

    ``peak``: the most memory it had resident, in bytes; 0 if that is unknown.
    """

    worker: int
    pid: int
    how: str
    peak: int = 0


@dataclass(frozen=True, slots=True)
class Gone:
    """The nursery is dead, and all its workers with it."""


class Wires(NamedTuple):
    """What joins a node to one worker, to be closed when it has exited.

    ``kept`` is a copy of the worker's end of the pipe, from which to take back what it has not read.
    """

    pipe: Pipe
    kept: Pipe
    box: BlackBox
    streams: Streams

    def close(self) -> None:
        for wire in self:
            wire.close()


class Nursery:
    """The node's end."""

    def __init__(self) -> None:
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        # What the streams hold now would otherwise be written again by every worker.
        for stream in (sys.stdout, sys.stderr):
            if stream is not None and not stream.closed:
                stream.flush()
        self.pid = os.fork()
        if self.pid == 0:
            _child(theirs.detach())
        theirs.close()

    def spawn(self, worker: int) -> Wires:
        """Ask for a worker of this number. Runs may be sent at once."""
        ours, theirs = pair()
        box = BlackBox()
        streams = Streams(worker)
        self._send(_SPAWN, worker, [theirs.fileno(), box.descriptor, *streams.descriptors])
        streams.handed_over()
        return Wires(ours, theirs, box, streams)

    def kill(self, worker: int) -> None:
        """SIGKILL the worker and its process group. Its exit is reported by :meth:`read`; a dead one is ignored."""
        self._send(_KILL, worker)

    def interrupt(self, worker: int) -> None:
        """SIGINT to the worker alone, in a while; a dead one is ignored."""
        self._send(_INTERRUPT, worker)

    def dump(self, worker: int) -> None:
        """Have the worker write its stack into its black box, whatever it is doing; nobody waits. A dead one is ignored."""
        self._send(_DUMP, worker)

    def teach_clients(self) -> None:
        """Have later workers know how to be clients: their tasks would each spend a while on importing that."""
        self._send(_TEACH, 0)

    def fileno(self) -> int:
        return self._control.fileno()

    def read(self) -> list[Born | Exited | Gone]:
        """What happened since the last call; never waits. The last event of all is Gone."""
        events: list[Born | Exited | Gone] = []
        while True:
            try:
                data = self._control.recv(_CONTROL_MAX, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return events
            except ConnectionResetError:  # said once, and before what is still to be read
                continue
            if not data:
                events.append(Gone())
                return events
            kind, worker, pid, peak = _CONTROL.unpack_from(data)
            how = data[_CONTROL.size :].decode(errors="replace")
            events.append(Born(worker, pid) if kind == _BORN else Exited(worker, pid, how, peak))

    def close(self) -> None:
        """Kill all workers and wait for them and the nursery, at most ``CLOSE_TIMEOUT_S`` seconds."""
        if self._control.fileno() < 0:
            return
        try:
            self._control.shutdown(socket.SHUT_WR)
            self._control.settimeout(CLOSE_TIMEOUT_S)
            while self._control.recv(_CONTROL_MAX):
                continue
        except TimeoutError:
            os.kill(self.pid, signal.SIGKILL)
        except OSError:  # it is dead already
            pass
        self._control.close()
        os.waitpid(self.pid, 0)

    def _send(self, kind: bytes, worker: int, fds: Sequence[int] = ()) -> None:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        try:
            self._control.sendmsg([_CONTROL.pack(kind, worker, 0, 0)], rights)
        except (BrokenPipeError, ConnectionResetError):  # read() reports it as Gone
            return


# --- the forked side -----------------------------------------------------------------------------------------------


def _child(control_fd: int) -> NoReturn:
    code = 1
    try:
        code = _nursery(control_fd)
    except BaseException:  # noqa: BLE001 - there is no caller to raise to
        traceback.print_exc()
    finally:
        os._exit(code)


def _nursery(control_fd: int) -> int:
    """Become the nursery, and serve until the node is gone. In a worker this returns the worker's exit code."""
    # The node's objects must never be finalised here: they would close descriptors that are ours by now.
    gc.freeze()
    atexit._clear()
    os.setsid()
    orphans.adopt()
    # A batch system signals every process of a job; what stops is the node's to decide.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, STACK_SIGNAL):
        signal.signal(number, signal.SIG_IGN)
    _silence_descriptors(keep=control_fd)
    from . import worker  # noqa: F401 - what every worker needs, imported once

    gc.collect()
    gc.freeze()  # workers share these pages as long as the collector does not touch them
    return _Keeper(socket.socket(fileno=control_fd)).serve()


def _silence_descriptors(keep: int) -> None:
    null = os.open(os.devnull, os.O_RDWR)
    for fd in [int(name) for name in os.listdir("/proc/self/fd")]:
        if fd not in (1, 2, keep, null) and _is_open(fd):
            os.dup2(null, fd, inheritable=fd == 0)
    os.close(null)


def _is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


class _Keeper:
    """The nursery's loop: what the node asks for, and which children died."""

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._control.setblocking(False)
        self._pids: dict[int, int] = {}  # by worker
        self._workers: dict[int, int] = {}  # by pid
        self._outbox: deque[bytes] = deque()
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._woken, self._waker = socket.socketpair()
        for end in (self._woken, self._waker):
            end.setblocking(False)
        signal.signal(signal.SIGCHLD, _nothing)
        signal.set_wakeup_fd(self._waker.fileno(), warn_on_full_buffer=False)

    def serve(self) -> int:
        poller = select.poll()
        poller.register(self._woken, select.POLLIN)
        while True:
            # The node may be busy and its socket full; a nursery that waited for it could not hear it.
            poller.register(self._control, select.POLLIN | (select.POLLOUT if self._outbox else 0))
            ready = dict(poller.poll())
            if self._woken.fileno() in ready:
                self._woken.recv(4096)
                self._reap()
            if ready.get(self._control.fileno(), 0) & ~select.POLLOUT:
                code = self._obey()
                if code is not None:
                    return code
            self._report()

    def _obey(self) -> int | None:
        """Read one request. Returns an exit code when this process, nursery or worker, is done."""
        try:
            data, ancillary, _, _ = self._control.recvmsg(_CONTROL_MAX, _ANCILLARY, socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            return None
        except ConnectionResetError:
            data, ancillary = b"", []
        if not data:
            self._kill_all()
            return 0
        kind, worker, _, _ = _CONTROL.unpack_from(data)
        if kind == _KILL:
            if worker in self._pids:
                _kill_group(self._pids[worker])
            return None
        if kind == _TEACH:
            from . import client  # noqa: F401

            gc.collect()
            gc.freeze()
            return None
        if kind in _SIGNALS:
            if worker in self._pids:
                os.kill(self._pids[worker], _SIGNALS[kind])
            return None
        fds = array.array("i", ancillary[0][2] if ancillary else b"")
        if len(fds) < _RIGHTS:  # the kernel cuts what does not fit
            for fd in fds:
                os.close(fd)
            self._tell(_EXITED, worker, 0, "not started: too many open files")
            return None
        return self._spawn(worker, fds)

    def _spawn(self, worker: int, fds: Sequence[int]) -> int | None:
        nursery = os.getpid()
        try:
            pid = os.fork()
        except OSError as error:
            self._tell(_EXITED, worker, 0, f"not started: {error.strerror}")
            pid = -1
        if pid == 0:
            self._become_worker(worker, nursery)
            return _work(*fds)
        for fd in fds:
            os.close(fd)
        if pid > 0:
            self._pids[worker] = pid
            self._workers[pid] = worker
            self._tell(_BORN, worker, pid)
        return None

    def _become_worker(self, worker: int, nursery: int) -> None:
        self._libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != nursery:  # it died before the line above
            os._exit(1)
        os.setsid()
        orphans.mark(worker)
        origin.worker = worker
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        for end in (self._control, self._woken, self._waker):
            end.close()

    def _reap(self) -> None:
        while True:
            try:
                dead = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return
            if dead is None:
                return
            worker = self._workers.get(dead.si_pid)
            if worker is not None:
                _kill_group(dead.si_pid)  # still a zombie, so the number is still its own
                orphans.end_orphans(worker, others=self._workers)
            _, status, used = os.wait4(dead.si_pid, 0)
            if worker is not None:
                del self._workers[dead.si_pid]
                del self._pids[worker]
                self._tell(_EXITED, worker, dead.si_pid, _how(status), used.ru_maxrss * 1024)

    def _kill_all(self) -> None:
        for pid in self._workers:
            _kill_group(pid)
        orphans.end_all()

    def _tell(self, kind: bytes, worker: int, pid: int, text: str = "", peak: int = 0) -> None:
        self._outbox.append(_CONTROL.pack(kind, worker, pid, peak) + text.encode()[:256])

    def _report(self) -> None:
        try:
            while self._outbox:
                self._control.send(self._outbox[0])
                self._outbox.popleft()
        except BlockingIOError:
            return
        except (BrokenPipeError, ConnectionResetError):  # the node is gone; the next read says so
            self._outbox.clear()


def _work(pipe: int, stack: int, *streams: int) -> int:
    """A worker's life: its exit code."""
    from .worker import run_worker

    arm(stack)
    voice = Voice(*streams)
    try:
        run_worker(Pipe(socket.socket(fileno=pipe)), stack, voice)
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except BaseException:  # noqa: BLE001 - there is no caller to raise to
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except Exception:  # noqa: BLE001 - the task closed or replaced it
            continue
    return code


def _kill_group(pid: int) -> None:
    """Kill a child that is not reaped yet, and its group. It may not lead one yet, so each by itself."""
    for kill in (os.kill, os.killpg):
        try:
            kill(pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            continue


def _how(status: int) -> str:
    code = os.waitstatus_to_exitcode(status)
    if code == EXIT_PIPE_LOST:
        return f"exit code {code} (a task closed what the worker needs)"
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"killed by signal {-code}"


def _nothing(number: int, frame: FrameType | None) -> None:
    """A Python handler must exist for the wakeup descriptor to be written to."""
