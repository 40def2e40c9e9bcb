"""Commands as tasks (``zmqsched exec``): how a command line is made of a template and arguments, and how a worker runs it.

Rules
-----
* Without a shell no character of an argument means anything. For a shell each argument is quoted; the template is not.
* A command has a process group of its own. Whatever ends the task before the command has ended kills that group; what has
  left the group ends with the worker (``orphans.py``).
* What it writes goes into files without a name: nothing that it has left running can hold up the task's end.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

# As a shell says that there is no such command, or none that can be run.
NOT_FOUND, NOT_EXECUTABLE = 127, 126

_PLACE = re.compile(r"\{(?:(?P<number>#)|(?P<which>[1-9]\d*)?(?P<part>/\.|//|/|\.)?)\}")
_PARTS: dict[str, Callable[[str], str]] = {
    "": str,
    ".": lambda text: os.path.splitext(text)[0],
    "/": os.path.basename,
    "//": lambda text: os.path.dirname(text) or ".",
    "/.": lambda text: os.path.splitext(os.path.basename(text))[0],
}


class Outcome(NamedTuple):
    """How a command ended. ``code``: its exit code, or minus the signal that killed it; ``began``: when, in seconds since
    1970, by its host's clock; ``seconds``: how long it took."""

    code: int
    out: bytes
    err: bytes
    host: str
    began: float
    seconds: float


class CommandFailed(Exception):
    """The command did not end with exit code 0: an exception, so that it can be retried."""

    def __init__(self, outcome: Outcome) -> None:
        super().__init__(outcome)
        self.outcome = outcome


def run_command(words: Sequence[str], directory: str) -> Outcome:
    """Run it there, with nothing on standard input.

    Raises
    ------
    CommandFailed
        It failed, or could not be started; then ``err`` says why.
    """
    host, began, start = os.uname().nodename, time.time(), time.monotonic()
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        try:
            code = _ended(words, directory, out.fileno(), err.fileno())
        except OSError as error:
            code = NOT_FOUND if isinstance(error, FileNotFoundError) else NOT_EXECUTABLE
            what = f"no directory {directory}" if error.filename == directory else f"cannot run {words[0]}"
            err.write(os.fsencode(f"zmqsched: {what} on {host}: {error.strerror}\n"))
        out.seek(0)
        err.seek(0)
        outcome = Outcome(code, out.read(), err.read(), host, began, time.monotonic() - start)
    if code:
        raise CommandFailed(outcome)
    return outcome


def _ended(words: Sequence[str], directory: str, out: int, err: int) -> int:
    process = subprocess.Popen(words, cwd=directory, stdin=subprocess.DEVNULL, stdout=out, stderr=err, process_group=0)
    try:
        return process.wait()
    except BaseException:  # cancelled, or over its time
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise


class Template:
    """``{}`` in it stands for the arguments, ``{.}`` without their extension, ``{/}`` their file names, ``{//}`` their
    directories, ``{/.}`` both; ``{2}``, ``{2.}``, ... those of the second list alone; ``{#}`` is the command's number. If
    there is none of these, the arguments are appended.

    A word that is nothing but ``{}`` becomes a word for each argument; within a word they are joined with blanks.

    Raises
    ------
    ValueError
        There is no command in it, or it names a list that there is not.
    """

    def __init__(self, words: Sequence[str], lists: int, *, shell: bool) -> None:
        if not words:
            raise ValueError("there is no command")
        places = [place for word in words for place in _PLACE.finditer(word)]
        if not any(place["number"] is None for place in places):
            words = [*words, "{}"]
        for place in places:
            if place["which"] and int(place["which"]) > lists:
                raise ValueError(f"{place[0]} names a list of arguments that is not there: there are {lists}")
        self.name = "".join(filter(str.isprintable, Path(*words[0].split()[:1]).name))
        self._words = [" ".join(words)] if shell else list(words)
        self._quote: Callable[[str], str] = shlex.quote if shell else str
        self._shell = shell

    def command(self, number: int, arguments: Sequence[str]) -> list[str]:
        """The words to run for the arguments, one of each list."""
        words = [word for text in self._words for word in self._filled(text, number, arguments)]
        return ["/bin/sh", "-c", *words] if self._shell else words

    def text(self, number: int, arguments: Sequence[str]) -> str:
        """The same for people, who can paste it."""
        words = self.command(number, arguments)
        return words[-1] if self._shell else shlex.join(words)

    def _filled(self, text: str, number: int, arguments: Sequence[str]) -> list[str]:
        def values(place: re.Match[str]) -> list[str]:
            if place["number"]:
                return [str(number)]
            chosen = [arguments[int(place["which"]) - 1]] if place["which"] else arguments
            return [self._quote(_PARTS[place["part"] or ""](argument)) for argument in chosen]

        if not self._shell and (alone := _PLACE.fullmatch(text)) is not None:
            return values(alone)
        return [_PLACE.sub(lambda place: " ".join(values(place)), text)]


def split(words: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """The template, and the lists of arguments, each behind a ``:::``."""
    parts: list[list[str]] = [[]]
    for word in words:
        if word == ":::":
            parts.append([])
        else:
            parts[-1].append(word)
    return parts[0], parts[1:]
