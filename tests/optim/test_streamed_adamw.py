"""Parameter groups, settings by name, and schedulers on the optimizer that holds no state."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import get_scheduler

from offload.errors import ConfigError, StateError
from offload.optim import AdamWOptions, ParameterSettings, StreamedAdamW, default_param_groups


def meta_model() -> torch.nn.Module:
    with torch.device("meta"):
        return torch.nn.Sequential(torch.nn.Embedding(5, 4), torch.nn.Linear(4, 4), torch.nn.LayerNorm(4))


def optimizer_of(model: torch.nn.Module, **options: float) -> StreamedAdamW:
    adamw = AdamWOptions(**options)  # type: ignore[arg-type]
    groups = default_param_groups(model.named_parameters(), adamw.weight_decay)
    return StreamedAdamW(groups, on_step=lambda: None, options=adamw)


def test_norms_and_biases_do_not_decay() -> None:
    optimizer = optimizer_of(meta_model(), weight_decay=0.1)
    decay = {name: optimizer.settings_for(name).weight_decay for name, _ in meta_model().named_parameters()}
    assert decay == {"0.weight": 0.1, "1.weight": 0.1, "1.bias": 0.0, "2.weight": 0.0, "2.bias": 0.0}


def test_frozen_parameters_are_in_no_group() -> None:
    model = meta_model()
    model[0].requires_grad_(False)  # type: ignore[index]
    optimizer = optimizer_of(model)
    with pytest.raises(ConfigError, match=r"no parameter group holds '0\.weight'"):
        optimizer.settings_for("0.weight")


def test_an_empty_group_is_left_out() -> None:
    groups = default_param_groups([("bias", torch.nn.Parameter(torch.zeros(3)))], 0.1)
    assert [group["weight_decay"] for group in groups] == [0.0]


def test_settings_are_those_of_the_group() -> None:
    one, two = (torch.nn.Parameter(torch.empty(2, 2, device="meta")) for _ in range(2))
    optimizer = StreamedAdamW(
        [
            {"params": [("one", one)], "lr": 1e-3, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.3},
            {"params": [("two", two)]},
        ],
        on_step=lambda: None,
        options=AdamWOptions(lr=2e-4),
    )
    assert optimizer.settings_for("one") == ParameterSettings(1e-3, 0.8, 0.95, 1e-6, 0.3)
    assert optimizer.settings_for("two") == ParameterSettings(2e-4, 0.9, 0.999, 1e-8, 0.01)


def test_bare_named_parameters_are_one_group() -> None:
    optimizer = StreamedAdamW(meta_model().named_parameters(), on_step=lambda: None)
    assert len(optimizer.param_groups) == 1
    assert optimizer.settings_for("2.bias").weight_decay == 0.01


def test_a_group_added_later_is_found() -> None:
    optimizer = optimizer_of(meta_model())
    late = torch.nn.Parameter(torch.empty(2, device="meta"))
    optimizer.add_param_group({"params": [("late", late)], "lr": 0.5})
    assert optimizer.settings_for("late").lr == 0.5


def test_parameters_without_names_are_refused() -> None:
    with pytest.raises(ConfigError, match="must come with names"):
        StreamedAdamW(meta_model().parameters(), on_step=lambda: None)  # type: ignore[arg-type]


def test_a_misspelt_group_key_gets_a_suggestion() -> None:
    named = list(meta_model().named_parameters())
    with pytest.raises(ConfigError, match="cannot have 'weight_decy'; did you mean 'weight_decay'"):
        StreamedAdamW([{"params": named, "weight_decy": 0.1}], on_step=lambda: None)
    with pytest.raises(ConfigError, match="cannot have 'amsgrad'"):
        StreamedAdamW([{"params": named, "amsgrad": True}], on_step=lambda: None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr must be finite and >= 0, got -1.0"),
        ({"lr": math.inf}, "lr must be finite"),
        ({"betas": (1.0, 0.9)}, r"beta1 must be in \[0, 1\), got 1.0"),
        ({"betas": (0.9, math.nan)}, r"beta2 must be in \[0, 1\), got nan"),
        ({"eps": 0.0}, "eps must be positive in fp32 and finite, got 0.0"),
        ({"weight_decay": -0.1}, "weight_decay must be finite and >= 0"),
        ({"num_threads": 0}, "num_threads must be >= 1, got 0"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        AdamWOptions(**options)  # type: ignore[arg-type]


def test_a_group_setting_out_of_range_is_refused() -> None:
    named = list(meta_model().named_parameters())
    with pytest.raises(ConfigError, match="beta2 must be"):
        StreamedAdamW([{"params": named, "betas": (0.9, 2.0)}], on_step=lambda: None)


def test_step_calls_the_runtime_once_and_zero_grad_does_nothing() -> None:
    calls: list[str] = []
    optimizer = StreamedAdamW(meta_model().named_parameters(), on_step=lambda: calls.append("step"))
    optimizer.zero_grad()
    optimizer.step()
    assert calls == ["step"]


def test_step_runs_a_closure_with_gradients_first() -> None:
    order: list[object] = []

    def closure() -> float:
        order.append(torch.is_grad_enabled())
        return 1.5

    optimizer = StreamedAdamW(meta_model().named_parameters(), on_step=lambda: order.append("step"))
    with torch.no_grad():
        assert optimizer.step(closure) == 1.5
    assert order == [True, "step"]


@pytest.mark.parametrize("name", ["linear", "cosine", "constant_with_warmup", "polynomial", "inverse_sqrt"])
def test_transformers_schedulers_set_the_same_rates_as_on_torch_adamw(name: str) -> None:
    model = meta_model()
    optimizer = optimizer_of(model, lr=1e-3)
    ordinary = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    ours, theirs = (get_scheduler(name, which, 3, 10) for which in (optimizer, ordinary))
    for _ in range(10):
        assert optimizer.settings_for("1.weight").lr == ordinary.param_groups[0]["lr"]
        for which, scheduler in ((optimizer, ours), (ordinary, theirs)):
            which.step()
            scheduler.step()


def test_one_cycle_changes_rate_and_beta1() -> None:
    optimizer = optimizer_of(meta_model(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=10)
    first = optimizer.settings_for("1.weight")
    optimizer.step()
    scheduler.step()
    second = optimizer.settings_for("1.weight")
    assert second.lr > first.lr
    assert second.beta1 < first.beta1


def test_a_learning_rate_may_be_a_tensor() -> None:
    optimizer = optimizer_of(meta_model())
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(0.25)
    assert optimizer.settings_for("1.weight").lr == 0.25


def test_state_dict_holds_settings_only_and_loads_back() -> None:
    optimizer = optimizer_of(meta_model(), lr=1e-3)
    optimizer.param_groups[0]["lr"] = 7e-4
    saved = optimizer.state_dict()
    assert saved["state"] == {}
    fresh = optimizer_of(meta_model(), lr=1e-3)
    fresh.load_state_dict(saved)
    assert fresh.settings_for("1.weight").lr == 7e-4
    fresh.param_groups[0]["lr"] = 6e-4
    assert fresh.settings_for("1.weight").lr == 6e-4


def test_loading_the_moments_of_another_optimizer_is_refused() -> None:
    parameter = torch.nn.Parameter(torch.zeros(2, 2))
    parameter.grad = torch.ones(2, 2)
    other = torch.optim.AdamW([("weight", parameter)])
    other.step()
    optimizer = StreamedAdamW([("weight", parameter)], on_step=lambda: None)
    with pytest.raises(StateError, match="live in the store"):
        optimizer.load_state_dict(other.state_dict())
