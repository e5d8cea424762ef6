"""The state on disk is always a committed step, and going on from it changes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from toy_models import SETTINGS, build, loss_of, make_batch, record_bytes, train

import offload
from offload.errors import ConfigError, LockedError, StateError

NAME = "gpt2"


def folder(parent: Path, name: str) -> Path:
    (parent / name).mkdir()
    return parent / name


def unbroken(steps: int, directory: Path) -> tuple[list[float], dict[str, bytes]]:
    directory.mkdir()
    model = build(NAME)
    torch.manual_seed(5)
    with offload.attach(model, disk=[directory], **SETTINGS) as runtime:
        return train(NAME, runtime, model, range(steps)), record_bytes(runtime)


@pytest.mark.parametrize("home", ["disk", "host", "device"])
def test_resumed_run_equals_unbroken_run_bit_for_bit(tmp_path: Path, home: str) -> None:
    expected = unbroken(8, tmp_path / "unbroken")
    model = build(NAME)
    torch.manual_seed(5)
    settings: dict[str, Any] = {**SETTINGS, "disk": [folder(tmp_path, "broken")], "run_id": None}
    with offload.attach(model, home=home, **settings) as runtime:
        losses = train(NAME, runtime, model, range(5))
        runtime.synchronize()
        settings["run_id"] = runtime.run_id
    torch.manual_seed(12345)
    model = build(NAME)
    with offload.attach(model, home="disk", resume=True, **settings) as runtime:
        assert runtime.global_step == 5
        assert runtime.state == {"next": 5}
        losses += train(NAME, runtime, model, range(5, 8))
        assert (losses, record_bytes(runtime)) == expected


def test_uncommitted_work_is_forgotten(tmp_path: Path) -> None:
    expected = unbroken(6, tmp_path / "unbroken")
    model = build(NAME)
    torch.manual_seed(5)
    settings: dict[str, Any] = {**SETTINGS, "disk": [folder(tmp_path, "broken")]}
    runtime = offload.attach(model, save_steps=3, **settings)
    train(NAME, runtime, model, range(5))
    # As a crash would: steps 4 and 5 were written and never committed.
    run_id = runtime.run_id
    runtime.close()
    model = build(NAME)
    with offload.attach(model, resume=True, run_id=run_id, **settings) as runtime:
        assert runtime.global_step == 3
        losses = train(NAME, runtime, model, range(3, 6))
        assert record_bytes(runtime) == expected[1]
        assert losses == expected[0][3:]


@pytest.mark.parametrize("home", ["disk", "host", "device"])
def test_commit_is_for_the_steps_since_the_last_one(tmp_path: Path, home: str) -> None:
    expected = unbroken(5, tmp_path / "unbroken")
    model = build(NAME)
    torch.manual_seed(5)
    settings: dict[str, Any] = {**SETTINGS, "disk": [folder(tmp_path, "broken")], "home": home}
    runtime = offload.attach(model, save_steps=100, **settings)
    train(NAME, runtime, model, range(3))
    assert runtime.committed_step == 0
    for _ in range(2):
        # The second has nothing to do.
        runtime.commit()
        runtime.synchronize()
        assert (runtime.committed_step, runtime.generation) == (3, 2)
    train(NAME, runtime, model, range(3, 4))
    loss_of(NAME, model, make_batch(NAME, 4)).backward()
    with pytest.raises(StateError, match=r"commit\(\) in the middle of a step: call runtime\.step\(\) first"):
        runtime.commit()
    run_id = runtime.run_id
    runtime.close()
    with pytest.raises(StateError, match="closed"):
        runtime.commit()
    model = build(NAME)
    with offload.attach(model, save_steps=100, resume=True, run_id=run_id, **settings) as runtime:
        assert runtime.state == {"next": 3}
        losses = train(NAME, runtime, model, range(3, 5))
        assert (losses, record_bytes(runtime)) == (expected[0][3:], expected[1])
    # Leaving the block in order has committed.
    model = build(NAME)
    with offload.attach(model, resume=True, run_id=run_id, **settings) as runtime:
        assert (runtime.global_step, record_bytes(runtime)) == (5, expected[1])


def test_leaving_the_block_with_an_error_or_in_a_step_commits_nothing(tmp_path: Path) -> None:
    settings: dict[str, Any] = {**SETTINGS, "disk": [tmp_path], "save_steps": 100}
    model = build(NAME)
    runtime = offload.attach(model, **settings)
    train(NAME, runtime, model, range(2))
    runtime.__exit__(ZeroDivisionError, ZeroDivisionError(), None)
    model = build(NAME)
    with offload.attach(model, resume=True, run_id=runtime.run_id, **settings) as runtime:
        assert runtime.global_step == 0
        train(NAME, runtime, model, range(2))
        loss_of(NAME, model, make_batch(NAME, 2)).backward()
    model = build(NAME)
    with offload.attach(model, resume=True, run_id=runtime.run_id, **settings) as runtime:
        assert runtime.global_step == 0


def test_two_drives_and_other_budgets_change_nothing(tmp_path: Path) -> None:
    expected = unbroken(4, tmp_path / "one")
    model = build(NAME)
    torch.manual_seed(5)
    settings: dict[str, Any] = {**SETTINGS, "disk": [folder(tmp_path, "a"), folder(tmp_path, "b")]}
    with offload.attach(model, **settings) as runtime:
        losses = train(NAME, runtime, model, range(2))
        run_id = runtime.run_id
    model = build(NAME)
    settings.update(host_memory="40MiB", device_memory="32MiB")
    with offload.attach(model, resume=True, run_id=run_id, **settings) as runtime:
        losses += train(NAME, runtime, model, range(2, 4))
        assert (losses, record_bytes(runtime)) == expected


def test_another_model_is_refused_with_the_record_that_differs(tmp_path: Path) -> None:
    with offload.attach(build("mlp"), disk=[tmp_path], **SETTINGS) as runtime:
        run_id = runtime.run_id
    with pytest.raises(ConfigError, match="another model or format"):
        offload.attach(build(NAME), disk=[tmp_path], resume=True, run_id=run_id, **SETTINGS)


def test_a_run_in_use_is_locked(tmp_path: Path) -> None:
    with offload.attach(build("mlp"), disk=[tmp_path], **SETTINGS) as runtime:
        settings: dict[str, Any] = {**SETTINGS, "disk": [tmp_path], "run_id": runtime.run_id, "resume": True}
        with pytest.raises(LockedError, match="locked by process"):
            offload.attach(build("mlp"), **settings)
