"""Where the workers of this node come from: what a task needs to become a client of the same cluster.

Set in the node before it forks its nursery, and inherited by every worker.
"""

from __future__ import annotations

from typing import NamedTuple

from .config import ConnectionFile


class Origin(NamedTuple):
    """``node``: the incarnation of its process."""

    file: ConnectionFile
    node: bytes


node: Origin | None = None
worker = 0  # in a worker: its number
