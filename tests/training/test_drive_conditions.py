"""Drives that are full, read-only or gone while a run trains: a message, an exit code, and a way on."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import offload.training.loop
from offload.cli import main
from offload.errors import StorageError
from offload.store import list_runs
from offload.training.finetune import finetune


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment that the test gives back."""
    for name in ("HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY"):
        monkeypatch.setenv(name, os.environ.get(name, "1"))


@pytest.fixture(params=["tmpfs", "ext4"])
def small(request: pytest.FixtureRequest, tmp_path: Path, own_mounts: None) -> Iterator[Path]:
    """A file system of 24 MiB."""
    point = tmp_path / "small"
    point.mkdir()
    if request.param == "tmpfs":
        command = ["mount", "-t", "tmpfs", "-o", "size=24m,mode=700", "tmpfs", str(point)]
    else:
        image = tmp_path / "image"
        with open(image, "wb") as file:
            file.truncate(24 << 20)
        try:
            subprocess.run(["mkfs.ext4", "-q", "-m", "0", str(image)], check=True)
        except FileNotFoundError:
            pytest.skip("no mkfs.ext4")
        command = ["mount", "-o", "loop", str(image), str(point)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"cannot mount: {done.stderr.strip()}")
    point.chmod(0o700)
    try:
        yield point
    finally:
        subprocess.run(["umount", str(point)], check=True)


def call(config: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """Run the command; return its exit code and what it printed."""
    path = tmp_path / "run.yaml"
    path.write_text(config.to_yaml())
    with pytest.raises(SystemExit) as caught:
        main(["finetune", str(path)])
    assert isinstance(caught.value.code, int)
    printed = capsys.readouterr()
    return caught.value.code, printed.out, printed.err


@pytest.fixture
def at_batch(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[], object]], None]:
    """Return a function that lets something happen in the middle of a step, from 1."""

    def plan(number: int, act: Callable[[], object]) -> None:
        real, count = offload.training.loop._backward, 0

        def backward(*arguments: Any) -> tuple[float, str]:
            nonlocal count
            count += 1
            if count == number:
                act()
            return real(*arguments)

        monkeypatch.setattr(offload.training.loop, "_backward", backward)

    return plan


def fill(directory: Path) -> None:
    """Take all the room there is."""
    with open(directory / "filler", "wb", buffering=0) as file:
        for size in (1 << 20, 4096, 1):
            try:
                while True:
                    file.write(b"\1" * size)
                    os.fsync(file.fileno())
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise


def check_goes_on(config: Any, directory: Path, make_config: Any, tmp_path: Path) -> None:
    """Finish the run and compare it with one that had no trouble."""
    (run,) = list_runs(directory)
    assert run.problem is None and run.state is not None
    lines: list[str] = []
    assert finetune(config, echo=lines.append).step == config.max_steps
    assert f"at step {run.state['step']} of {config.max_steps}" in lines[0]
    shape = config.lr_scheduler_type
    whole = make_config(max_steps=config.max_steps, output_dir=tmp_path / "whole", lr_scheduler_type=shape)
    finetune(whole, echo=lambda _: None)
    ours, theirs = (c.output_dir / "final/model.safetensors" for c in (config, whole))
    assert ours.read_bytes() == theirs.read_bytes()
    assert [name for name in os.listdir(config.output_dir) if name.endswith(".part")] == []


def test_no_room_for_a_commit(
    make_config: Any, tmp_path: Path, small: Path, at_batch: Any, capsys: Any
) -> None:
    config = make_config(disk=small, max_steps=5)
    at_batch(3, lambda: fill(small))
    code, out, err = call(config, tmp_path, capsys)
    assert code == 75
    assert "the manifest of generation 4 needs" in err and "free (" in err and "bytes) there" in err
    assert "generation 3 stands: free space" in err
    assert "the run stands at step 2, committed; start it again to go on" in out
    # Started again too early, it says so once more, and nothing is lost by that.
    code, _, err = call(config, tmp_path, capsys)
    assert (code, "free (" in err) == (75, True), err
    (small / "filler").unlink()
    check_goes_on(config, small, make_config, tmp_path)


def test_no_room_for_the_metrics(
    make_config: Any, tmp_path: Path, small: Path, at_batch: Any, capsys: Any
) -> None:
    (tmp_path / "state").mkdir(mode=0o700)
    config = make_config(disk=tmp_path / "state", output_dir=small / "out", max_steps=40)
    at_batch(3, lambda: fill(small))
    code, out, err = call(config, tmp_path, capsys)
    assert code == 75
    assert "metrics.jsonl: No space left on device: " in err
    assert "bytes needed, " in err and "free; free space, then run the same command again" in err
    assert "committed; start it again to go on" in out
    (small / "filler").unlink()
    check_goes_on(config, tmp_path / "state", make_config, tmp_path)


