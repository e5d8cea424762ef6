"""What an attached model's parameters hold while their values live elsewhere.

A parameter becomes a `Placeholder` on the meta device: shape, dtype and `requires_grad` are true, and what
would compute with its values is refused. Torch refuses some of that itself, but not all: it multiplies a
matrix on the CPU by one on the meta device and returns what happens to lie in memory. Its `.grad`, once
backward has run, is a `StreamedGradient`: it has the shape of a gradient and refuses every operation,
because the gradient has left with its unit and a norm or a clip computed from anything else would be
silently wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from ..errors import StateError

__all__ = [
    "Placeholder",
    "StreamedGradient",
    "placeholder",
    "refuse_load_state_dict",
    "refuse_state_dict",
    "replace_parameters",
]

# The gradient of a placeholder is a `StreamedGradient`, which need not lie on the meta device.
_SET_GRADIENT: Any = torch.Tensor.grad.__set__  # type: ignore[union-attr]

# What optimizers, schedulers and printing may ask of a gradient without touching its values.
_HARMLESS = frozenset(
    {"__get__", "__set__", "zero_", "detach_", "dim", "size", "numel", "is_floating_point", "requires_grad_"}
)


class _OnShapes:
    """What the tensors share that have shapes and no values."""

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        return _on_shapes(func, args, kwargs or {})


class _Valueless(_OnShapes, torch.Tensor):
    """A tensor made from placeholders alone, such as a view of one: it has a shape and no values either."""


class Placeholder(_OnShapes, torch.nn.Parameter):
    """Stands for a parameter whose values are in the tiers; alone or beside its like it only has a shape."""


def _on_shapes(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Run `func` on tensors that have only shapes.

    Raises:
        StateError: another argument has values, which would be computed with.
    """
    with torch._C.DisableTorchFunctionSubclass():
        if func != _SET_GRADIENT and any(
            isinstance(value, torch.Tensor) and not value.is_meta
            for value in pytree.tree_leaves((args, kwargs))
        ):
            raise StateError(
                f"{getattr(func, '__name__', func)} with a parameter of an attached model outside the"
                " forward of its unit: its values are not here; runtime.parameters_by_unit() reads them"
            )
        result = func(*args, **kwargs)
        return pytree.tree_map_only(
            torch.Tensor,
            lambda made: (
                made.as_subclass(_Valueless) if type(made) is torch.Tensor and made.is_meta else made
            ),
            result,
        )


class StreamedGradient(torch.Tensor):
    """Stands for a gradient that was handed to the streamed optimizer."""

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name not in _HARMLESS:
            raise StateError(
                f"{name} on a streamed gradient: its values have left with their unit, so their norm cannot"
                " be taken or clipped here; attach with park_gradients=True and clip with"
                " runtime.clip_grad_norm_(max_norm), or attach with max_grad_norm=..."
            )
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"StreamedGradient(shape={tuple(self.shape)})"


def placeholder(parameter: torch.nn.Parameter) -> Placeholder:
    """Return a parameter on the meta device with the shape, dtype and flags of `parameter`."""
    empty = torch.empty_like(parameter, device="meta")
    return Placeholder(empty, requires_grad=parameter.requires_grad)


def refuse_load_state_dict(*_: Any, **__: Any) -> None:
    """Raise instead of copying values into placeholders, where they are lost; a pre-hook.

    Raises:
        StateError: always.
    """
    raise StateError(
        "load_state_dict() of an attached model: its values live in the offload runtime; load them before"
        " attaching, or bring the model back with runtime.detach() first"
    )


def replace_parameters(
    model: torch.nn.Module, replacement: Callable[[str, torch.nn.Parameter], torch.nn.Parameter]
) -> None:
    """Put `replacement(name, parameter)` in the place of every parameter; shared ones stay shared.

    Args:
        replacement: called once per parameter, with the first of its names.
    """
    made: dict[int, torch.nn.Parameter] = {}
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        if id(parameter) not in made:
            made[id(parameter)] = replacement(name, parameter)
        prefix, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(prefix), leaf, made[id(parameter)])


def refuse_state_dict(*_: Any, **__: Any) -> None:
    """Raise instead of handing out placeholders; a `state_dict` pre-hook.

    Raises:
        StateError: always.
    """
    raise StateError(
        "state_dict() of an attached model: its values live in the offload runtime; write them with"
        " runtime.export(directory), go through them with runtime.parameters_by_unit(), or bring them back"
        " with runtime.detach()"
    )
