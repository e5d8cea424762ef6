"""The stress of `tests/sanitize/engine_stress.py`, short: a program of its own, so that a hang ends."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from engine_workbench import Drive

from offload.aio import probe_engines

STRESS = Path(__file__).resolve().parents[1] / "sanitize" / "engine_stress.py"
MEMORY = Path("/dev/shm")
NUM_OPERATIONS = {"uring": 3000, "threads": 3000, "portable": 800}


@pytest.fixture
def second_folder(tmp_path: Path) -> Iterator[Path]:
    """A folder on another file system where there is one."""
    where = MEMORY if os.access(MEMORY, os.W_OK) else tmp_path
    with tempfile.TemporaryDirectory(dir=where) as folder:
        yield Path(folder)


def stress(name: str, *arguments: str) -> str:
    """Run the program with one engine and return the line that it prints."""
    row = {row.name: row for row in probe_engines()}[name]
    if not row.available:
        pytest.skip(row.reason)
    command = [sys.executable, str(STRESS), "--engine", name, "--timeout-s", "100", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=110)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return done.stdout


@pytest.mark.parametrize("name", NUM_OPERATIONS)
def test_files_hold_what_the_model_says_after_everything_at_once(
    name: str, tmp_path: Path, second_folder: Path
) -> None:
    said = stress(name, "--operations", str(NUM_OPERATIONS[name]), str(tmp_path), str(second_folder))
    # None of these is left out by chance: the rounds are long.
    for doing in ("dropped", "cancelled at once", "files closed", "short reads", "writes past the limit"):
        assert doing in said


@pytest.mark.parametrize("name", NUM_OPERATIONS)
def test_a_drive_that_fills_up_meanwhile_disturbs_nothing_else(
    name: str, tmp_path: Path, drive: Drive
) -> None:
    said = stress(name, "--operations", "600", "--small-drive", str(drive.path), str(tmp_path))
    assert "drives filled" in said


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", NUM_OPERATIONS)
def test_the_same_for_long(name: str, seed: int, tmp_path: Path, second_folder: Path) -> None:
    operations = str(20 * NUM_OPERATIONS[name])
    stress(name, "--seed", str(seed), "--operations", operations, str(tmp_path), str(second_folder))
