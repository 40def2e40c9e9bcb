"""The shelf: what is put down comes back, in memory or not, and nothing stays when it is dropped."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import zmqsched.shelf
from zmqsched.shelf import Shelf

parts = st.one_of(
    st.binary(max_size=3000),
    st.lists(st.binary(max_size=2000), min_size=2, max_size=4).map(lambda all_of: (all_of[0], *map(memoryview, all_of[1:]))),
)


def files() -> list[str]:
    """Open files without a name."""
    found = []
    for entry in Path("/proc/self/fd").iterdir():
        if entry.exists() or entry.is_symlink():
            target = os.readlink(entry) if os.path.lexists(entry) else ""
            if "zmqsched-" in target or "(deleted)" in target:
                found.append(target)
    return found


def read(part: object) -> list[bytes]:
    return [bytes(part)] if isinstance(part, bytes) else [bytes(one) for one in part]


@given(items=st.lists(st.tuples(parts, st.booleans()), max_size=40), memory=st.sampled_from([0, 2000, 10**6]))
def test_what_is_put_down_is_there_until_it_is_dropped(items, memory):
    shelf, kept = Shelf(memory), []
    for part, keep in items:
        piece = shelf.put(part)
        if keep:
            kept.append((part, piece))
        else:
            shelf.drop(piece)
            with pytest.raises(LookupError):
                shelf.look(piece)
    for part, piece in kept:
        assert read(shelf.look(piece)) == read(part)
        shelf.drop(piece)
    assert shelf.size == 0


def test_memory_is_bounded_and_files_go_with_their_last_piece(monkeypatch):
    monkeypatch.setattr(zmqsched.shelf, "FILE_BYTES", 3000)
    before = files()
    shelf = Shelf(memory=5000)
    pieces = [shelf.put(bytes([number]) * 1000) for number in range(12)]
    assert sum(piece.part is not None for piece in pieces) == 3
    assert len(files()) - len(before) == 3
    for piece in pieces[:6]:
        shelf.drop(piece)
    assert len(files()) - len(before) == 2
    assert [shelf.look(piece)[0] for piece in pieces[6:]] == [6, 7, 8, 9, 10, 11]
    assert shelf.put(b"there is room again").part is not None
    for piece in pieces[6:]:
        shelf.drop(piece)
    del shelf
    assert files() == before


def test_a_piece_goes_with_its_last_user():
    shelf = Shelf()
    piece = shelf.put(b"x")
    piece.users += 1
    shelf.drop(piece)
    assert shelf.look(piece) == b"x"
    shelf.drop(piece)
    assert shelf.size == 0


def test_without_room_for_files_everything_stays_in_memory(monkeypatch):
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    shelf = Shelf(memory=0)
    piece = shelf.put(b"x" * 1000)
    assert shelf.look(piece) == b"x" * 1000
