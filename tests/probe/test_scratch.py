"""The measured file: what is refused, that nothing stays behind, that damage is found."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest

from offload.errors import CorruptionError, DiskFullError, StorageError
from offload.probe import scratch
from offload.probe.scratch import ScratchFile, check_directories
from offload.sizes import GIB, MIB

ROOT = Path(__file__).resolve().parents[2]
Room = namedtuple("Room", "f_bavail f_frsize f_blocks")

CHILD = """
import sys
from offload.aio import open_engine
from offload.probe.drives import transfer_memory
from offload.probe.scratch import ScratchFile

with open_engine("threads") as engine, ScratchFile(engine, sys.argv[1], 8 << 20) as file:
    file.fill(transfer_memory(8 << 20))
    print("filled", flush=True)
    sys.stdin.read()
"""


def flip(file: ScratchFile, offset: int) -> None:
    """Change one byte behind the file's back, though it has no name."""
    fd = os.open(f"/proc/self/fd/{file._cache_fd}", os.O_RDWR)
    try:
        (value,) = os.pread(fd, 1, offset)
        os.pwrite(fd, bytes([value ^ 1]), offset)
        os.fsync(fd)
    finally:
        os.close(fd)


def room(monkeypatch: pytest.MonkeyPatch, free_nbytes: int, nbytes: int) -> None:
    """Make every file system look this large and this full."""
    monkeypatch.setattr(scratch.os, "statvfs", lambda path: Room(free_nbytes // 4096, 4096, nbytes // 4096))


def test_a_filled_file_verifies(engine, make_file, memory):
    file = make_file(engine)
    file.verify(memory)
    assert file.verified_nbytes == file.nbytes
    assert file.file.size_nbytes == file.nbytes


@pytest.mark.parametrize("offset", [0, 5 * MIB + 4097, 8 * MIB - 1])
def test_one_flipped_bit_on_the_drive_is_found_at_its_offset(engine, make_file, memory, offset):
    file = make_file(engine)
    flip(file, offset)
    with pytest.raises(CorruptionError, match=f"offset {offset:,} of the file") as caught:
        file.verify(memory)
    assert caught.value.offset_bytes == offset


def test_the_file_has_no_name_while_it_is_used(threads, make_file, tmp_path):
    make_file(threads)
    assert list(tmp_path.iterdir()) == []


def fill_and_fail(file: ScratchFile, memory: memoryview) -> None:
    with file:
        file.fill(memory)
        raise RuntimeError("ours")


def test_the_space_is_free_again_after_an_exception(threads, tmp_path, memory):
    file = ScratchFile(threads, str(tmp_path), 8 * MIB)
    before = os.listdir("/proc/self/fd")
    with pytest.raises(RuntimeError, match="ours"):
        fill_and_fail(file, memory)
    # The descriptors were all that held the space: two of the engine (one direct), one of ours.
    assert len(before) - len(os.listdir("/proc/self/fd")) in (2, 3)
    assert list(tmp_path.iterdir()) == []


def test_a_killed_process_leaves_nothing_behind(tmp_path):
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(tmp_path)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with child:
        assert child.stdout is not None
        assert child.stdout.readline() == "filled\n"
        child.send_signal(signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL
    assert list(tmp_path.iterdir()) == []


def test_a_failed_allocation_leaves_nothing_behind(threads, tmp_path, monkeypatch):
    class Full:
        direct = False
        closed = False

        def allocate(self, nbytes):
            raise DiskFullError("no room", errno=errno.ENOSPC)

        def close(self):
            self.closed = True

    made = Full()

    class Engine:
        def open(self, name, mode, *, dir_fd):
            with threads.open(name, mode, dir_fd=dir_fd):
                return made

    with pytest.raises(DiskFullError, match="no room"):
        ScratchFile(Engine(), str(tmp_path), 8 * MIB)
    assert made.closed
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt(), StorageError("no descriptor", errno=errno.EMFILE)])
def test_a_file_made_by_an_open_that_never_returned_is_removed(tmp_path, error):
    class Engine:
        def open(self, name, mode, *, dir_fd):
            os.close(os.open(name, os.O_CREAT | os.O_EXCL, dir_fd=dir_fd))
            raise error

    with pytest.raises(type(error)):
        ScratchFile(Engine(), str(tmp_path), 8 * MIB)
    assert list(tmp_path.iterdir()) == []


def test_existing_files_are_left_alone(threads, tmp_path):
    (tmp_path / "offload-bench-mine").write_text("mine")
    with ScratchFile(threads, str(tmp_path), 8 * MIB):
        pass
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]


def test_a_missing_directory_is_named(threads, tmp_path):
    with pytest.raises(StorageError, match="gone: No such file.*create it, or name one") as caught:
        ScratchFile(threads, str(tmp_path / "gone"), 8 * MIB)
    assert caught.value.errno == errno.ENOENT


def test_a_file_in_place_of_a_directory_is_refused(threads, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="it is not a directory"):
        ScratchFile(threads, str(tmp_path / "file"), 8 * MIB)


def test_a_directory_that_takes_no_files_is_refused(engine):
    # /sys refuses them to root as well.
    with pytest.raises(StorageError, match="cannot measure in /sys: .*that you may write to"):
        ScratchFile(engine, "/sys", 8 * MIB)


def test_a_read_only_file_system_is_refused(tmp_path):
    class Engine:
        def open(self, name, mode, *, dir_fd):
            raise StorageError("open failed", errno=errno.EROFS)

    with pytest.raises(StorageError, match="Read-only.*mount it for writing"):
        ScratchFile(Engine(), str(tmp_path), 8 * MIB)


def test_a_file_that_leaves_too_little_free_is_refused_with_a_size_that_fits(tmp_path, monkeypatch):
    room(monkeypatch, free_nbytes=4 * GIB, nbytes=1000 * GIB)
    with pytest.raises(DiskFullError, match="use --size 2GiB") as caught:
        check_directories([str(tmp_path)], 4 * GIB)
    assert caught.value.asked_nbytes == 4 * GIB
    assert caught.value.got_nbytes == 4 * GIB
    assert check_directories([str(tmp_path)], 2 * GIB) == [4 * GIB]


def test_one_gib_stays_free_on_a_large_file_system(tmp_path, monkeypatch):
    room(monkeypatch, free_nbytes=5 * GIB, nbytes=1000 * GIB)
    assert check_directories([str(tmp_path)], 4 * GIB)
    with pytest.raises(DiskFullError):
        check_directories([str(tmp_path)], 4 * GIB + MIB)


def test_a_small_file_system_can_be_measured_with_a_small_file(tmp_path, monkeypatch):
    room(monkeypatch, free_nbytes=50 * MIB, nbytes=60 * MIB)
    assert check_directories([str(tmp_path)], 32 * MIB)
    with pytest.raises(DiskFullError, match="3.0 MiB .* must stay free; use --size 32MiB"):
        check_directories([str(tmp_path)], 48 * MIB)


def test_directories_on_one_file_system_share_its_room(tmp_path, monkeypatch):
    room(monkeypatch, free_nbytes=50 * MIB, nbytes=60 * MIB)
    (tmp_path / "other").mkdir()
    with pytest.raises(DiskFullError, match="each of 2 directories .* use --size 16MiB"):
        check_directories([str(tmp_path), str(tmp_path / "other")], 32 * MIB)


def test_no_size_is_named_where_none_fits(tmp_path, monkeypatch):
    room(monkeypatch, free_nbytes=5 * MIB, nbytes=60 * MIB)
    with pytest.raises(DiskFullError, match="free some space, or name a directory on another"):
        check_directories([str(tmp_path)], 8 * MIB)
