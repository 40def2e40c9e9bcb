"""Who may say what, by the role of the key they came with.

==========  ==========================================================================================================
admin       everything: what the owner of the cluster has, and every peer on a Unix socket of this user
client      submits tasks, asks and waits; does not end, drain or re-key the cluster, and is no node
node        joins as a node and beats; its tasks' clients submit, as long as it and their worker are there
observer    subscribes to facts; no session at all
==========  ==========================================================================================================
"""

from __future__ import annotations

from ..config import ROLES
from ..protocol import ClientHello, NodeHello

ADMIN, CLIENT, NODE, OBSERVER = ROLES
BEATERS = (ADMIN, NODE)

KEY_GONE = "the key that this side came with was revoked, or replaced and its time is over: get the present connection file"


def role_of(user: str) -> str:
    """Of a User-Id, ``ROLE:NUMBER``. A cluster without keys has none: its sockets are its owner's alone."""
    return user.partition(":")[0] or ADMIN


def objection(user: str, hello: ClientHello | NodeHello) -> str:
    """Why this peer may have no such session; "" if it may, or, being a task's client, may if its node vouches for it."""
    role = role_of(user)
    if role == ADMIN or role == (NODE if isinstance(hello, NodeHello) else CLIENT):
        return ""
    if isinstance(hello, NodeHello):
        return f"a key of the role {role!r} lets no node in: use the cluster's node.json"
    if role == NODE and hello.nested:
        return ""
    return f"a key of the role {role!r} lets no client in: use the cluster's client.json"


def forbidden(role: str, what: str) -> str:
    """Why a client may not say this."""
    return f"a key of the role {role!r} does not allow {what}: that takes the owner's connection.json"
