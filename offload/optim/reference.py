"""The AdamW update in plain torch operations: what the kernel is tested against, and a way to run
without the extension.

The same formula as csrc/adam/adamw.h, in place on the same arrays, but without fused multiply-adds:
it agrees with the kernel to rounding, not bit for bit. A run must not mix the two.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..codec import join_master, split_master
from .groups import ParameterSettings

__all__ = ["adamw_reference", "squared_norm_reference"]

# 1 Mi elements at a time keep the temporaries near 16 MiB.
_STEP_NUMEL = 1 << 20


def adamw_reference(
    gradient: Tensor,
    weights: Tensor,
    residual: Tensor | None,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    settings: ParameterSettings,
    step: int,
    grad_scale: float = 1.0,
) -> None:
    """Apply one AdamW step in place; arguments as `offload.optim.kernel.adamw_update`."""
    for start in range(0, exp_avg.numel(), _STEP_NUMEL):
        part = slice(start, start + _STEP_NUMEL)
        if residual is None:
            master = weights[part]
        else:
            master = join_master(weights[part], residual[part])
        _update(
            gradient[part].float().mul(grad_scale),
            master,
            exp_avg[part],
            exp_avg_sq[part],
            settings,
            step,
        )
        if residual is not None:
            split_master(master, high=weights[part], residual=residual[part])


def squared_norm_reference(gradient: Tensor) -> tuple[float, bool]:
    """Return the sum of squares in double, and whether every element is finite."""
    total = 0.0
    for start in range(0, gradient.numel(), _STEP_NUMEL):
        total += float(gradient[start : start + _STEP_NUMEL].double().square().sum())
    return total, math.isfinite(total)


@torch.no_grad()
def _update(g: Tensor, p: Tensor, m: Tensor, v: Tensor, settings: ParameterSettings, step: int) -> None:
    bias_correction1 = 1 - settings.beta1**step
    bias_correction2 = 1 - settings.beta2**step
    p.mul_(1 - settings.lr * settings.weight_decay)
    m.lerp_(g, 1 - settings.beta1)
    v.mul_(settings.beta2).addcmul_(g, g, value=1 - settings.beta2)
    denominator = v.sqrt().div_(math.sqrt(bias_correction2)).add_(settings.eps)
    p.addcdiv_(m, denominator, value=-settings.lr / bias_correction1)
