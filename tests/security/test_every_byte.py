"""A single bit that changes anywhere in a run is found and named, or is of no consequence.

What a generation refers to is covered: every chunk of its records, its manifests, the ownership files. Not
referred to are the extents that the next generation will be written to, and the lock's content.
"""

from __future__ import annotations

import os
import random
from collections import Counter
from pathlib import Path

import pytest
import torch
from toy_models import SETTINGS, build, train

import offload
from offload.aio import open_engine
from offload.errors import CorruptionError, StorageError
from offload.export.contents import read_contents, tensors_at
from offload.store import RunReader, Store, fall_back, verify_reader

NUM_FLIPS = 1000


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Path], str]:
    """A run of two drives and three generations, closed."""
    drives = [tmp_path_factory.mktemp("a"), tmp_path_factory.mktemp("b")]
    model = build("mlp")
    torch.manual_seed(7)
    with offload.attach(model, **{**SETTINGS, "chunk_numel": 1024}, disk=drives) as runtime:
        train("mlp", runtime, model, range(2))
        assert runtime.run_id is not None
        return drives, runtime.run_id


def flip(fd: int, position: int, bit: int) -> None:
    (byte,) = os.pread(fd, 1, position)
    os.pwrite(fd, bytes([byte ^ 1 << bit]), position)


