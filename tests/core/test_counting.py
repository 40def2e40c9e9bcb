"""Whose additions to a WaitGroup count: the rules of ``core/counting.py``, told with a few actors."""

from __future__ import annotations

import re

import pytest

from zmqsched.core.groups import NEGATIVE, Groups, Waiter
from zmqsched.protocol import (
    MAX_DELTA,
    Attempt,
    GroupAdd,
    GroupDone,
    GroupWait,
    NodeHello,
    Options,
    Outcome,
    Results,
    Shape,
    tag_of,
)  # fmt: skip

from .builders import Broker, Client, Node, label_of, task_id, token
from .test_nesting import has, nested


def waits(client: Client, request: int = 1) -> None:
    client.says(GroupWait(request, token("g")))


def told(client: Client) -> list[str]:
    """How the waits were answered."""
    return [message.error for message in client.all(GroupDone)]


def owing(broker: Broker, *labels: str, client: Client | None = None, **options: object) -> Client:
    """A client that has added one for each of these tasks, sends the WaitGroup to all of them, and waits."""
    client = client or broker.client()
    client.says(GroupAdd([(token("g"), len(labels))]))
    client.submits(*labels, holds=["g"], **options)
    waits(client)
    return client


def counter(broker: Broker) -> int:
    return broker.scheduler.book.counting.groups.by_hand().get(token("g"), 0)


def ends(node: Node, label: str, attempt: int, *, ok: bool = True) -> None:
    """A result of an attempt that the broker may have given up."""
    node.says(Results([Outcome(task_id(label), attempt, ok, b"late", 1)]))


# --- an attempt that dies ------------------------------------------------------------------------------------------


def test_a_task_that_counts_down():
    broker = Broker()
    node = broker.node()
    client = owing(broker, "a")
    node.counts("a", -1)
    assert told(client) == [""], "it need not have ended"
    node.finishes("a")
    assert not broker.scheduler.book.open_counts()


def test_what_an_attempt_has_counted_is_taken_back_when_its_worker_dies():
    broker = Broker()
    node = broker.node()
    client = owing(broker, "a", "b")
    node.counts("a", 3, -4)
    assert counter(broker) == 1
    node.loses_a_worker(running="a")
    assert counter(broker) == 2
    node.counts("a", -1)
    node.finishes("a")
    assert told(client) == []
    node.counts("b", -1)
    node.finishes("b")
    assert told(client) == [""]
    assert not broker.scheduler.book.open_counts()


def test_and_when_it_is_retried():
    broker = Broker()
    node = broker.node()
    client = owing(broker, "a", retries=1)
    client.says(GroupAdd([(token("g"), 1)]))
    node.counts("a", -1)
    node.fails("a")
    node.counts("a", -1)
    node.finishes("a")
    assert counter(broker) == 1
    assert told(client) == []


def test_and_while_a_retry_is_waited_for():
    broker = Broker()
    node = broker.node()
    client = owing(broker, "a", retries=1, backoff=5.0)
    client.says(GroupAdd([(token("g"), 1)]))
    node.counts("a", -1)
    node.fails("a")
    assert counter(broker) == 2


def test_and_when_its_node_is_lost():
    broker = Broker()
    lost = broker.node("lost")
    client = owing(broker, "a")
    client.says(GroupAdd([(token("g"), 1)]))
    lost.counts("a", -1)
    assert counter(broker) == 1
    lost.freezes()
    broker.passes(6)
    assert counter(broker) == 2
    other = broker.node("other")
    other.counts("a", -1)
    other.finishes("a")
    assert counter(broker) == 1


def test_a_result_of_an_attempt_that_was_given_up_brings_what_it_has_counted():
    """First result wins, with all that belongs to it; the attempt that came after it counts for nothing."""
    broker = Broker()
    lost = broker.node("lost")
    client = owing(broker, "a")
    client.says(GroupAdd([(token("g"), 5)]))
    lost.counts("a", -2)
    lost.freezes()
    broker.passes(6)
    other = broker.node("other")
    other.counts("a", -1)
    assert counter(broker) == 5
    lost.thaws()
    lost.orders.clear()
    lost.comes_back()
    ends(lost, "a", 1)
    assert client.answers == {"a": "ok"}
    assert counter(broker) == 4
    other.counts("a", -1)
    assert counter(broker) == 4, "what is said for a task that is answered counts for nothing"
    assert broker.counts["additions of tasks that are over"] == 1


def test_a_late_error_of_an_attempt_that_was_given_up_brings_nothing():
    broker = Broker()
    lost = broker.node("lost")
    owing(broker, "a")
    lost.counts("a", -1)
    lost.freezes()
    broker.passes(6)
    lost.thaws()
    lost.orders.clear()
    lost.comes_back()
    ends(lost, "a", 1, ok=False)
    assert counter(broker) == 1
    assert lost.holds == ["a"]
    lost.counts("a", -1)
    lost.finishes("a")
    assert counter(broker) == 0
    assert not broker.scheduler.book.open_counts()


