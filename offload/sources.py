"""Where initial weights come from, one tensor at a time, so that a model is never whole in memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch

from .errors import StateError

__all__ = ["ModuleSource", "WeightSource"]


class WeightSource(Protocol):
    """Gives the initial value of each parameter."""

    def load(self, name: str) -> torch.Tensor:
        """Return the value of the parameter `name` of the model: CPU, any float dtype, its shape.

        Raises:
            KeyError: there is no such parameter.
        """


class ModuleSource:
    """The parameters a model already has in memory."""

    def __init__(self, parameters: Mapping[str, torch.nn.Parameter]) -> None:
        self._parameters = parameters

    def load(self, name: str) -> torch.Tensor:
        """Return the parameter's value, sharing its memory where it is on the CPU.

        Raises:
            StateError: the parameter is on the meta device, so it has no value.
        """
        parameter = self._parameters[name]
        if parameter.is_meta:
            raise StateError(
                f"parameter {name!r} is on the meta device and has no value; give attach() a source, for"
                " example the one that offload.hf.open_pretrained() returns"
            )
        return parameter.detach().cpu()
