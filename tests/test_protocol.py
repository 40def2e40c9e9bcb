"""The wire: what is encoded comes out the same, what is not of this protocol is refused, and neither costs much."""

from __future__ import annotations

import gc
import struct
import tracemalloc
import typing
import weakref
from collections.abc import Callable
from types import UnionType
from typing import Annotated, Any, Literal, get_args, get_origin

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from zmqsched import codec, protocol
from zmqsched.codec import decode, decode_pipe, decode_record, encode, encode_pipe, encode_record
from zmqsched.errors import ProtocolError, VersionMismatch
from zmqsched.protocol import (
    BATCH_BYTES,
    BATCH_ITEMS,
    INLINE_MAX,
    MAJOR,
    MAX_FRAMES,
    MAX_HEADER,
    MAX_PARTS,
    MAX_WORDS,
    MINOR,
    Dispatch,
    Done,
    Envelope,
    Final,
    Finals,
    Function,
    GroupAdd,
    Host,
    NodeHello,
    Options,
    Order,
    Outcome,
    Ping,
    Record,
    Results,
    Run,
    Shape,
    Submit,
    TaskSpec,
    Welcome,
    batches,
    payload_bytes,
)  # fmt: skip

PREFIX = b"ZQ" + bytes((MAJOR, MINOR))
TASK = b"sixteen byte id."
DIGEST = b"function-digest!"
MEGABYTE = 1 << 20

MESSAGES = get_args(protocol.Message)
PIPE_MESSAGES = get_args(protocol.PipeMessage)
RECORDS = get_args(protocol.RecordMessage)


# --- any message, from its struct -------------------------------------------------------------------------------------

small = st.binary(max_size=40)
# The big ones are few and cheap to make: what matters is on which side of INLINE_MAX they are.
payloads = st.one_of(
    small,
    st.sampled_from([INLINE_MAX, INLINE_MAX + 1, 3 * INLINE_MAX]).map(lambda size: b"\xc1" * size),
    st.lists(st.one_of(small, small.map(memoryview), small.map(bytearray)), min_size=1, max_size=4),
)


def strategy(kind: Any) -> st.SearchStrategy[Any]:
    """Values of a field's type, within what its Meta says."""
    if kind == protocol._Inline:
        return payloads
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        meta = arguments[1]
        return bounded(arguments[0], meta)
    if origin is Literal:
        return st.sampled_from(arguments)
    if origin in (list, tuple):
        return bounded(kind, msgspec.Meta(max_length=3))
    if origin is UnionType:  # or None
        return st.none() | strategy(arguments[0])
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        return messages(kind)
    plain = {
        int: st.integers(0, 99),
        str: st.text(max_size=9),
        bytes: small,
        bool: st.booleans(),
        float: floats(0, 1e9),
    }
    return plain[kind]


def floats(low: float, high: float) -> st.SearchStrategy[float]:
    return st.floats(low, high, allow_nan=False)


def bounded(kind: Any, meta: msgspec.Meta) -> st.SearchStrategy[Any]:
    low, high = meta.min_length or 0, min(meta.max_length or 3, max(3, meta.min_length or 0))
    if kind is int:
        least = meta.ge if meta.ge is not None else 0
        most = meta.le if meta.le is not None else meta.lt - 1
        return st.one_of(st.sampled_from([int(least), int(most)]), st.integers(int(least), int(most)))
    if kind is float:
        return floats(meta.ge if meta.ge is not None else 0.001, float(meta.le))
    if kind is bytes:
        return st.binary(min_size=low, max_size=meta.max_length or 40)
    if kind is str:
        letters = st.characters(categories=["L", "N", "P", "S"]) if meta.max_length < 1000 else st.characters(codec="utf-8")
        return st.text(letters, min_size=low, max_size=min(meta.max_length, 40))  # names of hosts must be printable
    arguments = get_args(kind)
    if get_origin(kind) is tuple and arguments[-1] is not Ellipsis:
        return st.tuples(*[strategy(argument) for argument in arguments])
    by_name = (lambda pair: pair[0]) if get_origin(arguments[0]) is tuple else None  # resources: no name twice
    lists = st.lists(strategy(arguments[0]), min_size=low, max_size=high, unique_by=by_name)
    return lists.map(tuple) if get_origin(kind) is tuple else lists


