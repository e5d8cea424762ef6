"""Frozen descriptions shared by every layer: tiers, tensors, units, homes, budgets. No behaviour
beyond arithmetic on their own fields, no torch, no I/O.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Literal

from .sizes import align_up

__all__ = [
    "ELEMENT_ALIGNMENT",
    "MEMORY_SAVE_STEPS",
    "SCALE_NUMEL",
    "MomentDType",
    "RecordDType",
    "RecordKind",
    "TensorSpec",
    "Tier",
    "UnitLayout",
]

# How master weights are stored: `float32`, or `bfloat16` high halves plus a 16-bit residual in the
# optimizer record, which together are the exact fp32 value.
RecordDType = Literal["float32", "bfloat16"]

# How exp_avg and exp_avg_sq are stored: exact, or in a byte each with a scale for every 128.
MomentDType = Literal["float32", "8bit"]

# `weights`: trainable weights as computed with. `frozen`: weights without gradient.
# `optimizer`: residual and moments of the trainable weights.
RecordKind = Literal["weights", "frozen", "optimizer"]

# Elements of an 8-bit moment that share a scale, as the kernel has it.
SCALE_NUMEL = 128

# 128 elements: every tensor of a record begins a block of 8-bit moments, so that parameters with other
# settings can be updated by other calls; and SIMD loads are aligned in every array of the record.
ELEMENT_ALIGNMENT = SCALE_NUMEL

# Steps between commits where the home is memory. From disk a commit costs milliseconds, and each step has
# one. From memory it writes all that a step changes, which is everything: every step of them would cost
# what a home on disk costs.
MEMORY_SAVE_STEPS = 100


class Tier(enum.Enum):
    """Where bytes live: GPU memory, host memory (pinned when there is a GPU), or drives."""

    DEVICE = "device"
    HOST = "host"
    DISK = "disk"


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One parameter inside a unit's flat element space.

    Attributes:
        name: the parameter's full name in the model, `model.layers.0.mlp.up_proj.weight`.
        shape: as in the model.
        offset: index of its first element in the flat space of its record.
    """

    name: str
    shape: tuple[int, ...]
    offset: int

    @property
    def numel(self) -> int:
        """Number of elements; 1 for a scalar."""
        numel = 1
        for size in self.shape:
            numel *= size
        return numel

    @property
    def end(self) -> int:
        """Index one past its last element."""
        return self.offset + self.numel


@dataclass(frozen=True, slots=True)
class UnitLayout:
    """How the parameters of one unit lie in its records.

    Trainable and frozen parameters have a flat element space each; both are padded so that every
    tensor begins at a multiple of `ELEMENT_ALIGNMENT` elements.

    Attributes:
        name: the module's full name, `model.layers.0`.
        trainable: the tensors with a gradient, ordered by offset.
        frozen: the tensors without one, ordered by offset.
    """

    name: str
    trainable: tuple[TensorSpec, ...]
    frozen: tuple[TensorSpec, ...] = ()

    @property
    def trainable_numel(self) -> int:
        """Elements of the flat trainable space, padding included."""
        return _padded_end(self.trainable)

    @property
    def frozen_numel(self) -> int:
        """Elements of the flat frozen space, padding included."""
        return _padded_end(self.frozen)


def _padded_end(tensors: tuple[TensorSpec, ...]) -> int:
    return align_up(tensors[-1].end, ELEMENT_ALIGNMENT) if tensors else 0
