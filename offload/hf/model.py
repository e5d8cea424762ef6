"""A model of a local directory built without memory for its weights, and its tokenizer.

Invariants: parameters stay on the meta device; buffers hold real values. Nothing is downloaded, no
code of the directory is run, and what cannot be trained here is refused with one clear message.

Thread rule: the caller's thread only; building swaps `nn.Module.register_parameter` for a moment, as
accelerate does it, so no other thread may build modules meanwhile.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from ..errors import ConfigError
from .source import PretrainedSource

__all__ = ["load_tokenizer", "open_pretrained"]

# One of these holds a tokenizer's vocabulary; without any, transformers makes an empty tokenizer.
VOCABULARY_PATTERNS = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab*",
    "spiece.model",
    "*.tiktoken",
    "tekken.json",
)


def open_pretrained(
    directory: str | os.PathLike[str], *, dtype: torch.dtype = torch.float32
) -> tuple[torch.nn.Module, PretrainedSource]:
    """Build the causal language model of a local directory without its weights, and their source.

    Args:
        directory: config.json and safetensors, as `save_pretrained` writes them.
        dtype: in which the model computes; the dtype of its (meta) parameters.

    Returns:
        The model, in training mode with `use_cache` off, parameters on the meta device; and the
        source, which the caller closes.

    Raises:
        ConfigError: the directory is missing, is not a model directory, or needs what offload does
            not do (pickled or quantized weights, code from the directory).
        CorruptionError: a weights file cannot be read.
    """
    path = _check_directory(directory)
    with _refusing(f"transformers cannot use {path / 'config.json'}"):
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None:
        method = quantization.get("quant_method") if isinstance(quantization, Mapping) else quantization
        raise ConfigError(
            f"{path} is quantized ({method}); full fine-tuning needs dense weights: "
            "save the model dequantized, or take the original it was made from"
        )
    with _refusing(f"{path} is not a causal language model"), init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    # init_empty_weights replaces every parameter by a new one, which undoes the sharing.
    model.tie_weights()
    model.config.use_cache = False
    model.train()
    source = PretrainedSource(path, model)
    try:
        _load_buffers(model, source)
    except BaseException:
        source.close()
        raise
    return model, source


def load_tokenizer(directory: str | os.PathLike[str]) -> Any:
    """Return the tokenizer of a local model directory.

    Raises:
        ConfigError: the directory has none, or transformers cannot read it.
    """
    path = _check_directory(directory)
    if not any(file for pattern in VOCABULARY_PATTERNS for file in path.glob(pattern)):
        raise ConfigError(
            f"{path} has no tokenizer: none of {', '.join(VOCABULARY_PATTERNS)} is there; "
            "copy the tokenizer's files of the model into it"
        )
    cure = "copy the tokenizer's files of the model again"
    with _refusing(f"the tokenizer of {path} cannot be loaded", cure):
        return AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)


def _check_directory(directory: str | os.PathLike[str]) -> Path:
    path = Path(directory).expanduser()
    if not path.exists():
        raise ConfigError(
            f"model_name_or_path: {path} does not exist; name a local model directory "
            "(nothing is downloaded here; 'hf download NAME --local-dir DIR' fetches one)"
        )
    if not path.is_dir():
        raise ConfigError(f"model_name_or_path: {path} is a file; name the directory that holds config.json")
    if not (path / "config.json").is_file():
        raise ConfigError(f"model_name_or_path: {path} is not a model directory: it has no config.json")
    return path


def _load_buffers(model: torch.nn.Module, source: PretrainedSource) -> None:
    """Fill the persistent buffers that the files hold; the others keep what the model computed."""
    for prefix, module in model.named_modules():
        for name, buffer in module._buffers.items():
            full_name = f"{prefix}.{name}" if prefix else name
            if buffer is not None and name not in module._non_persistent_buffers_set:
                with torch.no_grad():
                    buffer.copy_(source.load(full_name))


@contextmanager
def _refusing(what: str, cure: str = "") -> Iterator[None]:
    """Turn what the libraries raise over a file into one `ConfigError`.

    That can be anything: over values of other types they fail wherever these are used first, and tokenizers
    raises bare `Exception`. Nothing of ours runs inside.
    """
    try:
        yield
    except Exception as error:
        said = " ".join(str(error).split())[:300] or type(error).__name__
        raise ConfigError(f"{what}: {said}{'; ' if cure else ''}{cure}") from error