def messages(kind: type[msgspec.Struct]) -> st.SearchStrategy[Any]:
    hints = typing.get_type_hints(kind, include_extras=True)
    made = st.fixed_dictionaries({name: strategy(hints[name]) for name in kind.__struct_fields__})
    if kind in (Submit, Dispatch):
        made = made.filter(lambda fields: fields["shapes"] or not fields.get("tasks", fields.get("orders")))
        made = made.map(lambda fields: within(fields, len(fields["shapes"])))
    return made.map(lambda fields: kind(**fields))


def within(fields: dict[str, Any], shapes: int) -> dict[str, Any]:
    """Every item names a shape that is there."""
    key = "tasks" if "tasks" in fields else "orders"
    items = [msgspec.structs.replace(item, shape=item.shape % shapes) for item in fields[key]]
    return {**fields, key: items}


def plainly(value: Any) -> Any:
    """With all payloads as bytes: how they are cut into buffers in memory is nobody's business."""
    if isinstance(value, msgspec.Struct):
        return (type(value), *[plainly(getattr(value, name)) for name in value.__struct_fields__])
    if isinstance(value, list | tuple):
        if value and all(isinstance(part, bytes | bytearray | memoryview) for part in value):
            return [bytes(part) for part in value]
        return [plainly(part) for part in value]
    return bytes(value) if isinstance(value, bytearray | memoryview) else value


def joined(value: Any) -> Any:
    """As ``plainly``, and a list of one buffer is that buffer: bytes over INLINE_MAX come back so."""
    plain = plainly(value)

    def join(part: Any) -> Any:
        if isinstance(part, list | tuple):
            if len(part) == 1 and isinstance(part[0], bytes) and len(part[0]) > INLINE_MAX:
                return part[0]
            return [join(inner) for inner in part]
        return part

    return join(plain)


def payloads_of(message: Any) -> list[Any]:
    found = []
    for where, field in codec._CARRIES.get(type(message), ()):
        found += [getattr(item, field) for item in (getattr(message, where) if where else (message,))]
    return found


def bulk_of(message: Any) -> list[bytes]:
    """What is to travel in frames of its own, in order."""
    bulk: list[bytes] = []
    for payload in payloads_of(message):
        if isinstance(payload, list):
            bulk += [bytes(part) for part in payload]
        elif len(payload) > INLINE_MAX:
            bulk.append(payload)
    return bulk


few = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
counts = st.sampled_from([0, 1, 2**53])


@pytest.mark.parametrize("kind", MESSAGES, ids=lambda kind: kind.__name__)
def test_every_message_comes_out_as_it_went_in(kind):
    @few
    @given(messages(kind), counts, counts, counts)
    def round_trip(message, session, seq, ack):
        before = plainly(message)
        frames = [bytes(frame) for frame in encode(Envelope(session, seq, ack, message))]
        assert plainly(message) == before, "encoding changes nothing"
        envelope = decode(frames)
        assert (envelope.session, envelope.seq, envelope.ack) == (session, seq, ack)
        assert joined(envelope.body) == joined(message)
        assert frames[1:] == bulk_of(message), "small payloads stay in the header, big ones are frames in order"

    round_trip()


@pytest.mark.parametrize("kind", PIPE_MESSAGES, ids=lambda kind: kind.__name__)
def test_every_message_of_a_pipe_comes_out_as_it_went_in(kind):
    @few
    @given(messages(kind))
    def round_trip(message):
        frames = [bytes(frame) for frame in encode_pipe(message)]
        assert joined(decode_pipe(frames)) == joined(message)
        assert frames[1:] == bulk_of(message)

    round_trip()


@pytest.mark.parametrize("kind", RECORDS, ids=lambda kind: kind.__name__)
def test_every_record_of_a_journal_comes_out_as_it_went_in(kind):
    @few
    @given(messages(kind))
    def round_trip(message):
        frames = [bytes(frame) for frame in encode_record(Record(b"owner", message))]
        record = decode_record(frames)
        assert (record.owner, joined(record.body)) == (b"owner", joined(message))
        assert frames[1:] == bulk_of(message)

    round_trip()


