"""Results of tasks that are arguments of others: who waits for which, and those that are here and needed.

Rules
-----
* A task waits until the results of all its inputs are here. Then it keeps them until it is answered itself, for it may have
  to run again, or to be submitted to another broker; each is here once, however many tasks name it.
* An input that ends otherwise ends all who wait for it: :func:`failed` makes their answer. It names the first cause, so a
  long chain of failures is no long chain of exceptions.
* The cost of a task is that of its inputs, and nothing while it waits.

Both the scheduler and a client's brain keep one: what a broker has forgotten, because its answer was acknowledged, the
client still has.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Generic, TypeVar

from msgspec.structs import replace

from ..protocol import INLINE_MAX, Final, Payload, Shape, payload_bytes, tag_of
from .load import RECORD_BYTES

User = TypeVar("User")


class Input(Generic[User]):
    """``users``: the unfinished tasks that have it as an argument, by id. ``name``: it travels to nodes under this; no two
    inputs ever have the same."""

    __slots__ = ("name", "users", "value")

    def __init__(self, name: bytes) -> None:
        self.name = name
        self.value: Payload | None = None
        self.users: dict[bytes, User] = {}


class Inputs(Generic[User]):
    """``bytes``: what the results take that are here."""

    def __init__(self, prefix: bytes = b"") -> None:
        self._inputs: dict[bytes, Input[User]] = {}
        self._by_name: dict[bytes, Input[User]] = {}
        self._prefix = prefix.rjust(8, b"\0")
        self._numbers = itertools.count(1)
        self.bytes = 0

    def __contains__(self, task: bytes) -> bool:
        return task in self._inputs

    def __len__(self) -> int:
        return len(self._inputs)

    def __getitem__(self, task: bytes) -> Input[User]:
        return self._inputs[task]

    def need(self, user_id: bytes, user: User, inputs: tuple[bytes, ...]) -> list[bytes]:
        """This task has these inputs, none of them twice. Returns those that it has to wait for."""
        lacking = []
        for task in inputs:
            entry = self._inputs.get(task)
            if entry is None:
                entry = self._inputs[task] = Input(self._prefix + next(self._numbers).to_bytes(8, "big"))
                self._by_name[entry.name] = entry
            entry.users[user_id] = user
            if entry.value is None:
                lacking.append(task)
        return lacking

    def release(self, user_id: bytes, inputs: tuple[bytes, ...]) -> None:
        """The task is answered."""
        for task in inputs:
            entry = self._inputs[task]
            del entry.users[user_id]
            if not entry.users:
                self.bytes -= _bytes(entry)
                del self._inputs[task], self._by_name[entry.name]

    def arrive(self, task: bytes, value: Payload) -> list[User]:
        """The result is here. Returns those who have waited for it."""
        entry = self._inputs.get(task)
        if entry is None or entry.value is not None:
            return []
        entry.value = value
        self.bytes += _bytes(entry)
        return list(entry.users.values())

    def waiting_for(self, task: bytes) -> list[User]:
        entry = self._inputs.get(task)
        return list(entry.users.values()) if entry is not None and entry.value is None else []

    def lacks(self, task: bytes) -> bool:
        """It is waited for."""
        entry = self._inputs.get(task)
        return entry is not None and entry.value is None

    def named(self, name: bytes) -> Payload | None:
        """The result that travels by this name, if it is here."""
        entry = self._by_name.get(name)
        return None if entry is None else entry.value

    def here(self) -> Iterator[tuple[bytes, Payload]]:
        """The results that are here, by task."""
        return ((task, entry.value) for task, entry in self._inputs.items() if entry.value is not None)

    def lacking(self) -> Iterator[bytes]:
        """The tasks whose results are waited for."""
        return (task for task, entry in self._inputs.items() if entry.value is None)

    def sanity_check(self, users: dict[bytes, tuple[bytes, ...]]) -> None:
        """``users``: the inputs of all unfinished tasks that have some."""
        named = {(task, user) for user, inputs in users.items() for task in inputs}
        assert named == {(task, user) for task, entry in self._inputs.items() for user in entry.users}, "users are off"
        assert all(entry.users for entry in self._inputs.values()), "an input of nobody is kept"
        assert self._by_name == {entry.name: entry for entry in self._inputs.values()}, "names are off"
        assert self.bytes == sum(map(_bytes, self._inputs.values())), "bytes of inputs are off"


def _bytes(entry: Input[User]) -> int:
    return 0 if entry.value is None else payload_bytes(entry.value) + RECORD_BYTES


def failed(task: bytes, final: Final, shape: Shape | None) -> Final:
    """The answer to a task that has an input which ended like this. ``shape``: the input's, if it is known."""
    name = tag_of(final.task, shape)
    if final.verdict == "DependencyFailed":
        first = final.text.rpartition("; ")[2]
        return replace(final, task=task, text=f"its input {name} was not run; {first}")
    how = {"error": "failed", "cancelled": "was cancelled"}.get(final.verdict, f"ended with {final.verdict}")
    value = final.value if payload_bytes(final.value) <= INLINE_MAX else b""
    return Final(task, "DependencyFailed", value, f"its input {name} {how}", final.verdict, final.text)
