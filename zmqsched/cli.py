"""The commands for people: ``up``, ``ls``, ``status`` and ``down``.

What is asked for goes to standard output, all else to standard error. Exit codes: 0, 1 for what went wrong (one line
that says what to do), 2 for arguments that cannot be, 130 for an interrupt.

``up --detach`` runs the same ``up`` in a session of its own, with a pipe on which it says that it is ready, or why not.
What it and the tasks print goes to a log beside the cluster's directory, not into it: there only the lock's holder may
put files.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn, TextIO

import click

from .__main__ import main
from .cluster import START_TIMEOUT_S, STOP_TIMEOUT_S, LocalCluster, check_free, wait_until_ready
from .config import (
    CONNECTION_FILE,
    DEFAULT_CLUSTER,
    ConnectionFile,
    check_name,
    find_cluster,
    running_clusters,
    runtime_dir,
)
from .core.policy import DEFAULT_POLICY, POLICIES
from .display import Sheet, Table, cell, sheet_of
from .errors import ClusterNotFound, StartError, ZmqschedError
from .host import usable_cpus
from .options import resource_argument, size_argument
from .shell import Starter, StopSignals
from .version import __version__

# For `ls`, of each cluster: a broker answers in milliseconds, or something is wrong with it.
ANSWER_TIMEOUT_S = 2.0
# A node that ends this shortly before its broker was not lost: the cluster is being stopped.
STOPPING_S = 1.0
MAX_COUNT = 10_000


def run(arguments: list[str]) -> int:
    """Run a command line (without the program's name). Returns the exit code."""
    try:
        code = zmqsched.main(arguments or ["--help"], "zmqsched", standalone_mode=False)
        sys.stdout.flush()
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        return 128 + signal.SIGINT
    except ZmqschedError as error:
        print(f"zmqsched: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # the reader (`| head`) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or the interpreter complains when it flushes at exit
        return 1
    return code if isinstance(code, int) else 0


class _InOrder(click.Group):
    """Lists the commands as they are written below: in the order one needs them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


@click.group(cls=_InOrder, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, message="%(prog)s %(version)s")
def zmqsched() -> None:
    """Run Python functions on all the cores of one machine, or of many.

    A cluster has a name. Commands that take one use $ZMQSCHED_CLUSTER, else "default", if none is given.
    """


_as_json = click.option(
    "-o", "--output", type=click.Choice(["table", "json"]), default="table", show_default=True, help="How to print it."
)


@dataclass(frozen=True)
class _Wanted:
    """What ``up`` was asked for."""

    name: str
    workers: int
    nodes: int
    policy: str
    resources: dict[str, float]
    tags: tuple[str, ...]
    listen: str | None
    max_queued: int | None
    journal: str | None

    @property
    def keeps_journal(self) -> bool | str:
        """As LocalCluster takes it. No word of it is the usual place, an empty one none."""
        return True if self.journal is None else self.journal or False


def _count(ctx: click.Context, parameter: click.Parameter, number: int | None) -> int | None:
    """As click.IntRange would, but for what that adds to the help."""
    if number is not None and not 1 <= number <= MAX_COUNT:
        raise click.BadParameter(f"{number} is not between 1 and {MAX_COUNT}", ctx, parameter)
    return number


def _listen(ctx: click.Context, _: click.Parameter, text: str | None) -> str | None:
    if text is not None:
        from .sockets import listen_address  # ZeroMQ is loaded for those who need it

        try:
            listen_address(text)
        except ValueError as error:
            raise click.UsageError(str(error), ctx) from None
    return text


def _resources(ctx: click.Context, parameter: click.Parameter, texts: tuple[str, ...]) -> dict[str, float]:
    try:
        return dict(resource_argument(text) for text in texts)
    except ValueError as error:
        raise click.BadParameter(str(error), ctx, parameter) from None


def _size(ctx: click.Context, parameter: click.Parameter, text: str | None) -> int | None:
    try:
        return None if text is None else size_argument(text)
    except ValueError as error:
        raise click.BadParameter(str(error), ctx, parameter) from None


@zmqsched.command()
@click.option(
    "-n", "--workers", type=int, callback=_count, metavar="N",
    help="Workers in all.  [default: one for each CPU]",
)  # fmt: skip
@click.option("--name", default=DEFAULT_CLUSTER, show_default=True, help="To find the cluster by.")
@click.option(
    "--nodes", type=int, callback=_count, metavar="K", default=1, show_default=True,
    help="Spread them over K nodes.",
)  # fmt: skip
@click.option(
    "--policy", type=click.Choice(sorted(POLICIES)), default=DEFAULT_POLICY, show_default=True,
    help="Which node gets a task.",
)  # fmt: skip
@click.option(
    "--resource", "resources", multiple=True, metavar="NAME=AMOUNT", callback=_resources,
    help="What each node offers to tasks that ask for it; may be repeated.",
)  # fmt: skip
@click.option("--tag", "tags", multiple=True, metavar="TAG", help="A tag of each node; may be repeated.")
@click.option(
    "--listen", is_flag=False, flag_value="", metavar="[ADDRESS[:PORT]]", callback=_listen,
    help="Use TCP, encrypted, so that other hosts can join; without an address on loopback.",
)  # fmt: skip
@click.option(
    "--max-queued", metavar="SIZE", callback=_size,
    help="What the broker holds of tasks and results (500M, 2G) before clients wait.  [default: a quarter of the memory]",
)  # fmt: skip
@click.option(
    "--journal", metavar="FILE",
    help="Keep tasks and answers there, for when the broker dies.  [default: in your state directory]",
)  # fmt: skip
@click.option("--no-journal", "journal", flag_value="", help="Keep them in memory alone.")
@click.option("--detach", is_flag=True, help="Return when it is ready; it runs on in the background.")
@click.option("--ready-fd", type=int, hidden=True)
def up(workers: int | None, nodes: int, detach: bool, ready_fd: int | None, **settings: Any) -> int:
    """Start a cluster on this machine, and stay until Ctrl-C."""
    workers = usable_cpus() if workers is None else workers
    if nodes > workers:
        raise click.UsageError(f"{nodes} nodes need at least as many workers, not {workers}: give -n {nodes} or more")
    wanted = _Wanted(workers=workers, nodes=nodes, **settings)
    if detach:
        return _start_detached(wanted)
    starter = Starter(ready_fd)
    try:
        return _stay_up(wanted, starter)
    except ZmqschedError as error:
        return starter.failed(error)


def _stay_up(wanted: _Wanted, starter: Starter) -> int:
    signal.signal(signal.SIGTERM, _interrupt)
    with LocalCluster(
        wanted.workers, name=wanted.name, n_nodes=wanted.nodes, policy=wanted.policy, resources=wanted.resources,
        tags=wanted.tags, listen=wanted.listen, journal=wanted.keeps_journal, max_queued=wanted.max_queued, echo=True,
    ) as cluster:  # fmt: skip
        stop = StopSignals(until_eof=False)  # from here on nothing is interrupted, the clean-up least of all
        signal.signal(signal.SIGCHLD, _nothing)
        cluster._changed = stop.wake
        _greet(wanted, cluster.file)
        starter.ready({"pid": os.getpid(), "file": str(_path(cluster.file))})
        why = _watch(cluster, stop)
    if why.startswith(("killed", "exit code")):  # the log stays: now it is wanted
        print(f"zmqsched: the broker of cluster {wanted.name} died ({why}); the cluster is gone", file=sys.stderr)
        return 1
    _remove_own_log(wanted.name)
    print(f"cluster {wanted.name} is stopped ({why})")
    return 0


def _interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def _nothing(*_: object) -> None:
    """A handler must exist for the wake-up descriptor of StopSignals to be written."""


def _greet(wanted: _Wanted, file: ConnectionFile) -> None:
    nodes = "1 node" if wanted.nodes == 1 else f"{wanted.nodes} nodes"
    workers = "1 worker" if wanted.workers == 1 else f"{wanted.workers} workers"
    lines = [
        f"cluster {wanted.name} is up: {workers} on {nodes}",
        f'  use it:    zmqsched.Client("{wanted.name}")',
        f"  stop it:   zmqsched down {wanted.name}",
    ]
    if wanted.listen is not None:
        lines.append(f"  add to it: zmqsched node --connect {_path(file)}")
    print("\n".join(lines), flush=True)


def _path(file: ConnectionFile) -> Path:
    return runtime_dir() / file.name / CONNECTION_FILE


def _watch(cluster: LocalCluster, stop: StopSignals) -> str:
    """Until the cluster is to end: a signal's name, or how the broker ended. Nodes that die meanwhile are told of."""
    nodes = list(cluster.node_pids)
    while True:
        if how := cluster.broker_death:
            return "zmqsched down" if how == "exit code 0" else how
        dead = {pid: how for pid in nodes if (how := _ended(pid))}
        ready = select.select(stop.descriptors, [], [], STOPPING_S if dead else None)[0]
        for descriptor in ready:
            if why := stop.read(descriptor):
                return why
        if ready:  # another child ended: the broker perhaps
            continue
        for pid, how in dead.items():
            nodes.remove(pid)
            print(f"zmqsched: node process {pid} ended ({how}); {len(nodes)} left", file=sys.stderr, flush=True)


def _ended(child: int) -> str:
    """How a child of this process ended, "" if it did not. It stays a zombie, for its owner to wait for."""
    found = os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    if found is None:
        return ""
    if found.si_code == os.CLD_EXITED:
        return f"exit code {found.si_status}"
    return f"killed by {signal.Signals(found.si_status).name}"


def _start_detached(wanted: _Wanted) -> int:
    check_free(wanted.name)
    read, write = os.pipe()
    with os.fdopen(write, "wb"), _new_log(wanted.name) as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "zmqsched", *_arguments(wanted), f"--ready-fd={write}"],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=[write], start_new_session=True,
        )  # fmt: skip
    try:
        # It has a limit of its own for each process it starts; this one is for a machine that does not even start it.
        file = wait_until_ready(process, os.fdopen(read, "rb"), START_TIMEOUT_S * (2 + wanted.nodes))["file"]
    except BaseException as error:
        _end(process, at_once=not isinstance(error, ZmqschedError))
        if isinstance(error, StartError):
            sys.stderr.write(_log_path(wanted.name).read_text(errors="replace"))
        _log_path(wanted.name).unlink(missing_ok=True)
        raise
    _greet(wanted, ConnectionFile.load(file))
    print(f"  log:       {_log_path(wanted.name)}")
    return 0


