"""Why tasks wait, as the broker says it. A reason reads on from "12 waiting:"."""

from zmqsched.core.reasons import MAX_REASONS
from zmqsched.protocol import Draining

from .builders import Broker

GIB = float(2**30)


def a_cluster(*nodes: dict, **settings):
    """A broker, a client, and nodes with these offers, named a, b, c."""
    broker = Broker(**settings)
    client = broker.client()
    return broker, client, *(broker.node(name, **offer) for name, offer in zip("abc", nodes, strict=False))


def why(client, **asked):
    """The reason for a new task that asks for this."""
    client.submits("it", **asked)
    ((reason, count),) = client.asks_why("it").items()
    assert count == 1
    return reason


# --- what nobody has ---------------------------------------------------------------------------------------------------


def test_without_nodes():
    _, client = a_cluster()
    assert why(client, resources={"gpu": 1}) == "no node is there"


def test_the_last_node_was_lost():
    broker, client, node = a_cluster({})
    node.freezes()
    broker.passes(6)
    assert why(client) == "no node is there: n1 is lost"


def test_no_node_has_one():
    _, client, _ = a_cluster({"slots": 2})
    assert why(client, resources={"gpu": 1}) == "need gpu, no node has one"


def test_no_node_has_any():
    _, client, _ = a_cluster({})
    assert why(client, resources={"gpu": 2}) == "need 2 gpu, no node has any"


def test_no_node_has_enough():
    _, client, *_ = a_cluster({"resources": {"gpu": 1}}, {"resources": {"gpu": 3}})
    assert why(client, resources={"gpu": 4}) == "need 4 gpu, no node has more than 3"


def test_memory_is_told_in_its_unit():
    _, client, _ = a_cluster({"resources": {"memory": 8 * GIB}})
    assert why(client, resources={"memory": 64 * GIB}) == "need 64 GiB of memory, no node has more than 8 GiB"


def test_no_node_has_the_tag():
    _, client, _ = a_cluster({"resources": {"gpu": 1}, "tags": ["ssd"]})
    assert why(client, resources={"gpu": 1}, tags=("tpu",)) == "need tag tpu, no node has it"


def test_several_things_are_missing():
    _, client, _ = a_cluster({})
    assert why(client, resources={"cpu": 9, "gpu": 2}, tags=("tpu",)) == "need 9 cpu, 2 gpu and tag tpu, no node has them"


def test_each_is_there_and_not_together():
    _, client, *_ = a_cluster({"resources": {"gpu": 1}}, {"tags": ["ssd"]})
    assert why(client, resources={"gpu": 1}, tags=("ssd",)) == "need gpu and tag ssd, no node has all of that"


def test_the_node_that_had_it_is_lost():
    broker, client, _, big = a_cluster({}, {"resources": {"gpu": 1}})
    big.freezes()
    broker.passes(6)
    assert why(client, resources={"gpu": 1}) == "need gpu, the node that had it is lost: n2 (b-host)"


def test_the_error_of_what_can_never_run_uses_the_same_words():
    broker, client, _ = a_cluster({"resources": {"memory": 8 * GIB}, "tags": ["ssd"]})
    reason = why(client, resources={"gpu": 1})
    broker.passes(10)
    text = client.final("it").text
    assert text.startswith(f"tasks like this one {reason}. The nodes offer n1 (a-host): cpu=1, memory=8 GiB, ssd. ")


# --- what others have --------------------------------------------------------------------------------------------------


def test_all_slots_are_taken():
    _, client, *_ = a_cluster({"slots": 3}, {"slots": 1})
    client.submits(*"abcd")
    assert why(client) == "all 4 slots are taken"


def test_the_only_slot_is_taken():
    _, client, _ = a_cluster({})
    client.submits("a")
    assert why(client) == "the only slot is taken"


def test_the_slots_of_those_that_have_it_are_taken():
    _, client, *_ = a_cluster({"slots": 2, "resources": {"gpu": 4}}, {"slots": 5})
    client.submits(*"ab", resources={"gpu": 1})
    assert why(client, resources={"gpu": 1}) == "need gpu, both slots are taken at nodes that have it"


def test_all_of_a_resource_is_taken():
    _, client, _ = a_cluster({"slots": 4, "resources": {"gpu": 4}})
    client.submits("a", "b", resources={"gpu": 2})
    assert why(client, resources={"gpu": 2}) == "need 2 gpu, all 4 are taken"


def test_too_much_of_a_resource_is_taken():
    _, client, *_ = a_cluster({"slots": 4, "resources": {"gpu": 2}}, {"slots": 4, "resources": {"gpu": 2}})
    client.submits("a", "b", resources={"gpu": 1})
    assert why(client, resources={"gpu": 2}) == "need 2 gpu, 2 of 4 are taken"


def test_the_only_one_is_taken():
    _, client, _ = a_cluster({"slots": 4, "resources": {"gpu": 1}})
    client.submits("a", resources={"gpu": 1})
    assert why(client, resources={"gpu": 1}) == "need gpu, the only one is taken"


def test_of_several_that_which_is_short_is_named():
    _, client, _ = a_cluster({"slots": 4, "resources": {"gpu": 3, "memory": 8 * GIB}})
    client.submits("a", resources={"gpu": 3})
    asked = {"resources": {"gpu": 1, "memory": 4 * GIB}}
    assert why(client, **asked) == "need gpu and 4 GiB of memory, all 3 gpu are taken"


