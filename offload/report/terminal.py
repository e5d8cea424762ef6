"""Sections on standard output: tables with colour on a terminal, aligned plain text in a pipe or file.

Plain text is never cut to a width and holds no control characters, so that `grep` and `diff` work on it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import TextIO

from rich.console import Console
from rich.markup import escape
from rich.table import Table as RichTable

from .sections import Section, Table

__all__ = ["print_sections", "printable", "to_text"]


def print_sections(sections: Iterable[Section], stream: TextIO | None = None) -> None:
    """Print the sections to `stream`, standard output when None."""
    stream = sys.stdout if stream is None else stream
    if not stream.isatty():
        stream.write(to_text(sections))
        return
    console = Console(file=stream, highlight=False)
    for section in sections:
        console.print(f"\n[bold]{escape(printable(section.title))}[/bold]")
        if section.facts:
            console.print(_facts(section.facts))
        for line in section.lines:
            console.print(f"  - {escape(printable(line))}")
        for table in section.tables:
            console.print()
            console.print(_rich_table(table))
        if section.code:
            # No wrapping: what is copied must stay one line.
            console.print(escape(section.code.rstrip()), style="cyan", soft_wrap=True)
    console.print()


def to_text(sections: Iterable[Section]) -> str:
    """Return the sections as plain text."""
    return "\n".join(_section_lines(sections)) + "\n"


def _section_lines(sections: Iterable[Section]) -> Iterator[str]:
    for number, section in enumerate(sections):
        if number:
            yield ""
        yield printable(section.title)
        width = max((len(label) for label, _ in section.facts), default=0)
        for label, value in section.facts:
            yield f"  {label:<{width}}  {printable(value)}"
        for line in section.lines:
            yield f"  - {printable(line)}"
        for table in section.tables:
            yield ""
            yield from _table_lines(table)
        yield from map(printable, section.code.splitlines())


def _table_lines(table: Table) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(table.columns, *table.rows, strict=True)]
    for index, row in enumerate([table.columns, *table.rows]):
        cells = [
            cell.rjust(width) if place else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        mark = f"  <- {table.mark}" if index - 1 in table.marked else ""
        yield ("    " + "  ".join(cells) + mark).rstrip()


def printable(text: str) -> str:
    """Return text without what would steer a terminal; a directory may be called anything."""
    return "".join(character if character.isprintable() else "?" for character in text)


def _facts(facts: Iterable[tuple[str, str]]) -> RichTable:
    grid = RichTable.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for label, value in facts:
        grid.add_row(f"  {label}", escape(printable(value)))
    return grid


def _rich_table(table: Table) -> RichTable:
    # No frame: eight columns have to fit a terminal of 80.
    drawn = RichTable(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for place, column in enumerate(table.columns):
        drawn.add_column(column, justify="right" if place else "left", no_wrap=True)
    drawn.add_column("", no_wrap=True)
    for index, row in enumerate(table.rows):
        marked = index in table.marked
        cells = [escape(cell) for cell in row]
        drawn.add_row(*cells, table.mark if marked else "", style="bold green" if marked else None)
    return drawn
