"""``exec``: run a command for each of many arguments, on all workers of a cluster.

A thread reads arguments and submits commands, so that what has ended is printed while the next argument is awaited; the
main thread does all else. How a command is made and run is in ``commands.py``.
"""

from __future__ import annotations

import itertools
import os
import signal
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, NamedTuple, NoReturn, TextIO

import click

from ..commands import CommandFailed, Outcome, Template, run_command, split
from ..config import find_cluster
from ..errors import ClusterNotFound, TaskTimeout, ZmqschedError

if TYPE_CHECKING:
    from ..client import Client
    from ..cluster import LocalCluster
    from ..config import ConnectionFile
    from ..futures import Future
    from ..tasks import Tasks

# Commands that are submitted and not ended: arguments may come without end.
WINDOW = 1_000
MOST_FAILURES = 101
JOBLOG = "Seq\tHost\tStarttime\tJobRuntime\tSend\tReceive\tExitval\tSignal\tCommand\n"


@click.command("exec", context_settings={"allow_interspersed_args": False})
@click.option(
    "-n", "--workers", type=click.IntRange(1, 10_000), metavar="N",
    help="At most N commands at once.  [default: one on each worker]",
)  # fmt: skip
@click.option("--name", metavar="NAME", help="The cluster.  [default: the one that runs, else one for this command]")
@click.option("--cwd", metavar="DIR", help="Where to run the commands.  [default: here]")
@click.option("--shell", is_flag=True, help="Let /bin/sh read the command; arguments are quoted for it.")
@click.option("-k", "--keep-order", is_flag=True, help="Print in the order of the arguments, not as commands end.")
@click.option(
    "--halt", type=click.Choice(["never", "soon", "now"]), default="never", show_default=True,
    help="After a failure start no more (soon), and kill what runs (now).",
)  # fmt: skip
@click.option("--timeout", type=click.FloatRange(0, min_open=True), metavar="SECONDS", help="Kill what takes longer.")
@click.option("--retries", type=click.IntRange(0, 10_000), metavar="N", default=0, help="Run up to N times more what fails.")
@click.option("--joblog", metavar="FILE", help="Write a line for each there.")
@click.option("--dry-run", is_flag=True, help="Print the commands and run none.")
@click.argument("words", nargs=-1, required=True, type=click.UNPROCESSED, metavar="-- CMD [ARG]... [::: ARG...]...")
def execute(
    words: tuple[str, ...], workers: int | None, name: str | None, cwd: str | None, shell: bool, keep_order: bool,
    halt: str, timeout: float | None, retries: int, joblog: str | None, dry_run: bool,
) -> int:  # fmt: skip
    """Run a command for each of many arguments.

    The arguments stand behind ":::", or are the lines of standard input; of several ":::" each combination is taken. In the
    command, {} stands for the argument, {.} the same without its extension, {/} its file name, {//} its directory, {/.} its
    file name without extension, {1} {2.} that of one list, {#} the number of the command; without any, the argument is
    appended. The output of each is printed in one piece.

    The exit code is the number of commands that failed, at most 101.

      zmqsched exec -- convert {} {.}.png ::: *.jpg
    """
    template, lists = split(words)
    try:
        made = Template(template, len(lists) or 1, shell=shell)
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    sets = itertools.product(*lists) if lists else ((line,) for line in _lines())
    if dry_run:
        for number, arguments in enumerate(sets, 1):
            _print(sys.stdout, os.fsencode(made.text(number, arguments)) + b"\n")
        return 0
    signal.signal(signal.SIGTERM, _interrupt)
    with ExitStack() as stack:
        log = _JobLog(joblog, stack)
        cluster = _cluster(stack, name, workers)
        from ..client import Client

        client = stack.enter_context(Client(cluster, output=False))
        tasks: Tasks = client.options(name=f"exec {made.name}".strip(), retries=retries, timeout=timeout)
        # Only what runs is submitted, if a failure is to start no more: what waits could be running before it is cancelled.
        window = workers or (max(1, len(client.workers())) if halt == "soon" else WINDOW)
        run = _Run(client, tasks, made, cwd or os.getcwd(), window)
        return run.all(sets, _Printed(keep_order=keep_order), log, halt)


def _interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def _lines() -> Iterator[str]:
    if sys.stdin.isatty():
        print("zmqsched: reads arguments, one a line, from the terminal; Ctrl-D ends them", file=sys.stderr)
    for line in sys.stdin.buffer:
        if text := os.fsdecode(line.rstrip(b"\r\n")):
            yield text


def _cluster(stack: ExitStack, name: str | None, workers: int | None) -> ConnectionFile | LocalCluster:
    """The cluster that runs, else one that ends with this command."""
    try:
        return find_cluster(name)
    except ClusterNotFound:
        if name or os.environ.get("ZMQSCHED_CLUSTER"):
            raise
    from ..cluster import LocalCluster

    return stack.enter_context(LocalCluster(workers))


class _Job(NamedTuple):
    number: int
    command: str


