"""Directories of clusters of their own, for tests that run commands in real processes and leave nothing behind."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

from zmqsched.__main__ import main

PATIENCE_S = 60.0
ZMQSCHED = [sys.executable, "-m", "zmqsched"]


class Home:
    """A directory of clusters, and the processes that know it: by their command line or their environment."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith("ZMQSCHED_")}
        self.environment |= {"ZMQSCHED_DIR": str(path), "NO_COLOR": "1"}

    def run(self, *arguments: str, code: int = 0, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run a command to its end."""
        done = subprocess.run(
            [*ZMQSCHED, *arguments], env=self.environment | environment, cwd=self.path, capture_output=True, text=True,
            stdin=subprocess.DEVNULL, timeout=120, check=False,
        )  # fmt: skip
        assert done.returncode == code, f"exit code {done.returncode}: {done.stdout}{done.stderr}"
        return done

    def fails(self, *arguments: str, **environment: str) -> str:
        """Run a command that has to fail with one line; that line."""
        done = self.run(*arguments, code=1, **environment)
        assert done.stdout == ""
        assert done.stderr.startswith("zmqsched: ")
        assert done.stderr.count("\n") == 1, done.stderr
        return done.stderr

    def call(self, *arguments: str) -> str:
        """As run, in this process: a third of a second sooner. What it prints."""
        with contextlib.redirect_stdout(io.StringIO()) as out, mock.patch.dict(os.environ, self.environment):
            assert main(list(arguments)) == 0
        return out.getvalue()

    def ask(self, *arguments: str) -> object:
        return json.loads(self.call(*arguments, "-o", "json"))

    def compute(self, where: str) -> str:
        """Another process uses the cluster."""
        source = f"import zmqsched\nwith zmqsched.Client({where!r}) as c: print(c.submit(pow, 2, 10).result(60))"
        done = subprocess.run(
            [sys.executable, "-c", source], env=self.environment, cwd=self.path, capture_output=True, text=True,
            timeout=120, check=True,
        )  # fmt: skip
        return done.stdout.strip()

    def run_python(self, script: Path) -> str:
        done = subprocess.run(
            [sys.executable, script], env=self.environment, cwd=self.path, capture_output=True, text=True, timeout=120,
            check=True,
        )  # fmt: skip
        return done.stdout.strip()

    @contextlib.contextmanager
    def start(self, *arguments: str, until: str) -> Iterator[Foreground]:
        """A command that stays; ``until`` is in the last line that it prints before it is ready."""
        process = subprocess.Popen(
            [*ZMQSCHED, *arguments], env=self.environment, cwd=self.path, text=True, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        with process:
            try:
                yield Foreground(process, until)
            finally:
                process.kill()

    def up(self, *arguments: str) -> contextlib.AbstractContextManager[Foreground]:
        return self.start("up", *arguments, until="stop it")

    def processes(self) -> dict[int, str]:
        """Command lines by pid. Zombies, which have none, do not count."""
        found = {}
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                command, environment = (entry / "cmdline").read_bytes(), (entry / "environ").read_bytes()
                if command and os.fsencode(self.path) in command + environment and int(entry.name) != os.getpid():
                    found[int(entry.name)] = command.replace(b"\0", b" ").decode()
        return found

    def files(self) -> set[str]:
        return {str(path.relative_to(self.path)) for path in self.path.rglob("*")}

    def assert_nothing_left(self) -> None:
        assert self.processes() == {}
        assert self.files() == set()


class Foreground:
    def __init__(self, process: subprocess.Popen[str], until: str) -> None:
        self.process = process
        self.printed = ""
        assert process.stdout
        while until and until not in self.printed:
            line = process.stdout.readline()
            assert line, f"it ended: {self.printed}{process.communicate()}"
            self.printed += line

    def end(self, number: int | None = None) -> tuple[int, str, str]:
        """Its exit code, and what else it printed; with the signal that makes it end."""
        if number is not None:
            self.process.send_signal(number)
        out, err = self.process.communicate(timeout=PATIENCE_S)
        return self.process.returncode, out, err


@contextlib.contextmanager
def new_home() -> Iterator[Home]:
    """For one test; nothing may be left in it."""
    home = Home(Path(tempfile.mkdtemp(prefix="zs", dir="/tmp")))  # short: a Unix socket's path has 107 bytes
    try:
        yield home
        eventually(lambda: not home.processes())
        home.assert_nothing_left()
    finally:
        for pid in home.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        shutil.rmtree(home.path, ignore_errors=True)


def eventually(fact: Callable[[], object], timeout_s: float = PATIENCE_S) -> None:
    """Wait until it is so; the assertions that follow say what is wrong if it does not become so."""
    until = time.monotonic() + timeout_s
    while not fact() and time.monotonic() < until:
        time.sleep(0.02)


def pid_of(home: Home, *words: str) -> int:
    return min(pid for pid, command in home.processes().items() if all(word in command for word in words))
