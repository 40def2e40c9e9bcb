"""Many nodes in one process: each has a real agent and a real socket; its one worker is a function call.

Run as ``python -m chaos.crowd FILE NUMBER``. "leave" on standard input makes all of them leave in order, at once.
"""

from __future__ import annotations

import os
import secrets
import select
import sys
from collections.abc import Callable
from pathlib import Path
from time import monotonic
from typing import Any

import zmq

from zmqsched import host, sockets
from zmqsched.codec import decode, encode
from zmqsched.config import ConnectionFile
from zmqsched.core import events
from zmqsched.core.agent import Agent
from zmqsched.payload import load_function, pack_value, unpack_call
from zmqsched.protocol import Done, Envelope, NodeHello, Run

TURN_MS = 10


class Member:
    """A node of one slot."""

    def __init__(self, ctx: sockets.Context, file: ConnectionFile, functions: dict[bytes, Callable[..., Any]]) -> None:
        hello = NodeHello(secrets.token_bytes(16), 1, host.where(), 1, 1, (("cpu", 1.0),), ())
        self.agent = Agent(hello)
        self.dealer = sockets.connect_dealer(ctx, file.reachable("work"), None)
        self.ended = False
        self._pub = sockets.connect_pub(ctx, file.reachable("beats"), None)
        self._functions = functions

    def step(self, event: events.AgentEvent) -> None:
        for action in self.agent.handle(event, monotonic()):
            match action:
                case events.ToBroker(envelope):
                    self._send(self.dealer, envelope)
                case events.SendBeat(beat):
                    self._send(self._pub, Envelope(0, 0, 0, beat))
                case events.Start(worker):
                    self.step(events.Born(worker, os.getpid()))
                case events.TakeBack(worker):
                    self.step(events.TakenBack(worker, []))
                case events.Give(worker, runs):
                    self.step(events.Said(worker, [self._done(run) for run in runs]))
                case events.Quit():
                    self.ended = True

    def read(self) -> None:
        for frames in sockets.receive_all(self.dealer, 100):
            self.step(events.Reached(decode([frame.buffer for frame in frames])))

    def _send(self, socket: sockets.Socket, envelope: Envelope) -> None:
        try:
            sockets.send(socket, encode(envelope))
        except zmq.Again:
            pass

    def _done(self, run: Run) -> Done:
        if run.function and run.digest not in self._functions:
            self._functions[run.digest], _ = load_function(run.function)
        args, kwargs = unpack_call(run.call)
        return Done(run.task, run.attempt, True, pack_value(self._functions[run.digest](*args, **kwargs)), 0.0)


def serve(file: ConnectionFile, number: int) -> None:
    ctx = sockets.context()
    ctx.set(zmq.MAX_SOCKETS, 2 * number + 100)
    functions: dict[bytes, Callable[..., Any]] = {}
    members = [Member(ctx, file, functions) for _ in range(number)]
    by_socket = {member.dealer: member for member in members}
    print("ready", flush=True)
    while not all(member.ended for member in members):
        for socket, _ in zmq.zmq_poll([(member.dealer, zmq.POLLIN) for member in members], TURN_MS):
            by_socket[socket].read()
        if select.select([0], [], [], 0)[0] and os.read(0, 100) != b"stay\n":
            for member in members:
                member.step(events.Leave(True, "all leave"))
        now = monotonic()
        for member in members:
            if member.agent.next_deadline() <= now:
                member.step(events.Tick())
    ctx.destroy(linger=1_000)


if __name__ == "__main__":
    serve(ConnectionFile.load(Path(sys.argv[1])), int(sys.argv[2]))
