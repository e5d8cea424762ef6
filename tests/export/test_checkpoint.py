"""Exports are whole, readable by transformers and safetensors alone, and replace only themselves."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file

from offload.errors import ConfigError, DiskFullError, StateError, StorageError
from offload.export import checkpoint
from offload.export.checkpoint import (
    MARKER_NAME,
    ExportOptions,
    check_export_target,
    export,
    persistent_buffers,
)
from offload.export.shards import plan_shards
from offload.runtime.rng import capture_rng, restore_rng

SHAPES = {"a.weight": (3, 5), "a.bias": (3,), "b.weight": (2, 3, 4), "c": ()}


def values() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def as_units(tensors: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, Mapping[str, torch.Tensor]]]:
    for name, tensor in reversed(tensors.items()):  # the order of arrival is not the order of the files
        yield name, {name: tensor}


def tree(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def llama(directory: Path) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    config.tie_word_embeddings = True
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(directory)
    return model


def test_the_random_state_survives_json() -> None:
    state = json.loads(json.dumps(capture_rng()))
    first = (random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(3).tolist())
    restore_rng(state)
    again = (random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(3).tolist())
    assert first == again


def test_the_cached_second_gaussian_is_kept() -> None:
    random.gauss(0, 1)
    np.random.randn()
    state = capture_rng()
    first = (random.gauss(0, 1), np.random.randn())
    restore_rng(state)
    assert (random.gauss(0, 1), np.random.randn()) == first


def test_a_random_state_that_is_none_of_ours_is_refused() -> None:
    with pytest.raises(StateError, match="cannot be read"):
        restore_rng({"python": {}})
    with pytest.raises(StateError, match="99 CUDA devices"):
        restore_rng(capture_rng() | {"cuda": ["" for _ in range(99)]})


def test_shards_close_before_they_grow_too_large() -> None:
    plan = plan_shards(dict.fromkeys("abcde", ((25,), torch.float32)), 250)
    assert [[slot.name for slot in shard.slots] for shard in plan] == [["a", "b"], ["c", "d"], ["e"]]
    assert [shard.file_name for shard in plan] == [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]


def test_a_tensor_larger_than_a_shard_gets_its_own() -> None:
    plan = plan_shards(
        {"a": ((1,), torch.float32), "big": ((99,), torch.float32), "c": ((1,), torch.float32)}, 8
    )
    assert [[slot.name for slot in shard.slots] for shard in plan] == [["a"], ["big"], ["c"]]


def test_every_tensor_begins_at_a_multiple_of_its_element_size() -> None:
    (shard,) = plan_shards({"a": ((3,), torch.bool), "b": ((5,), torch.bfloat16), "c": ((), torch.int64)}, 99)
    assert [(slot.name, slot.begin) for slot in shard.slots] == [("c", 0), ("b", 8), ("a", 18)]


def test_an_empty_plan_and_an_unknown_dtype_are_refused() -> None:
    with pytest.raises(ConfigError, match="nothing to export"):
        plan_shards({}, 100)
    with pytest.raises(ConfigError, match=r"cannot export a as torch\.complex64"):
        plan_shards({"a": ((3,), torch.complex64)}, 100)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("max_shard_nbytes", [10**9, 70])
def test_safetensors_reads_what_was_exported(
    tmp_path: Path, dtype: torch.dtype, max_shard_nbytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "CHUNK_NUMEL", 7)
    options = ExportOptions(dtype=dtype, max_shard_nbytes=max_shard_nbytes)
    written: list[int] = []
    target = export(tmp_path / "out", as_units(values()), SHAPES, options=options, on_written=written.append)
    loaded: dict[str, torch.Tensor] = {}
    for path in target.glob("*.safetensors"):
        loaded |= load_file(path)
        with safe_open(path, framework="pt") as file:
            assert file.metadata() == {"format": "pt"}
    assert loaded.keys() == SHAPES.keys()
    assert all(torch.equal(loaded[name], value.to(dtype)) for name, value in values().items())
    assert sum(written) == sum(value.numel() for value in values().values()) * dtype.itemsize


def test_several_shards_have_an_index(tmp_path: Path) -> None:
    target = export(tmp_path / "out", as_units(values()), SHAPES, options=ExportOptions(max_shard_nbytes=70))
    index = json.loads((target / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == SHAPES.keys()
    assert all(name in load_file(target / file) for name, file in index["weight_map"].items())
    assert index["metadata"]["total_size"] == 4 * sum(value.numel() for value in values().values())


def test_one_shard_has_no_index(tmp_path: Path) -> None:
    target = export(tmp_path / "out", as_units(values()), SHAPES)
    assert sorted(path.name for path in target.iterdir()) == ["model.safetensors", MARKER_NAME]


@pytest.mark.parametrize("max_shard_nbytes", [10**9, 3000])
def test_transformers_loads_the_export_without_offload(tmp_path: Path, max_shard_nbytes: int) -> None:
    model = llama(tmp_path / "in")
    (tmp_path / "in" / "tokenizer_config.json").write_text("{}")
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    options = ExportOptions(max_shard_nbytes=max_shard_nbytes, assets_from=tmp_path / "in")
    units = [("all", dict(model.named_parameters()))]
    target = export(tmp_path / "out", units, shapes, model=model, options=options)
    assert (target / "tokenizer_config.json").read_text() == "{}"
    assert (target / "generation_config.json").is_file()
    script = (
        "import sys, torch; sys.modules['offload'] = None\n"
        "from transformers import AutoModelForCausalLM as M\n"
        f"a, b = M.from_pretrained({str(tmp_path / 'in')!r}), M.from_pretrained({str(target)!r})\n"
        "assert b.lm_head.weight is b.model.embed_tokens.weight and b.dtype == torch.float32\n"
        "assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=90
    )
    assert done.returncode == 0, done.stderr
    assert "MISSING" not in done.stderr
    assert "UNEXPECTED" not in done.stderr


def test_the_config_says_the_dtype_of_the_files(tmp_path: Path) -> None:
    model = llama(tmp_path / "in")
    source = json.loads((tmp_path / "in" / "config.json").read_text())
    del source["dtype"]
    (tmp_path / "in" / "config.json").write_text(json.dumps(source | {"torch_dtype": "bfloat16", "mine": 1}))
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    units = [("all", dict(model.named_parameters()))]
    target = export(tmp_path / "out", units, shapes, options=ExportOptions(assets_from=tmp_path / "in"))
    config = json.loads((target / "config.json").read_text())
    assert (config["dtype"], config["mine"], "torch_dtype" in config) == ("bfloat16", 1, False)
    assert next(iter(load_file(target / "model.safetensors").values())).dtype == torch.bfloat16


def test_a_model_object_gives_its_config_and_buffers(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    model.register_buffer("scratch", torch.ones(1), persistent=False)
    assert persistent_buffers(model).keys() == {"1.running_mean", "1.running_var", "1.num_batches_tracked"}
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    target = export(tmp_path / "out", [("all", dict(model.named_parameters()))], shapes, model=model)
    loaded = load_file(target / "model.safetensors")
    assert loaded.keys() == model.state_dict().keys()
    assert loaded["1.num_batches_tracked"].dtype == torch.int64
    hf = llama(tmp_path / "in")
    shapes = {name: tuple(p.shape) for name, p in hf.named_parameters()}
    target = export(tmp_path / "hf", [("all", dict(hf.named_parameters()))], shapes, model=hf)
    assert json.loads((target / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]


def test_an_earlier_export_is_replaced(tmp_path: Path) -> None:
    export(tmp_path / "out", as_units(values()), SHAPES, options=ExportOptions(max_shard_nbytes=70))
    export(tmp_path / "out", as_units(values()), SHAPES)
    assert sorted(tree(tmp_path)) == [f"out/{name}" for name in ["model.safetensors", MARKER_NAME]]


def test_a_foreign_directory_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"did not write \(notes\.txt\)"):
        export(tmp_path, as_units(values()), SHAPES)
    assert tree(tmp_path) == {"notes.txt": b"mine"}


def test_a_file_added_to_an_export_keeps_it_from_being_replaced(tmp_path: Path) -> None:
    target = export(tmp_path / "out", as_units(values()), SHAPES)
    (target / "README.md").write_text("mine")
    before = tree(tmp_path)
    with pytest.raises(ConfigError, match=r"README\.md"):
        export(target, as_units(values()), SHAPES)
    assert tree(tmp_path) == before


def test_a_file_or_a_link_is_no_export_target(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    for name in ("file", "link"):
        with pytest.raises(ConfigError, match="not a directory"):
            check_export_target(tmp_path / name)


@pytest.mark.parametrize("broken", ["missing", "extra", "shape", "error"])
def test_a_failed_export_leaves_nothing_and_keeps_the_old(tmp_path: Path, broken: str) -> None:
    export(tmp_path / "out", as_units(values()), SHAPES)
    before = tree(tmp_path)
    tensors = values()

    def units() -> Iterator[tuple[str, Mapping[str, torch.Tensor]]]:
        if broken == "missing":
            del tensors["a.bias"]
        if broken == "extra":
            yield "x", {"x": torch.ones(1)}
        if broken == "shape":
            tensors["a.bias"] = torch.ones(4)
        yield from as_units(tensors)
        if broken == "error":
            raise StorageError("a drive failed", path="/nvme0")

    with pytest.raises((StateError, StorageError), match=r"a\.bias|x: it came|a drive failed"):
        export(tmp_path / "out", units(), SHAPES)
    assert tree(tmp_path) == before


def test_what_a_killed_export_left_is_cleaned_by_the_next(tmp_path: Path) -> None:
    script = (
        "import os, torch\nfrom offload.export.checkpoint import export\n"
        "def units():\n    yield 'a', {'a': torch.ones(3)}\n    os._exit(9)\n"
        f"export({str(tmp_path / 'out')!r}, units(), {{'a': (3,), 'b': (2,)}})\n"
    )
    root = Path(checkpoint.__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", script], cwd=root, check=False, timeout=60)
    assert done.returncode == 9
    assert not (tmp_path / "out").exists()
    assert tree(tmp_path) != {}
    export(tmp_path / "out", as_units(values()), SHAPES)
    assert sorted(tree(tmp_path)) == [f"out/{name}" for name in ["model.safetensors", MARKER_NAME]]


def test_a_killed_export_without_marker_is_cleaned_too(tmp_path: Path) -> None:
    (tmp_path / ".out.offload-tmp").mkdir()
    (tmp_path / ".out.offload-tmp" / f".{MARKER_NAME}.part").write_text("{")
    export(tmp_path / "out", as_units(values()), SHAPES)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_too_little_space_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10})())
    with pytest.raises(DiskFullError, match=r"10 B free \(10 bytes\); nothing was written"):
        export(tmp_path / "out", as_units(values()), SHAPES)
    assert tree(tmp_path) == {}


def test_a_disk_that_fills_up_is_reported_and_cleaned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.os, "posix_fallocate", full)
    with pytest.raises(
        DiskFullError,
        match=r"No space left on device; .* needed \(.* bytes\), .* free \(.* bytes\); nothing was left",
    ) as caught:
        export(tmp_path / "out", as_units(values()), SHAPES)
    assert caught.value.errno == 28
    assert tree(tmp_path) == {}


def test_a_parent_that_is_a_file_is_one_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match=r"export to .*file/out failed"):
        export(tmp_path / "file" / "out", as_units(values()), SHAPES)
