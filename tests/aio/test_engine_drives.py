"""Several drives under one engine, and how each is accessed: decided by a trial, said once."""

from __future__ import annotations

import ctypes
import logging
import mmap
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from engine_workbench import QUEUE_DEPTH, SEGMENT_NBYTES, Drive, View, aligned, pattern

from offload.aio import Engine, open_engine
from offload.aio.failures import warn_buffered
from offload.aio.native import missing_reason

needs_extension = pytest.mark.skipif(bool(missing_reason), reason=missing_reason)


@needs_extension
@pytest.mark.parametrize("name", ["uring", "threads"])
def test_a_drive_that_hangs_does_not_hold_up_another(name: str, drive: Drive, tmp_path: Path) -> None:
    nbytes = 2 * QUEUE_DEPTH * SEGMENT_NBYTES
    with (
        open_engine(
            name, queue_depth=QUEUE_DEPTH, segment_nbytes=SEGMENT_NBYTES, threads=QUEUE_DEPTH
        ) as engine,
        engine.open(str(drive.path / "data"), "x+") as hanging,
        engine.open(str(tmp_path / "data"), "x+") as other,
    ):
        source, target = pattern(nbytes), aligned(nbytes)
        with drive.frozen():
            stuck = engine.submit("write", hanging, source, 0)  # more than the queue holds
            engine.submit("write", other, source, 0).wait(timeout_s=60)
            engine.submit("read", other, target, 0).wait(timeout_s=60)
            assert not stuck.done()
        assert stuck.wait() == nbytes
    assert target == source


# Classic BPF: EINVAL to pread64 (17) and pwrite64 (18), which only the trial uses; the engines use
# io_uring, preadv and pwritev, which a filter on these two does not see.
_REFUSED = """
import ctypes, logging, struct, sys
logging.basicConfig(stream=sys.stdout, format="%(levelname)s %(message)s")
program = b"".join(struct.pack("HBBI", *step) for step in [
    (0x20, 0, 0, 0),
    (0x15, 1, 0, 17),
    (0x15, 0, 1, 18),
    (0x06, 0, 0, 0x00050000 | {errno}),
    (0x06, 0, 0, 0x7FFF0000),
])
code = ctypes.create_string_buffer(program)
filter = struct.pack("HP", 5, ctypes.addressof(code))
libc = ctypes.CDLL(None, use_errno=True)
if libc.prctl(38, 1, 0, 0, 0) or libc.prctl(22, 2, filter, 0, 0):
    print("no seccomp here")
    sys.exit()
import os
from offload.aio import open_engine
folder, name = sys.argv[1:]
with open_engine(name) as engine:
    for mode, path in [("x+", "new"), ("r", "old"), ("r+", "old")]:
        with engine.open(os.path.join(folder, path), mode) as file:
            print(mode, "direct" if file.direct else "buffered", file.size_nbytes)
    with engine.open(os.path.join(folder, "old"), "r+") as file:
        buffer = bytearray(file.size_nbytes)
        engine.submit("write", file, bytes(buffer), 0).wait()
        engine.sync(file)
        engine.submit("read", file, buffer, 0).wait()
        print(bytes(buffer) == bytes(len(buffer)))
"""


@needs_extension
@pytest.mark.skipif(sys.platform != "linux", reason="seccomp is Linux")
@pytest.mark.parametrize("name", ["uring", "threads"])
@pytest.mark.parametrize(("errno", "access"), [(22, "buffered"), (95, "buffered"), (5, "direct")])
def test_a_trial_decides_between_direct_and_buffered(
    name: str, errno: int, access: str, tmp_path: Path
) -> None:
    if not _takes_direct(tmp_path):
        pytest.skip("the temporary directory's file system has no O_DIRECT")
    (tmp_path / "old").write_bytes(pattern(256 * 1024))
    result = subprocess.run(
        [sys.executable, "-c", _REFUSED.replace("{errno}", str(errno)), str(tmp_path), name],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 0, result.stderr
    if "no seccomp here" in result.stdout:
        pytest.skip("this kernel has no seccomp filters")
    lines = result.stdout.splitlines()
    warnings = [line for line in lines if line.startswith("WARNING")]
    assert [line for line in lines if line not in warnings] == [
        f"x+ {access} 0",
        f"r {access} 262144",
        f"r+ {access} 262144",
        "True",
    ]
    if access == "buffered":
        assert len(warnings) == 1
        assert str(tmp_path) in warnings[0]
        assert "refuses O_DIRECT" in warnings[0]
        assert _cached_nbytes(tmp_path / "old") == 0
    else:
        assert warnings == []


def _takes_direct(folder: Path) -> bool:
    with open_engine("threads") as engine, engine.open(str(folder / "trial"), "x+") as file:
        return file.direct


def _cached_nbytes(path: Path) -> int:
    """How much of a file is in the page cache (mincore)."""
    nbytes = path.stat().st_size
    with path.open("rb") as file:
        resident = (ctypes.c_ubyte * -(-nbytes // mmap.PAGESIZE))()
        libc = ctypes.CDLL(None, use_errno=True)
        libc.mmap.restype = ctypes.c_void_p
        libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
        libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
        libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
        address = libc.mmap(None, nbytes, mmap.PROT_READ, mmap.MAP_SHARED, file.fileno(), 0)
        assert libc.mincore(address, nbytes, resident) == 0
        libc.munmap(address, nbytes)
        return sum(one & 1 for one in resident) * mmap.PAGESIZE


def test_an_existing_file_is_not_changed_by_the_trial(engine: Engine, tmp_path: Path, view: View) -> None:
    before = pattern(3 * SEGMENT_NBYTES + 5)
    view.write_file(tmp_path / "data", before)
    engine.open(str(tmp_path / "data"), "r+").close()
    assert view.read_file(tmp_path / "data") == before


def test_a_new_file_is_empty_after_the_trial(engine: Engine, tmp_path: Path, view: View) -> None:
    engine.open(str(tmp_path / "data"), "x+").close()
    assert view.read_file(tmp_path / "data") == b""


@pytest.mark.usefixtures("real_files")
def test_an_engine_asked_for_buffered_transfers_keeps_the_page_cache(
    make_engine: Callable[..., Engine], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "data").write_bytes(pattern(4 * SEGMENT_NBYTES))
    with make_engine(direct=False) as engine, engine.open(str(tmp_path / "data"), "r+") as file:
        assert not file.direct
        engine.submit("read", file, bytearray(4 * SEGMENT_NBYTES), 0).wait()
        engine.sync(file)
    assert _cached_nbytes(tmp_path / "data") == 4 * SEGMENT_NBYTES
    assert not [record for record in caplog.records if "O_DIRECT" in record.getMessage()]


def test_a_drive_without_direct_transfers_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, logger="offload.aio")
    for path in ("/drive/one", "/drive/two"):
        warn_buffered(path, (250 << 8) | 77)
    warn_buffered("/other", (250 << 8) | 78)
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2
    assert messages[0].startswith("/drive/one: its file system (device 250:77) refuses O_DIRECT")
