"""How a node ends tasks that run: time limits and cancels by force, told with workers that do as they are told."""

from __future__ import annotations

import pytest

from zmqsched.core.events import Said
from zmqsched.core.stops import GRACE_S, LOOK_S
from zmqsched.protocol import Done, Progress

from .builders import Workplace
from .test_agent import used_to_short_tasks

LIMIT_S = 10.0
SOON = 0.001
ALL_STEPS = [("ask", 1), ("interrupt", 1), ("kill", 1)]


def limited(*labels: str, slots: int = 1) -> Workplace:
    place = Workplace(slots)
    place.broker_orders(*labels, timeout=LIMIT_S, name="train")
    return place


def text_of(place: Workplace, label: str) -> str:
    [text] = [one.text for message in place.all(Progress) for one in message.stopped if one.task.endswith(label.encode())]
    return text


def test_a_task_is_looked_at_interrupted_and_killed_in_time():
    place = limited("a")
    place.passes(LIMIT_S - SOON)
    assert place.signals == []
    place.passes(2 * SOON)
    assert place.signals == ALL_STEPS[:1]
    place.passes(LOOK_S)
    assert place.signals == ALL_STEPS[:2]
    place.passes(GRACE_S - 3 * SOON)
    assert place.signals == ALL_STEPS[:2]
    place.passes(3 * SOON)
    assert place.signals == ALL_STEPS
    place.passes(100)
    assert place.signals == ALL_STEPS


def test_a_task_that_ends_in_time_is_left_alone():
    place = limited("a")
    place.passes(LIMIT_S - SOON)
    place.finishes("a", took=LIMIT_S)
    place.passes(100)
    assert (place.signals, place.results, place.stopped) == ([], ["a"], {})


def test_what_waits_is_not_on_the_clock():
    place = limited("a")
    place.passes(LIMIT_S - SOON)
    place.finishes("a", took=LIMIT_S)
    place.broker_orders("b", timeout=LIMIT_S)
    place.passes(LIMIT_S - SOON)
    assert place.running(1) == "b"
    assert place.signals == []
    place.passes(2 * SOON)
    assert place.signals == [("ask", 1)]


def test_an_interrupted_task_is_told_as_stopped_with_its_stack():
    place = limited("a")
    place.passes(LIMIT_S + LOOK_S + SOON)
    place.feels_it(1)
    place.finishes("a", ok=False)
    assert place.stopped == {"a": "TaskTimeout"}
    assert place.results == []
    text = text_of(place, "a")
    assert "train was stopped at its time limit of 10 s, in worker n1/1 (pid 1001) on here" in text
    assert text.endswith("\nline 1 in f")
    assert place.agent.held == 0


def test_a_worker_that_did_not_say_where_it_stood_is_no_obstacle():
    place = limited("a")
    place.stack = ""
    place.passes(LIMIT_S + LOOK_S + SOON)
    place.finishes("a", ok=False)
    assert text_of(place, "a").endswith("on here")


def test_the_interrupted_worker_goes_on_with_other_tasks():
    place = limited("a")
    place.passes(LIMIT_S + LOOK_S + SOON)
    place.feels_it(1)
    assert place.running(1) == "a"
    place.finishes("a", ok=False)
    place.broker_orders("b")
    assert place.running(1) == "b"
    place.passes(GRACE_S + SOON)
    assert place.signals == ALL_STEPS[:2]
    assert place.born == [1]


@pytest.mark.parametrize("when", [LIMIT_S + SOON, LIMIT_S + LOOK_S + SOON])
def test_a_value_counts_even_late(when):
    place = limited("a")
    place.passes(when)
    place.finishes("a")
    assert (place.results, place.stopped) == (["a"], {})


def test_an_error_before_the_interrupt_is_the_tasks_own():
    place = limited("a")
    place.passes(LIMIT_S + SOON)
    place.finishes("a", ok=False)
    place.broker_orders("b", timeout=LIMIT_S)
    assert (place.results, place.stopped) == (["a"], {})
    assert place.running(1) == "b"
    place.passes(LIMIT_S - 2 * SOON)
    assert place.signals == ALL_STEPS[:1], "the next task has its own clock"


def test_a_worker_gets_nothing_before_it_has_felt_the_interrupt():
    place = limited("a")
    place.passes(LIMIT_S + LOOK_S + SOON)
    place.finishes("a", ok=False)
    place.broker_orders("b")
    assert place.running(1) is None, "the signal may still be on its way"
    place.feels_it(1)
    assert place.running(1) == "b"


def test_a_worker_that_never_feels_the_interrupt_is_replaced():
    place = limited("a")
    place.passes(LIMIT_S + LOOK_S + SOON)
    place.finishes("a", ok=False)
    place.passes(GRACE_S)
    assert place.signals == ALL_STEPS
    place.broker_orders("b")
    place.feels_it(1)
    assert place.running(1) is None, "it is about to die"
    place.dies(1)
    assert place.running(2) == "b"
    assert (place.deaths, place.stopped) == ([], {"a": "TaskTimeout"})


def test_a_killed_worker_is_replaced_at_once_and_nobody_is_charged():
    place = limited("a")
    place.passes(LIMIT_S + LOOK_S + GRACE_S + 0.01)
    place.dies(1)
    assert place.stopped == {"a": "TaskTimeout"}
    assert place.deaths == []
    place.broker_orders("b")
    assert place.running(2) == "b", "replaced without the delay for workers that die young"
    assert place.agent.held == 1


