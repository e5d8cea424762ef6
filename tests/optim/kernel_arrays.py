"""What the kernel's tests update: arrays as in training, or of arbitrary bits."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from offload import _adam
from offload.codec import join_master, split_master
from offload.optim import ParameterSettings

GRADIENT_TAGS = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
SETTINGS = ParameterSettings(lr=3e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.1)


@dataclass
class Arrays:
    """Everything one update reads and writes; `weights` fp32, or bf16 with `residual`."""

    gradient: torch.Tensor
    weights: torch.Tensor
    residual: torch.Tensor | None
    exp_avg: torch.Tensor
    exp_avg_sq: torch.Tensor

    def copy(self) -> Arrays:
        copied = {name: None if t is None else t.clone() for name, t in vars(self).items()}
        return Arrays(**copied)  # type: ignore[arg-type]

    def split(self) -> Arrays:
        """The same arrays with the weights as high halves and residuals."""
        high, residual = split_master(self.weights)
        return replace(self.copy(), weights=high, residual=residual)

    def master(self) -> torch.Tensor:
        return self.weights if self.residual is None else join_master(self.weights, self.residual)

    def bits(self) -> dict[str, bytes]:
        """The bytes of everything an update may change."""
        exact = {"master": self.master(), "exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}
        return {name: tensor.numpy().tobytes() for name, tensor in exact.items()}


def random_arrays(numel: int, seed: int, *, bfloat16_gradient: bool = False) -> Arrays:
    """Arrays as in the midst of training."""
    generator = torch.Generator().manual_seed(seed)
    gradient, weights, exp_avg = (torch.randn(numel, generator=generator) for _ in range(3))
    exp_avg_sq = torch.rand(numel, generator=generator) * 1e-2
    if bfloat16_gradient:
        gradient = gradient.to(torch.bfloat16)
    return Arrays(gradient, weights, None, exp_avg * 0.1, exp_avg_sq)


def pattern_arrays(numel: int, seed: int, *, bfloat16_gradient: bool) -> Arrays:
    """Arrays of arbitrary bits: denormals, infinities, NaNs, huge and negative second moments."""
    rng = np.random.default_rng(seed)

    def patterns() -> torch.Tensor:
        return torch.from_numpy(rng.integers(-(2**31), 2**31, numel, dtype=np.int32)).view(torch.float32)

    gradient, weights, exp_avg, exp_avg_sq = (patterns() for _ in range(4))
    if bfloat16_gradient:
        gradient = gradient.view(torch.int16)[:numel].clone().view(torch.bfloat16)
    return Arrays(gradient, weights, None, exp_avg, exp_avg_sq)


def update(
    arrays: Arrays, *, isa: str = "auto", num_threads: int = 1, step: int = 1, **changes: float
) -> Arrays:
    """Run `_adam.adamw` on a copy and return it."""
    result = arrays.copy()
    values = settings_values()
    _adam.adamw(
        export(result.gradient),
        export(result.weights),
        None if result.residual is None else export(result.residual),
        export(result.exp_avg),
        export(result.exp_avg_sq),
        step=step,
        gradient_dtype=GRADIENT_TAGS[result.gradient.dtype],
        num_threads=num_threads,
        isa=isa,
        **{**values, **changes},
    )
    return result


def settings_values() -> dict[str, float]:
    """The settings as `_adam` takes them."""
    return {name: getattr(SETTINGS, name) for name in ("lr", "beta1", "beta2", "eps", "weight_decay")}


def export(tensor: torch.Tensor) -> npt.NDArray[np.generic]:
    array = tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor
    return array.numpy()  # type: ignore[no-any-return]
