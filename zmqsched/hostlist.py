"""Lists of hosts as Slurm and others write them: ``host1,host2,gpu[1-4]``, ``rack[01-03]n[1,3-5]``."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator

MAX_HOSTS = 10_000
MAX_TEXT = 256 * 1024

# What ssh takes: a name, an address, an alias of its configuration, with `user@` or as ssh://user@host:port. A dash at the
# start, also behind the @, would be an option.
_HOST = re.compile(r"(?!-)(?!.*@-)[A-Za-z0-9_.:@%/+-]{1,255}")
_PART = re.compile(r"([^\[\]]*)\[([^\[\]]*)\]")
_RANGE = re.compile(r"([0-9]{1,9})(?:-([0-9]{1,9}))?")


def hosts_of(text: str) -> tuple[str, ...]:
    """The hosts in the order in which they are written; ranges with leading zeros keep their width.

    Raises
    ------
    ValueError
        It is not a list of hosts, or one of more than ``MAX_HOSTS``; one line.
    """
    if len(text) > MAX_TEXT:
        raise ValueError(f"a list of hosts has at most {MAX_TEXT} characters, not {len(text)}")
    hosts: list[str] = []
    for item in _items(text):
        hosts += _expanded(item, MAX_HOSTS - len(hosts))
    seen: set[str] = set()
    for host in hosts:
        if host in seen:
            raise ValueError(f"host {host} is named twice")
        seen.add(host)
    return tuple(hosts)


def _items(text: str) -> Iterator[str]:
    """What is between the commas that are not in brackets."""
    start = depth = 0
    for place, letter in enumerate(text + ","):
        depth += (letter == "[") - (letter == "]")
        if letter == "," and (depth <= 0 or place == len(text)):
            item = text[start:place].strip()
            if not item:
                raise ValueError(f"{_short(text)} names no host" + (" beside one of its commas" if "," in text else ""))
            yield item
            start = place + 1


def _expanded(item: str, room: int) -> list[str]:
    pieces: list[list[str]] = []
    words: list[tuple[str, list[tuple[range, int]]]] = []
    rest = item
    while match := _PART.match(rest):
        words.append((match[1], [_range(part.strip(), item) for part in match[2].split(",")]))
        rest = rest[match.end() :]
    if "[" in rest or "]" in rest:
        raise ValueError(f"{_short(item)}: brackets are written as in gpu[1-4] or rack[01-03]n[1,3-5]")
    count = math.prod(sum(len(numbers) for numbers, _ in ranges) for _, ranges in words)
    if count > room:
        raise ValueError(f"{_short(item)} names {count} hosts; a list may name {MAX_HOSTS}")
    for before, ranges in words:
        pieces += [[before], [str(number).zfill(width) for numbers, width in ranges for number in numbers]]
    hosts = ["".join(parts) for parts in itertools.product(*pieces, [rest])]
    if not _HOST.fullmatch(hosts[0]):
        raise ValueError(f"{_short(hosts[0])} cannot name a host: it is a name or address as ssh takes it")
    return hosts


def _range(part: str, item: str) -> tuple[range, int]:
    """Numbers, and the width that they are filled up to with zeros."""
    match = _RANGE.fullmatch(part)
    if match is None:
        raise ValueError(f"{_short(item)}: {_short(part)} is neither a number nor a range like 1-4")
    low, high = match[1], match[2] or match[1]
    if int(low) > int(high):
        raise ValueError(f"{_short(item)}: the range {part} runs backwards; write {high}-{low}")
    return range(int(low), int(high) + 1), len(low)


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:60] + "...")
