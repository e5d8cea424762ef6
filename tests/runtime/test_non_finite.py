"""A step with a loss or gradient that is not finite leaves nothing behind."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from toy_models import SETTINGS, record_bytes

import offload
from offload.errors import ConfigError, StateError

WIDTH = 32


class Block(torch.nn.Module):
    """A linear layer whose weight, and nothing else, gets a NaN gradient while `poison` is set."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(WIDTH, WIDTH)
        self.poison = math.nan
        self.poisoned = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.linear.weight * 1.0
        if self.poisoned and weight.requires_grad:
            weight.register_hook(lambda gradient: gradient.index_fill(0, torch.tensor([3]), self.poison))
        return torch.tanh(torch.nn.functional.linear(x, weight, self.linear.bias))


def build() -> torch.nn.Sequential:
    torch.manual_seed(0)
    return torch.nn.Sequential(*(Block() for _ in range(7)))


def backward(model: Any, number: int) -> float:
    inputs = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(number))
    loss = model(inputs).square().mean()
    loss.backward()
    return float(loss.detach())


def poison(model: Any, on: bool, value: float = math.nan, unit: int = 3) -> None:
    model[unit].poisoned, model[unit].poison = on, value


# What keeps a bad step away: parked gradients, wherever the records rest, or a disk to read the state
# before from.
MODES: dict[str, dict[str, Any]] = {
    "parked, disk": {"disk": True, "max_grad_norm": 1.0},
    "parked, disk, save_steps": {"disk": True, "max_grad_norm": 1.0, "save_steps": 3},
    "parked, device": {"park_gradients": True, "home": "device"},
    "parked, host": {"park_gradients": True, "home": "host"},
    "rolled back, disk": {"disk": True},
    "rolled back, disk, 8-bit moments": {"disk": True, "moments": "8bit"},
    "rolled back, host": {"disk": True, "home": "host"},
    "rolled back, device": {"disk": True, "home": "device"},
}


def attach(model: Any, folder: Path, mode: str, **settings: Any) -> Any:
    chosen = {**MODES[mode], **settings}
    chosen["disk"] = [folder] if chosen.get("disk") else []
    return offload.attach(model, **SETTINGS, **chosen)


def train(
    batches: list[int], bad: dict[int, float], folder: Path, mode: str, unit: int = 3, **settings: Any
) -> Any:
    """Train on batches, with a poisoned gradient in some; return losses, norms, records and the counts."""
    model = build()
    losses, norms = [], []
    with attach(model, folder, mode, **settings) as runtime:
        for number in batches:
            poison(model, number in bad, bad.get(number, 0.0), unit)
            loss = backward(model, number)
            assert runtime.step({"next": number + 1}) is (number not in bad)
            if number in bad:
                assert not math.isfinite(runtime.grad_norm)
            else:
                losses.append(loss)
                norms.append(runtime.grad_norm)
        runtime.synchronize()
        return (losses, norms, record_bytes(runtime), runtime.global_step), runtime.skipped_steps


# The first unit's gradient comes last, when the others were updated and some of them fetched again.
@pytest.mark.parametrize("unit", [0, 3])
@pytest.mark.parametrize("mode", MODES)
def test_a_skipped_batch_leaves_the_run_as_one_that_never_saw_it(
    mode: str, unit: int, tmp_path: Path
) -> None:
    bad = {2: math.nan, 4: math.inf}
    found, skipped = train([0, 1, 2, 3, 4, 5], bad, tmp_path, mode, unit, on_non_finite="skip")
    expected, none = train([0, 1, 3, 5], {}, tmp_path, mode)
    assert found == expected
    assert (skipped, none) == (2, 0)


@pytest.mark.parametrize("mode", MODES)
def test_the_first_step_may_be_the_bad_one(mode: str, tmp_path: Path) -> None:
    found, _ = train([9, 0, 1], {9: math.nan}, tmp_path, mode, on_non_finite="skip")
    assert found == train([0, 1], {}, tmp_path, mode)[0]


