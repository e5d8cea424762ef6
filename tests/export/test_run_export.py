"""A run that is not open: its contents told by itself, and exported as its runtime would."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from toy_models import BUILDERS, SETTINGS, build, train

import offload
from offload.aio import open_engine
from offload.errors import ConfigError, CorruptionError, LockedError, StateError
from offload.export import run as run_export
from offload.export.checkpoint import ExportOptions
from offload.export.contents import CONTENTS_KEY, read_contents, tensors_at
from offload.export.run import export_run
from offload.store import RunReader, Store


def tree(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def begin(name: str, disk: list[Path], to: Path, **settings: Any) -> str:
    """Train two steps, export by the runtime, close, and return the run's id."""
    model = build(name)
    torch.manual_seed(7)
    with offload.attach(model, **{**SETTINGS, **settings}, disk=disk) as runtime:
        train(name, runtime, model, range(2))
        runtime.export(to)
        assert runtime.run_id is not None
        return runtime.run_id


@pytest.fixture
def drives(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / "a", tmp_path / "b"]
    for path in paths:
        path.mkdir()
    return paths


@pytest.fixture
def engine() -> Iterator[Any]:
    with open_engine("threads") as engine:
        yield engine


@pytest.mark.parametrize(
    "settings",
    [
        {"dtype": "bfloat16"},
        {"dtype": "float32"},
        {"dtype": "bfloat16", "moments": "8bit"},
        {"dtype": "bfloat16", "home": "host", "chunk_numel": 1024, "chunk_nbytes": 4096},
        {"dtype": "bfloat16", "chunk_numel": 256, "chunk_nbytes": 4096},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
@pytest.mark.parametrize("name", sorted(BUILDERS))
def test_a_closed_run_exports_what_its_runtime_did(
    name: str, settings: dict[str, Any], drives: list[Path], tmp_path: Path, engine: Any
) -> None:
    run_id = begin(name, drives, tmp_path / "runtime", **settings)
    with RunReader.open(drives, engine=engine, run_id=run_id) as reader:
        contents = read_contents(reader.newest.identity)
        export_run(reader.newest, contents, tmp_path / "closed")
    ours, theirs = tree(tmp_path / "closed"), tree(tmp_path / "runtime")
    assert ours["model.safetensors"] == theirs["model.safetensors"]
    assert contents.model == type(build(name)).__name__
    assert ours.keys() == theirs.keys() - {"config.json", "generation_config.json"}


def test_frozen_parameters_are_exported_too(drives: list[Path], tmp_path: Path, engine: Any) -> None:
    model = build("mlp")
    frozen = list(model.parameters())[:2]
    for parameter in frozen:
        parameter.requires_grad_(False)
    with offload.attach(model, **SETTINGS, disk=drives) as runtime:
        train("mlp", runtime, model, range(1))
        runtime.export(tmp_path / "runtime")
        run_id = runtime.run_id
    with RunReader.open(drives, engine=engine, run_id=run_id) as reader:
        export_run(reader.newest, read_contents(reader.newest.identity), tmp_path / "closed")
    assert tree(tmp_path / "closed") == tree(tmp_path / "runtime")


@pytest.fixture
def run(drives: list[Path], tmp_path: Path) -> str:
    return begin("llama", drives, tmp_path / "runtime", dtype="bfloat16", chunk_numel=1024, chunk_nbytes=4096)


def test_moments_are_not_read(run: str, drives: list[Path], tmp_path: Path, engine: Any) -> None:
    """Of an optimizer chunk only the store chunks that hold residuals."""
    with RunReader.open(drives, engine=engine, run_id=run) as reader:
        asked: dict[str, int] = {}
        read = reader.newest.read

        def counting(name: str, buffer: Any, *, offset: int = 0, nbytes: int | None = None) -> Any:
            kind = name.rpartition(":")[2]
            asked[kind] = asked.get(kind, 0) + (nbytes or memoryview(buffer).nbytes)
            return read(name, buffer, offset=offset, nbytes=nbytes)

        reader.newest.read = counting  # type: ignore[method-assign]
        export_run(reader.newest, read_contents(reader.newest.identity), tmp_path / "closed")
    # Chunks of 1024: 2 KiB of residuals, which is one store chunk of 4096 of three.
    assert asked["optimizer"] <= 1.2 * 2 * asked["weights"]


def test_damage_ends_an_export_and_leaves_nothing(
    run: str, drives: list[Path], tmp_path: Path, engine: Any
) -> None:
    for path in drives:
        data = path / f"run-{run}" / "data.bin"
        data.write_bytes(bytes(data.stat().st_size))
    with (
        RunReader.open(drives, engine=engine, run_id=run) as reader,
        pytest.raises(CorruptionError, match="checksum mismatch"),
    ):
        export_run(reader.newest, read_contents(reader.newest.identity), tmp_path / "closed")
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b", "runtime"}


def test_a_run_in_use_is_not_exported(run: str, drives: list[Path], engine: Any) -> None:
    with Store.open(drives, engine=engine, run_id=run), pytest.raises(LockedError, match="locked by process"):
        RunReader.open(drives, engine=engine, run_id=run)


def test_another_model_is_refused(run: str, drives: list[Path], tmp_path: Path, engine: Any) -> None:
    other = build("gpt2")
    with RunReader.open(drives, engine=engine, run_id=run) as reader:
        contents = read_contents(reader.newest.identity)
        with pytest.raises(ConfigError, match="is of another model: .* parameters differ"):
            export_run(reader.newest, contents, tmp_path / "closed", model=other)


def test_buffers_come_from_the_model(drives: list[Path], tmp_path: Path, engine: Any) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 1))
    model.register_buffer("scale", torch.full((3,), 2.0))
    with offload.attach(model, **SETTINGS, disk=drives) as runtime:
        model(torch.ones(2, 4)).sum().backward()
        runtime.step()
        run_id = runtime.run_id
    fresh = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 1))
    fresh.register_buffer("scale", torch.full((3,), 2.0))
    with RunReader.open(drives, engine=engine, run_id=run_id) as reader:
        contents = read_contents(reader.newest.identity)
        assert contents.buffers == ("scale",)
        export_run(reader.newest, contents, tmp_path / "closed", model=fresh)
    assert b'"scale"' in (tmp_path / "closed" / "model.safetensors").read_bytes()[:4096]


