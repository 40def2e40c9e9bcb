"""A broker with a journal: what it says before the disk has it (nothing), and what the next broker knows.

Which facts wait for which commit is ``core/ledger.py`` (``test_ledger.py``); that any history gives the same state from its
whole log as from a snapshot, and a consistent one from each of its prefixes, is at the end.
"""

from __future__ import annotations

import os
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zmqsched.codec import decode_record, encode_record
from zmqsched.core.events import Arrived, Send, Tick
from zmqsched.core.link import ACK_DELAY_S
from zmqsched.core.recovery import snapshot
from zmqsched.core.scheduler import Scheduler
from zmqsched.core.settings import Settings
from zmqsched.core.tasks import QUEUED, WAITING
from zmqsched.protocol import (
    Ack,
    Charged,
    Envelope,
    Finals,
    Goodbye,
    GroupAdd,
    GroupDone,
    GroupWait,
    JobTasks,
    Left,
    NeedFunctions,
    Notice,
    Outcome,
    Ping,
    Pong,
    Record,
    Results,
    StillOpen,
    Submit,
    Unknown,
    Welcome,
    Workers,
)

from .builders import Broker, Client, Node, blob, digest, label_of, task_id, token


def journaled(**settings: object) -> Broker:
    return Broker(journal=True, **settings)


def acknowledged(peer: Client | Node) -> bool:
    """The broker has acknowledged all that this peer said."""
    assert peer.link is not None
    return not peer.link.unfinished()


def queued(broker: Broker) -> list[str]:
    """Labels of the queued tasks, in the order in which one node of one slot would get them."""
    return [label_of(task.id) for lane in broker.scheduler.book.placement.lanes() for task in lane.tasks]


# --- before the disk has it, nothing is said -------------------------------------------------------------------------


def test_a_submission_is_acknowledged_when_it_is_on_disk():
    broker = journaled()
    client = broker.client()
    broker.disk.slow = True
    client.submits("a")
    broker.passes(0.2)
    assert not acknowledged(client)
    broker.writes()
    broker.passes(0.2)
    assert acknowledged(client)


def test_a_task_that_may_run_twice_does_not_wait_for_the_disk_to_be_started():
    broker = journaled()
    client, node = broker.client(), broker.node()
    broker.disk.slow = True
    client.submits("a")
    assert node.holds == ["a"]


def test_results_are_acknowledged_and_answered_when_they_are_on_disk():
    broker = journaled()
    client, node = broker.client(), broker.node()
    client.submits("a")
    broker.disk.slow = True
    node.finishes("a")
    broker.passes(0.2)
    assert client.answers == {}
    assert not acknowledged(node)
    broker.writes()
    broker.passes(0.2)
    assert client.answers == {"a": "ok"}
    assert acknowledged(node)


def test_an_answer_that_comes_to_disk_when_its_client_was_given_up_and_is_back_is_not_told_for_the_next():
    broker = journaled(client_lease_s=5.0)
    client, node = broker.client(), broker.node()
    client.submits("a")
    broker.disk.slow = True
    node.finishes("a", value=b"of before")
    client.freezes()
    broker.passes(8)
    client.thaws()
    client.comes_back()
    client.submits("a")
    node.finishes("a", value=b"another")
    broker.writes()
    broker.writes()
    assert client.final("a").value == b"another"


def test_a_wait_is_over_when_what_ended_it_is_on_disk():
    broker = journaled()
    client, node = broker.client(), broker.node()
    client.submits("a", group="g")
    broker.disk.slow = True
    node.finishes("a")
    client.says(GroupWait(1, token("g")))
    assert client.all(GroupDone) == []
    broker.writes()
    assert client.last(GroupDone).error == ""
    order = [type(message) for message in client.heard if isinstance(message, Finals | GroupDone)]
    assert order == [Finals, GroupDone], "the answer comes before the news that the counter is zero"


def test_a_wait_counts_what_was_added_before_it_on_a_slow_disk():
    broker = journaled()
    client = broker.client()
    broker.disk.slow = True
    client.says(GroupAdd([(token("g"), 1)], 1), GroupWait(1, token("g")), GroupAdd([(token("g"), -1)], 2))
    assert client.all(GroupDone) == []
    broker.writes()
    assert len(client.all(GroupDone)) == 1


