"""What somebody wants to become of a node: that it drains, retires, pauses or resumes.

Rules
-----
* A node is named by its id or by what its launcher calls it; of several so called it is the newest.
* The broker gives the node nothing from here on, and tells it; the node does the rest, at any broker: it says in its hello
  that it is paused, and behind it that it drains.
* What a paused or draining node has not started: paused, it hands that back; draining, it does it. What waits there
  for tasks of its own must not wait for ever, so these are taken (``Node.takes_nested``).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from ..protocol import Command, CommandDone, Message, Pause, Stop, clipped
from .book import Book
from .nodes import ALIVE, DRAINING, PAUSED, SUSPECT, Node
from .sessions import Session

MAX_REPLACED = 1_000  # nodes that others have replaced, remembered


class Commands:
    def __init__(self, book: Book, fact: Callable[[str, Node, str], None]) -> None:
        self._book = book
        self._fact = fact
        self._replaced: deque[bytes] = deque(maxlen=MAX_REPLACED)  # incarnations

    def obey(self, session: Session, command: Command) -> None:
        node = self._named(command.node)
        error = self._missing(command.node) if node is None else self._objection(node, command)
        if node is not None and not error:
            self._do(node, command)
        self._book.sessions.send(session, CommandDone(command.request, clipped(error)))

    def replace(self, newer: Node) -> None:
        """A launcher's label is one node's. If another has it (a batch system has run the job again, and may not have told
        the old one), the newer is the one: the older is told to leave. If it comes back, it is still the older."""
        if not newer.label:
            return
        if newer.incarnation in self._replaced:
            self._send_off(newer, "replaced before")
            return
        for older in [node for node in self._book.nodes.values() if node.label == newer.label and node is not newer]:
            self._replaced.append(older.incarnation)
            self._send_off(older, f"replaced by {newer.id}, which has the same label")

    def _send_off(self, node: Node, why: str) -> None:
        self._fact("replaced", node, why)
        self.start_draining(node)
        self._tell(node, Stop(drain=False))

    def start_draining(self, node: Node) -> None:
        if node.state is not DRAINING:
            node.move(DRAINING)
            self._book.placement.changed(node)
            self._fact("draining", node, f"{node.assigned} tasks to finish")

    def _named(self, name: str) -> Node | None:
        nodes = self._book.nodes
        labelled = [node for node in nodes.values() if name and node.label == name]
        return nodes.get(name) or (labelled[-1] if labelled else None)

    def _missing(self, name: str) -> str:
        there = [f"{node.id} ({node.label})" if node.label else node.id for node in self._book.nodes.values()]
        return f"there is no node {name!r}; nodes: {', '.join(there) or 'none'}"

    def _objection(self, node: Node, command: Command) -> str:
        if node.state is DRAINING and command.what in ("pause", "resume"):
            return f"node {node.id} drains: it takes nothing new and leaves, so it can be neither paused nor resumed"
        return ""

    def _do(self, node: Node, command: Command) -> None:
        match command.what:
            case "drain":
                self.start_draining(node)
                self._tell(node, Stop(drain=True))
            case "retire":
                self.start_draining(node)
                self._tell(node, Stop(drain=command.grace_s > 0, grace_s=command.grace_s))
            case "pause" if node.state is not PAUSED:
                node.move(PAUSED)
                self._book.placement.changed(node)
                self._tell(node, Pause(on=True))
                self._fact("paused", node, "as told")
            case "resume" if node.state is PAUSED:
                node.move(ALIVE if node.pinged_at is None else SUSPECT)
                self._book.placement.changed(node)
                self._tell(node, Pause(on=False))
                self._fact("resumed", node, "as told")

    def _tell(self, node: Node, message: Message) -> None:
        sessions = self._book.sessions
        sessions.send(sessions.of(node), message)
