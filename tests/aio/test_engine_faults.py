"""Faults of real drives, where root may make some: one that loses its medium, one turned read-only."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from engine_workbench import SEGMENT_NBYTES, aligned, pattern

from offload.aio import Engine
from offload.errors import StorageError

NBYTES = 64 * SEGMENT_NBYTES


class FailingDrive:
    """ext4 on a loop device that can shrink: what lay behind its new end is an I/O error."""

    def __init__(self, path: Path, image: Path) -> None:
        self.path, self._image = path, image
        listed = subprocess.run(["findmnt", "-no", "SOURCE", str(path)], capture_output=True, text=True)
        self._device = listed.stdout.strip()

    def lose_medium(self) -> None:
        os.truncate(self._image, 4 << 20)
        subprocess.run(["losetup", "--set-capacity", self._device], check=True)

    def remount_read_only(self) -> None:
        subprocess.run(["mount", "-o", "remount,ro", str(self.path)], check=True)


@pytest.fixture(autouse=True)
def _real_drives_only(engine_kind: str) -> None:
    if engine_kind == "sim":
        pytest.skip("the simulated disk has faults of its own making")


@pytest.fixture
def failing_drive(tmp_path: Path) -> Iterator[FailingDrive]:
    if os.geteuid() != 0 or shutil.which("mkfs.ext4") is None:
        pytest.skip("mounting a file system needs root and mkfs.ext4")
    image, mount_point = tmp_path / "image", tmp_path / "drive"
    mount_point.mkdir()
    with image.open("wb") as file:
        file.truncate(32 << 20)
    # A large inode table comes first, so that a cut leaves the metadata alone.
    subprocess.run(["mkfs.ext4", "-q", "-O", "^has_journal", "-N", "16384", str(image)], check=True)
    mounted = subprocess.run(
        ["mount", "-o", "loop,errors=continue", str(image), str(mount_point)], capture_output=True
    )
    if mounted.returncode != 0:
        pytest.skip(f"mount: {mounted.stderr.decode().strip()}")
    try:
        yield FailingDrive(mount_point, image)
    finally:
        subprocess.run(["umount", str(mount_point)], check=True)


@pytest.mark.parametrize("op", ["read", "write"])
def test_a_drive_that_fails_is_an_error_with_errno_path_and_offset(
    make_engine: Callable[..., Engine], failing_drive: FailingDrive, op: str
) -> None:
    path = failing_drive.path / "data"
    with make_engine() as engine, engine.open(str(path), "x+") as file:
        if not file.direct:
            pytest.skip("the page cache answers in the drive's place")
        file.allocate(NBYTES)
        buffer = aligned(NBYTES)
        buffer[:] = pattern(NBYTES)
        engine.submit("write", file, buffer, 0).wait()
        engine.sync(file)
        failing_drive.lose_medium()
        request = engine.submit(op, file, buffer, 0)
        with pytest.raises(StorageError) as caught:
            request.wait()
    assert caught.value.errno == errno.EIO
    assert caught.value.path == str(path)
    assert (caught.value.offset_bytes, caught.value.asked_nbytes) == (0, NBYTES)
    assert caught.value.got_nbytes is not None
    assert caught.value.got_nbytes < NBYTES
    assert "dmesg" in str(caught.value)


def test_a_read_only_file_system_refuses_writers_and_serves_readers(
    engine: Engine, failing_drive: FailingDrive
) -> None:
    path = failing_drive.path / "data"
    path.write_bytes(pattern(NBYTES))
    failing_drive.remount_read_only()
    with pytest.raises(StorageError) as caught:
        engine.open(str(path), "r+")
    assert caught.value.errno == errno.EROFS
    with pytest.raises(StorageError, match="read-only"):
        engine.open(str(failing_drive.path / "new"), "x+")
    with engine.open(str(path)) as file:
        target = aligned(NBYTES)
        assert engine.submit("read", file, target, 0).wait() == NBYTES
    assert target == pattern(NBYTES)


def test_a_file_removed_while_open_goes_on_until_it_is_closed(engine: Engine, tmp_path: Path) -> None:
    path = tmp_path / "data"
    with engine.open(str(path), "x+") as file:
        path.unlink()
        engine.submit("write", file, pattern(NBYTES), 0).wait()
        target = aligned(NBYTES)
        engine.submit("read", file, target, 0).wait()
    assert target == pattern(NBYTES)
    with pytest.raises(StorageError) as caught:
        engine.open(str(path))
    assert caught.value.errno == errno.ENOENT


def test_a_file_cut_short_while_open_is_a_short_read(engine: Engine, tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(pattern(NBYTES))
    with engine.open(str(path)) as file:
        os.truncate(path, NBYTES // 2 + 100)
        with pytest.raises(StorageError, match="cut off") as caught:
            engine.submit("read", file, aligned(NBYTES), 0).wait()
    assert caught.value.errno == 0
    assert caught.value.got_nbytes == NBYTES // 2 + 100
