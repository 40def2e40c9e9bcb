"""A TCP proxy that makes a network slow, narrow or broken. It passes bytes on and does not know what they mean."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import msgspec

from zmqsched.config import Addresses, ConnectionFile, split_tcp

CHUNK = 16 * 1024
# What may be under way in one direction, as in a router's queue; past it the sender has to wait.
MAX_UNDER_WAY = 64
_RESET = struct.pack("ii", 1, 0)  # SO_LINGER: close by RST


class Proxy:
    """Listens on loopback in front of a cluster's addresses; ``file`` is the connection file that leads through it.

    ``delay_s``: each way. ``bits_per_s``: of each connection, each way. Both may be changed at any time.
    """

    def __init__(self, real: Path, delay_s: float = 0.0, bits_per_s: float = float("inf")) -> None:
        self.delay_s = delay_s
        self.bits_per_s = bits_per_s
        self.carried = 0
        self.resets = 0
        self._servers: list[asyncio.Server] = []
        self._connections: set[asyncio.StreamWriter] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy")
        self._thread.start()
        known = ConnectionFile.load(real)
        behind = {role: split_tcp(getattr(known.addresses, role)[0]) for role in Addresses.__struct_fields__}
        addresses = {role: [self._await(self._listen(*target))] for role, target in behind.items()}
        self.file = real.parent.parent / "proxied.json"
        msgspec.structs.replace(known, addresses=Addresses(**addresses)).write(self.file)

    def __enter__(self) -> Proxy:
        return self

    def __exit__(self, *_: object) -> None:
        self._await(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self.file.unlink()

    def reset(self) -> None:
        """Break every connection, as a router that lost its table does."""
        self._await(self._reset())

    def _await(self, what: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(what, self._loop).result(60)

    async def _listen(self, host: str, port: int) -> str:
        async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await self._join(reader, writer, host, port)

        server = await asyncio.start_server(connected, "127.0.0.1", 0)
        self._servers.append(server)
        return f"tcp://127.0.0.1:{server.sockets[0].getsockname()[1]}"

    async def _join(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, host: str, port: int) -> None:
        try:
            there, away = await asyncio.open_connection(host, port)
        except OSError:
            writer.transport.abort()
            return
        both = {writer, away}
        self._connections |= both
        try:
            await asyncio.gather(self._carry(reader, away), self._carry(there, writer))
        finally:
            for one in both:
                one.transport.abort()
            self._connections -= both

    async def _carry(self, source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        under_way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(MAX_UNDER_WAY)
        delivery = asyncio.ensure_future(self._deliver(under_way, target))
        free_at = 0.0  # when the line has taken what was put on it
        try:
            while data := await source.read(CHUNK):
                now = self._loop.time()
                free_at = max(free_at, now) + 8 * len(data) / self.bits_per_s
                await under_way.put((free_at + self.delay_s, data))
        except ConnectionError:
            pass
        finally:
            delivery.cancel()
            target.transport.abort()

    async def _deliver(self, under_way: asyncio.Queue[tuple[float, bytes]], target: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while True:
                due, data = await under_way.get()
                await asyncio.sleep(max(0.0, due - self._loop.time()))
                target.write(data)
                self.carried += len(data)
                await target.drain()

    async def _reset(self) -> None:
        self.resets += 1
        for writer in list(self._connections):
            connection: socket.socket = writer.get_extra_info("socket")
            with contextlib.suppress(OSError):
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            writer.transport.abort()

    async def _end(self) -> None:
        for server in self._servers:
            server.close()
        await self._reset()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        await asyncio.gather(*others, return_exceptions=True)
