"""A model whose units are cut into parts trains as the whole one does, bit for bit, and is found again."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from toy_models import BUILDERS, ROWS, SETTINGS, VOCAB, build, make_batch, train

import offload
from offload.errors import CapacityError, StateError
from offload.runtime.blueprint import Blueprint
from offload.runtime.memory import memory_request
from offload.runtime.options import RuntimeOptions
from offload.specs import Tier
from offload.tiers.memory_planning import smallest_plan
from offload.units import find_cuts

STEPS = 4
HOST = {"home": "host"}


def device_memory(model: torch.nn.Module, which: int) -> int:
    """The least device memory with which cut number `which` of `model` is streamed from disk or host."""
    blueprint = list(Blueprint.cuts(model, RuntimeOptions(home=Tier.HOST)))[which]
    request = memory_request(
        blueprint.options,
        blueprint.schedule,
        blueprint.records,
        blueprint.trains,
        activations_nbytes=0,
        loss_head=blueprint.loss_head,
    )
    least = smallest_plan(request)
    return least.device_nbytes + least.device_reserve_nbytes


def masters(runtime: Any) -> dict[str, bytes]:
    return {
        name: value.numpy().tobytes()
        for _, values in runtime.parameters_by_unit()
        for name, value in values.items()
    }


def run(name: str, **settings: Any) -> tuple[list[float], dict[str, bytes], int]:
    model = build(name)
    torch.manual_seed(7)
    with offload.attach(model, **(SETTINGS | settings)) as runtime:
        losses = train(name, runtime, model, range(STEPS))
        return losses, masters(runtime), len(runtime._parts.units)


@pytest.mark.parametrize("moments", ["float32", "8bit"])
@pytest.mark.parametrize("name", sorted({*BUILDERS} - {"mlp"}))
def test_every_cut_equals_the_resident_model_bit_for_bit(name: str, moments: str, tmp_path: Path) -> None:
    resident, expected, coarse = run(name, moments=moments)
    cuts = list(find_cuts(build(name)))
    assert len(cuts) == 3, "whole, layers into attention and MLP, MLPs into linears"
    for which, units in enumerate(cuts):
        directory = tmp_path / str(which)
        directory.mkdir()
        least = device_memory(build(name), which)
        losses, found, count = run(name, moments=moments, disk=[directory], device_memory=least)
        assert count == len(units)
        assert losses == resident
        assert found == expected
    assert count > coarse


@pytest.mark.parametrize("rows", [1, 2])
def test_micro_batches_inside_parts_add_up_to_the_same_sums(rows: int, tmp_path: Path) -> None:
    # Without dropout: parts draw for all rows of one module before those of the next.
    def trained(**settings: Any) -> tuple[list[float], dict[str, bytes]]:
        model = build("llama")
        for module in model.modules():
            if hasattr(module, "attention_dropout"):
                module.attention_dropout = 0.0
        with offload.attach(model, rows=rows, **(SETTINGS | settings)) as runtime:
            return train("llama", runtime, model, range(STEPS)), masters(runtime)

    least = device_memory(build("llama"), 2)
    assert trained(disk=[tmp_path], device_memory=least) == trained()


def test_a_cut_run_goes_on_bit_for_bit_with_any_budget_that_its_units_fit(tmp_path: Path) -> None:
    least = device_memory(build("llama"), 1)
    expected = run("llama", home="host", device_memory=least)
    model = build("llama")
    torch.manual_seed(7)
    with offload.attach(model, **(SETTINGS | {"disk": [tmp_path], "device_memory": least})) as runtime:
        losses = train("llama", runtime, model, range(2))
        going_on = {"disk": [tmp_path], "run_id": runtime.run_id, "resume": True}
    with pytest.raises(CapacityError, match="keeps the units that it was begun with"):
        offload.attach(build("llama"), **(SETTINGS | going_on | {"device_memory": least - 4096}))
    model = build("llama")
    # With so much memory a new run would not be cut.
    with offload.attach(model, **(SETTINGS | going_on)) as runtime:
        losses += train("llama", runtime, model, range(2, STEPS))
        assert (losses, masters(runtime), len(runtime._parts.units)) == expected


def test_a_run_that_was_not_cut_is_not_cut_when_it_goes_on_with_less(tmp_path: Path) -> None:
    with offload.attach(build("llama"), **(SETTINGS | {"disk": [tmp_path]})) as runtime:
        going_on = {"disk": [tmp_path], "run_id": runtime.run_id, "resume": True}
    less = device_memory(build("llama"), 0) - 4096
    with pytest.raises(CapacityError, match="device_memory: needs"):
        offload.attach(build("llama"), **(SETTINGS | going_on | {"device_memory": less}))


def test_an_export_of_a_cut_run_has_the_bytes_of_the_whole_one(tmp_path: Path) -> None:
    files = []
    for which in (0, 2):
        model = build("llama")
        least = device_memory(model, which)
        torch.manual_seed(7)
        with offload.attach(model, **(SETTINGS | HOST | {"device_memory": least})) as runtime:
            train("llama", runtime, model, range(2))
            folder = runtime.export(tmp_path / str(which))
        files.append({path.name: path.read_bytes() for path in folder.glob("*.safetensors")})
    assert files[0] == files[1] != {}


def test_a_cut_model_evaluates_and_generates_as_the_whole_one(tmp_path: Path) -> None:
    outputs = []
    for which in (0, 2):
        model = build("llama").eval()
        with offload.attach(model, **(SETTINGS | HOST | {"device_memory": device_memory(model, which)})):
            tokens = make_batch("llama", 0)[0]
            with torch.no_grad():
                outputs.append(
                    (model(tokens).logits, model.generate(tokens, max_new_tokens=4, do_sample=False))
                )
    assert torch.equal(outputs[0][0], outputs[1][0])
    assert torch.equal(outputs[0][1], outputs[1][1])


class Reader(torch.nn.Module):
    """A block whose forward computes with a child's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = torch.nn.Linear(32, 64), torch.nn.Linear(64, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.outer(torch.tanh(x @ self.inner.weight.T))


def test_a_block_that_reads_a_childs_weight_stays_whole_and_the_refusal_says_why() -> None:
    model = torch.nn.Sequential(Reader(), Reader(), torch.nn.Linear(32, VOCAB))
    assert len(list(find_cuts(model))) == 1
    least = device_memory(model, 0)
    with pytest.raises(CapacityError, match=r"'0'.* cut no further: its forward uses 'self.inner.weight'"):
        offload.attach(model, **(SETTINGS | HOST | {"device_memory": least - 4096}))
    with offload.attach(model, **(SETTINGS | HOST | {"device_memory": least})) as runtime:
        model(torch.ones(ROWS, 32)).sum().backward()
        runtime.step()


def test_a_part_that_is_given_a_placeholder_refuses_it() -> None:
    class Sly(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.outer = torch.nn.Linear(32, 32), torch.nn.Linear(32, 32)
            self.box = SimpleNamespace(box=SimpleNamespace(inner=self.inner))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x) + self.outer(self.box.box.inner.weight * 2.0)

    model = torch.nn.Sequential(Sly(), Sly())
    with offload.attach(model, **(SETTINGS | HOST | {"device_memory": device_memory(model, 1)})) as runtime:
        assert [unit.name for unit in runtime._parts.units] == ["0.inner", "0.outer", "1.inner", "1.outer"]
        with pytest.raises(StateError, match=r"unit '0.outer' was given a tensor on the meta device"):
            model(torch.ones(ROWS, 32))
