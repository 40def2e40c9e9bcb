"""Tracebacks as plain data, and back.

Rules
-----
* What comes back is a traceback like any other: ``traceback``, pytest, IPython and debuggers read it. Its frames have no
  locals, and nothing behind them (``f_back``): they keep no memory.
* A frame is rebuilt from code compiled for it, whose one instruction has the original's file, function, line and columns.
* Source lines are read where the error is shown, as always: a notebook's cells are known to the client alone. Those of the
  user's files travel along too, and are used for files that this process does not have.
"""

from __future__ import annotations

import ast
import functools
import itertools
import linecache
import types
from typing import Any, NamedTuple, TypeAlias

from .local import is_users

# Of a deeper stack the middle is left out.
MAX_FRAMES = 200
_MAX_LINES = 10
_MAX_COLUMNS = 500

# Frames of ours between the worker's loop and the user's code, and of imports, which nobody wants to read elsewhere either.
_MACHINERY = ("zmqsched.worker", f"{__package__}.")
_IMPORTS = (f"{__package__}.shipped", "importlib._bootstrap")


class Frame(NamedTuple):
    """One frame of a traceback. Lines count from 1, columns from 0, in bytes."""

    file: str
    name: str
    qualname: str
    first_line: int
    line: int
    end_line: int
    column: int
    end_column: int
    module: str
    source: str


# As it travels: builtin types alone, so that reading it cannot fail for the user's reasons.
Stack: TypeAlias = tuple[tuple[Any, ...], ...]


def taken_apart(trace: types.TracebackType | None) -> Stack:
    """The frames of a traceback, outermost first, without those of ours that called the user's function."""
    entries: list[types.TracebackType] = []
    while trace is not None:
        module = str(trace.tb_frame.f_globals.get("__name__"))
        if not module.startswith(_IMPORTS if entries else (*_MACHINERY, *_IMPORTS)):
            entries.append(trace)
        trace = trace.tb_next
    if len(entries) > MAX_FRAMES:
        entries[MAX_FRAMES // 4 : MAX_FRAMES // 4 - MAX_FRAMES] = []
    return tuple(tuple(_frame(entry)) for entry in entries)


def put_together(stack: Stack) -> types.TracebackType | None:
    """A traceback of these frames."""
    trace = None
    for fields in reversed(stack):
        frame = Frame(*fields)
        try:
            _provide_source(frame)
            code, instruction = _code(*frame[:8])
        except Exception:  # noqa: BLE001 - made by a tool, with a file or a line that no source has: nothing to show
            continue
        # A generator that never starts has a frame, and nobody who called it.
        generator = types.FunctionType(code, {"__name__": frame.module, "__file__": frame.file})()
        trace = types.TracebackType(trace, generator.gi_frame, instruction, frame.line)
    return trace


def innermost(stack: Stack) -> Frame | None:
    """The deepest frame in code of the user's; else the deepest."""
    frames = [Frame(*fields) for fields in reversed(stack)]
    return next((frame for frame in frames if is_users(frame.file)), frames[0] if frames else None)


def _frame(entry: types.TracebackType) -> Frame:
    code, names = entry.tb_frame.f_code, entry.tb_frame.f_globals
    line = entry.tb_lineno or code.co_firstlineno
    position = next(itertools.islice(code.co_positions(), entry.tb_lasti // 2, None), (None,) * 4)
    start, end, column, end_column = position
    end = end if start == line and end is not None and end >= line else line
    source = ""
    if is_users(code.co_filename):
        lines = (_line(code.co_filename, n, names) for n in range(line, min(end + 1, line + _MAX_LINES)))
        source = "".join(text if len(text) < _MAX_COLUMNS else f"{text[:_MAX_COLUMNS]}...\n" for text in lines)
    if start != line or column is None or end_column is None:  # python -X no_debug_ranges: the whole line, which marks none
        text = _line(code.co_filename, line, names).rstrip()
        end, column, end_column = line, len(text) - len(text.lstrip()), max(len(text.encode()), 1)
    module = names.get("__name__")
    module = module if isinstance(module, str) else "?"
    return Frame(
        code.co_filename, code.co_name, code.co_qualname, code.co_firstlineno, line, end, column, end_column, module, source
    )


def _line(file: str, number: int, names: dict[str, Any]) -> str:
    try:
        return linecache.getline(file, number, names)
    except Exception:  # noqa: BLE001 - a name that no file can have, a loader of the user's
        return ""


@functools.lru_cache(maxsize=1024)
def _code(
    file: str, name: str, qualname: str, first_line: int, line: int, end_line: int, column: int, end_column: int
) -> tuple[types.CodeType, int]:
    """Code with an instruction at this place, and the instruction's offset."""
    tree = ast.parse("def f():\n yield")
    function = tree.body[0]
    assert isinstance(function, ast.FunctionDef)
    place = function.body[0]
    assert isinstance(place, ast.Expr)
    function.lineno, function.end_lineno = first_line, max(end_line, first_line)
    for node in (place, place.value):
        node.lineno, node.end_lineno, node.col_offset, node.end_col_offset = line, end_line, column, end_column
    module = compile(tree, file, "exec", dont_inherit=True)
    code = next(constant for constant in module.co_consts if isinstance(constant, types.CodeType))
    at = next(i for i, position in enumerate(code.co_positions()) if position == (line, end_line, column, end_column))
    return code.replace(co_name=name, co_qualname=qualname), 2 * at


# The lines, by number, of files that this process does not have.
_foreign: dict[str, dict[int, str]] = {}


def _provide_source(frame: Frame) -> None:
    if not frame.source or (frame.file not in _foreign and linecache.getlines(frame.file)):
        return
    known = _foreign.setdefault(frame.file, {})
    known.update(enumerate(frame.source.splitlines(keepends=True), frame.line))
    lines = [known.get(number, "\n") for number in range(1, max(known) + 1)]
    # Without a time of modification it is never looked for on disk.
    linecache.cache[frame.file] = (sum(map(len, lines)), None, lines, frame.file)
