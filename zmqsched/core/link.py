"""A link: numbered messages between two ends, delivered in order and once, over a transport that loses.

Rules
-----
* ZeroMQ keeps the order of messages within a connection, and loses whole messages, silently, when a connection breaks
  or a peer is replaced (pitfalls 1 to 5, 13). A link repairs that for one *session*: one life of the peer, known to
  one life of the broker. What outlives a session is repaired above it, by task id and attempt number.
* Each message that matters has a sequence number from 1 (``seq``); 0 marks a message that may be lost. Each envelope
  carries ``ack``, the highest number received in order. A message is kept until it is acknowledged.
* The receiver takes number ``received + 1`` and nothing else; a duplicate is acknowledged again, a gap is ignored.
* **Nothing is sent again on a timer: only on evidence.** A timer cannot tell a slow link, where the message is still
  under way, from a lost one, and would fill the slow link with copies. So after a silence the sender asks:
  ``Ping(high)``, the highest number sent so far. It travels behind the messages, so the ``Pong(high)`` that comes back
  proves that each of them arrived or is lost, and its ``received`` says which. Those missing are sent again.
* A *cautious* end acknowledges only what its owner has ``secured``: a broker with a journal keeps its word across its own
  death. It says in its pongs how much it has received, so nothing is sent again meanwhile.
* At most ``WINDOW`` messages are on the way; the rest wait here. That keeps ZeroMQ's high-water mark (1,000) out of
  reach, so that a refused send is a rare event instead of a way of life.

Go-back-N with probing; TCP's "tail loss probe" (RFC 8985) asks the same question.
"""

from __future__ import annotations

import math
from collections import deque

from ..protocol import Ack, Envelope, Finals, Message, Output, Ping, Pong, Submit

WINDOW = 200
ACK_DELAY_S = 0.05  # an answer usually carries the acknowledgement sooner, for nothing
PING_AFTER_S = 1.0


