"""Why tasks wait, in words for who submitted them: the one place for these words.

Rules
-----
* Nothing is kept for this: the words are made from what placement decides by, when somebody asks, once a lane.
* A reason reads on from "12 waiting:" and from "tasks like this one", so it begins with "need", if they ask for more than a
  slot, and says then what there is.
* An answer names at most ``MAX_REASONS``, most tasks first; the others are added up.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING

from ..protocol import clipped
from .nodes import ALIVE, DRAINING, PAUSED, SUSPECT, Demand, Node, Prospect
from .tasks import ASSIGNED, DELAYED, QUEUED, WAITING, Lane, Task

if TYPE_CHECKING:
    from .book import Book

MAX_REASONS = 8
MAX_NAMED = 5  # nodes named in a reason
MAX_REASON = 300  # characters

NO_FUNCTION = "their function has not arrived yet"
NO_INPUT = "have results of other tasks as arguments, which are not there yet"
IN_LIMBO = "may have been running when the broker died, and must not run twice: their nodes are awaited"
SETTLING = "the broker was started anew and waits for its nodes"
UNREAD = "the broker's memory is full of results that nobody has read"
NEXT_IN_LINE = "next in line at their nodes"
STATES = {DRAINING: "is draining", SUSPECT: "is silent", PAUSED: "is paused"}


class Reasons:
    """Of the moment at which it is made. ``lost``: nodes that may be back; ``prospects``: those that may be started.
    ``held``: why nothing at all is placed now."""

    def __init__(self, book: Book, lost: Sequence[Node], prospects: Sequence[Prospect] = (), held: str = "") -> None:
        self._book = book
        self._lost = lost
        self._prospects = prospects
        self._held = held
        self._of_lanes: dict[int, str] = {}

    def of_all(self) -> list[tuple[int, str]]:
        """How many tasks wait for what reason."""
        book = self._book
        reasons: Counter[str] = Counter()
        for lane in book.placement.lanes():
            if lane.tasks:
                reasons[self._of_lane(lane)] += len(lane.tasks)
        without_function = sum(map(len, book.waiting.values()))
        reasons[NO_FUNCTION] += without_function
        reasons[NO_INPUT] += dict(book.task_counts())["waiting"] - without_function - len(book.limbo)
        reasons[IN_LIMBO] += len(book.limbo)
        if book.delayed:
            reasons[self._of_delayed()] += len(book.delayed)
        for node in book.nodes.values():
            if node.state is SUSPECT:
                reasons[_at_silent(node, book.now)] += node.assigned
        return _summed_up(reasons)

    def of(self, tasks: Iterable[Task]) -> list[tuple[int, str]]:
        """The same of these tasks alone; those that run have no reason to wait."""
        return _summed_up(Counter(map(self._of_task, tasks)))

    def _of_task(self, task: Task) -> str:
        if task.state is QUEUED:
            return self._of_lane(task.lane)
        if task.state is WAITING:
            if task.id in self._book.limbo:
                return IN_LIMBO
            return NO_FUNCTION if task.id in self._book.waiting.get(task.kind.shape.function, ()) else NO_INPUT
        if task.state is DELAYED:
            return self._of_delayed()
        node = self._book.nodes[task.node]
        if node.state is SUSPECT:
            return _at_silent(node, self._book.now)
        return NEXT_IN_LINE if task.state is ASSIGNED else ""

    def _of_lane(self, lane: Lane) -> str:
        if self._held:
            return self._held
        if id(lane) not in self._of_lanes:
            book = self._book
            self._of_lanes[id(lane)] = why_queued(lane, book.nodes.values(), self._lost, self._prospects, book.now)
        return self._of_lanes[id(lane)]

    def _of_delayed(self) -> str:
        next_in_s = max(0.0, self._book.delayed.soonest - self._book.now)
        return f"failed and will be tried again, the next in {next_in_s:.0f} s"


def why_queued(
    lane: Lane, nodes: Collection[Node], lost: Sequence[Node], prospects: Sequence[Prospect], now: float
) -> str:
    """Why the first task of a lane is at none of these nodes. ``lost``, ``prospects``: as :class:`Reasons` has them."""
    need = _needs(lane.demand, lane.tags)
    able = [node for node in lane.pool.nodes.values() if node.could_hold(lane.demand)]
    if not nodes:
        return "no node is there" + (": " + _listed(f"{node.id} is lost" for node in lost) if lost else "")
    if not able:
        if any(map(lane.suits, prospects)):
            return _joined(need, "a node that has it is about to be started, or has no room to be")
        return _of_the_lost(lane, need, lost) or _nobody_has(lane, nodes)
    alive = [node for node in able if node.state is ALIVE]
    if not alive:
        whose = "no node that has it takes tasks" if need else "no node takes tasks"
        return _joined(need, f"{whose}: {_listed(f'{node.id} {STATES[node.state]}' for node in able)}")
    lasting = [node for node in alive if node.lasts(lane.length_s, now)]
    if not lasting:
        ends = _listed(f"{node.id} in {max(0.0, node.leaves_at - now):.0f} s" for node in alive)
        return _joined(need, f"may take {lane.length_s:.0f} s, and the nodes leave before: {ends}")
    roomy = [node for node in lasting if node.open and node.fits(lane.demand)]
    if any(node.reserved is None for node in roomy):
        return _joined(need, "about to start")
    if roomy:
        return _joined(need, "what is free is kept for tasks that have waited longer and need more")
    beyond_a_slot = tuple(pair for pair in lane.demand if pair[1] > (pair[0] == "cpu"))
    paused = sum(node.state is PAUSED for node in able)
    besides = f", {paused} node{'s are' if paused > 1 else ' is'} paused" if paused else ""
    if any(node.fits(beyond_a_slot) for node in lasting):
        taken = _all_taken(str(sum(node.slots for node in lasting)), " slots")
        return _joined(need, taken + (" at nodes that have it" if need else "")) + besides
    return _short_of(beyond_a_slot, need, lasting) + besides


def _nobody_has(lane: Lane, nodes: Collection[Node]) -> str:
    """What a lane asks for and no node has, not even when it is empty."""
    most = {name: max((node.total.get(name, 0.0) for node in nodes), default=0.0) for name, _ in lane.demand}
    missing = [(name, amount) for name, amount in lane.demand if amount > most[name] + 1e-9]
    tags = [tag for tag in lane.tags if not any(tag in node.tags for node in nodes)]
    if not missing and not tags:
        return _joined(_needs(lane.demand, lane.tags) or "need a slot", "no node has all of that")
    need = "need " + _and([*(_amount(*pair) for pair in missing), *(f"tag {tag}" for tag in tags)])
    if len(missing) + len(tags) > 1:
        return f"{need}, no node has them"
    if tags:
        return f"{need}, no node has it"
    name, amount = missing[0]
    if most[name] > 0:
        return f"{need}, no node has more than {_quantity(name, most[name])}"
    return f"{need}, no node has {'one' if amount == 1 and name != 'memory' else 'any'}"


def why_hopeless(lane: Lane, nodes: Collection[Node]) -> str:
    """The error of tasks that no node can ever hold."""
    offers = [f"{node.id} ({node.where.host}): {_offer(node)}" for node in list(nodes)[:MAX_NAMED]]
    return clipped(
        f"tasks like this one {_nobody_has(lane, nodes)}. The nodes offer {'; '.join(offers)}. "
        "Ask for less, or start a node that has it (zmqsched node --resource NAME=AMOUNT --tag TAG)."
    )


def _at_silent(node: Node, now: float) -> str:
    return f"at {node.id} ({node.where.host}), which has been silent for {now - node.heard_at:.0f} s"


def _summed_up(reasons: Counter[str]) -> list[tuple[int, str]]:
    """As many as an answer may hold."""
    found = [(count, reason) for reason, count in reasons.items() if count and reason]
    found.sort(key=lambda each: (-each[0], each[1]))
    shown = [(count, clipped(reason, MAX_REASON)) for count, reason in found[:MAX_REASONS]]
    if rest := found[MAX_REASONS:]:
        shown.append((sum(count for count, _ in rest), f"{len(rest)} other reasons"))
    return shown


def _of_the_lost(lane: Lane, need: str, lost: Sequence[Node]) -> str:
    had = [node for node in lost if lane.pool.suits(node) and node.could_hold(lane.demand)]
    whose = "nodes that had it are" if len(had) > 1 else "the node that had it is"
    return _joined(need, f"{whose} lost: {_listed(f'{node.id} ({node.where.host})' for node in had)}") if had else ""


def _short_of(demand: Demand, need: str, nodes: list[Node]) -> str:
    """What these nodes have, and others have taken: one thing alone, if that explains it."""
    for name, amount in sorted(demand, key=lambda pair: pair[0] == "cpu"):
        if all(node.used.get(name, 0.0) + amount > node.total.get(name, 0.0) + 1e-9 for node in nodes):
            total = sum(node.total.get(name, 0.0) for node in nodes)
            used = sum(min(node.used.get(name, 0.0), node.total.get(name, 0.0)) for node in nodes)
            what = f" {name}" if len(demand) > 1 or name == "memory" else ""
            if used < total - 1e-9:
                return _joined(need, f"{_quantity(name, used)} of {_quantity(name, total)}{what} are taken")
            return _joined(need, _all_taken(_quantity(name, total), what))
    return _joined(need, "no node has all of that free")


def _all_taken(number: str, what: str) -> str:
    if number == "1":
        return f"the only{what.removesuffix('s') or ' one'} is taken"
    return f"both{what} are taken" if number == "2" else f"all {number}{what} are taken"


def _needs(demand: Demand, tags: Iterable[str]) -> str:
    """What is asked for beyond a slot."""
    wants = [_amount(name, amount) for name, amount in demand if amount > (name == "cpu")]
    wants += [f"tag {tag}" for tag in tags]
    return "need " + _and(wants) if wants else ""


def _amount(name: str, amount: float) -> str:
    if name == "memory":
        return f"{_quantity(name, amount)} of memory"
    return name if amount == 1 else f"{amount:g} {name}"


def _offer(node: Node) -> str:
    """As one writes it on a node's command line."""
    return ", ".join([*(f"{name}={_quantity(name, amount)}" for name, amount in node.total.items()), *sorted(node.tags)])


def _quantity(name: str, amount: float) -> str:
    if name != "memory":
        return f"{amount:g}"
    return f"{amount / 2**30:.3g} GiB" if amount >= 2**30 else f"{amount / 2**20:.3g} MiB"


def _joined(need: str, what: str) -> str:
    return f"{need}, {what}" if need else what


def _and(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _listed(words: Iterable[str]) -> str:
    words = list(words)
    return ", ".join(words[:MAX_NAMED]) + (f" and {len(words) - MAX_NAMED} more" if len(words) > MAX_NAMED else "")
