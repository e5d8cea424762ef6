"""One AdamW step of many tensors in one call of the kernel, whatever their sizes.

A call for each tensor costs some microseconds of Python, most of it to export memory under the buffer
protocol. Here the kernel reads the tensors themselves, under DLPack, and checks all of them before it
changes one; then it shares their elements among its threads as if they were one range.

Owns nothing beyond a call: the tensors are the caller's. Thread rule: any thread, on tensors that no other
thread uses meanwhile; the GIL is released while the kernel computes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from .groups import ParameterSettings
from .kernel import Backend, adamw_update, adamw_update_rows

__all__ = ["TensorGroup", "TensorRow", "update_tensors"]

# A moment: fp32, or 8-bit codes and scales (see Moment8bit).
_Moment: TypeAlias = Tensor | tuple[Tensor, Tensor]

# (gradient, weights, residual, exp_avg, exp_avg_sq, step, seed), contiguous and on the CPU. gradient: fp32,
# bf16 or fp16. weights: fp32; or bf16 high halves with an int16 residual. step: an fp32 scalar, the updates
# so far. seed: of the rounding of 8-bit moments. A plain tuple, for there may be thousands in a step.
TensorRow: TypeAlias = tuple[Tensor, Tensor, Tensor | None, _Moment, _Moment, Tensor, int]


class TensorGroup(NamedTuple):
    """Tensors that share their settings.

    Attributes:
        rows: the tensors; all but scales and step have the shape of the weights.
        settings: of every element of theirs.
        grad_scale: their gradients are multiplied with it first.
    """

    rows: list[TensorRow]
    settings: ParameterSettings
    grad_scale: float = 1.0


@torch.no_grad()
def update_tensors(
    groups: Sequence[TensorGroup], *, num_threads: int | None = None, backend: Backend = "kernel"
) -> None:
    """Apply one AdamW step to each tensor in place and count it in its `step`.

    The result is that of `adamw_update` or `adamw_update_8bit` for each tensor. Autograd is told of the
    change: a backward pass that needs an old value raises.

    Args:
        groups: the tensors.
        num_threads: torch's number when None. The result does not depend on it.
        backend: as for `adamw_update`; the reference has no 8-bit moments.

    Raises:
        ValueError: a tensor or a setting does not fit. With the kernel nothing has been changed then; the
            reference has updated the tensors before it.
        StateError: the extension is not there and `backend` is `kernel`.
    """
    if backend == "reference":
        _update_by_reference(groups)
    else:
        adamw_update_rows(
            [
                (rows, (s.lr, s.beta1, s.beta2, s.eps, s.weight_decay, grad_scale))
                for rows, s, grad_scale in groups
            ],
            num_threads=num_threads,
        )
    # The kernel writes behind torch's back.
    increment_version([row[1] for group in groups for row in group.rows])


def _update_by_reference(groups: Sequence[TensorGroup]) -> None:
    for group in groups:
        for gradient, weights, residual, exp_avg, exp_avg_sq, step, _ in group.rows:
            if not isinstance(exp_avg, Tensor) or not isinstance(exp_avg_sq, Tensor):
                raise ValueError("adamw: the reference has no 8-bit moments")
            adamw_update(
                gradient.view(-1),
                weights.view(-1),
                None if residual is None else residual.view(-1),
                exp_avg.view(-1),
                exp_avg_sq.view(-1),
                settings=group.settings,
                step=int(step.item()) + 1,
                grad_scale=group.grad_scale,
                backend="reference",
            )
            step.add_(1)
