"""What a node's agent does, told with workers that do as they are told."""

from __future__ import annotations

import pytest

from zmqsched.core.agent import HEARD_S, LEASE_S, REPORT_AFTER_S
from zmqsched.core.crew import RESTART_BACKOFF_S
from zmqsched.core.events import Born, Exited, Said
from zmqsched.core.giving import BATCH_S, HAND_BACK_S, MAX_BATCH, STUCK_AFTER_S
from zmqsched.protocol import (
    Done,
    Draining,
    Envelope,
    Function,
    Functions,
    GoesOn,
    Goodbye,
    GroupAdd,
    NeedFunctions,
    No,
    Ping,
    Progress,
    Query,
    Remains,
    Results,
    Stop,
    Waits,
    Workers,
)  # fmt: skip

from .builders import Workplace, blob, digest, task_id, token

LONG_S = 1.0  # no task of this length is worth a batch


def used_to_short_tasks(slots: int = 1, **how: object) -> Workplace:
    """A node whose estimate says that tasks take next to nothing."""
    place = Workplace(slots, **how)  # type: ignore[arg-type]
    place.broker_orders("warm-up")
    place.finishes("warm-up", took=0.0)
    return place


# --- starting tasks --------------------------------------------------------------------------------------------------


def test_a_worker_is_started_for_each_slot():
    assert Workplace(3).born == [1, 2, 3]


def test_a_task_starts_at_once_and_its_result_is_told():
    place = Workplace()
    before = place.now
    place.broker_orders("a")
    assert place.running(1) == "a"
    place.finishes("a")
    assert place.now == before
    assert place.results == ["a"]
    assert place.agent.held == 0


def test_nothing_is_given_to_a_worker_that_is_not_born():
    place = Workplace(workers=False)
    place.broker_orders("a")
    assert place.given == []
    place.step(Born(1, 4711))
    place.turn()
    assert place.running(1) == "a"


def test_the_higher_priority_starts_first_and_equals_in_order():
    place = Workplace(2)
    place.broker_orders("wide", resources={"cpu": 2.0})
    place.broker_orders("a")
    place.broker_orders("high", priority=5)
    place.broker_orders("b")
    place.finishes("wide", took=LONG_S)
    place.finishes("high", took=LONG_S)
    assert [label for _, label in place.given] == ["wide", "high", "a", "b"]


def test_a_wide_task_is_not_starved_by_narrow_ones():
    place = Workplace(2)
    place.broker_orders("a", "b")
    place.broker_orders("wide", resources={"cpu": 2.0})
    place.broker_orders("c", "d")
    place.finishes("a", took=LONG_S)
    assert place.all_running == ["b"]
    place.finishes("b", took=LONG_S)
    assert place.all_running == ["wide"]
    place.finishes("wide", took=LONG_S)
    assert place.all_running == ["c", "d"]


def test_a_function_travels_once_to_each_worker():
    place = Workplace(2)
    place.broker_orders("a", "b")
    place.finishes("a", took=LONG_S)
    place.broker_orders("c")
    assert [place.runs[label].function for label in "abc"] == [blob("f"), blob("f"), b""]


def test_a_missing_function_is_asked_for_once_and_the_tasks_start_when_it_comes():
    place = Workplace(2)
    place.broker_orders("a", with_code=False)
    place.broker_orders("b", with_code=False)
    assert place.all(NeedFunctions) == [NeedFunctions([digest("f")])]
    assert place.all_running == []
    place.broker_says(Functions([Function(digest("f"), blob("f"))]))
    assert place.all_running == ["a", "b"]


# --- batches ---------------------------------------------------------------------------------------------------------


def test_there_are_no_batches_before_there_is_an_estimate():
    place = Workplace(2)
    place.broker_orders(*"abcdef")
    assert [len(runs) for runs in place.pipes.values()] == [1, 1]


def test_short_tasks_are_given_several_at_once_and_fairly():
    place = used_to_short_tasks(2)
    place.broker_orders(*[f"t{n}" for n in range(20)])
    assert [len(runs) for runs in place.pipes.values()] == [10, 10]
    place.broker_orders(*[f"u{n}" for n in range(200)])
    assert [len(runs) for runs in place.pipes.values()] == [MAX_BATCH, MAX_BATCH]


