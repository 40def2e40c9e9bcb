"""The control socket: what other processes ask of the one that holds a cluster's nodes.

A Unix socket in the cluster's directory, which only this user can enter. Each line is a request, a JSON object, and is
answered by a line: what was asked for, or ``{"error": TEXT}``.

Rules
-----
* Nobody who connects can hold up the cluster: nothing here waits, and whoever is silent, does not read or sends a line that
  is too long is cut off.
* It is served by whoever holds the nodes. The broker's death does not end it, this process's does.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from .config import cluster_dir, is_held
from .errors import ClusterNotFound, ZmqschedError

SOCKET = "control"
MAX_LINE = 1 << 16
MAX_ANSWER = 1 << 24
MAX_PEERS = 32
# A peer on this host has its request ready and reads its answer.
SILENT_S = 5.0
# A batch system's command may take some seconds.
ANSWER_S = 60.0

Request = dict[str, Any]


@contextlib.contextmanager
def _short_path(directory: Path) -> Iterator[str]:
    """The socket's path, however deep the directory lies: a Unix socket's has 107 bytes at most."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{descriptor}/{SOCKET}"
    finally:
        os.close(descriptor)


class Server:
    """The socket of one cluster, for a loop that waits for ``descriptors``. ``answer`` is called with each request; what it
    raises is told to the peer."""

    def __init__(self, directory: Path, answer: Callable[[Request], Request]) -> None:
        self._directory = directory
        self._answer = answer
        self._peers: dict[int, _Peer] = {}
        self._listener: socket.socket | None = None
        self.look()

    def descriptors(self) -> dict[int, int]:
        """What to wait for: poll events by descriptor."""
        wanted = {number: peer.events for number, peer in self._peers.items()}
        if self._listener is not None and len(self._peers) < MAX_PEERS:
            wanted[self._listener.fileno()] = select.POLLIN
        return wanted

    def serve(self, ready: set[int]) -> None:
        """Do what these descriptors allow, and cut off who is too slow."""
        if self._listener is not None and self._listener.fileno() in ready:
            with contextlib.suppress(OSError):
                connection, _ = self._listener.accept()
                self._peers[connection.fileno()] = _Peer(connection)
        now = time.monotonic()
        for number, peer in list(self._peers.items()):
            if number in ready:
                peer.turn(self._answer)
            if peer.over or now >= peer.until:
                peer.close()
                del self._peers[number]

    def look(self) -> None:
        """Once in a while: bind it again if somebody has tidied the directory away, between two brokers perhaps."""
        with contextlib.suppress(OSError):
            if self._listener is None or not (self._directory / SOCKET).exists():
                self._bind()

    def close(self) -> None:
        for peer in self._peers.values():
            peer.close()
        self._peers = {}
        self._unbind()

    def _bind(self) -> None:
        self._unbind()
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            with _short_path(self._directory) as path:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(path)
                listener.bind(path)
            listener.listen(MAX_PEERS)
        except OSError:
            listener.close()
            raise
        self._listener = listener

    def _unbind(self) -> None:
        if self._listener is not None:
            self._listener.close()
            self._listener = None


class _Peer:
    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self._connection = connection
        self._read = b""
        self._unsent = b""
        self.over = False
        self.until = time.monotonic() + SILENT_S

    @property
    def events(self) -> int:
        return select.POLLOUT if self._unsent else select.POLLIN

    def turn(self, answer: Callable[[Request], Request]) -> None:
        try:
            if self._unsent:
                self._send()
            elif data := self._connection.recv(MAX_LINE):
                self._read += data
            else:
                self.over = True
            self._next(answer)
        except BlockingIOError:
            pass
        except OSError:
            self.over = True

    def close(self) -> None:
        self._connection.close()

    def _next(self, answer: Callable[[Request], Request]) -> None:
        """Answer what has come, one after the other."""
        while not self._unsent and b"\n" in self._read:
            line, _, self._read = self._read.partition(b"\n")
            self._unsent = _line(_answered(line, answer))
            self.until = time.monotonic() + SILENT_S
            self._send()
        if len(self._read) > MAX_LINE:
            self._read = b""
            self._unsent = _line({"error": f"a request has {MAX_LINE} bytes at most"})
            self._send()
            self.over = True

    def _send(self) -> None:
        self._unsent = self._unsent[self._connection.send(self._unsent) :]


def _answered(line: bytes, answer: Callable[[Request], Request]) -> Request:
    try:
        request = json.loads(line)
    except (ValueError, RecursionError):
        return {"error": "a request is a JSON object on one line"}
    if not isinstance(request, dict):
        return {"error": "a request is a JSON object on one line"}
    try:
        return answer(request)
    except (ZmqschedError, ValueError, TypeError) as error:
        return {"error": str(error)}


def _line(answer: Request) -> bytes:
    return json.dumps(answer).encode() + b"\n"


def ask(name: str, request: Request, timeout: float = ANSWER_S) -> Request:
    """What the process that holds this cluster's nodes answers.

    Raises
    ------
    ClusterNotFound
        No process on this host holds nodes of a cluster of this name.
    ZmqschedError
        It cannot do that, and says why; or it does not answer within ``timeout`` seconds.
    """
    directory = cluster_dir(name)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(timeout)
        try:
            _connect(connection, directory, time.monotonic() + timeout)
            connection.sendall(_line(request))
            answer = _read_line(connection)
        except TimeoutError:
            raise ZmqschedError(f"who holds the cluster {name!r} does not answer within {timeout:g} s") from None
        except OSError:
            raise ClusterNotFound(_nobody(name, directory)) from None
    if "error" in answer:
        raise ZmqschedError(str(answer["error"]))
    return answer


def is_served(directory: Path) -> bool:
    """Whether somebody listens at the control socket in this directory."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        with _short_path(directory) as path:
            connection.connect(path)
        return True
    return False


def _connect(connection: socket.socket, directory: Path, until: float) -> None:
    with _short_path(directory) as path:
        while True:
            try:
                return connection.connect(path)
            except BlockingIOError:  # too many others wait to be let in
                if time.monotonic() >= until:
                    raise TimeoutError from None
                time.sleep(0.02)


def _nobody(name: str, directory: Path) -> str:
    if is_held(directory):
        return f"the cluster {name!r} runs, but no process on this host holds its nodes: each was started by itself"
    return f"no cluster named {name!r} was started here; see: zmqsched ls"


def _read_line(connection: socket.socket) -> Request:
    data = b""
    while not data.endswith(b"\n") and len(data) < MAX_ANSWER:
        if not (more := connection.recv(1 << 20)):
            raise ConnectionResetError
        data += more
    answer: Request = json.loads(data)
    return answer
