"""Facts of the host, from files as kernels write them."""

from __future__ import annotations

import os
from pathlib import Path

import psutil
import pytest

from offload.probe import host


def device_of(path: Path) -> str:
    number = os.stat(path).st_dev
    return f"{os.major(number)}:{os.minor(number)}"


def test_the_processor_is_named_on_x86_and_where_it_has_no_name():
    assert host.cpu_name("processor\t: 0\nmodel name\t: AMD EPYC 9354 32-Core\n") == "AMD EPYC 9354 32-Core"
    assert host.cpu_name("processor\t: 0\nBogoMIPS\t: 50.00\n")


def test_the_mount_is_found_by_its_device(tmp_path):
    here = device_of(tmp_path)
    text = (
        "22 1 0:5 / / rw - tmpfs root rw\n"
        f"36 22 {here} / {tmp_path} rw,noatime shared:1 master:2 - xfs /dev/nvme0n1p2 rw,attr2\n"
        f"37 22 0:99 / {tmp_path} rw - ext4 /dev/other rw\n"
    )
    mount = host.mount_of(str(tmp_path), text)
    assert mount.source == "/dev/nvme0n1p2"
    assert mount.file_system == "xfs"
    assert mount.options == ("rw", "noatime", "attr2")


def test_a_subvolume_with_a_device_of_its_own_is_found_by_the_longest_mount_point(tmp_path):
    text = (
        "22 1 8:1 / / rw - ext4 /dev/sda1 rw\n"
        f"36 22 0:42 /@home {tmp_path} rw - btrfs /dev/nvme1n1 rw,subvol=/@home\n"
    )
    (tmp_path / "deep").mkdir()
    assert host.mount_of(str(tmp_path / "deep"), text).source == "/dev/nvme1n1"


def test_a_mount_point_is_no_prefix_of_another_name(tmp_path):
    text = f"22 1 8:1 / / rw - ext4 /dev/sda1 rw\n23 22 8:2 / {str(tmp_path)[:-1]} rw - xfs /dev/sdb rw\n"
    assert host.mount_of(str(tmp_path), text).source == "/dev/sda1"


def test_escaped_names_are_read(tmp_path):
    folder = tmp_path / "my drive"
    folder.mkdir()
    escaped = str(folder).replace(" ", "\\040")
    text = f"36 22 0:42 / {escaped} rw - nfs4 server:/my\\040share rw\n"
    assert host.mount_of(str(folder), text).source == "server:/my share"


def test_an_unreadable_list_of_mounts_says_so(tmp_path):
    assert host.mount_of(str(tmp_path), "nonsense\n").file_system == "unknown"


def test_the_real_list_of_mounts_knows_every_directory(tmp_path):
    assert host.mount_of(str(tmp_path)).file_system != "unknown"


def group(root: Path, cgroup: str, files: dict[str, str]) -> Path:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(cgroup)
    for name, text in files.items():
        (root / "sys/fs/cgroup" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "sys/fs/cgroup" / name).write_text(text)
    return root


def test_the_smallest_limit_of_the_groups_above_holds(tmp_path):
    root = group(
        tmp_path,
        "0::/a/b\n",
        {"a/memory.max": "1000000\n", "a/b/memory.max": "max\n", "a/b/cpu.max": "150000 100000\n"},
    )
    assert host.memory_nbytes(root) == 1_000_000
    assert host.num_cores(root) == min(2, len(os.sched_getaffinity(0)))


def test_limits_of_the_first_version_are_read(tmp_path):
    root = group(
        tmp_path,
        "5:memory:/job\n4:cpu,cpuacct:/job\n",
        {
            "memory/job/memory.limit_in_bytes": "2000000\n",
            "cpu/job/cpu.cfs_quota_us": "100000\n",
            "cpu/job/cpu.cfs_period_us": "100000\n",
        },
    )
    assert host.memory_nbytes(root) == 2_000_000
    assert host.num_cores(root) == 1


def test_no_limit_is_the_whole_host(tmp_path):
    root = group(tmp_path, "0::/\n", {"memory.max": "max\n", "cpu.max": "max 100000\n"})
    assert host.memory_nbytes(root) == psutil.virtual_memory().total
    assert host.num_cores(root) == len(os.sched_getaffinity(0))


@pytest.mark.parametrize("device", ["259:0", "259:2"])
def test_a_drives_traffic_is_that_of_the_whole_drive(tmp_path, device):
    drive = tmp_path / "sys/devices/nvme/nvme0n1"
    (drive / "nvme0n1p2").mkdir(parents=True)
    (drive / "nvme0n1p2/partition").write_text("2\n")
    (drive / "nvme0n1p2/stat").write_text("0 0 1 0 0 0 1 0 0 0 0\n")
    (drive / "stat").write_text("  10 0 2000 5 20 0 4000 7 0 0 0 0 0 0 0 0 0\n")
    (tmp_path / "sys/dev/block").mkdir(parents=True)
    (tmp_path / "sys/dev/block/259:0").symlink_to(drive)
    (tmp_path / "sys/dev/block/259:2").symlink_to(drive / "nvme0n1p2")
    assert host.device_nbytes(device, tmp_path) == ("nvme0n1", 2000 * 512, 4000 * 512)


def test_what_has_no_drive_has_no_traffic(tmp_path):
    assert host.device_nbytes("0:27", tmp_path) is None
