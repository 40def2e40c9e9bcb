"""The broker's shell: sockets around the scheduler. It carries and never decides.

One thread, one loop. A turn reads what has come in on ROUTER and SUB, hands it to the core, ticks the core, and sends what
the core says. An unexpected error ends the process loudly. It never unpickles: payloads pass through as bytes.

With a journal, a broker that follows one that died is the same to everybody: it has the tasks, and over TCP the addresses
and the keys, which lie in the journal for that.
"""

from __future__ import annotations

import json
import math
import os
import platform
import resource
import secrets
from collections.abc import Sequence
from pathlib import Path
from random import Random
from time import monotonic

import msgspec
import zmq

from . import host, sockets
from .authenticator import Authenticator
from .codec import decode, encode
from .config import (
    BEAT_INTERVAL_S,
    CONNECTION_FILE,
    Addresses,
    ClusterLock,
    ConnectionFile,
    TaskDefaults,
    ipc_address,
    this_host,
    this_network,
)
from .core.events import (
    Arrived,
    KeysChanged,
    Leave,
    Log,
    Malformed,
    Publish,
    Quit,
    Rekey,
    SchedulerAction,
    SchedulerEvent,
    Send,
    Shrunk,
    Tick,
    Undelivered,
    Write,
)
from .core.scheduler import Scheduler
from .core.settings import DEAD_AFTER_S, Settings, patience
from .errors import ConnectionFileError, JournalError, ProtocolError, VersionMismatch
from .facts import Facts
from .intake import Intake
from .journal import Journal
from .keyring import Keyring, Stored
from .lookout import Lookout
from .monitor import Monitor
from .protocol import ChangeKeys, Envelope, KeyReport, No
from .shell import Relay, Starter, StopSignals, log, return_memory, tune_garbage_collection
from .version import PYTHON, __version__

MAX_MESSAGES_PER_TURN = 200
LINGER_MS = 1_000
SETTLE_S = 2.0  # nodes ping each second, hear that their session is over, and join anew
# What this process may have, before unfinished messages are held against their senders: so many times the bytes of tasks
# that it may hold, or one part in so many of the usable memory if that is more.
MEMORY_PER_QUEUED, MEMORY_SHARE = 2, 2
CHANNELS = ("work", "beats", "status")


class _Identity(msgspec.Struct):
    """What a cluster over TCP is known by: whoever follows its broker must have the same."""

    cluster_id: str
    listen: str
    addresses: Addresses
    keys: Stored

    @classmethod
    def read(cls, journal: Journal | None, listen: str) -> _Identity | None:
        """That of the broker before, if it listened as this one is to."""
        if journal is None or not listen or not journal.identity:
            return None
        identity = msgspec.json.decode(journal.identity, type=cls)
        return identity if identity.listen == listen else None


