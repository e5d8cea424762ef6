"""Which modules become units: Hugging Face decoders, plain models, what cannot be cut."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import transformers
from torch import nn
from torch.nn.utils import parametrizations

from offload.errors import UnitError
from offload.units import find_units

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
GROUPED = {**SIZES, "num_key_value_heads": 2}
HEADS = {**GROUPED, "head_dim": 8}

# Configuration, then the expected names; `*` stands for the decoder layers.
LLAMA_NAMES = "model.embed_tokens model.layers.* model.norm lm_head"
DECODERS = {
    "Llama": (GROUPED, LLAMA_NAMES),
    "SmolLM3": (GROUPED, LLAMA_NAMES),
    "Qwen2": (GROUPED, LLAMA_NAMES),
    "Qwen3": (HEADS, LLAMA_NAMES),
    "Mistral": (GROUPED, LLAMA_NAMES),
    "Gemma": (HEADS, LLAMA_NAMES),
    "Gemma2": (HEADS, LLAMA_NAMES),
    "Gemma3Text": (HEADS, LLAMA_NAMES),
    "Phi3": (GROUPED, LLAMA_NAMES),
    "Phi": (SIZES, "model.embed_tokens model.layers.* model.final_layernorm lm_head"),
    "Mixtral": ({**GROUPED, "num_local_experts": 4}, LLAMA_NAMES),
    "Olmo2": (GROUPED, LLAMA_NAMES),
    "GPT2": (SIZES, "transformer.wte transformer.wpe transformer.h.* transformer.ln_f lm_head"),
    "GPTNeoX": (SIZES, "gpt_neox.embed_in gpt_neox.layers.* gpt_neox.final_layer_norm lm_head"),
    "Bloom": (
        SIZES,
        "transformer.word_embeddings transformer.word_embeddings_layernorm transformer.h.* "
        "transformer.ln_f lm_head",
    ),
    "Falcon": (SIZES, "transformer.word_embeddings transformer.h.* transformer.ln_f lm_head"),
    "OPT": (
        {**SIZES, "ffn_dim": 48, "word_embed_proj_dim": 16},
        "model.decoder.embed_tokens model.decoder.embed_positions model.decoder.project_out "
        "model.decoder.project_in model.decoder.final_layer_norm model.decoder.layers.* lm_head",
    ),
}


class Block(nn.Module):
    """A block with modules inside, a nested Sequential and a parameter of its own."""

    def __init__(self, size: int = 4) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(size))
        self.norm = nn.LayerNorm(size)
        self.mlp = nn.Sequential(nn.Linear(size, size), nn.GELU(), nn.Linear(size, size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.scale * self.mlp(self.norm(x))


class Other(Block):
    """A block of another class."""


class Experts(Block):
    """A block that holds a list of blocks."""

    def __init__(self, size: int = 4) -> None:
        super().__init__(size)
        self.experts = nn.ModuleList([Block(size), Block(size)])


class Model(nn.Module):
    """Whatever modules it is given, under their names."""

    def __init__(self, **modules: nn.Module) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for module in self.children():
            x = module(x)
        return x


class Wrapped(Model):
    """Like Model, and with a parameter of its own."""

    def __init__(self, **modules: nn.Module) -> None:
        super().__init__(**modules)
        self.register_parameter("position", nn.Parameter(torch.zeros(4)))


def names(model: nn.Module) -> list[str]:
    return [unit.name for unit in find_units(model)]


def blocks(count: int, kind: Callable[[], nn.Module] = Block) -> nn.ModuleList:
    return nn.ModuleList([kind() for _ in range(count)])


def decoder(family: str, **changes: object) -> transformers.PreTrainedModel:
    config = getattr(transformers, f"{family}Config")(**{**DECODERS[family][0], **changes})
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("family", DECODERS)
def test_decoder_is_cut_into_layers_and_leaves(family: str) -> None:
    expected = []
    for name in DECODERS[family][1].split():
        expected += [name.replace("*", str(i)) for i in range(2)] if "*" in name else [name]
    assert names(decoder(family)) == expected


@pytest.mark.parametrize("family", DECODERS)
def test_every_parameter_of_a_decoder_is_owned_once(family: str) -> None:
    model = decoder(family)
    owned = [tensor for unit in find_units(model) for tensor in unit.layout.trainable]
    assert [tensor.name for tensor in owned] == [name for name, _ in model.named_parameters()]
    assert [tensor.shape for tensor in owned] == [tuple(p.shape) for p in model.parameters()]


def test_decoder_on_the_meta_device_and_loaded_are_cut_alike() -> None:
    model = decoder("Llama", tie_word_embeddings=True)
    assert find_units(model) == find_units(transformers.LlamaForCausalLM(model.config))


def test_decoder_with_one_layer_has_that_layer_as_unit() -> None:
    assert names(decoder("Llama", num_hidden_layers=1))[1] == "model.layers.0"


def test_declared_blocks_are_found_under_any_attribute() -> None:
    class Declared(Model):
        _no_split_modules = ("Tower",)

    class Tower(Model):
        pass

    tower = Tower(embed=nn.Embedding(4, 4), layers=blocks(2))
    assert names(Declared(inner=Model(tower=tower))) == ["inner.tower"]


def test_declared_blocks_are_found_through_a_wrapper() -> None:
    class Inner(Model):
        _no_split_modules = ("Layer",)

    class Layer(Model):
        pass

    assert names(Model(a=Inner(block=Layer(mlp=nn.Linear(4, 4))), b=nn.Linear(4, 4))) == ["a.block", "b"]


def test_declared_blocks_win_over_the_stacks_around_them() -> None:
    class Declared(Model):
        _no_split_modules = ("Other",)

    towers = nn.ModuleDict({key: Model(layers=blocks(2, Other), head=nn.Linear(4, 4)) for key in "ab"})
    expected = [f"towers.{key}.{rest}" for key in "ab" for rest in ("layers.0", "layers.1", "head")]
    assert names(Declared(towers=towers)) == expected


def test_gradient_checkpointing_layers_are_blocks() -> None:
    class GradientCheckpointingLayer(Model):
        pass

    class Layer(GradientCheckpointingLayer):
        pass

    assert names(Model(only=Layer(mlp=nn.Linear(4, 4)), head=nn.Linear(4, 4))) == ["only", "head"]


def test_elements_of_a_module_list_are_units() -> None:
    model = Model(embed=nn.Embedding(4, 4), layers=blocks(3), head=nn.Linear(4, 4))
    assert names(model) == ["embed", "layers.0", "layers.1", "layers.2", "head"]


def test_elements_of_a_module_dict_are_units() -> None:
    model = Model(stack=nn.ModuleDict({"first": Block(), "second": Block()}))
    assert names(model) == ["stack.first", "stack.second"]


def test_single_element_of_a_module_list_is_a_unit() -> None:
    assert names(Model(layers=blocks(1), head=nn.Linear(4, 4))) == ["layers.0", "head"]


def test_blocks_of_different_classes_in_one_list_are_units() -> None:
    model = Model(layers=nn.ModuleList([Block(), Other(), Block(), nn.Linear(4, 4)]))
    assert names(model) == [f"layers.{i}" for i in range(4)]


def test_children_of_a_sequential_with_parameters_are_units() -> None:
    assert names(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), Block())) == ["0", "2"]


def test_sequential_inside_a_sequential_stays_whole() -> None:
    mlp = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    assert names(nn.Sequential(nn.Embedding(4, 4), mlp, nn.Linear(4, 4))) == ["0", "1", "2"]


def test_sequential_of_blocks_inside_a_sequential_is_cut() -> None:
    model = nn.Sequential(nn.Embedding(4, 4), nn.Sequential(Block(), Block()), nn.Linear(4, 4))
    assert names(model) == ["0", "1.0", "1.1", "2"]


def test_equal_sequentials_inside_a_sequential_are_blocks() -> None:
    model = nn.Sequential(*[nn.Sequential(Block(), Block()) for _ in range(2)])
    assert names(model) == ["0", "1"]


def test_outermost_stack_wins_and_experts_stay_in_their_layer() -> None:
    assert names(Model(layers=blocks(2, Experts))) == ["layers.0", "layers.1"]


def test_stack_inside_plain_modules_is_found() -> None:
    model = Model(backbone=Model(decoder=Model(embed=nn.Embedding(4, 4), layers=blocks(2))))
    assert names(model) == [f"backbone.decoder.{rest}" for rest in ("embed", "layers.0", "layers.1")]


def test_blocks_under_attributes_of_their_own_are_units() -> None:
    model = Model(first=Model(mlp=nn.Linear(4, 4)), second=Model(mlp=nn.Linear(4, 4)))
    assert names(model) == ["first", "second"]


def test_equal_towers_under_attributes_are_cut_into_their_blocks() -> None:
    model = Model(encoder=Model(layers=blocks(2)), decoder=Model(layers=blocks(2)))
    assert names(model) == [f"{tower}.layers.{i}" for tower in ("encoder", "decoder") for i in range(2)]


def test_pytorchs_own_transformer_is_cut_into_its_layers() -> None:
    model = nn.Transformer(
        8, 2, num_encoder_layers=2, num_decoder_layers=2, dim_feedforward=8, batch_first=True
    )
    layers = [f"{side}.layers.{i}" for side in ("encoder", "decoder") for i in range(2)]
    assert names(model) == [*layers[:2], "encoder.norm", *layers[2:], "decoder.norm"]


def test_module_around_its_own_parameter_is_one_unit() -> None:
    # nn.MultiheadAttention reads out_proj.weight without calling out_proj.
    model = Model(attention=nn.MultiheadAttention(4, 2), head=nn.Linear(4, 4))
    assert names(model) == ["attention", "head"]


def test_parameter_list_belongs_to_the_module_that_reads_it() -> None:
    class Reader(Model):
        pass

    reader = Reader(tables=nn.ParameterList([torch.zeros(2)]), mlp=nn.Linear(4, 4))
    assert names(Model(reader=reader, head=nn.Linear(4, 4))) == ["reader", "head"]


def test_parametrized_module_is_one_unit() -> None:
    linear = parametrizations.weight_norm(nn.Linear(4, 4, bias=False))
    (unit,) = find_units(Model(linear=linear))
    assert unit.name == "linear"
    assert [binding.path for binding in unit.bindings] == [
        "parametrizations.weight.original0",
        "parametrizations.weight.original1",
    ]


def test_adapter_layer_outside_the_blocks_is_one_unit() -> None:
    class BaseTunerLayer(Model):
        pass

    class LoraLinear(BaseTunerLayer):
        pass

    adapted = LoraLinear(base_layer=nn.Linear(4, 4), lora_A=nn.ModuleDict({"default": nn.Linear(4, 2)}))
    assert names(Model(layers=blocks(2), head=adapted)) == ["layers.0", "layers.1", "head"]


def test_module_used_twice_is_one_unit() -> None:
    block = Block()
    assert names(Model(layers=nn.ModuleList([block, Other(), block]))) == ["layers.0", "layers.1"]


def test_module_registered_in_two_places_is_one_unit() -> None:
    shared = nn.Embedding(4, 4)
    model = Model(shared=shared, encoder=Model(embed=shared, layers=blocks(2)))
    assert names(model) == ["shared", "encoder.layers.0", "encoder.layers.1"]


def test_plain_module_around_leaves_is_cut_into_them() -> None:
    inner = Model(norm=nn.LayerNorm(4), project=nn.Linear(4, 4))
    assert names(Model(inner=inner, head=nn.Linear(4, 4))) == ["inner.norm", "inner.project", "head"]


def test_one_block_in_a_list_is_not_yet_a_stack() -> None:
    assert names(Model(inner=Wrapped(layers=blocks(1)), head=nn.Linear(4, 4))) == ["inner", "head"]


def test_modules_without_parameters_are_no_units() -> None:
    model = Model(drop=nn.Dropout(), norm=nn.BatchNorm1d(4, affine=False), head=nn.Linear(4, 4))
    assert names(model) == ["head"]


@pytest.mark.parametrize("model", [nn.Linear(4, 4), nn.LayerNorm(4)])
def test_single_leaf_is_refused(model: nn.Module) -> None:
    with pytest.raises(
        UnitError, match=rf"no units in {type(model).__name__}: looked for .*'weight', 'bias'"
    ):
        find_units(model)


@pytest.mark.parametrize("model", [nn.Sequential(nn.ReLU()), Model(), nn.ReLU()])
def test_model_without_parameters_is_refused(model: nn.Module) -> None:
    with pytest.raises(UnitError, match="it has no parameters"):
        find_units(model)


def test_parameter_of_the_root_is_refused_by_name() -> None:
    with pytest.raises(UnitError, match=r"1 parameters of Wrapped lie outside every unit: 'position'; "):
        find_units(Wrapped(layers=blocks(2)))


def test_parameter_beside_a_stack_is_refused_by_name() -> None:
    with pytest.raises(UnitError, match=r"outside every unit: 'inner.position'; .*move each into"):
        find_units(Model(inner=Wrapped(layers=blocks(2))))


def test_parameter_beside_declared_blocks_is_refused_by_name() -> None:
    class Declared(Model):
        _no_split_modules = ("Other",)

    with pytest.raises(UnitError, match=r"outside every unit: 'inner.position'; "):
        find_units(Declared(inner=Wrapped(block=Other())))


def test_stray_parameter_tied_to_a_unit_is_refused() -> None:
    model = Wrapped(layers=blocks(2), bias=nn.Linear(4, 4))
    model.position = model.bias.bias
    with pytest.raises(UnitError, match=r"outside every unit: 'position'"):
        find_units(model)


def test_long_list_of_strays_is_cut_short() -> None:
    model = Model(layers=blocks(1))
    model.table = nn.ParameterList([torch.zeros(1) for _ in range(30)])
    with pytest.raises(UnitError, match=r"30 parameters .* 'table.7' and 22 more; "):
        find_units(model)


@pytest.mark.parametrize("shared_first", [True, False])
def test_unit_inside_another_unit_is_refused(shared_first: bool) -> None:
    layers = blocks(2)
    shared = nn.Linear(4, 4)
    layers[1].extra = shared
    modules = {"shared": shared, "layers": layers} if shared_first else {"layers": layers, "shared": shared}
    with pytest.raises(UnitError, match=r"'shared' \(Linear\) is also part of unit 'layers.1', as 'extra'"):
        find_units(Model(**modules))


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_torchscript_module_is_refused_by_name() -> None:
    scripted = torch.jit.trace(nn.Linear(4, 4), torch.zeros(1, 4))
    with pytest.raises(UnitError, match=r"cannot cut 'inner' \(TopLevelTracedModule\): TorchScript"):
        find_units(Model(inner=scripted, head=nn.Linear(4, 4)))
