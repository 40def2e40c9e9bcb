"""What this host has and what of it may be used: CPUs, memory, GPUs, versions.

``os.cpu_count()`` lies in containers and batch allocations; the sources here are the scheduler affinity, the cgroup's CPU
quota (v2 ``cpu.max``, v1 ``cpu.cfs_quota_us``) and ``SLURM_CPUS_PER_TASK``: the smallest counts.

Numerical libraries start a thread for each CPU, in every worker: :func:`thread_limits` keeps workers out of each other's
way. They read it once, when they are imported, so it is in a node's environment before its workers are forked.
"""

from __future__ import annotations

import math
import os
import platform
import resource
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from .protocol import Host

ROOM_SHARE = 4  # of the usable memory, one part in so many: nodes, workers and clients may be here too
LEAST_ROOM = 256 * 1024 * 1024
CGROUP = Path("/sys/fs/cgroup")
PROC = Path("/proc")
# Each library reads its own, and where that is not set OpenMP's.
OPENMP_THREADS = "OMP_NUM_THREADS"
THREADS = (OPENMP_THREADS, "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "BLIS_NUM_THREADS", "NUMEXPR_NUM_THREADS")
LIBRARIES = ("zmqsched", "pyzmq", "cloudpickle", "msgspec", "numpy")


def usable_cpus() -> int:
    """CPUs this process may use, at least 1."""
    counts = [len(os.sched_getaffinity(0))]
    if (quota := cgroup_cpus()) is not None:
        counts.append(max(1, math.ceil(quota)))
    if (slurm := os.environ.get("SLURM_CPUS_PER_TASK", "")).isdigit():
        counts.append(max(1, int(slurm)))
    return min(counts)


def thread_limits(workers: int, environment: Mapping[str, str]) -> dict[str, str]:
    """What to add to the environment of so many workers on this host, so that the threads of all of their BLAS and OpenMP
    libraries together are about as many as its usable CPUs.

    What the user has set is left as it is; with ``OMP_NUM_THREADS``, which the others follow, nothing is added.
    """
    if OPENMP_THREADS in environment:
        return {}
    each = str(max(1, usable_cpus() // workers))
    return {name: each for name in THREADS if name not in environment}


def walltime(environment: Mapping[str, str]) -> float:
    """Seconds until the batch system ends this process's allocation, as it says by the wall clock; 0 if it says nothing.
    Read once, at the start: what follows from it goes by the monotonic clock."""
    end = environment.get("SLURM_JOB_END_TIME", "")
    return max(1.0, int(end) - time.time()) if end.isdigit() else 0.0


def resident(pid: int) -> int:
    """Bytes of memory that this process has, 0 if it is gone."""
    fields = _read(PROC / str(pid) / "statm").split()
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE") if fields else 0


def usable_memory() -> int:
    """Bytes of memory this process may use: the host's, or the cgroup's limit if that is lower."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        text = _read(CGROUP / name)
        if text.isdigit():
            total = min(total, int(text))
    return total


def room_for_tasks() -> int:
    """Bytes of others' tasks that a broker here may hold unless it is told otherwise."""
    return max(LEAST_ROOM, usable_memory() // ROOM_SHARE)


def allow_many_files() -> None:
    """As many open files as this process may have: a node has seven for each worker, and 1,024 is what most shells allow."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


class OomKills:
    """How many processes the kernel has killed for want of memory: in this process's cgroup, where that is counted, else on
    the whole host. It counts after the fact, and names nobody: a worker killed while the count grew is the likely victim.
    """

    def __init__(self) -> None:
        self._read = _oom_counter()
        self._before = self._now = self._read()

    def look(self) -> None:
        """Once a second or so: what counts as lately begins at the look before."""
        self._before, self._now = self._now, self._read()

    def lately(self) -> bool:
        """The count has grown since the look before the last."""
        return self._read() > self._before


def _oom_counter() -> Callable[[], int]:
    """v2 ``memory.events``, v1 ``memory.oom_control``, ``/proc/vmstat``: the first that has a line ``oom_kill``."""
    sources = [PROC / "vmstat"]
    for line in _read(PROC / "self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            sources.insert(0, CGROUP / path.lstrip("/") / "memory.events")
        elif "memory" in controllers.split(","):
            sources.insert(0, CGROUP / "memory" / path.lstrip("/") / "memory.oom_control")
    counted = [source for source in sources if _oom_kills(source) is not None]
    return lambda: (counted and _oom_kills(counted[0])) or 0


def _oom_kills(source: Path) -> int | None:
    for line in _read(source).splitlines():
        name, _, number = line.partition(" ")
        if name == "oom_kill" and number.isdigit():
            return int(number)
    return None


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


def cgroup_cpus() -> float | None:
    """The CPUs that the cgroup's quota is worth; None without one."""
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
