"""What `offload bench` measured is used when a model is attached; a broken file never stops a run."""

from __future__ import annotations

import logging
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import offload
from offload.aio import open_engine
from offload.errors import ConfigError
from offload.machine import DriveSpeed, IoSetting, Machine, SharedSpeed, file_system_id, save_machine
from offload.runtime import io_setting, measured, storage

MEASURED = IoSetting(segment_nbytes=256 << 10, queue_depth=3)
SHARED = IoSetting(segment_nbytes=512 << 10, queue_depth=5)


def drive(path: Path, device: str, setting: IoSetting = MEASURED) -> DriveSpeed:
    return DriveSpeed(
        path=str(path),
        device=device,
        file_system="ext4",
        engine="uring",
        direct=True,
        setting=setting,
        read_bytes_per_s=2e9,
        write_bytes_per_s=1e9,
    )


def machine(*drives: DriveSpeed, together: SharedSpeed | None = None) -> Machine:
    return Machine(
        measured_at="2026-11-21T00:00:00+00:00",
        cpu="Example",
        num_cores=2,
        memory_nbytes=1 << 34,
        drives=drives,
        together=together,
    )


@pytest.fixture
def machine_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "kept" / "machine.json"
    monkeypatch.setenv("OFFLOAD_MACHINE", str(path))
    return path


def opened_with(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, disk: list[Path], **settings: Any
) -> tuple[int, int]:
    """Attach a model and return (queue depth, segment bytes) that its engine was opened with."""
    seen: list[dict[str, int]] = []

    def spy(name: Any, **sizes: int) -> Any:
        seen.append(sizes)
        return open_engine(name, **sizes)  # type: ignore[arg-type]

    monkeypatch.setattr(storage, "open_engine", spy)
    caplog.set_level(logging.INFO, logger="offload")
    budgets = {"device": "cpu", "host_memory": "64MiB", "device_memory": "64MiB"}
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 1))
    with offload.attach(model, disk=disk, **budgets, **settings) as runtime:
        model(torch.ones(2, 8)).sum().backward()
        runtime.step()
    assert len(seen) == 1
    return seen[0]["queue_depth"], seen[0]["segment_nbytes"]


def test_a_measured_setting_is_used_and_logged_once(machine_path, tmp_path, monkeypatch, caplog) -> None:
    save_machine(machine(drive(tmp_path, file_system_id(tmp_path))), machine_path)
    assert opened_with(monkeypatch, caplog, [tmp_path]) == (3, 256 << 10)
    said = [record for record in caplog.records if "I/O setting" in record.getMessage()]
    assert [record.levelno for record in said] == [logging.INFO]
    assert said[0].getMessage() == (
        f"I/O setting: segments of 256.0 KiB, queue depth 3, measured, from {machine_path}"
    )


def test_explicit_options_win_each_for_itself(machine_path, tmp_path, monkeypatch, caplog) -> None:
    save_machine(machine(drive(tmp_path, file_system_id(tmp_path))), machine_path)
    assert opened_with(monkeypatch, caplog, [tmp_path], queue_depth=7) == (7, 256 << 10)
    assert opened_with(monkeypatch, caplog, [tmp_path], segment_nbytes="64KiB") == (3, 64 << 10)
    both = {"queue_depth": 9, "segment_nbytes": 8192}
    assert opened_with(monkeypatch, caplog, [tmp_path], **both) == (9, 8192)


def test_without_a_file_the_defaults_are_used_and_bench_is_named(
    machine_path, tmp_path, monkeypatch, caplog
) -> None:
    assert opened_with(monkeypatch, caplog, [tmp_path]) == (32, 1 << 20)
    assert f"offload bench {tmp_path}" in caplog.text
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_drive_that_was_not_measured_gets_the_defaults(machine_path, tmp_path, monkeypatch, caplog) -> None:
    save_machine(machine(drive(tmp_path, "999:9")), machine_path)
    assert opened_with(monkeypatch, caplog, [tmp_path]) == (32, 1 << 20)
    assert "does not hold these drives" in caplog.text


