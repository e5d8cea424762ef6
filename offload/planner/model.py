"""What a plan has to know of a model: its units and a few dimensions, from its configuration alone.

The model is built on the meta device, so no weight exists; its units, and the finer ones that a small device
makes of them, are found as `offload.attach` finds them. No file is read here: who calls has the
configuration.

Thread rule: the caller's thread; building sets torch's default device for a moment.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ..errors import ConfigError
from ..tiers.schedule import Schedule
from ..units import LossHead, Unit, find_cuts, find_loss_head
from .shapes import Shape

__all__ = ["ModelFacts", "build_without_memory", "config_of_shape", "describe_config", "describe_model"]


@dataclass(frozen=True)
class ModelFacts:
    """A model without its weights.

    Attributes:
        name: for people.
        units: as `find_units` returns them, or a finer cut.
        lookups: names of the units that look tokens or positions up: they save no input, and do not multiply.
        num_parameters: each counted once, without padding.
        multiplied_numel: parameters that a token is multiplied with; a tied table counts as the head.
        hidden_size: width of what units hand to each other.
        intermediate_size: width inside the MLP.
        num_layers: decoder layers.
        attention_width: heads times the width of a head.
        vocab_size: logits of a token.
        max_positions: tokens that a row may have; None where the configuration does not say.
        loss_head: the head whose loss a run computes in chunks of tokens; None when it cannot.
        input_widths: elements of a token that each unit gets from the one before, by unit name.
        between_width: elements of a token that autograd keeps on the device between the parts of units that
            were cut; see [Note: temporaries] in work.py.
        finer: the same model in the next finer cut; None where no unit may be cut.
    """

    name: str
    units: tuple[Unit, ...]
    lookups: frozenset[str]
    num_parameters: int
    multiplied_numel: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    attention_width: int
    vocab_size: int
    max_positions: int | None
    loss_head: LossHead | None
    input_widths: Mapping[str, int]
    between_width: int
    finer: ModelFacts | None = None

    @property
    def cuts(self) -> Iterator[ModelFacts]:
        """This cut and every finer one."""
        cut: ModelFacts | None = self
        while cut is not None:
            yield cut
            cut = cut.finer

    @property
    def trains(self) -> dict[str, tuple[str, ...]]:
        """For each unit, the owners whose gradients its backward adds to."""
        return {unit.name: unit.trained_records for unit in self.units}

    def schedule(self, *, wraps: bool) -> Schedule:
        """Return the predicted order of visits."""
        names = tuple(unit.name for unit in self.units)
        return Schedule(names, {unit.name: unit.records for unit in self.units}, wraps=wraps)


def config_of_shape(shape: Shape) -> Any:
    """Return transformers' configuration of a published shape."""
    return AutoConfig.for_model(shape.model_type, **shape.settings)


def describe_config(config: Any, name: str) -> ModelFacts:
    """Build the causal language model of a configuration on the meta device, and describe it.

    Raises:
        ConfigError: transformers has no such model, or cannot build it.
        UnitError: it cannot be cut into units.
    """
    return describe_model(build_without_memory(config, name), name)


def build_without_memory(config: Any, name: str) -> torch.nn.Module:
    """Return the causal language model of a configuration, everything of it on the meta device.

    Raises:
        ConfigError: transformers has no such model, or cannot build it.
    """
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    # What transformers and torch raise for dimensions that make no model.
    except (ValueError, TypeError, AttributeError, KeyError, RuntimeError, ZeroDivisionError) as error:
        text = str(error).strip().splitlines()
        reason = text[0] if text else type(error).__name__
        raise ConfigError(f"transformers cannot build {name}: {reason}; check its config.json") from error
    built: torch.nn.Module = model
    return built


def describe_model(model: torch.nn.Module, name: str) -> ModelFacts:
    """Describe a Hugging Face causal language model, on any device.

    Raises:
        ConfigError: its configuration lacks a dimension that a plan needs.
        UnitError: it cannot be cut into units.
    """
    finer = None
    # The coarsest comes first, and refers to the next.
    for units in reversed(list(find_cuts(model))):
        finer = _describe_cut(model, name, units, finer)
    assert finer is not None, "there is at least one cut"
    return finer


def _describe_cut(
    model: torch.nn.Module, name: str, units: tuple[Unit, ...], finer: ModelFacts | None
) -> ModelFacts:
    config: Any = model.config
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    lookups = frozenset(
        unit.name for unit in units if isinstance(model.get_submodule(unit.name), torch.nn.Embedding)
    )
    hidden = _dimension(config, "hidden_size", name)
    heads = _dimension(config, "num_attention_heads", name)
    # GPT-2 has an `n_inner` of None for four times the width.
    intermediate = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None)
    numel = {
        spec.name: spec.numel for unit in units for spec in (*unit.layout.trainable, *unit.layout.frozen)
    }
    multiplied = {binding.tensor for unit in units if unit.name not in lookups for binding in unit.bindings}
    return ModelFacts(
        name=name,
        units=units,
        lookups=lookups,
        num_parameters=sum(numel.values()),
        multiplied_numel=sum(numel[tensor] for tensor in multiplied),
        hidden_size=hidden,
        intermediate_size=intermediate or 4 * hidden,
        num_layers=_dimension(config, "num_hidden_layers", name),
        attention_width=heads * (getattr(config, "head_dim", None) or hidden // heads),
        vocab_size=_dimension(config, "vocab_size", name),
        max_positions=getattr(config, "max_position_embeddings", None),
        loss_head=find_loss_head(model, [unit.name for unit in units]),
        input_widths={
            unit.name: _widths(model.get_submodule(unit.name), hidden)[0]
            for unit in units
            if unit.name not in lookups
        },
        between_width=_between_width(model, units),
        finer=finer,
    )


def _widths(module: torch.nn.Module, otherwise: int) -> tuple[int, int]:
    """Return the elements of a token that a linear takes and gives; `otherwise` twice for other modules."""
    # GPT-2's Conv1D calls them nx and nf.
    taken = getattr(module, "in_features", None) or getattr(module, "nx", None) or otherwise
    return taken, getattr(module, "out_features", None) or getattr(module, "nf", None) or otherwise


def _between_width(model: torch.nn.Module, units: tuple[Unit, ...]) -> int:
    outputs: dict[str, list[int]] = {}
    for unit in units:
        width = _widths(model.get_submodule(unit.name), 0)[1]
        if unit.is_part and width:
            outputs.setdefault(unit.name.rpartition(".")[0], []).append(width)
    # Of a gated MLP: what both projections give, and the activation of one; the last linear's input is saved.
    return sum(sum(widths[:-1]) + max(widths[:-1], default=0) for widths in outputs.values())


def _dimension(config: Any, key: str, name: str) -> int:
    value = getattr(config, key, None)
    if type(value) is not int or value <= 0:
        raise ConfigError(f"the configuration of {name} has no {key} (got {value!r}), which a plan needs")
    return value
