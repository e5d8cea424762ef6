"""`StreamedAdamW`: the face that an outer training loop sees where it expects a torch optimizer.

It holds settings, not state. Parameters in its groups may be meta tensors; masters and moments live in
the store, and the updater asks `settings_for(name)` when it updates a unit. Schedulers of torch and
transformers change the groups as usual. Settings are read when a unit is updated, which may be before
`step()` is called: `step()` says that the step is over, and the scheduler then sets the next one's.

Thread rule: `settings_for` may be called from any thread; everything else belongs to the training loop.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor

from ..errors import ConfigError, StateError
from .groups import AdamWOptions, ParameterSettings

__all__ = ["StreamedAdamW"]

_GROUP_KEYS = {"params", "param_names", "lr", "betas", "eps", "weight_decay", "initial_lr"}


class StreamedAdamW(torch.optim.Optimizer):
    """AdamW whose update happens elsewhere.

    Args:
        params: pairs of name and parameter, or groups of such pairs (`default_param_groups`).
        on_step: called by `step()`: the runtime's end of a step.
        options: defaults of the groups.

    Raises:
        ConfigError: a parameter has no name, or a group has an unknown key or a setting out of range.

    >>> weight = torch.nn.Parameter(torch.empty(2, 2, device="meta"))
    >>> optimizer = StreamedAdamW([("weight", weight)], on_step=lambda: None)
    >>> optimizer.settings_for("weight").lr
    1e-05
    """

    def __init__(
        self,
        params: Iterable[tuple[str, Tensor]] | Iterable[dict[str, Any]],
        on_step: Callable[[], object],
        options: AdamWOptions | None = None,
    ) -> None:
        self._on_step = on_step
        self._group_of: dict[str, int] = {}
        super().__init__(params, (options or AdamWOptions()).defaults())

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of named parameters; see the class for what it may hold."""
        for key in param_group:
            if key not in _GROUP_KEYS:
                close = difflib.get_close_matches(key, _GROUP_KEYS, n=1)
                hint = f"; did you mean {close[0]!r}?" if close else ""
                raise ConfigError(f"AdamW: a parameter group cannot have {key!r}{hint}")
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        if "param_names" not in group:
            raise ConfigError("AdamW: parameters must come with names: pass model.named_parameters()")
        _settings(group)
        for name in group["param_names"]:
            self._group_of[name] = len(self.param_groups) - 1

    def settings_for(self, name: str) -> ParameterSettings:
        """Return the present settings of the parameter `name`.

        Raises:
            ConfigError: no group holds it, or its settings have been set out of range.
        """
        index = self._group_of.get(name)
        if index is None:
            raise ConfigError(
                f"AdamW: no parameter group holds {name!r}; give it to the optimizer or freeze it "
                "(requires_grad_(False)) before attaching the model"
            )
        return _settings(self.param_groups[index])

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """End the step: finish its updates and commit as the runtime sees fit.

        Args:
            closure: runs forward and backward and returns the loss, as with any torch optimizer.
        """
        loss: float | None = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._on_step()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Do nothing: gradients leave with their unit and are never kept on a parameter."""

    def state_dict(self) -> dict[str, Any]:
        """Return the settings of the groups; `state` is empty, for masters and moments are in the store."""
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the settings of the groups.

        Raises:
            StateError: the dictionary holds moments, which another optimizer has made.
        """
        if state_dict["state"]:
            raise StateError(
                "AdamW: cannot load moments from a state_dict: they live in the store of the run, which "
                "resumes from its last commit by itself"
            )
        super().load_state_dict(state_dict)


def _settings(group: dict[str, Any]) -> ParameterSettings:
    # float(): a learning rate may be a tensor.
    beta1, beta2 = group["betas"]
    return ParameterSettings(
        float(group["lr"]), float(beta1), float(beta2), float(group["eps"]), float(group["weight_decay"])
    )
