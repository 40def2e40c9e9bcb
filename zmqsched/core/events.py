"""What goes into a core and what comes out: ``handle(event, now) -> list[Action]``.

``peer`` is the transport's address of the other end (a ROUTER's routing id). It says where to send, never who it is.
``user`` is who the transport's security says the peer is (``roles.py``); empty where the transport has none (``ipc://``).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Literal, TypeAlias

from msgspec import Struct

from ..protocol import (
    Advance,
    Beat,
    ChangeKeys,
    Command,
    CommandDone,
    Declined,
    Done,
    Envelope,
    Fact,
    Fence,
    Final,
    Follow,
    GoesOn,
    GroupAdd,
    GroupDone,
    GroupForget,
    GroupWait,
    Interrupted,
    JobTasks,
    KeyReport,
    No,
    Payload,
    Query,
    Record,
    Remains,
    Report,
    Run,
    Shape,
    Shutdown,
    Waits,
    Welcome,
    Words,
)  # fmt: skip


class _Event(Struct, frozen=True, gc=False):
    """One is made for each message and each call, and a NamedTuple would take five times as long. For the same reason those
    that are many are matched without their fields: ``case Send():``."""


class Arrived(_Event):
    peer: bytes
    user: str
    envelope: Envelope


class BeatArrived(_Event):
    beat: Beat


class Malformed(_Event):
    """Bytes that are no message for us. ``sender`` is for the log. ``answer``: what the peer is told, if it may be told
    anything: that its version is another at once, that it cannot be read when that goes on."""

    peer: bytes
    reason: str
    answer: No | None = None
    sender: str = "somebody"


class Alarmed(_Event):
    """Something is wrong with this process's surroundings, and what can be done; said again while it lasts."""

    what: str
    advice: str


class KeysChanged(_Event):
    """``moved``: by User-Id, the key pair to go on with in place of the one it has; ``gone``: whose key is good for nothing
    any more. ``report`` is for the session that asked, if one did."""

    moved: Mapping[str, tuple[str, str]]
    gone: Collection[str]
    session: int = 0
    report: KeyReport | None = None


class Undelivered(_Event):
    """The transport refused a send: the peer is gone, or its queue is full."""

    peer: bytes
    reason: Literal["unreachable", "full"]


class Leave(_Event):
    """Somebody wants this process to end, in order: a node when it has finished what it runs, or now; a broker with its
    cluster, as soon as everybody was told; a client when what it submitted is accepted, or now."""

    drain: bool
    reason: str


class Tick(_Event):
    """The turn is over, or the deadline has come: act."""


class Send(_Event):
    peer: bytes
    envelope: Envelope


class Publish(_Event):
    fact: Fact


class Log(_Event):
    level: Literal["debug", "info", "warning", "error"]
    text: str


class Rekey(_Event):
    """This session of an administrator wants to know of the keys, or to have them changed: say :class:`KeysChanged`."""

    session: int
    request: ChangeKeys


class Shrunk(_Event):
    """A great many records are gone; a good moment to return memory to the system."""


class Quit(_Event):
    """The process that holds this core ends, in order."""

    reason: str


class Write(_Event):
    """Put these records into the journal, in one commit, after all before it; ``anew``: instead of all before it."""

    number: int
    records: list[Record]
    anew: bool


class Written(_Event):
    """All commits up to this number are on disk. ``size`` is the journal's, in bytes."""

    number: int
    size: int


class Troubled(_Event):
    """The journal cannot be written now; the shell keeps trying."""

    reason: str


SchedulerEvent = Arrived | BeatArrived | Malformed | Undelivered | Alarmed | KeysChanged | Written | Troubled | Leave | Tick
SchedulerAction = Send | Publish | Write | Rekey | Log | Shrunk | Quit


# --- the node's agent --------------------------------------------------------------------------------------------


class Reached(_Event):
    """A message from the broker; a node has one peer, so there is no address."""

    envelope: Envelope


class Unreadable(_Event):
    """The broker sent what is no message."""

    why: str


class Reconnected(_Event):
    """The connection to the broker is a new one; what was on the old one may be lost."""


class Born(_Event):
    worker: int
    pid: int


class Exited(_Event):
    """A worker died. ``untaken``: the runs that lay in its pipe, taken back; ``how`` is a readable phrase; ``remains``:
    whatever else is known."""

    worker: int
    pid: int
    how: str
    untaken: list[Run]
    remains: Remains = Remains()


