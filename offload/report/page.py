"""A bench as one picture or page that needs nothing else: inline SVG, its own style, no scripts.

`render_html` adds every figure of the tables below the charts and follows the reader's light or dark
setting; `render_svg` is the charts alone with their captions, without a background, to put into a
document. The template escapes all text that goes into it, and matplotlib does in the charts.

Needs the extra `plot`: import it only when a picture is asked for.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import SubFigure

from ..probe.results import BenchResult, Pattern
from ..sizes import format_bytes, format_rate
from .charts import Chart, bandwidth_chart, latency_chart, sustained_chart, to_svg
from .outputs import write_text
from .sections import (
    bandwidth_cells,
    best_setting,
    cells_of,
    drive_groups,
    format_setting,
    group_title,
    latency_cells,
    sections_of,
)

__all__ = ["render_html", "render_svg", "write_plot"]

PATTERNS: tuple[tuple[Pattern, str], ...] = (
    ("read", "Read"),
    ("write", "Write, flush included"),
    ("mixed", "Both at once, sum"),
)

# Where a caption breaks: 8.5 points on the width of a chart.
CAPTION_CHARACTERS = 132
LINE_HEIGHT = 16

# What matplotlib calls its groups. Nothing refers to them, and in a page they would stand more than once.
_GROUP_ID = re.compile(r' id="[a-z0-9.]+_[0-9]+"')


@dataclass(frozen=True, slots=True)
class _Figure:
    """Charts under one heading.

    Attributes:
        title: heading.
        facts: the caption, without which figures mean little.
        headline: (label, figure) pairs to be read first.
        charts: one below the other.
    """

    title: str
    facts: tuple[str, ...]
    headline: tuple[tuple[str, str], ...]
    charts: tuple[Chart, ...]


def write_plot(result: BenchResult, path: Path) -> None:
    """Write a picture if `path` ends in `.svg`, else a page, over what was there.

    Raises:
        StorageError: it cannot be written.
    """
    render = render_svg if path.suffix.lower() == ".svg" else render_html
    write_text(path, render(result))


def render_html(result: BenchResult) -> str:
    """Return a page with every chart and every figure."""
    figures = list(_figures(result))
    return (
        _environment()
        .get_template("bench.html")
        .render(
            title="offload bench: " + ", ".join(drive.path for drive in result.drives),
            host=_host_line(result),
            figures=[
                (figure, [_inline(chart, figure.title) for chart in figure.charts]) for figure in figures
            ],
            sections=sections_of(result),
            notes=result.notes,
        )
    )


def render_svg(result: BenchResult) -> str:
    """Return the charts as one SVG picture."""
    charts = [_words("offload bench", [_host_line(result)], size=16)]
    for figure in _figures(result):
        headline = "; ".join(f"{label} {value}" for label, value in figure.headline)
        parts = [part for part in (headline, ", ".join(figure.facts)) if part]
        charts += [_words(figure.title, parts), *figure.charts]
    if result.notes:
        charts.append(_words("Notes", result.notes))
    return to_svg(charts, "offload bench: " + _host_line(result))


def _inline(chart: Chart, title: str) -> Markup:
    """Return a chart as a part of a page: without what belongs to a file of its own."""
    svg = to_svg([chart], title)
    return Markup(_GROUP_ID.sub("", svg[svg.index("<svg") :]))


def _words(heading: str, texts: Sequence[str], *, size: float = 12) -> Chart:
    """Return a heading, `size` points high, over texts, each from a line of its own."""
    lines = [line for text in texts for line in textwrap.wrap(text, CAPTION_CHARACTERS)]
    height = round(2.5 * size) + LINE_HEIGHT * len(lines) + 12

    def draw(figure: SubFigure) -> None:
        figure.text(0.006, (LINE_HEIGHT * len(lines) + 14) / height, heading, size=size, weight="bold")
        for rank, line in enumerate(reversed(lines)):
            figure.text(0.006, (LINE_HEIGHT * rank + 12) / height, line)

    return Chart(height, draw)


def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("offload.report", "templates"),
        # Everywhere: what is shown are paths and names from outside.
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _figures(result: BenchResult) -> Iterator[_Figure]:
    for group in drive_groups(result):
        yield _sweep_figure(result, group)
    for run in result.sustained:
        if run.points:
            path = result.drives[run.drive].path
            yield _Figure(f"Sustained writing to {path}", (), (), (sustained_chart(run),))


def _sweep_figure(result: BenchResult, group: tuple[int, ...]) -> _Figure:
    cells = cells_of(result, group)
    best = best_setting(result, group)
    timed = bandwidth_cells(cells)
    by_name = {name: [cell for cell in timed if cell.workload.pattern == key] for key, name in PATTERNS}
    # A single point is no curve: its figure stands above.
    drawn = {name: own for name, own in by_name.items() if len(own) > 1}
    charts = [bandwidth_chart(drawn, best)] if drawn else []
    if with_latency := latency_cells(cells):
        charts.append(latency_chart(with_latency, best))
    return _Figure(
        group_title(result, group), _caption(result, group), _headline(result, group), tuple(charts)
    )


def _caption(result: BenchResult, group: tuple[int, ...]) -> tuple[str, ...]:
    if len(group) > 1:
        return (", ".join(result.drives[index].path for index in group),)
    drive = result.drives[group[0]]
    access = "O_DIRECT" if drive.direct else "through the page cache, dropped before reads"
    return (
        f"{drive.file_system} on {drive.source}",
        f"engine {drive.engine}",
        access,
        f"file of {format_bytes(drive.file_nbytes)}",
        f"{format_bytes(drive.verified_nbytes)} verified",
        "marks: medians, bars: range of the samples, ring: the chosen setting",
    )


def _headline(result: BenchResult, group: tuple[int, ...]) -> tuple[tuple[str, str], ...]:
    best = best_setting(result, group)
    figures = []
    for pattern, name in PATTERNS:
        own = [cell for cell in bandwidth_cells(cells_of(result, group)) if cell.workload.pattern == pattern]
        at_best = [cell for cell in own if cell.workload.setting == best] or (own if len(own) == 1 else [])
        figures += [(name, format_rate(cell.bytes_per_s)) for cell in at_best]
    if best is not None:
        figures.append(("Best with", format_setting(best)))
    return tuple(figures)


def _host_line(result: BenchResult) -> str:
    machine = result.machine
    parts = [f"{machine.cpu}, {machine.num_cores} usable", f"{format_bytes(machine.memory_nbytes)} memory"]
    if machine.device is not None:
        parts.append(machine.device.name)
    return ", ".join([*parts, machine.measured_at])