def test_nothing_is_sent_again_because_the_disk_is_slow():
    broker = journaled()
    client, node = broker.client(), broker.node()
    client.submits("a")
    broker.disk.slow = True
    node.finishes("a")
    client.submits("b")
    assert node.link is not None
    node.link.ping(broker.now)
    node.flush()
    broker.turn()
    broker.passes(5.0)
    assert broker.counts.get("zombie results", 0) == 0
    assert not acknowledged(node)
    assert node.link._resend_after is None, "it knows that all has arrived"


def test_a_pong_tells_what_was_received_and_not_only_what_is_safe():
    broker = journaled()
    client = broker.client()
    broker.disk.slow = True
    client.submits("a")
    assert client.link is not None
    actions = broker.hears(Envelope(client.link.session, 0, 0, Ping(1, 1)), address="client#1")
    assert actions == []
    session = broker.scheduler._sessions.get(client.link.session)
    assert session is not None
    out = session.link.flush(broker.now)
    assert [(envelope.ack, envelope.body) for envelope in out] == [(0, Pong(1, 1, 1))]


def test_what_changes_nothing_is_not_acknowledged_over_and_over():
    broker = journaled()
    client, node = broker.client(), broker.node()
    client.submits("a")
    broker.passes(1.0)
    node.finishes("a")
    actions = broker.step(Tick())
    assert client.link is not None
    actions = broker.hears(Envelope(client.link.session, 0, client.link.received, Ack()), address="client#1")
    actions += broker.step(Tick())
    broker.now += ACK_DELAY_S
    actions += broker.step(Tick())
    assert [action for action in actions if isinstance(action, Send) and action.peer == client.address] == []


# --- what may be started only once -----------------------------------------------------------------------------------


def test_what_may_start_only_once_starts_when_that_is_on_disk():
    broker = journaled()
    client, node = broker.client(), broker.node()
    broker.disk.slow = True
    client.submits("a", requeue=False)
    broker.passes(0.2)
    assert node.holds == []
    broker.writes()
    assert node.holds == ["a"]
    assert [(charged.task, charged.attempt) for charged in broker.disk.bodies(Charged)] == [(task_id("a"), 1)]


def test_a_dispatch_that_does_not_wait_brings_its_function_itself():
    """Two tasks of one function, new to the node; one waits for the disk, and with it its message."""
    broker = journaled()
    client, node = broker.client(), broker.node(slots=2)
    broker.disk.slow = True
    client.submits("once", requeue=False)
    client.submits("often")
    assert node.holds == ["often"]
    broker.writes()
    assert sorted(node.holds) == ["often", "once"]


@pytest.mark.parametrize("force", [False, True])
def test_a_cancel_before_the_start_is_on_disk(force):
    broker = journaled()
    client, node = broker.client(), broker.node()
    broker.disk.slow = True
    client.submits("a", requeue=False)
    client.cancels("a", force=force)
    broker.writes()
    broker.writes()
    assert node.attempts == []
    assert client.answers == {"a": "cancelled"}


def test_a_node_that_is_gone_before_the_start_is_on_disk():
    broker = journaled()
    client, node = broker.client(), broker.node()
    broker.disk.slow = True
    client.submits("a", requeue=False)
    node.leaves()
    broker.disk.slow = False
    broker.writes()
    assert node.attempts == []
    assert client.answers == {"a": "WorkerDied"}


# --- what the next broker knows --------------------------------------------------------------------------------------


def test_queued_tasks_are_there_in_order_of_priority_and_age():
    broker = journaled()
    client = broker.client()
    client.submits("a", "b")
    client.submits("urgent", priority=5)
    client.submits("c")
    broker.dies()
    assert queued(broker) == ["urgent", "a", "b", "c"]
    node = broker.node(slots=4)
    broker.passes(2.5)
    assert node.holds == ["urgent", "a", "b", "c"]
    assert {order.call for order in node.orders.values()} == {f"call of {label}".encode() for label in node.holds}


