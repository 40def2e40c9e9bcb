"""The one protocol: every message between clients, broker, nodes and workers. Their bytes are in ``codec.py``.

Rules
-----
* A message on a ZeroMQ link lies in an :class:`Envelope`. One on a worker's pipe has none: the kernel keeps a pipe's order
  and loses nothing.
* Whatever can be many travels as many: a message carries lists.
* A **payload** is pickled bytes that only clients and workers ever look into. In memory it is ``bytes``, or a list of
  buffers (the pickle stream, then its out-of-band buffers).
* Types, lengths and ranges are stated here; whoever decodes a message has them checked.
* A new field has a default and comes last: that is a new minor version.

Sessions, sequence numbers and acknowledgements (the envelope's fields) are explained in ``core/link.py``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Annotated, Literal, TypeAlias, TypeVar

from msgspec import Meta, Struct

from .config import BEAT_INTERVAL_S, ROLES, SUSPECT_AFTER_BEATS, Role

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer as Buffer

MAGIC = b"ZQ"
MAJOR, MINOR = 1, 3

# Limits. A frame costs ZeroMQ about a microsecond and copying 16 KiB about as much: below that, inline wins.
INLINE_MAX = 16 * 1024
# Senders cut batches near BATCH_BYTES; MAX_HEADER leaves room for the last item of a batch and for names.
BATCH_BYTES = 256 * 1024
BATCH_ITEMS = 2_000
MAX_HEADER = 4 * 1024 * 1024
MAX_ITEMS = 10_000
MAX_FRAMES = 1_024
MAX_PARTS = 256  # frames of one payload: a task and its function must fit a message together
MAX_TEXT = 64 * 1024
MAX_DEPTH = (1 << 16) - 1  # of nested tasks; deeper ones count as this deep
MAX_WORDS = 64 * 1024  # of what a task prints: as much as its future keeps
MAX_ADVANCE_TEXT = 200
MAX_HELD = 64  # WaitGroups that a call refers to
MAX_DELTA = 2**31  # of one addition to a WaitGroup
# What a task does not need while it waits for others. What it has in memory stays there, and what else it asks for (a
# licence, a disk) may still be in use.
LENT = frozenset({"cpu", "gpu"})
# One call or one result. libzmq cuts a link at an oversize frame without a word, so the sender checks (pitfall 6).
MAX_PAYLOAD = 1 << 30

T = TypeVar("T")

Payload: TypeAlias = "bytes | list[Buffer]"

TaskId = Annotated[bytes, Meta(min_length=16, max_length=16)]
Digest = Annotated[bytes, Meta(min_length=16, max_length=16)]
Token = Annotated[bytes, Meta(min_length=16, max_length=16)]
Count = Annotated[int, Meta(ge=0, le=2**53)]
Name = Annotated[str, Meta(max_length=255)]
Text = Annotated[str, Meta(max_length=MAX_TEXT)]
Excerpt = Annotated[str, Meta(max_length=8 * 1024)]
Amount = Annotated[float, Meta(ge=0, le=2**60)]
_Key = Annotated[str, Meta(min_length=40, max_length=40)]  # Z85
if TYPE_CHECKING:
    _Inline = Payload
else:  # what the header itself may hold
    _Inline = bytes | Annotated[int, Meta(ge=1, le=MAX_PARTS)]


class _Wire(Struct, array_like=True, frozen=True, gc=False):
    """Fields travel by position; appending one with a default is a minor version."""


# --- what messages are made of -----------------------------------------------------------------------------------


class Attempt(_Wire):
    """Names one attempt of one task."""

    task: TaskId
    attempt: Count


class Options(_Wire):
    """What a task asks for, apart from its call. Frozen and hashable: tasks that ask alike share one.

    ``resources`` are (name, amount) sorted by name; ``memory`` is in bytes. ``group`` is the WaitGroup that the task's end
    counts down. ``requeue=False`` with ``retries=0`` means at most one execution. ``backoff``: seconds before the first
    retry. ``job``: the task is answered to the job of that name, which any client may follow, and not to the client that
    submitted it. ``timeout``: seconds that a run may take, 0 for any. ``holds``: the WaitGroups that the call or the
    function refers to. ``depth``: how deep the task is nested in others, which may wait for it: of equal priority the
    deeper goes first, so that few have to wait. ``parent``: the attempt whose code has submitted the task, if it ``holds``
    any WaitGroup.
    """

    priority: Annotated[int, Meta(ge=-(2**31), le=2**31)] = 0
    retries: Annotated[int, Meta(ge=0, le=1_000_000)] = 0
    resources: Annotated[tuple[tuple[Name, Amount], ...], Meta(max_length=64)] = (("cpu", 1.0),)
    tags: Annotated[tuple[Name, ...], Meta(max_length=64)] = ()
    name: Name = ""
    group: Annotated[bytes, Meta(max_length=16)] = b""
    requeue: bool = True
    backoff: Amount = 0.0
    job: Name = ""
    timeout: Amount = 0.0
    holds: Annotated[tuple[Token, ...], Meta(max_length=MAX_HELD)] = ()
    depth: Annotated[int, Meta(ge=0, le=MAX_DEPTH)] = 0
    parent: Attempt | None = None

    @property
    def rank(self) -> int:
        """Higher goes first."""
        return self.priority * (MAX_DEPTH + 1) + self.depth


class Shape(_Wire, cache_hash=True):
    """What many tasks have in common: the function, by digest, and the options. ``label``: the function's name, for messages
    about these tasks."""

    function: Digest
    options: Options = Options()
    label: Name = ""


def tag_of(task: bytes, shape: Shape | None) -> str:
    """A task's name and its number among those of its client."""
    name = "task" if shape is None else shape.options.name or shape.label.rsplit(".", 1)[-1].strip("<>")
    return f"{''.join(c if c.isprintable() else '?' for c in name)[:40] or 'task'}-{int.from_bytes(task[8:], 'big')}"


