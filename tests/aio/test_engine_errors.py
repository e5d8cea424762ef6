"""The conformance suite, second part: what fails says what, where, how far and why."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from engine_workbench import QUEUE_DEPTH, SEGMENT_NBYTES, Drive, View, aligned, pattern

from offload.aio import Engine
from offload.errors import DiskFullError, RequestTimeoutError, StateError, StorageError


@contextmanager
def file_size_limit(nbytes: int) -> Iterator[None]:
    """Let no file of this process grow beyond `nbytes`."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [0, 1, 4096, 5000, SEGMENT_NBYTES, 3 * SEGMENT_NBYTES + 77])
def test_a_read_across_the_end_of_the_file_fails_with_what_was_there(
    engine: Engine, tmp_path: Path, size: int, view: View
) -> None:
    path = tmp_path / "data"
    view.write_file(path, pattern(size))
    asked = SEGMENT_NBYTES * (2 * QUEUE_DEPTH + 1)
    with engine.open(str(path)) as file:
        request = engine.submit("read", file, aligned(asked), 0)
        with pytest.raises(StorageError) as caught:
            request.wait()
    error = caught.value
    assert type(error) is StorageError
    assert (error.errno, error.path, error.offset_bytes) == (0, str(path), 0)
    assert (error.asked_nbytes, error.got_nbytes) == (asked, size)
    assert str(error).startswith(f"short read: {size:,} of {asked:,} bytes at offset 0 of {path}: ")


def test_a_read_beyond_the_end_of_the_file_fails(engine: Engine, tmp_path: Path, view: View) -> None:
    view.write_file(tmp_path / "data", b"short")
    with engine.open(str(tmp_path / "data")) as file, pytest.raises(StorageError) as caught:
        engine.submit("read", file, bytearray(10), 1 << 40).wait()
    assert (caught.value.offset_bytes, caught.value.got_nbytes) == (1 << 40, 0)


def test_every_later_wait_raises_the_failure_again(engine: Engine, tmp_path: Path, view: View) -> None:
    view.write_file(tmp_path / "data", b"short")
    with engine.open(str(tmp_path / "data")) as file:
        request = engine.submit("read", file, bytearray(10), 0)
        for _ in range(3):
            with pytest.raises(StorageError, match="5 of 10 bytes"):
                request.wait()
            assert request.done()


def test_a_failed_request_does_not_disturb_the_next(engine: Engine, tmp_path: Path, view: View) -> None:
    view.write_file(tmp_path / "data", pattern(SEGMENT_NBYTES))
    with engine.open(str(tmp_path / "data")) as file:
        bad = engine.submit("read", file, aligned(20 * SEGMENT_NBYTES), 0)
        target = aligned(SEGMENT_NBYTES)
        good = engine.submit("read", file, target, 0)
        assert good.wait() == SEGMENT_NBYTES
        assert target == pattern(SEGMENT_NBYTES)
        with pytest.raises(StorageError):
            bad.wait()


@pytest.mark.usefixtures("real_files")
def test_the_file_size_limit_is_an_error_with_the_bytes_that_fitted(engine: Engine, tmp_path: Path) -> None:
    limit = (1 << 20) + 4096
    source = aligned(2 << 20)
    with engine.open(str(tmp_path / "data"), "x+") as file, file_size_limit(limit):
        with pytest.raises(StorageError) as caught:
            engine.submit("write", file, source, 0).wait()
        assert caught.value.errno == errno.EFBIG
        assert caught.value.got_nbytes == limit
        assert not isinstance(caught.value, DiskFullError)
        with pytest.raises(StorageError, match="EFBIG"):
            file.allocate(2 << 20)


def test_a_full_drive_is_a_disk_full_error_at_wait(engine: Engine, drive: Drive) -> None:
    source = aligned(128 << 20)
    with engine.open(str(drive.path / "data"), "x+") as file:
        with pytest.raises(DiskFullError) as caught:
            engine.submit("write", file, source, 0).wait()
        error = caught.value
        assert (error.errno, error.offset_bytes) == (errno.ENOSPC, 0)
        assert error.asked_nbytes == 128 << 20
        assert error.got_nbytes is not None
        assert 0 < error.got_nbytes < 64 << 20
        assert "free space" in str(error)


def test_allocate_on_a_full_drive_is_a_disk_full_error(engine: Engine, drive: Drive) -> None:
    with engine.open(str(drive.path / "data"), "x+") as file, pytest.raises(DiskFullError) as caught:
        file.allocate(128 << 20)
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.asked_nbytes == 128 << 20


