"""A bench as one picture or page that needs nothing else: inline SVG, its own style, no scripts.

`render_html` adds every figure of the tables below the charts; `render_svg` is the charts alone with
their captions, to put into a document. Both follow the reader's light or dark setting. Templates lie in
`templates/` and escape all text that goes into them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from jinja2 import Environment, PackageLoader, StrictUndefined

from ..probe.results import BenchResult, Pattern
from ..sizes import format_bytes, format_rate
from .charts import Chart, bandwidth_chart, latency_chart, sustained_chart
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

__all__ = ["render_html", "render_svg"]

PATTERNS: tuple[tuple[Pattern, str], ...] = (
    ("read", "Read"),
    ("write", "Write, flush included"),
    ("mixed", "Both at once, sum"),
)

# Of the charts of one row, by how many there are; with gaps of 20 they fill 940.
PANEL_WIDTHS = {1: 460, 2: 460, 3: 300}

# Of the picture without a page around it, in pixels.
SVG_WIDTH = 1000
SVG_MARGIN = 30
ROW_GAP = 16
# A heading with its caption of one line each, and the space above them.
HEADING_HEIGHT = 78
# Where a caption breaks: 13 px text on 940 px.
CAPTION_CHARACTERS = 138


@dataclass(frozen=True, slots=True)
class _Figure:
    """Charts under one heading.

    Attributes:
        title: heading.
        facts: the caption, without which figures mean little.
        headline: (label, figure) pairs to be read first.
        rows: charts side by side, in rows.
    """

    title: str
    facts: tuple[str, ...]
    headline: tuple[tuple[str, str], ...]
    rows: tuple[tuple[Chart, ...], ...]


@dataclass(frozen=True, slots=True)
class _Placed:
    """Something at a place of the bare picture: a chart, or a line of text of a `kind`."""

    x: int
    y: int
    chart: Chart | None = None
    text: str = ""
    kind: str = ""


def render_html(result: BenchResult) -> str:
    """Return a page with every chart and every figure."""
    return (
        _environment()
        .get_template("bench.html")
        .render(
            title="offload bench: " + ", ".join(drive.path for drive in result.drives),
            host=_host_line(result),
            figures=list(_figures(result)),
            sections=sections_of(result),
            notes=result.notes,
        )
    )


def render_svg(result: BenchResult) -> str:
    """Return the charts as one SVG picture."""
    placed: list[_Placed] = []
    y = _place_text(placed, 44, "offload bench", "page-title")
    y = _place_text(placed, y + 4, _host_line(result), "caption")
    for figure in _figures(result):
        y = _place_text(placed, y + 36, figure.title, "heading")
        headline = "; ".join(f"{label} {value}" for label, value in figure.headline)
        for line in _wrap(". ".join(part for part in (headline, ", ".join(figure.facts)) if part)):
            y = _place_text(placed, y, line, "caption")
        for row in figure.rows:
            x = SVG_MARGIN
            for chart in row:
                placed.append(_Placed(x, y, chart=chart))
                x += chart.width + 20
            y += max(chart.height for chart in row) + ROW_GAP
    for note in result.notes:
        for line in _wrap(f"Note: {note}"):
            y = _place_text(placed, y + 4, line, "caption")
    template = _environment().get_template("bench.svg")
    return template.render(placed=placed, width=SVG_WIDTH, height=y + SVG_MARGIN, title=_host_line(result))


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
            chart = sustained_chart("Bandwidth over time", run)
            yield _Figure(f"Sustained writing to {path}", (), (), ((chart,),))


def _sweep_figure(result: BenchResult, group: tuple[int, ...]) -> _Figure:
    cells = cells_of(result, group)
    best = best_setting(result, group)
    timed = bandwidth_cells(cells)
    top = max((sample.bytes_per_s for cell in timed for sample in cell.samples), default=0.0)
    by_name = {name: [cell for cell in timed if cell.workload.pattern == key] for key, name in PATTERNS}
    # A single point is no curve: its figure stands above.
    drawn = {name: own for name, own in by_name.items() if len(own) > 1}
    rows = []
    if drawn:
        width = PANEL_WIDTHS[len(drawn)]
        panels = (bandwidth_chart(name, own, best, top=top, width=width) for name, own in drawn.items())
        rows.append(tuple(panels))
    if with_latency := latency_cells(cells):
        rows.append((latency_chart("Latency of single blocks", with_latency, best),))
    return _Figure(group_title(result, group), _caption(result, group), _headline(result, group), tuple(rows))


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


def _place_text(placed: list[_Placed], y: int, text: str, kind: str) -> int:
    """Put a line of text with its base line at `y`; return the base line of the next."""
    placed.append(_Placed(SVG_MARGIN, y, text=text, kind=kind))
    return y + (24 if kind != "caption" else 18)


def _wrap(text: str) -> list[str]:
    lines = [""]
    for word in text.split():
        if lines[-1] and len(lines[-1]) + 1 + len(word) > CAPTION_CHARACTERS:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return lines
