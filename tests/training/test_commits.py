"""How often a run commits, what a crash takes it back to, and what its lines say of the cost."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import offload.training.loop
from offload.errors import ConfigError, StateError
from offload.store import list_runs
from offload.training.config import load_config
from offload.training.finetune import finetune

ROOT = Path(__file__).resolve().parents[2]

# Kills the process when a line begins so.
KILLED = (
    "import os, sys\nfrom pathlib import Path\nfrom offload.training.config import load_config\n"
    "from offload.training.finetune import finetune\n"
    "def echo(line):\n    if line.startswith(sys.argv[2]): os.kill(os.getpid(), 9)\n"
    "finetune(load_config(Path(sys.argv[1]), {}), echo=echo)\n"
)


def losses(directory: Path) -> dict[int, float]:
    records = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return {record["step"]: record["loss"] for record in records if "loss" in record}


def exported(directory: Path) -> bytes:
    return (directory / "final" / "model.safetensors").read_bytes()


def committed(directory: Path) -> tuple[int, int]:
    """Return the step that the run stands at, and the number of its commits."""
    (run,) = list_runs(directory / "state")
    assert run.state is not None
    return run.state["step"], run.generation


def stopper(at: str) -> tuple[Any, list[str]]:
    lines: list[str] = []

    def echo(line: str) -> None:
        lines.append(line)
        if line.startswith(at):
            os.kill(os.getpid(), signal.SIGTERM)

    return echo, lines


@pytest.fixture
def whole(make_config: Any, tmp_path: Path) -> Path:
    """A run of 7 steps that was never interrupted, all on disk."""
    finetune(make_config(output_dir=tmp_path / "whole", max_steps=7), echo=lambda _: None)
    return tmp_path / "whole"


@pytest.mark.parametrize(
    ("settings", "commits"),
    [
        # The import, and each step.
        ({}, 1 + 7),
        # The import, the first step, the third and sixth, and the last.
        ({"save_steps": 3}, 1 + 4),
        ({"home": "host", "save_steps": 3}, 1 + 4),
        # Their own: the import, the first step, and the last.
        ({"home": "host"}, 1 + 2),
        ({"home": "device"}, 1 + 2),
        ({"home": "host", "save_steps": 1}, 1 + 7),
        ({"home": "host", "save_steps": 2, "max_grad_norm": 100.0}, 1 + 5),
    ],
    ids=str,
)
def test_commits_come_as_often_as_asked_and_change_nothing(
    make_config: Any, tmp_path: Path, whole: Path, settings: dict[str, Any], commits: int
) -> None:
    out = tmp_path / "out"
    finetune(make_config(max_steps=7, **settings), echo=lambda _: None)
    assert committed(out) == (7, commits)
    assert losses(out) == losses(whole)
    assert exported(out) == exported(whole)


@pytest.mark.parametrize("home", ["disk", "host", "device"])
def test_a_stop_between_two_commits_commits(make_config: Any, tmp_path: Path, whole: Path, home: str) -> None:
    config = make_config(max_steps=7, home=home, save_steps=4)
    echo, lines = stopper("step 3/7")
    assert finetune(config, echo=echo).exit_code == 143
    assert "stopped after step 3 of 7, which is committed; run the same command again to go on" in lines
    assert committed(tmp_path / "out")[0] == 3
    assert finetune(config, echo=lambda _: None).step == 7
    assert losses(tmp_path / "out") == losses(whole)
    assert exported(tmp_path / "out") == exported(whole)


@pytest.mark.parametrize("home", ["disk", "host"])
def test_a_kill_between_two_commits_goes_back_to_the_last(
    make_config: Any, tmp_path: Path, whole: Path, home: str
) -> None:
    config = make_config(max_steps=7, home=home, save_steps=3)
    path = tmp_path / "run.yaml"
    path.write_text(config.to_yaml())
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(path), "step 5/7"], cwd=ROOT, capture_output=True, timeout=100
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    # Steps 4 and 5 were written over and over; what is read is step 3.
    assert committed(tmp_path / "out")[0] == 3
    assert max(losses(tmp_path / "out")) == 5
    lines: list[str] = []
    assert finetune(config, echo=lines.append).step == 7
    assert lines[0].endswith("at step 3 of 7")
    assert losses(tmp_path / "out") == losses(whole)
    assert exported(tmp_path / "out") == exported(whole)


def test_a_run_that_ends_at_a_loss_that_is_not_finite_keeps_the_steps_before(
    make_config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    number = iter(range(1, 100))

    def backward(*arguments: Any) -> tuple[float, str]:
        if next(number) == 6:
            return float("nan"), "the loss is nan"
        return real(*arguments)

    real = offload.training.loop._backward
    monkeypatch.setattr(offload.training.loop, "_backward", backward)
    lines: list[str] = []
    with pytest.raises(StateError, match="nothing of this step was applied"):
        finetune(make_config(max_steps=7, home="host", save_steps=50), echo=lines.append)
    assert lines[-1].startswith("the run stands at step 5, committed")
    assert committed(tmp_path / "out")[0] == 5


def test_the_lines_say_what_a_commit_takes(make_config: Any) -> None:
    lines: list[str] = []
    finetune(make_config(max_steps=4, home="host"), echo=lines.append)
    steps = [line for line in lines if line.startswith("step ")]
    # The first one has none behind it; the others show the last that there was.
    assert [bool(re.search(r"  commit \d+(\.\d)? m?s  ", line)) for line in steps] == [
        False,
        True,
        True,
        True,
    ]
    (told,) = [line for line in lines if line.startswith("a stop ")]
    assert re.search(r"its commit takes \d+(\.\d)? m?s; wait longer", told)
    assert "takes 0 ms" not in told


@pytest.mark.parametrize("policy", ["skip", "rollback"])
def test_what_cannot_be_undone_between_commits_is_refused_at_once(
    make_config: Any, tmp_path: Path, policy: str
) -> None:
    settings = {"on_non_finite": policy, "snapshot_steps": 2}
    with pytest.raises(
        ConfigError, match=r"commits are 100 steps apart: set save_steps: 1, or max_grad_norm"
    ):
        make_config(home="host", **settings)
    for more in ({"save_steps": 1}, {"max_grad_norm": 1.0}):
        assert make_config(home="host", **settings, **more).commit_steps in (1, 100)


def test_the_key_survives_its_own_file(make_config: Any, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(make_config(home="device", save_steps=7, queue_depth=5).to_yaml())
    config = load_config(path, {})
    assert (config.home, config.commit_steps, config.queue_depth) == ("device", 7, 5)
