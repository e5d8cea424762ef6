"""Which settings are tried, which one is kept, and when a drive's bandwidth has dropped."""

from __future__ import annotations

import pytest

from offload.machine import IoSetting
from offload.probe.choice import best_setting, in_flight_nbytes, settings_of, sustained_run
from offload.probe.options import BenchOptions
from offload.probe.results import Cell, Sample, SustainedPoint, Workload
from offload.sizes import KIB, MIB


def setting(block: int, depth: int) -> IoSetting:
    return IoSetting(segment_nbytes=block, queue_depth=depth)


def cell(pattern: str, where: IoSetting, *gb_per_s: float) -> Cell:
    samples = tuple(Sample(nbytes=10**9, elapsed_s=1 / rate, flush_s=0.0, cpu_s=0.1) for rate in gb_per_s)
    return Cell(workload=Workload(pattern=pattern, setting=where, drives=(0,)), samples=samples)


SMALL, MIDDLE, LARGE = setting(MIB, 4), setting(MIB, 16), setting(4 * MIB, 32)


def test_the_least_in_flight_within_two_per_cent_is_kept():
    cells = [
        *(cell("read", where, rate) for where, rate in ((SMALL, 5.0), (MIDDLE, 6.9), (LARGE, 7.0))),
        *(cell("write", where, rate) for where, rate in ((SMALL, 5.0), (MIDDLE, 6.9), (LARGE, 7.0))),
    ]
    assert best_setting(cells) == MIDDLE


def test_more_than_two_per_cent_is_worth_more_in_flight():
    cells = [
        *(cell("read", where, rate) for where, rate in ((MIDDLE, 6.8), (LARGE, 7.0))),
        *(cell("write", where, rate) for where, rate in ((MIDDLE, 6.8), (LARGE, 7.0))),
    ]
    assert best_setting(cells) == LARGE


def test_reads_and_writes_count_alike():
    # 10 % less of the faster direction weighs as much as 10 % less of the slower one.
    cells = [
        *(cell("read", where, rate) for where, rate in ((SMALL, 9.0), (LARGE, 10.0))),
        *(cell("write", where, rate) for where, rate in ((SMALL, 1.2), (LARGE, 1.0))),
    ]
    assert best_setting(cells) == SMALL


def test_the_median_decides_and_not_a_lucky_sample():
    cells = [cell("read", SMALL, 5, 5, 20), cell("read", LARGE, 7, 7, 7)]
    assert best_setting(cells) == LARGE


def test_a_setting_that_lacks_a_pattern_is_left_out():
    cells = [cell("read", SMALL, 7), cell("write", SMALL, 7), cell("read", LARGE, 9)]
    assert best_setting(cells) == SMALL


def test_mixed_does_not_count_beside_the_others():
    cells = [cell("read", SMALL, 7), cell("read", LARGE, 7), cell("mixed", LARGE, 99)]
    assert best_setting(cells) == SMALL


def test_mixed_alone_decides_where_nothing_else_was_measured():
    assert best_setting([cell("mixed", SMALL, 5), cell("mixed", LARGE, 7)]) == LARGE


def test_of_equal_bytes_in_flight_fewer_operations_are_kept():
    many, few = setting(256 * KIB, 32), setting(MIB, 8)
    assert best_setting([cell("read", many, 7.05), cell("read", few, 7)]) == few


def test_nothing_measured_keeps_nothing():
    assert best_setting([]) is None


def test_the_full_sweep_crosses_blocks_and_depths():
    settings = settings_of(BenchOptions(full=True))
    assert len(settings) == 42
    assert setting(128 * KIB, 1) in settings
    assert setting(8 * MIB, 32) in settings


def test_named_blocks_and_depths_replace_the_default_ones():
    named = settings_of(BenchOptions(block_nbytes=(MIB, 4 * MIB), depths=(1, 8)))
    assert set(named) == {setting(block, depth) for block in (MIB, 4 * MIB) for depth in (1, 8)}
    assert {one.queue_depth for one in settings_of(BenchOptions(full=True, block_nbytes=(MIB,)))} == {
        1, 2, 4, 8, 16, 32,
    }  # fmt: skip


def test_settings_deeper_than_the_engine_are_measured_once():
    settings = settings_of(BenchOptions(full=True), max_depth=8)
    assert max(one.queue_depth for one in settings) == 8
    assert len(settings) == len(set(settings)) == 7 * 4
    assert max(map(in_flight_nbytes, settings)) == 64 * MIB


def points(*gb_per_s: float) -> list[SustainedPoint]:
    return [
        SustainedPoint(at_s=at + 1.0, nbytes=round(rate * 1e9), bytes_per_s=rate * 1e9)
        for at, rate in enumerate(gb_per_s)
    ]


def test_a_full_write_cache_shows_as_a_drop():
    run = sustained_run(0, points(*[5.0] * 12, *[1.5] * 8))
    assert run.first_bytes_per_s == 5e9
    assert run.last_bytes_per_s == 1.5e9
    assert run.drop_at_nbytes == 12 * 5 * 10**9


@pytest.mark.parametrize(
    "curve",
    [
        [5.0] * 20,
        [5.0] * 9 + [1.0] + [5.0] * 10,  # a dip that passes
        [5.0] * 10 + [3.6] * 10,  # slower, but above 0.7
        [5.0] * 19 + [1.0],  # a last slice alone shows nothing
        [5.0],
    ],
)
def test_what_comes_back_or_stays_near_is_no_drop(curve):
    assert sustained_run(0, points(*curve)).drop_at_nbytes is None