def test_one_units_memory_is_enough(
    run: str, drives: list[Path], tmp_path: Path, engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[int] = []
    real = run_export.aligned_buffer
    monkeypatch.setattr(run_export, "aligned_buffer", lambda n: taken.append(n) or real(n))
    with RunReader.open(drives, engine=engine, run_id=run) as reader:
        contents = read_contents(reader.newest.identity)
        export_run(reader.newest, contents, tmp_path / "closed")
    largest = max(record.host_nbytes for record in contents.records.values())
    assert taken == [largest, *[contents.records["model.layers.0"].format.chunk_nbytes] * 2]


def test_every_tensor_is_found_where_it_lies(run: str, drives: list[Path], engine: Any) -> None:
    with RunReader.open(drives, engine=engine, run_id=run) as reader:
        records = read_contents(reader.newest.identity).records
    for record in records.values():
        for spec in record.layout.trainable:
            at = 2 * spec.offset
            assert tensors_at(records, record.name("weights"), at, at + 2) == (spec.name,)
            assert spec.name in tensors_at(records, record.name("weights"), 0, record.weights_nbytes)
            chunk = spec.offset // 1024
            first = record.format.optimizer_chunks(record.layout.trainable_numel)[chunk]
            for field in ("residual", "exp_avg", "exp_avg_sq"):
                array = getattr(first, field)
                itemsize = 2 if field == "residual" else 4
                begin = first.offset_bytes + array.start + itemsize * (spec.offset - first.start)
                found = tensors_at(records, record.name("optimizer"), begin, begin + itemsize)
                assert found == (f"{field} of {spec.name}",)
    assert tensors_at(records, "other:weights", 0, 4096) == ()


@pytest.fixture
def identity(run: str, drives: list[Path], engine: Any) -> dict[str, Any]:
    with RunReader.open(drives, engine=engine, run_id=run) as reader:
        return json.loads(json.dumps(dict(reader.newest.identity)))


def test_a_run_that_does_not_say_is_told_so(identity: dict[str, Any]) -> None:
    del identity[CONTENTS_KEY]
    with pytest.raises(StateError, match="an older offload began it"):
        read_contents(identity)


IMPOSSIBLE: dict[str, tuple[tuple[Any, ...], Any]] = {
    "contents are a list": ((), []),
    "contents are text": ((), "x"),
    "no units": (("units",), None),
    "units are a number": (("units",), 7),
    "a unit too short": (("units", 0), ["x", []]),
    "a unit is a number": (("units", 0), 3),
    "a unit twice": (("units", 1), None),
    "a unit's name is a number": (("units", 0, 0), 4),
    "a unit's name is empty": (("units", 0, 0), ""),
    "a unit's name has a newline": (("units", 0, 0), "a\nb"),
    "a tensor is text": (("units", 0, 1, 0), "x"),
    "a tensor too short": (("units", 0, 1, 0), ["x", [1]]),
    "a tensor's name is long": (("units", 0, 1, 0, 0), "x" * 2000),
    "a tensor's name has an escape": (("units", 0, 1, 0, 0), "\x1b[2J"),
    "a tensor twice": (("units", 1, 1, 0, 0), "model.embed_tokens.weight"),
    "a shape is a number": (("units", 0, 1, 0, 1), 8),
    "a shape is negative": (("units", 0, 1, 0, 1), [-1, 8]),
    "a shape of floats": (("units", 0, 1, 0, 1), [1.0, 8]),
    "a shape of booleans": (("units", 0, 1, 0, 1), [True]),
    "a shape that overflows": (("units", 0, 1, 0, 1), [1 << 40, 1 << 40]),
    "a shape of many dimensions": (("units", 0, 1, 0, 1), [1] * 40),
    "an offset is negative": (("units", 0, 1, 0, 2), -128),
    "an offset is text": (("units", 0, 1, 0, 2), "0"),
    "an offset is not aligned": (("units", 0, 1, 0, 2), 5),
    "an offset is huge": (("units", 0, 1, 0, 2), 1 << 60),
    "tensors overlap": (("units", 1, 1, 1, 2), 0),
    "a directory is a number": (("directory",), 4),
    "a directory has a zero byte": (("directory",), "a\0b"),
    "the model is a list": (("model",), []),
    "buffers are a number": (("buffers",), 4),
    "a buffer is a number": (("buffers",), [4]),
}


@pytest.mark.parametrize("what", IMPOSSIBLE)
def test_impossible_contents_are_refused(what: str, identity: dict[str, Any]) -> None:
    path, value = IMPOSSIBLE[what]
    changed = copy.deepcopy(identity)
    if what == "a unit twice":
        value = changed[CONTENTS_KEY]["units"][0]
    target: Any = changed
    *parents, last = (CONTENTS_KEY, *path)
    for key in parents:
        target = target[key]
    target[last] = value
    with pytest.raises(ConfigError, match="impossible things"):
        read_contents(changed)


@pytest.mark.parametrize(
    "changes",
    [
        {"dtype": "int3"},
        {"dtype": 3},
        {"chunk_numel": 0},
        {"chunk_numel": "many"},
        {"chunk_numel": -128},
        {"moments": []},
        {"compute_dtype": "float64"},
        {"compute_dtype": []},
    ],
    ids=str,
)
def test_impossible_formats_are_refused(changes: dict[str, Any], identity: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        read_contents(identity | changes)


def test_contents_that_are_not_the_records_are_refused(
    run: str, drives: list[Path], tmp_path: Path, engine: Any, identity: dict[str, Any]
) -> None:
    for changes in ({"dtype": "float32"}, {"chunk_numel": 2048}, {"chunk_numel": 128}):
        with (
            RunReader.open(drives, engine=engine, run_id=run) as reader,
            pytest.raises(CorruptionError, match="something else than it is"),
        ):
            export_run(reader.newest, read_contents(identity | changes), tmp_path / "closed")
        assert not (tmp_path / "closed").exists()


def test_a_run_goes_on_though_its_model_directory_moved(
    drives: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build("mlp")
    with offload.attach(model, **SETTINGS, disk=drives) as runtime:
        train("mlp", runtime, model, range(1))
        run_id = runtime.run_id
    monkeypatch.setattr("offload.runtime.identity.pretrained_directory", lambda _: Path("/elsewhere"))
    with offload.attach(build("mlp"), **SETTINGS, disk=drives, run_id=run_id, resume=True) as runtime:
        assert runtime.global_step == 1


def test_an_export_takes_the_dtype_asked_for(
    run: str, drives: list[Path], tmp_path: Path, engine: Any
) -> None:
    with RunReader.open(drives, engine=engine, run_id=run) as reader:
        contents = read_contents(reader.newest.identity)
        export_run(reader.newest, contents, tmp_path / "out", options=ExportOptions(dtype=torch.bfloat16))
    wide = load_file(tmp_path / "runtime" / "model.safetensors")
    narrow = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(narrow[name], value.to(torch.bfloat16)) for name, value in wide.items())
