"""The bytes of a measured file: distinct, incompressible, and any change is found."""

from __future__ import annotations

import zlib

import numpy as np
import pytest

from offload.probe.content import BLOCK_NBYTES, PERIOD_NBYTES, Content

OFFSET = 3 * PERIOD_NBYTES + 5 * BLOCK_NBYTES


def stamped(content: Content, offset: int, num_blocks: int, times: int = 1) -> tuple[bytearray, np.ndarray]:
    """What is at `offset` of a file, and how often it was written."""
    before = offset % PERIOD_NBYTES
    whole = bytearray(before + num_blocks * BLOCK_NBYTES)
    content.fill(memoryview(whole))
    data = whole[before:]
    counts = np.full(num_blocks, times, dtype=np.uint32)
    content.stamp(memoryview(data), offset, counts)
    return data, counts


def test_what_was_stamped_is_recognised_across_periods():
    content = Content(1)
    data, counts = stamped(content, OFFSET, 600)
    assert content.first_difference(memoryview(data), OFFSET, counts) is None


@pytest.mark.parametrize("position", [0, 7, 8, 4095, 4096, 300 * BLOCK_NBYTES + 77, 600 * BLOCK_NBYTES - 1])
def test_one_flipped_bit_is_found_at_its_offset(position):
    content = Content(1)
    data, counts = stamped(content, OFFSET, 600)
    data[position] ^= 0x10
    assert content.first_difference(memoryview(data), OFFSET, counts) == OFFSET + position


def test_an_older_version_of_a_block_is_found():
    content = Content(1)
    data, counts = stamped(content, OFFSET, 4, times=2)
    counts[2] = 3
    found = content.first_difference(memoryview(data), OFFSET, counts)
    assert found is not None
    assert found // BLOCK_NBYTES == OFFSET // BLOCK_NBYTES + 2


def test_a_block_of_another_period_is_found():
    content = Content(1)
    data, counts = stamped(content, 0, 4)
    assert content.first_difference(memoryview(data), PERIOD_NBYTES, counts) is not None


def test_a_block_torn_between_two_versions_is_found():
    content = Content(1)
    old, _ = stamped(content, OFFSET, 1, times=1)
    new, counts = stamped(content, OFFSET, 1, times=2)
    torn = new[:2048] + old[2048:]
    assert content.first_difference(memoryview(torn), OFFSET, counts) is not None


def test_no_two_blocks_are_alike_and_none_compresses():
    data, _ = stamped(Content(1), 0, 1024)
    blocks = {bytes(data[start : start + BLOCK_NBYTES]) for start in range(0, len(data), BLOCK_NBYTES)}
    assert len(blocks) == 1024
    assert len(zlib.compress(bytes(data))) > 0.999 * len(data)


def test_files_with_other_seeds_differ():
    content = Content(1)
    data, counts = stamped(Content(2), 0, 4)
    assert content.first_difference(memoryview(data), 0, counts) is not None
