"""The user's own modules, for workers that lack them or have others: what of them a call needs, as the files say now.

Rules
-----
* A module is the user's own if it is a Python file that somebody edits (``local.py``). It travels as source, to be imported
  in the worker under its name (``shipped.py``): so its classes are the same for all functions that come with it, and what
  it does when it is imported, it does there.
* What travels: the modules that a packed function or call names, the packages they lie in, and what those import, anywhere
  in their text, as far as it is the user's own. Nothing else that lies beside them, and no data files.
* The file counts, not what this process has imported: who edits a module and calls again gets the new behaviour, without
  a reload here. A file that is gone counts as it was last. One that cannot be parsed is an error of the call, at once.
* A loop of calls looks only now and then whether files have changed (``LOOK_S``); whoever waits for a result, edits a file
  and calls again gets the new one. A file read within ``SETTLED_S`` of its last change is read again, for a second change
  within that time may leave it with the same time and size.
* Not sent: ``__main__`` (what it defines is pickled by value), modules registered with cloudpickle (so is theirs), and
  packages with compiled parts, which are the node's to have.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib
import importlib.machinery
import operator
import os
import pickle
import re
import sys
import threading
import zlib
from collections.abc import Iterable, Iterator, Mapping
from time import monotonic
from types import ModuleType
from typing import Any, NamedTuple

from ..errors import NotSerializable
from ..protocol import Payload
from .local import is_users
from .pickling import by_value
from .shipped import Loader, Source

# For each file, so looking takes at most some 5 % of a loop's time; nobody gets a result and edits a file in less.
LOOK_S = 50e-6
SETTLED_S = 0.05
_MAX_SETS = 256
_COMPILED = tuple(importlib.machinery.EXTENSION_SUFFIXES)
_NEVER = ("__main__", "__mp_main__", "zmqsched")
# How pickle begins to refer to a class or function by its names: none in a stream, no module either.
STACK_GLOBAL = b"\x93"


class Bundle(NamedTuple):
    """Some modules and what they import. ``blob``: the sources, for :class:`~zmqsched.payload.shipped.Shipped`."""

    digest: bytes
    blob: bytes


class _Entry:
    """A module of the user's and the modules it may import, as read last. ``file``: empty for a namespace package;
    ``fixed``: it has no file here that could change."""

    __slots__ = ("broken", "digest", "file", "fixed", "imports", "name", "places", "read_at", "seen", "seen_at", "text")

    def __init__(self, name: str, file: str, places: tuple[str, ...] | None, text: bytes | None = None) -> None:
        self.name = name
        self.file = file
        self.places = places
        self.seen: tuple[int, ...] | None = None
        self.seen_at = self.read_at = 0.0
        self.digest = b""
        self.text = b""
        self.imports: tuple[str, ...] = ()
        self.broken: SyntaxError | ValueError | None = None
        self.fixed = text is not None or not file
        if text is not None:
            self._take(text)

    def look(self, now: float) -> bool:
        """Read the file if it is not known to be what it was; True if it has changed."""
        if self.fixed:
            return False
        try:
            status = os.stat(self.file)
        except OSError:
            return False
        seen = (status.st_mtime_ns, status.st_size, status.st_ino)
        if seen != self.seen:
            self.seen, self.seen_at = seen, now
        elif self.read_at >= self.seen_at + SETTLED_S:
            return False
        try:
            with open(self.file, "rb") as file:
                text = file.read()
        except OSError:
            self.seen = None
            return False
        self.read_at = now
        return self._take(text)

    def _take(self, text: bytes) -> bool:
        digest = hashlib.blake2b(text, digest_size=16).digest()
        if digest == self.digest:
            return False
        self.text, self.digest, self.broken = text, digest, None
        try:
            tree = ast.parse(text, self.file)
        except (SyntaxError, ValueError) as error:
            self.broken = error
            return True
        package = self.name if self.places is not None else self.name.rpartition(".")[0]
        self.imports = tuple(dict.fromkeys(_imports(tree, package)))
        return True


class _Set:
    """Modules that were asked for together. ``due``: when to look at their files again."""

    __slots__ = ("bundle", "due", "entries")

    def __init__(self, bundle: Bundle, entries: list[_Entry], now: float) -> None:
        self.bundle = bundle
        self.entries = [(entry, entry.digest) for entry in entries]
        self.due = now + LOOK_S * len(entries)

    def has_changed(self, now: float) -> bool:
        if now < self.due:
            return False
        changed = False
        for entry, then in self.entries:
            entry.look(now)
            changed |= entry.digest is not then  # others look at the same entries
        if not changed:  # until then nobody else is to take it for looked at
            self.due = now + LOOK_S * len(self.entries)
        return changed


class Modules:
    """What this process knows of the user's own modules. Safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._entries: dict[str, _Entry | None] = {}
        self._sets: dict[frozenset[str], _Set] = {}
        self._imported: tuple[int, str] = (0, "")
        self._compiled: set[str] = set()
        self._judged: dict[str, tuple[str, bool]] = {}  # by name: the file, and whether it is the user's own
        self._pattern: re.Pattern[bytes] | None = None

    def named_in(self, payload: Payload) -> frozenset[str]:
        """Names of the user's modules that this pickle refers to, or may refer to: a text that equals one counts too."""
        stream = payload if isinstance(payload, bytes) else payload[0]
        if isinstance(stream, bytes) and STACK_GLOBAL not in stream:
            return _NONE
        if self._imported != _imported_now():
            self._look_around()
        if self._pattern is None:
            return _NONE
        found = self._pattern.findall(stream)
        return frozenset(name[1:].decode() for name in found) if found else _NONE

    def own_among(self, names: frozenset[str]) -> frozenset[str]:
        """Those of these names that are modules of the user's own, imported here or not."""
        if not names:
            return _NONE
        with self._lock:
            return frozenset(name for name in names if self._entry(name) is not None)

    def bundle(self, names: frozenset[str]) -> Bundle | None:
        """These modules with all they import; None if none of them is there any more.

        Raises
        ------
        NotSerializable
            One of them is no Python, as it is now.
        """
        found = self._sets.get(names)
        if found is None or found.due <= monotonic():
            found = self._looked_at(names)
        return found.bundle if found.bundle.blob else None

    def _looked_at(self, names: frozenset[str]) -> _Set:
        with self._lock:
            now = monotonic()
            found = self._sets.get(names)
            if found is not None and found.has_changed(now):
                self._forget()
                found = None
            if found is None:
                if len(self._sets) >= _MAX_SETS:
                    self._sets.clear()
                found = self._sets[names] = self._made(names, now)
            return found

    def _look_around(self) -> None:
        """Which of the imported modules are the user's own."""
        with self._lock:
            self._imported = _imported_now()
            loaded = [(name, module, _file_of(module)) for name, module in list(sys.modules.items())]
            self._compiled = {name.partition(".")[0] for name, _, file in loaded if file.endswith(_COMPILED)}
            for name, module, file in loaded:
                if self._judged.get(name, _NOT_JUDGED)[0] != file:
                    self._judged[name] = (file, _is_users_own(module))
            own = (name for name, *_ in loaded if self._judged[name][1] and name.isascii() and self._may_be_own(name))
            names = [name.encode() for name in own]
            # As protocol 5 writes a name the first time: opcode, length, name, memoize.
            any_of = b"|".join(re.escape(b"%c%b" % (len(name), name)) for name in names if len(name) < 256)
            self._pattern = re.compile(b"\x8c(" + any_of + b")\x94", re.DOTALL) if any_of else None
            self._forget()

    def _forget(self) -> None:
        """What was not there before may be now."""
        self._sets.clear()
        self._entries = {name: entry for name, entry in self._entries.items() if entry is not None}

    def _made(self, names: Iterable[str], now: float) -> _Set:
        importlib.invalidate_caches()
        entries = self._gathered(names)
        while any([entry.look(now) for entry in entries.values()]):  # noqa: C419 - look at each
            entries = self._gathered(names)
        sources: list[Source] = []
        keys = _keys(entries)
        for name, entry in sorted(entries.items()):
            if entry.broken is not None:
                raise NotSerializable(f"cannot send the module {name!r} along: {entry.broken}") from entry.broken
            sources.append(Source(name, keys[name], entry.file, entry.text, entry.places))
        blob = zlib.compress(pickle.dumps([tuple(source) for source in sources], 5), 1) if sources else b""
        digest = hashlib.blake2b(b"".join(source.key for source in sources), digest_size=16).digest()
        return _Set(Bundle(digest, blob), list(entries.values()), now)

    def _gathered(self, names: Iterable[str]) -> dict[str, _Entry]:
        """Modules, the packages around them, and whatever those import."""
        found: dict[str, _Entry] = {}
        todo = list(names)
        while todo:
            name = todo.pop()
            if name in found or (entry := self._entry(name)) is None:
                continue
            found[name] = entry
            todo.extend(_needs(entry))
        return found

    def _entry(self, name: str) -> _Entry | None:
        if name not in self._entries:
            self._entries[name] = entry = self._found(name)
            if entry is not None:
                entry.look(monotonic())
        return self._entries[name]

    def _found(self, name: str) -> _Entry | None:
        """The user's own module of that name, imported here or not."""
        module = sys.modules.get(name)
        if module is None:
            return self._not_imported(name)
        if not (self._may_be_own(name) and _is_users_own(module)):
            return None
        loader = _names_in(module).get("__loader__")
        path = _names_in(module).get("__path__")
        places = None if path is None else tuple(str(place) for place in path)
        return _Entry(name, _file_of(module), places, loader.source.text if isinstance(loader, Loader) else None)

    def _not_imported(self, name: str) -> _Entry | None:
        if not self._may_be_own(name):
            return None
        parent = name.rpartition(".")[0]
        above = self._entry(parent) if parent else None
        if parent and (above is None or above.places is None):
            return None
        try:
            spec = importlib.machinery.PathFinder.find_spec(name, list(above.places or ()) if above else None)
        except Exception:  # noqa: BLE001 - a finder of somebody's: then it is not ours to ship
            return None
        if spec is None or not _is_own_file(spec.origin or "", spec.submodule_search_locations or ()):
            return None
        places = spec.submodule_search_locations
        return _Entry(name, spec.origin or "", None if places is None else tuple(places))


    def _may_be_own(self, name: str) -> bool:
        top = name.partition(".")[0]
        return top not in _NEVER and top not in self._compiled and not by_value(name)


