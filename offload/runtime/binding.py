"""Binds fetched weights to the modules of a unit for the time of a run.

While a unit runs, its modules' `_parameters` hold views of the fetched buffers: plain leaf tensors
whose `.grad` is a view of the gradient buffer, so that autograd accumulates in place and no gradient
of a whole unit exists beside it. Outside, they hold parameters on the meta device, which refuse to
give values.

Thread rule: one run of a unit at a time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..tiers.gradients import GradientBuffer
from ..tiers.records import RecordSet
from ..tiers.transfer import WeightsOnDevice
from ..units import Unit

__all__ = ["ParameterBinder", "apart_from"]


@dataclass(frozen=True)
class _Place:
    """Where one tensor of a record is bound: `module._parameters[name]`."""

    module: torch.nn.Module
    name: str
    owner: str
    tensor: str


class ParameterBinder:
    """The places of one unit's parameters; see the module."""

    def __init__(self, unit: Unit, module: torch.nn.Module, records: Mapping[str, RecordSet]) -> None:
        self._records = records
        self._places = [
            _Place(*_split_path(module, binding.path), binding.owner, binding.tensor)
            for binding in unit.bindings
        ]

    @contextlib.contextmanager
    def bound(
        self, weights: Mapping[str, WeightsOnDevice], buffers: Mapping[str, GradientBuffer] | None
    ) -> Iterator[None]:
        """Bind fetched weights (and gradient views) to the modules for the time of a run."""
        leaves: dict[tuple[str, str], torch.Tensor] = {}
        before: list[tuple[_Place, Any]] = []
        try:
            for place in self._places:
                key = (place.owner, place.tensor)
                if key not in leaves:
                    leaves[key] = self._leaf(place, weights[place.owner], buffers)
                before.append((place, place.module._parameters[place.name]))
                # The annotation says Parameter; modules only read the entry, as a tensor.
                place.module._parameters[place.name] = leaves[key]  # type: ignore[assignment]
            yield
        finally:
            for place, parameter in before:
                place.module._parameters[place.name] = parameter

    def _leaf(
        self, place: _Place, weights: WeightsOnDevice, buffers: Mapping[str, GradientBuffer] | None
    ) -> torch.Tensor:
        spec, trainable = self._records[place.owner].locate(place.tensor)
        flat = weights.trainable if trainable else weights.frozen
        leaf = flat[spec.offset : spec.end].view(spec.shape).detach()
        if trainable and buffers is not None:
            leaf.requires_grad_()
            leaf.grad = buffers[place.owner].micro[spec.offset : spec.end].view(spec.shape)
        return leaf


def apart_from(weights: Mapping[str, WeightsOnDevice], leaves: list[Any]) -> list[Any]:
    """Copy what is a view of a weight (a table of positions, cut to length): the next unit's weights
    will lie in its bytes. Return `leaves` itself when there is nothing to copy."""
    buffers = {
        space.untyped_storage().data_ptr()
        for unit in weights.values()
        for space in (unit.trainable, unit.frozen)
        if space.numel()
    }

    def is_view(leaf: Any) -> bool:
        strided = isinstance(leaf, torch.Tensor) and leaf.layout is torch.strided and not leaf.is_meta
        return strided and leaf.untyped_storage().data_ptr() in buffers

    if not any(is_view(leaf) for leaf in leaves):
        return leaves
    return [leaf.clone() if is_view(leaf) else leaf for leaf in leaves]


def _split_path(module: torch.nn.Module, path: str) -> tuple[torch.nn.Module, str]:
    prefix, _, name = path.rpartition(".")
    return (module.get_submodule(prefix) if prefix else module), name
