"""The commands for people.

What is asked for goes to standard output, all else to standard error. Exit codes: 0, 1 for what went wrong (one line
that says what to do), 2 for arguments that cannot be, 130 for an interrupt.

Each family of commands is a module; what is to be loaded for one command alone, it imports when it runs.
"""

from __future__ import annotations

import os
import signal
import sys

import click

from ..errors import ZmqschedError
from ..version import __version__
from . import clean, config, doctor, execute, hand, keys, logs, look, nodes, scaling, script, stop, up


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


_look = (look.ls, look.status, logs.logs, nodes.wait)
_nodes = (scaling.scale, scaling.adapt, nodes.drain, nodes.pause, nodes.resume, nodes.retire)
_use = (execute.execute, script.run_script)
_care = (doctor.doctor, clean.clean, keys.keys)
for _command in (up.up, config.config, *_look, *_nodes, stop.down, *_use, *_care, hand.broker, hand.node):
    zmqsched.add_command(_command)
