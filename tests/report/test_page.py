"""Pictures of a bench as files: well-formed, escaped, complete, silent, and the same each time."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path

import pytest
from report.bench_results import MIB, cell, full_result, machine, small_result

from offload.probe.results import BenchResult
from offload.report.page import render_html, render_svg

ROOT = Path(__file__).resolve().parents[2]
ODD = "/mnt/<script>alert(1)</script>&\"'$x^2$\u5b57"


def odd_result() -> BenchResult:
    result = full_result()
    first = replace(result.drives[0], path=ODD, source=ODD, engine_reason=ODD)
    return replace(result, drives=(first, *result.drives[1:]), notes=(ODD,))


def only_latency() -> BenchResult:
    cells = (replace(cell("read", MIB, 1, latency=True), samples=()),)
    return replace(small_result(), cells=cells)


def nothing_chosen() -> BenchResult:
    return replace(small_result(), machine=replace(machine(1), drives=()))


def words_of(svg: str) -> list[str]:
    return [text for element in ElementTree.fromstring(svg).iter() if (text := (element.text or "").strip())]


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
    page, picture = render_html(result), render_svg(result)
    ElementTree.fromstring(picture.encode())
    for svg in page.split("<svg")[1:]:
        ElementTree.fromstring("<svg" + svg.split("</svg>")[0] + "</svg>")
    for text in (page, picture):
        assert "<script" not in text
        assert not any(word in text for word in ("src=", "@import"))
        # Marks and clips are defined once and referred to, inside the file.
        assert all(target.startswith("#") for target in re.findall(r'href="([^"]*)"', text))
        assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", text))


def test_every_chart_and_figure_is_on_the_page() -> None:
    result = full_result()
    page = render_html(result)
    # Bandwidth of three groups, latencies of two drives, one long run.
    assert page.count('<div class="chart"') == page.count("<svg") == 3 + 2 + 1
    assert page.count("<tr") - page.count("<thead") == len(result.cells) + sum(
        one.latency is not None for one in result.cells if one.workload.mode == "bandwidth"
    )
    assert all(note in page for note in result.notes)
    assert 'id="axes_1"' not in page and "<!DOCTYPE svg" not in page


def test_the_picture_says_what_was_measured_where() -> None:
    words = words_of(render_svg(odd_result()))
    for text in (ODD, "/mnt/nvme1", "2 drives at once", "Notes", f"Sustained writing to {ODD}"):
        assert text in words
    caption = " ".join(words)
    assert "Read 3.11 GB/s; Write, flush included 2.13 GB/s" in caption
    assert "Best with blocks of 1 MiB, 8 in flight" in caption
    assert "engine threads, O_DIRECT, file of 4.0 GiB, 4.0 GiB verified" in caption


def test_the_same_result_gives_the_same_bytes_and_no_ground() -> None:
    first = render_svg(full_result())
    assert first == render_svg(full_result())
    assert "<dc:date>" not in first and "Matplotlib" not in first
    ground = ElementTree.fromstring(first.encode()).find(".//*[@id='patch_1']/*")
    assert ground is not None and ground.attrib["style"] == "fill: none"


QUIET = """
import pathlib, sys
sys.path.insert(0, "tests")
import report.bench_results as results
from offload.cli import main
from offload.probe import run
run.run_bench = lambda *_: results.full_result()
try:
    main(["bench", sys.argv[1], "--quiet", "--no-machine", "--plot", sys.argv[1] + "/b.svg"])
except SystemExit as end:
    assert end.code == 0, end.code
assert "matplotlib.pyplot" not in sys.modules
"""


def test_a_home_that_cannot_be_written_to_costs_nothing_and_prints_nothing(tmp_path: Path) -> None:
    # Under /proc nobody makes a folder, not even root; matplotlib builds its font cache elsewhere, anew.
    gone = dict.fromkeys(("HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME"), "/proc/none")
    kept = {name: value for name, value in os.environ.items() if name != "MPLCONFIGDIR"}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", QUIET, str(tmp_path)],
        cwd=ROOT,
        env={**kept, **gone, "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert [path.name for path in tmp_path.iterdir()] == ["b.svg"]