def test_memory_is_taken():
    _, client, _ = a_cluster({"slots": 4, "resources": {"memory": 8 * GIB}})
    client.submits("a", resources={"memory": 6 * GIB})
    assert why(client, resources={"memory": 4 * GIB}) == "need 4 GiB of memory, 6 GiB of 8 GiB memory are taken"


def test_wide_tasks_wait_for_cpus():
    _, client, _ = a_cluster({"slots": 4})
    client.submits("a")
    assert why(client, resources={"cpu": 4}) == "need 4 cpu, 1 of 4 are taken"


def test_no_single_thing_is_short_everywhere():
    _, client, *_ = a_cluster(
        {"slots": 4, "resources": {"gpu": 1, "disk": 2}, "tags": ["x"]},
        {"slots": 4, "resources": {"gpu": 2, "disk": 1}, "tags": ["y"]},
    )
    client.submits("a", resources={"gpu": 1}, tags=("x",))
    client.submits("b", resources={"disk": 1}, tags=("y",))
    assert why(client, resources={"gpu": 1, "disk": 1}) == "need disk and gpu, no node has all of that free"


def test_what_is_free_is_kept_for_a_task_that_needs_more():
    broker, client, node = a_cluster({"slots": 2})
    client.submits("narrow")
    client.submits("wide", resources={"cpu": 2.0})
    while broker.now < 110:  # narrow ones pass it until a node is kept free
        client.submits(f"n{broker.now}")
        node.finishes(*[label for label in node.holds if label != "narrow"])
        broker.passes(1)
    node.finishes(*[label for label in node.holds if label != "narrow"])
    assert why(client) == "what is free is kept for tasks that have waited longer and need more"


# --- the state of nodes ------------------------------------------------------------------------------------------------


def test_the_only_node_is_draining():
    _, client, node = a_cluster({})
    node.says(Draining())
    assert why(client) == "no node takes tasks: n1 is draining"


def test_a_silent_node_is_given_nothing_and_what_it_has_waits_for_it():
    broker, client, node = a_cluster({"resources": {"gpu": 1}})
    client.submits("there")
    node.freezes()
    broker.passes(3.2)
    assert why(client, resources={"gpu": 1}) == "need gpu, no node that has it takes tasks: n1 is silent"
    assert client.asks_why("there") == {"at n1 (a-host), which has been silent for 3 s": 1}
    assert sum(client.asks_why().values()) == 2


# --- what is not placed yet --------------------------------------------------------------------------------------------


def test_a_function_that_has_not_come():
    _, client, _ = a_cluster({})
    assert why(client, with_code=False) == "their function has not arrived yet"


def test_a_retry_after_a_while():
    _, client, node = a_cluster({})
    client.submits("a", "b", retries=1, backoff=40.0)
    node.fails("a")
    node.fails("b")
    (reason,) = client.asks_why()
    assert reason.startswith("failed and will be tried again, the next in ")
    assert client.asks_why("a", "b") == client.asks_why() == {reason: 2}


def test_a_new_broker_waits_for_its_nodes():
    broker, client, _ = a_cluster({}, journal=True)
    client.submits("a", "b")
    broker.dies()
    client.comes_back()
    assert client.asks_why("b") == {"the broker was started anew and waits for its nodes": 1}
    assert client.asks_why() == {"the broker was started anew and waits for its nodes": 2}


def test_what_may_run_and_must_not_run_twice_waits_for_its_node():
    broker, client, _ = a_cluster({}, journal=True)
    client.submits("once", requeue=False)
    broker.dies()
    client.comes_back()
    broker.passes(3)
    (reason,) = client.asks_why("once")
    assert "must not run twice" in reason


def test_results_that_nobody_reads():
    broker, client, node = a_cluster({"slots": 4}, max_queued_bytes=10_000)
    reader = broker.client("reader")
    client.submits(*"ab")
    client.freezes()
    node.finishes(*"ab", value=bytes(20_000))
    reader.submits("c")
    assert reader.asks_why("c") == {"the broker's memory is full of results that nobody has read": 1}


# --- the answer --------------------------------------------------------------------------------------------------------


def test_most_tasks_first_and_those_that_run_have_no_reason():
    _, client, _ = a_cluster({"slots": 2})
    client.submits("a", "b")
    client.submits("c", resources={"gpu": 1})
    client.submits("d", "e")
    assert list(client.asks_why().items()) == [("both slots are taken", 2), ("need gpu, no node has one", 1)]


def test_what_a_node_has_and_has_not_begun_is_next_in_line():
    _, client, node = a_cluster({"credit": 2})
    client.submits("a", "b")
    node.starts("a")
    assert client.asks_why("a", "b") == {"next in line at their nodes": 1}


def test_one_is_told_about_ones_own_tasks_only():
    broker, client, _ = a_cluster({})
    client.submits("a", resources={"gpu": 1})
    client.submits("j", resources={"gpu": 1}, job="everybody's")
    stranger = broker.client("stranger")
    assert stranger.asks_why("a", "nobody's") == {}
    assert stranger.asks_why("j") == {"need gpu, no node has one": 1}


def test_many_reasons_are_added_up():
    _, client, _ = a_cluster({})
    for number in range(30):
        client.submits(f"t{number}", resources={f"r{number:02}": 1})
    found = client.asks_why()
    assert len(found) == MAX_REASONS + 1
    assert found["22 other reasons"] == 22


def test_a_long_reason_is_cut():
    _, client, _ = a_cluster({})
    assert len(why(client, tags=tuple(f"{number:0250}" for number in range(60)))) < 400
