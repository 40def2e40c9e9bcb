"""A broker on another host, held from here through the system's ``ssh``, as if it were here.

Rules
-----
* This process holds the lock of the cluster's directory here, and removes the directory at its end. So the cluster runs, for
  everybody here, as long as this process does.
* What the shell there runs is the first line of standard input (``launch/remote.py``). The end of standard input ends
  ``ssh``'s, and that the broker's, however it comes. Where the network is gone it never comes: the broker is sent a byte
  every ``BEAT_S``, and ends when it has had none for a minute.
* The broker gives its connection files over standard output, when it is ready and whenever keys have changed. They are
  written here, for this user alone, and nowhere else; the server's secret key stays there.
* When none of the broker's TCP addresses answers from here, a second ``ssh`` leads to them (``-L``), and what is here has
  its ends, Unix sockets in the cluster's directory, as last addresses. CURVE is spoken from end to end.
* A broker that dies while the connection stands can be followed by another: its journal is there (exit code ``DIED``). When
  the connection breaks the broker ends with it, so the cluster is lost (``LOST``).
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import msgspec
from msgspec.structs import replace

from . import sockets
from .brokers import DIED, LOST, facts_of
from .config import TUNNEL_SCHEME, Addresses, ClusterLock, ConnectionFile, this_host, this_network
from .errors import BrokerUnreachable, StartError, ZmqschedError
from .launch.output import Log
from .launch.remote import COMMAND
from .launch.ssh import NOT_CONNECTED, environment, fix_of, is_loopback, ssh_words
from .shell import Relay, Starter, StopSignals, first_line, log

BEAT_S = 10.0
# Together less than who has started this process waits for its end.
END_S, END_TUNNEL_S = 2.0, 0.5
# From ssh's end on, for what it has said last.
LAST_WORDS_S = 0.5
LOOK_S = 0.05
TUNNEL_S = 10.0
GREETING_S = 4.0
MAX_LINE = 1 << 20
CHANNELS = ("work", "beats", "status")
_FORBIDDEN = "sshd forbids the way to it: allow it (AllowTcpForwarding), or open the broker's ports to this host"


class _Session:
    """An ``ssh`` to the host, with what it says on standard error in the log, and with a ``relay`` here too."""

    relay: Relay | None = None

    def __init__(self, words: Sequence[str], first: bytes, said: Log) -> None:
        self.said = said
        try:
            self._process = subprocess.Popen(
                words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
                env=environment(), bufsize=0,
            )  # fmt: skip
        except OSError as error:
            raise StartError(f"cannot start {words[0]!r}: {error.strerror}") from None
        self._pipes = [pipe for pipe in (self._process.stdin, self._process.stdout, self._process.stderr) if pipe]
        for pipe in self._pipes:
            os.set_blocking(pipe.fileno(), False)
        self._open = [pipe.fileno() for pipe in self._pipes[1:]]
        self._out = self._open[0]
        self._unread = b""
        self._ended_at: float | None = None
        self.send(first)

    def send(self, data: bytes) -> None:
        """Less than a pipe holds; when nobody reads it, it is lost."""
        with contextlib.suppress(OSError):
            self._pipes[0].write(data)

    def descriptors(self) -> list[int]:
        return self._open

    def read(self) -> list[bytes]:
        """What has come on standard output, in whole lines; never waits."""
        for descriptor in list(self._open):
            with contextlib.suppress(BlockingIOError):
                if not (data := os.read(descriptor, 1 << 16)):
                    self._open.remove(descriptor)
                elif descriptor == self._out:
                    self._unread += data
                else:
                    self.said.write(data)
                    if self.relay is not None:
                        self.relay.forward(data)
        if len(self._unread) > MAX_LINE:
            raise StartError(f"what came from there is over {MAX_LINE} bytes, and no line")
        *lines, self._unread = self._unread.split(b"\n")
        return lines

    def code(self) -> int | None:
        """Its exit code, once all that it said is read; None before."""
        if self._process.poll() is None:
            return None
        if self._ended_at is None:
            self._ended_at = time.monotonic()
        if self._open and time.monotonic() < self._ended_at + LAST_WORDS_S:  # a master of shared connections may hold them
            return None
        return self._process.returncode

    def end(self, within_s: float) -> None:
        """Its input ends, and so does it, or is killed."""
        self._pipes[0].close()
        try:
            self._process.wait(within_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        for pipe in self._pipes:
            pipe.close()


class Tether:
    """The broker of the cluster ``name``, on ``host``."""

    def __init__(self, name: str, host: str, ssh_options: Sequence[str]) -> None:
        self._host = host
        self._options = ssh_options
        self._script = first_line("zmqsched tether wants a script as one line there")
        self._lock = ClusterLock.acquire(name)
        self._relay = Relay()
        self._tunnel: _Session | None = None

    def run(self, starter: Starter) -> int:
        """Hold it until standard input ends, a signal comes or it ends. Returns the exit code.

        Raises
        ------
        ZmqschedError
            It did not start; says why, with what to do.
        """
        code = LOST
        try:
            broker = self._session([*ssh_words(self._options), "--", self._host, COMMAND], self._script + b"\n")
            try:
                code = self._hold(broker, starter, StopSignals(until_eof=True))
            finally:
                broker.end(END_S)
                if self._tunnel is not None:  # through which the broker says goodbye
                    self._tunnel.end(END_TUNNEL_S)
        finally:
            self._relay.close()
            if code == DIED:  # as a broker that is killed leaves it: another is to follow
                self._lock.release()
            else:
                self._lock.remove()
        return code

    def _hold(self, broker: _Session, starter: Starter, stop: StopSignals) -> int:
        ready = False
        beat_at = time.monotonic() + BEAT_S
        while True:
            sessions = [broker, self._tunnel] if self._tunnel else [broker]
            waiter = select.poll()
            for descriptor in (*stop.descriptors, *(each for session in sessions for each in session.descriptors())):
                waiter.register(descriptor, select.POLLIN)
            over = any(len(session.descriptors()) < 2 for session in sessions)
            timeout_s = LOOK_S if over else max(0.0, beat_at - time.monotonic())
            found = {descriptor for descriptor, _ in waiter.poll(1000 * timeout_s)}
            if any(stop.read(descriptor) for descriptor in found.intersection(stop.descriptors)):
                return 0
            if time.monotonic() >= beat_at:
                beat_at = time.monotonic() + BEAT_S
                broker.send(b"\n")
            for line in broker.read():
                if self._heard(line, starter):
                    ready = True
                    broker.relay = self._relay  # before, its words were for the exception
            if (code := broker.code()) is not None:
                return self._ended(code, broker) if ready else self._failed(code, broker)
            if self._tunnel is not None:
                self._tunnel.read()
                if (code := self._tunnel.code()) is not None:
                    return self._ended(NOT_CONNECTED, self._tunnel)

    def _session(self, words: Sequence[str], first: bytes) -> _Session:
        return _Session(words, first, Log(self._lock.directory / "logs" / "broker.log"))

    # --- what comes from there ----------------------------------------------------------------------------------------

    def _heard(self, line: bytes, starter: Starter) -> bool:
        """Whether it says that the broker is ready. What a login shell prints is of no meaning."""
        if not line.startswith(b"{"):
            return False
        try:
            facts = facts_of(line)
        except ZmqschedError as error:
            raise type(error)(f"on {self._host}: {error}") from None
        files = [ConnectionFile.parse(msgspec.json.encode(each), f"what came from {self._host}") for each in facts["files"]]
        if "pid" in facts:
            self._find_way(files[-1])
        for file in files:
            self._from_here(file).write_into(self._lock.directory)
        if "pid" not in facts:
            return False
        starter.ready({"pid": facts["pid"]})
        return True

    def _find_way(self, file: ConnectionFile) -> None:
        """See whether what is here can reach the broker, and if not, lay a way through ssh."""
        try:
            sockets.pick_address(self._from_here(file).reachable("work"), sockets.BEFORE_TUNNEL_S)
        except BrokerUnreachable:
            self._lay_tunnel(file.addresses)
            log.warning("the broker on %s is reached through ssh only, which is slower", self._host)

    def _from_here(self, file: ConnectionFile) -> ConnectionFile:
        """Loopback there is somebody else's here, unless there is here."""
        if (file.host, file.network) == (this_host(), this_network()):
            return file
        found = {}
        for channel in CHANNELS:
            theirs = [each for each in getattr(file.addresses, channel) if not is_loopback(each)]
            ours = [f"{TUNNEL_SCHEME}{self._end(channel)}"] if self._tunnel else []
            found[channel] = theirs + ours
        return replace(file, addresses=Addresses(**found))

    def _end(self, channel: str) -> Path:
        return self._lock.directory / f"{channel}.ssh"

    def _lay_tunnel(self, addresses: Addresses) -> None:
        words = ssh_words([*self._options, "-o", "ExitOnForwardFailure=yes"])
        for channel in CHANNELS:
            self._end(channel).unlink(missing_ok=True)
            target = next(each for each in getattr(addresses, channel) if each.startswith("tcp://"))
            words += ["-L", f"{self._end(channel)}:{target.removeprefix('tcp://')}"]
        # What is written there comes back: then the ways are open. And it ends with its input.
        tunnel = self._tunnel = self._session([*words, "--", self._host, "exec cat"], b"\n")
        until = time.monotonic() + TUNNEL_S
        while not tunnel.read():
            if (code := tunnel.code()) is not None:
                self._failed(code, tunnel)
            if time.monotonic() >= until:
                raise StartError(f"{self._host}: no way to the broker through ssh within {TUNNEL_S:g} s")
            waiter = select.poll()
            for descriptor in tunnel.descriptors():
                waiter.register(descriptor, select.POLLIN)
            waiter.poll(1000 * LOOK_S)
        if not _greets(self._end("work")):
            tunnel.read()
            raise StartError(f"{self._host}: nobody answers at the broker's addresses: {tunnel.said.tail}\n{_FORBIDDEN}")

    # --- its end ------------------------------------------------------------------------------------------------------

    def _failed(self, code: int, session: _Session) -> NoReturn:
        """Before it was ready."""
        raise StartError(self._how(code, session, " before the broker was ready"))

    def _ended(self, code: int, session: _Session) -> int:
        if code == 0:
            return 0
        log.error("the cluster's broker: %s", self._how(code, session))
        return LOST if code == NOT_CONNECTED or code < 0 else DIED

    def _how(self, code: int, session: _Session, when: str = "") -> str:
        words = session.said.tail
        fix = fix_of(words, self._host) if code == NOT_CONNECTED else ""
        how = f"{self._host}: exit code {code}{when}"
        return "\n".join(filter(None, [f"{how}: {words}" if words else how, fix]))


def _greets(end: Path) -> bool:
    """Whether a broker is at the other end: ZeroMQ begins to speak at once."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(GREETING_S)
        probe.connect(str(end))
        return bool(probe.recv(1))
    return False