class Function(_Wire):
    """What tasks need besides their calls, and may share. Inputs travel to nodes so too, by names that the broker gives."""

    digest: Digest
    blob: _Inline


class TaskSpec(_Wire):
    """A task as its client made it; ``shape`` is an index into the message's shapes. ``inputs``: the tasks whose results are
    arguments of its call."""

    task: TaskId
    shape: Annotated[int, Meta(ge=0, lt=MAX_ITEMS)]
    call: _Inline
    inputs: Annotated[tuple[TaskId, ...], Meta(max_length=MAX_ITEMS)] = ()


class Order(_Wire):
    """One attempt at a task, as the broker sends it to a node. ``inputs``: the tasks whose results are arguments, and by
    what name each result travels."""

    task: TaskId
    attempt: Count
    shape: Annotated[int, Meta(ge=0, lt=MAX_ITEMS)]
    call: _Inline
    inputs: Annotated[tuple[tuple[TaskId, Digest], ...], Meta(max_length=MAX_ITEMS)] = ()


class Input(_Wire):
    """What a task has returned, for one that has it as an argument."""

    task: TaskId
    value: _Inline


class Outcome(_Wire):
    """How an attempt ended, as its worker said it: a value, or an exception, which ``retry`` allows to be retried.
    ``ran_s``: how long it took."""

    task: TaskId
    attempt: Count
    ok: bool
    value: _Inline
    worker: Count
    retry: bool = True
    ran_s: Amount = 0.0


class Remains(_Wire):
    """What a dead worker left. ``stack``: of its Python calls, the latest first; ``stderr``: the end of what it wrote there.
    ``memory``, ``peak``: bytes of resident set when last measured and at most, 0 if unknown; ``oom``: the kernel has killed
    for want of memory at that time, and this worker was killed."""

    stack: Excerpt = ""
    stderr: Excerpt = ""
    memory: Count = 0
    peak: Count = 0
    oom: bool = False