def test_several_drives_get_the_setting_measured_together(machine_path, tmp_path, monkeypatch) -> None:
    # One file system under two made-up numbers: this machine need not have two.
    folders = [tmp_path / "a", tmp_path / "b"]
    together = SharedSpeed(setting=SHARED, read_bytes_per_s=4e9, write_bytes_per_s=2e9)
    save_machine(machine(drive(folders[0], "1:1"), drive(folders[1], "2:2"), together=together), machine_path)
    monkeypatch.setattr(measured, "file_system_id", lambda path: {"a": "1:1", "b": "2:2"}[Path(path).name])
    options = offload.RuntimeOptions(disk=folders)
    drives = measured.MeasuredDrives.read(options.disk)
    assert io_setting.choose_io_setting(options, drives) == SHARED


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe",
        b'{"format": "offload-machine-9"}',
        b"[1, 2]",
        b'{"format": "offload-machine-1", "measured_at": 1}',
    ],
)
def test_a_broken_file_is_a_warning_that_says_how_to_mend_it(
    machine_path, tmp_path, monkeypatch, caplog, content
) -> None:
    machine_path.parent.mkdir()
    machine_path.write_bytes(content)
    assert opened_with(monkeypatch, caplog, [tmp_path]) == (32, 1 << 20)
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    warning = next(text for text in warnings if "I/O setting" in text)
    assert str(machine_path) in warning and f"offload bench {tmp_path}" in warning


@pytest.mark.parametrize(
    "setting",
    [
        IoSetting(segment_nbytes=0, queue_depth=8),
        IoSetting(segment_nbytes=5000, queue_depth=8),
        IoSetting(segment_nbytes=4096, queue_depth=0),
        IoSetting(segment_nbytes=4096, queue_depth=100_000),
        IoSetting(segment_nbytes=2 << 30, queue_depth=1),
    ],
)
def test_a_setting_that_no_engine_takes_is_a_warning(
    machine_path, tmp_path, monkeypatch, caplog, setting
) -> None:
    save_machine(machine(replace(drive(tmp_path, file_system_id(tmp_path)), setting=setting)), machine_path)
    assert opened_with(monkeypatch, caplog, [tmp_path]) == (32, 1 << 20)
    assert "is not used" in caplog.text and str(machine_path) in caplog.text


def test_a_directory_in_place_of_the_file_is_a_warning(machine_path, tmp_path, monkeypatch, caplog) -> None:
    machine_path.mkdir(parents=True)
    assert opened_with(monkeypatch, caplog, [tmp_path]) == (32, 1 << 20)
    assert "is not used" in caplog.text and str(machine_path) in caplog.text


def test_no_home_directory_is_no_reason_to_stop(tmp_path, monkeypatch, caplog) -> None:
    def no_home(path: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("OFFLOAD_MACHINE")
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    monkeypatch.setattr(Path, "expanduser", no_home)
    assert opened_with(monkeypatch, caplog, [tmp_path]) == (32, 1 << 20)
    assert "no place for machine.json" in caplog.text


def test_without_pydantic_the_defaults_are_used_and_the_reason_logged(
    machine_path, tmp_path, monkeypatch, caplog
) -> None:
    save_machine(machine(drive(tmp_path, file_system_id(tmp_path))), machine_path)
    monkeypatch.setitem(sys.modules, "pydantic", None)  # what an import of what is not there meets
    assert opened_with(monkeypatch, caplog, [tmp_path]) == (32, 1 << 20)
    assert "machine.json cannot be read: import of pydantic" in caplog.text


@pytest.mark.parametrize(
    ("name", "value"),
    [("queue_depth", 0), ("queue_depth", 5000), ("segment_nbytes", 0), ("segment_nbytes", 5000)],
)
def test_options_that_no_engine_takes_are_refused_at_construction(name: str, value: int) -> None:
    with pytest.raises(ConfigError, match=name):
        offload.RuntimeOptions(**{name: value})
