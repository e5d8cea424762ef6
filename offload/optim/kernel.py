"""The typed door to the optimizer kernels: tensors in, the extension or the torch reference behind.

Owns the choice of backend and the checks that need torch (dtype, device, strides); sizes and settings
are checked by the extension. Nothing is kept from one call to the next; any thread may call, and the
GIL is released while the kernel runs. The reference is used when it is asked for, never by itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from ..errors import StateError
from .groups import ParameterSettings
from .reference import adamw_reference, squared_norm_reference

if TYPE_CHECKING:
    from typing_extensions import Buffer

_LOAD_ERROR: ImportError | None = None
try:
    from .. import _adam
except ImportError as error:
    _LOAD_ERROR = error

__all__ = ["Backend", "adamw_update", "describe_kernel", "squared_norm"]

Backend = Literal["kernel", "reference"]


def adamw_update(
    gradient: Tensor,
    weights: Tensor,
    residual: Tensor | None,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    settings: ParameterSettings,
    step: int,
    grad_scale: float = 1.0,
    num_threads: int | None = None,
    backend: Backend = "kernel",
) -> None:
    """Apply one AdamW step to n elements, in place.

    All tensors are 1-D, contiguous, on the CPU, of n elements, and disjoint. They are used only until
    the call returns. Raw buffers go to `torch.frombuffer` first, or to `offload._adam` directly.

    Args:
        gradient: fp32 or bf16; only read.
        weights: fp32 masters; or with a residual their bf16 high halves (see `offload.codec`).
        residual: int16, or None for fp32 weights.
        exp_avg: fp32.
        exp_avg_sq: fp32.
        settings: of every element of this call.
        step: 1 for the first update.
        grad_scale: the gradient is multiplied with it first (unscale and clip factor).
        num_threads: torch's number when None. The result does not depend on it.
        backend: `kernel` is exact and fast; `reference` needs no extension and is neither.

    Raises:
        ValueError: a tensor has the wrong dtype, size, device or strides, or a setting is out of range.
        StateError: the extension is not there and `backend` is `kernel`.
    """
    float_types = (torch.float32, torch.bfloat16)
    weights_types = (torch.float32,) if residual is None else (torch.bfloat16, torch.int16)
    numel = exp_avg.numel()
    _check(exp_avg, "exp_avg", (torch.float32,), numel)
    _check(exp_avg_sq, "exp_avg_sq", (torch.float32,), numel)
    _check(gradient, "gradient", float_types, numel)
    _check(weights, "weights", weights_types, numel)
    if residual is not None:
        _check(residual, "residual", (torch.int16,), numel)
    if backend == "reference":
        adamw_reference(
            gradient, weights, residual, exp_avg, exp_avg_sq,
            settings=settings, step=step, grad_scale=grad_scale,
        )  # fmt: skip
        return
    _require_kernel()
    _adam.adamw(
        _export(gradient),
        _export(weights),
        None if residual is None else _export(residual),
        _export(exp_avg),
        _export(exp_avg_sq),
        lr=settings.lr,
        beta1=settings.beta1,
        beta2=settings.beta2,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        step=step,
        grad_scale=grad_scale,
        gradient_dtype=_dtype_tag(gradient),
        num_threads=num_threads or torch.get_num_threads(),
    )


def squared_norm(
    gradient: Tensor, *, num_threads: int | None = None, backend: Backend = "kernel"
) -> tuple[float, bool]:
    """Return the sum of squares of an fp32 or bf16 gradient, in double, and whether all are finite.

    The kernel's order of addition is fixed: the result depends neither on the threads nor on the
    processor.

    Raises:
        ValueError: the tensor has the wrong dtype, device or strides.
        StateError: the extension is not there and `backend` is `kernel`.
    """
    _check(gradient, "gradient", (torch.float32, torch.bfloat16), gradient.numel())
    if backend == "reference":
        return squared_norm_reference(gradient)
    _require_kernel()
    return _adam.squared_norm(
        _export(gradient),
        gradient_dtype=_dtype_tag(gradient),
        num_threads=num_threads or torch.get_num_threads(),
    )


def describe_kernel() -> str:
    """Return one line for people: the active instruction set, or why there is no kernel."""
    if _LOAD_ERROR is not None:
        return f"AdamW kernel: not available ({_LOAD_ERROR})"
    return f"AdamW kernel: {_adam.active_isa()} (of {', '.join(_adam.supported_isas())})"


def _require_kernel() -> None:
    if _LOAD_ERROR is not None:
        raise StateError(
            f"the optimizer kernels (offload._adam) could not be loaded: {_LOAD_ERROR}; build them with "
            "'pip install .' (needs a C++17 compiler), or ask for the slow backend='reference'"
        ) from _LOAD_ERROR


def _check(tensor: Tensor, name: str, dtypes: tuple[torch.dtype, ...], numel: int) -> None:
    wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
    if tensor.dtype not in dtypes:
        raise ValueError(f"adamw: {name} must be {wanted}, got {tensor.dtype}")
    if tensor.device.type != "cpu" or tensor.dim() != 1 or not tensor.is_contiguous():
        raise ValueError(
            f"adamw: {name} must be a contiguous 1-D tensor on the CPU, got shape {tuple(tensor.shape)}, "
            f"strides {tensor.stride()} on {tensor.device}"
        )
    if tensor.numel() != numel:
        raise ValueError(f"adamw: {name} has {tensor.numel()} elements, exp_avg has {numel}")


def _export(tensor: Tensor) -> Buffer:
    """Return the tensor's memory under the buffer protocol; numpy has no bf16, so as int16."""
    bits = tensor.detach()
    return (bits.view(torch.int16) if bits.dtype == torch.bfloat16 else bits).numpy().data


def _dtype_tag(gradient: Tensor) -> Literal["float32", "bfloat16"]:
    return "bfloat16" if gradient.dtype == torch.bfloat16 else "float32"
