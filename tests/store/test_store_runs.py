"""Listing runs without touching them; removing one only when it is provably ours."""

from __future__ import annotations

import os
import shutil
import threading
import time
from contextlib import suppress

import pytest
from store_content import write_all

from offload.errors import CorruptionError, LockedError, StorageError
from offload.store import RunState, Store, files, find_runs, list_runs, remove_run

RUN_ID = "00010203-0405-4607-8809-0a0b0c0d0e0f"


@pytest.fixture
def run_id(dirs, specs, engine):
    with Store.create(dirs, specs, engine=engine, chunk_nbytes=8192, identity={"model": "m"}) as store:
        write_all(store, 1)
        store.commit({"step": 1})
    return store.run_id


def snapshot(dirs):
    return {
        (path, path.lstat().st_mtime_ns): path.read_bytes() if path.is_file() else b""
        for directory in dirs
        for path in directory.rglob("*")
    }


def test_runs_are_listed_with_what_they_are(dirs, run_id):
    for drive, directory in enumerate(dirs):
        (info,) = list_runs(directory)
        assert (info.run_id, info.problem, info.drive, info.generation) == (run_id, None, drive, 1)
        assert info.path == str(directory / f"run-{run_id}")
        assert info.directories == tuple(map(str, dirs))
        assert (info.state, info.identity) == ({"step": 1}, {"model": "m"})
        assert info.nbytes == (directory / f"run-{run_id}" / "data.bin").stat().st_size


def test_listing_changes_nothing(dirs, run_id):
    before = snapshot(dirs)
    list_runs(dirs[0])
    assert snapshot(dirs) == before


def test_a_run_in_use_is_listed(dirs, store):
    assert [info.run_id for info in list_runs(dirs[0])] == [store.run_id]


def test_other_entries_are_not_runs(tmp_path):
    for name in ("run-", "run-x", "other", f"run-{RUN_ID}x", f"run-{RUN_ID.upper()}"):
        (tmp_path / name).mkdir()
    assert list_runs(tmp_path) == ()


def test_a_broken_run_is_listed_with_its_problem(dirs, run_id):
    (dirs[0] / f"run-{run_id}" / "OFFLOAD_RUN").unlink()
    (dirs[0] / f"run-{RUN_ID}").symlink_to(dirs[1] / f"run-{run_id}")
    infos = {info.run_id: info for info in list_runs(dirs[0])}
    assert "OFFLOAD_RUN: No such file" in infos[run_id].problem
    assert "cannot open directory" in infos[RUN_ID].problem


def test_a_directory_that_is_not_there_cannot_be_listed(tmp_path):
    with pytest.raises(StorageError, match="cannot list"):
        list_runs(tmp_path / "gone")


def test_a_removed_run_leaves_nothing(dirs, run_id):
    remove_run(dirs, run_id)
    assert [path for directory in dirs for path in directory.rglob("*")] == []


def test_only_the_run_named_is_removed(dirs, specs, engine, run_id):
    with Store.create(dirs, specs, engine=engine) as other:
        pass
    remove_run(dirs, run_id)
    assert [info.run_id for info in list_runs(dirs[0])] == [other.run_id]


def test_a_run_in_use_is_not_removed(dirs, store):
    before = snapshot(dirs)
    with pytest.raises(LockedError):
        remove_run(dirs, store.run_id)
    assert snapshot(dirs) == before


def no_owner(folder):
    (folder / "OFFLOAD_RUN").unlink()


def damaged_owner(folder):
    (folder / "OFFLOAD_RUN").write_bytes(b"mine")


def foreign_file(folder):
    (folder / "thesis.tex").write_text("years of work")


def foreign_folder(folder):
    (folder / "photos").mkdir()


def open_mode(folder):
    folder.chmod(0o777)


@pytest.mark.parametrize("spoil", [no_owner, damaged_owner, foreign_file, foreign_folder, open_mode])
def test_what_is_not_provably_ours_is_not_removed(dirs, run_id, spoil):
    """Not even from the other drive."""
    spoil(dirs[1] / f"run-{run_id}")
    before = snapshot(dirs)
    with pytest.raises(StorageError):
        remove_run(dirs, run_id)
    assert snapshot(dirs) == before


def test_a_folder_renamed_to_another_run_is_not_removed(dirs, run_id):
    (dirs[0] / f"run-{run_id}").rename(dirs[0] / f"run-{RUN_ID}")
    with pytest.raises(CorruptionError, match="belongs to run"):
        remove_run(dirs[:1], RUN_ID)


def test_removing_does_not_follow_a_link(tmp_path, dirs, run_id):
    shutil.move(dirs[0] / f"run-{run_id}", tmp_path / "kept")
    (dirs[0] / f"run-{run_id}").symlink_to(tmp_path / "kept")
    with pytest.raises(StorageError, match="cannot open directory"):
        remove_run(dirs, run_id)
    assert (tmp_path / "kept" / "data.bin").exists()


def test_a_link_inside_is_removed_and_not_its_target(tmp_path, dirs, run_id):
    (tmp_path / "target").write_text("keep")
    os.symlink(tmp_path / "target", dirs[0] / f"run-{run_id}" / "manifest-7")
    remove_run(dirs, run_id)
    assert (tmp_path / "target").read_text() == "keep"


