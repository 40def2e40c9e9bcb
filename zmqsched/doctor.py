"""What keeps clusters from working here, or makes them slow: this machine, looked at step by step (``zmqsched doctor``).

Other hosts, as ``ssh`` reaches them, are in ``hops.py``; they end with these same steps, run there.
"""

from __future__ import annotations

import contextlib
import math
import os
import platform
import re
import resource
import socket
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import zmq
from msgspec import Struct

from . import cleaning, host, sockets
from .client import Client
from .config import ConnectionFile, ipc_address, running_clusters, runtime_dir
from .display import counted
from .errors import BrokerUnreachable, ConnectionFileError, StartError, ZmqschedError
from .version import __version__

# What every host must have alike, and what may differ.
LIBRARIES = ("pyzmq", "cloudpickle", "msgspec")
# A broker has two descriptors for each node, a node seven for each worker.
FEW_FILES, ENOUGH_FILES = 256, 4096
ENOUGH_PROCESSES = 1024
# What containers have unless they are told otherwise.
LITTLE_SHARED = 64 * 1024 * 1024
SHARED_MEMORY = Path("/dev/shm")
# A wheel's libsodium without its fast paths makes 35 MB/s of what the same processor can do, some 500 MB/s.
SLOW_CURVE_MBS = 100.0
CURVE_FOR_S = 0.4
CURVE_BLOCK = 1024 * 1024
ANSWER_TIMEOUT_S = 2.0
REACH_TIMEOUT_S = 4.0


class Finding(Struct, frozen=True):
    """One step. ``found``: what was found, for people; ``fix``: what to do about it, if there is something."""

    hop: str
    state: Literal["ok", "slow", "failed"]
    found: str
    fix: str = ""


def look_here() -> Iterator[Finding]:
    """This machine, as one to start clusters on."""
    yield from look_at_host()
    left = cleaning.find(watch_s=0)
    yield Finding("leftovers", "ok", f"{len(left)} of dead clusters" if left else "none", "zmqsched clean" if left else "")
    files = running_clusters()
    if not files:
        yield Finding("clusters", "ok", "none is running")
    for file in files:
        yield _cluster(file)


def look_at_host() -> Iterator[Finding]:
    """This machine, as one for nodes."""
    yield Finding("python", "ok", f"{platform.python_version()} ({sys.executable})")
    yield _libraries()
    yield _directory()
    yield _shared_memory()
    yield _open_files()
    yield _processes()
    yield _cpus()
    yield Finding("memory", "ok", f"{host.usable_memory() / 2**30:.1f} GiB may be used")
    yield _encryption()


def reaches(addresses: Sequence[str]) -> Finding:
    """Whether one of these ``tcp://`` addresses of a broker answers here."""
    try:
        where = sockets.pick_address(addresses, REACH_TIMEOUT_S)
    except BrokerUnreachable as error:
        why = re.search(r"addresses: (.*); is the cluster", str(error))
        return no_way_back(f"does not reach the broker: {why[1] if why else error}")
    return Finding("way back", "ok", f"reaches {where.removeprefix('tcp://')} directly")


def no_way_back(why: str) -> Finding:
    return Finding(
        "way back", "slow", why,
        "nodes there come back through ssh -R by themselves; for full speed give the broker an address that they reach "
        "(listen) and let the firewall pass it",
    )  # fmt: skip


def _libraries() -> Finding:
    found = f"zmqsched {__version__}, " + ", ".join(f"{name} {version(name)}" for name in LIBRARIES)
    found += f", libzmq {zmq.zmq_version()}"
    if not zmq.has("curve"):
        return Finding("libraries", "failed", f"{found} without CURVE", "pip install --force-reinstall pyzmq")
    try:
        sockets.context().term()
    except StartError as error:
        return Finding("libraries", "failed", found, str(error))
    return Finding("libraries", "ok", found)


def _directory() -> Finding:
    try:
        directory = runtime_dir()
        ipc_address(directory / ("n" * 40), "status")
    except ConnectionFileError as error:
        what, _, fix = re.sub(": (?=set )", "; ", str(error)).partition("; ")
        return Finding("directory", "failed", what, fix)
    return Finding("directory", "ok", str(directory))


def _shared_memory() -> Finding:
    fix = f"mount a tmpfs at {SHARED_MEMORY}; for a container, --shm-size=1g"
    try:
        with tempfile.TemporaryFile(dir=SHARED_MEMORY):
            space = os.statvfs(SHARED_MEMORY)
    except OSError as error:
        what = f"{SHARED_MEMORY} cannot be written ({error.strerror}): libraries that share memory (multiprocessing) need it"
        return Finding("shared memory", "slow", what, fix)
    free, size = space.f_bavail * space.f_frsize, space.f_blocks * space.f_frsize
    found = f"{SHARED_MEMORY}, {free / 2**20:,.0f} of {size / 2**20:,.0f} MiB free"
    return Finding("shared memory", "ok", found) if free > LITTLE_SHARED else Finding("shared memory", "slow", found, fix)


