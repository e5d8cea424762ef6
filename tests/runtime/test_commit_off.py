"""`commit=False`: the same training in half the room, resumable where it ended in order and nowhere else."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from toy_models import SETTINGS, build, loss_of, make_batch, record_bytes, train

import offload
from offload.errors import ConfigError, CorruptionError, StateError
from offload.store import RunState, find_runs

NAME = "gpt2"
STEPS = 5


@pytest.fixture
def expected(tmp_path: Path) -> tuple[list[float], dict[str, bytes]]:
    """Losses and bytes of the run with commits."""
    (tmp_path / "committed").mkdir()
    with attached(tmp_path / "committed", commit=True) as (model, runtime):
        return train(NAME, runtime, model, range(STEPS)), record_bytes(runtime)


class attached:
    """A model attached to the run in a directory, or to a new one."""

    def __init__(self, directory: Path, **settings: Any) -> None:
        runs = [run.run_id for run in find_runs([directory])]
        self.model = build(NAME)
        torch.manual_seed(5)
        chosen = {**SETTINGS, "commit": False, **settings, "disk": [directory]}
        self.runtime = offload.attach(
            self.model, **chosen, run_id=runs[0] if runs else None, resume=bool(runs)
        )

    def __enter__(self) -> tuple[torch.nn.Module, offload.Runtime]:
        return self.model, self.runtime.__enter__()

    def __exit__(self, *error: Any) -> None:
        self.runtime.__exit__(*error)


@pytest.mark.parametrize(
    "settings",
    [{}, {"home": "host"}, {"max_grad_norm": 0.25}, {"moments": "8bit"}],
    ids=["disk", "host", "clip", "8bit"],
)
def test_a_run_without_commits_is_the_same_run_in_half_the_room(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    found = []
    for commit in (True, False):
        directory = tmp_path / str(commit)
        directory.mkdir()
        with attached(directory, commit=commit, **settings) as (model, runtime):
            losses = train(NAME, runtime, model, range(2))
        with attached(directory, commit=commit, **settings) as (model, runtime):
            assert (runtime.global_step, runtime.state) == (2, {"next": 2})
            losses += train(NAME, runtime, model, range(2, STEPS))
            found.append((losses, record_bytes(runtime)))
    assert found[0] == found[1]
    sizes = [next(tmp_path.glob(f"{commit}/run-*/data.bin")).stat().st_size for commit in (True, False)]
    assert sizes[0] == 2 * sizes[1]


def test_steps_are_not_committed_until_the_run_ends_in_order(tmp_path: Path) -> None:
    with attached(tmp_path) as (model, runtime):
        assert runtime.is_resumable
        train(NAME, runtime, model, range(3))
        runtime.synchronize()
        # The import, and the mark.
        assert (runtime.committed_step, runtime.generation, runtime.is_resumable) == (0, 1, False)
        assert [path.name for path in tmp_path.glob("run-*/manifest-*")] == ["manifest-2"]
        runtime.commit()
        runtime.synchronize()
        assert (runtime.committed_step, runtime.is_resumable) == (3, True)
        train(NAME, runtime, model, range(3, 4))
    assert find_runs([tmp_path])[0].state is RunState.COMPLETE
    with attached(tmp_path) as (_, runtime):
        assert runtime.global_step == 4


def test_a_run_that_did_not_end_in_order_is_refused(tmp_path: Path, caplog: Any) -> None:
    run = attached(tmp_path)
    train(NAME, run.runtime, run.model, range(2))
    run.runtime.close()
    assert "is lost" in caplog.text
    with pytest.raises(CorruptionError, match=r"commit: off\) and did not end in order"):
        attached(tmp_path)


def test_a_run_that_had_not_gone_over_anything_stands(tmp_path: Path) -> None:
    """With records at home in memory nothing is written before the commit."""
    run = attached(tmp_path, home="host")
    train(NAME, run.runtime, run.model, range(2))
    assert run.runtime.is_resumable
    run.runtime.close()
    with attached(tmp_path) as (_, runtime):
        assert runtime.global_step == 0


def test_the_start_says_loudly_that_a_crash_loses_the_run(tmp_path: Path, caplog: Any) -> None:
    for _ in ("new", "resumed"):
        caplog.clear()
        with attached(tmp_path) as (_, runtime):
            pass
        (record,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
        assert record.getMessage().startswith(f"commit is off: run {runtime.run_id} is written in place")


def test_a_step_that_is_not_finite_and_cannot_be_undone_loses_the_run(tmp_path: Path) -> None:
    run = attached(tmp_path)
    train(NAME, run.runtime, run.model, range(1))
    loss = loss_of(NAME, run.model, make_batch(NAME, 1)) * float("nan")
    loss.backward()
    with pytest.raises(StateError, match=r"cannot be undone.*commit at True, or set park_gradients"):
        run.runtime.step()
    with pytest.raises(StateError, match="the run is lost"):
        run.runtime.commit()
    run.runtime.close()


def test_a_step_that_is_not_finite_is_dropped_where_gradients_are_parked(
    tmp_path: Path, expected: tuple[list[float], dict[str, bytes]]
) -> None:
    with attached(tmp_path, park_gradients=True, on_non_finite="skip") as (model, runtime):
        losses = train(NAME, runtime, model, range(3))
        loss = loss_of(NAME, model, make_batch(NAME, 3)) * float("nan")
        loss.backward()
        assert not runtime.step()
        assert runtime.global_step == 3
    assert losses == expected[0][:3]
    with attached(tmp_path) as (_, runtime):
        assert runtime.global_step == 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"on_non_finite": "rollback"}, "no write goes over; with commit=False there are none"),
        ({"on_non_finite": "skip"}, "set park_gradients, or give a disk"),
        ({"room_for_snapshot": True}, "which a run with commit=False cannot take"),
        ({"commit": "off"}, "commit must be True or False, got 'off'"),
    ],
)
def test_what_needs_two_extents_is_refused(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        attached(tmp_path, **settings)
    assert not list(tmp_path.iterdir())


def test_a_run_without_a_disk_has_nothing_to_commit() -> None:
    with pytest.raises(ConfigError, match="for a run on drives, and none was given"):
        offload.attach(build(NAME), **SETTINGS, commit=False)


def test_a_snapshot_is_refused_with_the_reason(tmp_path: Path) -> None:
    with attached(tmp_path) as (model, runtime):
        train(NAME, runtime, model, range(1))
        with pytest.raises(StateError, match=r"commit: off.*no write goes over"):
            runtime.snapshot("a")


@pytest.mark.parametrize("begun", [True, False])
def test_a_run_is_resumed_as_it_was_begun(tmp_path: Path, begun: bool) -> None:
    with attached(tmp_path, commit=begun):
        pass
    word = "on" if begun else "off"
    with pytest.raises(ConfigError, match=rf"was begun with commit: {word}.*\(commit={begun}\)"):
        attached(tmp_path, commit=not begun)
