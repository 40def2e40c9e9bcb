"""Compile Python's own standard library in parallel, kill a worker half way, and lose nothing.

Every module of the standard library (tests left out) is parsed and compiled, serially, then by a small cluster. While
the cluster works one of its workers is killed with SIGKILL. Prints what was found, who did how much, both times, what
was run again because of the killed worker, and that both ways found the same. Ends with exit code 1 if they did not.
"""

import ast
import os
import signal
import sys
import sysconfig
import time
from collections import Counter
from concurrent.futures import as_completed
from pathlib import Path
from types import CodeType
from typing import Literal, TypedDict

from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from zmqsched import Client, LocalCluster

LEFT_OUT = {"site-packages", "test", "tests", "idle_test", "lib2to3"}  # the last is in some versions only
LONGEST = 10
REQUEUED = "requeued: worker died"


class Module(TypedDict):
    """What one file holds. ``functions``: name and length in lines of each.

    At run time a plain dict: an object of a class of ``__main__`` would travel with its class, which workers cannot
    import.
    """

    lines: int
    classes: int
    instructions: int
    functions: list[tuple[str, int]]


def parse(path: str) -> Module:
    source = Path(path).read_bytes()
    tree = ast.parse(source)
    nodes = list(ast.walk(tree))
    return Module(
        lines=source.count(b"\n"),
        classes=sum(isinstance(node, ast.ClassDef) for node in nodes),
        instructions=count_instructions(compile(tree, path, "exec", dont_inherit=True)),
        functions=[
            (node.name, (node.end_lineno or node.lineno) - node.lineno + 1)
            for node in nodes
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        ],
    )


def count_instructions(code: CodeType) -> int:
    inner = (constant for constant in code.co_consts if isinstance(constant, CodeType))
    return len(code.co_code) // 2 + sum(map(count_instructions, inner))


def parse_there(path: str) -> tuple[int, Module]:
    """The task: the module, and the pid of the worker that parsed it."""
    return os.getpid(), parse(path)


def standard_library() -> dict[str, int]:
    """Size by path, the largest first: the shorter the last tasks are, the sooner all workers end together."""
    root = Path(sysconfig.get_path("stdlib"))
    files = [file for file in root.rglob("*.py") if not LEFT_OUT & set(file.relative_to(root).parts)]
    # Reading them here also spares whoever parses first the wait for the disk.
    sizes = {str(file): len(file.read_bytes()) for file in files}
    return dict(sorted(sizes.items(), key=lambda item: (-item[1], item[0])))


def serially(sizes: dict[str, int]) -> dict[str, Module]:
    with progress_bar("serially", sizes) as bar:
        modules = {}
        for path, size in sizes.items():
            modules[path] = parse(path)
            bar.update(size)
    return modules


def in_parallel(client: Client, sizes: dict[str, int]) -> tuple[dict[str, Module], Counter[int], str]:
    """The modules, how many each worker (pid) parsed, and which worker was killed."""
    modules: dict[str, Module] = {}
    shares: Counter[int] = Counter()
    killed = ""
    with progress_bar("in parallel", sizes) as bar:
        futures = {client.submit(parse_there, path): path for path in sizes}
        left = sum(sizes.values())
        for future in as_completed(futures):
            path = futures[future]
            worker, modules[path] = future.result()
            shares[worker] += 1
            bar.update(sizes[path])
            left -= sizes[path]
            if not killed and left < bar.total / 2:
                killed = kill_a_worker(client)
    return modules, shares, killed


def progress_bar(what: str, sizes: dict[str, int]) -> tqdm:
    # disable=None: none where there is no terminal.
    return tqdm(desc=f"{what:11}", total=sum(sizes.values()), unit="B", unit_scale=True, disable=None)


def kill_a_worker(client: Client) -> str:
    """Kill until one was caught with a task in its hands, which the first nearly always is. Returns who it was."""
    killed = []
    while not client.status().counts.get(REQUEUED) and sum(client.status().tasks.values()):
        victim = client.workers()[0]
        os.kill(victim.pid, signal.SIGKILL)
        killed.append(f"{victim.id} (pid {victim.pid})")
        while client.status().counts.get("worker deaths", 0) < len(killed):
            time.sleep(0.01)
    return ", ".join(killed)


def show_findings(console: Console, modules: dict[str, Module]) -> None:
    def total(key: Literal["lines", "classes", "instructions"]) -> int:
        return sum(module[key] for module in modules.values())

    functions = sum(len(module["functions"]) for module in modules.values())
    console.print(f"{len(modules):,} files, {total('lines'):,} lines, {total('classes'):,} classes, ", end="")
    console.print(f"{functions:,} functions, {total('instructions'):,} instructions")
    table = Table("lines", "function", "file", title=f"The {LONGEST} longest functions", title_justify="left")
    table.columns[0].justify = "right"
    lengths = ((length, name, path) for path, module in modules.items() for name, length in module["functions"])
    root = sysconfig.get_path("stdlib")
    for length, name, path in sorted(lengths, reverse=True)[:LONGEST]:
        table.add_row(str(length), name, os.path.relpath(path, root))
    console.print(table)


def show_workers(console: Console, shares: Counter[int], names: dict[int, str], killed: str) -> None:
    table = Table("worker", "pid", "files", "share", title="Who did how much", title_justify="left")
    for pid, files in sorted(shares.items()):
        note = ", killed" if f"(pid {pid})" in killed else ""
        table.add_row(names.get(pid, "?") + note, str(pid), str(files), f"{files / shares.total():.0%}")
    console.print(table)


def main() -> int:
    console = Console(highlight=False, soft_wrap=True)
    sizes = standard_library()
    console.print(f"The standard library of Python {sys.version.split()[0]}, {sum(sizes.values()) / 1e6:.1f} MB")

    began = time.perf_counter()
    serial = serially(sizes)
    serial_s = time.perf_counter() - began

    with LocalCluster(min(4, os.cpu_count() or 1)) as cluster, Client(cluster) as client:
        workers = client.workers()
        began = time.perf_counter()
        parallel, shares, killed = in_parallel(client, sizes)
        parallel_s = time.perf_counter() - began
        names = {worker.pid: worker.id for worker in [*workers, *client.workers()]}
        again = client.status().counts.get(REQUEUED, 0)

    show_findings(console, parallel)
    show_workers(console, shares, names, killed)
    ratio = f"{serial_s / parallel_s:.2f} times as fast"
    console.print(f"serially {serial_s:.1f} s, in parallel {parallel_s:.1f} s with {len(workers)} workers: {ratio}")
    console.print(f"killed half way: worker {killed}; tasks that ran again because of it: {again}")
    same = parallel == serial
    console.print("nothing is missing: both ways found the same" if same else "THE TWO WAYS DIFFER")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
