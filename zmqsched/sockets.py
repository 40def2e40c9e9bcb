"""Every ZeroMQ socket is made here, so that no option is forgotten anywhere.

Rules
-----
* A Unix socket (``ipc://``) lies in a directory of mode 0700 and needs no more. A ``tcp://`` socket, loopback included,
  is always CURVE: encrypted, and open to known keys only. Without keys it is refused, on both sides.
* A bound socket may have both kinds. Then Unix peers are authenticated too (by their user id, as the kernel tells it),
  and **every message of every peer carries a User-Id**. The broker drops what carries none, or one of a key that is not
  good any more: libzmq lets everybody in while no authenticator runs (``authenticator.py``), and never cuts a connection
  because its key was revoked. That one check closes both gaps.
* The authenticator starts before the first bind and stops after the last socket is closed.
* No routing ids are set and no handover is allowed (pitfalls 14 to 17): who a peer is, its messages say.
* High-water marks only bound memory; the flow control is the protocol's credit. So sends are non-blocking, and EAGAIN
  or EHOSTUNREACH is an event for the link, which sends again from its own queue.
* Closing waits for unsent messages for two seconds at most, and for beats not at all: ``Context.term()`` cannot hang.
"""

from __future__ import annotations

import contextlib
import math
import os
import queue
import re
import select
import socket
import struct
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import TYPE_CHECKING, NamedTuple, TypeAlias, cast

import zmq

from . import config, protocol
from .errors import BrokerUnreachable, Refused, StartError

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer as Buffer

Context: TypeAlias = "zmq.Context[zmq.Socket[bytes]]"
Socket: TypeAlias = "zmq.Socket[bytes]"

ZAP_DOMAIN = "zmqsched"
# The User-Id of Unix peers, on a cluster that has keys: the cluster's owner. Those of keys are in keyring.py.
LOCAL_USER = "admin:local"

# Older ones have CVE-2019-13132: a stack overflow before authentication.
_OLDEST_LIBZMQ = (4, 3, 2)
# libzmq's limit is per frame and cuts the link; CURVE adds 33 bytes to a frame, hence the slack.
_SLACK = 1024
_MAX_FRAME = protocol.MAX_PAYLOAD + _SLACK
# Beats and facts are a header without bulk frames.
_MAX_SMALL_FRAME = protocol.MAX_HEADER + _SLACK
# All that an observer sends, its handshake included: about 300 bytes.
_MAX_SUBSCRIPTION = 512
_HWM = 1000
# A beat is of use while it is fresh: better none than one from before the jam.
_BEATS_SENT_HWM, _BEATS_RECEIVED_HWM = 10, 100
_LINGER_MS = 2000
_BACKLOG = 1024
# A peer that connects and says nothing holds a descriptor; libzmq would let it for 30 s.
_HANDSHAKE_MS = 5000
# ZMTP heartbeats find a link that a router dropped. Only complete frames count as life (pitfall 20): a big frame over
# a slow line must be through before the timeout, so that is generous. Dead nodes are noticed by their beats.
_HEARTBEAT_MS, _HEARTBEAT_TIMEOUT_MS = 15_000, 60_000
# The kernel asks a silent network ever less often: after 30 s it waits another 20 s, however soon the network is well
# again. A new connection is quicker.
_UNACKNOWLEDGED_MS = 10_000
# How soon a healed network, or a new broker, is noticed: an attempt to connect is given up after a while, and the next one
# comes after a pause that grows to the last of these. Together less than what a user should wait.
_ATTEMPT_MS = 2_000
_RECONNECT_TCP_MS, _RECONNECT_IPC_MS, _RECONNECT_MAX_MS = 100, 20, 2_000
# Where there is a tunnel, addresses that do not answer are not waited for as long: one lost packet, not two.
BEFORE_TUNNEL_S = 2.0

# What the monitor of a connecting socket says of a handshake that failed. A CURVE server that cannot decrypt what a peer
# says closes the connection without a word; so does one that dies, but not several times in a row.
_HANDSHAKE_FAILED = int(
    zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
)
_CLOSED_ENOUGH = 3
_BACK, _BARRED = int(zmq.EVENT_HANDSHAKE_SUCCEEDED), int(zmq.EVENT_HANDSHAKE_FAILED_AUTH)

