"""What the doctor learns of directories and drives; it leaves nothing behind in any of them."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from offload.aio import open_engine
from offload.doctor import directories
from offload.doctor.directories import block_device, look_at_directory
from offload.doctor.facts import BlockDevice, Link
from offload.errors import DiskFullError
from offload.machine import file_system_id


class Spoiled:
    """An engine that lets one call go wrong and passes the others on."""

    def __init__(self, engine, **calls):
        self._engine = engine
        self._calls = calls

    def __getattr__(self, name):
        return self._calls.get(name, getattr(self._engine, name))

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._engine.close()


@pytest.mark.parametrize("engine", ["threads", "portable"])
def test_a_directory_is_tried_and_left_as_it_was(tmp_path, engine):
    found = look_at_directory(str(tmp_path), "named", engine)
    assert (found.problem, found.write_problem) == ("", "")
    assert (found.path, found.origin) == (str(tmp_path), "named")
    assert found.mount.file_system != "unknown"
    assert found.file_system_id == file_system_id(tmp_path)
    assert found.mode == tmp_path.stat().st_mode & 0o7777
    assert 0 < found.free_nbytes <= found.total_nbytes
    assert abs(found.clock_skew_s) < 1.0
    assert (found.direct is None) == (engine == "portable")
    assert os.listdir(tmp_path) == []


def test_o_direct_is_what_the_engine_found(tmp_path):
    with open_engine("threads") as engine, engine.open(str(tmp_path / "own"), "x+") as file:
        direct = file.direct
    assert look_at_directory(str(tmp_path), "named", "threads").direct == direct


def test_without_an_engine_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(directories, "open_engine", None)
    found = look_at_directory(str(tmp_path), "named", None)
    assert (found.problem, found.write_problem, found.direct) == ("", "", None)


@pytest.mark.parametrize(
    ("name", "problem"), [("gone", "No such file or directory"), ("file", "Not a directory")]
)
def test_what_is_no_directory_says_so(tmp_path, name, problem):
    (tmp_path / "file").touch()
    found = look_at_directory(str(tmp_path / name), "named", "threads")
    assert (found.path, found.problem) == (str(tmp_path / name), problem)


def test_a_relative_path_becomes_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert look_at_directory(".", "working directory", "threads").path == str(tmp_path)


def test_a_directory_that_takes_no_file_says_why():
    found = look_at_directory("/proc/self", "named", "threads")
    assert found.problem == ""
    assert found.write_problem == "No such file or directory"
    assert found.direct is None


def test_a_full_drive_says_so_and_nothing_is_left(tmp_path, monkeypatch):
    def full(name, **settings):
        engine = open_engine(name, **settings)

        def refuse(*_, **__):
            raise DiskFullError("no room", errno=errno.ENOSPC)

        return Spoiled(engine, submit=refuse)

    monkeypatch.setattr(directories, "open_engine", full)
    assert look_at_directory(str(tmp_path), "named", "threads").write_problem == "No space left on device"
    assert os.listdir(tmp_path) == []


def test_a_drive_that_returns_other_bytes_is_found_out(tmp_path, monkeypatch):
    def forgetful(name, **settings):
        engine = open_engine(name, **settings)

        def submit(op, file, buffer, offset):
            # What is to be written is not: the file is read as the zeros that were reserved.
            return engine.submit(op, file, bytes(len(buffer)) if op == "write" else buffer, offset)

        return Spoiled(engine, submit=submit)

    monkeypatch.setattr(directories, "open_engine", forgetful)
    found = look_at_directory(str(tmp_path), "named", "threads")
    assert found.write_problem == "other bytes were read back than were written"


@pytest.mark.parametrize(("ahead_s", "skew_s"), [(60.0, 60.0), (-60.0, -60.0)])
def test_a_file_system_with_another_clock_is_found_out(tmp_path, monkeypatch, ahead_s, skew_s):
    real = os.stat

    def stat(path, **options):
        status = real(path, **options)
        if "dir_fd" not in options:
            return status
        return os.stat_result([*status[:8], status.st_mtime + ahead_s, *status[9:10]])

    monkeypatch.setattr(directories, "os", SimpleNamespace(**{**vars(os), "stat": stat}))
    found = look_at_directory(str(tmp_path), "named", "threads")
    assert found.clock_skew_s == pytest.approx(skew_s, abs=2.0)


def device(root: Path, number: str, path: str, **files: str) -> Path:
    """A block device as /sys shows it; `queue__scheduler` is `queue/scheduler`."""
    folder = root / "sys/devices" / path
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "stat").write_text("0 0 0 0 0 0 0 0 0 0 0\n")
    for name, text in files.items():
        file = folder / name.replace("__", "/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text + "\n")
    for link in (root / "sys/dev/block" / number, root / "sys/block" / folder.name):
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(folder)
    return folder


NVME = {
    "queue__rotational": "0",
    "queue__write_cache": "write back",
    "queue__scheduler": "[none] mq-deadline",
    "device__model": "Example 990",
    "device__device__current_link_speed": "8.0 GT/s PCIe",
    "device__device__max_link_speed": "16.0 GT/s PCIe",
    "device__device__current_link_width": "4",
    "device__device__max_link_width": "4",
}
NVME_FACTS = BlockDevice(
    name="nvme0n1",
    model="Example 990",
    bus="nvme",
    write_cache="write back",
    scheduler="none",
    link=Link(generation=3, width=4, max_generation=4, max_width=4),
)


def test_an_nvme_drive_shows_model_cache_scheduler_and_link(tmp_path):
    device(tmp_path, "259:0", "pci0000:00/nvme/nvme0/nvme0n1", **NVME)
    assert block_device(os.makedev(259, 0), "/dev/nvme0n1", tmp_path) == NVME_FACTS


def test_a_partition_is_its_drive(tmp_path):
    folder = device(tmp_path, "259:0", "pci0000:00/nvme/nvme0/nvme0n1", **NVME)
    (folder / "nvme0n1p2").mkdir()
    (folder / "nvme0n1p2/partition").write_text("2\n")
    (tmp_path / "sys/dev/block/259:2").symlink_to(folder / "nvme0n1p2")
    assert block_device(os.makedev(259, 2), "/dev/nvme0n1p2", tmp_path) == NVME_FACTS


def test_an_encrypted_volume_shows_the_drive_below(tmp_path):
    drive = device(tmp_path, "259:0", "pci0000:00/nvme/nvme0/nvme0n1", **NVME)
    (drive / "nvme0n1p3").mkdir()
    (drive / "nvme0n1p3/partition").write_text("3\n")
    crypt = device(tmp_path, "253:0", "virtual/block/dm-0", dm__uuid="CRYPT-LUKS2-0123")
    (crypt / "slaves").mkdir()
    (crypt / "slaves/nvme0n1p3").symlink_to(drive / "nvme0n1p3")
    volume = device(tmp_path, "253:1", "virtual/block/dm-1", dm__uuid="LVM-4567", queue__rotational="0")
    (volume / "slaves").mkdir()
    (volume / "slaves/dm-0").symlink_to(crypt)
    found = block_device(os.makedev(253, 1), "/dev/mapper/vg-data", tmp_path)
    assert found is not None
    assert (found.name, found.parts, found.encrypted) == ("dm-1", ("nvme0n1",), True)
    assert (found.model, found.scheduler, found.link) == ("Example 990", "none", NVME_FACTS.link)


def test_a_raid_names_its_parts_and_takes_none_of_them_for_all(tmp_path):
    drives = [
        device(tmp_path, f"259:{index}", f"pci0000:00/nvme/nvme{index}/nvme{index}n1", **NVME)
        for index in (0, 1)
    ]
    raid = device(tmp_path, "9:0", "virtual/block/md0", queue__rotational="0")
    (raid / "slaves").mkdir()
    for drive in drives:
        (raid / "slaves" / drive.name).symlink_to(drive)
    found = block_device(os.makedev(9, 0), "/dev/md0", tmp_path)
    assert found is not None
    assert (found.name, found.parts, found.model, found.link) == ("md0", ("nvme0n1", "nvme1n1"), "", None)


@pytest.mark.parametrize(
    ("path", "bus"),
    [
        ("pci0000:00/0000:00:14.0/usb2/2-1/host6/block/sda", "usb"),
        ("pci0000:00/0000:00:17.0/ata1/host0/block/sda", "sata"),
        ("pci0000:00/0000:00:02.0/virtio1/block/vda", "virtio"),
        ("virtual/block/loop0", "virtual"),
        ("platform/soc/mmc0/block/mmcblk0", ""),
    ],
)
def test_the_bus_is_that_on_the_way_to_the_drive(tmp_path, path, bus):
    device(tmp_path, "8:0", path, queue__rotational="1", queue__scheduler="none")
    found = block_device(os.makedev(8, 0), "/dev/x", tmp_path)
    assert found is not None
    assert (found.bus, found.rotational, found.scheduler) == (bus, True, "none")


def test_a_file_system_without_a_drive_has_none(tmp_path):
    assert block_device(os.makedev(0, 27), "tmpfs", tmp_path) is None
    assert block_device(os.makedev(0, 27), "/dev/there-is-none", tmp_path) is None


def test_a_subvolume_is_found_by_what_is_mounted(tmp_path, monkeypatch):
    device(tmp_path, "259:0", "pci0000:00/nvme/nvme0/nvme0n1", **NVME)
    status = os.stat_result([0] * 10, {"st_rdev": os.makedev(259, 0)})
    asked: list[str] = []
    stat = SimpleNamespace(**{**vars(os), "stat": lambda path: asked.append(path) or status})
    monkeypatch.setattr(directories, "os", stat)
    assert block_device(os.makedev(0, 42), "/dev/nvme0n1", tmp_path) == NVME_FACTS
    assert asked == ["/dev/nvme0n1"]
