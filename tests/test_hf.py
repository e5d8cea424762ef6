"""Model directories: what transformers would load is what the source hands out, name by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from offload.errors import ConfigError, CorruptionError, StateError
from offload.hf import PretrainedSource, load_tokenizer, open_pretrained

TINY = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**TINY, tie_word_embeddings=False),
    "llama-tied": lambda: transformers.LlamaConfig(**TINY, tie_word_embeddings=True),
    "qwen3": lambda: transformers.Qwen3Config(**TINY),
    "mistral": lambda: transformers.MistralConfig(**TINY),
    "gemma2": lambda: transformers.Gemma2Config(**TINY),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2
    ),
    "mixtral": lambda: transformers.MixtralConfig(**TINY, num_local_experts=4),
}


def save_model(directory: Path, kind: str = "llama-tied", **options: object) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[kind]())
    model.save_pretrained(directory, **options)
    return model


def edit_tensors(directory: Path, change: object) -> None:
    tensors = load_file(directory / "model.safetensors")
    save_file(change(dict(tensors)), directory / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_parameter_equals_what_transformers_loads(tmp_path: Path, kind: str) -> None:
    save_model(tmp_path, kind)
    expected = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    model, source = open_pretrained(tmp_path)
    with source:
        names = [name for name, _ in model.named_parameters()]
        assert names == [name for name, _ in expected.named_parameters()]
        for name, parameter in expected.named_parameters(remove_duplicate=False):
            assert torch.equal(source.load(name), parameter), name


def test_parameters_stay_on_meta_and_buffers_are_real(tmp_path: Path) -> None:
    save_model(tmp_path)
    expected = dict(transformers.AutoModelForCausalLM.from_pretrained(tmp_path).named_buffers())
    model, source = open_pretrained(tmp_path, dtype=torch.bfloat16)
    source.close()
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", torch.bfloat16)}
    buffers = dict(model.named_buffers())
    assert buffers.keys() == expected.keys()
    assert all(torch.equal(buffers[name], expected[name]) for name in buffers)
    assert not model.config.use_cache
    assert model.training


def test_tied_weights_stay_one_parameter(tmp_path: Path) -> None:
    save_model(tmp_path)
    model, source = open_pretrained(tmp_path)
    source.close()
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_shards_are_read_through_their_index(tmp_path: Path) -> None:
    saved = save_model(tmp_path, "llama", max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    _, source = open_pretrained(tmp_path)
    with source:
        for name, parameter in saved.named_parameters():
            assert torch.equal(source.load(name), parameter)


def test_a_base_model_checkpoint_without_prefix_is_matched(tmp_path: Path) -> None:
    saved = save_model(tmp_path)
    edit_tensors(tmp_path, lambda old: {name.removeprefix("model."): old[name] for name in old})
    _, source = open_pretrained(tmp_path)
    with source:
        name = "model.layers.1.mlp.up_proj.weight"
        assert torch.equal(source.load(name), saved.get_parameter(name))


def test_a_tied_head_alone_serves_the_embedding(tmp_path: Path) -> None:
    saved = save_model(tmp_path)

    def rename(old: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        old["lm_head.weight"] = old.pop("model.embed_tokens.weight")
        return old

    edit_tensors(tmp_path, rename)
    _, source = open_pretrained(tmp_path)
    with source:
        assert torch.equal(source.load("model.embed_tokens.weight"), saved.lm_head.weight)


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    save_model(tmp_path)
    edit_tensors(tmp_path, lambda old: {k: v for k, v in old.items() if k != "model.norm.weight"})
    with pytest.raises(ConfigError, match=r"lacks 1 tensors .*model\.norm\.weight"):
        open_pretrained(tmp_path)


def test_a_tensor_of_another_shape_is_refused(tmp_path: Path) -> None:
    save_model(tmp_path)
    edit_tensors(tmp_path, lambda old: old | {"model.norm.weight": torch.ones(5)})
    with pytest.raises(ConfigError, match=r"model\.norm\.weight has shape \(5,\).*wants \(32,\)"):
        open_pretrained(tmp_path)


def test_integer_weights_are_refused(tmp_path: Path) -> None:
    save_model(tmp_path)
    edit_tensors(tmp_path, lambda old: old | {"model.norm.weight": torch.ones(32, dtype=torch.int8)})
    with pytest.raises(ConfigError, match="stored as I8"):
        open_pretrained(tmp_path)


def test_a_quantized_directory_is_refused(tmp_path: Path) -> None:
    save_model(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"quantized \(gptq\)"):
        open_pretrained(tmp_path)


def test_a_missing_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        open_pretrained(tmp_path / "nowhere")


def test_a_directory_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no config\.json"):
        open_pretrained(tmp_path)


def test_an_unknown_model_type_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "no-such-model"}')
    with pytest.raises(ConfigError, match=r"transformers cannot use .*config\.json"):
        open_pretrained(tmp_path)


def test_broken_json_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"transformers cannot use .*config\.json"):
        open_pretrained(tmp_path)


def test_a_model_that_is_no_language_model_is_refused(tmp_path: Path) -> None:
    transformers.ViTConfig(hidden_size=8, num_attention_heads=2).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="not a causal language model"):
        open_pretrained(tmp_path)


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    save_model(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"pickled weights only \(pytorch_model\.bin\)"):
        open_pretrained(tmp_path)


def test_a_directory_without_weights_is_refused(tmp_path: Path) -> None:
    save_model(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"neither model\.safetensors nor"):
        open_pretrained(tmp_path)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    save_model(tmp_path, "llama", max_shard_size="10KB")
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(ConfigError, match=rf"names {shard.name}, which is not there"):
        open_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", "x\0y"])
def test_an_index_may_not_point_outside(tmp_path: Path, name: str) -> None:
    save_model(tmp_path)
    index = {"metadata": {}, "weight_map": {"model.norm.weight": name}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ConfigError, match="must lie beside its index"):
        open_pretrained(tmp_path)


def test_an_index_that_is_no_index_is_refused(tmp_path: Path) -> None:
    save_model(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(ConfigError, match="is not an index"):
        open_pretrained(tmp_path)


def test_a_torn_weights_file_is_corruption(tmp_path: Path) -> None:
    save_model(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CorruptionError, match="cannot be read as safetensors"):
        open_pretrained(tmp_path)


def test_a_closed_source_says_so(tmp_path: Path) -> None:
    save_model(tmp_path)
    model, source = open_pretrained(tmp_path)
    source.close()
    with pytest.raises(StateError, match="is closed"):
        source.load("model.norm.weight")
    with PretrainedSource(tmp_path, model) as again, pytest.raises(StateError, match="no tensor for nothing"):
        again.load("nothing")


def test_a_directory_without_tokenizer_is_refused(tmp_path: Path) -> None:
    save_model(tmp_path, "gpt2")
    with pytest.raises(ConfigError, match="has no tokenizer"):
        load_tokenizer(tmp_path)


def test_a_broken_tokenizer_is_refused(tmp_path: Path) -> None:
    save_model(tmp_path, "gpt2")
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ConfigError, match="cannot be loaded"):
        load_tokenizer(tmp_path)
