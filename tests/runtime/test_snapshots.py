"""A snapshot taken between steps can be gone back to, and the run then computes what it computed before."""

from __future__ import annotations

import errno
import logging
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from test_parked_on_disk import SMALL, budgets
from toy_models import SETTINGS, build, loss_of, make_batch, record_bytes, train

import offload
from offload.errors import CapacityError, ConfigError, CorruptionError, StateError, StorageError
from offload.store import files

NAME = "gpt2"  # It has dropout: other random numbers would be other losses.

MODES: dict[str, dict[str, Any]] = {
    "disk": {},
    "disk, parked": {"max_grad_norm": 0.25},
    "disk, every third step": {"save_steps": 3},
    "host": {"home": "host"},
    "host, parked, every third step": {"home": "host", "save_steps": 3, "park_gradients": True},
    "device": {"home": "device"},
}


def attach(model: Any, folder: Path, **settings: Any) -> Any:
    folder.mkdir(exist_ok=True)
    return offload.attach(model, disk=[folder], **{**SETTINGS, **settings})


@pytest.mark.parametrize("mode", MODES)
def test_steps_behind_a_restored_snapshot_are_the_same_bit_for_bit(mode: str, tmp_path: Path) -> None:
    model = build(NAME)
    torch.manual_seed(5)
    with attach(model, tmp_path, **MODES[mode]) as runtime:
        train(NAME, runtime, model, range(4))
        info = runtime.snapshot("four")
        assert (runtime.global_step, runtime.committed_step) == (4, 4)
        four = record_bytes(runtime)
        first = train(NAME, runtime, model, range(4, 9)), record_bytes(runtime)
        assert first[1] != four
        assert runtime.restore("four") == runtime.state == {"next": 4}
        assert (runtime.global_step, runtime.committed_step) == (4, 4)
        assert record_bytes(runtime) == four
        assert (train(NAME, runtime, model, range(4, 9)), record_bytes(runtime)) == first
        assert runtime.snapshots() == (info,)
        run_id = runtime.run_id
    # And with the process that took it gone.
    torch.manual_seed(77)
    model = build(NAME)
    with attach(model, tmp_path, run_id=run_id, resume=True, **MODES[mode]) as runtime:
        runtime.restore("four")
        assert (train(NAME, runtime, model, range(4, 9)), record_bytes(runtime)) == first


def test_a_snapshot_does_not_change_the_run(tmp_path: Path) -> None:
    found = []
    for folder, takes in [("without", False), ("with", True)]:
        model = build(NAME)
        torch.manual_seed(5)
        with attach(model, tmp_path / folder) as runtime:
            losses = train(NAME, runtime, model, range(2))
            if takes:
                runtime.snapshot("a")
                before = runtime.stats()
                assert before.disk_read_nbytes > runtime.snapshots()[0].nbytes
            losses += train(NAME, runtime, model, range(2, 5))
            found.append((losses, record_bytes(runtime)))
    assert found[0] == found[1]


def test_a_run_killed_behind_a_restore_goes_on_from_what_was_restored(tmp_path: Path) -> None:
    model = build(NAME)
    torch.manual_seed(5)
    with attach(model, tmp_path) as runtime:
        train(NAME, runtime, model, range(3))
        runtime.snapshot("three")
        train(NAME, runtime, model, range(3, 5))
        runtime.restore("three", {"next": 40})
        run_id = runtime.run_id
        expected = record_bytes(runtime)
        torch.manual_seed(6)  # What is resumed must not depend on it.
    model = build(NAME)
    with attach(model, tmp_path, run_id=run_id, resume=True) as runtime:
        assert (runtime.global_step, runtime.state) == (3, {"next": 40})
        assert record_bytes(runtime) == expected
        resumed = train(NAME, runtime, model, range(40, 42)), record_bytes(runtime)
        runtime.restore("three")
        assert (train(NAME, runtime, model, range(40, 42)), record_bytes(runtime)) == resumed


def test_what_is_in_the_middle_of_a_step_is_refused(tmp_path: Path) -> None:
    for number, settings in enumerate([{}, {"park_gradients": True}]):
        model = build(NAME)
        with attach(model, tmp_path / str(number), **settings) as runtime:
            train(NAME, runtime, model, range(1))
            runtime.snapshot("a")
            loss_of(NAME, model, make_batch(NAME, 1)).backward()
            for act in (runtime.snapshot, runtime.restore):
                with pytest.raises(StateError, match=r"in the middle of a step: call runtime.step\(\) first"):
                    act("a")
            runtime.step()
            with pytest.raises(StateError, match="has a snapshot 'a' already"):
                runtime.snapshot("a")
            with pytest.raises(StateError, match="has no snapshot 'b'"):
                runtime.restore("b")
            # None of this has harmed it.
            train(NAME, runtime, model, range(2, 3))


