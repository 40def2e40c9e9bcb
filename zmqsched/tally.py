"""Failures of a map, summed up by type and place."""

from __future__ import annotations

from dataclasses import dataclass

from .payload import Origin

# Beyond so many different types and places the rest is one group.
_MAX_GROUPS = 1_000
_SHOWN = 20
_OTHERS = Origin("errors of other types or places", "", 0, "")


@dataclass
class _Group:
    message: str
    index: int
    count: int = 0


class Tally:
    def __init__(self) -> None:
        self.count = 0
        self._groups: dict[Origin, _Group] = {}

    def add(self, index: int, origin: Origin, words: str) -> None:
        """The item of this index has failed. ``words``: type and message."""
        if origin not in self._groups and len(self._groups) >= _MAX_GROUPS:
            origin = _OTHERS
        self.count += 1
        group = self._groups.setdefault(origin, _Group("", index))
        group.count += 1
        if index <= group.index:
            group.index = index
            group.message = words.partition(": ")[2].partition("\n")[0][:100]

    def lines(self) -> list[str]:
        """A line for each type and place, the most frequent first."""
        found = sorted(self._groups.items(), key=lambda entry: -entry[1].count)
        lines = []
        for origin, group in found[:_SHOWN]:
            message = f"{group.message!r}, " if group.message else ""
            lines.append(f"{group.count:,} x {_short(origin)} ({message}first at item {group.index:,})")
        if rest := found[_SHOWN:]:
            lines.append(f"{sum(group.count for _, group in rest):,} of {len(rest):,} other types or places")
        return lines


def _short(origin: Origin) -> str:
    return str(origin._replace(file=origin.file.rpartition("/")[2]))
