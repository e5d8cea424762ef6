"""Published model shapes by name, for a plan of a model whose config is not at hand. Data, and its look-up.

A shape is what transformers' configuration class of that `model_type` takes; what it leaves out has that
class's default. `source` says where the figures were published.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import ConfigError

__all__ = ["SHAPES", "Shape", "find_shape"]

_LLAMA = "Touvron et al. 2023, arXiv 2302.13971, table 2; intermediate sizes of the published config.json"
_LLAMA_2 = "Touvron et al. 2023, arXiv 2307.09288, and the published config.json"
_LLAMA_3 = "Grattafiori et al. 2024, arXiv 2407.21783, table 3, and the published config.json"
_QWEN = "Qwen Team 2024, arXiv 2412.15115, table 1, and the published config.json"
_GPT = "Brown et al. 2020, arXiv 2005.14165, table 2.1"


@dataclass(frozen=True, slots=True)
class Shape:
    """A published configuration.

    Attributes:
        model_type: transformers' name of the architecture.
        settings: keyword arguments of its configuration class.
        source: where they were published.
    """

    model_type: str
    settings: Mapping[str, int | bool]
    source: str


def _dense(
    model_type: str,
    source: str,
    *,
    hidden: int,
    intermediate: int,
    layers: int,
    heads: int,
    vocab: int,
    positions: int,
    kv_heads: int | None = None,
    tied: bool = False,
) -> Shape:
    settings = {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads or heads,
        "vocab_size": vocab,
        "max_position_embeddings": positions,
        "tie_word_embeddings": tied,
    }
    return Shape(model_type, settings, source)


def _llama(hidden: int, intermediate: int, layers: int, heads: int) -> Shape:
    return _dense(
        "llama",
        _LLAMA,
        hidden=hidden,
        intermediate=intermediate,
        layers=layers,
        heads=heads,
        vocab=32000,
        positions=2048,
    )


def _llama_3(hidden: int, intermediate: int, layers: int, heads: int) -> Shape:
    return _dense(
        "llama",
        _LLAMA_3,
        hidden=hidden,
        intermediate=intermediate,
        layers=layers,
        heads=heads,
        kv_heads=8,
        vocab=128256,
        positions=131072,
    )


def _qwen(
    hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, vocab: int = 152064
) -> Shape:
    # The small ones have another vocabulary, and share it with the head.
    return _dense(
        "qwen2",
        _QWEN,
        hidden=hidden,
        intermediate=intermediate,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        vocab=vocab,
        positions=32768,
        tied=vocab != 152064,
    )


SHAPES: Mapping[str, Shape] = {
    "smollm2-135m": _dense(
        "llama",
        "Allal et al. 2025, arXiv 2502.02737, and the published config.json",
        hidden=576,
        intermediate=1536,
        layers=30,
        heads=9,
        kv_heads=3,
        vocab=49152,
        positions=8192,
        tied=True,
    ),
    "tinyllama-1.1b": _dense(
        "llama",
        "Zhang et al. 2024, arXiv 2401.02385, table 1, and the published config.json",
        hidden=2048,
        intermediate=5632,
        layers=22,
        heads=32,
        kv_heads=4,
        vocab=32000,
        positions=2048,
    ),
    "llama-7b": _llama(4096, 11008, 32, 32),
    "llama-13b": _llama(5120, 13824, 40, 40),
    "llama-33b": _llama(6656, 17920, 60, 52),
    "llama-65b": _llama(8192, 22016, 80, 64),
    "llama-2-70b": _dense(
        "llama",
        _LLAMA_2,
        hidden=8192,
        intermediate=28672,
        layers=80,
        heads=64,
        kv_heads=8,
        vocab=32000,
        positions=4096,
    ),
    "llama-3.1-8b": _llama_3(4096, 14336, 32, 32),
    "llama-3.1-70b": _llama_3(8192, 28672, 80, 64),
    "llama-3.1-405b": _llama_3(16384, 53248, 126, 128),
    "qwen2.5-0.5b": _qwen(896, 4864, 24, 14, 2, vocab=151936),
    "qwen2.5-7b": _qwen(3584, 18944, 28, 28, 4),
    "qwen2.5-14b": _qwen(5120, 13824, 48, 40, 8),
    "qwen2.5-32b": _qwen(5120, 27648, 64, 40, 8),
    "qwen2.5-72b": _qwen(8192, 29568, 80, 64, 8),
    "gpt-175b": Shape(
        "gpt2",
        {"n_embd": 12288, "n_layer": 96, "n_head": 96, "n_positions": 2048, "vocab_size": 50257},
        _GPT,
    ),
}


def find_shape(name: str) -> Shape:
    """Return the shape called `name`; case does not matter.

    Raises:
        ConfigError: there is none; names the nearest.
    """
    found = SHAPES.get(name.lower())
    if found is not None:
        return found
    close = difflib.get_close_matches(name.lower(), SHAPES, n=1, cutoff=0.6)
    hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(SHAPES)}"
    raise ConfigError(f"{name!r} is neither a directory with a config.json nor a shape known by name; {hint}")
