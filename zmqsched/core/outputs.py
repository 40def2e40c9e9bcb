"""What tasks print, on its way from their nodes to their clients.

Rules
-----
* It travels in order with everything else on a link, so it comes before its task's result. It is kept nowhere and written
  into no journal: whoever waits for the task now is told, or nobody.
* It must hold up nobody. A link on which ``MAX_ON_THE_WAY`` bytes of it are unacknowledged carries the rest without its
  text: each :class:`~zmqsched.protocol.Words` says behind how many bytes it stands, so the client knows what is missing. By
  that, it also knows what it has seen before.
* Each attempt's two streams are counted for themselves.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from ..protocol import Advance, Output, Words, batches
from .link import Link

if TYPE_CHECKING:
    from .book import Book
    from .sessions import Session

MAX_ON_THE_WAY = 4 * 1024 * 1024


def messages(link: Link, words: list[Words], advances: list[Advance], node: str) -> Iterator[Output]:
    """These as messages for the link, to be sent one by one."""
    for some in batches(advances, _advance_bytes):
        yield Output([], some, node)
    for batch in batches(words, _words_bytes):
        yield Output(batch if link.printed <= MAX_ON_THE_WAY else [without_text(each) for each in batch], [], node)


def pass_on(output: Output, node: str, book: Book) -> None:
    """Tell whoever waits for these tasks."""
    telling: dict[Session, tuple[list[Words], list[Advance]]] = {}
    for words in output.words:
        if (task := book.tasks.get(words.task)) is None:
            book.counts["printed by what nobody waits for"] += 1
            continue
        for session in task.owner.sessions:
            telling.setdefault(session, ([], []))[0].append(words)
    for advance in output.advances:
        if (task := book.tasks.get(advance.task)) is not None:
            for session in task.owner.sessions:
                telling.setdefault(session, ([], []))[1].append(advance)
    for session, (some_words, advances) in telling.items():
        for message in messages(session.link, some_words, advances, node):
            book.sessions.send(session, message)


def without_text(words: Words) -> Words:
    """The same place in the stream, with the text left out."""
    at, lines = words.at + len(words.text), words.lines + words.text.count(b"\n")
    return Words(words.task, words.attempt, words.worker, words.stream, at, lines, b"")


def _words_bytes(words: Words) -> int:
    return len(words.text) + 80


def _advance_bytes(advance: Advance) -> int:
    return 4 * len(advance.text) + 80