def test_what_is_not_on_disk_when_it_dies_was_never_said():
    broker = journaled()
    client = broker.client()
    client.submits("a")
    broker.disk.slow = True
    client.submits("b")
    broker.dies()
    assert queued(broker) == ["a"]


def test_failures_and_deaths_count_on_across_brokers():
    broker = journaled()
    client, node = broker.client(), broker.node()
    client.submits("a", retries=1)
    node.fails("a")
    node.loses_a_worker("a")
    node.loses_a_worker("a")
    broker.dies()
    client.comes_back()
    del node.orders["a"]  # it died with the node's process, say
    node.comes_back()
    assert node.holds == ["a"]
    node.loses_a_worker("a")
    assert client.answers == {"a": "WorkerDied"}
    assert client.final("a").text.count("SIGSEGV") == 3


def test_a_failure_counts_on_across_brokers():
    broker = journaled()
    client, node = broker.client(), broker.node()
    client.submits("a", retries=1)
    node.fails("a")
    broker.dies()
    client.comes_back()
    node.comes_back()
    node.fails("a")
    assert client.answers == {"a": "error"}


def test_a_retry_that_was_waited_for_is_queued():
    broker = journaled()
    client, node = broker.client(), broker.node()
    client.submits("a", retries=1, backoff=30.0)
    node.fails("a")
    broker.dies()
    node.comes_back()
    assert node.holds == ["a"]


def test_answers_that_were_not_acknowledged_are_given_and_others_forgotten():
    broker = journaled()
    client, node = broker.client(), broker.node(slots=2)
    client.submits("a", "b")
    node.finishes("a")
    broker.passes(1.5)
    client.frozen = True
    node.finishes("b")
    client.frozen = False
    client._missed.clear()
    broker.dies()
    assert broker.scheduler.book.unacknowledged() == 1
    client.comes_back()
    broker.passes(0.2)
    assert client.answers == {"a": "ok", "b": "ok"}
    broker.passes(1.5)
    broker.dies()
    assert broker.scheduler.book.unacknowledged() == 0
    assert broker.scheduler.book.keeps_nothing


def test_what_was_cancelled_stays_so():
    broker = journaled()
    client = broker.client()
    client.submits("a", "b")
    client.cancels("a")
    broker.dies()
    assert queued(broker) == ["b"]


def test_counters_of_wait_groups():
    broker = journaled()
    client, node = broker.client(), broker.node()
    client.submits("a", "b", group="g")
    client.says(GroupAdd([(token("g"), 3)], 1))
    client.says(GroupAdd([(token("g"), -1)], 2))
    node.finishes("a")
    broker.dies()
    client.comes_back()
    client.says(GroupAdd([(token("g"), -1)], 2))
    assert broker.counts["additions offered again"] == 1
    assert broker.scheduler.book.counting.groups.by_hand() == {token("g"): 2}, "and one task"
    client.says(GroupAdd([(token("g"), -2)], 3), GroupWait(1, token("g")))
    assert client.all(GroupDone) == []
    del node.orders["b"]
    node.comes_back()
    node.finishes("b")
    assert client.last(GroupDone).error == ""


def test_a_broken_counter_is_broken_for_the_next_broker():
    broker = journaled()
    client = broker.client()
    client.says(GroupAdd([(token("g"), -1)], 1))
    broker.dies()
    client.comes_back()
    client.says(GroupWait(1, token("g")))
    assert "below zero" in client.last(GroupDone).error


def test_a_task_whose_function_never_came_waits_for_it():
    broker = journaled()
    client = broker.client()
    client.submits("a", with_code=False)
    broker.dies()
    client.comes_back()
    client.says(StillOpen([task_id("a"), task_id("b")]))
    assert client.last(NeedFunctions).digests == [digest("f")]
    assert client.last(Unknown).tasks == [task_id("b")]
    client.teaches("f")
    node = broker.node()
    broker.passes(2.5)
    assert node.holds == ["a"]


