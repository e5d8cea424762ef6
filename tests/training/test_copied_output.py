"""An output directory that was copied or moved: two runs never touch each other."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from offload.errors import ConfigError, StateError
from offload.store import list_runs
from offload.training.finetune import finetune


def train(config: Any) -> int:
    return finetune(config, echo=lambda _: None).step


def contents(directory: Path) -> dict[str, bytes]:
    """Every file but locks, which whoever only looks may write their pid into."""
    files = (path for path in sorted(directory.rglob("*")) if path.is_file() and path.name != "lock")
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


@pytest.fixture
def make(make_config: Any, tmp_path: Path) -> Any:
    """Return a function that makes the configuration of a run in a directory of `tmp_path`."""

    def make(name: str, max_steps: int, **flags: Any) -> Any:
        return make_config(
            output_dir=tmp_path / name, max_steps=max_steps, lr_scheduler_type="constant", **flags
        )

    return make


@pytest.fixture
def drive(tmp_path: Path) -> Path:
    path = tmp_path / "drive"
    path.mkdir(mode=0o700)
    return path


def test_a_copy_that_points_to_the_drives_of_the_original_is_refused(
    make: Any, tmp_path: Path, drive: Path
) -> None:
    train(make("out", 2, disk=drive))
    shutil.copytree(tmp_path / "out", tmp_path / "copy")
    before = contents(tmp_path)
    (tmp_path / "mounted").symlink_to(drive)
    for disk in (drive, tmp_path / "mounted"):
        with pytest.raises(ConfigError) as error:
            train(make("copy", 4, disk=disk))
        text = str(error.value)
        assert f"{tmp_path}/copy is a copy of {tmp_path}/out" in text and str(disk) in text
    (tmp_path / "mounted").unlink()
    assert contents(tmp_path) == before
    # The original goes on, and the copy does when the original is given up, as the message says.
    assert train(make("out", 4, disk=drive)) == 4
    assert f"remove {tmp_path}/out/run.json" in text
    (tmp_path / "out/run.json").unlink()
    assert train(make("copy", 6, disk=drive)) == 6


def test_a_copy_with_its_own_state_goes_on_beside_the_original(make: Any, tmp_path: Path) -> None:
    train(make("out", 2))
    shutil.copytree(tmp_path / "out", tmp_path / "copy")
    before = contents(tmp_path / "out")
    assert train(make("copy", 4)) == 4
    assert contents(tmp_path / "out") == before
    after = contents(tmp_path / "copy")
    assert train(make("out", 4)) == 4
    assert contents(tmp_path / "copy") == after
    assert after["final/model.safetensors"] == contents(tmp_path / "out")["final/model.safetensors"]


def test_a_directory_that_was_moved_goes_on(make: Any, tmp_path: Path, drive: Path) -> None:
    train(make("out", 2, disk=drive))
    (tmp_path / "out").rename(tmp_path / "moved")
    assert train(make("moved", 4, disk=drive)) == 4
    assert json.loads((tmp_path / "moved/run.json").read_text())["directory"] == f"{tmp_path}/moved"
    # Whatever takes its old place is another run.
    train(make("out", 1))
    assert train(make("moved", 5, disk=drive)) == 5


@pytest.mark.parametrize("knows_its_place", [True, False])
def test_a_copy_made_during_the_import_removes_nothing_of_the_original(
    make: Any, tmp_path: Path, drive: Path, knows_its_place: bool
) -> None:
    """Its `run.json` says that nothing was committed, which was true when it was copied."""
    train(make("out", 2, disk=drive))
    shutil.copytree(tmp_path / "out", tmp_path / "copy")
    path = tmp_path / "copy/run.json"
    pointer = {**json.loads(path.read_text()), "imported": False}
    if not knows_its_place:
        # As earlier versions wrote it.
        del pointer["directory"]
    path.write_text(json.dumps(pointer))
    before = contents(tmp_path)
    with pytest.raises(ConfigError if knows_its_place else StateError) as error:
        train(make("copy", 4, disk=drive))
    assert f"{tmp_path}/copy" in str(error.value)
    assert contents(tmp_path) == before
    (run,) = list_runs(drive)
    assert run.problem is None and run.state is not None and run.state["step"] == 2
