"""`scripts/seeded_bugs.py`: every bug can be planted and three are noticed; `make soak` runs all."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """`scripts/seeded_bugs.py`, which is no part of a package."""
    spec = importlib.util.spec_from_file_location("seeded_bugs", ROOT / "scripts" / "seeded_bugs.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclass looks itself up
    spec.loader.exec_module(module)
    return module


def test_every_bug_has_its_place_and_its_tests(script: ModuleType) -> None:
    """Code moves; a bug whose place is gone would no longer show anything."""
    assert len(script.BUGS) >= 12
    assert len({bug.name for bug in script.BUGS}) == len(script.BUGS)
    for bug in script.BUGS:
        assert (ROOT / "offload" / bug.path).read_text().count(bug.text) == 1, f"plant {bug.name} anew"
        assert bug.text != bug.planted
        for test in bug.tests:
            assert (ROOT / test.split("::")[0]).exists(), f"{bug.name} names {test}"


def test_every_single_test_that_a_bug_names_is_there(script: ModuleType) -> None:
    """The numbers and names in brackets change with the parameters of a test."""
    named = sorted({test for bug in script.BUGS for test in bug.tests if "::" in test})
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *named],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert {line for line in done.stdout.splitlines() if "::" in line} == set(named)


def test_a_bug_that_cannot_be_planted_is_an_error(script: ModuleType, tmp_path: Path) -> None:
    gone = script.Bug("gone", "sizes.py", "nobody wrote this", "", ())
    with pytest.raises(ValueError, match="gone: its text is 0 times in offload/sizes.py"):
        script.plant(gone, tmp_path)


@pytest.mark.parametrize("name", ["no-directory-fsync", "ignore-a-failed-write", "commit-without-waiting"])
def test_a_bug_is_noticed(script: ModuleType, tmp_path: Path, name: str) -> None:
    """Three that need no torch, so that this takes seconds."""
    (bug,) = script.select([name])
    script.plant(bug, tmp_path)
    outcome = script.run_tests(tmp_path, bug.tests)
    assert not outcome.passed
    assert outcome.first
