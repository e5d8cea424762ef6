"""The typed door to the optimizer kernels: tensors in, the extension or the torch reference behind.

Owns the choice of backend and the checks that need torch (dtype, device, strides); sizes and settings
are checked by the extension. Nothing is kept from one call to the next; any thread may call, and the
GIL is released while the kernel runs. The reference is used when it is asked for, never by itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypedDict

import torch
from torch import Tensor

from ..errors import StateError
from ..specs import SCALE_NUMEL
from .groups import ParameterSettings
from .reference import adamw_reference, squared_norm_reference

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from .._adam import GroupSettings, TensorRow

_LOAD_ERROR: ImportError | None = None
try:
    from .. import _adam
except ImportError as error:
    _LOAD_ERROR = error

__all__ = [
    "SCALE_NUMEL",
    "Backend",
    "Moment8bit",
    "adamw_update",
    "adamw_update_8bit",
    "adamw_update_rows",
    "describe_kernel",
    "squared_norm",
]

Backend = Literal["kernel", "reference"]

_DTypeTag = Literal["float32", "bfloat16", "float16"]

_GRADIENT_DTYPES: dict[torch.dtype, _DTypeTag] = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}


@dataclass(frozen=True, slots=True)
class Moment8bit:
    """One moment in eight bits, for n elements; the memory is the caller's.

    Attributes:
        which: `exp_avg` has signed codes, `exp_avg_sq` unsigned ones.
        codes: uint8, n.
        scales: bf16, ceil(n / 128): one for each `SCALE_NUMEL` elements; [Note: 8-bit moments] in
            offload/_adam.pyi.
    """

    which: Literal["exp_avg", "exp_avg_sq"]
    codes: Tensor
    scales: Tensor

    @classmethod
    def zeros(cls, which: Literal["exp_avg", "exp_avg_sq"], numel: int) -> Moment8bit:
        """Return moments of zero, in memory of their own: every byte is zero."""
        num_scales = -(-numel // SCALE_NUMEL)
        codes = torch.zeros(numel, dtype=torch.uint8)
        return cls(which, codes, torch.zeros(num_scales, dtype=torch.bfloat16))

    @classmethod
    def of(cls, which: Literal["exp_avg", "exp_avg_sq"], values: Tensor) -> Moment8bit:
        """Return fp32 values rounded to the nearest codes, in memory of their own.

        Raises:
            ValueError: not a contiguous 1-D fp32 tensor on the CPU.
            StateError: the extension is not there.
        """
        _check(values, which, (torch.float32,), values.numel())
        _require_kernel()
        moment = cls.zeros(which, values.numel())
        _adam.encode_8bit(which, _export(values), *moment.exported())
        return moment

    def values(self) -> Tensor:
        """Return the fp32 values that the codes stand for, exactly, in memory of their own.

        Raises:
            ValueError: the tensors do not fit.
            StateError: the extension is not there.
        """
        self.check(self.codes.numel())
        _require_kernel()
        values = torch.empty(self.codes.numel())
        _adam.decode_8bit(self.which, *self.exported(), _export(values))
        return values

    def part(self, where: slice) -> Moment8bit:
        """Return the elements [start, stop) as views of this memory.

        Raises:
            ValueError: `start` is not a multiple of 128: the part would share its first scale.
        """
        start, stop, step = where.indices(self.codes.numel())
        if start % SCALE_NUMEL or step != 1:
            raise ValueError(f"{self.which}: a part must begin at a multiple of {SCALE_NUMEL}, got {where}")
        scales = self.scales[start // SCALE_NUMEL : -(-stop // SCALE_NUMEL)]
        return Moment8bit(self.which, self.codes[start:stop], scales)

    def check(self, numel: int) -> None:
        """Raise ValueError unless these are `numel` elements that the kernel can take."""
        _check(self.codes, f"{self.which} codes", (torch.uint8,), numel)
        num_scales = -(-numel // SCALE_NUMEL)
        _check(self.scales, f"{self.which} scales", (torch.bfloat16,), num_scales, "the codes need")

    def exported(self) -> tuple[Buffer, Buffer]:
        """Return codes and scales under the buffer protocol."""
        return _export(self.codes), _export(self.scales)


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
        gradient: fp32, bf16 or fp16; only read.
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
    numel = exp_avg.numel()
    _check(exp_avg, "exp_avg", (torch.float32,), numel)
    _check(exp_avg_sq, "exp_avg_sq", (torch.float32,), numel)
    _check_weights(gradient, weights, residual, numel)
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
        step=step,
        grad_scale=grad_scale,
        **_common(gradient, settings, num_threads),
    )


def adamw_update_8bit(
    gradient: Tensor,
    weights: Tensor,
    residual: Tensor | None,
    exp_avg: Moment8bit,
    exp_avg_sq: Moment8bit,
    *,
    settings: ParameterSettings,
    step: int,
    grad_scale: float = 1.0,
    seed: int = 0,
    first_element: int = 0,
    num_threads: int | None = None,
) -> None:
    """Apply one AdamW step with 8-bit moments to n elements, in place; else as `adamw_update`.

    New moments are rounded up or down at random, right on average; the same arguments give the same
    bits, on every processor and with any number of threads. One call equals several on parts that begin
    at multiples of 128. There is no torch reference of it.

    Args:
        gradient: as for `adamw_update`.
        weights: as for `adamw_update`.
        residual: as for `adamw_update`.
        exp_avg: the first moment; n is taken from it.
        exp_avg_sq: the second moment.
        settings: of every element of this call.
        step: 1 for the first update.
        grad_scale: the gradient is multiplied with it first.
        seed: of the random numbers, with `step`; best another one for each unit.
        first_element: the number of the first element, a multiple of 128, when the call is one of several.
        num_threads: torch's number when None.

    Raises:
        ValueError: as `adamw_update`, or the moments are not those of their places.
        StateError: the extension is not there.
    """
    if (exp_avg.which, exp_avg_sq.which) != ("exp_avg", "exp_avg_sq"):
        raise ValueError(
            f"adamw: the moments must be exp_avg and exp_avg_sq, got {exp_avg.which} and {exp_avg_sq.which}"
        )
    numel = exp_avg.codes.numel()
    exp_avg.check(numel)
    exp_avg_sq.check(numel)
    _check_weights(gradient, weights, residual, numel)
    _require_kernel()
    _adam.adamw_8bit(
        _export(gradient),
        _export(weights),
        None if residual is None else _export(residual),
        exp_avg.exported(),
        exp_avg_sq.exported(),
        step=step,
        grad_scale=grad_scale,
        seed=seed,
        first_element=first_element,
        **_common(gradient, settings, num_threads),
    )


def adamw_update_rows(
    groups: list[tuple[list[TensorRow], GroupSettings]], *, num_threads: int | None = None
) -> None:
    """Apply one AdamW step to every tensor of every group, in place; see `adamw_tensors` in `_adam.pyi`.

    Raises:
        ValueError: a tensor or a setting does not fit; nothing has been changed.
        StateError: the extension is not there.
    """
    _require_kernel()
    _adam.adamw_tensors(groups, num_threads=num_threads or torch.get_num_threads())


def squared_norm(
    gradient: Tensor, *, num_threads: int | None = None, backend: Backend = "kernel"
) -> tuple[float, bool]:
    """Return the sum of squares of an fp32, bf16 or fp16 gradient, in double, and whether all are finite.

    The kernel's order of addition is fixed: the result depends neither on the threads nor on the
    processor.

    Raises:
        ValueError: the tensor has the wrong dtype, device or strides.
        StateError: the extension is not there and `backend` is `kernel`.
    """
    _check(gradient, "gradient", tuple(_GRADIENT_DTYPES), gradient.numel())
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


class _Common(TypedDict):
    """What both updates of the extension take, but for the step's own numbers."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    gradient_dtype: _DTypeTag
    num_threads: int


