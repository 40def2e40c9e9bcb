"""Which part of a value cannot be pickled, as a path that a reader of the user's code understands, and what to do instead.

Rules
-----
* The value is pickled once more, by a pickler that sees each object just before it is taken: the last it saw is the culprit.
  Then a path to it is looked for, along what the user's code can name: attributes, items, closure variables, globals.
* Both are bounded (``BUDGET_S``, ``MAX_PARTS``), for a value may be huge, or make new parts of itself for ever. When the
  budget is spent, the message says as much as is known.
* Whatever is part of something that nobody looks into (the lock in a queue) is reported as that.
"""

from __future__ import annotations

import functools
import types
from collections import deque
from collections.abc import Iterator, Sequence
from time import monotonic
from typing import Any

from .captures import ABSENT, importable, names
from .pickling import Pickler, Sink
from .words import brief, short, type_name
from .wrappers import Wrapper

BUDGET_S = 3.0
MAX_PARTS = 100_000
# Of what was seen last, where to look for something that has a path when the culprit has none: it was made for the occasion.
_SEEN = 1_000

Named = tuple[str, Any]

_ADVICE = "pass plain data (a path, an address, a number) and make the object inside the task"
_ADVICE_FOR_RESULTS = "return plain data, or write it to a file and return the path"
_LOCK = "a lock holds up nobody in another process: leave it out, or make one inside the task"
_SPECIAL = {
    **dict.fromkeys(("_thread.lock", "_thread.RLock", "threading.Condition", "threading.Event"), _LOCK),
    **dict.fromkeys(("threading.Semaphore", "threading.BoundedSemaphore", "threading.Barrier"), _LOCK),
    **dict.fromkeys(("generator", "map", "filter", "zip"), "make a list of its items"),
    **dict.fromkeys(("coroutine", "async_generator"), "a task is a plain function: let it call asyncio.run"),
    "weakref.ReferenceType": "use the object itself",
    "socket.socket": "hand over the address, and connect where it is used",
    "ssl.SSLSocket": "hand over the address, and connect where it is used",
    "sqlite3.Connection": "hand over the path, and connect where it is used",
    "concurrent.futures._base.Future": "hand over its result",
    "_asyncio.Future": "hand over its result",
    "_asyncio.Task": "hand over its result",
    "subprocess.Popen": "a process belongs to the one that started it: start it where it is used",
}
_BY_MODULE = {
    "_io": "hand over the path, and open the file where it is used",
    "threading": "threads and what they share stay in their process: start them inside the task",
    "queue": "a queue stays in its process: hand over its items as a list",
    "concurrent.futures": "executors stay in their process: make one inside the task",
    "multiprocessing": "make it inside the task",
}
# Nobody wants to know which part of these it is.
_WHOLE = ("threading", "queue", "concurrent.futures", "multiprocessing", "asyncio", "socket", "ssl", "subprocess", "logging")


def blame(roots: Sequence[Named], error: BaseException, *, results: bool = False) -> str:
    """Which of these, and what within it, raised this error when they were pickled; and what to do instead."""
    until = monotonic() + BUDGET_S
    if isinstance(error.__cause__, RecursionError):  # cloudpickle's own words for it
        error = error.__cause__
    for name, root in roots:
        tracer = _Tracer(until)
        failure = tracer.failure(root)
        if isinstance(failure, _OutOfTimeError):
            break
        if failure is None:
            continue
        if isinstance(failure, RecursionError):
            return f"{name} ({type_name(type(root))}) is nested too deeply, or refers to itself through __reduce__"
        steps, culprit = _path(root, tracer.seen, monotonic() + BUDGET_S)
        path = " -> ".join([name, *steps])
        kind = "" if culprit is root and isinstance(root, types.FunctionType) else f" ({type_name(type(culprit))})"
        return f"{path}{kind}: {brief(failure)}{_advice(culprit, results)}"
    return f"{roots[0][0] if len(roots) == 1 else 'one of the arguments'}: {brief(error)}{_advice(ABSENT, results)}"


class _OutOfTimeError(BaseException):
    """The budget is spent."""


class _Tracer(Pickler):
    """Pickles into nothing, and remembers what it has seen last."""

    def __init__(self, until: float) -> None:
        super().__init__(Sink(), 5, buffer_callback=lambda _: None)
        self._until = until
        self.seen: deque[Any] = deque(maxlen=_SEEN)

    def persistent_id(self, obj: Any) -> None:
        self.seen.append(obj)
        if monotonic() > self._until:
            raise _OutOfTimeError

    def failure(self, value: Any) -> BaseException | None:
        try:
            self.dump(value)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # noqa: BLE001 - user code may raise anything
            return error.__cause__ if isinstance(error.__cause__, RecursionError) else error
        return None


def _path(root: Any, seen: deque[Any], until: float) -> tuple[list[str], Any]:
    """Steps from the root to what was seen last, and that; or to the last that can be reached."""
    culprit = seen[-1] if seen else root
    # What holds the culprit was mostly seen shortly before it.
    reached = _reached(root, culprit, until, set(map(id, seen)))
    if id(culprit) not in reached:
        reached = _reached(root, culprit, until, None)
    if id(culprit) in reached:
        chain = _chain(culprit, reached)
    else:  # it was made for the occasion: what holds it is the last object that was seen before, classes apart
        holders = (_chain(thing, reached) for thing in reversed(seen) if id(thing) in reached)
        fit = (chain for chain in holders if not any(issubclass(type(thing), _NO_HOLDERS) for _, thing in chain[1:]))
        chain = next(fit, [("", root)])
    # From the top down to the first that is a whole.
    end = next((at for at, (_, thing) in enumerate(chain) if _is_whole(thing)), len(chain) - 1)
    return [step for step, _ in chain[1 : end + 1]], chain[end][1]