def test_functions_are_kept_whatever_their_size():
    """More than the store keeps of those that nobody needs."""
    broker = journaled(max_queued_bytes=200)
    client = broker.client()
    for number in range(6):
        client.submits(f"t{number}", function=f"f{number}", job="j")
        client.teaches(f"f{number}")
    broker.dies()
    assert sorted(queued(broker)) == [f"t{number}" for number in range(6)]
    rewritten(broker)
    broker.dies()
    assert sorted(queued(broker)) == [f"t{number}" for number in range(6)]
    assert broker.scheduler.book.functions[digest("f0")] == blob("f0")


# --- nodes come back -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("journal", [False, True])
def test_what_runs_is_adopted(journal):
    broker = Broker(journal=journal)
    client, node = broker.client(), broker.node()
    client.submits("a")
    node.starts("a")
    broker.dies()
    node.comes_back()
    client.comes_back()
    client.submits("a")
    assert node.adopted == ["a"]
    assert broker.counts["adopted"] == 1
    assert client.told_running[-1:] == ["a"]
    broker.passes(5.0)
    assert node.attempts == [("a", 1)], "it was not placed again"
    node.finishes("a")
    broker.passes(0.1)
    assert client.answers == {"a": "ok"}
    assert broker.counts.get("zombie results", 0) == 0


def test_what_runs_for_a_client_that_does_not_come_back_is_ended():
    broker = Broker()
    client, node = broker.client(), broker.node()
    client.submits("a")
    node.starts("a")
    broker.dies()
    node.comes_back()
    broker.passes(58.0)
    assert node.revoked == []
    broker.passes(4.0)
    assert node.revoked_by_force == ["a"]


def test_nothing_is_placed_before_all_nodes_are_back():
    broker = journaled()
    client, first, second = broker.client(), broker.node("first"), broker.node("second")
    client.submits("a", "b", "c")
    broker.dies()
    client.comes_back()
    first.comes_back()
    assert queued(broker) == [label for label in "abc" if label not in first.holds]
    second.comes_back(reports=False)
    assert len(first.attempts) + len(second.attempts) == 2, "the second has not said what it had to say"
    first.finishes(*first.holds)
    assert first.holds == []
    second.says(Workers([]))
    assert first.holds == ["c"]


def test_nodes_that_do_not_come_back_are_not_waited_for():
    broker = journaled()
    client, first = broker.client(), broker.node("first")
    second = broker.node("second")
    client.submits("a", "b")
    broker.dies()
    second.freezes()
    first.comes_back()
    first.finishes(*first.holds)
    broker.passes(1.5)
    assert first.holds == []
    broker.passes(1.0)
    assert len(first.holds) == 1


def test_a_broker_that_dies_before_all_are_back_does_not_forget_the_others():
    broker = journaled()
    client, first, second = broker.client(), broker.node("first"), broker.node("second")
    client.submits("a", "b")
    given = {node: list(node.holds) for node in (first, second)}
    broker.dies()
    first.comes_back()
    broker.dies()
    client.comes_back()
    first.comes_back()
    assert (first.holds, queued(broker)) == (given[first], given[second])
    first.finishes(*first.holds)
    assert first.holds == [], "the second may run what is left"
    second.comes_back()
    assert second.adopted == given[second]


def test_without_nodes_before_nothing_is_waited_for():
    broker = journaled()
    client = broker.client()
    client.submits("a")
    broker.dies()
    assert broker.node().holds == ["a"]


def test_what_may_have_started_waits_for_its_node_and_is_adopted():
    broker = journaled()
    client, node = broker.client(), broker.node()
    client.submits("a", requeue=False)
    broker.dies()
    other = broker.node("other")
    broker.passes(30.0)
    assert other.holds == []
    node.comes_back()
    assert node.adopted == ["a"]
    client.comes_back()
    node.finishes("a")
    broker.passes(0.1)
    assert client.answers == {"a": "ok"}


@pytest.mark.parametrize("ok", [False, True])
def test_the_answer_of_what_may_have_started_counts(ok):
    broker = journaled()
    client, node = broker.client(), broker.node()
    client.submits("a", requeue=False)
    broker.dies()
    order = node.orders.pop("a")
    node.comes_back(reports=False)
    node.orders["a"] = order
    (node.finishes if ok else node.fails)("a")
    client.comes_back()
    broker.passes(0.1)
    assert client.answers == {"a": "ok" if ok else "error"}


