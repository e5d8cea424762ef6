"""Parameters of an attached model have shapes and no values: whoever computes with one is told."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn
from torch.nn import functional
from toy_models import SETTINGS

import offload
from offload.errors import StateError


@pytest.fixture
def weight() -> Iterator[nn.Parameter]:
    """[4, 3], of an attached model."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))
    with offload.attach(model, **SETTINGS):
        yield model[0].weight


@pytest.mark.parametrize(
    "use",
    [
        # Torch itself computes the first two, from memory that is not the weight's.
        lambda weight: torch.ones(2, 3) @ weight.T,
        lambda weight: functional.linear(torch.ones(2, 3), weight),
        lambda weight: torch.addmm(torch.ones(4), torch.ones(2, 3), weight.T),
        lambda weight: weight.detach().copy_(torch.ones(4, 3)),
        lambda weight: setattr(weight, "data", torch.ones(4, 3)),
        lambda weight: torch.equal(weight, torch.ones(4, 3)),
        lambda weight: torch.stack([weight, torch.ones(4, 3)]),
    ],
)
def test_a_weight_that_is_used_outside_its_unit_is_refused(
    weight: nn.Parameter, use: Callable[[nn.Parameter], object]
) -> None:
    with pytest.raises(StateError, match="outside the forward of its unit"):
        use(weight)


def test_what_needs_no_values_is_answered(weight: nn.Parameter) -> None:
    assert isinstance(weight, nn.Parameter) and weight.is_meta and weight.requires_grad
    assert (weight.shape, weight.numel(), weight.dtype) == ((4, 3), 12, torch.float32)
    assert (weight * 2).is_meta and torch.zeros_like(weight).is_meta
    assert len(torch.optim.SGD([weight], lr=0.1).param_groups) == 1