def referenced(reader: RunReader) -> list[tuple[str, int, int, str, int]]:
    """(file, begin, end, record, chunk) of every chunk of the newest generation."""
    generation, found = reader.newest, []
    for spec in generation.written:
        for chunk in range(-(-spec.nbytes // generation.chunk_nbytes)):
            _, path, offset = generation.place(spec.name, chunk)
            nbytes = min(generation.chunk_nbytes, spec.nbytes - chunk * generation.chunk_nbytes)
            found.append((path, offset, offset + nbytes, spec.name, chunk))
    return found


def test_a_thousand_flipped_bits_are_found_and_named(run: tuple[list[Path], str]) -> None:
    drives, run_id = run
    rng = random.Random(1000)
    with open_engine("threads") as engine:
        with RunReader.open(drives, engine=engine, run_id=run_id) as reader:
            chunks = referenced(reader)
            records = read_contents(reader.newest.identity).records
        folders = [drive / f"run-{run_id}" for drive in drives]
        places: list[tuple[Path, int, int]] = []
        for folder in folders:
            for name in ("manifest-2", "manifest-3", "OFFLOAD_RUN", "lock"):
                path = folder / name
                places.append((path, 0, path.stat().st_size))
        data = [(Path(path), begin, end) for path, begin, end, _, _ in chunks]
        found: Counter[str] = Counter()
        for number in range(NUM_FLIPS):
            # A quarter in the small files, which are a small part of the bytes and decide over all.
            path, begin, end = rng.choice(places if number % 4 == 0 else data)
            position, bit = rng.randrange(begin, end), rng.randrange(8)
            fd = os.open(path, os.O_RDWR)
            try:
                flip(fd, position, bit)
                found[check(drives, run_id, engine, path, position, chunks, records)] += 1
            finally:
                flip(fd, position, bit)
                os.close(fd)
        with RunReader.open(drives, engine=engine, run_id=run_id) as reader:
            assert verify_reader(reader).ok
    assert sum(found.values()) == NUM_FLIPS
    assert found["data"] == NUM_FLIPS * 3 // 4
    assert min(found["manifest"], found["ownership"], found["lock"]) > 20


def check(drives, run_id, engine, path: Path, position: int, chunks, records) -> str:
    """Verify the run as it is now; return what was found, after checking that it was named."""
    if path.name == "OFFLOAD_RUN":
        with pytest.raises(CorruptionError, match=f"^{path} ") as caught:
            RunReader.open(drives, engine=engine, run_id=run_id)
        assert caught.value.path == str(path)
        return "ownership"
    with RunReader.open(drives, engine=engine, run_id=run_id) as reader:
        assert reader.newest.number == 3
        report = verify_reader(reader)
        if path.name == "lock":
            # For messages alone: the kernel keeps the lock itself, and this one has just been taken.
            assert report.ok
            return "lock"
        if path.name.startswith("manifest"):
            assert report.newest.ok and not report.ok
            assert any(problem.startswith(f"{path} ") for problem in report.problems)
            return "manifest"
        (damaged,) = report.newest.damaged
        (expected,) = [
            (record, chunk)
            for file, begin, end, record, chunk in chunks
            if file == str(path) and begin <= position < end
        ]
        assert (damaged.record, damaged.chunk) == expected
        drive, file, offset = reader.newest.place(*expected)
        assert str(path) == file and f"(drive {drive})" in str(damaged.error)
        assert isinstance(damaged.error, CorruptionError)
        assert damaged.error.offset_bytes == offset <= position < offset + damaged.end - damaged.begin
        # Which tensors: unless the whole chunk is padding, or moments of nothing.
        if damaged.record.endswith(":weights"):
            assert tensors_at(records, damaged.record, damaged.begin, damaged.end)
        return "data"


def test_what_is_not_referred_to_is_of_no_consequence(run: tuple[list[Path], str]) -> None:
    drives, run_id = run
    rng = random.Random(2)
    with open_engine("threads") as engine, RunReader.open(drives, engine=engine, run_id=run_id) as reader:
        used = [(path, begin, end) for path, begin, end, _, _ in referenced(reader)]
        for drive in drives:
            path = drive / f"run-{run_id}" / "data.bin"
            free = [
                position
                for position in range(0, path.stat().st_size, 512)
                if not any(file == str(path) and begin <= position < end for file, begin, end in used)
            ]
            fd = os.open(path, os.O_RDWR)
            for position in rng.sample(free, 10):
                flip(fd, position, 0)
                assert verify_reader(reader).ok
                flip(fd, position, 0)
            os.close(fd)


def test_a_run_goes_on_from_the_generation_before_a_damaged_one(
    run: tuple[list[Path], str], tmp_path: Path
) -> None:
    """To the same bits as a run that was never damaged."""
    drives = [tmp_path / "c", tmp_path / "d"]
    for drive in drives:
        drive.mkdir()
    model = build("mlp")
    torch.manual_seed(7)
    settings = {**SETTINGS, "chunk_numel": 1024, "disk": drives}
    with offload.attach(model, **settings) as runtime:
        losses = train("mlp", runtime, model, range(3))
        run_id = runtime.run_id
    with open_engine("threads") as engine:
        with RunReader.open(drives, engine=engine, run_id=run_id) as reader:
            _, path, offset = reader.newest.place("1:optimizer", 0)
        fd = os.open(path, os.O_RDWR)
        flip(fd, offset + 100, 5)
        os.close(fd)
        assert fall_back(drives, engine=engine, run_id=run_id).state["step"] == 2
    again = build("mlp")
    with offload.attach(again, **settings, run_id=run_id, resume=True) as runtime:
        assert runtime.global_step == 2
        assert train("mlp", runtime, again, range(2, 3)) == losses[2:]


def test_damage_that_training_meets_names_the_way_on(tmp_path: Path) -> None:
    model = build("mlp")
    with offload.attach(model, **SETTINGS, disk=[tmp_path]) as runtime:
        train("mlp", runtime, model, range(1))
        run_id = runtime.run_id
    with open_engine("threads") as engine, Store.open([tmp_path], engine=engine, run_id=run_id) as store:
        for name in store.records:
            assert store.is_written(name)
    data = tmp_path / f"run-{run_id}" / "data.bin"
    data.write_bytes(bytes(data.stat().st_size))
    again = build("mlp")
    with (
        pytest.raises(StorageError, match="'offload verify' tells whether the generation before is whole"),
        offload.attach(again, **SETTINGS, disk=[tmp_path], run_id=run_id, resume=True) as runtime,
    ):
        train("mlp", runtime, again, range(1, 2))
