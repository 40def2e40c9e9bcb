"""The client: an exact ``concurrent.futures.Executor`` in front of a cluster.

How a call travels
------------------
``submit`` pickles in the caller's thread, makes the future, puts the packed call into an inbox and wakes the I/O thread
if it sleeps. The I/O thread owns the socket and the client's brain (``core/requests.py``); it sends what has gathered as
one batch, and completes futures as answers come. So a lone call goes out at once, and a loop of calls becomes batches.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import itertools
import math
import os
import secrets
import threading
import time
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

import zmq
from msgspec.structs import replace

from . import errors, lifetime, nesting, sockets, worker
from .arguments import fail, first_failed, inputs_of, values_of
from .callbacks import Callbacks
from .codec import decode, encode
from .config import CONNECT_TIMEOUT_S, ConnectionFile, find_cluster, lasting_name
from .core import events
from .core.events import ClientAction, ClientEvent
from .core.load import call_bytes
from .core.requests import DELIVERY_TIMEOUT_S, Requests
from .display import ANSWER_TIMEOUT_S, Sheet, Shown, as_line
from .errors import (
    BrokerUnreachable,
    ClusterLost,
    ClusterNotFound,
    CommandFailed,
    JobNotFound,
    ProtocolError,
    Refused,
    ZmqschedError,
)
from .futures import ALERT_S, Future
from .host import where
from .maps import Map
from .options import boolean, seconds, short_name
from .origin import Origin
from .payload import FunctionPickler, groups, pack_call, references, short_form
from .printing import Log, Printer, Source, cell_reader
from .protocol import (
    MAX_HELD,
    ClientHello,
    Command,
    CommandDone,
    Envelope,
    Follow,
    GroupAdd,
    GroupWait,
    JobTasks,
    Options,
    Payload,
    Prospect,
    Query,
    Report,
    Shape,
    Words,
    clipped,
    tag_of,
)
from .readiness import asked_here, wait_for_nodes, wait_until_left
from .records import NodeList, Status, WorkerList, node_infos, nodes_table, status_of, task_facts, worker_infos
from .tasks import Tasks
from .waiting import cancel_all

if TYPE_CHECKING:

    from .cluster import LocalCluster
    from .mapping import Run

T = TypeVar("T")

QUERY_TIMEOUT_S = 10.0
CLOSE_TIMEOUT_S = 2.0
MAX_MESSAGES_PER_TURN = 100
# What may wait here for a broker that is full, slow or away, before submit() waits too. A task counts half a KiB besides its
# payload (core/load.py), so this is also some 130,000 small tasks.
MAX_WAITING_BYTES = 64 * 1024 * 1024


_TICK = events.Tick()


class Submission(events.Asked, gc=True):  # type: ignore[misc]  # frozen is inherited, which mypy does not know
    """A packed call on its way to the I/O thread. ``arguments``: the futures whose tasks are its inputs."""

    function: Payload = b""
    arguments: tuple[Future[Any], ...] = ()


class Client(Shown, Tasks):
    """A connection to a cluster, for all threads of this process.

    At its end the program waits for what was submitted, as with the standard's executors. An interrupt (Ctrl-C) then cancels
    what is left, and so does one that has ended the program. In a forked child the client raises RuntimeError, and so do its
    unfinished futures. A pickled client connects anew where it is unpickled, to the cluster of that name or connection file;
    in a task it is what :func:`~zmqsched.get_client` gives there; copied, it stays the same.

    Parameters
    ----------
    cluster
        A :class:`~zmqsched.LocalCluster`, the name of a running cluster, or a connection file's path. Without it:
        ``$ZMQSCHED_CLUSTER`` (a name or a path), else this user's running cluster named "default", else a local
        cluster is started, and stopped again with this client or at exit.
    timeout
        Seconds until the broker must have answered.
    output
        Show what tasks print (``printing.py``): each line with its task and worker in front; in a notebook, in the cell that
        has submitted the task. Whether shown or not, ``future.log()`` has the end of it.

    Raises
    ------
    ClusterNotFound, ConnectionFileError, BrokerUnreachable, Refused
        One line each, with what to do.
    RuntimeError
        Inside a task, where :func:`~zmqsched.get_client` gives one.
    """

    def __init__(
        self,
        cluster: LocalCluster | ConnectionFile | Origin | str | os.PathLike[str] | None = None,
        *,
        timeout: float = CONNECT_TIMEOUT_S,
        output: bool = True,
    ) -> None:
        self._nested = isinstance(cluster, Origin)
        if worker.in_worker() and not self._nested:
            raise RuntimeError(
                "a task does not make a client: zmqsched.get_client() gives one of its cluster, and lends the task's slot "
                "to others while it waits"
            )
        self._owned: LocalCluster | None = None
        if isinstance(timeout, bool) or not isinstance(timeout, int | float) or not 0 < timeout < math.inf:
            raise ValueError(f"timeout is a number of seconds above 0, not {timeout!r}")
        self._printer = Printer() if boolean("output", output) else None
        self._cell = cell_reader()
        file = self._find(cluster)
        self._cluster_id = file.cluster_id
        # A broker on Unix sockets has nodes on its own host only.
        self._on_one_host = all(address.startswith("ipc://") for address in file.addresses.work)
        self._local = self._owned or (cast("LocalCluster", cluster) if hasattr(cluster, "broker_death") else None)
        self._client = self
        tasks = file.tasks
        self._options = Options(tasks.priority, tasks.retries, timeout=tasks.timeout, requeue=tasks.requeue)
        self._retry_on = b""
        self._lock = threading.RLock()  # a signal handler that submits may have interrupted a submit
        self._idle = threading.Condition(self._lock)
        self._room = threading.Condition(self._lock)
        self._blocked = 0  # how many threads wait for room
        self._asked = 0  # bytes of all that was ever submitted
        self._closed = False
        self._owing = False  # in a task: it has submitted some with WaitGroups
        self._why_closed = ""
        self._broken: ZmqschedError | RuntimeError | None = None
        self._functions = FunctionPickler()
        self._callbacks = Callbacks()
        self._prefix = secrets.token_bytes(8)
        self._numbers = itertools.count(1)
        self._shape = Shape(b"", self._options)
        self._futures: dict[bytes, Future[Any]] = {}
        self._runs: set[Run] = set()  # maps that are not over
        self._last_run: Run | None = None
        self._kept: set[bytes] = set()  # those that are a job's: they outlive this client
        self._requests: dict[int, concurrent.futures.Future[Any]] = {}
        self._inbox: deque[Submission | ClientEvent] = deque()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        # Closed with the object and not before, nor at exit: a late cancel() may still write to it.
        weakref.finalize(self, _wake_and_close, self._wake).atexit = False
        self._awake = False
        self._parted = False  # the core has said goodbye
        self._began: concurrent.futures.Future[str] = concurrent.futures.Future()
        self._ctx = sockets.context()
        try:
            self._dealer = sockets.connect_dealer(self._ctx, file.reachable("work"), sockets.Keys.of(file), timeout)
            incarnation = nesting.incarnation() if self._nested else secrets.token_bytes(16)
            self._core = Requests(ClientHello(incarnation, 1, where(), self._nested))
            self._waiter = sockets.Waiter(self._dealer)
            has = (weakref.ref(self), self._core, self._dealer, self._waiter, self._ctx, os.dup(self._wake), self._printer)
            self._thread = threading.Thread(target=_serve, args=has, name="zmqsched client", daemon=True)
            self._thread.start()
            self.cluster_name = self._wait_until_begun(file, timeout)
        except BaseException:
            self._abandon()
            raise
        lifetime.register(self)

    # --- what users call, besides Tasks ------------------------------------------------------------------------------

    def nodes(self) -> NodeList:
        """The nodes of the cluster, as a list of :class:`NodeInfo`; also those lost or left not long ago."""
        return node_infos(self._report())

    def workers(self) -> WorkerList:
        """The workers of all nodes that are there, as a list of :class:`WorkerInfo`."""
        return worker_infos(self._report())

    def status(self) -> Status:
        """The cluster at this moment: nodes, tasks by state, why tasks wait, and what has happened so far."""
        return status_of(self._report())

    def wait_for_nodes(self, n: int, timeout: float | None = None) -> None:
        """Return when ``n`` nodes are alive.

        Raises
        ------
        TimeoutError
            They are not, after ``timeout`` seconds. If a process on this host has started nodes: says of each that is
            missing its state and the reason.
        StartError
            Nodes have failed, so that no ``n`` can come; their own words say why.
        """
        wait_for_nodes(n, timeout, self.nodes, lambda: asked_here(self.cluster_name, self._cluster_id))

    def wait_until_left(self, node: str, timeout: float | None = None) -> None:
        """Return when this node, which was told to :meth:`drain` or :meth:`retire`, has left.

        Raises
        ------
        TimeoutError
            It has not, after ``timeout`` seconds; says how many tasks it has.
        CommandFailed
            There is no such node, or it was lost: then what it had not finished runs elsewhere.
        """
        wait_until_left(node, timeout, self.nodes, lambda _: None)

    def drain(self, node: str) -> None:
        """Have this node, named by its id or its label, finish what it holds, take nothing new, and leave. Returns when it
        has been told, see :meth:`wait_until_left`; :class:`CommandFailed` if there is no such node."""
        self._command(node, "drain")

    def retire(self, node: str, *, grace: float = 30.0) -> None:
        """As :meth:`drain`, but what has not finished after ``grace`` seconds is run elsewhere; with 0 at once."""
        self._command(node, "retire", seconds("grace", grace))

    def pause(self, node: str) -> None:
        """Give this node nothing new: it finishes what runs, hands back what it has not started, and stays.
        :class:`CommandFailed` if there is no such node, or if it is leaving."""
        self._command(node, "pause")

    def resume(self, node: str) -> None:
        """Let a paused node take tasks again. :class:`CommandFailed` if there is no such node, or if it is leaving."""
        self._command(node, "resume")

    def job(self, name: str) -> list[Future[Any]]:
        """The futures of all tasks that any client has submitted under this name (``options(job=name)``), those of one
        client in the order of their submission. Tasks that have ended are done, or about to be.

        Raises
        ------
        JobNotFound
            The cluster knows no task of that job.
        """
        name = short_name(name)
        futures: list[Future[Any]] = self._ask(lambda request: Follow(request, name))
        if not futures:
            raise JobNotFound(f"the cluster {self.cluster_name!r} knows no task of a job {name!r}")
        return futures

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """As ``Executor.shutdown``: take nothing more, and (``wait``) return when all futures are done and their callbacks
        have returned; in a callback, when all futures are done. KeyboardInterrupt while it waits cancels what is left, also
        what runs, but for jobs.

        A cluster that this client has started itself is stopped too.
        """
        self._take_no_more()
        futures = list(self._futures.values())
        if cancel_futures:
            self._stop_maps(concurrent.futures.CancelledError())
            cancel_all(futures)
        if wait:
            self._close_when_done()
        elif all(future.done() for future in futures) and self._is_idle:
            self._close()
        else:
            closing = threading.Thread(target=self._close_when_done, name="zmqsched shutdown", daemon=True)
            with contextlib.suppress(RuntimeError):  # CPython 3.12 starts none while the program ends; that closes it too
                closing.start()

    @property
    def last_map(self) -> Map[Any] | None:
        """The last map of this client, also one that was interrupted: see :meth:`Map.results`. None before the first."""
        return None if self._last_run is None else Map(self, self._last_run)

    @property
    def usable(self) -> bool:
        """Neither shut down nor cut off from its cluster."""
        return not self._closed and self._broken is None

    _repr_pretty_ = Shown._repr_pretty_  # beside __repr__, for IPython takes of each class what it finds there

    def __repr__(self) -> str:
        return as_line(self._own_sheet())

    def _own_sheet(self) -> Sheet:
        """What is known here, without asking anybody."""
        state = "closed" if self._closed else f"broken: {self._broken}" if self._broken else "open"
        facts = [("state", state), ("unfinished tasks", len(self._futures))]
        return Sheet(f"zmqsched.Client of cluster {self.cluster_name!r}", facts=facts)

    def _sheet(self) -> Sheet:
        own = self._own_sheet()
        if not self.usable or threading.current_thread() is self._thread:
            return own
        try:
            status = status_of(self._report(ANSWER_TIMEOUT_S))
        except ZmqschedError as error:
            return dataclasses.replace(own, facts=[*own.facts, ("broker", error)])
        return dataclasses.replace(own, tables=[nodes_table(status.nodes)], facts=[*own.facts, *task_facts(status)])

    def __reduce__(self) -> tuple[Any, ...]:
        if self._owned:
            raise TypeError(
                "this zmqsched Client cannot be pickled: it has started a cluster for itself, which ends with it. "
                "Start a LocalCluster, and what is made with Client(cluster) can be"
            )
        return _arrived, (self._where,)

    def __copy__(self) -> Client:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Client:
        """A connection is one thing, like a module: what holds it may be copied, it is not."""
        return self

    # --- submitting ----------------------------------------------------------------------------------------------------

    def _submit(
        self, fn: Callable[..., T], args: tuple[Any, ...], kwargs: dict[str, Any], options: Options, retry_on: bytes,
        *, accepted: bool = False, known_to: set[concurrent.futures.Future[Any]] | None = None,
    ) -> Future[T]:  # fmt: skip
        """``accepted``: part of what was asked for before a shutdown. ``known_to``: where the future is from before the task
        is submitted, for one who is interrupted before it is returned."""
        if self._closed or self._broken is not None:
            self._check_usable(accepted=accepted)
        if self._nested:
            self._keep_order()
            if options.depth != (depth := nesting.depth()):
                options = replace(options, depth=depth)
        task = self._prefix + next(self._numbers).to_bytes(8, "big")
        future: Future[T] = Future(task, self)
        if self._cell is not None:
            future._cell = self._cell()
        try:
            call = pack_call(args, kwargs)
            arguments = inputs_of(found, self) if (found := references()) is not None else ()
            digest, blob = self._functions.pack(fn, retry_on if options.retries else b"", call)
        except errors.TaskError as error:
            self._fail_groups(task, Shape(b"", options, short_form(fn)), str(error))
            future.set_running_or_notify_cancel()
            future.set_exception(error)
            return future
        if arguments and (argument := first_failed(arguments)) is not None:
            self._fail_groups(task, Shape(digest, options, short_form(fn)), "an input has failed")
            fail(future, argument)
            return future
        if held := groups():
            self._owing = self._nested
            options = replace(options, holds=held[:MAX_HELD], parent=nesting.attempt())
        shape = self._shape
        if shape.function != digest or shape.options is not options:  # than the last task's
            shape = self._shape = Shape(digest, options, short_form(fn))
        inputs = tuple([each._task for each in arguments]) if arguments else ()
        with self._lock:
            if self._closed or self._broken is not None:
                self._check_usable(accepted=accepted)
            if self._waiting >= MAX_WAITING_BYTES and threading.current_thread() is not self._thread:
                self._wait_for_room(accepted=accepted)
            self._asked += call_bytes(call, inputs)
            lifetime.needed.add(self)
            if options.job:
                self._kept.add(task)
            if known_to is not None:
                known_to.add(future)
            submission = Submission(task, shape, call, inputs, blob, arguments)
            self._futures[task] = future  # an interrupt is raised behind a call: not between this and the next
            self._inbox.append(submission)
        if not self._awake:
            self._nudge()
        return future

    def _keep_order(self) -> None:
        """In a task: what it says next comes behind what it has told its node."""
        nesting.keep_order(lambda: self._post(events.SetFence()))

    def _deliver_groups(self) -> None:
        """In a task: return when the broker has what was submitted with WaitGroups. It answers in order, so a wait for one
        that nobody counts on says so."""
        if self._owing and self._futures and self.usable:
            self._owing = False
            reply = self._request(lambda number: GroupWait(number, secrets.token_bytes(16)))[1]
            with contextlib.suppress(ClusterLost, Refused):
                reply.result()

    def _take_on(self, run: Run) -> None:
        self._runs.add(run)
        lifetime.needed.add(self)

    def _stop_maps(self, why: BaseException) -> None:
        for run in list(self._runs):
            run.stop(why)

    def _fail_groups(self, task: bytes, shape: Shape, why: str) -> None:
        """The task holds these WaitGroups, and may owe to them, and cannot be sent."""
        if held := groups():
            first_line = why.partition("\n")[0]
            failed = clipped(f"{tag_of(task, shape)}: {first_line}", 500)
            self._post(events.Tell(GroupAdd([(group, 0) for group in held[:MAX_HELD]], failed=failed)))

    @property
    def _held_back(self) -> bool:
        """The broker takes no more tasks for now."""
        return self._core.held

    @property
    def _waiting(self) -> int:
        """Bytes of tasks that are not submitted yet, in the inbox or in the core."""
        return self._asked - self._core.taken + self._core.waiting

    def _wait_for_room(self, *, accepted: bool) -> None:
        self._blocked += 1  # before looking again: the I/O thread makes room before it looks for who waits
        try:
            with nesting.waiting():
                while self._waiting >= MAX_WAITING_BYTES:
                    self._room.wait(ALERT_S)
                    self._check_usable(accepted=accepted)
        finally:
            self._blocked -= 1

    def _check_usable(self, *, accepted: bool = False) -> None:
        if self._broken is not None:
            raise type(self._broken)(str(self._broken))
        if self._closed and not (accepted and self._thread.is_alive()):
            raise RuntimeError(self._why_closed)

    def _withdraw(self, tasks: list[bytes], *, force: bool) -> None:
        self._post(events.Withdraw(tasks, force))

    def _post(self, event: ClientEvent) -> None:
        self._inbox.append(event)
        self._nudge()

    def _nudge(self) -> None:
        if not self._awake:
            self._awake = True
            os.eventfd_write(self._wake, 1)

    def _request(self, make: Callable[[int], Any]) -> tuple[int, concurrent.futures.Future[Any]]:
        """Send the message that ``make(request)`` is; the future completes with its reply."""
        self._check_usable()
        request = next(self._numbers)
        reply: concurrent.futures.Future[Any] = concurrent.futures.Future()
        self._requests[request] = reply
        self._post(events.Tell(make(request)))
        return request, reply

    def _report(self, timeout_s: float = QUERY_TIMEOUT_S, prospects: Sequence[Prospect] = ()) -> Report:
        return cast(Report, self._ask(lambda request: Query(request, [], list(prospects)), timeout_s))

    def _ask(self, make: Callable[[int], Any], timeout_s: float = QUERY_TIMEOUT_S) -> Any:
        """What the broker answers to the message that ``make(request)`` is."""
        request, reply = self._request(make)
        try:
            return reply.result(timeout_s)
        except concurrent.futures.TimeoutError:
            self._requests.pop(request, None)
            raise BrokerUnreachable(f"the broker did not answer within {timeout_s:g} s") from None

    def _command(self, node: str, what: Literal["drain", "retire", "pause", "resume"], grace_s: float = 0.0) -> None:
        """Returns when the broker has told the node."""
        done = cast(CommandDone, self._ask(lambda request: Command(short_name(node), request, what, grace_s)))
        if done.error:
            raise CommandFailed(done.error)

    # --- beginning and ending ----------------------------------------------------------------------------------------

    def _find(self, cluster: LocalCluster | ConnectionFile | Origin | str | os.PathLike[str] | None) -> ConnectionFile:
        file = cluster if isinstance(cluster, ConnectionFile) else getattr(cluster, "file", None)
        if file is not None:
            self._where = file.name
            return cast(ConnectionFile, file)
        where = cast("str | os.PathLike[str] | None", cluster)
        try:
            self._where = lasting_name(where)
            return find_cluster(where)
        except ClusterNotFound:
            if cluster is not None or os.environ.get("ZMQSCHED_CLUSTER"):
                raise
        from .cluster import LocalCluster

        self._owned = LocalCluster()
        lifetime.needed.add(self)
        return self._owned.file

    def _wait_until_begun(self, file: ConnectionFile, timeout: float) -> str:
        try:
            return self._began.result(timeout)
        except concurrent.futures.TimeoutError:
            raise BrokerUnreachable(
                f"the broker of cluster {file.name!r} does not answer within {timeout:g} s. If it was restarted, its "
                "connection file is stale: use the new one."
            ) from None

    def _abandon(self) -> None:
        """The constructor failed: leave nothing behind."""
        if hasattr(self, "_thread"):
            self._close()
        else:
            lifetime.needed.discard(self)
            self._ctx.destroy(linger=0)
            if self._owned:
                self._owned.close()

    def _take_no_more(self, why: str = "cannot schedule new futures after shutdown") -> None:
        with self._lock:
            self._closed = True
            self._why_closed = self._why_closed or why
            self._room.notify_all()

    def _disown(self, error: RuntimeError) -> None:
        """This process is a fork of the client's (``lifetime.py``)."""
        self._broken = error
        self._lock = threading.RLock()
        self._idle = threading.Condition(self._lock)
        self._room = threading.Condition(self._lock)
        self._callbacks = Callbacks()
        futures, self._futures = self._futures, {}
        for future in futures.values():
            future._disown(error)

    def _close_when_done(self) -> None:
        try:
            with self._idle, nesting.waiting() if not self._is_idle else contextlib.nullcontext():
                while not self._is_idle and self._thread.is_alive():
                    self._idle.wait(1.0)
            if not self._callbacks.are_mine(threading.current_thread()):
                self._callbacks.finish()
        except KeyboardInterrupt:
            self._stop_maps(concurrent.futures.CancelledError())
            cancel_all([future for task, future in list(self._futures.items()) if task not in self._kept], force=True)
            raise
        self._close()

    def _close(self) -> None:
        self._take_no_more()
        self._stop_maps(RuntimeError(self._why_closed))  # they wait for somebody to read
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._post(events.Leave(bool(self._kept), "client closed"))
            self._thread.join(CLOSE_TIMEOUT_S + (DELIVERY_TIMEOUT_S if self._kept else 0.0))
        self._callbacks.close()
        if self._printer is not None:
            self._printer.join()
        lifetime.opened.discard(self)
        if self._owned:
            self._owned.close()

    # --- the I/O thread ------------------------------------------------------------------------------------------------

    def _turn(self, connections: sockets.Connections | None, *, nudged: bool, readable: bool) -> float | None:
        """Take in, decide, act. Returns when the next turn is due; None when it is time to go. ``connections``: if there is
        news of them."""
        now = time.monotonic()
        actions: list[ClientAction] = []
        if connections is not None:
            self._look_at(connections, now)
        if nudged:
            os.eventfd_read(self._wake)
        self._awake = False  # before the inbox is read: who finds it raised has put its item in before that
        if self._inbox:
            actions += self._take_inbox(now)
        for frames in self._waiter.receive(MAX_MESSAGES_PER_TURN) if readable else ():
            try:
                event: ClientEvent = events.Reached(decode([frame.buffer for frame in frames]))
            except ProtocolError as error:
                event = events.Unreadable(str(error))
            actions += self._core.handle(event, now)
        if (deadline := self._core.next_deadline()) <= now:
            actions += self._core.handle(_TICK, now)
            deadline = self._core.next_deadline()
        if self._blocked and self._waiting < MAX_WAITING_BYTES:
            with self._lock:
                self._room.notify_all()
        # Last: whoever waits for an answer wakes up when nothing but going to sleep is left to do here, which frees the GIL.
        self._perform(actions)
        return None if self._parted or self._broken is not None else deadline

    def _look_at(self, connections: sockets.Connections, now: float) -> None:
        try:
            if connections.new():
                self._perform(self._core.handle(events.Reconnected(), now))
        except Refused as error:
            self._break(error)

    def _take_inbox(self, now: float) -> list[ClientAction]:
        actions: list[ClientAction] = []
        tasks: list[events.Asked] = []
        functions: dict[bytes, Payload] = {}
        values: dict[bytes, Payload] = {}
        for _ in range(len(self._inbox)):
            item = self._inbox.popleft()
            if isinstance(item, Submission):
                if not item.arguments:
                    tasks.append(item)
                elif self._fails_at_once(item):
                    continue
                else:  # without the futures, which are their owner's to keep
                    tasks.append(events.Asked(item.task, item.shape, item.call, item.inputs))
                    values.update(values_of(item.arguments))
                functions[item.shape.function] = item.function
                continue
            if tasks:
                actions += self._core.handle(events.Ask(tasks, functions, values), now)
                tasks, functions, values = [], {}, {}
            actions += self._core.handle(item, now)
        if tasks:
            actions += self._core.handle(events.Ask(tasks, functions, values), now)
        return actions

    def _fails_at_once(self, item: Submission) -> bool:
        """An argument has failed since the call was packed: nothing is submitted."""
        argument = first_failed(item.arguments)
        if argument is None:
            return False
        with self._lock:
            self._asked -= call_bytes(item.call, item.inputs)
        future = self._futures.pop(item.task, None)
        if future is not None and fail(future, argument):
            self._callbacks.put(future._call_back)
        self._wake_if_idle()
        return True

    def _perform(self, actions: list[ClientAction]) -> None:
        for action in actions:
            match action:
                case events.ToBroker():
                    self._send(action.envelope)
                case events.Finished(finals):
                    self._settle_screen()
                    for final in finals:
                        future = self._futures.pop(final.task, None)
                        if future is not None and future._answer(final):
                            self._callbacks.put(future._call_back)
                    self._wake_if_idle()
                case events.NowRunning(tasks):
                    for task in tasks:
                        self._now_running(task)
                case events.Heard(words, advances, node):
                    for said, shape in words:
                        self._heard(said, shape, node)
                    for advance in advances:
                        if (future := self._futures.get(advance.task)) is not None:
                            future._progress = (advance.fraction, advance.text)
                case events.Replied(message):
                    self._settle_screen()  # a WaitGroup may be zero before the answers that made it so are here
                    reply = self._requests.pop(message.request, None)
                    if reply is not None:
                        reply.set_result(self._followed(message) if isinstance(message, JobTasks) else message)
                case events.TellNode(fence):
                    with contextlib.suppress(OSError, RuntimeError):  # the worker ends
                        worker.tell(fence)
                case events.UseKeys(public, secret):
                    self._waiter.use_keys(public, secret)
                case events.Quit():
                    self._parted = True
                case events.Began(welcome):
                    if not self._began.done():
                        self._began.set_result(welcome.name)
                case events.Warned(text) if self._local is not None and (died := self._local.broker_death):
                    self._break(ClusterLost(f"the broker of the local cluster {self.cluster_name!r} is gone: {died}"))
                case events.Warned(text):
                    _warn(text)
                case events.Broken(code, reason):
                    self._break(Refused(reason) if code == "refused" else ClusterLost(f"the cluster is gone: {reason}"))

    def _send(self, envelope: Envelope) -> None:
        frames = encode(envelope)
        try:
            self._waiter.send(frames)
        except zmq.Again:
            pass  # no connection now; the link sends again what is not acknowledged

    def _followed(self, listed: JobTasks) -> list[Future[Any]]:
        """Futures for all of a job's tasks, before any of their answers is looked at."""
        with self._lock:
            self._kept.update(listed.tasks)
            known = self._futures
            return [known.get(task) or known.setdefault(task, Future(task, self)) for task in listed.tasks]

    def _settle_screen(self) -> None:
        if self._printer is not None:
            self._printer.settle()

    def _heard(self, words: Words, shape: Shape | None, node: str) -> None:
        future = self._futures.get(words.task)
        if future is None:
            return
        if future._log is None:
            future._log = Log()
        news = future._log.add(words)
        if news is not None and self._printer is not None:
            self._printer.show(Source(tag_of(words.task, shape), f"{node}/{words.worker}", words.stream), news, future._cell)

    def _now_running(self, task: bytes) -> None:
        future = self._futures.get(task)
        if future is not None and not future.running() and not future.done():
            try:
                future.set_running_or_notify_cancel()
            except (concurrent.futures.InvalidStateError, RuntimeError):
                return  # cancelled this very moment

    @property
    def _is_idle(self) -> bool:
        """Nothing is to be done any more, unless somebody reads the results of a map."""
        return not self._futures and (not self._runs or all(run.waits for run in list(self._runs)))

    def _wake_if_idle(self) -> None:
        if self._futures:
            return
        with self._lock:
            if not self._is_idle:
                return
            if self._closed:  # nobody waits for it before
                self._idle.notify_all()
            if not self._owned:
                lifetime.needed.discard(self)

    def _break(self, error: ZmqschedError) -> None:
        """Nothing more will come: everything open fails with the reason."""
        with self._lock:
            self._broken = error
            self._room.notify_all()
            futures, self._futures = self._futures, {}
            requests, self._requests = self._requests, {}
        if not self._began.done():
            self._began.set_exception(error)
        for future in futures.values():
            if future._fail(type(error)(str(error))):
                self._callbacks.put(future._call_back)
        for reply in requests.values():
            reply.set_exception(type(error)(str(error)))
        self._wake_if_idle()