_PEER = struct.Struct("iII")  # pid, uid and gid, as the kernel tells them

# pyzmq's names are enums, and enum arithmetic costs more than the calls it is for.
_POLLIN = int(zmq.POLLIN)
_NOBLOCK, _NOBLOCK_MORE = int(zmq.NOBLOCK), int(zmq.NOBLOCK | zmq.SNDMORE)
_SMALL_MESSAGE = 2  # frames: a header, and a routing id before it

_WILDCARDS = [ip_address(text) for text in ("0.0.0.0", "::", "::ffff:0.0.0.0")]
_EVERYWHERE = (
    "would listen on every interface; write the address of the one that is meant. With --insecure-any-interface it is done "
    "all the same, and whatever network this host is in can try to get in"
)


@dataclass(frozen=True, slots=True)
class Keys:
    """The CURVE keys of one side in Z85: the server's public key, and, to connect, a key pair of one's own; to bind, the
    server's secret key."""

    server_public: bytes
    client_public: bytes = b""
    client_secret: bytes = field(repr=False, default=b"")
    server_secret: bytes = field(repr=False, default=b"")

    @classmethod
    def of(cls, file: config.ConnectionFile) -> Keys | None:
        """The keys in a connection file; None if it holds none, as the cluster only has Unix sockets."""
        if not file.server_key:
            return None
        return cls(file.server_key.encode(), file.client_public.encode(), file.client_secret.encode())


def key_pair() -> tuple[bytes, bytes]:
    """A new public and secret key."""
    if not zmq.has("curve"):
        raise StartError("this libzmq has no CURVE encryption, which tcp:// needs; install pyzmq's own wheel")
    return zmq.curve_keypair()


class Bound(NamedTuple):
    """A bound socket, and the addresses it got, in the order asked for: where ``*`` was, the port is in there."""

    socket: Socket
    addresses: list[str]


def context() -> Context:
    """A context of one's own. The process-wide ``Context.instance()`` belongs to the user's program, which may end it.

    Raises
    ------
    StartError
        libzmq is too old to be exposed to a network.
    """
    if zmq.zmq_version_info() < _OLDEST_LIBZMQ:
        wanted = ".".join(map(str, _OLDEST_LIBZMQ))
        raise StartError(f"libzmq {zmq.zmq_version()} is too old, {wanted} or newer is needed: pip install -U pyzmq")
    return zmq.Context()


def bind_router(ctx: Context, addresses: Iterable[str], keys: Keys | None) -> Bound:
    """The broker's work socket."""
    router = _socket(ctx, zmq.ROUTER, _MAX_FRAME)
    # Without it, what is sent to a peer that left or is full vanishes without a word (pitfalls 1 and 2).
    router.setsockopt(zmq.ROUTER_MANDATORY, 1)
    return _bind(router, addresses, keys)


def bind_sub(ctx: Context, addresses: Iterable[str], keys: Keys | None) -> Bound:
    """The monitor's socket for beats. Poll it once it is bound: until then no node's beat is sent (pitfall 9)."""
    sub = _socket(ctx, zmq.SUB, _MAX_SMALL_FRAME)
    sub.setsockopt(zmq.RCVHWM, _BEATS_RECEIVED_HWM)
    sub.setsockopt(zmq.LINGER, 0)
    sub.setsockopt(zmq.SUBSCRIBE, b"")
    return _bind(sub, addresses, keys)


def bind_xpub(ctx: Context, addresses: Iterable[str], keys: Keys | None) -> Bound:
    """A socket for the broker's facts (``facts.py``). A slow observer loses facts and nobody else notices."""
    xpub = _socket(ctx, zmq.XPUB, _MAX_SUBSCRIPTION)
    xpub.setsockopt(zmq.XPUB_MANUAL, 1)
    xpub.setsockopt(zmq.LINGER, 0)
    return _bind(xpub, addresses, keys)