def test_an_attempt_that_is_adopted_counts_again():
    broker = Broker(journal=True)
    node = broker.node()
    client = owing(broker, "a", "b")
    node.counts("a", -1)
    broker.dies()
    assert counter(broker) == 2, "nobody knows yet whether it is alive"
    client.comes_back()
    node.comes_back()
    assert counter(broker) == 1
    node.finishes("a")
    assert counter(broker) == 1
    node.counts("b", -1)
    waits(client, 2)
    assert told(client) == [""]


def test_an_attempt_that_nobody_heard_of_after_a_crash_counts_nothing():
    broker = Broker(journal=True)
    node = broker.node()
    client = owing(broker, "a")
    node.counts("a", -1)
    node.freezes()
    broker.dies()
    client.comes_back()
    other = broker.node("other")
    broker.passes(3)
    assert other.holds == ["a"]
    other.counts("a", -1)
    other.finishes("a")
    assert counter(broker) == 0
    broker.dies()
    assert counter(broker) == 0


def test_additions_offered_again_are_known():
    broker = Broker(journal=True)
    node = broker.node()
    owing(broker, "a", "b")
    node.counts("a", -1)
    node.says(GroupAdd([(token("g"), -1)], 1, task_id("a")))
    assert counter(broker) == 1
    broker.dies()
    node.comes_back()
    node.says(GroupAdd([(token("g"), -1)], 1, task_id("a")))
    assert counter(broker) == 1


def test_an_attempt_whose_death_was_not_reported_does_not_count_with_the_next_at_the_same_node():
    """The broker dies, and the report with its session; the next one has what the attempt had counted in its journal."""
    broker = Broker(journal=True)
    node = broker.node()
    client = owing(broker, "a", "b")
    node.counts("a", 2, -3)
    broker.dies()
    node.orders.clear()
    node.comes_back()
    node.is_over("a")
    client.comes_back()
    broker.passes(3)
    assert node.holds == ["a"]
    node.counts("a", 2)
    assert counter(broker) == 4
    node.counts("a", -3)
    assert counter(broker) == 1
    broker.dies()
    node.comes_back()
    assert counter(broker) == 1
    node.finishes("a")
    node.counts("b", -1)
    node.finishes("b")
    assert counter(broker) == 0


def test_the_end_of_an_attempt_that_is_offered_again_is_known():
    """Else it would take what the next attempt has counted."""
    broker = Broker(journal=True)
    node = broker.node()
    client = owing(broker, "a", "b")
    node.counts("a", -1)
    node.loses_a_worker(running="a")
    node.is_over("a")
    node.counts("a", -1)
    broker.dies()
    client.comes_back()
    node.comes_back()
    assert counter(broker) == 1
    node.says(GroupAdd([], 2, task_id("a")), GroupAdd([(token("g"), -1)], 3, task_id("a")))
    assert counter(broker) == 1


def test_a_task_of_a_client_that_is_gone_counts_for_nothing():
    """It comes back, and all is run again."""
    broker = Broker(client_lease_s=5.0)
    node = broker.node()
    client = owing(broker, "a")
    node.counts("a", -1)
    client.says(GroupAdd([(token("g"), 1)]))
    client.freezes()
    broker.passes(8)
    node.finishes("a")
    assert counter(broker) == 2
    client.thaws()
    client.comes_back()
    client.submits("a", holds=["g"])
    node.counts("a", -1)
    node.finishes("a")
    assert counter(broker) == 1


@pytest.mark.parametrize("journal", [False, True])
@pytest.mark.parametrize("ok", [True, False])
def test_a_result_of_a_task_that_is_submitted_again_brings_what_was_counted_while_nobody_knew_it(ok, journal):
    """Else the task would be over, and its debt owed for ever."""
    broker = Broker(client_lease_s=5.0, journal=journal)
    node = broker.node()
    client = owing(broker, "a")
    client.freezes()
    node.freezes()
    broker.passes(8)
    node.thaws()
    node.orders.clear()
    node.comes_back()
    node.counts("a", -1)
    client.thaws()
    client.comes_back()
    client.submits("a", holds=["g"])
    ends(node, *node.attempts[-1], ok=ok)  # what it runs is what it was sent again
    assert client.answers == {"a": "ok" if ok else "error"}
    waits(client, 2)
    assert told(client) == [""]
    broker.passes(2)
    assert not broker.scheduler.book.open_counts()


