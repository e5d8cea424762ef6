"""`AdamW`: an ordinary torch optimizer for parameters in host memory, computed by the kernel.

It stands where `torch.optim.AdamW(fused=True)` or DeepSpeedCPUAdam stood. Its state is torch's own: `step`,
`exp_avg` and `exp_avg_sq` by parameter, and with `master_weights` the int16 `residual` that completes a
bf16 parameter to its fp32 master (see `offload.codec`); or moments in 8 bits (`torch_state`). Nothing here
touches a disk: `StreamedAdamW` is the optimizer of an attached model.

Invariants: state is contiguous; a step or a `load_state_dict` that is refused has changed nothing; the
result depends neither on the threads nor on who else has a gradient.

Thread rule: one thread at a time, as with any torch optimizer. The GIL is released while the kernel runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from ..codec import join_master
from ..errors import ConfigError, StateError
from ..specs import MomentDType
from .groups import ParameterSettings
from .kernel import Backend
from .multi_tensor import TensorGroup, TensorRow, update_tensors
from .torch_state import check_state, loaded_state, new_state, row_moments

__all__ = ["AdamW"]

GRADIENT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# float32's largest: the kernel takes the scale as such, and a larger one would make every weight a NaN.
LARGEST_SCALE = (2 - 2**-23) * 2.0**127

# Settings of torch's and DeepSpeed's optimizers for which one value is supported, and what to do instead.
FIXED_SETTINGS = {
    "amsgrad": (False, "use torch.optim.AdamW for it"),
    "capturable": (False, "it is for CUDA graphs"),
    "differentiable": (False, "use torch.optim.AdamW for it"),
    "decoupled_weight_decay": (True, "use torch.optim.Adam for L2 regularization"),
    "adamw_mode": (True, "use torch.optim.Adam for L2 regularization"),
    "bias_correction": (True, "use a warm-up of the learning rate in its place"),
    "fp32_optimizer_states": (True, "moments are float32, or 8-bit with moments='8bit'"),
}

# What torch.optim.AdamW writes into a group besides the settings; older state_dicts lack some of it.
GROUP_DEFAULTS = {
    "amsgrad": False,
    "maximize": False,
    "foreach": None,
    "capturable": False,
    "differentiable": False,
    "fused": None,
    "decoupled_weight_decay": True,
}


class AdamW(Optimizer):
    """AdamW on CPU tensors: a drop-in for `torch.optim.AdamW(fused=True)` and DeepSpeedCPUAdam.

    Parameters are float32, or bfloat16 with `master_weights`; contiguous and on the CPU. Gradients are
    float32, bfloat16 or float16. Results agree with torch's to rounding (1e-6), not bit for bit.

    Args:
        params: parameters, pairs of name and parameter, or groups, as torch takes them.
        lr: as in torch.optim.AdamW; a one-element tensor will do.
        betas: as in torch.optim.AdamW.
        eps: as in torch.optim.AdamW, but not zero.
        weight_decay: as in torch.optim.AdamW, decoupled. DeepSpeedCPUAdam's default is 0.
        amsgrad: must be False.
        maximize: climb instead of descend.
        foreach: accepted and without effect: it chooses among torch's own implementations.
        capturable: must be False.
        differentiable: must be False.
        fused: accepted and without effect, as `foreach`.
        adamw_mode: DeepSpeed's name for decoupled weight decay; must be True.
        bias_correction: as DeepSpeed has it; must be True.
        fp32_optimizer_states: as DeepSpeed has it; must be True.
        master_weights: take bfloat16 parameters, and keep beside each the 16 bits that complete it to an
            exact float32 master: every step equals one in float32, at 2 bytes a parameter.
        moments: `float32`, or `8bit`: 2.03 bytes a parameter for both moments in place of 8. As with
            bitsandbytes and torchao, tensors of less than 4096 elements keep float32. Moments are rounded
            at random, from the number of the step and that of the parameter among all parameters: the same
            run gives the same bits, and so does one that goes on from a saved state. Kernel only.
        num_threads: threads of one call; torch's number when None. Results do not depend on it.
        backend: `reference` needs no extension and is slow; see `adamw_update`.

    Raises:
        ConfigError: a setting is out of range or not supported, or a parameter that requires grad has the
            wrong dtype, device or strides.

    >>> weight = torch.nn.Parameter(torch.zeros(2))
    >>> optimizer = AdamW([weight], lr=0.1, weight_decay=0.0)
    >>> weight.grad = torch.tensor([3.0, -4.0])
    >>> optimizer.step()
    >>> weight.detach()
    tensor([-0.1000,  0.1000])
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        adamw_mode: bool = True,
        bias_correction: bool = True,
        fp32_optimizer_states: bool = True,
        master_weights: bool = False,
        moments: MomentDType = "float32",
        num_threads: int | None = None,
        backend: Backend = "kernel",
    ) -> None:
        _check_fixed(
            {
                "adamw_mode": adamw_mode,
                "bias_correction": bias_correction,
                "fp32_optimizer_states": fp32_optimizer_states,
            }
        )
        if num_threads is not None and num_threads < 1:
            raise ConfigError(f"AdamW: num_threads must be >= 1, got {num_threads}")
        if backend not in ("kernel", "reference"):
            raise ConfigError(f"AdamW: backend must be 'kernel' or 'reference', got {backend!r}")
        if moments not in ("float32", "8bit"):
            raise ConfigError(f"AdamW: moments must be 'float32' or '8bit', got {moments!r}")
        if moments == "8bit" and backend == "reference":
            raise ConfigError("AdamW: the reference has no 8-bit moments; use backend='kernel'")
        self._master_weights = master_weights
        self._moments: MomentDType = moments
        self._num_threads = num_threads
        self._backend: Backend = backend
        # The keys of torch.optim.AdamW in its order, so that either loads the other's groups.
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            **GROUP_DEFAULTS,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, as torch does.

        Raises:
            ConfigError: as for the class; the group is not added then.
        """
        super().add_param_group(param_group)
        index = len(self.param_groups) - 1
        group = self.param_groups[index]
        try:
            _settings(group)
            for name, parameter in _named(index, group):
                fault = _fault(parameter, self._master_weights) if parameter.requires_grad else None
                if fault is not None:
                    raise ConfigError(f"AdamW: {name} {fault}")
        except ConfigError:
            self.param_groups.pop()
            raise

    @overload
    def step(self, closure: None = None, *, grad_scale: float | Tensor = 1.0) -> None: ...

    @overload
    def step(self, closure: Callable[[], float], *, grad_scale: float | Tensor = 1.0) -> float: ...

    def step(
        self, closure: Callable[[], float] | None = None, *, grad_scale: float | Tensor = 1.0
    ) -> float | None:
        """Update every parameter that has a gradient.

        Args:
            closure: runs forward and backward and returns the loss; called once, before the update.
            grad_scale: every gradient is multiplied with it in the same pass: a clip factor, or one over
                a loss scale. The gradients themselves stay as they are.

        Raises:
            ConfigError: grad_scale is not finite in float32, or a group's setting has been set out of range.
            StateError: a gradient is sparse or of another dtype or shape, or a parameter has moved or
                changed its dtype since it was given. Nothing has been changed then.
        """
        loss: float | None = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        scale = float(grad_scale)
        if not abs(scale) <= LARGEST_SCALE:
            raise ConfigError(
                f"AdamW: grad_scale must be finite in float32, got {scale}: if the norm of the gradients is "
                "not finite, leave out this step"
            )
        groups: list[TensorGroup] = []
        fresh: dict[Tensor, dict[str, Tensor]] = {}
        number = 0  # Among all parameters.
        for group in self.param_groups:
            rows: list[TensorRow] = []
            for parameter in group["params"]:
                if (gradient := parameter.grad) is not None:
                    state = self.state.get(parameter)
                    if not state:
                        state = fresh[parameter] = new_state(parameter, self._moments)
                    rows.append(self._row(parameter, gradient, state, number))
                number += 1
            factor = -scale if group["maximize"] else scale
            groups.append(TensorGroup(rows, _settings(group), factor))
        try:
            update_tensors(groups, num_threads=self._num_threads, backend=self._backend)
        except ValueError as error:
            # It knows rows; the names are known here.
            self._check_step()
            raise StateError(f"AdamW: a parameter cannot be updated: {error}") from error
        self.state.update(fresh)
        return loss

    def master(self, parameter: Tensor) -> Tensor:
        """Return the exact float32 value of a parameter, as a new tensor of its shape."""
        residual = self.state.get(parameter, {}).get("residual")
        if residual is None:
            return parameter.detach().to(torch.float32, copy=True)
        return join_master(parameter.detach(), residual)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state_dict of this class, of torch.optim.AdamW or of DeepSpeedCPUAdam.

        As with torch, tensors that fit are taken over and not copied: deepcopy the dictionary of an
        optimizer that goes on. A bfloat16 parameter without a saved residual begins with one of zero: its
        master is what it holds.

        The form of the moments is this optimizer's, whatever was saved and whatever the parameter is:
        saved 8-bit moments become float32 exactly, others 8-bit with each value rounded to the nearest
        code. Of the same form they are taken over bit for bit.

        Raises:
            ConfigError: a group's setting is out of range or not supported.
            StateError: the state of a parameter is not AdamW's, or does not fit it.
            ValueError: the groups differ in number or size.
        """
        # torch casts all state to the parameter's dtype: moments of bf16 parameters would be rounded, and
        # codes take four times their memory. So it gets none. The hooks come after the user's before the
        # load and ahead of them after it: they see what was made of the dictionary, and are not seen.
        loaded: dict[str, Any] = {}

        def check(_: Optimizer, final: dict[str, Any]) -> dict[str, Any]:
            self._check_loadable(final)
            loaded.update(final)
            parameters = {key for group in final["param_groups"] for key in group["params"]}
            others = {key: value for key, value in final["state"].items() if key not in parameters}
            return {**final, "state": others}

        def restore(_: Optimizer) -> None:
            for _name, parameter, entry in self._saved_entries(loaded):
                self.state[parameter] = loaded_state(parameter, entry, self._moments)

        checking = self.register_load_state_dict_pre_hook(check)
        restoring = self.register_load_state_dict_post_hook(restore, prepend=True)
        try:
            super().load_state_dict(state_dict)
        finally:
            checking.remove()
            restoring.remove()

    def __getstate__(self) -> dict[str, Any]:
        own = ("_master_weights", "_moments", "_num_threads", "_backend")
        return {**super().__getstate__(), **{name: self.__dict__[name] for name in own}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for key, value in GROUP_DEFAULTS.items():
                group.setdefault(key, value)

    # -- a step --------------------------------------------------------------------------------

    def _row(self, parameter: Tensor, gradient: Tensor, state: dict[str, Tensor], number: int) -> TensorRow:
        """Return what the update of a parameter takes; whether it fits is checked there."""
        if gradient.layout == torch.strided and (not gradient.is_contiguous() or gradient.is_neg()):
            gradient = gradient.resolve_neg().contiguous()
        residual = None
        if self._master_weights:
            residual = state.get("residual")
            if residual is None and parameter.dtype == torch.bfloat16:
                residual = state["residual"] = torch.zeros(parameter.shape, dtype=torch.int16)
        return (gradient, parameter, residual, *row_moments(state), state["step"], number)

    def _check_step(self) -> None:
        """Raise what is wrong with a step, by the name of a parameter.

        Raises:
            StateError: there is something.
        """
        for index, group in enumerate(self.param_groups):
            for name, parameter in _named(index, group):
                if parameter.grad is None:
                    continue
                fault = _fault(parameter, self._master_weights)
                if fault is not None:
                    raise StateError(f"AdamW: {name} {fault}")
                _check_gradient(name, parameter, parameter.grad)
                if state := self.state.get(parameter):
                    check_state(name, parameter, state)

    # -- loading -------------------------------------------------------------------------------

    def _check_loadable(self, state_dict: Mapping[str, Any]) -> None:
        for index, group in enumerate(state_dict["param_groups"]):
            missing = {"lr", "betas", "eps", "weight_decay"} - set(group)
            if missing:
                raise StateError(f"AdamW: group {index} of the state_dict has no {_list(missing)}")
            _settings(group)
        for name, parameter, entry in self._saved_entries(state_dict):
            check_state(name, parameter, entry)

    def _saved_entries(
        self, state_dict: Mapping[str, Any]
    ) -> Iterator[tuple[str, Tensor, Mapping[str, Any]]]:
        """Yield (name, parameter, saved state) of each parameter that the dictionary has a state for."""
        # torch refuses groups that differ in number or size, after its hooks: hence not strict.
        groups = zip(self.param_groups, state_dict["param_groups"], strict=False)
        for index, (group, saved) in enumerate(groups):
            for (name, parameter), key in zip(_named(index, group), saved["params"], strict=False):
                if entry := state_dict["state"].get(key):
                    yield name, parameter, entry


def _settings(group: Mapping[str, Any]) -> ParameterSettings:
    _check_fixed(group)
    # float(): each may be a tensor.
    beta1, beta2 = group["betas"]
    return ParameterSettings(
        float(group["lr"]), float(beta1), float(beta2), float(group["eps"]), float(group["weight_decay"])
    )


def _named(index: int, group: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    parameters = group["params"]
    names = group.get("param_names") or [
        f"{position} of group {index}" for position in range(len(parameters))
    ]
    yield from zip((f"parameter {name}" for name in names), parameters, strict=True)


def _list(names: set[str]) -> str:
    return ", ".join(repr(name) for name in sorted(names))


def _check_fixed(settings: Mapping[str, Any]) -> None:
    for name, (wanted, remedy) in FIXED_SETTINGS.items():
        got = settings.get(name, wanted)
        if bool(got) != wanted:
            raise ConfigError(f"AdamW: {name} must be {wanted}, got {got!r}; {remedy}")


def _fault(parameter: Tensor, master_weights: bool) -> str | None:
    """Return why the kernel cannot update a parameter, or None."""
    # The layout before the strides, which a sparse tensor has none of.
    if not parameter.is_cpu or parameter.layout != torch.strided or not parameter.is_contiguous():
        return (
            f"must be a contiguous tensor on the CPU, got shape {tuple(parameter.shape)}, {parameter.layout} "
            f"on {parameter.device}; bring it there with .cpu() and .contiguous(), or use torch.optim.AdamW"
        )
    if parameter.dtype == torch.float32 or (master_weights and parameter.dtype == torch.bfloat16):
        return None
    if parameter.dtype == torch.bfloat16:
        return (
            "is bfloat16, in which small updates are lost; pass master_weights=True for exact float32 "
            "masters at 2 bytes more a parameter, or convert the model with .float()"
        )
    return (
        "must be float32, or bfloat16 with master_weights=True, "
        f"got {str(parameter.dtype).removeprefix('torch.')}; convert it, or use torch.optim.AdamW"
    )


def _check_gradient(name: str, parameter: Tensor, gradient: Tensor) -> None:
    if gradient.layout != torch.strided:
        raise StateError(
            f"AdamW: the gradient of {name} must be dense, got {gradient.layout}; use "
            "torch.optim.SparseAdam, or an embedding with sparse=False"
        )
    if gradient.dtype not in GRADIENT_DTYPES:
        raise StateError(
            f"AdamW: the gradient of {name} must be float32, bfloat16 or float16, got {gradient.dtype}"
        )
    if gradient.shape != parameter.shape or not gradient.is_cpu:
        raise StateError(
            f"AdamW: the gradient of {name} must have shape {tuple(parameter.shape)} on the CPU, got "
            f"{tuple(gradient.shape)} on {gradient.device}"
        )
