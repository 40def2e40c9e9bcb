"""How commands print: as a table, or as JSON."""

from __future__ import annotations

import json

import click

from ..display import Sheet, Table, cell

as_json = click.option(
    "-o", "--output", type=click.Choice(["table", "json"]), default="table", show_default=True, help="How to print it."
)


def print_json(value: object) -> None:
    print(json.dumps(value, indent=2, sort_keys=True))


def print_table(table: Table) -> None:
    from rich.console import Console
    from rich.table import Table as Grid
    from rich.text import Text

    grid = Grid(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for column, head in enumerate(table.heads):
        grid.add_column(head, justify="right" if table.is_number(column) else "left", no_wrap=True)
    for row in table.rows:
        grid.add_row(*(Text(cell(value)) for value in row))  # as Text: brackets in a host's name are no markup
    console = Console(highlight=False)
    if not console.is_terminal:  # a file or a pipe has no width to fit into
        console.width = 1_000
    with console.capture() as printed:
        console.print(grid)
    for line in printed.get().splitlines():
        print(line.rstrip())  # rich fills the last column up


def print_sheet(sheet: Sheet) -> None:
    print(sheet.title)
    for table in sheet.tables:
        print()
        print_table(table)
    print()
    width = 1 + max(len(name) for name, _ in sheet.facts)
    for name, value in sheet.facts:
        print(f"{name + ':':{width}} {cell(value)}")
