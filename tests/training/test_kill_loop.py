"""Hundreds of SIGKILLs: every run goes on by itself and ends like one that was not killed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).resolve().parent


def kill(make_config: Any, tmp_path: Path, kills: int, *, seed: int, timeout_s: float) -> None:
    """Let kill_loop.py kill runs so often; see there."""
    config = make_config(
        output_dir=tmp_path / "none",
        max_steps=6,
        lr_scheduler_type="cosine",
        warmup_steps=2,
        val_size=2,
        eval_steps=2,
    )
    path = tmp_path / "run.yaml"
    path.write_text(config.to_yaml())
    done = subprocess.run(
        [
            sys.executable,
            str(HERE / "kill_loop.py"),
            str(path),
            str(tmp_path / "runs"),
            str(kills),
            str(seed),
        ],
        env={**os.environ, "PYTHONPATH": str(HERE.parents[1]), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr[-8000:]
    counts = re.match(
        r"(\d+) SIGKILLs, (\d+) at random moments and (\d+) at (\d+) named points; ", done.stdout
    )
    assert counts is not None
    number, at_random, at_points, points = (int(count) for count in counts.groups())
    assert number >= kills
    # It is half and half, and the points are many.
    assert min(at_random, at_points) > kills // 4 and points > 10


# Two halves, for two cores.
@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.timeout(600)
def test_two_hundred_kills_change_nothing(make_config: Any, tmp_path: Path, seed: int) -> None:
    kill(make_config, tmp_path, 100, seed=seed, timeout_s=500)


@pytest.mark.slow
@pytest.mark.timeout(10_000)
def test_five_thousand_kills_change_nothing(make_config: Any, tmp_path: Path) -> None:
    kill(make_config, tmp_path, 5000, seed=3, timeout_s=9000)