def connect_dealer(
    ctx: Context, addresses: Sequence[str], keys: Keys | None, timeout_s: float = config.CONNECT_TIMEOUT_S
) -> Socket:
    """A client's or node's link to the broker, once its handshake is done.

    Raises
    ------
    BrokerUnreachable
        Nobody answers at any of the addresses, or no broker does.
    Refused
        The broker does not let this side in, or its key is not the one in the connection file.
    """
    deadline = time.monotonic() + timeout_s
    dealer = _socket(ctx, zmq.DEALER, _MAX_FRAME)
    # Only to a link whose handshake is done. Otherwise libzmq would take messages while the broker is away and give
    # them to whichever broker comes next (pitfall 12). As it is, a send is EAGAIN until there is a broker (POLLOUT
    # tells), and the link's own queue, which knows what was acknowledged, is the only one.
    dealer.setsockopt(zmq.IMMEDIATE, 1)
    watch = f"inproc://handshake-{descriptor(dealer)}"
    dealer.monitor(watch, _HANDSHAKE_FAILED)
    with ctx.socket(zmq.PAIR) as events:
        events.setsockopt(zmq.LINGER, 0)
        events.connect(watch)
        _connect(dealer, addresses, keys, timeout_s)
        try:
            _await_handshake(dealer, events, max(deadline, time.monotonic() + 0.5 * timeout_s), timeout_s)
        except BaseException:
            dealer.close(linger=0)
            raise
        dealer.disable_monitor()
    return dealer


class Connections:
    """Tells when a socket has got a new connection: what was sent on the one before may be lost.

    Or that it will not get one: libzmq does not try again once the other end has refused the key.
    """

    def __init__(self, of: Socket) -> None:
        self._of = of
        self._events = of.get_monitor_socket(_BACK | _BARRED)
        self.descriptor = descriptor(self._events)
        self.new()  # the descriptor signals only to one that has read the socket empty

    def new(self) -> bool:
        """Whether there has been one since this was asked last.

        Raises
        ------
        Refused
            There will be none.
        """
        events = [struct.unpack_from("=H", frames[0].buffer)[0] for frames in receive_all(self._events, 1_000)]
        if events and events[-1] == _BARRED:
            raise Refused(
                "the connection broke, and the broker does not know this side's key any more: it was revoked or replaced, "
                "or this is another broker. Get the present connection file"
            )
        return bool(events)

    def close(self) -> None:
        """To be called before the socket itself is closed."""
        self._of.disable_monitor()
        self._events.close(linger=0)


def use_keys(connected: Socket, public: str, secret: str) -> None:
    """Connect anew with this key pair. A socket's options count for the connections that are begun after."""
    address = connected.getsockopt_string(zmq.LAST_ENDPOINT).rstrip("\0")
    if address.startswith("tcp://"):
        connected.disconnect(address)
        connected.setsockopt(zmq.CURVE_PUBLICKEY, public.encode())
        connected.setsockopt(zmq.CURVE_SECRETKEY, secret.encode())
        connected.connect(address)


def connect_pub(
    ctx: Context, addresses: Sequence[str], keys: Keys | None, timeout_s: float = config.CONNECT_TIMEOUT_S
) -> Socket:
    """A node's socket for its beats; raises as :func:`connect_dealer` does."""
    pub = _socket(ctx, zmq.PUB, _MAX_SMALL_FRAME)
    pub.setsockopt(zmq.SNDHWM, _BEATS_SENT_HWM)
    pub.setsockopt(zmq.LINGER, 0)
    return _connect(pub, addresses, keys, timeout_s)


def connect_sub(
    ctx: Context, addresses: Sequence[str], keys: Keys | None, timeout_s: float = config.CONNECT_TIMEOUT_S
) -> Socket:
    """An observer's socket for facts; raises as :func:`connect_dealer` does."""
    sub = _socket(ctx, zmq.SUB, _MAX_SMALL_FRAME)
    sub.setsockopt(zmq.LINGER, 0)
    sub.setsockopt(zmq.SUBSCRIBE, b"")
    return _connect(sub, addresses, keys, timeout_s)