def test_every_struct_on_the_wire_is_one_of_the_messages_or_part_of_one():
    tagged = {
        kind
        for kind in vars(protocol).values()
        if isinstance(kind, type) and issubclass(kind, protocol._Wire) and kind.__struct_config__.tag is not None
    }
    assert tagged == {*MESSAGES, *PIPE_MESSAGES, *RECORDS}
    tags = [kind.__struct_config__.tag for kind in tagged]
    assert len(tags) == len(set(tags))


def test_bulk_is_not_copied():
    big = bytearray(1_000_000)
    frames = encode(Envelope(1, 1, 0, Results([Outcome(TASK, 1, True, [b"stream", memoryview(big)], 1)])))
    assert frames[2].obj is big
    (outcome,) = decode(frames).body.outcomes
    assert outcome.value[1].obj is big


class Memory(bytearray):
    """A frame's, of which one can ask whether it is still needed."""


def test_a_result_that_is_kept_keeps_its_own_frames_and_no_others():
    """A client keeps answers packed until somebody asks for them."""
    big = Envelope(1, 1, 0, Finals([Final(bytes([number]) * 16, "ok", [b"s", bytes(100_000)]) for number in range(3)]))
    frames = [Memory(frame) for frame in encode(big)]
    alive = [weakref.ref(frame) for frame in frames]
    kept = decode([memoryview(frame) for frame in frames]).body.finals[1]
    del frames
    gc.collect()
    assert [ref() is not None for ref in alive] == [False, False, False, True, True, False, False]
    assert len(kept.value[1]) == 100_000


@pytest.mark.parametrize(("size", "frames"), [(0, 1), (INLINE_MAX, 1), (INLINE_MAX + 1, 2), (1_000_000, 2)])
def test_what_is_small_stays_in_the_header(size, frames):
    message = Finals([Final(TASK, "ok", bytes(size))])
    assert len(encode(Envelope(1, 1, 0, message))) == frames


def test_payloads_are_counted_in_bytes():
    assert payload_bytes(b"123") == 3
    assert payload_bytes([b"12", memoryview(bytes(8)).cast("d"), bytearray(5)]) == 15


# --- the bytes, for ever ----------------------------------------------------------------------------------------------

