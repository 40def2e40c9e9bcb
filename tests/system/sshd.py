"""Hosts for tests: each is a real sshd with a host name, a directory of clusters and, if it is to be apart, a network of its
own. They share this machine's files and processes, but nothing here or there is found by that.

Needs root, and ``sshd``, ``ip`` and ``unshare`` (Debian: openssh-server, iproute2, util-linux). Nothing of it touches this
machine's own ssh: keys, configuration and known hosts lie in the directory given.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

import psutil
import pytest
from conftest import Home, eventually

from zmqsched.launch.remote import dead_tunnels

HERE = "10.111.9.1"
SSHD = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
_CLONE_NEWNET = 0x40000000  # <sched.h>
_PORTS = range(20_000, 30_000)


def why_not() -> str:
    """What is missing on this machine; "" if nothing is."""
    if os.geteuid() != 0:
        return "hosts of one's own need root"
    missing = [program for program in ("ssh", "ssh-keygen", "ip", "unshare") if shutil.which(program) is None]
    missing += [] if SSHD else ["sshd"]
    return f"needs {', '.join(missing)} (Debian: openssh-server, iproute2)" if missing else ""


# Of each module that has hosts of its own.
MARKS = [pytest.mark.system, pytest.mark.skipif(bool(why_not()), reason=why_not())]


class Host:
    """``home``: its directory of clusters, which all that is started there has in its environment."""

    def __init__(self, hosts: Hosts, name: str, address: str, shell: str, options: Mapping[str, str]) -> None:
        self.name = name
        self.address = address
        self.home = Home()
        self._hosts = hosts
        self._shell = shell
        self._options = options
        self._log = hosts.directory / f"{name}.log"
        self._namespace = f"zs{os.getpid()}{name}" if address else ""
        self._cable = f"c{len(hosts.hosts)}"
        self.key = hosts.keygen(f"{name}.hostkey")
        self.port = 22
        if address:
            self._connect()
            self.begin()
            return
        for port in hosts.ports:  # one may be another's
            self.port = port
            with contextlib.suppress(AssertionError):
                self.begin()
                return

    def begin(self) -> None:
        """Its sshd starts."""
        self._configure()
        self._log.unlink(missing_ok=True)
        inside = ["ip", "netns", "exec", self._namespace] if self._namespace else []
        start = f"hostname {self.name} && exec {SSHD} -D -e -f {self._hosts.directory}/{self.name}.sshd"
        with self._log.open("wb") as log:
            self._sshd = subprocess.Popen(
                [*inside, "unshare", "--uts", "sh", "-c", start], stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        eventually(lambda: "Server listening" in self.log() or self._sshd.poll() is not None)
        assert self._sshd.poll() is None, self.log()

    def end(self) -> None:
        """Its sshd, and all its sessions, are gone, as when the host is switched off; what they have started is not."""
        sessions = psutil.Process(self._sshd.pid).children(recursive=True) if self._sshd.poll() is None else []
        for process in [*(session for session in sessions if session.name() == "sshd"), self._sshd]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self._sshd.wait()

    def close(self) -> None:
        self.end()
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.home.remove()
        if self._namespace:
            run("ip", "netns", "delete", self._namespace)

    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def processes(self) -> dict[int, str]:
        """What runs there, by pid, without sshd."""
        found = self.home.processes()
        if self._namespace:
            pids = run("ip", "netns", "pids", self._namespace).split()
            for pid in map(int, pids):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process = psutil.Process(pid)
                    if process.name() != "sshd" and process.status() != psutil.STATUS_ZOMBIE:
                        found[pid] = " ".join(process.cmdline())
        return found

    @contextlib.contextmanager
    def cut_off(self) -> Iterator[None]:
        """Its cable is out."""
        self.cable("down")
        try:
            yield
        finally:
            self.cable("up")

    def cable(self, state: str) -> None:
        run("ip", "-n", self._hosts.here, "link", "set", self._cable, state)

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """Its sshd takes connections, and says nothing."""
        os.kill(self._sshd.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(self._sshd.pid, signal.SIGCONT)

    @contextlib.contextmanager
    def firewall(self) -> Iterator[None]:
        """Port 22 is all that passes, and only from outside."""
        rules = ["tcp dport 22 accept", "tcp sport 22 accept"]
        chains = [
            f"chain {hook} {{ type filter hook {hook} priority 0; {name} lo accept; {rule}; drop; }}"
            for hook, name, rule in zip(("input", "output"), ("iifname", "oifname"), rules, strict=True)
        ]
        inside = ["ip", "netns", "exec", self._namespace]
        run(*inside, "nft", "table inet wall {\n" + "\n".join(chains) + "\n}")
        try:
            yield
        finally:
            run(*inside, "nft", "delete table inet wall")

    def _connect(self) -> None:
        here, there = self._hosts.here, self._namespace
        run("ip", "netns", "add", there)
        run("ip", "link", "add", self._cable, "netns", here, "type", "veth", "peer", "name", "cable", "netns", there)
        run("ip", "-n", here, "link", "set", self._cable, "master", "switch", "up")
        run("ip", "-n", there, "addr", "add", f"{self.address}/24", "dev", "cable")
        run("ip", "-n", there, "link", "set", "cable", "up")
        run("ip", "-n", there, "link", "set", "lo", "up")

    def _configure(self) -> None:
        options = {
            "ListenAddress": f"{self.address or '127.0.0.1'}:{self.port}",
            "HostKey": self.key,
            "AuthorizedKeysFile": self._hosts.key.with_suffix(".pub"),
            "SetEnv": f"ZMQSCHED_DIR={self.home.path}",
        } | dict.fromkeys(
            ("StrictModes", "UsePAM", "PasswordAuthentication", "KbdInteractiveAuthentication", "UseDNS", "PrintMotd"), "no"
        )
        options |= {"PidFile": "none", **self._options}
        if self._shell:  # as if it were the user's login shell: it alone sees the command
            options["ForceCommand"] = f'exec {self._shell} -c "$SSH_ORIGINAL_COMMAND"'
        text = "".join(f"{name} {value}\n" for name, value in options.items())
        (self._hosts.directory / f"{self.name}.sshd").write_text(text)


class Hosts:
    """``config``: for ``ssh -F``; ``options``: with it, and with patience for a busy machine. ``here``: the network
    namespace from which hosts that are apart can be reached."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.hosts: list[Host] = []
        self.config = directory / "ssh_config"
        self.options = ("-F", str(self.config), "-o", "ConnectTimeout=8")
        self.key = self.keygen("key")
        self.own: dict[str, str] = {}  # what else the user has in ssh_config
        self.ports = iter([_PORTS[(os.getpid() * 7 + number) % len(_PORTS)] for number in range(100)])
        self.here = ""
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # Debian's own script makes it, where sshd is a service
        self._write()

    def __enter__(self) -> Hosts:
        return self

    def __exit__(self, *_: object) -> None:
        for host in self.hosts:
            host.close()
        if self.here:
            run("ip", "netns", "delete", self.here)

    def add(
        self, name: str, *, apart: bool = False, shell: str = "", options: Mapping[str, str] = MappingProxyType({})
    ) -> Host:
        """A host that is a port of this machine's loopback interface, or apart, with an address of its own. ``shell``: the
        login shell there; ``options``: for ``sshd_config``."""
        if apart and not self.here:
            self.here = f"zs{os.getpid()}here"
            run("ip", "netns", "add", self.here)
            run("ip", "-n", self.here, "link", "add", "switch", "type", "bridge")
            run("ip", "-n", self.here, "addr", "add", f"{HERE}/24", "dev", "switch")
            for link in ("switch", "lo"):
                run("ip", "-n", self.here, "link", "set", link, "up")
        address = f"10.111.9.{10 + len(self.hosts)}" if apart else ""
        host = Host(self, name, address, shell, options)
        self.hosts.append(host)
        self._write()
        return host

    def keygen(self, name: str) -> Path:
        path = self.directory / name
        run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", name, "-f", str(path))
        return path

    def knows(self, host: Host, key: Path) -> None:
        """What is in the list of known hosts is this key."""
        known = self.directory / "known_hosts"
        lines = known.read_text().splitlines() if known.exists() else []
        lines = [line for line in lines if line.split()[0] != host.name]
        kind, public, *_ = key.with_suffix(key.suffix + ".pub").read_text().split()
        known.write_text("\n".join([*lines, f"{host.name} {kind} {public}"]) + "\n")

    def on(self) -> list[str]:
        """The words before a command that is to run here."""
        return ["ip", "netns", "exec", self.here] if self.here else []

    @contextlib.contextmanager
    def inside(self) -> Iterator[None]:
        """This thread, and every thread, process and socket that it makes meanwhile, is where the hosts can be reached."""
        libc = ctypes.CDLL(None, use_errno=True)
        with contextlib.ExitStack() as stack:
            home, there = (
                stack.enter_context(open(path, "rb")) for path in ("/proc/thread-self/ns/net", f"/run/netns/{self.here}")
            )
            assert libc.setns(there.fileno(), _CLONE_NEWNET) == 0, os.strerror(ctypes.get_errno())
            try:
                yield
            finally:
                assert libc.setns(home.fileno(), _CLONE_NEWNET) == 0, os.strerror(ctypes.get_errno())

    def _write(self) -> None:
        blocks = []
        for host in self.hosts:
            place = f"HostName {host.address or '127.0.0.1'}\n  Port {host.port}\n  HostKeyAlias {host.name}"
            blocks.append(f"Host {host.name}\n  {place}\n")
            self.knows(host, host.key)
        common = {
            **self.own,
            "UserKnownHostsFile": self.directory / "known_hosts",
            "GlobalKnownHostsFile": "/dev/null",
            "IdentityFile": self.key,
            "IdentityAgent": "none",
            "IdentitiesOnly": "yes",
            "User": "root",
        }
        text = "Host *\n" + "".join(f"  {name} {value}\n" for name, value in common.items())
        self.config.write_text("".join(blocks) + text)


@contextlib.contextmanager
def checked_hosts() -> Iterator[Hosts]:
    """Hosts on which nothing may be left."""
    before = set(dead_tunnels())
    with tempfile.TemporaryDirectory(prefix="zsh", dir="/tmp") as path, Hosts(Path(path)) as hosts:
        yield hosts
        eventually(lambda: set(dead_tunnels()) <= before)
        for host in hosts.hosts:
            eventually(lambda host=host: not host.processes())
            assert host.home.files() == set()


def run(*words: str) -> str:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{words}: {done.stderr}"
    return done.stdout


