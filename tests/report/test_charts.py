"""Charts of a bench: the figures they were given, at the places that the axes name, told apart."""

from __future__ import annotations

import itertools
from dataclasses import replace

import matplotlib
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from report.bench_results import BEST, DEPTHS, KIB, MIB, cell, sustained

from offload.probe.results import Cell
from offload.report.charts import (
    COLOURS,
    MARKERS,
    Chart,
    bandwidth_chart,
    latency_chart,
    sustained_chart,
    to_figure,
    to_svg,
)

BLOCKS = (128 * KIB, MIB, 4 * MIB)


def axes_of(chart: Chart) -> list[Axes]:
    return to_figure([chart]).axes


def sweep(*depths: int) -> list[Cell]:
    return [cell("read", block, depth) for block in BLOCKS for depth in depths]


def lines_of(axes: Axes) -> dict[str, list[tuple[float, float]]]:
    return {
        line.get_label(): list(map(tuple, line.get_xydata())) for line in axes.lines if len(line.get_xdata())
    }


def ticks_of(axes: Axes) -> list[str]:
    low, high = axes.get_xlim()
    labels = zip(axes.get_xticks(), axes.get_xticklabels(), strict=True)
    return [label.get_text() for at, label in labels if low <= at <= high]


def contrast(colour: str, ground: str) -> float:
    """WCAG 2.1, relative luminance and contrast ratio."""
    lights = []
    for rgb in (to_rgb(colour), to_rgb(ground)):
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in rgb]
        lights.append(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2])
    return (max(lights) + 0.05) / (min(lights) + 0.05)


def test_each_depth_is_a_line_of_its_medians_over_block_size() -> None:
    cells = sweep(1, 8)
    (axes,) = axes_of(bandwidth_chart({"Read": cells}, BEST))
    lines = lines_of(axes)
    for depth in (1, 8):
        own = [one for one in cells if one.workload.setting.queue_depth == depth]
        assert lines[str(depth)] == [
            (one.workload.setting.segment_nbytes, one.bytes_per_s / 1e9) for one in own
        ]
    assert lines["best"] == [(MIB, cell("read", MIB, 8).bytes_per_s / 1e9)]
    assert (axes.get_title(loc="left"), axes.get_ylabel()) == ("Read", "bandwidth in GB/s")
    assert axes.get_xlabel() == "block size (K = KiB, M = MiB)"
    assert ticks_of(axes) == ["128K", "256K", "512K", "1M", "2M", "4M"]


def test_the_range_of_the_samples_stands_behind_each_mark() -> None:
    (axes,) = axes_of(bandwidth_chart({"Read": sweep(8)}, None))
    (ranges,) = axes.collections
    for one, ((x, low), (same_x, high)) in zip(sweep(8), ranges.get_segments(), strict=True):
        rates = [sample.bytes_per_s / 1e9 for sample in one.samples]
        assert (x, low, high) == (one.workload.setting.segment_nbytes, min(rates), max(rates)) and x == same_x


def test_panels_share_a_scale_from_zero_over_the_fastest_sample() -> None:
    write = [cell("write", block, 8) for block in BLOCKS]
    panels = axes_of(bandwidth_chart({"Read": sweep(1, 8), "Write": write}, None))
    fastest = max(sample.bytes_per_s for one in sweep(8) for sample in one.samples) / 1e9
    for axes in panels:
        assert axes.get_ylim()[0] == 0 and fastest < axes.get_ylim()[1] < 1.2 * fastest
        assert axes.get_xlim()[0] < BLOCKS[0] and axes.get_xlim()[1] > BLOCKS[-1]
    assert [list(lines_of(axes)) for axes in panels] == [["8", "1"], ["8"]]


def test_lines_are_told_apart_by_colour_by_mark_and_in_a_legend() -> None:
    figure = to_figure([bandwidth_chart({"Read": sweep(*DEPTHS), "Write": sweep(*DEPTHS)}, BEST)])
    lines = [line for line in figure.axes[0].lines if line.get_label() != "best"]
    assert (
        len({line.get_color() for line in lines}) == len({line.get_marker() for line in lines}) == len(DEPTHS)
    )
    ((legend,),) = [part.legends for part in figure.subfigs]
    assert [text.get_text() for text in legend.get_texts()] == ["32", "8", "2", "1", "best"]
    assert legend.get_title().get_text() == "depth"


def test_one_block_size_is_drawn_over_depth() -> None:
    (axes,) = axes_of(bandwidth_chart({"Read": [cell("read", MIB, depth) for depth in (1, 8, 32)]}, BEST))
    assert [x for x, _ in lines_of(axes)["1M"]] == [1, 8, 32]
    assert axes.get_xlabel() == "depth: operations in flight"
    assert ticks_of(axes) == ["1", "2", "4", "8", "16", "32"]


