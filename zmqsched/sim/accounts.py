"""What executions of tasks have said to WaitGroups, and for whom: what must be true when one is zero."""

from __future__ import annotations

from collections import defaultdict
from typing import Protocol


class Client(Protocol):
    """Of the tasks that an execution has submitted. ``orphans``: its node was given up, so if the execution counts after
    all its tasks do not, which is told."""

    @property
    def orphans(self) -> bool: ...

    def has_answer(self, task: bytes) -> bool: ...

    def went_well(self, task: bytes) -> bool: ...

    def may_lose(self, task: bytes) -> bool: ...


class Account:
    """One execution. ``paid``: it has counted down what it owed itself. ``ended``: it has given its answer. ``children``:
    the tasks that it has added for and submitted, with the client that did."""

    def __init__(self) -> None:
        self.paid = False
        self.ended = False
        self.children: list[tuple[Client, bytes]] = []


class Accounts:
    def __init__(self) -> None:
        self._accounts: defaultdict[bytes, list[Account]] = defaultdict(list)

    def begin(self, task: bytes) -> Account:
        account = Account()
        self._accounts[task].append(account)
        return account

    def settled(self, task: bytes, *, answered: bool, told: str) -> bool:
        """There is an execution that has counted down, as have all that it has added for, or failed: if a wait was ``told``
        of a failure, their client need not have heard of it yet. Of a task that is ``answered`` it is one that has ended."""
        return any(
            account.paid
            and (account.ended or not answered)
            and all(
                client.may_lose(child)
                or (account.ended and client.orphans)
                or (told and not client.has_answer(child))
                or self.settled(child, answered=client.has_answer(child), told=told)
                for client, child in account.children
            )
            for account in self._accounts[task]
        )

    def lost_any(self, task: bytes) -> bool:
        """Some of those that were added for may have failed; their client need not have heard of it yet."""
        return any(
            not client.went_well(child) or client.orphans or self.lost_any(child)
            for account in self._accounts[task]
            for client, child in account.children
        )
