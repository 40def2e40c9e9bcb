"""The nodes of a cluster, group by group: asked for, watched, drained and ended. One thread of the cluster's does it.

Rules
-----
* A launcher is called by one thread at a time. It says how its nodes are; whether one has joined, the broker says, unless
  the launcher has heard it from the node.
* The thread runs while the first nodes start, too: what is known of one is told and can be asked for, whatever others do.
* A node that ends unasked is told of once: in the log, or by the exception if the cluster cannot start without it. In a
  group of fixed size no other takes its place, for what has ended it might end the next: ``scale`` makes up for it. A group
  that adapts is kept at its least number, with pauses that grow.
* Nobody is ended with work: a node that is to go is drained by the broker, and stopped by its launcher when it has left.
* The broker is asked only while something depends on it: who has joined, who is idle, who has left.
"""

from __future__ import annotations

import contextlib
import math
import os
import select
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, replace
from typing import Any

from .brokers import KeptBroker
from .clusterfile import NodeGroup
from .control import Request, Server
from .core.adapting import Adapting, Demand
from .errors import CommandFailed, StartError, ZmqschedError
from .launch.base import Launched, Site
from .nodegroup import Group, Member
from .readiness import Asked
from .records import NodeInfo, Status, status_of
from .shell import log

LOOK_EVERY_S = 1.0
# While somebody waits for nodes that only the broker can tell of.
ASK_EVERY_S = 0.2
# A broker answers in milliseconds, or is being replaced.
ANSWER_S = 3.0
# What launchers have to end their nodes, or to say which may be left: a host that is down is waited for by ssh.
CLOSE_TIMEOUT_S = 10.0
MAX_NODES = 10_000
MAX_FAILURES = 100
# A broker that follows another has all that are there back within seconds.
UNKNOWN_S = 60.0
HERE = ("alive", "suspect", "paused", "draining")


