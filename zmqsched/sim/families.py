"""What a simulated task does that has tasks of its own: its program, and the client in its worker.

The program adds to its WaitGroup, by way of its node, for tasks that it then submits, by way of its client; waits for their
answers, or for the WaitGroup, or for neither; and counts its own debt down before that or at its end.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from msgspec.structs import replace

from ..core.events import Tell, Withdraw
from ..protocol import Attempt, GroupDone, GroupForget, Options, Run
from .accounts import Account
from .world import SimulationFailed, named

if TYPE_CHECKING:
    from .clients import InnerClient
    from .nodes import SimWorker
    from .plans import Plan

LOOK_S = 1.0


class Family:
    """One execution of a task that has tasks."""

    def __init__(self, worker: SimWorker, run: Run, plan: Plan, account: Account, over: Callable[[], None]) -> None:
        """``over`` is called when it has nothing left but to end."""
        self._worker = worker
        self._run = run
        self._plan = plan
        self._account = account
        self._over = over
        self._client: InnerClient = worker.inner_client()
        self._tasks: list[bytes] = []
        self._request = 0

    def begin(self) -> None:
        one_by_one = self._plan.number % 2 == 0
        if not one_by_one:
            self._worker.counts(self._run, self._plan, len(self._plan.children))
        for child in self._plan.children:
            if one_by_one:
                self._worker.counts(self._run, self._plan, 1)
            self._submit(child)
        if self._plan.counts == "early":
            self._worker.counts(self._run, self._plan, -1)
        match self._plan.awaits:
            case "answers":
                self._worker.waits(self._run)
                self._client.when_answered(self._tasks, self._goes_on)
            case "group":
                self._worker.waits(self._run)
                self._client.keep_order()
                self._request = self._client.wait(self._plan.group, self._run.task, self._is_zero)
                self._look()
            case _:
                self._end()

    def interrupted(self) -> None:
        """The wait ends with it."""
        if self._request:
            self._client.post(Tell(GroupForget(self._request)))
        elif self._plan.awaits == "answers" and self._plan.number % 2:
            self._client.cancelled.update(self._tasks)
            self._client.post(Withdraw(self._tasks, force=True))

    def _submit(self, child: Plan) -> None:
        run, client = self._run, self._client
        plan = replace(child, number=len(client.plans), group=self._plan.group)
        options = Options(
            depth=run.depth + 1, holds=(plan.group,), parent=Attempt(run.task, run.attempt), retries=2 * plan.retried
        )
        client.keep_order()
        client.ask([(plan, options)])
        task = client.task(plan.number)
        self._tasks.append(task)
        self._account.children.append((client, task))

    def _then(self, act: Callable[[], None]) -> None:
        self._worker.then(self._run, 0.0, act)

    def _goes_on(self) -> None:
        def act() -> None:
            self._worker.goes_on(self._run)
            self._end()

        self._then(act)

    def _end(self) -> None:
        """The result does not go out before they are accepted."""
        self._client.wait(self._client.world.random.randbytes(16), b"", lambda _: self._then(self._over))

    def _is_zero(self, reply: GroupDone) -> None:
        client, accounts = self._client, self._worker.node.world.accounts
        if self._is_the_tasks and not client.may_have_lost_counts(self._plan.group) and not (reply.error and client.orphans):
            lost = [task for task in self._tasks if client.may_lose(task) or accounts.lost_any(task)]
            here = [task for task in self._tasks if not client.may_lose(task)]
            open_ = [task for task in here if not accounts.settled(task, answered=client.has_answer(task), told=reply.error)]
            if open_:
                parent, children = named(self._run.task), ", ".join(map(named, open_))
                raise SimulationFailed(f"the WaitGroup is zero in {parent}, and {children} have not counted down")
            if reply.error and not lost:
                raise SimulationFailed(f"a wait in {named(self._run.task)} is told: {reply.error}")
        self._request = 0
        self._goes_on()

    @property
    def _is_the_tasks(self) -> bool:
        """To the broker this is the task's execution. Of one that was given up nothing counts."""
        task = self._client.broker.core.book.tasks.get(self._run.task)
        return task is not None and task.node == self._worker.node.core.name

    def _look(self) -> None:
        """A counter that was forgotten may not come to zero again: its program has to give up."""
        if self._request and self._client.may_have_lost_counts(self._plan.group):
            self._client.post(Tell(GroupForget(self._request)))
            self._request = 0
            self._goes_on()
        elif self._request:
            self._worker.then(self._run, LOOK_S, self._look)