def _end(process: subprocess.Popen[bytes], *, at_once: bool) -> None:
    """One that has said why it cannot start is about to end; a signal then would only make it complain."""
    if not at_once:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_TIMEOUT_S)
    process.terminate()
    process.wait()


def _arguments(wanted: _Wanted) -> list[str]:
    """The command line that ``wanted`` was read from."""
    arguments = ["up", f"-n{wanted.workers}", f"--nodes={wanted.nodes}", f"--policy={wanted.policy}"]
    arguments += [f"--resource={name}={amount}" for name, amount in wanted.resources.items()]
    arguments += [f"--tag={tag}" for tag in wanted.tags]
    if wanted.journal is not None:
        arguments.append(f"--journal={wanted.journal}" if wanted.journal else "--no-journal")
    if wanted.listen is not None:  # bare, it would take a word that follows for its address
        arguments.append(f"--listen={wanted.listen}" if wanted.listen else "--listen")
    if wanted.max_queued is not None:
        arguments.append(f"--max-queued={wanted.max_queued}")
    return [*arguments, f"--name={wanted.name}"]


def _log_path(name: str) -> Path:
    """No cluster's name begins with a dot, so this cannot be the directory of another cluster."""
    return runtime_dir() / f".{check_name(name)}.log"


def _new_log(name: str) -> TextIO:
    path = _log_path(name)
    path.unlink(missing_ok=True)
    return open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o600), "w")


