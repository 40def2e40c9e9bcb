"""The store of functions: what is needed stays, what is not goes when it must, the longest unused first."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from zmqsched.core.functions import FunctionStore

CAP = 100
Digest = st.sampled_from([b"a", b"b", b"c", b"d", b"e"])


class AgainstAList(RuleBasedStateMachine):
    """``kept`` is in order of use, the longest unused first."""

    def __init__(self) -> None:
        super().__init__()
        self.store = FunctionStore(CAP)
        self.kept: list[tuple[bytes, int]] = []
        self.held: list[bytes] = []

    def evict(self) -> None:
        for entry in list(self.kept):
            if sum(size for _, size in self.kept) <= CAP:
                return
            if entry[0] not in self.held:
                self.kept.remove(entry)

    @rule(digest=Digest, size=st.integers(1, 60))
    def add(self, digest: bytes, size: int) -> None:
        self.store.add(digest, bytes(size))
        if digest not in dict(self.kept):
            self.kept.append((digest, size))
            self.evict()

    @rule(digest=Digest)
    def hold(self, digest: bytes) -> None:
        self.store.hold(digest)
        self.held.append(digest)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        digest = data.draw(st.sampled_from(sorted(self.held)))
        self.store.release(digest)
        self.held.remove(digest)
        if digest not in self.held:
            self.evict()

    @precondition(lambda self: self.kept)
    @rule(data=st.data())
    def use(self, data: st.DataObject) -> None:
        digest, size = entry = data.draw(st.sampled_from(sorted(self.kept)))
        assert self.store[digest] == bytes(size)
        self.kept.remove(entry)
        self.kept.append(entry)

    @invariant()
    def the_same(self) -> None:
        assert {digest for digest in (b"a", b"b", b"c", b"d", b"e") if digest in self.store} == dict(self.kept).keys()
        assert self.store.bytes == sum(size for _, size in self.kept)
        assert self.store.held() == {digest: self.held.count(digest) for digest in self.held}


TestAgainstAList = AgainstAList.TestCase
TestAgainstAList.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)


def test_what_tasks_need_stays_even_over_the_cap():
    store = FunctionStore(10)
    store.hold(b"needed")
    store.add(b"needed", bytes(50))
    store.add(b"idle", bytes(5))
    assert b"needed" in store
    assert b"idle" not in store
    store.release(b"needed")
    assert b"needed" not in store


def test_a_payload_of_several_buffers_counts_whole():
    store = FunctionStore()
    store.add(b"a", [b"12", memoryview(b"345")])
    assert store.bytes == 5


def test_what_is_not_there_is_a_key_error():
    with pytest.raises(KeyError):
        FunctionStore()[b"a"]
