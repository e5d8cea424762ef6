"""The commands over a run that was written in place and did not end in order: nothing is made of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from runs_cases import begin, call
from toy_models import SETTINGS, build, train

import offload


@pytest.fixture
def lost(tmp_path: Path) -> str:
    model = build("mlp")
    torch.manual_seed(7)
    runtime = offload.attach(model, **SETTINGS, disk=[tmp_path], commit=False)
    train("mlp", runtime, model, range(2))
    runtime.close()
    assert runtime.run_id is not None
    return runtime.run_id


def test_a_lost_run_is_listed_without_a_step(capsys, tmp_path: Path, lost: str) -> None:
    code, out, _ = call(capsys, "runs", tmp_path, "--json")
    (found,) = json.loads(out)["runs"]
    assert (code, found["run_id"], found["state"], found["step"]) == (0, lost, "lost", None)
    code, out, _ = call(capsys, "runs", tmp_path)
    assert "written in place (commit: off) and did not end in order" in out


def test_a_lost_run_is_neither_verified_nor_gone_back_with(capsys, tmp_path: Path, lost: str) -> None:
    for more in ((), ("--fall-back",)):
        code, out, _ = call(capsys, "verify", tmp_path, *more)
        assert code == 76
        assert out.startswith(f"run {lost} (Sequential)\n")
        assert "not checked" in out and "remove it with 'offload clean'" in out


def test_a_lost_run_is_not_exported(capsys, tmp_path: Path, lost: str) -> None:
    code, _, err = call(capsys, "export", tmp_path, "--to", tmp_path / "model")
    assert code == 76
    assert "did not end in order" in err
    assert not (tmp_path / "model").exists()


def test_a_lost_run_is_removed(capsys, tmp_path: Path, lost: str) -> None:
    code, out, _ = call(capsys, "clean", tmp_path, "--yes")
    assert (code, "lost" in out) == (0, True)
    assert not list(tmp_path.iterdir())


def test_a_run_in_place_that_ended_in_order_is_as_good_as_any(capsys, tmp_path: Path) -> None:
    begin([tmp_path], commit=False)
    code, out, _ = call(capsys, "verify", tmp_path)
    assert (code, "is whole" in out) == (0, True)
    code, _, _ = call(capsys, "runs", tmp_path, "--json")
    assert code == 0
