"""Clipping, batches that are not finite, and losses that jump, in `offload finetune`."""

from __future__ import annotations

import json
import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest

import offload.training.loop
from offload.errors import StateError
from offload.training.data import Batches
from offload.training.finetune import finetune
from offload.training.spikes import LossSpikes


def records(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def learned(directory: Path) -> list[tuple[float, float]]:
    return [(record["loss"], record["grad_norm"]) for record in records(directory) if "loss" in record]


def model_bytes(directory: Path) -> bytes:
    return (directory / "final" / "model.safetensors").read_bytes()


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch):
    """Return a function that makes the loss of some batches (from 1) NaN, and counts those seen."""
    backward = offload.training.loop._backward
    seen: list[int] = []

    def make(*bad: int, first: int = 1) -> list[int]:
        seen.clear()

        def poisoned(job: Any, runtime: Any, batch: Any) -> Any:
            seen.append(first + len(seen))
            return (math.nan, "the loss is nan") if seen[-1] in bad else backward(job, runtime, batch)

        monkeypatch.setattr(offload.training.loop, "_backward", poisoned)
        return seen

    return make


def test_a_clipped_run_learns_otherwise_and_reports_the_norm_before_clipping(
    make_config, tmp_path: Path
) -> None:
    for name, norm in [("free", 0), ("clipped", 1e-3), ("measured", 1e9)]:
        config = make_config(output_dir=tmp_path / name, max_grad_norm=norm)
        assert finetune(config, echo=lambda _: None).step == 6
    free, clipped, measured = (learned(tmp_path / name) for name in ("free", "clipped", "measured"))
    assert clipped[0] == pytest.approx(free[0], rel=1e-6)  # the first step: same weights, same norm
    assert clipped[0][1] > 1e-3
    assert measured == free
    assert model_bytes(tmp_path / "measured") == model_bytes(tmp_path / "free")
    assert model_bytes(tmp_path / "clipped") != model_bytes(tmp_path / "free")


def test_a_clipped_run_resumes_to_the_same_bytes(make_config, tmp_path: Path) -> None:
    finetune(make_config(output_dir=tmp_path / "whole", max_grad_norm=1e-3), echo=lambda _: None)

    def stop(line: str) -> None:
        if line.startswith("step 3/6"):
            os.kill(os.getpid(), signal.SIGINT)

    config = make_config(output_dir=tmp_path / "broken", max_grad_norm=1e-3)
    assert finetune(config, echo=stop).exit_code == 130
    assert finetune(config, echo=lambda _: None).step == 6
    assert learned(tmp_path / "broken") == learned(tmp_path / "whole")
    assert model_bytes(tmp_path / "broken") == model_bytes(tmp_path / "whole")


def test_a_skipped_batch_leaves_the_run_as_one_that_never_saw_it(
    make_config, tmp_path: Path, poison: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = {"on_non_finite": "skip"}
    poison(3)
    lines: list[str] = []
    assert finetune(make_config(output_dir=tmp_path / "bad", **flags), echo=lines.append).step == 6
    assert "step 3, batch 3: the loss is nan" in lines
    assert "skipped batch 3; nothing of it was applied" in lines
    assert {"step": 3, "batch": 3, "not_finite": "the loss is nan"} in records(tmp_path / "bad")
    poison()
    batch = Batches.batch
    monkeypatch.setattr(Batches, "batch", lambda self, number: batch(self, number + (number >= 2)))
    finetune(make_config(output_dir=tmp_path / "good", **flags), echo=lambda _: None)
    assert learned(tmp_path / "bad") == learned(tmp_path / "good")
    assert model_bytes(tmp_path / "bad") == model_bytes(tmp_path / "good")


def test_a_resumed_run_knows_how_many_batches_were_skipped(make_config, tmp_path: Path, poison: Any) -> None:
    poison(2)
    flags = {"on_non_finite": "skip", "lr_scheduler_type": "cosine"}
    finetune(make_config(output_dir=tmp_path / "whole", **flags), echo=lambda _: None)
    poison(2)
    config = make_config(output_dir=tmp_path / "broken", **flags)

    def stop(line: str) -> None:
        if line.startswith("step 3/6"):
            os.kill(os.getpid(), signal.SIGINT)

    assert finetune(config, echo=stop).exit_code == 130
    poison(first=5)
    assert finetune(config, echo=lambda _: None).step == 6
    assert learned(tmp_path / "broken") == learned(tmp_path / "whole")
    assert model_bytes(tmp_path / "broken") == model_bytes(tmp_path / "whole")


def test_too_many_batches_in_a_row_stop_the_run(make_config, tmp_path: Path, poison: Any) -> None:
    poison(2, 3)
    config = make_config(on_non_finite="skip", max_non_finite_steps=2)
    lines: list[str] = []
    with pytest.raises(StateError, match="skipped 2 times in a row"):
        finetune(config, echo=lines.append)
    assert lines[-1].startswith("the run stands at step ")
    poison()
    assert finetune(config, echo=lines.append).step == 6


def test_a_loss_that_jumps_is_told(make_config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("offload.training.spikes.SMALLEST_WINDOW", 3)
    backward = offload.training.loop._backward
    seen: list[float] = []

    def jumping(*args: Any) -> tuple[float, str]:
        seen.append(0.0)
        value, problem = backward(*args)
        return value + 100 * (len(seen) == 5), problem

    monkeypatch.setattr(offload.training.loop, "_backward", jumping)
    lines: list[str] = []
    finetune(make_config(), echo=lines.append)
    (warning,) = [line for line in lines if line.startswith("warning")]
    assert warning.startswith("warning: the loss of step 5 jumped to 10")
    assert "the median of the last 4 is" in warning


def test_spikes_are_measured_against_the_spread_of_the_losses_before() -> None:
    steady = [2.0 + 0.01 * (step % 3) for step in range(40)]
    noisy = [2.0 + 0.5 * (step % 3) for step in range(40)]
    assert LossSpikes(steady).check(2.5) is not None
    assert LossSpikes(noisy).check(2.5) is None
    assert LossSpikes(noisy).check(9.0) is not None
    assert LossSpikes(steady).check(0.1) is None
    assert LossSpikes([2.0] * 40).check(2.01) is None
    assert LossSpikes(steady[:8]).check(9.0) is None


def test_one_spike_does_not_hide_the_next() -> None:
    spikes = LossSpikes([2.0, 2.1] * 20)
    assert spikes.check(6.0) is not None
    assert spikes.check(6.0) is not None
