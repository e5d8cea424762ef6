"""Finds the head of a causal language model whose loss can be computed in chunks of tokens. Pure.

[Note: which models] The rule reads what transformers' models say of themselves, not their names. The model
has a `loss_function`, and it is transformers' `ForCausalLMLoss`; `get_output_embeddings()` gives its head;
the head is a unit of its own; and the head is linear, perhaps with adapters beside it, so that the logits of
a token depend on that token alone. What lies between head and loss need not be known; see
`runtime/deferred_logits.py`.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch

__all__ = ["MAX_CHUNK_ROWS", "LossHead", "find_loss_head", "logits_nbytes"]

# Products of 1,024 rows keep a GPU as busy as longer ones do: the weights are read once for all of them.
MAX_CHUNK_ROWS = 1024

# The loss that is computed in chunks, by name: this module works where transformers is not installed.
_LOSS = ("transformers.loss.loss_utils", "ForCausalLMLoss")


@dataclass(frozen=True)
class LossHead:
    """A model whose head and loss are computed in chunks of tokens.

    Attributes:
        model: full name of the module with the `loss_function`, empty for the root; an adapter's wrapper
            has it inside.
        unit: full name of the head's unit.
        num_logits: logits of a token.
    """

    model: str
    unit: str
    num_logits: int

    def chunk_rows(self, limit_nbytes: int, itemsize: int) -> int:
        """Return the tokens of a chunk whose logits and loss take at most `limit_nbytes`, at least one token.

        It follows from the model, so that other budgets do not give other sums.

        Args:
            itemsize: bytes of an element in the compute dtype.
        """
        return min(MAX_CHUNK_ROWS, max(1, limit_nbytes // logits_nbytes(1, self.num_logits, itemsize)))

    def chunk_nbytes(self, limit_nbytes: int, itemsize: int) -> int:
        """Return the bytes that the logits and the loss of a chunk take at once; see `chunk_rows`."""
        return logits_nbytes(self.chunk_rows(limit_nbytes, itemsize), self.num_logits, itemsize)


def logits_nbytes(rows: int, num_logits: int, itemsize: int) -> int:
    """Return the bytes that the logits of `rows` tokens and their loss take at once.

    Logits and their gradient in the compute dtype; log-probabilities and their gradient in fp32.

    Args:
        itemsize: bytes of an element in the compute dtype.
    """
    return rows * num_logits * (2 * itemsize + 8)


def find_loss_head(model: torch.nn.Module, units: Collection[str]) -> LossHead | None:
    """Return the head whose loss can be computed in chunks, None when the model is not of this kind.

    Args:
        model: before or after it is attached; on the meta device as well.
        units: names of the model's units.
    """
    names = {id(module): name for name, module in model.named_modules()}
    for path, inner in model.named_modules():
        head = _head_of(inner)
        if head is None:
            continue
        name, num_logits = names.get(id(head)), getattr(head, "out_features", None)
        if not _computes_causal_loss(inner) or not _is_linear(head) or not isinstance(num_logits, int):
            return None
        return LossHead(path, name, num_logits) if name in units and name is not None else None
    return None


def _head_of(module: torch.nn.Module) -> torch.nn.Module | None:
    if not hasattr(type(module), "loss_function") or not hasattr(type(module), "get_output_embeddings"):
        return None
    head = module.get_output_embeddings()  # type: ignore[operator]
    return head if isinstance(head, torch.nn.Module) else None


def _computes_causal_loss(module: torch.nn.Module) -> bool:
    function = module.loss_function
    return (getattr(function, "__module__", ""), getattr(function, "__name__", "")) == _LOSS


def _is_linear(head: torch.nn.Module) -> bool:
    holders = [inner for inner in head.modules() if next(inner.parameters(recurse=False), None) is not None]
    return bool(holders) and all(isinstance(holder, torch.nn.Linear) for holder in holders)
