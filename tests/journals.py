"""Journals for tests: small commits by label, and what a journal holds."""

from __future__ import annotations

import select
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from core.builders import digest, label_of, options, task_id

from zmqsched.core.events import Troubled, Write, Written
from zmqsched.journal import Journal
from zmqsched.protocol import Record, Shape, Submit, TaskSpec


def shape(**asked: object) -> Shape:
    return Shape(digest("f"), options(**asked))


def commit(label: str, *, number: int = 1, size: int = 0, anew: bool = False) -> Write:
    """A task of this name is submitted; its call has so many bytes."""
    return Write(number, [Record(b"cann", Submit([shape()], [TaskSpec(task_id(label), 0, bytes(size))]))], anew)


@contextmanager
def opened(path: Path, cluster: str = "lab", *, start: bool = True, remove: bool = False) -> Iterator[Journal]:
    journal = Journal(path, cluster)
    try:
        if start:
            for _ in journal.read():
                pass
            journal.start()
        yield journal
    finally:
        journal.close(remove=remove)


def settled(journal: Journal, *commits: Write) -> list[Written | Troubled]:
    """Hand these over and wait until the last is written."""
    for each in commits:
        journal.write(each)
    return news_of(journal, commits[-1].number)


def news_of(journal: Journal, number: int | None) -> list[Written | Troubled]:
    """What it says until this commit is written; the first it says, without a number."""
    news: list[Written | Troubled] = []
    while not news or (number is not None and (not isinstance(news[-1], Written) or news[-1].number < number)):
        assert select.select([journal], [], [], 15)[0], f"no news, after {news}"
        news += journal.news()
    return news


def labels(journal: Journal) -> list[str]:
    """Of the tasks in it."""
    bodies = [record.body for record in journal.read()]
    return [label_of(spec.task) for body in bodies if isinstance(body, Submit) for spec in body.tasks]


def read(path: Path, cluster: str = "lab") -> list[str]:
    with opened(path, cluster, start=False) as journal:
        return labels(journal)
