"""The state that `AdamW` keeps of one parameter: how it is made, checked, and loaded in either form.

With fp32 moments it is torch's: `step`, `exp_avg`, `exp_avg_sq`. With 8-bit moments each moment is two
tensors, `exp_avg_codes` and `exp_avg_scales` (and `exp_avg_sq_...`): under torch's names they would be taken
for moments by any optimizer that loads them. A bf16 parameter has an int16 `residual` in either form.

Pure but for the memory it makes; nothing is kept from one call to the next. Any thread.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from ..errors import StateError
from ..specs import MomentDType
from .kernel import SCALE_NUMEL, Moment8bit

__all__ = [
    "MIN_8BIT_NUMEL",
    "check_state",
    "is_8bit",
    "loaded_state",
    "new_state",
    "row_moments",
]

# Smaller tensors keep fp32 moments, as with bitsandbytes (min_8bit_size) and torchao: norms and biases, whose
# moments are few bytes, and each of whose elements counts for a whole row or column.
MIN_8BIT_NUMEL = 4096

_WHICH: tuple[Literal["exp_avg"], Literal["exp_avg_sq"]] = ("exp_avg", "exp_avg_sq")
_KEYS_8BIT = tuple(f"{which}_{part}" for which in _WHICH for part in ("codes", "scales"))
_KEYS = ("step", "residual", *_WHICH, *_KEYS_8BIT)


def is_8bit(state: Mapping[str, Any]) -> bool:
    """Return whether a parameter's state holds 8-bit moments."""
    return "exp_avg_codes" in state


def new_state(parameter: Tensor, moments: MomentDType) -> dict[str, Tensor]:
    """Return the state of a parameter that has had no update."""
    state: dict[str, Tensor] = {"step": torch.zeros((), dtype=torch.float32)}
    for which in _WHICH:
        if _wants_8bit(parameter, moments):
            state |= _tensors_8bit(Moment8bit.zeros(which, parameter.numel()), parameter)
        else:
            state[which] = torch.zeros(parameter.shape, dtype=torch.float32)
    if parameter.dtype == torch.bfloat16:
        state["residual"] = torch.zeros(parameter.shape, dtype=torch.int16)
    return state


def row_moments(
    state: Mapping[str, Tensor],
) -> tuple[Tensor | tuple[Tensor, Tensor], Tensor | tuple[Tensor, Tensor]]:
    """Return the moments of a state as `TensorRow` has them."""
    if not is_8bit(state):
        return state["exp_avg"], state["exp_avg_sq"]
    return (
        (state["exp_avg_codes"], state["exp_avg_scales"]),
        (state["exp_avg_sq_codes"], state["exp_avg_sq_scales"]),
    )


def check_state(name: str, parameter: Tensor, state: Mapping[str, Any]) -> None:
    """Check that a state, kept or saved, is AdamW's and that of the parameter.

    Raises:
        StateError: it is not; the message begins with the parameter's name.
    """
    needed = ("step", *_KEYS_8BIT) if is_8bit(state) else ("step", *_WHICH)
    missing = [repr(key) for key in needed if key not in state]
    if missing:
        raise StateError(
            f"AdamW: the state of {name} has no {', '.join(missing)}; it is not that of an AdamW"
        )
    for key in ("exp_avg", "exp_avg_sq", "residual", "exp_avg_codes", "exp_avg_sq_codes"):
        if key in state and state[key].shape != parameter.shape:
            raise StateError(
                f"AdamW: {key} of {name} must have shape {tuple(parameter.shape)}, got "
                f"{tuple(state[key].shape)}"
            )
    if is_8bit(state):
        _check_8bit(name, parameter, state)
    if "residual" in state and parameter.dtype != torch.bfloat16:
        raise StateError(
            f"AdamW: the state of {name} has a residual, which completes a bfloat16 parameter, but the "
            f"parameter is {parameter.dtype}; give a float32 model the masters (AdamW.master), and take "
            "'residual' out of the state"
        )


def loaded_state(parameter: Tensor, entry: Mapping[str, Any], moments: MomentDType) -> dict[str, Tensor]:
    """Return a saved state that `check_state` has passed in the form that `new_state` gives it.

    Tensors that have it already are taken over and not copied; so is what others have put into the state.
    Moments in the other form are converted: 8-bit to fp32 exactly, fp32 to 8-bit with each value rounded
    to the nearest code.
    """
    state = {key: value for key, value in entry.items() if key not in _KEYS}
    # DeepSpeed and old versions of torch save a number.
    state["step"] = torch.as_tensor(entry["step"], dtype=torch.float32, device="cpu")
    to_8bit = _wants_8bit(parameter, moments)
    for which in _WHICH:
        if not is_8bit(entry):
            values = entry[which].to("cpu", torch.float32).contiguous()
            if not to_8bit:
                state[which] = values
                continue
            moment = Moment8bit.of(which, values.view(-1))
        else:
            moment = _moment_8bit(which, {key: entry[key].to("cpu").contiguous() for key in _KEYS_8BIT})
            if not to_8bit:
                state[which] = moment.values().view(parameter.shape)
                continue
        state |= _tensors_8bit(moment, parameter)
    if "residual" in entry:
        state["residual"] = entry["residual"].to("cpu").contiguous()
    return state


def _wants_8bit(parameter: Tensor, moments: MomentDType) -> bool:
    return moments == "8bit" and parameter.numel() >= MIN_8BIT_NUMEL


def _tensors_8bit(moment: Moment8bit, parameter: Tensor) -> dict[str, Tensor]:
    return {
        f"{moment.which}_codes": moment.codes.view(parameter.shape),
        f"{moment.which}_scales": moment.scales,
    }


def _moment_8bit(which: Literal["exp_avg", "exp_avg_sq"], state: Mapping[str, Tensor]) -> Moment8bit:
    return Moment8bit(which, state[f"{which}_codes"].view(-1), state[f"{which}_scales"])


def _check_8bit(name: str, parameter: Tensor, state: Mapping[str, Any]) -> None:
    num_scales = -(-parameter.numel() // SCALE_NUMEL)
    for which in _WHICH:
        codes, scales = state[f"{which}_codes"], state[f"{which}_scales"]
        # Another dtype is a sign that something has cast them, and codes are no numbers to cast.
        if codes.dtype != torch.uint8 or scales.dtype != torch.bfloat16 or scales.shape != (num_scales,):
            raise StateError(
                f"AdamW: 8-bit {which} of {name} must be uint8 codes and {num_scales} bfloat16 scales, got "
                f"{codes.dtype} and {tuple(scales.shape)} {scales.dtype}"
            )
