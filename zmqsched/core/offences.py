"""What peers say that is out of place: counted by reason, told to the log in few words, and not borne for ever.

Rules
-----
* Reasons are few: they name a kind of message and a role, never what is in it. So a count per reason is bounded.
* The log gets a line a second at most, however many there were: how many of what since the last, and who came last.
* Of one peer only ``FLOOD`` messages without a session, unreadable ones and beats are looked at in a round; the rest
  is counted, and not answered.
* What cannot be read cannot be acknowledged: its sender would send it again for ever, and all that waits behind it with
  it. So after ``STRIKES`` of them within ``STRIKES_WITHIN_S`` the peer's session is over, and it is told why.
"""

from __future__ import annotations

from collections import Counter, deque

STRIKES = 3
STRIKES_WITHIN_S = 10.0
FLOOD = 100


class Strikes:
    """Of one peer."""

    def __init__(self) -> None:
        self._times: deque[float] = deque(maxlen=STRIKES)

    def add(self, now: float) -> bool:
        """One more; True if that was one too many."""
        self._times.append(now)
        return len(self._times) == STRIKES and self._times[0] > now - STRIKES_WITHIN_S

    def old(self, now: float) -> bool:
        """The last is so long ago that none of them counts any more."""
        return self._times[-1] <= now - STRIKES_WITHIN_S


class Floods:
    """How much each of those has said that one need not listen to, since the last look at the clock."""

    def __init__(self) -> None:
        self._said: Counter[bytes] = Counter()

    def add(self, who: bytes) -> bool:
        """Once more; True if that is more than anybody says who means well."""
        self._said[who] += 1
        return self._said[who] > FLOOD

    def clear(self) -> None:
        """To be called once a round."""
        self._said.clear()


class Offences:
    def __init__(self, counts: Counter[str]) -> None:
        self._counts = counts
        self._new: Counter[str] = Counter()
        self._last = ""
        self._strikes: dict[bytes, Strikes] = {}

    def note(self, reason: str, who: str) -> None:
        self._counts[f"dropped: {reason}"] += 1
        self._new[reason] += 1
        self._last = who

    def strike(self, peer: bytes, now: float) -> bool:
        """This peer sent what cannot be read; True if it has done so too often of late."""
        return self._strikes.setdefault(peer, Strikes()).add(now)

    def line(self, now: float) -> str:
        """What is to be logged of the time since the last line; "" if nothing. To be asked for once a second."""
        self._strikes = {peer: strikes for peer, strikes in self._strikes.items() if not strikes.old(now)}
        if not self._new:
            return ""
        what = ", ".join(f"{number} {reason}" for reason, number in self._new.most_common(5))
        self._new.clear()
        return f"dropped {what}; the last from {self._last}"