def test_no_room_for_the_export(
    make_config: Any, tmp_path: Path, small: Path, at_batch: Any, capsys: Any
) -> None:
    (tmp_path / "state").mkdir(mode=0o700)
    config = make_config(disk=tmp_path / "state", output_dir=small / "out", max_steps=3)
    at_batch(3, lambda: fill_but(small, 64 << 10))
    code, _, err = call(config, tmp_path, capsys)
    assert (code, "needed (" in err, "free (" in err) == (75, True, True), err
    assert not (small / "out" / "final").exists()
    (small / "filler").unlink()
    check_goes_on(config, tmp_path / "state", make_config, tmp_path)


def fill_but(directory: Path, nbytes: int) -> None:
    """Take all the room but so much."""
    fill(directory)
    os.truncate(directory / "filler", (directory / "filler").stat().st_size - nbytes)


def no_room_for_a_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("offload.trace.chrome._open_text", full)


def test_no_room_for_the_trace(make_config: Any, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    no_room_for_a_trace(monkeypatch)
    config = make_config(max_steps=3, trace=tmp_path / "trace.json")
    code, out, err = call(config, tmp_path, capsys)
    assert code == 75
    assert f"cannot write the trace {tmp_path}/trace.json: No space left on device" in err
    assert " bytes needed, " in err
    # Everything else is done: nothing but the trace is lost.
    assert "the run stands at step 3, committed" in out
    assert (config.output_dir / "final" / "model.safetensors").exists()
    (run,) = list_runs(config.output_dir / "state")
    assert run.state is not None and run.state["step"] == 3


def test_a_trace_that_cannot_be_written_does_not_hide_why_the_run_ended(
    make_config: Any, tmp_path: Path, at_batch: Any, monkeypatch: Any, capsys: Any
) -> None:
    def broken() -> None:
        raise StorageError("the drive is gone", errno=errno.EIO, path="/a/drive")

    no_room_for_a_trace(monkeypatch)
    at_batch(3, broken)
    code, out, err = call(make_config(max_steps=5, trace=tmp_path / "trace.json"), tmp_path, capsys)
    assert code == 74
    assert "the drive is gone" in err and "trace" not in err
    assert "the run stands at step " in out
    assert "cannot write the trace" in out


@pytest.mark.parametrize("small", ["ext4"], indirect=True)
def test_a_drive_that_becomes_read_only(
    make_config: Any, tmp_path: Path, small: Path, at_batch: Any, capsys: Any
) -> None:
    def abort() -> None:
        # What the kernel does by itself when it meets damage (errors=remount-ro).
        subprocess.run(["mount", "-o", "remount,abort", str(small)], check=True, capture_output=True)

    config = make_config(disk=small, max_steps=5)
    at_batch(3, abort)
    code, out, err = call(config, tmp_path, capsys)
    assert code == 74, err
    assert str(small) in err
    assert "the run stands at step " in out
    subprocess.run(["umount", str(small)], check=True)
    subprocess.run(["mount", "-o", "loop", str(tmp_path / "image"), str(small)], check=True)
    check_goes_on(config, small, make_config, tmp_path)


@pytest.mark.parametrize("small", ["tmpfs"], indirect=True)
def test_an_output_directory_that_becomes_read_only(
    make_config: Any, tmp_path: Path, small: Path, at_batch: Any, capsys: Any
) -> None:
    def remount(how: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{how}", str(small)], check=True)

    (tmp_path / "state").mkdir(mode=0o700)
    config = make_config(disk=tmp_path / "state", output_dir=small / "out", max_steps=5)
    at_batch(3, lambda: remount("ro"))
    code, out, err = call(config, tmp_path, capsys)
    assert (code, "metrics.jsonl: Read-only file system; name a directory that can be written" in err) == (
        74,
        True,
    )
    assert "the run stands at step 2, committed; start it again to go on" in out
    code, _, err = call(config, tmp_path, capsys)
    assert (code, "Read-only file system" in err) == (74, True)
    remount("rw")
    check_goes_on(config, tmp_path / "state", make_config, tmp_path)


@pytest.mark.parametrize("small", ["ext4"], indirect=True)
def test_a_drive_that_is_not_mounted_is_named_and_nothing_is_written_in_its_place(
    make_config: Any, tmp_path: Path, small: Path, capsys: Any
) -> None:
    other = tmp_path / "other"
    other.mkdir(mode=0o700)
    settings = {"disk": [small, other], "lr_scheduler_type": "constant"}
    config = make_config(max_steps=2, **settings)
    assert call(config, tmp_path, capsys)[0] == 0
    subprocess.run(["umount", str(small)], check=True)
    longer = make_config(max_steps=4, **settings)
    code, _, err = call(longer, tmp_path, capsys)
    assert code == 74
    assert f"error: {small} holds no run" in err and "mount its drive there" in err
    assert list(small.iterdir()) == []
    subprocess.run(["mount", "-o", "loop", str(tmp_path / "image"), str(small)], check=True)
    check_goes_on(longer, small, make_config, tmp_path)
