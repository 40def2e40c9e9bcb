"""What is in the journal of a book: a snapshot of it, and the book that records make when they are played again.

Rules
-----
* ``replay`` of a log, of a snapshot taken anywhere in it with what followed, and of each beginning of the log agree: tasks,
  answers, counters of WaitGroups, functions. What a record says is done again by the methods that did it first, so there
  is one way only.
* What is not recorded is learned from the peers: nodes say what they run, clients ask again for what they wait for. A task
  that may be started only once, and may have been, is in *limbo* until its node has said.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from ..protocol import (
    Charged,
    Finals,
    Forgotten,
    Function,
    Functions,
    GroupAdd,
    Inputs,
    Left,
    Present,
    Record,
    RecordMessage,
    Shape,
    Submit,
    TaskSpec,
    batches,
)
from .book import Book
from .ledger import final_bytes
from .tasks import QUEUED, WAITING, Task, task_bytes


def snapshot(book: Book, present: Present) -> list[Record]:
    """Records that ``replay`` makes the present state of."""
    records = [Record(b"", Functions([Function(digest, blob)])) for digest, blob in book.functions.items()]
    records += [Record(b"", GroupAdd([(group, -1)])) for group in book.counting.groups.broken()]
    for owner in book.owners:  # one that has nothing here is remembered too
        answers = [*owner.answers.values(), *owner.unwritten.values()]
        records += [Record(owner.id, Finals(some)) for some in [[], *batches(answers, final_bytes)]]
    tasks = [task for task in book.tasks.values() if book.owners.knows(task.owner)]
    for batch in batches(tasks, task_bytes):
        records += _submissions(batch)
    records += book.dependencies.snapshot()
    charges = [(task, book.charged(task)) for task in tasks]
    records += [Record(b"", charge) for task, charge in charges if charge.attempt or task.failures or task.deaths]
    records += [Record(incarnation, said) for incarnation, said in book.counting.snapshot(tasks)]
    records.append(Record(b"", present))
    return records


def replay(book: Book, records: Iterable[Record]) -> set[bytes]:
    """Play a journal to an empty book. Returns the incarnations of the nodes that were there at its end."""
    ledger, book.ledger = book.ledger, None  # what is played is written already
    assert ledger is not None, "a journal nobody asked for"
    book.functions.limit(math.inf)  # who would send again what no longer has room?
    once: set[bytes] = set()
    nodes: set[bytes] = set()
    for record in records:
        if isinstance(record.body, Present):
            nodes = set(record.body.nodes)
        else:
            _replay(book, record.owner, record.body, once)
    for task_id in once & book.tasks.keys():
        task = book.tasks[task_id]
        if task.state is QUEUED:
            book.placement.withdraw(task)
            task.state = WAITING
            book.limbo[task_id] = task
    book.dependencies.restored()
    book.functions.limit(book.functions_cap)
    book.load.answers = book.kept_for_clients()
    book.ledger = ledger
    return nodes


def _replay(book: Book, owner_id: bytes, body: RecordMessage, once: set[bytes]) -> None:
    """``once`` collects the tasks that may have been started and must not be again."""
    match body:
        case Functions(functions):
            book.learn(functions)
        case Submit():
            _resubmit(book, owner_id, body)
        case Finals(finals):
            owner = book.owners.written(owner_id, book.now)
            for final in finals:
                _forget(book, final.task)
                owner.answers[final.task] = final
                if final.verdict == "ok":
                    book.dependencies.arrive(final.task, final.value)
        case Inputs(finals):
            for final in finals:
                book.dependencies.arrive(final.task, final.value)
        case Forgotten(tasks):
            for task_id in tasks:
                _forget(book, task_id)
            for owner in book.owners:
                for task_id in tasks:
                    owner.answers.pop(task_id, None)
        case Left():
            if (gone := book.owners.get(owner_id)) is not None:
                book.owners.forget(gone)
                for task in [task for task in book.tasks.values() if task.owner is gone]:
                    _forget(book, task.id)
                    if task.debts is not None:
                        book.counting.keep(task, task.debts)
        case GroupAdd(task=task_id, failed=failed) if task_id and failed:
            book.counting.charge(task_id, owner_id, body)
        case GroupAdd():
            book.counting.add(owner_id, body, from_node=bool(body.task))
        case Charged(task_id, attempt, failures, deaths):
            if (charged := book.tasks.get(task_id)) is not None:
                charged.attempt, charged.failures, charged.deaths = attempt, failures, deaths
                (once.add if attempt else once.discard)(task_id)


def _resubmit(book: Book, owner_id: bytes, message: Submit) -> None:
    kinds = [book.placement.kind(shape) for shape in message.shapes]
    sender = book.owners.written(owner_id, book.now)
    for spec in message.tasks:
        kind = kinds[spec.shape]
        job = kind.options.job
        owner = book.owners.job(job, book.now) if job else sender
        if spec.task not in book.tasks and not owner.has_answered(spec.task):
            book.accept(spec, kind, owner, sender, waits=kind.shape.function not in book.functions)
    book.accepted_all(kinds)


def _forget(book: Book, task_id: bytes) -> None:
    task = book.tasks.get(task_id)
    if task is not None:
        book.close(task)
        if task.kind.options.group:
            book.counting.answer(book.counting.groups.end(task.kind.options.group))
        if task.debts is not None:
            book.counting.release(task, task.debts)


def _submissions(tasks: list[Task]) -> list[Record]:
    """These tasks as they were submitted, by owner."""
    by_owner: dict[bytes, tuple[dict[Shape, int], list[TaskSpec]]] = {}
    for task in tasks:
        index, specs = by_owner.setdefault(task.owner.id, ({}, []))
        specs.append(TaskSpec(task.id, index.setdefault(task.kind.shape, len(index)), task.call, task.inputs))
    return [Record(owner, Submit(list(index), specs)) for owner, (index, specs) in by_owner.items()]