def _common(gradient: Tensor, settings: ParameterSettings, num_threads: int | None) -> _Common:
    return {
        "lr": settings.lr,
        "beta1": settings.beta1,
        "beta2": settings.beta2,
        "eps": settings.eps,
        "weight_decay": settings.weight_decay,
        "gradient_dtype": _dtype_tag(gradient),
        "num_threads": num_threads or torch.get_num_threads(),
    }


def _check_weights(gradient: Tensor, weights: Tensor, residual: Tensor | None, numel: int) -> None:
    weights_types = (torch.float32,) if residual is None else (torch.bfloat16, torch.int16)
    _check(gradient, "gradient", tuple(_GRADIENT_DTYPES), numel)
    _check(weights, "weights", weights_types, numel)
    if residual is not None:
        _check(residual, "residual", (torch.int16,), numel)


def _check(
    tensor: Tensor, name: str, dtypes: tuple[torch.dtype, ...], numel: int, whose: str = "exp_avg has"
) -> None:
    if tensor.dtype not in dtypes:
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(f"adamw: {name} must be {wanted}, got {tensor.dtype}")
    if tensor.device.type != "cpu" or tensor.dim() != 1 or not tensor.is_contiguous():
        raise ValueError(
            f"adamw: {name} must be a contiguous 1-D tensor on the CPU, got shape {tuple(tensor.shape)}, "
            f"strides {tensor.stride()} on {tensor.device}"
        )
    if tensor.numel() != numel:
        raise ValueError(f"adamw: {name} has {tensor.numel()} elements, {whose} {numel}")


def _export(tensor: Tensor) -> Buffer:
    """Return the tensor's memory under the buffer protocol; numpy has no bf16, so as int16."""
    bits = tensor.detach()
    return (bits.view(torch.int16) if bits.dtype == torch.bfloat16 else bits).numpy().data


def _dtype_tag(gradient: Tensor) -> _DTypeTag:
    return _GRADIENT_DTYPES[gradient.dtype]