def test_a_wait_that_is_too_short_names_the_request_and_can_be_repeated(engine: Engine, drive: Drive) -> None:
    path = drive.path / "data"
    with engine.open(str(path), "x+") as file, drive.frozen() as thaw:
        request = engine.submit("write", file, pattern(9000), 17)
        for timeout_s in (0, 0.01, 0.15, -1):
            with pytest.raises(RequestTimeoutError) as caught:
                request.wait(timeout_s)
        error = caught.value
        assert (error.path, error.offset_bytes, error.asked_nbytes) == (str(path), 17, 9000)
        assert isinstance(error, TimeoutError)
        assert not request.done()
        thaw()
        assert request.wait(60) == 9000
        assert request.done()


def test_wait_refuses_a_timeout_that_is_no_number(engine: Engine, tmp_path: Path) -> None:
    with engine.open(str(tmp_path / "data"), "x+") as file:
        request = engine.submit("write", file, b"x", 0)
        with pytest.raises(ValueError):
            request.wait(float("nan"))
        assert request.wait(float("inf")) == 1


def test_opening_what_is_not_there_is_a_storage_error(engine: Engine, tmp_path: Path) -> None:
    with pytest.raises(StorageError) as caught:
        engine.open(str(tmp_path / "missing"))
    assert caught.value.errno == errno.ENOENT
    assert caught.value.path == str(tmp_path / "missing")


@pytest.mark.usefixtures("real_files")
def test_x_creates_a_private_file(engine: Engine, tmp_path: Path) -> None:
    with engine.open(str(tmp_path / "data"), "x+"):
        assert (tmp_path / "data").stat().st_mode & 0o777 == 0o600


def test_x_never_opens_an_old_file(engine: Engine, tmp_path: Path) -> None:
    engine.open(str(tmp_path / "data"), "x+").close()
    with pytest.raises(StorageError) as caught:
        engine.open(str(tmp_path / "data"), "x+")
    assert caught.value.errno == errno.EEXIST


@pytest.mark.usefixtures("real_files")
@pytest.mark.parametrize("mode", ["r", "r+"])
def test_symbolic_links_are_not_followed(engine: Engine, tmp_path: Path, mode: str) -> None:
    (tmp_path / "data").write_bytes(b"secret")
    (tmp_path / "link").symlink_to(tmp_path / "data")
    with pytest.raises(StorageError, match="symbolic link") as caught:
        engine.open(str(tmp_path / "link"), mode)
    assert caught.value.errno == errno.ELOOP


@pytest.mark.usefixtures("real_files")
def test_a_dangling_link_is_not_created_through(engine: Engine, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StorageError):
        engine.open(str(tmp_path / "link"), "x+")
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.usefixtures("real_files")
@pytest.mark.parametrize("mode", ["r", "r+"])
def test_a_fifo_is_refused_without_blocking(engine: Engine, tmp_path: Path, mode: str) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(StorageError, match="not a regular file"):
        engine.open(str(tmp_path / "fifo"), mode)


@pytest.mark.usefixtures("real_files")
def test_descriptors_block_and_end_with_exec(engine: Engine, tmp_path: Path) -> None:
    path = tmp_path / "data"
    with engine.open(str(path), "x+") as file:
        numbers = [entry.name for entry in Path("/proc/self/fd").iterdir() if entry.resolve() == path]
        assert len(numbers) == (2 if file.direct else 1)
        for number in numbers:
            info = Path(f"/proc/self/fdinfo/{number}").read_text()
            flags = int(info.split("flags:")[1].split()[0], 8)
            assert not flags & os.O_NONBLOCK  # io_uring would answer EAGAIN on some file systems
            assert flags & os.O_CLOEXEC


@pytest.mark.usefixtures("real_files")
def test_a_directory_is_refused(engine: Engine, tmp_path: Path) -> None:
    with pytest.raises(StorageError) as caught:
        engine.open(str(tmp_path))
    assert caught.value.errno == errno.EISDIR


@pytest.mark.usefixtures("real_files")
def test_a_device_is_refused(engine: Engine) -> None:
    with pytest.raises(StorageError, match="not a regular file"):
        engine.open("/dev/null", "r+")


def test_dir_fd_is_where_the_path_begins(engine: Engine, tmp_path: Path, view: View) -> None:
    folder = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with engine.open("data", "x+", dir_fd=folder) as file:
            assert file.path == "data"
            engine.submit("write", file, b"here", 0).wait()
    finally:
        os.close(folder)
    assert view.read_file(tmp_path / "data") == b"here"


def test_names_that_are_not_utf8_work(engine: Engine, tmp_path: Path) -> None:
    path = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9")
    with engine.open(path, "x+") as file:
        assert file.path == path
        with pytest.raises(StorageError) as caught:
            engine.submit("read", file, bytearray(1), 0).wait()
    assert caught.value.path == path


