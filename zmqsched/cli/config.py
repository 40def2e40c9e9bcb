"""``config``: a first file of a cluster, and what a file would start."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from ..clusterfile import ClusterFile, NodeGroup
from ..display import Table, counted
from ..errors import ClusterFileError, ZmqschedError
from .tables import as_json, print_json, print_table

DEFAULT_PATH = "cluster.toml"

# Every key there is; those that are commented out are as by default, or examples that load.
TEMPLATE = """\
# What zmqsched is to start:  zmqsched up cluster.toml
# Every key is optional; what is commented out shows the default, or an example. To see what this would start:
#   zmqsched config check cluster.toml
# Durations are seconds as a number, or "90s", "30m", "1h", "2d"; sizes are bytes, or "500M", "2G".

name = "default"                     # to find the cluster by: zmqsched.Client("default")

[broker]
# host = "login1"                    # where it runs, over ssh if that is another host; "": here
# listen = ["10.0.0.1"]              # addresses to bind, encrypted; none: Unix sockets, unless there are nodes elsewhere
# insecure_any_interface = false     # let listen be 0.0.0.0 or ::, every address of this host, in all its networks
# port = 0                           # the first of three in a row; 0: any that are free
# journal = true                     # keep tasks and answers for when it dies: true, false, or a file's path
# idle_timeout = 0                   # end the cluster when nothing was asked of it for so long; 0: never
# max_queued = 0                     # what it holds of tasks and results before clients wait; 0: a quarter of the memory
# policy = "least-loaded"            # which node gets a task; or "round-robin", "random", "pack"
# With a host, as for nodes there:
# python = "~/venv/bin/python"
# prologue = ["module load python"]
# env = {LANG = "C"}
# ssh_options = ["-o", "ConnectTimeout=5"]

[heartbeat]
# interval = 1.0                     # how often a node beats
# dead_after = 3.5                   # how long it may be silent before it is lost

[tasks]                              # what tasks have unless their client says otherwise
# retries = 0
# timeout = 0                        # 0: no limit
# priority = 0                       # the higher, the sooner
# requeue = true                     # run again what was running where a node was lost

# Nodes on this machine.
[[nodes]]
launcher = "local"
# name = "local"                     # of this group: zmqsched scale local=2; the launcher's unless it is given
# count = 1                          # how many nodes
# slots = 0                          # workers of each; 0: one for each CPU
# resources = {gpu = 1}              # what each offers to tasks that ask for it
# tags = ["fast"]
# env = {OMP_NUM_THREADS = "1"}
# cwd = ""                           # where workers run; "" is here
# prologue = ["module load python"]  # shell lines that run before the node
# python = ""                        # the interpreter; "" is the one that runs this
# max_tasks_per_worker = 0           # replace a worker after so many tasks; 0: never
# memory_limit = 0                   # of each worker, "4G"; it is killed above that; 0: no limit
# memory_soft = 0.8                  # from this part of it on it gets no other task and is replaced
# scale = {min = 0, max = 4}         # between how many nodes, by what there is to do

# Nodes on other hosts, through ssh: zmqsched scale ssh=16
# [[nodes]]
# launcher = "ssh"
# hosts = "host1,host2,gpu[1-4]"
# slots = 8
# ssh_options = ["-o", "ConnectTimeout=5"]

# Nodes in jobs of Slurm. Likewise "pbs" and "sge".
# [[nodes]]
# launcher = "slurm"
# slots = 16
# batch = {nodes = 4, time = "1h", partition = "short", account = "acct", array = false, options = ["--qos=low"]}
"""


@click.group()
def config() -> None:
    """Write and check the file that says what a cluster is made of."""


@config.command()
@click.argument("path", default=DEFAULT_PATH, metavar="[PATH]")
def init(path: str) -> None:
    """Write a file with every key and what it means, to PATH (cluster.toml). One that is there already stays."""
    try:
        with Path(path).open("x") as file:
            file.write(TEMPLATE.replace(DEFAULT_PATH, path))
    except FileExistsError:
        raise ZmqschedError(f"there is {path} already: give another path, or remove it") from None
    except OSError as error:
        raise ZmqschedError(f"cannot write {path}: {(error.strerror or str(error)).lower()}") from None
    print(f"wrote {path}; start what it says: zmqsched up {path}")


@config.command()
@click.argument("path", metavar="FILE")
@as_json
def check(path: str, output: str) -> int:
    """Say what FILE would start, or all that is wrong with it, each with the path of its key."""
    from .wanted import load

    try:
        file = load(path)
    except ClusterFileError as error:
        for problem in error.args:
            print(f"zmqsched: {problem}", file=sys.stderr)
        return 1
    if output == "json":
        print_json(_as_record(file))
        return 0
    print(f"cluster {file.name}: {counted(len(file.nodes), 'group')} of nodes")
    if file.nodes:
        print()
        print_table(Table(("group", "launcher", "nodes", "workers of each", "where"), [_row(group) for group in file.nodes]))
    return 0


def _as_record(file: ClusterFile) -> dict[str, object]:
    groups = [
        {
            "name": group.name,
            "launcher": group.launcher,
            "nodes": group.size,
            "slots": group.slots,
            "hosts": list(group.hosts),
        }
        for group in file.nodes
    ]
    return {"name": file.name, "groups": groups}


def _row(group: NodeGroup) -> tuple[object, ...]:
    nodes = f"{group.scale.min} to {group.scale.max}, now {group.size}" if group.scale else str(group.size)
    where = ", ".join(group.hosts[:8]) + (f" and {len(group.hosts) - 8} more" if len(group.hosts) > 8 else "")
    return (
        group.name,
        group.launcher,
        nodes,
        group.slots or "one for each CPU",
        where or ("here" if group.launcher == "local" else ""),
    )
