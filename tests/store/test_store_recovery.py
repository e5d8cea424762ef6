"""Opening a run: locks, missing drives, damaged and newer manifests; nothing is ever deleted."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest
from store_content import content, read_all, write_all
from store_doubles import PlainEngine

from offload.aio import crc32c
from offload.errors import CorruptionError, LockedError, StorageError
from offload.store import Store

CHUNK = 8192


@pytest.fixture
def run_id(dirs, specs, engine):
    """A closed run with three generations."""
    with Store.create(dirs, specs, engine=engine, chunk_nbytes=CHUNK) as store:
        for generation in (1, 2, 3):
            write_all(store, generation)
            store.commit({"step": generation})
    return store.run_id


def folder(directory, run_id):
    return directory / f"run-{run_id}"


def flip(path, position, bit=0):
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << bit
    path.write_bytes(data)


def test_a_run_reopens_where_it_was(dirs, engine, run_id):
    with Store.open(dirs, engine=engine, run_id=run_id) as store:
        assert (store.generation, store.state, store.run_id) == (3, {"step": 3}, run_id)
        assert store.recovery_notes == ()
        assert read_all(store)["w"] == content("w", 3, 5 * CHUNK + 4096)
        assert read_all(store)["base"] == content("base", 1, 2 * CHUNK)


def test_a_run_that_committed_nothing_reopens_empty(dirs, specs, engine):
    with Store.create(dirs, specs, engine=engine, chunk_nbytes=CHUNK) as store:
        write_all(store, 1)
    with Store.open(dirs, engine=engine, run_id=store.run_id) as again:
        assert again.generation == 0
        assert read_all(again) == {}
        assert list(again.records.values()) == specs


def test_the_directories_may_be_named_in_any_order(dirs, engine, run_id):
    with Store.open(dirs[::-1], engine=engine, run_id=run_id) as store:
        assert store.verify().ok


def test_drives_may_be_mounted_elsewhere(tmp_path, dirs, engine, run_id):
    dirs[0].rename(tmp_path / "elsewhere")
    with Store.open([tmp_path / "elsewhere", dirs[1]], engine=engine, run_id=run_id) as store:
        assert store.verify().ok


def test_a_missing_drive_is_named(dirs, engine, run_id):
    with pytest.raises(
        StorageError, match=rf"drive 1 of the 2 of run {run_id} is missing; .* it was {dirs[1]}"
    ):
        Store.open(dirs[:1], engine=engine, run_id=run_id)


def test_a_directory_without_the_run_is_named(tmp_path, dirs, engine, run_id):
    (tmp_path / "c").mkdir()
    with pytest.raises(StorageError, match=rf"{tmp_path}/c holds no run {run_id}"):
        Store.open([dirs[0], tmp_path / "c"], engine=engine, run_id=run_id)


def test_a_directory_that_is_not_there_is_named(tmp_path, engine, run_id):
    with pytest.raises(StorageError, match=rf"cannot open directory {tmp_path}/gone: No such file"):
        Store.open([tmp_path / "gone"], engine=engine, run_id=run_id)


def test_a_copy_of_a_drive_is_not_another_drive(tmp_path, dirs, engine, run_id):
    shutil.copytree(dirs[0], tmp_path / "copy")
    with pytest.raises(StorageError, match="are both drive 0"):
        Store.open([dirs[0], tmp_path / "copy"], engine=engine, run_id=run_id)


def test_the_same_run_cannot_be_opened_twice(dirs, run_id):
    with (
        Store.open(dirs, engine=PlainEngine(), run_id=run_id),
        pytest.raises(LockedError, match=f"is locked by process {os.getpid()}, which uses this run"),
    ):
        Store.open(dirs, engine=PlainEngine(), run_id=run_id)


def test_a_run_in_use_by_another_process_names_it(dirs, engine, run_id):
    script = (
        "import sys; from offload.aio import open_engine; from offload.store import Store\n"
        "with open_engine() as engine, Store.open(sys.argv[2:], engine=engine, run_id=sys.argv[1]):\n"
        "    print('open', flush=True); sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, run_id, *map(str, dirs)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as process:
        assert process.stdout.readline() == b"open\n"
        with pytest.raises(LockedError, match=f"is locked by process {process.pid}"):
            Store.open(dirs, engine=engine, run_id=run_id)
        process.kill()
    # Its lock file stays behind, and is taken over.
    assert json.loads((folder(dirs[0], run_id) / "lock").read_text())["pid"] == process.pid
    with Store.open(dirs, engine=engine, run_id=run_id):
        assert json.loads((folder(dirs[0], run_id) / "lock").read_text())["pid"] == os.getpid()


def test_a_failed_opening_leaves_no_lock(dirs, engine, run_id):
    with pytest.raises(StorageError, match="missing"):
        Store.open(dirs[:1], engine=engine, run_id=run_id)
    with Store.open(dirs, engine=engine, run_id=run_id):
        pass


def test_a_failed_opening_leaves_no_descriptor(dirs, engine, run_id):
    before = len(os.listdir("/proc/self/fd"))
    for paths in (dirs[:1], [dirs[0], dirs[0].parent]):
        with pytest.raises(StorageError):
            Store.open(paths, engine=engine, run_id=run_id)
    assert len(os.listdir("/proc/self/fd")) == before


def test_one_drives_manifest_is_enough_and_the_other_is_healed(dirs, engine, run_id):
    flip(folder(dirs[0], run_id) / "manifest-3", 100)
    with Store.open(dirs, engine=engine, run_id=run_id) as store:
        assert store.generation == 3
        assert len(store.recovery_notes) == 1
        assert "a/run-" in store.recovery_notes[0]
    first, second = [(folder(path, run_id) / "manifest-3").read_bytes() for path in dirs]
    assert first == second


def test_a_manifest_missing_on_one_drive_is_healed(dirs, engine, run_id):
    (folder(dirs[1], run_id) / "manifest-3").unlink()
    with Store.open(dirs, engine=engine, run_id=run_id) as store:
        assert store.generation == 3
    assert (folder(dirs[1], run_id) / "manifest-3").exists()


def test_a_torn_newest_manifest_falls_back_to_the_one_before(dirs, engine, run_id):
    for path in dirs:
        manifest = folder(path, run_id) / "manifest-3"
        manifest.write_bytes(manifest.read_bytes()[:-1])
    with Store.open(dirs, engine=engine, run_id=run_id) as store:
        assert (store.generation, store.state) == (2, {"step": 2})
        assert [note for note in store.recovery_notes if "manifest-3 is torn" in note]
        assert read_all(store)["w"] == content("w", 2, 5 * CHUNK + 4096)
        write_all(store, 4)
        assert store.commit({"step": 4}) == 3
    with Store.open(dirs, engine=engine, run_id=run_id) as store:
        assert store.state == {"step": 4}
        assert store.verify().ok


def test_without_a_valid_manifest_every_reason_is_given_and_nothing_is_touched(dirs, engine, run_id):
    for path in dirs:
        for name in ("manifest-2", "manifest-3"):
            flip(folder(path, run_id) / name, -1)
    before = {
        path: path.read_bytes() for path in dirs[0].rglob("*") if path.is_file() and path.name != "lock"
    }
    with pytest.raises(CorruptionError) as error:
        Store.open(dirs, engine=engine, run_id=run_id)
    assert str(error.value).count("fails its checksum") == 4
    assert {path: path.read_bytes() for path in before} == before


def test_a_newer_format_is_refused_and_not_passed_over(dirs, engine, run_id):
    for path in dirs:
        manifest = folder(path, run_id) / "manifest-3"
        body = manifest.read_bytes().partition(b"\n")[2]
        line = b"offload-manifest 2.0 nbytes=%d" % len(body)
        manifest.write_bytes(line + b" crc32c=%08x\n" % crc32c(body, crc32c(line)) + body)
    with pytest.raises(
        StorageError, match=r"manifest-3 has format version 2\.0 and this offload reads up to 1"
    ):
        Store.open(dirs, engine=engine, run_id=run_id)


def test_two_valid_manifests_that_differ_are_refused(tmp_path, dirs, engine, run_id):
    shutil.copytree(dirs[1], tmp_path / "old")
    with Store.open(dirs, engine=engine, run_id=run_id) as store:
        store.commit({"branch": 1})
    with Store.open([dirs[0], tmp_path / "old"], engine=engine, run_id=run_id) as store:
        assert store.generation == 4
    (folder(dirs[0], run_id) / "manifest-4").unlink()
    (folder(tmp_path / "old", run_id) / "manifest-4").unlink()
    with Store.open([dirs[0], tmp_path / "old"], engine=engine, run_id=run_id) as store:
        assert store.generation == 3
        store.commit({"branch": 2})
    with pytest.raises(CorruptionError, match="are both valid and differ"):
        Store.open(dirs, engine=engine, run_id=run_id)


def test_a_manifest_under_another_name_is_passed_over(dirs, engine, run_id):
    for path in dirs:
        (folder(path, run_id) / "manifest-3").rename(folder(path, run_id) / "manifest-9")
    with Store.open(dirs, engine=engine, run_id=run_id) as store:
        assert store.generation == 2
        assert "describes generation 3" in store.recovery_notes[0]


def test_a_data_file_cut_short_is_named(dirs, engine, run_id):
    path = folder(dirs[1], run_id) / "data.bin"
    os.truncate(path, path.stat().st_size - 4096)
    with pytest.raises(CorruptionError, match=rf"{path} has .* bytes, the manifest says"):
        Store.open(dirs, engine=engine, run_id=run_id)


def test_a_data_file_that_is_gone_is_named(dirs, engine, run_id):
    path = folder(dirs[1], run_id) / "data.bin"
    path.unlink()
    with pytest.raises(CorruptionError, match=rf"{path} is missing, the manifest says .* bytes") as caught:
        Store.open(dirs, engine=engine, run_id=run_id)
    assert (caught.value.path, path.exists()) == (str(path), False)


def test_a_damaged_ownership_file_is_refused(dirs, engine, run_id):
    flip(folder(dirs[1], run_id) / "OFFLOAD_RUN", 60)
    with pytest.raises(CorruptionError, match="OFFLOAD_RUN fails its checksum"):
        Store.open(dirs, engine=engine, run_id=run_id)


@pytest.mark.parametrize("name", ["data.bin", "manifest-3", "OFFLOAD_RUN", "lock"])
def test_a_symbolic_link_in_the_folder_is_not_followed(tmp_path, dirs, engine, run_id, name):
    path = folder(dirs[0], run_id) / name
    shutil.copy(path, tmp_path / "target")
    path.unlink()
    path.symlink_to(tmp_path / "target")
    with pytest.raises(StorageError, match=rf"cannot open .*{name.split('.')[0]}"):
        Store.open(dirs, engine=engine, run_id=run_id)


def test_a_folder_that_is_a_symbolic_link_is_not_followed(tmp_path, dirs, engine, run_id):
    folder(dirs[0], run_id).rename(tmp_path / "target")
    folder(dirs[0], run_id).symlink_to(tmp_path / "target")
    with pytest.raises(StorageError, match="cannot open directory"):
        Store.open(dirs, engine=engine, run_id=run_id)


@pytest.mark.parametrize("name", ["data.bin", "manifest-3", "OFFLOAD_RUN"])
def test_a_file_with_a_second_name_is_refused(tmp_path, dirs, engine, run_id, name):
    os.link(folder(dirs[0], run_id) / name, tmp_path / "second")
    with pytest.raises(StorageError, match=r"second name|one name"):
        Store.open(dirs, engine=engine, run_id=run_id)


def test_a_folder_open_to_others_is_refused(dirs, engine, run_id):
    folder(dirs[0], run_id).chmod(0o755)
    with pytest.raises(StorageError, match=r"is open to others \(mode 755\)"):
        Store.open(dirs, engine=engine, run_id=run_id)


def test_a_pipe_in_place_of_a_manifest_does_not_hang(dirs, engine, run_id):
    path = folder(dirs[0], run_id) / "manifest-3"
    path.unlink()
    os.mkfifo(path, 0o600)
    with pytest.raises(StorageError, match="is not a plain file"):
        Store.open(dirs, engine=engine, run_id=run_id)


def test_no_directories_are_refused(engine, run_id):
    with pytest.raises(ValueError, match="name the directories"):
        Store.open([], engine=engine, run_id=run_id)


def test_a_staged_leftover_stays_when_opening_and_goes_with_the_next_commit(dirs, engine, run_id):
    staged = folder(dirs[1], run_id) / "manifest-9.tmp"
    staged.write_bytes(b"half of it")
    staged.chmod(0o600)
    with Store.open(dirs, engine=engine, run_id=run_id) as store:
        assert store.generation == 3
        assert staged.exists()
        store.commit({})
        assert not staged.exists()
