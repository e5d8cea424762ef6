"""One call of a unit: what is kept from its forward to its backward, and what makes both run alike.

A recompute must see what the forward saw: the same arguments, random state, autocast and buffers.

Thread rule: a call belongs to the thread that runs the model.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.modules.batchnorm import _NormBase
from torch.utils import _pytree as pytree

from ..errors import StateError
from ..tiers.activations import SavedTensor

__all__ = [
    "TENSOR",
    "Call",
    "DroppedCall",
    "autocast_as",
    "buffers_preserved",
    "hides_tensors",
    "is_cache",
    "may_have_gradient",
    "running_statistics",
    "tensor_leaves",
    "version_of",
]

# Stands in a result's leaves where a tensor was.
TENSOR = object()


@dataclass(frozen=True)
class DroppedCall:
    """A forward with a graph whose backward will never come, because the graph is gone."""

    unit: str
    attempt: int
    saved: tuple[SavedTensor, ...]


@dataclass
class Call:
    """One call of a unit, kept from its forward to its backward.

    Attributes:
        function: what is run on the module's own forward and the arguments; None for that forward itself.
        tree: the pytree structure of (args, kwargs).
        leaves: its leaves; None where a tensor was saved.
        kept: for each leaf that is a tensor kept by reference, its index in the saved tensors.
        saved: for each leaf that was copied to the host.
        rows: the cut of the batch, (start, stop) for each micro-batch.
        batch: the size of the first dimension of what is cut, None when nothing is.
        rng: generator states before each micro-batch.
        changed_buffers: buffers of the unit that the forward wrote (running statistics).
        autocast: the state of autocast in the forward, which holds for the recompute, too.
        output_tree: structure of the result.
        attempt: that of the forward; see `UnitHost.attempt`.
        awaited: notes the call as dropped when it is collected; dead once its backward has begun.
    """

    function: Callable[..., torch.Tensor] | None
    tree: pytree.TreeSpec
    leaves: list[Any]
    tensor_indices: tuple[int, ...]
    saved: dict[int, SavedTensor]
    wants_grad: tuple[bool, ...]
    cuts: tuple[tuple[int, int], ...]
    batch: int | None
    rng: list[Any]
    output_tree: pytree.TreeSpec | None = None
    output_leaves: list[Any] | None = None
    changed_buffers: tuple[torch.Tensor, ...] = ()
    autocast: list[tuple[str, torch.dtype, bool]] = field(default_factory=list)
    attempt: int = 0
    awaited: weakref.finalize[Any, Call] | None = None


@contextlib.contextmanager
def buffers_preserved(call: Call) -> Iterator[None]:
    """Undo what a recompute writes into buffers: the forward has counted this batch already."""
    before = [(buffer, buffer.clone()) for buffer in call.changed_buffers]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, values in before:
                buffer.copy_(values)


@contextlib.contextmanager
def autocast_as(call: Call) -> Iterator[None]:
    """Cast as the forward of `call` did. Without autocast's cache: it would keep every cast weight."""
    with contextlib.ExitStack() as entered:
        for kind, dtype, enabled in call.autocast:
            entered.enter_context(torch.autocast(kind, dtype, enabled, cache_enabled=False))
        yield


def tensor_leaves(call: Call, result: Any) -> list[torch.Tensor]:
    """Return the tensors of a result, and note the rest of it in `call`."""
    leaves, tree = pytree.tree_flatten(result)
    for leaf in leaves:
        if hides_tensors(leaf):
            raise StateError(
                f"a unit returned a {type(leaf).__name__}, which holds tensors where torch.utils._pytree does"
                " not see them: their gradients would be lost; return tuples or dicts, or register the class"
            )
    call.output_tree = tree
    call.output_leaves = [TENSOR if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


def running_statistics(module: torch.nn.Module) -> set[int]:
    """Return the ids of the buffers that batch norms write without counting a version."""
    norms = (inner for inner in module.modules() if isinstance(inner, _NormBase))
    return {id(buffer) for norm in norms for buffer in norm.buffers() if norm.training}


def hides_tensors(leaf: Any) -> bool:
    """Return whether a leaf is an object with tensors in it that pytree does not see."""
    if isinstance(leaf, torch.Tensor) or is_cache(leaf):
        return False
    return any(
        isinstance(value, torch.Tensor) and may_have_gradient(value)
        for value in getattr(leaf, "__dict__", {}).values()
    )


def version_of(tensor: torch.Tensor) -> int:
    """Return how often `tensor` was written in place; 0 for inference tensors, which do not count."""
    return 0 if tensor.is_inference() else tensor._version


def may_have_gradient(tensor: torch.Tensor) -> bool:
    """Return whether autograd can give `tensor` a gradient, by its dtype."""
    return tensor.is_floating_point() or tensor.is_complex()


def is_cache(value: Any) -> bool:
    """Return whether `value` is a KV cache, by the methods that all of transformers' caches have.

    By methods and not by name or position: GPT-2 gives its blocks the cache as a positional argument.
    """
    return hasattr(value, "get_seq_length") and hasattr(value, "update")
