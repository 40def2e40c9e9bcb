"""The way to another host and back, hop by hop, as nodes that are launched by ``ssh`` take it (``zmqsched doctor HOSTS``).

Each hop needs those before it, so the first that fails is the last that is looked at. What is asked there first runs on any
Python 3; the rest is ``doctor.py``, run there.
"""

from __future__ import annotations

import json
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from shlex import quote
from typing import Any, NamedTuple

import msgspec

from .config import ConnectionFile
from .doctor import LIBRARIES, Finding, listening, no_way_back
from .launch import remote, ssh
from .version import PYTHON, __version__

REACH_TIMEOUT_S = 4.0
ANSWER_TIMEOUT_S = 30.0
# Clocks of hosts that keep time differ by less. Nothing of ours compares them; people who read logs do.
CLOCKS_DIFFER_S = 1.0

_ASK = """
import json, os, sys, time
libraries = {}
try:
    from importlib.metadata import version
    for name in sys.argv[1:]:
        try: libraries[name] = version(name)
        except ImportError: pass
    from zmqsched.version import __version__
    libraries["zmqsched"] = __version__
except ImportError: pass
client = os.environ.get("SSH_CONNECTION", "").split(" ")[0]
print(json.dumps({"python": "%d.%d.%d" % sys.version_info[:3], "executable": sys.executable, "libraries": libraries,
                  "client": client, "time": time.time()}))
"""
# The first python3 with zmqsched, else the first.
_HAS = "\"$python\" -c 'import zmqsched' 2>/dev/null"
_PYTHON = remote.SEARCH.format(probe=_HAS) + '\n[ "$python" ] || python=python3'


class Hop(NamedTuple):
    """How to get to a host. ``python``: the interpreter there, "" to look for one."""

    host: str
    ssh_options: tuple[str, ...] = ()
    python: str = ""


class _Failed(Exception):
    """A hop failed; ``args`` is the finding."""


def look_at(hop: Hop, cluster: ConnectionFile | None) -> Iterator[Finding]:
    """``cluster``: one whose broker the host is to reach; without one, some port of this machine."""
    try:
        yield from _connection(hop)
        there, here = _ask(hop), time.time()
        yield Finding("authenticate", "ok", "ssh logs in without asking")
        if there is None:
            fix = "install Python and zmqsched there, or name the interpreter (--python)"
            raise _Failed(Finding("versions", "failed", f"no {hop.python or 'python3'} that works", fix))
        yield from _versions(there)
        yield _clock(there["time"] - here)
        addresses = _tcp(cluster) if cluster is not None else []
        with listening(there["client"]) as mine:
            yield from _there(hop, there["executable"], addresses or mine)
            if not (addresses or mine):
                yield no_way_back(f"sees this machine as {there['client'] or 'nobody'}, which is no address of its own")
    except _Failed as failed:
        yield failed.args[0]


def _connection(hop: Hop) -> Iterator[Finding]:
    """To the port that ssh will connect to, unless it goes by another way."""
    words = [*ssh.ssh_words(hop.ssh_options), "-G", "--", hop.host]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=ANSWER_TIMEOUT_S, check=False)
    except FileNotFoundError:
        raise _Failed(Finding("resolve", "failed", "there is no ssh here", "install OpenSSH's client")) from None
    except subprocess.TimeoutExpired:
        raise _Failed(Finding("resolve", "failed", "ssh -G does not answer", "look at ~/.ssh/config")) from None
    if done.returncode:
        raise _Failed(Finding("resolve", "failed", _last_line(done.stderr), "correct ~/.ssh/config, or the option"))
    settings = dict(line.partition(" ")[::2] for line in done.stdout.splitlines())
    for name in ("proxyjump", "proxycommand"):
        if (way := settings.get(name, "none")) != "none":
            yield Finding("resolve", "ok", f"left to {name} {way}")
            return
    name, port = settings["hostname"], int(settings["port"])
    try:
        address = str(socket.getaddrinfo(name, port, type=socket.SOCK_STREAM)[0][4][0])
    except (OSError, UnicodeError) as error:
        fix = "correct the name, or say in ~/.ssh/config which address it means (HostName)"
        raise _Failed(Finding("resolve", "failed", f"{name}: {_reason(error)}", fix)) from None
    yield Finding("resolve", "ok", f"{name} is {address}")
    try:
        socket.create_connection((address, port), timeout=REACH_TIMEOUT_S).close()
    except OSError as error:
        fix = "is it up, does an sshd run there on that port (Port in ~/.ssh/config), does a firewall let it through?"
        raise _Failed(Finding("reach", "failed", f"{address} port {port}: {_reason(error)}", fix)) from None
    yield Finding("reach", "ok", f"port {port}")


