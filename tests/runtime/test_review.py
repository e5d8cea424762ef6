"""Models and loops that are a little unusual train as they do in memory, or are refused with a reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from toy_models import SETTINGS

import offload
from offload.errors import ConfigError, StateError
from offload.optim import default_param_groups, updater
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


def adamw(model: torch.nn.Module) -> torch.optim.AdamW:
    options = SETTINGS["optimizer"]
    groups = default_param_groups(model.named_parameters(), options.weight_decay)
    return torch.optim.AdamW(groups, lr=options.lr, betas=options.betas, eps=options.eps)


def batch(step: int) -> torch.Tensor:
    return torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(step))


def compare(build: Any, step_of: Any, disk: Path, steps: int = 4, **settings: Any) -> Any:
    """Train the same model streamed and in memory and compare masters; return both models."""
    model, plain = build(), build()
    optimizer = adamw(plain)
    with attach(model, disk, **settings) as runtime:
        for step in range(steps):
            step_of(model, step)
            runtime.step()
            step_of(plain, step)
            optimizer.step()
            optimizer.zero_grad()
        found = {
            name: value.clone() for _, unit in runtime.parameters_by_unit() for name, value in unit.items()
        }
    for name, value in plain.named_parameters():
        torch.testing.assert_close(found[name], value.detach(), rtol=1e-5, atol=1e-6, msg=name)
    return model, plain


# One update in flight, one visit ahead, two staging slots; found by lowering it until it was refused.
MINIMAL = {"host_memory": "156KiB", "device_memory": "16KiB", "activations_nbytes": 1 << 17}


def test_two_calls_of_the_model_in_one_loss_sum_their_gradients(tmp_path: Path) -> None:
    def step_of(model: torch.nn.Module, step: int) -> None:
        (model(batch(step)).square().mean() + model(batch(step + 100)).square().mean()).backward()

    compare(lambda: stack(8), step_of, tmp_path)


def test_a_forward_whose_graph_is_dropped_expects_no_backward(tmp_path: Path) -> None:
    def step_of(model: torch.nn.Module, step: int) -> None:
        for unused in range(100):
            model(batch(unused))
        model(batch(step)).square().mean().backward()

    compare(lambda: stack(8), step_of, tmp_path, activations_nbytes=32 * 4096)


def test_a_forward_whose_graph_is_kept_without_a_backward_does_not_stop_the_step(tmp_path: Path) -> None:
    kept = []

    def step_of(model: torch.nn.Module, step: int) -> None:
        kept.append(model(batch(step + 100)))
        model(batch(step)).square().mean().backward()

    compare(lambda: stack(8), step_of, tmp_path)


def test_a_step_after_a_forward_alone_is_refused(tmp_path: Path) -> None:
    model = stack()
    with attach(model, tmp_path) as runtime:
        loss = model(batch(0)).sum()
        with pytest.raises(StateError, match="without a backward"):
            runtime.step()
        loss.backward()
        runtime.step()


def test_units_called_twice_train_with_the_smallest_budgets(tmp_path: Path) -> None:
    def step_of(model: torch.nn.Module, step: int) -> None:
        model(model(batch(step))).square().mean().backward()

    compare(lambda: stack(8), step_of, tmp_path, **MINIMAL)


def test_a_second_backward_of_one_graph_is_refused(tmp_path: Path) -> None:
    model = torch.nn.ModuleList([torch.nn.Linear(WIDTH, WIDTH), torch.nn.Linear(WIDTH, WIDTH)])
    with attach(model, tmp_path):
        loss = model[0](batch(0)).sum() + model[1](batch(0)).sum()
        loss.backward(retain_graph=True)
        with pytest.raises(StateError, match="a second time"):
            loss.backward()