@pytest.mark.parametrize("journal", [False, True])
@pytest.mark.parametrize("crash", [False, True])
def test_what_an_attempt_had_counted_before_its_task_was_forgotten_comes_back_with_its_result(crash, journal):
    broker = Broker(client_lease_s=5.0, journal=journal)
    node = broker.node()
    client = owing(broker, "a")
    node.counts("a", -1)
    client.freezes()
    node.freezes()
    broker.passes(8)
    if crash and journal:
        broker.dies()
    node.thaws()
    node.orders.clear()
    node.comes_back()
    client.thaws()
    client.comes_back()
    client.submits("a", holds=["g"])
    ends(node, "a", 1, ok=True)
    assert client.answers == {"a": "ok"}
    waits(client, 2)
    assert told(client) == ["", ""], "before, and now"
    broker.passes(2)
    assert not broker.scheduler.book.open_counts()


# --- a task that ends without done() -------------------------------------------------------------------------------


def dies_for_good(broker: Broker, client: Client, node: Node) -> None:
    for _ in range(3):
        node.loses_a_worker(running="a")


def raises(broker: Broker, client: Client, node: Node) -> None:
    node.fails("a")


def is_cancelled(broker: Broker, client: Client, node: Node) -> None:
    client.cancels("a")
    node.hands_back("a")


def times_out(broker: Broker, client: Client, node: Node) -> None:
    node.stops("a", "TaskTimeout", "it ran too long\nand so on")


def is_ended_by_force(broker: Broker, client: Client, node: Node) -> None:
    client.cancels("a", force=True)
    node.stops("a", "cancelled", "ended")


ENDS = {
    dies_for_good: "3 workers died running it",
    raises: "it raised an exception",
    is_cancelled: "cancelled before it started",
    times_out: "it ran too long",
    is_ended_by_force: "ended",
}


@pytest.mark.parametrize("end", ENDS, ids=lambda end: end.__name__)
@pytest.mark.parametrize("journal", [False, True])
def test_a_task_that_ends_without_counting_down_is_named(end, journal):
    broker = Broker(journal=journal)
    node = broker.node()
    client = owing(broker, "a", name="train")
    end(broker, client, node)
    name = tag_of(task_id("a"), Shape(token("f"), Options(name="train")))
    (error,) = told(client)
    assert error.startswith(f"a task that held this WaitGroup has ended without done(): {name}: {ENDS[end]}")
    assert "and so on" not in error
    waits(client, 2)
    assert told(client)[1:] == [""], "it can be used again"
    assert not broker.scheduler.book.open_counts()


@pytest.mark.parametrize("end", [raises, times_out, dies_for_good], ids=lambda end: end.__name__)
def test_one_that_had_counted_down_owes_nothing(end):
    broker = Broker()
    node = broker.node()
    client = owing(broker, "a")
    for _ in range(3 if end is dies_for_good else 1):
        node.counts("a", -1)
        if end is dies_for_good:
            node.loses_a_worker(running="a")
    if end is not dies_for_good:
        end(broker, client, node)
    waits(client, 2)
    assert set(told(client)) == {""}
    assert not broker.scheduler.book.open_counts()


def test_the_wait_is_for_all_the_others():
    broker = Broker()
    node = broker.node(slots=3)
    client = owing(broker, "a", "b", "c", "d")
    node.fails("a")
    node.counts("b", -1)
    assert counter(broker) == 2
    assert told(client) == []
    client.cancels("d")
    node.hands_back("d")
    node.counts("c", -1)
    (error,) = told(client)
    assert error.startswith("2 tasks that held this WaitGroup have ended without done():")


def test_an_error_names_a_few_of_many():
    broker = Broker()
    labels = [f"t{number}" for number in range(5)]
    client = owing(broker, *labels)
    client.cancels(*labels)
    (error,) = told(client)
    assert error.startswith("5 tasks that held")
    assert error.endswith("; and 2 more")


def test_a_task_that_owes_nothing_may_fail():
    """Nobody knows what a task owes that was sent a WaitGroup; there are tasks enough that may pay what is owed."""
    broker = Broker()
    node = broker.node(slots=2)
    client = broker.client()
    client.submits("watcher", holds=["g"])
    owing(broker, "a", client=client)
    node.fails("watcher")
    assert counter(broker) == 1
    node.counts("a", -1)
    node.finishes("a")
    assert told(client) == [""]
    assert not broker.scheduler.book.open_counts()


def test_who_waits_for_the_group_is_not_expected_to_count_down():
    broker = Broker()
    node = broker.node(slots=2)
    client = broker.client()
    client.submits("parent", holds=["g"])
    client.says(GroupAdd([(token("g"), 1)]))
    client.submits("child", holds=["g"])
    client.says(GroupWait(1, token("g"), task_id("parent")))
    node.fails("child")
    assert "ended without done()" in told(client)[0]


def test_a_failure_waits_for_who_may_yet_pay():
    broker = Broker()
    node = broker.node(slots=2)
    client = broker.client()
    client.submits("watcher", holds=["g"])
    owing(broker, "a", client=client)
    node.fails("a")
    assert told(client) == [], "the watcher may count down for it"
    node.finishes("watcher")
    assert "ended without done()" in told(client)[0]


