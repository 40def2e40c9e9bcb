"""What placement has decided, on its way to the nodes: one ``Dispatch`` a node, with the functions that it lacks.

Rules
-----
* A turn's tasks for a node go as one message, or as few as the limits of a message allow; a function goes with the first
  task of it that this node gets. Inputs that the node has not had yet go behind, in messages of their own, for they may be
  many and large.
* With a journal, a task that may be started only once goes when it is on disk that it may have been: ``placed`` hears of
  that. If it is not to be started any more by then, because it was cancelled or its node is not well, it was not.
"""

from __future__ import annotations

from collections.abc import Callable

from ..protocol import Attempt, Dispatch, Function, Functions, Order, Payload, batches, wire_bytes
from .book import Book
from .functions import function_bytes
from .ledger import Ledger, Placed
from .nodes import ALIVE, SUSPECT, Node
from .tasks import Kind, Task, task_bytes

MAX_NODE_FUNCTIONS = 4_096  # digests remembered as sent to a node; past it, functions are sent again


class Dispatching:
    def __init__(self, book: Book) -> None:
        self._book = book
        self._may_start: list[Placed] = []  # what may be started only once, and that is on disk now

    def dispatch(self) -> None:
        """Send what can be placed now."""
        book = self._book
        if not book.placement.pending or book.load.unread:
            return
        orders: dict[str, list[Task]] = {}
        for node, run in book.placement.place(book.now):
            orders.setdefault(node.id, []).extend(run)
        for node_id, tasks in orders.items():
            node = book.nodes[node_id]
            if len(node.functions) > MAX_NODE_FUNCTIONS:
                node.functions.clear()
            self._send_orders(node, tasks if book.ledger is None else self._dispatch_once(book.ledger, node, tasks))

    def placed(self, placed: Placed) -> None:
        """That these tasks may be started is on disk."""
        self._may_start.append(placed)

    def start_once(self) -> None:
        """What may be started only once and is on disk: now it may be, if it still is to be."""
        placed, self._may_start = self._may_start, []
        for node_id, attempts in placed:
            self._send_once(node_id, attempts)

    def _dispatch_once(self, ledger: Ledger, node: Node, tasks: list[Task]) -> list[Task]:
        """What may be started only once is, when that is on disk. Returns the others."""
        once = [task for task in tasks if not task.kind.options.requeue]
        for task in once:
            self._book.charge(task)
        if once:
            ledger.then(Placed(node.id, [Attempt(task.id, task.attempt) for task in once]))
        return [task for task in tasks if task.kind.options.requeue]

    def _send_once(self, node_id: str, attempts: list[Attempt]) -> None:
        book = self._book
        wanted = []
        for task_id, number in [(attempt.task, attempt.attempt) for attempt in attempts]:
            task = book.tasks.get(task_id)
            if task is None or task.node != node_id or task.attempt != number:
                continue
            if task.cancelled or not self._still_takes(book.nodes[node_id], task):
                book.let_go(task, book.nodes[node_id])
                book.charge(task)
                book.requeue(task)
            else:
                wanted.append(task)
        if wanted:
            self._send_orders(book.nodes[node_id], wanted)

    def _still_takes(self, node: Node, task: Task) -> bool:
        return node.state is ALIVE or (task.kind.lane.nested and node.state is not SUSPECT)

    def _send_orders(self, node: Node, tasks: list[Task]) -> None:
        sessions = self._book.sessions
        for batch in batches(tasks, self._sizes_at(node)):
            inputs = self._new_inputs(node, batch) if len(self._book.dependencies.inputs) else []
            sessions.send(sessions.of(node), self._message(node, batch, [each.digest for each in inputs]))
            for some in batches(inputs, function_bytes):
                sessions.send(sessions.of(node), Functions(some))

    def _new_inputs(self, node: Node, tasks: list[Task]) -> list[Function]:
        inputs = self._book.dependencies.inputs
        new: dict[bytes, Payload] = {}
        for entry in [inputs[each] for task in tasks for each in task.inputs]:
            if entry.name not in node.functions:
                assert entry.value is not None, "a task is placed before its inputs are here"
                new[entry.name] = entry.value
        node.functions |= new.keys()
        return [Function(name, value) for name, value in new.items()]

    def _sizes_at(self, node: Node) -> Callable[[Task], int]:
        """What each task takes in a dispatch to this node: with its function, the first time that is named there."""
        functions = self._book.functions
        named: set[bytes] = set()

        def size(task: Task) -> int:
            digest = task.kind.shape.function
            if digest in node.functions or digest in named:
                return task_bytes(task)
            named.add(digest)
            return task_bytes(task) + wire_bytes(functions[digest])

        return size

    def _message(self, node: Node, tasks: list[Task], follow: list[bytes]) -> Dispatch:
        index: dict[Kind, int] = {}  # a shape takes long to hash
        orders = []
        for task in tasks:
            number = index.setdefault(task.kind, len(index))
            inputs = self._inputs_of(task) if task.inputs else ()
            orders.append(Order(task.id, task.attempt, number, task.call, inputs))
        shapes = [kind.shape for kind in index]
        new = {shape.function for shape in shapes} - node.functions
        node.functions |= new
        functions = self._book.functions
        return Dispatch(shapes, orders, [Function(digest, functions[digest]) for digest in sorted(new)], follow)

    def _inputs_of(self, task: Task) -> tuple[tuple[bytes, bytes], ...]:
        inputs = self._book.dependencies.inputs
        return tuple([(each, inputs[each].name) for each in task.inputs])
