"""Which units may be cut into their parts, in which order these run, and what keeps a unit whole."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from test_unit_cut import DECODERS, decoder
from torch import nn
from torch.nn.utils import parametrizations

from offload.units import find_cuts, find_units, why_whole
from offload.units.opening import inspect_forward


def cuts(model: nn.Module) -> list[list[str]]:
    return [[unit.name for unit in units] for units in find_cuts(model)]


@pytest.mark.parametrize("family", DECODERS)
def test_every_decoder_layer_may_be_cut_into_its_parts(family: str) -> None:
    model = decoder(family)
    coarse, finer, *_ = find_cuts(model)
    assert coarse == find_units(model)
    assert len(finer) > len(coarse)
    owned = sorted(spec.name for unit in finer for spec in unit.layout.trainable)
    assert owned == sorted(name for name, _ in model.named_parameters())
    assert [unit.is_part for unit in finer] == [
        unit.name not in {one.name for one in coarse} for unit in finer
    ]


def test_a_llama_layer_is_cut_into_attention_norms_and_mlp_and_then_linears() -> None:
    coarse, finer, finest = cuts(decoder("Llama", num_hidden_layers=1))
    layer = "model.layers.0"
    parts = ["input_layernorm", "self_attn", "post_attention_layernorm"]
    assert coarse[1] == layer
    assert finer[1:-2] == [f"{layer}.{part}" for part in [*parts, "mlp"]]
    linears = ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    assert finest[1:-2] == [f"{layer}.{part}" for part in [*parts, *linears]]


def test_the_largest_units_are_cut_first() -> None:
    small, large = (nn.Sequential(nn.Linear(4, width), nn.Linear(width, 4)) for width in (8, 16))
    assert cuts(nn.Sequential(small, large)) == [
        ["0", "1"],
        ["0", "1.0", "1.1"],
        ["0.0", "0.1", "1.0", "1.1"],
    ]


class Block(nn.Module):
    """Two linears, and a forward that a test chooses."""

    limit = 2

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.both = [self.first, self.second]
        self.box = SimpleNamespace(second=self.second)
        self.closure = lambda: self.second.weight

    def twice(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.second(x))

    @property
    def last(self) -> torch.Tensor:
        return self.second.weight

    @functools.cached_property
    def kept(self) -> torch.Tensor:
        return self.second.weight


def block(forward: Callable[..., torch.Tensor]) -> nn.Module:
    return type("Chosen", (Block,), {"forward": forward})()


def reversed_order(self, x):
    return self.first(self.second(x))


def through_a_method(self, x, mask=None):
    if self.first is not None and not hasattr(self, "third"):
        x = self.first(x) * self.limit * self.first.in_features
    return self.twice(x)


@pytest.mark.parametrize(
    ("forward", "calls"),
    [(reversed_order, ("second", "first")), (through_a_method, ("first", "second"))],
)
def test_parts_stand_in_the_order_of_their_calls(
    forward: Callable[..., torch.Tensor], calls: tuple[str, ...]
):
    assert inspect_forward(block(forward)).calls == calls


def reads_a_weight(self, x):
    return self.first(x) @ self.second.weight


def reads_through_a_property(self, x):
    return self.second(self.first(x)) @ self.last


def reads_through_a_cached_property(self, x):
    return self.second(self.first(x)) @ self.kept


def reads_a_list(self, x):
    return self.both[1](self.second(self.first(x)))


def reads_an_object(self, x):
    return self.second(self.first(x)) @ self.box.second.weight


def calls_a_closure(self, x):
    return self.second(self.first(x)) @ self.closure()


def hands_a_child_on(self, x):
    return torch.utils.checkpoint.checkpoint(self.first, self.second(x))


def hands_itself_on(self, x):
    return getattr(self, "first")(self.second(x))  # noqa: B009


def leaves_one_out(self, x):
    return self.first(x)


def asks_its_base(self, x):
    return super().twice(self.first(self.second(x)))


def lists_its_parameters(self, x):
    return self.first(self.second(x)) + sum(parameter.sum() for parameter in self.parameters())


@pytest.mark.parametrize(
    ("forward", "obstacle"),
    [
        (reads_a_weight, "uses 'self.second.weight'"),
        (reads_through_a_property, "uses 'self.second.weight'"),
        (reads_through_a_cached_property, "uses 'self.second.weight'"),
        (reads_a_list, "uses 'self.both'"),
        (reads_an_object, "uses 'self.box'"),
        (calls_a_closure, "uses 'self.closure'"),
        (hands_a_child_on, "uses 'self.first' without calling it"),
        (hands_itself_on, "hands 'self' on"),
        (leaves_one_out, "does not call 'second'"),
        (asks_its_base, "hands 'super' on"),
        (lists_its_parameters, "uses 'self.parameters'"),
    ],
)
def test_what_cannot_be_followed_stays_whole(forward: Callable[..., torch.Tensor], obstacle: str) -> None:
    module = block(forward)
    assert obstacle in why_whole(module)
    assert len(cuts(nn.Sequential(module, nn.Linear(4, 4)))) == 1


def test_a_forward_without_source_stays_whole() -> None:
    namespace: dict[str, Callable[..., torch.Tensor]] = {}
    exec("def forward(self, x): return self.second(self.first(x))", namespace)
    assert "source" in why_whole(block(namespace["forward"]))


def test_a_forward_that_was_replaced_keeps_its_module_whole() -> None:
    module = block(reversed_order)
    module.forward = module.forward  # as accelerate's hooks do
    assert why_whole(module) == "its forward was replaced"


@pytest.mark.parametrize(
    "module",
    [nn.TransformerEncoderLayer(8, 2), nn.MultiheadAttention(8, 2), nn.LSTM(4, 4), nn.Linear(4, 4)],
    ids=lambda module: type(module).__name__,
)
def test_modules_of_torch_that_read_weights_stay_whole(module: nn.Module) -> None:
    assert why_whole(module)


def test_parts_that_share_a_weight_stay_whole() -> None:
    tied = block(reversed_order)
    tied.first.weight = tied.second.weight
    assert "share" in why_whole(tied)


def test_a_parametrised_part_is_a_unit_of_its_own() -> None:
    module = block(reversed_order)
    parametrizations.weight_norm(module.first)
    assert cuts(nn.Sequential(module, nn.Linear(4, 4)))[1:] == [["0.second", "0.first", "1"]]


def test_a_block_that_shares_a_module_with_another_stays_whole() -> None:
    first, second = block(reversed_order), block(reversed_order)
    second.first = first.first
    assert cuts(nn.Sequential(first, second)) == [["0", "1"]]
