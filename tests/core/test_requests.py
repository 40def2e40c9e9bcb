"""The client's brain: nothing it was asked for is forgotten, nothing is answered twice."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zmqsched.core.events import Began, Broken, Finished, Leave, NowRunning, Replied, Warned
from zmqsched.core.requests import WARN_AFTER_S
from zmqsched.protocol import (
    Cancel,
    Final,
    Finals,
    Follow,
    Function,
    Functions,
    Goodbye,
    GroupAdd,
    GroupDone,
    GroupWait,
    Hold,
    Inputs,
    JobTasks,
    NeedFunctions,
    NeedInputs,
    Notice,
    Query,
    Report,
    Running,
    StillOpen,
    Submit,
    Unknown,
)  # fmt: skip

from .builders import Desk, blob, digest, task_id, token


def codes(desk: Desk) -> list[list[bytes]]:
    return [[function.digest for function in message.functions] for message in desk.all(Submit)]


def test_a_task_is_submitted_at_once_and_its_answer_handed_out():
    desk = Desk()
    desk.asks("a")
    assert desk.submitted == ["a"]
    desk.broker_answers("a", value=b"42")
    assert desk.acted(Finished) == [Finished([Final(task_id("a"), "ok", b"42")])]
    assert desk.brain.open == 0


def test_what_is_asked_before_there_is_a_session_waits_for_it():
    desk = Desk(joins=False)
    desk.asks("a")
    desk.asks("b")
    desk.passes(3.0)
    assert 3 <= len(desk.hellos) <= 5
    desk.broker_welcomes()
    assert desk.submitted == ["a", "b"]
    assert len(desk.acted(Began)) == 1


def test_many_tasks_travel_as_one_message():
    desk = Desk()
    desk.asks(*[f"t{n}" for n in range(500)])
    assert len(desk.all(Submit)) == 1


def test_all_that_is_open_is_submitted_to_a_new_session_in_order():
    desk = Desk()
    desk.asks(*"abc")
    desk.broker_answers("b")
    desk.broker_forgets()
    desk.told.clear()
    desk.asks("d")
    desk.broker_welcomes()
    assert desk.submitted == ["a", "c", "d"]
    assert [hello.life for hello in desk.hellos][-1] == 2


def test_an_answer_is_handed_out_once():
    desk = Desk()
    desk.asks("a", "b")
    desk.broker_answers("a")
    desk.broker_answers("a", "b", "unknown")
    assert desk.answered == ["a", "b"]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from(["ask", "answer", "answer again", "forget", "wait"]), max_size=25), st.randoms())
def test_whatever_the_broker_forgets_each_task_is_answered_once(steps, random):
    desk = Desk()
    asked: list[str] = []
    for step in [*steps, "forget"]:
        if step == "ask":
            asked.append(f"t{len(asked)}")
            desk.asks(asked[-1])
        elif step.startswith("answer") and asked and desk.link is not None:
            desk.broker_answers(random.choice(asked))
        elif step == "forget":
            desk.broker_forgets()
            desk.broker_welcomes()
        else:
            desk.passes(1.0)
    still = [label for label in asked if label not in desk.answered]
    assert desk.brain.open == len(still)
    assert set(still) <= set(desk.submitted)
    desk.broker_answers(*asked)
    assert sorted(desk.answered) == sorted(asked)


def test_a_function_travels_once_a_session():
    desk = Desk()
    desk.asks("a")
    desk.asks("b")
    desk.asks("c", function="g")
    assert codes(desk) == [[digest("f")], [], [digest("g")]]
    desk.broker_forgets()
    desk.told.clear()
    desk.broker_welcomes()
    assert sorted(code for message in codes(desk) for code in message) == [digest("f"), digest("g")]


def test_a_function_that_the_broker_lacks_is_sent_again():
    desk = Desk()
    desk.asks("a")
    desk.broker_says(NeedFunctions([digest("f"), digest("unknown")]))
    assert desk.all(Functions) == [Functions([Function(digest("f"), blob("f"))]), Functions([], [digest("unknown")])]


def test_withdrawing_what_is_open():
    desk = Desk()
    desk.asks("a", "b")
    desk.broker_answers("b")
    desk.withdraws("a", "b", "unknown")
    assert desk.all(Cancel) == [Cancel([task_id("a")])]


def test_withdrawing_before_there_is_a_session():
    desk = Desk(joins=False)
    desk.asks("a", "b")
    desk.withdraws("a")
    assert desk.answered == ["a"]
    desk.broker_welcomes()
    assert desk.submitted == ["b"]


def test_a_withdrawal_that_the_old_session_did_not_deliver_is_said_again():
    desk = Desk()
    desk.asks("a")
    desk.cut = True
    desk.withdraws("a")
    desk.cut = False
    desk.broker_forgets()
    desk.told.clear()
    desk.broker_welcomes()
    assert desk.told == [Cancel([task_id("a")])]


@pytest.mark.parametrize("force", [False, True])
def test_a_withdrawal_is_said_to_each_new_broker(force):
    """It may not know of it, nor of the task."""
    desk = Desk()
    desk.asks("a", "b", "c")
    desk.withdraws("b", force=force)
    desk.withdraws("c")
    desk.broker_answers("c")
    desk.told.clear()
    desk.broker_forgets()
    desk.broker_welcomes()
    assert desk.submitted == ["a"]
    assert desk.all(Cancel) == [Cancel([task_id("b")], force)]
    assert desk.answered == ["c", "b"]
    desk.broker_answers("b")
    assert desk.answered == ["c", "b"]


def test_force_is_not_taken_back():
    desk = Desk()
    desk.asks("a")
    desk.withdraws("a")
    desk.withdraws("a", force=True)
    desk.withdraws("a")
    desk.broker_forgets()
    desk.told.clear()
    desk.broker_welcomes()
    assert desk.told == [Cancel([task_id("a")], force=True)]


def test_what_runs_is_told_while_it_is_open():
    desk = Desk()
    desk.asks("a", "b")
    desk.broker_answers("a")
    desk.broker_says(Running([task_id("a"), task_id("b")]))
    assert desk.acted(NowRunning) == [NowRunning([task_id("b")])]


def test_what_was_asked_for_arrives_before_what_is_told_then():
    desk = Desk(joins=False)
    desk.broker_welcomes()
    desk.asks("a", group="g")
    desk.tells(GroupWait(1, token("g")))
    assert [type(message) for message in desk.told] == [Submit, GroupWait]


def test_requests_without_a_reply_are_asked_again():
    desk = Desk()
    desk.tells(GroupWait(1, token("g")))
    desk.tells(Query(2))
    desk.broker_says(Report(2, "cluster", 1, "pack", [], [], [], 1))
    assert [action.message.request for action in desk.acted(Replied)] == [2]
    desk.broker_forgets()
    desk.told.clear()
    desk.broker_welcomes()
    assert desk.told == [GroupWait(1, token("g"))]
    desk.broker_says(GroupDone(1), GroupDone(1))
    assert desk.acted(Replied)[1:] == [Replied(GroupDone(1))]


def test_a_request_made_without_a_session_is_asked_once_in_the_next():
    desk = Desk(joins=False)
    desk.tells(GroupWait(1, token("g")))
    desk.broker_welcomes()
    assert desk.told == [GroupWait(1, token("g"))]


def test_what_counts_on_groups_and_was_not_delivered_is_said_again():
    desk = Desk()
    desk.cut = True
    desk.tells(GroupAdd([(token("g"), 3)]))
    desk.cut = False
    desk.broker_forgets()
    desk.broker_welcomes()
    assert desk.all(GroupAdd) == [GroupAdd([(token("g"), 3)], 1)]


def test_silence_is_warned_of_once_and_a_word_ends_it():
    desk = Desk()
    desk.passes(3.0)
    assert desk.acted(Warned) == []
    desk.cut = True
    desk.passes(WARN_AFTER_S + 1.5)
    (warned,) = desk.acted(Warned)
    assert "silent for 5 s; still trying" in warned.text
    desk.passes(5.0)
    assert len(desk.acted(Warned)) == 1
    desk.cut = False
    desk.passes(2.0)
    desk.cut = True
    desk.passes(WARN_AFTER_S + 1.5)
    assert len(desk.acted(Warned)) == 2
    assert desk.acted(Broken) == []


@pytest.mark.parametrize("joined", [True, False])
def test_a_silence_that_lasts_breaks_the_client(joined):
    desk = Desk(lost_after_s=12.0, joins=joined)
    desk.cut = True
    desk.asks("a")
    desk.passes(11.0)
    assert desk.acted(Broken) == []
    desk.passes(3.0)
    (broken,) = desk.acted(Broken)
    assert broken.code == "lost"
    assert "silent for 12 s" in broken.reason


def test_what_is_answered_right_behind_the_welcome_is_not_submitted_again():
    desk = Desk()
    desk.asks("a", "b")
    desk.broker_forgets()
    desk.told.clear()
    desk.broker_welcomes("a")
    assert desk.answered == ["a"]
    assert desk.submitted == ["b"]


def test_a_new_connection_is_used_at_once():
    desk = Desk()
    desk.cut = True
    desk.asks("a")
    desk.reconnects()
    assert desk.submitted == ["a"]


def test_a_new_connection_is_used_for_a_hello_if_there_is_no_session():
    desk = Desk(joins=False)
    assert len(desk.hellos) == 1
    desk.reconnects()
    assert len(desk.hellos) == 2


def test_a_broker_that_sleeps_for_half_a_minute_is_waited_for():
    desk = Desk()
    desk.cut = True
    desk.passes(40.0)
    assert desk.acted(Broken) == []


def test_the_clients_own_pause_is_not_the_brokers_silence():
    desk = Desk(lost_after_s=12.0)
    desk.passes(2.0)
    desk.sleeps(3600.0)
    desk.passes(3.0)
    assert desk.acted(Broken) == []
    assert desk.acted(Warned) == []


def test_a_refusal_breaks_the_client_and_says_why():
    desk = Desk(joins=False)
    desk.broker_refuses("this client runs Python 3.10")
    assert desk.acted(Broken) == [Broken("refused", "this client runs Python 3.10")]


def test_a_cluster_that_is_shut_down_breaks_the_client():
    desk = Desk()
    desk.broker_says(Goodbye("the cluster was shut down"))
    assert desk.acted(Broken) == [Broken("lost", "the cluster was shut down")]


def test_the_client_is_broken_once():
    desk = Desk(joins=False)
    desk.broker_refuses("no")
    desk.broker_refuses("no")
    desk.passes(100.0)
    assert len(desk.acted(Broken)) == 1


def test_notices_are_passed_on_and_what_a_broker_would_not_say_is_ignored():
    desk = Desk()
    desk.broker_says(Notice("mind the gap"), Cancel([]))
    assert [warned.text for warned in desk.acted(Warned)] == ["mind the gap"]
    assert desk.brain.counts == {"dropped: Cancel from the broker": 1}


def test_leaving_says_goodbye():
    desk = Desk()
    desk.step(Leave(False, "client closed"))
    desk.turn()
    assert desk.told[-1] == Goodbye("client closed")


def test_all_answers_of_a_message_are_handed_out_together():
    desk = Desk()
    desk.asks("a", "b", "c")
    desk.broker_says(Finals([Final(task_id("a"), "ok"), Final(task_id("c"), "cancelled", text="why")]))
    assert len(desk.acted(Finished)) == 1
    assert desk.answered == ["a", "c"]


def test_what_must_not_run_twice_is_not_given_to_another_session():
    desk = Desk()
    desk.asks("once", requeue=False)
    desk.asks("often")
    desk.broker_forgets()
    desk.asks("fresh", requeue=False)
    desk.broker_welcomes()
    assert desk.submitted == ["once", "often", "often", "fresh"]
    [finished] = desk.acted(Finished)
    assert [(final.task, final.verdict) for final in finished.finals] == [(task_id("once"), "WorkerDied")]
    assert "requeue=False" in finished.finals[0].text


# --- jobs ------------------------------------------------------------------------------------------------------------


def listed(desk: Desk) -> list[list[bytes]]:
    return [reply.message.tasks for reply in desk.acted(Replied) if isinstance(reply.message, JobTasks)]


def test_a_long_list_of_a_jobs_tasks_comes_in_parts():
    desk = Desk()
    desk.tells(Follow(1, "j"))
    desk.broker_says(JobTasks(1, "j", [task_id("a")], more=True))
    assert listed(desk) == []
    desk.broker_says(JobTasks(1, "j", [task_id("b")]))
    assert listed(desk) == [[task_id("a"), task_id("b")]]
    desk.broker_answers("b", "a")
    assert desk.answered == ["b", "a"]


def test_half_a_list_is_forgotten_with_the_session_that_brought_it():
    desk = Desk()
    desk.tells(Follow(1, "j"))
    desk.broker_says(JobTasks(1, "j", [task_id("a")], more=True))
    desk.broker_forgets()
    desk.broker_welcomes()
    assert desk.all(Follow) == [Follow(1, "j"), Follow(1, "j")]
    desk.broker_says(JobTasks(1, "j", [task_id("a"), task_id("b")]))
    assert listed(desk) == [[task_id("a"), task_id("b")]]


def test_a_job_is_followed_at_the_next_broker_and_what_that_does_not_know_is_lost():
    desk = Desk()
    desk.tells(Follow(1, "j"))
    desk.broker_says(JobTasks(1, "j", [task_id("a"), task_id("b"), task_id("c")]))
    desk.broker_answers("a")
    desk.broker_forgets()
    desk.broker_welcomes()
    assert desk.all(Follow)[1:] == [Follow(0, "j")]
    desk.broker_says(JobTasks(0, "j", [task_id("a"), task_id("b")]))
    assert desk.answered == ["a", "c"]
    lost = desk.acted(Finished)[-1].finals[0]
    assert lost.verdict == "ClusterLost"
    assert "does not know it" in lost.text
    desk.broker_answers("b")
    assert desk.answered == ["a", "c", "b"]


def test_a_job_that_is_done_is_not_followed_any_more():
    desk = Desk()
    desk.tells(Follow(1, "j"))
    desk.broker_says(JobTasks(1, "j", [task_id("a")]))
    desk.broker_answers("a")
    desk.broker_forgets()
    desk.broker_welcomes()
    assert len(desk.all(Follow)) == 1


def test_a_client_that_leaves_waits_for_what_it_has_submitted_to_be_accepted():
    desk = Desk()
    desk.cut = True
    desk.asks("a")
    desk.step(Leave(True, "done"))
    desk.passes(3.0)
    assert not desk.brain._ended
    desk.reconnects()
    desk.passes(1.5)
    assert desk.brain._ended
    assert [type(message) for message in desk.told] == [Submit, Goodbye]


@pytest.mark.parametrize(("drain", "after_s"), [(True, 10.0), (False, 0.0)])
def test_a_client_that_leaves_does_not_wait_for_ever(drain, after_s):
    desk = Desk()
    desk.cut = True
    desk.asks("a")
    desk.step(Leave(drain, "done"))
    desk.passes(after_s - 0.5)
    assert not desk.brain._ended or not drain
    desk.passes(1.0)
    assert desk.brain._ended


def test_what_the_broker_lacks_is_submitted_before_what_is_new():
    """In the order of the calls: a broker that is full of tasks with inputs holds back who has yet to submit those."""
    desk = Desk()
    desk.asks("input", "known")
    desk.broker_forgets()
    desk.broker_welcomes(remembered=True)
    desk.asks("needs it")
    assert [list(message.tasks) for message in desk.all(StillOpen)] == [[task_id("input"), task_id("known")]]
    assert desk.submitted == ["input", "known"], "nothing in this session"
    desk.broker_says(Unknown([task_id("input")]))
    assert desk.submitted[2:] == ["input", "needs it"]


def test_a_broker_that_is_full_is_sent_what_it_waits_for():
    desk = Desk()
    desk.broker_says(Hold(True))
    desk.asks("other", "input", "another")
    assert desk.submitted == []
    desk.broker_says(NeedInputs([task_id("input")]))
    assert desk.submitted == ["input"]
    desk.broker_answers("input")
    assert not desk.all(Inputs), "it has been that task's result itself"
    desk.broker_says(Hold(False))
    assert desk.submitted == ["input", "other", "another"]