def descriptor(of: Socket) -> int:
    """The descriptor that signals what happens on a socket; see :class:`Waiter` for how to read it."""
    return cast(int, of.getsockopt(zmq.FD))


def endpoint(of: Socket) -> str:
    """The address that a socket is connected to."""
    return of.getsockopt_string(zmq.LAST_ENDPOINT).rstrip("\0")


def _readable(one: Socket) -> bool:
    return bool(zmq.zmq_poll([(one, _POLLIN)], 0))  # as asking for EVENTS, which pyzmq wraps in enums


def receive_all(source: Socket, limit: int) -> list[list[zmq.Frame]]:
    """The messages that have come in, at most so many; never waits."""
    messages: list[list[zmq.Frame]] = []
    while len(messages) < limit and _readable(source):  # cheaper than an exception of recv
        frame = source.recv(_NOBLOCK, copy=False)
        frames = [frame]
        while frame.more:
            frame = source.recv(_NOBLOCK, copy=False)
            frames.append(frame)
        messages.append(frames)
    return messages


def send(target: Socket, frames: list[Buffer]) -> None:
    """Send one message without waiting; small frames are copied, which is cheaper, large ones are not.

    Raises
    ------
    zmq.Again
        There is no connection now, or its queue is full.
    """
    copy = len(frames) <= _SMALL_MESSAGE
    for frame in frames[:-1]:
        target.send(frame, _NOBLOCK_MORE, copy)
    target.send(frames[-1], _NOBLOCK, copy)


class Waiter:
    """Sleeps until a socket or a descriptor has something to read.

    In place of ``zmq.Poller``, which asks libzmq several times about each socket whenever it is called. The rule for a
    ZeroMQ socket's own descriptor: it signals an edge, once, and any call on the socket may swallow it. So the socket that
    is sent on is asked itself (``EVENTS``) after everything else was done and before going to sleep; one that is only read
    from, and read empty, keeps its edge. So does the one that is sent on while it is only used through :meth:`receive`.
    """

    def __init__(self, sending: Socket, reading: Socket | None = None) -> None:
        self._sending = sending
        self._emptied = False  # it was read empty, and nothing was done with it since
        self._poll = select.poll()
        self.socket = descriptor(sending)
        self.add(self.socket)
        if reading is not None:
            self.add(descriptor(reading))

    def add(self, descriptor: int) -> None:
        self._poll.register(descriptor, select.POLLIN)

    def remove(self, descriptor: int) -> None:
        self._poll.unregister(descriptor)

    def receive(self, limit: int) -> list[list[zmq.Frame]]:
        """As :func:`receive_all`, from the socket that is sent on: then it is to be used by these methods alone."""
        messages = receive_all(self._sending, limit)
        self._emptied = len(messages) < limit
        return messages

    def send(self, frames: list[Buffer]) -> None:
        """As the function of that name."""
        self._emptied = False
        send(self._sending, frames)

    def use_keys(self, public: str, secret: str) -> None:
        """As the function of that name."""
        self._emptied = False
        use_keys(self._sending, public, secret)

    def wait(self, deadline: float) -> set[int]:
        """The descriptors that can be read, after sleeping until the deadline (monotonic) if there are none. Without
        ``socket`` among them there is nothing to receive from the socket that is sent on."""
        if not deadline or (not self._emptied and _readable(self._sending)):
            return {self.socket, *[descriptor for descriptor, _ in self._poll.poll(0)]}
        # Rounded up: a millisecond early would only mean another turn.
        timeout = max(0, math.ceil((deadline - time.monotonic()) * 1000))
        return {descriptor for descriptor, _ in self._poll.poll(timeout)}


def user_id(frame: zmq.Frame) -> str:
    """Who sent this frame (received with ``copy=False``), as the authenticator named it; "" if nobody vouched."""
    try:
        return str(frame.get("User-Id"))
    except zmq.ZMQError:  # EINVAL: the connection has no such property
        return ""


def address_of(frame: zmq.Frame) -> str:
    """Where this frame came from (received with ``copy=False``), for the log."""
    try:
        return str(frame.get("Peer-Address"))
    except zmq.ZMQError:
        return "an unknown address"