def loses_its_node(broker: Broker, client: Client, node: Node) -> None:
    node.freezes()
    broker.passes(6)


@pytest.mark.parametrize("end", [*ENDS, loses_its_node], ids=lambda end: end.__name__)
@pytest.mark.parametrize("journal", [False, True])
def test_what_a_task_has_added_itself_is_owed_too_when_it_ends_without_counting_that_down(end, journal):
    broker = Broker(journal=journal)
    node = broker.node(slots=2)
    client = owing(broker, "a", "b", requeue=end is not loses_its_node)
    node.counts("b", -1)
    node.finishes("b")
    for _ in range(3 if end is dies_for_good else 1):
        node.counts("a", 4, -1)
        if end is dies_for_good:
            node.loses_a_worker(running="a")
    if end is not dies_for_good:
        end(broker, client, node)
    (error,) = told(client)
    assert error.startswith("a task that held this WaitGroup has ended without done()")
    assert counter(broker) == 0
    assert not broker.scheduler.book.open_counts()


def test_what_a_task_has_added_to_a_group_that_it_was_not_sent_is_owed_too():
    broker = Broker()
    node = broker.node()
    client = owing(broker)
    client.submits("a")
    node.counts("a", 2, -1)
    waits(client, 2)
    assert told(client) == [""]
    node.fails("a")
    assert "a task that held this WaitGroup has ended without done()" in told(client)[1]


def test_what_it_has_added_is_settled_by_the_tasks_that_it_has_started_if_they_go_on():
    broker = Broker()
    node = broker.node(slots=3)
    client = owing(broker, "parent")
    node.counts("parent", 2)
    client.submits("one", "other", holds=["g"])
    node.fails("parent")
    assert counter(broker) == 2, "its own debt is counted down"
    for label in ("one", "other"):
        assert told(client) == []
        node.counts(label, -1)
        node.finishes(label)
    assert "a task that held this WaitGroup has ended without done()" in told(client)[0]
    assert not broker.scheduler.book.open_counts()


def test_nor_is_a_failure_taken_for_what_a_task_that_runs_has_added():
    """It may be about to submit those whom it has added for."""
    broker = Broker()
    node = broker.node(slots=2)
    client = broker.client()
    client.submits("watcher", holds=["g"])
    owing(broker, "parent", client=client)
    node.counts("parent", 2)
    node.fails("watcher")
    assert counter(broker) == 3
    client.submits("one", "other", holds=["g"])
    for label in ("parent", "one", "other"):
        node.counts(label, -1)
        node.finishes(label)
    assert told(client) == [""]


def test_nor_for_what_was_added_for_tasks_that_are_yet_to_be_submitted():
    broker = Broker()
    node = broker.node(slots=2)
    client = broker.client()
    client.says(GroupAdd([(token("g"), 1)]))
    client.submits("a", "watcher", holds=["g"])
    node.fails("watcher", "a")
    client.says(GroupAdd([(token("g"), 1)]))
    assert counter(broker) == 2
    client.submits("b", holds=["g"])
    node.counts("b", -1)
    node.finishes("b")
    waits(client)
    assert "ended without done()" in told(client)[0]
    assert not broker.scheduler.book.open_counts()


@pytest.mark.parametrize("anew", [False, True])
def test_a_counter_that_has_become_larger_than_an_addition_may_be_survives_the_broker(anew):
    broker = Broker(journal=True)
    node = broker.node(slots=2)
    client = owing(broker, "a", "b")
    large = [(token("g"), MAX_DELTA)] * 3
    client.says(GroupAdd(large))
    node.counts("a", MAX_DELTA, MAX_DELTA, MAX_DELTA)
    node.counts("b", MAX_DELTA, MAX_DELTA)
    node.loses_a_worker(running="b")
    node.fails("a")
    assert counter(broker) == 1 + 3 * MAX_DELTA, "that of a is counted down"
    if anew:
        ledger = broker.scheduler.book.ledger
        ledger._slack_bytes = ledger._base = 0
        broker.passes(2)
        assert any(commit.anew for commit in broker.disk.commits)
    broker.dies()
    client.comes_back()
    node.comes_back()
    assert counter(broker) == 1 + 3 * MAX_DELTA
    client.says(GroupAdd([(group, -delta) for group, delta in large]))
    node.counts("b", -1)
    node.finishes("b")
    waits(client, 2)
    assert "ended without done()" in told(client)[0]


def test_what_the_client_could_not_send():
    broker = Broker()
    client = broker.client()
    client.says(GroupAdd([(token("g"), 1)]), GroupAdd([(token("g"), 0)], failed="fit: cannot be pickled"))
    waits(client)
    assert told(client) == ["a task that held this WaitGroup has ended without done(): fit: cannot be pickled"]


