"""Llama-shaped models without weights, and a source that makes random ones tensor by tensor.

A benchmark names a shape or a model directory; neither is ever whole in memory. Weights depend on the
parameter's name alone, so two runs begin alike.
"""

from __future__ import annotations

import argparse
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import init_empty_weights
from transformers import LlamaConfig, LlamaForCausalLM

from offload import WeightSource
from offload.hf import open_pretrained

__all__ = ["SHAPES", "OpenModel", "RandomSource", "add_model_arguments", "open_model", "random_tokens"]


@dataclass(frozen=True, slots=True)
class Shape:
    """The numbers that make a Llama."""

    hidden: int
    layers: int
    intermediate: int
    heads: int
    kv_heads: int
    vocab: int
    tied: bool = False


SHAPES = {
    # For the tests: a step takes milliseconds.
    "toy": Shape(32, 3, 64, 4, 2, 96),
    "10m": Shape(256, 8, 704, 4, 4, 4096),
    "40m": Shape(512, 10, 1408, 8, 4, 8192),
    "100m": Shape(640, 14, 1792, 10, 5, 32000),
    # As deep models are: little of it is in the embedding.
    "100m-deep": Shape(640, 20, 1792, 10, 5, 4096),
    "smollm2-135m": Shape(576, 30, 1536, 9, 3, 49152, tied=True),
    # Nearly all of it is in the embedding and the head.
    "vocabulary-128k": Shape(64, 2, 128, 4, 2, 128256),
    "tinyllama-1.1b": Shape(2048, 22, 5632, 32, 4, 32000),
    "llama-7b": Shape(4096, 32, 11008, 32, 32, 32000),
}


@dataclass(frozen=True, slots=True)
class OpenModel:
    """A model on the meta device, where its weights come from, and what it is called in reports."""

    model: torch.nn.Module
    source: WeightSource
    label: str
    num_parameters: int
    vocab_size: int


class RandomSource:
    """Initial values of a Llama: norms one, the rest normal, from a seed made of the name."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._shapes = {name: parameter.shape for name, parameter in model.named_parameters()}

    def load(self, name: str) -> torch.Tensor:
        """Return the value of one parameter, made now."""
        shape = self._shapes[name]
        if len(shape) < 2:
            return torch.ones(shape)
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        return torch.empty(shape).normal_(std=0.02, generator=generator)


def add_model_arguments(parser: argparse.ArgumentParser, default: str) -> None:
    """Add `--shape` and `--model`."""
    parser.add_argument(
        "--shape", choices=sorted(SHAPES), default=default, help="random weights of this shape [%(default)s]"
    )
    parser.add_argument("--model", type=Path, metavar="DIR", help="a Hugging Face model directory instead")


def open_model(args: argparse.Namespace) -> OpenModel:
    """Build the model that the arguments name, its parameters on the meta device."""
    if args.model is not None:
        model, source = open_pretrained(args.model)
        return _opened(model, source, f"`{args.model.name}` ({model.config.model_type})")
    model = _build(SHAPES[args.shape])
    return _opened(model, RandomSource(model), f"random {args.shape}")


def random_tokens(opened: OpenModel, rows: int, length: int, seed: int = 0) -> torch.Tensor:
    """Return token ids [rows, length]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(opened.vocab_size, (rows, length), generator=generator)


def _build(shape: Shape) -> torch.nn.Module:
    config = LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        tie_word_embeddings=shape.tied,
        use_cache=False,
    )
    with init_empty_weights(include_buffers=False):
        model = LlamaForCausalLM(config)
    # init_empty_weights replaces every parameter by a new one, which undoes the sharing.
    model.tie_weights()
    model.train()
    return model


def _opened(model: torch.nn.Module, source: WeightSource, label: str) -> OpenModel:
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    return OpenModel(model, source, label, num_parameters, model.config.vocab_size)
