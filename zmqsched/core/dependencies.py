"""Tasks that wait for the results of others, at the broker: when they may run, and what becomes of them if they cannot.

Rules
-----
* Such a task is accepted when it comes, and WAITING until the results of its inputs are here (``inputs.py``). They come from
  the inputs' own ends; from answers that the client has not acknowledged; or, where a broker has forgotten or never known an
  input, from the client, which is asked (``NeedInputs``).
* An input that ends otherwise than well ends those who wait for it, and so on, in one sweep however long the chain. An input
  that is tried again has not ended.
* Whose inputs never come, because the client that knew them is gone, ends with the client; a job's task after its lease.
* In the journal the result of an input is where its answer is; ``Inputs`` records hold those that are to outlast it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import TYPE_CHECKING

from ..protocol import MAX_ITEMS, Final, Inputs, NeedInputs, Payload, Record, batches
from . import inputs
from .ledger import final_bytes
from .sessions import Session
from .tasks import FINISHED, Task

if TYPE_CHECKING:
    from .book import Book
    from .owners import Owner


class Dependencies:
    def __init__(self, book: Book, prefix: bytes) -> None:
        self._book = book
        self.inputs: inputs.Inputs[Task] = inputs.Inputs(prefix)
        # Inputs that are not to be expected here: the session that was asked last, and when that was last seen to be there.
        self._absent: dict[bytes, tuple[int, float]] = {}

    def sanity_check(self) -> None:
        tasks = self._book.tasks
        self.inputs.sanity_check({task.id: task.inputs for task in tasks.values() if task.inputs})
        for task in tasks.values():
            lacking = sum(self.inputs[each].value is None for each in task.inputs)
            assert task.lacks == lacking, f"{task} lacks {lacking} inputs, not {task.lacks}"

    def begin(self, task: Task, client: Owner) -> None:
        """An accepted task has inputs. What is answered already is taken from there."""
        lacking = self.inputs.need(task.id, task, task.inputs)
        task.lacks = len(lacking)
        if task.id in self.inputs and task.id in task.inputs:
            self._end(task, Final(task.id, "NotAccepted", text="a task cannot wait for its own result"))
        for each in lacking:
            final = None if each in self._book.tasks else _answer(each, client, task.owner)
            if final is None:
                continue
            if final.verdict == "ok":
                self._record([final])
                self.arrive(each, final.value)
            elif task.id in self._book.tasks:
                self._end(task, inputs.failed(task.id, final, None))

    def end(self, task: Task) -> None:
        """The task is over."""
        self.inputs.release(task.id, task.inputs)

    def arrive(self, task_id: bytes, value: Payload) -> None:
        self._absent.pop(task_id, None)
        for user in self.inputs.arrive(task_id, value):
            user.lacks -= 1
            self._book.queue_if_ready(user)

    def ended(self, task: Task, final: Final) -> None:
        """A task that others have as an argument is answered."""
        if task.cancelled and final.verdict == "ok":
            final = Final(task.id, "cancelled", text="it had started when it was cancelled")
        if final.verdict == "ok":
            if not self._book.owners.knows(task.owner):
                self._record([final])  # which is nowhere else
            self.arrive(task.id, final.value)
        else:
            self._fail(self.inputs.waiting_for(task.id), task, final)

    def told(self, session: Session, finals: list[Final]) -> None:
        """A client says how inputs had ended, of tasks of its own."""
        for final in finals:
            if final.task in self._book.tasks:
                continue  # it will end here
            mine = [user for user in self.inputs.waiting_for(final.task) if session in user.owner.sessions]
            if mine and final.verdict == "ok":
                self._record([final])
                self.arrive(final.task, final.value)
            elif mine:
                self._fail(mine, None, final)

    def ask(self, session: Session, tasks: Iterable[Task]) -> None:
        """For the inputs of these tasks that are neither here nor to be expected."""
        lacking = dict.fromkeys(each for task in tasks if task.lacks for each in task.inputs)
        self._ask(session, [each for each in lacking if self._is_absent(each)])

    def ask_again(self, session: Session) -> None:
        """The client is back. What it has an answer to already, because an input had failed, it does not name."""
        client = session.follows[0]
        waiting = [each for each in self._absent if self._is_absent(each)]
        self._ask(session, [each for each in waiting if any(u.owner is client for u in self.inputs.waiting_for(each))])

    def _ask(self, session: Session, needed: list[bytes]) -> None:
        for start in range(0, len(needed), MAX_ITEMS):
            self._book.sessions.send(session, NeedInputs(needed[start : start + MAX_ITEMS]))
        for each in needed:
            self._absent[each] = (session.token, self._book.now)

    def expire(self, lease_s: float) -> None:
        """A job's tasks whose inputs never came: whoever knew them is gone. Those of a client end with the client."""
        now = self._book.now
        why = "the client that submitted the task is gone, and only that knew this result"
        for each, (token, since) in list(self._absent.items()):
            if not self._is_absent(each):
                del self._absent[each]
            elif self._book.sessions.get(token) is not None:
                self._absent[each] = (token, now)
            elif now - since > lease_s:
                users = [user for user in self.inputs.waiting_for(each) if user.owner.job]
                self._fail(users, None, Final(each, "NotAccepted", text=why))

    # --- the journal -------------------------------------------------------------------------------------------------

    def record(self, task: Task) -> None:
        """The task is written down again: so is what it has of its inputs."""
        here = ((each, self.inputs[each].value) for each in task.inputs)
        self._record([Final(each, "ok", value) for each, value in here if value is not None])

    def snapshot(self) -> list[Record]:
        finals = [Final(task, "ok", value) for task, value in self.inputs.here()]
        return [Record(b"", Inputs(some)) for some in batches(finals, final_bytes)]

    def restored(self) -> None:
        """A journal has been played."""
        self._absent = {each: (0, self._book.now) for each in self.inputs.lacking() if self._is_absent(each)}

    def _record(self, finals: list[Final]) -> None:
        for some in batches(finals, final_bytes):
            self._book.record(b"", Inputs(some))

    def _is_absent(self, task_id: bytes) -> bool:
        return self.inputs.lacks(task_id) and task_id not in self._book.tasks

    def _fail(self, users: list[Task], task: Task | None, final: Final) -> None:
        shape = None if task is None else task.kind.shape
        for user in users:
            self._end(user, inputs.failed(user.id, final, shape))

    def _end(self, task: Task, final: Final) -> None:
        """And all who wait for it, and so on."""
        ends = deque([(task, final)])
        while ends:
            task, final = ends.popleft()
            if task.state is FINISHED:  # by another of its inputs
                continue
            waiting = self.inputs.waiting_for(task.id)
            self._book.end(task, final)
            ends.extend((user, inputs.failed(user.id, final, task.kind.shape)) for user in waiting)


def _answer(task: bytes, *owners: Owner) -> Final | None:
    for owner in owners:
        if (final := owner.answers.get(task) or owner.unwritten.get(task)) is not None:
            return final
    return None
