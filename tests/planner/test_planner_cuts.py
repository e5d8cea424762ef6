"""Models whose units are larger than the device: the planner cuts them as `offload.attach` does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from planner_cases import machine, question, shape
from transformers import LlamaConfig, LlamaForCausalLM

import offload
from offload.planner import ModelFacts, TrainingPlan, describe_model
from offload.planner.inputs import saved_inputs
from offload.planner.layout import Choice, lay_out
from offload.planner.plan import Lack
from offload.sizes import GIB, MIB
from offload.specs import Tier

DISK = Choice(Tier.DISK, "8bit", None)
ROWS, LENGTH, HIDDEN, INTERMEDIATE, LAYERS = 2, 8, 256, 768, 2


def build() -> LlamaForCausalLM:
    """A model whose decoder layers take 3.4 MB in fp32, and their largest linears 0.8 MB."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=4,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config).train()


def plan_with(device_memory: int, facts: ModelFacts) -> TrainingPlan | Lack:
    asked = question(
        machine(memory=GIB, device=None),
        host_memory=64 * MIB,
        device_memory=device_memory,
        batch=ROWS,
        length=LENGTH,
        moments="8bit",
    )
    return lay_out(asked, facts, DISK)


def test_the_less_memory_the_finer_the_cut_and_attach_takes_the_same(tmp_path: Path) -> None:
    facts = describe_model(build(), "llama")
    plans: dict[int, TrainingPlan] = {}
    for size in range(24, 0, -1):
        plan = plan_with(size * MIB, facts)
        if isinstance(plan, Lack):
            assert plan.tier is Tier.DEVICE
            break
        plans[plan.num_units] = plan
    assert list(plans) == sorted(plans) == [len(cut.units) for cut in facts.cuts]
    for count, plan in plans.items():
        directory = tmp_path / str(count)
        directory.mkdir()
        model = build()
        tokens = torch.zeros(ROWS, LENGTH, dtype=torch.long)
        with offload.attach(model, disk=[directory], device="cpu", **plan.settings) as runtime:
            model(input_ids=tokens, labels=tokens).loss.backward()
            runtime.step()
            runtime.synchronize()
            assert len(runtime._parts.units) == count
            assert runtime.plan == plan.memory
            assert runtime.stats().disk_written_nbytes == plan.step_written_nbytes
            # Every saved input of the step, once, in whole pages.
            assert runtime._parts.activations._heap.high_water_nbytes == plan.traffic.saved_inputs_nbytes


def test_saved_inputs_and_kept_activations_of_parts_are_counted_by_their_widths() -> None:
    facts = describe_model(build(), "llama")
    whole, parts, linears = facts.cuts
    page = 4096
    tokens = ROWS * LENGTH * 4
    hidden, wide = (-(-tokens * width // page) * page for width in (HIDDEN, INTERMEDIATE))
    assert saved_inputs(whole, ROWS, LENGTH, 4).nbytes == (LAYERS + 2) * hidden
    assert saved_inputs(parts, ROWS, LENGTH, 4).nbytes == (4 * LAYERS + 2) * hidden
    # Both projections save the input that they share.
    assert saved_inputs(linears, ROWS, LENGTH, 4).nbytes == LAYERS * (5 * hidden + wide) + 2 * hidden
    assert [cut.between_width for cut in (whole, parts, linears)] == [0, 0, LAYERS * 3 * INTERMEDIATE]


def test_what_autograd_keeps_between_parts_is_what_is_counted() -> None:
    model = build()
    facts = list(describe_model(model, "llama").cuts)[2]
    plans = (plan_with(size * MIB, describe_model(model, "llama")) for size in range(24, 0, -1))
    plan = next(one for one in plans if isinstance(one, TrainingPlan) and one.num_units == len(facts.units))
    kept: dict[int, torch.Tensor] = {}
    settings = {"device": "cpu", "home": "host", "host_memory": "64MiB"}
    with offload.attach(model, device_memory=plan.options.device_memory, **settings):
        layer = model.model.layers[0]
        x = torch.ones(ROWS, LENGTH, HIDDEN, requires_grad=True)

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            layer.mlp(x)
    assert sum(tensor.numel() for tensor in kept.values()) == ROWS * LENGTH * facts.between_width // LAYERS


@pytest.mark.parametrize("name", ["llama-7b", "llama-65b"])
def test_a_published_model_is_cut_only_where_the_device_is_small(name: str) -> None:
    facts = shape(name)
    large = question(machine(memory=GIB << 10, device=24 * GIB), moments="8bit", batch=1)
    plan = lay_out(large, facts, DISK)
    assert isinstance(plan, TrainingPlan) and plan.num_units == len(facts.units)