@pytest.mark.parametrize("settled", [False, True])
def test_failures_survive_the_broker(settled):
    broker = Broker(journal=True)
    node = broker.node(slots=2)
    client = broker.client()
    client.submits("watcher", holds=["g"])
    client.says(GroupAdd([(token("g"), 1)]))
    client.submits("a", holds=["g"])
    node.fails("a")
    if settled:
        node.finishes("watcher")
    broker.passes(0.1)
    broker.dies()
    client.comes_back()
    node.comes_back()
    waits(client)
    if not settled:
        assert told(client) == []
        node.finishes("watcher")
    assert "ended without done()" in told(client)[0]


def test_what_a_wait_has_heard_is_not_told_again_by_the_next_broker():
    broker = Broker(journal=True)
    node = broker.node()
    client = owing(broker, "a")
    node.fails("a")
    assert "ended without done()" in told(client)[0]
    broker.passes(0.1)
    broker.dies()
    client.comes_back()
    node.comes_back()
    assert not broker.scheduler.book.open_counts()
    waits(client, 2)
    assert told(client)[1:] == [""]


# --- below zero ----------------------------------------------------------------------------------------------------


def test_a_counter_below_zero_is_an_error_when_no_task_can_raise_it_any_more():
    broker = Broker()
    node = broker.node()
    client = owing(broker, "a")
    node.counts("a", -2)
    assert told(client) == []
    node.counts("a", 1)
    assert told(client) == [""]
    node.counts("a", -1)
    waits(client, 2)
    assert told(client) == [""]
    node.finishes("a")
    assert told(client) == ["", NEGATIVE]
    waits(client, 3)
    assert told(client)[2:] == [""]


def test_what_a_client_says_for_a_task_counts_as_its_own():
    broker = Broker()
    client = broker.client()
    client.says(GroupAdd([(token("g"), 2)], 1, task_id("a")))
    assert counter(broker) == 2


def test_a_node_that_counts_on_very_many_groups_is_held_to_a_limit():
    broker = Broker()
    node = broker.node()
    owing(broker, "a")
    node.says(GroupAdd([(number.to_bytes(16, "big"), 1) for number in range(2_000)], 1, task_id("a")))
    assert broker.counts["additions to too many WaitGroups"] == 1_001
    node.finishes("a")


def test_overdue_are_so_many_as_nobody_is_left_for():
    groups = Groups()
    groups.add(b"g", 9)
    for task in (b"1", b"2"):
        groups.hold(b"g", task, 2)
    for text in ("x", "y"):
        groups.fail(b"g", text, 4)
    assert groups.overdue() == [], "nobody waits"
    groups.wait(b"g", Waiter("ann", 1))
    assert groups.overdue() == [(b"g", "x", 4), (b"g", "y", 1)]
    for request in (2, 3):
        groups.wait(b"g", Waiter("ann", request, b"2"))
    assert groups.overdue() == [(b"g", "x", 4), (b"g", "y", 3)]
    groups.lose(b"g", "y", 3)
    assert groups.failed() == [(b"g", "x", 4), (b"g", "y", 1)]
    groups.sanity_check()


def test_the_hello_names_what_runs():
    """That builders do what a node does: else the stories of adoption tell nothing."""
    broker = Broker(journal=True)
    node = broker.node()
    owing(broker, "a")
    broker.dies()
    node.comes_back()
    assert isinstance(node.hello, NodeHello)
    assert [label_of(attempt.task) for attempt in node.hello.holding] == ["a"] == node.adopted


# --- tasks that a task has submitted -------------------------------------------------------------------------------


def child(of: Client, label: str, parent: str, attempt: int = 1) -> None:
    of.submits(label, holds=["g"], depth=1, parent=Attempt(task_id(parent), attempt))


def family(**options: object) -> tuple[Broker, Node, Node, Client, Client]:
    """A parent that runs at the first node, has added one, and has submitted a child, which runs at the other."""
    broker = Broker()
    node = broker.node()
    client = owing(broker, "parent", **options)
    node.counts("parent", 1)
    other, inside = broker.node("other"), nested(broker, node, 1)
    child(inside, "child", "parent")
    assert other.holds == ["child"]
    return broker, node, other, client, inside


def goes_well(node: Node, label: str, *counts: int) -> None:
    node.counts(label, *counts)
    node.finishes(label)


def test_a_parent_that_dies_when_its_child_has_counted_down_does_it_all_again():
    broker, node, other, client, _ = family()
    goes_well(other, "child", -1)
    assert counter(broker) == 1
    node.loses_a_worker(running="parent")
    assert (counter(broker), told(client)) == (1, [])
    running = node if node.holds else other
    running.counts("parent", 1)
    child(nested(broker, running, 2), "again", "parent", 2)
    goes_well(other if "again" in other.holds else node, "again", -1)
    assert (counter(broker), told(client)) == (1, [])
    goes_well(running, "parent", -1)
    assert told(client) == [""]
    assert not broker.scheduler.book.open_counts()


