"""Going back to a snapshot in `offload finetune`: what is skipped, told, kept, and where it ends."""

from __future__ import annotations

import errno
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import offload.store.files
import offload.training.loop
from offload.errors import ConfigError, DiskFullError, StateError, StorageError
from offload.store import list_runs, list_snapshots
from offload.training.data import Batches
from offload.training.finetune import finetune
from offload.training.guard import StepGuard

HERE = Path(__file__).resolve().parent

ROLLBACK = {"on_non_finite": "rollback", "max_non_finite_steps": 2, "snapshot_steps": 3}


def records(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def learned(directory: Path) -> list[tuple[int, float, float]]:
    return [(r["step"], r["loss"], r["grad_norm"]) for r in records(directory) if "loss" in r]


def model_bytes(directory: Path) -> bytes:
    return (directory / "final" / "model.safetensors").read_bytes()


def snapshots(directory: Path) -> list[str]:
    (run,) = list_runs(directory / "state")
    return [info.name for info in list_snapshots([directory / "state"], run.run_id)]


@pytest.fixture
def batch_numbers(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of the batches that were asked for, from 1."""
    batch = Batches.batch
    seen: list[int] = []

    def noted(self: Batches, number: int) -> Any:
        seen.append(number + 1)
        return batch(self, number)

    monkeypatch.setattr(Batches, "batch", noted)
    return seen


@pytest.fixture
def disturb(monkeypatch: pytest.MonkeyPatch, batch_numbers: list[int]) -> Any:
    """Return a function that gives batches (from 1) another loss."""
    backward = offload.training.loop._backward
    losses: dict[int, float] = {}

    def disturbed(*args: Any) -> tuple[float, str]:
        loss, problem = backward(*args)
        loss += losses.get(batch_numbers[-1], 0.0)
        return loss, problem or ("" if math.isfinite(loss) else f"the loss is {loss}")

    monkeypatch.setattr(offload.training.loop, "_backward", disturbed)

    def set_losses(**chosen: float) -> None:
        losses.clear()
        losses.update({int(name[1:]): loss for name, loss in chosen.items()})

    return set_losses


def without_batches(monkeypatch: pytest.MonkeyPatch, first: int, last: int) -> None:
    """Let the data lack batches `first` to `last`, from 1."""
    batch = Batches.batch
    count = last - first + 1
    monkeypatch.setattr(
        Batches, "batch", lambda self, number: batch(self, number + count * (number + 1 >= first))
    )


def test_a_run_that_went_back_learns_as_one_that_never_saw_the_batches(
    make_config: Any, tmp_path: Path, disturb: Any, batch_numbers: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    disturb(b5=math.nan, b6=math.inf)
    lines: list[str] = []
    config = make_config(output_dir=tmp_path / "bad", max_steps=8, **ROLLBACK)
    assert finetune(config, echo=lines.append).step == 8
    # Step 4 learned batch 4, and is forgotten with it.
    assert batch_numbers == [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]
    assert "skipped batch 5; nothing of it was applied" in lines
    (told,) = [line for line in lines if line.startswith("went back")]
    (name,) = [word for word in told.split() if word.startswith("rolling-3-")]
    assert told == f"went back from step 4 to step 3 (snapshot {name} batches 4 to 6 are skipped"
    assert [line.split(":")[0] for line in lines if line.startswith("snapshot")] == [
        "snapshot of step 0",
        "snapshot of step 3",
        "snapshot of step 6",
    ]
    # The newest is kept, and it alone.
    assert [kept.rpartition("-")[0] for kept in snapshots(tmp_path / "bad")] == ["rolling-6"]
    found = records(tmp_path / "bad")
    (event,) = [record for record in found if "rolled_back" in record]
    assert event == {
        "step": 3,
        "rolled_back": {"batch": 6, "from_step": 4, "reason": "the loss is inf"},
    }
    assert [r["step"] for r in found if "loss" in r] == list(range(1, 9))

    disturb()
    without_batches(monkeypatch, 4, 6)
    finetune(make_config(output_dir=tmp_path / "good", max_steps=8), echo=lambda _: None)
    assert learned(tmp_path / "bad") == learned(tmp_path / "good")
    assert model_bytes(tmp_path / "bad") == model_bytes(tmp_path / "good")


def test_a_loss_that_jumps_goes_back_too(
    make_config: Any, tmp_path: Path, disturb: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("offload.training.spikes.SMALLEST_WINDOW", 3)
    disturb(b5=100.0, b9=100.0)
    lines: list[str] = []
    settings = {"on_loss_spike": "rollback", "snapshot_steps": 3, "max_rollbacks": 2, "max_steps": 8}
    finetune(make_config(output_dir=tmp_path / "bad", **settings), echo=lines.append)
    told = [line for line in lines if line.startswith(("step 5, batch", "step 7, batch", "went back"))]
    assert told[0].startswith("step 5, batch 5: the loss of step 5 jumped to 10")
    assert told[1].endswith("batches 4 to 5 are skipped")
    assert told[2].startswith("step 7, batch 9: the loss of step 7 jumped to 10")
    # The median is of the steps that are left, not of those that were forgotten.
    assert "the median of the last 6 is" in told[2]
    assert told[3].endswith("batches 9 to 9 are skipped")

    disturb()
    batch = Batches.batch
    kept = [0, 1, 2, 5, 6, 7, 9, 10]
    monkeypatch.setattr(Batches, "batch", lambda self, number: batch(self, kept[number]))
    finetune(make_config(output_dir=tmp_path / "good", max_steps=8), echo=lambda _: None)
    assert learned(tmp_path / "bad") == learned(tmp_path / "good")
    assert model_bytes(tmp_path / "bad") == model_bytes(tmp_path / "good")


def test_what_a_power_cut_takes_of_the_metrics_changes_no_decision(
    make_config: Any, tmp_path: Path, disturb: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("offload.training.spikes.SMALLEST_WINDOW", 3)
    disturb(b6=100.0)
    settings = {"output_dir": tmp_path / "run", "on_loss_spike": "rollback", "snapshot_steps": 3}
    finetune(make_config(**settings, max_steps=5), echo=lambda _: None)
    metrics = tmp_path / "run" / "metrics.jsonl"
    metrics.write_text(metrics.read_text().splitlines(keepends=True)[0])
    lines: list[str] = []
    finetune(make_config(**settings, max_steps=7), echo=lines.append)
    assert [line for line in lines if line.startswith("step 6, batch 6: the loss of step 6 jumped")]
    assert [line for line in lines if line.startswith("went back from step 5 to step")]


def test_it_goes_back_so_often_and_then_stops(make_config: Any, tmp_path: Path, disturb: Any) -> None:
    disturb(b5=math.nan, b6=math.nan, b7=math.nan, b8=math.nan)
    config = make_config(max_steps=8, max_rollbacks=1, **ROLLBACK)
    lines: list[str] = []
    with pytest.raises(StateError, match=r"went back to a snapshot 1 times already \(max_rollbacks\)"):
        finetune(config, echo=lines.append)
    assert lines[-1].startswith("the run stands at step 3, committed")
    # Started again, it meets the same batches and the same end: what it may do is not renewed.
    with pytest.raises(StateError, match=r"went back to a snapshot 1 times already \(max_rollbacks\)"):
        finetune(config, echo=lambda _: None)
    more = make_config(max_steps=8, max_rollbacks=2, **ROLLBACK)
    assert finetune(more, echo=lambda _: None).step == 8
    assert [r["rolled_back"]["batch"] for r in records(tmp_path / "out") if "rolled_back" in r] == [6, 8]


def test_what_cannot_go_back_is_refused_at_once(make_config: Any, tmp_path: Path) -> None:
    for key in ("on_non_finite", "on_loss_spike"):
        with pytest.raises(ConfigError, match=f"{key}: rollback goes back to a snapshot: set snapshot_steps"):
            make_config(**{key: "rollback"})
    assert not (tmp_path / "out").exists()


def test_no_room_for_the_first_snapshot_stops_before_the_first_step(
    make_config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(directories: Any, *_: object, **__: object) -> None:
        raise DiskFullError(f"{directories[0]} has 1 KiB free", errno=28, path=directories[0])

    with monkeypatch.context() as patch:
        patch.setattr("offload.store.snapshots.check_room", full)
        with pytest.raises(DiskFullError):
            finetune(make_config(snapshot_steps=2), echo=lambda _: None)
    assert not (tmp_path / "out" / "metrics.jsonl").exists()
    assert finetune(make_config(snapshot_steps=2), echo=lambda _: None).step == 6
    assert len(snapshots(tmp_path / "out")) == 1


def test_a_snapshot_takes_the_place_of_the_one_before_where_there_is_no_room_for_two(
    make_config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def one_fits(directories: Any, *_: object, **__: object) -> None:
        if any(Path(directories[0]).glob("run-*/snapshot-*.bin")):
            raise DiskFullError(f"{directories[0]} has 1 KiB free", errno=28, path=directories[0])

    monkeypatch.setattr("offload.store.snapshots.check_room", one_fits)
    lines: list[str] = []
    assert finetune(make_config(snapshot_steps=2), echo=lines.append).step == 6
    told = [line for line in lines if line.endswith("1 KiB free; taking the place of the one before instead")]
    assert len(told) == 2
    assert [kept.rpartition("-")[0] for kept in snapshots(tmp_path / "out")] == ["rolling-4"]


def test_a_snapshot_that_cannot_be_read_for_a_while_stays(
    make_config: Any, tmp_path: Path, disturb: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A passing EIO must cost nothing: neither the snapshot, nor the place that the run would go back to."""
    settings = {**ROLLBACK, "snapshot_steps": 2, "max_non_finite_steps": 1, "output_dir": tmp_path / "out"}
    with monkeypatch.context() as patch:
        patch.setattr(StepGuard, "_drop", lambda *_: None)  # as when it is killed there
        finetune(make_config(max_steps=5, **settings), echo=lambda _: None)
    steps = ["rolling-0", "rolling-2", "rolling-4"]
    assert [name.rpartition("-")[0] for name in snapshots(tmp_path / "out")] == steps
    read_file = offload.store.files.read_file
    healed = False

    def failing(fd: int, name: str, path: str, *args: Any) -> bytes:
        if name.startswith("snapshot-rolling-4") and not healed:
            raise StorageError(f"cannot read {path}: Input/output error", errno=errno.EIO, path=path)
        return read_file(fd, name, path, *args)

    monkeypatch.setattr("offload.store.files.read_file", failing)
    disturb(b6=math.nan)
    lines: list[str] = []
    with pytest.raises(StorageError, match="cannot be read, and it may be the one to go back to") as error:
        finetune(make_config(max_steps=6, **settings), echo=lines.append)
    assert error.value.errno == errno.EIO
    assert [line for line in lines if line.startswith("warning: snapshot rolling-4-")]
    assert "the run stands at step 5, committed" in lines[-1]
    assert not [line for line in lines if line.startswith("snapshot of step")]  # none was due
    healed = True
    assert [name.rpartition("-")[0] for name in snapshots(tmp_path / "out")] == steps[1:]
    lines.clear()
    assert finetune(make_config(max_steps=6, **settings), echo=lines.append).step == 6
    assert [line for line in lines if line.startswith("went back from step 5 to step 4")]


def test_a_drive_without_room_for_run_and_snapshot_is_refused_before_the_import(
    make_config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the import of a large model would end at its first snapshot, an hour later."""
    free_nbytes = 0
    monkeypatch.setattr("offload.store.room.free_nbytes", lambda _: free_nbytes)
    needs = []
    for snapshot_steps in (None, 2):
        with pytest.raises(DiskFullError) as error:
            finetune(make_config(snapshot_steps=snapshot_steps), echo=lambda _: None)
        assert not (tmp_path / "out").exists()
        assert error.value.got_nbytes == 0
        needs.append(error.value.asked_nbytes)
    assert "the run and a snapshot of it (snapshot_steps) needs" in error.value.message
    free_nbytes = needs[0]
    finetune(make_config(output_dir=tmp_path / "none", snapshot_steps=None), echo=lambda _: None)
    with pytest.raises(DiskFullError, match="the run and a snapshot of it"):
        finetune(make_config(snapshot_steps=2), echo=lambda _: None)
    assert not (tmp_path / "out").exists()
    # What is said to be needed is enough, and what the snapshot takes is what was asked for beside the run.
    free_nbytes = needs[1]
    finetune(make_config(snapshot_steps=2), echo=lambda _: None)
    taken = sum(path.stat().st_size for path in (tmp_path / "out/state").glob("run-*/snapshot-*"))
    # Its description is counted as the longest that can be.
    assert 0 <= needs[1] - needs[0] - taken < 1 << 18
    # A run that goes on has its room already.
    free_nbytes = 0
    finetune(make_config(output_dir=tmp_path / "none", max_steps=8), echo=lambda _: None)


def test_snapshots_change_nothing_of_a_run_without_trouble(make_config: Any, tmp_path: Path) -> None:
    for name, every in [("with", 2), ("without", None)]:
        finetune(make_config(output_dir=tmp_path / name, snapshot_steps=every), echo=lambda _: None)
    assert learned(tmp_path / "with") == learned(tmp_path / "without")
    assert model_bytes(tmp_path / "with") == model_bytes(tmp_path / "without")
    assert snapshots(tmp_path / "without") == []


def run_child(config: Path, root: Path, *points: str) -> list[str]:
    """Let kill_rollback.py end a run at each point and finish it; see there."""
    path = os.pathsep.join([str(HERE.parents[1])])
    done = subprocess.run(
        [sys.executable, str(HERE / "kill_rollback.py"), str(config), str(root), *points],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.fixture
def troubled(make_config: Any, tmp_path: Path) -> Path:
    config = make_config(output_dir=tmp_path / "none", max_steps=5, **{**ROLLBACK, "snapshot_steps": 2})
    path = tmp_path / "run.yaml"
    path.write_text(config.to_yaml())
    return path


def check_killed(troubled: Path, tmp_path: Path, points: list[str]) -> None:
    assert run_child(troubled, tmp_path, *points) == [f"{point} killed, done" for point in points]
    expected = [
        {key: value for key, value in record.items() if key not in ("seconds", "eval_loss")}
        for record in records(tmp_path / "whole")
    ]
    assert any("rolled_back" in record for record in expected)
    for point in points:
        directory = tmp_path / f"killed-{point}"
        assert learned(directory) == learned(tmp_path / "whole"), point
        for kind in ("rolled_back", "not_finite"):
            told = [record for record in records(directory) if kind in record]
            assert told == [record for record in expected if kind in record], point
        assert model_bytes(directory) == model_bytes(tmp_path / "whole"), point
        assert len(snapshots(directory)) == 1, point


def test_a_run_killed_while_it_goes_back_ends_like_an_unbroken_one(troubled: Path, tmp_path: Path) -> None:
    events = run_child(troubled, tmp_path)
    wanted = [
        "snapshot: after publish snapshot-rolling-4",
        "drop: before discard snapshot-rolling-2",
        "drop: after discard snapshot-rolling-2",
        "restore: write",
        "restore: before publish manifest",
        "restore: after publish manifest",
        "went back: after cut_metrics",
        "went back: after append_metrics",
    ]
    points = []
    for want in wanted:
        # The last: behind it nothing tidies up but the next start.
        points.append(str([number for number, event in enumerate(events) if event.startswith(want)][-1]))
    check_killed(troubled, tmp_path, points)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_run_killed_at_any_moment_of_it_ends_like_an_unbroken_one(troubled: Path, tmp_path: Path) -> None:
    events = run_child(troubled, tmp_path)
    check_killed(troubled, tmp_path, [str(number) for number in range(len(events))])
