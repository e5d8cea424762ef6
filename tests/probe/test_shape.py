"""Requests that keep a queue full, within the memory and the file at hand."""

from __future__ import annotations

from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload.machine import IoSetting
from offload.probe.shape import Region, plan_requests, regions_of
from offload.sizes import GIB, KIB, MIB


def setting(block: int, depth: int) -> IoSetting:
    return IoSetting(segment_nbytes=block, queue_depth=depth)


@given(
    block=st.integers(12, 26).map(lambda power: 1 << power),
    depth=st.integers(1, 256),
    pattern=st.sampled_from(["read", "write", "mixed"]),
    file_nbytes=st.integers(8, 4096).map(lambda num: num * MIB),
    buffer_nbytes=st.integers(8, 256).map(lambda num: num * MIB),
)
def test_planned_requests_fill_the_queue_and_stay_within_bounds(
    block, depth, pattern, file_nbytes, buffer_nbytes
):
    requests = plan_requests(
        setting(block, depth), pattern, file_nbytes=file_nbytes, buffer_nbytes=buffer_nbytes
    )
    if requests is None:
        return
    assert requests.nbytes % max(block, MIB) == 0
    assert requests.num_outstanding >= 2
    assert requests.buffer_nbytes <= buffer_nbytes
    # While one is waited for, the others hold at least what the queue does.
    assert requests.nbytes * (requests.num_outstanding - 1) >= block * depth
    regions = regions_of(pattern, file_nbytes)
    for region in regions:
        mine = requests.num_outstanding // len(regions)
        offsets = list(islice(region.offsets(requests.nbytes), 3 * mine + 1))
        for start in range(len(offsets) - mine + 1):
            assert len(set(offsets[start : start + mine])) == mine  # none overlap in flight
        assert all(
            region.start <= offset and offset + requests.nbytes <= region.start + region.nbytes
            for offset in offsets
        )


def test_requests_are_large_where_there_is_room():
    assert (
        plan_requests(setting(128 * KIB, 1), "read", file_nbytes=4 * GIB, buffer_nbytes=256 * MIB) is not None
    )
    requests = plan_requests(setting(128 * KIB, 1), "read", file_nbytes=4 * GIB, buffer_nbytes=256 * MIB)
    assert requests is not None
    assert requests.nbytes == 8 * MIB


@pytest.mark.parametrize(
    ("block", "depth", "file_nbytes", "buffer_nbytes"),
    [
        (8 * MIB, 32, 4 * GIB, 256 * MIB),  # all of the buffers in flight, and nothing to go on with
        (4 * MIB, 8, 8 * MIB, 256 * MIB),
        (64 * MIB, 1, 4 * GIB, 128 * MIB),
    ],
)
def test_a_setting_without_room_is_not_measured(block, depth, file_nbytes, buffer_nbytes):
    wanted = setting(block, depth)
    assert plan_requests(wanted, "read", file_nbytes=file_nbytes, buffer_nbytes=buffer_nbytes) is None


def test_mixed_reads_and_writes_different_halves():
    read, write = regions_of("mixed", 16 * MIB)
    assert (read.op, write.op) == ("read", "write")
    assert read.start + read.nbytes <= write.start
    assert read.nbytes == write.nbytes == 8 * MIB


def test_offsets_go_on_where_the_last_run_stopped_and_around():
    region = Region("write", 8 * MIB, 8 * MIB)
    assert list(islice(region.offsets(2 * MIB, 12 * MIB), 4)) == [12 * MIB, 14 * MIB, 8 * MIB, 10 * MIB]
    assert next(region.offsets(2 * MIB, 16 * MIB)) == 8 * MIB
