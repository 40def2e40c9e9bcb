"""WaitGroup counters against a model that is as simple as Go's documentation."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from zmqsched.core.groups import NEGATIVE, Answer, Groups, Waiter

Group = st.sampled_from([b"g", b"h"])
Owner = st.sampled_from(["ann", "ben"])


class AgainstGo(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.groups = Groups()
        self.counts = {b"g": 0, b"h": 0}
        self.waiting: dict[bytes, list[Waiter]] = {b"g": [], b"h": []}
        self.broken = {b"g": False, b"h": False}
        self.requests = 0

    @rule(group=Group, delta=st.integers(-3, 3))
    def add(self, group: bytes, delta: int) -> None:
        self.counts[group] += delta
        answers = self.groups.add(group, delta)
        if self.counts[group] > 0:
            assert answers == []
            return
        error = NEGATIVE if self.counts[group] < 0 else ""
        assert answers == [Answer(waiter, error, group) for waiter in self.waiting[group]]
        self.broken[group] |= bool(error) and not answers
        self.waiting[group] = []
        self.counts[group] = 0

    @rule(group=Group, owner=Owner)
    def wait(self, group: bytes, owner: str) -> None:
        self.requests += 1
        waiter = Waiter(owner, self.requests)
        answers = self.groups.wait(group, waiter)
        if self.broken[group]:
            assert answers == [Answer(waiter, NEGATIVE, group)]
            self.broken[group] = False
        elif self.counts[group] == 0:
            assert answers == [Answer(waiter, "", group)]
        else:
            assert answers == []
            self.waiting[group].append(waiter)

    @rule(owner=Owner, data=st.data())
    def give_up(self, owner: str, data: st.DataObject) -> None:
        requests = [waiter.request for waiters in self.waiting.values() for waiter in waiters if waiter.owner == owner]
        request = data.draw(st.sampled_from([None, 0, *requests]))
        self.groups.forget(owner, request)
        for group, waiters in self.waiting.items():
            self.waiting[group] = [w for w in waiters if w.owner != owner or request not in (None, w.request)]

    @invariant()
    def kept_is_what_matters(self) -> None:
        self.groups.sanity_check()
        open_groups = [g for g in self.counts if self.counts[g] or self.waiting[g] or self.broken[g]]
        assert len(self.groups) == len(open_groups)


TestAgainstGo = AgainstGo.TestCase
TestAgainstGo.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)


def test_everybody_who_waits_is_answered_once():
    groups = Groups()
    groups.add(b"g", 2)
    ann, ben = Waiter("ann", 1), Waiter("ben", 1)
    assert groups.wait(b"g", ann) == groups.wait(b"g", ben) == []
    assert groups.add(b"g", -1) == []
    assert groups.add(b"g", -1) == [Answer(ann, "", b"g"), Answer(ben, "", b"g")]
    assert len(groups) == 0
    assert groups.add(b"g", 1) == []
    assert groups.add(b"g", -1) == []


def test_every_wait_on_a_broken_counter_is_told_so():
    """Present waits are told at once; where nobody waits, the next one is."""
    groups = Groups()
    groups.add(b"g", 1)
    groups.wait(b"g", Waiter("ann", 1))
    assert groups.add(b"g", -2) == [Answer(Waiter("ann", 1), NEGATIVE, b"g")]
    assert groups.wait(b"g", Waiter("ben", 1)) == [Answer(Waiter("ben", 1), "", b"g")], "it starts again at zero"
    groups.add(b"g", -1)
    assert groups.wait(b"g", Waiter("ann", 2)) == [Answer(Waiter("ann", 2), NEGATIVE, b"g")]
