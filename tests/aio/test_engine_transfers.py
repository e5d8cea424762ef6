"""The conformance suite, first part: the right bytes, at every offset, size and address."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from engine_workbench import QUEUE_DEPTH, SEGMENT_NBYTES, View, aligned, pattern
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from offload.aio import ALIGNMENT_NBYTES, Engine

# Around every border there is: none, one byte, the alignment, the segment, the whole queue.
_BORDERS = [0, ALIGNMENT_NBYTES, SEGMENT_NBYTES, SEGMENT_NBYTES * QUEUE_DEPTH]
_near_borders = st.builds(
    lambda border, delta: max(0, border + delta), st.sampled_from(_BORDERS), st.integers(-513, 513)
)
_shifts = st.sampled_from([0, 1, 64, 512, 4095])

_each_engine = settings(
    max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)


@_each_engine
@given(offset=_near_borders, nbytes=_near_borders, shift=_shifts)
def test_any_offset_size_and_address_writes_and_reads_back_exactly(
    engine: Engine, folder: Path, offset: int, nbytes: int, shift: int, view: View
) -> None:
    path = folder / "data"
    view.remove(path)
    source = aligned(nbytes, shift)
    source[:] = pattern(nbytes)
    with engine.open(str(path), "x+") as file:
        assert engine.submit("write", file, source, offset).wait() == nbytes
        assert file.size_nbytes == (offset + nbytes if nbytes else 0)
        target = aligned(nbytes, shift)
        assert engine.submit("read", file, target, offset).wait() == nbytes
        assert target == source
    assert view.read_file(path) == (bytes(offset) + bytes(source) if nbytes else b"")


@_each_engine
@given(offset=_near_borders, nbytes=_near_borders, shift=_shifts)
def test_a_write_leaves_its_neighbours_and_the_size_alone(
    engine: Engine, folder: Path, offset: int, nbytes: int, shift: int, view: View
) -> None:
    path = folder / "data"
    before = pattern(SEGMENT_NBYTES * (QUEUE_DEPTH * 2 + 2) + 77, seed=5)
    view.write_file(path, before)
    source = aligned(nbytes, shift)
    source[:] = pattern(nbytes)
    with engine.open(str(path), "r+") as file:
        engine.submit("write", file, source, offset).wait()
    assert view.read_file(path) == before[:offset] + bytes(source) + before[offset + nbytes :]


def test_unaligned_neighbours_written_at_once_do_not_lose_each_other(
    engine: Engine, folder: Path, view: View
) -> None:
    piece = 1000  # four of them share a page
    data = pattern(piece * 200)
    with engine.open(str(folder / "data"), "x+") as file:
        requests = [
            engine.submit("write", file, data[start : start + piece], start)
            for start in range(0, len(data), piece)
        ]
        for request in requests:
            request.wait()
    assert view.read_file(folder / "data") == data


def test_direct_and_buffered_parts_of_one_file_see_each_other(engine: Engine, folder: Path) -> None:
    size = 4 * ALIGNMENT_NBYTES
    with engine.open(str(folder / "data"), "x+") as file:
        expected = bytearray(size)
        for turn in range(20):
            start, nbytes = ((turn * 1000) % ALIGNMENT_NBYTES, 5000) if turn % 2 else (0, size)
            source = aligned(nbytes)
            source[:] = pattern(nbytes, seed=turn)
            engine.submit("write", file, source, start).wait()
            expected[start : start + nbytes] = source
            target = aligned(size)
            engine.submit("read", file, target, 0).wait()
            assert target == expected


def test_many_requests_far_beyond_the_queue_depth_all_arrive(engine: Engine, folder: Path) -> None:
    nbytes = 2 * SEGMENT_NBYTES + 4096
    sources = [aligned(nbytes) for _ in range(10 * QUEUE_DEPTH)]
    for seed, source in enumerate(sources):
        source[:] = pattern(nbytes, seed)
    with engine.open(str(folder / "data"), "x+") as file:
        writes = [engine.submit("write", file, source, i * nbytes) for i, source in enumerate(sources)]
        assert [request.wait() for request in writes] == [nbytes] * len(sources)
        targets = [aligned(nbytes) for _ in sources]
        reads = [engine.submit("read", file, target, i * nbytes) for i, target in enumerate(targets)]
        for request in reversed(reads):
            request.wait()
    assert targets == sources


def test_threads_share_an_engine(engine: Engine, folder: Path) -> None:
    failures: list[BaseException] = []

    def use(number: int) -> None:
        try:
            data = pattern(3 * SEGMENT_NBYTES + number, seed=number)
            with engine.open(str(folder / f"data{number}"), "x+") as file:
                for _ in range(5):
                    engine.submit("write", file, data, number).wait()
                    target = bytearray(len(data))
                    engine.submit("read", file, target, number).wait()
                    assert target == data
                engine.sync(file)
        except BaseException as error:  # noqa: BLE001 - shown by the main thread
            failures.append(error)

    threads = [threading.Thread(target=use, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_nbytes_transfers_a_prefix_of_the_buffer(engine: Engine, folder: Path, view: View) -> None:
    with engine.open(str(folder / "data"), "x+") as file:
        assert engine.submit("write", file, b"abcdef", 0, 3).wait() == 3
        target = bytearray(b"......")
        assert engine.submit("read", file, target, 0, nbytes=2).wait() == 2
    assert target == b"ab...."
    assert view.read_file(folder / "data") == b"abc"


def test_zero_bytes_are_done_at_once_and_do_not_grow_the_file(engine: Engine, folder: Path) -> None:
    with engine.open(str(folder / "data"), "x+") as file:
        request = engine.submit("write", file, b"", 10_000)
        assert request.done()
        assert request.wait() == 0
        assert engine.submit("read", file, bytearray(8), 10_000, 0).wait() == 0
        assert file.size_nbytes == 0


def test_numpy_arrays_of_any_shape_are_buffers(engine: Engine, folder: Path) -> None:
    source = np.arange(6000, dtype=np.float32).reshape(60, 100)
    with engine.open(str(folder / "data"), "x+") as file:
        assert engine.submit("write", file, source, 3).wait() == source.nbytes
        target = np.empty_like(source)
        engine.submit("read", file, target, 3).wait()
        assert engine.submit("write", file, np.empty((0, 4)), 0).wait() == 0
    np.testing.assert_array_equal(target, source)


def test_data_behind_4_gib_of_hole_is_found(engine: Engine, folder: Path) -> None:
    offset = (5 << 30) + 123
    with engine.open(str(folder / "data"), "x+") as file:
        engine.submit("write", file, b"far away", offset).wait()
        target = bytearray(8)
        engine.submit("read", file, target, offset).wait()
        assert file.size_nbytes == offset + 8
    assert target == b"far away"


@pytest.mark.slow
@pytest.mark.usefixtures("real_files")
def test_one_request_above_4_gib_transfers_every_byte(
    make_engine: Callable[..., Engine], tmp_path: Path
) -> None:
    nbytes = (4 << 30) + 8192
    if os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGESIZE") < 2 * nbytes:
        pytest.skip("not enough free memory")
    path = tmp_path / "data"
    path.touch()
    os.truncate(path, nbytes)  # a hole: no drive is read
    with path.open("r+b") as file:
        file.seek(nbytes - 4)
        file.write(b"last")
    with make_engine(segment_nbytes=8 << 20) as engine, engine.open(str(path)) as opened:
        memory = aligned(nbytes)
        assert engine.submit("read", opened, memory, 0).wait() == nbytes
        assert memory[nbytes - 4 :] == b"last"


def test_the_size_is_the_size_now(engine: Engine, folder: Path, view: View) -> None:
    with engine.open(str(folder / "data"), "x+") as file:
        assert file.size_nbytes == 0
        view.write_file(folder / "data", bytes(12345))
        assert file.size_nbytes == 12345


def test_allocate_reserves_blocks_and_grows_the_file(engine: Engine, folder: Path, view: View) -> None:
    with engine.open(str(folder / "data"), "x+") as file:
        file.allocate(0)
        assert file.size_nbytes == 0
        file.allocate(100_000)
        assert file.size_nbytes == 100_000
        file.allocate(50_000)
        assert file.size_nbytes == 100_000
    assert view.used_nbytes(folder / "data") >= 100_000


def test_sync_returns_after_waited_writes(engine: Engine, folder: Path) -> None:
    with engine.open(str(folder / "data"), "x+") as file:
        engine.submit("write", file, pattern(100_000), 1).wait()
        assert engine.sync(file) is None


def test_direct_is_what_the_engine_was_asked_for(make_engine: Callable[..., Engine], folder: Path) -> None:
    with make_engine(direct=False) as engine, engine.open(str(folder / "data"), "x+") as file:
        assert file.direct is False


def test_finished_s_lies_between_submit_and_wait(engine: Engine, folder: Path) -> None:
    with engine.open(str(folder / "data"), "x+") as file:
        began_s = time.perf_counter()
        request = engine.submit("write", file, bytes(SEGMENT_NBYTES), 0)
        request.wait()
        finished_s = request.finished_s
        assert finished_s is not None
        assert began_s <= finished_s <= time.perf_counter()
