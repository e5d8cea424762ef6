"""What the tests of 8-bit moments update."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from kernel_arrays import GRADIENT_TAGS, export, settings_values

from offload import _adam
from offload.codec import join_master, split_master
from offload.optim.kernel import Moment8bit

Which = Literal["exp_avg", "exp_avg_sq"]


@dataclass
class Arrays8:
    """Everything one update reads and writes; `weights` fp32, or bf16 with `residual`."""

    gradient: torch.Tensor
    weights: torch.Tensor
    residual: torch.Tensor | None
    exp_avg: Moment8bit
    exp_avg_sq: Moment8bit

    def part(self, start: int, stop: int) -> Arrays8:
        """Copies of the elements [start, stop); `start` is a multiple of 128."""

        def cut(t: torch.Tensor) -> torch.Tensor:
            return t[start:stop].clone()

        def moment(of: Moment8bit) -> Moment8bit:
            return Moment8bit(of.which, cut(of.codes), of.scales[start // 128 : -(-stop // 128)].clone())

        residual = None if self.residual is None else cut(self.residual)
        return Arrays8(
            cut(self.gradient), cut(self.weights), residual, moment(self.exp_avg), moment(self.exp_avg_sq)
        )

    def split(self) -> Arrays8:
        """The same with the weights as high halves and residuals."""
        high, residual = split_master(self.weights)
        return replace(self, weights=high, residual=residual)

    def master(self) -> torch.Tensor:
        return self.weights if self.residual is None else join_master(self.weights, self.residual)

    def bits(self) -> list[bytes]:
        """The bytes of everything an update may change."""
        moments = [self.exp_avg, self.exp_avg_sq]
        parts = [self.master(), *(t for m in moments for t in (m.codes, m.scales))]
        return [export(t).tobytes() for t in parts]


def random_moment(which: Which, numel: int, generator: torch.Generator) -> Moment8bit:
    """Any codes, with scales from 2^-90 to 2^125, and zero."""
    codes = torch.randint(0, 256, (numel,), dtype=torch.uint8, generator=generator)
    exponents = torch.randint(-91, 126, (-(-numel // 128),), generator=generator)
    scales = torch.where(exponents < -90, 0.0, 2.0**exponents)
    return Moment8bit(which, codes, scales.to(torch.bfloat16))


def random_arrays8(numel: int, seed: int) -> Arrays8:
    """Arrays as in the midst of training."""
    generator = torch.Generator().manual_seed(seed)
    gradient, weights, exp_avg = (torch.randn(numel, generator=generator) for _ in range(3))
    exp_avg_sq = torch.rand(numel, generator=generator) * 1e-2
    return Arrays8(
        gradient,
        weights,
        None,
        Moment8bit.of("exp_avg", exp_avg * 0.1),
        Moment8bit.of("exp_avg_sq", exp_avg_sq),
    )


def update8(
    arrays: Arrays8,
    *,
    isa: str = "auto",
    num_threads: int = 1,
    step: int = 1,
    seed: int = 0,
    first_element: int = 0,
    **changes: float,
) -> Arrays8:
    """Run `_adam.adamw_8bit` on a copy and return it."""
    result = arrays.part(0, len(arrays.gradient))
    _adam.adamw_8bit(
        export(result.gradient),
        export(result.weights),
        None if result.residual is None else export(result.residual),
        result.exp_avg.exported(),
        result.exp_avg_sq.exported(),
        step=step,
        seed=seed,
        first_element=first_element,
        gradient_dtype=GRADIENT_TAGS[result.gradient.dtype],
        num_threads=num_threads,
        isa=isa,
        **{**settings_values(), **changes},
    )
    return result
