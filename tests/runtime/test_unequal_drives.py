"""Stripes follow the speeds that `offload bench` measured; a drive that is slow all the same is named."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from toy_models import SETTINGS, build, record_bytes, train

import offload
from offload.machine import DriveSpeed, IoSetting, Machine, save_machine
from offload.runtime import measured, stats
from offload.runtime.measured import MeasuredDrives
from offload.runtime.slow_drives import describe_slow_drives
from offload.runtime.stripes import choose_weights
from offload.store import DriveLoad

NAME = "gpt2"


def speed(name: str, bytes_per_s: float) -> DriveSpeed:
    return DriveSpeed(
        path=f"/mnt/{name}",
        device=f"id-{name}",
        file_system="ext4",
        engine="uring",
        direct=True,
        setting=IoSetting(segment_nbytes=1 << 20, queue_depth=8),
        read_bytes_per_s=bytes_per_s,
        write_bytes_per_s=bytes_per_s,
    )


@pytest.fixture
def drives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Two directories that stand for drives of 1 and 3 GB/s."""
    path = tmp_path / "machine.json"
    monkeypatch.setenv("OFFLOAD_MACHINE", str(path))
    monkeypatch.setattr(measured, "file_system_id", lambda directory: f"id-{Path(directory).name[0]}")
    found = Machine(
        measured_at="a test",
        cpu="A CPU",
        num_cores=2,
        memory_nbytes=1 << 34,
        drives=(speed("a", 1e9), speed("b", 3e9)),
    )
    save_machine(found, path)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    return [tmp_path / "a", tmp_path / "b"]


def shares(runtime: Any) -> list[float]:
    return [load.share for load in runtime.stats().drives]


def test_a_new_run_is_striped_by_the_measured_speeds_and_says_why(
    drives: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="offload")
    model = build(NAME)
    torch.manual_seed(5)
    with offload.attach(model, disk=drives, **SETTINGS) as runtime:
        losses = train(NAME, runtime, model, range(2))
        runtime.synchronize()
        found = runtime.stats()
        striped = record_bytes(runtime)
    small, large = (load.read_nbytes + load.written_nbytes for load in found.drives)
    assert large == pytest.approx(3 * small, rel=0.1)
    assert small + large >= found.disk_read_nbytes + found.disk_written_nbytes
    (said,) = [text for text in caplog.messages if text.startswith("stripes: ")]
    assert f"{drives[0]} 1.0 GB/s gets 25%, {drives[1]} 3.0 GB/s gets 75%; by their speeds" in said
    model = build(NAME)
    torch.manual_seed(5)
    (drives[0] / "one").mkdir()
    with offload.attach(model, disk=[drives[0] / "one"], **SETTINGS) as runtime:
        assert train(NAME, runtime, model, range(2)) == losses
        assert record_bytes(runtime) == striped


def test_a_resumed_run_keeps_its_stripes_in_any_order(
    drives: list[Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with offload.attach(build(NAME), disk=drives, **SETTINGS) as runtime:
        run_id = runtime.run_id
    monkeypatch.setenv("OFFLOAD_MACHINE", str(drives[0] / "none"))
    caplog.set_level(logging.INFO, logger="offload")
    again: dict[str, Any] = {**SETTINGS, "run_id": run_id, "resume": True}
    with offload.attach(build(NAME), disk=drives[::-1], **again) as runtime:
        assert shares(runtime) == [0.25, 0.75]
    assert "gets 75%; as the run was begun" in caplog.text


@pytest.mark.parametrize("case", ["no file", "one is not measured", "alike"])
def test_drives_of_which_nothing_better_is_known_are_dealt_alike(
    drives: list[Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, case: str
) -> None:
    if case == "no file":
        monkeypatch.setenv("OFFLOAD_MACHINE", str(drives[0] / "none"))
    if case == "one is not measured":
        monkeypatch.setattr(measured, "file_system_id", lambda path: f"id-{Path(path).name[0]}"[:4] + "x")
    if case == "alike":
        monkeypatch.setattr(measured, "file_system_id", lambda _: "id-b")
    caplog.set_level(logging.INFO, logger="offload")
    with offload.attach(build(NAME), disk=drives, **SETTINGS) as runtime:
        assert shares(runtime) == [0.5, 0.5]
    wanted = {
        "no file": "no drive was measured; 'offload bench",
        "one is not measured": "does not hold the drive of",
        "alike": "since their speeds are",
    }
    assert f"gets 50%; alike, {'' if case == 'alike' else 'since '}" in caplog.text
    assert wanted[case] in caplog.text


def test_two_directories_on_a_drive_share_its_speed(drives: list[Path]) -> None:
    found = MeasuredDrives.read([*drives, drives[1] / "b2"])
    weights, _ = choose_weights(found)
    assert weights == pytest.approx((1e9, 1.5e9, 1.5e9))


def test_one_drive_is_not_worth_a_line(drives: list[Path], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="offload")
    with offload.attach(build(NAME), disk=drives[:1], **SETTINGS) as runtime:
        assert shares(runtime) == [1.0]
    assert "stripes" not in caplog.text


def load(name: str, busy_s: float, nbytes: int = 10**10, share: float = 0.5) -> DriveLoad:
    return DriveLoad(f"/mnt/{name}", share, nbytes, nbytes, busy_s)


def test_a_drive_that_holds_the_others_up_is_named_with_the_figures() -> None:
    (said,) = describe_slow_drives([load("a", 20.0), load("b", 8.0)], {})
    assert said.startswith("/mnt/a is a slow drive: 1.00 GB/s while at work, 20.0 s for its 50% of the bytes")
    assert "the others were at work for 8.0 s" in said
    assert describe_slow_drives([load("a", 8.5), load("b", 8.0)], {}) == ()


def test_a_drive_that_gives_less_than_was_measured_is_named() -> None:
    speeds = {"/mnt/a": replace(speed("a", 7e9), write_bytes_per_s=3e9)}
    (said,) = describe_slow_drives([load("a", 20.0)], speeds)
    assert "1.00 GB/s while at work, where 'offload bench' measured 4.20 GB/s" in said
    assert describe_slow_drives([load("a", 6.0)], speeds) == ()
    assert describe_slow_drives([load("a", 20.0)], {}) == ()


def test_a_short_run_says_nothing_of_its_drives() -> None:
    assert describe_slow_drives([load("a", 0.9), load("b", 0.1)], {"/mnt/a": speed("a", 1e12)}) == ()
    assert describe_slow_drives([], {}) == ()


def test_a_slow_drive_is_told_when_the_run_is_closed(
    drives: list[Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(stats, "describe_slow_drives", lambda loads, speeds: ("/mnt/a is a slow drive",))
    with offload.attach(build(NAME), disk=drives, **SETTINGS) as runtime:
        assert runtime.stats().slow_drives == ("/mnt/a is a slow drive",)
        assert "slow drive" not in caplog.text
    assert "/mnt/a is a slow drive" in caplog.text


def test_totals_start_over(drives: list[Path]) -> None:
    model = build(NAME)
    with offload.attach(model, disk=drives, **SETTINGS) as runtime:
        train(NAME, runtime, model, range(1))
        runtime.synchronize()
        assert all(load.busy_s > 0 for load in runtime.stats().drives)
        runtime.reset_stats()
        assert all(load.read_nbytes + load.written_nbytes == 0 for load in runtime.stats().drives)
