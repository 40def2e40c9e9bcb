"""Tasks that wait for others: at the broker, in the client's brain, at the node."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zmqsched.core.events import Ask, Asked, Finished
from zmqsched.core.inputs import Inputs as Store
from zmqsched.core.load import RECORD_BYTES
from zmqsched.core.reasons import NO_INPUT, Reasons
from zmqsched.protocol import (
    MAX_PARTS,
    Dispatch,
    Final,
    Function,
    Functions,
    Hold,
    Inputs,
    NeedFunctions,
    NeedInputs,
    Order,
    Outcome,
    Results,
    Shape,
    StillOpen,
    Submit,
    TaskSpec,
)

from .builders import Broker, Client, Desk, Node, Workplace, blob, digest, label_of, options, task_id


def submits(client: Client, label: str, *inputs: str, **asked: object) -> None:
    spec = TaskSpec(task_id(label), 0, b"call of " + label.encode(), tuple(map(task_id, inputs)))
    client.says(Submit([Shape(digest("f"), options(**asked), label)], [spec], [Function(digest("f"), blob("f"))]))


def given_to(node: Node, label: str) -> dict[str, bytes]:
    """What the node has for this task, by input."""
    known = {each.digest: each.blob for message in node.all(Functions) for each in message.functions}
    return {label_of(task): bytes(known[name]) for task, name in node.orders[label].inputs}


def diamond(broker: Broker, **asked: object) -> Client:
    client = broker.client()
    for label, *inputs in ("a",), ("b", "a"), ("c", "a"), ("d", "b", "c"):
        submits(client, label, *inputs, **asked)
    return client


# --- the broker ------------------------------------------------------------------------------------------------------


def test_a_task_waits_for_all_its_inputs_and_gets_them():
    broker = Broker()
    client = diamond(broker)
    node = broker.node(slots=4)
    assert node.holds == ["a"]
    assert dict(broker.scheduler.book.task_counts())["waiting"] == 3
    assert (3, NO_INPUT) in Reasons(broker.scheduler.book, []).of_all()
    assert Reasons(broker.scheduler.book, []).of([broker.scheduler.book.tasks[task_id("d")]]) == [(1, NO_INPUT)]
    node.finishes("a", value=b"A")
    assert node.holds == ["b", "c"]
    assert given_to(node, "b") == given_to(node, "c") == {"a": b"A"}
    node.finishes("c", value=b"C")
    assert node.holds == ["b"]
    node.finishes("b", value=b"B")
    assert given_to(node, "d") == {"b": b"B", "c": b"C"}
    node.finishes("d")
    assert client.answers == dict.fromkeys("abcd", "ok")
    assert not broker.scheduler.book.open_counts()


def test_the_client_is_not_on_the_way():
    broker = Broker()
    client = diamond(broker)
    node = broker.node(slots=4)
    client.freezes()
    for label in "abcd":
        node.finishes(label)
    client.thaws()
    assert client.answers == dict.fromkeys("abcd", "ok")


def test_an_input_goes_to_a_node_once_however_many_tasks_have_it():
    broker = Broker()
    client = broker.client()
    node = broker.node(slots=1)
    submits(client, "a")
    for number in range(20):
        submits(client, f"t{number}", "a")
    node.finishes("a", value=b"A")
    for number in range(20):
        assert given_to(node, f"t{number}") == {"a": b"A"}
        node.finishes(f"t{number}")
    assert sum(function.blob == b"A" for message in node.all(Functions) for function in message.functions) == 1


def test_a_node_that_has_dropped_an_input_is_sent_it_again():
    broker = Broker()
    client = diamond(broker)
    node = broker.node(slots=2)
    node.finishes("a", value=b"A")
    name = node.orders["b"].inputs[0][1]
    node.heard.clear()
    node.says(NeedFunctions([name]))
    assert node.all(Functions) == [Functions([Function(name, b"A")])]
    assert client.answers == {"a": "ok"}


def test_an_input_that_is_answered_but_not_acknowledged_is_taken_from_there():
    broker = Broker()
    client = broker.client()
    node = broker.node()
    submits(client, "a")
    client.freezes()
    node.finishes("a", value=b"A")
    client.frozen = False
    submits(client, "b", "a")
    assert given_to(node, "b") == {"a": b"A"}
    assert client.all(NeedInputs) == []


def test_the_client_is_asked_for_an_input_that_was_forgotten():
    broker = Broker()
    client = broker.client()
    node = broker.node()
    submits(client, "a")
    node.finishes("a", value=b"A")
    broker.passes(1.0)
    submits(client, "b", "a")
    assert client.last(NeedInputs).tasks == [task_id("a")]
    assert node.holds == []
    client.says(Inputs([Final(task_id("a"), "ok", b"A")]))
    assert given_to(node, "b") == {"a": b"A"}


def test_what_even_the_client_does_not_know_fails_the_task():
    broker = Broker()
    client = broker.client()
    submits(client, "b", "unknown")
    submits(client, "c", "b")
    client.says(Inputs([Final(task_id("unknown"), "cancelled", text="forgotten")]))
    assert client.answers == {"b": "DependencyFailed", "c": "DependencyFailed"}
    assert not broker.scheduler.book.open_counts()


def test_another_client_cannot_answer_for_an_input():
    broker = Broker()
    client, other = broker.client(), broker.client("other")
    submits(client, "b", "a")
    other.says(Inputs([Final(task_id("a"), "ok", b"wrong")]))
    other.says(Inputs([Final(task_id("a"), "cancelled")]))
    assert client.answers == {}
    submits(client, "a")
    client.says(Inputs([Final(task_id("a"), "ok", b"wrong too, it is open")]))
    node = broker.node()
    node.finishes("a", value=b"A")
    assert given_to(node, "b") == {"a": b"A"}


def test_a_task_that_waits_for_itself_is_not_accepted():
    broker = Broker()
    client = broker.client()
    submits(client, "a", "a")
    assert client.answers == {"a": "NotAccepted"}


def test_a_circle_waits_for_as_long_as_its_client_is_there():
    broker = Broker(client_lease_s=5.0)
    client = broker.client()
    submits(client, "a", "b")
    submits(client, "b", "a")
    client.leaves()
    assert not broker.scheduler.book.open_counts()


def test_the_same_input_named_twice_is_one():
    broker = Broker()
    client = broker.client()
    submits(client, "a")
    submits(client, "b", "a", "a")
    node = broker.node()
    node.finishes("a", value=b"A")
    assert len(node.orders["b"].inputs) == 1


def test_those_whose_functions_never_came_may_follow_from_each_other():
    broker = Broker()
    ann, ben = broker.client("ann"), broker.client("ben")
    for label, function, inputs in (("a", "f", ()), ("b", "g", ("a",))):
        spec = TaskSpec(task_id(label), 0, b"call", tuple(map(task_id, inputs)))
        ben.says(Submit([Shape(digest(function), options(job="night"))], [spec]))
    assert ann.follows("night") == ["a", "b"]
    ben.freezes()
    broker.passes(2 * broker.settings.client_lease_s + 10)
    assert ann.answers == {"a": "NotAccepted", "b": "DependencyFailed"}


def test_a_failed_input_fails_all_that_follow_from_it_once():
    broker = Broker()
    client = diamond(broker)
    node = broker.node()
    node.fails("a", error=b"the user's error")
    assert client.answers == {"a": "error", **dict.fromkeys("bcd", "DependencyFailed")}
    for label in "bcd":
        final = client.final(label)
        assert (final.cause, bytes(final.value)) == ("error", b"the user's error")
    assert client.final("b").text == f"its input a-{int.from_bytes(task_id('a')[8:])} failed"
    assert client.final("d").text.endswith("was not run; " + client.final("b").text)
    assert not broker.scheduler.book.open_counts()


@pytest.mark.parametrize("tried", ["error", "death", "back-off"])
def test_an_input_that_is_tried_again_has_not_ended(tried):
    broker = Broker()
    client = diamond(broker, retries=1, backoff=0.5 if tried == "back-off" else 0.0)
    node = broker.node()
    node.loses_a_worker("a") if tried == "death" else node.fails("a")
    broker.passes(1.0)
    assert client.answers == {}
    node.finishes("a", value=b"A")
    assert given_to(node, "b") == {"a": b"A"}


def test_a_cancelled_input_cancels_nobody_but_fails_them():
    broker = Broker()
    client = diamond(broker)
    client.cancels("a")
    assert client.answers == {"a": "cancelled", **dict.fromkeys("bcd", "DependencyFailed")}
    assert client.final("d").cause == "cancelled"


def test_an_input_that_ends_after_all_though_it_was_cancelled_is_cancelled_for_the_others():
    broker = Broker()
    client = diamond(broker)
    node = broker.node()
    client.cancels("a")
    node.finishes("a")
    assert client.answers == {"a": "ok", **dict.fromkeys("bcd", "DependencyFailed")}


def test_a_dependent_that_is_cancelled_lets_its_input_go():
    broker = Broker()
    client = broker.client()
    node = broker.node()
    submits(client, "a")
    submits(client, "b", "a")
    client.cancels("b")
    node.finishes("a")
    assert client.answers == {"a": "ok", "b": "cancelled"}
    assert not broker.scheduler.book.open_counts()


def test_a_dependent_runs_again_with_the_same_inputs_at_another_node():
    broker = Broker()
    client = diamond(broker)
    node = broker.node()
    node.finishes("a", value=b"A")
    broker.passes(1.0)  # the answer is acknowledged
    node.leaves()
    other = broker.node("other", slots=2)
    assert given_to(other, "b") == given_to(other, "c") == {"a": b"A"}
    assert client.answers == {"a": "ok"}


def test_a_dependent_waits_for_its_function_and_its_inputs_whichever_comes_first():
    broker = Broker()
    client, node = broker.client(), broker.node(slots=2)
    submits(client, "a")
    for first in ("function", "input"):
        shape = Shape(digest(f"g {first}"), options())
        client.says(Submit([shape], [TaskSpec(task_id(first), 0, b"", (task_id("a"),))]))
    client.teaches("g function")
    assert node.holds == ["a"]
    node.finishes("a", value=b"A")
    assert node.holds == ["function"]
    client.teaches("g input")
    assert node.holds == ["function", "input"]


def test_a_late_result_ends_a_task_that_waits_for_its_inputs_again():
    """The broker was another; its client submits all anew, the node offers what it has."""
    broker = Broker()
    client = diamond(broker)
    node = broker.node(slots=4)
    node.finishes("a", value=b"A")
    del node.orders["c"]
    broker.dies(settle_s=0.0)
    client.comes_back()
    for label, *inputs in ("a",), ("b", "a"):
        submits(client, label, *inputs)
    node.comes_back()
    client.finals.clear()
    node.finishes("b", value=b"B")
    assert client.answers == {"b": "ok"}


def test_inputs_count_once_against_what_the_broker_may_hold():
    broker = Broker(max_queued_bytes=100_000)
    client = broker.client()
    node = broker.node(slots=1)
    submits(client, "a")
    submits(client, "b", "a")
    submits(client, "c", "a")
    node.finishes("a", value=bytes(40_000))
    broker.passes(1.0)
    assert broker.scheduler.book.dependencies.inputs.bytes == 40_000 + RECORD_BYTES
    assert client.all(Hold) == []
    node.finishes("b")
    node.finishes("c")
    assert broker.scheduler.book.dependencies.inputs.bytes == 0


def test_a_long_chain_and_a_wide_one_fail_in_one_sweep():
    broker = Broker()
    client = broker.client()
    shape = Shape(digest("f"), options(), "f")
    chain = [TaskSpec(b"%016d" % n, 0, b"", (b"%016d" % (n - 1),) if n else ()) for n in range(5_000)]
    for start in range(0, len(chain), 1_000):
        client.says(Submit([shape], chain[start : start + 1_000], [Function(digest("f"), b"code")]))
    client.says(Submit([shape], [TaskSpec(task_id("wide"), 0, b"", tuple(spec.task for spec in chain))]))
    node = broker.node()
    (attempt,) = node.orders.values()
    node.says(Results([Outcome(attempt.task, attempt.attempt, False, b"error", 1)]))
    assert len(client.finals) == 5_001
    assert max(len(final.text) for final in client.finals) < 200


def test_many_large_inputs_of_one_task_come_in_readable_pieces():
    broker = Broker()
    client, node = broker.client(), broker.node()
    many = [b"%016d" % n for n in range(60)]
    spec = TaskSpec(task_id("d"), 0, b"", tuple(many))
    client.says(Submit([Shape(digest("f"), options())], [spec], [Function(digest("f"), b"code")]))
    assert client.last(NeedInputs).tasks == many
    for task in many:
        client.says(Inputs([Final(task, "ok", [b"part"] * MAX_PARTS)]))
    assert len(node.orders["d"].inputs) == len(many)
    assert sum(len(message.functions) for message in node.all(Functions)) == len(many)


# --- the journal -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["log", "snapshot"])
def test_the_next_broker_has_what_the_inputs_returned(how):
    broker = Broker(journal=True)
    client = diamond(broker)
    node = broker.node()
    node.finishes("a", value=b"A")
    broker.passes(2.0)  # acknowledged, and forgotten
    node.finishes("b", value=b"B")
    broker.passes(2.0)
    if how == "snapshot":
        ledger = broker.scheduler.book.ledger
        ledger._slack_bytes = ledger._base = 0
        submits(client, "x")
        assert any(commit.anew for commit in broker.disk.commits)
    broker.dies(settle_s=0.0)
    other = broker.node("other", slots=9)
    assert given_to(other, "c") == {"a": b"A"}
    other.finishes("c", value=b"C")
    assert given_to(other, "d") == {"b": b"B", "c": b"C"}


def test_what_came_from_answers_not_acknowledged_is_in_the_journal_too():
    broker = Broker(journal=True)
    client, node = broker.client(), broker.node()
    submits(client, "a", job="j")
    client.freezes()
    node.finishes("a", value=b"A")
    client.frozen = False
    submits(client, "b", "a", job="j")
    broker.dies(settle_s=0.0)
    other = broker.node("other")
    assert given_to(other, "b") == {"a": b"A"}


def test_a_restored_broker_asks_its_client_for_what_it_lacks():
    broker = Broker(journal=True)
    client = broker.client()
    submits(client, "b", "a")
    broker.dies(settle_s=0.0)
    client.comes_back()
    client.heard.clear()
    client.says(StillOpen([task_id("b")]))
    assert client.last(NeedInputs).tasks == [task_id("a")]


def test_a_jobs_task_whose_input_nobody_knows_fails_after_a_while():
    broker = Broker(journal=True, client_lease_s=5.0)
    client = broker.client()
    submits(client, "b", "a", job="j")
    client.leaves()
    broker.dies(settle_s=0.0)
    other = broker.client("other")
    broker.passes(4.0)
    assert other.follows("j") == ["b"]
    assert other.answers == {}
    broker.passes(4.0)
    assert other.answers == {"b": "DependencyFailed"}


# --- the client's brain ----------------------------------------------------------------------------------------------


def asks(desk: Desk, label: str, *inputs: str, values: dict[str, bytes] | None = None, **asked: object) -> None:
    entry = Asked(task_id(label), Shape(digest("f"), options(**asked)), b"", tuple(map(task_id, inputs)))
    known = {task_id(each): value for each, value in (values or {}).items()}
    desk.step(Ask([entry], {digest("f"): blob("f")}, known))
    desk.turn()


def verdicts(desk: Desk) -> dict[str, str]:
    return {label_of(final.task): final.verdict for action in desk.acted(Finished) for final in action.finals}


def test_inputs_are_named_and_not_sent():
    desk = Desk()
    asks(desk, "a")
    asks(desk, "b", "a")
    assert [spec.inputs for message in desk.all(Submit) for spec in message.tasks] == [(), (task_id("a"),)]


def test_what_the_broker_has_forgotten_it_is_told_while_somebody_needs_it():
    desk = Desk()
    asks(desk, "a")
    asks(desk, "b", "a")
    asks(desk, "c", "x", values={"x": b"X"})
    desk.broker_answers("a", value=b"A")
    desk.broker_says(NeedInputs([task_id("a"), task_id("x")]))
    told = [final for message in desk.all(Inputs) for final in message.finals]
    assert {(label_of(final.task), final.verdict, final.value) for final in told} == {("a", "ok", b"A"), ("x", "ok", b"X")}
    desk.broker_answers("b", "c")
    desk.told.clear()
    desk.broker_says(NeedInputs([task_id("a")]))
    assert [final.verdict for message in desk.all(Inputs) for final in message.finals] == ["cancelled"]
    assert len(desk.brain._inputs) == 0


def test_what_the_broker_asks_for_too_early_it_is_told_when_it_is_there():
    desk = Desk()
    asks(desk, "a")
    asks(desk, "b", "a")
    desk.broker_says(NeedInputs([task_id("a")]))
    assert desk.all(Inputs) == []
    desk.broker_answers("a", value=b"A")
    assert desk.all(Inputs) == [Inputs([Final(task_id("a"), "ok", b"A")])]


def test_a_failure_is_passed_on_without_the_broker():
    desk = Desk(joins=False)
    for label, *inputs in ("a",), ("b", "a"), ("c", "b"), ("d", "x"):
        asks(desk, label, *inputs, values={"x": b"X"})
    desk.withdraws("a")
    assert verdicts(desk) == {"a": "cancelled", "b": "DependencyFailed", "c": "DependencyFailed"}
    desk.broker_welcomes()
    assert desk.submitted == ["d"]


def test_an_input_that_was_cancelled_too_late_is_cancelled_for_the_others():
    desk = Desk()
    asks(desk, "a")
    asks(desk, "b", "a")
    desk.withdraws("a")
    desk.broker_answers("a")
    assert verdicts(desk)["b"] == "DependencyFailed"


def test_what_is_submitted_anew_names_its_inputs():
    desk = Desk()
    asks(desk, "a")
    asks(desk, "b", "a")
    desk.broker_answers("a", value=b"A")
    desk.broker_forgets()
    desk.told.clear()
    desk.broker_welcomes()
    assert desk.submitted == ["b"]
    desk.broker_says(NeedInputs([task_id("a")]))
    assert desk.all(Inputs) == [Inputs([Final(task_id("a"), "ok", b"A")])]


# --- the node --------------------------------------------------------------------------------------------------------


def orders(place: Workplace, label: str, *names: str, follow: tuple[str, ...] = (), with_code: bool = True) -> None:
    inputs = tuple((task_id(name), digest(name)) for name in names)
    functions = [Function(digest("f"), blob("f"))] if with_code else []
    order = Order(task_id(label), 1, 0, b"", inputs)
    place.broker_says(Dispatch([Shape(digest("f"), options())], [order], functions, [digest(name) for name in follow]))


def got(place: Workplace, label: str) -> dict[str, bytes]:
    return {label_of(each.task): each.value for each in place.runs[label].inputs}


def test_a_task_starts_when_all_its_inputs_have_come():
    place = Workplace()
    orders(place, "t", "a", "b", follow=("a", "b"))
    place.broker_says(Functions([Function(digest("a"), b"A")]))
    assert place.all_running == []
    place.broker_says(Functions([Function(digest("b"), b"B")]))
    assert got(place, "t") == {"a": b"A", "b": b"B"}
    assert place.all(NeedFunctions) == []


def test_a_node_asks_for_what_does_not_follow_once():
    place = Workplace(slots=2)
    orders(place, "t", "a", with_code=False)
    orders(place, "u", "a", with_code=False)
    assert [message.digests for message in place.all(NeedFunctions)] == [[digest("f"), digest("a")]]
    place.broker_says(Functions([Function(digest("a"), b"A"), Function(digest("f"), blob("f"))]))
    assert got(place, "t") == got(place, "u") == {"a": b"A"}


def test_a_task_that_waits_for_an_input_is_revoked_and_dropped():
    place = Workplace()
    orders(place, "t", "a", "b", follow=("a", "b"))
    place._attempts["t"] = 1
    place.broker_revokes("t")
    assert place.returned == ["t"]
    orders(place, "u", "a", follow=("a",))
    place.broker_forgets()
    place.broker_welcomes()
    assert place.agent.held == 0
    assert place.agent._functions.held() == {}


# --- the store -------------------------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["need", "arrive", "release"]), st.integers(0, 5), st.sets(st.integers(0, 5)))))
def test_what_is_needed_is_kept_and_nothing_else(steps):
    store: Store[int] = Store(b"p")
    users: dict[bytes, tuple[bytes, ...]] = {}
    for what, number, others in steps:
        user = b"user %d" % number
        if what == "need" and user not in users:
            users[user] = tuple(b"%d" % other for other in others)
            store.need(user, number, users[user])
        elif what == "arrive":
            before = store.waiting_for(b"%d" % number)
            assert store.arrive(b"%d" % number, b"value") == before
        elif what == "release" and user in users:
            store.release(user, users.pop(user))
        store.sanity_check({user: inputs for user, inputs in users.items() if inputs})
    for user, inputs in users.items():
        store.release(user, inputs)
    assert (len(store), store.bytes) == (0, 0)
