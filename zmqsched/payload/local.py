"""Whose a source file is: the user's, or a library's."""

from __future__ import annotations

import functools
import os
import sysconfig

# Where packages are installed. The interpreter's prefix would be too much: people's own programs lie below it, too.
_INSTALLED = frozenset({"site-packages", "dist-packages"})
_STANDARD = tuple({os.path.join(sysconfig.get_path(name), "") for name in ("stdlib", "platstdlib")})
_OURS = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "")


@functools.lru_cache(maxsize=4096)
def is_users(file: str) -> bool:
    """True for what somebody edits: not the standard library, not an installed package, not zmqsched. A package installed
    in editable mode is the user's; so is what has no file (a notebook's cell)."""
    if file.startswith(("<frozen ", *_STANDARD, _OURS)):
        return False
    return _INSTALLED.isdisjoint(file.split(os.sep))