@pytest.mark.parametrize("end", ["worker dies", "raises", "node is lost"])
def test_what_an_unfinished_child_has_counted_is_taken_back_with_its_parents_attempt(end):
    broker, node, other, client, _ = family(retries=1)
    other.counts("child", -1)
    match end:
        case "worker dies":
            node.loses_a_worker(running="parent")
        case "raises":
            node.fails("parent")
        case "node is lost":
            node.freezes()
            broker.passes(6)
    assert (counter(broker), told(client)) == (1, []), "the counter was never zero"
    other.counts("child", -1)
    assert counter(broker) == 1, "it belongs to what is run again"
    if "child" in other.holds:
        other.finishes("child")
    goes_well(node if "parent" in node.holds and not node.frozen else other, "parent", -1)
    assert told(client) == [""]


def test_a_child_of_a_child_goes_with_them():
    broker, node, other, client, _ = family()
    other.counts("child", 1)
    third, within = broker.node("third"), nested(broker, other, 1)
    child(within, "grandchild", "child")
    goes_well(other, "child", -1)
    third.counts("grandchild", -1)
    assert counter(broker) == 1
    node.loses_a_worker(running="parent")
    assert (counter(broker), told(client)) == (1, [])
    third.finishes("grandchild")
    assert counter(broker) == 1


def test_a_child_that_outlives_its_parent_counts():
    broker, node, other, client, _ = family()
    goes_well(node, "parent", -1)
    assert (counter(broker), told(client)) == (1, [])
    goes_well(other, "child", -1)
    assert told(client) == [""]
    assert not broker.scheduler.book.open_counts()


def test_a_parent_that_fails_for_good_owes_what_its_child_has_not_paid():
    broker, node, other, client, _ = family(name="parent")
    node.fails("parent")
    goes_well(other, "child", -1)
    assert re.fullmatch(r"a task that .* has ended without done\(\): parent-\d+: it raised an exception", told(client)[0])
    assert not broker.scheduler.book.open_counts()


def test_a_child_that_an_earlier_attempt_has_submitted_and_that_arrives_late_counts_for_nothing():
    broker, node, other, client, inside = family(retries=1)
    goes_well(other, "child", -1)
    node.fails("parent")
    child(inside, "late", "parent", 1)
    at = other if "late" in other.holds else node
    goes_well(at, "late", -1)
    assert (counter(broker), told(client)) == (1, [])


def test_a_childs_failure_that_its_parent_was_told_of_is_taken_back_with_its_parents_attempt():
    broker, node, other, client, inside = family()
    client.says(GroupAdd([(token("g"), 1)]))
    node.counts("parent", -1)
    inside.says(GroupWait(9, token("g"), task_id("parent")))
    client.says(GroupAdd([(token("g"), -1)]))
    other.fails("child")
    assert [bool(error) for error in told(inside)] == [True], "the child's debt was counted down: somebody waited"
    assert counter(broker) == 0
    node.loses_a_worker(running="parent")
    assert counter(broker) == 1, "as before the attempt that died"
    running = node if node.holds else other
    waits(client, 2)
    running.counts("parent", 1)
    child(nested(broker, running, 2), "again", "parent", 2)
    goes_well(other if "again" in other.holds else node, "again", -1)
    goes_well(running, "parent", -1)
    assert told(client)[-1] == ""
    assert not broker.scheduler.book.open_counts()


def test_and_by_the_broker_that_follows():
    broker = Broker(journal=True)
    node = broker.node()
    client = owing(broker, "parent")
    node.counts("parent", 1)
    other, inside = broker.node("other"), nested(broker, node, 1)
    child(inside, "child", "parent")
    node.counts("parent", -1)
    inside.says(GroupWait(9, token("g"), task_id("parent")))
    other.fails("child")
    assert told(client) == told(inside) != [""]
    node.freezes()
    broker.dies()
    assert counter(broker) == 1, "nobody knows yet whether the parent is alive"
    client.comes_back()
    broker.passes(4)
    waits(client, 2)
    other.comes_back()
    goes_well(other, "parent", -1)
    assert told(client)[-1] == ""


def test_a_childs_failure_that_nobody_was_told_of_yet_is_not_the_next_attempts():
    broker, node, other, client, inside = family()
    client.says(GroupAdd([(token("g"), 1)]))
    inside.says(GroupWait(9, token("g"), task_id("parent")))
    other.fails("child")
    assert (counter(broker), told(inside)) == (2, []), "its debt was counted down: somebody waits"
    node.loses_a_worker(running="parent")
    assert counter(broker) == 2, "without what the attempt that died had added and counted down"
    running = node if node.holds else other
    client.says(GroupAdd([(token("g"), -1)]))
    goes_well(running, "parent", -1)
    assert told(client) == [""]
    assert not broker.scheduler.book.open_counts()