def test_what_may_have_started_fails_when_its_node_does_not_come_back():
    broker = journaled()
    client, node = broker.client(), broker.node()
    client.submits("a", requeue=False)
    broker.dies()
    client.comes_back()
    node.freezes()
    other = broker.node("other")
    broker.passes(55.0)
    assert client.answers == {}
    broker.passes(10.0)
    assert client.answers == {"a": "WorkerDied"}
    assert "its node did not come back" in client.final("a").text
    assert other.attempts == []


def test_what_was_handed_back_before_its_start_has_not_started():
    broker = journaled()
    client, node = broker.client(), broker.node(credit=1)
    client.submits("a", requeue=False)
    node.starts("a")
    node.asks_for(0)
    node.hands_back("a")
    broker.dies()
    other = broker.node("other")
    node.comes_back()
    assert "a" in (*other.holds, *node.holds)


def test_what_was_not_sent_after_all_has_not_started():
    """Its node fell silent before the disk had it."""
    broker = journaled()
    client, node = broker.client(), broker.node()
    broker.disk.slow = True
    client.submits("a", requeue=False)
    node.freezes()
    broker.passes(3.2)
    assert broker.facts_of("suspect") == [node.last(Welcome).name]
    broker.disk.slow = False
    broker.writes()
    broker.dies()
    assert broker.node("other").holds == []
    broker.passes(2.5)
    assert broker.peers[-1].holds == ["a"]  # type: ignore[attr-defined]


def test_a_second_attempt_of_what_was_not_adopted_is_a_higher_number_than_what_is_on_disk():
    broker = journaled()
    client, node = broker.client(), broker.node()
    client.submits("a", requeue=False, retries=3)
    node.fails("a")
    assert node.attempts == [("a", 1), ("a", 2)]
    broker.dies()
    task = broker.scheduler.book.tasks[task_id("a")]
    assert (task.attempt, task.failures, task.state) == (2, 1, WAITING)


# --- clients ---------------------------------------------------------------------------------------------------------


def test_a_client_that_does_not_come_back_is_given_up_after_its_lease():
    broker = journaled()
    client, node = broker.client(), broker.node()
    client.submits("a", "b")
    broker.dies()
    client.freezes()
    node.comes_back()
    assert node.adopted == ["a"]
    broker.passes(55.0)
    assert queued(broker) == ["b"]
    broker.passes(10.0)
    assert queued(broker) == []
    assert node.revoked_by_force == ["a"]
    broker.dies()
    assert broker.scheduler.book.open_counts() == {}


def test_tasks_of_a_client_that_left_stay_cancelled_also_in_a_journal_written_anew():
    broker = journaled()
    client, node = broker.client(), broker.node()
    client.submits("a", "b", group="g")
    node.starts("a")
    client.leaves()
    for _ in range(2):
        broker.dies()
        assert broker.scheduler.book.open_counts() == {}
        node.comes_back()
        assert node.adopted == []
        rewritten(broker)


def test_the_journal_written_anew_while_a_task_of_a_client_that_left_still_runs():
    broker = journaled()
    client = broker.client()
    broker.node()
    client.submits("a", group="g")
    client.leaves()
    rewritten(broker)
    broker.dies()
    assert broker.scheduler.book.open_counts() == {}


def test_a_client_that_is_back_after_its_lease_gets_its_running_task_back_with_its_history():
    broker = journaled()
    client, node = broker.client(), broker.node()
    client.submits("a", retries=2)
    node.fails("a")
    client.freezes()
    broker.passes(65.0)
    client.thaws()
    client.comes_back()
    client.submits("a", retries=2)
    broker.dies()
    assert broker.scheduler.book.tasks[task_id("a")].failures == 1


def test_answers_given_in_the_turn_in_which_their_client_leaves():
    broker = journaled()
    client, node = broker.client(), broker.node()
    client.submits("a")
    assert client.link is not None
    assert node.link is not None
    for peer, body in ((node, Results([Outcome(task_id("a"), 1, True, b"v", 1)])), (client, Goodbye())):
        peer.link.send(body)  # type: ignore[union-attr]
        for envelope in peer.link.flush(broker.now):  # type: ignore[union-attr]
            broker.step(Arrived(peer.address, "", envelope))
    broker.turn()
    broker.dies()
    assert list(broker.scheduler.book.owners) == []


