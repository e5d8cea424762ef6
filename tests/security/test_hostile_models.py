"""Hostile model directories: each is one clean error, and nothing outside the directory is opened."""

from __future__ import annotations

import contextlib
import json
import os
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from offload.errors import OffloadError
from offload.hf import open_pretrained

OPENED: list[str] = []
LISTENING = [False]


def listen(event: str, arguments: tuple[Any, ...]) -> None:
    if LISTENING[0] and event in ("open", "pickle.find_class"):
        OPENED.append(f"{event} {arguments[0]!r}")


@pytest.fixture(scope="module", autouse=True)
def hook() -> None:
    # A hook stays for the life of the process, so it does nothing unless a test listens.
    sys.addaudithook(listen)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a sound model directory."""
    directory = tmp_path_factory.mktemp("sound")
    config = transformers.LlamaConfig(
        vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
    )
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.fixture
def place(sound: dict[str, bytes], tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes the sound directory with some files replaced."""

    def write(**files: bytes) -> Path:
        directory = tmp_path / "model"
        directory.mkdir(exist_ok=True)
        for name, data in {**sound, **files}.items():
            (directory / name).write_bytes(data)
        return directory

    return write


def refused(directory: Path) -> str:
    """Open a model directory that must be refused; return the message, after checking what was opened."""
    OPENED.clear()
    LISTENING[0] = True
    try:
        with pytest.raises(OffloadError) as caught:
            open_pretrained(directory)[1].close()
    finally:
        LISTENING[0] = False
    outside = [event for event in OPENED if "canary" in event or "pickle" in event or "/etc/" in event]
    assert outside == []
    return str(caught.value)


def safetensors(header: Any, data: bytes = b"", nbytes: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if nbytes is None else nbytes) + text + data


def tensor(**changes: Any) -> dict[str, Any]:
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}
    return {"x": {key: value for key, value in entry.items() if value is not None}}


HEADERS: dict[str, bytes] = {
    "nothing": b"",
    "a length cut short": b"\x08\0\0\0\0\0\0",
    "a header of no bytes": safetensors(b""),
    "a length of half the numbers": safetensors({}, nbytes=1 << 63),
    "a length of all ones": safetensors({}, nbytes=(1 << 64) - 1),
    "a length beyond the file": safetensors({}, nbytes=1000),
    "a length of 200 MB": safetensors({}, nbytes=200_000_000),
    "no JSON": safetensors(b"{x}"),
    "JSON cut short": safetensors(b'{"x":'),
    "a list": safetensors([]),
    "null": safetensors(None),
    "a number": safetensors(7),
    "no UTF-8": safetensors(b'{"\xff\xfe": 1}'),
    "NaN": safetensors(b'{"x": NaN}'),
    "deep nesting": safetensors(b'{"x":' * 50_000 + b"1" + b"}" * 50_000),
    "a tensor that is a number": safetensors({"x": 1}),
    "no dtype": safetensors(tensor(dtype=None), bytes(8)),
    "an unknown dtype": safetensors(tensor(dtype="F31"), bytes(8)),
    "a dtype that is a number": safetensors(tensor(dtype=4), bytes(8)),
    "no shape": safetensors(tensor(shape=None), bytes(8)),
    "a negative shape": safetensors(tensor(shape=[-2]), bytes(8)),
    "a shape of floats": safetensors(tensor(shape=[2.0]), bytes(8)),
    "a shape of text": safetensors(tensor(shape="2"), bytes(8)),
    "a shape that overflows": safetensors(tensor(shape=[1 << 33, 1 << 33]), bytes(8)),
    "a shape that overflows to its size": safetensors(tensor(shape=[1 << 32, 1 << 32, 1 << 2]), bytes(8)),
    "a huge number in a shape": safetensors(tensor(shape=[1 << 80]), bytes(8)),
    "no offsets": safetensors(tensor(data_offsets=None), bytes(8)),
    "one offset": safetensors(tensor(data_offsets=[0]), bytes(8)),
    "three offsets": safetensors(tensor(data_offsets=[0, 8, 8]), bytes(8)),
    "offsets backwards": safetensors(tensor(data_offsets=[8, 0]), bytes(8)),
    "negative offsets": safetensors(tensor(data_offsets=[-8, 0]), bytes(8)),
    "offsets beyond the file": safetensors(tensor(data_offsets=[0, 8]), bytes(4)),
    "offsets far beyond the file": safetensors(tensor(data_offsets=[1 << 62, (1 << 62) + 8]), bytes(8)),
    "offsets that overflow": safetensors(tensor(data_offsets=[0, 1 << 64]), bytes(8)),
    "a length that is not the shape's": safetensors(tensor(shape=[3]), bytes(8)),
    "a hole in front": safetensors(tensor(data_offsets=[8, 16]), bytes(16)),
    "bytes behind": safetensors(tensor(), bytes(64)),
    "tensors that overlap": safetensors(
        {**tensor(), "y": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}}, bytes(12)
    ),
    "a tensor twice": safetensors(b'{"x":%b,"x":%b}' % ((json.dumps(tensor()["x"]).encode(),) * 2), bytes(8)),
    "metadata of numbers": safetensors({"__metadata__": {"a": 1}, **tensor()}, bytes(8)),
    "metadata that is a list": safetensors({"__metadata__": [], **tensor()}, bytes(8)),
    "another model's tensors": safetensors(tensor(), bytes(8)),
    "no tensors": safetensors({}),
    "a pickle": b"\x80\x04cposix\nsystem\n(S'touch canary'\ntR.",
    "a zip archive": b"PK\x03\x04" + bytes(100),
}


