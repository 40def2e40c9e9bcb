"""The priority queue against a sorted list."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from zmqsched.core.priorities import PriorityQueue

Priority = st.integers(-2, 2)


class AgainstAList(RuleBasedStateMachine):
    """``model`` holds (priority, key), in the order in which they should come out."""

    def __init__(self) -> None:
        super().__init__()
        self.queue: PriorityQueue[str] = PriorityQueue()
        self.model: list[tuple[int, bytes]] = []
        self.made = 0

    @rule(priority=Priority, first=st.booleans())
    def push(self, priority: int, first: bool) -> None:
        key = b"%d" % self.made
        self.made += 1
        self.queue.push(key, key.decode(), priority, first=first)
        comes_behind = [other <= priority if first else other < priority for other, _ in self.model]
        self.model.insert([*comes_behind, True].index(True), (priority, key))

    @precondition(lambda self: self.model)
    @rule()
    def pop(self) -> None:
        assert self.queue.head() == self.model[0][1].decode()
        assert self.queue.pop() == self.model.pop(0)[1].decode()

    @precondition(lambda self: self.model)
    @rule()
    def pop_last(self) -> None:
        assert self.queue.pop_last() == self.model.pop()[1].decode()

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        priority, key = self.model.pop(data.draw(st.integers(0, len(self.model) - 1)))
        self.queue.remove(key, priority)

    @invariant()
    def the_same(self) -> None:
        assert list(self.queue) == [key.decode() for _, key in self.model]
        assert len(self.queue) == len(self.model)
        assert bool(self.queue) == bool(self.model)


TestAgainstAList = AgainstAList.TestCase
TestAgainstAList.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)


def test_what_was_taken_out_goes_back_in_front_of_its_equals_only():
    queue: PriorityQueue[str] = PriorityQueue()
    for key, priority in (("low", 0), ("one", 1), ("two", 1), ("high", 2)):
        queue.push(key.encode(), key, priority)
    queue.push(b"back", "back", 1, first=True)
    assert list(queue) == ["high", "back", "one", "two", "low"]
