"""Charts of a bench, drawn by matplotlib: bandwidth, latency, and a long write over time.

A `Chart` is a height and what draws itself into that much room; `to_figure` stacks charts, `to_svg` makes
a picture of them. Only matplotlib's objects are used, never pyplot; its settings are those of
`charts.mplstyle` while a chart is drawn, whatever the user's own are, and are put back.

Lines are told apart by colour, in an order that the colour-blind see as well, and by the shape of their
marks. Needs the extra `plot`: import it only when a picture is asked for.
"""

from __future__ import annotations

import io
import itertools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from matplotlib import rcParams, style
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import LogLocator, NullLocator
from matplotlib.transforms import offset_copy

from ..machine import IoSetting
from ..probe.results import Cell, SustainedRun
from ..sizes import format_rate
from .sections import format_block, format_latency

__all__ = ["Chart", "bandwidth_chart", "latency_chart", "sustained_chart", "to_figure", "to_svg"]

# In pixels, as the heights: 96 to an inch.
WIDTH = 940

# Found by a search: 3:1 against white and against #14171b, and no two of them near each other for people
# who lack one kind of cones either.
COLOURS = ("#0051ff", "#8b42c1", "#a5418d", "#c22b56", "#e40001", "#e27600")
MARKERS = ("o", "s", "^", "D", "X", "P")
PERCENTILES = (("p50", "p50_s"), ("p99", "p99_s"), ("p99.9", "p999_s"), ("max", "max_s"))
RING: dict[str, Any] = {"ms": 13, "mfc": "none", "mew": 1.6, "label": "best", "zorder": 10}


@dataclass(frozen=True, slots=True)
class Chart:
    """A height in pixels, and what fills a figure of that height."""

    height: int
    draw: Callable[[SubFigure], None]


def bandwidth_chart(panels: Mapping[str, Sequence[Cell]], best: IoSetting | None) -> Chart:
    """Return bandwidth over block size with a line for each depth, or over depth for a single block size.

    `panels` are cells by title, at least one and each with samples; they share a scale. `best` is ringed.
    """
    settings = [cell.workload.setting for cells in panels.values() for cell in cells]
    over_depth = len({setting.segment_nbytes for setting in settings}) == 1
    names = ("queue_depth", "segment_nbytes") if over_depth else ("segment_nbytes", "queue_depth")
    x_of, line_of = map(attrgetter, names)
    xlabel = "depth: operations in flight" if over_depth else "block size (K = KiB, M = MiB)"
    lines = sorted({line_of(setting) for setting in settings})

    def draw(figure: SubFigure) -> None:
        ink = rcParams["text.color"]
        row = _row(figure, len(panels))
        for axes, (title, cells) in zip(row, panels.items(), strict=True):
            # The deepest first: so the legend names them from the top, as the lines lie.
            for rank, line in reversed([*enumerate(lines)]):
                own = {c.workload.setting: c for c in cells if line_of(c.workload.setting) == line}
                xs, ys = [x_of(setting) for setting in own], [c.bytes_per_s / 1e9 for c in own.values()]
                ranges = [min(_rates(c)) for c in own.values()], [max(_rates(c)) for c in own.values()]
                look = _look(rank, len(lines))
                # Side by side: ranges that overlap at one block size would hide each other.
                at = offset_copy(axes.transData, figure.figure, 2 * rank - len(lines) + 1, units="points")
                axes.vlines(xs, *ranges, look["color"], lw=4, alpha=0.4, transform=at)
                axes.plot(xs, ys, label=_short_block(line) if over_depth else str(line), transform=at, **look)
                if best in own:
                    axes.plot(x_of(best), own[best].bytes_per_s / 1e9, "o", mec=ink, transform=at, **RING)
            axes.set(title=title, xlabel=xlabel)
        top = max(rate for cells in panels.values() for cell in cells for rate in _rates(cell))
        row[0].set(ylabel="bandwidth in GB/s", ylim=(0, 1.06 * top))
        row[0].set_xscale("log", base=2)
        row[0].set_xlim(min(map(x_of, settings)) / 1.4, max(map(x_of, settings)) * 1.4)
        row[0].xaxis.set_major_locator(LogLocator(base=2, numticks=7))
        row[0].xaxis.set_major_formatter(lambda x, _: f"{x:g}" if over_depth else _short_block(x))
        _legend(figure, row, "block" if over_depth else "depth")

    return Chart(300, draw)


def latency_chart(cells: Sequence[Cell], best: IoSetting | None) -> Chart:
    """Return p50, p99, p99.9 and the maximum of cells, at least one, a row each; `best` is ringed."""
    rows = [(c.workload.pattern, c.workload.setting, c.latency) for c in cells if c.latency is not None]
    names = [f"{pattern} {format_block(at.segment_nbytes)} x {at.queue_depth}" for pattern, at, _ in rows]
    low, high = min(latency.p50_s for *_, latency in rows), max(latency.max_s for *_, latency in rows)

    def draw(figure: SubFigure) -> None:
        (axes,), ink = _row(figure, 1, left=100), rcParams["text.color"]
        for rank, (name, field) in enumerate(PERCENTILES):
            seconds = [getattr(latency, field) for *_, latency in rows]
            # Where marks lie on each other, the lower percentile stays on top.
            axes.plot(seconds, range(len(rows)), label=name, ls="none", zorder=9 - rank, **_look(rank, 4))
        for place, (_, setting, latency) in enumerate(rows):
            axes.hlines(place, latency.p50_s, latency.max_s, ink, lw=1.2, alpha=0.6)
            if setting == best:
                axes.plot(latency.p50_s, place, "o", mec=ink, **RING)
        axes.set(title="Latency of single blocks", xlabel="latency of one operation, logarithmic")
        axes.set_yticks(range(len(rows)), names)
        axes.grid(visible=False, axis="y")
        # Wide enough for one labelled tick at least, whatever was measured.
        axes.set(ylim=(len(rows) - 0.4, -0.6), xscale="log", xlim=(low / 1.6, high * 1.6))
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 3000 * low else (1,)))
        axes.xaxis.set_major_formatter(lambda seconds, _: format_latency(seconds))
        axes.xaxis.set_minor_locator(NullLocator())
        _legend(figure, [axes], "")

    return Chart(24 * len(rows) + 96, draw)