@pytest.mark.parametrize("mode", MODES)
def test_stop_raises_and_what_was_committed_is_what_is_there(mode: str, tmp_path: Path) -> None:
    model = build()
    with attach(model, tmp_path, mode) as runtime:
        backward(model, 0)
        runtime.step()
        before = record_bytes(runtime)
        poison(model, True)
        backward(model, 1)
        with pytest.raises(
            StateError, match="step 2: the gradient of unit '3' is not finite; nothing of this"
        ):
            runtime.step()
        assert record_bytes(runtime) == before
        # Who catches it may go on.
        poison(model, False)
        backward(model, 2)
        assert runtime.step()
        found = record_bytes(runtime)
    assert found == train([0, 2], {}, tmp_path, mode)[0][2]


def test_updates_that_cannot_be_undone_end_the_runtime() -> None:
    model = build()
    with offload.attach(model, **SETTINGS) as runtime:
        poison(model, True)
        backward(model, 0)
        with pytest.raises(StateError, match="cannot be undone"):
            runtime.step()
        with pytest.raises(StateError, match="cannot be completed"):
            backward(model, 1)


def test_uncommitted_steps_are_not_lost_silently(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="leave save_steps at 1"):
        offload.attach(build(), disk=[tmp_path], save_steps=2, on_non_finite="skip", **SETTINGS)


@pytest.mark.parametrize("mode", ["parked, disk", "rolled back, disk"])
def test_so_many_in_a_row_stop_the_run(mode: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = build()
    settings = {"on_non_finite": "skip", "max_non_finite_steps": 2}
    with attach(model, tmp_path, mode, **settings) as runtime, caplog.at_level(logging.WARNING, "offload"):
        for number, bad in enumerate([True, False, True]):
            poison(model, bad)
            backward(model, number)
            assert runtime.step() is not bad
        backward(model, 3)
        with pytest.raises(StateError, match=r"skipped 2 times in a row \(max_non_finite_steps\)"):
            runtime.step()
        assert runtime.skipped_steps == 3
    assert [record.message for record in caplog.records] == [
        "step 1: the gradient of unit '3' is not finite; skipped, nothing of it was applied",
        "step 2: the gradient of unit '3' is not finite; skipped, nothing of it was applied",
    ]


@pytest.mark.parametrize("mode", ["parked, disk", "rolled back, disk"])
def test_a_loss_may_be_given_up_before_its_backward(mode: str, tmp_path: Path) -> None:
    expected, _ = train([0, 1], {}, tmp_path, mode)
    model = build()
    kept = []
    with attach(model, tmp_path, mode, on_non_finite="skip") as runtime:
        backward(model, 0)
        runtime.step()
        kept.append(model(torch.full((4, WIDTH), math.nan)).mean())
        runtime.give_up_step("the loss is nan")
        # The graph of the step that was given up goes while the next is under way.
        inputs = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(1))
        loss = model(inputs).square().mean()
        kept.clear()
        loss.backward()
        runtime.step()
        assert record_bytes(runtime) == expected[2]


def test_a_backward_of_a_step_that_was_given_up_is_refused(tmp_path: Path) -> None:
    model = build()
    with attach(model, tmp_path, "parked, disk", on_non_finite="skip") as runtime:
        loss = model(torch.ones(4, WIDTH)).mean()
        runtime.give_up_step("the loss is nan")
        with pytest.raises(StateError, match="of a step that is over"):
            loss.backward()


def test_an_accumulated_gradient_is_given_up_whole(tmp_path: Path) -> None:
    expected, _ = train([0, 1], {}, tmp_path, "parked, disk")
    model = build()
    with attach(model, tmp_path, "parked, disk", on_non_finite="skip") as runtime:
        backward(model, 0)
        runtime.step()
        backward(model, 7)
        poison(model, True)
        backward(model, 8)
        assert not runtime.step()
        poison(model, False)
        backward(model, 1)
        runtime.step()
        assert record_bytes(runtime) == expected[2]


def test_a_run_resumes_behind_a_skipped_step(tmp_path: Path) -> None:
    expected, _ = train([0, 1, 3], {}, tmp_path, "rolled back, disk")
    model = build()
    with attach(model, tmp_path, "rolled back, disk", on_non_finite="skip") as runtime:
        for number, bad in ((0, False), (1, False), (2, True)):
            poison(model, bad)
            backward(model, number)
            runtime.step()
        run_id = runtime.run_id
    model = build()
    with attach(model, tmp_path, "rolled back, disk", run_id=run_id, resume=True) as runtime:
        assert runtime.global_step == 2
        backward(model, 3)
        runtime.step()
        assert record_bytes(runtime) == expected[2]