def test_a_removal_interrupted_anywhere_can_be_repeated(dirs, specs, engine, monkeypatch):
    unlink, remove_directory = files.unlink, files.remove_directory
    calls = []

    def interrupted(call, limit):
        def checked(*arguments):
            calls.append(arguments)
            if len(calls) == limit:
                raise StorageError("interrupted")
            call(*arguments)

        return checked

    limit = 0
    while limit <= len(calls):
        with Store.create(dirs, specs, engine=engine) as store:
            pass
        calls.clear()
        limit += 1
        monkeypatch.setattr(files, "unlink", interrupted(unlink, limit))
        monkeypatch.setattr(files, "remove_directory", interrupted(remove_directory, limit))
        with suppress(StorageError):
            remove_run(dirs, store.run_id)
        monkeypatch.undo()
        for directory in dirs:
            if list_runs(directory):
                remove_run([directory], store.run_id)
        assert [path for directory in dirs for path in directory.rglob("*")] == []
    assert limit > 10


def test_what_a_creation_began_can_be_removed(dirs):
    folder = dirs[0] / f"run-{RUN_ID}"
    folder.mkdir(mode=0o700)
    (folder / "OFFLOAD_RUN.tmp").write_text("half")
    (folder / "lock").touch(mode=0o600)
    remove_run(dirs[:1], RUN_ID)
    assert not folder.exists()


def found(dirs):
    (run,) = find_runs(dirs)
    return run


def test_a_run_is_put_together_from_its_drives(dirs, run_id):
    run = found(dirs[::-1])
    assert (run.run_id, run.state, run.reason) == (run_id, RunState.COMPLETE, "")
    assert run.directories == tuple(map(str, dirs))
    assert run.nbytes == sum(folder.nbytes for folder in run.folders) > 0
    assert run.newest.state == {"step": 1}
    assert abs(run.newest.committed_s - time.time()) < 600


def test_a_directory_named_twice_counts_once(dirs, run_id):
    assert len(found([*dirs, dirs[0], f"{dirs[0]}/"]).folders) == 2


def test_a_missing_drive_is_told_with_where_it_was(dirs, run_id):
    run = found(dirs[:1])
    assert (run.state, run.reason) == (
        RunState.DRIVE_MISSING,
        f"drive 1 of 2 is not here; it was {dirs[1]}",
    )


def test_a_run_in_use_names_the_process(dirs, store):
    run = found(dirs)
    assert (run.state, run.holder) == (RunState.IN_USE, os.getpid())
    assert run.reason == f"being used by process {os.getpid()}"


def test_looking_keeps_nobody_out(dirs, engine, run_id):
    """Whoever opens the run while somebody lists it gets it."""
    stop = threading.Event()

    def look():
        while not stop.is_set():
            find_runs(dirs)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        for _ in range(50):
            Store.open(dirs, engine=engine, run_id=run_id).close()
    finally:
        stop.set()
        thread.join()


def test_a_holder_that_does_not_say_who_it_is(dirs, store):
    for path in dirs:
        (path / f"run-{store.run_id}" / "lock").write_bytes(b"\xff{")
    run = found(dirs)
    assert (run.state, run.holder, run.reason) == (RunState.IN_USE, 0, "being used by a process")


def test_a_run_without_a_commit_is_unfinished(dirs, specs, engine):
    with Store.create(dirs, specs, engine=engine):
        pass
    assert (found(dirs).state, found(dirs).reason) == (
        RunState.UNFINISHED,
        "its first import did not finish",
    )


@pytest.mark.parametrize("left", [[], ["lock"], ["OFFLOAD_RUN.tmp", "lock"], ["OFFLOAD_RUN", "data.bin"]])
def test_what_a_killed_creation_left_is_unfinished(dirs, run_id, left):
    folder = dirs[1] / f"run-{run_id}"
    for path in folder.iterdir():
        if path.name not in left:
            path.unlink()
    for name in left:
        (folder / name).touch(mode=0o600)
    run = found(dirs[1:])
    assert run.state is RunState.UNFINISHED
    assert "interrupted" in run.reason


def test_a_damaged_manifest_is_told(dirs, run_id):
    for path in dirs:
        (path / f"run-{run_id}" / "manifest-1").write_bytes(b"torn")
    run = found(dirs)
    assert run.state is RunState.DAMAGED
    assert f"{dirs[0]}/run-{run_id}/manifest-1 does not begin with" in run.reason
    assert run.newest.generation == 0


def test_without_any_valid_manifest_a_run_is_damaged(dirs, run_id):
    for name in ("manifest-0", "manifest-1"):
        (dirs[0] / f"run-{run_id}" / name).write_bytes(b"torn")
    assert found(dirs[:1]).state is RunState.DAMAGED


def test_a_copy_of_a_drive_is_told(tmp_path, dirs, run_id):
    shutil.copytree(dirs[0], tmp_path / "copy")
    run = found([*dirs, tmp_path / "copy"])
    assert (run.state, "are both drive 0" in run.reason) == (RunState.DAMAGED, True)


def test_the_newest_commit_comes_first(dirs, specs, engine, run_id):
    with Store.create(dirs, specs, engine=engine) as other:
        pass
    for path in dirs:
        os.utime(path / f"run-{other.run_id}" / "manifest-0", (1, 1))
    assert [run.run_id for run in find_runs(dirs)] == [run_id, other.run_id]
