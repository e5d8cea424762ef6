"""Spans, busy time and counters of a tracer, from one thread and from several."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from offload.errors import StateError
from offload.trace import Tracer


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Replace the tracer's clock; the time is `clock[0]`."""
    now = [0.0]
    monkeypatch.setattr("offload.trace.tracer.perf_counter", lambda: now[0])
    return now


@pytest.mark.parametrize("enabled", [True, False])
def test_span_makes_its_track_busy_while_open(enabled: bool, clock: list[float]) -> None:
    tracer = Tracer(enabled)
    with tracer.span("layer", "compute", row=0):
        clock[0] = 2.5
    clock[0] = 4.0
    assert tracer.busy_s() == {"compute": 2.5}


def test_span_that_raises_is_recorded_and_lets_the_error_pass(clock: list[float]) -> None:
    tracer = Tracer()

    def fail() -> None:
        with tracer.span("layer", "compute"):
            clock[0] = 1.0
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert tracer.busy_s() == {"compute": 1.0}


@pytest.mark.parametrize("enabled", [True, False])
def test_overlapping_spans_of_a_track_count_once(enabled: bool) -> None:
    tracer = Tracer(enabled)
    for start in (0.0, 1.0, 5.0):
        tracer.add("disk read", "layer", start, start + 2.0)
    assert tracer.busy_s() == {"disk read": 5.0}


def test_overlap_is_the_time_both_tracks_were_busy() -> None:
    tracer = Tracer(enabled=False)
    tracer.add("disk read", "a", 0.0, 4.0)
    tracer.add("disk read", "b", 3.0, 6.0)
    tracer.add("compute", "a", 5.0, 9.0)
    assert tracer.overlap_s("disk read", "compute") == tracer.overlap_s("compute", "disk read") == 1.0


def test_track_overlaps_itself_for_as_long_as_it_is_busy() -> None:
    tracer = Tracer(enabled=False)
    tracer.add("compute", "a", 1.0, 4.0)
    assert tracer.overlap_s("compute", "compute") == 3.0


def test_overlap_with_a_track_that_never_was_busy_is_zero() -> None:
    tracer = Tracer(enabled=False)
    tracer.add("compute", "a", 0.0, 1.0)
    assert tracer.overlap_s("compute", "disk read") == 0.0
    assert tracer.overlap_s("disk read", "compute") == 0.0


def test_span_that_ends_before_it_starts_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'a' on track 'compute' ends at 1.0 s, before its start at 2.0 s"):
        Tracer().add("compute", "a", 2.0, 1.0)


def test_counters_add_up() -> None:
    tracer = Tracer(enabled=False)
    tracer.count("disk_read_nbytes", 5)
    tracer.count("disk_read_nbytes", 7)
    tracer.count("disk_written_nbytes", 0)
    assert tracer.counters() == {"disk_read_nbytes": 12, "disk_written_nbytes": 0}


def test_counter_cannot_fall() -> None:
    tracer = Tracer(enabled=False)
    with pytest.raises(ValueError, match="'disk_read_nbytes' cannot fall: got amount -1"):
        tracer.count("disk_read_nbytes", -1)
    assert tracer.counters() == {}


def test_returned_counters_are_a_copy() -> None:
    tracer = Tracer(enabled=False)
    tracer.count("steps", 1)
    tracer.counters().clear()
    assert tracer.counters() == {"steps": 1}


def test_reset_starts_counters_and_busy_time_over(clock: list[float]) -> None:
    tracer = Tracer(enabled=False)
    tracer.count("steps", 1)
    tracer.add("compute", "a", 0.0, 1.0)
    clock[0] = 1.0
    tracer.reset()
    assert (tracer.counters(), tracer.busy_s()) == ({}, {})


def test_span_open_at_a_reset_counts_from_the_reset_on(clock: list[float]) -> None:
    tracer = Tracer(enabled=False)
    with tracer.span("a", "disk read"):
        clock[0] = 3.0
        tracer.reset()
        clock[0] = 4.0
    assert tracer.busy_s() == {"disk read": 1.0}


def test_ring_keeps_the_newest_and_counts_the_dropped() -> None:
    tracer = Tracer(capacity=3)
    for i in range(10):
        tracer.add("compute", str(i), i, i + 1)
    assert tracer.num_dropped == 7
    assert [span.name for span in tracer._spans] == ["7", "8", "9"]
    assert tracer.busy_s() == {"compute": 10.0}


def test_ring_survives_a_reset() -> None:
    tracer = Tracer()
    tracer.add("compute", "a", 0.0, 1.0)
    tracer.reset()
    assert len(tracer._spans) == 1


def test_disabled_tracer_keeps_no_spans() -> None:
    tracer = Tracer(enabled=False)
    with tracer.span("a", "compute"):
        pass
    assert not tracer.enabled
    assert (len(tracer._spans), tracer.num_dropped) == (0, 0)


def test_disabled_tracer_has_no_file_to_write(tmp_path: Path) -> None:
    with pytest.raises(StateError, match="this tracer only counts; make it with enabled=True"):
        Tracer(enabled=False).write_chrome_trace(tmp_path / "trace.json")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("capacity", [0, -1])
def test_ring_without_room_is_refused(capacity: int) -> None:
    with pytest.raises(ValueError, match=f"at least 1 span, got {capacity}"):
        Tracer(capacity=capacity)


def test_threads_lose_nothing() -> None:
    tracer = Tracer(capacity=100)
    barrier = threading.Barrier(4)
    rounds = 500

    def work(track: str) -> None:
        barrier.wait()
        for i in range(rounds):
            tracer.count("total", 1)
            tracer.add("shared", track, i, i + 1)
            tracer.add(track, track, 2 * i, 2 * i + 1)
            tracer.busy_s()

    threads = [threading.Thread(target=work, args=(f"track {i}",)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert tracer.counters() == {"total": 4 * rounds}
    assert tracer.busy_s() == {"shared": rounds, **{f"track {i}": rounds for i in range(4)}}
    assert tracer.num_dropped == 8 * rounds - 100
