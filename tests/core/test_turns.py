"""What a turn with one message costs: calls of Python functions, which are counted, for times would depend on the machine.

The limits are what it takes now and a tenth more. Who needs more than that asks in each turn what seldom changes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType

from zmqsched.core.events import Arrived, Ask, Asked, Reached, Said, Tick
from zmqsched.protocol import Dispatch, Done, Final, Finals, Message, Order, Outcome, Results, Shape, Submit, TaskSpec

from .builders import Broker, Desk, Peer, Workplace, blob, digest, task_id


def calls(do: Callable[[], object]) -> int:
    number = 0

    def count(frame: FrameType, event: str, arg: object) -> None:
        nonlocal number
        number += event == "call"

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        do()
    finally:
        sys.setprofile(before)
    return number - 1  # ``do`` itself


def test_a_lone_task_costs_the_agent_few_calls():
    place = Workplace(slots=2)
    place.broker_orders("warm")
    place.finishes("warm", took=0.001)
    place.passes(0.2)
    assert place.link is not None
    place.link.send(Dispatch([Shape(digest("f"))], [Order(task_id("a"), 1, 0, b"call")]))
    (ordered,) = place.link.flush(place.now)
    agent, now = place.agent, place.now

    def turns() -> None:
        agent.handle(Reached(ordered), now)
        agent.handle(Tick(), now)
        agent.next_deadline()
        worker = next(worker.id for worker in agent._workers.values() if worker.runs)
        agent.handle(Said(worker, [Done(task_id("a"), 1, True, b"value", 0.001)]), now)
        actions = agent.handle(Tick(), now)
        agent.next_deadline()
        assert len(actions) == 1, "the result"

    assert calls(turns) <= 96


def test_a_lone_task_costs_the_client_few_calls():
    desk = Desk()
    desk.asks("warm")
    desk.broker_answers("warm")
    desk.passes(0.2)
    assert desk.link is not None
    desk.link.send(Finals([Final(task_id("a"), "ok", b"value")]))
    (answer,) = desk.link.flush(desk.now)
    brain, now = desk.brain, desk.now

    def turns() -> None:
        brain.handle(Ask([Asked(task_id("a"), Shape(digest("f")), b"call")], {digest("f"): blob("f")}), now)
        assert brain.next_deadline() <= now
        brain.handle(Tick(), now)
        brain.next_deadline()
        brain.handle(Reached(answer), now)
        assert brain.next_deadline() > now, "nothing is to be ticked for"

    assert calls(turns) <= 59


def test_a_task_costs_the_scheduler_few_calls():
    assert _of_the_scheduler(1) <= 150
    assert _of_the_scheduler(4) - _of_the_scheduler(3) <= 25, "one more in the same messages"


def _of_the_scheduler(number: int) -> int:
    """So many tasks, from their submission to their answer."""
    world = Broker()
    client, node = world.client(), world.node(slots=4)
    client.submits("warm")
    node.finishes("warm")
    world.passes(0.2)
    tasks = [task_id(str(each)) for each in range(number)]
    submission = _enclosed(client, Submit([Shape(digest("f"))], [TaskSpec(task, 0, b"call") for task in tasks]))
    outcomes = _enclosed(node, Results([Outcome(task, 1, True, b"value", 1) for task in tasks]))
    scheduler, now = world.scheduler, world.now

    def turns() -> None:
        for arrived in (submission, outcomes):
            scheduler.handle(arrived, now)
            actions = scheduler.handle(Tick(), now)
            scheduler.next_deadline()
            assert len(actions) == 1, "the dispatch, then the answers"

    return calls(turns)


def _enclosed(peer: Peer, message: Message) -> Arrived:
    assert peer.link is not None
    peer.link.send(message)
    (envelope,) = peer.link.flush(peer.world.now)
    return Arrived(peer.address, peer.user, envelope)
