"""Slots that are lent while their tasks wait for others: the node's side, the broker's, and the order."""

from __future__ import annotations

import pytest

from zmqsched.core import agent, crew
from zmqsched.core.crew import SPARE_S
from zmqsched.core.events import Said
from zmqsched.protocol import (
    Adopt,
    Attempt,
    ClientHello,
    GoesOn,
    Goodbye,
    GroupAdd,
    GroupDone,
    GroupWait,
    Host,
    Options,
    Progress,
    Waits,
    Workers,
    WorkerState,
    nested_in,
    nested_incarnation,
)  # fmt: skip

from .builders import PYTHON, Broker, Client, Node, Workplace, label_of, task_id, token


def told(place: Workplace, what: str) -> list[str]:
    return [label_of(each.task) for message in place.all(Progress) for each in getattr(message, what)]


# --- the node ------------------------------------------------------------------------------------------------------------


def test_a_slot_is_lent_while_its_task_waits():
    place = Workplace(slots=1)
    place.broker_orders("parent")
    place.waits("parent")
    assert (told(place, "waiting"), place.credits[-1]) == (["parent"], 2)
    place.broker_orders("child")
    assert place.all_running == ["child", "parent"]
    place.finishes("child", took=1.0)
    place.goes_on("parent")
    assert (told(place, "resumed"), place.credits[-1]) == (["parent"], 1)
    place.finishes("parent")
    assert place.results == ["child", "parent"]


def test_nothing_new_is_started_before_there_is_room_again():
    place = Workplace(slots=1)
    place.broker_orders("parent")
    place.waits("parent")
    place.broker_orders("child")
    place.goes_on("parent")
    place.broker_orders("other")
    assert place.all_running == ["child", "parent"]
    place.finishes("child")
    assert place.all_running == ["parent"]
    place.finishes("parent")
    assert place.all_running == ["other"]


def test_what_lies_behind_a_task_that_waits_is_taken_back():
    place = Workplace(slots=1)
    place.broker_orders("warm")
    place.finishes("warm", took=0.0001)
    place.broker_orders("parent", "behind")
    assert place.at(place.worker_of("parent")) == ["parent", "behind"]
    place.waits("parent")
    assert place.all_running == ["behind", "parent"]


def test_workers_beyond_the_slots_end_when_they_have_been_idle():
    place = Workplace(slots=1)
    place.broker_orders("parent")
    place.waits("parent")
    place.broker_orders("child")
    place.finishes("child")
    place.goes_on("parent")
    assert len(place.pipes) == 2
    place.passes(SPARE_S + 0.1)
    assert (len(place.pipes), len(place.retired), place.deaths) == (1, 1, [])
    assert place.all_running == ["parent"]


def test_only_what_running_takes_is_lent():
    place = Workplace(slots=1, resources={"gpu": 1.0, "licence": 1.0}, gpus=["0"])
    place.broker_orders("parent", resources={"gpu": 1.0})
    place.waits("parent")
    place.broker_orders("child", resources={"gpu": 1.0})
    assert place.all_running == ["child", "parent"]
    place.finishes("child")
    place.broker_orders("holder", resources={"licence": 1.0})
    place.waits("holder")
    place.broker_orders("wants", resources={"licence": 1.0})
    assert place.all_running == ["holder", "parent"]


def test_a_wait_that_is_over_at_once_is_not_told_of():
    place = Workplace(slots=1, workers=True)
    place.broker_orders("parent")
    place.step(Said(1, [Waits(task_id("parent"))]))
    place.step(Said(1, [GoesOn(task_id("parent"))]))
    place.turn()
    assert (told(place, "waiting"), told(place, "resumed")) == ([], [])


def test_a_worker_that_dies_while_its_task_waits_is_charged_and_replaced():
    place = Workplace(slots=1)
    place.broker_orders("parent")
    place.waits("parent")
    place.dies(place.worker_of("parent"))
    assert [label_of(death.task) for death in place.deaths] == ["parent"]
    assert place.credits[-1] == 1
    place.broker_orders("other")
    assert place.all_running == ["other"]