def test_an_unknown_mode_or_op_is_a_value_error(engine: Engine, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="mode"):
        engine.open(str(tmp_path / "data"), "w")  # type: ignore[arg-type]
    with engine.open(str(tmp_path / "data"), "x+") as file, pytest.raises(ValueError, match="op"):
        engine.submit("erase", file, b"", 0)  # type: ignore[arg-type]


@pytest.mark.parametrize(("offset", "nbytes"), [(-1, None), (0, -1), (0, 9), ((1 << 63) - 4, 8)])
def test_impossible_extents_are_value_errors(
    engine: Engine, tmp_path: Path, offset: int, nbytes: int | None
) -> None:
    with engine.open(str(tmp_path / "data"), "x+") as file:
        buffer = bytearray(8)
        with pytest.raises(ValueError):
            engine.submit("write", file, buffer, offset, nbytes)
        buffer.append(1)  # the buffer is not held by a request that never was
        assert file.size_nbytes == 0


def test_a_read_into_constant_bytes_is_refused(engine: Engine, tmp_path: Path) -> None:
    with engine.open(str(tmp_path / "data"), "x+") as file, pytest.raises(BufferError):
        engine.submit("read", file, b"constant", 0)


def test_a_buffer_with_gaps_is_refused(engine: Engine, tmp_path: Path) -> None:
    with engine.open(str(tmp_path / "data"), "x+") as file, pytest.raises(BufferError):
        engine.submit("write", file, memoryview(bytes(10))[::2], 0)


def test_writing_to_a_file_opened_for_reading_is_refused(engine: Engine, tmp_path: Path, view: View) -> None:
    view.write_file(tmp_path / "data", b"keep")
    with engine.open(str(tmp_path / "data"), "r") as file, pytest.raises(StateError, match="reading"):
        engine.submit("write", file, b"lost", 0)
    assert view.read_file(tmp_path / "data") == b"keep"


def test_a_closed_file_refuses_everything(engine: Engine, tmp_path: Path) -> None:
    file = engine.open(str(tmp_path / "data"), "x+")
    file.close()
    file.close()
    buffer = bytearray(1)
    calls: list[Callable[[], object]] = [
        lambda: engine.submit("write", file, buffer, 0),
        lambda: engine.sync(file),
        lambda: file.allocate(1),
        lambda: file.size_nbytes,
    ]
    for call in calls:
        with pytest.raises(StateError, match="closed"):
            call()
    buffer.append(1)


def test_a_closed_engine_refuses_everything(engine: Engine, tmp_path: Path) -> None:
    with engine.open(str(tmp_path / "data"), "x+") as file:
        engine.close()
        engine.close()
        calls: list[Callable[[], object]] = [
            lambda: engine.open(str(tmp_path / "data")),
            lambda: engine.submit("write", file, b"x", 0),
            lambda: engine.sync(file),
        ]
        for call in calls:
            with pytest.raises(StateError, match="closed"):
                call()
        assert file.size_nbytes == 0


@pytest.mark.parametrize(("offset", "nbytes"), [(0.0, None), (0, 4.0), ("0", None)])
def test_extents_that_are_no_whole_numbers_are_type_errors(
    engine: Engine, tmp_path: Path, view: View, offset: Any, nbytes: Any
) -> None:
    view.write_file(tmp_path / "data", pattern(10))
    with engine.open(str(tmp_path / "data")) as file, pytest.raises(TypeError):
        engine.submit("read", file, bytearray(10), offset, nbytes)


def test_a_failure_that_is_waited_for_often_does_not_grow(engine: Engine, tmp_path: Path, view: View) -> None:
    view.write_file(tmp_path / "data", b"short")
    depths = []
    with engine.open(str(tmp_path / "data")) as file:
        request = engine.submit("read", file, bytearray(10), 0)
        for _ in range(5):
            with pytest.raises(StorageError) as caught:
                request.wait()
            depths.append(len(caught.traceback))
    assert len(set(depths)) == 1


@pytest.mark.usefixtures("real_files")
def test_a_failing_x_leaves_no_file_behind(engine: Engine, tmp_path: Path) -> None:
    engine.open(str(tmp_path / "first"), "x+").close()  # what is tried once a drive has been
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    held = [os.open("/dev/null", os.O_RDONLY) for _ in range(20)]  # fills the gaps below the last
    errors = []
    try:
        for room in range(3):
            # The next descriptor is the one after the last: so many of them are left.
            resource.setrlimit(resource.RLIMIT_NOFILE, (max(held) + 1 + room, hard))
            try:
                engine.open(str(tmp_path / "new"), "x+").close()
                break
            except StorageError as error:
                errors.append((error.errno, (tmp_path / "new").exists()))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for fd in held:
            os.close(fd)
    assert set(errors) == {(errno.EMFILE, False)}