def test_but_it_is_told_if_that_attempt_has_the_result_after_all():
    broker, node, other, client, inside = family()
    client.says(GroupAdd([(token("g"), 1)]))
    inside.says(GroupWait(9, token("g"), task_id("parent")))
    other.fails("child")
    node.freezes()
    broker.passes(6)
    client.says(GroupAdd([(token("g"), -1)]))
    node.thaws()
    node.orders.clear()
    node.comes_back()
    node.counts("parent", -1)
    ends(node, "parent", 1)
    assert [error.partition(": ")[0] for error in told(client)] == [
        "a task that held this WaitGroup has ended without done()"
    ]
    assert not broker.scheduler.book.open_counts()


def with_one_that_is_yet_to_be_submitted(**options: object) -> tuple[Broker, Node, Node, Client, Client]:
    """A family, whose parent's node is given up; the client has added one more."""
    broker, node, other, client, inside = family(**options)
    client.says(GroupAdd([(token("g"), 1)]))
    node.freezes()
    broker.passes(6)
    assert (counter(broker), told(client)) == (2, [])
    return broker, node, other, client, inside


def test_a_child_whose_parent_is_run_again_has_not_failed():
    broker, _, other, client, _ = with_one_that_is_yet_to_be_submitted()
    other.finishes("child")
    goes_well(other, "parent", -1)
    assert (counter(broker), told(client)) == (1, []), "nothing is taken for the one that is not here"
    client.submits("last", holds=["g"])
    goes_well(other, "last", -1)
    assert told(client) == [""]
    assert not broker.scheduler.book.open_counts()


def test_but_it_has_if_that_attempt_has_the_result_after_all():
    broker, node, other, client, _ = with_one_that_is_yet_to_be_submitted()
    other.finishes("child")
    client.says(GroupAdd([(token("g"), -1)]))
    node.thaws()
    node.orders.clear()
    node.comes_back()
    node.counts("parent", -1)
    ends(node, "parent", 1)
    assert client.answers["parent"] == "ok"
    assert re.fullmatch(r"a task that .* has ended without done\(\): .*: whoever had submitted it is gone", told(client)[0])
    assert not broker.scheduler.book.open_counts()


def test_a_child_that_comes_when_another_attempt_has_answered_for_its_parent_counts_for_nothing():
    _, node, other, client, inside = world = with_one_that_is_yet_to_be_submitted()
    other.finishes("child")
    goes_well(other, "parent", -1)
    node.thaws()
    node.orders.clear()
    node.comes_back()
    child(inside, "late", "parent")
    goes_well(other if "late" in other.holds else node, "late", -1)
    assert (counter(world[0]), told(client)) == (1, [])


def test_a_failure_of_an_attempts_child_is_not_the_next_attempts():
    broker, node, other, client, _ = family()
    other.fails("child")
    other.leaves()
    node.loses_a_worker(running="parent")
    node.counts("parent", 0)
    client.says(GroupAdd([(token("g"), 1)]))
    assert (counter(broker), told(client)) == (2, []), "nothing is taken for the one that is not here"


@pytest.mark.parametrize("child_ends", [True, False])
def test_nor_is_that_of_a_childs_child(child_ends):
    broker, node, other, client, _ = family()
    other.counts("child", 1)
    third, within = broker.node("third"), nested(broker, other, 1)
    child(within, "grandchild", "child")
    third.fails("grandchild")
    if child_ends:
        goes_well(other, "child", -1)
        assert (counter(broker), told(client)) == (2, [])
    node.loses_a_worker(running="parent")
    client.says(GroupAdd([(token("g"), 1)]))
    assert (counter(broker), told(client)) == (2, []), "nothing is taken for the one that is not here"


def test_a_child_that_comes_when_its_parent_has_failed_counts_for_nothing():
    broker, node, other, client, inside = family()
    client.says(GroupAdd([(token("g"), 1)]))
    goes_well(other, "child", -1)
    node.fails("parent")
    assert len(told(client)) == 0
    before = counter(broker)
    child(inside, "late", "parent")
    goes_well(other if "late" in other.holds else node, "late", -1)
    assert (counter(broker), told(client)) == (before, [])


@pytest.mark.parametrize("counts", [[1], []])
def test_so_does_one_of_a_child_that_has_ended_with_its_parents_worker(counts):
    broker, node, other, client, _ = family()
    client.says(GroupAdd([(token("g"), 1)]))
    within = nested(broker, other, 1)
    other.counts("child", *counts)
    node.loses_a_worker(running="parent")
    has(node, 2)
    other.stops("child", "cancelled")
    other.is_over("child")
    assert "child" not in {label_of(task) for task in broker.scheduler.book.tasks}
    child(within, "late", "child")
    goes_well(other if "late" in other.holds else node, "late", -1)
    assert (counter(broker), told(client)) == (2, [])


