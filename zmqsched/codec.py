"""Messages (``protocol.py``) as bytes, and what is checked before they are believed.

Rules
-----
* A message on a ZeroMQ link is a header frame and then *bulk* frames. The header is ``b"ZQ"``, the major and the minor
  version (a byte each), then one msgpack-encoded :class:`~zmqsched.protocol.Envelope`. Another major version is a
  :class:`~zmqsched.errors.VersionMismatch`; a newer minor one is read, its unknown trailing fields ignored.
* The header of a message on a worker's pipe is the msgpack-encoded message alone.
* A payload of ``bytes``, of at most ``INLINE_MAX``, lies inside the header; anything else is replaced by the count of bulk
  frames that hold it, taken in order of appearance.
* Decoding never trusts: types, lengths and ranges are checked by msgspec in C, what it cannot state and the counts of bulk
  frames here. Whatever is wrong raises :class:`~zmqsched.errors.ProtocolError`; cost is bounded by the input's size, and the
  size by the protocol's limits.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from math import isfinite, isnan
from typing import TYPE_CHECKING, Any

import msgspec

from .errors import ProtocolError, VersionMismatch
from .protocol import (
    INLINE_MAX,
    MAGIC,
    MAJOR,
    MAX_FRAMES,
    MAX_HEADER,
    MINOR,
    ClientHello,
    Dispatch,
    Done,
    Envelope,
    Final,
    Finals,
    Function,
    Functions,
    Input,
    Inputs,
    NodeHello,
    Order,
    Outcome,
    Output,
    Payload,
    PipeMessage,
    Record,
    Results,
    Run,
    Shape,
    Submit,
    TaskSpec,
)  # fmt: skip

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer as Buffer

_encode = msgspec.msgpack.Encoder().encode
_decode_envelope = msgspec.msgpack.Decoder(Envelope).decode
_decode_pipe_message = msgspec.msgpack.Decoder(PipeMessage).decode
_decode_record = msgspec.msgpack.Decoder(Record).decode
# What msgspec raises for bytes that are no message.
_MALFORMED = (msgspec.MsgspecError, RecursionError, UnicodeDecodeError, OverflowError)
_PREFIX = MAGIC + bytes((MAJOR, MINOR))

# Which messages carry payloads: (field of the message or "" for itself, field of the item).
_CARRIES: dict[type, tuple[tuple[str, str], ...]] = {
    Submit: (("functions", "blob"), ("tasks", "call")),
    Functions: (("functions", "blob"),),
    Dispatch: (("functions", "blob"), ("orders", "call")),
    Results: (("outcomes", "value"),),
    Finals: (("finals", "value"),),
    Inputs: (("finals", "value"),),
    Run: (("", "function"), ("", "call"), ("inputs", "value")),
    Done: (("", "value"),),
}


def encode(envelope: Envelope) -> list[Buffer]:
    """One message as frames: the header, then bulk frames in order."""
    body = envelope.body
    has_bulk = _HAS_BULK.get(type(body))
    if has_bulk is None or not has_bulk(body):
        return [_PREFIX + _encode(envelope)]
    bulk: list[Buffer] = []
    slim = _without_bulk(body, bulk)
    return [_PREFIX + _encode(Envelope(envelope.session, envelope.seq, envelope.ack, slim)), *bulk]


def decode(frames: Sequence[Buffer]) -> Envelope:
    """The message in these frames.

    Raises
    ------
    ProtocolError
        Not a message of this protocol, or over one of its limits.
    """
    if not 1 <= len(frames) <= MAX_FRAMES:
        raise ProtocolError(f"a message has 1 to {MAX_FRAMES} frames, not {len(frames)}")
    header = memoryview(frames[0])
    if header.nbytes > MAX_HEADER:
        raise ProtocolError(f"header of {header.nbytes} bytes is over the limit of {MAX_HEADER}")
    if header[:4] != _PREFIX:
        _check_prefix(bytes(header[:4]))
    try:
        envelope: Envelope = _decode_envelope(header[4:])
    except _MALFORMED as error:
        raise ProtocolError(f"malformed message: {error}") from None
    body = envelope.body
    check = _CHECKS.get(type(body))
    if (check is not None and check(body)) or len(frames) > 1:
        _fill_bulk(body, frames)
    return envelope


def encode_pipe(message: PipeMessage) -> list[Buffer]:
    has_bulk = _HAS_BULK.get(type(message))
    if has_bulk is None or not has_bulk(message):
        return [_encode(message)]
    bulk: list[Buffer] = []
    message = _without_bulk(message, bulk)
    return [_encode(message), *bulk]


def decode_pipe(frames: Sequence[Buffer]) -> PipeMessage:
    if not frames:
        raise ProtocolError("a message has at least one frame")
    try:
        message: PipeMessage = _decode_pipe_message(frames[0])
    except _MALFORMED as error:
        raise ProtocolError(f"malformed message: {error}") from None
    check = _CHECKS.get(type(message))
    if (check is not None and check(message)) or len(frames) > 1:
        _fill_bulk(message, frames)
    return message


def encode_record(record: Record) -> list[Buffer]:
    bulk: list[Buffer] = []
    if type(record.body) in _CARRIES:
        record = Record(record.owner, _without_bulk(record.body, bulk))
    return [_encode(record), *bulk]


def decode_record(frames: Sequence[Buffer]) -> Record:
    if not frames:
        raise ProtocolError("a record has at least one frame")
    try:
        record: Record = _decode_record(frames[0])
    except _MALFORMED as error:
        raise ProtocolError(f"malformed message: {error}") from None
    if (check := _CHECKS.get(type(record.body))) is not None:
        check(record.body)
    _fill_bulk(record.body, frames)
    return record


def _check_prefix(prefix: bytes) -> None:
    """It is not this version's; another minor one will do."""
    if len(prefix) < 4 or prefix[:2] != MAGIC:
        raise ProtocolError("not a zmqsched message")
    if prefix[2] != MAJOR:
        raise VersionMismatch(f"the peer speaks protocol {prefix[2]}.{prefix[3]}, this side {MAJOR}.{MINOR}")