def _socket(ctx: Context, kind: int, max_frame: int) -> Socket:
    made = ctx.socket(kind)
    made.setsockopt(zmq.LINGER, _LINGER_MS)
    made.setsockopt(zmq.SNDHWM, _HWM)
    made.setsockopt(zmq.RCVHWM, _HWM)
    made.setsockopt(zmq.MAXMSGSIZE, max_frame)
    made.setsockopt(zmq.HANDSHAKE_IVL, _HANDSHAKE_MS)
    made.setsockopt(zmq.BACKLOG, _BACKLOG)
    made.setsockopt(zmq.RECONNECT_IVL_MAX, _RECONNECT_MAX_MS)
    return made


def _tcp_options(made: Socket, address: str) -> None:
    # Only where it is needed: with IPV6 on, IPv4 addresses come back as ::ffff:1.2.3.4.
    made.setsockopt(zmq.IPV6, int(address.startswith("tcp://[")))
    # The kernel's own check begins after two hours otherwise: half a minute, then three questions, ten seconds apart.
    made.setsockopt(zmq.TCP_KEEPALIVE, 1)
    made.setsockopt(zmq.TCP_KEEPALIVE_IDLE, 30)
    made.setsockopt(zmq.TCP_KEEPALIVE_INTVL, 10)
    made.setsockopt(zmq.TCP_KEEPALIVE_CNT, 3)
    made.setsockopt(zmq.TCP_MAXRT, _UNACKNOWLEDGED_MS)
    made.setsockopt(zmq.HEARTBEAT_IVL, _HEARTBEAT_MS)
    made.setsockopt(zmq.HEARTBEAT_TIMEOUT, _HEARTBEAT_TIMEOUT_MS)


def _bind(made: Socket, addresses: Iterable[str], keys: Keys | None) -> Bound:
    """libzmq gives a listener the options of the moment it is bound: first the Unix sockets, then those with CURVE."""
    got = {}
    try:
        if keys is not None:
            made.setsockopt_string(zmq.ZAP_DOMAIN, ZAP_DOMAIN)
        for address in sorted(wanted := list(addresses), key=lambda address: address.startswith("tcp://")):
            if address.startswith("tcp://"):
                _serve_curve(made, keys)
                _tcp_options(made, address)
            made.bind(address)
            got[address] = made.getsockopt_string(zmq.LAST_ENDPOINT).rstrip("\0")
    except zmq.ZMQError as error:
        made.close(linger=0)
        raise StartError(f"cannot listen at {address}: {error.strerror}; choose another address or port") from None
    except BaseException:
        made.close(linger=0)
        raise
    return Bound(made, [got[address] for address in wanted])


def _serve_curve(made: Socket, keys: Keys | None) -> None:
    if keys is None or not keys.server_secret:
        raise ValueError("a tcp:// address can only be bound with the server's keys")
    made.setsockopt(zmq.CURVE_SERVER, 1)
    made.setsockopt(zmq.CURVE_SECRETKEY, keys.server_secret)


def _connect(made: Socket, addresses: Sequence[str], keys: Keys | None, timeout_s: float) -> Socket:
    """To one address only: with several, a DEALER would share its messages out among them (pitfall 11)."""
    try:
        address = pick_address(addresses, timeout_s)
        made.setsockopt(zmq.RECONNECT_IVL, _RECONNECT_IPC_MS)
        if address.startswith("tcp://"):
            made.setsockopt(zmq.RECONNECT_IVL, _RECONNECT_TCP_MS)
            made.setsockopt(zmq.CONNECT_TIMEOUT, _ATTEMPT_MS)
            _tcp_options(made, address)
            _use_curve(made, keys)
        elif address.startswith(config.TUNNEL_SCHEME):
            _use_curve(made, keys)
            address = config.tunnel_end(address)
        made.connect(address)
    except BaseException:
        made.close(linger=0)
        raise
    return made


