"""The sum of squares of a gradient: one value, whatever computes it."""

from __future__ import annotations

import math

import pytest
import torch

from offload import _adam
from offload.optim import squared_norm

ISAS = _adam.supported_isas()
BLOCK_NUMEL = 1 << 16


def gradient(numel: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    values = torch.randn(numel, generator=torch.Generator().manual_seed(numel))
    return (values * torch.logspace(-8, 8, numel) if numel else values).to(dtype)


@pytest.mark.parametrize("numel", [0, 1, 15, 16, 17, 1000, BLOCK_NUMEL, 3 * BLOCK_NUMEL + 77])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_instruction_sets_and_threads_agree_to_the_last_bit(numel: int, dtype: torch.dtype) -> None:
    values = gradient(numel, dtype)
    array = (values.view(torch.int16) if dtype == torch.bfloat16 else values).numpy()
    tag = "bfloat16" if dtype == torch.bfloat16 else "float32"
    sums = {
        _adam.squared_norm(array, gradient_dtype=tag, num_threads=threads, isa=isa)  # type: ignore[arg-type]
        for threads in (1, 2, 3)
        for isa in ISAS
    }
    assert len(sums) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_the_sum_of_squares(dtype: torch.dtype) -> None:
    values = torch.randn(200_003, generator=torch.Generator().manual_seed(1)).to(dtype)
    total, finite = squared_norm(values)
    assert finite
    assert total == pytest.approx(math.fsum((values.double() ** 2).tolist()), rel=1e-13)
    assert squared_norm(values, backend="reference") == (pytest.approx(total, rel=1e-12), True)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("where", [0, 16_000, 70_002])
def test_one_bad_element_is_seen(bad: float, where: int) -> None:
    values = gradient(70_003)
    values[where] = bad
    assert not squared_norm(values)[1]
    assert not squared_norm(values.to(torch.bfloat16))[1]
    assert not squared_norm(values, backend="reference")[1]


def test_the_largest_values_do_not_overflow() -> None:
    largest = torch.finfo(torch.float32).max
    total, finite = squared_norm(torch.full((100_000,), largest))
    assert finite
    assert total == pytest.approx(1e5 * largest**2, rel=1e-12)


def test_denormals_count_also_when_the_caller_flushes_them() -> None:
    values = torch.full((1000,), 1e-45)
    want = squared_norm(values)
    torch.set_flush_denormal(True)
    try:
        got = squared_norm(values)
    finally:
        torch.set_flush_denormal(False)
    assert got == want
    assert want[0] > 0


def test_bad_arguments_are_named() -> None:
    with pytest.raises(
        ValueError, match=r"gradient must be float32 or bfloat16 or float16, got torch\.float64"
    ):
        squared_norm(torch.zeros(3, dtype=torch.float64))
    with pytest.raises(ValueError, match="squared_norm: gradient holds 3 bytes, not a multiple of 4"):
        _adam.squared_norm(bytearray(3))
    with pytest.raises(ValueError, match="squared_norm: num_threads"):
        _adam.squared_norm(bytearray(4), num_threads=-1)
