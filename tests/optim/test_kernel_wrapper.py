"""The typed door to the kernel: the same numbers, tensors that do not fit, a missing extension."""

from __future__ import annotations

import pytest
import torch
from kernel_arrays import SETTINGS, random_arrays, update

from offload.errors import StateError
from offload.optim import adamw_update, kernel


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("bfloat16_gradient", [False, True])
def test_the_typed_wrapper_runs_the_same_kernel(split: bool, bfloat16_gradient: bool) -> None:
    arrays = random_arrays(1_003, 18, bfloat16_gradient=bfloat16_gradient)
    arrays = arrays.split() if split else arrays
    got = arrays.copy()
    adamw_update(**vars(got), settings=SETTINGS, step=3, grad_scale=0.5, num_threads=2)
    assert got.bits() == update(arrays, step=3, grad_scale=0.5).bits()


@pytest.mark.parametrize("split", [False, True])
def test_the_torch_reference_agrees_to_rounding(split: bool) -> None:
    arrays = random_arrays(10_000, 19)
    arrays = arrays.split() if split else arrays
    got = arrays.copy()
    adamw_update(**vars(got), settings=SETTINGS, step=3, grad_scale=0.5, backend="reference")
    want = update(arrays, step=3, grad_scale=0.5)
    torch.testing.assert_close(got.master(), want.master(), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(got.exp_avg, want.exp_avg, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(got.exp_avg_sq, want.exp_avg_sq, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"gradient": torch.zeros(4, dtype=torch.float64)},
            "gradient must be float32 or bfloat16 or float16, got torch.float64",
        ),
        ({"gradient": torch.zeros(5)}, "gradient has 5 elements, exp_avg has 4"),
        ({"weights": torch.zeros(4, dtype=torch.bfloat16)}, "weights must be float32, got torch.bfloat16"),
        ({"exp_avg_sq": torch.zeros(8)[::2]}, "exp_avg_sq must be a contiguous 1-D tensor on the CPU"),
        ({"exp_avg": torch.zeros(4, device="meta")}, "exp_avg must be .* on meta"),
        (
            {"residual": torch.zeros(4, dtype=torch.int16)},
            "weights must be bfloat16 or int16, got torch.float32",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(changes: dict[str, torch.Tensor], message: str) -> None:
    zeros = torch.zeros(4)
    tensors = {
        "gradient": zeros, "weights": zeros, "residual": None, "exp_avg": zeros, "exp_avg_sq": zeros
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        adamw_update(**{**tensors, **changes}, settings=SETTINGS, step=1)  # type: ignore[arg-type]


def test_without_the_extension_the_error_says_how_to_build_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "_LOAD_ERROR", ImportError("No module named 'offload._adam'"))
    arrays = random_arrays(8, 20)
    with pytest.raises(StateError, match=r"No module named .*pip install \..*backend='reference'"):
        adamw_update(**vars(arrays), settings=SETTINGS, step=1)
    adamw_update(**vars(arrays), settings=SETTINGS, step=1, backend="reference")
    assert "not available" in kernel.describe_kernel()
