"""How clusters, clients, futures and lists of nodes look, in a terminal and in a notebook.

Rules
-----
* What is shown is described once, as a :class:`Sheet`; text and HTML are made of the same cells, so they say the same.
* Everything is escaped; the HTML has no script, no style sheet, nothing from elsewhere and no colour, so it is readable in
  light and dark themes, and where a notebook is not trusted.
* Showing never raises, and waits half a second for a broker at most. ``repr`` asks nobody at all: debuggers call it.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

MAX_ROWS = 100  # of a table; a notebook is saved with what it shows
MAX_CELL = 1_000  # characters
ANSWER_TIMEOUT_S = 0.5  # twice, if the broker is away: a notebook asks for the text and for the HTML

Row = tuple[object, ...]


@dataclass(frozen=True)
class Table:
    """Columns with heads. A column of whole numbers is aligned to the right."""

    heads: tuple[str, ...]
    rows: Sequence[Row]

    def is_number(self, column: int) -> bool:
        return bool(self.rows) and all(isinstance(row[column], int) for row in self.rows)


@dataclass(frozen=True)
class Sheet:
    """A title, tables, and facts as pairs of a name and a value, in this order."""

    title: str
    tables: Sequence[Table] = ()
    facts: Sequence[tuple[str, object]] = ()


class Shown(ABC):
    """What has a sheet: notebooks show it as HTML, IPython in a terminal as the same text."""

    @abstractmethod
    def _sheet(self) -> Sheet:
        """What is shown."""

    def _repr_html_(self) -> str:
        return as_html(sheet_of(self))

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(as_text(sheet_of(self)))


def sheet_of(shown: Shown) -> Sheet:
    """Its sheet; if that cannot be made, one that says so."""
    try:
        return shown._sheet()
    except Exception as error:  # noqa: BLE001 - whatever it is: it must not replace what the cell was to show
        return Sheet(f"zmqsched.{type(shown).__name__}", facts=[("cannot be shown", _said(error))])


def as_text(sheet: Sheet) -> str:
    """Lines without ends; columns are two spaces apart."""
    blocks = [[cell(sheet.title)]]
    for table in sheet.tables:
        rows = [tuple(map(cell, row)) for row in (table.heads, *table.rows[:MAX_ROWS])]
        blocks.append(_aligned(rows, [table.is_number(column) for column in range(len(table.heads))]) + _more(table))
    if sheet.facts:
        blocks.append(_aligned([(cell(name), cell(value)) for name, value in sheet.facts], [False, False]))
    return "\n\n".join("\n".join(lines) for lines in blocks)


def as_line(sheet: Sheet) -> str:
    """The title and the facts, for ``repr``."""
    return f"<{', '.join([cell(sheet.title), *(f'{cell(name)}: {cell(value)}' for name, value in sheet.facts)])}>"


def as_html(sheet: Sheet) -> str:
    """One ``div``."""
    parts = [f"<div><strong>{_escaped(sheet.title)}</strong></div>"]
    for table in sheet.tables:
        aligned = ["right" if table.is_number(column) else "left" for column in range(len(table.heads))]
        heads = _html_row("th", table.heads, aligned)
        rows = "".join(_html_row("td", row, aligned) for row in table.rows[:MAX_ROWS])
        parts.append(f"<table><thead>{heads}</thead><tbody>{rows}</tbody></table>")
        parts += [f"<div>{line}</div>" for line in _more(table)]
    if sheet.facts:
        rows = "".join(_html_row("td", fact, ["left", "left"]) for fact in sheet.facts)
        parts.append(f"<table><tbody>{rows}</tbody></table>")
    return f"<div>{''.join(parts)}</div>"


def cell(value: object) -> str:
    """On one line, of a bearable length, without what a terminal would obey."""
    with contextlib.suppress(Exception):
        value = str(value)
        text = "".join(letter if letter.isprintable() else " " for letter in value[: 2 * MAX_CELL])
        text = " ".join(text.split())
        return text if len(text) <= MAX_CELL else text[: MAX_CELL - 1] + "…"
    return f"({type(value).__name__} that cannot be printed)"


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {cell(error)}"


def _aligned(rows: list[tuple[str, ...]], numbers: list[bool]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            text.rjust(width) if number else text.ljust(width)
            for text, width, number in zip(row, widths, numbers, strict=True)
        ).rstrip()
        for row in rows
    ]


def _more(table: Table) -> list[str]:
    return [f"and {len(table.rows) - MAX_ROWS} more"] if len(table.rows) > MAX_ROWS else []


def _html_row(kind: str, values: Iterable[object], aligned: list[str]) -> str:
    cells = [
        f'<{kind} style="text-align: {side}">{_escaped(value)}</{kind}>'
        for value, side in zip(values, aligned, strict=True)
    ]
    return f"<tr>{''.join(cells)}</tr>"


def _escaped(value: object) -> str:
    import html  # its table of names is large, and every client imports this module

    return html.escape(cell(value))


def counted(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"
