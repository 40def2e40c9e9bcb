"""What runs at the other end of ``ssh``: shell scripts, fed over standard input.

Rules
-----
* The login shell there may be any (``sh``, ``csh``, ``fish``), and only ever sees :data:`COMMAND`, in which nothing of the
  user's is. The script comes as the first line of input, so neither it nor what is in the environment of a node is on a
  command line.
* A script's own input is a node's: the next line is its connection file, and its end ends the node. What the prologue
  reads is empty, and what it prints goes to standard error.
* Whatever of a node is left is found by ``ZMQSCHED_LAUNCH=TOKEN`` in the environment, which its children inherit.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import stat
from collections.abc import Iterable, Mapping, Sequence
from errno import ECONNREFUSED
from glob import glob
from pathlib import Path
from shlex import quote

from ..clusterfile import BrokerPart, NodeGroup
from ..shell import BROKER_ENVIRONMENT
from .base import node_command
from .reach import LOOPBACK

# No newline, "!" or nested quote, for csh; "read" takes byte by byte, and leaves what follows the line to the script.
COMMAND = """exec sh -c 'IFS= read -r s && eval "$(printf %b "$s")"'"""
MARK = "ZMQSCHED_LAUNCH"
# sun_path has 108 bytes, and a private directory there may not exist: the socket itself is made with mode 0600.
TUNNEL = "/tmp/zmqsched-{token}.{role}"
ROLES = ("work", "beats")

# Reads also on a Python that is too old for the rest.
_PROBE = """
import sys
python, wanted = sys.argv[1:]
found = "%d.%d" % sys.version_info[:2]
if found != python: sys.exit(sys.executable + ": is Python " + found)
try: from zmqsched.version import __version__ as found
except ImportError as error: sys.exit("%s: %s" % (sys.executable, error))
if found != wanted: sys.exit(sys.executable + ": has zmqsched " + found)
"""
_KILLED_AT_ONCE_S, _GIVEN_UP_S = 2, 4


def line(script: str) -> bytes:
    """The script as :data:`COMMAND` reads it."""
    return script.replace("\\", "\\\\").replace("\n", "\\n").encode() + b"\n"


def tunnel_path(token: str, role: str) -> str:
    return TUNNEL.format(token=token, role=role)


def dead_tunnels() -> list[Path]:
    """The ends, on this host, of this user's ways back through connections that are no more."""
    found = []
    for role in ROLES:
        for end in map(Path, glob(tunnel_path("*", role))):
            with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as probe:
                about = end.lstat()
                ours = about.st_uid == os.geteuid() and stat.S_ISSOCK(about.st_mode)
                if ours and probe.connect_ex(str(end)) == ECONNREFUSED:
                    found.append(end)
    return found


def node_script(
    group: NodeGroup, label: str, token: str, python: str, version: str, leftovers: Sequence[tuple[str, int]] = ()
) -> str:
    """Runs the node. ``python``, ``version``: the broker's, as "3.11" and zmqsched's own; ``leftovers``: nodes that were
    here before and may be still, as :func:`sweep_script` takes them."""
    sockets = " ".join(tunnel_path(token, role) for role in ROLES)
    lines = [f"trap 'rm -f {sockets}' EXIT"]  # sshd leaves them
    lines += [_BEGIN, *(_sweeps(leftovers) if leftovers else [])]
    lines += _exports({**group.env, MARK: token})
    lines += [f"cd {path_word(group.cwd)} || {_fail(f'there is no directory {group.cwd} (cwd)')}"] if group.cwd else []
    lines += [*group.prologue, *_choose(group.python, python, version)]
    words = [*node_command(group, label, "-", "python")[1:], "--ready-fd=1"]
    return "\n".join([*lines, _run(map(quote, words))])


