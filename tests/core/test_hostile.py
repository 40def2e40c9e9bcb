"""Peers that say anything at any time: no message raises, no two facts ever disagree, and honest work still gets done.

Ids are drawn from a few, so that late, doubled, foreign and invented ones meet tasks that are there.
"""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from zmqsched.protocol import (
    Attempt,
    Cancel,
    ClientHello,
    Command,
    Death,
    Dispatch,
    Draining,
    Finals,
    Function,
    Functions,
    Goodbye,
    GroupAdd,
    GroupForget,
    GroupWait,
    Host,
    NeedFunctions,
    NodeHello,
    Options,
    Order,
    Outcome,
    Progress,
    Query,
    Remains,
    Results,
    Revoke,
    Running,
    Shape,
    Stop,
    Submit,
    TaskSpec,
    Workers,
    WorkerState,
)  # fmt: skip

from .builders import PYTHON, Broker, Peer, Workplace, digest, task_id, token

few = st.integers(0, 3)
task_ids = st.sampled_from("abc").map(task_id)
digests = st.sampled_from("fg").map(digest)
groups = st.sampled_from([token("g"), token("h")])
some = {"max_size": 3}
shapes = st.builds(
    Shape,
    digests,
    st.builds(
        Options,
        priority=st.integers(-1, 1),
        retries=st.integers(0, 1),
        resources=st.sampled_from([(), (("cpu", 1.0),), (("cpu", 2.0),), (("cpu", 0.0), ("gpu", 1.0)), (("x", 0.0),)]),
        tags=st.sampled_from([(), ("t",), ("t", "t")]),
        name=st.just(""),
        group=st.one_of(st.just(b""), groups),
        requeue=st.booleans(),
    ),
)
functions = st.lists(st.builds(Function, digests, st.just(b"code")), **some)
attempts = st.lists(st.builds(Attempt, task_ids, few), **some)
remains = st.builds(Remains, *[st.text(max_size=8192)] * 2, few, few, st.booleans())
killed = st.one_of(st.just(b""), task_ids)
deaths = st.lists(st.builds(Death, few, few, st.just("SIGKILL"), killed, few, st.floats(0, 1e9), remains), **some)


def of_its_shapes(kind: type, item: type, *between: st.SearchStrategy) -> st.SearchStrategy:
    return st.lists(shapes, min_size=1, max_size=3).flatmap(
        lambda listed: st.builds(
            kind,
            st.just(listed),
            st.lists(st.builds(item, task_ids, *between, st.integers(0, len(listed) - 1), st.just(b"call")), **some),
            functions,
        )
    )


said = st.one_of(
    of_its_shapes(Submit, TaskSpec),
    st.builds(Functions, functions),
    st.builds(Cancel, st.lists(task_ids, **some)),
    st.builds(GroupAdd, st.lists(st.tuples(groups, st.integers(-2, 2)), **some)),
    st.builds(GroupWait, few, groups),
    st.builds(GroupForget, few),
    st.builds(Query, few),
    st.builds(Command, st.sampled_from(["n1", "n2", "n3"]), few, st.sampled_from(["drain", "retire", "pause", "resume"])),
    st.builds(Results, st.lists(st.builds(Outcome, task_ids, few, st.booleans(), st.just(b"value"), few), **some)),
    st.builds(Progress, few, attempts, attempts, deaths),
    st.builds(Workers, st.just([WorkerState(1, 1, "idle")])),
    st.builds(NeedFunctions, st.lists(digests, **some)),
    st.just(Draining()),
    st.just(Goodbye()),
    st.builds(Revoke, attempts),
    st.builds(Stop, st.booleans()),
    st.builds(Finals, st.just([])),
    st.builds(Running, st.lists(task_ids, **some)),
)
nodes_like = st.one_of(
    st.builds(Results, st.lists(st.builds(Outcome, task_ids, few, st.booleans(), st.just(b"value"), few), **some)),
    st.builds(Progress, few, attempts, attempts, deaths),
)
happenings = st.one_of(
    st.tuples(st.just("client"), said),
    st.tuples(st.just("node"), said),
    st.tuples(st.just("node"), nodes_like),
    st.tuples(st.sampled_from(["client", "node"]), st.sampled_from(["hello", "begins anew", "freezes", "thaws"])),
    st.tuples(st.just("time"), st.sampled_from([0.1, 1.0, 5.0, 70.0])),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(happenings, min_size=5, max_size=40))
def test_whatever_peers_say_the_scheduler_stays_sane_and_serves_others(story):
    broker = Broker()
    where = Host("host", 1, PYTHON)
    peers = {
        "client": Peer(broker, "client", ClientHello(token("client"), 1, where)),
        "node": Peer(broker, "node", NodeHello(token("node"), 1, where, 2, 2, (("cpu", 2.0), ("gpu", 1.0)), ("t",))),
    }
    for peer in peers.values():
        broker.peers.append(peer)
        peer.says_hello()
    for who, what in story:
        if who == "time":
            broker.passes(what)
        elif what == "hello":
            peers[who].says_hello()
        elif what == "begins anew":
            peers[who].says_hello(life=peers[who].hello.life + 1)
        elif what == "freezes":
            peers[who].freezes()
        elif what == "thaws":
            peers[who].thaws()
        elif not peers[who].frozen:
            peers[who].says(what)
    client, node = broker.client("honest"), broker.node("honest-node", slots=9, resources={"mine": 1.0})
    client.submits("work", function="h", resources={"mine": 1.0})
    node.finishes("work")
    assert client.answers == {"work": "ok"}


orders = st.one_of(
    of_its_shapes(Dispatch, Order, few),
    of_its_shapes(Dispatch, Order, few),
    st.builds(Functions, functions),
    st.builds(Revoke, attempts),
    said,
)
worked = st.sampled_from(["finish", "finish", "die", "time", "long", "forget", "welcome", "cut", "heal"])


@settings(max_examples=150, deadline=None)
@given(st.lists(st.one_of(orders, worked), min_size=5, max_size=40), st.randoms())
def test_whatever_the_broker_says_and_the_workers_do_the_agent_stays_sane(story, random):
    place = Workplace(2, resources={"gpu": 1.0}, gpus=["0"])
    for what in story:
        if place.quit is not None:
            break
        if what == "finish":
            if place.all_running:
                place.finishes(random.choice(place.all_running), took=random.choice([0.0, 0.1]), ok=random.random() < 0.5)
        elif what == "die":
            if place.pipes:
                place.dies(random.choice(sorted(place.pipes)))
        elif what in ("time", "long"):
            place.passes(0.01 if what == "time" else 1.0)
        elif what == "forget":
            place.broker_forgets()
        elif what in ("cut", "heal"):
            place.cut = what == "cut"
        elif what == "welcome" or place.link is None:
            if place.link is None:
                place.broker_welcomes()
        elif not place.cut:
            place.broker_says(what)