def test_a_value_that_came_before_the_kill_counts():
    place = limited("a")
    place.passes(LIMIT_S + LOOK_S + GRACE_S + 0.01)
    place.finishes("a")
    place.dies(1)
    assert (place.results, place.stopped, place.deaths) == (["a"], {}, [])


def test_a_death_before_the_interrupt_is_the_tasks_own():
    place = limited("a")
    place.passes(LIMIT_S + SOON)
    place.dies(1, "killed by SIGSEGV")
    assert [death.how for death in place.deaths] == ["killed by SIGSEGV"]
    assert place.stopped == {}


def test_batch_mates_go_back_to_the_queue_before_any_signal():
    place = used_to_short_tasks(sloth=True)
    place.broker_orders("a", "b", "c")
    place.broker_revokes("a", force=True)
    assert place.signals == [], "while they may be in its hands"
    place.gives_back(1)
    assert place.signals == [("interrupt", 1)]
    assert place.at(1) == ["a"]
    place.passes(GRACE_S + SOON)
    place.dies(1)
    assert (place.stopped, place.deaths) == ({"a": "cancelled"}, [])
    assert sorted(place.returned) == ["b", "c"], "this node had nobody for them"
    assert place.agent.held == 0


def test_a_task_that_was_over_when_its_mates_were_taken_back_is_not_interrupted():
    place = used_to_short_tasks(sloth=True)
    place.broker_orders("a", "b", "c")
    place.broker_revokes("a", force=True)
    done = place.pipes[1].pop(0)  # its answer is on the way; the worker has taken b
    place.gives_back(1)
    place.passes(0.01)
    assert place.signals == []
    place.pipes[1].insert(0, done)
    place.finishes("a")
    place.passes(0.01)
    assert place.signals == []
    assert place.running(1) == "b"
    place.finishes("b")
    place.finishes("c")
    assert place.results == ["warm-up", "a", "b", "c"]


# --- cancels ---------------------------------------------------------------------------------------------------------


def test_a_cancel_by_force_interrupts_at_once():
    place = Workplace()
    place.broker_orders("a", "b")
    place.broker_revokes("a", force=True)
    assert place.signals == [("interrupt", 1)]
    place.feels_it(1)
    place.finishes("a", ok=False)
    assert place.stopped == {"a": "cancelled"}
    assert place.running(1) == "b"


def test_a_cancel_leaves_what_runs_alone():
    place = Workplace()
    place.broker_orders("a")
    place.broker_revokes("a")
    place.passes(100)
    assert place.signals == []
    place.broker_revokes("a", force=True)
    assert place.signals == [("interrupt", 1)]


def test_a_cancelled_task_that_runs_into_its_limit_was_cancelled():
    place = limited("a")
    place.broker_revokes("a")
    place.passes(LIMIT_S + SOON)
    place.finishes("a", ok=False)
    assert place.stopped == {"a": "cancelled"}


@pytest.mark.parametrize("force", [False, True])
def test_what_lies_in_a_pipe_is_taken_out_of_it_when_it_is_cancelled(force):
    place = used_to_short_tasks()
    place.broker_orders("a", "b", "c")
    place.broker_revokes("b", force=force)
    assert place.returned == ["b"]
    place.finishes("a")
    place.finishes("c")
    assert place.results == ["warm-up", "a", "c"]
    assert place.signals == []
    assert place.agent.held == 0


@pytest.mark.parametrize("force", [False, True])
def test_what_waits_at_the_node_is_dropped_when_it_is_cancelled(force):
    place = Workplace()
    place.broker_orders("a", "b")
    place.broker_revokes("b", force=force)
    assert place.returned == ["b"]
    assert place.agent.held == 1


def test_what_its_worker_takes_while_it_is_cancelled_by_force_is_interrupted_in_turn():
    place = used_to_short_tasks(sloth=True)
    place.broker_orders("a", "b")
    place.broker_revokes("b", force=True)
    place.finishes("a")
    assert place.signals == [], "b may just be taken out of the pipe"
    place.gives_back(1)
    assert place.signals == [("interrupt", 1)]
    assert place.running(1) == "b"


def test_a_task_that_is_wanted_again_has_its_limit_again():
    place = limited("a")
    place.broker_revokes("a")
    place.broker_forgets()
    place.broker_welcomes()
    place.broker_orders("a", timeout=LIMIT_S)
    place.passes(LIMIT_S + LOOK_S + SOON)
    place.finishes("a", ok=False)
    assert place.stopped == {"a": "TaskTimeout"}


def test_what_an_old_session_has_stopped_is_not_told_to_the_new_one():
    place = limited("a")
    place.cut = True
    place.passes(LIMIT_S + LOOK_S + SOON)
    run = place.pipes[1].pop(0)
    place.step(Said(1, [Done(run.task, run.attempt, False, b"error", 0.0)]))
    place.broker_forgets()
    place.cut = False
    place.broker_welcomes()
    assert place.stopped == {}
    assert place.agent.held == 0


def test_an_interrupt_of_the_tasks_own_is_nobodys_business():
    place = limited("a")
    place.feels_it(1)
    place.passes(LIMIT_S + SOON)
    place.feels_it(1)
    place.passes(LOOK_S + SOON)
    assert place.signals == ALL_STEPS[:2]


def test_a_worker_that_is_being_ended_is_busy():
    place = limited("a")
    place.passes(LIMIT_S + LOOK_S + SOON)
    place.finishes("a", ok=False)
    place.passes(GRACE_S / 2)
    assert place.agent._crew.states()[0].state == "busy"
