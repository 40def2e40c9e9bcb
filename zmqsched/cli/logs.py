"""``logs``: what a cluster's nodes have said, and what they say.

A log is a file of limited size: when it is full it gets a number (``LABEL.log.N``), and another takes its place; of the full
ones the last is kept.
"""

from __future__ import annotations

import codecs
import os
import select
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from ..config import CONNECTION_FILE, cluster_dir
from ..errors import ZmqschedError
from ..launch.base import Site
from ..launch.output import MAX_LOG, full_log, full_logs
from .reading import by_name, name_of

LOOK_EVERY_S = 0.2
_READ = 1 << 20


@click.command()
@click.argument("node", required=False)
@by_name
@click.option("-f", "--follow", is_flag=True, help="Go on with what it says, until Ctrl-C or the cluster's end.")
def logs(node: str | None, name: str | None, follow: bool) -> None:
    """Print what a node has said, or what all of them have. NODE is a label or an id of `zmqsched status`.

    That is what it wrote to standard error; what tasks print goes to their clients.
    """
    from ..control import ask

    cluster = name_of(name)
    holder = os.pidfd_open(ask(cluster, {"do": "facts"})["pid"])
    directory = cluster_dir(cluster)
    site = Site(directory / CONNECTION_FILE, directory)
    one = node
    if node is not None and ("/" in node or not site.log_path(node).exists()):  # not even one that has left
        one = _label(ask(cluster, {"do": "nodes"})["nodes"], node, cluster)
    tails: dict[Path, _Tail] = {}
    ended = not follow
    while True:
        # Nodes may have been added meanwhile.
        for path in sorted(site.log_path("*").parent.glob(site.log_path("*").name)) if one is None else [site.log_path(one)]:
            tails.setdefault(path, _Tail(path, "" if one else f"{path.stem}: "))
        for tail in tails.values():
            tail.copy()
        sys.stdout.flush()
        if ended:
            return
        ended = bool(select.select([holder], [], [], LOOK_EVERY_S)[0])


def _label(nodes: list[dict[str, Any]], node: str, cluster: str) -> str:
    labels = [one["label"] for one in nodes if node in (one["label"], one["node"])]
    if not labels:
        known = ", ".join(one["label"] for one in nodes) or "none"
        raise ZmqschedError(f"no node {node!r} of cluster {cluster!r} was started here; there are {known}")
    return str(labels[-1])


class _Tail:
    """What is new in a log, also if another has taken its place. ``mark`` stands before each line."""

    def __init__(self, path: Path, mark: str) -> None:
        self._path = path
        self._mark = mark
        self._file: int | None = None
        self._number = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._at_start = True  # of a line

    def copy(self) -> None:
        for data in self._news():
            text = self._decoder.decode(data)
            if self._mark and text:
                first = self._mark if self._at_start else ""
                self._at_start = text.endswith("\n")
                text = first + text.removesuffix("\n").replace("\n", f"\n{self._mark}") + ("\n" if self._at_start else "")
            sys.stdout.write(text)

    def _news(self) -> Iterator[bytes]:
        while (following := self._following()) is not None:
            if self._file is not None:
                yield from _rest(self._file)  # it may have been written to before its place was taken
                os.close(self._file)
                if (missed := following[1] - self._number - 1) > 0:
                    yield b"\nzmqsched: up to %d bytes came too fast to be shown\n" % (missed * MAX_LOG)
            self._file, self._number = following
        if self._file is not None:
            yield from _rest(self._file)

    def _following(self) -> tuple[int, int] | None:
        """The file after the one that is read, or the oldest that is there; and the number that it has, or will have."""
        while True:
            full = full_logs(self._path)
            number = full if full > self._number else full + 1
            file = _opened(full_log(self._path, number) if number == full else self._path)
            if full == full_logs(self._path):
                break
            if file is not None:  # it may have got a number since
                os.close(file)
        if file is not None and self._file is not None and os.path.sameopenfile(file, self._file):
            os.close(file)
            return None
        return None if file is None else (file, number)


def _rest(file: int) -> Iterator[bytes]:
    while data := os.read(file, _READ):
        yield data


def _opened(path: Path) -> int | None:
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ZmqschedError(f"cannot read {path}: {(error.strerror or str(error)).lower()}") from None