class Death(_Wire):
    """A worker died. ``task`` is the attempt it was running, if any, since ``ran_s``; ``how`` is one readable phrase.
    ``blamed``: the task may be the cause."""

    worker: Count
    pid: Count
    how: Text
    task: Annotated[bytes, Meta(max_length=16)] = b""
    attempt: Count = 0
    ran_s: Amount = 0.0
    remains: Remains = Remains()
    blamed: bool = True


Verdict = Literal[
    "ok", "error", "cancelled", "WorkerDied", "Unschedulable", "NotAccepted", "ClusterLost", "TaskTimeout",
    "DependencyFailed", "TooManyWaiting",
]  # fmt: skip


class Final(_Wire):
    """A task's one final answer. ``value`` belongs to "ok" and "error"; the others explain themselves in ``text``.

    "DependencyFailed" has an input's end as its cause: ``cause`` is that verdict, ``why`` its text, ``value`` its exception.
    """

    task: TaskId
    verdict: Verdict
    value: _Inline = b""
    text: Text = ""
    cause: Verdict = "ok"
    why: Text = ""


class Stopped(_Wire):
    """An attempt that its node has ended; ``text`` says how."""

    task: TaskId
    attempt: Count
    verdict: Literal["cancelled", "TaskTimeout", "TooManyWaiting"]
    text: Text


class Words(_Wire):
    """What an attempt has written to standard output (``stream`` 1) or error (2): ``text``, behind ``at`` bytes with
    ``lines`` line ends among them. Whoever passes it on may leave some out: what comes next tells how much."""

    task: TaskId
    attempt: Count
    worker: Count
    stream: Literal[1, 2]
    at: Count
    lines: Count
    text: Annotated[bytes, Meta(max_length=MAX_WORDS)]


class Advance(_Wire):
    """How far an attempt has come, as it says itself."""

    task: TaskId
    attempt: Count
    fraction: Annotated[float, Meta(ge=0, le=1)]
    text: Annotated[str, Meta(max_length=MAX_ADVANCE_TEXT)] = ""


class WorkerState(_Wire):
    """A worker as its node sees it. ``cpu`` in percent of one core, ``memory`` in bytes of resident set. ``worn``: it gets
    no other task, and is replaced when it is idle."""

    worker: Count
    pid: Count
    state: Literal["starting", "idle", "busy", "waiting"]
    done: Count = 0
    cpu: Amount = 0.0
    memory: Count = 0
    worn: bool = False


class Host(_Wire):
    """Where a process runs and with what."""

    host: Name
    pid: Count
    python: Name
    versions: Annotated[tuple[tuple[Name, Name], ...], Meta(max_length=64)] = ()


# --- messages that open, keep and close a session -----------------------------------------------------------------


class ClientHello(_Wire, tag=1):
    """``incarnation`` is new with each process, ``life`` with each session it asks for: a late copy of an earlier hello
    is recognised by it. :class:`Welcome` returns it. ``nested``: this is a task's client, whose incarnation says which
    worker's; its key may be its node's."""

    incarnation: Token
    life: Count
    where: Host
    nested: bool = False


def nested_incarnation(node: bytes, worker: int, number: int) -> bytes:
    """Of a client in a task: its node's process, its worker, and how many such clients that worker has had. So it can be
    told when nobody is there any more who waits for its tasks."""
    return node[:8] + worker.to_bytes(6, "big") + number.to_bytes(2, "big")


def nested_in(node: bytes, client: bytes) -> int | None:
    """The worker of this node that the client is in, if it is in one."""
    return int.from_bytes(client[8:14], "big") if client[:8] == node[:8] else None


