"""`offload.attach(model, plan)` obeys a plan, and refuses one that is for something else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from planner_cases import machine, question
from toy_models import LENGTH, ROWS, build, train

import offload
from offload.errors import ConfigError
from offload.optim import AdamWOptions
from offload.planner import TrainingPlan, describe_model, plan_training
from offload.sizes import GIB, MIB
from offload.specs import Tier


def make_plan(model: torch.nn.Module, *, drives: int = 1, **changes: Any) -> TrainingPlan:
    asked = question(
        machine(memory=GIB, device=None, drives=drives),
        **{"host_memory": 96 * MIB, "device_memory": 64 * MIB, "batch": ROWS, "length": LENGTH} | changes,
    )
    plan = plan_training(asked, describe_model(model, "toy")).plan
    assert plan is not None
    return plan


@pytest.mark.parametrize("home", list(Tier))
@pytest.mark.parametrize("clip", [None, 1.0])
def test_a_plan_is_obeyed(home, clip, tmp_path: Path) -> None:
    model = build("llama")
    plan = make_plan(model, home=home, max_grad_norm=clip, rows=2)
    optimizer = AdamWOptions(lr=1e-3)
    with offload.attach(model, plan, disk=tmp_path, optimizer=optimizer) as runtime:
        train("llama", runtime, model, range(2))
        runtime.synchronize()
        stats = runtime.stats()
        options = runtime._parts.options
    assert runtime.plan == plan.memory
    assert (options.rows, options.max_grad_norm, options.resolved_home) == (2, clip, home)
    assert options.optimizer is optimizer
    assert stats.host_high_water_nbytes == plan.memory.host_nbytes
    assert stats.device_high_water_nbytes == plan.memory.device_nbytes


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ("gpt2", r"model\.embed_tokens\.weight is not in this one, and \d+ more; plan this one"),
        ("qwen3", r"the plan is for another model: .* in the plan"),
    ],
)
def test_a_plan_for_another_model_is_refused_with_what_differs(other, said, tmp_path: Path) -> None:
    plan = make_plan(build("llama"))
    with pytest.raises(ConfigError, match=said):
        offload.attach(build(other), plan, disk=tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_plan_for_a_model_that_trains_everything_is_refused_where_a_parameter_is_frozen(tmp_path) -> None:
    model = build("llama")
    plan = make_plan(model)
    name = next(name for name, _ in model.named_parameters() if name.endswith("up_proj.weight"))
    model.get_parameter(name).requires_grad_(False)
    with pytest.raises(ConfigError, match=rf"{name} is \[.*\] frozen in unit .*, and \[.*\] trained in unit"):
        offload.attach(model, plan, disk=tmp_path)


def test_what_the_plan_decides_cannot_be_given_beside_it(tmp_path: Path) -> None:
    model = build("llama")
    with pytest.raises(ConfigError, match="the plan decides host_memory, rows: leave that out"):
        offload.attach(model, make_plan(model), disk=tmp_path, host_memory="1GiB", rows=1)


def test_a_plan_for_two_drives_is_not_carried_out_on_one(tmp_path: Path) -> None:
    model = build("llama")
    with pytest.raises(ConfigError, match="the plan is for 2 drives, and 1 are given"):
        offload.attach(model, make_plan(model, drives=2), disk=tmp_path)