def test_longer_tasks_make_smaller_batches_and_long_ones_none():
    place = Workplace()
    place.broker_orders("a")
    place.finishes("a", took=BATCH_S / 4)
    place.broker_orders(*"bcdefghi")
    assert 2 <= len(place.at(1)) <= 5
    place = Workplace()
    place.broker_orders("a")
    place.finishes("a", took=LONG_S)
    place.broker_orders(*"bcd")
    assert len(place.at(1)) == 1


def test_tasks_that_ask_for_more_than_a_cpu_are_given_alone():
    place = used_to_short_tasks(2, resources={"gpu": 2.0})
    place.broker_orders("a", "b", "c", "d", resources={"gpu": 0.5})
    assert [len(runs) for runs in place.pipes.values()] == [1, 1]


def test_a_stuck_batch_is_taken_apart_and_given_to_others():
    place = used_to_short_tasks(2)
    place.broker_orders(*"abcdef")
    slow, quick = place.at(1), place.at(2)
    for label in quick:
        place.finishes(label)
    assert place.at(1) == slow
    place.passes(STUCK_AFTER_S + 0.001)
    assert place.at(1) == slow[:1]
    assert place.at(2) == slow[1:]
    for label in slow[1:]:
        place.finishes(label)
    place.finishes(slow[0], took=STUCK_AFTER_S)
    assert sorted(place.results) == ["a", "b", "c", "d", "e", "f", "warm-up"]


def test_what_is_taken_back_waits_in_its_old_order_before_what_came_later():
    place = used_to_short_tasks(sloth=True)
    place.broker_orders(*"abcd")
    place.passes(STUCK_AFTER_S + 0.001)
    place.broker_orders("late")
    place.gives_back(1)
    place.finishes("a", took=LONG_S)
    order = []
    while (label := place.running(1)) is not None:
        order.append(label)
        place.finishes(label, took=LONG_S)
    assert order == ["b", "c", "d", "late"]


def test_what_is_taken_back_from_several_workers_waits_in_its_old_order():
    place = used_to_short_tasks(2, sloth=True)
    place.broker_orders(*"abcdefgh")
    first, second = place.at(1), place.at(2)
    assert [len(first), len(second)] == [4, 4]
    place.passes(STUCK_AFTER_S + 0.001)
    place.gives_back(1)
    place.gives_back(2)
    order = []
    while (label := place.running(1)) is not None:  # the other is busy for long
        order.append(label)
        place.finishes(label, took=LONG_S)
    assert order == [first[0], *sorted([*first[1:], *second[1:]])]


def test_while_runs_are_taken_back_their_worker_gets_no_more():
    place = used_to_short_tasks(sloth=True)
    place.broker_orders("a", "b")
    place.passes(STUCK_AFTER_S + 0.001)
    place.broker_orders("c")
    assert place.at(1) == ["a", "b"]
    place.finishes("a", took=0.01)  # b is taken by the worker before it could be taken back
    place.gives_back(1)
    assert "b" in place.at(1)
    place.finishes("b")
    assert place.running(1) == "c"


def test_a_function_whose_first_run_was_taken_back_travels_again():
    place = used_to_short_tasks(2)
    place.broker_orders("slow1", "slow2")
    place.broker_orders("x", function="g")
    assert place.runs["x"].function == blob("g")
    first = place.worker_of("x")
    place.passes(STUCK_AFTER_S + 0.001)
    place.finishes(place.running(first) or "", took=0.0)
    assert place.worker_of("x") == first
    assert place.runs["x"].function == blob("g"), "the pipe that held it was emptied: this worker never saw it"


# --- resources -------------------------------------------------------------------------------------------------------


def gpus_of(place: Workplace, label: str) -> str:
    return dict(place.runs[label].env).get("CUDA_VISIBLE_DEVICES", "none")


def test_each_task_sees_its_own_gpu():
    place = Workplace(4, resources={"gpu": 2.0}, gpus=["0", "7"])
    place.broker_orders("a", "b", resources={"gpu": 1.0})
    place.broker_orders("plain")
    assert {gpus_of(place, "a"), gpus_of(place, "b")} == {"0", "7"}
    assert gpus_of(place, "plain") == "none"
    place.finishes("b", took=LONG_S)
    place.broker_orders("c", resources={"gpu": 1.0})
    assert gpus_of(place, "c") == gpus_of(place, "b")