class NodeHello(_Wire, tag=2):
    """``credit`` is how many unfinished tasks the node takes at once, the slots' own included. ``holding``: what it runs for
    a session that is over. ``label``: what its launcher calls it. ``leaves_in_s``: when it will be ended, 0 if nobody has
    said so (a batch system's walltime). ``paused``: as somebody has told it in an earlier session."""

    incarnation: Token
    life: Count
    where: Host
    slots: Annotated[int, Meta(ge=1, le=10_000)]
    credit: Annotated[int, Meta(ge=0, le=100_000)]
    resources: Annotated[tuple[tuple[Name, Amount], ...], Meta(max_length=64)]
    tags: Annotated[tuple[Name, ...], Meta(max_length=64)] = ()
    holding: Annotated[list[Attempt], Meta(max_length=MAX_ITEMS)] = []
    label: Name = ""
    leaves_in_s: Amount = 0.0
    paused: bool = False


class Welcome(_Wire, tag=3):
    """The broker's yes. ``session`` goes into every later envelope; ``epoch`` is new with each life of a broker.
    ``remembered``: the broker knows what this client has submitted before. ``lease_s``: for so long it gives no node up
    that it has heard."""

    session: Count
    life: Count
    epoch: Count
    name: Name
    beat_interval_s: Annotated[float, Meta(gt=0, le=3600)]
    remembered: bool = False
    lease_s: Annotated[float, Meta(gt=0, le=36_000)] = BEAT_INTERVAL_S * SUSPECT_AFTER_BEATS


class No(_Wire, tag=4):
    """The broker's no: why, and what to do about it."""

    code: Literal["version", "python", "role", "stopping", "malformed", "key"]
    text: Text


class SayHello(_Wire, tag=5):
    """The broker does not know this session: it restarted, or gave the peer up."""


class Ping(_Wire, tag=6):
    """``high`` is the highest sequence number sent before it, ``number`` the ping's own."""

    high: Count
    number: Count


class Pong(_Wire, tag=7):
    """The ping's numbers, returned. ``received``: the highest sequence number that has arrived in order, acknowledged or
    not yet."""

    high: Count
    number: Count
    received: Count = 0


class Ack(_Wire, tag=8):
    """Carries nothing but its envelope's acknowledgement."""


class Goodbye(_Wire, tag=9):
    reason: Text = ""


# --- client and broker ---------------------------------------------------------------------------------------------


class Submit(_Wire, tag=20):
    shapes: Annotated[list[Shape], Meta(max_length=MAX_ITEMS)]
    tasks: Annotated[list[TaskSpec], Meta(max_length=MAX_ITEMS)]
    functions: Annotated[list[Function], Meta(max_length=MAX_ITEMS)] = []


class Functions(_Wire, tag=21):
    """``unknown``: of those that were asked for, what the client does not have."""

    functions: Annotated[list[Function], Meta(max_length=MAX_ITEMS)]
    unknown: Annotated[list[Digest], Meta(max_length=MAX_ITEMS)] = []


class NeedFunctions(_Wire, tag=22):
    digests: Annotated[list[Digest], Meta(max_length=MAX_ITEMS)]


class Cancel(_Wire, tag=23):
    """``force``: also if it runs."""

    tasks: Annotated[list[TaskId], Meta(max_length=MAX_ITEMS)]
    force: bool = False


class Finals(_Wire, tag=24):
    finals: Annotated[list[Final], Meta(max_length=MAX_ITEMS)]


class Running(_Wire, tag=25):
    """These tasks of the client's were started. Sent for tasks that take a while; for the others the answer tells."""

    tasks: Annotated[list[TaskId], Meta(max_length=MAX_ITEMS)]


