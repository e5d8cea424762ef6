"""Exports onto full and read-only file systems, from read-only ones, and into places that are not safe."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from runs_cases import begin, call

from offload.errors import LockedError, StorageError
from offload.export.folder import find_leftovers, remove_export, work_folder


@pytest.fixture
def drive(tmp_path: Path) -> Path:
    path = tmp_path / "drive"
    path.mkdir()
    return path


@pytest.fixture
def mounted(tmp_path: Path, own_mounts: None) -> Iterator[Path]:
    """A file system in memory with 12 KiB of room."""
    point = tmp_path / "small"
    point.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12k,mode=700", "tmpfs", str(point)], check=True)
    try:
        yield point
    finally:
        subprocess.run(["umount", str(point)], check=True)


def test_a_full_disk_says_the_bytes_and_leaves_the_run(capsys, drive, mounted, monkeypatch):
    run = begin([drive])
    before = {path: path.read_bytes() for path in drive.rglob("*") if path.name == "data.bin"}
    code, _, err = call(capsys, "export", drive, "--to", mounted / "model")
    assert code == 75
    assert "needed (" in err and "free (" in err
    # A room that looks sufficient and is not: the space is gone when it is reserved.
    usage = type("Usage", (), {"free": 1 << 40})
    monkeypatch.setattr("offload.export.checkpoint.shutil.disk_usage", lambda _: usage)
    code, _, err = call(capsys, "export", drive, "--to", mounted / "deep" / "model")
    assert (code, "No space left on device" in err, "needed (" in err) == (75, True, True)
    assert list(mounted.iterdir()) == []
    assert {path: path.read_bytes() for path in before} == before
    assert call(capsys, "verify", drive, "--run", run)[0] == 0


def test_a_read_only_target_is_one_error(capsys, drive, mounted):
    begin([drive])
    subprocess.run(["mount", "-o", "remount,ro", str(mounted)], check=True)
    code, _, err = call(capsys, "export", drive, "--to", mounted / "model")
    assert (code, "Read-only file system" in err) == (74, True)
    assert call(capsys, "verify", drive)[0] == 0


@pytest.mark.usefixtures("own_mounts")
def test_a_run_on_a_read_only_drive_is_checked_and_exported(capsys, drive, tmp_path):
    begin([drive])
    subprocess.run(["mount", "--bind", str(drive), str(drive)], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,ro,bind", str(drive)], check=True)
        assert call(capsys, "runs", drive)[0] == 0
        code, out, _ = call(capsys, "verify", drive)
        assert (code, "is whole" in out) == (0, True)
        assert call(capsys, "export", drive, "--to", tmp_path / "model")[0] == 0
        code, _, err = call(capsys, "clean", drive, "--yes")
        assert (code, "Read-only file system" in err) == (74, True)
    finally:
        subprocess.run(["umount", str(drive)], check=True)
    assert call(capsys, "verify", drive)[0] == 0


def test_a_parent_that_everyone_may_write_to_is_refused(capsys, drive, tmp_path):
    begin([drive])
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    code, _, err = call(capsys, "export", drive, "--to", shared / "model")
    assert (code, "writable by everyone (mode 777)" in err, list(shared.iterdir())) == (74, True, [])
    shared.chmod(0o1777)
    assert call(capsys, "export", drive, "--to", shared / "model")[0] == 0


def test_a_link_in_place_of_the_work_folder_is_refused(capsys, drive, tmp_path):
    begin([drive])
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "offload_export.json").write_text(json.dumps({"format": "offload-export", "files": ["a"]}))
    (kept / "a").write_text("mine")
    (tmp_path / ".model.offload-tmp").symlink_to(kept)
    code, _, err = call(capsys, "export", drive, "--to", tmp_path / "model")
    assert (code, "is not a folder that an export of ours left" in err) == (74, True)
    assert (kept / "a").read_text() == "mine"


MARKERS = {
    "no JSON": b"{",
    "a list": b"[]",
    "another format": b'{"format": "other", "files": ["a"]}',
    "no files": b'{"format": "offload-export"}',
    "files that are a number": b'{"format": "offload-export", "files": 7}',
    "a path above": b'{"format": "offload-export", "files": ["a", "../canary"]}',
    "an absolute path": b'{"format": "offload-export", "files": ["a", "/etc/passwd"]}',
    "the directory above": b'{"format": "offload-export", "files": ["a", ".."]}',
    "a zero byte": b'{"format": "offload-export", "files": ["a", "a\\u0000b"]}',
    "a number among names": b'{"format": "offload-export", "files": ["a", 4]}',
    "deep nesting": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
}


@pytest.mark.parametrize("what", [*MARKERS, "a link", "a pipe"])
def test_a_hostile_marker_proves_nothing(tmp_path: Path, what: str) -> None:
    (tmp_path / "canary").write_text("keep")
    left = tmp_path / ".model.offload-tmp"
    left.mkdir()
    (left / "a").write_text("keep")
    marker = left / "offload_export.json"
    if what == "a link":
        (tmp_path / "elsewhere").write_text(json.dumps({"format": "offload-export", "files": ["a"]}))
        marker.symlink_to(tmp_path / "elsewhere")
    elif what == "a pipe":
        os.mkfifo(marker)
    else:
        marker.write_bytes(MARKERS[what])
    assert find_leftovers(tmp_path) == [left]
    with pytest.raises(StorageError, match="no export of ours wrote"):
        remove_export(left)
    assert (left / "a").read_text() == (tmp_path / "canary").read_text() == "keep"


def test_two_exports_to_one_target_do_not_meet(tmp_path: Path) -> None:
    with (
        work_folder(tmp_path / "model") as work,
        pytest.raises(LockedError, match="is being written by another process"),
        work_folder(tmp_path / "model"),
    ):
        pass
    assert not work.exists()


@pytest.mark.parametrize("exchanges", [True, False])
def test_an_export_takes_the_place_of_another(tmp_path: Path, monkeypatch, exchanges: bool) -> None:
    if not exchanges:
        monkeypatch.setattr("offload.export.folder._exchange", lambda *_: False)
    for text in ("one", "two"):
        with work_folder(tmp_path / "model") as work:
            (work / "offload_export.json").write_text('{"format": "offload-export", "files": ["a"]}')
            (work / "a").write_text(text)
            assert work.stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "model" / "a").read_text() == "two"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    mask = os.umask(0)
    os.umask(mask)
    assert (tmp_path / "model").stat().st_mode & 0o777 == 0o777 & ~mask