def test_a_time_limit_goes_on_counting_and_estimates_do_not():
    place = Workplace(slots=1)
    place.broker_orders("parent", timeout=5.0)
    place.waits("parent")
    place.passes(4.0)
    assert place.signals == []
    place.passes(1.2)
    assert ("interrupt", 1) in place.signals
    place.goes_on("parent")
    place.feels_it(1)
    place.finishes("parent", took=5.2, ok=False)
    assert place.stopped == {"parent": "TaskTimeout"}
    assert place.agent._giving.task_s < 0.5


def test_too_many_that_wait_are_an_error(monkeypatch):
    for module in (agent, crew):
        monkeypatch.setattr(module, "MAX_LENT", 2)
    place = Workplace(slots=1)
    for label in ("a", "b", "c"):
        place.broker_orders(label)
        place.waits(label)
    place.passes(0.1)
    assert place.signals == [("interrupt", 3)]
    place.goes_on("c")
    place.feels_it(3)
    place.finishes("c", ok=False)
    assert place.stopped == {"c": "TooManyWaiting"}
    place.goes_on("b")
    place.finishes("b")
    assert place.results == ["b"]


def test_a_wait_outlives_the_session_in_which_it_began():
    place = Workplace(slots=1)
    place.broker_orders("parent")
    place.waits("parent")
    place.broker_forgets()
    place.broker_welcomes()
    place.told.clear()
    place.broker_says(Adopt([Attempt(task_id("parent"), 1)]))
    assert told(place, "waiting") == ["parent"]
    assert place.agent._reports.credit == 2


def test_a_broker_that_adopts_more_than_there_are_slots_is_told_that_there_are_no_more():
    place = Workplace(slots=1)
    place.broker_orders("parent")
    place.waits("parent")
    place.broker_orders("child")
    place.goes_on("parent")
    assert place.all_running == ["child", "parent"]
    place.broker_forgets()
    place.told.clear()
    place.broker_welcomes("parent", "child")
    assert place.credits == [1]


def test_a_broker_that_adopts_what_it_was_told_of_as_no_room_is_told_that_it_is_room_again():
    place = Workplace(slots=1)
    place.broker_orders("a")
    place.broker_forgets()
    place.told.clear()
    place.broker_welcomes()
    assert place.credits == [0], "what runs for nobody takes the slot"
    place.broker_says(Adopt([Attempt(task_id("a"), 1)]))
    assert place.credits == [0, 1], "the broker may have heard the first after it adopted"


@pytest.mark.parametrize("message", ["waits", "goes_on"])
def test_a_wait_of_another_task_than_the_one_that_runs_is_an_offence(message):
    place = Workplace(slots=1)
    place.broker_orders("parent")
    place.says(1, (Waits if message == "waits" else GoesOn)(task_id("stranger")))
    assert told(place, "waiting") == []
    assert sum(place.agent.counts.values()) == 1


# --- the broker ------------------------------------------------------------------------------------------------------------


def waits(node: Node, label: str, *, credit: int) -> None:
    node.credit = credit
    node.says(Progress(credit, waiting=[node._attempt(label)]))


def resumes(node: Node, label: str, *, credit: int) -> None:
    node.credit = credit
    node.says(Progress(credit, resumed=[node._attempt(label)]))


def test_what_a_waiting_task_does_not_need_is_free_for_others():
    broker = Broker()
    client, node = broker.client(), broker.node(resources={"gpu": 1.0, "memory": 10.0})
    client.submits("parent", resources={"gpu": 1.0, "memory": 6.0})
    client.submits("child", resources={"gpu": 1.0})
    client.submits("large", resources={"memory": 6.0})
    waits(node, "parent", credit=2)
    assert node.holds == ["parent", "child"]
    node.finishes("child")
    assert node.holds == ["parent"]
    resumes(node, "parent", credit=1)
    node.finishes("parent")
    assert node.holds == ["large"]


def test_wide_tasks_nest_on_a_node_that_holds_one():
    broker = Broker()
    client, node = broker.client(), broker.node(slots=2, credit=2)
    client.submits("parent", resources={"cpu": 2.0})
    client.submits("child", resources={"cpu": 2.0}, depth=1)
    assert node.holds == ["parent"]
    waits(node, "parent", credit=3)
    assert node.holds == ["parent", "child"]
    resumes(node, "parent", credit=2)
    node.finishes("child")
    node.finishes("parent")
    assert client.answers == {"parent": "ok", "child": "ok"}