# The exact frames of a few messages. If one of these tests fails, the wire format has changed and peers of the version
# before cannot read it: raise MAJOR (or MINOR, if only a field with a default was appended) before changing the hex.
SHAPE = Shape(DIGEST, Options(3, 2, (("cpu", 1.0), ("gpu", 0.5)), ("ssd",), "train", b"g" * 16, False))
GOLDEN = {
    "submit": Envelope(
        7, 1, 2, Submit([SHAPE], [TaskSpec(TASK, 0, b"call")], [Function(DIGEST, b"code")])
    ),
    "submit, bulk": Envelope(7, 1, 2, Submit([Shape(DIGEST)], [TaskSpec(TASK, 0, [b"stream", b"buffer"])])),
    "dispatch": Envelope(1, 300, 70_000, Dispatch([SHAPE], [Order(TASK, 1, 0, b"call"), Order(TASK, 2, 0, b"")])),
    "results": Envelope(1, 1, 1, Results([Outcome(TASK, 2, True, b"value", 3), Outcome(TASK, 1, False, [b"err"], 4)])),
    "welcome": Envelope(2**52, 0, 0, Welcome(2**52, 1, 9, "n1", 1.0)),
    "ping": Envelope(5, 0, 3, Ping(8, 2)),
    "node hello": Envelope(0, 0, 0, NodeHello(TASK, 1, Host("box", 7, "3.11"), 2, 2, (("cpu", 2.0),), (), [], "g-1", 60.0)),
}  # fmt: skip
BYTES = {
    "submit": [
        (
            "5a5101039407010294149193c41066756e6374696f6e2d646967657374219d03029292a3637075cb3ff0000000000000"
            "92a3677075cb3fe000000000000091a3737364a5747261696ec41067676767676767676767676767676767c2cb000000"
            "0000000000a0cb00000000000000009000c0a09194c4107369787465656e20627974652069642e00c40463616c6c909192"
            "c41066756e6374696f6e2d64696765737421c404636f6465"
        ),
    ],
    "submit, bulk": [
        (
            "5a5101039407010294149193c41066756e6374696f6e2d646967657374219d00009192a3637075cb3ff0000000000000"
            "90a0c400c3cb0000000000000000a0cb00000000000000009000c0a09194c4107369787465656e20627974652069642e00"
            "029090"
        ),
        "73747265616d",
        "627566666572",
    ],
    "dispatch": [
        (
            "5a5101039401cd012cce0001117095289193c41066756e6374696f6e2d646967657374219d03029292a3637075cb3ff0"
            "00000000000092a3677075cb3fe000000000000091a3737364a5747261696ec410676767676767676767676767676767"
            "67c2cb0000000000000000a0cb00000000000000009000c0a09295c4107369787465656e20627974652069642e0100c404"
            "63616c6c9095c4107369787465656e20627974652069642e0200c400909090"
        ),
    ],
    "results": [
        (
            "5a51010394010101922b9297c4107369787465656e20627974652069642e02c3c40576616c756503c3cb000000000000"
            "000097c4107369787465656e20627974652069642e01c20104c3cb0000000000000000"
        ),
        "657272",
    ],
    "welcome": [
        "5a51010394cf001000000000000000009803cf00100000000000000109a26e31cb3ff0000000000000c2cb4008000000000000",
    ],
    "ping": [
        "5a5101039405000393060802",
    ],
    "node hello": [
        (
            "5a510103940000009c02c4107369787465656e20627974652069642e0194a3626f7807a4332e31319002029192a36370"
            "75cb40000000000000009090a3672d31cb404e000000000000c2"
        ),
    ],
    "run": [
        (
            "9c3cc4107369787465656e20627974652069642e01c41066756e6374696f6e2d64696765737421c404636f6465c40463"
            "616c6cc39192b4435544415f56495349424c455f44455649434553a130cb4004000000000000a09000"
        ),
    ],
    "done": [
        "983dc4107369787465656e20627974652069642e01c3c40576616c7565cb3fe0000000000000c3c2",
    ],
}


@pytest.mark.parametrize("name", GOLDEN)
def test_the_bytes_are_those_of_this_version(name):
    assert [bytes(frame).hex() for frame in encode(GOLDEN[name])] == BYTES[name]
    assert joined(decode([bytes.fromhex(frame) for frame in BYTES[name]])) == joined(GOLDEN[name])


def test_the_bytes_are_those_of_this_version_on_a_pipe():
    run = Run(TASK, 1, DIGEST, b"code", b"call", True, (("CUDA_VISIBLE_DEVICES", "0"),), 2.5)
    assert [bytes(frame).hex() for frame in encode_pipe(run)] == BYTES["run"]
    assert [bytes(frame).hex() for frame in encode_pipe(Done(TASK, 1, True, b"value", 0.5))] == BYTES["done"]


# --- other versions ---------------------------------------------------------------------------------------------------


def pack(value: Any) -> bytes:
    return msgspec.msgpack.encode(value)


def test_a_newer_minor_version_is_read_and_its_new_fields_are_ignored():
    newer = b"ZQ" + bytes((MAJOR, MINOR + 1))
    ping = newer + pack([5, 0, 3, [6, 8, 2, "new", {"and": [1, 2]}], "in the envelope", 7])
    assert decode([ping]) == Envelope(5, 0, 3, Ping(8, 2))
    nested = newer + pack([5, 1, 3, [43, [[TASK, 1, True, b"v", 1, False, 0.5, "new"]], []]])
    assert decode([nested]).body == Results([Outcome(TASK, 1, True, b"v", 1, False, 0.5)])


def test_an_older_minor_version_may_leave_the_last_fields_out():
    assert decode([PREFIX + pack([5, 1, 3, [20, [[DIGEST]], [[TASK, 0, b""]]]])]).body.shapes == [Shape(DIGEST)]


