"""Whole clusters on a virtual clock: many seeds with faults, and a few stories told message by message."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import msgspec
import pytest
from core.builders import label_of, task_id

from zmqsched.core.events import Ask, Asked, Withdraw
from zmqsched.core.policy import POLICIES
from zmqsched.core.settings import Settings
from zmqsched.protocol import (
    Attempt,
    Cancel,
    Dispatch,
    Draining,
    Envelope,
    Finals,
    Goodbye,
    NodeHello,
    Options,
    Progress,
    Results,
    Revoke,
    Running,
    SayHello,
    Shape,
    Submit,
    Welcome,
)  # fmt: skip
from zmqsched.sim import simulate
from zmqsched.sim.clients import SimClient
from zmqsched.sim.nodes import SimNode
from zmqsched.sim.peers import SimBroker
from zmqsched.sim.plans import FUNCTIONS, Plan
from zmqsched.sim.tally import MOST_EXECUTIONS, Tally, run_many
from zmqsched.sim.world import DELAY_S, Deliver, Way, World

SEEDS = 70  # in each part; a run takes about 0.1 s of one CPU. `make sim SEEDS=100000` runs more
PARTS = 5  # for each policy


@pytest.mark.parametrize("policy", sorted(POLICIES))
@pytest.mark.parametrize("part", range(PARTS))
def test_every_promise_holds_whatever_breaks(part, policy):
    first = SEEDS * (part + PARTS * sorted(POLICIES).index(policy))
    total = sum(run_many(range(first, first + SEEDS), policy), Tally())
    assert total.failures == ()
    assert total.seeds == SEEDS
    assert 1.0 <= total.executions_per_task < MOST_EXECUTIONS


def test_the_same_seed_makes_the_same_run():
    one, again, other = simulate(7), simulate(7), simulate(8)
    assert (one.steps, one.executions, one.now) == (again.steps, again.executions, again.now)
    assert one.steps != other.steps


def test_in_each_process():
    """What is in a set has another order in each. (Seed 20199: functions that nobody has.)"""
    said = [
        subprocess.run(
            [sys.executable, "-m", "zmqsched.sim", "--start", "20199", "--seeds", "1", "--verbose"],
            env={**os.environ, "PYTHONHASHSEED": order}, capture_output=True, timeout=60, check=True,
        ).stdout
        for order in ("1", "4")
    ]  # fmt: skip
    assert said[0] == said[1] != b""


# --- stories ---------------------------------------------------------------------------------------------------------
#
# A story is a text. A line that begins with "# " is what happens; the lines under it are what the cores then say to each
# other, as they really said it. Signs of life, acknowledgements and changes of credit are left out, and so is the join.


def attempts(of: list[Attempt]) -> str:
    return " ".join(f"{label_of(attempt.task)}#{attempt.attempt}" for attempt in of)


def said(envelope: Envelope) -> str | None:
    """A message in a few words; None for what stories leave out."""
    match envelope.body:
        case Submit(_, tasks):
            return "Submit " + " ".join(label_of(spec.task) for spec in tasks)
        case Dispatch(_, orders):
            return "Dispatch " + " ".join(f"{label_of(order.task)}#{order.attempt}" for order in orders)
        case Results(outcomes):
            return "Results " + " ".join(f"{label_of(outcome.task)}#{outcome.attempt}" for outcome in outcomes)
        case Finals(finals):
            return "Finals " + ", ".join(f"{label_of(final.task)} {final.verdict}" for final in finals)
        case Running(tasks) | Cancel(tasks) as message:
            return f"{type(message).__name__} " + " ".join(map(label_of, tasks))
        case Revoke(revoked):
            return f"Revoke {attempts(revoked)}"
        case Progress(_, started, returned, deaths):
            parts = [f"started {attempts(started)}"] * bool(started)
            parts += [f"returned {attempts(returned)}"] * bool(returned)
            parts += [f"died running {label_of(death.task)}#{death.attempt}" for death in deaths]
            return "Progress " + ", ".join(parts) if parts else None
        case NodeHello(life=life):
            return f"NodeHello life {life}"
        case Welcome(name=name):
            return f"Welcome {name}"
        case SayHello() | Draining() | Goodbye() as message:
            return type(message).__name__
        case _:
            return None


class StoryWorld(World):
    """A world whose wire keeps the order, writes down what is said, and loses what it is told to lose."""

    def __init__(self) -> None:
        super().__init__(seed=1)
        self.lines: list[str] = []
        self.loses = ""

    def send(self, envelope: Envelope, deliver: Deliver, peer: bytes, way: Way, who: str) -> None:
        words = said(envelope)
        lost = self.is_cut(peer, way)
        if words is not None and self.loses and words.startswith(self.loses):
            self.loses = ""
            lost = True
        if words is not None:
            self.lines.append(f"{re.sub('#[0-9]+', '', who)}: {words}{' (lost)' * lost}")
        if not lost:
            self.carry(envelope, deliver, DELAY_S)

    def passes(self, seconds: float) -> None:
        end = self.now + seconds
        self.at(seconds, lambda: None)
        self.run_until(end, lambda: self.now >= end)


class StoryClient(SimClient):
    def asks(self, label: str, seconds: float, ends: str, **asked: object) -> None:
        task = task_id(label)
        plan = self.plans[task] = Plan(len(self.plans), seconds, ends)
        asked_for = self.options[task] = Options(**asked)  # type: ignore[arg-type]
        digest, code = next(iter(FUNCTIONS.items()))
        self.post(Ask([Asked(task, Shape(digest, asked_for), msgspec.msgpack.encode(plan))], {digest: code}))


class Story:
    def __init__(self, nodes: int, slots: int = 1) -> None:
        self.world = StoryWorld()
        self.broker = SimBroker(self.world, Settings())
        self.nodes = {
            f"n{n}": SimNode(self.world, b"n%d" % n, self.broker, slots, {"cpu": float(slots)}, "")
            for n in range(1, nodes + 1)
        }
        self.world.passes(0.1)
        self.client = StoryClient(self.world, b"client", self.broker)
        self.world.passes(0.9)
        self.world.lines.clear()

    def happens(self, command: str) -> None:
        match command.split():
            case ["client", "asks", label, seconds]:
                self.client.asks(label, float(seconds), "value")
            case ["client", "asks", label, seconds, "that", ends]:
                self.client.asks(label, float(seconds), {"raises": "error", "kills": "death"}[ends])
            case ["client", "withdraws", label]:
                self.client.cancelled.add(task_id(label))
                self.client.post(Withdraw([task_id(label)]))
            case ["client", "dies"]:
                self.client.kill()
            case ["broker", "dies", "and", "another", "begins", seconds, "s", "later"]:
                self.broker.crash(float(seconds))
            case ["client", "freezes", "for", seconds]:
                self.client.pause(float(seconds))
            case ["broker", "freezes", "for", seconds]:
                self.broker.pause(float(seconds))
            case [node, "freezes", "for", seconds]:
                self.nodes[node].pause(float(seconds))
            case [node, "dies"]:
                self.nodes[node].kill()
            case [node, "is", "told", "to", "leave"]:
                self.nodes[node].drain("SIGTERM")
            case [node, "is", "not", "heard", "for", seconds]:
                self.world.cut(self.nodes[node].name, "up", float(seconds))
            case [node, "hears", "nothing", "for", seconds]:
                self.world.cut(self.nodes[node].name, "down", float(seconds))
            case ["the", "wire", "loses", "the", "next", kind]:
                self.world.loses = kind
            case [seconds, "s", "pass"]:
                self.world.passes(float(seconds))
            case ["the", "broker", "counted", *words]:
                self.world.lines.append(f"{self.broker.core.counts[' '.join(words)]}")
            case _:
                raise AssertionError(f"what is {command!r}?")

    def told(self, text: str) -> str:
        """The story again, with what was really said."""
        out = []
        for line in text.strip().splitlines():
            if line.strip().startswith("# "):
                out.append(line.strip())
                self.happens(line.strip().removeprefix("# "))
                self.world.passes(0.01)
                out += [f"  {said}" for said in self.world.lines]
                self.world.lines.clear()
        return "\n".join(out)


def check(story: Story, text: str) -> None:
    wanted = "\n".join("  " * (not line.strip().startswith("#")) + line.strip() for line in text.strip().splitlines())
    assert story.told(text) == wanted


def test_a_node_freezes_its_task_runs_elsewhere_it_thaws_its_late_result_is_dropped():
    check(
        Story(nodes=2),
        """
        # client asks a 3
          client > broker: Submit a
          broker > n1: Dispatch a#1
        # 1 s pass
          n1 > broker: Progress started a#1
          broker > client: Running a
        # n1 freezes for 9
        # 2 s pass
        # 2 s pass
          broker > n2: Dispatch a#2
          n2 > broker: Progress started a#2
          broker > client: Running a
        # 4 s pass
          n2 > broker: Results a#2
          broker > client: Finals a ok
        # 3 s pass
          n1 > broker: Results a#1
          broker > n1: SayHello
          broker > n1: SayHello
          broker > n1: SayHello
          broker > n1: SayHello
          n1 > broker: NodeHello life 2
          broker > n1: Welcome n3
          n1 > broker: Results a#1
        # the broker counted zombie results
          1
        """,
    )


def test_a_frozen_node_is_the_first_to_finish_and_its_late_result_is_taken():
    check(
        Story(nodes=2),
        """
        # client asks a 20
          client > broker: Submit a
          broker > n1: Dispatch a#1
        # 1 s pass
          n1 > broker: Progress started a#1
          broker > client: Running a
        # n1 freezes for 6
        # 5 s pass
          broker > n2: Dispatch a#2
          n2 > broker: Progress started a#2
          broker > client: Running a
        # 2 s pass
          broker > n1: SayHello
          broker > n1: SayHello
          n1 > broker: NodeHello life 2
          broker > n1: Welcome n3
        # 14 s pass
          n1 > broker: Results a#1
          broker > client: Finals a ok
          broker > n2: Revoke a#2
        # 4 s pass
          n2 > broker: Results a#2
        """,
    )


def test_a_node_dies_and_its_task_runs_elsewhere():
    check(
        Story(nodes=2),
        """
        # client asks a 1
          client > broker: Submit a
          broker > n1: Dispatch a#1
        # n1 dies
        # 3 s pass
        # 2 s pass
          broker > n2: Dispatch a#2
          n2 > broker: Progress started a#2
          broker > client: Running a
          n2 > broker: Results a#2
          broker > client: Finals a ok
        """,
    )


def test_a_task_that_kills_its_workers_is_given_up_and_the_one_behind_it_is_untouched():
    check(
        Story(nodes=1),
        """
        # client asks killer 0.2 that kills
          client > broker: Submit killer
          broker > n1: Dispatch killer#1
        # client asks behind 0.1
          client > broker: Submit behind
        # 1 s pass
          n1 > broker: Progress started killer#1
          broker > client: Running killer
          n1 > broker: Progress died running killer#1
          broker > n1: Dispatch killer#2
          n1 > broker: Progress started killer#2
          broker > client: Running killer
          n1 > broker: Progress died running killer#2
          broker > n1: Dispatch killer#3
          n1 > broker: Progress started killer#3
          broker > client: Running killer
          n1 > broker: Progress died running killer#3
          broker > client: Finals killer WorkerDied
          broker > n1: Dispatch behind#1
          n1 > broker: Progress started behind#1
          broker > client: Running behind
          n1 > broker: Results behind#1
          broker > client: Finals behind ok
        # the broker counted worker deaths
          3
        """,
    )


def test_a_node_is_drained_and_nothing_is_done_twice():
    check(
        Story(nodes=2),
        """
        # client asks a 1
          client > broker: Submit a
          broker > n1: Dispatch a#1
        # client asks b 1
          client > broker: Submit b
          broker > n2: Dispatch b#1
        # client asks c 1
          client > broker: Submit c
        # n1 is told to leave
          n1 > broker: Draining
        # 1.5 s pass
          n1 > broker: Progress started a#1
          broker > client: Running a
          n2 > broker: Progress started b#1
          broker > client: Running b
          n1 > broker: Results a#1
          broker > client: Finals a ok
          n1 > broker: Goodbye
          n2 > broker: Results b#1
          broker > client: Finals b ok
          broker > n2: Dispatch c#1
          n2 > broker: Progress started c#1
          broker > client: Running c
        # 1 s pass
          n2 > broker: Results c#1
          broker > client: Finals c ok
        # the broker counted requeued: node lost
          0
        """,
    )


def test_answers_that_are_lost_on_the_way_are_given_again():
    check(
        Story(nodes=1),
        """
        # client asks a 0.01
          client > broker: Submit a
          broker > n1: Dispatch a#1
        # the wire loses the next Results
          n1 > broker: Results a#1 (lost)
        # 0.5 s pass
        # 1 s pass
          n1 > broker: Results a#1
          broker > client: Finals a ok
        # client asks b 0.01
          client > broker: Submit b
          broker > n1: Dispatch b#1
        # the wire loses the next Finals
          n1 > broker: Results b#1
          broker > client: Finals b ok (lost)
        # 0.5 s pass
        # 1 s pass
          broker > client: Finals b ok
        """,
    )


def test_what_waits_is_cancelled_at_once_and_what_runs_has_its_answer():
    check(
        Story(nodes=1),
        """
        # client asks a 2
          client > broker: Submit a
          broker > n1: Dispatch a#1
        # client asks b 2
          client > broker: Submit b
        # 0.5 s pass
          n1 > broker: Progress started a#1
          broker > client: Running a
        # client withdraws b
          client > broker: Cancel b
          broker > client: Finals b cancelled
        # client withdraws a
          client > broker: Cancel a
          broker > n1: Revoke a#1
        # 2 s pass
          n1 > broker: Results a#1
          broker > client: Finals a ok
        """,
    )


def test_the_broker_is_stopped_for_half_a_minute_and_nobody_is_blamed_for_it():
    check(
        Story(nodes=2),
        """
        # client asks a 5
          client > broker: Submit a
          broker > n1: Dispatch a#1
        # 1 s pass
          n1 > broker: Progress started a#1
          broker > client: Running a
        # broker freezes for 30
        # 29 s pass
          n1 > broker: Results a#1
        # 2 s pass
          broker > client: Finals a ok
        # the broker counted own absences
          1
        """,
    )


def test_a_drained_node_does_not_leave_before_its_last_result_has_arrived():
    """A link repairs what a broken connection lost, as long as both ends are there."""
    told = Story(nodes=2).told(
        """
        # client asks a 1
        # n1 is told to leave
        # the wire loses the next Results
        # 2 s pass
        # 3 s pass
        """
    )
    assert "Results a#1 (lost)" in told
    assert "Dispatch a#2" not in told, told
    assert "Finals a ok" in told


def test_a_node_that_is_not_heard_loses_its_task_and_its_own_answer_is_as_good():
    check(
        Story(nodes=2),
        """
        # client asks a 10
          client > broker: Submit a
          broker > n1: Dispatch a#1
        # client asks b 1
          client > broker: Submit b
          broker > n2: Dispatch b#1
        # 1 s pass
          n1 > broker: Progress started a#1
          broker > client: Running a
          n2 > broker: Progress started b#1
          broker > client: Running b
          n2 > broker: Results b#1
          broker > client: Finals b ok
        # n1 is not heard for 9
        # 6 s pass
          broker > n2: Dispatch a#2
          n2 > broker: Progress started a#2
          broker > client: Running a
        # 4 s pass
          n1 > broker: Results a#1 (lost)
          broker > n1: SayHello
          broker > n1: SayHello
          n1 > broker: NodeHello life 2
          broker > n1: Welcome n3
          n1 > broker: Results a#1
          broker > client: Finals a ok
          broker > n2: Revoke a#2
        # 10 s pass
          n2 > broker: Results a#2
        """,
    )


def test_a_node_that_hears_nothing_is_still_heard_and_keeps_its_task():
    check(
        Story(nodes=2),
        """
        # client asks a 6
          client > broker: Submit a
          broker > n1: Dispatch a#1
        # 1 s pass
          n1 > broker: Progress started a#1
          broker > client: Running a
        # n1 hears nothing for 8
        # client asks b 0.1
          client > broker: Submit b
          broker > n2: Dispatch b#1
        # 6 s pass
          n2 > broker: Progress started b#1
          broker > client: Running b
          n2 > broker: Results b#1
          broker > client: Finals b ok
          n1 > broker: Results a#1
          broker > client: Finals a ok
        # 4 s pass
        """,
    )


def test_another_broker_follows_a_dead_one_and_the_same_futures_are_answered():
    check(
        Story(nodes=1),
        """
        # client asks a 3
          client > broker: Submit a
          broker > n1: Dispatch a#1
        # client asks b 0.1
          client > broker: Submit b
        # 1 s pass
          n1 > broker: Progress started a#1
          broker > client: Running a
        # broker dies and another begins 1 s later
        # 1.5 s pass
          broker > n1: SayHello
          n1 > broker: NodeHello life 2
          broker > n1: Welcome n1
          broker > client: SayHello
          broker > client: Welcome cluster
          client > broker: Submit a b
          broker > client: Running a
        # 3 s pass
          n1 > broker: Results a#1
          broker > client: Finals a ok
          broker > n1: Dispatch b#1
          n1 > broker: Progress started b#1
          broker > client: Running b
          n1 > broker: Results b#1
          broker > client: Finals b ok
        """,
    )


def test_a_worker_dies_before_the_client_tells_another_broker_what_it_was_running():
    check(
        Story(nodes=1),
        """
        # client asks a 3 that kills
          client > broker: Submit a
          broker > n1: Dispatch a#1
        # 1 s pass
          n1 > broker: Progress started a#1
          broker > client: Running a
        # client freezes for 4
        # broker dies and another begins 0.1 s later
        # 3 s pass
          broker > n1: SayHello
          n1 > broker: NodeHello life 2
          broker > n1: Welcome n1
          n1 > broker: Progress died running a#1
        # 2 s pass
          broker > client: SayHello
          broker > client: Welcome cluster
          client > broker: Submit a
          broker > n1: Dispatch a#1
          n1 > broker: Progress started a#1
          broker > client: Running a
        # 4 s pass
          n1 > broker: Progress died running a#1
          broker > n1: Dispatch a#2
          n1 > broker: Progress started a#2
          broker > client: Running a
        """,
    )


def test_a_worker_dies_while_its_node_has_no_session_and_the_next_broker_hears_of_it():
    check(
        Story(nodes=1),
        """
        # client asks a 3.5 that kills
          client > broker: Submit a
          broker > n1: Dispatch a#1
        # 2 s pass
          n1 > broker: Progress started a#1
          broker > client: Running a
        # client freezes for 4
        # the wire loses the next Welcome
        # broker dies and another begins 0.1 s later
        # 3 s pass
          broker > n1: SayHello
          n1 > broker: NodeHello life 2
          broker > n1: Welcome n1 (lost)
          n1 > broker: NodeHello life 2
          broker > n1: Welcome n1
          n1 > broker: Progress died running a#1
        # 3 s pass
          broker > client: SayHello
          broker > client: Welcome cluster
          client > broker: Submit a
          broker > n1: Dispatch a#1
          n1 > broker: Progress started a#1
          broker > client: Running a
        """,
    )


def test_a_client_dies_and_its_tasks_with_it():
    check(
        Story(nodes=1),
        """
        # client asks a 100
          client > broker: Submit a
          broker > n1: Dispatch a#1
        # client asks b 100
          client > broker: Submit b
        # 1 s pass
          n1 > broker: Progress started a#1
          broker > client: Running a
        # client dies
        # 60 s pass
          broker > n1: Revoke a#1
        # 2 s pass
        # 38 s pass
        """,
    )


@pytest.mark.parametrize("word", ["is", "asks", "freezes"])
def test_a_story_with_a_word_that_nobody_knows_is_an_error(word):
    with pytest.raises(AssertionError, match=f"what is 'n1 {word} nonsense'"):
        Story(nodes=1).told(f"# n1 {word} nonsense")
