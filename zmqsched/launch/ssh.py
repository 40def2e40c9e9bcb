"""Nodes on other hosts, through the system's ``ssh``: port 22 is all it needs.

Rules
-----
* OpenSSH does what it does for the user: ``~/.ssh/config``, agents, jump hosts, known hosts. It never asks anything.
* The remote's standard input is ours: it ends when this process does, however that ends, and with it the node
  (``remote.py``). When the connection breaks, sshd ends it; when the network is just gone, the node ends by itself after a
  while without a word from the broker.
* Each connection offers the node a way back to the broker's sockets for work and beats, and no other: a private Unix socket
  there (``ssh -R``), which leads to the broker's TCP sockets, so CURVE is spoken from end to end. The node takes it when it
  reaches none of the broker's addresses, and says so.
* A node is gone when ``ssh`` has brought its exit code. Where it has not (the connection broke, or the node hung), a second
  ``ssh`` ends what is left of it there, before anything takes its place.
* When the connection to a node breaks, its host is tried again, with pauses that grow, for as long as the node is wanted.
  What is left there works on for the broker until then, if it reaches it; then another node takes its place.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import subprocess
import time
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from ipaddress import ip_address
from itertools import cycle
from random import uniform
from shlex import join

import msgspec

from .. import sockets
from ..clusterfile import NodeGroup
from ..config import TUNNEL_SCHEME, Addresses, ConnectionFile, split_tcp
from ..errors import BrokerUnreachable, StartError, ZmqschedError
from ..shell import log
from ..version import PYTHON, __version__
from . import remote
from .base import Launched, Launcher, Site
from .children import STOP_TIMEOUT_S, Children, running

# That a host is down, or does not say who it is, is to be known within 5 s, also where this one is busy.
CONNECT_TIMEOUT_S = 3
# A network that is gone for half a minute should be found as it was left.
ALIVE_INTERVAL_S, ALIVE_COUNT = 10, 3
SWEEP_TIMEOUT_S = 12.0
# What ssh says when sshd has more connections being made than it may (MaxStartups: of the eleventh on it drops some).
BUSY, MAX_TRIES = "kex_exchange_identification", 6
LONGEST_PAUSE_S = 20.0
MAX_FIRST = 60_000  # bytes; a pipe takes some more without anybody reading
# The user's own (``ssh_options``) come before these, and of each the first counts.
OPTIONS = {
    "BatchMode": "yes",
    "ConnectTimeout": CONNECT_TIMEOUT_S,
    "ServerAliveInterval": ALIVE_INTERVAL_S,
    "ServerAliveCountMax": ALIVE_COUNT,
    "ControlMaster": "no",  # one that is there is used; one that is made here would outlive us
    "LogLevel": "INFO",  # what goes wrong is to be told
    "RemoteCommand": "none",
    "RequestTTY": "no",
    "ForwardAgent": "no",
    "ForwardX11": "no",
    "ExitOnForwardFailure": "no",  # most nodes need no way back
}
NOT_CONNECTED = 255  # ssh's own exit code; all others are the remote's
_FIXES = (
    (
        "REMOTE HOST IDENTIFICATION HAS CHANGED|host key for .* has changed",
        "its key is not the one that it had: if you know why, forget the old one (ssh-keygen -R {host})",
    ),
    ("Host key verification failed", "its key is not known here: log in once by hand (ssh {host}) and look at it"),
    ("Permission denied", "it takes none of your keys: ssh-copy-id {host}, or ssh-add, or IdentityFile in ~/.ssh/config"),
    ("Could not resolve hostname", "no such host: correct the name, or say in ~/.ssh/config which address it means"),
    ("Connection refused", "no sshd answers there: is it another port? (Port in ~/.ssh/config)"),
    ("during banner exchange", "its sshd is slow: give it longer (ssh_options: -o ConnectTimeout=20)"),
    ("timed out|No route to host|is unreachable", "is it up, and does a firewall let port 22 through?"),
    ("not responding|Broken pipe|reset by peer|closed by remote", "the connection broke; what ran there runs elsewhere"),
)


@dataclass(frozen=True)
class _Remote:
    """Where a label's node was started last. ``token``: by which what is left of it is found there; ``tries``: how often
    it was tried to connect; ``lost``: how the connection to the one before it broke; ``ends``: the tokens of those that may
    be left there, and are ended first."""

    host: str
    token: str
    tries: int = 1
    lost: str = ""
    ends: frozenset[str] = frozenset()

    @property
    def tunnel(self) -> str:
        """What a node that came back through it has as the broker's address."""
        return f"ipc://{remote.tunnel_path(self.token, 'work')}"