class GroupAdd(_Wire, tag=26):
    """Add to WaitGroup counters; ``done()`` is a delta of -1. ``number``: a process numbers its additions from 1, through
    all its sessions, so that one offered again is recognised. ``task``: whose code has said it, if a node tells.
    No deltas and a task: its ``attempt`` at that node is over, without a result; 0 if it was one of an earlier session.

    ``failed``: a task that held these groups has ended without counting down; which, and why. What deltas mean with it is in
    ``core/counting.py``. If a client says so, ``task`` is the one that it is in.
    """

    deltas: Annotated[list[tuple[Token, Annotated[int, Meta(ge=-MAX_DELTA, le=MAX_DELTA)]]], Meta(max_length=MAX_ITEMS)]
    number: Count = 0
    task: Annotated[bytes, Meta(max_length=16)] = b""
    failed: Text = ""
    attempt: Count = 0


class GroupWait(_Wire, tag=27):
    """``task``: whose code waits, if it does in a task."""

    request: Count
    group: Token
    task: Annotated[bytes, Meta(max_length=16)] = b""


class GroupForget(_Wire, tag=28):
    """The waiter gave up."""

    request: Count


class GroupDone(_Wire, tag=29):
    request: Count
    error: Text = ""


class Prospect(_Wire):
    """A node that could be started: what it would offer."""

    resources: Annotated[tuple[tuple[Name, Amount], ...], Meta(max_length=64)]
    tags: Annotated[tuple[Name, ...], Meta(max_length=64)] = ()


class Query(_Wire, tag=30):
    """Asks for a report; with ``tasks``, why those of them wait that the client may ask about. ``prospects``: nodes that the
    client, an administrator's, starts when they are wanted: what they could hold is not hopeless, until it asks anew."""

    request: Count
    tasks: Annotated[list[TaskId], Meta(max_length=MAX_ITEMS)] = []
    prospects: Annotated[list[Prospect], Meta(max_length=1_000)] = []


class NodeReport(_Wire):
    id: Name
    where: Host
    state: Name
    slots: Count
    credit: Count
    assigned: Count
    done: Count
    resources: tuple[tuple[Name, Amount], ...]
    free: tuple[tuple[Name, float], ...]
    tags: tuple[Name, ...]
    workers: list[WorkerState]
    silent_s: float
    label: Name = ""
    leaves_in_s: Amount = 0.0


class Report(_Wire, tag=31):
    """``waiting``: how many tasks have not started for what reason, most first. ``suited``: how many of the queued
    each of the query's prospects could hold."""

    request: Count
    name: Name
    epoch: Count
    policy: Name
    nodes: list[NodeReport]
    tasks: list[tuple[Name, Count]]
    counts: list[tuple[Name, Count]]
    clients: Count
    waiting: list[tuple[Count, Text]] = []
    suited: list[Count] = []


class Notice(_Wire, tag=32):
    """Something the user should know while nothing has failed yet."""

    text: Text


class Shutdown(_Wire, tag=33):
    """Stop the whole cluster."""


class Command(_Wire, tag=34):
    """What becomes of a node, named by its id or its label. "drain": it finishes what it holds and leaves; "retire": so too,
    but what is not finished after ``grace_s`` is run elsewhere. "pause": it takes nothing new and hands back what it has
    not started, until "resume"."""

    node: Name
    request: Count = 0
    what: Literal["drain", "retire", "pause", "resume"] = "drain"
    grace_s: Amount = 0.0


class CommandDone(_Wire, tag=49):
    """``error``: why nothing was done."""

    request: Count
    error: Text = ""


class Unknown(_Wire, tag=35):
    """Of the tasks that the client has open these are not here: to be submitted again."""

    tasks: Annotated[list[TaskId], Meta(max_length=MAX_ITEMS)]


class Follow(_Wire, tag=36):
    """Answer this job's tasks to this client as well."""

    request: Count
    job: Name


class JobTasks(_Wire, tag=37):
    """Tasks of a job, in the order they were submitted; ``more`` of them follow. An unknown job has none."""

    request: Count
    job: Name
    tasks: Annotated[list[TaskId], Meta(max_length=MAX_ITEMS)]
    more: bool = False


