"""Runs the head and the loss of a causal language model in chunks of tokens: full logits never exist.

Owns what it takes over of the model while attached: the model's `forward` (to see whether it is given
labels), the head's (to defer the logits then), and its `loss_function`, by transformers' own setter.

A chunk is a run of the head's streamed unit: its weights cross each link twice a step whatever the number of
chunks. It gives the loss of each token in fp32, so that is all that backward starts from; each chunk's logits
are computed again there, and gone before those of the next.

[Note: the same sum] Each token's loss is that of torch's cross entropy on its logits. They are averaged by
torch's own `nll_loss`, as `-loss` for the single class of [tokens, 1]: it adds the same numbers in the same
order as cross entropy does on [tokens, vocabulary]. So with one chunk loss and gradients are those of the
unchunked loss bit for bit; with several, products of other shapes may round otherwise.

Thread rule: that of `stream.py`.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn import functional

from ..errors import StateError
from ..units import LossHead
from .deferred_logits import DeferredLogits, Elementwise
from .stream import StreamedUnit, UnitHost

__all__ = ["ChunkedLoss"]

logger = logging.getLogger(__name__)

# torch's own; ours between the tokens' losses and their sum, where every label is one class.
_IGNORED = -100


class ChunkedLoss:
    """See the module; `install` behind that of the unit, `remove` before it."""

    def __init__(
        self, head: LossHead, model: torch.nn.Module, unit: StreamedUnit, host: UnitHost, rows: int
    ) -> None:
        """
        Args:
            head: of `model`.
            unit: the head's.
            rows: tokens of a chunk.
        """
        self._model: Any = model.get_submodule(head.model)
        self._num_logits = head.num_logits
        self._unit = unit
        self._host = host
        self._rows = rows
        self._forward: Callable[..., Any] = self._model.forward
        self._had_override = "forward" in vars(self._model)
        self._labels_place = _place_of(self._forward, "labels")
        self._loss_function: Any = self._model.loss_function
        self._defers = False
        self._told = False

    def install(self) -> None:
        """Take over the model's forward and loss, and its head's forward."""

        @functools.wraps(self._forward)  # trainers read the arguments of a model's forward
        def forward(*args: Any, **kwargs: Any) -> Any:
            return self._run(*args, **kwargs)

        vars(self._model)["forward"] = forward
        vars(self._unit.module)["forward"] = self._run_head
        self._model.loss_function = self._loss

    def remove(self) -> None:
        """Undo `install`."""
        self._model.loss_function = self._loss_function
        self._unit.install()
        if self._had_override:
            vars(self._model)["forward"] = self._forward
        else:
            vars(self._model).pop("forward", None)

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        place = self._labels_place
        labels = args[place] if place is not None and place < len(args) else kwargs.get("labels")
        before, self._defers = self._defers, labels is not None
        try:
            return self._forward(*args, **kwargs)
        finally:
            self._defers = before

    def _run_head(self, *args: Any, **kwargs: Any) -> Any:
        if not self._defers or len(args) != 1 or kwargs:
            return self._unit.run(*args, **kwargs)
        (hidden,) = args
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        attempt = self._host.attempt
        return DeferredLogits.of(functools.partial(self._compute, attempt), hidden, self._num_logits, dtype)

    def _compute(self, attempt: int, hidden: torch.Tensor) -> torch.Tensor:
        if self._host.attempt != attempt:
            raise StateError(
                "the logits of a call with labels were used behind runtime.step(): they were not computed,"
                " and the weights have changed since; use them before, call the model without labels, or"
                " attach with loss_chunk_nbytes=None"
            )
        if not self._told:
            self._told = True
            logger.info(
                "%s: the logits of a call with labels are used beside their loss, so all are computed;"
                " without that they never exist at once",
                self._unit.unit.name,
            )
        logits: torch.Tensor = self._unit.run(hidden)
        return logits

    def _loss(
        self,
        logits: torch.Tensor,
        labels: torch.Tensor,
        vocab_size: int,
        num_items_in_batch: torch.Tensor | int | None = None,
        ignore_index: int = _IGNORED,
        shift_labels: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Compute what transformers' `ForCausalLMLoss` does, with the same arguments."""
        if not isinstance(logits, DeferredLogits) or logits.computed or logits.shape[-1] != vocab_size:
            loss: torch.Tensor = self._loss_function(
                logits,
                labels,
                vocab_size,
                num_items_in_batch=num_items_in_batch,
                ignore_index=ignore_index,
                shift_labels=shift_labels,
                **kwargs,
            )
            return loss
        if shift_labels is None:
            shift_labels = functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        hidden = logits.hidden.reshape(-1, logits.hidden.shape[-1])
        targets = shift_labels.reshape(-1, 1).to(hidden.device)
        if len(targets) != len(hidden):
            raise ValueError(f"labels for {len(targets)} tokens were given with logits for {len(hidden)}")
        function = functools.partial(_token_losses, logits.elementwise, ignore_index)
        losses: torch.Tensor = self._unit.run_rows(function, (hidden, targets), self._rows)
        return _reduce(losses, targets.squeeze(1) == ignore_index, num_items_in_batch)


def _token_losses(
    elementwise: Sequence[Elementwise],
    ignore_index: int,
    forward: Callable[[torch.Tensor], torch.Tensor],
    hidden: torch.Tensor,
    targets: torch.Tensor,
) -> torch.Tensor:
    """Return the loss of each token, [tokens, 1] fp32; 0 where it is ignored.

    Args:
        hidden: [tokens, width].
        targets: [tokens, 1].
    """
    logits = forward(hidden)
    for change in elementwise:
        logits = change(logits)
    losses = functional.cross_entropy(
        logits.float(), targets.squeeze(1), ignore_index=ignore_index, reduction="none"
    )
    return losses.unsqueeze(1)


def _reduce(
    losses: torch.Tensor, ignored: torch.Tensor, num_items_in_batch: torch.Tensor | int | None
) -> torch.Tensor:
    """Return the mean over the tokens that count, or their sum by `num_items_in_batch`.

    Args:
        losses: [tokens, 1].
        ignored: [tokens], bool.
    """
    classes = torch.where(ignored, _IGNORED, 0)
    reduction = "mean" if num_items_in_batch is None else "sum"
    loss = functional.nll_loss(-losses, classes, ignore_index=_IGNORED, reduction=reduction)
    if num_items_in_batch is None:
        return loss
    if isinstance(num_items_in_batch, torch.Tensor):
        num_items_in_batch = num_items_in_batch.to(loss.device)
    return loss / num_items_in_batch


def _place_of(function: Callable[..., Any], name: str) -> int | None:
    names = list(inspect.signature(function).parameters)
    return names.index(name) if name in names else None
