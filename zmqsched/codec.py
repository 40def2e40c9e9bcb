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
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

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
    Finals,
    Functions,
    Inputs,
    Message,
    NodeHello,
    Output,
    Payload,
    PipeMessage,
    Record,
    RecordMessage,
    Results,
    Run,
    Submit,
)  # fmt: skip

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer as Buffer

_encoder = msgspec.msgpack.Encoder()
_envelopes = msgspec.msgpack.Decoder(Envelope)
_pipe_messages = msgspec.msgpack.Decoder(PipeMessage)
_records = msgspec.msgpack.Decoder(Record)
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
    bulk: list[Buffer] = []
    body = envelope.body
    if type(body) in _CARRIES:
        slim = _without_bulk(body, bulk)
        if slim is not body:
            envelope = Envelope(envelope.session, envelope.seq, envelope.ack, slim)
    return [_PREFIX + _encoder.encode(envelope), *bulk]


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
    prefix = bytes(header[:4])
    if len(prefix) < 4 or prefix[:2] != MAGIC:
        raise ProtocolError("not a zmqsched message")
    if prefix[2] != MAJOR:
        raise VersionMismatch(f"the peer speaks protocol {prefix[2]}.{prefix[3]}, this side {MAJOR}.{MINOR}")
    envelope: Envelope = _decoded(_envelopes, header[4:])
    _check(envelope.body)
    _fill_bulk(envelope.body, frames)
    return envelope


def encode_pipe(message: PipeMessage) -> list[Buffer]:
    if _is_small(message):
        return [_encoder.encode(message)]
    bulk: list[Buffer] = []
    message = _without_bulk(message, bulk)
    return [_encoder.encode(message), *bulk]


def decode_pipe(frames: Sequence[Buffer]) -> PipeMessage:
    if not frames:
        raise ProtocolError("a message has at least one frame")
    message: PipeMessage = _decoded(_pipe_messages, frames[0])
    if len(frames) > 1 or not _is_small(message):
        _fill_bulk(message, frames)
    return message


def encode_record(record: Record) -> list[Buffer]:
    bulk: list[Buffer] = []
    if type(record.body) in _CARRIES:
        record = Record(record.owner, _without_bulk(record.body, bulk))
    return [_encoder.encode(record), *bulk]


def decode_record(frames: Sequence[Buffer]) -> Record:
    if not frames:
        raise ProtocolError("a record has at least one frame")
    record: Record = _decoded(_records, frames[0])
    _check(record.body)
    _fill_bulk(record.body, frames)
    return record


def _decoded(decoder: Any, data: Buffer) -> Any:
    try:
        return decoder.decode(data)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError, OverflowError) as error:
        raise ProtocolError(f"malformed message: {error}") from None


def _is_small(message: PipeMessage) -> bool:
    """It has no bulk, as most; a look costs a tenth of what taking it apart does."""
    if type(message) is Run:
        function, call = message.function, message.call
        whole = type(function) is bytes and type(call) is bytes and not message.inputs
        return whole and len(function) <= INLINE_MAX and len(call) <= INLINE_MAX
    if type(message) is Done:
        return type(message.value) is bytes and len(message.value) <= INLINE_MAX
    return True


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


def _check(body: Message | RecordMessage) -> None:
    """What msgspec cannot state: indices within the message, and NaN, which passes every comparison it makes."""
    kind = type(body)
    if kind is Submit or kind is Dispatch:
        items = body.tasks if isinstance(body, Submit) else cast(Dispatch, body).orders
        shapes = cast(Submit, body).shapes
        if items and max([item.shape for item in items]) >= len(shapes):
            raise ProtocolError("a task names a shape that the message does not have")
        for shape in shapes:
            _check_amounts(shape.options.resources)
            if not math.isfinite(shape.options.backoff + shape.options.timeout):
                raise ProtocolError("a task's seconds must be finite numbers")
    elif kind is Output:
        if any(math.isnan(advance.fraction) for advance in cast(Output, body).advances):
            raise ProtocolError("how far a task has come must be a number")
    elif kind is NodeHello or kind is ClientHello:
        _check_names(cast(NodeHello | ClientHello, body))
        if isinstance(body, NodeHello):
            _check_amounts(body.resources)
            if not math.isfinite(body.leaves_in_s):
                raise ProtocolError("a node's seconds must be a finite number")


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
        if not math.isfinite(amount):
            raise ProtocolError("resource amounts must be finite numbers")
    if len(resources) > 1 and len({name for name, _ in resources}) < len(resources):
        raise ProtocolError("a resource is named twice")