def _has_bulk_value(items: Sequence[Outcome | Final | Input]) -> bool:
    for item in items:
        value = item.value
        if type(value) is not bytes or len(value) > INLINE_MAX:
            return True
    return False


def _has_bulk_call(items: Sequence[TaskSpec | Order]) -> bool:
    for item in items:
        call = item.call
        if type(call) is not bytes or len(call) > INLINE_MAX:
            return True
    return False


def _has_bulk_blob(functions: list[Function]) -> bool:
    for function in functions:
        blob = function.blob
        if type(blob) is not bytes or len(blob) > INLINE_MAX:
            return True
    return False


def _run_has_bulk(run: Run) -> bool:
    function, call = run.function, run.call
    if type(function) is not bytes or type(call) is not bytes or len(function) > INLINE_MAX or len(call) > INLINE_MAX:
        return True
    return bool(run.inputs) and _has_bulk_value(run.inputs)


def _done_has_bulk(done: Done) -> bool:
    return type(done.value) is not bytes or len(done.value) > INLINE_MAX


# Whether any payload is not for the header: one look at each, for all of most messages are small. Taking a message apart by
# the table above costs several times as much.
_HAS_BULK: dict[type, Callable[[Any], bool]] = {
    Submit: lambda body: _has_bulk_call(body.tasks) or _has_bulk_blob(body.functions),
    Functions: lambda body: _has_bulk_blob(body.functions),
    Dispatch: lambda body: _has_bulk_call(body.orders) or _has_bulk_blob(body.functions),
    Results: lambda body: _has_bulk_value(body.outcomes),
    Finals: lambda body: _has_bulk_value(body.finals),
    Inputs: lambda body: _has_bulk_value(body.finals),
    Run: _run_has_bulk,
    Done: _done_has_bulk,
}


def _without_bulk(message: Any, bulk: list[Buffer]) -> Any:
    """The message with every payload that is not small replaced by its count of frames, which join ``bulk``."""
    replaced: dict[str, Any] = {}
    for where, field in _CARRIES[type(message)]:
        if not where:
            payload = getattr(message, field)
            if type(payload) is bytes and len(payload) <= INLINE_MAX:
                continue
            if (parts := _parts(payload)) is not None:
                bulk.extend(parts)
                replaced[field] = len(parts)
            continue
        items = getattr(message, where)
        slim: list[Any] | None = None
        for index, item in enumerate(items):
            payload = getattr(item, field)
            if type(payload) is bytes and len(payload) <= INLINE_MAX:
                continue
            parts = _parts(payload) or []
            bulk.extend(parts)
            slim = slim or list(items)
            slim[index] = msgspec.structs.replace(item, **{field: len(parts)})
        if slim is not None:
            replaced[where] = slim
    return msgspec.structs.replace(message, **replaced) if replaced else message


