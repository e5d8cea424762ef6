"""Snapshots: what is copied, what comes back, and what is refused."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from store_content import content, read_all, write_all
from store_doubles import PlainEngine

from offload.aio import open_engine
from offload.errors import CorruptionError, DiskFullError, StateError, StorageError
from offload.store import RecordSpec, Store, files, list_snapshots, remove_run

CHUNK = 8192


def commit(store: Store, step: int) -> dict[str, bytes]:
    write_all(store, step)
    store.commit({"step": step})
    return read_all(store)


def folders(dirs) -> list[Path]:
    return [next(path.glob("run-*")) for path in dirs]


def entries(dirs) -> list[set[str]]:
    return [{path.name for path in folder.glob("snapshot-*")} for folder in folders(dirs)]


def reopen(store: Store, dirs) -> Store:
    store.close()
    return Store.open(dirs, engine=PlainEngine(), run_id=store.run_id)


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def test_a_restored_snapshot_is_a_new_generation_with_the_old_bytes_and_state(store, dirs):
    one = commit(store, 1)
    info = store.snapshot("before")
    assert (info.name, info.problem, info.generation, info.state) == ("before", None, 1, {"step": 1})
    # The frozen record is not copied.
    assert info.nbytes == sum(spec.nbytes for spec in store.records.values() if spec.mutable)
    sizes = [(folder / "snapshot-before.bin").stat().st_size for folder in folders(dirs)]
    assert sum(sizes) == info.nbytes
    for step in (2, 3):
        assert commit(store, step) != one
    assert store.restore("before") == 4
    assert (store.generation, store.state) == (4, {"step": 1})
    assert read_all(store) == one
    assert store.verify().ok
    # It stays, and can be restored again.
    commit(store, 5)
    with reopen(store, dirs) as store:
        assert store.snapshots() == (info,)
        store.restore("before", state={"step": 1, "batches": 7})
        assert read_all(store) == one
    with reopen(store, dirs) as store:
        assert (store.generation, store.state) == (6, {"step": 1, "batches": 7})
        assert read_all(store) == one


def test_a_snapshot_is_of_the_commit_and_a_restore_forgets_what_was_written_since(store):
    one = commit(store, 1)
    write_all(store, 2, names=["w"])
    store.snapshot("a")
    assert read_all(store) != one  # What is being built goes on.
    store.restore("a")
    assert read_all(store) == one


def test_snapshots_are_listed_oldest_first_open_or_not(store, dirs):
    for step, name in [(1, "z"), (2, "y"), (3, "x")]:
        commit(store, step)
        store.snapshot(name)
    store.restore("z")
    store.snapshot("w")
    assert [info.name for info in store.snapshots()] == ["z", "y", "x", "w"]
    assert list_snapshots(dirs, store.run_id) == store.snapshots()
    assert [info.name for info in list_snapshots(dirs[:1], store.run_id)] == ["z", "y", "x", "w"]
    store.drop_snapshot("y")
    assert [info.name for info in store.snapshots()] == ["z", "x", "w"]
    assert all("snapshot-y" not in names and "snapshot-y.bin" not in names for names in entries(dirs))


@pytest.mark.parametrize("buffer_nbytes", [CHUNK, 3 * CHUNK + 100, 40 * CHUNK])
def test_a_copy_goes_through_the_buffer_it_is_lent(store, buffer_nbytes):
    one = commit(store, 1)
    buffer = bytearray(buffer_nbytes)
    seen = []
    store.snapshot("a", buffer=buffer, progress=lambda done, total: seen.append((done, total)))
    assert any(buffer)
    commit(store, 2)
    store.restore("a", buffer=buffer, progress=lambda done, total: seen.append((done, total)))
    assert read_all(store) == one
    total = 8 * CHUNK + 2 * 4096
    assert seen.count((total, total)) == 2
    assert {whole for _, whole in seen} == {total}


def test_records_smaller_than_a_chunk_need_a_buffer_no_larger(dirs, engine):
    with Store.create(dirs, [RecordSpec("w", 4096), RecordSpec("o", 8192)], engine=engine) as store:
        one = commit(store, 1)
        with pytest.raises(ValueError, match="a buffer of 4,096 bytes to copy records; it needs 8,192"):
            store.snapshot("a", buffer=bytearray(4096))
        assert entries(dirs) == [set(), set()]
        store.snapshot("a", buffer=bytearray(8192))
        commit(store, 2)
        store.restore("a", buffer=bytearray(8192))
        assert read_all(store) == one


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".hidden", "a.bin", "-", "x" * 65, "a b", "a\n", "\x00"])
def test_a_name_that_could_be_a_path_is_refused(store, name):
    commit(store, 1)
    for act in (store.snapshot, store.restore, store.drop_snapshot):
        with pytest.raises(ValueError, match="a snapshot's name has 1 to 64"):
            act(name)


def test_what_cannot_be_is_refused(store, specs):
    with pytest.raises(StateError, match="record w of run .* was never committed"):
        store.snapshot("a")
    one = commit(store, 1)
    store.snapshot("a")
    with pytest.raises(StateError, match="has a snapshot 'a' already"):
        store.snapshot("a")
    for act in (store.restore, store.drop_snapshot):
        with pytest.raises(StateError, match="has no snapshot 'b'"):
            act("b")
    assert read_all(store) == one

    def writes(done: int, total: int) -> None:
        store.write("o", content("o", 2, store.records["o"].nbytes))

    with pytest.raises(StateError, match="or a snapshot; write when it has returned"):
        store.snapshot("c", progress=writes)
    assert [info.name for info in store.snapshots()] == ["a"]
    store.close()
    for act in (store.snapshot, store.restore, store.drop_snapshot):
        with pytest.raises(StateError, match="is closed"):
            act("a")
    with pytest.raises(StateError, match="is closed"):
        store.snapshots()


def test_an_interrupted_copy_leaves_nothing_and_the_run_as_it_was(store, dirs):
    one = commit(store, 1)

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.snapshot("a", progress=interrupt)
    assert entries(dirs) == [set(), set()]
    store.snapshot("a")
    two = commit(store, 2)
    with pytest.raises(KeyboardInterrupt):
        store.restore("a", progress=interrupt)
    assert (read_all(store), store.generation) == (two, 2)
    assert commit(store, 3) != one


def test_too_little_room_is_said_with_numbers_before_anything_is_made(store, dirs, monkeypatch):
    commit(store, 1)
    statvfs = os.statvfs

    class Full:
        def __init__(self, path) -> None:
            self.f_frsize = statvfs(path).f_frsize
            self.f_bavail = 3

    monkeypatch.setattr(os, "statvfs", Full)
    with pytest.raises(DiskFullError, match=r"free \(12,288 bytes\) and the snapshot needs") as caught:
        store.snapshot("a")
    needed = sum(spec.nbytes for spec in store.records.values() if spec.mutable)
    assert needed < caught.value.asked_nbytes < needed + 4096
    assert caught.value.got_nbytes == 12288
    assert entries(dirs) == [set(), set()]
    monkeypatch.undo()
    store.snapshot("a")


def test_a_damaged_chunk_of_a_snapshot_is_named_and_the_run_stays_as_it_is(store, dirs):
    commit(store, 1)
    store.snapshot("a")
    two = commit(store, 2)
    path = folders(dirs)[1] / "snapshot-a.bin"
    flip(path, CHUNK + 5)
    with pytest.raises(
        CorruptionError, match=r"snapshot-a\.bin \(drive 1\) at offset 8,192: chunk 3 of record w"
    ):
        store.restore("a")
    assert (read_all(store), store.generation, store.state) == (two, 2, {"step": 2})
    commit(store, 3)


def test_a_damaged_chunk_of_the_run_is_in_no_snapshot(store, dirs):
    commit(store, 1)
    flip(folders(dirs)[0] / "data.bin", 7)
    with pytest.raises(CorruptionError, match=r"data\.bin \(drive 0\) at offset 0: chunk 0 of record w"):
        store.snapshot("a")
    assert entries(dirs) == [set(), set()]


def test_a_snapshot_cut_short_or_without_its_data_is_refused(store, dirs):
    commit(store, 1)
    store.snapshot("a")
    two = commit(store, 2)
    path = folders(dirs)[0] / "snapshot-a.bin"
    os.truncate(path, path.stat().st_size - 4096)
    with pytest.raises(CorruptionError, match="it was cut or replaced"):
        store.restore("a")
    path.unlink()
    (info,) = store.snapshots()
    assert info.problem == f"{path} is missing"
    with pytest.raises(StorageError, match=f"{path}: No such file"):
        store.restore("a")
    assert read_all(store) == two
    store.drop_snapshot("a")
    assert entries(dirs) == [set(), set()]


def test_one_drives_description_is_enough_and_is_given_to_the_other(store, dirs):
    one = commit(store, 1)
    store.snapshot("a")
    commit(store, 2)
    flip(folders(dirs)[0] / "snapshot-a", 60)
    assert [info.problem for info in store.snapshots()] == [None]
    with reopen(store, dirs) as store:
        whole = [(folder / "snapshot-a").read_bytes() for folder in folders(dirs)]
        assert whole[0] == whole[1]
        store.restore("a")
        assert read_all(store) == one


def test_a_snapshot_with_no_valid_description_is_told_of_and_can_be_dropped(store, dirs):
    commit(store, 1)
    store.snapshot("a")
    for folder in folders(dirs):
        flip(folder / "snapshot-a", 60)
    with reopen(store, dirs) as store:
        (info,) = store.snapshots()
        assert info.problem is not None
        assert "snapshot-a fails its checksum" in info.problem
        with pytest.raises(CorruptionError, match="snapshot-a fails its checksum"):
            store.restore("a")
        # Its records may still be of use to somebody.
        assert entries(dirs) == [{"snapshot-a", "snapshot-a.bin"}] * 2
        store.drop_snapshot("a")
        assert entries(dirs) == [set(), set()]


def test_a_description_under_another_name_or_of_another_run_is_refused(store, dirs, tmp_path):
    commit(store, 1)
    store.snapshot("a")
    for folder in folders(dirs):
        (folder / "snapshot-b").write_bytes((folder / "snapshot-a").read_bytes())
        (folder / "snapshot-b").chmod(0o600)
    with pytest.raises(CorruptionError, match="describes snapshot 'a' of run"):
        store.restore("b")
    others = [tmp_path / "c", tmp_path / "d"]
    for path in others:
        path.mkdir()
    with Store.create(
        others, list(store.records.values()), engine=PlainEngine(), chunk_nbytes=CHUNK
    ) as other:
        commit(other, 1)
        other.snapshot("a")
        for mine, its in zip(folders(dirs), folders(others), strict=True):
            (its / "snapshot-a").write_bytes((mine / "snapshot-a").read_bytes())
        with pytest.raises(CorruptionError, match="describes snapshot 'a' of run"):
            other.restore("a")


def test_only_parts_that_are_provably_ours_are_removed_at_an_opening(store, dirs, tmp_path, caplog):
    commit(store, 1)
    first, second = folders(dirs)
    precious = tmp_path / "precious"
    precious.write_bytes(b"x")
    precious.chmod(0o600)
    for name in ("snapshot-left.bin", "snapshot-left-2.bin"):
        (first / name).write_bytes(b"part")
        (first / name).chmod(0o600)
    (first / "snapshot-link.bin").symlink_to(precious)
    os.link(precious, second / "snapshot-second_name.bin")
    (second / "snapshot-open.bin").write_bytes(b"x")
    (second / "snapshot-open.bin").chmod(0o644)
    with caplog.at_level(logging.WARNING), reopen(store, dirs):
        pass
    assert entries(dirs) == [
        {"snapshot-link.bin"},
        {"snapshot-second_name.bin", "snapshot-open.bin"},
    ]
    assert precious.read_bytes() == b"x"
    assert sum("of an unfinished snapshot stays" in record.message for record in caplog.records) == 3


def test_a_run_is_removed_together_with_its_snapshots(store, dirs):
    commit(store, 1)
    store.snapshot("a")
    store.close()
    remove_run(dirs, store.run_id)
    assert [list(path.iterdir()) for path in dirs] == [[], []]


def test_extents_are_shared_where_the_file_system_can(store, dirs, monkeypatch, engine):
    """A double copies as FICLONERANGE would, so the offsets are held; the engine must not copy."""
    one = commit(store, 1)
    paths = []

    def clone(fd, offset, target_fd, target_offset, nbytes, path) -> bool:
        paths.append(path)
        os.pwrite(target_fd, os.pread(fd, nbytes, offset), target_offset)
        return True

    monkeypatch.setattr(files, "clone_range", clone)
    engine.submitted.clear()
    store.snapshot("a")
    assert engine.submitted == []
    assert set(paths) == {str(folder / "snapshot-a.bin") for folder in folders(dirs)}
    commit(store, 2)
    store.restore("a")
    assert read_all(store) == one


def test_a_second_drive_that_cannot_share_extents_is_copied_to(store, dirs, monkeypatch):
    one = commit(store, 1)
    second = str(dirs[1])

    def clone(fd, offset, target_fd, target_offset, nbytes, path) -> bool:
        if path.startswith(second):
            return False
        os.pwrite(target_fd, os.pread(fd, nbytes, offset), target_offset)
        return True

    monkeypatch.setattr(files, "clone_range", clone)
    store.snapshot("a")
    commit(store, 2)
    store.restore("a")
    assert read_all(store) == one


@pytest.mark.slow
@pytest.mark.usefixtures("own_mounts")
@pytest.mark.parametrize("kind", ["xfs", "btrfs"])
def test_a_file_system_that_shares_extents_takes_no_room_for_a_snapshot(tmp_path, kind):
    """On a real one, in an image; only where the tools are and mounting is allowed."""
    make = shutil.which(f"mkfs.{kind}")
    if make is None:
        pytest.skip(f"needs mkfs.{kind}")
    image, root = tmp_path / "image", tmp_path / "mounted"
    with image.open("wb") as file:
        file.truncate(400 << 20)  # The least that mkfs.xfs takes is 300 MiB.
    root.mkdir()
    subprocess.run([make, "-q", image], check=True)
    if subprocess.run(["mount", "-o", "loop", image, root], check=False).returncode:
        pytest.skip(f"this kernel does not mount {kind}")
    try:
        specs = [RecordSpec("w", 8 << 20), RecordSpec("o", 12 << 20), RecordSpec("base", 8192, mutable=False)]
        with open_engine() as engine, Store.create([root], specs, engine=engine) as store:
            one = commit(store, 1)
            os.sync()
            free = shutil.disk_usage(root).free
            copied = []
            store.snapshot("a", progress=lambda done, total: copied.append(done))
            os.sync()
            assert copied == []
            assert free - shutil.disk_usage(root).free < 1 << 20
            for step in (2, 3):
                assert commit(store, step) != one
            store.restore("a")
            assert read_all(store) == one
            assert store.verify().ok
    finally:
        subprocess.run(["umount", root], check=True)