def test_a_task_may_have_several_gpus_or_a_share_of_one():
    place = Workplace(4, resources={"gpu": 2.0}, gpus=["0", "1"])
    place.broker_orders("both", resources={"gpu": 2.0})
    assert sorted(gpus_of(place, "both").split(",")) == ["0", "1"]
    place.finishes("both", took=LONG_S)
    place.broker_orders(*"abcd", resources={"gpu": 0.5})
    assert sorted(gpus_of(place, label) for label in "abcd") == ["0", "0", "1", "1"]


def test_a_dead_workers_resources_are_free_again():
    place = Workplace(2, resources={"gpu": 1.0}, gpus=["0"])
    place.broker_orders("a", resources={"gpu": 1.0})
    place.dies(place.worker_of("a"))
    place.broker_orders("b", resources={"gpu": 1.0})
    assert gpus_of(place, "b") == "0"


# --- credit ----------------------------------------------------------------------------------------------------------


def test_nothing_is_prefetched_before_there_is_an_estimate():
    place = Workplace(2)
    place.broker_orders("a", "b")
    place.passes(0.02)
    assert all(credit == 2 for credit in place.credits)


def test_credit_grows_with_short_tasks():
    place = used_to_short_tasks(2)
    assert place.credits[-1] > 2


def test_when_tasks_turn_out_long_credit_shrinks_and_what_waits_is_handed_back_last_first():
    place = used_to_short_tasks(2)
    labels = [f"t{n:03}" for n in range(100)]
    place.broker_orders(*labels)
    place.passes(2.0)
    assert place.credits[-1] == 2
    assert len(place.all_running) == 2
    assert place.agent.held == 2
    assert sorted([*place.returned, *place.all_running]) == labels
    assert place.returned[0] > place.all_running[0]
    assert place.deaths == []


def test_what_would_start_last_is_handed_back_first():
    place = used_to_short_tasks(4)
    place.broker_orders(*"wxyz")
    place.passes(STUCK_AFTER_S + 0.001)
    place.broker_orders("low", priority=-1)
    place.broker_orders("one", "two", "three")
    place.broker_orders("high", priority=1)
    while not place.returned:
        place.passes(0.001)
    assert 1 <= len(place.returned) < 5
    assert place.returned == ["high", "one", "two", "three", "low"][-len(place.returned) :]


def test_what_has_just_come_is_not_handed_back_at_once():
    """What was answered elsewhere and still runs here takes no slot in the broker's books, and there may be no other node:
    the two would send each other the next one as fast as they can."""
    place = Workplace()
    place.broker_orders("warm")
    place.finishes("warm")
    place.broker_orders("long")
    place.passes(1.0)
    place.broker_revokes("long")
    for times in range(3):
        place.broker_orders("next")
        place.passes(HAND_BACK_S / 2)
        assert place.returned == ["next"] * times
        place.passes(HAND_BACK_S)
        assert place.returned == ["next"] * (times + 1)


# --- the lease -------------------------------------------------------------------------------------------------------


def with_a_task_waiting() -> Workplace:
    """``a`` runs, ``wide`` waits for it and for nothing else."""
    place = Workplace(2)
    place.broker_orders("a")
    place.broker_orders("wide", resources={"cpu": 2.0})
    return place


def test_without_a_lease_nothing_starts_and_with_an_answer_it_goes_on():
    place = with_a_task_waiting()
    place.passes(2.0)
    place.cut = True
    place.passes(LEASE_S + 1.0)
    place.finishes("a", took=LONG_S)
    assert place.all_running == []
    place.cut = False
    place.passes(1.1)
    assert place.all_running == ["wide"]
    place.finishes("wide")
    place.passes(1.1)
    assert place.results == ["a", "wide"]


def test_a_short_silence_holds_nothing_up():
    place = with_a_task_waiting()
    place.cut = True
    place.passes(LEASE_S - 1.5)
    place.finishes("a", took=LONG_S)
    assert place.all_running == ["wide"]


def test_a_node_that_was_frozen_starts_nothing_before_it_has_asked():
    place = with_a_task_waiting()
    place.now += 60
    place.cut = True
    place.finishes("a", took=LONG_S)
    assert place.all_running == []
    place.cut = False
    place.passes(1.1)
    assert place.all_running == ["wide"]


