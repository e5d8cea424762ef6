"""Which models compute their loss in chunks, and how large a chunk is."""

from __future__ import annotations

import warnings

import pytest
import torch
from loss_models import BUILDERS, VOCAB, LoraLinear, make
from toy_models import build
from transformers import BertConfig, BertForSequenceClassification

from offload.units import LossHead, find_loss_head, find_units, logits_nbytes


def found(model: torch.nn.Module) -> LossHead | None:
    return find_loss_head(model, [unit.name for unit in find_units(model)])


@pytest.mark.parametrize("name", sorted(BUILDERS))
def test_causal_language_models_of_transformers_are_found(name: str) -> None:
    assert found(make(name)) == LossHead("", "lm_head", VOCAB)


def test_a_model_on_the_meta_device_is_found() -> None:
    with torch.device("meta"):
        assert found(BUILDERS["llama"]()) == LossHead("", "lm_head", VOCAB)


def test_a_model_inside_a_wrapper_is_found() -> None:
    wrapper = torch.nn.Module()
    wrapper.base_model = make("llama")
    assert found(wrapper) == LossHead("base_model", "base_model.lm_head", VOCAB)


def test_a_head_with_an_adapter_is_found() -> None:
    model = make("llama")
    model.lm_head = LoraLinear(model.lm_head)
    assert found(model) == LossHead("", "lm_head", VOCAB)


def test_a_head_that_is_not_linear_is_not() -> None:
    model = make("llama")
    model.lm_head = torch.nn.Sequential(torch.nn.LayerNorm(32), torch.nn.Linear(32, VOCAB))
    model.lm_head.out_features = VOCAB
    assert found(model) is None


def test_other_models_are_not() -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert found(build("mlp")) is None
        assert found(BertForSequenceClassification(BertConfig(vocab_size=64, **sizes))) is None
        assert found(make("llama").model) is None


def test_another_loss_is_not() -> None:
    model = make("llama")
    model.loss_function = lambda **_: torch.zeros(())
    assert found(model) is None


def test_a_chunk_has_as_many_tokens_as_its_bytes_hold() -> None:
    head = LossHead("", "lm_head", 131072)
    assert logits_nbytes(1, 131072, 2) == 131072 * 12
    assert head.chunk_rows(256 << 20, 2) == 170
    assert head.chunk_nbytes(256 << 20, 2) <= 256 << 20
    assert head.chunk_rows(1, 2) == 1
    assert LossHead("", "lm_head", 64).chunk_rows(256 << 20, 4) == 1024
