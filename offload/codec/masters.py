"""Exact fp32 master weights in 4 bytes: a bf16 high half and a 16-bit residual.

`bits = (high << 16) + sign_extended(residual)` with `high = (bits + 0x8000) >> 16`: `high` is the master
rounded to bf16, half away from zero, and the int16 `residual` is what the rounding lost. Every finite
value, infinity, denormal and signed zero recombines bit for bit. A NaN becomes 0x7FC00000, whose high
half is a NaN too. (A master above the largest bf16 has an infinite high half, as any rounding to bf16
would give it, and recombines all the same.)

Pure functions of CPU tensors, callable from any thread.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..sizes import MIB

__all__ = [
    "CANONICAL_NAN_BITS",
    "check_tensor",
    "copy_high",
    "copy_residual",
    "join_master",
    "split_master",
]

# The one NaN that is stored: quiet, positive, and a NaN in its upper half alone.
CANONICAL_NAN_BITS = 0x7FC00000

# 1 Mi elements at a time: an int32 copy, a sum and a mask are 9 MiB of temporaries.
_STEP_NUMEL = MIB


def split_master(
    master: Tensor, *, high: Tensor | None = None, residual: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Split fp32 values into bf16 high halves and int16 residuals.

    Args:
        master: fp32, any shape, contiguous.
        high: where to write the high halves, bf16 or its bits as int16; a new tensor when None.
        residual: where to write the residuals, int16; a new tensor when None.

    Returns:
        (high, residual), contiguous and shaped as `master`.

    Raises:
        ValueError: a tensor has the wrong dtype or shape, or is not contiguous.
    """
    check_tensor(master, "master", (torch.float32,), master.shape)
    if high is None:
        high = torch.empty(master.shape, dtype=torch.bfloat16)
    if residual is None:
        residual = torch.empty(master.shape, dtype=torch.int16)
    check_tensor(high, "high", (torch.bfloat16, torch.int16), master.shape)
    check_tensor(residual, "residual", (torch.int16,), master.shape)
    flat, flat_high, flat_residual = master.view(-1), high.view(torch.int16).view(-1), residual.view(-1)
    for part in _steps(flat.numel()):
        bits = _canonical_bits(flat[part])
        flat_residual[part] = _residual(bits)
        flat_high[part] = _high(bits)
    return high, residual


def join_master(high: Tensor, residual: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Recombine bf16 high halves and int16 residuals into the fp32 values they were split from.

    Args:
        high: bf16, or its bits as int16; contiguous.
        residual: int16, of the same shape; contiguous.
        out: where to write, fp32 of the same shape; a new tensor when None.

    Raises:
        ValueError: a tensor has the wrong dtype or shape, or is not contiguous.
    """
    check_tensor(high, "high", (torch.bfloat16, torch.int16), high.shape)
    check_tensor(residual, "residual", (torch.int16,), high.shape)
    if out is None:
        out = torch.empty(high.shape, dtype=torch.float32)
    check_tensor(out, "out", (torch.float32,), high.shape)
    bits, flat_high = out.view(torch.int32).view(-1), high.view(torch.int16).view(-1)
    flat_residual = residual.view(-1)
    for part in _steps(bits.numel()):
        bits[part].copy_(flat_high[part]).bitwise_left_shift_(16).add_(flat_residual[part])
    return out


def copy_high(values: Tensor, high: Tensor) -> None:
    """Write the high halves of 1-D fp32, bf16 or fp16 `values`, any stride, into int16 `high`."""
    for part in _steps(values.numel()):
        high[part] = _high(_canonical_bits(values[part]))


def copy_residual(values: Tensor, residual: Tensor) -> None:
    """Write the residuals of 1-D fp32, bf16 or fp16 `values`, any stride, into int16 `residual`."""
    for part in _steps(values.numel()):
        residual[part] = _residual(_canonical_bits(values[part]))


def check_tensor(tensor: Tensor, name: str, dtypes: tuple[torch.dtype, ...], shape: torch.Size) -> None:
    """Raise ValueError unless `tensor` is contiguous, of one of `dtypes` and of `shape`."""
    if tensor.dtype not in dtypes or tensor.shape != shape or not tensor.is_contiguous():
        raise ValueError(
            f"{name}: wanted a contiguous tensor of {dtypes[0]} and shape {tuple(shape)}, got "
            f"{'a contiguous' if tensor.is_contiguous() else 'a strided'} tensor of {tensor.dtype} "
            f"and shape {tuple(tensor.shape)}"
        )


def _steps(numel: int) -> Iterator[slice]:
    for start in range(0, numel, _STEP_NUMEL):
        yield slice(start, min(start + _STEP_NUMEL, numel))


def _canonical_bits(values: Tensor) -> Tensor:
    """Return a new int32 tensor: the fp32 bits of `values`, every NaN the canonical one."""
    # Not Tensor.to: it keeps strides, and one element with a stride other than 1 has no int16 view.
    exact = torch.empty(values.shape, dtype=torch.float32).copy_(values)
    return exact.view(torch.int32).masked_fill_(exact.isnan(), CANONICAL_NAN_BITS)


# Little-endian: of the two halves of an int32 the lower comes first. Read as signed, it is the residual.
def _residual(bits: Tensor) -> Tensor:
    return bits.view(torch.int16)[0::2]


def _high(bits: Tensor) -> Tensor:
    """Return the rounded upper halves of `bits`, which is overwritten."""
    return bits.add_(0x8000).view(torch.int16)[1::2]
