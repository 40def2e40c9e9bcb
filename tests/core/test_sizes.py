"""Whatever a core sends, the other end can read: what cannot be read is sent again for ever, and what waits behind it never
arrives. The worlds of builders.py decode all that is sent."""

from __future__ import annotations

import pytest

from zmqsched.core.events import Ask, Asked, Exited
from zmqsched.protocol import (
    BATCH_ITEMS,
    MAX_PARTS,
    MAX_TEXT,
    Attempt,
    Command,
    CommandDone,
    Dispatch,
    Done,
    Envelope,
    Fact,
    Function,
    Functions,
    NeedFunctions,
    Options,
    Order,
    Payload,
    Progress,
    Running,
    Shape,
    Submit,
    TaskSpec,
    clipped,
)  # fmt: skip

from .builders import Broker, Desk, Workplace, over_the_wire, task_id

MANY = 2_000
LARGE = bytes(20_000)


def numbered(number: int) -> bytes:
    return b"%016d" % number


def wordy(number: int) -> Options:
    """Options as long as they may be, and no two the same."""
    names = tuple((f"{number}-{index}".ljust(255, "é"), 0.0) for index in range(20))
    return Options(resources=(("cpu", 1.0), *names), name="é" * 255)


@pytest.mark.parametrize("code", [LARGE[:4_000], LARGE, [b"part"] * MAX_PARTS], ids=["inline", "bulk", "in parts"])
def test_closures_that_differ_are_submitted_in_readable_pieces(code: Payload):
    """Each task has a function of its own, and they count, not only the calls."""
    desk = Desk()
    number = MANY // 10 if isinstance(code, list) else MANY
    tasks = [Asked(numbered(n), Shape(numbered(n)), b"call") for n in range(number)]
    desk.step(Ask(tasks, {each.shape.function: code for each in tasks}))
    desk.turn()
    submits = desk.all(Submit)
    assert sum(len(message.tasks) for message in submits) == number
    assert sum(len(message.functions) for message in submits) == number
    desk.broker_says(NeedFunctions([numbered(n) for n in range(number)]))
    assert sum(len(message.functions) for message in desk.all(Functions)) == number


def test_wordy_options_are_submitted_in_readable_pieces():
    desk = Desk()
    tasks = [Asked(numbered(n), Shape(numbered(0), wordy(n)), b"call") for n in range(MANY)]
    desk.step(Ask(tasks, {numbered(0): b"code"}))
    desk.turn()
    assert sum(len(message.tasks) for message in desk.all(Submit)) == MANY


@pytest.mark.parametrize("code", [LARGE, [b"part"] * MAX_PARTS], ids=["bulk", "in parts"])
def test_closures_that_differ_are_dispatched_in_readable_pieces(code: Payload):
    broker = Broker()
    client = broker.client()
    number, at_once = (1_100, 500) if isinstance(code, bytes) else (50, 1)
    for start in range(0, number, at_once):
        numbers = range(start, min(number, start + at_once))
        specs = [TaskSpec(numbered(n), n - start, b"call" if at_once > 1 else code) for n in numbers]
        client.says(Submit([Shape(numbered(n)) for n in numbers], specs, [Function(numbered(n), code) for n in numbers]))
    node = broker.node(slots=number)
    assert len(node.orders) == number
    node.says(NeedFunctions([numbered(n) for n in range(number)]))
    assert sum(len(message.functions) for message in node.all(Functions)) == number


def test_wordy_options_are_dispatched_in_readable_pieces():
    broker = Broker()
    client = broker.client()
    for number in range(300):
        options = Options(name=f"{number}".ljust(255, "é"), tags=tuple(f"{tag}".ljust(255, "é") for tag in range(60)))
        functions = [Function(numbered(0), b"code")]
        client.says(Submit([Shape(numbered(0), options)], [TaskSpec(numbered(number), 0, b"")], functions))
    node = broker.node(slots=300, tags=[f"{tag}".ljust(255, "é") for tag in range(60)])
    assert len(node.orders) == 300


def test_a_certificate_of_any_length_reaches_the_client_and_the_observers():
    broker = Broker()
    client, node = broker.client(), broker.node()
    client.submits("a")
    for _ in range(3):
        node.loses_a_worker("a", how="x" * MAX_TEXT)
    text = client.final("a").text
    assert len(text) <= MAX_TEXT
    assert "failed: 3 workers died running it" in text[:100]
    for fact in broker.facts:
        assert isinstance(over_the_wire(Envelope(0, 0, 0, fact)).body, Fact)


