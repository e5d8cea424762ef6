"""Parameters and gradients for the tests of optimizers: from seeds, the same for each optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch.nn import Parameter

Model = list[Parameter]


def parameters_of(
    shapes: Sequence[Sequence[int]], seed: int = 0, dtype: torch.dtype = torch.float32
) -> Model:
    """Parameters of these shapes, the same in every call."""
    generator = torch.Generator().manual_seed(seed)
    return [Parameter(torch.randn(tuple(shape), generator=generator).to(dtype)) for shape in shapes]


def gradients(model: Model, seed: int) -> list[torch.Tensor]:
    """A gradient for each parameter, the same in every call."""
    generator = torch.Generator().manual_seed(1000 + seed)
    return [torch.randn(p.shape, generator=generator).to(p.dtype) for p in model]


def set_gradients(model: Model, seed: int) -> None:
    """Give each parameter its gradient."""
    for parameter, gradient in zip(model, gradients(model, seed), strict=True):
        parameter.grad = gradient


def train(
    optimizer: torch.optim.Optimizer,
    model: Model,
    num_steps: int,
    *,
    first_step: int = 0,
    after_step: Callable[[], object] | None = None,
) -> None:
    """Take steps with the gradients of seeds `first_step` and up."""
    for step in range(first_step, first_step + num_steps):
        set_gradients(model, step)
        optimizer.step()
        if after_step is not None:
            after_step()


def bits(tensors: Iterable[torch.Tensor | None]) -> list[bytes]:
    """The bytes of each tensor."""
    return [
        b"" if t is None else t.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        for t in tensors
    ]
