"""Two hosts on this machine: network namespaces joined by a cable, which can be cut one way or both.

Needs root, and ``ip`` and ``nft`` (Debian: iproute2, nftables). Packets vanish without a word, as in a broken network.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

HERE, THERE = "10.111.8.1", "10.111.8.2"
Side = Literal["here", "there"]
Direction = Literal["in", "out", "both"]
_CLONE_NEWNET = 0x40000000  # <sched.h>


def why_not() -> str:
    """What is missing on this machine; "" if nothing is."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    missing = [program for program in ("ip", "nft") if shutil.which(program) is None]
    return f"needs {' and '.join(missing)} (Debian: iproute2, nftables)" if missing else ""


class Hosts:
    def __init__(self) -> None:
        self._names = {"here": f"zsc{os.getpid()}a", "there": f"zsc{os.getpid()}b"}

    def __enter__(self) -> Hosts:
        here, there = self._names.values()
        for name in (here, there):
            _run("ip", "netns", "add", name)
        _run("ip", "link", "add", "cable", "netns", here, "type", "veth", "peer", "name", "cable", "netns", there)
        for name, address in ((here, HERE), (there, THERE)):
            _run("ip", "-n", name, "addr", "add", f"{address}/24", "dev", "cable")
            _run("ip", "-n", name, "link", "set", "cable", "up")
            _run("ip", "-n", name, "link", "set", "lo", "up")
        return self

    def __exit__(self, *_: object) -> None:
        for name in self._names.values():
            _run("ip", "netns", "delete", name)

    def on(self, side: Side) -> list[str]:
        """The words before a command that is to run on that host."""
        return ["ip", "netns", "exec", self._names[side]]

    @contextlib.contextmanager
    def inside(self, side: Side) -> Iterator[None]:
        """This thread, and every thread and socket that it makes meanwhile, is on that host."""
        libc = ctypes.CDLL(None, use_errno=True)
        home = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        there = os.open(Path("/run/netns", self._names[side]), os.O_RDONLY)
        try:
            _enter(libc, there)
            try:
                yield
            finally:
                _enter(libc, home)
        finally:
            os.close(there)
            os.close(home)

    @contextlib.contextmanager
    def cut(self, side: Side, direction: Direction) -> Iterator[None]:
        """That host hears nothing ("in"), is not heard ("out"), or both. What was connected stays so, in silence."""
        interface = {"input": "iifname", "output": "oifname"}
        hooks = {"in": ["input"], "out": ["output"], "both": ["input", "output"]}[direction]
        chains = [
            f'chain {hook} {{ type filter hook {hook} priority 0; {interface[hook]} "lo" accept; drop; }}' for hook in hooks
        ]
        _run(*self.on(side), "nft", "table inet chaos {\n" + "\n".join(chains) + "\n}")
        try:
            yield
        finally:
            _run(*self.on(side), "nft", "delete table inet chaos")


def _enter(libc: ctypes.CDLL, namespace: int) -> None:
    if libc.setns(namespace, _CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), "cannot enter the network namespace")


def _run(*words: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{words}: {done.stderr}"