def _ask(hop: Hop) -> dict[str, Any] | None:
    """What a Python there says of itself; None if there is none."""
    python = f"python={remote.path_word(hop.python)}" if hop.python else _PYTHON
    return _run(hop, f'{python}\nexec "$python" -c {quote(_ASK)} {" ".join(LIBRARIES)}', "authenticate")


def _versions(there: dict[str, Any]) -> Iterator[Finding]:
    python, libraries = there["python"], there["libraries"]
    listed = ", ".join(f"{name} {number}" for name, number in libraries.items())
    found = f"Python {python} ({there['executable']}), {listed or 'none of the libraries'}"
    fix = f"install there: python{PYTHON} -m pip install zmqsched=={__version__}; or name another interpreter (--python)"
    if python.rpartition(".")[0] != PYTHON:
        raise _Failed(Finding("versions", "failed", f"{found}: tasks need Python {PYTHON}, as here", fix))
    if libraries.get("zmqsched") != __version__:
        raise _Failed(Finding("versions", "failed", f"{found}: zmqsched {__version__} is needed, as here", fix))
    if missing := [name for name in LIBRARIES if name not in libraries]:
        raise _Failed(Finding("versions", "failed", f"{found}: {', '.join(missing)} not found", fix))
    other = [f"{name} {version(name)}" for name in LIBRARIES if libraries[name] != version(name)]
    yield Finding("versions", "ok", f"{found}; here {', '.join(other)}" if other else found)


def _clock(offset_s: float) -> Finding:
    """Only to be known: nothing here compares clocks of hosts."""
    if abs(offset_s) < CLOCKS_DIFFER_S:
        return Finding("clock", "ok", "as here")
    ahead = "ahead of" if offset_s > 0 else "behind"
    return Finding("clock", "ok", f"{abs(offset_s):,.0f} s {ahead} the one here: no harm to tasks, but to who reads logs")


def _tcp(cluster: ConnectionFile) -> list[str]:
    return [address for address in cluster.addresses.work if address.startswith("tcp://")]


def _there(hop: Hop, python: str, addresses: Sequence[str]) -> Iterator[Finding]:
    """That host's own findings, and whether it reaches one of the addresses."""
    words = [python, "-m", "zmqsched", "doctor", *(f"--reach={address}" for address in addresses or [""])]
    answer = _run(hop, f"exec {' '.join(map(quote, words))}", "doctor")
    if answer is None:
        raise _Failed(Finding("doctor", "failed", "zmqsched doctor does not work there", f"ssh {hop.host} zmqsched doctor"))
    yield from msgspec.convert(answer["findings"], list[Finding])


def _run(hop: Hop, script: str, name: str) -> dict[str, Any] | None:
    """The JSON object that a script there prints as its last line; None if it does not."""
    words = [*ssh.ssh_words(hop.ssh_options), "--", hop.host, remote.COMMAND]
    try:
        done = subprocess.run(
            words, input=remote.line(script), capture_output=True, timeout=ANSWER_TIMEOUT_S, check=False,
            env=ssh.environment(),
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        what = f"no answer within {ANSWER_TIMEOUT_S:.0f} s"
        raise _Failed(Finding(name, "failed", what, f"try it by hand: ssh {hop.host} true")) from None
    said = done.stderr.decode(errors="replace")
    if done.returncode == ssh.NOT_CONNECTED:
        raise _Failed(Finding(name, "failed", _last_line(said), ssh.fix_of(said, hop.host)))
    try:
        answer = json.loads(_last_line(done.stdout.decode(errors="replace")))
    except ValueError:
        return None
    return answer if isinstance(answer, dict) else None


def _last_line(text: str) -> str:
    return next((line for line in reversed(text.splitlines()) if line.strip()), "it says nothing").strip()


def _reason(error: Exception) -> str:
    return (isinstance(error, OSError) and error.strerror) or str(error)
