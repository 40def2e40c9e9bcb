"""The book: the broker's truth about tasks, and whom their answers are for.

Rules
-----
* Only here a task is accepted (``dependencies.py``: when it has to wait for others), changes its state (but for ASSIGNED,
  which ``placement.py`` gives) and is answered. Each ends in ``finish``, once.
* An outcome that names the current attempt of its task decides it. One that does not is a *zombie*: from a node that was
  given up and its task placed anew. A zombie's value is as good as any and is accepted if the task is still open (first
  result wins); a zombie's error is not, for the newer attempt may succeed. Both are counted.
* The scheduler owns ``now``, ``sessions``, ``nodes`` and the verdicts on nodes. The book says what follows for tasks.

What becomes of a task is in ``tasks.py``; which task goes where in ``placement.py``, and how it gets there in
``dispatching.py``; whom answers are for in ``owners.py``, when they may be told in ``ledger.py``; what tasks count on
WaitGroups in ``counting.py``.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from random import Random

from ..protocol import (
    LENT,
    MAX_ITEMS,
    Adopt,
    Attempt,
    Charged,
    Death,
    Final,
    Finals,
    Function,
    Functions,
    JobTasks,
    NeedFunctions,
    Outcome,
    Progress,
    RecordMessage,
    Revoke,
    Running,
    Stopped,
    Submit,
    TaskSpec,
    Unknown,
    batches,
)  # fmt: skip
from .certificate import certificate, entry
from .counting import Counting
from .dependencies import Dependencies
from .functions import CAP_BYTES, FunctionStore
from .ledger import Ledger, final_bytes
from .load import FUNCTIONS_SHARE, Load, answer_bytes
from .nodes import Node, Prospect
from .owners import Owner, Owners
from .placement import Placement
from .policy import POLICIES
from .reasons import why_hopeless
from .sessions import Session, Sessions
from .settings import Settings
from .tasks import ASSIGNED, DELAYED, FINISHED, QUEUED, RUNNING, WAITING, Kind, Task
from .timers import Timers

MAX_BACKOFF_S = 60.0  # the longest wait before a retry


class Book:
    def __init__(
        self, settings: Settings, random: Random, counts: Counter[str], sessions: Sessions, nodes: Mapping[str, Node]
    ) -> None:
        self._settings = settings
        self._random = random
        self.counts = counts
        self.sessions = sessions
        self.nodes = nodes
        self.now = 0.0
        self.ledger = Ledger() if settings.journal else None
        self.owners = Owners()
        self.placement = Placement(POLICIES[settings.policy](), random)
        self.functions_cap = min(CAP_BYTES, settings.max_queued_bytes // FUNCTIONS_SHARE)
        self.functions = FunctionStore(self.functions_cap)
        self.load = Load(settings.max_queued_bytes)
        self.counting = Counting(self)
        self.dependencies = Dependencies(self, random.randbytes(8))
        self.tasks: dict[bytes, Task] = {}
        self._most_tasks = 0  # since the table of tasks was last made anew
        self.waiting: dict[bytes, dict[bytes, Task]] = {}  # by the digest of the function they wait for
        self._asked: dict[bytes, set[int]] = {}  # sessions that were asked for these functions, and may yet send them
        self._waiting_since: dict[bytes, float] = {}  # as each round has found it
        self.delayed: Timers[bytes] = Timers()  # when to queue a task again that failed
        # By task: attempts that nodes run and nobody wants so far, and since when they are known.
        self.offers: dict[bytes, tuple[str, int, float]] = {}
        self.limbo: dict[bytes, Task] = {}  # may have been started, before a crash, and must not be again
        self._seq = 0

    def sanity_check(self) -> None:
        """Raise AssertionError if any two facts disagree."""
        self.placement.sanity_check()
        self.counting.sanity_check()
        assert self._asked.keys() <= self.waiting.keys(), "a function is looked for that no task waits for"
        assert self.load.tasks == sum(task.held_bytes for task in self.tasks.values()), "bytes of tasks are off"
        assert self.load.answers == self.kept_for_clients(), "bytes of answers are off"
        self.dependencies.sanity_check()
        self._check_states()
        self._check_owners()
        kinds = Counter(task.kind.shape for task in self.tasks.values())
        assert all(kind == kinds[shape] for shape, kind in self.placement.open_kinds().items()), "a kind's count is off"
        assert self.functions.held() == Counter(shape.function for shape in kinds), "functions held for nobody"
        for node in self.nodes.values():
            for name in node.used:
                those = [task for task in node.tasks.values() if not (task.lent and name in LENT)]
                used = sum(dict(task.kind.options.resources).get(name, 0.0) for task in those)
                assert abs(node.used[name] - used) < 1e-6, f"{node.id}: {name} in use is off"
        if not self.placement.pending:
            self.placement.check_nothing_waits(self.now)

    def _check_states(self) -> None:
        for task in self.tasks.values():
            held = task.state in (ASSIGNED, RUNNING)
            assert task.state is not FINISHED, f"{task} is finished and kept"
            assert held == bool(task.node), f"{task}: state and node disagree"
            assert not held or self.nodes[task.node].tasks.get(task.id) is task, f"{task} is not at its node"
            waits = task.lacks > 0 or task.id in self.waiting.get(task.kind.shape.function, {})
            assert (waits or task.id in self.limbo) == (task.state is WAITING), f"{task}: waits for something or not"
            assert (task.id in self.delayed) == (task.state is DELAYED), f"{task}: waits for its retry or not"
            assert task.state not in (QUEUED, DELAYED) or not task.cancelled, f"{task} is cancelled and queued"
        delayed = sum(task.state is DELAYED for task in self.tasks.values())
        assert len(self.delayed) == delayed, "a retry of no task is waited for"

    def _check_owners(self) -> None:
        open_: dict[int, set[bytes]] = {}
        for task in self.tasks.values():
            open_.setdefault(id(task.owner), set()).add(task.id)
        for owner in self.owners:
            its = open_.get(id(owner), set())
            assert owner.open == len(its), f"{owner.id!r}: the count of its open tasks is off"
            assert not owner.answers.keys() & its, "a task is answered and open"
            assert self.ledger is not None or not owner.unwritten, "an answer waits for a journal that is not there"

    def kept_for_clients(self) -> int:
        """Bytes of the answers that clients have not acknowledged."""
        clients = [owner for owner in self.owners if not owner.job]
        return sum(answer_bytes(final) for each in clients for final in (*each.answers.values(), *each.unwritten.values()))

    def open_counts(self) -> Counter[str]:
        """What is held at this moment, by sort; empty when all is answered."""
        counts = Counter(task.state.name for task in self.tasks.values())
        counts["groups"] = len(self.counting.groups)
        counts["kinds"] = sum(1 for number in self.placement.open_kinds().values() if number)
        counts["at nodes"] = sum(node.assigned for node in self.nodes.values())
        counts["bytes of tasks"] = self.load.tasks
        counts["inputs"] = len(self.dependencies.inputs)
        return +counts

    def unacknowledged(self) -> int:
        """Answers that clients have not acknowledged."""
        return sum(len(owner.answers) + len(owner.unwritten) for owner in self.owners if not owner.job)

    # --- what clients say --------------------------------------------------------------------------------------------

    def submit(self, session: Session, message: Submit) -> None:
        trouble = self.ledger.trouble if self.ledger is not None else ""
        self.learn([each for each in message.functions if not trouble or each.digest in self.waiting])
        kinds = [self.placement.kind(shape) for shape in message.shapes]
        owners = [self._owner(session, kind) for kind in kinds]
        missing = {shape.function for shape in message.shapes if shape.function not in self.functions}
        before = self._seq
        tasks = self.tasks
        new = []
        refused = []
        dependent = []
        for spec in message.tasks:
            owner = owners[spec.shape]
            if spec.inputs:
                dependent.append(spec.task)
            if spec.task in tasks or owner.has_answered(spec.task):
                self._submitted_again(spec.task, owner, session)
                continue
            if trouble:
                refused.append(spec.task)
                continue
            new.append(spec)
            waits = message.shapes[spec.shape].function in missing
            task = self.accept(spec, kinds[spec.shape], owner, session.follows[0], waits=waits)
            if spec.task in self.offers:
                self._adopt(task)
        self.counts["accepted"] += self._seq - before
        self.accepted_all(kinds)
        if missing and not trouble:
            self._ask_for(missing, session)
        if dependent:
            self.dependencies.ask(session, [tasks[task_id] for task_id in dependent if task_id in tasks])
        if refused:
            self._refuse(session, refused, trouble)
        if new:
            self.record(session.follows[0].id, Submit(message.shapes, new))

    def _owner(self, session: Session, kind: Kind) -> Owner:
        if not kind.options.job:
            return session.follows[0]
        owner = self.owners.job(kind.options.job, self.now)
        self._join_job(session, owner)
        return owner

    def _join_job(self, session: Session, owner: Owner) -> None:
        """Of what was answered before it hears when it asks."""
        if session not in owner.sessions:
            self._let_follow(session, owner)

    def _ask_for(self, functions: set[bytes], session: Session) -> None:
        self.sessions.send(session, NeedFunctions(sorted(functions)))
        for digest in functions & self.waiting.keys():
            self._asked.setdefault(digest, set()).add(session.token)

    def accept(self, spec: TaskSpec, kind: Kind, owner: Owner, client: Owner, *, waits: bool) -> Task:
        """``client``: who submits it, be the owner a job. ``waits``: its function is not here."""
        self._seq += 1
        inputs = tuple(dict.fromkeys(spec.inputs)) if spec.inputs else ()
        state = WAITING if waits or inputs else QUEUED
        task = self.tasks[spec.task] = Task(spec.task, owner, kind, spec.call, self._seq, inputs, state)
        self.load.tasks += task.held_bytes
        owner.open += 1
        if not kind.open:
            self.functions.hold(kind.shape.function)
        kind.open += 1
        options = kind.options
        if options.group:
            self.counting.answer(self.counting.groups.begin(options.group))
        if options.holds:
            self.counting.hold(task)
        if state is QUEUED:
            self.placement.enqueue(task)
            return task
        if waits:
            self.waiting.setdefault(kind.shape.function, {})[task.id] = task
        if inputs:
            self.dependencies.begin(task, client)
        self.queue_if_ready(task)
        return task

    def queue_if_ready(self, task: Task) -> None:
        """A task that waits, or has just been accepted: perhaps all that it needs is here."""
        if task.state is WAITING and not task.lacks and task.id not in self.waiting.get(task.kind.shape.function, ()):
            task.move(QUEUED)
            self.placement.enqueue(task)

    def accepted_all(self, kinds: list[Kind]) -> None:
        """All tasks of a message are accepted, as far as they are new."""
        self._most_tasks = max(self._most_tasks, len(self.tasks))
        for kind in kinds:
            if not kind.open:
                self.placement.retire(kind)

    def still_open(self, session: Session, tasks: list[bytes]) -> None:
        """A client is back, or this broker follows another: what it waits for is here, or to be submitted again."""
        unknown = []
        for task_id in tasks:
            owner = self._owner_of(task_id, session.follows[0])
            if owner is None:
                unknown.append(task_id)
                continue
            if owner.job:
                self._join_job(session, owner)
            self._submitted_again(task_id, owner, session)
        known = [self.tasks[task] for task in tasks if task in self.tasks]
        if missing := {task.kind.shape.function for task in known if task.kind.shape.function in self.waiting}:
            self._ask_for(missing, session)
        self.dependencies.ask(session, known)
        self.sessions.send(session, Unknown(unknown))

    def _owner_of(self, task_id: bytes, client: Owner) -> Owner | None:
        """Who is or was to be answered, if the task is known."""
        if (task := self.tasks.get(task_id)) is not None:
            return task.owner if self.owners.knows(task.owner) else client
        if client.has_answered(task_id):
            return client
        return next((owner for owner in self.owners if owner.job and owner.has_answered(task_id)), None)

    def _submitted_again(self, task_id: bytes, owner: Owner, session: Session) -> None:
        """A copy; or the client was given up while an attempt ran, is back, and wants the task after all; or a job's task
        was answered and this client has not heard of it."""
        self.counts["submitted again"] += 1
        task = self.tasks.get(task_id)
        if task is None:
            if owner.job and task_id in owner.answers:
                session.finals.append(owner.answers[task_id])
                self.sessions.touch(session)
        elif not self.owners.knows(task.owner):
            task.owner = owner
            owner.open += 1
            task.cancelled = False
            self.record(owner.id, Submit([task.kind.shape], [TaskSpec(task_id, 0, task.call, task.inputs)]))
            self.dependencies.record(task)
            self.charge(task)

    def _refuse(self, session: Session, tasks: list[bytes], trouble: str) -> None:
        """What cannot be kept is not taken."""
        self.counts["not accepted: no journal"] += len(tasks)
        text = f"the broker cannot keep new tasks: {trouble}. Submit again when it can; what was accepted is not lost"
        session.finals.extend(Final(task, "NotAccepted", text=text) for task in tasks)
        self.sessions.touch(session)

    def learn(self, functions: list[Function]) -> None:
        for function in functions:
            if function.digest not in self.functions:
                self.functions.add(function.digest, function.blob)
                self.record(b"", Functions([function]))
            self._asked.pop(function.digest, None)
            for task in self.waiting.pop(function.digest, {}).values():
                self.queue_if_ready(task)

    def has_none_of(self, session: Session, functions: list[bytes]) -> None:
        """No use in waiting for these from there."""
        for digest in functions:
            self._asked.get(digest, set()).discard(session.token)

    def cancel(self, session: Session, task_id: bytes, *, force: bool) -> None:
        for task in self.asked_about(session, [task_id]):
            self._drop(task, "cancelled", force=force)

    def asked_about(self, session: Session, tasks: list[bytes]) -> list[Task]:
        """Those of the tasks that are open and this session's, or a job's: a job is everybody's."""
        known = [self.tasks[task] for task in tasks if task in self.tasks]
        return [task for task in known if task.owner.job or session in task.owner.sessions]

    def follow(self, session: Session, request: int, job: str) -> None:
        owner = self.owners.find_job(job)
        tasks: list[bytes] = []
        if owner is not None:
            mine = [task.id for task in self.tasks.values() if task.owner is owner]
            tasks = sorted([*mine, *owner.answers, *owner.unwritten])  # a client numbers its tasks in order
        starts = range(0, len(tasks), MAX_ITEMS)
        for start in starts or [0]:
            part = tasks[start : start + MAX_ITEMS]
            self.sessions.send(session, JobTasks(request, job, part, more=start + MAX_ITEMS < len(tasks)))
        if owner is not None:
            if session not in owner.sessions:
                self._let_follow(session, owner)
            session.finals.extend(owner.answers.values())

    def join(self, session: Session) -> None:
        """A client is told what it has missed; what it submits again is known."""
        session.remembered = self.owners.find_client(session.incarnation) is not None
        owner = self.owners.client(session.incarnation, self.now)
        self._let_follow(session, owner)
        session.finals.extend(owner.answers.values())
        self.sessions.touch(session)
        self.dependencies.ask_again(session)

    def _let_follow(self, session: Session, owner: Owner) -> None:
        owner.sessions.append(session)
        session.follows.append(owner)

    def unfollow(self, session: Session) -> None:
        """The session is over."""
        self.counting.groups.forget(session.token)
        self.has_none_of(session, list(self._asked))
        for owner in session.follows:
            owner.sessions.remove(session)
            if not owner.job:
                owner.quiet_since = self.now

    def owner_gone(self, owner: Owner, *, force: bool, nested: bool) -> int:
        """``nested``: it was a task's."""
        self.owners.forget(owner)
        self.load.answers -= sum(map(answer_bytes, (*owner.answers.values(), *owner.unwritten.values())))
        if self.ledger is not None:
            self.ledger.leave(owner.id)
        mine = [task for task in self.tasks.values() if task.owner is owner]
        for task in mine:
            if nested and task.debts is not None:
                self.counting.abandon(task, task.debts)
            if task.state is not FINISHED:  # as one is by now whose input was dropped before
                self._drop(task, "its client is gone", force=force)
        return len(mine)

    # --- what nodes say ----------------------------------------------------------------------------------------------

    def offer(self, node: Node, holding: list[Attempt]) -> None:
        """What a node runs, of a session that is over: somebody wants it, or may want it yet."""
        for attempt in holding:
            self.offers[attempt.task] = (node.id, attempt.attempt, self.now)
            if (task := self.tasks.get(attempt.task)) is not None:
                self._adopt(task)

    def _end_offer(self, node: Node, task_id: bytes, attempt: int) -> None:
        """The attempt came to its end before anybody wanted it."""
        if self.offers.get(task_id, ())[:2] == (node.id, attempt):
            del self.offers[task_id]

    def _adopt(self, task: Task) -> None:
        """A node runs this task already, for a session that is over: that attempt counts again, unless there is another."""
        node_id, attempt, _ = self.offers.pop(task.id)
        node = self.nodes[node_id]
        free = task.state is QUEUED or task.id in self.limbo
        if task.cancelled or not free or attempt < task.attempt or not node.fits(task.kind.options.resources):
            return
        if self.limbo.pop(task.id, None) is not None:
            task.move(QUEUED)
            self.placement.enqueue(task)
        self.placement.adopt(task, node, attempt)
        task.move(RUNNING)
        self.counting.runs_at(task, node.incarnation)
        self.counts["adopted"] += 1
        self.sessions.send(self.sessions.of(node), Adopt([Attempt(task.id, attempt)]))
        self._tell_running(task)

    def results(self, node: Node, outcomes: list[Outcome]) -> None:
        for outcome in outcomes:
            task = self.tasks.get(outcome.task)
            if self.offers:
                self.offers.pop(outcome.task, None)
            if task is not None:
                task.kind.took(outcome.ran_s)
                current = (task.node == node.id and task.attempt == outcome.attempt) or outcome.task in self.limbo
            if task is None or not current:
                self.counts["zombie results"] += 1
                if task is None or not outcome.ok:
                    self.counting.over(outcome, node.incarnation)
                    continue
                if task.node:  # a newer attempt elsewhere is no longer wanted
                    self._call_back(task, force=False)
            if outcome.ok:
                if task.debts is not None:
                    self.counting.runs_at(task, node.incarnation)
                self.finish(task, Final(task.id, "ok", outcome.value))
                node.done += 1
            elif outcome.retry and task.failures < task.kind.options.retries and not task.cancelled:
                task.failures += 1
                self.counts["retried"] += 1
                if self.limbo.pop(task.id, None) is None:
                    self.let_go(task, node)
                self.charge(task)
                self.counting.over(outcome, node.incarnation)
                self._retry(task)
            else:
                self.counting.runs_at(task, node.incarnation)
                self.finish(task, Final(task.id, "error", outcome.value))
                node.done += 1

    def _retry(self, task: Task) -> None:
        """Exponential back-off with jitter, so that what failed together does not come back together."""
        if not task.kind.options.backoff:
            self.requeue(task)
            return
        wait_s = min(MAX_BACKOFF_S, task.kind.options.backoff * 2.0 ** min(task.failures - 1, 60))
        task.move(DELAYED)
        self.delayed.set(task.id, self.now + wait_s * self._random.uniform(0.5, 1.0))

    def progress(self, node: Node, message: Progress) -> None:
        for attempt in message.started:
            task = self._current(node, attempt)
            if task is not None and task.state is ASSIGNED:
                task.move(RUNNING)
                self._tell_running(task)
        for attempt in message.waiting:
            if (task := self._current(node, attempt)) is not None:
                node.lend(task)
                self.placement.changed(node)
        for attempt in message.resumed:
            if (task := self._current(node, attempt)) is not None:
                node.reclaim(task)
                self.placement.changed(node)
        for attempt in reversed(message.returned):
            task = self._current(node, attempt)
            if task is not None:
                self.let_go(task, node)
                if not task.kind.options.requeue:
                    self.charge(task)
                self.counting.over(attempt, node.incarnation)
                self.requeue(task)
        for death in message.deaths:
            self._death(node, death)
        for stopped in message.stopped:
            self._stopped(node, stopped)

    def leave(self, node: Node) -> int:
        """The node holds nothing any more: what it held is queued again. Returns how many tasks that are."""
        self.placement.leave(node)
        self.offers = {task: offer for task, offer in self.offers.items() if offer[0] != node.id}
        requeued = 0
        for task in reversed(list(node.tasks.values())):  # to the front of the queue, the first of them last
            self.let_go(task, node)
            if task.kind.options.requeue or task.cancelled:
                self.counting.given_up(task)
                self.requeue(task)
                requeued += 1
            else:
                self._fail(task, f"node {node.id} ended while it held the task, and requeue=False forbids another try")
        return requeued

    def _stopped(self, node: Node, stopped: Stopped) -> None:
        self._end_offer(node, stopped.task, stopped.attempt)
        task = self.limbo.get(stopped.task) or self._current(node, Attempt(stopped.task, stopped.attempt))
        if task is None:
            self.counting.over(stopped, node.incarnation)
            return
        self.counting.runs_at(task, node.incarnation)
        self.counts["stopped"] += 1
        if task.cancelled or stopped.verdict != "cancelled":
            self.finish(task, Final(task.id, "cancelled" if task.cancelled else stopped.verdict, text=stopped.text))
            return
        # It was cancelled for its client's absence, and the client is back.
        if task.node:
            self.let_go(task, node)
        if task.kind.options.requeue:
            self.counting.over(stopped, node.incarnation)
            self.requeue(task)
        else:
            self._fail(task, "it was stopped while its client seemed gone, and requeue=False forbids another try")

    def _death(self, node: Node, death: Death) -> None:
        self.counts["worker deaths"] += 1
        self._end_offer(node, death.task, death.attempt)
        task = self._current(node, Attempt(death.task, death.attempt)) if death.task else None
        if task is None:
            self.counting.over(death, node.incarnation)
            return
        self.let_go(task, node)
        if death.blamed:
            after_first_s = None if task.died_at is None else self.now - task.died_at
            task.died_at = self.now if task.died_at is None else task.died_at
            where = f"{node.id}/{death.worker} on {node.where.host}"
            task.deaths += (entry(death, where, after_first_s, task.deaths),)
        self.charge(task)
        if not task.kind.options.requeue:
            self._fail(task, "its worker died, and requeue=False forbids another try")
        elif len(task.deaths) >= self._settings.max_deaths:
            self._fail(task, f"{len(task.deaths)} workers died running it")
        else:
            self.counts["requeued: worker died"] += 1
            self.counting.over(death, node.incarnation)
            self.requeue(task)

    def _current(self, node: Node, attempt: Attempt) -> Task | None:
        task = self.tasks.get(attempt.task)
        if task is not None and task.node == node.id and task.attempt == attempt.attempt:
            return task
        self.counts["late reports"] += 1
        return None

    def _drop(self, task: Task, why: str, *, force: bool = False) -> None:
        """Cancel what has not started. An attempt at a node is called back: the node hands it back, or its answer comes;
        with ``force`` the node ends it if it runs."""
        if task.state in (WAITING, QUEUED, DELAYED):
            self.finish(task, Final(task.id, "cancelled", text=why))
        elif force or not task.cancelled:
            task.cancelled = True
            self._call_back(task, force=force)

    def _call_back(self, task: Task, *, force: bool) -> None:
        session = self.sessions.of(self.nodes[task.node])
        self.sessions.send(session, Revoke([Attempt(task.id, task.attempt)], force))

    # --- the course of a task ----------------------------------------------------------------------------------------

    def let_go(self, task: Task, node: Node) -> None:
        """The attempt at this node is over, the task is not."""
        node.drop(task)
        task.node = ""
        self.placement.changed(node)

    def requeue(self, task: Task) -> None:
        task.move(QUEUED)
        self.placement.enqueue(task, first=True)
        if task.cancelled:
            self.finish(task, Final(task.id, "cancelled", text="cancelled before it started"))

    def _fail(self, task: Task, why: str) -> None:
        label = task.kind.shape.label
        name = task.kind.options.name or label or f"task {task.id.hex()[-8:]}"
        self.finish(task, Final(task.id, "WorkerDied", text=certificate(f"{name} failed: {why}", label, task.deaths)))

    def finish(self, task: Task, final: Final) -> None:
        """The one answer to the task; and what follows from it for those that have it as an argument."""
        self.end(task, final)
        if task.id in self.dependencies.inputs:
            self.dependencies.ended(task, final)

    def end(self, task: Task, final: Final) -> None:
        debts, owner, group = task.debts, task.owner, task.kind.options.group
        self.close(task)
        self.counts[final.verdict] += 1
        wanted = self.owners.knows(owner)
        if wanted:
            self._keep(owner, final)
        if group:
            self.counting.answer(self.counting.groups.end(group))
        if debts is not None:
            self.counting.finish(task, debts, final, wanted=wanted)

    def close(self, task: Task) -> None:
        """The record of the task is over."""
        kind, owner = task.kind, task.owner
        if task.node:
            self.let_go(task, self.nodes[task.node])
        elif task.state is QUEUED:
            self.placement.withdraw(task)
        elif task.state is WAITING:
            self._stop_waiting(task)
        elif task.state is DELAYED:
            self.delayed.set(task.id, None)
        task.move(FINISHED)
        del self.tasks[task.id]
        if task.inputs:
            self.dependencies.end(task)
        self.load.tasks -= task.held_bytes
        kind.open -= 1
        if not kind.open:
            self.functions.release(kind.shape.function)
            self.placement.retire(kind)
        owner.open -= 1
        if not owner.open:
            owner.quiet_since = self.now

    def _stop_waiting(self, task: Task) -> None:
        if self.limbo.pop(task.id, None) is not None:
            return
        waiting = self.waiting.get(task.kind.shape.function, {})
        if waiting.pop(task.id, None) is not None and not waiting:
            del self.waiting[task.kind.shape.function]
            self._asked.pop(task.kind.shape.function, None)

    def _tell_running(self, task: Task) -> None:
        for session in task.owner.sessions:
            session.running.append(task.id)
            self.sessions.touch(session)

    # --- answers -----------------------------------------------------------------------------------------------------

    def _keep(self, owner: Owner, final: Final) -> None:
        if not owner.job:
            self.load.answers += answer_bytes(final)
        if self.ledger is not None:
            owner.unwritten[final.task] = final
            self.ledger.answer(owner.id, final)
        else:
            self._tell(owner, final)

    def written(self, owner_id: bytes, final: Final) -> None:
        """The answer is on disk. If its owner was given up meanwhile and is back, the task may have another by now."""
        owner = self.owners.get(owner_id)
        if owner is not None and owner.unwritten.get(final.task) is final:
            del owner.unwritten[final.task]
            self._tell(owner, final)

    def _tell(self, owner: Owner, final: Final) -> None:
        """The answer is as safe as it will be; it is kept until it is acknowledged."""
        owner.answers[final.task] = final
        for session in owner.sessions:
            if not session.finals:
                self.sessions.touch(session)
            session.finals.append(final)

    def delivered(self, session: Session) -> None:
        """Answers were acknowledged. Those of a job are kept for others."""
        owner = session.follows[0]
        messages = [message for message in session.link.delivered if isinstance(message, Finals)]
        for final in itertools.chain.from_iterable(message.finals for message in messages):
            if owner.answers.pop(final.task, None) is not None:
                self.load.answers -= answer_bytes(final)
                if self.ledger is not None:
                    self.ledger.forget(final.task)
        session.link.delivered.clear()

    def post(self, session: Session) -> None:
        if session.running:
            for tasks in batches(session.running, len):
                self.sessions.send(session, Running(tasks))
            session.running = []
        if session.finals:
            for batch in batches(session.finals, final_bytes):
                self.sessions.send(session, Finals(batch))
            session.finals = []

    # --- what is to be written down ----------------------------------------------------------------------------------

    def record(self, owner: bytes, body: RecordMessage) -> None:
        if self.ledger is not None:
            self.ledger.record(owner, body)

    def charge(self, task: Task) -> None:
        self.record(b"", self.charged(task))

    def charged(self, task: Task) -> Charged:
        once = not task.kind.options.requeue and (task.node or task.id in self.limbo)
        return Charged(task.id, task.attempt if once else 0, task.failures, task.deaths)

    @property
    def keeps_nothing(self) -> bool:
        """No task that anybody wants is open, and no answer kept: a journal of this state is empty."""
        return not any(owner.open or owner.answers or owner.unwritten for owner in self.owners)

    # --- once a round ------------------------------------------------------------------------------------------------

    def expire_waiting(self) -> None:
        """A job's tasks whose function never came: whoever has it is gone. Those of a client end with the client."""
        helpless = [
            digest
            for digest, tasks in self.waiting.items()
            if not self._asked.get(digest) and all(task.owner.job for task in tasks.values())
        ]
        self._waiting_since = {digest: self._waiting_since.get(digest, self.now) for digest in helpless}
        text = "the task's function has not arrived: the client that submitted it is gone"
        for digest, since in self._waiting_since.items():
            if self.now - since > self._settings.client_lease_s:
                for task in list(self.waiting.get(digest, {}).values()):
                    if task.state is WAITING:  # it may have waited for the result of one that has just ended
                        self.finish(task, Final(task.id, "NotAccepted", text=text))

    def expire_offers(self) -> None:
        """What runs for a client that did not come back in its time is ended."""
        for task_id, (node_id, attempt, since) in list(self.offers.items()):
            if self.now - since > self._settings.client_lease_s:
                del self.offers[task_id]
                session = self.sessions.of(self.nodes[node_id])
                self.sessions.send(session, Revoke([Attempt(task_id, attempt)], force=True))

    def expire_limbo(self) -> None:
        """The nodes that may have started these tasks will not come back."""
        for task in list(self.limbo.values()):
            self._fail(task, "the broker died while the task may have been running, and its node did not come back")

    def fail_hopeless(self, expected: Sequence[Node | Prospect]) -> None:
        """Tasks that no node can ever hold, here or of those that may come."""
        if not self.nodes:
            return  # they may all be on their way: nothing is known about what they will offer
        hopeless = self.placement.hopeless(expected)
        for lane in self.placement.lanes():
            if lane not in hopeless:
                lane.unservable_since = None
        for lane in hopeless:
            if lane.unservable_since is None:
                lane.unservable_since = self.now
            elif self.now - lane.unservable_since >= self._settings.unservable_after_s:
                text = why_hopeless(lane, self.nodes.values())
                for task in list(lane.tasks):
                    self.finish(task, Final(task.id, "Unschedulable", text=text))

    def shrink(self) -> bool:
        """A dict keeps the room it once needed; give it back when most of it is unused. Returns whether it was."""
        if self._most_tasks <= 10_000 or self._most_tasks <= 4 * len(self.tasks):
            return False
        self.tasks = {task_id: task for task_id, task in self.tasks.items()}  # noqa: C416 - dict() would copy the room too
        self._most_tasks = len(self.tasks)
        return True

    def task_counts(self) -> list[tuple[str, int]]:
        running = sum(len(node.tasks) for node in self.nodes.values())
        queued = self.placement.queued
        waiting = len(self.tasks) - running - queued - len(self.delayed)
        return [("waiting", waiting), ("queued", queued), ("delayed", len(self.delayed)), ("assigned", running)]
