"""`commit: off`: the same training, told loudly; resumed after an orderly stop, and refused otherwise."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import offload.training.loop
from offload.errors import ConfigError, CorruptionError, StateError
from offload.store import RunState, find_runs
from offload.training.finetune import finetune

ROOT = Path(__file__).resolve().parents[2]
KILLED = (
    "import os, sys\nfrom pathlib import Path\nfrom offload.training.config import load_config\n"
    "from offload.training.finetune import finetune\n"
    "def echo(line):\n    if line.startswith(sys.argv[2]): os.kill(os.getpid(), 9)\n"
    "finetune(load_config(Path(sys.argv[1]), {}), echo=echo)\n"
)


def result(directory: Path) -> tuple[dict[int, float], bytes]:
    records = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    losses = {record["step"]: record["loss"] for record in records if "loss" in record}
    return losses, (directory / "final" / "model.safetensors").read_bytes()


def state_of(directory: Path) -> RunState:
    (run,) = find_runs([directory / "state"])
    return run.state


@pytest.fixture
def expected(make_config: Any, tmp_path: Path) -> tuple[dict[int, float], bytes]:
    finetune(make_config(output_dir=tmp_path / "committed"), echo=lambda _: None)
    return result(tmp_path / "committed")


def test_a_stopped_run_goes_on_to_the_same_model_and_says_loudly_what_it_is(
    make_config: Any, tmp_path: Path, expected: Any
) -> None:
    lines: list[str] = []

    def echo(line: str) -> None:
        lines.append(line)
        if line.startswith("step 3"):
            os.kill(os.getpid(), signal.SIGTERM)

    config = make_config(commit="off")
    assert finetune(config, echo=echo).exit_code == 128 + signal.SIGTERM
    assert state_of(tmp_path / "out") is RunState.COMPLETE
    again: list[str] = []
    finetune(config, echo=again.append)
    for said in (lines, again):
        assert any("A CRASH, A KILL OR A POWER CUT LOSES THIS RUN" in line for line in said)
    assert any("the only commit there is; SIGKILL before that loses the run" in line for line in lines)
    assert any("at step 3 of 6" in line for line in again)
    assert result(tmp_path / "out") == expected
    assert state_of(tmp_path / "out") is RunState.COMPLETE


def test_a_killed_run_is_refused_and_nothing_is_exported(make_config: Any, tmp_path: Path) -> None:
    config = make_config(commit="off")
    path = tmp_path / "config.yaml"
    path.write_text(config.to_yaml())
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ended = subprocess.run([sys.executable, "-c", KILLED, str(path), "step 3"], env=environment, check=False)
    assert ended.returncode == -signal.SIGKILL
    assert state_of(tmp_path / "out") is RunState.LOST
    with pytest.raises(CorruptionError, match="did not end in order"):
        finetune(config, echo=lambda _: None)
    assert not (tmp_path / "out" / "final").exists()


def test_an_error_in_a_step_says_that_the_run_is_lost(
    make_config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = []

    def failing(*args: Any) -> tuple[float, str]:
        taken.append(1)
        if len(taken) == 3:
            raise StateError("a test ends the run")
        return backward(*args)

    backward = offload.training.loop._backward
    monkeypatch.setattr(offload.training.loop, "_backward", failing)
    lines: list[str] = []
    with pytest.raises(StateError, match="a test"):
        finetune(make_config(commit="off"), echo=lines.append)
    assert lines[-1].startswith("the run is lost, since commit is off")
    assert state_of(tmp_path / "out") is RunState.LOST


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"save_steps": 2}, "save_steps: the steps between commits, and commit: off has none"),
        ({"snapshot_steps": 2}, "snapshot_steps: a snapshot is copied from what no write goes over"),
        ({"on_non_finite": "skip"}, "when commit is off: set commit: on, or max_grad_norm"),
        ({"on_non_finite": "rollback"}, "set snapshot_steps"),
    ],
)
def test_what_needs_commits_is_refused(make_config: Any, flags: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_config(commit="off", **flags)
    make_config(commit="on", **{**flags, "snapshot_steps": 2})


def test_a_run_goes_on_as_it_was_begun(make_config: Any) -> None:
    finetune(make_config(commit="off", max_steps=1), echo=lambda _: None)
    with pytest.raises(ConfigError, match="begun with commit: off"):
        finetune(make_config(max_steps=2), echo=lambda _: None)


def test_the_drives_are_told_with_their_shares(make_config: Any, tmp_path: Path) -> None:
    drives = [tmp_path / "a", tmp_path / "b"]
    for drive in drives:
        drive.mkdir()
    lines: list[str] = []
    finetune(make_config(disk=[str(drive) for drive in drives], max_steps=2), echo=lines.append)
    (said,) = [line for line in lines if line.startswith("drives, while at work: ")]
    assert f"{drives[0]} 50% of the bytes at " in said and f"{drives[1]} 50% of the bytes at " in said
