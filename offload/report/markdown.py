"""Sections as Markdown, for an issue or a notebook. Pure: it returns text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from .sections import Section, Table

__all__ = ["to_markdown"]


def to_markdown(title: str, sections: Iterable[Section]) -> str:
    """Return the sections under one title, as text ending in a newline."""
    lines = [f"# {_escape(title)}"]
    for section in sections:
        lines += ["", f"## {_escape(section.title)}"]
        if section.facts:
            lines += ["", *(f"- {label}: {_escape(value)}" for label, value in section.facts)]
        if section.lines:
            lines += ["", *(f"- {_escape(line)}" for line in section.lines)]
        for table in section.tables:
            lines += ["", *_table(table)]
        if section.code:
            lines += ["", f"```{section.language}", *section.code.splitlines(), "```"]
    return "\n".join(lines) + "\n"


def _table(table: Table) -> Iterator[str]:
    yield _row([*table.columns, ""])
    yield _row([":---", *("---:" for _ in table.columns[1:]), ":---"])
    for index, row in enumerate(table.rows):
        marked = index in table.marked
        yield _row([*(f"**{cell}**" if marked else cell for cell in row), "best" if marked else ""])


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _escape(text: str) -> str:
    """Keep paths and messages as they are read: no emphasis, links or markup of their own."""
    for character in "\\`*_[]<>":
        text = text.replace(character, f"\\{character}")
    # A drive's name may hold a line break; a heading or a list item must not.
    return " ".join(text.split())