class StillOpen(_Wire, tag=39):
    """The client has submitted these to a session before and has no answer so far."""

    tasks: Annotated[list[TaskId], Meta(max_length=MAX_ITEMS)]


class NeedInputs(_Wire, tag=50):
    """Tasks that wait for the results of these, which the broker does not have: the client has been answered."""

    tasks: Annotated[list[TaskId], Meta(max_length=MAX_ITEMS)]


class Inputs(_Wire, tag=51):
    """How these tasks had ended, for those that wait for their results."""

    finals: Annotated[list[Final], Meta(max_length=MAX_ITEMS)]


class Hold(_Wire, tag=38):
    """The broker holds as much as it may: keep new tasks back; or (``on=False``) go on. A session begins without."""

    on: bool


# --- broker and node -----------------------------------------------------------------------------------------------


class Dispatch(_Wire, tag=40):
    """``follow``: names of inputs that come behind this message; the others the node has had."""

    shapes: Annotated[list[Shape], Meta(max_length=MAX_ITEMS)]
    orders: Annotated[list[Order], Meta(max_length=MAX_ITEMS)]
    functions: Annotated[list[Function], Meta(max_length=MAX_ITEMS)] = []
    follow: Annotated[list[Digest], Meta(max_length=MAX_ITEMS)] = []


class Revoke(_Wire, tag=41):
    """Drop these attempts if they have not started; with ``force``, end them if they have."""

    attempts: Annotated[list[Attempt], Meta(max_length=MAX_ITEMS)]
    force: bool = False


class Stop(_Wire, tag=42):
    """Leave the cluster: at once, or when what runs is finished, after ``grace_s`` in any case (0: take your time)."""

    drain: bool
    grace_s: Amount = 0.0


class Pause(_Wire, tag=52):
    """Take nothing new and hand back what has not started; or (``on=False``) go on."""

    on: bool


class Results(_Wire, tag=43):
    outcomes: Annotated[list[Outcome], Meta(max_length=MAX_ITEMS)]


class Progress(_Wire, tag=44):
    """What changed at a node besides results.

    ``started``: attempts that have run a while. ``returned``: attempts handed back unstarted, to be placed anew.
    ``deaths``: workers that died. ``stopped``: attempts that the node has ended. ``credit``: how many unfinished tasks
    the node now takes. ``waiting``: attempts that wait for other tasks, and need nothing of ``LENT`` meanwhile; ``resumed``:
    that go on.
    """

    credit: Annotated[int, Meta(ge=0, le=100_000)]
    started: Annotated[list[Attempt], Meta(max_length=MAX_ITEMS)] = []
    returned: Annotated[list[Attempt], Meta(max_length=MAX_ITEMS)] = []
    deaths: Annotated[list[Death], Meta(max_length=MAX_ITEMS)] = []
    stopped: Annotated[list[Stopped], Meta(max_length=MAX_ITEMS)] = []
    waiting: Annotated[list[Attempt], Meta(max_length=MAX_ITEMS)] = []
    resumed: Annotated[list[Attempt], Meta(max_length=MAX_ITEMS)] = []


class Workers(_Wire, tag=45):
    """All workers of the node, whenever one came or went."""

    workers: Annotated[list[WorkerState], Meta(max_length=MAX_ITEMS)]


class Draining(_Wire, tag=46):
    """The node was told to leave (SIGTERM) and takes nothing new."""


class Adopt(_Wire, tag=47):
    """These attempts, begun for a session that is over, count again: their answers decide."""

    attempts: Annotated[list[Attempt], Meta(max_length=MAX_ITEMS)]


class Output(_Wire, tag=48):
    """What tasks print and how far they have come: from ``node`` to the broker, and on to who waits for them. Before their
    results, if they are told at all."""

    words: Annotated[list[Words], Meta(max_length=MAX_ITEMS)]
    advances: Annotated[list[Advance], Meta(max_length=MAX_ITEMS)] = []
    node: Name = ""