def _serve(
    reference: weakref.ref[Client],
    core: Requests,
    dealer: zmq.Socket[bytes],
    waiter: sockets.Waiter,
    ctx: zmq.Context[zmq.Socket[bytes]],
    wake: int,
    printer: Printer | None,
) -> None:
    """The I/O thread. It does not keep its client: one that nobody can use any more says goodbye, and the thread ends."""
    waiter.add(wake)
    connections = sockets.Connections(dealer)
    waiter.add(connections.descriptor)
    try:
        # A hello before the connection is there would be a hello lost.
        while not dealer.poll(100, zmq.POLLOUT) and not _is_closed(reference):
            continue
        ready = {waiter.socket}
        while (client := reference()) is not None:
            news = connections if connections.descriptor in ready else None
            deadline = client._turn(news, nudged=wake in ready, readable=waiter.socket in ready)
            if deadline is None:
                break
            del client
            ready = waiter.wait(deadline)
        if client is None:
            _say_goodbye(core, dealer)
    except Exception as error:
        if (client := reference()) is not None:
            client._break(ClusterLost(f"the client's I/O thread failed: {error!r}"))
        raise
    finally:
        lifetime.needed.discard(cast("Client", reference()))
        connections.close()
        dealer.close(linger=1_000)
        ctx.term()
        os.close(wake)
        if printer is not None:
            printer.close()


def _arrived(where: str) -> Client:
    """A client that was pickled: in a task it is the worker's."""
    return nesting.get_client() if worker.in_worker() else Client(where)


def _is_closed(reference: weakref.ref[Client]) -> bool:
    client = reference()
    return client is None or client._closed


def _say_goodbye(core: Requests, dealer: zmq.Socket[bytes]) -> None:
    now = time.monotonic()
    for action in core.handle(events.Leave(False, "client dropped"), now) + core.handle(events.Tick(), now):
        if isinstance(action, events.ToBroker):
            with contextlib.suppress(zmq.Again):
                sockets.send(dealer, encode(action.envelope))


def _wake_and_close(wake: int) -> None:
    os.eventfd_write(wake, 1)
    os.close(wake)


def _warn(text: str) -> None:
    """From the I/O thread, which must outlive it when warnings are errors."""
    with contextlib.suppress(RuntimeWarning):
        warnings.warn(f"zmqsched: {text}", RuntimeWarning, stacklevel=1)