def test_a_run_may_be_begun_as_long_as_the_lease_lasts():
    place = Workplace()
    place.broker_orders("a")
    assert place.now < place.runs["a"].until <= place.now + LEASE_S


def test_a_run_that_its_worker_took_too_late_waits_for_the_lease_again():
    place = used_to_short_tasks()
    place.broker_orders("a", "b")
    place.now += 60
    place.cut = True
    place.finishes("a")
    place.declines("b")
    assert place.all_running == []
    place.cut = False
    place.passes(1.1)
    assert place.all_running == ["b"]


def test_a_worker_that_declines_a_run_is_given_its_function_with_it():
    place = Workplace()
    place.broker_orders("a")
    place.declines("a")
    assert place.all_running == ["a"]
    assert place.runs["a"].function == blob("f")


def test_a_message_that_lay_in_a_buffer_is_no_lease():
    place = with_a_task_waiting()
    place.now += 60
    place._arrive(Envelope(place.session, 0, 0, Ping(0, 1)))
    place.cut = True
    place.finishes("a", took=LONG_S)
    assert place.all_running == []


# --- given up by the broker ------------------------------------------------------------------------------------------


def test_when_the_session_is_over_what_has_not_started_is_dropped_and_a_hello_follows():
    place = with_a_task_waiting()
    place.broker_forgets()
    assert place.agent.held == 1
    assert [hello.life for hello in place.hellos] == [1, 2]
    assert place.hellos[0].incarnation == place.hellos[1].incarnation
    place.broker_welcomes()
    place.finishes("a", took=LONG_S)
    assert place.all_running == []
    assert place.results == ["a"]


def test_what_finished_without_a_session_is_offered_to_the_next():
    place = with_a_task_waiting()
    place.broker_forgets()
    place.finishes("a", took=LONG_S)
    place.broker_welcomes()
    place.passes(0.1)
    assert place.results == ["a"]


def test_results_on_the_way_when_the_session_ended_are_offered_to_the_next():
    place = Workplace()
    place.broker_orders("a")
    place.cut = True
    place.finishes("a")
    place.cut = False
    place.broker_forgets()
    place.broker_welcomes()
    assert place.results == ["a"]


def test_a_slot_with_an_old_task_is_not_offered():
    place = with_a_task_waiting()
    place.broker_forgets()
    place.broker_welcomes()
    place.passes(0.1)
    assert place.credits[-1] == 1
    place.finishes("a", took=LONG_S)
    place.passes(0.1)
    assert place.credits[-1] == 2


def test_a_task_that_still_runs_and_is_ordered_again_runs_once_and_answers_for_the_new_attempt():
    place = Workplace(2)
    place.broker_orders("a")
    place.passes(0.1)
    place.broker_forgets()
    place.broker_welcomes()
    place.broker_orders("a")
    place.passes(0.1)
    assert place.started == ["a", "a"]
    place.finishes("a", took=LONG_S)
    (outcome,) = place.all(Results)[-1].outcomes
    assert (outcome.task, outcome.attempt) == (task_id("a"), 2)
    assert place.given == [(1, "a")]


def test_a_batch_whose_session_is_over_is_taken_back_and_forgotten():
    place = used_to_short_tasks()
    place.broker_orders(*"abc")
    place.broker_forgets()
    assert place.at(1) == ["a"]
    assert place.agent.held == 1


def test_a_batch_that_is_ordered_again_before_it_was_taken_back_is_kept():
    place = used_to_short_tasks(sloth=True)
    place.broker_orders("a", "b")
    place.broker_forgets()
    place.broker_welcomes()
    place.broker_orders("b")
    place.gives_back(1)
    place.finishes("a")
    assert place.running(1) == "b"
    assert place.runs["b"].attempt == 2


def test_hello_is_said_each_second_until_there_is_an_answer():
    place = Workplace(joins=False)
    place.passes(5.0)
    assert 5 <= len(place.hellos) <= 7
    assert {hello.life for hello in place.hellos} == {1}


# --- deaths ----------------------------------------------------------------------------------------------------------