def test_the_reason_why_nothing_fits_is_readable_however_much_is_wanted_and_offered():
    broker = Broker(unservable_after_s=1.0)
    client = broker.client()
    for number in range(5):
        broker.node(f"node{number}", resources={f"{number}-{n}".ljust(250, "é"): 1.0 for n in range(60)})
    client.says(Submit([Shape(numbered(0), wordy(1))], [TaskSpec(task_id("a"), 0, b"")], [Function(numbered(0), b"f")]))
    client.submits("b", resources={f"x{n}".ljust(250, "é"): 1.0 for n in range(60)})
    broker.passes(5.0)
    assert client.answers["b"] == "Unschedulable"
    client.says(Command("nobody"))
    assert "nobody" in client.last(CommandDone).error


def test_many_tasks_that_start_at_once_are_told_in_readable_pieces():
    broker = Broker()
    client, number = broker.client(), 10_001
    for start in range(0, number, 5_000):
        specs = [TaskSpec(numbered(n), 0, b"") for n in range(start, min(number, start + 5_000))]
        client.says(Submit([Shape(numbered(0))], specs, [Function(numbered(0), b"code")]))
    for name in ("one", "two"):
        node = broker.node(name, slots=6_000)
        assert node.link is not None
        started = [Attempt(order.task, order.attempt) for order in node.orders.values()]
        broker.hears(Envelope(node.link.session, 0, 0, Progress(6_000, started)), node.address.decode())
    broker.turn()
    assert sum(len(message.tasks) for message in client.all(Running)) == number


def test_much_that_happens_at_a_node_is_told_in_readable_pieces_and_in_order():
    place = Workplace(slots=1)
    shape = Shape(numbered(0))
    number = 12_000
    for start in range(0, number, 6_000):
        orders = [Order(numbered(n), 1, 0, b"") for n in range(start, start + 6_000)]
        place.broker_says(Dispatch([shape], orders, [Function(numbered(0), b"code")]))
    place.passes(1.0)
    messages = place.all(Progress)
    returned = [attempt.task for message in reversed(messages) for attempt in message.returned]
    assert returned == [numbered(n) for n in range(1, number)], "each piece goes before those told earlier"
    assert max(len(message.returned) for message in messages) == BATCH_ITEMS


def test_many_deaths_with_long_certificates_are_told_in_readable_pieces():
    place = Workplace(slots=50)
    dead = sorted(place.pipes)
    for worker in dead:  # within one turn of the node
        place.pipes.pop(worker)
        place.agent.handle(Exited(worker, 1000 + worker, "é" * MAX_TEXT, []), place.now)
    place.turn()
    assert [death.worker for death in place.deaths] == dead


def test_clipping_keeps_head_and_tail():
    text = "head" + "." * MAX_TEXT + "tail"
    assert clipped("short") == "short"
    assert len(clipped(text)) <= MAX_TEXT
    assert clipped(text).startswith("head")
    assert clipped(text).endswith("tail")


# --- what comes out of a worker's pipe ---------------------------------------------------------------------------------


def at_a_batch() -> Workplace:
    """One worker with several runs in its pipe."""
    place = Workplace()
    place.broker_orders("warm")
    place.finishes("warm")
    place.broker_orders("a", "b", "c", "d")
    assert place.at(1) == ["a", "b", "c", "d"]
    return place


def forged(label: str) -> Done:
    return Done(task_id(label), 1, True, b"forged", 0.0)


def test_a_task_can_not_answer_for_another():
    place = at_a_batch()
    place.says(1, forged("c"))
    assert place.results == ["warm"]
    for label in "abcd":
        place.finishes(label)
    assert place.results == ["warm", "a", "b", "c", "d"]


def test_a_task_that_answers_twice_and_for_the_next_upsets_nothing():
    place = at_a_batch()
    place.says(1, forged("a"))
    place.says(1, forged("b"))
    place.passes(0.1)  # the batch is stuck, and what is still in the pipe, b included, is taken back
    assert place.agent.held == 2
    place.dies(1)
    place.passes(1.0)
    assert sorted(set(place.all_running)) == ["c"]


def test_a_task_that_swallows_what_lies_in_its_pipe_takes_the_blame_for_all():
    place = at_a_batch()
    del place.pipes[1][1:3]
    place.dies(1)
    assert [death.task for death in place.deaths] == [task_id("a"), task_id("b"), task_id("c")]
    assert place.agent.held == 1


def test_next_to_nothing_of_what_is_not_here_can_be_asked_for():
    place = Workplace()
    place.broker_orders("a", resources={"other": 1e-10})
    assert place.running(1) == "a"
    place.finishes("a")


def test_an_answer_to_what_was_not_submitted_yet():
    desk = Desk(joins=False)
    desk.asks("a")
    desk.broker_welcomes()
    desk.step(Ask([Asked(task_id("b"), Shape(numbered(0)), b"")], {numbered(0): b""}))
    desk.broker_answers("b")
    assert desk.answered == ["b"]
