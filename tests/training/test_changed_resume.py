"""What may change when a run goes on: bytes move, values stay; what may not is an error with both values."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from offload.errors import ConfigError, StorageError
from offload.runtime.runtime import Runtime
from offload.tiers.memory_plan import MemoryPlan
from offload.training.finetune import finetune

# Each part of a run is started with the next of these, and every one is another place for the bytes.
PLACES: dict[str, list[dict[str, Any]]] = {
    "save_steps": [{}, {"save_steps": 2}, {"save_steps": 5}],
    "home": [{}, {"home": "host"}, {"home": "device"}, {"home": "disk"}, {"home": "host", "save_steps": 2}],
    "cache": [{}, {"host_cache": "64KiB"}, {"host_cache": "16MiB", "save_steps": 1}, {"home": "host"}],
    "budgets": [{}, {"host_memory": "17200KiB"}, {"device_memory": "4712KiB"}, {"host_memory": "64MiB"}],
    "depth": [{"queue_depth": 1}, {"queue_depth": 64}, {"io_engine": "portable"}, {"io_engine": "threads"}],
    "snapshots": [{"snapshot_steps": 1}, {}, {"snapshot_steps": 2}],
}


def result(directory: Path) -> tuple[list[tuple[Any, ...]], bytes]:
    """Return what was learned step by step, and the exported bytes."""
    records = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    learned = [(r["step"], r["loss"], r["learning_rate"], r["grad_norm"]) for r in records if "loss" in r]
    return learned, (directory / "final" / "model.safetensors").read_bytes()


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> list[MemoryPlan]:
    """The plans of the runtimes that were made."""
    seen: list[MemoryPlan] = []
    made = Runtime.__init__

    def noting(self: Runtime, parts: Any, *rest: Any) -> None:
        seen.append(parts.plan)
        made(self, parts, *rest)

    monkeypatch.setattr(Runtime, "__init__", noting)
    return seen


@pytest.mark.parametrize("moments", ["float32", "8bit"])
@pytest.mark.parametrize("what", PLACES)
def test_a_run_whose_bytes_move_between_its_starts_ends_like_one_that_stayed(
    make_config: Any, tmp_path: Path, plans: list[MemoryPlan], what: str, moments: str
) -> None:
    # Where a run ends is not part of what it computes with this schedule.
    settings = {"moments": moments, "lr_scheduler_type": "constant", "max_grad_norm": 0.5}
    num_steps = 2 * len(PLACES[what])
    whole = make_config(output_dir=tmp_path / "whole", max_steps=num_steps, **settings)
    finetune(whole, echo=lambda _: None)
    plans.clear()
    for number, place in enumerate(PLACES[what], 1):
        config = make_config(output_dir=tmp_path / "moved", max_steps=2 * number, **settings, **place)
        assert finetune(config, echo=lambda _: None).step == 2 * number
    assert result(tmp_path / "moved") == result(tmp_path / "whole")
    if what in ("home", "budgets"):
        # They were told to differ, and did.
        assert len(set(plans)) > 2


def test_drives_of_a_run_may_be_mounted_elsewhere_in_any_order(make_config: Any, tmp_path: Path) -> None:
    for name in "abcd":
        (tmp_path / name).mkdir(mode=0o700)
    settings = {"lr_scheduler_type": "constant", "output_dir": tmp_path / "moved"}
    finetune(make_config(max_steps=2, disk=[tmp_path / "a", tmp_path / "b"], **settings), echo=lambda _: None)
    for old, new in (("a", "d"), ("b", "c")):
        (run,) = (tmp_path / old).iterdir()
        run.rename(tmp_path / new / run.name)
    there = [tmp_path / "c", tmp_path / "d"]
    # The note of where they are is not what finds them.
    with pytest.raises(
        StorageError, match=r"/a holds no run .*; mount its drive there, or name the directory it was made in"
    ):
        finetune(
            make_config(max_steps=4, disk=[tmp_path / "a", tmp_path / "b"], **settings), echo=lambda _: None
        )
    with pytest.raises(
        StorageError, match=r"drive 0 of the 2 of run .* is missing; .* it was .*/a: mount it"
    ):
        finetune(make_config(max_steps=4, disk=there[:1], **settings), echo=lambda _: None)
    assert finetune(make_config(max_steps=4, disk=there, **settings), echo=lambda _: None).step == 4
    whole = make_config(max_steps=4, output_dir=tmp_path / "whole", lr_scheduler_type="constant")
    finetune(whole, echo=lambda _: None)
    assert result(tmp_path / "moved") == result(tmp_path / "whole")


def test_everything_that_may_not_change_is_listed_at_once(make_config: Any, tmp_path: Path) -> None:
    finetune(make_config(max_steps=1), echo=lambda _: None)
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    with pytest.raises(ConfigError) as caught:
        finetune(
            make_config(
                max_steps=2, seed=7, dtype="float32", moments="8bit", compute_dtype="bfloat16", val_size=3
            ),
            echo=lambda _: None,
        )
    for change in (
        "seed: 42 then, 7 now",
        "dtype: 'bfloat16' then, 'float32' now",
        "moments: 'float32' then, '8bit' now",
        "compute_dtype: 'float32' then, 'bfloat16' now",
        "val_size: 0 then, 3.0 now",
    ):
        assert change in str(caught.value)
    assert "use the old values to go on, or another output_dir for a new run" in str(caught.value)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == kept


def test_another_model_is_an_error_with_both(make_config: Any, tmp_path: Path, model_directory: Path) -> None:
    finetune(make_config(max_steps=1), echo=lambda _: None)
    (tmp_path / "other").symlink_to(model_directory)
    # The same directory by another name is the same model.
    other = make_config(max_steps=2, model_name_or_path=tmp_path / "other")
    assert finetune(other, echo=lambda _: None).step == 2
    (tmp_path / "other").unlink()
    (tmp_path / "other").mkdir()
    for file in model_directory.iterdir():
        (tmp_path / "other" / file.name).write_bytes(file.read_bytes())
    with pytest.raises(
        ConfigError, match=rf"model_name_or_path: '{model_directory}' then, '{tmp_path}/other' now"
    ):
        finetune(make_config(max_steps=3, model_name_or_path=tmp_path / "other"), echo=lambda _: None)
