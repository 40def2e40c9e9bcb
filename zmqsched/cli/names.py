"""What lies where for a cluster of a name: its connection file, and the log of an ``up --detach``.

The log is beside the cluster's directory, not in it: there only the lock's holder may put files.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TextIO

from ..config import CONNECTION_FILE, ConnectionFile, check_name, runtime_dir


def path_of(file: ConnectionFile) -> Path:
    return runtime_dir() / file.name / CONNECTION_FILE


def log_path(name: str) -> Path:
    """No cluster's name begins with a dot, so this cannot be the directory of another cluster."""
    return runtime_dir() / f".{check_name(name)}.log"


def new_log(name: str) -> TextIO:
    path = log_path(name)
    path.unlink(missing_ok=True)
    return open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o600), "w")


def remove_own_log(name: str) -> None:
    """If this process writes to it: not that of a cluster of the same name that somebody has started meanwhile."""
    with contextlib.suppress(OSError):
        if os.path.samestat(os.fstat(2), log_path(name).stat()):
            log_path(name).unlink()