def _chain(thing: Any, reached: dict[int, tuple[Any, int, str]]) -> list[Named]:
    """From the root, whose step is empty, down to this."""
    _, above, step = reached[id(thing)]
    chain = [(step, thing)]
    while above:
        thing, above, step = reached[above]
        chain.append((step, thing))
    chain.reverse()
    return chain


def _reached(root: Any, wanted: Any, until: float, through: set[int] | None) -> dict[int, tuple[Any, int, str]]:
    """What can be reached from the root, until the wanted is: by id, with the id of what it is part of and the step to it.
    ``through``: look only into these."""
    reached: dict[int, tuple[Any, int, str]] = {id(root): (root, 0, "")}
    todo = deque([root])
    while todo and id(wanted) not in reached and len(reached) < MAX_PARTS and monotonic() < until:
        parent = todo.popleft()
        for step, part in _some_parts(parent, wanted):
            if id(part) not in reached and (through is None or id(part) in through):
                reached[id(part)] = (part, id(parent), step)
                todo.append(part)
    return reached


_NO_HOLDERS = (str, int, float, bytes, complex, type(None), type, types.FunctionType, types.ModuleType)


def _is_whole(thing: Any) -> bool:
    module = type(thing).__module__
    return isinstance(module, str) and any(module == name or module.startswith(f"{name}.") for name in _WHOLE)


def _advice(culprit: Any, results: bool) -> str:
    kind = type(culprit)
    module = kind.__module__
    if isinstance(module, str) and module.split(".")[0] == "zmqsched":  # they say themselves what to do
        return ""
    special = _SPECIAL.get(type_name(kind))
    if special is None and isinstance(module, str):
        special = next((text for name, text in _BY_MODULE.items() if module == name or module.startswith(f"{name}.")), None)
    return f"; {special or (_ADVICE_FOR_RESULTS if results else _ADVICE)}"


# --- the parts of a value ----------------------------------------------------------------------------------------------


def _some_parts(value: Any, wanted: Any) -> list[Named]:
    """Parts of a value, the wanted one among them if it is one; not more than are ever looked at."""
    if isinstance(value, list | tuple) and len(value) > _SEEN:
        at = next((index for index, part in enumerate(value) if part is wanted), None)
        if at is not None:
            return [(f"[{at}]", wanted)]
    found: list[Named] = []
    try:
        for step, part in parts(value):
            found.append((step, part))
            if len(found) == MAX_PARTS:
                break
    except Exception:  # noqa: BLE001 - the user's __getattr__ or property
        return found
    return found


def parts(value: Any) -> Iterator[Named]:
    """The parts that pickling this value would pickle too, named as a reader of the user's code would name them."""
    if isinstance(value, Wrapper):
        yield from parts(value.fn)
    elif isinstance(value, types.FunctionType):
        if not importable(value):
            yield from function_parts(value)
        return
    elif isinstance(value, type | types.ModuleType):
        if isinstance(value, type) and not importable(value):
            yield from ((f".{name}", part) for name, part in vars(value).items())
        return
    elif isinstance(value, types.MethodType):
        yield "its `self`", value.__self__
        yield "its function", value.__func__
    elif isinstance(value, types.BuiltinMethodType):
        yield "its `self`", value.__self__
    elif isinstance(value, staticmethod | classmethod):
        yield "its function", value.__func__
    elif isinstance(value, property):
        yield from (("its function", fn) for fn in (value.fget, value.fset, value.fdel) if fn is not None)
    elif isinstance(value, functools.partial):
        yield "the partial's function", value.func
        yield from ((f"the partial's argument {number}", part) for number, part in enumerate(value.args, 1))
        yield from ((f"the partial's keyword `{name}`", part) for name, part in value.keywords.items())
    elif isinstance(value, dict):
        for key, part in value.items():
            yield f"[{short(key)}]", part
            yield f"key {short(key)}", key
    elif isinstance(value, list | tuple | deque):
        yield from ((f"[{index}]", part) for index, part in enumerate(value))
    elif isinstance(value, set | frozenset):
        yield from (("an item", part) for part in value)
    yield from _attributes(value)
    yield "its class", type(value)


def function_parts(fn: types.FunctionType) -> Iterator[Named]:
    """What travels with a function that travels by value."""
    for name, cell in zip(fn.__code__.co_freevars, fn.__closure__ or (), strict=False):
        try:
            yield f"closure variable `{name}`", cell.cell_contents
        except ValueError:  # empty
            continue
    for name in names(fn.__code__):
        if name in fn.__globals__:
            yield f"global `{name}`", fn.__globals__[name]
    defaults = fn.__defaults__ or ()
    named = fn.__code__.co_varnames[: fn.__code__.co_argcount][-len(defaults) :] if defaults else ()
    for name, part in (*zip(named, defaults, strict=False), *(fn.__kwdefaults__ or {}).items()):
        yield f"the default of `{name}`", part
    for name, part in fn.__dict__.items():
        yield f".{name}", part
    yield from ((f"the annotation of `{name}`", part) for name, part in getattr(fn, "__annotations__", {}).items())


def _attributes(value: Any) -> Iterator[Named]:
    attributes = getattr(value, "__dict__", None)
    if isinstance(attributes, dict):
        yield from ((f".{name}", part) for name, part in attributes.items())
    for cls in type(value).__mro__:
        slots = vars(cls).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            part = getattr(value, name, ABSENT)
            if part is not ABSENT:
                yield f".{name}", part
