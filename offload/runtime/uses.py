"""Tells the gradients of a tensor's uses apart, so that a cut of a model into units changes no sum.

[Note: sums of gradients] A tensor that is used several times gets the sum of its uses' gradients, and
floating point addition is not associative: autograd adds them in the order in which it meets the uses, the
last one first. Where a unit is a part of a larger module, a tensor may be used in the unit and beside it: the
input of a decoder layer goes into the residual sum, and twice into an RMS norm. A unit that returned one
gradient would make residual + (first + second) of what in memory is (residual + second) + first. So a part
is given each input in several places, and returns the gradient of each use in a place of its own.

Thread rule: the thread that runs backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

__all__ = ["MAX_USES", "Uses"]

# Places for the gradients of one tensor. An attention block uses its input three times, an RMS norm twice;
# of more, the first uses share the last place.
MAX_USES = 6


class Uses(TorchFunctionMode):
    """While entered, gives every use of some tensors a leaf of its own with the same memory.

    Args:
        tensors: leaves; those that do not require grad are used as they are.
    """

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        super().__init__()
        self._uses = {id(tensor): (tensor, list[torch.Tensor]()) for tensor in tensors}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given: dict[int, torch.Tensor] = {}

        def alias(tensor: torch.Tensor) -> torch.Tensor:
            original, aliases = self._uses.get(id(tensor), (None, []))
            if original is None or not original.requires_grad:
                return tensor
            use = original.detach().requires_grad_()
            aliases.append(use)
            given[id(use)] = original
            return use

        args, kwargs = pytree.tree_map_only(torch.Tensor, alias, (args, kwargs or {}))
        result = func(*args, **kwargs)
        if not given:
            return result
        # A cast to the dtype that it has is no use: the tensor itself comes back.
        return pytree.tree_map_only(torch.Tensor, lambda one: given.get(id(one), one), result)

    def gradients(self, tensor: torch.Tensor) -> list[torch.Tensor | None]:
        """Return the gradients of a tensor's uses, the last use first, in `MAX_USES` places."""
        original, aliases = self._uses[id(tensor)]
        found = [use.grad for use in (*reversed(aliases), original) if use.grad is not None]
        for gradient in found[MAX_USES:]:
            found[MAX_USES - 1] = found[MAX_USES - 1] + gradient
        return [*found[:MAX_USES], *[None] * (MAX_USES - len(found))]
