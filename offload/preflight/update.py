"""How fast the AdamW kernel goes through host memory, on the threads that are asked for.

Thread rule: the caller's thread, and the kernel's own.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from ..optim import Moment8bit, ParameterSettings, adamw_update, adamw_update_8bit
from ..specs import MomentDType

__all__ = ["update_bytes_per_s"]

# 28 bytes each with fp32 moments: 112 MiB, more than the caches of a processor.
_NUMEL = 4 << 20
_ROUNDS = 3
_SETTINGS = ParameterSettings(lr=1e-4, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.01)


def update_bytes_per_s(moments: MomentDType, *, num_threads: int, numel: int = _NUMEL) -> float:
    """Return the bytes that an update of bf16 halves and residuals reads and writes in a second.

    Counted as a plan does: the fp32 gradient once, weights, residual and moments twice.

    Args:
        moments: their format.
        num_threads: of the kernel.
        numel: elements, a multiple of 128.

    Raises:
        StateError: the kernel was not built.
    """
    gradient = torch.full((numel,), 1e-3)
    weights = torch.full((numel,), 0.1, dtype=torch.bfloat16)
    residual = torch.zeros(numel, dtype=torch.int16)
    first, second = torch.full((numel,), 1e-3), torch.full((numel,), 1e-4)
    run: Callable[[int], None]
    if moments == "float32":
        each = 2 * 4

        def run(step: int) -> None:
            adamw_update(
                gradient, weights, residual, first, second,
                settings=_SETTINGS, step=step, num_threads=num_threads,
            )  # fmt: skip
    else:
        each = 2
        coded = Moment8bit.of("exp_avg", first), Moment8bit.of("exp_avg_sq", second)

        def run(step: int) -> None:
            adamw_update_8bit(
                gradient, weights, residual, *coded, settings=_SETTINGS, step=step, num_threads=num_threads
            )

    run(1)
    elapsed = []
    for step in range(2, _ROUNDS + 2):
        began_s = time.perf_counter()
        run(step)
        elapsed.append(time.perf_counter() - began_s)
    return numel * (4 + 2 * (2 + 2 + each)) / statistics.median(elapsed)
