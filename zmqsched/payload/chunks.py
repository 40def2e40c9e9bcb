"""Several items of a map as one task: what the worker does with them, and how the outcome is packed and read.

Rules
-----
* Each item runs in a ``try`` of its own: what one raises, or returns and cannot be pickled, disturbs no other.
* A chunk ends when its time is used up, when its results are large, and at an interrupt: what it has not begun is given
  back.
* Values that plain pickle can always read stand for themselves in the outcome; each other is packed by itself, so that one
  that cannot be read is one failure.
"""

from __future__ import annotations

import math
import os
import pickle
from collections.abc import Sequence
from time import perf_counter
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from ..protocol import Payload, payload_bytes
from .calls import pack_value, unpack_call, unpack_value
from .exceptions import pack_exception
from .pickling import enclosed, pack, unpack
from .wrappers import Wrapper

if TYPE_CHECKING:
    import numpy as np

RESULT_BYTES = 8 * 1024 * 1024
_SHORT = 256  # characters of a text that stands for itself

# A payload inside another: its buffers stay apart from the stream there too.
Enclosed: TypeAlias = "bytes | tuple[Any, ...]"
# Entropy and spawn key of a numpy SeedSequence.
Seed: TypeAlias = tuple[Any, tuple[int, ...]]


class How(NamedTuple):
    """What comes with the items: plain values, that a call which needs no modules does not look as if it did.

    ``alone``: one item, which is an argument itself, and whose exception is the task's. ``numbers``: the items' indices in
    the map; if they are ``counted``, the first and how many. ``spread``: each item is a tuple of arguments. ``kinds``:
    packed types of the exceptions that are retried; empty: any.
    """

    alone: bool
    counted: bool
    numbers: tuple[int, ...]
    spread: bool
    budget_s: float
    seed: Seed | None
    kinds: bytes

    @property
    def indices(self) -> Sequence[int]:
        return range(self.numbers[0], sum(self.numbers)) if self.counted else self.numbers


class Failure(NamedTuple):
    """The item at ``offset`` raised. ``error``: by ``pack_exception``."""

    offset: int
    error: bytes
    retry: bool


class Outcome(NamedTuple):
    """``entries``: one for each item that was ``begun`` (:func:`entries_of`). ``plain``: each is the value itself."""

    entries: Enclosed
    failures: list[Failure]
    begun: int
    seconds: float
    plain: bool


class Chunk(Wrapper):
    """Calls a function for items of a map, as one task: for several, packed as the arguments of a call, or for one."""

    __slots__ = ()

    def __call__(self, items: Any, *how: Any) -> Outcome:
        began = perf_counter()
        told = How(*how)
        if not told.alone:
            return self._run(unpack_call(opened(items))[0], told, began)
        entry = as_entry(self._call(items, told.indices[0], told))
        return Outcome(enclosed(pack([entry])), [], 1, perf_counter() - began, is_plain(entry))

    def _run(self, items: Sequence[Any], how: How, began: float) -> Outcome:
        fn, arguments, forked = self.fn, iter(items), _forked
        if how.spread or how.seed is not None:
            fn, arguments = lambda each: self._call(each[0], each[1], how), zip(items, how.indices, strict=True)
        limited, until = how.budget_s < math.inf, began + how.budget_s  # to look at the clock costs more than a short item
        forked.clear()
        entries: list[Any] = []
        failures: list[Failure] = []
        room = RESULT_BYTES
        for each in arguments:
            try:
                value = fn(each)
                if type(value) not in _TINY:
                    value = as_entry(value)
                    room -= _bytes(value)
                entries.append(value)
            except BaseException as error:  # noqa: BLE001 - whatever an item raises is its answer
                failures.append(Failure(len(entries), pack_error(error), _may_retry(error, how.kinds)))
                entries.append(None)
                room -= len(failures[-1].error)
                if isinstance(error, KeyboardInterrupt):  # the task is to end
                    break
            if forked:  # a child that the item forked came back from it; there must be one answer
                os._exit(0)
            if room < 0 or (limited and perf_counter() >= until):
                break
        plain = room == RESULT_BYTES  # what does not stand for itself takes some of it
        return Outcome(enclosed(pack(entries)), failures, len(entries), perf_counter() - began, plain)

    def _call(self, item: Any, number: int, how: How) -> Any:
        keywords = {} if how.seed is None else {"rng": generator(how.seed, number)}
        return self.fn(*item, **keywords) if how.spread else self.fn(item, **keywords)


# Not empty in a process that was forked since the chunk began; asking for the process's id costs more than a short item.
_forked: list[bool] = []
os.register_at_fork(after_in_child=lambda: _forked.append(True))


def generator(seed: Seed, number: int) -> np.random.Generator:
    """The random numbers of one item of a map."""
    from numpy.random import SeedSequence, default_rng

    entropy, key = seed
    return default_rng(SeedSequence(entropy, spawn_key=(*key, number)))


def opened(part: Enclosed) -> Payload:
    return part if isinstance(part, bytes) else list(part)


# --- entries ---------------------------------------------------------------------------------------------------------

_TINY = frozenset({int, float, bool, type(None)})
_PACKED = frozenset({bytes, tuple})


def as_entry(value: Any) -> Any:
    """What stands for a value in the list of a chunk's results.

    Raises
    ------
    ResultNotSerializable, PayloadTooLarge
    """
    if type(value) in _TINY or (type(value) is str and len(value) <= _SHORT):
        return value
    return enclosed(pack_value(value))


def entries_of(part: Enclosed) -> list[Any]:
    """The entries of an outcome: each the value itself, or what :func:`value_of` reads."""
    entries: list[Any] = unpack(opened(part))
    return entries


def is_plain(entry: Any) -> bool:
    """This entry is the value itself."""
    return type(entry) not in _PACKED


def value_of(entry: Any) -> Any:
    """The value that an entry stands for.

    Raises
    ------
    ResultDecodeError
    """
    return entry if is_plain(entry) else unpack_value(opened(entry))


def _bytes(entry: Any) -> int:
    return 0 if is_plain(entry) else payload_bytes(opened(entry))


# --- errors ----------------------------------------------------------------------------------------------------------


def pack_error(error: BaseException) -> bytes:
    packed = pack_exception(error)
    return packed if isinstance(packed, bytes) else b"".join(packed)


def _may_retry(error: BaseException, kinds: bytes) -> bool:
    # As ``except`` does it, which asks no __instancecheck__: that is the user's and may raise.
    return not kinds or any(kind in pickle.loads(kinds) for kind in type(error).__mro__)