class Link:
    """One end. ``send`` queues; ``flush`` says what goes out now; ``receive`` says what came in.

    ``confirmed_at``: the other end knew this session at some moment after this one (of our clock): a ping sent then was
    answered. A message alone does not say so: it may have lain in a buffer while we slept.

    ``delivered`` collects what carries payloads (:class:`~zmqsched.protocol.Finals`, :class:`~zmqsched.protocol.Submit`) and
    was acknowledged by the other end, for the owner to take. ``printed``: bytes of text (:class:`~zmqsched.protocol.Output`)
    that were not, so that whoever sends more may leave some out.
    """

    __slots__ = (
        "_ack_at", "_acked", "_backlog", "_cautious", "_control", "_next", "_ping_at", "_ping_number", "_pings",
        "_resend_after", "_secured", "_unacked", "confirmed_at", "delivered", "printed", "received", "session",
    )  # fmt: skip

    def __init__(self, session: int, *, cautious: bool = False) -> None:
        self.session = session
        self.received = 0
        self.delivered: list[Finals | Submit] = []
        self.printed = 0
        self._cautious = cautious
        self._secured = 0  # the highest number that may be acknowledged
        self._acked = 0  # the highest number that was acknowledged to the other end
        self._next = 1
        self._unacked: deque[tuple[int, Message]] = deque()
        self._backlog: deque[Message] = deque()
        self._control: list[Message] = []
        self._ack_at = math.inf
        self._ping_at = math.inf
        self._resend_after: int | None = None  # what is unacknowledged beyond this number is to be sent again
        self._pings: deque[tuple[int, float]] = deque(maxlen=8)
        self._ping_number = 0
        self.confirmed_at = float("-inf")

    def send(self, body: Message) -> None:
        self._backlog.append(body)
        if type(body) is Output:
            self.printed += printed_bytes(body)

    def ping(self, now: float) -> None:
        """Ask for a sign of life, and for what arrived."""
        self._ping_number += 1
        self._pings.append((self._ping_number, now))
        self._control.append(Ping(self._next - 1, self._ping_number))

    def receive(self, envelope: Envelope, now: float) -> Message | None:
        """The message to act on, if this envelope holds the next one."""
        self._acknowledged(envelope.ack, now)
        body = envelope.body
        if type(body) is Ping:
            self._control.append(Pong(body.high, body.number, self.received))
            return None
        if type(body) is Pong:
            self._compare(body)
            return None
        if envelope.seq == 0:
            return None if type(body) is Ack else body
        if envelope.seq != self.received + 1:
            if envelope.seq <= self.received:
                self._ack_at = now
            return None
        self.received += 1
        if not self._cautious:
            self.secure(self.received, now)
        return body

    def secure(self, number: int, now: float) -> None:
        """What was received up to this number may be acknowledged."""
        if number == self._secured:
            return
        self._secured = number
        if number - self._acked >= WINDOW // 4:
            self._ack_at = now  # before the other end has to stop
        elif self._ack_at == math.inf:
            self._ack_at = now + ACK_DELAY_S

    def flush(self, now: float) -> list[Envelope]:
        """Everything that should go out now, in order."""
        out = [] if self._resend_after is None else self._lost(self._resend_after)
        while self._backlog and len(self._unacked) < WINDOW:
            body = self._backlog.popleft()
            self._unacked.append((self._next, body))
            out.append(Envelope(self.session, self._next, self._secured, body))
            self._next += 1
        if out:
            self._ping_at = now + PING_AFTER_S
        elif now >= self._ping_at:
            self._ping_at = now + PING_AFTER_S
            self.ping(now)
        if self._control:
            out.extend(Envelope(self.session, 0, self._secured, body) for body in self._control)
            self._control.clear()
        if not out and now >= self._ack_at:
            out.append(Envelope(self.session, 0, self._secured, Ack()))
        if out:
            self._ack_at = math.inf
            self._acked = self._secured
        return out

    def reconnected(self) -> None:
        """The transport is known to be a new one: what was not acknowledged went down with the old."""
        self._resend_after = 0 if self._unacked else None

    def unfinished(self) -> list[Message]:
        """What the other end has not acknowledged, oldest first; for the next session when this one is over."""
        return [body for _, body in self._unacked] + list(self._backlog)

    def deadline(self) -> float:
        """When ``flush`` has something to do; 0.0 for at once, ``math.inf`` for never."""
        if self._resend_after is not None or self._control or (self._backlog and len(self._unacked) < WINDOW):
            return 0.0
        return min(self._ack_at, self._ping_at)

    def sanity_check(self) -> None:
        numbers = [seq for seq, _ in self._unacked]
        assert numbers == list(range(self._next - len(numbers), self._next)), "unacknowledged numbers have a hole"
        assert len(numbers) <= WINDOW, "more on the way than the window allows"
        printed = sum(printed_bytes(body) for body in self.unfinished() if isinstance(body, Output))
        assert self.printed == printed, "bytes of output on the way are off"
        assert bool(numbers) == (self._ping_at < math.inf), "a message on the way without a timer, or the reverse"

    def _lost(self, after: int) -> list[Envelope]:
        self._resend_after = None
        return [Envelope(self.session, seq, self._secured, body) for seq, body in self._unacked if seq > after]

    def _acknowledged(self, ack: int, now: float) -> None:
        if not self._unacked or ack < self._unacked[0][0] or ack >= self._next:
            return  # nothing new; or an acknowledgement of what was never sent
        while self._unacked and self._unacked[0][0] <= ack:
            body = self._unacked.popleft()[1]
            if type(body) is Finals or type(body) is Submit:
                self.delivered.append(body)
            elif type(body) is Output:
                self.printed -= printed_bytes(body)
        self._ping_at = now + PING_AFTER_S if self._unacked else math.inf

    def _compare(self, pong: Pong) -> None:
        """Whatever the peer will ever get of the numbers up to ``high`` it has: what it lacks is lost."""
        if self._unacked and self._unacked[0][0] <= pong.high and pong.received < pong.high:
            self._resend_after = pong.received  # also what was sent since: the peer ignores numbers behind a gap
        self.confirmed_at = max([self.confirmed_at, *(at for number, at in self._pings if number == pong.number)])


def printed_bytes(output: Output) -> int:
    return sum([len(words.text) for words in output.words])
