"""Charts as geometry: which mark stands where. Pure; `page` draws them.

Three kinds: bandwidth over block size with a line for each depth (or over depth, when one block size was
measured), latency percentiles on a logarithmic axis, and bandwidth over the time of a long write.

Depths are told apart three times: by lightness (shades 0 to 5, ordered, safe for the colour-blind), by the
shape of their marks, and by a label at the line's end. All coordinates are pixels of the chart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..machine import IoSetting
from ..probe.results import Cell, SustainedRun
from ..sizes import format_rate
from .scales import Tick, category_scale, linear_scale, log_scale, spread
from .sections import format_block, format_latency, format_range

__all__ = ["Band", "Chart", "Label", "Line", "Mark", "bandwidth_chart", "latency_chart", "sustained_chart"]

SHAPES = ("circle", "square", "triangle", "diamond", "cross", "plus")
NUM_SHADES = 6

PANEL_HEIGHT = 300
WIDE_WIDTH, SUSTAINED_HEIGHT = 940, 250
LATENCY_ROW_HEIGHT = 24

# Ticks of the latency axis in seconds.
LATENCY_TICKS = {
    scale * 10.0**power: f"{scale * 10 ** (power - exponent):g} {unit}"
    for power, exponent, unit in (
        (-6, -6, "us"),
        (-5, -6, "us"),
        (-4, -6, "us"),
        (-3, -3, "ms"),
        (-2, -3, "ms"),
        (-1, -3, "ms"),
        (0, 0, "s"),
        (1, 0, "s"),
    )
    for scale in (1, 2, 5)
}


@dataclass(frozen=True, slots=True)
class Mark:
    """One measured value.

    Attributes:
        x: pixels.
        y: pixels.
        shape: an entry of SHAPES, or `open` for a ring.
        shade: 0 to 5.
        title: what a pointer shows.
        best: whether it is the setting that was chosen.
    """

    x: float
    y: float
    shape: str
    shade: int
    title: str
    best: bool = False


@dataclass(frozen=True, slots=True)
class Line:
    """A stroke through points.

    Attributes:
        points: (x, y) pairs.
        kind: `series`, `range`, `leader`, `dashed`, `drop` or `row`.
        shade: 0 to 5.
    """

    points: tuple[tuple[float, float], ...]
    kind: str = "series"
    shade: int = 0

    @property
    def text(self) -> str:
        """The points as SVG has them."""
        return " ".join(f"{x:g},{y:g}" for x, y in self.points)


@dataclass(frozen=True, slots=True)
class Band:
    """A filled area under a curve, as the points around it."""

    points: tuple[tuple[float, float], ...]

    @property
    def text(self) -> str:
        """The points as SVG has them."""
        return " ".join(f"{x:g},{y:g}" for x, y in self.points)


@dataclass(frozen=True, slots=True)
class Label:
    """Text in a chart.

    Attributes:
        x: pixels.
        y: pixels of the base line.
        text: what it says.
        anchor: `start`, `middle` or `end`.
        strong: whether it names a figure; else it explains.
    """

    x: float
    y: float
    text: str
    anchor: str = "start"
    strong: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """One picture.

    Attributes:
        title: heading inside the picture.
        description: for those who do not see it.
        width: pixels.
        height: pixels.
        plot: left, top, right and bottom of the area inside the axes.
        x_ticks: labelled places below.
        y_ticks: labelled places on the left.
        x_title: quantity and unit of the horizontal axis.
        y_title: quantity and unit of the upright axis.
        upright_grid: whether grid lines stand at the horizontal axis's ticks instead of the other's.
        bands: drawn first.
        lines: drawn over the grid.
        marks: drawn over the lines.
        labels: drawn last.
    """

    title: str
    description: str
    width: int
    height: int
    plot: tuple[int, int, int, int]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    x_title: str
    y_title: str
    upright_grid: bool = False
    bands: tuple[Band, ...] = ()
    lines: tuple[Line, ...] = ()
    marks: tuple[Mark, ...] = ()
    labels: tuple[Label, ...] = ()


def bandwidth_chart(
    title: str, cells: Sequence[Cell], best: IoSetting | None, *, top: float, width: int
) -> Chart:
    """Draw the bandwidth of cells of one pattern.

    Args:
        title: heading.
        cells: at least one, each with samples.
        best: the setting to ring.
        top: highest bandwidth of the axis in bytes per second, the same for charts side by side.
        width: pixels.
    """
    blocks = sorted({cell.workload.setting.segment_nbytes for cell in cells})
    depths = sorted({cell.workload.setting.queue_depth for cell in cells})
    over_depth = len(blocks) == 1 and len(depths) > 1
    xs, series = (depths, blocks) if over_depth else (blocks, depths)
    name = _short_block if over_depth else str
    left, right_edge, upper, lower = 42, width - 62, 52, PANEL_HEIGHT - 48
    places = category_scale([str(x) if over_depth else _short_block(x) for x in xs], left, right_edge)
    x_of = {value: tick.at for value, tick in zip(xs, places, strict=True)}
    y_scale = linear_scale(top / 1e9, lower, upper)
    step = (right_edge - left) / len(places)
    lines: list[Line] = []
    marks: list[Mark] = []
    ends: list[tuple[float, float]] = []
    for rank, value in enumerate(series):
        shade, shape = _shade(rank, len(series)), SHAPES[rank % len(SHAPES)]
        own = [cell for cell in cells if _series_of(cell, over_depth) == value]
        own.sort(key=lambda cell: _x_of(cell, over_depth))
        # Side by side: ranges that overlap at one block size would hide each other.
        aside = (rank - (len(series) - 1) / 2) * min(7.0, 0.5 * step / len(series))
        points = []
        for cell in own:
            x = round(x_of[_x_of(cell, over_depth)] + aside, 1)
            y = y_scale.at(cell.bytes_per_s / 1e9)
            rates = [sample.bytes_per_s / 1e9 for sample in cell.samples]
            lines.append(Line(((x, y_scale.at(min(rates))), (x, y_scale.at(max(rates)))), "range", shade))
            marks.append(Mark(x, y, shape, shade, _cell_title(cell), cell.workload.setting == best))
            points.append((x, y))
        lines.append(Line(tuple(points), "series", shade))
        ends.append(points[-1])
    key_x = right_edge + 20
    heights = spread([y for _, y in ends], 15, upper, lower)
    labels = [Label(key_x - 6, min(heights) - 12, "block" if over_depth else "depth")]
    for rank, (value, (x, y), height) in enumerate(zip(series, ends, heights, strict=True)):
        shade = _shade(rank, len(series))
        lines.append(Line(((x + 7, y), (key_x - 7, height)), "leader", shade))
        marks.append(Mark(key_x, height, SHAPES[rank % len(SHAPES)], shade, ""))
        labels.append(Label(key_x + 10, height + 4, name(value), strong=True))
    return Chart(
        title=title,
        description=f"{title}: " + "; ".join(mark.title for mark in marks if mark.title),
        width=width,
        height=PANEL_HEIGHT,
        plot=(left, upper, right_edge, lower),
        # Labels of four letters need 34 pixels; where there is less, every second one is left out.
        x_ticks=places if step >= 34 else places[::2],
        y_ticks=y_scale.ticks,
        x_title="depth: operations in flight" if over_depth else "block size (K = KiB, M = MiB)",
        y_title="GB/s",
        lines=tuple(lines),
        marks=tuple(marks),
        labels=tuple(labels),
    )


def latency_chart(title: str, cells: Sequence[Cell], best: IoSetting | None) -> Chart:
    """Draw p50, p99, p99.9 and the maximum of cells, one row each.

    Args:
        title: heading.
        cells: at least one, each with latencies.
        best: the setting to ring.
    """
    left, upper = 190, 66
    lower = upper + LATENCY_ROW_HEIGHT * len(cells)
    right_edge = WIDE_WIDTH - 30
    summaries = [cell.latency for cell in cells if cell.latency is not None]
    scale = log_scale(
        min(summary.p50_s for summary in summaries),
        max(summary.max_s for summary in summaries),
        left,
        right_edge,
        LATENCY_TICKS,
    )
    rows = category_scale([_cell_name(cell) for cell in cells], upper, lower)
    lines: list[Line] = []
    marks: list[Mark] = []
    for cell, summary, row in zip(cells, summaries, rows, strict=True):
        steps = (
            ("p50", summary.p50_s, "circle", 5),
            ("p99", summary.p99_s, "diamond", 3),
            ("p99.9", summary.p999_s, "triangle", 1),
            ("max", summary.max_s, "open", 0),
        )
        lines.append(Line(((scale.at(summary.p50_s), row.at), (scale.at(summary.max_s), row.at)), "row"))
        chosen = cell.workload.setting == best
        # The slowest first: where marks lie on each other, p50 stays on top.
        for name, seconds, shape, shade in reversed(steps):
            text = f"{row.label}: {name} {format_latency(seconds)}"
            marks.append(Mark(scale.at(seconds), row.at, shape, shade, text, chosen and name == "p50"))
    key = [(left + 96 * place, text) for place, text in enumerate(("p50", "p99", "p99.9", "max"))]
    for (x, _), (shape, shade) in zip(
        key, (("circle", 5), ("diamond", 3), ("triangle", 1), ("open", 0)), strict=True
    ):
        marks.append(Mark(x + 6, 44, shape, shade, ""))
    return Chart(
        title=title,
        description=f"{title}: " + "; ".join(mark.title for mark in marks if mark.title),
        width=WIDE_WIDTH,
        height=lower + 46,
        plot=(left, upper, right_edge, lower),
        x_ticks=scale.ticks,
        y_ticks=rows,
        x_title="latency of one operation, logarithmic",
        y_title="",
        upright_grid=True,
        lines=tuple(lines),
        marks=tuple(marks),
        labels=tuple(Label(x + 16, 48, text) for x, text in key),
    )


def sustained_chart(title: str, run: SustainedRun) -> Chart:
    """Draw a long write over time; `run` has at least one point."""
    left, upper, right_edge, lower = 42, 52, WIDE_WIDTH - 122, SUSTAINED_HEIGHT - 48
    seconds = run.points[-1].at_s
    per_unit, unit = (60.0, "minutes") if seconds >= 180 else (1.0, "seconds")
    x_scale = linear_scale(seconds / per_unit, left, right_edge, num_ticks=8)
    y_scale = linear_scale(max(point.bytes_per_s for point in run.points) / 1e9, lower, upper, num_ticks=4)
    points = tuple(
        (x_scale.at(point.at_s / per_unit), y_scale.at(point.bytes_per_s / 1e9)) for point in run.points
    )
    lines = [Line(points, "series", 5)]
    levels = (("first tenth", run.first_bytes_per_s), ("last tenth", run.last_bytes_per_s))
    labels = []
    places = spread([y_scale.at(rate / 1e9) for _, rate in levels], 30, upper, lower)
    for (name, rate), place in zip(levels, places, strict=True):
        y = y_scale.at(rate / 1e9)
        lines.append(Line(((left, y), (right_edge, y)), "dashed", 2))
        labels += [
            Label(right_edge + 10, place - 2, name),
            Label(right_edge + 10, place + 12, format_rate(rate), strong=True),
        ]
    if run.drop_at_nbytes is not None and (when := _time_of(run)) is not None:
        x = x_scale.at(when / per_unit)
        lines.append(Line(((x, upper), (x, lower)), "drop", 2))
        on_left = x > (left + right_edge) / 2
        text = f"falls after {run.drop_at_nbytes / 1e9:.0f} GB"
        labels.append(Label(x - 7 if on_left else x + 7, upper - 7, text, "end" if on_left else "start"))
    return Chart(
        title=title,
        description=f"{title}: first tenth {format_rate(run.first_bytes_per_s)}, "
        f"last tenth {format_rate(run.last_bytes_per_s)}",
        width=WIDE_WIDTH,
        height=SUSTAINED_HEIGHT,
        plot=(left, upper, right_edge, lower),
        x_ticks=x_scale.ticks,
        y_ticks=y_scale.ticks,
        x_title=f"time in {unit}",
        y_title="GB/s",
        bands=(Band(((points[0][0], lower), *points, (points[-1][0], lower))),),
        lines=tuple(lines),
        labels=tuple(labels),
    )


def _time_of(run: SustainedRun) -> float | None:
    """Return when the drop came, in seconds; None when the curve ends before."""
    written = 0
    for point in run.points:
        written += point.nbytes
        if run.drop_at_nbytes is not None and written >= run.drop_at_nbytes:
            return point.at_s
    return None


def _series_of(cell: Cell, over_depth: bool) -> int:
    setting = cell.workload.setting
    return setting.segment_nbytes if over_depth else setting.queue_depth


def _x_of(cell: Cell, over_depth: bool) -> int:
    return _series_of(cell, not over_depth)


def _shade(rank: int, count: int) -> int:
    """Return 0 (shallow) to 5 (deep), spread over as many series as there are."""
    return NUM_SHADES - 1 if count == 1 else round(rank * (NUM_SHADES - 1) / (count - 1))


def _short_block(nbytes: int) -> str:
    return format_block(nbytes).replace(" ", "").removesuffix("iB")


def _cell_name(cell: Cell) -> str:
    setting = cell.workload.setting
    return f"{cell.workload.pattern} {format_block(setting.segment_nbytes)} x {setting.queue_depth}"


def _cell_title(cell: Cell) -> str:
    return f"{_cell_name(cell)}: {cell.bytes_per_s / 1e9:.2f} GB/s {format_range(cell)}"