def _remove_own_log(name: str) -> None:
    """If this process writes to it: not that of a cluster of the same name that somebody has started meanwhile."""
    with contextlib.suppress(OSError):
        if os.path.samestat(os.fstat(2), _log_path(name).stat()):
            _log_path(name).unlink()


@zmqsched.command()
@_as_json
def ls(output: str) -> None:
    """List your clusters that run on this machine."""
    files = running_clusters()
    with ThreadPoolExecutor(max_workers=16) as pool:  # together: one that does not answer costs no more than all
        found = list(zip(files, pool.map(_workers_of, files), strict=True))
    if output == "json":
        _print_json([_as_record(file, workers) for file, workers in found])
    elif not found:
        print("no cluster is running; start one: zmqsched up", file=sys.stderr)
    else:
        rows = [
            (file.name, file.host, file.pid, _since(file), _where(file), "no answer" if workers is None else workers)
            for file, workers in found
        ]
        _print_table(Table(("name", "host", "broker pid", "since", "where", "workers"), rows))


def _workers_of(file: ConnectionFile) -> int | None:
    """How many workers it has; None: it did not answer."""
    from .client import Client

    try:
        with Client(file, timeout=ANSWER_TIMEOUT_S) as client:
            return len(client.workers())
    except ZmqschedError:
        return None


