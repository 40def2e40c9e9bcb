"""``run``: a script with a cluster of its own, on all hosts on which a launcher starts this command."""

from __future__ import annotations

import click


@click.command("run", context_settings={"allow_interspersed_args": False})
@click.option(
    "-n", "--slots", type=click.IntRange(1, 10_000), metavar="N", default=None,
    help="Workers of each rank.  [default: one for each CPU that the launcher gives it]",
)  # fmt: skip
@click.option("--id", "word", metavar="WORD", default="", help="What these ranks, and no others, have in common.")
@click.argument("script", nargs=-1, required=True, type=click.UNPROCESSED, metavar="SCRIPT [ARG]...")
def run_script(slots: int | None, word: str, script: tuple[str, ...]) -> int:
    """Run a Python script with a cluster for its time; Client() finds it.

    Under srun or mpirun (`srun zmqsched run script.py`) the cluster has all hosts of the job: the first process is the
    broker, runs the script and is a node, the others are nodes. They end when the script does; the first has its exit code.
    """
    from ..ranks import run

    return run(script, slots or 0, word)
