"""How many nodes a group should have: up by what lacks a slot, down by who is idle, and no swinging in between."""

from __future__ import annotations

from random import Random

import pytest

from zmqsched.core.adapting import FIRST_PAUSE_S, IDLE_S, LONGEST_PAUSE_S, UP_AFTER_S, Adapting, Demand, Step


class Site:
    """A group whose nodes take ``takes_s`` to come, and work off the tasks there are, one a second and slot."""

    def __init__(self, least: int, most: int, slots: int = 2, takes_s: float = 3.0) -> None:
        self.adapting = Adapting(least, most)
        self.slots = slots
        self.takes_s = takes_s
        self.now = 0.0
        self.tasks = 0
        self.here: list[str] = []
        self.coming: dict[str, float] = {}
        self.asked = 0
        self.left: list[str] = []

    def step(self) -> Step:
        here, coming = self.slots * len(self.here), self.slots * len(self.coming)
        busy, rest = {}, self.tasks
        for label in self.here:
            busy[label] = min(self.slots, rest)
            rest -= busy[label]
        demand = Demand(self.tasks, max(0, self.tasks - 2 * here), here, coming)
        return self.adapting.decide(self.now, demand, self.slots, busy, list(self.coming))

    def turn(self) -> None:
        step = self.step()
        for _ in range(step.start):
            self.asked += 1
            self.coming[f"g-{self.asked}"] = self.now + self.takes_s
        for label in step.leave:
            self.left.append(label)
            self.coming.pop(label, None)
            self.here = [each for each in self.here if each != label]

    def run(self, seconds: float) -> None:
        until = self.now + seconds
        while self.now < until:
            self.turn()
            self.now += 1.0
            for label in [label for label, at in self.coming.items() if at <= self.now]:
                del self.coming[label]
                self.here.append(label)
                self.adapting.joined()
            self.tasks = max(0, self.tasks - self.slots * len(self.here))

    @property
    def number(self) -> int:
        return len(self.here) + len(self.coming)


def test_the_least_number_is_there_from_the_start():
    site = Site(3, 8)
    site.turn()
    assert (site.number, site.asked) == (3, 3)


def test_the_first_node_is_asked_for_at_once():
    site = Site(0, 8)
    site.tasks = 1
    site.turn()
    assert site.number == 1


def test_without_tasks_nothing_is_started():
    site = Site(0, 8)
    site.run(100)
    assert site.asked == 0


def test_what_has_found_no_slot_for_a_while_gets_more_nodes():
    site = Site(1, 8)
    site.run(5)
    site.tasks = 1000
    site.turn()
    assert site.number == 1
    site.now += UP_AFTER_S
    site.turn()
    assert site.number == 2


def test_what_is_queued_while_slots_are_free_asks_for_what_is_not_there():
    adapting = Adapting(0, 4)
    assert adapting.decide(0.0, Demand(1, 1, 8, 0), 2, {}, []) == Step()
    assert adapting.decide(UP_AFTER_S, Demand(1, 1, 8, 0), 2, {}, []).start == 1
    assert adapting.decide(2 * UP_AFTER_S, Demand(1, 1, 8, 2), 2, {}, ["a"]) == Step()


def test_no_more_nodes_come_than_the_tasks_fill():
    site = Site(0, 100, slots=4, takes_s=1000)
    site.tasks = 9
    site.run(60)
    assert site.asked == 3


def test_their_number_at_most_doubles_at_a_time_and_ends_at_the_most():
    site = Site(0, 20, takes_s=1000)
    site.tasks = 10_000
    seen = []
    for _ in range(40):
        before = site.number
        site.turn()
        seen.append(site.number)
        assert site.number <= max(1, 2 * before)
        site.now += 1.0
    assert seen[-1] == 20


def test_what_other_groups_have_or_await_is_not_started_again():
    adapting = Adapting(0, 8)
    assert adapting.decide(0.0, Demand(6, 0, 2, 4), 2, {}, []) == Step()
    assert adapting.decide(0.0 + UP_AFTER_S, Demand(6, 0, 2, 4), 2, {}, []) == Step()


def test_what_is_on_its_way_and_not_wanted_any_more_is_called_off():
    site = Site(0, 8, slots=4, takes_s=1000)
    site.tasks = 30
    site.run(20)
    assert site.number == 8
    site.tasks = 3
    site.run(IDLE_S + 2)
    assert (site.number, site.left) == (1, [f"g-{number}" for number in range(2, 9)])