@pytest.mark.parametrize("what", HEADERS)
def test_a_hostile_header_is_one_error(what: str, place: Callable[..., Path]) -> None:
    refused(place(**{"model.safetensors": HEADERS[what]}))


INDEXES: dict[str, bytes] = {
    "nothing": b"",
    "no JSON": b"{",
    "a list": b"[]",
    "null": b"null",
    "no map": b"{}",
    "a map that is a list": b'{"weight_map": ["model.safetensors"]}',
    "a map that is text": b'{"weight_map": "x"}',
    "no UTF-8": b'{"weight_map": {"\xff": "x"}}',
    "deep nesting": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "the directory above": b'{"weight_map": {"x": "../canary.safetensors"}}',
    "far above": b'{"weight_map": {"x": "../../../../../../etc/passwd"}}',
    "an absolute path": b'{"weight_map": {"x": "/etc/passwd"}}',
    "a folder below": b'{"weight_map": {"x": "a/b.safetensors"}}',
    "a zero byte": b'{"weight_map": {"x": "model.safetensors\\u0000.txt"}}',
    "a hidden file": b'{"weight_map": {"x": ".bashrc"}}',
    "the directory itself": b'{"weight_map": {"x": "."}}',
    "an empty name": b'{"weight_map": {"x": ""}}',
    "a line break": b'{"weight_map": {"x": "a\\nb"}}',
    "a name of 300 characters": json.dumps({"weight_map": {"x": "a" * 300}}).encode(),
    "a shard that is not there": b'{"weight_map": {"x": "model-2.safetensors"}}',
    "a number": b'{"weight_map": {"x": 7}}',
    "a map": b'{"weight_map": {"x": {}}}',
    "a pickle beside it": b'{"weight_map": {"x": "pytorch_model.bin"}}',
}


@pytest.mark.parametrize("what", INDEXES)
def test_a_hostile_index_is_one_error(what: str, place: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "canary.safetensors").write_bytes(HEADERS["another model's tensors"])
    directory = place(
        **{"model.safetensors.index.json": INDEXES[what], "pytorch_model.bin": HEADERS["a pickle"]}
    )
    refused(directory)


@pytest.mark.parametrize("kind", ["fifo", "directory", "device"])
def test_a_shard_that_is_no_file_is_one_error(kind: str, place: Callable[..., Path]) -> None:
    directory = place(**{"model.safetensors.index.json": b'{"weight_map": {"x": "odd"}}'})
    if kind == "fifo":
        os.mkfifo(directory / "odd")
    elif kind == "directory":
        (directory / "odd").mkdir()
    else:
        (directory / "odd").symlink_to("/dev/zero")
    refused(directory)


CONFIGS: dict[str, Any] = {
    "nothing": b"",
    "no JSON": b"{",
    "a list": [],
    "null": None,
    "no model type": {},
    "an unknown model type": {"model_type": "evil"},
    "a model type that is a list": {"model_type": []},
    "code of its own": {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config"}},
    "no language model": {"model_type": "vit"},
    "quantized": {"model_type": "llama", "quantization_config": {"quant_method": "bitsandbytes"}},
    "other sizes": {"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2},
}


@pytest.mark.parametrize("what", CONFIGS)
def test_a_hostile_config_is_one_error(what: str, place: Callable[..., Path]) -> None:
    value = CONFIGS[what]
    data = value if isinstance(value, bytes) else json.dumps(value).encode()
    directory = place(**{"config.json": data, "evil.py": b"open('canary', 'w')"})
    refused(directory)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_file_changed_anywhere_is_an_error_or_a_model(
    data: Any, sound: dict[str, bytes], place: Callable[..., Path]
) -> None:
    """Header bytes overwritten, cut or doubled; a change in a tensor's bytes alone is not noticed."""
    whole = sound["model.safetensors"]
    header_nbytes = 8 + struct.unpack("<Q", whole[:8])[0]
    begin = data.draw(st.integers(0, header_nbytes - 1))
    end = data.draw(st.integers(begin, min(begin + 40, header_nbytes)))
    changed = whole[:begin] + data.draw(st.binary(max_size=40)) + whole[end:]
    directory = place(**{"model.safetensors": changed})
    with contextlib.suppress(OffloadError):
        open_pretrained(directory)[1].close()
