"""Pictures of a bench: well-formed, escaped, complete, and drawn where the figures are."""

from __future__ import annotations

import itertools
import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import pytest
from report.bench_results import BEST, KIB, MIB, cell, full_result, machine, small_result, sustained

from offload.probe.results import BenchResult
from offload.report.charts import bandwidth_chart, latency_chart, sustained_chart
from offload.report.page import render_html, render_svg

SVG = "{http://www.w3.org/2000/svg}"
ODD = "/mnt/<script>alert(1)</script>&\"'"


def odd_result() -> BenchResult:
    result = full_result()
    first = replace(result.drives[0], path=ODD, source=ODD, engine_reason=ODD)
    return replace(result, drives=(first, *result.drives[1:]), notes=(ODD,))


def only_latency() -> BenchResult:
    cells = (replace(cell("read", MIB, 1, latency=True), samples=()),)
    return replace(small_result(), cells=cells)


def nothing_chosen() -> BenchResult:
    return replace(small_result(), machine=replace(machine(1), drives=()))


@pytest.mark.parametrize(
    "result",
    [
        full_result(),
        small_result(),
        odd_result(),
        only_latency(),
        nothing_chosen(),
        replace(small_result(), cells=()),
    ],
    ids=["full", "small", "odd names", "latency only", "nothing chosen", "no cells"],
)
def test_pictures_are_well_formed_and_need_nothing_else(result: BenchResult) -> None:
    ElementTree.fromstring(render_svg(result))
    page = render_html(result)
    for svg in page.split("<svg")[1:]:
        ElementTree.fromstring("<svg" + svg.split("</svg>")[0] + "</svg>")
    for text in (page, render_svg(result)):
        assert "<script" not in text
        assert not any(word in text for word in ("src=", "href=", "@import", "url("))


def test_every_chart_and_figure_is_on_the_page() -> None:
    result = full_result()
    page = render_html(result)
    # Three groups of three patterns, latencies of two drives, one long run.
    assert page.count('<svg class="chart"') == 3 * 3 + 2 + 1
    assert page.count("<tr") - page.count("<thead") == len(result.cells) + sum(
        one.latency is not None for one in result.cells if one.workload.mode == "bandwidth"
    )
    assert all(note in page for note in result.notes)
    assert page.count('class="ring"') == 3 * 3 + 2 * 2


def test_charts_of_the_bare_picture_do_not_overlap() -> None:
    root = ElementTree.fromstring(render_svg(full_result()))
    frames = [
        tuple(float(svg.attrib[name]) for name in ("x", "y", "width", "height"))
        for svg in root.findall(f"{SVG}svg")
    ]
    assert len(frames) == 12
    for index, (x, y, width, height) in enumerate(frames):
        assert x + width <= float(root.attrib["width"]) and y + height <= float(root.attrib["height"])
        for other_x, other_y, other_width, other_height in frames[index + 1 :]:
            apart = (
                x + width <= other_x
                or other_x + other_width <= x
                or y + height <= other_y
                or other_y + other_height <= y
            )
            assert apart


def test_bandwidth_stands_where_its_axis_says() -> None:
    cells = [cell("read", block, depth) for block in (128 * KIB, MIB) for depth in (1, 8)]
    chart = bandwidth_chart("Read", cells, BEST, top=4e9, width=460)
    bottom, top = chart.y_ticks[0], chart.y_ticks[-1]
    assert (bottom.label, top.label) == ("0", "4")
    for one in cells:
        value = one.bytes_per_s / 1e9
        wanted = bottom.at + value / 4 * (top.at - bottom.at)
        assert any(mark.y == pytest.approx(wanted, abs=0.1) for mark in chart.marks), value
    assert [mark.title.split(":")[0] for mark in chart.marks if mark.best] == ["read 1 MiB x 8"]


def test_labels_of_a_full_sweep_do_not_run_into_each_other() -> None:
    cells = [cell("read", 128 * KIB << step, depth) for step in range(7) for depth in (1, 8)]
    for width in (300, 460):
        ticks = bandwidth_chart("Read", cells, None, top=4e9, width=width).x_ticks
        gaps = [right.at - left.at for left, right in itertools.pairwise(ticks)]
        assert min(gaps) >= 34 and ticks[0].label == "128K"


def test_one_block_size_is_drawn_over_depth() -> None:
    cells = [cell("read", MIB, depth) for depth in (1, 8, 32)]
    chart = bandwidth_chart("Read", cells, None, top=4e9, width=460)
    assert [tick.label for tick in chart.x_ticks] == ["1", "8", "32"]
    assert chart.x_title.startswith("depth")


def test_latency_axis_holds_every_mark() -> None:
    cells = [cell("read", 4 * KIB, 1, latency=True), cell("write", 8 * MIB, 32, latency=True)]
    chart = latency_chart("Latency", cells, BEST)
    left, _, right, _ = chart.plot
    assert all(left <= mark.x <= right for mark in chart.marks if mark.title)
    by_name = {mark.title.rsplit(" ", 2)[0]: mark.x for mark in chart.marks if mark.title}
    assert by_name["read 4 KiB x 1: p50"] < by_name["read 4 KiB x 1: p99"] < by_name["read 4 KiB x 1: p99.9"]


def test_the_drop_of_a_long_run_is_marked_where_it_came() -> None:
    chart = sustained_chart("Sustained", sustained())
    drop = next(line for line in chart.lines if line.kind == "drop")
    curve = next(line for line in chart.lines if line.kind == "series")
    before = [y for x, y in curve.points if x < drop.points[0][0]]
    after = [y for x, y in curve.points if x > drop.points[0][0]]
    assert max(before) < min(after)  # pixels grow downwards
    assert any("falls after 62 GB" in label.text for label in chart.labels)
    steady = sustained_chart("Sustained", replace(sustained(), drop_at_nbytes=None))
    assert not [line for line in steady.lines if line.kind == "drop"]


def test_long_runs_are_shown_in_minutes() -> None:
    run = sustained()
    slow = replace(run, points=tuple(replace(point, at_s=point.at_s * 10) for point in run.points))
    assert sustained_chart("Sustained", slow).x_title == "time in minutes"
