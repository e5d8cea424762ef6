"""Creating a run: space reserved, modes, and nothing left behind by a failure."""

from __future__ import annotations

import errno
import os
import stat
from types import SimpleNamespace

import pytest
from store_content import write_all
from store_doubles import Journal, PlainEngine

from offload.errors import DiskFullError, StorageError
from offload.store import RecordSpec, Store, list_runs

CHUNK = 8192
RUN_ID = "00010203-0405-4607-8809-0a0b0c0d0e0f"


def left_behind(dirs):
    return [path for directory in dirs for path in directory.rglob("*")]


def test_all_space_is_reserved(dirs, store):
    nbytes = [(path / f"run-{store.run_id}" / "data.bin").stat() for path in dirs]
    assert sum(status.st_size for status in nbytes) == store.nbytes_reserved
    assert all(status.st_blocks * 512 >= status.st_size for status in nbytes)


def test_writing_does_not_grow_a_file(dirs, store):
    before = [(path / f"run-{store.run_id}" / "data.bin").stat().st_size for path in dirs]
    for generation in (1, 2, 3):
        write_all(store, generation)
        store.commit({})
    assert [(path / f"run-{store.run_id}" / "data.bin").stat().st_size for path in dirs] == before


def test_weights_share_the_bytes_out(dirs, engine):
    specs = [RecordSpec("w", 4096 * 400)]
    with Store.create(dirs, specs, engine=engine, chunk_nbytes=4096, weights=[3, 1]) as store:
        nbytes = [(path / f"run-{store.run_id}" / "data.bin").stat().st_size for path in dirs]
    assert nbytes == [4096 * 600, 4096 * 200]


@pytest.mark.parametrize("umask", [0o000, 0o777])
def test_modes_are_for_the_owner_alone_whatever_the_umask(dirs, specs, engine, umask):
    old = os.umask(umask)
    try:
        with Store.create(dirs, specs, engine=engine, run_id=RUN_ID) as store:
            store.commit({})
    finally:
        os.umask(old)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in left_behind(dirs)}
    assert modes.pop(f"run-{RUN_ID}") == 0o700
    # The engine makes data.bin, so its mode may be less than 0600, never more.
    assert modes.pop("data.bin") & 0o177 == 0
    assert set(modes.values()) == {0o600}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"run_id": "../x"}, "UUID"),
        ({"chunk_nbytes": 1000}, "multiple of 4096"),
        ({"chunk_nbytes": 2 << 30}, "up to 1 GiB"),
        ({"weights": [1]}, "1 weights for 2 directories"),
        ({"weights": [1, 0]}, "positive"),
        ({"identity": {"x": object()}}, "the identity cannot be stored as JSON"),
        ({"records": [RecordSpec("a", 4096), RecordSpec("a", 4096)]}, "same name"),
        ({"records": [RecordSpec("a", 4096 << 21)], "chunk_nbytes": 4096}, "raise chunk_nbytes"),
        ({"directories": []}, "1 to 64 directories"),
    ],
)
def test_arguments_that_no_run_can_have_make_nothing(dirs, specs, engine, arguments, message):
    given = {"directories": dirs, "records": specs, **arguments}
    with pytest.raises(ValueError, match=message):
        Store.create(given.pop("directories"), given.pop("records"), engine=engine, **given)
    assert left_behind(dirs) == []


@pytest.mark.parametrize(
    ("name", "nbytes"), [("", 4096), ("a b", 4096), ("a\n", 4096), ("a", 0), ("a", -4096), ("a", 100)]
)
def test_a_record_that_no_run_can_have_is_refused(name, nbytes):
    with pytest.raises(ValueError, match="record"):
        RecordSpec(name, nbytes)


def test_a_run_without_records_can_be_committed(dirs, engine):
    with Store.create(dirs, [], engine=engine) as store:
        assert store.commit({"step": 1}) == 1
        assert store.nbytes_reserved == 0