class SSHLauncher(Launcher):
    """One node on each of the group's hosts; more, in turn, when there are more nodes than hosts."""

    def __init__(self, group: NodeGroup, site: Site) -> None:
        super().__init__(group, site)
        self._children = Children(site.wake, echo=site.echo)
        self._file: ConnectionFile  # as it was when nodes were last started
        self._targets: dict[str, str]
        self._remotes: dict[str, _Remote] = {}
        self._left: dict[_Remote, int] = {}  # what may be left of nodes whose connection broke: their pids, 0 if unknown
        self._due: dict[str, float] = {}  # by token: when to try again
        self._sweepers: dict[str, tuple[subprocess.Popen[str], frozenset[str]]] = {}  # by host: who ends which tokens there
        self._sweep_at = 0.0
        self._told: set[str] = set()  # tokens of nodes of which was said that they come back through ssh

    def start(self, labels: Sequence[str]) -> None:
        self._look_for_broker()
        self._note_left(self._remotes)
        busy = Counter(self._remotes[one.label].host for one in self.poll() if one.state != "ended")
        for label in labels:
            host = min(self.group.hosts, key=lambda host: busy[host])  # of equals the first
            busy[host] += 1
            self._connect(label, host)

    def poll(self) -> list[Launched]:
        self._sweep_again()
        return [self._again(one) or one for one in map(self._worded, self._children.poll())]

    def stop(self, labels: Collection[str], *, at_once: bool = False) -> None:
        hosts = {self._remotes[label].host for label in labels if label in self._remotes}
        self._end(labels, at_once=at_once)
        self._sweep(hosts)

    def close(self) -> None:
        for process, _ in self._sweepers.values():
            process.kill()
            process.communicate()
        self._sweepers = {}
        try:
            self._end(list(self._remotes))
            self._sweep({there.host for there in self._left})
        finally:
            self._children.close()

    def preview(self, labels: Sequence[str]) -> list[str]:
        lines = []
        targets = {role: f"BROKER:{role.upper()}" for role in remote.ROLES}
        for label, host in zip(labels, cycle(self.group.hosts), strict=False):
            there = _Remote(host, "TOKEN")
            script = remote.node_script(self.group, label, there.token, PYTHON, __version__)
            lines += [f"# {label}, fed over standard input, and behind it the connection file:"]
            lines += [f"#   {text}" for text in script.splitlines()]
            lines += [join(self._command(there, targets))]
        return lines

    # --- starting -----------------------------------------------------------------------------------------------------

    def _look_for_broker(self) -> None:
        self._file = self.site.file
        self._targets = _targets(self._file)

    def _connect(self, label: str, host: str, tries: int = 1, lost: str = "") -> None:
        left = self._left_on([host])
        there = _Remote(host, secrets.token_hex(8), tries, lost, frozenset(token for token, _ in left))
        script = remote.node_script(self.group, label, there.token, *_versions(self._file), left)
        first = remote.line(script) + _with_tunnels(self._file, there.token).line()
        if len(first) > MAX_FIRST:
            raise StartError(f"{label}: environment and prologue are over {MAX_FIRST} bytes; put them into a file there")
        command = self._command(there, self._targets)
        self._children.start(label, command, self.site.log_path(label), environment(), first=first, where=host)
        self._remotes[label] = there

    def _again(self, one: Launched) -> Launched | None:
        """How one is that is tried again in a while: sshd did not want to talk to it, or the connection to it broke. None
        for all others."""
        there = self._remotes[one.label]
        child = self._children[one.label]
        if one.state != "ended" or child.code() != NOT_CONNECTED:
            return None
        was_there = "node" in child.facts
        busy = not child.spoke and BUSY in child.tail and there.tries < MAX_TRIES
        if not (was_there or there.lost or busy):
            return None
        tries = 1 if was_there else there.tries
        pause_s = uniform(0.5, 1.0) * min(tries, LONGEST_PAUSE_S)
        if time.monotonic() >= self._due.setdefault(there.token, time.monotonic() + pause_s):
            del self._due[there.token]
            self._note_left([one.label])
            with contextlib.suppress(ZmqschedError):  # the broker is being replaced, or there is no ssh: tried again, too
                self._look_for_broker()
                self._connect(one.label, there.host, tries + 1, one.why if was_there else there.lost)
        return replace(one, state="starting", node="", why=one.why if was_there else there.lost)

    def _command(self, there: _Remote, targets: Mapping[str, str]) -> list[str]:
        words = ssh_words(self.group.ssh_options)
        for role, target in targets.items():
            words += ["-R", f"{remote.tunnel_path(there.token, role)}:{target}"]
        return [*words, "--", there.host, remote.COMMAND]

    def _worded(self, one: Launched) -> Launched:
        there = self._remotes[one.label]
        child = self._children[one.label]
        where = there.host
        if one.state == "running":
            self._left = {left: pid for left, pid in self._left.items() if left.token not in there.ends}
        elif one.state == "starting":
            one = replace(one, why=there.lost)
        if child.facts.get("broker") == there.tunnel:
            where += ", back through ssh -R"
            if there.token not in self._told:
                self._told.add(there.token)
                log.warning("%s on %s reaches the broker through ssh only, which is slower", one.label, there.host)
        why = one.why if one.state == "starting" else one.why and f"{there.host}: {one.why}"
        fix = fix_of(child.tail, there.host) if child.code() == NOT_CONNECTED else ""
        if child.facts.get("type") == "BrokerUnreachable" and "forwarding failed" in child.tail:
            fix = "sshd forbids the way back: allow it (AllowStreamLocalForwarding), or open the broker's ports to this host"
        if why and fix:
            why += f"\n{fix}"
        return replace(one, why=why, where=where)

    # --- ending -------------------------------------------------------------------------------------------------------

    def _end(self, labels: Collection[str], *, at_once: bool = False) -> None:
        """As far as their own connections can. What is no node yet has nothing to finish."""
        labels = [label for label in labels if label in self._remotes]
        children = [self._children[label] for label in labels]
        for child in children:
            child.close_input()
        if not at_once:
            running([child for child in children if "node" in child.facts], STOP_TIMEOUT_S)
        self._note_left(labels, ended=False)
        self._children.stop(labels, at_once=True)
        for label in labels:
            del self._remotes[label]

    def _note_left(self, labels: Iterable[str], *, ended: bool = True) -> None:
        """Remember the nodes of which ``ssh`` has not said that they have ended. ``ended``: of those only where it has ended
        itself."""
        for label in labels:
            child = self._children[label]
            code = child.code()
            begun = child.spoke
            if begun and (not ended if code is None else code < 0 or code == NOT_CONNECTED):
                self._left[self._remotes[label]] = int(child.facts.get("pid", 0))

    def _left_on(self, hosts: Collection[str]) -> list[tuple[str, int]]:
        return [(there.token, pid) for there, pid in self._left.items() if there.host in hosts]

    def _sweep(self, hosts: Iterable[str]) -> None:
        """End what may be left of nodes on these hosts, by a connection of its own to each.

        Raises
        ------
        StartError
            It cannot be, or a host cannot be reached; names them.
        """
        started = [(host, self._sweeper(host, nodes)) for host in hosts if (nodes := self._left_on([host]))]
        until = time.monotonic() + SWEEP_TIMEOUT_S
        failed = []
        for host, process in started:
            with process:
                try:
                    _, said = process.communicate(timeout=max(0.0, until - time.monotonic()))
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
                    said = f"no answer in {SWEEP_TIMEOUT_S:g} s"
            if process.returncode:
                failed.append(f"{host} ({said.strip() or 'it cannot be killed'})")
            else:
                self._left = {there: pid for there, pid in self._left.items() if there.host != host}
        if failed:
            raise StartError(
                f"nodes may be left on {', '.join(failed)}; they end by themselves a minute after the broker did"
            )

    def _sweep_again(self) -> None:
        """What nobody could end, for its host did not answer, is ended when it does: here, or by who is started there."""
        for host, (process, tokens) in list(self._sweepers.items()):
            if process.poll() is not None:
                process.communicate()
                del self._sweepers[host]
                if process.returncode == 0:
                    self._left = {there: pid for there, pid in self._left.items() if there.token not in tokens}
        used = {
            there.host for label, there in self._remotes.items() if self._children[label].code() in (None, NOT_CONNECTED)
        }
        hosts = {there.host for there in self._left} - used - self._sweepers.keys()
        if hosts and time.monotonic() >= self._sweep_at:
            self._sweep_at = time.monotonic() + LONGEST_PAUSE_S
            for host in hosts:
                nodes = self._left_on([host])
                self._sweepers[host] = self._sweeper(host, nodes), frozenset(token for token, _ in nodes)

    def _sweeper(self, host: str, nodes: Sequence[tuple[str, int]]) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            self._command(_Remote(host, ""), {}), stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            start_new_session=True, env=environment(), text=True, errors="replace",
        )  # fmt: skip
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it could not connect; why, it is about to say
            process.stdin.write(remote.line(remote.sweep_script(nodes)).decode())
            process.stdin.flush()
        return process


