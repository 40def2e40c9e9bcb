"""At which addresses of this host nodes elsewhere can reach it: those by which it reaches them."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterable
from ipaddress import ip_address

LOOPBACK = "127.0.0.1"
# Of the networks for documentation, so nobody's: the route to them is the one to everywhere. No packet is sent.
_SOMEWHERE = ("192.0.2.1", "2001:db8::1")
_DISCARD_PORT = 9


def own_addresses(hosts: Iterable[str] = ()) -> list[str]:
    """The addresses of this host on the way to these; where a name means nothing here (ssh may know it), or none is given,
    on the way to everywhere. Loopback only if there is nothing else."""
    found: dict[str, None] = {}
    for host in dict.fromkeys(hosts):
        found.update(dict.fromkeys(_towards(host.rpartition("@")[2]) or _towards_everywhere()))
    if not found:
        found.update(dict.fromkeys(_towards_everywhere()))
    # One of a link is of no use without the interface's name, which is another on each host.
    return [one for one in found if not ip_address(one).is_loopback and not ip_address(one).is_link_local] or [LOOPBACK]


def _towards_everywhere() -> list[str]:
    return [address for somewhere in _SOMEWHERE for address in _towards(somewhere)][:1]


def _towards(host: str) -> list[str]:
    """Which address the kernel would send from."""
    with contextlib.suppress(OSError, UnicodeError):  # neither a name nor an address, or no route
        for family, kind, _, _, address in socket.getaddrinfo(host, _DISCARD_PORT, type=socket.SOCK_DGRAM):
            with contextlib.suppress(OSError), socket.socket(family, kind) as probe:
                probe.connect(address)
                return [str(probe.getsockname()[0])]
    return []