def test_a_client_is_remembered_also_when_all_it_has_submitted_is_a_jobs():
    """Or it would give up what it has submitted with requeue=False."""
    broker = journaled()
    client = broker.client()
    client.submits("a", job="j", requeue=False)
    for _ in range(2):
        broker.dies()
        client.comes_back()
        assert client.last(Welcome).remembered
        rewritten(broker)


# --- jobs ------------------------------------------------------------------------------------------------------------


def test_a_jobs_tasks_go_on_without_their_client_and_another_follows():
    broker = journaled()
    client, node = broker.client(), broker.node()
    client.submits("a", "b", job="j")
    client.leaves()
    node.finishes("a")
    broker.dies()
    node.comes_back()
    other = broker.client("other")
    assert other.follows("j") == ["a", "b"]
    broker.passes(0.1)
    assert other.answers == {"a": "ok"}
    node.finishes("b")
    broker.passes(0.1)
    assert other.answers == {"a": "ok", "b": "ok"}


def test_what_was_acknowledged_of_a_job_is_kept_for_others():
    broker = journaled()
    client, node = broker.client(), broker.node()
    client.submits("a", job="j")
    node.finishes("a")
    broker.passes(1.5)
    assert client.answers == {"a": "ok"}
    broker.dies()
    for name in ("one", "two"):
        other = broker.client(name)
        assert other.follows("j") == ["a"]
        broker.passes(0.1)
        assert other.answers == {"a": "ok"}


def test_a_job_nobody_knows():
    client = journaled().client()
    assert client.follows("j") == []
    assert client.last(JobTasks).more is False


def test_a_follower_cancels():
    broker = journaled()
    client, other = broker.client(), broker.client("other")
    client.submits("a", "b", job="j")
    other.follows("j")
    other.cancels("a")
    broker.passes(0.1)
    assert client.answers == other.answers == {"a": "cancelled"}


def test_a_cancel_of_a_jobs_task_from_who_has_withdrawn_it_while_the_broker_was_dead():
    """Its next session submits it no more, so it does not follow the job."""
    broker = journaled()
    client = broker.client()
    client.submits("a", job="j")
    broker.dies()
    client.comes_back()
    client.cancels("a")
    assert queued(broker) == []


def test_results_of_a_job_are_dropped_after_a_day():
    broker = journaled(keep_results_s=100.0)
    client, node = broker.client(), broker.node()
    client.submits("a", "b", job="j")
    client.leaves()
    node.finishes("a")
    broker.passes(150.0)
    node.finishes("b")
    broker.passes(90.0)
    assert broker.client("early").follows("j") == ["a", "b"]
    broker.passes(20.0)
    assert broker.client("late").follows("j") == []
    assert [record.owner for record in broker.disk.records() if isinstance(record.body, Left)][-1] == b"jj"
    broker.dies()
    assert broker.client("later").follows("j") == []


def test_an_end_in_order_keeps_what_jobs_have():
    broker = journaled()
    client = broker.client()
    client.submits("mine")
    assert not broker.scheduler.book.keeps_nothing
    client.leaves()
    assert broker.scheduler.book.keeps_nothing
    other = broker.client("other")
    other.submits("a", job="j")
    other.leaves()
    assert not broker.scheduler.book.keeps_nothing


# --- a disk that cannot be written -----------------------------------------------------------------------------------


def test_while_the_journal_cannot_be_written_new_tasks_are_refused_and_known_ones_answered():
    broker = journaled()
    client, node = broker.client(), broker.node(slots=2)
    client.submits("a")
    client.submits("done", job="j")
    node.finishes("done")
    broker.passes(1.5)
    broker.is_troubled()
    assert "no space left" in client.last(Notice).text
    client.submits("b")
    assert client.answers == {"done": "ok", "b": "NotAccepted"}
    assert "no space left" in client.final("b").text
    client.submits("a")
    assert client.answers == {"done": "ok", "b": "NotAccepted"}
    node.finishes("a")
    assert client.answers == {"done": "ok", "b": "NotAccepted"}
    broker.disk.slow = False
    broker.writes()
    assert client.answers == {"done": "ok", "b": "NotAccepted", "a": "ok"}
    client.submits("c")
    assert "c" in node.holds


