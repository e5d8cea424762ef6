"""Models and loops that are a little unusual train as they do in memory, or are refused with a reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from toy_models import SETTINGS

import offload

WIDTH = 16


def attach(model: torch.nn.Module, disk: Path, **settings: Any) -> Any:
    return offload.attach(model, disk=[disk], **{**SETTINGS, "dtype": "float32", **settings})


def stack(depth: int = 3, build: Any = None) -> torch.nn.Sequential:
    torch.manual_seed(0)

    def block() -> torch.nn.Module:
        return torch.nn.Sequential(torch.nn.Linear(WIDTH, WIDTH), torch.nn.Tanh())

    return torch.nn.Sequential(*[(build or block)() for _ in range(depth)])


class Positions(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(8, WIDTH))

    def forward(self, length: int) -> torch.Tensor:
        return self.weight[:length]


class WithPositions(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.positions = Positions()
        self.blocks = stack(6)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        positions = self.positions(x.shape[0])
        return self.blocks(x) + positions, positions


@pytest.mark.parametrize("grad", [True, False])
def test_an_output_that_is_a_view_of_a_weight_keeps_its_values(grad: bool, tmp_path: Path) -> None:
    model = WithPositions()
    tight = {"host_memory": "300KiB", "device_memory": "40KiB", "activations_nbytes": 65536}
    with attach(model, tmp_path, **tight), torch.set_grad_enabled(grad):
        for _ in range(2):
            _, positions = model(torch.randn(4, WIDTH))
            assert torch.equal(positions, torch.ones(4, WIDTH))
