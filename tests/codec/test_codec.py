"""The exact split of fp32 masters and the layout of records."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from unit_records import read_parameter, write_parameter

from offload.codec import (
    CANONICAL_NAN_BITS,
    RecordFormat,
    join_master,
    read_masters,
    split_master,
    view_elements,
    view_optimizer_chunk,
    write_frozen,
    write_residual,
    write_weights,
)
from offload.errors import ConfigError
from offload.specs import TensorSpec


def floats(bits: torch.Tensor) -> torch.Tensor:
    """fp32 values of unsigned 32-bit patterns held in int64."""
    return torch.where(bits >= 1 << 31, bits - (1 << 32), bits).to(torch.int32).view(torch.float32)


def every_exponent() -> torch.Tensor:
    """Both signs, all 256 exponents, mantissas around each rounding boundary."""
    mantissas = {0, 1, 0x7FFFFF, 0x400000, 0x3FFFFF, 0x555555, 0x2AAAAA}
    for boundary in (0x8000, 0x10000, 0x18000, 0x7F8000, 0x7F0000):
        mantissas |= {boundary - 1, boundary, boundary + 1}
    sign_exponent = torch.arange(512, dtype=torch.int64) << 23
    return floats((sign_exponent[:, None] + torch.tensor(sorted(mantissas))[None, :]).reshape(-1))


def random_patterns(count: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return floats(torch.randint(0, 1 << 32, (count,), generator=generator, dtype=torch.int64))


def assert_same_bits(got: torch.Tensor, want: torch.Tensor) -> None:
    assert torch.equal(got.view(torch.int32), want.view(torch.int32))


def canonical(values: torch.Tensor) -> torch.Tensor:
    """`values` with every NaN the canonical one."""
    bits = values.clone().view(torch.int32)
    bits[values.isnan()] = CANONICAL_NAN_BITS
    return bits.view(torch.float32)


@pytest.mark.parametrize("values", [every_exponent(), random_patterns(1_000_000, 7)], ids=["grid", "random"])
def test_every_pattern_recombines_bit_exactly(values: torch.Tensor) -> None:
    high, residual = split_master(values)
    assert_same_bits(join_master(high, residual), canonical(values))


def test_a_nan_is_visible_in_the_high_half_alone() -> None:
    values = floats(torch.tensor([0x7F800001, 0x7FFFFFFF, 0xFF800001, 0xFFFFFFFF, 0x7FC00000, 0xFFC12345]))
    high, residual = split_master(values)
    assert high.isnan().all()
    assert high.view(torch.int16).tolist() == [0x7FC0] * 6
    assert residual.tolist() == [0] * 6


def test_only_nans_have_a_nan_high_half() -> None:
    values = every_exponent()
    high, _ = split_master(values)
    assert torch.equal(high.isnan(), values.isnan())


@pytest.mark.parametrize(
    ("bits", "high", "residual"),
    [
        (0x3F800000, 0x3F80, 0),  # 1.0
        (0x3F808000, 0x3F81, -0x8000),  # a tie goes away from zero
        (0x3F807FFF, 0x3F80, 0x7FFF),  # the largest residual
        (0xBF808000, 0xBF81, -0x8000),  # negative: away from zero too
        (0x80000000, 0x8000, 0),  # -0.0
        (0x00000001, 0x0000, 1),  # the smallest denormal
        (0x80000001, 0x8000, 1),
        (0x7F7FFFFF, 0x7F80, -1),  # the largest value rounds to an infinite high half
        (0x7F800000, 0x7F80, 0),  # infinity
        (0xFF800000, 0xFF80, 0),
    ],
)
def test_golden_split(bits: int, high: int, residual: int) -> None:
    got_high, got_residual = split_master(floats(torch.tensor([bits])))
    assert got_high.view(torch.int16).item() & 0xFFFF == high
    assert got_residual.item() == residual


def test_high_is_the_nearest_bf16() -> None:
    values = random_patterns(100_000, 3)
    values = values[values.isfinite() & (values.abs() < 3.3e38)]
    high, _ = split_master(values)
    nearest = values.to(torch.bfloat16)
    assert torch.equal((high.double() - values.double()).abs(), (nearest.double() - values.double()).abs())


def test_split_and_join_write_into_given_tensors() -> None:
    values = random_patterns(3_000_000, 11).view(3, -1)
    high, residual = (
        torch.empty(3, 1_000_000, dtype=torch.int16),
        torch.empty(3, 1_000_000, dtype=torch.int16),
    )
    got_high, got_residual = split_master(values, high=high, residual=residual)
    assert got_high is high
    assert got_residual is residual
    out = torch.empty(3, 1_000_000)
    assert join_master(high, residual, out=out) is out
    assert_same_bits(out, canonical(values))


def test_split_leaves_the_master_as_it_was() -> None:
    values = random_patterns(1000, 5)
    before = values.clone()
    split_master(values)
    assert_same_bits(values, before)


def test_split_names_the_tensor_that_does_not_fit() -> None:
    with pytest.raises(ValueError, match=r"residual: wanted .*int16 and shape \(4,\).*int32"):
        split_master(torch.zeros(4), residual=torch.zeros(4, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"master: .*strided"):
        split_master(torch.zeros(8)[::2])
    with pytest.raises(ValueError, match=r"high: .*shape \(4,\).*shape \(5,\)"):
        split_master(torch.zeros(4), high=torch.zeros(5, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="out: "):
        join_master(
            torch.zeros(4, dtype=torch.bfloat16), torch.zeros(4, dtype=torch.int16), out=torch.zeros(3)
        )


def test_golden_layout_of_the_default_format() -> None:
    layout = RecordFormat()
    assert layout.dtype == "bfloat16"
    first, second, last = layout.optimizer_chunks((1 << 22) + 64)
    mib = 1 << 20
    assert (first.start, first.stop, first.offset_bytes, first.nbytes) == (0, 1 << 21, 0, 20 * mib)
    assert first.residual == slice(0, 4 * mib)
    assert first.exp_avg == slice(4 * mib, 12 * mib)
    assert first.exp_avg_sq == slice(12 * mib, 20 * mib)
    assert (second.start, second.offset_bytes, second.nbytes) == (1 << 21, 20 * mib, 20 * mib)
    assert (last.start, last.stop, last.offset_bytes, last.nbytes) == (
        1 << 22,
        (1 << 22) + 64,
        40 * mib,
        4096,
    )
    assert (last.residual, last.exp_avg, last.exp_avg_sq) == (slice(0, 128), slice(128, 384), slice(384, 640))
    assert layout.optimizer_nbytes((1 << 22) + 64) == 40 * mib + 4096
    assert layout.weights_nbytes((1 << 22) + 64) == 8 * mib + 4096
    assert layout.frozen_nbytes(4096) == 8192
    assert layout.frozen_nbytes(4096, torch.float32) == 16384


def test_golden_layout_of_the_float32_format() -> None:
    layout = RecordFormat("float32")
    (chunk,) = layout.optimizer_chunks(1 << 21)
    mib = 1 << 20
    assert chunk.residual is None
    assert (chunk.exp_avg, chunk.exp_avg_sq) == (slice(0, 8 * mib), slice(8 * mib, 16 * mib))
    assert chunk.nbytes == layout.optimizer_nbytes(1 << 21) == 16 * mib
    assert layout.weights_nbytes(1000) == 4096


def test_golden_layout_of_8bit_moments() -> None:
    layout = RecordFormat(moments="8bit")
    first, last = layout.optimizer_chunks((1 << 21) + 256)
    mib, kib = 1 << 20, 1 << 10
    assert first.residual == slice(0, 4 * mib)
    assert first.exp_avg == slice(4 * mib, 6 * mib)
    assert first.exp_avg_scales == slice(6 * mib, 6 * mib + 32 * kib)
    assert first.exp_avg_sq == slice(6 * mib + 32 * kib, 8 * mib + 32 * kib)
    assert first.exp_avg_sq_scales == slice(8 * mib + 32 * kib, 8 * mib + 64 * kib)
    assert first.nbytes == layout.chunk_nbytes == 8 * mib + 64 * kib
    assert (last.start, last.offset_bytes, last.nbytes) == (1 << 21, first.nbytes, 4096)
    # Two scales of two bytes each, and the next array from the next 64-byte boundary.
    assert last.residual == slice(0, 512)
    assert (last.exp_avg, last.exp_avg_scales) == (slice(512, 768), slice(768, 772))
    assert (last.exp_avg_sq, last.exp_avg_sq_scales) == (slice(832, 1088), slice(1088, 1092))
    assert layout.optimizer_nbytes((1 << 21) + 256) == first.nbytes + 4096
    assert layout.weights_nbytes(1 << 21) == RecordFormat().weights_nbytes(1 << 21)


def test_golden_layout_of_8bit_moments_beside_float32_weights() -> None:
    (chunk,) = RecordFormat("float32", moments="8bit").optimizer_chunks(1 << 21)
    mib, kib = 1 << 20, 1 << 10
    assert chunk.residual is None
    assert (chunk.exp_avg, chunk.exp_avg_scales) == (slice(0, 2 * mib), slice(2 * mib, 2 * mib + 32 * kib))
    assert chunk.nbytes == 4 * mib + 64 * kib


@pytest.mark.parametrize(
    ("record_format", "nbytes"),
    [
        (RecordFormat("bfloat16"), 4 << 20),
        (RecordFormat("float32"), 4 << 20),
        (RecordFormat("bfloat16", moments="8bit"), (4 << 20) + (32 << 10)),
        (RecordFormat("float32", moments="8bit"), (4 << 20) + (64 << 10)),
        (RecordFormat("bfloat16", 128), 4096),
        # Primes of pages: one that fits a store chunk, and one beyond the 1 GiB that it may have.
        (RecordFormat("float32", 512 * 1_021), 4096 * 1_021),
        (RecordFormat("float32", 512 * 262_147), 4096),
    ],
)
def test_a_store_chunk_is_the_part_of_an_optimizer_chunk_nearest_to_4_mib(
    record_format: RecordFormat, nbytes: int
) -> None:
    assert record_format.store_chunk_nbytes == nbytes


@given(
    dtype=st.sampled_from(["bfloat16", "float32"]),
    moments=st.sampled_from(["float32", "8bit"]),
    chunk_numel=st.integers(1, 1 << 16).map(lambda blocks: 128 * blocks),
)
@settings(max_examples=200, deadline=None)
def test_an_optimizer_chunk_is_a_whole_number_of_store_chunks(
    dtype: Any, moments: Any, chunk_numel: int
) -> None:
    layout = RecordFormat(dtype, chunk_numel, moments)
    assert layout.chunk_nbytes % layout.store_chunk_nbytes == 0
    assert layout.store_chunk_nbytes % 4096 == 0
    assert layout.store_chunk_nbytes <= 1 << 30


@given(
    dtype=st.sampled_from(["bfloat16", "float32"]),
    moments=st.sampled_from(["float32", "8bit"]),
    chunk_numel=st.integers(1, 200).map(lambda blocks: 128 * blocks),
    numel=st.integers(0, 60_000),
)
@settings(max_examples=200, deadline=None)
def test_chunks_tile_the_record(dtype: Any, moments: Any, chunk_numel: int, numel: int) -> None:
    layout = RecordFormat(dtype, chunk_numel, moments)
    element, offset = 0, 0
    for chunk in layout.optimizer_chunks(numel):
        assert (chunk.start, chunk.offset_bytes) == (element, offset)
        assert chunk.nbytes % 4096 == 0
        codes, scales = chunk.numel, 2 * -(-chunk.numel // 128)
        arrays = (
            [(chunk.exp_avg, 4 * chunk.numel), (chunk.exp_avg_sq, 4 * chunk.numel)]
            if moments == "float32"
            else [
                (chunk.exp_avg, codes),
                (chunk.exp_avg_scales, scales),
                (chunk.exp_avg_sq, codes),
                (chunk.exp_avg_sq_scales, scales),
            ]
        )
        if dtype == "bfloat16":
            arrays.insert(0, (chunk.residual, 2 * chunk.numel))
        end = 0
        for array, nbytes in arrays:
            assert array is not None
            assert array.start % 64 == 0
            assert end <= array.start < end + 64
            assert array.stop - array.start == nbytes
            end = array.stop
        assert end <= chunk.nbytes < end + 4096
        element, offset = chunk.stop, offset + chunk.nbytes
    assert element == numel
    assert offset == layout.optimizer_nbytes(numel)


def test_formats_that_cannot_be_are_refused() -> None:
    with pytest.raises(ConfigError, match="'bfloat16' or 'float32', got 'float16'"):
        RecordFormat("float16")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="'float32' or '8bit', got '4bit'"):
        RecordFormat(moments="4bit")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="positive multiple of 128, got 64"):
        RecordFormat(chunk_numel=64)


SPECS = (
    TensorSpec("a.weight", (13, 50), 0),
    TensorSpec("a.bias", (7,), 704),
    TensorSpec("scalar", (), 768),
    TensorSpec("b.weight", (3, 100), 832),
)
NUMEL = 1152


def records(layout: RecordFormat) -> tuple[torch.Tensor, torch.Tensor]:
    return (
        torch.zeros(layout.weights_nbytes(NUMEL), dtype=torch.uint8),
        torch.zeros(layout.optimizer_nbytes(NUMEL), dtype=torch.uint8),
    )


@pytest.mark.parametrize("moments", ["float32", "8bit"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("source_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("as_memoryview", [False, True])
def test_parameters_come_back_exactly_from_records(
    dtype: Any, source_dtype: torch.dtype, as_memoryview: bool, moments: Any
) -> None:
    # 256 elements a chunk: a.weight spans three chunks, and one chunk holds the end of b.weight.
    layout = RecordFormat(dtype, 256, moments)
    weights, optimizer = records(layout)
    weights_buffer = memoryview(weights.numpy()) if as_memoryview else weights
    optimizer_buffer = memoryview(optimizer.numpy()) if as_memoryview else optimizer
    generator = torch.Generator().manual_seed(1)
    sources = {spec: torch.randn(spec.shape, generator=generator).to(source_dtype) for spec in SPECS}
    for spec, source in sources.items():
        write_parameter(layout, spec, source, weights_buffer, optimizer_buffer, NUMEL)
    for spec, source in sources.items():
        got = read_parameter(layout, spec, weights_buffer, optimizer_buffer, NUMEL)
        assert got.shape == source.shape
        assert_same_bits(got.reshape(-1), source.float().reshape(-1))


@pytest.mark.parametrize("moments", ["float32", "8bit"])
def test_writing_a_parameter_leaves_padding_and_moments_zero(moments: Any) -> None:
    layout = RecordFormat("bfloat16", 256, moments)
    weights, optimizer = records(layout)
    for spec in SPECS:
        write_parameter(layout, spec, torch.full(spec.shape, 1.0000001), weights, optimizer, NUMEL)
    flat = view_elements(weights, torch.bfloat16, NUMEL)
    covered = torch.zeros(NUMEL, dtype=torch.bool)
    for spec in SPECS:
        covered[spec.offset : spec.end] = True
    assert torch.equal(flat != 0, covered)
    for chunk in layout.optimizer_chunks(NUMEL):
        views = view_optimizer_chunk(chunk, optimizer[chunk.offset_bytes :])
        assert views.residual is not None
        assert torch.equal(views.residual != 0, covered[chunk.start : chunk.stop])
        residual = chunk.residual or slice(0)
        own = optimizer[chunk.offset_bytes : chunk.offset_bytes + chunk.nbytes]
        assert not own[residual.stop :].any()


@pytest.mark.parametrize("as_memoryview", [False, True])
def test_views_of_8bit_moments_are_codes_and_scales_in_the_record_s_memory(as_memoryview: bool) -> None:
    (chunk,) = RecordFormat("bfloat16", 256, "8bit").optimizer_chunks(256)
    record = torch.zeros(chunk.nbytes, dtype=torch.uint8)
    views = view_optimizer_chunk(chunk, memoryview(record.numpy()) if as_memoryview else record)
    arrays = [view for view in views if view is not None]
    assert [view.dtype for view in arrays] == [
        torch.int16, torch.uint8, torch.bfloat16, torch.uint8, torch.bfloat16
    ]  # fmt: skip
    assert [view.numel() for view in arrays] == [256, 256, 2, 256, 2]
    for value, view in enumerate(arrays, start=1):
        view.view(torch.uint8).fill_(value)
    assert [record[at].item() for at in (0, 511, 512, 767, 768, 771, 772)] == [1, 1, 2, 2, 3, 3, 0]
    assert [record[at].item() for at in (831, 832, 1087, 1088, 1091, 1092)] == [0, 4, 4, 5, 5, 0]


def test_records_can_be_written_and_read_chunk_by_chunk() -> None:
    layout = RecordFormat("bfloat16", 128)
    weights, optimizer = records(layout)
    spec = SPECS[0]
    source = torch.randn(spec.shape, generator=torch.Generator().manual_seed(2))
    write_weights(layout, spec, source, weights)
    chunks = layout.optimizer_chunks(NUMEL)
    buffers = [torch.zeros(chunk.nbytes, dtype=torch.uint8) for chunk in chunks]
    for chunk, buffer in zip(chunks, buffers, strict=True):
        write_residual(chunk, spec, source, buffer)
    out = torch.empty(spec.shape)
    for chunk, buffer in zip(chunks, buffers, strict=True):
        read_masters(chunk, spec, view_elements(weights, torch.bfloat16, spec.end), buffer, out)
    assert_same_bits(out, source)
    write_parameter(layout, spec, source, weights, optimizer, NUMEL)
    assert torch.equal(torch.cat(buffers), optimizer)


def test_strided_sources_are_accepted() -> None:
    layout = RecordFormat("bfloat16", 256)
    weights, optimizer = records(layout)
    source = torch.randn(50, 13, generator=torch.Generator().manual_seed(3)).t()
    write_parameter(layout, SPECS[0], source, weights, optimizer, NUMEL)
    assert torch.equal(read_parameter(layout, SPECS[0], weights, optimizer, NUMEL), source)


def test_one_strided_element_is_accepted() -> None:
    column = torch.randn(5, 4, generator=torch.Generator().manual_seed(4))[:, 1]
    value = column[2:3]
    assert value.stride() == (4,)
    assert_same_bits(join_master(*split_master(value)), value)
    layout = RecordFormat("bfloat16", 256)
    weights, optimizer = records(layout)
    spec = TensorSpec("one", (1,), 64)
    write_parameter(layout, spec, value, weights, optimizer, NUMEL)
    assert torch.equal(read_parameter(layout, spec, weights, optimizer, NUMEL), value)


def test_frozen_tensors_are_rounded_as_torch_rounds() -> None:
    layout = RecordFormat("bfloat16")
    frozen = torch.zeros(layout.frozen_nbytes(NUMEL), dtype=torch.uint8)
    source = every_exponent()[:650].view(13, 50)
    write_frozen(SPECS[0], source, frozen, torch.bfloat16)
    got = view_elements(frozen, torch.bfloat16, NUMEL)[:650].view(13, 50)
    assert torch.equal(got.view(torch.int16), source.to(torch.bfloat16).view(torch.int16))


def test_a_source_or_buffer_that_does_not_fit_is_named() -> None:
    layout = RecordFormat("bfloat16", 256)
    weights, optimizer = records(layout)
    with pytest.raises(ValueError, match=r"a\.bias: wanted a CPU tensor of shape \(7,\), got .*\(8,\)"):
        write_weights(layout, SPECS[1], torch.zeros(8), weights)
    with pytest.raises(ValueError, match=r"a\.bias: a parameter must be float32.*int64"):
        write_weights(layout, SPECS[1], torch.zeros(7, dtype=torch.int64), weights)
    with pytest.raises(ValueError, match="record: the buffer holds 100 bytes, 1422 are needed"):
        write_weights(layout, SPECS[1], torch.zeros(7), weights[:100])
    with pytest.raises(ValueError, match="optimizer chunk: the buffer holds 100 bytes"):
        write_parameter(layout, SPECS[0], torch.zeros(13, 50), weights, optimizer[:100], NUMEL)
    with pytest.raises(ValueError, match="writable, contiguous 1-D memoryview"):
        view_elements(memoryview(bytes(64)), torch.bfloat16, 8)
    with pytest.raises(ValueError, match=r"contiguous 1-D uint8 tensor, got torch\.float32"):
        view_elements(torch.zeros(64), torch.bfloat16, 8)