def _await_handshake(dealer: Socket, events: Socket, deadline: float, timeout_s: float) -> None:
    """Until it is done, or libzmq's monitor says that it cannot be: on the socket itself a refusal looks like silence."""
    address = endpoint(dealer)
    advice = "The connection file is of another cluster, or of an earlier life of this one: get the present one"
    closed = 0
    while (left_s := deadline - time.monotonic()) > 0:
        asked = [(dealer, zmq.POLLOUT), (events, zmq.POLLIN)]
        ready = [which for which, _ in zmq.zmq_poll(asked, math.ceil(left_s * 1000))]
        if dealer in ready:
            return
        if events not in ready:
            continue
        (event,) = struct.unpack_from("=H", events.recv_multipart()[0])
        if event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
            raise Refused(f"the broker at {address} does not know this side's key. {advice}")
        if event == zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL:
            raise BrokerUnreachable(f"what answers at {address} is no broker. {advice}")
        closed += 1
        if closed == _CLOSED_ENOUGH:
            raise Refused(
                f"what answers at {address} closes the connection during the handshake: it is no broker, or its key is not "
                f"the server key of the connection file (server key mismatch). {advice}"
            )
    raise BrokerUnreachable(f"the broker at {address} does not answer within {timeout_s:g} s: it hangs, or is no broker")


def _use_curve(made: Socket, keys: Keys | None) -> None:
    if keys is None:
        raise ValueError("only a Unix socket of the broker's own can be connected to without the cluster's keys")
    made.setsockopt(zmq.CURVE_SERVERKEY, keys.server_public)
    made.setsockopt(zmq.CURVE_PUBLICKEY, keys.client_public)
    made.setsockopt(zmq.CURVE_SECRETKEY, keys.client_secret)


def pick_address(addresses: Sequence[str], timeout_s: float = config.CONNECT_TIMEOUT_S) -> str:
    """The first of the broker's addresses that answers, host names replaced by the IP address that did.

    libzmq itself never says that a name does not exist or nobody listens (pitfall 37), and it tries only one of a
    name's IP addresses. Unix sockets are tried first and in order; then those of TCP all at once, so that an address that
    swallows packets delays nobody; tunnels, which cost more than any, last.

    Raises
    ------
    BrokerUnreachable
        None answered within ``timeout_s`` seconds; names each address, what was wrong and what to do.
    """
    failed: dict[str, str] = {}
    for address in addresses:
        if address.startswith("ipc://"):
            try:
                return _probe_ipc(address, timeout_s)
            except (OSError, ValueError) as error:
                failed[address] = _reason(error)
    tunnels = [address for address in addresses if address.startswith(config.TUNNEL_SCHEME)]
    others = [each for each in dict.fromkeys(addresses) if not each.startswith(("ipc://", config.TUNNEL_SCHEME))]
    answer = _first_answer(others, min(timeout_s, BEFORE_TUNNEL_S) if tunnels else timeout_s, failed)
    if answer is not None:
        return answer
    for address in tunnels:
        try:
            return _probe_tunnel(address, timeout_s)
        except (OSError, ValueError) as error:
            failed[address] = _reason(error)
    listed = ", ".join(f"{address} ({why})" for address, why in failed.items()) or "there are none"
    raise BrokerUnreachable(
        f"nobody answers at the broker's addresses: {listed}; is the cluster running (zmqsched ls)? "
        "For other hosts it must be started with --listen ADDR, and no firewall may be in between"
    )


def _first_answer(addresses: list[str], timeout_s: float, failed: dict[str, str]) -> str | None:
    """Probe all at once. In threads, as looking up a name has no timeout; one that hangs is left behind."""
    answers: queue.SimpleQueue[tuple[str, str | Exception]] = queue.SimpleQueue()

    def probe(address: str) -> None:
        try:
            answers.put((address, _probe_tcp(address, timeout_s)))
        except (OSError, ValueError) as error:
            answers.put((address, error))

    deadline = time.monotonic() + timeout_s
    for address in addresses:
        threading.Thread(target=probe, args=(address,), name="zmqsched-probe", daemon=True).start()
    waiting = set(addresses)
    while waiting:
        try:
            address, answer = answers.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            break
        if isinstance(answer, str):
            return answer
        waiting.discard(address)
        failed[address] = _reason(answer)
    failed.update((address, f"no answer in {timeout_s:g} s") for address in addresses if address in waiting)
    return None


