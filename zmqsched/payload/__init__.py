"""Callables, calls, results and exceptions as bytes, and back. Only clients and workers import this package.

``calls`` packs arguments and results, ``functions`` callables (``captures``: whether one is still what it was) with the
user's own ``modules``, which ``shipped`` imports in the worker (``local``: which files are the user's own),
``exceptions`` what tasks raise, with ``tracebacks``; ``chunks`` several items of a map; ``references`` notes what on the
cluster a call refers to; ``blame`` finds what cannot be pickled; ``pickling`` is below all of them.

Rules
-----
* Plain pickle (protocol 5) first; it is several times faster. cloudpickle when that fails, or when the stream refers to
  ``__main__``: a reference to the user's ``__main__`` would be looked up in the worker's. Whatever an importable module
  defines travels as a reference to it, unless ``cloudpickle.register_pickle_by_value`` says otherwise.
* Buffers of at least ``OUT_OF_BAND`` bytes are not copied: a payload then is ``[stream, buffer, ...]``, and the buffers
  are the caller's own memory until they are sent. A caller who changes an array before that changes the argument.
* A function is sent once as long as it is the same, with all that it captures. A change in place is seen.
* The user's own modules go along with the function that needs them, as their files are at the time of the call.
* Failing to pickle is the caller's error and says which part cannot be pickled. Failing to unpickle is an answer too.
  User code (``__reduce__``, ``__setstate__``, ``__str__``) may raise anything; only KeyboardInterrupt passes through.
* An exception arrives as itself if it can be rebuilt, else as text with its type; with its traceback in any case.
* A class that the client sent by value comes back as the client's own class, and as the client left it.
"""

from __future__ import annotations

from .calls import Call, pack_call, pack_value, unpack_call, unpack_value
from .chunks import (
    Chunk,
    Enclosed,
    How,
    Outcome,
    Seed,
    as_entry,
    entries_of,
    generator,
    opened,
    value_of,
)
from .exceptions import Origin, know_place, origin_of, pack_exception, unpack_exception, words_of
from .functions import FunctionPickler, load_function, pack_kinds
from .pickling import OUT_OF_BAND, enclosed
from .references import References, as_it_is, groups, input_value, note_group, noting, packed_value, references
from .shipped import Shipped
from .wrappers import RetryOn, Wrapper, may_retry, short_form

__all__ = [
    "OUT_OF_BAND",
    "Call",
    "Chunk",
    "Enclosed",
    "FunctionPickler",
    "How",
    "Origin",
    "Outcome",
    "References",
    "RetryOn",
    "Seed",
    "Shipped",
    "Wrapper",
    "as_entry",
    "as_it_is",
    "enclosed",
    "entries_of",
    "generator",
    "groups",
    "input_value",
    "know_place",
    "load_function",
    "may_retry",
    "note_group",
    "noting",
    "opened",
    "origin_of",
    "pack_call",
    "pack_exception",
    "pack_kinds",
    "pack_value",
    "packed_value",
    "references",
    "short_form",
    "unpack_call",
    "unpack_exception",
    "unpack_value",
    "value_of",
    "words_of",
]
