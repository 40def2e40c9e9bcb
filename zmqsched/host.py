"""What this host has and what of it may be used: CPUs, memory, GPUs, versions.

``os.cpu_count()`` lies in containers and batch allocations; the sources here are the scheduler affinity, the cgroup's CPU
quota (v2 ``cpu.max``, v1 ``cpu.cfs_quota_us``) and ``SLURM_CPUS_PER_TASK``: the smallest counts.
"""

from __future__ import annotations

import math
import os
import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from .protocol import Host

CGROUP = Path("/sys/fs/cgroup")
LIBRARIES = ("zmqsched", "pyzmq", "cloudpickle", "msgspec", "numpy")


def usable_cpus() -> int:
    """CPUs this process may use, at least 1."""
    counts = [len(os.sched_getaffinity(0))]
    if (quota := _cgroup_cpus()) is not None:
        counts.append(max(1, math.ceil(quota)))
    if (slurm := os.environ.get("SLURM_CPUS_PER_TASK", "")).isdigit():
        counts.append(max(1, int(slurm)))
    return min(counts)


def usable_memory() -> int:
    """Bytes of memory this process may use: the host's, or the cgroup's limit if that is lower."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        text = _read(CGROUP / name)
        if text.isdigit():
            total = min(total, int(text))
    return total


def gpus() -> list[str]:
    """GPUs by the names that CUDA_VISIBLE_DEVICES takes: those it shows already, else all that nvidia-smi lists."""
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    if shown is not None:
        return [name for name in (part.strip() for part in shown.split(",")) if name and name != "-1"]
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return done.stdout.split() if done.returncode == 0 else []


def where() -> Host:
    """This process: host, pid, Python, and the libraries whose versions matter."""
    found = []
    for name in LIBRARIES:
        try:
            found.append((name, version(name)))
        except PackageNotFoundError:
            continue
    return Host(platform.node()[:255] or "unknown", os.getpid(), platform.python_version(), tuple(found))


def _cgroup_cpus() -> float | None:
    quota, _, period = _read(CGROUP / "cpu.max").partition(" ")
    if not quota:
        quota, period = _read(CGROUP / "cpu/cpu.cfs_quota_us"), _read(CGROUP / "cpu/cpu.cfs_period_us")
    if quota.isdigit() and period.isdigit() and int(period):
        return int(quota) / int(period)
    return None


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
