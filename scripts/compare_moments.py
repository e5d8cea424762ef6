"""Compare ways to keep AdamW's moments in eight bits; docs/optimizer.md has what it printed.

    python scripts/compare_moments.py

Every candidate is a table of values between 0 and 1, blocks of 128 elements with a scale each, and a
rounding: nearest, or up or down at random and right on average. Three questions, on seeded data:

- static: v of elements whose gradients differ by decades within a block, encoded once. How far off is
  sqrt(v), and how many v become zero (whose next update is divided by eps alone)?
- tracking: v over 2,000 steps of constant noise, then 2,000 steps with gradients a tenth as large. How far
  is it from fp32's v?
- training: a small network that learns another network's function; m and v both in the candidate's codes.
  Its final loss as a multiple of the loss with fp32 moments.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK_NUMEL = 128
BETA1, BETA2, EPS = 0.9, 0.999, 1e-8


@dataclass(frozen=True)
class Candidate:
    """A way to encode; `unsigned` and `signed` are the tables of exp_avg_sq and exp_avg, ascending from 0.

    Args:
        at_random: round at random, else to nearest.
        power_of_two: scales are powers of two, else the block's largest value.
        keeps: a second moment that is not zero becomes the table's first value at least.
    """

    name: str
    unsigned: Tensor
    signed: Tensor
    at_random: bool = False
    power_of_two: bool = False
    keeps: bool = False

    def round_trip(self, x: Tensor, *, second: bool) -> Tensor:
        """Return what is left of a flat tensor, whose length is a multiple of 128."""
        table = self.unsigned if second else self.signed
        magnitude = x.abs().view(-1, BLOCK_NUMEL)
        largest = magnitude.amax(1, keepdim=True).clamp_min(1e-38)
        scale = torch.exp2(torch.ceil(torch.log2(largest / table[-1]))) if self.power_of_two else largest
        y = (magnitude / scale).clamp_max(float(table[-1]))
        upper = torch.searchsorted(table, y).clamp(1, len(table) - 1)
        low, high = table[upper - 1], table[upper]
        part = (y - low) / (high - low)
        chance = torch.rand(y.shape) if self.at_random else 0.5
        code = torch.where(part > chance, upper, upper - 1)
        if self.keeps and second:
            code = torch.where(magnitude > 0, code.clamp_min(1), code)
        return (table[code] * scale).view(-1) * x.sign()


def candidates() -> list[Candidate]:
    """Return all, what the kernel does last."""
    grid = torch.arange(256) / 255
    half = torch.arange(128) / 127
    return [
        Candidate("linear", grid, half),
        Candidate("dynamic (bitsandbytes)", dynamic(8), dynamic(7)),
        Candidate("square (of a root)", grid**2, half**2),
        Candidate("fourth power", grid**4, half**4),
        Candidate("fp8 e4m3", fp8(torch.float8_e4m3fn), fp8(torch.float8_e4m3fn)),
        Candidate("fp8 e5m2", fp8(torch.float8_e5m2), fp8(torch.float8_e5m2)),
        Candidate("fourth power, at random, kept", grid**4, half**4, at_random=True, keeps=True),
        Candidate("curve 32 x 8 / 8 x 16, at random, kept", curve(8, 8), curve(7, 16), True, True, True),
        Candidate("curve 16 x 16 / 16 x 8, nearest, kept", curve(8, 16), curve(7, 8), False, True, True),
        Candidate("curve 16 x 16 / 16 x 8, at random", curve(8, 16), curve(7, 8), True, True),
        Candidate("curve 16 x 16 / 16 x 8, at random, kept", curve(8, 16), curve(7, 8), True, True, True),
    ]


def curve(bits: int, steps: int) -> Tensor:
    """The kernel's curve with `steps` to an octave (csrc/adam/moments8.h)."""
    code = torch.arange(1 << bits)
    octaves = (1 << bits) // steps
    values = torch.exp2(code // steps - octaves + 1.0) * (1 + code % steps / steps)
    return values - 2.0 ** (1 - octaves)


def dynamic(bits: int) -> Tensor:
    """Dettmers et al., "8-bit Optimizers via Block-wise Quantization": decades, fractions, and zero."""
    values = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, (1 << (decade + bits - 7)) + 1)
        values += ((edges[:-1] + edges[1:]) / 2 * 10.0 ** (decade - 6)).tolist()
    return torch.tensor(sorted(values))