def _open_files() -> Finding:
    hard = _limit(resource.RLIMIT_NOFILE)
    found = f"{hard:,.0f} at most" if hard < math.inf else "unlimited"
    if hard >= ENOUGH_FILES:
        return Finding("open files", "ok", found)
    found += f": enough for {hard / 2:,.0f} nodes at a broker, or {hard / 7:,.0f} workers of a node"
    fix = "raise the hard limit: /etc/security/limits.conf (nofile), LimitNOFILE= of a systemd unit, --ulimit of a container"
    return Finding("open files", "slow" if hard >= FEW_FILES else "failed", found, fix)


def _processes() -> Finding:
    hard = _limit(resource.RLIMIT_NPROC)
    found = f"{hard:,.0f} of this user at most, threads included" if hard < math.inf else "unlimited"
    if hard >= ENOUGH_PROCESSES:
        return Finding("processes", "ok", found)
    fix = "raise the hard limit: /etc/security/limits.conf (nproc), TasksMax= of a systemd unit, --pids-limit of a container"
    return Finding("processes", "slow", found, fix)


def _limit(kind: int) -> float:
    """The hard limit, up to which a process may go by itself."""
    hard = resource.getrlimit(kind)[1]
    return math.inf if hard == resource.RLIM_INFINITY else hard


def _cpus() -> Finding:
    limits = [f"affinity {len(os.sched_getaffinity(0))}"]
    if (quota := host.cgroup_cpus()) is not None:
        limits.append(f"cgroup quota {quota:g}")
    if allotted := os.environ.get("SLURM_CPUS_PER_TASK"):
        limits.append(f"SLURM_CPUS_PER_TASK {allotted}")
    return Finding("CPUs", "ok", f"{host.usable_cpus()} of {os.cpu_count()} may be used ({', '.join(limits)})")


def _encryption() -> Finding:
    speed = curve_mbs()
    if speed >= SLOW_CURVE_MBS:
        return Finding("encryption", "ok", f"CURVE {speed:,.0f} MB/s")
    return Finding(
        "encryption", "slow", f"CURVE {speed:,.0f} MB/s: this pyzmq's libsodium is slow; on one host nothing is encrypted",
        "pip install --no-binary pyzmq --force-reinstall pyzmq, against the distribution's libzmq (Debian: apt install "
        "libzmq3-dev)",
    )  # fmt: skip


def curve_mbs() -> float:
    """How many MB a second of large messages go through one encrypted connection within this process."""
    (server, secret), (mine, my_secret) = zmq.curve_keypair(), zmq.curve_keypair()
    with zmq.Context(io_threads=2) as ctx, ctx.socket(zmq.PULL) as pull, ctx.socket(zmq.PUSH) as push:
        pull.curve_server, pull.curve_secretkey = True, secret
        push.curve_serverkey, push.curve_publickey, push.curve_secretkey = server, mine, my_secret
        push.linger = 0
        push.connect(f"tcp://127.0.0.1:{pull.bind_to_random_port('tcp://127.0.0.1')}")
        block, received = bytes(CURVE_BLOCK), 0
        for _ in range(2):
            push.send(block)
        pull.recv()  # the handshake is over
        began = time.perf_counter()
        while (took := time.perf_counter() - began) < CURVE_FOR_S:
            push.send(block)
            received += len(pull.recv())
    return received / took / 1e6


def _cluster(file: ConnectionFile) -> Finding:
    hop = f"cluster {file.name}"
    try:
        with Client(file, timeout=ANSWER_TIMEOUT_S) as client:
            nodes = [node for node in client.nodes() if node.state not in ("lost", "gone")]
            return Finding(hop, "ok", f"{counted(len(client.workers()), 'worker')} on {counted(len(nodes), 'node')}")
    except ZmqschedError as error:
        return Finding(hop, "failed", str(error), f"zmqsched down {file.name}")


@contextlib.contextmanager
def listening(address: str) -> Iterator[list[str]]:
    """A port of this machine that answers for as long, as a broker's would; none if the address is not one of its own."""
    try:
        listener = socket.create_server((address, 0), family=socket.AF_INET6 if ":" in address else socket.AF_INET)
    except OSError:
        yield []
        return
    with listener:
        port = listener.getsockname()[1]
        where = f"tcp://[{address}]:{port}" if ":" in address else f"tcp://{address}:{port}"
        yield [where]