def sustained_chart(run: SustainedRun) -> Chart:
    """Return the bandwidth of a long write over time; `run` has at least one point."""
    per_unit, unit = (60.0, "minutes") if run.points[-1].at_s >= 180 else (1.0, "seconds")
    times, rates = [p.at_s / per_unit for p in run.points], [p.bytes_per_s / 1e9 for p in run.points]
    written = itertools.accumulate(p.nbytes for p in run.points)
    drop_at = run.drop_at_nbytes or float("inf")
    drops = [time for time, nbytes in zip(times, written, strict=True) if nbytes >= drop_at]

    def draw(figure: SubFigure) -> None:
        (axes,), ink = _row(figure, 1), rcParams["text.color"]
        axes.stairs(rates, [0, *times], color=COLOURS[0], fill=True, alpha=0.12)
        axes.stairs(rates, [0, *times], color=COLOURS[0], baseline=None, lw=rcParams["lines.linewidth"])
        levels = {"first tenth": run.first_bytes_per_s, "last tenth": run.last_bytes_per_s}
        # The words for one level stand below it and for the other above: they cannot meet.
        for name, side in zip(sorted(levels, key=levels.__getitem__), ("top", "bottom"), strict=True):
            axes.axhline(levels[name] / 1e9, color=ink, lw=1, dashes=(5, 3), zorder=1, label=name)
            at = offset_copy(axes.get_yaxis_transform(), figure.figure, 6, units="points")
            text = f"{name}\n{format_rate(levels[name])}"
            axes.text(1, levels[name] / 1e9, text, transform=at, va=side)
        for time in drops[:1]:
            axes.axvline(time, color=COLOURS[-1], dashes=(2, 1.5), label="drop")
            side, aside = ("right", -6) if time > times[-1] / 2 else ("left", 6)
            at = offset_copy(axes.get_xaxis_transform(), figure.figure, aside, units="points")
            axes.text(time, 0.97, f"falls after {drop_at / 1e9:.0f} GB", transform=at, ha=side, va="top")
        axes.set(title="Bandwidth over time", xlabel=f"time in {unit}", ylabel="bandwidth in GB/s")
        axes.set(xlim=(0, times[-1]), ylim=(0, 1.25 * max(rates)))  # room for the words at the drop

    return Chart(260, draw)


def to_figure(charts: Sequence[Chart]) -> Figure:
    """Return the charts, at least one, one below the other."""
    heights = [chart.height for chart in charts]
    with _own_settings():
        figure = Figure(figsize=(WIDTH / 96, sum(heights) / 96))
        FigureCanvasSVG(figure)
        parts = figure.subfigures(len(charts), 1, squeeze=False, height_ratios=heights, hspace=0)
        for chart, part in zip(charts, parts[:, 0], strict=True):
            chart.draw(part)
    return figure


def to_svg(charts: Sequence[Chart], title: str) -> str:
    """Return the charts as an SVG file with a title for those who do not see it; the same each time."""
    figure, file = to_figure(charts), io.StringIO()
    with _own_settings():
        figure.savefig(file, format="svg", metadata={"Title": title, "Date": None, "Creator": None})
    return file.getvalue()


def _row(figure: SubFigure, count: int, *, left: float = 40) -> Sequence[Axes]:
    # Margins in points: matplotlib's solver finds them too, but its last digits differ from run to run.
    width, height = figure.bbox.size
    margins = {"left": left / width, "right": 1 - 64 / width, "bottom": 38 / height, "top": 1 - 28 / height}
    grid = {**margins, "wspace": 0.06}
    return list(figure.subplots(1, count, sharex=True, sharey=True, squeeze=False, gridspec_kw=grid)[0])


def _look(rank: int, count: int) -> dict[str, Any]:
    colour = COLOURS[round(rank * (len(COLOURS) - 1) / max(1, count - 1))]
    return {"color": colour, "marker": MARKERS[rank % len(MARKERS)]}


def _legend(figure: SubFigure, row: Sequence[Axes], title: str) -> None:
    """Say once what the lines of a row stand for; the ring comes last."""
    named = {str(line.get_label()): line for axes in row for line in axes.lines}
    names = sorted(named, key=lambda name: name == "best")
    figure.legend([named[name] for name in names], names, title=title, loc="upper right")


def _rates(cell: Cell) -> list[float]:
    return [sample.bytes_per_s / 1e9 for sample in cell.samples]


def _short_block(nbytes: float) -> str:
    return format_block(int(nbytes)).replace(" ", "").removesuffix("iB")


@contextmanager
def _own_settings() -> Iterator[None]:
    with style.context("offload.report.charts", after_reset=True), warnings.catch_warnings():
        # A path may have letters that DejaVu Sans lacks; the reader's font draws them, not ours.
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from font")
        yield
