"""The settings of AdamW: options of a run, settings of a parameter, and the default parameter groups.

Pure values, checked when they are made. The groups follow torch's convention (`params` holds pairs of
name and parameter), so that any optimizer accepts them. Nothing here touches a parameter's values.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..errors import ConfigError

__all__ = ["AdamWOptions", "ParameterSettings", "default_param_groups"]


@dataclass(frozen=True, slots=True)
class ParameterSettings:
    """What one update of one parameter uses.

    Raises:
        ConfigError: lr or weight_decay is negative or not finite, a beta is outside [0, 1), or eps is
            not positive (with eps = 0 the zeros between tensors would become 0 / 0).
    """

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float

    def __post_init__(self) -> None:
        _require(math.isfinite(self.lr) and self.lr >= 0, "lr", "finite and >= 0", self.lr)
        _require(0 <= self.beta1 < 1, "beta1", "in [0, 1)", self.beta1)
        _require(0 <= self.beta2 < 1, "beta2", "in [0, 1)", self.beta2)
        # 1.2e-38: the smallest normal fp32 value; the kernel computes in fp32.
        _require(1.2e-38 <= self.eps < math.inf, "eps", "positive in fp32 and finite", self.eps)
        _require(
            math.isfinite(self.weight_decay) and self.weight_decay >= 0,
            "weight_decay",
            "finite and >= 0",
            self.weight_decay,
        )


@dataclass(frozen=True, slots=True)
class AdamWOptions:
    """Settings of AdamW for a run.

    Attributes:
        lr: 1e-5, what full-parameter fine-tuning of pretrained models usually takes; the schedule scales it.
        betas: as in torch.optim.AdamW.
        eps: as in torch.optim.AdamW; must be positive.
        weight_decay: as in torch.optim.AdamW; decoupled, of parameters with two or more dimensions.
        num_threads: threads of one update; torch's number when None. Results do not depend on it.

    Raises:
        ConfigError: a setting is out of range.
    """

    lr: float = 1e-5
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.01
    num_threads: int | None = None

    def __post_init__(self) -> None:
        ParameterSettings(self.lr, *self.betas, self.eps, self.weight_decay)
        _require(self.num_threads is None or self.num_threads >= 1, "num_threads", ">= 1", self.num_threads)

    def defaults(self) -> dict[str, Any]:
        """Return the settings in the form of a torch parameter group."""
        return {"lr": self.lr, "betas": self.betas, "eps": self.eps, "weight_decay": self.weight_decay}


def default_param_groups(
    named_parameters: Iterable[tuple[str, Tensor]], weight_decay: float
) -> list[dict[str, Any]]:
    """Return two groups: matrices with `weight_decay`, norms and biases (at most 1-D) without.

    Parameters that need no gradient are in neither; an empty group is left out.

    Args:
        named_parameters: as `Module.named_parameters()` yields them; meta parameters will do.
        weight_decay: of the first group.
    """
    decayed: list[tuple[str, Tensor]] = []
    plain: list[tuple[str, Tensor]] = []
    for name, parameter in named_parameters:
        if parameter.requires_grad:
            (decayed if parameter.dim() >= 2 else plain).append((name, parameter))
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def _require(holds: bool, name: str, wanted: str, got: object) -> None:
    if not holds:
        raise ConfigError(f"AdamW: {name} must be {wanted}, got {got!r}")