class Broker:
    """A bound broker. ``run`` serves until told to stop; everything it made is gone when it returns."""

    def __init__(
        self,
        name: str,
        policy: str,
        listen: Sequence[str] = (),
        journal: Path | None = None,
        max_queued: int | None = None,
        *,
        beat_interval_s: float = BEAT_INTERVAL_S,
        dead_after_s: float = DEAD_AFTER_S,
        idle_timeout_s: float = 0.0,
        tasks: TaskDefaults | None = None,
    ) -> None:
        """Take the name, open the journal, bind the sockets and write the connection file.

        ``listen``: ``tcp://`` addresses (``sockets.listen_address``), besides Unix sockets in the cluster's directory.
        ``max_queued``: bytes held before clients are asked to hold back; by default what the host has room for.
        ``beat_interval_s``, ``dead_after_s``: how often nodes beat, and after how long a silence they are given up.
        ``idle_timeout_s``: it ends when nothing has been asked of it for so long; 0: never. ``tasks``: what clients' tasks
        have unless they say otherwise.

        Raises
        ------
        ClusterExists, JournalError, StartError
            Another broker has the name, the journal cannot be used, or an address is taken.
        """
        self.lock = ClusterLock.acquire(name)
        self._journal: Journal | None = None
        try:
            self._journal = Journal(journal, name) if journal else None
            suspect_after_s, ping_grace_s = patience(dead_after_s)
            settings = Settings(
                name=name,
                epoch=secrets.randbits(48),
                python=PYTHON,
                policy=policy,
                beat_interval_s=beat_interval_s,
                suspect_after_s=suspect_after_s,
                ping_grace_s=ping_grace_s,
                journal=self._journal is not None,
                max_queued_bytes=host.room_for_tasks() if max_queued is None else max_queued,
                settle_s=SETTLE_S if self.lock.was_left or self._journal else 0.0,
                idle_timeout_s=idle_timeout_s,
                max_connections=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
            )
            self._core = self._restored(settings)
            before = _Identity.read(self._journal, " ".join(listen))
        except BaseException:
            self._let_go(journal_is_done=False)
            raise
        self._listen = listen
        self._tasks = tasks or TaskDefaults()
        self._cluster_id = before.cluster_id if before else secrets.token_hex(16)
        self._keyring = Keyring(before.keys if before else None, monotonic()) if listen else None
        self._ctx = sockets.context()
        self._intake = Intake(max(MEMORY_PER_QUEUED * settings.max_queued_bytes, host.usable_memory() // MEMORY_SHARE))
        self._authenticator: Authenticator | None = None
        keys = None
        if self._keyring:
            keys = self._keyring.keys
            self._authenticator = Authenticator(self._ctx, self._keyring.users)
            self._authenticator.start()
        try:
            self._router, work = sockets.bind_router(self._ctx, self._addresses("work", before), keys)
            self._monitor = Monitor(self._ctx, self._addresses("beats", before), self._keyring, self._intake)
            self._facts = Facts(self._ctx, self._addresses("status", before), self._keyring)
            self._bound = Addresses(work, self._monitor.addresses, self._facts.addresses)
            self._keep_identity()
        except BaseException:
            if self._authenticator:  # its socket is its thread's: closed from here, libzmq aborts the process
                self._authenticator.stop()
            self._ctx.destroy(linger=0)
            self._let_go(journal_is_done=self._core.book.keeps_nothing)
            raise
        self._lookout = Lookout(self._authenticator, self._intake)
        self._copies: Relay | None = None
        self.file = self._write_files(name)
        if self._journal:
            self._journal.start()

    def _addresses(self, channel: str, before: _Identity | None) -> list[str]:
        """Unix sockets for those on this host, in any case. With TCP the cluster's id is in their names: another cluster may
        have this one's name, on a host of this one's name."""
        if not self._listen:
            return [ipc_address(self.lock.directory, channel)]
        tcp = getattr(before.addresses, channel)[:-1] if before else [_port_of(each, channel) for each in self._listen]
        return [*tcp, ipc_address(self.lock.directory, f"{channel}-{self._cluster_id[:8]}")]

    def _keep_identity(self) -> None:
        if self._journal and self._keyring:
            identity = _Identity(self._cluster_id, " ".join(self._listen), self._bound, self._keyring.stored)
            self._journal.identity = msgspec.json.encode(identity)

    def _restored(self, settings: Settings) -> Scheduler:
        core = Scheduler(settings, Random(secrets.randbits(64)))
        if self._journal:
            core.restore(self._journal.read(), monotonic())
        return core

    @property
    def path(self) -> Path:
        return self.lock.directory / CONNECTION_FILE

    def run(
        self, starter: Starter, *, until_eof: bool, give_up_after_s: float = math.inf, copies: Relay | None = None
    ) -> None:
        """``give_up_after_s``: with ``until_eof``, it ends as well when nothing has come from standard input for so long.
        ``copies``: who is told the connection files again when keys have changed; what the starter is told has them, too."""
        stop = StopSignals(until_eof=until_eof)
        self._copies = copies
        waiter = sockets.Waiter(self._router, self._monitor.socket)
        news = [self._journal.fileno()] if self._journal else []
        for descriptor in (*stop.descriptors, *news):
            waiter.add(descriptor)
        starter.ready({"pid": os.getpid(), "file": str(self.path), **(self._contents() if copies else {})})
        silent_at = monotonic() + give_up_after_s
        tune_garbage_collection()
        log.info("broker of cluster %s ready: %s", self.file.name, self.path)
        try:
            why = ""
            while not why:
                ready = waiter.wait(min(self._core.next_deadline(), silent_at))
                why = self._turn(beats=self._monitor.descriptor in ready)
                for descriptor in ready.intersection(stop.descriptors):
                    reason = stop.read(descriptor)
                    if descriptor != 0:
                        why = why or reason
                    elif reason:  # whoever owns the cluster is gone or wants it to end
                        waiter.remove(descriptor)
                        silent_at = math.inf
                        self._core.handle(Leave(False, reason), monotonic())
                    else:
                        silent_at = monotonic() + give_up_after_s
                if monotonic() >= silent_at:
                    silent_at = math.inf
                    reason = f"nothing was heard of its starter for {give_up_after_s:g} s"
                    self._core.handle(Leave(False, reason), monotonic())
                if self._authenticator and not self._authenticator.alive:
                    why = "the authenticator died: nobody new could be let in"
            log.info("broker ends: %s", why)
        finally:
            self._close()

    def _turn(self, *, beats: bool) -> str:
        """Take in, act, send. Returns why to end, if the core says so."""
        now = monotonic()
        why = ""
        if self._keyring and now >= self._keyring.deadline:
            gone = self._keyring.expire(now)
            self._put_keys_into_force(gone)
            why = self._perform(self._core.handle(KeysChanged({}, gone), now), now)
        for news in self._lookout.look(now):
            self._perform(self._core.handle(news, now), now)
        for event in self._journal.news() if self._journal else ():
            why = self._perform(self._core.handle(event, now), now) or why
        for frames in sockets.receive_all(self._router, MAX_MESSAGES_PER_TURN):
            why = self._perform(self._core.handle(self._event(frames), now), now) or why
        if beats:
            for beat in self._monitor.read():
                why = self._perform(self._core.handle(beat, now), now) or why
        return self._perform(self._core.handle(Tick(), now), now) or why

    def _event(self, frames: Sequence[zmq.Frame]) -> SchedulerEvent:
        peer = frames[0].bytes
        user = ""
        if self._keyring is not None:
            self._intake.heard(frames[0])
            if (user := sockets.user_id(frames[0])) not in self._keyring.live:
                return Malformed(peer, self._keyring.refusal(user), sender=sockets.address_of(frames[0]))
        try:
            return Arrived(peer, user, decode([frame.buffer for frame in frames[1:]]))
        except ProtocolError as error:
            version = isinstance(error, VersionMismatch)
            no = No("version" if version else "malformed", f"{error}; install the same zmqsched on both sides")
            sender = f"{user or 'this host'} at {sockets.address_of(frames[0])}"
            return Malformed(peer, "protocol version" if version else "malformed message", no, sender)

    def _perform(self, actions: list[SchedulerAction], now: float) -> str:
        why = ""
        for action in actions:
            match action:
                case Send():
                    if (refusal := self._send(action.peer, action.envelope)) is not None:
                        self._core.handle(refusal, now)
                case Publish(fact):
                    for offence in self._facts.publish(fact):
                        self._core.handle(offence, now)
                case Write() if self._journal:
                    self._journal.write(action)
                case Rekey(session, request):
                    why = self._perform(self._core.handle(self._rekey(session, request, now), now), now) or why
                case Log(level, text):
                    getattr(log, level)(text)
                case Shrunk():
                    return_memory()
                case Quit(reason):
                    why = reason
        return why

    def _send(self, peer: bytes, envelope: Envelope) -> Undelivered | None:
        frames = encode(envelope)
        try:
            sockets.send(self._router, [peer, *frames])
        except zmq.Again:
            return Undelivered(peer, "full")
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            return Undelivered(peer, "unreachable")
        return None

    def _rekey(self, session: int, request: ChangeKeys, now: float) -> KeysChanged:
        if self._keyring is None:
            why = "this cluster has no keys: it only has Unix sockets, which whoever can read its directory can use"
            return KeysChanged({}, (), session, KeyReport(request.request, [], str(self.lock.directory), why))
        moved: dict[str, tuple[str, str]] = {}
        gone: frozenset[str] = frozenset()
        warning = ""
        if request.action == "rotate":
            moved = self._keyring.rotate(request.roles, request.grace_s, now)
        elif request.action == "revoke":
            gone = self._keyring.revoke(request.roles)
        if moved or gone:
            log.info("keys of %s: %s", ", ".join(request.roles), request.action)
            warning = self._put_keys_into_force(gone)
        report = KeyReport(request.request, self._keyring.info(now), str(self.lock.directory), warning)
        return KeysChanged(moved, gone, session, report)

    def _put_keys_into_force(self, gone: frozenset[str]) -> str:
        """Here, in the files, and for the next broker. Returns what of it did not work."""
        assert self._keyring is not None, "a cluster without keys"
        assert self._authenticator is not None, "nobody to be told"
        self._authenticator.admit(self._keyring.users)
        if gone:
            self._facts.cut_off()
        try:
            self._keyring.write_files(self.file, self.lock.directory)
            self._keep_identity()
            if self._copies:
                self._copies.forward(json.dumps(self._contents()).encode() + b"\n")
        except (ConnectionFileError, JournalError) as error:
            log.error("keys were changed, but %s", error)
            return f"in force until the broker ends, but {error}"
        return ""

    def _contents(self) -> dict[str, object]:
        """The connection files, for whoever holds this broker from another host."""
        files = self._keyring.files(self.file) if self._keyring else [self.file]
        return {"files": msgspec.to_builtins(files)}

    def _write_files(self, name: str) -> ConnectionFile:
        file = ConnectionFile(
            name=name,
            cluster_id=self._cluster_id,
            host=this_host(),
            network=this_network(),
            pid=os.getpid(),
            python=platform.python_version(),
            zmqsched=__version__,
            addresses=self._bound,
            tasks=self._tasks,
        )
        if self._keyring:
            self._keyring.write_files(file, self.lock.directory)
        else:
            file.write_into(self.lock.directory)
        return file

    def _close(self) -> None:
        self._monitor.socket.close(linger=0)
        self._facts.close()
        self._router.close(linger=LINGER_MS)
        if self._authenticator:
            self._authenticator.stop()
        self._ctx.term()
        self._let_go(journal_is_done=self._core.book.keeps_nothing)

    def _let_go(self, *, journal_is_done: bool) -> None:
        if self._journal:
            self._journal.close(remove=journal_is_done)
        self.lock.remove()


def _port_of(listen: str, channel: str) -> str:
    """A stated port is the work socket's, the next two are for beats and status; else each takes what is free."""
    host, _, port = listen.rpartition(":")
    return listen if port == "*" else f"{host}:{int(port) + CHANNELS.index(channel)}"
