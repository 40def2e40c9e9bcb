"""Pickling as this package does it: plain pickle first, cloudpickle when needed, large buffers apart."""

from __future__ import annotations

import io
import pickle
import sys
from collections import ChainMap
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

import cloudpickle
from cloudpickle.cloudpickle import _PICKLE_BY_VALUE_MODULES

from ..errors import PayloadTooLarge
from ..protocol import MAX_PAYLOAD, Payload, payload_bytes

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer as Buffer

# A buffer smaller than this is copied into the stream: a frame of its own costs more.
OUT_OF_BAND = 64 * 1024
# Buffers of one payload that may travel apart; a message has at most protocol.MAX_FRAMES frames for all its payloads.
MAX_BUFFERS = 200

# The modules whose functions and classes the user wants sent by value.
REGISTERED: set[str] = _PICKLE_BY_VALUE_MODULES
# How protocol 5 writes the first mention of the module name "__main__": opcode, length, name, memoize. User data that
# happens to contain it costs a slower pickling, nothing else.
_MAIN = b"\x8c\x08__main__\x94"


def _refuse_file(file: io.TextIOWrapper) -> tuple[Any, ...]:
    """cloudpickle would send all that is in the file: nobody expects that of a handle."""
    if file is sys.stdout or file is sys.stderr:
        return getattr, (sys, "stdout" if file is sys.stdout else "stderr")
    raise TypeError(f"cannot pickle {type(file).__name__!r} object")


class Pickler(cloudpickle.Pickler):  # type: ignore[misc]  # cloudpickle has no annotations
    """cloudpickle's, but for open files."""

    dispatch_table: ClassVar[Mapping[type, Any]] = ChainMap(
        {io.TextIOWrapper: _refuse_file}, cloudpickle.Pickler.dispatch_table
    )


def pack(value: Any, pickler: type[Pickler] = Pickler, *, plain_first: bool = True) -> Payload:
    buffers: list[Buffer] = []

    def in_band(buffer: pickle.PickleBuffer) -> bool:
        raw = buffer.raw()
        if raw.nbytes < OUT_OF_BAND or len(buffers) == MAX_BUFFERS:
            return True
        buffers.append(raw)
        return False

    stream = _plain(value, in_band) if plain_first else None
    if stream is None:
        buffers.clear()
        stream = _dumps_by_value(value, pickler, in_band)
    return [stream, *buffers] if buffers else stream


def dumps(value: Any, pickler: type[Pickler] = Pickler) -> bytes:
    """Like pack, with every buffer in the stream."""
    stream = _plain(value, None)
    return stream if stream is not None else _dumps_by_value(value, pickler, None)


_BufferCallback: TypeAlias = Callable[[pickle.PickleBuffer], Any] | None


def _plain(value: Any, in_band: _BufferCallback) -> bytes | None:
    """What plain pickle makes of it, unless that is nothing, or nothing a worker could read."""
    if REGISTERED:
        return None
    try:
        stream = pickle.dumps(value, 5, buffer_callback=in_band)
    except (KeyboardInterrupt, RecursionError, MemoryError):
        raise
    except BaseException:  # noqa: BLE001 - cloudpickle can do more, and says what is wrong if it cannot
        return None
    return None if _MAIN in stream else stream


def _dumps_by_value(value: Any, pickler: type[Pickler], in_band: _BufferCallback) -> bytes:
    file = io.BytesIO()
    pickler(file, 5, buffer_callback=in_band).dump(value)
    return file.getvalue()


def enclosed(payload: Payload) -> bytes | tuple[Any, ...]:
    """A payload to be put inside another: its buffers stay apart from the stream there too. :func:`unpack` reads it."""
    return payload if isinstance(payload, bytes) else (payload[0], *map(pickle.PickleBuffer, payload[1:]))


class Sink:
    """A file that only counts what is written."""

    def __init__(self) -> None:
        self.bytes = 0

    def write(self, data: Any) -> int:
        size = memoryview(data).nbytes
        self.bytes += size
        return size


def pickled_bytes(value: Any) -> int:
    """How much a value takes pickled, buffers included; 0 if it cannot be."""
    sink = Sink()

    def count(buffer: pickle.PickleBuffer) -> None:
        sink.bytes += buffer.raw().nbytes

    try:
        Pickler(sink, 5, buffer_callback=count).dump(value)
    except Exception:  # noqa: BLE001 - user code may raise anything
        return 0
    return sink.bytes


def unpack(payload: Payload | tuple[Any, ...]) -> Any:
    if isinstance(payload, bytes):
        return pickle.loads(payload)
    # An array built on a read-only buffer could not be written to, though the caller's could: copy those.
    buffers = [part if not memoryview(part).readonly else bytearray(part) for part in payload[1:]]
    return pickle.loads(payload[0], buffers=buffers)


def by_value(module: str) -> bool:
    """The user wants what this module defines sent by value."""
    return bool(REGISTERED) and any(module == name or module.startswith(f"{name}.") for name in list(REGISTERED))


def check_size(payload: Payload, what: str) -> None:
    size = payload_bytes(payload)
    if size > MAX_PAYLOAD:
        raise PayloadTooLarge(
            f"{what} takes {size:,} bytes pickled, over the limit of {MAX_PAYLOAD:,}; "
            "write it to a file both sides can reach and pass the path, or split the work"
        )


class ResultPickler(Pickler):
    """cloudpickle sends a class by value with its attributes, and the receiver sets them on the class it knows by that
    identity. Right for calls, where the client's class is the truth; for results it would undo the client's changes."""

    def reducer_override(self, obj: Any) -> Any:
        reduced = super().reducer_override(obj)
        if isinstance(obj, type) and type(reduced) is tuple and len(reduced) == 6:
            make, args, state, *rest, set_state = reduced
            return (make, args, (set_state, state), *rest, _fill_new_class)
        return reduced


_BARE = vars(type("_", (), {})).keys() | {"__slotnames__"}


def _fill_new_class(cls: type, how: tuple[Callable[[type, Any], object], Any]) -> None:
    set_state, state = how
    if not state[0].keys() - _BARE <= vars(cls).keys():
        set_state(cls, state)