class Fleet:
    """All nodes that this process has asked for."""

    def __init__(
        self, groups: Sequence[NodeGroup], site: Site, broker: KeptBroker, changed: Callable[[], None],
        told: Callable[[Sequence[Launched]], None], least: int,
    ) -> None:  # fmt: skip
        """``least``: with fewer nodes the cluster does not start. ``changed`` is called when a node has ended unasked,
        ``told`` with all of them whenever they were looked at; by the fleet's thread, or the one that starts it."""
        self.failures: deque[Launched] = deque(maxlen=MAX_FAILURES)
        self._site = replace(site, wake=self._news)
        self._broker = broker
        self._changed = changed
        self._told = told
        self._least = least
        self._started = False
        self._lock = threading.RLock()
        self._looked = threading.Condition(self._lock)
        self._client: Any = None
        self._status: Status  # as the broker was last asked
        self._nodes: dict[str, NodeInfo] = {}  # its nodes that are there, by label
        self._suited: dict[str, int] = {}  # queued tasks that a node of each adapting group could hold
        self._shown: list[Launched] = []
        self._closed = False
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        weakref.finalize(self, os.close, self._wake).atexit = False
        self._thread: threading.Thread | None = None
        self._closings: list[threading.Thread] = []
        self.groups = {wanted.name: Group(wanted, self._site) for wanted in groups}

    # --- beginning ------------------------------------------------------------------------------------------------

    def start(self, *, local: bool) -> None:
        """Ask for the first nodes, of the local groups or of the others.

        A launcher that can start none of a group's nodes is told of as a failure; the other groups go on.
        """
        for group in self.groups.values():
            if (group.wanted.launcher == "local") is local:
                try:
                    group.start(group.wanted.size)
                except StartError as error:
                    self._failed(Launched(group.name, "ended", str(error)))
        self._show()

    def serve(self) -> None:
        """From now on the thread does the rest, and the control socket is there."""
        server = Server(self._site.directory, self.answer)
        self._thread = threading.Thread(target=self._run, args=(server,), name="zmqsched cluster", daemon=True)
        self._thread.start()

    def wait_for_first(self, timeout_s: float) -> None:
        """Until each node has joined or failed, of those that do not wait in a queue; or for so long.

        Raises
        ------
        StartError
            So many have failed that the least number cannot come, which is said at once; their own words say why.
        """
        until = time.monotonic() + timeout_s
        with self._looked:
            while not self._is_hopeless() and (coming := self._coming()):
                if not self._looked.wait(until - time.monotonic()) and time.monotonic() >= until:
                    for launched in coming:
                        self._failed(replace(launched, why=f"was not ready within {timeout_s:g} s"))
                    break
            if self._is_hopeless():
                raise self.cannot_start()
            self._started = True

    def cannot_start(self) -> StartError:
        """With the words of all nodes that failed."""
        words = "\n".join(f"  {one.label}{f' ({one.where})' if one.where else ''}: {one.why}" for one in self.failures)
        return StartError(f"nodes of cluster {self._broker.name!r} did not start:\n{words}")

    def _is_hopeless(self) -> bool:
        """Too many have failed for the cluster to start."""
        possible = sum(group.number() for group in self.groups.values())
        return not self._started and bool(self.failures) and possible < self._least

    def _coming(self) -> list[Launched]:
        groups = [group for group in self.groups.values() if not group.launcher.queues]
        return [one.launched for group in groups for one in group.members.values() if not one.joined and not one.ended]

    def _heard(self) -> bool:
        """A launcher has heard that a first node runs, but not that it is ready: the broker knows."""
        return not self._started and any(one.state == "running" for one in self._coming())

    # --- what is asked of it --------------------------------------------------------------------------------------

    def now(self) -> list[Launched]:
        """How the nodes are, with their ids at the broker as far as they are known here."""
        shown = list(self._shown)
        labels = {one.label for one in shown}
        return shown + [one for one in list(self.failures) if one.label not in labels]

    def scale(self, name: str, number: int) -> None:
        """Have so many nodes in this group, from now on whatever the demand.

        Raises
        ------
        ValueError
            There is no such group, or no such number.
        StartError
            None of the new ones can be started.
        """
        group = self._group(name)
        _check_number("n", number, 0)
        with self._lock:
            self._check_open()
            group.adapting = None
            staying = group.staying()
            group.start(number - len(staying))
            if number < len(staying):
                self._ask()
                order = list(staying)[::-1]  # of equals the latest
                order.sort(key=self._burden)
                self._dismiss(group, order[: len(staying) - number])
            self._show()
        self._news()

    def adapt(self, name: str, least: int, most: int) -> None:
        """Keep the group between ``least`` and ``most`` nodes from now on (``core/adapting.py``)."""
        group = self._group(name)
        _check_number("min", least, 0)
        _check_number("max", most, max(1, least))
        with self._lock:
            self._check_open()
            group.adapting = Adapting(least, most)
        self._news()

    def asked(self) -> Asked:
        """What :func:`wait_for_nodes` wants to know."""
        grows = any(group.adapting and len(group.staying()) < group.adapting.most for group in self.groups.values())
        return Asked([asdict(one) for one in self.now()], grows)

    def status(self) -> Status:
        """What the broker says.

        Raises
        ------
        ZmqschedError
            It does not answer.
        """
        with self._lock:
            if self._client is None or not self._client.usable:
                from .client import Client  # a cluster that needs none starts without it

                self._client = Client(self._broker.file, timeout=ANSWER_S, output=False)
            client = self._client
        groups = [group for group in self.groups.values() if group.adapting]
        report = client._report(ANSWER_S, [group.prospect(self._nodes) for group in groups])
        self._suited = dict(zip([group.name for group in groups], report.suited, strict=False))
        return status_of(report)

    def answer(self, request: Request) -> Request:
        """What the control socket says to a request."""
        match request:
            case {"do": "nodes"}:
                return {**self.asked()._asdict(), "cluster_id": self._broker.file.cluster_id}
            case {"do": "scale", "group": str(name), "n": int(number)}:
                self.scale(name, number)
                return {}
            case {"do": "adapt", "group": str(name), "min": int(least), "max": int(most)}:
                self.adapt(name, least, most)
                return {}
            case {"do": "log", "label": str(label)}:
                return {"path": self._log_of(label)}
            case {"do": "facts"}:
                groups = {name: len(group.staying()) for name, group in self.groups.items()}
                return {"name": self._broker.name, "pid": os.getpid(), "broker": self._broker.pid, "groups": groups}
        raise ValueError(f"this cluster's process does not know the request {str(request)[:200]}")

    def _log_of(self, label: str) -> str:
        known = {one.label for one in self.now()}
        if label not in known:
            raise ValueError(f"no node {label!r} was started here; there are {', '.join(sorted(known)) or 'none'}")
        return str(self._site.log_path(label))

    def _group(self, name: str) -> Group:
        if name not in self.groups:
            raise ValueError(f"there is no group of nodes {name!r}; there are {', '.join(self.groups) or 'none'}")
        return self.groups[name]

    def _check_open(self) -> None:
        if self._closed:
            raise StartError(f"the cluster {self._broker.name!r} is closed")

    # --- the thread -----------------------------------------------------------------------------------------------

    def _news(self) -> None:
        """To be called from any thread: look again."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_write(self._wake, 1)

    def _run(self, server: Server) -> None:
        look_at = time.monotonic()
        while not self._closed:
            waiter = select.poll()
            for descriptor, events in {self._wake: select.POLLIN, **server.descriptors()}.items():
                waiter.register(descriptor, events)
            ready = {descriptor for descriptor, _ in waiter.poll(max(0.0, 1000 * (look_at - time.monotonic())))}
            server.serve(ready)
            if self._wake in ready or time.monotonic() >= look_at:
                if not self._broker.fate:  # then the directory may be another's
                    server.look()
                self._turn()
                look_at = time.monotonic() + (ASK_EVERY_S if self._heard() else LOOK_EVERY_S)
        server.close()

    def _turn(self) -> None:
        groups = self.groups.values()
        with self._looked:
            if self._closed:
                return
            try:
                asked = any(group.adapting or any(one.leaving for one in group.members.values()) for group in groups)
                self._look(ask=asked or self._heard())
                if asked and self._started:
                    self._see_off()
                    self._adapt()
            except ZmqschedError as error:  # the broker is being replaced, or a command of the site failed
                log.debug("zmqsched: cluster %s: %s", self._broker.name, error)
            self._show()
            self._looked.notify_all()

    def _look(self, *, ask: bool) -> None:
        """How are they?"""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wake)
        for group in self.groups.values():
            for launched in group.poll():
                self._saw(group, launched)
        self._show()
        if ask:
            self._ask()

    def _saw(self, group: Group, launched: Launched) -> None:
        one = group.members.get(launched.label)
        if one is None or (one.ended and launched.state == "ended"):
            return
        broke = one.launched.state == "running" and launched.state == "starting"
        one.launched = replace(launched, node=launched.node or ("" if broke else one.launched.node))
        if broke:
            one.joined, one.cut_off = False, True
            self._say(launched, f"is cut off, and is started again when that can be: {launched.why}")
        elif one.cut_off and launched.state == "running":
            one.cut_off = False
            self._say(launched, "is there again")
        if launched.node:
            self._joined(group, one)
        if one.ended and launched.why and not one.leaving:
            if group.adapting:
                group.adapting.failed(time.monotonic())
            self._failed(launched)

    def _joined(self, group: Group, one: Member) -> None:
        if not one.joined and group.adapting:
            group.adapting.joined()
        one.joined = True

    def _failed(self, launched: Launched) -> None:
        self.failures.append(launched)
        if self._is_hopeless():  # the exception says it
            return
        how = f"ended: {launched.why} ({sum(map(Group.number, self.groups.values()))} left)"
        self._say(launched, how if launched.state == "ended" else launched.why)
        self._changed()

    def _say(self, launched: Launched, what: str) -> None:
        where = f" ({launched.where})" if launched.where else ""
        log.warning("zmqsched: node %s%s of cluster %s %s", launched.label, where, self._broker.name, what)

    def _ask(self) -> None:
        """Who has joined, and what do they do? Who has not joined, or has left, the broker is not waited for to know."""
        self._status = self.status()
        now = time.monotonic()
        labelled = [node for node in self._status.nodes if node.label]
        self._nodes = {node.label: node for node in labelled if node.state in HERE}
        left = {node.label for node in labelled} - self._nodes.keys()
        for group in self.groups.values():
            for label, one in group.members.items():
                if node := self._nodes.get(label):
                    one.launched = replace(one.launched, node=node.id)
                    one.unknown_since = None
                    self._joined(group, one)
                elif not one.joined or label in left:
                    one.unknown_since = -math.inf
                elif one.unknown_since is None:
                    one.unknown_since = now

    def _show(self) -> None:
        self._shown = [one.launched for group in self.groups.values() for one in group.members.values()]
        self._told(self._shown)

    # --- more and fewer -------------------------------------------------------------------------------------------

    def _adapt(self) -> None:
        """Each group in turn: what one starts, the next need not."""
        here = [node for node in self._status.nodes if node.state in ("alive", "suspect")]
        assigned = self._status.tasks.get("assigned", 0)
        groups = [group for group in self.groups.values() if group.adapting]
        for group in groups:
            assert group.adapting is not None
            staying = group.staying()
            coming = [label for label, one in staying.items() if not one.joined and not one.cut_off]
            busy = {label: self._nodes[label].assigned for label in staying if label in self._nodes}
            busy.update(dict.fromkeys((label for label in staying if self._is_unknown(staying[label])), 1))
            queued = self._suited.get(group.name, 0)
            demand = Demand(queued + assigned, queued, sum(node.slots for node in here), self._slots_coming(group.name))
            step = group.adapting.decide(time.monotonic(), demand, group.slots(self._nodes), busy, coming)
            self._dismiss(group, step.leave)
            group.stop([label for label, one in group.members.items() if one.ended])
            try:
                group.start(step.start)
            except StartError as error:
                group.adapting.failed(time.monotonic())
                self._failed(Launched(group.name, "ended", str(error)))

    def _slots_coming(self, name: str) -> int:
        """Of all nodes that are on their way and could hold as much of what is queued as those of this group."""
        mine = self._suited.get(name, 0)
        like = [other for other in self.groups.values() if self._suited.get(other.name, math.inf) >= mine]
        return sum(
            group.slots(self._nodes)
            for group in like
            for one in group.staying().values()
            if (not one.joined and not one.cut_off) or self._is_unknown(one)
        )

    def _is_unknown(self, one: Member) -> bool:
        """It may be there, and have work: it has joined, and the broker does not say that it has left."""
        return one.unknown_since is not None and time.monotonic() - one.unknown_since < UNKNOWN_S

    def _burden(self, label: str) -> tuple[bool, int]:
        """Who is to leave goes by this: what has not joined first, then by unfinished tasks."""
        node = self._nodes.get(label)
        return node is not None, node.assigned if node else 0

    def _dismiss(self, group: Group, labels: Collection[str]) -> None:
        """Have them leave: what has not joined now, the others when they have finished."""
        group.stop([label for label in labels if not group.members[label].joined])
        for label in labels:
            if one := group.members.get(label):
                one.leaving = True
        self._see_off()

    def _see_off(self) -> None:
        """Those that are leaving: drain who has not heard it, stop who has left."""
        for group in self.groups.values():
            left = []
            for label, one in group.members.items():
                node = self._nodes.get(label)
                if one.leaving and (one.ended or (node is None and not self._is_unknown(one))):
                    left.append(label)
                elif one.leaving and node is not None and node.state != "draining":
                    with contextlib.suppress(CommandFailed):  # it has left just now
                        self._client.drain(node.id)
            group.stop(left)

    # --- ending ---------------------------------------------------------------------------------------------------

    def begin_to_close(self) -> None:
        """End all nodes, each launcher's beside the others'."""
        if self._closed:
            return
        self._closed = True
        self._news()
        for group in self.groups.values():
            closing = threading.Thread(target=self._close_group, args=(group,), name="zmqsched close", daemon=True)
            try:
                closing.start()
            except RuntimeError:  # CPython 3.12 starts no thread while the program ends
                self._close_group(group)
            else:
                self._closings.append(closing)

    def close(self) -> None:
        """Return when they have ended, or after some seconds say who has not."""
        self.begin_to_close()
        until = time.monotonic() + CLOSE_TIMEOUT_S
        for closing in self._closings:
            closing.join(max(0.0, until - time.monotonic()))
            if closing.is_alive():
                log.warning("zmqsched: cluster %s: some nodes do not end; left behind", self._broker.name)
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(max(0.0, until - time.monotonic()))
        if self._client is not None:
            self._client.shutdown(wait=False)

    def _close_group(self, group: Group) -> None:
        # Whoever calls a launcher now has it; nobody will from now on. Who has it for longer hangs in a command of the site.
        if self._lock.acquire(timeout=CLOSE_TIMEOUT_S / 2):
            self._lock.release()
        try:
            group.launcher.close()
        except (ZmqschedError, OSError) as error:
            log.warning("zmqsched: cluster %s: group %s: %s", self._broker.name, group.name, error)
        except Exception:  # noqa: BLE001 - of another package
            log.exception("zmqsched: cluster %s: the launcher of group %s fails", self._broker.name, group.name)


def _check_number(name: str, number: int, least: int) -> None:
    if isinstance(number, bool) or not isinstance(number, int) or not least <= number <= MAX_NODES:
        raise ValueError(f"{name} is a number of nodes from {least} to {MAX_NODES}, not {number!r}")
