"""Whatever a user hands in comes out alike on the other side."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import WORKER_SIDE, ExplodesLater, run_as_main, there_and_back

from zmqsched.errors import PayloadTooLarge, RemoteError, ResultDecodeError
from zmqsched.payload import (
    OUT_OF_BAND,
    FunctionPickler,
    pack_call,
    pack_value,
    unpack_call,
    unpack_exception,
    unpack_value,
)
from zmqsched.payload.pickling import MAX_BUFFERS

plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner) | st.tuples(inner, inner),
    max_leaves=8,
)


@settings(max_examples=30, deadline=None)
@given(st.lists(plain), st.dictionaries(st.text(), plain))
def test_plain_arguments_arrive_equal(args, kwargs):
    assert unpack_call(pack_call(tuple(args), kwargs)) == (tuple(args), kwargs)


def test_small_payloads_are_bytes():
    assert type(pack_call((1, "x"), {"y": np.arange(10)})) is bytes


def test_text_that_mentions_main_is_just_text():
    assert there_and_back(["__main__", b"__main__", pickle.dumps("__main__", 5)])[0] == "__main__"


@pytest.mark.parametrize("make", [np.arange, lambda n: bytearray(8 * n)])
def test_large_buffers_travel_out_of_band_without_a_copy(make):
    big = make(OUT_OF_BAND)
    packed = pack_call((pickle.PickleBuffer(big) if isinstance(big, bytearray) else big,), {})
    assert isinstance(packed, list)
    assert len(packed[0]) < 1_000
    assert np.shares_memory(np.frombuffer(packed[1], "u1"), np.frombuffer(big, "u1"))


def test_small_buffers_stay_in_band():
    assert type(pack_value(np.zeros(OUT_OF_BAND - 1, "u1"))) is bytes
    assert type(pack_value(np.zeros(OUT_OF_BAND, "u1"))) is list


@pytest.mark.parametrize(
    "array",
    [
        np.arange(100_000).reshape(100, 1000),
        np.arange(100_000).reshape(100, 1000)[::2, ::3],
        np.asfortranarray(np.arange(100_000.0).reshape(100, 1000)),
        np.arange(100_000)[::-1],
        np.zeros((0, 5)),
        np.array(["a", None, {"b": 1}], dtype=object),
    ],
    ids=["contiguous", "strided", "fortran", "reversed", "empty", "objects"],
)
def test_arrays_of_every_layout_arrive_equal_and_writable(array):
    back = there_and_back(array)
    assert np.array_equal(back, array)
    assert back.flags.writeable


def test_an_array_on_a_read_only_frame_is_writable_if_it_was():
    stream, *buffers = pack_value(np.zeros(100_000))
    back = unpack_value([bytes(stream), *map(bytes, buffers)])
    back[0] = 1
    assert back.flags.writeable


def test_more_buffers_than_a_message_has_frames_still_travel():
    arrays = [np.full(OUT_OF_BAND, number % 256, "u1") for number in range(MAX_BUFFERS + 5)]
    packed = pack_value(arrays)
    assert len(packed) == MAX_BUFFERS + 1
    assert all(np.array_equal(ours, theirs) for ours, theirs in zip(arrays, unpack_value(packed), strict=True))


def test_lambdas_and_local_classes_are_arguments():
    class Local:
        x = 3

    (fn, cls), _ = unpack_call(pack_call((lambda value: value + 1, Local), {}))
    assert fn(1) == 2
    assert cls.x == 3


def test_a_retry_by_cloudpickle_does_not_double_the_buffers():
    packed = pack_call((np.zeros(100_000), lambda: 1), {})
    assert len(packed) == 2
    assert np.array_equal(unpack_call(packed)[0][0], np.zeros(100_000))


def test_sizes_are_checked(monkeypatch):
    monkeypatch.setattr("zmqsched.payload.pickling.MAX_PAYLOAD", 100_000)
    with pytest.raises(PayloadTooLarge, match=r"the arguments.* 200,0\d\d bytes .*100,000.*pass the path"):
        pack_call((b"x" * 200_000,), {})
    with pytest.raises(PayloadTooLarge, match="returned"):
        pack_value(np.zeros(100_000))
    with pytest.raises(PayloadTooLarge, match="function `<lambda>`"):
        FunctionPickler().pack(lambda text="x" * 200_000: text)


def test_classes_and_functions_of_main_travel_by_value_and_come_home_as_themselves():
    printed = run_as_main(
        WORKER_SIDE
        + """
import collections, dataclasses, enum, traceback

@dataclasses.dataclass
class Point:
    x: int
    made = 0

class Color(enum.Enum):
    RED = 1

Pair = collections.namedtuple("Pair", "left right")

class Oops(Exception):
    def __init__(self, code):
        super().__init__(code)
        self.code = code

def move(point, color, pair=None):
    assert color is Color.RED
    Point.made += 100
    return Point(point.x + 1), color, pair, [Point]

def fail():
    raise Oops(7)

Point.made = 1
point, color, pair, classes = remote(move, Point(1), Color.RED, pair=Pair(1, 2))
assert type(point) is Point and point == Point(2)
assert color is Color.RED
assert type(pair) is Pair
assert classes == [Point]
assert Point.made == 1, "the client's class stays as the client left it"
try:
    remote(fail)
except Oops as error:
    assert type(error) is Oops and error.code == 7
    assert traceback.extract_tb(error.__traceback__)[-1].name == "fail"
    print("fine")
"""
    )
    assert printed == "fine"


def test_a_class_made_in_a_task_comes_back_whole():
    printed = run_as_main(
        WORKER_SIDE
        + """
def make():
    class New:
        def hello(self):
            return "hello"
    return New()

print(remote(make).hello())
"""
    )
    assert printed == "hello"


def test_a_class_of_main_that_changed_is_sent_as_it_is_now():
    printed = run_as_main(
        WORKER_SIDE
        + """
class Model:
    scale = 1

def scaled(model):
    return model.scale

first = remote(scaled, Model())
Model.scale = 2
print(first, remote(scaled, Model()))
"""
    )
    assert printed == "1 2"


def test_the_standard_streams_are_those_of_the_other_side():
    printed = run_as_main(
        WORKER_SIDE
        + """
def says(stream):
    import sys
    return stream is sys.stderr

print(remote(says, sys.stderr))
"""
    )
    assert printed == "True"


def test_a_result_that_explodes_on_arrival_is_a_decode_error():
    with pytest.raises(ResultDecodeError, match="SystemExit: 3") as caught:
        unpack_value(pack_value(ExplodesLater()))
    assert isinstance(caught.value.__cause__, SystemExit)


@pytest.mark.parametrize("damaged", [b"", b"\x80\x05", b"not a pickle", [b"\x80\x05\x97."]])
def test_damaged_results_are_decode_errors(damaged):
    with pytest.raises(ResultDecodeError):
        unpack_value(damaged)
    assert isinstance(unpack_exception(damaged), RemoteError)
