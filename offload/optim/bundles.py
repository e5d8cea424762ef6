"""One AdamW step over many tensors: large ones by themselves, small ones together.

A call of the kernel costs some microseconds of Python whatever its size. Small tensors alike in step and
dtypes are therefore copied into one flat bundle, updated in one call, and copied back. The update is
elementwise, so how tensors are bundled changes no bit.

Owns nothing beyond a call: the tensors are the caller's, the bundles are temporary (16 bytes an element,
at most `BUNDLE_NUMEL + SMALL_NUMEL` elements for each kind). Checks nothing but what the kernel checks.

Thread rule: any thread, on tensors that no other thread uses meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors
from torch.autograd.graph import increment_version

from .groups import ParameterSettings
from .kernel import Backend, Moment8bit, adamw_update, adamw_update_8bit

__all__ = ["BUNDLE_NUMEL", "SMALL_NUMEL", "TensorUpdate", "update_tensors"]

# Through a bundle a tensor takes half the time of a call of its own at 512 elements and three quarters at
# 8 Ki, measured on 2 AVX2 cores; beyond, copying to and fro costs more than it saves.
SMALL_NUMEL = 1 << 13

# 64 Ki elements: a bundle, 1 MiB in all, stays in the second-level cache.
BUNDLE_NUMEL = 1 << 16


class TensorUpdate(NamedTuple):
    """What the update of one tensor reads and writes: contiguous CPU tensors of one shape.

    Attributes:
        gradient: fp32, bf16 or fp16; only read.
        weights: fp32, or bf16 high halves with a residual.
        residual: int16, or None for fp32 weights.
        exp_avg: fp32, or 8-bit.
        exp_avg_sq: in the form of exp_avg.
        step: fp32 scalar: the updates so far; one more afterwards.
        seed: of the rounding of 8-bit moments.
    """

    gradient: Tensor
    weights: Tensor
    residual: Tensor | None
    exp_avg: Tensor | Moment8bit
    exp_avg_sq: Tensor | Moment8bit
    step: Tensor
    seed: int = 0


@dataclass(slots=True)
class _Bundle:
    updates: list[TensorUpdate] = field(default_factory=list)
    numel: int = 0


@torch.no_grad()
def update_tensors(
    updates: Iterable[TensorUpdate],
    *,
    settings: ParameterSettings,
    grad_scale: float = 1.0,
    num_threads: int | None = None,
    backend: Backend = "kernel",
) -> None:
    """Apply one AdamW step to each tensor in place and count it in its `step`.

    Autograd is told of the change: a backward pass that needs an old value raises.

    Raises:
        ValueError, StateError: as `adamw_update`; tensors before the offending one are updated.
    """

    def run(flat: Sequence[Tensor | None], step: int) -> None:
        gradient, weights, residual, exp_avg, exp_avg_sq = flat
        assert gradient is not None and weights is not None
        assert exp_avg is not None and exp_avg_sq is not None
        adamw_update(
            gradient,
            weights,
            residual,
            exp_avg,
            exp_avg_sq,
            settings=settings,
            step=step,
            grad_scale=grad_scale,
            num_threads=num_threads,
            backend=backend,
        )

    def run_bundle(bundle: _Bundle, step: int) -> None:
        if len(bundle.updates) == 1:
            run_one(bundle.updates[0], step)
            return
        *columns, steps, _seeds = zip(*bundle.updates, strict=True)
        flat = [
            None if column[0] is None else _flatten_dense_tensors(column)  # type: ignore[no-untyped-call]
            for column in columns
        ]
        run(flat, step)
        for column, result in zip(columns[1:], flat[1:], strict=True):
            if result is not None:
                views = _unflatten_dense_tensors(result, column)  # type: ignore[no-untyped-call]
                torch._foreach_copy_(column, views)
        # A tensor: adding a Python number would wrap it anew for each of the steps.
        torch._foreach_add_(steps, torch.ones(()), alpha=1.0)

    def run_one(update: TensorUpdate, step: int) -> None:
        gradient, weights, residual, exp_avg, exp_avg_sq, _, seed = update
        flat = [None if tensor is None else tensor.view(-1) for tensor in (gradient, weights, residual)]
        if isinstance(exp_avg, Tensor) and isinstance(exp_avg_sq, Tensor):
            run([*flat, exp_avg.view(-1), exp_avg_sq.view(-1)], step)
        else:
            assert flat[0] is not None and flat[1] is not None
            assert isinstance(exp_avg, Moment8bit) and isinstance(exp_avg_sq, Moment8bit)
            adamw_update_8bit(
                flat[0],
                flat[1],
                flat[2],
                exp_avg,
                exp_avg_sq,
                settings=settings,
                step=step,
                grad_scale=grad_scale,
                seed=seed,
                num_threads=num_threads,
            )
        # The kernel writes behind torch's back.
        increment_version(update.weights)
        update.step.add_(1)

    bundles: dict[tuple[int, torch.dtype, torch.dtype], _Bundle] = {}
    for update in updates:
        step, numel = int(update.step.item()) + 1, update.weights.numel()
        if numel == 0 or numel > SMALL_NUMEL or isinstance(update.exp_avg, Moment8bit):
            run_one(update, step)
            continue
        key = (step, update.gradient.dtype, update.weights.dtype)
        bundle = bundles.setdefault(key, _Bundle())
        bundle.updates.append(update)
        bundle.numel += numel
        if bundle.numel >= BUNDLE_NUMEL:
            run_bundle(bundles.pop(key), step)
    for (step, _, _), bundle in bundles.items():
        run_bundle(bundle, step)