def broker_script(part: BrokerPart, options: Sequence[str], python: str, version: str) -> str:
    """Runs a broker with these options and, of ``part``, its journal; if no addresses are given, at the one that this host
    was reached by. ``python``, ``version``: ours, as for :func:`node_script`. Its input is a leash, as a node's is."""
    words = ["-m", "zmqsched", "broker", *map(quote, options), "--until-eof", "--ready-fd=1", "--hand-over"]
    if part.journal is True:
        words.append("--journal")
    elif part.journal:
        words.append(f"--journal={path_word(part.journal)}")
    lines = [_BEGIN, *_exports({**part.env, **BROKER_ENVIRONMENT})]
    if not part.listen:
        lines.append(_REACHED_BY)
        words.append(f'--listen="$address"{f":{part.port}" if part.port else ""}')
    return "\n".join([*lines, *part.prologue, *_choose(part.python, python, version), _run(words)])


# What a login shell may have printed ends its line.
_BEGIN = "exec 3<&0 4>&1 </dev/null 1>&2\necho >&4"
# sshd says from where to where: ADDRESS PORT ADDRESS PORT. An address of a link is of no use elsewhere.
_REACHED_BY = f"""\
address=${{SSH_CONNECTION% *}}; address=${{address##* }}
case $address in
    *%*|"") address={LOOPBACK} ;;
    *:*) address="[$address]" ;;
esac"""


def _exports(variables: Mapping[str, str]) -> list[str]:
    return [f"export {name}={quote(value)}" for name, value in variables.items()]


def _choose(chosen: str, python: str, version: str) -> list[str]:
    """Sets ``$python``, or fails."""
    probe = f'"$python" -c {quote(_PROBE)} {quote(python)} {quote(version)}'
    install = f"install it there (python{python} -m pip install zmqsched=={version})"
    if chosen:
        says = f"{chosen} is not a Python {python} with zmqsched {version}: {install}, or name another one (python)"
        return [f"python={path_word(chosen)}", f"{probe} || {_fail(says)}"]
    says = f"no python3 of its PATH is a Python {python} with zmqsched {version}: {install}, or name one (python)"
    return [SEARCH.format(probe=probe), f'[ "$python" ] || {_fail(says)}']


def _run(words: Iterable[str]) -> str:
    return f'"$python" {" ".join(words)} <&3 >&4 3<&- 4>&-\nexit $?'


def sweep_script(nodes: Sequence[tuple[str, int]]) -> str:
    """Ends what is left of these nodes (token, and the node's pid or 0) on a host. Exit code 3: something could not be
    killed."""
    return "\n".join([*_sweeps(nodes), 'exit "$stuck"'])


def _sweeps(nodes: Sequence[tuple[str, int]]) -> list[str]:
    return [_SWEEP, *(f"sweep {quote(token)} {pid}" for token, pid in nodes)]


# First the node alone: its nursery then ends what has left the session or the environment of the tasks.
_SWEEP = f"""
stuck=0
left() {{ grep -lsF "{MARK}=$1" /proc/[0-9]*/environ; }}
sweep() {{
    n=0
    while found=$(left "$1"); [ "$found" ]; do
        [ $n -lt {_GIVEN_UP_S}0 ] || {{ stuck=3; break; }}
        for file in $found; do
            pid=${{file#/proc/}}; pid=${{pid%/environ}}
            if [ $n -ge {_KILLED_AT_ONCE_S}0 ] || [ "$pid" = "$2" ] || [ "$2" = 0 ]; then kill -9 "$pid"; fi
        done
        n=$((n + 1)); sleep 0.1
    done
    rm -f {TUNNEL.format(token='"$1"', role="*")}
}}
"""
SEARCH = """
ifs=$IFS; IFS=:; set -f
python=
for directory in $PATH; do
    python=$directory/python3
    [ -x "$python" ] && {probe} && break
    python=
done
IFS=$ifs; set +f"""


def _fail(error: str) -> str:
    answer = json.dumps({"error": error, "type": "StartError"})
    return f"{{ echo {quote(answer)} >&4; exit 1; }}"


def path_word(path: str) -> str:
    """As a word, in which "~" is the home directory there."""
    home, _, rest = path.partition("/")
    return f'"$HOME"/{quote(rest)}' if home == "~" else quote(path)
