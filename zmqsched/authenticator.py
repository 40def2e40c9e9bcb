"""Who is let in at a handshake, on a cluster that has keys. Started before the first bind, stopped after the last close."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Mapping

import zmq
from zmq.utils import z85

from . import sockets
from .errors import StartError

_ZAP_ADDRESS = "inproc://zeromq.zap.01"


class Authenticator:
    """Tells libzmq, at each handshake with the context's bound sockets, whether to let the peer in (ZAP, RFC 27).

    It lets in the CURVE keys it was given, each under the name that becomes its messages' User-Id, and Unix peers of
    this user as ``LOCAL_USER``. pyzmq's ``ThreadAuthenticator`` is not used: it needs an asyncio loop, a callback that
    raises ends its thread and then ``stop()`` hangs, and it admits every peer without a mechanism.

    A handshake without an answer hangs for ever and nobody is told, so its owner looks at ``alive`` now and then.
    """

    _STOP = b"stop"

    def __init__(self, ctx: sockets.Context, users: Mapping[bytes, str]) -> None:
        self._ctx = ctx
        self.admit(users)
        self.refused = (0, "")  # how many with keys that are none of these, and from where the last
        self._thread: threading.Thread | None = None

    def admit(self, users: Mapping[bytes, str]) -> None:
        """From now on these public keys (Z85) may connect, under these names, and no others."""
        self._users = {z85.decode(key): name for key, name in users.items()}

    def start(self) -> None:
        """Before the first bind.

        Raises
        ------
        StartError
            The context has an authenticator already.
        """
        zap = self._ctx.socket(zmq.REP)
        zap.setsockopt(zmq.LINGER, 0)
        try:
            zap.bind(_ZAP_ADDRESS)
        except zmq.ZMQError as error:
            zap.close()
            raise StartError(f"cannot authenticate peers: {error.strerror}") from None
        self._thread = threading.Thread(target=self._run, args=(zap,), name="zmqsched-zap", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """After the last bound socket is closed: from here on libzmq would let everybody in. Idempotent."""
        if self._thread is None:
            return
        with self._ctx.socket(zmq.REQ) as control:
            control.setsockopt(zmq.LINGER, 0)
            control.connect(_ZAP_ADDRESS)
            control.send(self._STOP)
            self._thread.join()
        self._thread = None

    @property
    def alive(self) -> bool:
        """Whether handshakes are being answered."""
        return self._thread is not None and self._thread.is_alive()

    def _run(self, zap: sockets.Socket) -> None:
        with zap:
            while True:
                try:
                    request = zap.recv_multipart()
                except zmq.ContextTerminated:
                    return
                if request == [self._STOP]:
                    return
                zap.send_multipart(self._reply(request))

    def _reply(self, request: list[bytes]) -> list[bytes]:
        """Never raises: a request that cannot be understood is one that is refused."""
        try:
            version, number, domain, address, _, mechanism, *credentials = request
            user = self._user(domain, address, mechanism, credentials)
        except Exception:  # noqa: BLE001 - whatever it is, an answer must go out
            version, number, user = b"1.0", request[1] if len(request) > 1 else b"", None
        if user is None:
            self.refused = (self.refused[0] + 1, request[3].decode(errors="replace") if len(request) > 3 else "somewhere")
            return [version, number, b"400", b"No access", b"", b""]
        return [version, number, b"200", b"OK", user.encode(), b""]

    def _user(self, domain: bytes, address: bytes, mechanism: bytes, credentials: list[bytes]) -> str | None:
        if domain != sockets.ZAP_DOMAIN.encode():
            return None
        if mechanism == b"CURVE":
            (key,) = credentials
            return self._users.get(key)
        if mechanism == b"NULL":
            # libzmq gives a Unix peer's address as localhost:UID:GID:PID, from SO_PEERCRED.
            unix = re.fullmatch(rb"localhost:(\d+):\d+:\d+", address)
            return sockets.LOCAL_USER if unix and int(unix[1]) == os.geteuid() else None
        return None