@pytest.mark.parametrize("major", [0, MAJOR + 1, 255])
def test_another_major_version_is_refused_and_both_are_named(major):
    with pytest.raises(VersionMismatch, match=rf"{major}\.9.*{MAJOR}\.{MINOR}"):
        decode([b"ZQ" + bytes((major, 9)) + b"whatever comes then"])


# --- what is not a message --------------------------------------------------------------------------------------------


def refused(frames: list[bytes], match: str | None = None) -> None:
    with pytest.raises(ProtocolError, match=match):
        decode(frames)


def envelope_of(body: Any) -> bytes:
    return PREFIX + pack([1, 1, 0, body])


def survives(take: Callable[[Any], Any], frames: list[bytes]) -> None:
    """A message or a ProtocolError, never anything else; and what is a message can be sent on."""
    try:
        message = take(frames)
    except ProtocolError:
        return
    (encode if take is decode else encode_pipe)(message)


GARBLED = [[bytes(frame) for frame in encode(envelope)] for envelope in GOLDEN.values()]


@pytest.mark.parametrize("frames", GARBLED, ids=list(GOLDEN))
def test_a_message_cut_short_at_any_byte_is_refused(frames):
    for end in range(len(frames[0])):
        refused([frames[0][:end], *frames[1:]])


@pytest.mark.parametrize("frames", GARBLED, ids=list(GOLDEN))
def test_any_flipped_bit_is_refused_or_makes_another_message(frames):
    for place in range(len(frames[0])):
        for bit in range(8):
            header = bytearray(frames[0])
            header[place] ^= 1 << bit
            survives(decode, [bytes(header), *frames[1:]])


@pytest.mark.parametrize("frames", GARBLED, ids=list(GOLDEN))
def test_any_byte_replaced_by_any_marker_is_refused_or_makes_another_message(frames):
    for place in range(4, len(frames[0])):
        for byte in (0x00, 0x7F, 0x80, 0x8F, 0x90, 0x9F, 0xA0, 0xBF, *range(0xC0, 0xE1), 0xFF):
            survives(decode, [frames[0][:place] + bytes((byte,)) + frames[0][place + 1 :], *frames[1:]])


@settings(max_examples=300, deadline=None)
@given(st.lists(st.binary(max_size=100), max_size=4), st.booleans())
def test_random_bytes_are_refused(frames, prefixed):
    if prefixed and frames:
        frames[0] = PREFIX + frames[0]
    survives(decode, frames)


json_like = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(2**63), 2**64 - 1),
        st.floats(),
        st.text(max_size=5),
        st.binary(max_size=17),
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=3), inner, max_size=3)),
    max_leaves=12,
)
any_tag = st.sampled_from(sorted(kind.__struct_config__.tag for kind in (*MESSAGES, *PIPE_MESSAGES)))


@settings(max_examples=150, deadline=None)
@given(any_tag, st.lists(json_like, max_size=8), st.lists(st.binary(max_size=9), max_size=2))
def test_right_tags_with_wrong_fields_are_refused(tag, fields, bulk):
    survives(decode, [envelope_of([tag, *fields]), *bulk])
    survives(decode_pipe, [pack([tag, *fields]), *bulk])


def option_list(**changed: Any) -> list[Any]:
    fields = {name: getattr(Options(), name) for name in Options.__struct_fields__}
    return list({**fields, **changed}.values())


def submit_with(**changed: Any) -> list[Any]:
    return [20, [[DIGEST, option_list(**changed)]], [[TASK, 0, b""]]]


NAN, INFINITY = float("nan"), float("inf")