def fp8(dtype: torch.dtype) -> Tensor:
    """The finite values of an fp8 type, scaled to 1; a sign bit is left over for second moments."""
    values = torch.arange(128, dtype=torch.uint8).view(dtype).float()
    values = values[values.isfinite()]
    return values / values[-1]


def static_error(each: Candidate, decades: float) -> tuple[float, float]:
    """Return the root mean square error of sqrt(v), relative, and the share of v that become zero."""
    torch.manual_seed(1)
    root = torch.pow(10.0, decades * (torch.rand(BLOCK_NUMEL * 500) - 1))
    got = each.round_trip(root.square(), second=True).sqrt()
    return float(((got - root) / root).square().mean().sqrt()), float((got == 0).float().mean())


def tracking_error(each: Candidate) -> tuple[float, float]:
    """Return the mean relative error of v, against fp32's, after constant noise and after a fall."""
    torch.manual_seed(2)
    size = torch.pow(10.0, -torch.rand(BLOCK_NUMEL * 16))
    exact = torch.zeros_like(size)
    kept = torch.zeros_like(size)
    errors = []
    for factor in (1.0, 0.1):
        for _ in range(2_000):
            square = (torch.randn(size.shape) * size * factor).square()
            exact = BETA2 * exact + (1 - BETA2) * square
            kept = each.round_trip(BETA2 * kept + (1 - BETA2) * square, second=True)
        errors.append(float(((kept - exact) / exact).abs().mean()))
    return errors[0], errors[1]


def trained_loss(keep: Callable[[Tensor, bool], Tensor], seed: int, steps: int) -> float:
    """Train the small network with moments that go through `keep`; return its loss on fresh data."""
    torch.manual_seed(seed)
    shapes = [(64, 32), (64, 64), (8, 64)]
    teacher = [torch.randn(shape) / math.sqrt(shape[1]) for shape in shapes]
    weights = [(torch.randn(shape) / math.sqrt(shape[1])).requires_grad_() for shape in shapes]
    # Inputs of sizes that differ by three decades: so do the gradients within a block.
    size = torch.logspace(-3, 0, 32)

    def out(layers: list[Tensor], x: Tensor) -> Tensor:
        for layer in layers[:-1]:
            x = torch.nn.functional.silu(x @ layer.T)
        return x @ layers[-1].T

    def loss(x: Tensor) -> Tensor:
        return (out(weights, x * size) - out(teacher, x)).square().mean()

    data = torch.Generator().manual_seed(seed + 100)
    moments = [(torch.zeros(w.numel()), torch.zeros(w.numel())) for w in weights]
    for step in range(1, steps + 1):
        gradients = torch.autograd.grad(loss(torch.randn(64, 32, generator=data)), weights)
        lr = 3e-3 * (1 - step / (steps + 1))
        for number, (w, g) in enumerate(zip(weights, gradients, strict=True)):
            m, v = moments[number]
            m = BETA1 * m + (1 - BETA1) * g.flatten()
            v = BETA2 * v + (1 - BETA2) * g.flatten().square()
            corrected = (v / (1 - BETA2**step)).sqrt() + EPS
            update = m / (1 - BETA1**step) / corrected
            w.data -= lr * update.view(w.shape)
            moments[number] = keep(m, False), keep(v, True)
    with torch.no_grad():
        return float(loss(torch.randn(4_096, 32, generator=data)))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=1_000, help="of training [%(default)s]")
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each candidate [%(default)s]")
    args = parser.parse_args()
    torch.set_num_threads(1)
    seeds = range(args.seeds)
    full = [trained_loss(lambda x, _: x, seed, args.steps) for seed in seeds]
    print("| | sqrt(v), 2 decades | 4 decades | zeros, 4 decades | tracking | after a fall | final loss |")
    print("|" + " --- |" * 7)
    for each in candidates():
        near, _ = static_error(each, 2)
        far, zeros = static_error(each, 4)
        steady, fallen = tracking_error(each)
        ratios = []
        for seed, theirs in zip(seeds, full, strict=True):
            ours = trained_loss(lambda x, second: each.round_trip(x, second=second), seed, args.steps)  # noqa: B023
            ratios.append(ours / theirs)
        print(
            f"| {each.name} | {near:.1%} | {far:.1%} | {zeros:.1%} | {steady:.1%} | {fallen:.1%} |"
            f" {sum(ratios) / len(ratios):.3f} [{min(ratios):.3f}..{max(ratios):.3f}] |",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