def _probe_ipc(address: str, timeout_s: float) -> str:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(timeout_s)
        probe.connect(config.ipc_path(address))
        _, user, _ = _PEER.unpack(probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))
    if user != os.geteuid():  # it would not let us in, nor should we trust it
        raise PermissionError(0, f"a socket of user {user}")
    return address


def _probe_tunnel(address: str, timeout_s: float) -> str:
    end = config.tunnel_end(address)
    found = os.lstat(config.ipc_path(end))
    if found.st_uid != os.geteuid() or found.st_mode & 0o077:
        raise ValueError("open to other users: StreamLocalBindMask in sshd_config")
    _probe_ipc(end, timeout_s)
    return address


def _probe_tcp(address: str, timeout_s: float) -> str:
    with socket.create_connection(config.split_tcp(address), timeout=timeout_s) as probe:
        # A free port of this host that is probed from that very port by chance answers itself.
        if probe.getsockname() == probe.getpeername():
            raise ConnectionRefusedError(0, "connection refused")
        host, port = probe.getpeername()[:2]
    return f"tcp://{_bracketed(host)}:{port}"


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    return str(error)


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def listen_address(text: str = "") -> str:
    """What to bind for ``--listen ADDR[:PORT]``: ``tcp://IP:PORT``, the port ``*`` (any free one) if none is given.

    "" is loopback. Names are looked up, IPv6 addresses may come with or without brackets (with, if a port follows).
    Listening on every interface at once is refused: it offers the cluster to networks one did not think of.

    Raises
    ------
    ValueError
        One line that says what is wrong and what to write instead.
    """
    host, port = _host_and_port(text or "127.0.0.1")
    try:
        found = ip_address(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0])
    except (OSError, UnicodeError, IndexError):
        raise ValueError(f"--listen {text}: {host!r} is not an address; write one that `ip addr` shows") from None
    if found in _WILDCARDS:
        raise ValueError(f"--listen {text} {_EVERYWHERE}")
    return f"tcp://{_bracketed(str(found))}:{port}"


def listen_addresses(text: str, *, any_interface: bool) -> list[str]:
    """As :func:`listen_address`; with ``any_interface``, where every interface is asked for, each address that this host has
    now: so the connection file says where to connect to."""
    host, port = _host_and_port(text or "127.0.0.1")
    with contextlib.suppress(ValueError):
        if any_interface and (wild := ip_address(host)) in _WILDCARDS:
            found = [ip_address(address) for address in own_addresses() if "%" not in address]  # no use elsewhere
            found.sort(key=lambda address: address.is_loopback)
            return [f"tcp://{_bracketed(str(each))}:{port}" for each in found if each.version == wild.version]
    return [listen_address(text)]


def own_addresses() -> list[str]:
    """All IP addresses of this host, those of links with their interface's name behind a ``%``."""
    import psutil  # for this alone

    every = [each for interface in psutil.net_if_addrs().values() for each in interface]
    return [each.address for each in every if each.family in (socket.AF_INET, socket.AF_INET6)]


def _host_and_port(text: str) -> tuple[str, str]:
    match = re.fullmatch(r"\[([^\[\]]+)\](?::(\d{1,5}|\*))?|([^\[\]:]*)(?::(\d{1,5}|\*))?|([^\[\]]+)", text)
    if match is None:
        raise ValueError(f"--listen {text}: write ADDR, ADDR:PORT or [IPV6]:PORT")
    inner, inner_port, host, host_port, bare = match.groups()
    host, port = inner or bare or host, inner_port or host_port or "*"
    if host in ("", "*"):
        host = "0.0.0.0"
    if bare is not None and bare.count(":") < 2:
        raise ValueError(f"--listen {text}: the port must be a number from 1 to 65535")
    if port != "*" and not 1 <= int(port) <= 65535:
        raise ValueError(f"--listen {text}: the port must be a number from 1 to 65535")
    return host, port
