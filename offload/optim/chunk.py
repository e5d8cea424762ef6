"""The update of one optimizer chunk, whose elements belong to several parameters.

A chunk of a unit's flat space crosses parameter boundaries, and parameters differ in weight decay or
learning rate: the kernel is called once per run of equal settings, and once per parameter where it rounds at
random, with the parameter's own random numbers. The padding behind a parameter goes
with it (zero in every array, the gradient included, and AdamW keeps it zero). Runs cover the chunk
without gap or overlap. Elements are independent, and with 8-bit moments blocks of 128 are, where tensors
and chunks begin; so neither cut changes a result. Memory is the caller's; nothing is kept from one call
to the next.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from ..codec import (
    OptimizerChunk,
    OptimizerViews,
    RecordBuffer,
    RecordFormat,
    view_elements,
    view_optimizer_chunk,
)
from ..specs import TensorSpec, UnitLayout
from .groups import ParameterSettings
from .kernel import Backend, Moment8bit, adamw_update, adamw_update_8bit

__all__ = ["ChunkMemory", "SettingsRun", "settings_runs", "update_chunk"]


@dataclass(frozen=True, slots=True)
class ChunkMemory:
    """Where everything that one chunk's update needs lies in host memory.

    Attributes:
        format: the run's record format.
        chunk: which elements, and where their arrays lie in `optimizer`.
        optimizer: the chunk's own bytes, from where the chunk begins.
        weights: the bytes of the unit's whole weights record.
        gradient: the bytes of the chunk's gradient, from where the chunk begins; only read, zero in the
            padding.
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
    layout: UnitLayout,
    settings: Mapping[str, ParameterSettings],
    *,
    step: int,
    grad_scale: float = 1.0,
    num_threads: int | None = None,
    backend: Backend = "kernel",
) -> None:
    """Apply one AdamW step to the weights and moments of a chunk, in place.

    Random numbers for the rounding of 8-bit moments are fixed by the unit's name, the step and each
    element's place in the unit: the same step gives the same bits wherever it runs.

    Args:
        memory: the chunk and its buffers.
        layout: the unit.
        settings: of each of its trainable tensors, by parameter name.
        step: 1 for the first update.
        grad_scale: the gradient is multiplied with it first.
        num_threads: torch's number when None. The result does not depend on it.
        backend: as for `adamw_update`; 8-bit moments have the kernel alone.

    Raises:
        ValueError: a buffer is too small, the moments are 8-bit and the backend is not the kernel, or as
            `adamw_update`.
        KeyError: a tensor has no settings.
        StateError: as `adamw_update`.
    """
    chunk = memory.chunk
    gradient = view_elements(memory.gradient, memory.gradient_dtype, chunk.numel)
    weights = view_elements(memory.weights, memory.format.torch_dtype, chunk.stop)
    views = view_optimizer_chunk(chunk, memory.optimizer)
    moments_8bit = _moments_8bit(views)
    if moments_8bit is not None and backend != "kernel":
        raise ValueError(f"8-bit moments are updated by backend='kernel' alone, got {backend!r}")
    if moments_8bit is not None:
        exp_avg, exp_avg_sq = moments_8bit
        for start, stop, spec in _tensors_between(layout.trainable, chunk.start, chunk.stop):
            in_chunk = slice(start - chunk.start, stop - chunk.start)
            adamw_update_8bit(
                gradient[in_chunk],
                weights[start:stop],
                None if views.residual is None else views.residual[in_chunk],
                exp_avg.part(in_chunk),
                exp_avg_sq.part(in_chunk),
                settings=settings[spec.name],
                step=step,
                grad_scale=grad_scale,
                seed=_seed_of(spec.name),
                first_element=start - spec.offset,
                num_threads=num_threads,
            )
        return
    for run in settings_runs(layout.trainable, chunk.start, chunk.stop, settings):
        in_chunk = slice(run.start - chunk.start, run.stop - chunk.start)
        adamw_update(
            gradient[in_chunk],
            weights[run.start : run.stop],
            None if views.residual is None else views.residual[in_chunk],
            views.exp_avg[in_chunk],
            views.exp_avg_sq[in_chunk],
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
    runs: list[SettingsRun] = []
    for begin, end, spec in _tensors_between(tensors, start, stop):
        own = settings[spec.name]
        if runs and runs[-1].settings == own:
            runs[-1] = SettingsRun(runs[-1].start, end, own)
        else:
            runs.append(SettingsRun(begin, end, own))
    return tuple(runs)


def _tensors_between(
    tensors: Sequence[TensorSpec], start: int, stop: int
) -> Iterator[tuple[int, int, TensorSpec]]:
    """Yield the parts of [start, stop) that belong to one tensor each, with it."""
    if start < stop and not tensors:
        raise ValueError(f"elements {start} to {stop} belong to no tensor: the unit has none")
    for index, spec in enumerate(tensors):
        # A tensor's elements reach to the next tensor, so that padding belongs to someone.
        begin = max(start, spec.offset if index else 0)
        end = min(stop, tensors[index + 1].offset) if index + 1 < len(tensors) else stop
        if begin < end:
            yield begin, end, spec


def _moments_8bit(views: OptimizerViews) -> tuple[Moment8bit, Moment8bit] | None:
    """Return exp_avg and exp_avg_sq of a chunk with 8-bit moments; None with fp32 ones."""
    if views.exp_avg_scales is None or views.exp_avg_sq_scales is None:
        return None
    return (
        Moment8bit("exp_avg", views.exp_avg, views.exp_avg_scales),
        Moment8bit("exp_avg_sq", views.exp_avg_sq, views.exp_avg_sq_scales),
    )


def _seed_of(tensor: str) -> int:
    """Return the seed of a tensor's random numbers, 64 bits; part of what makes a run the same run.

    Of the tensor, not of its unit: how a model is cut into units must not change what it learns. Not Python's
    `hash`, which differs from process to process.
    """
    return int.from_bytes(hashlib.sha256(tensor.encode()).digest()[:8], "little")