# --- keys (keyring.py) -----------------------------------------------------------------------------------------------


class ChangeKeys(_Wire, tag=90):
    """From an administrator, about the keys of these roles: tell of them, replace them, or replace them with the old ones
    good for nothing at once. ``grace_s``: how long replaced ones stay good."""

    request: Count
    action: Literal["show", "rotate", "revoke"]
    roles: Annotated[list[Role], Meta(min_length=1, max_length=len(ROLES))]
    grace_s: Annotated[float, Meta(ge=0, le=365 * 86400.0)] = 0.0


class KeyInfo(_Wire):
    """``left_s``: of a replaced key, how long it is still good; 0 for the one in the role's file."""

    role: Role
    number: Count
    public: Name
    left_s: Amount = 0.0


class KeyReport(_Wire, tag=91):
    """``directory``: on the broker's host, where the files are. ``warning``: what went wrong."""

    request: Count
    keys: Annotated[list[KeyInfo], Meta(max_length=MAX_ITEMS)]
    directory: Text = ""
    warning: Text = ""


class NewKeys(_Wire, tag=92):
    """Connect anew with this key pair: the one you have is good for a while only."""

    public: _Key
    secret: _Key


# --- node and worker (pipes) -----------------------------------------------------------------------------------------


class Run(_Wire, tag=60):
    """Run one attempt. ``function`` is empty when the worker has it by digest; ``fresh`` says forget the others first.

    ``env`` is set for this task alone (``CUDA_VISIBLE_DEVICES``). It is not to be begun after ``until``, by the monotonic
    clock of the host that node and worker share. ``name``: the task's, if it was given one.
    """

    task: TaskId
    attempt: Count
    digest: Digest
    function: _Inline
    call: _Inline
    fresh: bool = False
    env: tuple[tuple[str, str], ...] = ()
    until: float = math.inf
    name: Name = ""
    inputs: Annotated[list[Input], Meta(max_length=MAX_ITEMS)] = []
    depth: Annotated[int, Meta(ge=0, le=MAX_DEPTH)] = 0


class Declined(_Wire, tag=63):
    """The run was taken from the pipe and not begun: it came after its ``until``, or the run that brought its function was
    taken back before it."""

    task: TaskId


class Done(_Wire, tag=61):
    """An attempt's answer. ``wrote``: what it has printed lies in the worker's streams, up to its mark there."""

    task: TaskId
    attempt: Count
    ok: bool
    value: _Inline
    seconds: Amount
    retry: bool = True
    wrote: bool = False


class Interrupted(_Wire, tag=62):
    """SIGINT has come to the worker."""


class Waits(_Wire, tag=65):
    """The task that the worker runs waits for others."""

    task: TaskId


class GoesOn(_Wire, tag=66):
    """The task waits no more."""

    task: TaskId


class Fence(_Wire, tag=67):
    """From a worker by way of its node to the broker, behind all that its tasks had told the node before, and back to
    ``client``, the worker's, of which it is the ``number``-th."""

    client: Token
    number: Count


class Advanced(_Wire, tag=64):
    """The task that the worker runs has said how far it is; where, is in ``streams.py``."""


# --- beats and facts (PUB) ----------------------------------------------------------------------------------------------


class Beat(_Wire, tag=70):
    """A node's heartbeat. ``cpu`` in percent of the host, ``memory`` in free bytes."""

    incarnation: Token
    number: Count
    workers: Annotated[list[WorkerState], Meta(max_length=MAX_ITEMS)]
    cpu: Amount = 0.0
    memory: Count = 0


class Fact(_Wire, tag=71):
    """Something that happened, for observers; ``about`` is a node's or cluster's name."""

    kind: Name
    about: Name
    text: Text = ""
    counts: Annotated[list[tuple[Name, Count]], Meta(max_length=64)] = []