def test_a_run_without_a_drive_has_no_snapshots() -> None:
    model = build(NAME)
    with offload.attach(model, **SETTINGS) as runtime:
        train(NAME, runtime, model, range(1))
        assert runtime.snapshots() == ()
        with pytest.raises(StateError, match=r"this run has none: attach with disk"):
            runtime.snapshot("a")
        with pytest.raises(StateError, match=r"this run has none: attach with disk"):
            runtime.restore("a")


def test_too_little_memory_to_copy_through_is_said_with_numbers(tmp_path: Path) -> None:
    model = build(NAME)
    settings = {"activations_nbytes": 64 << 10, "chunk_nbytes": 128 << 10, "chunk_numel": 1 << 17}
    with attach(model, tmp_path, **settings) as runtime:
        with pytest.raises(CapacityError, match=r"has 64.* \(65,536 bytes\) and needs .* \(131,072 bytes\)"):
            runtime.snapshot("a")
        assert runtime.snapshots() == ()


def test_a_damaged_snapshot_leaves_the_last_commit(tmp_path: Path) -> None:
    model = build(NAME)
    torch.manual_seed(5)
    with attach(model, tmp_path, home="host") as runtime:
        train(NAME, runtime, model, range(2))
        runtime.snapshot("two")
        train(NAME, runtime, model, range(2, 4))
        expected, run_id = record_bytes(runtime), runtime.run_id
        (path,) = tmp_path.glob("run-*/snapshot-two.bin")
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
        with pytest.raises(CorruptionError, match=r"snapshot-two\.bin"):
            runtime.restore("two")
        with pytest.raises(StateError, match="resume the run at step 4"):
            loss_of(NAME, model, make_batch(NAME, 4))
    model = build(NAME)
    with attach(model, tmp_path, run_id=run_id, resume=True, home="host") as runtime:
        assert runtime.global_step == 4
        assert record_bytes(runtime) == expected