def test_a_death_names_exactly_the_task_that_ran_and_the_others_run_elsewhere():
    place = used_to_short_tasks(2)
    place.broker_orders(*"abcdef")
    running, *untaken = place.at(1)
    place.dies(1, "killed by SIGSEGV")
    (death,) = place.deaths
    assert (death.worker, death.pid, death.how, death.task) == (1, 1001, "killed by SIGSEGV", task_id(running))
    assert death.attempt == 1
    assert place.returned == []
    while place.all_running:
        place.finishes(place.all_running[0])
    assert sorted(place.results) == sorted({*"abcdef", "warm-up"} - {running})
    assert set(untaken) <= set(place.results)


def test_a_death_is_told_with_how_long_the_task_ran_and_what_the_worker_left():
    place = Workplace()
    place.broker_orders("a")
    place.passes(1.25)
    place.dies(1, remains=Remains("the stack", "the words", 1, 2, oom=True))
    (death,) = place.deaths
    assert death.ran_s == pytest.approx(1.25)
    assert death.remains == Remains("the stack", "the words", 1, 2, oom=True)


def test_many_deaths_at_once_fit_into_messages():
    place = Workplace(200)
    place.broker_orders(*map(str, range(200)))
    much = "\U0001f600" * 8192
    for worker in list(place.pipes):
        del place.pipes[worker]
        place.step(Exited(worker, 1000 + worker, "killed by SIGKILL", [], Remains(much, much)))
    place.turn()  # each message is encoded and decoded, and over the limit that fails
    assert len([death for death in place.deaths if death.remains.stack == much]) == 200


def test_an_idle_workers_death_blames_nobody():
    place = Workplace()
    place.broker_orders("a")
    place.finishes("a")
    place.dies(1)
    (death,) = place.deaths
    assert (death.task, death.attempt) == (b"", 0)


def test_a_dead_worker_is_replaced_at_once():
    place = Workplace()
    place.broker_orders("a")
    before = place.now
    place.dies(1)
    assert (place.born, place.now) == ([1, 2], before)
    place.broker_orders("a")
    assert place.running(2) == "a"


def test_workers_that_die_before_their_first_task_are_replaced_ever_later():
    place = Workplace()
    waits = []
    for number in range(1, 9):
        place.dies(number)
        since = place.now
        while len(place.born) == number:
            place.passes(0.05)
        waits.append(place.now - since)
    assert waits[:3] == pytest.approx([RESTART_BACKOFF_S, 2 * RESTART_BACKOFF_S, 4 * RESTART_BACKOFF_S], abs=0.06)
    assert waits[-1] == pytest.approx(64 * RESTART_BACKOFF_S, abs=0.06)
    place.broker_orders("a")
    place.finishes("a")
    place.dies(9)
    assert len(place.born) == 10


def test_the_broker_knows_the_workers():
    place = Workplace(2)
    place.broker_orders("a")
    place.dies(1)
    states = place.all(Workers)[-1].workers
    assert [state.worker for state in states] == [2, 3]


# --- reports and orders ----------------------------------------------------------------------------------------------


def test_a_task_that_takes_a_while_is_reported_as_running_once():
    place = Workplace()
    place.broker_orders("a")
    place.passes(REPORT_AFTER_S - 0.01)
    assert place.started == []
    place.passes(0.02)
    assert place.started == ["a"]
    place.passes(5.0)
    assert place.started == ["a"]


def test_what_waits_can_be_revoked_what_runs_cannot():
    place = with_a_task_waiting()
    place.broker_revokes("wide")
    place.broker_revokes("a")
    assert place.returned == ["wide"]
    assert place.all_running == ["a"]
    place.finishes("a")
    assert place.results == ["a"]


def test_a_revocation_of_an_older_attempt_is_ignored():
    place = with_a_task_waiting()
    place._attempts["wide"] += 1
    place.broker_revokes("wide")
    assert place.returned == []


def test_what_waits_for_its_function_can_be_revoked():
    place = Workplace(2)
    place.broker_orders("a", "b", with_code=False)
    place.broker_revokes("a")
    place.broker_says(Functions([Function(digest("f"), blob("f"))]))
    assert (place.returned, place.all_running) == (["a"], ["b"])


