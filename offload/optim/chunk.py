"""The update of one optimizer chunk, whose elements belong to several parameters.

A chunk of a unit's flat space crosses parameter boundaries, and parameters differ in weight decay or
learning rate: the kernel is called once per run of equal settings. The padding behind a parameter goes
with it (zero in every array, the gradient included, and AdamW keeps it zero). Runs cover the chunk
without gap or overlap, and elements are independent, so the cut changes no result. Memory is the
caller's; nothing is kept from one call to the next.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from ..codec import OptimizerChunk, RecordBuffer, RecordFormat, view_elements, view_optimizer_chunk
from ..specs import TensorSpec
from .groups import ParameterSettings
from .kernel import Backend, adamw_update

__all__ = ["ChunkMemory", "SettingsRun", "settings_runs", "update_chunk"]


@dataclass(frozen=True, slots=True)
class ChunkMemory:
    """Where everything that one chunk's update needs lies in host memory.

    Attributes:
        format: the run's record format.
        chunk: which elements, and where their arrays lie in `optimizer`.
        optimizer: the chunk's own bytes, from where the chunk begins.
        weights: the bytes of the unit's whole weights record.
        gradient: the bytes of the unit's whole flat gradient; only read, zero in the padding.
        gradient_dtype: float32, bfloat16 or float16.
    """

    format: RecordFormat
    chunk: OptimizerChunk
    optimizer: RecordBuffer
    weights: RecordBuffer
    gradient: RecordBuffer
    gradient_dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class SettingsRun:
    """Elements [start, stop) of a unit's flat space that share their settings."""

    start: int
    stop: int
    settings: ParameterSettings


def update_chunk(
    memory: ChunkMemory,
    tensors: Sequence[TensorSpec],
    settings: Mapping[str, ParameterSettings],
    *,
    step: int,
    grad_scale: float = 1.0,
    num_threads: int | None = None,
    backend: Backend = "kernel",
) -> None:
    """Apply one AdamW step to the weights and moments of a chunk, in place.

    Args:
        memory: the chunk and its buffers.
        tensors: the unit's trainable tensors, ordered by offset.
        settings: of each of them, by parameter name.
        step: 1 for the first update.
        grad_scale: the gradient is multiplied with it first.
        num_threads: torch's number when None. The result does not depend on it.
        backend: as for `adamw_update`.

    Raises:
        ValueError: a buffer is too small, or as `adamw_update`.
        KeyError: a tensor has no settings.
        StateError: as `adamw_update`.
    """
    chunk = memory.chunk
    gradient = view_elements(memory.gradient, memory.gradient_dtype, chunk.stop)
    weights = view_elements(memory.weights, memory.format.torch_dtype, chunk.stop)
    residual, exp_avg, exp_avg_sq = view_optimizer_chunk(chunk, memory.optimizer)
    for run in settings_runs(tensors, chunk.start, chunk.stop, settings):
        in_chunk = slice(run.start - chunk.start, run.stop - chunk.start)
        adamw_update(
            gradient[run.start : run.stop],
            weights[run.start : run.stop],
            None if residual is None else residual[in_chunk],
            exp_avg[in_chunk],
            exp_avg_sq[in_chunk],
            settings=run.settings,
            step=step,
            grad_scale=grad_scale,
            num_threads=num_threads,
            backend=backend,
        )


def settings_runs(
    tensors: Sequence[TensorSpec], start: int, stop: int, settings: Mapping[str, ParameterSettings]
) -> tuple[SettingsRun, ...]:
    """Cut the elements [start, stop) of a unit's flat trainable space into runs of equal settings.

    Args:
        tensors: the unit's trainable tensors, ordered by offset.
        start: first element.
        stop: one past the last.
        settings: of each tensor, by parameter name.

    Raises:
        ValueError: there are elements but no tensors.
        KeyError: a tensor in the range has no settings.
    """
    if start < stop and not tensors:
        raise ValueError(f"elements {start} to {stop} belong to no tensor: the unit has none")
    runs: list[SettingsRun] = []
    for index, spec in enumerate(tensors):
        # A tensor's elements reach to the next tensor, so that padding belongs to someone.
        begin = max(start, spec.offset if index else 0)
        end = min(stop, tensors[index + 1].offset) if index + 1 < len(tensors) else stop
        if begin >= end:
            continue
        own = settings[spec.name]
        if runs and runs[-1].settings == own:
            runs[-1] = SettingsRun(runs[-1].start, end, own)
        else:
            runs.append(SettingsRun(begin, end, own))
    return tuple(runs)