def test_a_waiting_task_whose_node_is_lost_begins_anew_and_waits_no_more():
    broker = Broker()
    client, node = broker.client(), broker.node()
    client.submits("parent")
    waits(node, "parent", credit=2)
    node.leaves()
    other = broker.node("other")
    assert other.holds == ["parent"]
    other.finishes("parent")
    assert client.answers == {"parent": "ok"}


def test_deeper_tasks_go_first_within_a_priority():
    broker = Broker()
    client = broker.client()
    client.submits("shallow")
    client.submits("deep", depth=2)
    client.submits("middle", depth=1)
    client.submits("urgent", priority=1)
    node = broker.node()
    order = []
    while node.holds:
        order += node.holds
        node.finishes(*node.holds)
    assert order == ["urgent", "deep", "middle", "shallow"]
    assert Options(priority=-1, depth=65_535).rank < Options().rank < Options(depth=1).rank < Options(priority=1).rank


def nested(broker: Broker, node: Node, worker: int, number: int = 1) -> Client:
    client = Client(broker, f"of worker {worker}")
    client.hello = ClientHello(nested_incarnation(node.hello.incarnation, worker, number), 1, Host("here", 1, PYTHON))
    broker.peers.append(client)
    client.says_hello()
    return client


def has(node: Node, *workers: int) -> None:
    node.says(Workers([WorkerState(worker, 4711, "idle") for worker in workers]))


@pytest.mark.parametrize("node_first", [True, False])
def test_what_a_task_has_submitted_ends_with_its_worker(node_first):
    broker = Broker()
    node = Node(broker, "node", 1, None, {}, (), PYTHON, "")
    broker.peers.append(node)
    if node_first:
        node.says_hello()
    first, second = nested(broker, node, 1), nested(broker, node, 2)
    if not node_first:
        node.says_hello()
    first.submits("a")
    second.submits("b")
    has(node, 1, 2)
    assert node.holds == ["a"]
    has(node, 2)
    assert node.revoked_by_force == ["a"]
    del node.orders["a"]
    node.says(Progress(1, returned=[Attempt(task_id("a"), 1)]))
    assert node.holds == ["b"]
    node.leaves()
    assert not broker.scheduler.book.open_counts()


def says_goodbye(broker: Broker, node: Node, client: Client) -> None:
    client.says(Goodbye("left"))


def loses_its_worker(broker: Broker, node: Node, client: Client) -> None:
    has(node, 2)


def loses_its_node(broker: Broker, node: Node, client: Client) -> None:
    node.freezes()
    client.freezes()
    broker.passes(20)


@pytest.mark.parametrize("journal", [False, True])
@pytest.mark.parametrize("end", [says_goodbye, loses_its_worker, loses_its_node], ids=lambda end: end.__name__)
def test_what_it_has_submitted_and_not_waited_for_is_missed_by_who_waits_for_the_group(end, journal):
    """The task that had added for it has ended well; nobody will run these again."""
    broker = Broker(journal=journal, client_lease_s=10.0)
    node, other = broker.node(), broker.node("other")
    client = broker.client()
    client.says(GroupAdd([(token("g"), 3)]))
    submits = nested(broker, node, 1)
    submits.submits("a", "b", "c", holds=["g"], name="child")
    other.counts(other.holds[0], -1)
    end(broker, node, submits)
    for holder in (node, other):
        for label in holder.holds if not holder.frozen else ():
            holder.stops(label, "cancelled", "ended")
    if journal:
        broker.dies()
        client.comes_back()
        broker.passes(5)
    client.says(GroupWait(1, token("g")))
    error = client.last(GroupDone).error
    assert error.startswith("2 tasks that held this WaitGroup have ended without done(): child-")
    assert "whoever had submitted it is gone" in error
    assert not broker.scheduler.book.counting.groups


def test_a_client_of_no_task_is_nobodys():
    broker = Broker()
    client, node = broker.client(), broker.node()
    has(node, 1)
    client.submits("a")
    has(node)
    node.finishes("a")
    assert client.answers == {"a": "ok"}
    assert nested_in(node.hello.incarnation, nested_incarnation(node.hello.incarnation, 7, 3)) == 7
    assert nested_in(node.hello.incarnation, client.hello.incarnation) is None
