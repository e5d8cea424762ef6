"""The Chrome trace file: valid JSON, threads that the viewers can show, all or nothing."""

from __future__ import annotations

import errno
import gzip
import itertools
import json
import math
import os
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload.errors import DiskFullError, StorageError
from offload.trace import Tracer
from offload.trace.chrome import Recorded, _events


@pytest.fixture
def tracer() -> Tracer:
    tracer = Tracer()
    tracer.add("disk read", "layer 1", 12.0, 14.0, nbytes=4096)
    tracer.add("disk read", "layer 2", 13.0, 15.0)
    tracer.add("compute", "layer 0", 10.0, 13.0, phase="forward")
    tracer.count("disk_read_nbytes", 4096)
    return tracer


def load(path: Path) -> dict[str, Any]:
    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    document: dict[str, Any] = json.loads(path.read_text(), parse_constant=refuse)
    return document


def thread_names(events: list[dict[str, Any]]) -> dict[int, str]:
    return {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}


def test_file_holds_each_span_with_its_time_and_arguments(tracer: Tracer, tmp_path: Path) -> None:
    tracer.write_chrome_trace(tmp_path / "trace.json")
    events = load(tmp_path / "trace.json")["traceEvents"]
    threads = thread_names(events)
    spans = [(threads[e["tid"]], e["name"], e["ts"], e["dur"], e["args"]) for e in events if e["ph"] == "X"]
    assert spans == [
        ("compute", "layer 0", 0.0, 3e6, {"phase": "forward"}),
        ("disk read", "layer 1", 2e6, 2e6, {"nbytes": 4096}),
        ("disk read 2", "layer 2", 3e6, 2e6, {}),
    ]


def test_spans_that_do_not_overlap_share_a_thread_in_order_of_time(tmp_path: Path) -> None:
    tracer = Tracer()
    for start in (4.0, 0.0, 2.0):
        tracer.add("disk read", str(start), start, start + 2.0)
    tracer.write_chrome_trace(tmp_path / "trace.json")
    events = load(tmp_path / "trace.json")["traceEvents"]
    assert thread_names(events) == {1: "disk read"}
    assert [event["name"] for event in events if event["ph"] == "X"] == ["0.0", "2.0", "4.0"]


def test_file_holds_counters_busy_time_and_dropped_spans(tmp_path: Path) -> None:
    tracer = Tracer(capacity=1)
    tracer.add("compute", "a", 0.0, 1.0)
    tracer.add("compute", "b", 1.0, 3.0)
    tracer.count("disk_read_nbytes", 7)
    tracer.write_chrome_trace(tmp_path / "trace.json")
    assert load(tmp_path / "trace.json")["otherData"] == {
        "counters": {"disk_read_nbytes": 7},
        "busy_s": {"compute": 3.0},
        "num_dropped_spans": 1,
    }


def test_known_tracks_stand_in_a_fixed_order_before_others(tmp_path: Path) -> None:
    tracer = Tracer()
    for track in ("zebra", "commit", "another", "disk write", "compute"):
        tracer.add(track, "a", 0.0, 1.0)
    tracer.write_chrome_trace(tmp_path / "trace.json")
    threads = thread_names(load(tmp_path / "trace.json")["traceEvents"])
    assert [threads[tid] for tid in sorted(threads)] == [
        "compute",
        "disk write",
        "commit",
        "another",
        "zebra",
    ]


def test_trace_without_spans_is_valid(tmp_path: Path) -> None:
    Tracer().write_chrome_trace(tmp_path / "trace.json")
    assert [e["name"] for e in load(tmp_path / "trace.json")["traceEvents"]] == ["process_name"]


def test_name_that_ends_in_gz_is_compressed(tracer: Tracer, tmp_path: Path) -> None:
    tracer.write_chrome_trace(tmp_path / "trace.json")
    tracer.write_chrome_trace(tmp_path / "trace.json.gz")
    assert (
        gzip.decompress((tmp_path / "trace.json.gz").read_bytes()) == (tmp_path / "trace.json").read_bytes()
    )


@pytest.mark.parametrize("value", [math.nan, math.inf, Path("/data"), (1, 2)])
def test_argument_that_json_lacks_is_written_as_text(value: object, tmp_path: Path) -> None:
    tracer = Tracer()
    tracer.add("compute", "a", 0.0, 1.0, value=value)
    tracer.write_chrome_trace(tmp_path / "trace.json")
    assert load(tmp_path / "trace.json")["traceEvents"][-1]["args"] == {"value": str(value)}


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["compute", "disk read"]),
            st.floats(0, 1e5, allow_subnormal=False),
            st.floats(0, 1e-3, allow_subnormal=False),
        ),
        max_size=30,
    )
)
def test_no_two_spans_of_a_thread_overlap_and_none_is_lost(spans: list[tuple[str, float, float]]) -> None:
    recorded = [
        Recorded(track, str(i), start, start + length, {}) for i, (track, start, length) in enumerate(spans)
    ]
    by_thread = defaultdict(list)
    for event in _events(recorded):
        if event["ph"] == "X":
            assert event["dur"] >= 0
            start_ns = round(event["ts"] * 1e3)
            by_thread[event["tid"]].append((start_ns, start_ns + round(event["dur"] * 1e3), event["name"]))
    for lane in by_thread.values():
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(lane))
    names = sorted(int(name) for lane in by_thread.values() for *_, name in lane)
    assert names == list(range(len(spans)))


def test_file_is_replaced_whole_and_nothing_else_is_left(tracer: Tracer, tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    path.write_text("old")
    with path.open() as reader:
        tracer.write_chrome_trace(str(path))
        assert reader.read() == "old"
    assert load(path)["displayTimeUnit"] == "ms"
    assert list(tmp_path.iterdir()) == [path]


def test_missing_directory_is_a_storage_error(tracer: Tracer, tmp_path: Path) -> None:
    path = tmp_path / "missing" / "trace.json"
    with pytest.raises(StorageError, match=r"cannot write the trace .*No such file or directory; ") as caught:
        tracer.write_chrome_trace(path)
    assert (caught.value.errno, caught.value.path) == (errno.ENOENT, str(path))


def test_failed_write_leaves_the_old_file_and_no_part(
    tracer: Tracer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = tmp_path / "trace.json"
    path.write_text("old")
    monkeypatch.setattr("offload.trace.chrome.os.fsync", full)
    with pytest.raises(DiskFullError, match="No space left on device"):
        tracer.write_chrome_trace(path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["trace.json", "trace.json.gz"])
def test_a_full_drive_is_told_with_the_bytes_needed_and_free(
    name: str, tracer: Tracer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracer.write_chrome_trace(tmp_path / "whole.json")
    whole = (tmp_path / "whole.json").stat().st_size

    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("offload.trace.chrome.os.fsync", full)
    with pytest.raises(DiskFullError, match=rf": (up to )?{whole:,} bytes needed, [\d,]+ free") as error:
        tracer.write_chrome_trace(tmp_path / name)
    assert ("up to" in error.value.message) == name.endswith(".gz")
    assert error.value.asked_nbytes == whole
    assert error.value.got_nbytes is not None and error.value.got_nbytes > 0
