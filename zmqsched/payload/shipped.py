"""The modules that a task's client has sent along, imported in its worker.

Rules
-----
* A module is one object for each version of it; a version is its text and that of all it imports (``Source.key``). So
  functions share classes and the state of modules as long as nothing that they use was changed.
* ``sys.modules`` holds the versions that the running task came with (:meth:`Shipped.activate`). What was changed, and what
  imports it, is thereby imported anew; a task of before, run again, finds what it had.
* What was not sent is found as ever: where the package's files lie at the client, if that is here too, and on ``sys.path``.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import pickle
import sys
import zlib
from collections.abc import Sequence
from types import CodeType, ModuleType
from typing import Any, NamedTuple, cast

# Versions of one module that are kept.
_KEPT = 4
_MAX_OPENED = 64


class Source(NamedTuple):
    """One module as it travels. ``key`` names it with all it imports. ``places``: where a package's files lie at the
    client; None for a module."""

    name: str
    key: bytes
    file: str
    text: bytes
    places: tuple[str, ...] | None


class Shipped:
    """The modules that some function needs."""

    def __init__(self, blob: bytes) -> None:
        self._sources = [Source(*fields) for fields in pickle.loads(zlib.decompress(blob))]

    @classmethod
    def of(cls, blob: bytes) -> Shipped:
        """Functions that need the same modules have the same object."""
        if (known := _opened.get(blob)) is None:
            if len(_opened) >= _MAX_OPENED:
                _opened.clear()
            known = _opened[blob] = cls(blob)
        return known

    def activate(self) -> None:
        """Let imports find these modules, and no other versions of them."""
        if _shelf.active is not self:
            _shelf.take(self._sources)
            _shelf.active = self


class Loader:
    """Imports a module from the text that has come with a task."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.path = source.file

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        _shelf.add(self.source, module)  # before it runs: modules that import each other are the same version
        try:
            exec(self.get_code(module.__name__), vars(module))
        except BaseException:
            _shelf.remove(self.source)
            raise

    def get_code(self, name: str) -> CodeType:
        code: CodeType = compile(self.source.text, self.source.file or name, "exec", dont_inherit=True)
        return code

    def get_source(self, name: str) -> str:
        """For tracebacks and ``inspect``, where the file is not."""
        return importlib.util.decode_source(self.source.text)

    def get_filename(self, name: str) -> str:
        return self.path

    def get_data(self, path: str) -> bytes:
        """A file beside it, for ``pkgutil``: not sent, but perhaps here too."""
        with open(path, "rb") as file:
            return file.read()

    def get_resource_reader(self, name: str) -> Any:
        """The same for ``importlib.resources``."""
        from importlib.readers import FileReader  # zipfile, tempfile and more, which few need

        return FileReader(cast(Any, self))

    def is_package(self, name: str) -> bool:
        return self.source.places is not None


class _Shelf:
    """A finder: the versions there are, and which of them are imported now."""

    def __init__(self) -> None:
        self.active: Shipped | None = None
        self._wanted: dict[str, Source] = {}
        self._made: dict[str, dict[bytes, ModuleType]] = {}

    def take(self, sources: Sequence[Source]) -> None:
        if self not in sys.meta_path:
            sys.meta_path.insert(0, self)
        for source in sources:
            self._wanted[source.name] = source
            made = self._made.get(source.name, {}).get(source.key)
            if made is None or sys.modules.get(source.name) is not made:
                self._put(source.name, made)

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        source = self._wanted.get(name)
        if source is None:
            return None
        spec = importlib.machinery.ModuleSpec(
            name, cast(Any, Loader(source)), origin=source.file or None, is_package=source.places is not None
        )
        spec.has_location = bool(source.file)
        if source.places is not None:
            spec.submodule_search_locations = list(source.places)
        return spec

    def add(self, source: Source, module: ModuleType) -> None:
        made = self._made.setdefault(source.name, {})
        made[source.key] = module
        while len(made) > _KEPT:
            del made[next(iter(made))]

    def remove(self, source: Source) -> None:
        self._made.get(source.name, {}).pop(source.key, None)

    @staticmethod
    def _put(name: str, module: ModuleType | None) -> None:
        """What the next import of this name finds; None: nothing yet."""
        before = sys.modules.pop(name, None)
        if module is not None:
            sys.modules[name] = module
        parent_name, _, child = name.rpartition(".")
        parent = sys.modules.get(parent_name)
        if parent is None:
            return
        if module is not None:
            setattr(parent, child, module)
        elif before is not None and getattr(parent, child, None) is before:
            delattr(parent, child)


_shelf = _Shelf()
_opened: dict[bytes, Shipped] = {}
