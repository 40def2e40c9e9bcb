"""``python -m zmqsched``, and the ``zmqsched`` command.

``broker``, ``node`` and ``tether`` are started by programs and must be up in a moment, so they parse their arguments here
and import no more than they need; the commands for people are in ``cli``.
"""

from __future__ import annotations

import argparse
import math
import os
import select
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import msgspec

from .config import BEAT_INTERVAL_S, NODE_ALONE_S, ConnectionFile, TaskDefaults, journal_path
from .core.policy import DEFAULT_POLICY, POLICIES
from .core.settings import DEAD_AFTER_S, Care
from .errors import ZmqschedError
from .options import resource_argument, size_argument
from .shell import BROKER_ENVIRONMENT, LEVELS, Relay, Starter, allow_many_connections, file_from_input, set_up_logging

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

T = TypeVar("T")

MAX_BEAT_INTERVAL_S = 3600.0


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments[:1] == ["broker"]:
        return _broker(arguments[1:])
    if arguments[:1] == ["node"]:
        return _node(arguments[1:])
    if arguments[:1] == ["tether"]:
        return _tether(arguments[1:])
    from .cli import run

    return run(arguments)


def _broker(arguments: list[str]) -> int:
    parser = _broker_parser()
    options = parser.parse_args(arguments)
    beat_interval_s = options.beat_interval
    dead_after_s = options.dead_after or DEAD_AFTER_S * beat_interval_s / BEAT_INTERVAL_S
    if beat_interval_s > MAX_BEAT_INTERVAL_S:
        parser.error(f"a beat interval is at most {MAX_BEAT_INTERVAL_S:g} s, not {beat_interval_s:g}")
    if dead_after_s < 3 * beat_interval_s:
        parser.error(f"--dead-after is at least three beat intervals, {3 * beat_interval_s:g} s, not {dead_after_s:g}")
    _return_memory_by_page(arguments)
    set_up_logging(options.log_level)
    allow_many_connections()
    starter = Starter(options.ready_fd)
    try:
        from . import sockets
        from .broker import Broker

        wide = options.insecure_any_interface
        listen = [each for text in options.listen for each in sockets.listen_addresses(text, any_interface=wide)]
        journal = journal_path(options.name) if options.journal == "" else options.journal and Path(options.journal)
        broker = Broker(
            options.name, options.policy, listen, journal or None, options.max_queued, beat_interval_s=beat_interval_s,
            dead_after_s=dead_after_s, idle_timeout_s=options.idle_timeout, tasks=options.task_defaults,
        )  # fmt: skip
    except ValueError as error:
        return starter.failed(error if isinstance(error, ZmqschedError) else ZmqschedError(str(error)))
    except ZmqschedError as error:
        return starter.failed(error)
    copies = Relay(1) if options.hand_over else None
    broker.run(starter, until_eof=options.until_eof, give_up_after_s=options.give_up_after, copies=copies)
    return 0


def _broker_parser() -> argparse.ArgumentParser:
    parser = _parser("broker", "Run a broker: the process that owns the tasks and gives them to nodes.")
    parser.add_argument("--name", default="default", help="the cluster's name (default: %(default)s)")
    parser.add_argument(
        "--listen",
        action="append",
        nargs="?",
        const="",
        default=[],
        metavar="ADDRESS[:PORT]",
        help="listen on TCP, encrypted, besides Unix sockets; without an address on loopback; may be repeated",
    )
    parser.add_argument(
        "--insecure-any-interface",
        action="store_true",
        help="let --listen 0.0.0.0 (or ::) mean every address of this host: all its networks can try to get in",
    )
    parser.add_argument("--policy", choices=sorted(POLICIES), default=DEFAULT_POLICY, help="who gets a task (%(default)s)")
    parser.add_argument(
        "--max-queued",
        metavar="SIZE",
        type=_size,
        help="hold as much of tasks and results (500M, 2G), then ask clients to wait (a quarter of the memory)",
    )
    parser.add_argument(
        "--journal",
        nargs="?",
        const="",
        metavar="FILE",
        help="keep a journal, so that a broker that follows this one knows its tasks; without FILE in the user's state "
        "directory",
    )
    parser.add_argument(
        "--beat-interval", metavar="SECONDS", type=_seconds, default=BEAT_INTERVAL_S, help="of each node (%(default)s)"
    )
    parser.add_argument(
        "--dead-after",
        metavar="SECONDS",
        type=_seconds,
        help=f"of silence a node is lost ({DEAD_AFTER_S:g} beat intervals; at least 3)",
    )
    parser.add_argument(
        "--idle-timeout",
        metavar="SECONDS",
        type=_seconds,
        default=0.0,
        help="end the cluster when no task is unfinished and no client has asked for anything but reports for so long",
    )
    parser.add_argument(
        "--task-defaults",
        metavar="JSON",
        type=_task_defaults,
        default=TaskDefaults(),
        help='what tasks have unless they say otherwise: {"retries": 2, "timeout": 60, "priority": 0, "requeue": true}',
    )
    parser.add_argument(
        "--give-up-after",
        metavar="SECONDS",
        type=_seconds,
        default=math.inf,
        help="with --until-eof: end also when nothing has come from standard input for so long",
    )
    parser.add_argument(
        "--hand-over",
        action="store_true",
        help="with --ready-fd=1: write the connection files there, with their keys, and again when keys change",
    )
    return parser


def _return_memory_by_page(arguments: list[str]) -> None:
    """Begin again with the C library's allocator. Python's own gives memory back by the mebibyte, when all of it is free:
    after 300,000 tasks were queued, 60 MB stayed with the broker for good. It must be chosen before Python starts."""
    if "PYTHONMALLOC" not in os.environ:
        command = [sys.executable, "-m", "zmqsched", "broker", *arguments]
        os.execve(sys.executable, command, {**os.environ, **BROKER_ENVIRONMENT})