# --- what only a journal holds (journal.py), besides Submit, Functions, Finals, Inputs and GroupAdd ------------------------


class Charged(_Wire, tag=80):
    """What has become of an unfinished task so far. ``attempt``: of one that may be started only once, written before."""

    task: TaskId
    attempt: Count
    failures: Count
    deaths: Annotated[tuple[Text, ...], Meta(max_length=1_000)]


class Forgotten(_Wire, tag=81):
    """Nobody will ask for these tasks any more."""

    tasks: Annotated[list[TaskId], Meta(max_length=MAX_ITEMS)]


class Left(_Wire, tag=82):
    """The owner is gone, and with it what it owned."""


class Present(_Wire, tag=83):
    """The nodes that are there, by incarnation."""

    nodes: Annotated[list[Token], Meta(max_length=MAX_ITEMS)]


Message: TypeAlias = (
    ClientHello | NodeHello | Welcome | No | SayHello | Ping | Pong | Ack | Goodbye
    | Submit | Functions | NeedFunctions | Cancel | Finals | Running | GroupAdd | GroupWait | GroupForget | GroupDone
    | Query | Report | Notice | Shutdown | Command | CommandDone | Follow | JobTasks | StillOpen | Unknown | Hold
    | NeedInputs | Inputs | ChangeKeys | KeyReport | NewKeys
    | Dispatch | Revoke | Stop | Pause | Results | Progress | Workers | Draining | Adopt | Output | Fence
    | Beat | Fact
)  # fmt: skip
RecordMessage: TypeAlias = Submit | Functions | Finals | Inputs | GroupAdd | Charged | Forgotten | Left | Present
PipeMessage: TypeAlias = Run | Done | Declined | GroupAdd | Interrupted | Advanced | Waits | GoesOn | Fence


class Envelope(Struct, array_like=True, frozen=True, gc=False):
    session: Count
    seq: Count
    ack: Count
    body: Message


class Record(Struct, array_like=True, frozen=True, gc=False):
    """What a journal keeps: a fact about the tasks of ``owner``, if of anybody's."""

    owner: bytes
    body: RecordMessage


# --- sizes -----------------------------------------------------------------------------------------------------------------

def payload_bytes(payload: Payload) -> int:
    """Size of a payload, in bytes."""
    if isinstance(payload, bytes):
        return len(payload)
    return sum(memoryview(part).nbytes for part in payload)


def wire_bytes(payload: Payload) -> int:
    """What a payload counts in a batch: its bytes, and so much for each frame that a batch cannot have too many."""
    if isinstance(payload, bytes):
        return len(payload)
    return payload_bytes(payload) + len(payload) * (2 * BATCH_BYTES // MAX_FRAMES)


def shape_bytes(shape: Shape) -> int:
    """What a shape counts in a batch: at least what it takes encoded."""
    options = shape.options
    letters = len(shape.label) + len(options.name) + len(options.job)
    letters += sum([len(name) + 4 for name, _ in options.resources]) + sum(map(len, options.tags))
    return 64 + 4 * letters


def clipped(text: str, limit: int = MAX_TEXT) -> str:
    """As much of the text as a message may hold: head and tail."""
    if len(text) <= limit:
        return text
    half = limit // 2 - 32
    return f"{text[:half]}\n... {len(text) - 2 * half:,} characters left out ...\n{text[-half:]}"


def batches(items: list[T], size: Callable[[T], int], limit: int = BATCH_BYTES) -> Iterator[list[T]]:
    """Cut items of these sizes, in bytes, into batches that each fit a message."""
    if len(items) == 1:
        yield items
        return
    start = total = 0
    for index, item in enumerate(items):
        bytes_ = size(item)
        if index > start and (index - start == BATCH_ITEMS or total + bytes_ > limit):
            yield items[start:index]
            start, total = index, 0
        total += bytes_
    if start < len(items):
        yield items[start:]
