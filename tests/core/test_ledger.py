"""What waits for which commit, and when the journal is written anew."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zmqsched.core.groups import Waiter
from zmqsched.core.ledger import GROWTH, IDLE_BYTES, SLACK_BYTES, Answered, Counted, Ledger
from zmqsched.protocol import MAX_ITEMS, Final, Finals, Forgotten, Left, Present, RecordMessage

NOTHING: tuple[dict[int, int], list[object]] = ({}, [])


def final(label: str) -> Final:
    return Final(label.encode().rjust(16, b"_"), "ok", b"value")


def bodies(records: Iterable[object]) -> list[RecordMessage]:
    return [record.body for record in records]  # type: ignore[attr-defined]


def test_without_anything_to_write_nothing_waits():
    ledger = Ledger()
    ledger.received(1, 7)
    waiter = Counted(Waiter(1, 1), "")
    ledger.then(waiter)
    assert ledger.commit() is None
    assert not ledger.busy
    assert ledger.due() == ({1: 7}, [waiter])
    assert ledger.due() == NOTHING


def test_what_was_received_waits_for_the_commit_of_its_turn():
    ledger = Ledger()
    ledger.received(1, 7)
    ledger.record(b"", Present([]))
    write = ledger.commit()
    assert write is not None
    assert (write.number, write.anew) == (1, False)
    assert ledger.busy
    assert ledger.due() == NOTHING
    assert ledger.written(1, 100) == ({1: 7}, [])
    assert not ledger.busy


def test_what_is_received_while_a_commit_is_under_way_waits_for_it():
    """What it means may follow from what that commit holds."""
    ledger = Ledger()
    ledger.record(b"", Present([]))
    ledger.commit()
    ledger.received(1, 8)
    assert ledger.commit() is None
    assert ledger.due() == NOTHING
    assert ledger.written(1, 100) == ({1: 8}, [])


def test_commits_are_over_in_order_and_one_word_may_stand_for_several():
    ledger = Ledger()
    for number in (1, 2, 3):
        ledger.received(1, number)
        ledger.answer(b"c", final(str(number)))
        ledger.commit()
    received, consequences = ledger.written(2, 100)
    assert received == {1: 2}
    assert consequences == [Answered(b"c", final("1")), Answered(b"c", final("2"))]
    assert ledger.written(3, 100) == ({1: 3}, [Answered(b"c", final("3"))])


def test_what_is_forgotten_waits_for_a_reason_to_write():
    ledger = Ledger()
    ledger.forget(b"a")
    assert ledger.commit() is None
    assert not ledger.busy
    write = ledger.commit(hurry=True)
    assert write is not None
    assert bodies(write.records) == [Forgotten([b"a"])]
    assert ledger.commit(hurry=True) is None


def test_what_is_forgotten_is_so_before_all_else_of_its_commit():
    """The same task may be submitted anew in the same turn."""
    ledger = Ledger()
    ledger.forget(b"a")
    ledger.record(b"c", Present([]))
    ledger.answer(b"c", final("x"))
    write = ledger.commit()
    assert write is not None
    assert [type(body) for body in bodies(write.records)] == [Forgotten, Present, Finals]


def test_very_many_that_are_forgotten_fit_their_records():
    ledger = Ledger()
    for number in range(2 * MAX_ITEMS + 1):
        ledger.forget(number.to_bytes(16, "big"))
    write = ledger.commit(hurry=True)
    assert write is not None
    assert [len(body.tasks) for body in bodies(write.records)] == [MAX_ITEMS, MAX_ITEMS, 1]  # type: ignore[union-attr]


def test_an_owner_that_leaves_takes_the_answers_of_its_turn_along():
    ledger = Ledger()
    ledger.answer(b"ann", final("a"))
    ledger.answer(b"ben", final("b"))
    ledger.leave(b"ann")
    write = ledger.commit()
    assert write is not None
    assert [(record.owner, type(record.body)) for record in write.records] == [(b"ann", Left), (b"ben", Finals)]


@pytest.mark.parametrize(
    ("base", "idle", "limit"), [(0, False, SLACK_BYTES), (0, True, IDLE_BYTES), (10**6, True, IDLE_BYTES)]
)
def test_it_is_written_anew_when_it_has_grown(base, idle, limit):
    ledger = grown(base)
    at = base + limit + (GROWTH * base if not idle else 0)
    wrote(ledger, at)
    assert not ledger.has_outgrown(idle=idle)
    wrote(ledger, at + 1)
    assert ledger.has_outgrown(idle=idle)
    write = ledger.replace([])
    assert write.anew
    assert not ledger.has_outgrown(idle=idle), "it is under way"
    ledger.written(write.number, 5)
    assert not ledger.has_outgrown(idle=idle)


def test_how_large_it_is_when_written_anew_is_what_it_is_measured_by_next():
    ledger = grown(10**9)
    wrote(ledger, 10**9 + SLACK_BYTES + GROWTH * 10**9)
    assert not ledger.has_outgrown(idle=False)


def test_what_waited_waits_for_the_journal_written_anew_too():
    ledger = Ledger()
    ledger.received(1, 7)
    assert ledger.commit() is None
    write = ledger.replace([])
    assert ledger.due() == NOTHING
    assert ledger.written(write.number, 5) == ({1: 7}, [])


def grown(base: int) -> Ledger:
    """A ledger whose journal was of that size when it was last written anew."""
    ledger = Ledger()
    ledger.written(ledger.replace([]).number, base)
    return ledger


def wrote(ledger: Ledger, size: int) -> None:
    ledger.record(b"", Present([]))
    write = ledger.commit()
    assert write is not None
    ledger.written(write.number, size)


@given(st.lists(st.sampled_from(["receive", "record", "answer", "commit", "write", "anew"]), max_size=60))
def test_nothing_comes_out_before_what_was_recorded_before_it(steps):
    ledger = Ledger()
    number = recorded = written = 0
    under_way: list[tuple[int, int]] = []
    then: dict[int, int] = {}  # what must be on disk before this number is secured

    def out(received: dict[int, int], consequences: list[object]) -> None:
        for secured in received.values():
            assert written >= then[secured]
        for consequence in consequences:
            assert written >= int(consequence.final.text)  # type: ignore[attr-defined]

    for step in steps:
        if step == "receive":
            number += 1
            recorded += 1
            ledger.received(1, number)
            ledger.record(b"", Present([]))
            then[number] = recorded
        elif step == "record":
            recorded += 1
            ledger.record(b"", Present([]))
        elif step == "answer":
            recorded += 1
            ledger.answer(b"c", Final(bytes(16), "ok", b"", str(recorded)))
        elif step == "write" and under_way:
            commit, written = under_way.pop(0)
            out(*ledger.written(commit, 1))  # type: ignore[arg-type]
        else:
            write = ledger.replace([]) if step == "anew" and not ledger.busy else ledger.commit()
            if write is not None:
                under_way.append((write.number, recorded))
            out(*ledger.due())  # type: ignore[arg-type]
