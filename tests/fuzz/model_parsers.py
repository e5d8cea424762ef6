"""Harnesses over the files of a model directory: a safetensors header, an index of shards."""

from __future__ import annotations

import functools
import json
import struct
from pathlib import Path

import torch
import transformers
from fuzz.harness import Harness, touching

from offload.hf import PretrainedSource, source

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


HARNESSES = (
    Harness(name="header", parse=_parse_header, seeds=lambda: [_header()]),
    Harness(
        name="safetensors", kind="bytes", parse=_parse_safetensors, seeds=lambda: [_safetensors(_header())]
    ),
    Harness(name="index", parse=_parse_index, seeds=_indexes),
)
