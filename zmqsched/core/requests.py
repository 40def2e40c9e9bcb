"""The client's brain: what it has asked for and has no answer to yet, and how that survives the broker's absence.

Contract as the scheduler's. Every task asked for is kept, call and all, until its answer has come; a broker that does not
know this client has all of them submitted to it. Task ids are made here, so that the broker recognises what it has already.
An answer is handed out once: later ones of the same task find nothing here and are dropped.

A broker that remembers this client is only told the ids of what was submitted before, and says what it lacks: an answer
and a second submission of the same task can cross in no way.

Results of tasks are kept as long as others that have them as arguments are open (``inputs.py``): the broker asks for those
that it has forgotten meanwhile. When an input fails, those who have it as an argument are answered here, whatever the broker
knows of them.

Tasks are *fresh* until they are handed to the link: while there is no session, while the broker says ``Hold``, and while
``WINDOW_BYTES`` of them are on their way. ``waiting`` says how much that is, for the owner to stop asking. What must not
overtake the tasks asked for before it waits behind them. Additions to WaitGroups do not: they must not be overtaken by tasks
that count down.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Collection, Iterable, Mapping
from itertools import islice
from typing import Literal, TypeAlias, TypeGuard

from ..config import BEAT_INTERVAL_S, CLIENT_LEASE_S, CLUSTER_LOST_AFTER_S
from ..protocol import (
    BATCH_BYTES,
    BATCH_ITEMS,
    MAX_ITEMS,
    Cancel,
    ChangeKeys,
    ClientHello,
    CommandDone,
    Envelope,
    Fence,
    Final,
    Finals,
    Follow,
    Function,
    Functions,
    Goodbye,
    GroupAdd,
    GroupDone,
    GroupForget,
    GroupWait,
    Hold,
    Inputs,
    JobTasks,
    KeyReport,
    Message,
    NeedFunctions,
    NeedInputs,
    NewKeys,
    No,
    Notice,
    Output,
    Payload,
    Query,
    Report,
    Running,
    SayHello,
    Shape,
    StillOpen,
    Submit,
    TaskSpec,
    Unknown,
    Welcome,
    batches,
    payload_bytes,
    shape_bytes,
    tag_of,
    wire_bytes,
)  # fmt: skip
from . import inputs
from .events import (
    Ask,
    Asked,
    Began,
    Broken,
    ClientAction,
    ClientEvent,
    Finished,
    Heard,
    Leave,
    NowRunning,
    Quit,
    Reached,
    Reconnected,
    Replied,
    SetFence,
    Tell,
    TellNode,
    Tick,
    ToBroker,
    Unreadable,
    UseKeys,
    Warned,
    Withdraw,
)  # fmt: skip
from .fences import Fences
from .functions import FunctionStore, function_bytes
from .ledger import final_bytes
from .load import INPUT_BYTES, RECORD_BYTES
from .offences import Strikes
from .uplink import Uplink

MAX_SENT_FUNCTIONS = 4_096  # digests remembered as sent; past it, functions are sent again
WARN_AFTER_S = 5.0
DELIVERY_TIMEOUT_S = 10.0  # for a job's tasks to be accepted, when their client leaves | Resumed
_Ordered: TypeAlias = GroupAdd | GroupWait | GroupForget | Cancel | Query | Follow | ChangeKeys
WINDOW_BYTES = 32 * 1024 * 1024  # what a client sends before it hears that it arrived, and whether the broker takes more


class Requests:
    def __init__(self, hello: ClientHello, lost_after_s: float = CLUSTER_LOST_AFTER_S) -> None:
        self._uplink = Uplink(hello, BEAT_INTERVAL_S, CLIENT_LEASE_S)
        self._open: dict[bytes, Asked] = {}
        self._inputs: inputs.Inputs[Asked] = inputs.Inputs()
        self._lacked: dict[bytes, None] = {}  # inputs that the broker asks for and we have no answer to either
        self._withdrawn: dict[bytes, bool] = {}  # not answered, and not wanted any more; True: by force
        self._lapsed: dict[bytes, Shape] = {}  # answered here, may be known to the broker or not, and owe to WaitGroups
        self._fresh: dict[bytes, Asked] = {}  # asked for, not yet submitted
        self._doubts = 0  # questions what the broker still has, unanswered
        self._behind: list[_Ordered] = []  # to go out after the fresh ones
        self._on_the_way: deque[int] = deque()  # bytes of each submission that is not acknowledged
        self._window = WINDOW_BYTES  # what may still be sent of them
        self._held = False
        self._nested = hello.nested  # then it is not held: what it waits for may be what the broker is full of
        self.waiting = 0  # bytes of the fresh ones
        self.taken = 0  # bytes of all that was ever asked for
        self._functions = FunctionStore()
        self._sent: set[bytes] = set()
        self._asked: dict[int, GroupWait | Query | Follow | ChangeKeys] = {}  # requests without a reply
        self._jobs: dict[str, set[bytes]] = {}  # unanswered tasks, not ours, of the jobs we follow
        self._listed: dict[str, list[bytes]] = {}  # of a job's tasks, those named so far
        self._additions = 0  # to WaitGroups
        self._fences = Fences(hello.incarnation)
        self._lost_after_s = lost_after_s
        self._heard_at: float | None = None
        self._ticked_at: float | None = None
        self._warned = False
        self._leave_by = math.inf
        self._leave_why = ""
        self._ended = False
        self._out: list[ClientAction] = []
        self.counts: Counter[str] = Counter()
        self._strikes = Strikes()

    def handle(self, event: ClientEvent, now: float) -> list[ClientAction]:
        if not self._fences.keeps(event):
            self._take(event, now)
        out, self._out = self._out, []
        return out

    def _take(self, event: ClientEvent, now: float) -> None:
        match event:
            case Ask(tasks, functions, values):
                self._ask(tasks, functions, values)
            case Reached():
                if not self._ended:
                    self._reached(event.envelope, now)
            case Reconnected():
                self._uplink.reconnected()
            case Tick():
                self._tick(now)
            case Withdraw(tasks, force):
                self._withdraw(tasks, force=force)
            case Unreadable(why):
                self._unreadable(why, now)
            case Tell(message):
                if isinstance(message, GroupWait | Query | Follow | ChangeKeys):
                    self._asked[message.request] = message
                elif isinstance(message, GroupForget):
                    self._asked.pop(message.request, None)
                self._submit()
                if isinstance(message, GroupAdd) and _is_addition(message):
                    self._uplink.send(self._numbered(message))
                elif isinstance(message, GroupAdd | GroupWait | GroupForget | Follow):
                    self._send_behind(message)
                else:
                    self._uplink.send(message)
            case SetFence():
                self._out.append(TellNode(self._fences.set()))
            case Leave(drain, reason):
                self._leave_by = now + (DELIVERY_TIMEOUT_S if drain else 0.0)
                self._leave_why = reason

    def next_deadline(self) -> float:
        if self._ended:
            return math.inf
        if self._due or (self._leave_by < math.inf and self._delivered):
            return 0.0
        return min(self._uplink.deadline(), self._warn_at(), self._leave_by)

    def sanity_check(self) -> None:
        assert self._fresh.keys() <= self._open.keys(), "a task to submit is not open"
        assert self.waiting == _bytes(self._fresh.values()), "bytes that wait are off"
        assert self._window + sum(self._on_the_way) == WINDOW_BYTES, "bytes on the way are off"
        assert self._fresh or self._doubts or not self._behind, "what waits behind tasks waits behind none"
        assert all(map(self._awaits, self._withdrawn)), "a task that was answered is withdrawn"
        assert all(map(self._awaits, self._inputs.lacking())), "a task waits for what nobody will answer"
        assert all(map(self._awaits, self._lacked)), "an answer that was given is kept for the broker"
        self._inputs.sanity_check({task: entry.inputs for task, entry in self._open.items() if entry.inputs})
        assert not self._lapsed.keys() & self._open.keys(), "a task that waits for its answer has lapsed"
        self._fences.sanity_check()
        if self._uplink.link is not None:
            self._uplink.link.sanity_check()

    @property
    def open(self) -> int:
        return len(self._open)

    @property
    def held(self) -> bool:
        """The broker takes no more for now."""
        return self._held

    def _ask(self, tasks: list[Asked], functions: Mapping[bytes, Payload], values: Mapping[bytes, Payload]) -> None:
        named: dict[bytes, int] = {}
        for entry in tasks:
            self._open[entry.task] = self._fresh[entry.task] = entry
            if entry.inputs:
                self._inputs.need(entry.task, entry, entry.inputs)
            function = entry.shape.function
            named[function] = named.get(function, 0) + 1
        size = _bytes(tasks)
        self.waiting += size
        self.taken += size
        for task, value in values.items():
            self._inputs.arrive(task, value)
        for digest, times in named.items():
            self._functions.hold(digest, times)
        for digest, blob in functions.items():
            self._functions.add(digest, blob)

    def _numbered(self, addition: GroupAdd) -> GroupAdd:
        self._additions += 1
        return GroupAdd(addition.deltas, self._additions)

    def _withdraw(self, tasks: list[bytes], *, force: bool) -> None:
        """What is fresh need not be submitted first. An earlier session may have submitted it, so the broker is told too."""
        self._submit()
        wanted = [task for task in tasks if self._awaits(task)]
        for task in wanted:
            self._withdrawn[task] = force or self._withdrawn.get(task, False)
        why = "cancelled before it was submitted"
        self._answer_here([task for task in wanted if task in self._fresh], "cancelled", why)
        for batch in batches(wanted, len):
            self._uplink.send(Cancel(batch, force))

    def _reached(self, envelope: Envelope, now: float) -> None:
        message = self._uplink.receive(envelope, now)
        if (link := self._uplink.link) is not None:
            for _ in link.delivered:
                self._window += self._on_the_way.popleft()
            link.delivered.clear()
        if self._uplink.heard_at == now:
            self._heard_at = now
            self._warned = False
        if message is not None:
            self._message(message, now)

    def _message(self, message: Message, now: float) -> None:
        match message:
            case Finals(finals):
                self._finals(finals)
            case Running(tasks):
                self._out.append(NowRunning([task for task in tasks if self._awaits(task)]))
            case GroupDone() | Report() | KeyReport():
                if self._asked.pop(message.request, None) is not None:
                    self._out.append(Replied(message))
            case CommandDone():
                self._out.append(Replied(message))
            case Fence():
                for event in self._fences.passed(message):
                    self._take(event, now)
            case Unknown(tasks):
                self._doubts -= 1
                self._lapse(tasks)
                self._wait_again([self._open[task] for task in tasks if task in self._open])
                self._send_what_waits()
            case JobTasks():
                self._job_listed(message)
            case NeedInputs(tasks):
                self._give_inputs(tasks)
            case NeedFunctions(digests):
                known = [Function(digest, self._functions[digest]) for digest in digests if digest in self._functions]
                for batch in batches(known, function_bytes):
                    self._uplink.send(Functions(batch))
                if unknown := [digest for digest in digests if digest not in self._functions]:
                    self._uplink.send(Functions([], unknown))
            case Output():
                self._heard(message)
            case Hold(on):
                self._held = on and not self._nested
            case Welcome():
                self._welcomed(message)
            case NewKeys(public, secret):
                self._out.append(UseKeys(public, secret))
            case Notice(text):
                self._out.append(Warned(text))
            case No(_, text):
                self._break("refused", text)
            case Goodbye(reason):
                self._uplink.send(Goodbye("as told"))
                self._out.extend(ToBroker(envelope) for envelope in self._uplink.flush(now))
                self._break("lost", reason)
            case SayHello():
                pass  # the uplink says it
            case _:
                self.counts[f"dropped: {type(message).__name__} from the broker"] += 1

    def _unreadable(self, why: str, now: float) -> None:
        """What the broker will send again for ever, with all answers that wait behind it: that is told, not waited for."""
        self.counts["dropped: malformed message"] += 1
        if not self._ended and self._strikes.add(now):
            self._break("lost", f"what the broker says cannot be read: {why}; install the same zmqsched on both sides")

    def _welcomed(self, welcome: Welcome) -> None:
        self._out.append(Began(welcome))
        if (fence := self._fences.last) is not None:
            self._out.append(TellNode(fence))
        self._sent.clear()
        self._lacked.clear()
        again = [body for body in [*self._uplink.undelivered, *self._behind] if self._is_worth_saying_again(body)]
        self._uplink.undelivered.clear()
        self._behind.clear()
        self._listed.clear()
        self._doubts = 0
        for body in again:
            if _is_addition(body):
                self._uplink.send(body)
        withdrawn = self._withdrawals()
        if not welcome.remembered:
            self._give_up_what_may_have_run()
            self._lapse(list(self._lapsed))
        self._held = False
        self._on_the_way.clear()
        self._window = WINDOW_BYTES
        if welcome.remembered:
            submitted = [*(task for task in self._open if task not in self._fresh), *self._lapsed]
            for start in range(0, len(submitted), MAX_ITEMS):
                self._uplink.send(StillOpen(submitted[start : start + MAX_ITEMS]))
                self._doubts += 1
        else:
            self._wait_again(self._open.values())
        again = [body for body in again if not _is_addition(body)]
        for body in [*again, *self._asked.values(), *(Follow(0, job) for job, tasks in self._jobs.items() if tasks)]:
            self._send_behind(body)
        for body in withdrawn:
            self._send_behind(body)

    def _wait_again(self, entries: Iterable[Asked]) -> None:
        """To be submitted, with the next tick: this broker does not have them."""
        again = {entry.task: entry for entry in entries if entry.task not in self._fresh}
        self._fresh = {**again, **self._fresh}
        self.waiting += _bytes(again.values())

    def _give_inputs(self, tasks: list[bytes]) -> None:
        """What the broker lacks we have been answered; or shall be, with an answer that is on its way; or shall submit. Of
        anything else we know nothing any more: who waits for it is answered already."""
        finals = []
        for task in tasks:
            if task in self._inputs and (value := self._inputs[task].value) is not None:
                finals.append(Final(task, "ok", value))
            elif not self._awaits(task):
                finals.append(Final(task, "cancelled", text="its client does not know it any more"))
            else:
                self._lacked[task] = None
        for batch in batches(finals, final_bytes):
            self._uplink.send(Inputs(batch))

    def _withdrawals(self) -> list[Cancel]:
        """For a broker that may not have heard of them, nor of the tasks; so those are not submitted again."""
        cancels = []
        for force in (False, True):
            tasks = [task for task, by_force in self._withdrawn.items() if by_force is force]
            cancels += [Cancel(batch, force) for batch in batches(tasks, len)]
        why = "cancelled; the broker that had the task is gone, or gave this client up"
        lapsed = [task for task in self._withdrawn if task in self._open]
        owing = {task: self._open[task].shape for task in lapsed if self._open[task].shape.options.holds}
        self._finals([Final(task, "cancelled", text=why) for task in lapsed])
        self._lapsed.update(owing)
        return cancels

    def _lapse(self, tasks: list[bytes]) -> None:
        """The broker does not know these."""
        for task in tasks:
            if (shape := self._lapsed.pop(task, None)) is not None:
                self._fail_groups(task, shape, "it was not submitted")

    def _is_worth_saying_again(self, body: Message) -> TypeGuard[_Ordered]:
        """What the last session did not deliver. What is withdrawn and not answered is said to each new session anyhow."""
        return isinstance(body, GroupAdd) or (isinstance(body, Cancel) and not self._withdrawn.keys() >= set(body.tasks))

    def _job_listed(self, message: JobTasks) -> None:
        """What a job has; or (request 0) what it still has at the next broker, or in the next session."""
        listed = self._listed.setdefault(message.job, [])
        listed.extend(message.tasks)
        if message.more:
            return
        del self._listed[message.job]
        followed = self._jobs.setdefault(message.job, set())
        why = f"the broker that kept the job {message.job!r} is gone, and the one that is there now does not know it"
        self._finals([Final(task, "ClusterLost", text=why) for task in followed.difference(listed)])
        if self._asked.pop(message.request, None) is not None:
            followed.update(task for task in listed if task not in self._open)
            self._out.append(Replied(JobTasks(message.request, message.job, listed)))

    def _give_up_what_may_have_run(self) -> None:
        """The broker, or its memory of us, is another. What was submitted to the old one may have run."""
        open_ = [entry for entry in self._open.values() if not entry.shape.options.requeue]
        once = [entry.task for entry in open_ if entry.task not in self._fresh]
        why = "the broker that had the task is gone, or gave this client up; requeue=False forbids another try"
        self._answer_here(once, "WorkerDied", why)

    def _answer_here(self, tasks: list[bytes], verdict: Literal["cancelled", "WorkerDied"], why: str) -> None:
        for task in tasks:
            self._fail_groups(task, self._open[task].shape, why)
        self._finals([Final(task, verdict, text=why) for task in tasks])

    def _fail_groups_of(self, entry: Asked, final: Final, *, fresh: bool) -> None:
        if fresh or final.verdict == "NotAccepted":
            self._fail_groups(entry.task, entry.shape, final.text)
        else:  # the broker knows that the input has failed, unless it does not know the task
            self._lapsed[entry.task] = entry.shape

    def _fail_groups(self, task: bytes, shape: Shape, why: str) -> None:
        """The task was not submitted, or not accepted, so what it owes to WaitGroups is lost."""
        if shape.options.holds:
            parent = shape.options.parent
            within = b"" if parent is None else parent.task
            failed = f"{tag_of(task, shape)}: {why}"
            self._send_behind(GroupAdd([(group, 0) for group in shape.options.holds], task=within, failed=failed))

    def _finals(self, finals: list[Final]) -> None:
        news = []
        released: dict[bytes, int] = {}
        answers = deque(finals)
        passed_on: set[bytes] = set()
        while answers:
            final = answers.popleft()
            task = final.task
            withdrawn = self._withdrawn.pop(task, None) is not None
            if task in self._lapsed and task not in passed_on:
                shape = self._lapsed.pop(task)
                if final.verdict == "NotAccepted":
                    self._fail_groups(task, shape, final.text)
            entry = self._open.pop(task, None)
            if entry is not None:
                shape = entry.shape
                fresh = self._fresh.pop(task, None) is not None
                if fresh:
                    self.waiting -= _bytes([entry])
                if shape.options.holds and (final.verdict == "NotAccepted" or task in passed_on):
                    self._fail_groups_of(entry, final, fresh=fresh)
                if entry.inputs:
                    self._inputs.release(task, entry.inputs)
                released[shape.function] = released.get(shape.function, 0) + 1
                news.append(final)
            elif self._awaits(task):
                news.append(final)
                for tasks in self._jobs.values():
                    tasks.discard(task)
            else:
                continue
            if task in self._inputs or task in self._lacked:
                if withdrawn and final.verdict == "ok":
                    final = Final(task, "cancelled", text="it had started when it was cancelled")
                failed = self._pass_on(final, None if entry is None else entry.shape)
                passed_on.update(each.task for each in failed)
                answers.extend(failed)
        for digest, times in released.items():
            self._functions.release(digest, times)
        if news:
            self._out.append(Finished(news))
        self._send_what_waits()

    def _pass_on(self, final: Final, shape: Shape | None) -> list[Final]:
        """A task is answered that others have as an argument: their answers, if it failed."""
        if final.task in self._lacked:
            del self._lacked[final.task]
            self._uplink.send(Inputs([final]))
        if final.verdict == "ok":
            self._inputs.arrive(final.task, final.value)
            return []
        return [inputs.failed(user.task, final, shape) for user in self._inputs.waiting_for(final.task)]

    def _heard(self, output: Output) -> None:
        words = [(each, self._shape(each.task)) for each in output.words if self._awaits(each.task)]
        advances = [each for each in output.advances if self._awaits(each.task)]
        if words or advances:
            self._out.append(Heard(words, advances, output.node))

    def _shape(self, task: bytes) -> Shape | None:
        return self._open[task].shape if task in self._open else None

    def _awaits(self, task: bytes) -> bool:
        """It is ours, or of a job that we follow, and unanswered."""
        return task in self._open or any(task in tasks for tasks in self._jobs.values())

    def _tick(self, now: float) -> None:
        if self._ended:
            return
        self._watch(now)
        self._submit()
        self._out.extend(ToBroker(envelope) for envelope in self._uplink.flush(now))
        if self._leave_by < math.inf and (now >= self._leave_by or self._delivered):
            self._uplink.send(Goodbye(self._leave_why))
            self._out.extend(ToBroker(envelope) for envelope in self._uplink.flush(now))
            self._ended = True
            self._out.append(Quit(self._leave_why))

    @property
    def _delivered(self) -> bool:
        """The broker has accepted all that was asked for."""
        link = self._uplink.link
        return not self._fresh and link is not None and not link.unfinished()

    @property
    def _due(self) -> Collection[Asked]:
        """What may be submitted now. Nothing before it is known what the broker lacks of what was submitted: that is first.
        A broker that is full may be so of tasks that need the results of others: these go out all the same."""
        if self._uplink.link is None or self._doubts:
            return ()
        if self._held:
            return [self._fresh[task] for task in self._lacked if task in self._fresh]
        return self._fresh.values() if self._window > 0 else ()

    def _submit(self) -> None:
        if len(self._sent) > MAX_SENT_FUNCTIONS:
            self._sent.clear()
        while due := self._due:
            self._submit_batch(due)
        self._send_what_waits()

    def _submit_batch(self, due: Iterable[Asked]) -> None:
        """One message with the first of these, as many as it may hold."""
        batch: list[Asked] = []
        specs: list[TaskSpec] = []
        shapes: dict[Shape, tuple[int, int]] = {}  # its number in the message, and what it adds to each task's bytes
        functions: dict[bytes, Function] = {}
        room = BATCH_BYTES
        for entry in islice(due, BATCH_ITEMS):
            shape, call, inputs = entry.shape, entry.call, entry.inputs
            number, size = shapes.get(shape) or (len(shapes), shape_bytes(shape))
            room -= size + (len(call) if type(call) is bytes else wire_bytes(call)) + 20 * len(inputs)
            if number == len(shapes):
                digest = shape.function
                lacks = digest not in self._sent and digest not in functions
                if lacks:
                    room -= wire_bytes(self._functions[digest])
            if room < 0 and batch:
                break
            if number == len(shapes):
                shapes[shape] = number, size
                if lacks:
                    functions[digest] = Function(digest, self._functions[digest])
            batch.append(entry)
            specs.append(TaskSpec(entry.task, number, call, inputs))
        for entry in batch:
            del self._fresh[entry.task]
        if self._lacked:
            for entry in batch:
                self._lacked.pop(entry.task, None)
        size = _bytes(batch)
        self.waiting -= size
        self._window -= size
        self._on_the_way.append(size)
        self._sent |= functions.keys()
        self._uplink.send(Submit(list(shapes), specs, list(functions.values())))

    def _send_what_waits(self) -> None:
        if self._behind and not self._fresh and not self._doubts:
            for message in self._behind:
                self._uplink.send(message)
            self._behind.clear()

    def _send_behind(self, message: _Ordered) -> None:
        """What was asked for before this is to arrive before it."""
        if self._fresh or self._behind or self._doubts:
            self._behind.append(message)
        else:
            self._uplink.send(message)

    def _watch(self, now: float) -> None:
        gap = 0.0 if self._ticked_at is None else now - self._ticked_at
        self._ticked_at = now
        if self._heard_at is None:
            self._heard_at = now
        if gap > 2 * BEAT_INTERVAL_S:  # this process was stopped: the broker was not silent, nobody listened
            self._heard_at += gap
        if now >= self._heard_at + self._lost_after_s:
            self._break("lost", f"the broker has been silent for {now - self._heard_at:.0f} s")
        elif now >= self._warn_at():
            self._warned = True
            self._out.append(Warned(f"the broker has been silent for {now - self._heard_at:.0f} s; still trying"))

    def _warn_at(self) -> float:
        if self._heard_at is None:
            return 0.0
        return self._heard_at + (self._lost_after_s if self._warned else WARN_AFTER_S)

    def _break(self, code: str, reason: str) -> None:
        self._ended = True
        self._out.append(Broken("refused" if code == "refused" else "lost", reason))


def _bytes(entries: Collection[Asked]) -> int:
    """As ``call_bytes``, of all of them together."""
    total = RECORD_BYTES * len(entries)
    for each in entries:
        total += len(each.call) if type(each.call) is bytes else payload_bytes(each.call)
        if each.inputs:
            total += INPUT_BYTES * len(each.inputs)
    return total


def _is_addition(message: Message) -> bool:
    return isinstance(message, GroupAdd) and not message.failed