def ssh_words(options: Sequence[str]) -> list[str]:
    """``ssh`` with the user's own options, and ours."""
    return ["ssh", *options, *(word for name, value in OPTIONS.items() for word in ("-o", f"{name}={value}"))]


def fix_of(said: str, host: str) -> str:
    """What to do about an ``ssh`` that could not connect, by its own words; "" if that is not known."""
    return next((fix.format(host=host) for pattern, fix in _FIXES if re.search(pattern, said)), "")


def environment() -> dict[str, str]:
    """Nobody is to be asked for a password, in a window least of all, by a jump host's ssh neither."""
    return {**os.environ, "SSH_ASKPASS_REQUIRE": "never"}


def _versions(file: ConnectionFile) -> tuple[str, str]:
    """What the broker runs: the minor version of Python, and zmqsched."""
    return ".".join(file.python.split(".")[:2]), file.zmqsched


def _targets(file: ConnectionFile) -> dict[str, str]:
    """Where the ways back lead: for each role the address of the broker, as seen from here; where it is reached by a tunnel,
    that one's end."""
    found = {}
    for role in remote.ROLES:
        addresses = [address for address in getattr(file.addresses, role) if not address.startswith("ipc://")]
        if not addresses:
            raise StartError(
                f"the broker of cluster {file.name!r} has Unix sockets only, which other hosts have not: "
                "start it with --listen (loopback is enough for ssh)"
            )
        try:
            found[role] = sockets.pick_address(addresses).removeprefix("tcp://").removeprefix(TUNNEL_SCHEME)
        except BrokerUnreachable as error:
            raise StartError(str(error)) from None
    return found


def _with_tunnels(file: ConnectionFile, token: str) -> ConnectionFile:
    """What a node is given: the addresses that may mean the broker on another host, then the way back."""
    ways = {
        role: [address for address in getattr(file.addresses, role) if not _means_nothing(address)]
        + [f"{TUNNEL_SCHEME}{remote.tunnel_path(token, role)}"]
        for role in remote.ROLES
    }
    return msgspec.structs.replace(file, addresses=Addresses(**ways, status=file.addresses.status))


def _means_nothing(address: str) -> bool:
    """On another host than this one."""
    return address.startswith(TUNNEL_SCHEME) or is_loopback(address)


def is_loopback(address: str) -> bool:
    return address.startswith("tcp://") and ip_address(split_tcp(address)[0]).is_loopback
