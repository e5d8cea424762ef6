"""Gradients in fp16: widened exactly, by every instruction set."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from kernel_arrays import SETTINGS, Arrays, random_arrays, update

from offload import _adam
from offload.optim import adamw_update, squared_norm

ISAS = _adam.supported_isas()


def every_float16() -> torch.Tensor:
    """All bit patterns: denormals, infinities and NaNs among them."""
    return torch.from_numpy(np.arange(1 << 16, dtype=np.uint16).view(np.float16))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("split", [False, True])
def test_every_fp16_gradient_is_widened_exactly(isa: str, split: bool) -> None:
    arrays = random_arrays(1 << 16, 31)
    arrays = arrays.split() if split else arrays
    gradient = every_float16()
    got = update(replace(arrays, gradient=gradient), isa=isa)
    want = update(replace(arrays, gradient=gradient.float()), isa="scalar")
    assert got.bits() == want.bits()


@pytest.mark.parametrize("isa", ISAS)
def test_the_norm_of_fp16_gradients_is_that_of_their_values(isa: str) -> None:
    finite = every_float16()[:0x7C00]  # from zero to the largest
    array = finite.numpy()
    got = _adam.squared_norm(array, gradient_dtype="float16", isa=isa)
    assert got == _adam.squared_norm(finite.float().numpy(), isa="scalar")
    assert squared_norm(finite) == got
    assert not squared_norm(every_float16()[:0x7C01])[1]  # with infinity


def test_a_tail_of_fp16_gradients_is_read_to_its_end_and_no_further() -> None:
    whole = random_arrays(128, 32)
    whole = replace(whole, gradient=whole.gradient.half())
    for numel in (1, 7, 15, 17, 33):
        part = Arrays(*(None if t is None else t[:numel] for t in vars(whole).values()))  # type: ignore[arg-type]
        assert torch.equal(update(part).weights, update(whole).weights[:numel])


def test_the_wrapper_and_the_reference_take_fp16_gradients() -> None:
    arrays = random_arrays(1_003, 33)
    arrays = replace(arrays, gradient=arrays.gradient.half())
    got, reference = arrays.copy(), arrays.copy()
    adamw_update(**vars(got), settings=SETTINGS, step=3)
    adamw_update(**vars(reference), settings=SETTINGS, step=3, backend="reference")
    assert got.bits() == update(arrays, step=3).bits()
    torch.testing.assert_close(got.weights, reference.weights, rtol=1e-6, atol=1e-8)
