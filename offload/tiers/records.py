"""Which records a unit has, how large each is in every tier, and their names in the store. Pure.

A unit that owns parameters has up to three records: *weights* (its trainable parameters in the
record format), *frozen* (its parameters without a gradient, in the compute dtype, never rewritten)
and *optimizer* (residuals and moments of the trainable ones, in chunks). Weights and frozen are
fetched together into one host buffer, frozen behind weights, and land in one device buffer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch

from ..codec import OptimizerChunk, RecordFormat
from ..sizes import align_up
from ..specs import RecordKind, TensorSpec, UnitLayout
from ..store import RecordSpec

__all__ = ["RecordSet", "record_sets", "store_records"]

# 256 bytes: CUDA's allocation granularity for vectorised loads; also a multiple of any element size.
DEVICE_ALIGNMENT_NBYTES = 256


@dataclass(frozen=True)
class RecordSet:
    """The records of one unit.

    Attributes:
        layout: the unit's tensors in their flat spaces.
        format: how trainable weights and their optimizer state are stored.
        compute_dtype: what the weights are on the device; frozen weights are stored in it.
    """

    layout: UnitLayout
    format: RecordFormat
    compute_dtype: torch.dtype

    @property
    def owner(self) -> str:
        """The unit's name."""
        return self.layout.name

    def name(self, kind: RecordKind) -> str:
        """Return the record's name in the store."""
        return f"{self.layout.name}:{kind}"

    @cached_property
    def weights_nbytes(self) -> int:
        """Bytes of the weights record, 0 when nothing is trainable."""
        numel = self.layout.trainable_numel
        return self.format.weights_nbytes(numel) if numel else 0

    @cached_property
    def frozen_nbytes(self) -> int:
        """Bytes of the frozen record, 0 when nothing is frozen."""
        return self.format.frozen_nbytes(self.layout.frozen_numel, self.compute_dtype)

    @cached_property
    def optimizer_nbytes(self) -> int:
        """Bytes of the optimizer record, 0 when nothing is trainable."""
        numel = self.layout.trainable_numel
        return self.format.optimizer_nbytes(numel) if numel else 0

    @cached_property
    def chunks(self) -> tuple[OptimizerChunk, ...]:
        """The chunks of the optimizer record, in its order; none when nothing is trainable."""
        return self.format.optimizer_chunks(self.layout.trainable_numel)

    @property
    def host_nbytes(self) -> int:
        """Bytes of the host buffer that holds weights and frozen records."""
        return self.weights_nbytes + self.frozen_nbytes

    @cached_property
    def frozen_offset_on_device(self) -> int:
        """Byte offset of the frozen weights in the device buffer, behind the trainable ones."""
        return align_up(self.layout.trainable_numel * self.compute_dtype.itemsize, DEVICE_ALIGNMENT_NBYTES)

    @cached_property
    def device_nbytes(self) -> int:
        """Bytes of the device buffer that holds the unit's weights in the compute dtype."""
        return self.frozen_offset_on_device + self.layout.frozen_numel * self.compute_dtype.itemsize

    def locate(self, tensor: str) -> tuple[TensorSpec, bool]:
        """Return the spec of `tensor` and whether it is trainable.

        Raises:
            KeyError: the unit owns no such tensor.
        """
        for spec in self.layout.trainable:
            if spec.name == tensor:
                return spec, True
        for spec in self.layout.frozen:
            if spec.name == tensor:
                return spec, False
        raise KeyError(f"unit {self.owner!r} owns no tensor {tensor!r}")


def record_sets(
    layouts: Iterable[UnitLayout], record_format: RecordFormat, compute_dtype: torch.dtype
) -> dict[str, RecordSet]:
    """Return the records of every unit that owns parameters, by unit name."""
    return {
        layout.name: RecordSet(layout, record_format, compute_dtype)
        for layout in layouts
        if layout.trainable or layout.frozen
    }


def store_records(records: Mapping[str, RecordSet]) -> list[RecordSpec]:
    """Return what a store must hold for `records`, in unit order."""
    specs: list[RecordSpec] = []
    for unit in records.values():
        if unit.layout.trainable:
            specs.append(RecordSpec(unit.name("weights"), unit.weights_nbytes))
            specs.append(RecordSpec(unit.name("optimizer"), unit.optimizer_nbytes))
        if unit.layout.frozen:
            specs.append(RecordSpec(unit.name("frozen"), unit.frozen_nbytes, mutable=False))
    return specs
