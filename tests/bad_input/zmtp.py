"""ZMTP spoken by hand (RFC 23, 26), for what libzmq would not send."""

from __future__ import annotations

import socket
import struct
from types import TracebackType

READ_S = 60.0


def greeting(mechanism: bytes = b"NULL", major: int = 3, minor: int = 1, *, as_server: bool = False) -> bytes:
    signature = b"\xff" + bytes(8) + b"\x7f"
    return signature + bytes((major, minor)) + mechanism.ljust(20, b"\0") + bytes((as_server,)) + bytes(31)


def command(name: bytes, body: bytes = b"") -> bytes:
    body = bytes((len(name),)) + name + body
    return b"\x04" + bytes((len(body),)) + body if len(body) < 256 else b"\x06" + struct.pack(">Q", len(body)) + body


def ready(kind: bytes) -> bytes:
    return command(b"READY", b"\x0bSocket-Type" + struct.pack(">I", len(kind)) + kind)


def frame(body: bytes, *, more: bool = False) -> bytes:
    if len(body) < 256:
        return bytes((more, len(body))) + body
    return bytes((2 | more,)) + struct.pack(">Q", len(body)) + body


class Speaker:
    """A TCP or Unix connection that says what it is told to."""

    def __init__(self, address: str) -> None:
        if address.startswith("ipc://"):
            self.socket = socket.socket(socket.AF_UNIX)
            self.socket.connect(address.removeprefix("ipc://"))
        else:
            host, port = address.removeprefix("tcp://").split(":")
            self.socket = socket.create_connection((host, int(port)))
        self.socket.settimeout(READ_S)

    def __enter__(self) -> Speaker:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.socket.close()

    def say(self, *parts: bytes) -> None:
        self.socket.sendall(b"".join(parts))

    def hears(self, size: int) -> bytes:
        heard = b""
        while len(heard) < size and (part := self.socket.recv(size - len(heard))):
            heard += part
        return heard

    def cut_off(self) -> bool:
        """Wait until the other end closes; False if it has not for READ_S."""
        try:
            while self.socket.recv(65536):
                pass
        except TimeoutError:
            return False
        except ConnectionError:
            pass
        return True
