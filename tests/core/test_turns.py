"""What a turn with one message costs: calls of Python functions, which are counted, for times would depend on the machine.

The limits are what it takes now and a tenth more. Who needs more than that asks in each turn what seldom changes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType

from zmqsched.core.events import Ask, Asked, Reached, Said, Tick
from zmqsched.protocol import Dispatch, Done, Final, Finals, Order, Shape

from .builders import Desk, Workplace, blob, digest, task_id


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
        agent.handle(Said(worker, Done(task_id("a"), 1, True, b"value", 0.001)), now)
        actions = agent.handle(Tick(), now)
        agent.next_deadline()
        assert len(actions) == 1, "the result"

    assert calls(turns) <= 97


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

    assert calls(turns) <= 66
