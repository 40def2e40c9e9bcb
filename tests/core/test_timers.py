"""Timers against a dict that is searched."""

from __future__ import annotations

import math

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from zmqsched.core.timers import Timers

Key = st.integers(0, 5)
At = st.integers(0, 20).map(float)


class AgainstADict(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.timers: Timers[int] = Timers()
        self.model: dict[int, float] = {}

    @rule(key=Key, at=At)
    def set(self, key: int, at: float) -> None:
        self.timers.set(key, at)
        self.model[key] = at

    @rule(key=Key)
    def unset(self, key: int) -> None:
        self.timers.set(key, None)
        self.model.pop(key, None)

    @rule(now=At)
    def due(self, now: float) -> None:
        given = list(self.timers.due(now))
        assert sorted(given) == sorted(key for key, at in self.model.items() if at <= now)
        assert [self.model[key] for key in given] == sorted(self.model[key] for key in given)
        for key in given:
            del self.model[key]

    @rule(gap=At)
    def shift(self, gap: float) -> None:
        self.timers.shift(gap)
        self.model = {key: at + gap for key, at in self.model.items()}

    @invariant()
    def the_next_is_the_least(self) -> None:
        assert self.timers.soonest == min(self.model.values(), default=math.inf)


TestAgainstADict = AgainstADict.TestCase
TestAgainstADict.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)


def test_a_deadline_moved_ten_thousand_times_takes_no_room():
    timers: Timers[str] = Timers()
    for n in range(10_000):
        timers.set("a", float(n))
    assert len(timers._heap) < 200
    assert list(timers.due(1e9)) == ["a"]


def test_keys_are_never_compared():
    timers: Timers[object] = Timers()
    one, two = object(), object()
    timers.set(one, 1.0)
    timers.set(two, 1.0)
    assert list(timers.due(1.0)) == [one, two]


def test_a_key_may_be_set_again_while_the_due_are_given_out():
    timers: Timers[str] = Timers()
    timers.set("a", 1.0)
    given = []
    for key in timers.due(5.0):
        given.append(key)
        timers.set(key, 6.0)
    assert given == ["a"]
    assert timers.soonest == 6.0
