"""Imports only go down (docs/architecture.md): who may import whom, as tables, kept true by walking the sources."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "zmqsched"

CORE_MAY = {"errors", "config", "protocol"}
SHELL_MAY = CORE_MAY | {
    "core", "codec", "sockets", "pipes", "broker", "authenticator", "keyring", "facts", "lookout", "intake",
    "journal", "seal", "monitor", "node", "nursery", "orphans", "blackbox", "streams", "listening", "origin", "shell",
    "host", "version",
}  # fmt: skip
EDGE_MAY = CORE_MAY | {"core", "codec", "payload", "sockets", "pipes"}
MAPS = {"maps", "mapping", "plan", "batches", "answers", "gathered"}

# The modules of zmqsched that a module may import; a package stands for all that is in it. Not listed: assembly,
# which may import anything.
MAY = {
    "errors": set(),
    "config": {"errors"},
    "hostlist": set(),
    "schema": set(),
    "clusterfile": {"errors", "config", "core", "options", "hostlist", "schema"},
    "protocol": {"config"},
    "codec": {"errors", "protocol"},
    "payload": {"errors", "config", "protocol"},  # its limits and its word for a payload
    "core": CORE_MAY | {"core"},
    "sockets": CORE_MAY | {"core"},
    "pipes": CORE_MAY | {"core"},
    "broker": SHELL_MAY,
    "journal": CORE_MAY | {"core", "codec", "seal"},
    "seal": {"errors"},
    "monitor": SHELL_MAY,
    "authenticator": {"errors", "sockets"},
    "keyring": CORE_MAY | {"sockets"},
    "facts": CORE_MAY | {"core", "codec", "sockets", "keyring"},
    "lookout": {"core", "authenticator", "intake"},
    "intake": CORE_MAY | {"core", "host"},
    "node": SHELL_MAY,
    "nursery": SHELL_MAY,
    "blackbox": set(),
    "streams": {"protocol"},
    "surroundings": set(),
    "orphans": set(),
    "origin": {"config"},
    "shell": CORE_MAY,
    "host": CORE_MAY,
    "version": set(),
    "commands": set(),
    "listening": {"protocol", "streams"},
    "worker": EDGE_MAY | {"surroundings", "streams"},
    "context": {"protocol", "payload", "worker"},
    "nesting": {"protocol", "worker", "origin"},
    "display": set(),
    "records": CORE_MAY | {"display"},
    "control": CORE_MAY,
    "readiness": CORE_MAY | {"records", "control", "display"},
    "callbacks": set(),
    "printing": {"protocol"},
    "futures": CORE_MAY | {"payload", "callbacks", "display", "printing", "nesting"},
    "progress": CORE_MAY | {"options"},
    "waiting": {"futures", "progress", "nesting"},
    "lifetime": {"futures", "waiting", "client"},
    "options": CORE_MAY,
    "arguments": EDGE_MAY | {"futures"},
    "sources": set(),
    "shelf": {"payload"},
    "tally": {"payload"},
    "plan": {"payload", "protocol"},
    "batches": EDGE_MAY | {"plan", "client", "futures"},
    "answers": EDGE_MAY | {"futures"},
    "gathered": EDGE_MAY | {"plan", "shelf", "tally"},
    "mapping": EDGE_MAY
    | {"answers", "batches", "futures", "gathered", "lifetime", "nesting", "plan", "progress", "sources", "waiting"}
    | {"client"},
    "maps": EDGE_MAY | {"plan", "gathered", "mapping", "sources", "display", "options", "progress", "client", "tasks"},
    "tasks": EDGE_MAY | {"futures", "maps", "options", "client", "taskgroup"},
    "client": EDGE_MAY
    | {"worker", "futures", "callbacks", "printing", "waiting", "lifetime", "records", "display", "host", "options"}
    | {"arguments", "tasks", "nesting", "origin", "readiness"}
    | MAPS,
    "taskgroup": EDGE_MAY | {"futures", "tasks", "waiting"},
    "waitgroup": EDGE_MAY | {"futures", "tasks", "worker", "waiting", "nesting"},
}
ASSEMBLY = {
    "__init__", "__main__", "cluster", "brokers", "tether", "fleet", "nodegroup", "elsewhere", "cleaning", "doctor", "hops",
    "launch", "stopping", "ranks", "easy", "sim", "cli", "joblib",
}  # fmt: skip

# What the layers must not take from outside, as prefixes of dotted names.
CORE_NEVER = ("zmq", "time", "threading", "os", "socket", "logging", "pickle", "cloudpickle")
PICKLERS = ("pickle", "cloudpickle", "dill", "marshal", "shelve")
NEVER = {
    "errors": ("zmq", *PICKLERS),
    "config": ("zmq", *PICKLERS),
    "protocol": ("zmq", *PICKLERS),
    "codec": ("zmq", *PICKLERS),
    "payload": ("zmq",),
    "core": CORE_NEVER,
    "sockets": PICKLERS,
    "pipes": PICKLERS,
    "broker": PICKLERS,
    "journal": PICKLERS,
    "seal": PICKLERS,
    "monitor": PICKLERS,
    "authenticator": PICKLERS,
    "keyring": PICKLERS,
    "facts": PICKLERS,
    "lookout": PICKLERS,
    "intake": PICKLERS,
    "node": PICKLERS,
    "nursery": PICKLERS,
}

# (importer, imported): why this one may go up.
EXCEPTIONS = {
    ("client", "cluster"): "Client() without a cluster starts a local one, imported when that is wanted",
    ("nursery", "client"): "so that workers forked later need not import it, once tasks of this node are clients",
    ("nesting", "client"): "get_client() makes one when it is called",
    ("nesting", "easy"): "outside of tasks get_client() gives the one that zmqsched.map uses",
    ("nursery", "worker"): "its forked child becomes a worker and never returns; the nursery itself unpickles nothing",
}

# random's own functions share one hidden state; the core takes a Random and uses that.
RANDOM_ALLOWED = {"Random"}


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def dotted(path: Path) -> list[str]:
    """["core", "link"] for zmqsched/core/link.py; a package's __init__ keeps its name."""
    return list(path.relative_to(PACKAGE).with_suffix("").parts)


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, absolute dotted name) of everything imported anywhere in the file, inside functions too."""
    package = ["zmqsched", *dotted(path)[:-1]]
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            prefix = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{prefix}.{alias.name}") for alias in node.names)


def layer(path: Path) -> str:
    return dotted(path)[0]


def target(name: str) -> str | None:
    """The module of zmqsched that the name is or is in; "__init__" for what the package itself offers."""
    parts = name.split(".")
    if parts[0] != "zmqsched":
        return None
    if len(parts) > 1 and ((PACKAGE / parts[1]).is_dir() or (PACKAGE / f"{parts[1]}.py").exists()):
        return parts[1]
    return "__init__"


def is_in(name: str, prefixes: tuple[str, ...]) -> bool:
    return any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)


def breaches(path: Path) -> Iterator[str]:
    who = layer(path)
    for line, name in imports(path):
        whom = target(name)
        where = f"{path.relative_to(PACKAGE.parent)}:{line}: {name}"
        if whom is not None and who in MAY and whom not in MAY[who] | {who} and (who, whom) not in EXCEPTIONS:
            yield f"{where}: {who} may not import {whom}"
        if is_in(name, NEVER.get(who, ())):
            yield f"{where}: never in {who}"
        if who == "core" and is_in(name, ("random",)) and name.removeprefix("random.") not in RANDOM_ALLOWED:
            yield f"{where}: the core takes a Random, it does not share random's hidden one"


@pytest.mark.parametrize("path", modules(), ids=lambda path: ".".join(dotted(path)))
def test_imports_only_go_down(path):
    assert list(breaches(path)) == []


def test_each_module_has_a_layer():
    assert {layer(path) for path in modules()} <= MAY.keys() | ASSEMBLY


def test_only_the_edges_ever_unpickle():
    """The rule that the tables exist for, said once more without them."""
    direct = {layer(path) for path in modules() if "payload" in {target(name) for _, name in imports(path)}}
    edges = {"worker", "context", "client", "tasks", "waitgroup", "futures", "arguments", "shelf", "tally"}
    assert direct <= {"payload", *edges, *MAPS, *ASSEMBLY}


# The modules that read the wall clock, which may step; everything else measures by the monotonic one.
WALL_CLOCK = {
    "config": "when a connection file was written; how long ago a directory changed, which is only for tidying",
    "host": "when a batch allocation ends, once: it is said by that clock",
    "commands": "when a command began, for its line in the job log",
    "hops": "how far another host's clock is off, to be told",
}


def test_the_wall_clock_decides_nothing():
    reads = re.compile(r"\btime\.time\(|\btime_ns\(|\bdatetime\.(now|today|utcnow)\(|\bfrom time import .*\btime\b")
    assert {layer(path) for path in modules() if reads.search(path.read_text())} == WALL_CLOCK.keys()


@pytest.mark.parametrize(
    "source",
    [
        "import zmq.utils",
        "def f():\n    from ..payload import loads",
        "from .. import payload",
        "from random import shuffle",
        "import random",
        "import zmqsched.broker",
        "from os import path",
    ],
)
def test_the_walk_sees_each_way_to_import(source, tmp_path, monkeypatch):
    package = tmp_path / "zmqsched"
    (package / "core").mkdir(parents=True)
    for name in ("payload.py", "broker.py", "core/links.py"):
        (package / name).write_text("")
    (package / "core/links.py").write_text(source)
    monkeypatch.setattr(f"{__name__}.PACKAGE", package)
    assert len(list(breaches(package / "core/links.py"))) == 1
