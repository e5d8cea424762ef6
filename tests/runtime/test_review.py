"""Models and loops that are a little unusual train as they do in memory, or are refused with a reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from toy_models import SETTINGS

import offload
from offload.errors import ConfigError
from offload.optim import updater
from offload.transfer import Transfer

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


def test_a_trainable_parameter_in_no_group_is_refused_at_once(tmp_path: Path) -> None:
    model = stack()
    named = list(model.named_parameters())
    with pytest.raises(ConfigError, match=r"holds 4 of 6 trainable parameters, the first is '1\.0\.weight'"):
        attach(model, tmp_path, param_groups=[{"params": named[:2]}])
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("place", ["update", "fetch"])
def test_a_bug_in_a_background_thread_surfaces_and_does_not_hang(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise KeyError("not foreseen")

    def loop() -> None:
        model(torch.randn(2, WIDTH)).sum().backward()
        runtime.step()
        runtime.synchronize()

    model = stack()
    runtime = attach(model, tmp_path)
    target, name = (updater, "update_chunk") if place == "update" else (Transfer, "_upload")
    monkeypatch.setattr(target, name, fail)
    with pytest.raises(KeyError, match="not foreseen"):
        loop()
    runtime.close()
