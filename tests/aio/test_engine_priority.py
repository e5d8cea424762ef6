"""The conformance suite: a request that somebody waits for overtakes those that nobody waits for.

One segment at a time on a drive that hangs: what is submitted meanwhile is queued, and when the drive
goes on, the order of completion is the order in which segments began.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from engine_workbench import SEGMENT_NBYTES, Drive, View, pattern

from offload.aio import Engine, Request
from offload.errors import RequestTimeoutError


@pytest.fixture
def narrow(make_engine: Callable[..., Engine]) -> Iterator[Engine]:
    """An engine that does one segment after the other."""
    with make_engine(queue_depth=1, threads=1) as engine:
        yield engine


def wait_in_vain(request: Request) -> None:
    with pytest.raises(RequestTimeoutError):
        request.wait(timeout_s=0)


def order_of_completion(requests: list[Request]) -> list[int]:
    def finished_s(number: int) -> float:
        assert requests[number].finished_s is not None
        return requests[number].finished_s

    for request in requests:
        request.wait()
    return sorted(range(len(requests)), key=finished_s)


def submit_six(engine: Engine, file, source: bytes) -> list[Request]:
    return [engine.submit("write", file, source, number * len(source)) for number in range(6)]


def test_requests_begin_in_the_order_of_submission(narrow: Engine, drive: Drive) -> None:
    with narrow.open(str(drive.path / "data"), "x+") as file:
        with drive.frozen():
            requests = submit_six(narrow, file, pattern(SEGMENT_NBYTES))
        narrow.close()  # which waits for none of them in particular
        assert order_of_completion(requests) == [0, 1, 2, 3, 4, 5]


def test_what_is_waited_for_overtakes_what_is_not(narrow: Engine, drive: Drive, view: View) -> None:
    source = pattern(SEGMENT_NBYTES)
    with narrow.open(str(drive.path / "data"), "x+") as file:
        with drive.frozen():
            requests = submit_six(narrow, file, source)
            wait_in_vain(requests[4])
            wait_in_vain(requests[2])
            wait_in_vain(requests[4])
        narrow.close()
        order = order_of_completion(requests)
    order.remove(0)  # it had begun, or had not yet
    assert order == [4, 2, 1, 3, 5]
    assert view.read_file(drive.path / "data") == 6 * source


def test_the_rest_of_a_long_request_is_overtaken_too(narrow: Engine, drive: Drive, view: View) -> None:
    source = pattern(7 * SEGMENT_NBYTES)
    with narrow.open(str(drive.path / "data"), "x+") as file:
        with drive.frozen():
            long = narrow.submit("write", file, source, 0)
            short = narrow.submit("write", file, b"now", 10 * SEGMENT_NBYTES)
            wait_in_vain(short)
        narrow.close()
        assert order_of_completion([long, short]) == [1, 0]
    assert view.read_file(drive.path / "data")[: len(source)] == source


def test_waiting_for_what_has_begun_or_ended_changes_nothing(narrow: Engine, folder: Path) -> None:
    with narrow.open(str(folder / "data"), "x+") as file:
        requests = submit_six(narrow, file, pattern(SEGMENT_NBYTES))
        for request in [*reversed(requests), *requests]:
            assert request.wait() == SEGMENT_NBYTES
