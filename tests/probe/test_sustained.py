"""A long write: one point a slice, an end by time or by bytes, and a whole file after."""

from __future__ import annotations

import pytest
from engine_doubles import keep_time

from offload.machine import IoSetting
from offload.probe import sustained
from offload.probe.drives import DriveRunner
from offload.probe.sustained import write_for_long
from offload.sizes import KIB, MIB

SETTING = IoSetting(segment_nbytes=64 * KIB, queue_depth=4)


def test_each_slice_is_a_point_until_the_time_is_over(threads, make_file, memory, monkeypatch):
    clock = keep_time(monkeypatch, rate=1e9, flush_s=0.0)
    monkeypatch.setattr(sustained, "time", type("Time", (), {"perf_counter": lambda: clock.now_s}))
    runner = DriveRunner([make_file(threads)], memory, engine="threads", direct=True)
    heard: list[float] = []
    run = write_for_long(runner, 0, SETTING, min_s=0.2, slice_s=0.05, told=heard.append)
    assert 3 <= len(run.points) <= 4
    assert all(point.bytes_per_s == pytest.approx(1e9) for point in run.points)
    assert [point.at_s for point in run.points] == sorted(point.at_s for point in run.points)
    assert run.points[-1].at_s >= 0.2
    assert run.drop_at_nbytes is None
    assert heard == sorted(heard)
    assert heard[-1] == 1.0


def test_it_ends_after_so_many_bytes(threads, make_file, memory):
    file = make_file(threads)
    runner = DriveRunner([file], memory, engine="threads", direct=True)
    run = write_for_long(runner, 0, SETTING, min_s=3600, max_nbytes=20 * MIB, slice_s=0)
    assert 20 * MIB <= sum(point.nbytes for point in run.points) < 40 * MIB
    file.verify(memory)