def test_the_idle_leave_after_a_while_but_for_the_least():
    site = Site(1, 8)
    site.tasks = 200
    site.run(40)
    assert site.number > 1
    site.run(400)
    assert (site.number, site.tasks) == (1, 0)


def test_who_has_a_task_stays():
    adapting = Adapting(0, 8)
    for now in (0.0, IDLE_S + 1):
        step = adapting.decide(now, Demand(1, 0, 4, 0), 2, {"busy": 1, "idle": 0}, [])
    assert step.leave == ("idle",)


def test_who_was_busy_in_between_has_not_been_idle():
    adapting = Adapting(0, 8)
    for now, tasks in ((0.0, 0), (IDLE_S / 2, 1), (IDLE_S / 2 + 1, 0)):
        assert adapting.decide(now, Demand(tasks, 0, 2, 0), 2, {"a": tasks}, []) == Step()
    assert adapting.decide(IDLE_S + 1, Demand(0, 0, 2, 0), 2, {"a": 0}, []) == Step()
    assert adapting.decide(IDLE_S * 1.5 + 1, Demand(0, 0, 2, 0), 2, {"a": 0}, []).leave == ("a",)


def test_nobody_leaves_while_tasks_lack_a_slot():
    """An idle node that is not given the tasks (they ask for something else) is no reason to swing."""
    adapting = Adapting(0, 1)
    for now in (0.0, IDLE_S, 2 * IDLE_S):
        assert adapting.decide(now, Demand(50, 0, 2, 0), 2, {"a": 0}, []) == Step()


def test_the_longest_idle_goes_first_and_what_has_not_come_before_it():
    adapting = Adapting(2, 8)
    adapting.decide(0.0, Demand(0, 0, 4, 0), 2, {"first": 0, "second": 1}, [])
    adapting.decide(1.0, Demand(0, 0, 4, 2), 2, {"first": 0, "second": 0, "third": 0}, ["coming"])
    step = adapting.decide(IDLE_S + 1, Demand(0, 0, 4, 2), 2, {"first": 0, "second": 0, "third": 0}, ["coming"])
    assert step.leave == ("coming", "first")


def test_above_the_most_somebody_leaves_at_once_the_idle_before_the_busy():
    adapting = Adapting(0, 2)
    step = adapting.decide(0.0, Demand(9, 0, 8, 2), 2, {"a": 2, "b": 0, "c": 1}, ["d"])
    assert step.leave == ("d", "b")


def test_failures_are_followed_by_pauses_that_grow_until_one_succeeds():
    adapting = Adapting(1, 4)
    now, pauses = 0.0, []
    for _ in range(9):
        assert adapting.decide(now, Demand(0, 0, 0, 0), 2, {}, []).start == 1
        adapting.failed(now)
        failed_at = now
        while not adapting.decide(now, Demand(0, 0, 0, 0), 2, {}, []).start:
            now += 1.0
        pauses.append(now - failed_at)
    assert pauses[:3] == [FIRST_PAUSE_S, 2 * FIRST_PAUSE_S, 4 * FIRST_PAUSE_S]
    assert pauses[-1] == LONGEST_PAUSE_S
    adapting.joined()
    adapting.failed(now)
    assert adapting.decide(now + FIRST_PAUSE_S, Demand(0, 0, 0, 0), 2, {}, []).start == 1


@pytest.mark.parametrize("seed", range(30))
def test_whatever_comes_the_number_stays_between_and_the_work_is_done(seed):
    random = Random(seed)
    least = random.randint(0, 3)
    site = Site(least, least + random.randint(1, 8), random.randint(1, 4), random.uniform(0.5, 30))
    for _ in range(100):
        site.tasks += random.choice((0, 0, 0, 1, 20, 300))
        site.run(random.choice((1, 1, 5, 40)))
        assert site.adapting.least <= site.number <= site.adapting.most
    site.run(2000)
    assert (site.tasks, site.number) == (0, least)


def test_a_steady_load_makes_nobody_come_and_go():
    site = Site(0, 8, slots=2)
    for _ in range(300):
        site.tasks = 6
        site.run(1)
    assert (site.asked, site.left) == (3, [])