def _as_record(file: ConnectionFile, workers: int | None) -> dict[str, Any]:
    return {
        "name": file.name, "host": file.host, "pid": file.pid, "since": file.created, "work": file.addresses.work,
        "file": str(_path(file)), "workers": workers,
    }  # fmt: skip


def _since(file: ConnectionFile) -> str:
    try:
        return datetime.fromisoformat(file.created).astimezone().strftime("%Y-%m-%d %H:%M")
    except ValueError:  # the file's format leaves it open
        return file.created


def _where(file: ConnectionFile) -> str:
    kind, _, address = file.addresses.work[0].partition("://")
    return kind if kind == "ipc" else f"{kind} {address}"


@zmqsched.command()
@click.argument("name", required=False)
@_as_json
def status(name: str | None, output: str) -> None:
    """Show a cluster's nodes, workers and tasks. NAME may be a connection file's path too."""
    from .client import Client

    file = find_cluster(name)  # never starts one, as Client() may
    with Client(file) as client:
        found = client.status()
    if output == "json":
        _print_json(asdict(found))
    else:
        _print_sheet(sheet_of(replace(found, clients=found.clients - 1)))  # this very command is one


def _print_sheet(sheet: Sheet) -> None:
    print(sheet.title)
    for table in sheet.tables:
        print()
        _print_table(table)
    print()
    width = 1 + max(len(name) for name, _ in sheet.facts)
    for name, value in sheet.facts:
        print(f"{name + ':':{width}} {cell(value)}")


@zmqsched.command()
@click.argument("name", required=False)
@click.option("--all", "everything", is_flag=True, help="Stop all your clusters that run on this machine.")
def down(name: str | None, everything: bool) -> int:
    """Stop a cluster, wherever it was started. Its unfinished tasks are given up."""
    if everything and name is not None:
        raise click.UsageError("give a name or --all, not both")
    files = running_clusters() if everything else [_find(name)]
    if not files:
        print("no cluster is running")
    return max([_stop(file) for file in files], default=0)


def _find(name: str | None) -> ConnectionFile:
    try:
        return find_cluster(name)
    except ClusterNotFound:
        # Killed outright, a detached `up` leaves its log.
        _log_path(name or os.environ.get("ZMQSCHED_CLUSTER") or DEFAULT_CLUSTER).unlink(missing_ok=True)
        raise


def _stop(file: ConnectionFile) -> int:
    from .stopping import stop_cluster

    try:
        stop_cluster(file)
    except ZmqschedError as error:
        print(f"zmqsched: {error}", file=sys.stderr)
        return 1
    _log_path(file.name).unlink(missing_ok=True)
    print(f"cluster {file.name} is stopped")
    return 0


# __main__ takes these words before this module is loaded; here they are for the list of commands.
_as_is: dict[str, Any] = {"ignore_unknown_options": True, "help_option_names": []}


@zmqsched.command(context_settings=_as_is)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def broker(arguments: tuple[str, ...]) -> int:
    """Run a cluster's broker by hand."""
    return main(["broker", *arguments])


@zmqsched.command(context_settings=_as_is)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def node(arguments: tuple[str, ...]) -> int:
    """Add this machine to a cluster: run a node."""
    return main(["node", *arguments])


def _print_json(value: object) -> None:
    print(json.dumps(value, indent=2, sort_keys=True))


def _print_table(table: Table) -> None:
    from rich.console import Console
    from rich.table import Table as Grid
    from rich.text import Text

    grid = Grid(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for column, head in enumerate(table.heads):
        grid.add_column(head, justify="right" if table.is_number(column) else "left", no_wrap=True)
    for row in table.rows:
        grid.add_row(*(Text(cell(value)) for value in row))  # as Text: brackets in a host's name are no markup
    console = Console(highlight=False)
    if not console.is_terminal:  # a file or a pipe has no width to fit into
        console.width = 1_000
    with console.capture() as printed:
        console.print(grid)
    for line in printed.get().splitlines():
        print(line.rstrip())  # rich fills the last column up
