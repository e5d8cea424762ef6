"""Harnesses over the files of a model directory: a safetensors header, an index of shards, other JSON."""

from __future__ import annotations

import functools
import json
import re
import struct
import tempfile
from pathlib import Path

import torch
import transformers
from fuzz.harness import Harness, touching
from training.conftest import make_model_directory

from offload.errors import ConfigError
from offload.hf import PretrainedSource, load_tokenizer, open_pretrained, source

__all__ = ["HARNESSES"]

NBYTES = 1 << 12


@functools.cache
def _model() -> torch.nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=8, hidden_size=4, intermediate_size=4, num_hidden_layers=1, num_attention_heads=2
    )
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config)


@functools.cache
def _header() -> bytes:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, parameter in _model().named_parameters():
        nbytes = 2 * parameter.numel()
        header[name] = {"dtype": "BF16", "shape": list(parameter.shape), "data_offsets": [end, end + nbytes]}
        end += nbytes
    return json.dumps(header).encode()


def _data_nbytes(header: bytes) -> int:
    """Return how much data a header promises, as far as it can be told; wrong lengths are another input."""
    try:
        entries = json.loads(header).values()
        ends = [entry["data_offsets"][1] for entry in entries if "data_offsets" in entry]
        return max((end for end in ends if type(end) is int and 0 <= end <= NBYTES), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
        return 0


def _safetensors(header: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header + bytes(_data_nbytes(header))


def _open(folder: Path) -> None:
    with PretrainedSource(folder, _model()) as opened:
        for name, _ in _model().named_parameters():
            opened.load(name)
        assert opened.numel and opened.dtype


def _listen() -> None:
    # safetensors opens in Rust, of which no audit event tells.
    true = source.safe_open
    if not hasattr(true, "listens"):

        def listening(path, **settings):
            touching(path)
            return true(path, **settings)

        listening.listens = True
        source.safe_open = listening


def _parse_header(data: bytes, folder: Path) -> None:
    _listen()
    (folder / "model.safetensors").write_bytes(_safetensors(data))
    _open(folder)


def _parse_safetensors(data: bytes, folder: Path) -> None:
    _listen()
    (folder / "model.safetensors").write_bytes(data)
    _open(folder)


def _parse_index(data: bytes, folder: Path) -> None:
    _listen()
    for name in ("a.safetensors", "b.safetensors", "model.safetensors"):
        (folder / name).write_bytes(_safetensors(_header()))
    (folder / "model.safetensors.index.json").write_bytes(data)
    _open(folder)


def _indexes() -> list[bytes]:
    names = [name for name, _ in _model().named_parameters()]
    shards = ("a.safetensors", "b.safetensors")
    index = {"metadata": {"total_size": 1}, "weight_map": {n: shards[i % 2] for i, n in enumerate(names)}}
    return [json.dumps(index).encode()]


@functools.cache
def _small_files() -> dict[str, bytes]:
    """Return the files of a small model directory."""
    with tempfile.TemporaryDirectory() as name:
        make_model_directory(Path(name))
        return {path.name: path.read_bytes() for path in Path(name).iterdir()}


def _place(data: bytes, name: str, folder: Path) -> Path:
    directory = folder / "model"
    directory.mkdir(exist_ok=True)
    for other, content in {**_small_files(), name: data}.items():
        (directory / other).write_bytes(content)
    return directory


def _parse_config(data: bytes, folder: Path) -> None:
    # The size of a model is not limited, nor how many of them a number of five digits is.
    if re.search(rb"\d{4}|[eE]\+?\d|[Ii]nf", data) is None:
        open_pretrained(_place(data, "config.json", folder))[1].close()
    else:
        raise ConfigError("not for this harness")


def _parse_tokenizer(data: bytes, folder: Path) -> None:
    load_tokenizer(_place(data, "tokenizer.json", folder))


def _parse_tokenizer_settings(data: bytes, folder: Path) -> None:
    load_tokenizer(_place(data, "tokenizer_config.json", folder))


def _config() -> list[bytes]:
    config = json.loads(_small_files()["config.json"])
    small = {**config, "transformers_version": "5.0", "rope_parameters": None, "rms_norm_eps": 0.001}
    return [json.dumps(small).encode()]


HARNESSES = (
    Harness(name="model_config", parse=_parse_config, seeds=_config),
    Harness(name="tokenizer", parse=_parse_tokenizer, seeds=lambda: [_small_files()["tokenizer.json"]]),
    Harness(
        name="tokenizer_settings",
        parse=_parse_tokenizer_settings,
        seeds=lambda: [_small_files()["tokenizer_config.json"]],
    ),
    Harness(name="header", parse=_parse_header, seeds=lambda: [_header()]),
    Harness(
        name="safetensors", kind="bytes", parse=_parse_safetensors, seeds=lambda: [_safetensors(_header())]
    ),
    Harness(name="index", parse=_parse_index, seeds=_indexes),
)