_NONE: frozenset[str] = frozenset()
_NOT_JUDGED = (None, False)


def _is_users_own(module: Any) -> bool:
    try:
        names = _names_in(module)
        places = [str(place) for place in names.get("__path__") or ()]
        return names.get("__spec__") is not None and _is_own_file(_file_of(module), places)
    except Exception:  # noqa: BLE001 - what somebody has put there in place of a module
        return False


def _imported_now() -> tuple[int, str]:
    """Something else when modules were imported in between; told in no time."""
    return len(sys.modules), next(reversed(sys.modules))


def _needs(entry: _Entry) -> Iterator[str]:
    """What is imported with a module: what it imports, and the package around it."""
    yield from entry.imports
    if parent := entry.name.rpartition(".")[0]:
        yield parent


def _keys(entries: Mapping[str, _Entry]) -> dict[str, bytes]:
    """For each module what names its version: made of its own text and of those of all that are imported with it."""
    names = sorted(entries)
    number = {name: at for at, name in enumerate(names)}
    needs = [[number[other] for other in _needs(entries[name]) if other in number] for name in names]
    # Sets of modules as bits: all that is reached from each, and hundreds import each other in circles.
    reached = [1 << at for at in range(len(names))]
    grows = True
    while grows:
        grows = False
        for at, others in enumerate(needs):
            more = functools.reduce(operator.or_, (reached[other] for other in others), reached[at])
            grows |= more != reached[at]
            reached[at] = more

    @functools.cache
    def digest(which: int) -> bytes:
        parts = (b"%b\0%b" % (name.encode(), entries[name].digest) for at, name in enumerate(names) if which >> at & 1)
        return hashlib.blake2b(b"".join(parts), digest_size=16).digest()

    keys = (hashlib.blake2b(name.encode() + digest(reached[at]), digest_size=16).digest() for at, name in enumerate(names))
    return dict(zip(names, keys, strict=True))


def _is_own_file(file: str, places: Iterable[str]) -> bool:
    if file:
        return file.endswith(".py") and is_users(os.path.abspath(file))
    return any(is_users(os.path.abspath(place)) for place in places)


def _file_of(module: ModuleType | Any) -> str:
    file = _names_in(module).get("__file__")
    return file if isinstance(file, str) else ""


def _names_in(module: Any) -> dict[str, Any]:
    """What it has, past a ``__getattr__`` of its own: one that is loaded when it is used must not be loaded by looking."""
    try:
        names = object.__getattribute__(module, "__dict__")
    except AttributeError:
        return {}
    return names if isinstance(names, dict) else {}


def _imports(tree: ast.AST, package: str) -> Iterator[str]:
    """Names that the code may import, as modules or from them."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.rsplit(".", node.level - 1)[0] if node.level else ""
            name = ".".join(part for part in (base, node.module) if part)
            if name:
                yield name
                yield from (f"{name}.{alias.name}" for alias in node.names)