FromTask: TypeAlias = Done | Declined | GroupAdd | Interrupted | Waits | GoesOn | Fence


class Said(_Event):
    """What a worker has said, in its order."""

    worker: int
    messages: list[FromTask]


class Stood(_Event):
    """Where a worker stood when it was asked: its stack, "" if it has not said."""

    worker: int
    stack: str


class Printed(_Event):
    """What tasks here have printed, and how far they have come; of one that has ended, before :class:`Said` says so."""

    words: list[Words]
    advances: list[Advance]


class Measured(_Event):
    """What each worker takes of the memory, in bytes of resident set."""

    sizes: dict[int, int]


class TakenBack(_Event):
    worker: int
    runs: list[Run]


class ToBroker(_Event):
    envelope: Envelope


class Start(_Event):
    worker: int


class Give(_Event):
    """Put these into the worker's pipe, in this order."""

    worker: int
    runs: list[Run]


class TakeBack(_Event):
    """Take the runs out of this worker's pipe that it has not taken yet."""

    worker: int


class AskStack(_Event):
    """Have this worker write its stack, which takes a moment."""

    worker: int


class TellStack(_Event):
    """Say :class:`Stood` of this worker."""

    worker: int


class Interrupt(_Event):
    """SIGINT to this worker; it says :class:`~zmqsched.protocol.Interrupted` when that has come."""

    worker: int


class Kill(_Event):
    """SIGKILL to this worker."""

    worker: int


class Retire(_Event):
    """This idle worker is not needed any more: it is to end when it has nothing left to wait for."""

    worker: int


class UseKeys(_Event):
    """Connect anew, with this key pair."""

    public: str
    secret: str


class SendBeat(_Event):
    """The shell adds what it measures: CPU and memory."""

    beat: Beat


AgentEvent = (
    Reached | Reconnected | Unreadable | Born | Exited | Said | Printed | TakenBack | Measured | Stood | Leave | Tick
)  # fmt: skip
AgentAction = (
    ToBroker | Start | Give | TakeBack | AskStack | TellStack | Interrupt | Kill | Retire | SendBeat | UseKeys | Log | Quit
)


# --- the client's brain ---------------------------------------------------------------------------------------------


class Asked(_Event):
    """``inputs``: the tasks whose results are arguments of the call, none of them twice."""

    task: bytes
    shape: Shape
    call: Payload
    inputs: tuple[bytes, ...] = ()


class Ask(_Event):
    """New tasks, and the functions they name. ``values``: the results of those inputs that are answered already."""

    tasks: list[Asked]
    functions: dict[bytes, Payload]
    values: Mapping[bytes, Payload] = MappingProxyType({})


class Withdraw(_Event):
    """The caller no longer wants these; ``force``: not even if they run."""

    tasks: list[bytes]
    force: bool = False


class SetFence(_Event):
    """What comes now is to reach the broker behind what tasks here have told their node (``fences.py``)."""


class Tell(_Event):
    """A message for the broker that has no answer, or one that is asked for by its ``request`` number."""

    message: GroupAdd | GroupWait | GroupForget | Query | Follow | Shutdown | Command | ChangeKeys


class Began(_Event):
    """A session began; its first time, the cluster is reached."""

    welcome: Welcome


class Finished(_Event):
    finals: list[Final]


class NowRunning(_Event):
    tasks: list[bytes]


class Heard(_Event):
    """What tasks of this client's have printed at ``node``, and how far they have come. Each task's shape, if it is known:
    others' tasks are followed too."""

    words: list[tuple[Words, Shape | None]]
    advances: list[Advance]
    node: str


class Replied(_Event):
    message: GroupDone | Report | JobTasks | CommandDone | KeyReport


class Warned(_Event):
    text: str


class TellNode(_Event):
    """From a task's client."""

    fence: Fence


class Broken(_Event):
    """The cluster refuses this client, was shut down, or is gone: nothing more will come."""

    code: Literal["refused", "lost"]
    reason: str


ClientEvent = Ask | Withdraw | Tell | SetFence | Reached | Reconnected | Unreadable | Leave | Tick
ClientAction = (
    ToBroker | Began | Finished | NowRunning | Heard | Replied | TellNode | Warned | Broken | UseKeys | Quit
)  # fmt: skip
