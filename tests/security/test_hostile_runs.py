"""Hostile files in a run and in an output directory: listed with a reason, refused, never followed."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from offload.aio import crc32c, open_engine
from offload.cli._runs import find_targets
from offload.errors import CorruptionError, OffloadError, StorageError
from offload.store import RecordSpec, RunReader, RunState, Store, check_removable, find_runs
from offload.training.pointer import read_pointer


@pytest.fixture
def run(tmp_path: Path) -> tuple[Path, Path, str]:
    """The drive, the run's folder and its id."""
    drive = tmp_path / "drive"
    drive.mkdir()
    with (
        open_engine("threads") as engine,
        Store.create([drive], [RecordSpec("w", 4096)], engine=engine, chunk_nbytes=4096) as store,
    ):
        store.write("w", bytes(4096)).wait()
        store.commit({"step": 1})
    return drive, drive / f"run-{store.run_id}", store.run_id


def framed(kind: str, body: bytes) -> bytes:
    line = f"{kind} 1.0 nbytes={len(body)}".encode()
    return b"%b crc32c=%08x\n%b" % (line, crc32c(body, crc32c(line)), body)


OWNERS = {
    "empty": b"",
    "of another run": framed("offload-run", b'{"directories":["/"],"drive":0,"run_id":"x"}'),
    "a list": framed("offload-run", b"[]"),
    "a manifest": framed("offload-manifest", b"{}"),
    "deep": framed("offload-run", b'{"a":' * 50_000 + b"1" + b"}" * 50_000),
    "long": b"x" * (3 << 20),
}


@pytest.mark.parametrize("what", OWNERS)
def test_a_hostile_ownership_file_proves_nothing(what: str, run: tuple[Path, Path, str]) -> None:
    drive, folder, run_id = run
    (folder / "OFFLOAD_RUN").write_bytes(OWNERS[what])
    (found,) = find_runs([drive])
    assert found.state is RunState.DAMAGED
    with open_engine("threads") as engine, pytest.raises(CorruptionError):
        RunReader.open([drive], engine=engine, run_id=run_id)
    with pytest.raises(StorageError):
        check_removable([drive], run_id)


@pytest.mark.parametrize("name", ["OFFLOAD_RUN", "manifest-1", "lock", "data.bin"])
@pytest.mark.parametrize("kind", ["link", "hard link", "pipe", "folder", "open to others"])
def test_what_is_not_a_file_of_ours_is_refused(name: str, kind: str, run: tuple[Path, Path, str]) -> None:
    drive, folder, run_id = run
    path, canary = folder / name, drive.parent / "canary"
    canary.write_bytes(b"keep")
    canary.chmod(0o600)
    if kind == "hard link":
        os.link(path, drive.parent / "second")
    elif kind == "open to others":
        path.chmod(0o666)
    else:
        path.unlink()
        if kind == "link":
            path.symlink_to(canary)
        elif kind == "pipe":
            os.mkfifo(path, 0o600)
        else:
            path.mkdir(mode=0o700)
    (found,) = find_runs([drive])  # no hang, no error
    with open_engine("threads") as engine:
        if (name, kind) == ("data.bin", "open to others"):
            # The folder is 0700, so nobody else reaches it; a manifest would be refused all the same.
            RunReader.open([drive], engine=engine, run_id=run_id).close()
        else:
            with pytest.raises(OffloadError):
                RunReader.open([drive], engine=engine, run_id=run_id)
    assert canary.read_bytes() == b"keep"
    assert found.run_id == run_id


POINTERS: dict[str, object] = {
    "a list": [],
    "null": None,
    "empty": {},
    "another format": {"format": "x"},
    "a path for an id": {"run_id": "../../etc"},
    "a number for an id": {"run_id": 4},
    "disk as text": {"disk": "/etc"},
    "disk of numbers": {"disk": [4]},
    "a zero byte": {"disk": ["/a\0b"]},
    "identity as text": {"identity": "x"},
    "a step as text": {"exported_step": "../x"},
}


@pytest.mark.parametrize("what", POINTERS)
def test_a_hostile_pointer_is_one_error(what: str, tmp_path: Path) -> None:
    sound = {
        "format": "offload-run",
        "run_id": "00010203-0405-4607-8809-0a0b0c0d0e0f",
        "disk": [str(tmp_path)],
        "identity": {},
        "imported": True,
        "exported_step": None,
    }
    changes = POINTERS[what]
    value = {**sound, **changes} if isinstance(changes, dict) and changes else changes
    (tmp_path / "run.json").write_text(json.dumps(value))
    with pytest.raises(CorruptionError, match=r"run\.json is damaged"):
        read_pointer(tmp_path)
    with pytest.raises(CorruptionError):
        find_targets([str(tmp_path)])