def _parts(payload: Payload) -> list[Buffer] | None:
    """The frames that this payload needs; None if it goes into the header."""
    if isinstance(payload, bytes):
        return None if len(payload) <= INLINE_MAX else [payload]
    return payload


def _fill_bulk(message: Any, frames: Sequence[Buffer]) -> None:
    """Put the bulk frames where the header left their counts; they must come out even."""
    taken = 1
    for where, field in _CARRIES.get(type(message), ()):
        for item in getattr(message, where) if where else (message,):
            count = getattr(item, field)
            if type(count) is int:
                parts = list(frames[taken : taken + count])
                taken += count
                if taken > len(frames):
                    raise ProtocolError("the header names more bulk frames than came with it")
                msgspec.structs.force_setattr(item, field, parts)
    if taken != len(frames):
        raise ProtocolError(f"{len(frames) - taken} bulk frames that the header does not name")


# As it is decoded, a message's payload may still be a count, which its type does not say: hence Any.
def _check_tasks(items: Sequence[Any], shapes: list[Shape]) -> bool:
    for shape in shapes:
        options = shape.options
        _check_amounts(options.resources)
        if not isfinite(options.backoff + options.timeout):
            raise ProtocolError("a task's seconds must be finite numbers")
    known = len(shapes)
    bulk = False
    for item in items:
        if item.shape >= known:
            raise ProtocolError("a task names a shape that the message does not have")
        if type(item.call) is int:
            bulk = True
    return bulk


def _counts_blobs(functions: Sequence[Any]) -> bool:
    for function in functions:
        blob = function.blob
        if type(blob) is int:
            return True
    return False


def _counts_values(items: Sequence[Any]) -> bool:
    for item in items:
        value = item.value
        if type(value) is int:
            return True
    return False


def _check_output(body: Output) -> bool:
    if any(isnan(advance.fraction) for advance in body.advances):
        raise ProtocolError("how far a task has come must be a number")
    return False


def _check_client_hello(body: ClientHello) -> bool:
    _check_names(body)
    return False


def _check_node_hello(body: NodeHello) -> bool:
    _check_names(body)
    _check_amounts(body.resources)
    if not isfinite(body.leaves_in_s):
        raise ProtocolError("a node's seconds must be a finite number")
    return False


def _check_names(hello: ClientHello | NodeHello) -> None:
    """They appear in logs and on terminals, where a line break or an escape sequence could say anything."""
    names = [hello.where.host, hello.where.python, *itertools.chain(*hello.where.versions)]
    if isinstance(hello, NodeHello):
        names += [hello.label, *hello.tags, *(name for name, _ in hello.resources)]
    for name in names:
        if not name.isprintable():
            raise ProtocolError(f"a name has characters that cannot be printed: {name[:40]!a}")


def _check_amounts(resources: tuple[tuple[str, float], ...]) -> None:
    for _, amount in resources:
        if not isfinite(amount):
            raise ProtocolError("resource amounts must be finite numbers")
    if len(resources) > 1 and len({name for name, _ in resources}) < len(resources):
        raise ProtocolError("a resource is named twice")


# What msgspec cannot state: indices within the message, and NaN, which passes every comparison it makes. Each says whether
# the message names bulk frames: most have none, and need not be searched for their places.
_CHECKS: dict[type, Callable[[Any], bool]] = {
    Submit: lambda body: _check_tasks(body.tasks, body.shapes) or _counts_blobs(body.functions),
    Functions: lambda body: _counts_blobs(body.functions),
    Dispatch: lambda body: _check_tasks(body.orders, body.shapes) or _counts_blobs(body.functions),
    Results: lambda body: _counts_values(body.outcomes),
    Finals: lambda body: _counts_values(body.finals),
    Inputs: lambda body: _counts_values(body.finals),
    Output: _check_output,
    ClientHello: _check_client_hello,
    NodeHello: _check_node_hello,
    Run: lambda run: type(run.function) is int or type(run.call) is int or _counts_values(run.inputs),
    Done: lambda done: type(done.value) is int,
}