def test_tasks_count_on_groups_through_their_node_which_says_which_task():
    place = Workplace()
    place.broker_orders("a")
    place.says(1, GroupAdd([(token("g"), -1)]))
    assert place.all(GroupAdd) == [GroupAdd([(token("g"), -1)], 1, task_id("a"))]


def test_the_end_of_an_attempt_that_has_counted_and_has_no_result_is_numbered_too():
    """Its report may end with the session; this is offered to the next, behind what the attempt has counted."""
    place = Workplace()
    place.broker_orders("a")
    place.cut = True
    place.says(1, GroupAdd([(token("g"), -1)]))
    place.dies(1)
    place.cut = False
    assert place.deaths == []
    place.broker_forgets()
    place.broker_welcomes()
    assert place.deaths == [], "the next broker numbers attempts anew"
    assert place.all(GroupAdd) == [GroupAdd([(token("g"), -1)], 1, task_id("a")), GroupAdd([], 2, task_id("a"))]


def test_it_names_the_attempt_if_that_is_of_this_session():
    place = Workplace()
    place.broker_orders("a")
    place.says(1, GroupAdd([(token("g"), -1)]))
    place.dies(1)
    assert place.all(GroupAdd)[-1] == GroupAdd([], 2, task_id("a"), attempt=1)


def test_an_answer_to_what_was_never_given_is_ignored():
    place = Workplace()
    place.says(1, Done(task_id("nothing"), 1, True, b"", 0.0))
    assert place.results == []
    assert place.agent.counts == {"dropped: answer to what is not running": 1}


def test_answers_that_lay_in_a_pipe_together_are_as_if_they_had_come_one_by_one():
    place = Workplace()
    place.broker_orders("warm")
    place.finishes("warm", took=0.0001)
    place.broker_orders("a", "b", "c", "d")
    a, b, c, d = place.pipes[1]
    place.pipes[1] = [d]
    stray = Done(task_id("nothing"), 1, True, b"", 0.0)
    answers = [Done(run.task, run.attempt, True, b"value", 0.0001) for run in (a, b, c)]
    adds = GroupAdd([(token("g"), -1)])
    place.step(Said(1, [answers[0], stray, adds, answers[1], Waits(c.task), GoesOn(c.task), answers[2]]))
    place.turn()
    assert place.results == ["warm", "a", "b", "c"]
    assert place.all(GroupAdd) == [GroupAdd([(token("g"), -1)], 1, task_id("b"))]
    assert place.agent.counts == {"dropped: answer to what is not running": 1}
    assert place.agent.unanswered(1) == 1, "the one that it runs"
    place.finishes("d")
    assert place.results == ["warm", "a", "b", "c", "d"]


def test_beats_go_out_at_the_brokers_pace_and_are_numbered():
    place = Workplace(joins=False)
    place.broker_welcomes(beat_interval_s=0.5)
    place.passes(5.0)
    numbers = [beat.number for beat in place.beats]
    assert numbers == list(range(1, len(numbers) + 1))
    assert 9 <= len(numbers) <= 11


def test_what_a_broker_would_not_say_is_ignored():
    place = Workplace()
    place.broker_says(Query(1), Progress(1))
    assert place.agent.counts == {"dropped: Query from the broker": 1, "dropped: Progress from the broker": 1}
    place.passes(1.0)
    assert "dropped 1 Query from the broker, 1 Progress from the broker; the last from the broker" in place.log[-1]
    assert place.quit is None


# --- leaving ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("told_by", ["a signal", "the broker"])
def test_a_drained_node_takes_nothing_new_finishes_all_it_has_and_says_goodbye(told_by):
    place = with_a_task_waiting()
    if told_by == "a signal":
        place.leaves(drain=True)
        place.leaves(drain=True)
    else:
        place.broker_says(Stop(drain=True))
    assert place.all(Draining) == [Draining()]
    assert place.credits[-1] == 0
    place.finishes("a", took=LONG_S)
    assert place.quit is None
    place.finishes("wide", took=LONG_S)
    assert place.quit is None, "it must not go before the broker has its last results"
    place.passes(0.2)
    assert place.quit is not None
    assert place.results == ["a", "wide"]
    assert [type(message) for message in place.told[-2:]] == [Results, Goodbye]