def test_a_jobs_answer_is_known_in_trouble_too():
    broker = journaled()
    client, node = broker.client(), broker.node()
    client.submits("a", job="j")
    node.finishes("a")
    broker.passes(1.5)
    other = broker.client("other")
    broker.is_troubled()
    other.submits("a", job="j")
    assert other.answers == {"a": "ok"}


def test_trouble_is_told_once():
    broker = journaled()
    client = broker.client()
    for _ in range(3):
        broker.is_troubled()
    assert len(client.all(Notice)) == 1
    assert sum("no space left" in line for line in broker.log) == 1


def taken(broker: Broker) -> list[Record]:
    return snapshot(broker.scheduler.book, broker.scheduler._present(broker.now))


def rewritten(broker: Broker) -> None:
    """The journal is what a snapshot makes it, and everything else as it was."""
    ledger = broker.scheduler.book.ledger
    assert ledger is not None
    assert not ledger.busy
    broker.disk.under_way.append(ledger.replace(taken(broker)))
    broker._writes()


# --- any history ---------------------------------------------------------------------------------------------------------


KINDS: list[dict[str, object]] = [
    {},
    {"retries": 2},
    {"requeue": False},
    {"job": "j", "priority": 1},
    {"job": "j", "requeue": False, "function": "g"},
    {"group": "g"},
    {"group": "h", "job": "k", "retries": 1},
    {"retries": 1, "backoff": 2.0, "function": "g"},
]
STEPS = [
    "submit", "submit", "finish", "finish", "fail", "start", "die", "hand back", "cancel", "force", "add", "node leaves",
    "node is lost", "client leaves", "client is lost", "slow", "write", "write", "pass", "follow", "anew", "break",
]  # fmt: skip


