"""Drain, retire, pause and resume: the broker's side and the node's."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from zmqsched.protocol import Command, CommandDone, Draining, Goodbye, Pause, Progress, Query, Report, Stop

from .builders import Broker, Client, Node, Workplace


def states(client: Client) -> dict[str, str]:
    client.says(Query(99))
    return {node.id: node.state for node in client.last(Report).nodes}


def obeyed(client: Client, node: str, what: str, grace_s: float = 0.0) -> str:
    """The error, if it was not done."""
    client.says(Command(node, 5, what, grace_s))
    done = client.last(CommandDone)
    assert done.request == 5
    return done.error


def parent_waits(client: Client, node: Node) -> None:
    """A task of this node waits for tasks of its own."""
    client.submits("parent")
    node.credit = node.credit + 1
    node.says(Progress(node.credit, waiting=[node._attempt("parent")]))


# --- the broker ------------------------------------------------------------------------------------------------------------


def test_a_paused_node_gets_nothing_new_and_stays():
    broker = Broker()
    client, node = broker.client(), broker.node(slots=2)
    client.submits("a")
    assert obeyed(client, "n1", "pause") == ""
    assert node.last(Pause).on
    assert states(client) == {"n1": "paused"}
    client.submits("b")
    assert node.holds == ["a"]
    node.finishes("a")
    broker.passes(20.0)
    assert (node.holds, states(client)) == ([], {"n1": "paused"})
    assert obeyed(client, "n1", "resume") == ""
    assert not node.last(Pause).on
    assert (node.holds, states(client)) == (["b"], {"n1": "alive"})


def test_what_a_paused_node_hands_back_goes_elsewhere():
    broker = Broker()
    client, node = broker.client(), broker.node()
    client.submits("a")
    second = broker.node("second")
    obeyed(client, "n1", "pause")
    node.hands_back("a")
    assert (node.holds, second.holds) == ([], ["a"])


def test_why_tasks_wait_says_that_a_node_is_paused():
    broker = Broker()
    client = broker.client()
    broker.node()
    obeyed(client, "n1", "pause")
    client.submits("a")
    assert client.asks_why("a") == {"no node takes tasks: n1 is paused": 1}
    full = broker.node("second")
    assert full.holds == ["a"]
    client.submits("b")
    assert client.asks_why("b") == {"the only slot is taken, 1 node is paused": 1}


def test_a_node_is_named_by_its_label_too_and_an_unknown_one_is_an_error():
    broker = Broker()
    client, node = broker.client(), broker.node(label="gpu-1")
    broker.node("second")
    assert obeyed(client, "gpu-1", "drain") == ""
    assert node.last(Stop) == Stop(drain=True)
    assert obeyed(client, "gpu-9", "drain") == "there is no node 'gpu-9'; nodes: n1 (gpu-1), n2"
    assert obeyed(client, "", "drain") == "there is no node ''; nodes: n1 (gpu-1), n2"


def test_a_node_that_drains_cannot_be_paused_and_a_paused_one_can_drain():
    broker = Broker()
    client, node = broker.client(), broker.node()
    client.submits("a")
    assert obeyed(client, "n1", "pause") == ""
    assert obeyed(client, "n1", "drain") == ""
    for what in ("pause", "resume"):
        assert "n1 drains: it takes nothing new and leaves" in obeyed(client, "n1", what)
    assert states(client) == {"n1": "draining"}
    node.finishes("a")
    node.leaves()
    assert client.answers == {"a": "ok"}


def test_a_node_that_was_paused_says_so_to_the_next_broker():
    broker = Broker()
    client, node = broker.client(), broker.node()
    obeyed(client, "n1", "pause")
    node.hello = replace(node.hello, paused=True)
    broker.dies(settle_s=0.0)
    node.comes_back()
    client.comes_back()
    client.submits("a")
    assert (node.holds, states(client)) == ([], {"n1": "paused"})


def test_a_silent_node_that_is_paused_is_lost_as_any_and_resumed_it_is_still_suspect():
    broker = Broker()
    client, node = broker.client(), broker.node()
    obeyed(client, "n1", "pause")
    node.freezes()
    broker.passes(3.2)
    assert states(client) == {"n1": "paused"}
    obeyed(client, "n1", "resume")
    assert states(client) == {"n1": "suspect"}
    broker.passes(5.0)
    assert states(client) == {"n1": "lost"}


def test_a_retired_node_is_told_how_long_it_has():
    broker = Broker()
    client, node = broker.client(), broker.node()
    client.submits("a")
    obeyed(client, "n1", "retire", 30.0)
    assert node.last(Stop) == Stop(drain=True, grace_s=30.0)
    client.submits("b")
    assert node.holds == ["a"]
    second = broker.node("second", slots=2)
    node.says(Goodbye("time is up"))
    assert sorted(second.holds) == ["a", "b"]
    second.finishes("a", "b")
    assert client.answers == {"a": "ok", "b": "ok"}
    obeyed(client, "n2", "retire")
    assert not second.last(Stop).drain, "at once"


@pytest.mark.parametrize("what", ["pause", "drain"])
def test_what_a_task_on_the_only_node_waits_for_is_run_there(what):
    broker = Broker()
    client, node = broker.client(), broker.node()
    parent_waits(client, node)
    obeyed(client, "n1", what)
    client.submits("other", priority=3)
    client.submits("child", depth=1)
    assert node.holds == ["parent", "child"]
    node.finishes("child", "parent")
    assert client.answers == {"parent": "ok", "child": "ok"}
    client.submits("late", depth=1)
    assert node.holds == [], "no task there waits any more"


def test_it_is_run_elsewhere_if_there_is_room():
    broker = Broker()
    client, node = broker.client(), broker.node()
    parent_waits(client, node)
    node.says(Draining())
    second = broker.node("second")
    client.submits("child", "another", depth=1)
    assert (node.holds, second.holds) == (["parent", "another"], ["child"])


def test_a_node_that_comes_back_under_its_label_replaces_the_one_before():
    broker = Broker()
    client, old = broker.client(), broker.node("old", label="jobs-1")
    client.submits("a")
    new = broker.node("new", label="jobs-1")
    assert not old.last(Stop).drain
    assert states(client) == {"n1": "draining", "n2": "alive"}
    old.leaves("told by the broker")
    assert new.holds == ["a"]
    assert not new.all(Stop)
    other = broker.node("other", label="jobs-2")
    assert not other.all(Stop)


def test_the_one_before_stays_replaced_if_it_comes_back():
    broker = Broker()
    old = broker.node("old", label="jobs-1")
    old.freezes()
    new = broker.node("new", label="jobs-1")
    broker.passes(10.0)
    assert broker.facts_of("lost") == ["n1"]
    old.thaws()
    old.comes_back()
    assert not old.last(Stop).drain
    assert not new.all(Stop)


# --- the node --------------------------------------------------------------------------------------------------------------


def test_a_paused_node_hands_back_what_it_has_not_begun_and_finishes_the_rest():
    place = Workplace(slots=1)
    place.broker_orders("quick")
    place.finishes("quick", took=0.0001)
    place.broker_orders("a", "b", "c")
    assert place.at(place.worker_of("a")) == ["a", "b", "c"]
    place.broker_says(Pause(on=True))
    assert sorted(place.returned) == ["b", "c"]
    assert (place.all_running, place.credits[-1]) == (["a"], 0)
    place.finishes("a")
    assert place.results == ["quick", "a"]
    assert place.quit is None
    place.broker_says(Pause(on=False))
    assert place.credits[-1] > 0
    place.broker_orders("b")
    assert place.all_running == ["b"]


def test_what_waits_for_its_function_is_handed_back_too():
    place = Workplace(slots=1)
    place.broker_orders("a", function="g", with_code=False)
    place.broker_says(Pause(on=True))
    assert place.returned == ["a"]


def test_what_the_worker_took_first_is_finished():
    place = Workplace(slots=1, sloth=True)
    place.broker_orders("quick")
    place.finishes("quick", took=0.0001)
    place.broker_orders("a", "b")
    worker = place.worker_of("a")
    place.broker_says(Pause(on=True))
    place.finishes("a")
    place.pipes[worker][1:] = []
    place.gives_back(worker)
    place.finishes("b")
    assert (place.results, place.returned) == (["quick", "a", "b"], [])


def test_it_says_in_its_next_hello_that_it_is_paused():
    place = Workplace()
    place.broker_says(Pause(on=True))
    place.broker_forgets()
    assert place.hellos[-1].paused
    place.broker_welcomes()
    place.broker_says(Pause(on=False))
    place.broker_forgets()
    assert not place.hellos[-1].paused


@pytest.mark.parametrize("told", [Stop(drain=True), Pause(on=True)])
def test_it_takes_what_its_tasks_wait_for(told):
    place = Workplace(slots=1)
    place.broker_orders("parent")
    place.waits("parent")
    place.broker_says(told)
    assert place.credits[-1] == 2
    place.broker_orders("child")
    place.finishes("child")
    place.goes_on("parent")
    assert place.credits[-1] == 0
    place.finishes("parent")
    assert place.results == ["child", "parent"]


def test_when_its_time_is_up_a_retired_node_goes_and_what_runs_is_no_death():
    place = Workplace(slots=1)
    place.broker_orders("long")
    place.broker_says(Stop(drain=True, grace_s=10.0))
    assert place.all(Draining)
    place.passes(9.9)
    assert place.quit is None
    place.passes(0.2)
    assert place.quit == "told by the broker; 1 task is run elsewhere"
    assert place.all(Goodbye)
    assert (place.deaths, place.stopped) == ([], {})


def test_a_retired_node_that_has_finished_goes_before_its_time_is_up():
    place = Workplace(slots=1)
    place.broker_orders("short")
    place.broker_says(Stop(drain=True, grace_s=10.0))
    place.finishes("short")
    place.passes(0.1)
    assert place.quit == "told by the broker"