def _node(arguments: list[str]) -> int:
    parser = _parser("node", "Run a node: the process that owns this host's workers.")
    parser.add_argument(
        "--connect",
        required=True,
        metavar="FILE",
        help="the cluster's connection file; -: it is the first line of standard input, and the node ends when that does",
    )
    parser.add_argument("-n", "--slots", type=_positive, help="workers (default: one for each usable CPU)")
    parser.add_argument(
        "--resource", action="append", default=[], metavar="NAME=AMOUNT", type=_resource, help="offer this; may be repeated"
    )
    parser.add_argument("--tag", action="append", default=[], help="offer tasks that ask for this tag; may be repeated")
    parser.add_argument("--wait", type=float, default=0.0, metavar="SECONDS", help="for the connection file to appear")
    parser.add_argument(
        "--no-echo", action="store_true", help="do not write here too what tasks write to standard error: clients have it"
    )
    parser.add_argument("--label", type=_label, default="", help="what the launcher calls this node")
    parser.add_argument(
        "--walltime",
        type=_seconds,
        default=0.0,
        metavar="SECONDS",
        help="it will be ended after so long; without it as the batch system says",
    )
    parser.add_argument(
        "--max-tasks-per-worker", type=_tasks, default=0, metavar="N", help="replace a worker when it has run so many tasks"
    )
    parser.add_argument("--memory-limit", type=_size, default=0, metavar="SIZE", help="that a worker may use (500M, 2G)")
    parser.add_argument(
        "--memory-soft",
        type=_fraction,
        default=Care.memory_soft,
        metavar="FRACTION",
        help="of the memory limit: beyond it a worker is given no other task and is replaced (%(default)s)",
    )
    parser.add_argument(
        "--give-up-after",
        type=_seconds,
        metavar="SECONDS",
        help="end when the broker has been silent for so long (default: 60 with --connect -, else never)",
    )
    options = parser.parse_args(arguments)
    set_up_logging(options.log_level)
    starter = Starter(options.ready_fd)
    until_eof = options.until_eof or options.connect == "-"
    if os.getcwd() not in sys.path:  # as "python -m zmqsched" has it: workers find the modules that lie here
        sys.path.insert(0, os.getcwd())
    try:
        file = _load(options.connect, options.wait, until_eof=until_eof)
        care = Care(options.max_tasks_per_worker, options.memory_limit, options.memory_soft)
        from .node import Node

        node = Node(
            file, options.slots, dict(options.resource), options.tag, echo=not options.no_echo, label=options.label,
            walltime_s=options.walltime, care=care,
            alone_s=options.give_up_after or (NODE_ALONE_S if options.connect == "-" else math.inf),
        )  # fmt: skip
        node.run(starter, until_eof=until_eof)
    except ZmqschedError as error:
        return starter.failed(error)
    return 0


def _tether(arguments: list[str]) -> int:
    parser = _parser("tether", "Hold a broker on another host, for a cluster here. What the shell there runs is read first.")
    parser.add_argument("--name", required=True, help="the cluster's name")
    parser.add_argument("--host", required=True, help="as ssh takes it")
    parser.add_argument("--ssh-option", action="append", default=[], metavar="WORD", help="for ssh; may be repeated")
    options = parser.parse_args(arguments)
    set_up_logging(options.log_level)
    starter = Starter(options.ready_fd)
    from .tether import Tether

    try:
        return Tether(options.name, options.host, options.ssh_option).run(starter)
    except ZmqschedError as error:
        return starter.failed(error)


def _load(where: str, wait_s: float, *, until_eof: bool) -> ConnectionFile:
    """The file, which its broker may be about to write, or the starter gives us."""
    if where == "-":
        file = file_from_input()
        os.memfd_create(file.badge)
        return file
    path = Path(where)
    until = time.monotonic() + wait_s
    starter = [0] if until_eof else []
    while not path.exists() and time.monotonic() < until:
        if select.select(starter, [], [], 0.005)[0] and not os.read(0, 4096):
            break  # the starter has given up, or is gone
    return ConnectionFile.load(path)


def _parser(name: str, what: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"zmqsched {name}", description=what)
    parser.add_argument("--log-level", choices=LEVELS, default="info")
    parser.add_argument("--until-eof", action="store_true", help="end when standard input does")
    parser.add_argument("--ready-fd", type=int, metavar="N", help="write one JSON line there when ready")
    return parser


def _resource(text: str) -> tuple[str, float]:
    try:
        return resource_argument(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _size(text: str) -> int:
    try:
        return size_argument(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _positive(text: str) -> int:
    number = int(text)
    if not 1 <= number <= 10_000:
        raise argparse.ArgumentTypeError(f"{number} is not between 1 and 10000")
    return number


def _task_defaults(text: str) -> TaskDefaults:
    try:
        return msgspec.json.decode(text, type=TaskDefaults)
    except (msgspec.MsgspecError, UnicodeError) as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _tasks(text: str) -> int:
    return _checked(int(text), lambda number: number >= 1, "at least 1")


def _seconds(text: str) -> float:
    return _checked(float(text), lambda number: 0 < number < math.inf, "a finite number of seconds above 0")


def _fraction(text: str) -> float:
    return _checked(float(text), lambda number: 0 < number <= 1, "above 0 and at most 1")


def _label(text: str) -> str:
    return _checked(text, lambda label: label.isprintable() and len(label) < 256, "a short printable text")


def _checked(value: T, right: Callable[[T], bool], what: str) -> T:
    if not right(value):
        raise argparse.ArgumentTypeError(f"{value} is not {what}")
    return value


if __name__ == "__main__":
    sys.exit(main())