@pytest.mark.parametrize("number", [errno.EIO, 0])
def test_a_snapshot_that_cannot_be_read_is_the_drive_s_error_and_not_damage(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(NAME)
    real = files.read_file

    def failing(dir_fd: int, name: str, path: str, limit: int) -> bytes:
        if name == "snapshot-two":
            raise StorageError(f"cannot read {path}: the drive is gone", errno=number, path=path)
        return real(dir_fd, name, path, limit)

    with attach(model, tmp_path) as runtime:
        train(NAME, runtime, model, range(2))
        runtime.snapshot("two")
        (path,) = tmp_path.glob("run-*/snapshot-two")
        monkeypatch.setattr(files, "read_file", failing)
        with pytest.raises(
            StorageError, match="snapshot 'two' cannot be restored: cannot read .* is gone"
        ) as e:
            runtime.restore("two")
        assert (type(e.value), e.value.errno, e.value.path) == (StorageError, number, str(path))
        monkeypatch.undo()
        runtime.restore("two")


def test_a_snapshot_without_its_data_is_a_missing_file(tmp_path: Path) -> None:
    model = build(NAME)
    with attach(model, tmp_path) as runtime:
        train(NAME, runtime, model, range(2))
        runtime.snapshot("two")
        (path,) = tmp_path.glob("run-*/snapshot-two.bin")
        path.unlink()
        with pytest.raises(StorageError, match=r"snapshot 'two' cannot be restored: .* is missing") as e:
            runtime.restore("two")
        assert (type(e.value), e.value.errno, e.value.path) == (StorageError, errno.ENOENT, str(path))


def test_the_documented_loop_runs(tmp_path: Path) -> None:
    text = (Path(__file__).resolve().parents[2] / "docs" / "training.md").read_text()
    (source,) = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    exec(compile(source.replace('"/mnt/nvme0"', repr(str(tmp_path))), "docs/training.md", "exec"), {})


# -- going back -------------------------------------------------------------------------------


class Poison(torch.autograd.Function):
    """Passes values on; its gradient is NaN."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient * math.nan


def step(runtime: Any, model: Any, number: int, *, bad: bool = False) -> bool:
    loss = loss_of(NAME, model, make_batch(NAME, number))
    (Poison.apply(loss) if bad else loss).backward()
    return bool(runtime.step({"next": number + 1}))


def test_so_many_bad_steps_in_a_row_go_back_and_the_data_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = {"on_non_finite": "rollback", "max_non_finite_steps": 2, "max_rollbacks": 1}
    model = build(NAME)
    torch.manual_seed(5)
    with attach(model, tmp_path / "bad", **settings) as runtime, caplog.at_level(logging.WARNING, "offload"):
        train(NAME, runtime, model, range(3))
        runtime.snapshot("three")
        train(NAME, runtime, model, range(3, 5))
        assert not step(runtime, model, 5, bad=True)
        assert (runtime.global_step, runtime.rollbacks) == (5, 0)
        assert not step(runtime, model, 6, bad=True)
        assert (runtime.global_step, runtime.rollbacks, runtime.skipped_steps) == (3, 1, 2)
        # Committed already, with the position behind the bad batch.
        assert (runtime.committed_step, runtime.state) == (3, {"next": 7})
        found = train(NAME, runtime, model, range(7, 10)), record_bytes(runtime)
        assert runtime.global_step == 6
        assert not step(runtime, model, 10, bad=True)
        with pytest.raises(StateError, match=r"went back to a snapshot 1 times already \(max_rollbacks\)"):
            step(runtime, model, 11, bad=True)
        assert record_bytes(runtime) == found[1]
        run_id = runtime.run_id
    told = caplog.records[1].message
    assert told.startswith("step 6: the gradient of unit 'transformer.h.0' and ")
    assert told.endswith(" more is not finite (2 in a row); went back to step 3 (snapshot three)")

    model = build(NAME)
    torch.manual_seed(5)
    with attach(model, tmp_path / "good") as runtime:
        train(NAME, runtime, model, range(3))
        # The random numbers behind the snapshot are those of the first time.
        assert (train(NAME, runtime, model, range(7, 10)), record_bytes(runtime)) == found

    # How often it went back survives the process.
    model = build(NAME)
    with attach(model, tmp_path / "bad", run_id=run_id, resume=True, **settings) as runtime:
        assert runtime.rollbacks == 1


@pytest.mark.parametrize("mode", MODES)
def test_a_loop_goes_back_in_the_middle_of_a_step(mode: str, tmp_path: Path) -> None:
    model = build(NAME)
    torch.manual_seed(5)
    with attach(model, tmp_path, **MODES[mode]) as runtime:
        train(NAME, runtime, model, range(2))
        runtime.snapshot("two")
        expected = train(NAME, runtime, model, range(2, 4)), record_bytes(runtime)
        loss_of(NAME, model, make_batch(NAME, 4)).backward()
        done = runtime.roll_back("the loss jumped", {"next": 5})
        assert (done.from_step, done.step, done.snapshot, done.reason) == (4, 2, "two", "the loss jumped")
        assert runtime.state == {"next": 5}
        loss_of(NAME, model, make_batch(NAME, 5))  # A forward, and nothing comes of it.
        runtime.roll_back("once more")
        assert runtime.state == {"next": 2}
        assert (train(NAME, runtime, model, range(2, 4)), record_bytes(runtime)) == expected
        assert runtime.rollbacks == 2


def test_a_loop_goes_back_while_gradients_are_parked_on_disk(tmp_path: Path) -> None:
    for number, host_memory in enumerate(budgets(tmp_path, max_grad_norm=0.25)[:2]):
        model = build(NAME)
        torch.manual_seed(5)
        settings = {**SMALL, "max_grad_norm": 0.25, "host_memory": host_memory}
        with attach(model, tmp_path / str(number), **settings) as runtime:
            train(NAME, runtime, model, range(2))
            runtime.snapshot("two")
            expected = train(NAME, runtime, model, range(2, 4)), record_bytes(runtime)
            assert runtime.stats().parked_written_nbytes > 0
            loss_of(NAME, model, make_batch(NAME, 4)).backward()
            runtime.roll_back("the loss jumped")
            assert (train(NAME, runtime, model, range(2, 4)), record_bytes(runtime)) == expected
            assert runtime.stats().host_high_water_nbytes <= host_memory


def test_going_back_to_nothing_stops_with_nothing_applied(tmp_path: Path) -> None:
    model = build(NAME)
    settings = {"on_non_finite": "rollback", "max_non_finite_steps": 1}
    with attach(model, tmp_path, **settings) as runtime:
        train(NAME, runtime, model, range(2))
        before = record_bytes(runtime)
        with pytest.raises(StateError, match=r"step 3: .*there is no snapshot to go back to"):
            step(runtime, model, 2, bad=True)
        assert record_bytes(runtime) == before
        runtime.snapshot("two")
        assert not step(runtime, model, 3, bad=True)
        assert runtime.rollbacks == 1


def test_the_newest_whole_snapshot_is_the_one_gone_back_to(tmp_path: Path) -> None:
    model = build(NAME)
    with attach(model, tmp_path) as runtime:
        for number, name in enumerate(["z", "y", "x"]):
            train(NAME, runtime, model, range(number, number + 1))
            runtime.snapshot(name)
        (path,) = tmp_path.glob("run-*/snapshot-x")
        path.write_bytes(b"")
        assert runtime.roll_back("why not").snapshot == "y"
        runtime.drop_snapshot("y")
        assert runtime.roll_back("why not").snapshot == "z"


def test_options_that_cannot_go_together_are_refused(tmp_path: Path) -> None:
    for settings, message in [
        ({"on_non_finite": "rollback"}, "needs a disk for its snapshots"),
        ({"on_non_finite": "rollback", "disk": [tmp_path], "save_steps": 2}, "cannot undo updates"),
        ({"max_rollbacks": 0}, "max_rollbacks must be at least 1, got 0"),
        ({"on_non_finite": "back"}, "must be 'skip', 'rollback' or 'stop', got 'back'"),
    ]:
        with pytest.raises(ConfigError, match=message):
            offload.attach(build(NAME), **{**SETTINGS, **settings})
