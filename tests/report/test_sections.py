"""What is said of a bench: nothing left out, nothing said that was not measured, in every form."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import pytest
import yaml
from report.bench_results import MIB, cell, full_result, machine, small_result, sustained
from rich.console import Console

from offload.probe.results import BenchResult, LatencySummary
from offload.report.document import SCHEMA, bench_document, to_json
from offload.report.markdown import to_markdown
from offload.report.sections import Section, drive_groups, format_block, sections_of
from offload.report.terminal import print_sections, to_text
from offload.sizes import parse_bytes


def text_of(result: BenchResult) -> str:
    return to_text(sections_of(result))


def test_sections_come_in_reading_order() -> None:
    titles = [section.title for section in sections_of(full_result())]
    assert titles == [
        "/mnt/nvme0",
        "/mnt/nvme1",
        "2 drives at once",
        "Sustained writing to /mnt/nvme0",
        "Host",
        "Notes",
        "To paste",
    ]


def test_every_cell_and_note_is_shown() -> None:
    result = full_result()
    rows = sum(len(table.rows) for section in sections_of(result) for table in section.tables)
    bandwidth = sum(cell.workload.mode == "bandwidth" for cell in result.cells)
    assert rows == bandwidth + sum(cell.latency is not None for cell in result.cells)
    assert all(note in text_of(result) for note in result.notes)


def test_bandwidth_is_the_median_with_its_range() -> None:
    slow = cell("read", MIB, 1)
    samples = tuple(
        replace(slow.samples[0], nbytes=10**9, elapsed_s=seconds, flush_s=0.0) for seconds in (1.0, 0.5, 0.25)
    )
    result = replace(small_result(), cells=(replace(slow, samples=samples),))
    line = next(line for line in text_of(result).splitlines() if line.split()[:1] == ["read"])
    assert line.split()[4:6] == ["2.00", "[1.00..4.00]"]


def test_best_setting_is_marked_in_each_pattern_and_nowhere_else() -> None:
    marked = [line.split()[:4] for line in text_of(small_result()).splitlines() if line.endswith("<- best")]
    assert marked == [["read", "1", "MiB", "8"], ["write", "1", "MiB", "8"]]


def test_page_cache_is_named_when_direct_access_was_refused() -> None:
    direct, buffered = text_of(small_result()), text_of(small_result(direct=False))
    assert "cold: O_DIRECT bypasses the page cache" in direct
    assert "page cache dropped before each read" in buffered
    assert "cold" not in buffered


def test_parts_that_were_not_measured_are_left_out() -> None:
    bare = replace(machine(1, device=False), memory_bytes_per_s=None, crc32c_bytes_per_s=None)
    text = text_of(replace(small_result(), machine=bare))
    assert not any(word in text for word in ("crc32c", "memory copy", "pinned", "p99", "Sustained", "Notes"))


def test_a_run_without_a_drop_says_so() -> None:
    steady = replace(sustained(), drop_at_nbytes=None)
    assert "none: it stayed above" in text_of(replace(small_result(), sustained=(steady,)))
    assert "after 62.1 GB it fell" in text_of(replace(small_result(), sustained=(sustained(),)))


def test_drives_together_come_last_with_their_own_setting() -> None:
    result = full_result()
    assert drive_groups(result) == ((0,), (1,), (0, 1))
    together = sections_of(result)[2]
    assert ("best setting", "blocks of 4 MiB, 8 in flight: read 6.70 GB/s, write 4.40 GB/s") in together.facts


def test_tables_fit_a_terminal_of_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("NO_COLOR", "1")
    stream = Terminal()
    slow = LatencySummary(num_operations=200_000, p50_s=0.123, p99_s=0.234, p999_s=0.345, max_s=1.23)
    cells = (replace(cell("write", 128 << 10, 32, latency=True), latency=slow), cell("write", 8 << 20, 1))
    print_sections(sections_of(replace(small_result(), cells=cells)), stream)
    assert "\u2026" not in stream.getvalue()  # what rich puts in place of what it cut off
    assert "200,000" in stream.getvalue()


@pytest.mark.parametrize("nbytes", [4096, 6144, 128 << 10, 3 << 19, 1 << 20, (1 << 20) + 4096, 8 << 20])
def test_a_block_size_reads_back_exactly(nbytes: int) -> None:
    assert parse_bytes(format_block(nbytes)) == nbytes


def test_what_is_to_be_pasted_is_one_yaml_document() -> None:
    hint = sections_of(full_result())[-1]
    assert yaml.safe_load(hint.code) == {"disk": ["/mnt/nvme0", "/mnt/nvme1"]}
    assert "--block 4MiB --depth 8" in hint.code


def test_a_path_cannot_steer_a_terminal() -> None:
    section = Section("/mnt/\x1b[31mred\n", facts=(("drive", "\x1b]0;title\x07"),))
    assert "\x1b" not in to_text([section])


def test_plain_text_is_printed_where_there_is_no_terminal() -> None:
    stream = io.StringIO()
    print_sections(sections_of(small_result()), stream)
    assert stream.getvalue() == text_of(small_result())


def test_the_terminal_shows_the_same_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("TERM", "xterm")
    assert Console(file=Terminal()).is_terminal
    stream = Terminal()
    result = full_result()
    odd = replace(result.drives[0], path="/mnt/[bold]odd")
    print_sections(sections_of(replace(result, drives=(odd, *result.drives[1:]))), stream)
    shown = " ".join(stream.getvalue().split())
    assert "/mnt/[bold]odd" in shown
    for section in sections_of(result):
        for table in section.tables:
            assert all(cell in shown for row in table.rows for cell in row)


def test_markdown_has_the_same_tables_and_escapes_text() -> None:
    result = small_result()
    odd = replace(result.drives[0], source="/dev/<b>|*x*")
    page = to_markdown("offload bench", sections_of(replace(result, drives=(odd,))))
    assert page.startswith("# offload bench\n")
    assert "/dev/\\<b\\>|\\*x\\*" in page
    assert "| **read** | **1 MiB** | **8** |" in page
    widths = {line.count("|") for line in page.splitlines() if line.startswith("|")}
    assert len(widths) == 1


def test_json_has_stable_keys_and_every_raw_sample() -> None:
    result = full_result()
    document = json.loads(to_json(result))
    assert list(document) == [
        "schema",
        "measured_at",
        "drives",
        "cells",
        "best",
        "sustained",
        "machine",
        "notes",
    ]
    assert document["schema"] == SCHEMA == "offload-bench-1"
    first = document["cells"][0]
    assert list(first) == [
        "pattern",
        "mode",
        "drives",
        "segment_nbytes",
        "queue_depth",
        "bandwidth",
        "latency",
        "samples",
    ]
    assert list(first["samples"][0]) == ["nbytes", "elapsed_s", "flush_s", "cpu_s", "bytes_per_s"]
    assert sum(len(one["samples"]) for one in document["cells"]) == 3 * len(result.cells)
    assert document["best"][-1] == {
        "drives": [0, 1],
        "setting": {"segment_nbytes": 4 * MIB, "queue_depth": 8},
    }


def test_json_holds_no_number_that_json_has_not() -> None:
    wrong = replace(machine(1), crc32c_bytes_per_s=float("nan"))
    with pytest.raises(ValueError, match="not JSON compliant"):
        to_json(replace(small_result(), machine=wrong))


def test_a_cell_with_latencies_alone_has_no_bandwidth() -> None:
    only = replace(cell("read", MIB, 1, latency=True), samples=())
    document = bench_document(replace(small_result(), cells=(only,)))
    assert document["cells"][0]["bandwidth"] is None
    assert document["cells"][0]["latency"]["num_operations"] == 4096
    assert "p99.9" in text_of(replace(small_result(), cells=(only,)))


def test_single_operations_are_no_bandwidth() -> None:
    single = cell("read", 4096, 1, latency=True, mode="latency")
    best = cell("read", MIB, 8, latency=True)
    # The same setting in both modes: its latencies are shown once.
    again = cell("read", MIB, 8, latency=True, mode="latency")
    section = sections_of(replace(small_result(), cells=(single, best, again)))[0]
    bandwidth, latency = section.tables
    assert [row[:3] for row in bandwidth.rows] == [("read", "1 MiB", "8")]
    assert [row[:3] for row in latency.rows] == [("read", "4 KiB", "1"), ("read", "1 MiB", "8")]


def test_a_drive_is_found_by_its_path_where_another_has_no_setting() -> None:
    result = full_result()
    second = replace(result.machine, drives=result.machine.drives[1:])
    titles = {section.title: dict(section.facts) for section in sections_of(replace(result, machine=second))}
    assert "best setting" not in titles["/mnt/nvme0"]
    assert "best setting" in titles["/mnt/nvme1"]


def test_the_hint_names_no_setting_where_none_was_chosen() -> None:
    result = replace(small_result(), machine=replace(machine(1), drives=()))
    assert "--block" not in sections_of(result)[-1].code


def test_a_file_system_in_memory_is_never_called_cold() -> None:
    result = small_result()
    (drive,) = result.drives
    facts = dict(sections_of(replace(result, drives=(replace(drive, file_system="tmpfs"),)))[0].facts)
    assert facts["cache"] == "never cold: the file system is memory"
    assert dict(sections_of(result)[0].facts)["cache"] == "cold: O_DIRECT bypasses the page cache"