@pytest.mark.parametrize(
    "body",
    {
        "unknown tag": [99, 1],
        "no tag": [],
        "a map": {"type": 6},
        "a string as tag": ["Ping", 1, 1],
        "too few fields": [6, 1],
        "short task id": [23, [b"short"]],
        "long task id": [23, [TASK + b"!"]],
        "task id as text": [23, ["sixteen byte id."]],
        "short digest": [22, [b"short"]],
        "shape out of range": [20, [[DIGEST]], [[TASK, 1, b""]]],
        "shape below zero": [20, [[DIGEST]], [[TASK, -1, b""]]],
        "order's shape out of range": [40, [], [[TASK, 1, 0, b""]]],
        "resource NaN": submit_with(resources=[["gpu", NAN]]),
        "resource infinite": submit_with(resources=[["gpu", INFINITY]]),
        "resource below zero": submit_with(resources=[["gpu", -1.0]]),
        "resource as text": submit_with(resources=[["gpu", "1"]]),
        "too many resources": submit_with(resources=[[str(n), 1.0] for n in range(65)]),
        "too many tags": submit_with(tags=[str(n) for n in range(65)]),
        "name too long": submit_with(name="x" * 256),
        "retries below zero": submit_with(retries=-1),
        "retries without bound": submit_with(retries=10**9),
        "retries as text": submit_with(retries="3"),
        "backoff NaN": submit_with(backoff=NAN),
        "timeout NaN": submit_with(timeout=NAN),
        "timeout infinite": submit_with(timeout=INFINITY),
        "timeout below zero": submit_with(timeout=-1.0),
        "a stop that is no stop": [44, 1, [], [], [], [[TASK, 1, "ok", ""]]],
        "backoff infinite": submit_with(backoff=INFINITY),
        "backoff below zero": submit_with(backoff=-1.0),
        "priority NaN": submit_with(priority=NAN),
        "priority out of range": submit_with(priority=2**31 + 1),
        "group too long": submit_with(group=b"x" * 17),
        "node with NaN": [2, TASK, 1, ["h", 1, "3.11"], 1, 1, [["cpu", NAN]]],
        "node with no slots": [2, TASK, 1, ["h", 1, "3.11"], 0, 1, []],
        "node with too many slots": [2, TASK, 1, ["h", 1, "3.11"], 10**9, 1, []],
        "node with negative credit": [2, TASK, 1, ["h", 1, "3.11"], 1, -1, []],
        "host name of a megabyte": [1, TASK, 1, ["h" * MEGABYTE, 1, "3.11"]],
        "credit without bound": [44, 2**63],
        "beat interval zero": [3, 1, 1, 1, "n", 0.0],
        "beat interval NaN": [3, 1, 1, 1, "n", NAN],
        "memory NaN": [70, TASK, 1, [], NAN, 0],
        "progress NaN": [48, [], [[TASK, 1, NAN]]],
        "progress of more than all": [48, [], [[TASK, 1, 1.5]]],
        "a third stream": [48, [[TASK, 1, 1, 3, 0, 0, b"text"]]],
        "too many words": [48, [[TASK, 1, 1, 1, 0, 0, bytes(MAX_WORDS + 1)]]],
        "a count over 2**53": [6, 2**53 + 1, 0],
        "a count over 2**63": [6, 2**64 - 1, 0],
        "a fractional count": [6, 1.5, 0],
        "a verdict of its own": [24, [[TASK, "great"]]],
        "a payload as text": [24, [[TASK, "ok", "text"]]],
        "a payload of no frames": [24, [[TASK, "ok", 0]]],
        "a payload of -1 frames": [24, [[TASK, "ok", -1]]],
        "a payload of too many frames": [24, [[TASK, "ok", MAX_PARTS + 1]]],
        "too many items": [23, [TASK] * 10_001],
    }.items(),
    ids=lambda item: item[0],
)
def test_what_is_out_of_range_is_refused(body):
    refused([envelope_of(body[1])], "malformed|shape|finite")


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"Z",
        b"ZQ\x01",
        b"QZ\x01\x00",
        b"GET / HTTP/1.1\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"SSH-2.0-OpenSSH_9.2",
        PREFIX,
        PREFIX + b"\xc1",
        PREFIX + b"\xc0",
        PREFIX + b"\x90",
        PREFIX + pack([1, 1]),
        PREFIX + pack([-1, 1, 0, [8]]),
        PREFIX + pack({"session": 1, "seq": 1, "ack": 0, "body": [8]}),
        PREFIX + b"\x94\x01\x01\x00\x92\x08\xa2\xff\xfe"[:-1],
        PREFIX + b"\x94\x01\x01\x00\x92\x09\xa2\xff\xfe",
        PREFIX + b"\x94\xc7\x04\x05abcd\x01\x00\x91\x08",
        PREFIX + b"\x94\xd6\xff\x00\x00\x00\x00\x01\x00\x91\x08",
    ],
    ids=repr,
)
def test_what_is_no_message_is_refused(header):
    refused([header])


