"""What a task says through its client comes behind what it has told its node before."""

from __future__ import annotations

from zmqsched.core.events import Said, SetFence, TellNode
from zmqsched.protocol import Cancel, Fence, GroupAdd, GroupForget, GroupWait, Query, Submit

from .builders import Broker, Desk, Workplace, token
from .test_nesting import nested


def fence(number: int, client: str = "client") -> Fence:
    return Fence(token(client), number)


def fenced() -> Desk:
    desk = Desk()
    desk.asks("before")
    desk.step(SetFence())
    desk.asks("behind")
    return desk


def test_what_is_behind_a_fence_waits_for_it():
    desk = fenced()
    assert desk.acted(TellNode) == [TellNode(fence(1))]
    desk.tells(GroupWait(1, token("g")))
    desk.tells(GroupForget(1))
    assert desk.submitted == ["before"]
    desk.broker_says(fence(1))
    assert desk.submitted == ["before", "behind"]
    assert desk.told[-2:] == [GroupWait(1, token("g")), GroupForget(1)]
    desk.asks("later")
    assert desk.submitted[-1] == "later"


def test_each_fence_lets_through_what_is_before_the_next():
    desk = fenced()
    desk.step(SetFence())
    desk.asks("last")
    desk.broker_says(fence(1))
    assert desk.submitted == ["before", "behind"]
    desk.broker_says(fence(2))
    assert desk.submitted == ["before", "behind", "last"]


def test_what_was_asked_for_behind_a_fence_and_is_not_wanted_any_more():
    desk = fenced()
    desk.withdraws("behind")
    desk.broker_says(fence(1))
    assert [type(message) for message in desk.told[-2:]] == [Submit, Cancel]


def test_whoever_only_looks_does_not_wait():
    desk = fenced()
    desk.tells(Query(7))
    assert desk.told[-1] == Query(7)


def test_the_last_fence_is_told_again_in_a_new_session():
    desk = fenced()
    desk.step(SetFence())
    desk.asks("last")
    desk.broker_forgets()
    desk.broker_welcomes()
    assert desk.acted(TellNode)[2:] == [TellNode(fence(2))]
    assert "last" not in desk.submitted
    desk.broker_says(fence(2))
    assert desk.submitted[-2:] == ["behind", "last"]
    desk.broker_says(fence(2))
    desk.broker_forgets()
    desk.broker_welcomes()
    assert len(desk.acted(TellNode)) == 3


def test_a_node_passes_it_on_behind_what_it_was_told():
    place = Workplace(slots=1)
    place.broker_orders("a")
    place.step(Said(1, [GroupAdd([(token("g"), 1)])]))
    place.step(Said(1, [fence(1)]))
    place.turn()
    assert [type(message) for message in place.told if isinstance(message, GroupAdd | Fence)] == [GroupAdd, Fence]
    place.cut = True
    place.says(1, fence(2))
    place.cut = False
    place.broker_forgets()
    place.broker_welcomes()
    assert place.all(Fence)[-1] == fence(2)


def test_the_broker_passes_it_on_to_clients_of_that_nodes_tasks():
    broker = Broker()
    node, other = broker.node(), broker.node("other")
    mine, stranger = nested(broker, node, 1), broker.client("stranger")
    for sender in (other, node):
        sender.says(Fence(mine.hello.incarnation, 1), fence(1, "stranger"), fence(1, "nobody"))
    assert mine.all(Fence) == [Fence(mine.hello.incarnation, 1)]
    assert stranger.all(Fence) == []
