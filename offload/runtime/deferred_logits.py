"""Logits that a head has not computed: a tensor that stands for them until somebody needs the values.

In a call with labels a model runs its head, changes the logits perhaps (scales them, caps them), gives them
to its loss, and returns them. The head returns `DeferredLogits` instead. What changes each element by itself
is noted; the loss computes head, notes and cross entropy in chunks of tokens, and the full logits never
exist. Every other use computes them in full, as the head would have, so nobody is given a placeholder.

Invariants: shape, dtype and device are those of the logits; values, once computed, are kept; a gradient that
would go around the head is refused.

Thread rule: the thread that runs the model.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch.utils import _pytree as pytree

from ..errors import StateError

__all__ = ["DeferredLogits", "Elementwise"]

# One change of each logit by itself.
Elementwise = Callable[[torch.Tensor], torch.Tensor]

# Operations on each element, as torch names them, whose other arguments are numbers or dtypes.
_ELEMENTWISE = frozenset(
    {
        *("mul", "multiply", "__mul__", "__rmul__", "div", "divide", "true_divide", "__truediv__", "tanh"),
        *("float", "bfloat16", "half", "to", "contiguous"),
    }
)

# What is true of the logits whether or not they are computed.
_DESCRIPTIONS = frozenset(
    {
        torch.Tensor.shape.__get__,  # type: ignore[attr-defined]
        torch.Tensor.dtype.__get__,  # type: ignore[attr-defined]
        torch.Tensor.ndim.__get__,  # type: ignore[attr-defined]
        torch.Tensor.requires_grad.__get__,  # type: ignore[attr-defined]
        torch.Tensor.size,
        torch.Tensor.dim,
        torch.Tensor.numel,
        torch.Tensor.__len__,
        torch.Tensor.is_floating_point,
        torch.Tensor.is_complex,
        torch.is_floating_point,
        torch.is_complex,
        torch.numel,
    }
)


class DeferredLogits(torch.Tensor):
    """See the module. The tensor itself lies on the meta device: code that goes around Python gets no values.

    Attributes:
        hidden: what the head was given, [..., width].
        elementwise: what was done to each logit since, in order.
    """

    hidden: torch.Tensor
    elementwise: tuple[Elementwise, ...]
    _head: Callable[[torch.Tensor], torch.Tensor]
    _logits: torch.Tensor | None

    @classmethod
    def of(
        cls,
        head: Callable[[torch.Tensor], torch.Tensor],
        hidden: torch.Tensor,
        num_logits: int,
        dtype: torch.dtype,
    ) -> DeferredLogits:
        """Return what stands for `head(hidden)`, [..., num_logits] of `dtype`.

        Args:
            head: computes the logits in full, or raises when it is too late for that.
        """
        return cls._make(head, hidden, (), (*hidden.shape[:-1], num_logits), dtype)

    @classmethod
    def _make(
        cls,
        head: Callable[[torch.Tensor], torch.Tensor],
        hidden: torch.Tensor,
        elementwise: tuple[Elementwise, ...],
        shape: Sequence[int],
        dtype: torch.dtype,
    ) -> DeferredLogits:
        made = torch.empty(*shape, dtype=dtype, device="meta").as_subclass(cls)
        made.hidden, made.elementwise, made._head, made._logits = hidden, elementwise, head, None
        if torch.is_grad_enabled():
            with torch._C.DisableTorchFunctionSubclass():
                made.requires_grad_()
                made.register_hook(_refuse_gradient)  # type: ignore[no-untyped-call]
        return made

    @property
    def computed(self) -> bool:
        """Whether the logits exist: somebody has used them, and may have changed them."""
        return self._logits is not None

    def values(self) -> torch.Tensor:
        """Return the logits themselves, with their graph when gradients are enabled.

        Raises:
            StateError: the weights have changed since.
        """
        wants_graph = torch.is_grad_enabled() and self.requires_grad
        if self._logits is None or (wants_graph and not self._logits.requires_grad):
            logits = self._head(self.hidden)
            for change in self.elementwise:
                logits = change(logits)
            assert logits.shape == self.shape and logits.dtype == self.dtype
            self._logits = logits
        return self._logits

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in _DESCRIPTIONS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func == torch.Tensor.device.__get__:
            return args[0].hidden.device
        deferred = _changed_by_element(func, args, kwargs)
        if deferred is not None:
            return deferred._changed(func, args, kwargs)
        values = pytree.tree_map_only(DeferredLogits, DeferredLogits.values, (args, kwargs))
        return func(*values[0], **values[1])

    def _changed(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> DeferredLogits:
        place = next(index for index, argument in enumerate(args) if argument is self)
        # Not with `self` in it: a graph keeps what it runs, and would own the runtime.
        change = functools.partial(_call_at, func, args[:place], args[place + 1 :], kwargs)
        dtype = change(torch.empty(1, dtype=self.dtype, device="meta")).dtype
        return self._make(self._head, self.hidden, (*self.elementwise, change), self.shape, dtype)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"DeferredLogits(shape={tuple(self.shape)}, dtype={self.dtype})"


def _call_at(
    func: Callable[..., Any],
    before: tuple[Any, ...],
    behind: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    logits: torch.Tensor,
) -> torch.Tensor:
    result: torch.Tensor = func(*before, logits, *behind, **kwargs)
    return result


def _changed_by_element(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> DeferredLogits | None:
    """Return the logits that `func` changes each by itself; None when it does anything else."""
    if getattr(func, "__name__", "") not in _ELEMENTWISE:
        return None
    found = [argument for argument in args if isinstance(argument, DeferredLogits)]
    others = [argument for argument in args if not isinstance(argument, DeferredLogits)]
    if len(found) != 1 or found[0].computed:
        return None
    plain = all(isinstance(value, (bool, int, float, torch.dtype)) for value in (*others, *kwargs.values()))
    return found[0] if plain else None


def _refuse_gradient(_: torch.Tensor) -> NoReturn:
    """Raise instead of keeping a gradient that will not reach the head; a tensor's hook.

    Raises:
        StateError: always.
    """
    raise StateError(
        "a gradient reached logits that were not computed: code that torch does not show to tensor classes"
        " (an autograd.Function) got them from a call with labels; give it logits.clone(), or attach with"
        " loss_chunk_nbytes=None"
    )
