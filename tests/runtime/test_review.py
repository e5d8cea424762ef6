"""Models and loops that are a little unusual train as they do in memory, or are refused with a reason."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from toy_models import SETTINGS

import offload
from offload.errors import ConfigError, StateError
from offload.optim import default_param_groups, updater
from offload.tiers.transfer import Transfer

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
MINIMAL = {"host_memory": "152KiB", "device_memory": "16KiB", "activations_nbytes": 1 << 17}


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


def test_a_forward_under_autocast_is_recomputed_under_autocast(tmp_path: Path) -> None:
    def step_of(model: torch.nn.Module, step: int) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(batch(step)).float().square().mean()
        loss.backward()

    compare(stack, step_of, tmp_path)


def test_a_gradient_of_a_gradient_is_refused(tmp_path: Path) -> None:
    model = stack()
    with attach(model, tmp_path):
        x = batch(0).requires_grad_()
        with pytest.raises(StateError, match="create_graph=True"):
            torch.autograd.grad(model(x).sum(), x, create_graph=True)


class Halves(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x.mul_(0.5)
        return self.linear(x)


def test_a_unit_that_changes_its_input_in_place_is_refused(tmp_path: Path) -> None:
    model = stack(2, Halves)
    with attach(model, tmp_path), pytest.raises(StateError, match="unit '0' changes an argument in place"):
        model(batch(0))


def test_an_input_changed_in_place_after_its_unit_does_not_change_the_gradient(tmp_path: Path) -> None:
    def masters(change: bool) -> list[torch.Tensor]:
        model = stack()
        with attach(model, tmp_path) as runtime:
            hidden = model[0](batch(0))
            result = model[1](hidden)
            if change:
                hidden.detach().zero_()
            result.square().mean().backward()
            runtime.step()
            units = [unit for _, unit in runtime.parameters_by_unit()]
            return [value for unit in units for value in unit.values()]

    for changed, unchanged in zip(masters(True), masters(False), strict=True):
        assert torch.equal(changed, unchanged)


@dataclass
class Wrapped:
    value: torch.Tensor


class Wrapping(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> Wrapped:
        return Wrapped(self.linear(x))


def test_tensors_that_pytree_does_not_see_in_an_output_are_refused(tmp_path: Path) -> None:
    model = stack(2, Wrapping)
    with attach(model, tmp_path), pytest.raises(StateError, match="a unit returned a Wrapped, which holds"):
        model[0](batch(0))


def test_a_unit_called_with_no_rows_trains_as_in_memory(tmp_path: Path) -> None:
    def step_of(model: torch.nn.Module, step: int) -> None:
        x = model[0](batch(step))
        (model[1](x[:0]).sum() + model[2](x).square().mean()).backward()

    compare(stack, step_of, tmp_path)


class Complex(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.fft.fft(self.linear(x.real))


def test_a_complex_output_passes_its_gradient_on(tmp_path: Path) -> None:
    def step_of(model: torch.nn.Module, step: int) -> None:
        model(batch(step).to(torch.complex64)).abs().square().mean().backward()

    compare(lambda: stack(2, Complex), step_of, tmp_path)


class Mixing(torch.nn.Module):
    """Takes nested and keyword tensors and returns a tuple with a None in it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor, pair: Any, *, scale: torch.Tensor, position: torch.Tensor) -> Any:
        return torch.tanh(self.linear(x) * scale + pair["a"][0] + position), None, {"scale": scale * 2}


