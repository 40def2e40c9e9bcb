"""Every policy places what can be placed; each then has its own idea of where."""

from __future__ import annotations

from collections import Counter
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zmqsched.core.nodes import Node
from zmqsched.core.placement import Placement
from zmqsched.core.policy import DEFAULT_POLICY, POLICIES
from zmqsched.core.tasks import QUEUED, Task
from zmqsched.protocol import Host, NodeHello, Shape

from .builders import digest, options, task_id, token

every_policy = pytest.mark.parametrize("policy", sorted(POLICIES))


class Floor:
    """A placement with nodes and tasks, without anything that speaks."""

    def __init__(self, policy: str) -> None:
        self.placement = Placement(POLICIES[policy](), Random(1))
        self.nodes: dict[str, Node] = {}
        self.tasks: list[Task] = []
        self.placed: list[str] = []

    def node(self, slots: int, credit: int | None = None, **resources: float) -> None:
        name = f"n{len(self.nodes)}"
        held = tuple(sorted({"cpu": float(slots), **resources}.items()))
        hello = NodeHello(token(name), 1, Host("h", 1, "3.11"), slots, slots if credit is None else credit, held)
        node = self.nodes[name] = Node(name, 1, hello, 0.0)
        self.placement.join(node)

    def queue(self, count: int, priority: int = 0, **resources: float) -> None:
        kind = self.placement.kind(Shape(digest("f"), options(priority=priority, resources=resources)))
        for _ in range(count):
            task = Task(task_id(f"t{len(self.tasks)}"), 1, kind, b"", len(self.tasks))
            task.move(QUEUED)
            kind.open += 1
            self.placement.enqueue(task)
            self.tasks.append(task)

    def place(self) -> list[tuple[Task, Node]]:
        pairs = [(task, node) for node, run in self.placement.place(0.0) for task in run]
        self.placed += [node.id for _, node in pairs]
        self.placement.sanity_check()
        self.placement.check_nothing_waits(0.0)
        return pairs

    def end(self, task: Task) -> None:
        node = self.nodes[task.node]
        node.drop(task)
        task.node = ""
        self.placement.changed(node)

    @property
    def loads(self) -> list[int]:
        return [node.assigned for node in self.nodes.values()]


@every_policy
@settings(max_examples=60, deadline=None)
@given(
    nodes=st.lists(st.tuples(st.integers(1, 4), st.integers(0, 3), st.integers(0, 2)), max_size=5),
    asked=st.lists(st.tuples(st.integers(1, 6), st.integers(-1, 1), st.sampled_from([0, 1, 2])), max_size=6),
    seed=st.integers(0, 99),
)
def test_all_is_placed_that_can_be(policy, nodes, asked, seed):
    floor = Floor(policy)
    for slots, prefetch, gpus in nodes:
        floor.node(slots, slots + prefetch, **({"gpu": float(gpus)} if gpus else {}))
    random = Random(seed)
    held: list[Task] = []
    for count, priority, gpus in asked:
        floor.queue(count, priority, **({"gpu": float(gpus)} if gpus else {}))
        held += [task for task, _ in floor.place()]
        for task in random.sample(held, len(held) // 2):
            held.remove(task)
            floor.end(task)
        held += [task for task, _ in floor.place()]
    for node in floor.nodes.values():
        assert node.assigned <= node.credit
        assert node.used.get("gpu", 0.0) <= node.total.get("gpu", 0.0)


@every_policy
def test_plain_tasks_fill_all_credit(policy):
    floor = Floor(policy)
    for slots in (1, 2, 3):
        floor.node(slots, slots + 1)
    floor.queue(20)
    assert len(floor.place()) == 9
    assert floor.loads == [2, 3, 4]


@every_policy
def test_a_node_that_leaves_gets_nothing(policy):
    floor = Floor(policy)
    floor.node(2)
    floor.node(2)
    floor.queue(1)
    floor.placement.leave(floor.nodes.pop("n0"))
    floor.queue(5)
    floor.place()
    assert set(floor.placed) == {"n1"}


def test_the_least_loaded_spreads_by_slots():
    floor = Floor("least-loaded")
    for slots in (2, 4, 2):
        floor.node(slots, 100)
    floor.queue(8)
    floor.place()
    assert floor.loads == [2, 4, 2]
    floor.queue(8)
    floor.place()
    assert floor.loads == [4, 8, 4]


def test_round_robin_takes_turns_whatever_the_load():
    floor = Floor("round-robin")
    for _ in range(3):
        floor.node(100)
    floor.queue(9)
    for task, _ in floor.place():
        if task.node == "n0":
            floor.end(task)
    floor.queue(3)
    floor.place()
    assert floor.placed == ["n0", "n1", "n2"] * 4


def test_pack_fills_one_node_before_it_touches_the_next():
    floor = Floor("pack")
    for _ in range(3):
        floor.node(4, 8)
    for _ in range(6):
        floor.queue(1)
        floor.place()
    assert sorted(floor.loads) == [0, 2, 4]
    floor.queue(6)
    floor.place()
    assert floor.loads == [4, 4, 4], "slots before prefetch"


def test_random_hits_all_about_evenly():
    floor = Floor("random")
    for _ in range(4):
        floor.node(1000)
    floor.queue(400)
    floor.place()
    assert min(Counter(floor.placed).values()) > 60


def test_random_does_not_settle_on_one_node():
    floor = Floor("random")
    for _ in range(4):
        floor.node(10)
    for _ in range(500):
        floor.queue(1)
        ((task, _),) = floor.place()
        floor.end(task)
    assert min(Counter(floor.placed[-100:])[name] for name in floor.nodes) > 5


def test_the_default_is_one_of_them():
    assert DEFAULT_POLICY in POLICIES