def test_a_drained_node_with_nothing_to_do_leaves_as_soon_as_it_has_said_so():
    place = Workplace()
    place.leaves(drain=True)
    place.passes(0.2)
    assert place.quit is not None
    assert isinstance(place.told[-1], Goodbye)


def test_a_node_that_is_told_to_stop_does_not_wait():
    place = with_a_task_waiting()
    place.leaves(drain=False)
    assert place.quit is not None
    assert place.results == []
    assert isinstance(place.told[-1], Goodbye)


@pytest.mark.parametrize(("leaves", "how", "blamed"), [
    ("before", "killed by SIGTERM", False), ("after", "killed by SIGTERM", False), ("never", "killed by SIGTERM", True),
    ("before", "killed by SIGSEGV", True), ("after", "killed by SIGSEGV", True),
])  # fmt: skip
def test_who_is_ended_with_its_node_is_not_blamed(leaves, how, blamed):
    """Whoever of them is told first."""
    place = Workplace()
    place.broker_orders("a")
    if leaves == "before":
        place.leaves(drain=True)
    place.dies(1, how)
    if leaves == "after":
        place.passes(HEARD_S / 2)
        place.leaves(drain=True)
    place.passes(2 * HEARD_S)
    (death,) = place.deaths
    assert (death.task, death.blamed) == (task_id("a"), blamed)


def test_who_is_ended_before_a_session_is_over_is_not_reported_in_the_next():
    place = Workplace()
    place.broker_orders("a")
    place.dies(1, "killed by SIGTERM")
    place.broker_forgets()
    place.broker_welcomes()
    place.passes(2 * HEARD_S)
    assert place.deaths == []


def test_a_draining_node_that_was_given_up_says_so_again():
    place = with_a_task_waiting()
    place.leaves(drain=True)
    place.broker_forgets()
    place.broker_welcomes()
    assert len(place.all(Draining)) == 2
    place.finishes("a", took=LONG_S)
    place.passes(0.2)
    assert place.quit is not None
    assert place.results == ["a"]


def test_a_drained_node_that_was_given_one_more_task_meanwhile_waits_for_its_result_too():
    place = Workplace()
    place.cut = True
    place.leaves(drain=True)
    place.cut = False
    place.broker_orders("a")  # the broker has not heard yet that the node drains
    place.passes(3.0)
    place.cut = True
    place.finishes("a", took=LONG_S)
    assert place.quit is None
    place.cut = False
    place.passes(2.5)
    assert place.results == ["a"]
    assert place.quit is not None


def test_a_refused_node_ends_and_says_why():
    place = Workplace(joins=False)
    place._arrive(Envelope(0, 0, 0, No("python", "this node runs Python 3.10")))
    assert place.quit == "refused by the broker: this node runs Python 3.10"


def test_a_silent_broker_is_said_once_and_again_after_it_was_heard():
    place = Workplace()
    place.cut = True
    place.passes(20.0)
    assert len([text for text in place.log if "silent" in text]) == 1
    place.cut = False
    place.passes(2.0)
    place.cut = True
    place.passes(20.0)
    assert len([text for text in place.log if "silent" in text]) == 2


def test_a_node_that_may_be_forgotten_ends_when_the_broker_has_been_silent_for_long():
    place = Workplace(alone_s=60.0)
    place.cut = True
    place.passes(50.0)
    place.cut = False
    place.passes(2.0)
    place.cut = True
    place.passes(55.0)
    assert place.quit is None
    place.passes(8.0)
    assert place.quit.startswith("the broker has been silent for 6")


def test_while_the_node_itself_stood_still_nobody_was_silent():
    place = Workplace(alone_s=60.0)
    place.now += 10_000.0
    place.passes(2.0)
    assert place.quit is None


def test_a_node_is_ready_when_the_broker_knows_its_workers():
    place = Workplace(joins=False)
    assert not place.agent.ready
    place.broker_welcomes()
    assert place.agent.ready
    place.cut = True
    place.dies(1)
    place.passes(0.5)
    assert not place.agent.ready, "it has said who replaced the worker, and does not know that it was heard"
    place.cut = False
    place.passes(2.5)
    assert place.agent.ready


def test_a_new_connection_is_used_at_once():
    place = Workplace()
    place.broker_orders("a")
    place.cut = True
    place.finishes("a")
    assert place.results == []
    place.reconnects()
    assert place.results == ["a"]