def test_a_child_of_an_attempt_that_was_given_up_and_is_the_present_one_again_counts():
    """Its node was sent the task anew, and still runs it."""
    broker = Broker()
    node = broker.node()
    client = owing(broker, "parent")
    inside = nested(broker, node, 1)
    node.freezes()
    broker.passes(6)
    other = broker.node("other")
    assert other.holds == ["parent"]
    node.thaws()
    node.orders.clear()
    node.comes_back()
    other.leaves()
    assert node.holds == ["parent"]
    node.counts("parent", 1)
    child(inside, "child", "parent", 1)
    third = broker.node("third")
    goes_well(third if third.holds else node, "child", -1)
    goes_well(node, "parent", -1)
    assert told(client) == [""]
    assert not broker.scheduler.book.open_counts()


def test_the_end_of_an_attempt_of_before_its_client_was_gone_is_not_that_of_the_next():
    """Which is at the same node; what has ended is told when that was sent."""
    broker = Broker(client_lease_s=5.0)
    node = broker.node()
    client = owing(broker, "parent")
    node.counts("parent", 1)
    inside = nested(broker, node, 1)
    client.freezes()
    broker.passes(8)
    node.hands_back("parent")
    client.thaws()
    client.comes_back()
    client.submits("parent", holds=["g"])
    assert node.attempts == [("parent", 1), ("parent", 2)]
    other = broker.node("other")
    child(inside, "of the second", "parent", 2)
    node.is_over("parent", 1)
    child(inside, "of the first", "parent", 1)
    node.counts("parent", 1)
    for label in ("of the second", "of the first"):
        goes_well(other, label, -1)
    goes_well(node, "parent", -1)
    waits(client, 2)
    assert told(client) == [""]
    assert not broker.scheduler.book.open_counts()


def test_a_child_that_was_not_accepted_has_failed_for_its_parents_attempt_alone():
    broker, node, other, client, inside = family()
    goes_well(other, "child", -1)
    node.counts("parent", 1, -1)
    inside.says(GroupWait(9, token("g"), task_id("parent")))
    inside.says(GroupAdd([(token("g"), 0)], task=task_id("parent"), failed="second: the disk is full"))
    assert [bool(error) for error in told(inside)] == [True]
    node.loses_a_worker(running="parent")
    assert counter(broker) == 1, "as before the attempt that died"
    inside.says(GroupAdd([(token("g"), 0)], task=task_id("parent"), failed="third: the disk is full"))
    waits(client, 2)
    running = node if node.holds else other
    running.counts("parent", 1)
    child(nested(broker, running, 2), "again", "parent", 2)
    goes_well(other if "again" in other.holds else node, "again", -1)
    goes_well(running, "parent", -1)
    assert told(client)[-1] == ""
    assert not broker.scheduler.book.open_counts()


@pytest.mark.parametrize("queued", [True, False])
def test_one_that_comes_when_its_parents_attempt_was_given_up_has_failed_if_that_has_the_result_after_all(queued):
    broker = Broker()
    node = broker.node()
    client = owing(broker, "parent")
    node.counts("parent", 1)
    inside = nested(broker, node, 1)
    node.freezes()
    broker.passes(6)
    other = None if queued else broker.node("other")
    child(inside, "child", "parent")
    assert (counter(broker), told(client)) == (1, [])
    node.thaws()
    node.orders.clear()
    ran = other or broker.node("other")
    goes_well(ran, "child", -1) if "child" in ran.holds else None
    node.comes_back()
    node.counts("parent", -1)
    ends(node, "parent", 1)
    assert client.answers["parent"] == "ok"
    assert re.fullmatch(r"a task that .* has ended without done\(\): .*: whoever had submitted it is gone", told(client)[0])


def test_a_child_that_was_lost_with_its_parents_client_has_failed_if_both_come_back():
    broker = Broker(client_lease_s=5.0)
    node = broker.node()
    client = owing(broker, "parent")
    node.counts("parent", 1, -1)
    inside = nested(broker, node, 1)
    child(inside, "child", "parent")
    client.freezes()
    node.freezes()
    broker.passes(8)
    node.thaws()
    node.orders.clear()
    node.comes_back()
    client.thaws()
    client.comes_back()
    client.submits("parent", holds=["g"])
    ends(node, "parent", 1, ok=True)
    assert client.answers == {"parent": "ok"}
    waits(client, 2)
    assert re.fullmatch(r"a task that .* has ended without done\(\): .*: whoever had submitted it is gone", told(client)[-1])