class History:
    """Two clients, two nodes, one journal; what anybody was told is remembered with the commits that were on disk then."""

    def __init__(self) -> None:
        self.broker = journaled(client_lease_s=5.0)
        self.labels = 0
        self.additions = 0
        self.left: set[bytes] = set()  # tasks of clients that are gone
        self.told: dict[int, tuple[set[bytes], set[bytes], set[bytes]]] = {}
        self.accepted: set[bytes] = set()
        self.clients = [self.broker.client("ann"), self.broker.client("ben")]
        self.nodes = [self.broker.node("n", 2), self.broker.node("m", 3)]
        self.mine: dict[str, set[bytes]] = {"ann": set(), "ben": set()}

    def does(self, step: str, number: int) -> None:
        broker, client, node = self.broker, self.clients[number % 2], self.nodes[number // 2 % 2]
        held = sorted(node.holds)
        label = held[number % len(held)] if held else ""
        match step:
            case "submit":
                self._submit(client, KINDS[number])
            case "cancel" | "force":
                label = f"t{max(0, self.labels - number)}"
                client.cancels(label, force=step == "force")
            case "add":
                self.additions += 1
                client.says(GroupAdd([(token("g"), number - 3)], self.additions))
            case "node leaves" | "node is lost":
                node.orders.clear()
                if step == "node leaves":
                    node.leaves()
                node.comes_back(reports=number % 2 == 0)
            case "client leaves" | "client is lost":
                self.left |= self.mine[client.name]
                if step == "client leaves":
                    client.leaves()
                else:
                    client.freezes()
                    self._passes(6.5)
                    client.frozen = False
                    client._missed.clear()
                client.comes_back()
            case "slow":
                broker.disk.slow = True
            case "write":
                broker.disk.slow = False
                broker.writes()
            case "pass":
                self._passes(0.5 * number)
            case "follow":
                client.follows("j")
            case "anew" if broker.scheduler.book.ledger is not None and not broker.scheduler.book.ledger.busy:
                rewritten(broker)
                broker.turn()
            case "break":
                client.says(GroupAdd([(token("x"), -1)]))
            case _ if label:
                self._report(step, node, label)
        self._remember()

    def _submit(self, client: Client, kind: dict[str, object]) -> None:
        label = f"t{self.labels}"
        self.labels += 1
        client.submits(label, **kind)  # type: ignore[arg-type]
        if "job" not in kind:
            self.mine[client.name].add(task_id(label))

    def _report(self, step: str, node: Node, label: str) -> None:
        match step:
            case "finish":
                node.finishes(label)
            case "fail":
                node.fails(label)
            case "start":
                node.starts(label)
            case "die":
                node.loses_a_worker(label)
            case "hand back":
                node.hands_back(label)

    def _passes(self, seconds: float) -> None:
        self.broker.passes(seconds)

    def _remember(self) -> None:
        """What a broker must know that finds just what is on disk by now."""
        for client in self.clients:
            unacknowledged = {
                spec.task
                for message in (client.link.unfinished() if client.link else [])
                if isinstance(message, Submit)
                for spec in message.tasks
            }
            submitted = {task_id(f"t{number}") for number in range(self.labels)}
            if client.link is not None:
                self.accepted |= submitted & self.mine[client.name] - unacknowledged
        heard = {final.task for client in self.clients for final in client.finals}
        once = {
            order.task
            for node in self.nodes
            for order in node.orders.values()
            if (task := self.broker.scheduler.book.tasks.get(order.task)) is not None
            and task.node
            and task.node == node.id
            and not task.kind.options.requeue
        }
        self.told[len(self.broker.disk.commits)] = (set(self.accepted), heard | self.left, once)


def restored(records: list[Record]) -> Scheduler:
    scheduler = Scheduler(Settings(python="3.11", journal=True, settle_s=2.0), Random(3))
    scheduler.restore(records, 0.0)
    scheduler.sanity_check()
    return scheduler


def described(scheduler: Scheduler) -> dict[str, object]:
    """All that a journal is to keep."""
    book = scheduler.book
    groups = book.counting.groups
    tasks = list(book.tasks.values())
    return {
        "tasks": {
            label_of(task.id): (
                task.owner.id, task.kind.shape, bytes(task.call), task.failures, task.deaths, task.state, task.attempt,
            )
            for task in tasks
        },
        "order": {owner.id: order for owner in book.owners if (order := [t.id for t in tasks if t.owner is owner])},
        "answers": {owner.id: dict(owner.answers) for owner in book.owners if owner.answers},
        "counters": (groups.by_hand(), groups.broken(), groups.failed(), groups.lost(), dict(book.counting.counted)),
        "counted": {label_of(task.id): task.debts.added for task in tasks if task.debts is not None and task.debts.added},
        "functions": dict(book.functions.items()),
        "nodes": scheduler._expected,
    }  # fmt: skip


@settings(max_examples=int(os.environ.get("EXAMPLES", "60")), deadline=None)
@given(st.lists(st.tuples(st.sampled_from(STEPS), st.integers(0, 7)), max_size=40))
def test_the_whole_log_and_a_snapshot_and_each_beginning_of_the_log(steps):
    history = History()
    broker = history.broker
    for step, number in steps:
        history.does(step, number)
    broker.disk.slow = False
    broker.writes()
    broker.passes(1.1)
    # The whole log says what a snapshot says.
    assert broker.scheduler.book.ledger is not None
    assert not broker.scheduler.book.ledger.busy
    records = [decode_record([bytes(part) for part in encode_record(record)]) for record in taken(broker)]
    assert described(restored(broker.disk.records())) == described(restored(records))
    # Each beginning of it holds what anybody had been told by then.
    for commits, (accepted, done, once) in history.told.items():
        scheduler = restored(broker.disk.records(commits))
        answered = {task for owner in scheduler.book.owners for task in owner.answers}
        lost = accepted - done - scheduler.book.tasks.keys() - answered
        assert not lost, f"{commits} commits: {[label_of(task) for task in lost]}"
        again = {task for task in once & scheduler.book.tasks.keys() if scheduler.book.tasks[task].state is QUEUED}
        assert not again, f"{commits} commits: {[label_of(task) for task in again]} would be started twice"