def test_trailing_bytes_are_refused():
    refused([envelope_of([8]) + b"\x00"], "malformed")


def test_frames_that_the_header_does_not_name_are_refused():
    refused([envelope_of([8]), b"left over"], "1 bulk frames that")
    refused([envelope_of([24, [[TASK, "ok", 1]]]), b"", b""], "1 bulk frames that")


def test_frames_that_did_not_come_are_missed():
    refused([envelope_of([24, [[TASK, "ok", 1]]])], "more bulk frames")
    refused([envelope_of([24, [[TASK, "ok", 1], [TASK, "ok", 2]]]), b"", b""], "more bulk frames")


def test_the_number_of_frames_is_limited():
    refused([], "0")
    refused([envelope_of([8])] + [b""] * MAX_FRAMES, f"1 to {MAX_FRAMES}")
    finals = [[TASK, "ok", MAX_PARTS]] * (MAX_FRAMES // MAX_PARTS - 1) + [[TASK, "ok", MAX_PARTS - 1]]
    most = [envelope_of([24, finals])] + [b"x"] * (MAX_FRAMES - 1)
    assert sum(len(final.value) for final in decode(most).body.finals) == MAX_FRAMES - 1


def test_the_header_is_limited():
    refused([PREFIX + bytes(MAX_HEADER)], "over the limit")


def test_many_bulk_counts_that_add_up_beyond_all_frames_are_refused_soon():
    finals = [[TASK, "ok", MAX_PARTS]] * 10_000
    refused([envelope_of([24, finals]), b"one"], "more bulk frames")


# --- what they cost ---------------------------------------------------------------------------------------------------


def peak_of(act: Callable[[], object]) -> int:
    tracemalloc.start()
    try:
        act()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


OPEN = b"\x94\x01\x01\x00"
HUGE = struct.pack(">I", 2**32 - 1)


@pytest.mark.parametrize(
    "rest",
    {
        "an array of 2**32": OPEN + b"\x92\x17\xdd" + HUGE,
        "an array of 2**32 resources": OPEN + b"\x98\x02\xc4\x10" + TASK + b"\x01\x93\xa1h\x01\xa13\x01\x01\xdd" + HUGE,
        "an array of 10,000 that is empty": OPEN + b"\x92\x17\xdc\x27\x10",
        "arrays of 10,000 in each other": OPEN + b"\x93\x14\xdc\x27\x10\x92\xc4\x10" + DIGEST + b"\x97\x00\x00\xdc\x27\x10",
        "bytes of 2**32": OPEN + b"\x92\x17\x91\xc6" + HUGE,
        "text of 2**32": OPEN + b"\x92\x09\xdb" + HUGE,
        "a map of 2**32": OPEN + b"\x92\x08\xdf" + HUGE,
        "an extension of 2**32": OPEN + b"\x92\x08\xc9" + HUGE + b"\x05",
        "an envelope of 2**32": b"\xdd" + HUGE + b"\x01\x01\x00\x91\x08",
        "a million brackets": OPEN + b"\x91" * 1_000_000,
        "a million brackets in a field": OPEN + b"\x92\x08" + b"\x91" * 1_000_000,
        "a million maps": OPEN + b"\x92\x08" + b"\x81\xa1k" * 1_000_000,
        "a million brackets behind the envelope": b"\x95\x01\x01\x00\x91\x08" + b"\x91" * 1_000_000,
    }.items(),
    ids=lambda item: item[0],
)
def test_the_cost_of_garbage_is_bounded_by_its_size(rest):
    """And so is the stack: nesting ends in an error, not in a crash."""
    frame = PREFIX + rest[1]
    assert peak_of(lambda: refused([frame])) < 2 * MEGABYTE + 2 * len(frame)


def test_an_integer_of_more_than_64_bits_cannot_be_said_and_its_nearest_is_refused():
    refused([PREFIX + b"\x94\xcf" + b"\xff" * 8 + b"\x01\x00\x91\x08"], "malformed")
    refused([PREFIX + b"\x94\xc4\x09" + b"\xff" * 9 + b"\x01\x00\x91\x08"], "malformed")


def test_the_largest_header_of_many_small_things_costs_no_more_than_it_should():
    frame = envelope_of([23, [TASK] * 200_000])
    assert len(frame) < MAX_HEADER
    assert peak_of(lambda: refused([frame])) < MEGABYTE
    names = envelope_of([32, "x" * 3_000_000])
    assert peak_of(lambda: refused([names])) < 10 * MEGABYTE


# --- pipes ------------------------------------------------------------------------------------------------------------

ON_A_PIPE = [
    encode_pipe(Run(TASK, 1, DIGEST, b"code", b"call", True, (("A", "1"),))),
    encode_pipe(Done(TASK, 1, True, [b"stream", b"buffer"], 0.5)),
    encode_pipe(GroupAdd([(TASK, -1)])),
]


@pytest.mark.parametrize("frames", ON_A_PIPE, ids=["Run", "Done", "GroupAdd"])
def test_a_pipes_message_is_read_whole_or_refused(frames):
    header, bulk = bytes(frames[0]), frames[1:]
    for end in range(len(header)):
        with pytest.raises(ProtocolError):
            decode_pipe([header[:end], *bulk])
    for place in range(len(header)):
        for bit in range(8):
            flipped = bytearray(header)
            flipped[place] ^= 1 << bit
            survives(decode_pipe, [bytes(flipped), *bulk])
    for wrong in ([header + b"\x00", *bulk], [header, *bulk, b"left over"]):
        with pytest.raises(ProtocolError):
            decode_pipe(wrong)


def test_a_pipes_message_without_its_frames_is_refused():
    with pytest.raises(ProtocolError):
        decode_pipe(ON_A_PIPE[1][:2])
    with pytest.raises(ProtocolError):
        decode_pipe([])


@pytest.mark.parametrize("seconds", [NAN, INFINITY, -1.0, "1"])
def test_how_long_a_task_took_is_a_sane_number(seconds):
    with pytest.raises(ProtocolError):
        decode_pipe([pack([61, TASK, 1, True, b"", seconds])])


# --- batches ----------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.lists(st.integers(0, 100), max_size=50), st.integers(1, 300))
def test_batches_take_everything_in_order_and_as_much_at_once_as_fits(sizes, limit):
    cut = list(batches(sizes, lambda size: size, limit))
    assert [size for batch in cut for size in batch] == sizes
    for index, batch in enumerate(cut):
        following = cut[index + 1] if index + 1 < len(cut) else []
        assert batch
        assert len(batch) == 1 or sum(batch) <= limit, "only an item that is too big alone goes over the limit"
        assert not following or sum(batch) + following[0] > limit, "no more batches than needed"


def lengths(sizes: list[int]) -> list[int]:
    return [len(batch) for batch in batches(sizes, lambda size: size)]


def test_batches_are_limited_in_items_too():
    assert lengths([0] * (2 * BATCH_ITEMS + 1)) == [BATCH_ITEMS, BATCH_ITEMS, 1]
    assert lengths([]) == []
    assert lengths([BATCH_BYTES, 1, BATCH_BYTES - 1, 1]) == [1, 2, 1]
    assert lengths([10 * BATCH_BYTES]) == [1]


def test_a_batch_of_the_largest_inline_payloads_fits_a_header():
    finals = [Final(TASK, "ok", bytes(INLINE_MAX))] * 1000
    batch = next(batches(finals, lambda final: payload_bytes(final.value)))
    (frame,) = encode(Envelope(1, 1, 0, Finals(batch)))
    assert len(frame) < MAX_HEADER


def test_batches_stay_within_what_a_message_may_hold():
    assert BATCH_ITEMS <= protocol.MAX_ITEMS
    assert 2 * BATCH_BYTES < MAX_HEADER
