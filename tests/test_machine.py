"""`machine.json`: what goes in comes out, damage is named, and which setting fits which drives."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from offload.errors import ConfigError, StorageError
from offload.machine import (
    MACHINE_VARIABLE,
    DeviceSpeed,
    DriveSpeed,
    IoSetting,
    Machine,
    SharedSpeed,
    default_machine_path,
    file_system_id,
    load_machine,
    save_machine,
)
from offload.sizes import GIB, MIB


def drive(device: str, block_mib: int, depth: int) -> DriveSpeed:
    return DriveSpeed(
        path=f"/mnt/{device}",
        device=device,
        file_system="ext4",
        engine="uring",
        direct=True,
        setting=IoSetting(segment_nbytes=block_mib * MIB, queue_depth=depth),
        read_bytes_per_s=7e9,
        write_bytes_per_s=5e9,
    )


FIRST, SECOND, THIRD = drive("259:1", 1, 8), drive("259:2", 4, 8), drive("259:3", 1, 4)
TOGETHER = IoSetting(segment_nbytes=2 * MIB, queue_depth=16)
MACHINE = Machine(
    measured_at="2025-01-02T03:04:05+00:00",
    cpu="A CPU",
    num_cores=16,
    memory_nbytes=128 * GIB,
    drives=(FIRST, SECOND),
    together=SharedSpeed(setting=TOGETHER, read_bytes_per_s=13e9, write_bytes_per_s=9e9),
    memory_bytes_per_s=40e9,
    crc32c_bytes_per_s=10e9,
    device=DeviceSpeed(
        name="A GPU",
        memory_nbytes=24 * GIB,
        pinned_to_device_bytes_per_s=25e9,
        device_to_pinned_bytes_per_s=24e9,
        both_ways_bytes_per_s=40e9,
        pageable_to_device_bytes_per_s=10e9,
        device_to_pageable_bytes_per_s=9e9,
    ),
)


def test_a_machine_survives_its_file(tmp_path):
    path = tmp_path / "new" / "machine.json"
    save_machine(MACHINE, path)
    assert load_machine(path) == MACHINE
    assert [one.name for one in path.parent.iterdir()] == ["machine.json"]


def test_a_second_machine_replaces_the_first(tmp_path):
    path = tmp_path / "machine.json"
    path.write_text("rubbish")
    save_machine(MACHINE, path)
    assert load_machine(path) == MACHINE


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="cannot write .*file/machine.json"):
        save_machine(MACHINE, tmp_path / "file" / "machine.json")


def test_a_missing_file_is_no_other_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_machine(tmp_path / "machine.json")


@pytest.mark.parametrize(
    ("damage", "where"),
    [
        (lambda data: data.update(format="offload-machine-9"), "format"),
        (lambda data: data["drives"][0].pop("setting"), "drives.0.setting"),
        (lambda data: data.update(num_cores="many"), "num_cores"),
    ],
)
def test_a_damaged_file_names_the_key_and_the_remedy(tmp_path, damage, where):
    path = tmp_path / "machine.json"
    save_machine(MACHINE, path)
    data = json.loads(path.read_text())
    damage(data)
    path.write_text(json.dumps(data))
    with pytest.raises(ConfigError, match=f"{where}: .*offload bench DIR --machine"):
        load_machine(path)


def test_no_json_is_named(tmp_path):
    path = tmp_path / "machine.json"
    path.write_text("{")
    with pytest.raises(ConfigError, match="measure again"):
        load_machine(path)


def test_one_drive_has_its_own_setting():
    assert MACHINE.setting_for(("259:1",)) == FIRST.setting


def test_all_drives_have_the_setting_they_were_measured_with_together():
    assert MACHINE.setting_for(("259:2", "259:1")) == TOGETHER


def test_some_of_the_drives_have_the_largest_of_their_settings():
    machine = Machine(
        measured_at="", cpu="", num_cores=1, memory_nbytes=GIB, drives=(FIRST, SECOND, THIRD),
        together=MACHINE.together,
    )  # fmt: skip
    assert machine.setting_for(("259:1", "259:2")) == SECOND.setting


@pytest.mark.parametrize("devices", [(), ("8:1",), ("259:1", "8:1")])
def test_drives_that_were_not_measured_have_none(devices):
    assert MACHINE.setting_for(devices) is None


def test_the_file_is_where_the_variable_says(monkeypatch, tmp_path):
    monkeypatch.setenv(MACHINE_VARIABLE, str(tmp_path / "here.json"))
    assert default_machine_path() == tmp_path / "here.json"


def test_without_the_variable_it_is_in_the_configuration_folder(monkeypatch):
    monkeypatch.delenv(MACHINE_VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", "/etc/mine")
    assert default_machine_path() == Path("/etc/mine/offload/machine.json")
    monkeypatch.delenv("XDG_CONFIG_HOME")
    monkeypatch.setenv("HOME", "/home/me")
    assert default_machine_path() == Path("/home/me/.config/offload/machine.json")


def test_without_a_home_directory_the_variable_is_named(monkeypatch):
    def no_home(path):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv(MACHINE_VARIABLE, raising=False)
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    monkeypatch.setattr(Path, "expanduser", no_home)
    with pytest.raises(ConfigError, match=f"no place for machine.json .*{MACHINE_VARIABLE}"):
        default_machine_path()


def test_a_file_system_is_recognised_in_each_of_its_folders(tmp_path):
    (tmp_path / "inner").mkdir()
    assert file_system_id(tmp_path) == file_system_id(tmp_path / "inner")


def test_a_file_system_without_an_id_of_its_own_is_known_by_its_device_number(tmp_path, monkeypatch):
    number = tmp_path.stat().st_dev
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_fsid=0))
    assert file_system_id(tmp_path) == f"{os.major(number)}:{os.minor(number)}"
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_fsid=0xE2CA))
    assert file_system_id(tmp_path) == "fsid-e2ca"


def test_a_directory_that_is_no_utf8_can_be_read_again(tmp_path):
    path = tmp_path / "machine.json"
    save_machine(replace(MACHINE, drives=(replace(FIRST, path="/mnt/\udcff"),)), path)
    assert load_machine(path).drives[0].path == "/mnt/?"


def test_a_link_stays_a_link_and_nothing_staged_is_left(tmp_path):
    (tmp_path / "there").mkdir()
    link = tmp_path / "machine.json"
    link.symlink_to(tmp_path / "there" / "kept.json")
    save_machine(MACHINE, link)
    assert link.is_symlink()
    assert load_machine(link) == MACHINE
    assert [path.name for path in (tmp_path / "there").iterdir()] == ["kept.json"]


def test_what_cannot_be_put_in_place_leaves_nothing(tmp_path):
    (tmp_path / "machine.json").mkdir()
    with pytest.raises(StorageError, match="cannot write"):
        save_machine(MACHINE, tmp_path / "machine.json")
    assert [path.name for path in tmp_path.iterdir()] == ["machine.json"]
