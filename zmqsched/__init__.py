"""zmqsched: run Python functions on all the cores of one machine, or of many, through ZeroMQ.

>>> import zmqsched
>>> zmqsched.map(pow, [2, 3], [10, 10])
[1024, 59049]

The names are loaded when first used: a worker imports this package too and needs none of them.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .client import Client
    from .cluster import Cluster, LocalCluster
    from .context import get_task
    from .easy import map, starmap  # noqa: A004 - zmqsched.map is the point
    from .elsewhere import SlurmCluster, SSHCluster
    from .futures import Future
    from .maps import Map
    from .nesting import get_client
    from .version import __version__
    from .waitgroup import WaitGroup
    from .waiting import as_completed, wait

__all__ = [
    "Client", "Cluster", "Future", "LocalCluster", "Map", "SSHCluster", "SlurmCluster", "WaitGroup", "__version__",
    "as_completed", "errors", "get_client", "get_task", "map", "starmap", "wait",
]  # fmt: skip

_HOMES = {
    "Client": "client",
    "Cluster": "cluster",
    "Future": "futures",
    "LocalCluster": "cluster",
    "Map": "maps",
    "SSHCluster": "elsewhere",
    "SlurmCluster": "elsewhere",
    "WaitGroup": "waitgroup",
    "__version__": "version",
    "as_completed": "waiting",
    "get_client": "nesting",
    "get_task": "context",
    "map": "easy",
    "starmap": "easy",
    "wait": "waiting",
}


def __getattr__(name: str) -> Any:
    if name == "errors":
        return import_module(".errors", __name__)
    if name not in _HOMES:
        raise AttributeError(f"module 'zmqsched' has no attribute {name!r}")
    value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
