"""What a training loop may do with an attached model, and what it is told when it may not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from toy_models import SETTINGS, build, loss_of, make_batch, train

import offload
from offload.errors import CapacityError, ConfigError, StateError, StorageError, UnitError
from offload.store import Store


@pytest.fixture
def attached(tmp_path: Path) -> Any:
    model = build("llama")
    with offload.attach(model, disk=[tmp_path], **SETTINGS) as runtime:
        yield model, runtime


def masters(runtime: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone() for _, unit in runtime.parameters_by_unit() for name, value in unit.items()}


def test_masters_are_the_model_s_own_values_before_the_first_step(tmp_path: Path) -> None:
    model = build("llama")
    expected = {name: value.detach().clone() for name, value in model.named_parameters()}
    with offload.attach(model, disk=[tmp_path], **SETTINGS) as runtime:
        found = masters(runtime)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_step_without_backward_is_refused(attached: Any) -> None:
    _, runtime = attached
    with pytest.raises(StateError, match="without a backward"):
        runtime.step()


def test_second_forward_after_an_update_is_refused_before_step(attached: Any) -> None:
    model, _ = attached
    loss_of("llama", model, make_batch("llama", 0)).backward()
    with pytest.raises(StateError, match="call runtime.step\\(\\) after every backward"):
        loss_of("llama", model, make_batch("llama", 1))


def test_evaluation_between_steps_sees_the_updated_weights(tmp_path: Path) -> None:
    model = build("mlp").eval()
    with offload.attach(model, disk=[tmp_path], dtype="float32", **SETTINGS) as runtime:
        train("mlp", runtime, model, range(2))
        inputs, _ = make_batch("mlp", 9)
        with torch.no_grad():
            streamed = model(inputs)
        plain = runtime.detach()
        with torch.no_grad():
            assert torch.equal(plain(inputs), streamed)


def test_generation_with_a_cache_equals_the_plain_model(tmp_path: Path) -> None:
    model, plain = build("llama").eval(), build("llama").eval()
    tokens, _ = make_batch("llama", 0)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    with offload.attach(model, disk=[tmp_path], dtype="float32", **SETTINGS):
        streamed = model.generate(tokens, **options)
    assert torch.equal(streamed, plain.generate(tokens, **options))


def test_state_dict_and_save_pretrained_never_hand_out_placeholders(attached: Any, tmp_path: Path) -> None:
    model, _ = attached
    with pytest.raises(StateError, match="runtime.export"):
        model.state_dict()
    with pytest.raises(StateError, match="runtime.export"):
        model.save_pretrained(tmp_path / "out")


def test_clipping_a_streamed_gradient_is_refused(attached: Any) -> None:
    model, _ = attached
    loss_of("llama", model, make_batch("llama", 0)).backward()
    with pytest.raises(StateError, match=r"streamed gradient.*runtime\.clip_grad_norm_"):
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)


def test_detach_gives_back_a_model_that_works_alone(tmp_path: Path) -> None:
    model = build("gpt2")
    runtime = offload.attach(model, disk=[tmp_path], **SETTINGS)
    train("gpt2", runtime, model, range(2))
    expected = masters(runtime)
    plain = runtime.detach()
    assert plain is model
    assert all(torch.equal(value, expected[name]) for name, value in plain.named_parameters())
    assert plain.lm_head.weight is plain.transformer.wte.weight
    assert torch.isfinite(loss_of("gpt2", plain, make_batch("gpt2", 3)))
    plain.state_dict()


def test_frozen_parameters_stay_and_trainable_ones_move(tmp_path: Path) -> None:
    model = build("qwen3")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("mlp" in name)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    with offload.attach(model, disk=[tmp_path], **SETTINGS) as runtime:
        train("qwen3", runtime, model, range(3))
        after = masters(runtime)
    for name, value in before.items():
        assert torch.equal(after[name], value) == ("mlp" not in name), name


def test_frozen_and_trainable_units_stream_as_resident(tmp_path: Path) -> None:
    def run(**settings: Any) -> list[float]:
        model = build("qwen3")
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("q_proj" in name or "norm" in name)
        torch.manual_seed(3)
        with offload.attach(model, **SETTINGS, **settings) as runtime:
            return train("qwen3", runtime, model, range(6))

    assert run(disk=[tmp_path]) == run()


def test_a_unit_used_twice_and_defined_out_of_order_trains_as_in_memory(tmp_path: Path) -> None:
    class Odd(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = torch.nn.Linear(16, 4)
            self.blocks = torch.nn.ModuleList(torch.nn.Linear(16, 16) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for block in (*self.blocks, self.blocks[0]):
                x = torch.tanh(block(x))
            return self.head(x)

    def losses(model: torch.nn.Module, end_step: Any) -> list[float]:
        found = []
        for step in range(6):
            x = torch.randn(5, 16, generator=torch.Generator().manual_seed(step))
            loss = model(x).square().mean()
            loss.backward()
            end_step()
            found.append(loss.item())
        return found

    torch.manual_seed(0)
    model = Odd()
    torch.manual_seed(0)
    plain = Odd()
    matrices = [value for value in plain.parameters() if value.dim() > 1]
    vectors = [value for value in plain.parameters() if value.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}], lr=1e-2
    )

    def plain_step() -> None:
        optimizer.step()
        optimizer.zero_grad()

    with offload.attach(model, disk=[tmp_path], dtype="float32", **SETTINGS) as runtime:
        streamed = losses(model, runtime.step)
    assert streamed == pytest.approx(losses(plain, plain_step), rel=1e-6)


def test_an_output_the_loss_does_not_use_does_not_stop_the_step(tmp_path: Path) -> None:
    model = build("llama")
    with offload.attach(model, disk=[tmp_path], **SETTINGS) as runtime:
        # The head runs forward but the loss comes from the hidden states: its part never arrives.
        hidden = model(input_ids=make_batch("llama", 0)[0], output_hidden_states=True).hidden_states[-1]
        hidden.square().mean().backward()
        runtime.step()
        train("llama", runtime, model, range(1, 3))
        runtime.synchronize()
        assert runtime.committed_step == 3


def test_a_failing_unit_makes_the_step_fail_and_keeps_the_last_commit(tmp_path: Path) -> None:
    model = build("mlp")
    runtime = offload.attach(model, disk=[tmp_path], **SETTINGS)
    train("mlp", runtime, model, range(2))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        model(torch.ones(2, 31))
    with pytest.raises(StateError, match="(?s)cannot be completed.*resume the run at step [12]"):
        runtime.step()
    runtime.close()


def test_a_write_error_in_the_background_surfaces_in_the_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build("mlp")
    runtime = offload.attach(model, disk=[tmp_path], **SETTINGS)

    def fail(*_: Any, **__: Any) -> None:
        raise StorageError("the drive is gone", errno=5, path=str(tmp_path))

    monkeypatch.setattr(Store, "write", fail)

    def loop() -> None:
        train("mlp", runtime, model, range(3))
        runtime.synchronize()

    with pytest.raises(StorageError, match="the drive is gone"):
        loop()
    assert runtime.committed_step == 0
    runtime.close()


def test_budgets_too_small_are_refused_before_anything_is_touched(tmp_path: Path) -> None:
    model = build("llama")
    settings = {**SETTINGS, "host_memory": "16KiB", "device_memory": "8KiB", "activations_nbytes": 4096}
    with pytest.raises(
        CapacityError, match="set host_memory to at least(?s:.*)set device_memory to at least"
    ):
        offload.attach(model, disk=[tmp_path], **settings)
    assert not any(tmp_path.iterdir())
    assert not any(parameter.is_meta for parameter in model.parameters())


def test_saved_inputs_beyond_their_budget_are_refused_with_numbers(tmp_path: Path) -> None:
    model = build("llama")
    with (
        offload.attach(model, disk=[tmp_path], **{**SETTINGS, "activations_nbytes": 4096}) as runtime,
        pytest.raises(CapacityError, match="saved inputs"),
    ):
        train("llama", runtime, model, range(1))


def test_peaks_stay_within_budgets(tmp_path: Path) -> None:
    model = build("llama")
    with offload.attach(model, disk=[tmp_path], **SETTINGS) as runtime:
        train("llama", runtime, model, range(3))
        stats = runtime.stats()
    assert 0 < stats.host_high_water_nbytes <= 64 << 20
    assert 0 < stats.device_high_water_nbytes <= 64 << 20


def test_an_unknown_option_is_refused_with_a_suggestion() -> None:
    with pytest.raises(ConfigError, match="did you mean 'host_memory'"):
        offload.attach(build("mlp"), host_memroy="1GiB")


def test_a_model_without_units_is_refused() -> None:
    with pytest.raises(UnitError):
        offload.attach(torch.nn.Linear(4, 4), **SETTINGS)


@pytest.mark.parametrize("parks", [False, True])
def test_closing_twice_and_calling_after_close(parks: bool, tmp_path: Path) -> None:
    model = build("mlp")
    runtime = offload.attach(model, disk=[tmp_path], park_gradients=parks, **SETTINGS)
    runtime.close()
    runtime.close()
    for act in (runtime.step, runtime.synchronize, runtime.snapshots):
        with pytest.raises(StateError, match="closed"):
            act()
