"""CRC-32C: known vectors, one reference, and the chaining that the store relies on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload.aio import crc32c
from offload.aio.checksum import crc32c_python
from offload.aio.native import missing_reason

# RFC 3720 (iSCSI), appendix B.4, and the check value of the CRC catalogues.
_VECTORS = [
    (b"", 0),
    (b"123456789", 0xE3069283),
    (bytes(32), 0x8A9136AA),
    (b"\xff" * 32, 0x62A8AB43),
    (bytes(range(32)), 0x46DD794E),
    (bytes(range(31, -1, -1)), 0x113FDB5C),
    (
        bytes.fromhex(
            "01c000000000000000000000000000001400000000000400000000140000001828000000000000000200000000000000"
        ),
        0xD9963A56,
    ),
]
# Around the block lengths of the three-stream loops (3 x 256 and 3 x 4096 bytes).
_LENGTHS = [0, 1, 7, 8, 9, 767, 768, 769, 775, 1536, 12287, 12288, 12289, 12288 + 768 + 13, 40000]
# Around the strides of the vector loops (4 x 32 and 4 x 64 bytes), which begin at two of them.
_LENGTHS += [127, 128, 255, 256, 257, 383, 384, 385, 511, 512, 513, 519, 640, 767, 1023, 1024, 1025]


@pytest.mark.parametrize(("data", "expected"), _VECTORS)
def test_known_vectors(data: bytes, expected: int) -> None:
    assert crc32c(data) == expected
    assert crc32c_python(data) == expected


@pytest.mark.parametrize("nbytes", _LENGTHS)
@pytest.mark.parametrize("shift", [0, 1, 5])
def test_every_implementation_agrees_at_every_length_and_address(nbytes: int, shift: int) -> None:
    data = np.random.default_rng(nbytes).integers(0, 256, nbytes + shift, np.uint8)[shift:]
    expected = crc32c_python(data, 7)
    assert crc32c(data, 7) == expected
    if not missing_reason:
        from offload import _aio

        for isa in _aio.crc32c_isas():
            assert _aio._crc32c_by(isa, data, 7) == expected, isa


@given(st.binary(max_size=3000), st.binary(max_size=3000), st.integers(0, 2**32 - 1))
def test_the_seed_goes_on_where_the_last_part_ended(first: bytes, second: bytes, seed: int) -> None:
    whole = first + second
    assert crc32c(second, crc32c(first, seed)) == crc32c(whole, seed)
    assert crc32c_python(second, crc32c_python(first, seed)) == crc32c_python(whole, seed)


def test_one_flipped_bit_changes_it() -> None:
    data = bytearray(20_000)
    before = crc32c(data)
    for place in (0, 4096, 12288, 19_999):
        data[place] ^= 0x10
        assert crc32c(data) != before
        data[place] ^= 0x10


def test_it_takes_any_contiguous_buffer_and_refuses_gaps() -> None:
    array = np.arange(100, dtype=np.float64)
    assert crc32c(array) == crc32c(array.tobytes()) == crc32c_python(array)
    assert crc32c(np.empty((0, 3))) == 0
    with pytest.raises((BufferError, ValueError)):
        crc32c(memoryview(bytes(10))[::2])


@pytest.mark.skipif(bool(missing_reason), reason=missing_reason)
def test_every_instruction_set_of_the_cpu_is_used() -> None:
    from offload import _aio

    flags = set(Path("/proc/cpuinfo").read_text().split())
    needs = {
        "vpclmul512": {"avx512f", "vpclmulqdq"},
        "vpclmul256": {"avx2", "vpclmulqdq"},
        "sse4.2": {"sse4_2", "pclmulqdq"},
        "scalar": set(),
    }
    assert _aio.crc32c_isas() == [isa for isa, needed in needs.items() if needed <= flags]
    with pytest.raises(ValueError, match="no crc32c by neon"):
        _aio._crc32c_by("neon", b"")