def test_a_run_larger_than_the_disk_is_refused_with_the_numbers(dirs, engine):
    free = os.statvfs(dirs[0])
    nbytes = 4096 * (free.f_blocks * free.f_frsize // 4096)
    with pytest.raises(DiskFullError, match=r"free \(.* bytes\) and the run needs .* there") as error:
        Store.create(dirs, [RecordSpec("w", nbytes)], engine=engine, chunk_nbytes=1 << 30)
    assert error.value.errno == errno.ENOSPC
    assert error.value.asked_nbytes > 2 * nbytes
    assert error.value.got_nbytes < free.f_blocks * free.f_frsize
    assert left_behind(dirs) == []


def test_directories_on_one_file_system_share_its_room(dirs, engine, monkeypatch):
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_bavail=30 << 20, f_frsize=1))
    assert os.stat(dirs[0]).st_dev == os.stat(dirs[1]).st_dev
    with pytest.raises(DiskFullError):
        Store.create(dirs, [RecordSpec("w", 16 << 20)], engine=engine)
    with Store.create(dirs, [RecordSpec("w", 12 << 20)], engine=engine) as store:
        assert store.nbytes_reserved == 24 << 20


def test_a_reservation_that_fails_gives_the_numbers_and_leaves_nothing(dirs, specs, monkeypatch):
    """Where statvfs promised room that a quota does not give."""
    journal = Journal()
    engine = PlainEngine(journal)
    journal.errno = errno.ENOSPC
    note = journal.note
    monkeypatch.setattr(
        journal,
        "note",
        lambda what, path, detail=None: (
            setattr(journal, "fail_at", len(journal.ops) if what == "allocate" and "/b/" in path else None),
            note(what, path, detail),
        ),
    )
    with pytest.raises(DiskFullError, match=rf"{dirs[1]} has .* free .* and the run needs"):
        Store.create(dirs, specs, engine=engine, chunk_nbytes=CHUNK)
    assert left_behind(dirs) == []


def test_a_failure_at_any_operation_leaves_nothing_behind(tmp_path, specs, monkeypatch):
    journal = Journal()
    journal.attach(monkeypatch)
    index, done = 0, False
    while not done:
        dirs = [tmp_path / f"{index}a", tmp_path / f"{index}b"]
        for path in dirs:
            path.mkdir()
        before = len(os.listdir("/proc/self/fd"))
        journal.ops.clear()
        journal.fail_at = index
        try:
            Store.create(dirs, specs, engine=PlainEngine(journal), chunk_nbytes=CHUNK).close()
            done = True
        except StorageError:
            assert left_behind(dirs) == []
        assert len(os.listdir("/proc/self/fd")) == before
        index += 1
    assert index > 20


def test_a_run_that_is_there_already_is_not_touched(dirs, specs, engine):
    with Store.create(dirs[1:], specs, engine=engine, run_id=RUN_ID):
        pass
    before = sorted(left_behind(dirs))
    with pytest.raises(StorageError, match="cannot create directory .*: File exists"):
        Store.create(dirs, specs, engine=engine, run_id=RUN_ID)
    assert sorted(left_behind(dirs)) == before
    assert list_runs(dirs[1])[0].problem is None


def test_one_directory_cannot_be_two_drives(dirs, specs, engine):
    with pytest.raises(StorageError, match="File exists"):
        Store.create([dirs[0], dirs[0]], specs, engine=engine)
    assert left_behind(dirs) == []


def test_a_planted_link_is_not_followed(tmp_path, dirs, specs, engine):
    (tmp_path / "target").mkdir()
    (dirs[0] / f"run-{RUN_ID}").symlink_to(tmp_path / "target")
    with pytest.raises(StorageError, match="File exists"):
        Store.create(dirs, specs, engine=engine, run_id=RUN_ID)
    assert list((tmp_path / "target").iterdir()) == []


def test_a_directory_writable_by_everyone_is_refused_without_its_sticky_bit(dirs, specs, engine):
    dirs[1].chmod(0o777)
    with pytest.raises(StorageError, match=r"b is writable by everyone \(mode 777\)"):
        Store.create(dirs, specs, engine=engine)
    assert left_behind(dirs) == []
    dirs[1].chmod(0o1777)
    with Store.create(dirs, specs, engine=engine):
        pass


def test_a_directory_that_is_not_there_is_named(tmp_path, specs, engine):
    with pytest.raises(StorageError, match=rf"{tmp_path}/gone: No such file"):
        Store.create([tmp_path / "gone"], specs, engine=engine)


def test_two_runs_in_one_directory_leave_each_other_alone(dirs, specs, engine):
    with (
        Store.create(dirs, specs, engine=engine, chunk_nbytes=CHUNK) as one,
        Store.create(dirs, specs, engine=engine, chunk_nbytes=CHUNK) as two,
    ):
        write_all(one, 1)
        write_all(two, 2)
        one.commit({})
        two.commit({})
        assert one.verify().ok
        assert two.verify().ok