class Mixture(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = torch.nn.Linear(WIDTH, WIDTH)
        self.blocks = torch.nn.ModuleList(Mixing() for _ in range(4))

    def forward(self, x: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        shared = self.first(x)
        scale = shared.mean(-1, keepdim=True)
        h = x
        for block in self.blocks:
            h, nothing, more = block(h, {"a": (shared, 3)}, scale=scale, position=position)
            assert nothing is None
            h = h + more["scale"]
        return h


@pytest.mark.parametrize("rows", [None, 1, 3])
def test_tensors_shared_by_all_units_get_their_whole_gradient(rows: int | None, tmp_path: Path) -> None:
    found: dict[bool, list[torch.Tensor]] = {True: [], False: []}

    def step_of(model: torch.nn.Module, step: int) -> None:
        inputs = batch(step).unsqueeze(1).repeat(1, 5, 1).requires_grad_()
        position = torch.linspace(0, 1, 5 * WIDTH).view(1, 5, WIDTH).requires_grad_()
        model(inputs, position).square().mean().backward()
        streamed = hasattr(model.first, "forward") and "forward" in vars(model.first)
        found[streamed] += [inputs.grad, position.grad]

    compare(Mixture, step_of, tmp_path, rows=rows)
    for streamed, plain in zip(found[True], found[False], strict=True):
        torch.testing.assert_close(streamed, plain, rtol=1e-5, atol=1e-7)


def pairs() -> torch.nn.Sequential:
    def block() -> torch.nn.Module:
        return torch.nn.Sequential(torch.nn.Linear(64, 64, bias=False), torch.nn.Linear(64, 64, bias=False))

    return stack(2, block)


def resume(model: torch.nn.Module, run_id: str, disk: Path, **settings: Any) -> Any:
    return attach(model, disk, run_id=run_id, resume=True, **settings)


def test_resume_with_another_chunk_numel_is_refused(tmp_path: Path) -> None:
    with attach(pairs(), tmp_path) as runtime:
        run_id = runtime.run_id
    with pytest.raises(ConfigError, match="begun with chunk_numel=4096, not 2048"):
        resume(pairs(), run_id, tmp_path, chunk_numel=2048)


def test_resume_with_other_parameters_frozen_is_refused(tmp_path: Path) -> None:
    model, other = pairs(), pairs()
    model[0][0].weight.requires_grad_(False)
    other[0][1].weight.requires_grad_(False)
    with attach(model, tmp_path) as runtime:
        run_id = runtime.run_id
    with pytest.raises(ConfigError, match="what is frozen"):
        resume(other, run_id, tmp_path)


def test_resume_with_other_budgets_and_homes_continues_bit_for_bit(tmp_path: Path) -> None:
    def steps(model: torch.nn.Module, runtime: Any, which: range) -> list[float]:
        losses = []
        for step in which:
            loss = model(batch(step)).square().mean()
            loss.backward()
            runtime.step()
            losses.append(loss.item())
        return losses

    model = stack(8)
    with attach(model, tmp_path) as runtime:
        expected = steps(model, runtime, range(9))
    model = stack(8)
    with attach(model, tmp_path) as runtime:
        found = steps(model, runtime, range(3))
        run_id = runtime.run_id
    for which, settings in ((range(3, 6), MINIMAL), (range(6, 9), {"home": "host"})):
        model = stack(8)
        with resume(model, run_id, tmp_path, **settings) as runtime:
            found += steps(model, runtime, which)
    assert found == expected


def test_an_evaluation_between_backward_and_step_is_refused(tmp_path: Path) -> None:
    model = stack()
    with attach(model, tmp_path) as runtime:
        model(batch(0)).sum().backward()
        with torch.no_grad(), pytest.raises(StateError, match="already updated in this step"):
            model(batch(0))
        runtime.step()
        with torch.no_grad():
            model(batch(0))


def test_a_learning_rate_changed_between_backward_and_step_is_refused(tmp_path: Path) -> None:
    model = stack()
    with attach(model, tmp_path) as runtime:
        model(batch(0)).sum().backward()
        runtime.optimizer.param_groups[0]["lr"] = 1.0
        with pytest.raises(StateError, match="changed between backward"):
            runtime.step()
        assert runtime.global_step == 0


def test_the_state_of_a_step_is_the_one_at_its_call(tmp_path: Path) -> None:
    model = stack()
    seen: list[int] = []
    with attach(model, tmp_path) as runtime:
        for step in range(3):
            model(batch(step)).sum().backward()
            seen.append(step)
            runtime.step({"seen": seen})
            seen.append(-1)
        run_id = runtime.run_id
    with resume(stack(), run_id, tmp_path) as runtime:
        assert runtime.state == {"seen": [0, -1, 1, -1, 2]}


def test_a_state_that_is_not_json_is_refused_by_the_step_it_was_given_to(tmp_path: Path) -> None:
    model = stack()
    with attach(model, tmp_path) as runtime:
        model(batch(0)).sum().backward()
        with pytest.raises(TypeError, match="not JSON serializable"):
            runtime.step({"loss": torch.ones(1)})
        runtime.step({"loss": 1.0})


def test_load_state_dict_of_an_attached_model_is_refused(tmp_path: Path) -> None:
    model, values = stack(), stack().state_dict()
    with attach(model, tmp_path), pytest.raises(StateError, match="load them before"):
        model.load_state_dict(values)
    model = stack()
    with attach(model, tmp_path) as runtime:
        runtime.detach()
    model.load_state_dict(values)


def test_an_error_in_an_evaluation_does_not_end_the_run(tmp_path: Path) -> None:
    model = stack()
    with attach(model, tmp_path) as runtime:
        with torch.no_grad(), pytest.raises(RuntimeError, match="cannot be multiplied"):
            model(torch.ones(2, 3))
        model(batch(0)).sum().backward()
        runtime.step()


class Calling(torch.nn.Module):
    def __init__(self, other: torch.nn.Module) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(WIDTH, WIDTH)
        self.others = (other,)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.others[0](x))


def test_a_unit_that_calls_another_unit_is_refused(tmp_path: Path) -> None:
    first = torch.nn.Linear(WIDTH, WIDTH)
    model = torch.nn.Sequential(first, Calling(first))
    with attach(model, tmp_path), pytest.raises(StateError, match="'0' was called while unit '1' runs"):
        model(batch(0))


def test_running_statistics_count_a_batch_once(tmp_path: Path) -> None:
    def block() -> torch.nn.Module:
        return torch.nn.Sequential(torch.nn.Linear(WIDTH, WIDTH), torch.nn.BatchNorm1d(WIDTH))

    def step_of(model: torch.nn.Module, step: int) -> None:
        model(batch(step)).square().mean().backward()

    model, plain = compare(lambda: stack(3, block), step_of, tmp_path, steps=1)
    for found, expected in zip(model.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(found, expected)


def test_the_fetch_thread_outlives_a_record_that_is_no_longer_wanted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin_read = Transfer._begin_read
    calls = []

    def unwanted_at_first(self: Transfer, owner: str, *, block: bool) -> Any:
        # As when the model took another path while the thread waited for a slot.
        calls.append(owner)
        return None if len(calls) == 1 else begin_read(self, owner, block=block)

    monkeypatch.setattr(Transfer, "_begin_read", unwanted_at_first)
    model = stack()
    with attach(model, tmp_path) as runtime:
        model(batch(0)).sum().backward()
        runtime.step()
    assert len(calls) > 1
