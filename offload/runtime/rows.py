"""Cuts a batch into micro-batches of rows, and puts results together again. Pure.

A tensor belongs to the batch when it has two dimensions or more and the batch's size is its first.
Everything else (positions, masks shared by all rows) is passed on whole to every micro-batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..errors import StateError

__all__ = ["chunks", "cut", "join", "join_gradient", "micro_batches"]


def micro_batches(
    tensors: Sequence[torch.Tensor], rows: int | None
) -> tuple[int | None, tuple[tuple[int, int], ...]]:
    """Return the batch size and the micro-batches of `rows` rows each.

    The batch is the first dimension of the first tensor argument with two dimensions or more; every
    such tensor of that size is cut. One-dimensional tensors (positions) are passed on whole.
    """
    batch = next((tensor.shape[0] for tensor in tensors if tensor.dim() >= 2), None)
    if batch is None or rows is None or batch <= rows:
        return None, ((0, 0),)
    _refuse_ambiguity(tensors, batch)
    return batch, tuple((start, min(start + rows, batch)) for start in range(0, batch, rows))


def chunks(tensors: Sequence[torch.Tensor], rows: int) -> tuple[int | None, tuple[tuple[int, int], ...]]:
    """Return the number of rows and the chunks of `rows` rows each, for tensors that are all cut.

    Args:
        tensors: of two dimensions or more, with the same first one; so nothing has to be guessed.
    """
    total = tensors[0].shape[0]
    if total <= rows:
        return None, ((0, 0),)
    return total, tuple((start, min(start + rows, total)) for start in range(0, total, rows))


def cut(
    tensors: Sequence[torch.Tensor | None], batch: int | None, start: int, stop: int
) -> list[torch.Tensor | None]:
    """Return rows [start, stop) of the tensors that are cut, the others as they are."""
    return [
        tensor[start:stop]
        if tensor is not None and batch is not None and tensor.dim() >= 2 and tensor.shape[0] == batch
        else tensor
        for tensor in tensors
    ]


def join(pieces: Sequence[torch.Tensor], batch: int | None, cuts: Sequence[tuple[int, int]]) -> torch.Tensor:
    """Return the whole output of the micro-batches' outputs.

    Raises:
        StateError: an output does not have the micro-batch as its first dimension.
    """
    if batch is None:
        return pieces[0]
    sizes = [stop - start for start, stop in cuts]
    if any(piece.dim() < 2 or piece.shape[0] != size for piece, size in zip(pieces, sizes, strict=True)):
        raise StateError(
            f"cannot cut the batch of {batch} rows: a unit returned shape {tuple(pieces[0].shape)} for"
            f" {sizes[0]} rows; attach with rows=None for this model"
        )
    return torch.cat(list(pieces))


def join_gradient(
    pieces: Sequence[torch.Tensor | None],
    tensor: torch.Tensor | None,
    batch: int | None,
    cuts: Sequence[tuple[int, int]],
) -> torch.Tensor | None:
    """Return the gradient of an input from its micro-batches' gradients; None where there is none."""
    found = [piece for piece in pieces if piece is not None]
    if not found or tensor is None:
        return None
    if batch is None:
        return found[0]
    if tensor.dim() >= 2 and tensor.shape[0] == batch:
        # A micro-batch may have made no use of its rows (an expert that got no tokens).
        rows = zip(pieces, cuts, strict=True)
        return torch.cat(
            [
                torch.zeros_like(tensor[start:stop]) if piece is None else piece
                for piece, (start, stop) in rows
            ]
        )
    # Passed on whole: every micro-batch adds to its gradient.
    total = found[0]
    for piece in found[1:]:
        total = total + piece
    return total


def _refuse_ambiguity(tensors: Sequence[torch.Tensor], batch: int) -> None:
    """Refuse to guess which dimension is the batch when rows are as many as tokens.

    A mask of [tokens, tokens] and a table of [tokens, width] would be cut then, and broadcast.

    Raises:
        StateError: the batch's size stands twice in its tensor, and another tensor begins with it.
    """
    first, *others = [tensor for tensor in tensors if tensor.dim() >= 2]
    if batch in first.shape[1:] and any(tensor.shape[0] == batch for tensor in others):
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (first, *others))
        raise StateError(
            f"cannot tell rows from tokens: both are {batch} in the arguments of a unit ({shapes}); give a"
            " batch of another size or length, or attach with rows=None"
        )