@pytest.mark.parametrize(("smallest", "number"), [(128 * KIB, 7), (4 * KIB, 15)])
def test_labels_of_a_full_sweep_do_not_run_into_each_other(smallest: int, number: int) -> None:
    cells = [cell("read", smallest << step, depth) for step in range(number) for depth in (1, 8)]
    figure = to_figure([bandwidth_chart(dict.fromkeys("abc", cells), None)])
    figure.draw_without_rendering()
    for axes in figure.axes:
        low, high = axes.get_xlim()
        ticks = zip(axes.get_xticks(), axes.get_xticklabels(), strict=True)
        boxes = [label.get_window_extent() for at, label in ticks if low <= at <= high]
        assert len(boxes) > 3
        assert all(left.x1 + 2 < right.x0 for left, right in itertools.pairwise(boxes))


def test_percentiles_stand_in_rows_on_a_logarithmic_axis() -> None:
    cells = [cell("read", 4 * KIB, 1, latency=True), cell("write", MIB, 8, latency=True)]
    (axes,) = axes_of(latency_chart(cells, BEST))
    lines, summaries = lines_of(axes), [one.latency for one in cells]
    for name, field in (("p50", "p50_s"), ("p99", "p99_s"), ("p99.9", "p999_s"), ("max", "max_s")):
        assert lines[name] == [(getattr(one, field), row) for row, one in enumerate(summaries)]
    assert lines["best"] == [(summaries[1].p50_s, 1)]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["read 4 KiB x 1", "write 1 MiB x 8"]
    assert axes.get_ylim()[0] > axes.get_ylim()[1], "the first row is on top"
    assert axes.get_xscale() == "log"
    low, high = axes.get_xlim()
    assert low < summaries[0].p50_s and summaries[1].max_s < high
    assert {"100 us", "1 ms", "20 ms"} <= set(ticks_of(axes))


@pytest.mark.parametrize("factor", [1.0, 1.4, 100.0, 1e5])
def test_the_latency_axis_has_few_ticks_but_one_at_least(factor: float) -> None:
    one = cell("read", 4 * KIB, 1, latency=True)
    assert one.latency is not None
    for p50_s in (1.1e-4, 2.1e-4, 5.1e-4, 9.9e-4):
        times = {"p50_s": p50_s, "p99_s": p50_s, "p999_s": p50_s, "max_s": factor * p50_s}
        (axes,) = axes_of(latency_chart([replace(one, latency=replace(one.latency, **times))], None))
        assert 1 <= len(ticks_of(axes)) <= 12


def test_a_long_run_is_a_curve_with_its_levels_and_its_drop() -> None:
    run = sustained()
    (axes,) = axes_of(sustained_chart(run))
    for steps in axes.patches:
        assert list(steps.get_data().values) == [point.bytes_per_s / 1e9 for point in run.points]
        assert list(steps.get_data().edges) == [0, *(point.at_s for point in run.points)]
    lines = lines_of(axes)
    assert {y for _, y in lines["first tenth"]} == {2.3} and {y for _, y in lines["last tenth"]} == {1.0}
    ((drop_s, _), _) = lines["drop"]
    assert all(point.bytes_per_s == 2.3e9 for point in run.points if point.at_s <= drop_s)
    assert all(point.bytes_per_s < 1.2e9 for point in run.points if point.at_s > drop_s)
    words = [text.get_text() for text in axes.texts]
    assert words == ["last tenth\n1.00 GB/s", "first tenth\n2.30 GB/s", "falls after 62 GB"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("time in seconds", "bandwidth in GB/s")


def test_a_steady_run_has_no_drop() -> None:
    (axes,) = axes_of(sustained_chart(replace(sustained(), drop_at_nbytes=None)))
    assert "drop" not in lines_of(axes)


@pytest.mark.parametrize("last", [1.0e9, 2.29e9, 2.3e9, 2.5e9])
def test_the_words_at_the_levels_never_meet(last: float) -> None:
    figure = to_figure([sustained_chart(replace(sustained(), last_bytes_per_s=last))])
    figure.draw_without_rendering()
    lower, upper = (text.get_window_extent() for text in figure.axes[0].texts[:2])
    assert lower.y1 <= upper.y0 + 0.01
    assert upper.x1 <= figure.bbox.width


def test_long_runs_are_shown_in_minutes() -> None:
    run = sustained()
    slow = replace(run, points=tuple(replace(point, at_s=point.at_s * 10) for point in run.points))
    (axes,) = axes_of(sustained_chart(slow))
    assert (axes.get_xlabel(), axes.get_xlim()) == ("time in minutes", (0, 10))


def test_every_colour_is_seen_on_white_and_on_dark() -> None:
    with matplotlib.style.context("offload.report.charts", after_reset=True):
        ink = matplotlib.rcParams["text.color"]
    for ground in ("#ffffff", "#14171b"):
        assert contrast(ink, ground) >= 4
        assert all(contrast(colour, ground) >= 3 for colour in COLOURS)
    assert len(set(COLOURS)) == len(set(MARKERS)) == 6


def test_the_users_own_settings_neither_show_nor_change() -> None:
    charts = [bandwidth_chart({"Read": sweep(1, 8)}, BEST)]
    plain = to_svg(charts, "bench")
    own = {"font.size": 20, "svg.fonttype": "path", "axes.labelsize": 30, "lines.linestyle": "--"}
    with matplotlib.rc_context(own):
        assert to_svg(charts, "bench") == plain
        assert matplotlib.rcParams["font.size"] == 20 and matplotlib.rcParams["svg.fonttype"] == "path"
