"""What a runtime is to be built for, settled before memory is reserved. No behaviour.

[Note: the choice of a cut] A run takes the coarsest cut whose memory plan fits its budgets: larger units are
fewer, and keep what lies between modules out of device memory. Only a unit that is too large for the budgets
is cut into its parts (a decoder layer into attention, MLP and norms; an MLP into its linears). A run that
goes on keeps the cut that it was begun with, which its records tell.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from ..tiers.records import RecordSet, record_sets
from ..tiers.schedule import Schedule
from ..units import LossHead, Unit, find_cuts, find_loss_head
from .options import RuntimeOptions

__all__ = ["Blueprint"]


@dataclass(frozen=True, kw_only=True)
class Blueprint:
    """A model cut into units, and how it is to be streamed.

    Attributes:
        model: as the user gave it.
        options: how it is attached.
        units: of the model.
        records: of the units, by owner.
        schedule: the predicted order of visits.
        trains: for each unit, the owners whose gradients its backward adds to.
        loss_head: the head whose loss is computed in chunks, None when none is.
    """

    model: torch.nn.Module
    options: RuntimeOptions
    units: tuple[Unit, ...]
    records: Mapping[str, RecordSet]
    schedule: Schedule
    trains: Mapping[str, tuple[str, ...]]
    loss_head: LossHead | None

    @property
    def wide_owners(self) -> frozenset[str]:
        """Owners whose gradients are sums, and are added up in fp32 beside the compute dtype's own."""
        if self.options.sums_wide:
            return frozenset(self.records)
        if self.loss_head is None or self.options.compute_dtype == "float32":
            return frozenset()
        return frozenset(self.trains[self.loss_head.unit])

    @classmethod
    def cuts(cls, model: torch.nn.Module, options: RuntimeOptions) -> Iterator[Blueprint]:
        """Yield the blueprints of every cut of `model`, the coarsest first; there is at least one.

        Raises:
            UnitError: it cannot be cut into units.
        """
        return (cls._of(model, options, units) for units in find_cuts(model))

    @classmethod
    def _of(cls, model: torch.nn.Module, options: RuntimeOptions, units: tuple[Unit, ...]) -> Blueprint:
        layouts = (unit.layout for unit in units)
        return cls(
            model=model,
            options=options,
            units=units,
            records=record_sets(layouts, options.record_format, options.torch_compute_dtype),
            schedule=Schedule(
                tuple(unit.name for unit in units),
                {unit.name: unit.records for unit in units},
                wraps=not options.parks,
            ),
            trains={unit.name: unit.trained_records for unit in units},
            loss_head=(
                None
                if options.loss_chunk_nbytes is None
                else find_loss_head(model, [unit.name for unit in units])
            ),
        )
