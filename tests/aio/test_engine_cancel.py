"""The conformance suite: a request that is given up ends, says so, and lets go of what it held."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from engine_workbench import SEGMENT_NBYTES, Drive, View, aligned, pattern

from offload.aio import Engine, Request
from offload.errors import StorageError


@pytest.fixture
def narrow(make_engine: Callable[..., Engine]) -> Iterator[Engine]:
    """An engine that does one segment after the other."""
    with make_engine(queue_depth=1, threads=1) as engine:
        yield engine


def cancelled(request: Request) -> StorageError:
    """The error of a request that was given up, which every wait raises."""
    for _ in range(2):
        with pytest.raises(StorageError) as caught:
            request.wait(timeout_s=60)
        assert type(caught.value) is StorageError
        assert caught.value.errno == errno.ECANCELED
    return caught.value


def test_what_has_not_begun_is_given_up_at_once(narrow: Engine, drive: Drive, view: View) -> None:
    path = drive.path / "data"
    with narrow.open(str(path), "x+") as file:
        with drive.frozen():
            first = narrow.submit("write", file, pattern(SEGMENT_NBYTES), 0)
            buffer = bytearray(pattern(3 * SEGMENT_NBYTES))
            given_up = narrow.submit("write", file, buffer, SEGMENT_NBYTES)
            last = narrow.submit("write", file, b"after", SEGMENT_NBYTES)
            assert given_up.cancel()
            assert given_up.done()
            assert given_up.finished_s is not None
            buffer.append(1)  # BufferError while anything holds it
            error = cancelled(given_up)
            assert not given_up.cancel()
        assert (first.wait(), last.wait()) == (SEGMENT_NBYTES, 5)
    assert (error.path, error.offset_bytes) == (str(path), SEGMENT_NBYTES)
    assert (error.asked_nbytes, error.got_nbytes) == (3 * SEGMENT_NBYTES, 0)
    assert "cancelled" in str(error)
    assert view.read_file(path) == pattern(SEGMENT_NBYTES) + b"after"


def test_what_has_begun_is_finished_first(narrow: Engine, drive: Drive, view: View) -> None:
    source = pattern(5 * SEGMENT_NBYTES)
    with narrow.open(str(drive.path / "data"), "x+") as file:
        with drive.frozen():
            request = narrow.submit("write", file, source, 0)
            assert request.cancel()
            assert not request.cancel()
        error = cancelled(request)
        # The first segment had begun, or had not yet.
        assert error.got_nbytes in (0, SEGMENT_NBYTES)
    assert view.read_file(drive.path / "data") == source[: error.got_nbytes]


def test_a_request_that_has_ended_cannot_be_given_up(engine: Engine, folder: Path) -> None:
    with engine.open(str(folder / "data"), "x+") as file:
        good = engine.submit("write", file, pattern(100_000), 7)
        bad = engine.submit("read", file, aligned(100_000), 1 << 30)
        empty = engine.submit("write", file, b"", 0)
        assert good.wait() == 100_000
        with pytest.raises(StorageError, match="short read"):
            bad.wait()
        assert [request.cancel() for request in (good, bad, empty)] == [False] * 3
        assert (good.wait(), empty.wait()) == (100_000, 0)
        with pytest.raises(StorageError, match="short read"):
            bad.wait()
    engine.close()
    assert not good.cancel()


def test_cancelling_at_any_moment_leaves_what_was_said_and_nothing_else(
    engine: Engine, folder: Path, view: View
) -> None:
    """Cancelled writes, each of its own place: `got` bytes are there for certain, nothing is elsewhere."""
    nbytes = 6 * SEGMENT_NBYTES + 77
    sources = [pattern(nbytes, n) for n in range(40)]
    with engine.open(str(folder / "data"), "x+") as file:
        file.allocate(40 * nbytes)
        requests = [engine.submit("write", file, source, n * nbytes) for n, source in enumerate(sources)]
        gave_up = [n % 2 == 1 and request.cancel() for n, request in enumerate(requests)]
        got = []
        for request, was_given_up in zip(requests, gave_up, strict=True):
            if was_given_up:
                got.append(cancelled(request).got_nbytes)
            else:
                got.append(request.wait())
    found = view.read_file(folder / "data")
    assert len(found) == 40 * nbytes
    for n, sure_nbytes in enumerate(got):
        place, source = found[n * nbytes : (n + 1) * nbytes], sources[n]
        assert place[:sure_nbytes] == source[:sure_nbytes]
        assert all(one in (want, 0) for one, want in zip(place, source, strict=True))
        assert sure_nbytes == nbytes or n % 2 == 1


def test_file_and_engine_close_behind_cancelled_requests(narrow: Engine, drive: Drive) -> None:
    file = narrow.open(str(drive.path / "data"), "x+")
    with drive.frozen():
        requests = [narrow.submit("write", file, pattern(SEGMENT_NBYTES * 3), n << 20) for n in range(4)]
        assert all(request.cancel() for request in requests[1:])
    file.close()
    narrow.close()
    assert all(request.done() for request in requests)
    assert requests[0].wait() == 3 * SEGMENT_NBYTES


@pytest.mark.usefixtures("real_files")  # a thread that waits on a simulated disk lets nothing else go on
def test_who_waits_for_a_request_is_told_that_it_was_given_up(narrow: Engine, drive: Drive) -> None:
    errors: list[StorageError] = []
    with narrow.open(str(drive.path / "data"), "x+") as file:
        with drive.frozen():
            request = narrow.submit("write", file, pattern(3 * SEGMENT_NBYTES), 0)
            thread = threading.Thread(target=lambda: errors.append(cancelled(request)))
            thread.start()
            assert request.cancel()
        thread.join()
    assert [error.errno for error in errors] == [errno.ECANCELED]


def test_a_cancelled_read_leaves_the_rest_of_its_buffer_alone(
    make_engine: Callable[..., Engine], folder: Path, view: View
) -> None:
    nbytes = 64 * SEGMENT_NBYTES
    view.write_file(folder / "data", b"\xff" * nbytes)
    with make_engine(queue_depth=1, threads=1) as engine, engine.open(str(folder / "data")) as file:
        target = aligned(nbytes)
        request = engine.submit("read", file, target, 0)
        gave_up = request.cancel()
        got = cancelled(request).got_nbytes if gave_up else request.wait()
    assert bytes(target) == b"\xff" * got + bytes(nbytes - got)