class _Run:
    """The commands on their way. The lock is for what both threads do."""

    def __init__(self, client: Client, tasks: Tasks, template: Template, directory: str, window: int) -> None:
        self._client = client
        self._tasks = tasks
        self._template = template
        self._directory = directory
        self._room = threading.BoundedSemaphore(window)
        self._lock = threading.Lock()
        self._open: dict[Future[Outcome], _Job] = {}
        self._over = False  # nothing more is submitted
        self._news: SimpleQueue[Future[Outcome] | BaseException | None] = SimpleQueue()

    def all(self, sets: Iterable[Sequence[str]], printed: _Printed, log: _JobLog, halt: str) -> int:
        """Run them. Returns how many have failed, at most ``MOST_FAILURES``."""
        failed = 0
        threading.Thread(target=self._feed, args=[sets], name="zmqsched exec", daemon=True).start()
        try:
            while (future := self._next()) is not None:
                job = self._open.pop(future)
                if not future.cancelled():
                    outcome, why = _outcome(future)
                    printed.take(job, outcome, why)
                    log.write(job, outcome)
                    failed += outcome is None or outcome.code != 0
                if failed and halt != "never":
                    self._end(kill=halt == "now")
                self._room.release()
        except BaseException:
            self._end(kill=True)
            raise
        printed.rest()
        return min(failed, MOST_FAILURES)

    def _next(self) -> Future[Outcome] | None:
        """One that has ended; None when none is left."""
        while True:
            with self._lock:
                if self._over and not self._open:
                    return None
            news = self._news.get()
            if isinstance(news, BaseException):
                raise news
            if news is not None:
                return news

    def _feed(self, sets: Iterable[Sequence[str]]) -> None:
        try:
            for number, arguments in enumerate(sets, 1):
                self._room.acquire()
                command = self._template.command(number, arguments)
                with self._lock:
                    if self._over:
                        return
                    future = self._tasks.submit(run_command, command, self._directory)
                    self._open[future] = _Job(number, self._template.text(number, arguments))
                future.add_done_callback(self._news.put)  # type: ignore[arg-type]
            with self._lock:
                self._over = True
            self._news.put(None)
        except BaseException as error:  # noqa: BLE001 - the main thread raises it
            self._news.put(error)

    def _end(self, *, kill: bool) -> None:
        """Submit nothing more."""
        with self._lock:
            self._over = True
            left = list(self._open)
        if kill:
            for future in left:
                future.cancel(force=True)


def _outcome(future: Future[Outcome]) -> tuple[Outcome | None, str]:
    """What has come of it; without an outcome, why there is none."""
    try:
        return future.result(), ""
    except CommandFailed as error:
        return error.outcome, ""
    except TaskTimeout:  # its words show where Python stood, which is always the same place
        return None, "killed at its time limit"
    except ZmqschedError as error:
        return None, str(error)


class _Printed:
    """What commands have written, each in one piece."""

    def __init__(self, *, keep_order: bool) -> None:
        self._keep_order = keep_order
        self._next = 1
        self._kept: dict[int, tuple[_Job, Outcome | None, str]] = {}

    def take(self, job: _Job, outcome: Outcome | None, why: str) -> None:
        if not self._keep_order:
            _show(job, outcome, why)
            return
        self._kept[job.number] = job, outcome, why
        while (found := self._kept.pop(self._next, None)) is not None:
            _show(*found)
            self._next += 1

    def rest(self) -> None:
        """Those that stand behind one that was never run."""
        for _, found in sorted(self._kept.items()):
            _show(*found)


def _show(job: _Job, outcome: Outcome | None, why: str) -> None:
    if outcome is None:
        print(f"zmqsched: {job.command}: {why}", file=sys.stderr)
        return
    _print(sys.stdout, outcome.out)
    _print(sys.stderr, outcome.err)


def _print(stream: TextIO, data: bytes) -> None:
    stream.flush()
    stream.buffer.write(data)
    stream.buffer.flush()


class _JobLog:
    """A line for each command that has run, in the columns of GNU parallel's."""

    def __init__(self, path: str | None, stack: ExitStack) -> None:
        self._file: TextIO | None = None
        if path is not None:
            try:
                file = Path(path).open("w", encoding="utf-8", errors="surrogateescape")  # noqa: SIM115 - the stack closes it
            except OSError as error:
                raise ZmqschedError(f"cannot write {path}: {error.strerror}") from None
            self._file = stack.enter_context(file)
            self._file.write(JOBLOG)

    def write(self, job: _Job, outcome: Outcome | None) -> None:
        if self._file is None:
            return
        one = outcome or Outcome(-1, b"", b"", "", 0.0, 0.0)
        code, sent = (one.code, 0) if outcome is None or one.code >= 0 else (0, -one.code)
        times = f"{one.began:.3f}\t{one.seconds:10.3f}\t0\t{len(one.out)}"
        self._file.write(f"{job.number}\t{one.host or '-'}\t{times}\t{code}\t{sent}\t{job.command}\n")
        self._file.flush()
