"""A scratch area gives back what was last written, and leaves nothing behind."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from store_content import content
from store_doubles import LazyEngine, PlainEngine

from offload.aio import open_engine
from offload.aio.sim import Fault, SimDisk, SimEngine
from offload.errors import CorruptionError, DiskFullError, StateError, StorageError
from offload.store import RecordSpec, Store, remove_run
from offload.store import scratch as scratch_module
from offload.store.scratch import Scratch

CHUNK = 8192
LEFT = "scratch-01234567-89ab-cdef-0123-456789abcdef"
RECORDS = [RecordSpec("a", 5 * CHUNK + 4096), RecordSpec("b", 4096), RecordSpec("c", 3 * CHUNK)]


def entries(dirs: list[Path], store: Store) -> set[str]:
    return {name for path in dirs for name in os.listdir(path / f"run-{store.run_id}")}


@pytest.fixture
def scratch(store: Store):
    with store.scratch(RECORDS, chunk_nbytes=CHUNK) as scratch:
        yield scratch


@pytest.fixture
def names_of_a_run() -> set[str]:
    return {"OFFLOAD_RUN", "lock", "data.bin", "manifest-0"}


def read(scratch: Scratch, name: str, offset: int = 0, nbytes: int | None = None) -> bytes:
    length = scratch.records[name].nbytes - offset if nbytes is None else nbytes
    buffer = bytearray(length)
    scratch.read(name, buffer, offset=offset, nbytes=nbytes).wait()
    return bytes(buffer)


@pytest.mark.parametrize("name", ["uring", "threads", "portable"])
def test_what_is_read_is_what_was_last_written(name, dirs, specs) -> None:
    with (
        open_engine(name) as engine,
        Store.create(dirs, specs, engine=engine, chunk_nbytes=CHUNK) as store,
        store.scratch(RECORDS, chunk_nbytes=CHUNK) as scratch,
    ):
        for generation in range(3):
            for spec in RECORDS:
                scratch.write(spec.name, content(spec.name, generation, spec.nbytes)).wait()
            for spec in RECORDS:
                assert read(scratch, spec.name) == content(spec.name, generation, spec.nbytes)
        # A part of a record is read as a part of an update needs it.
        whole = content("a", 2, RECORDS[0].nbytes)
        assert read(scratch, "a", 2 * CHUNK, 2 * CHUNK) == whole[2 * CHUNK : 4 * CHUNK]
        assert read(scratch, "a", 5 * CHUNK) == whole[5 * CHUNK :]


def test_it_needs_one_extent_on_every_drive_and_no_name(dirs, store, names_of_a_run) -> None:
    with store.scratch(RECORDS, chunk_nbytes=CHUNK) as scratch:
        assert scratch.nbytes_reserved == sum(spec.nbytes for spec in RECORDS)
        assert all(drive.file.size_nbytes for drive in scratch._drives)
        assert entries(dirs, store) == names_of_a_run


def test_a_commit_and_a_rollback_of_the_run_leave_it_alone(store, scratch) -> None:
    scratch.write("a", content("a", 1, RECORDS[0].nbytes)).wait()
    store.rollback()
    store.commit({})
    assert read(scratch, "a") == content("a", 1, RECORDS[0].nbytes)


def test_a_read_waits_for_the_write_before_it(dirs, specs) -> None:
    engine = LazyEngine()
    with (
        Store.create(dirs, specs, engine=engine, chunk_nbytes=CHUNK) as store,
        store.scratch(RECORDS, chunk_nbytes=CHUNK) as scratch,
    ):
        scratch.write("a", content("a", 1, RECORDS[0].nbytes)).wait()
        late = scratch.write("a", content("a", 2, RECORDS[0].nbytes))
        assert not late.done()
        assert read(scratch, "a") == content("a", 2, RECORDS[0].nbytes)


def test_a_write_waits_for_the_read_before_it(dirs, specs) -> None:
    engine = LazyEngine()
    with (
        Store.create(dirs, specs, engine=engine, chunk_nbytes=CHUNK) as store,
        store.scratch(RECORDS, chunk_nbytes=CHUNK) as scratch,
    ):
        scratch.write("a", content("a", 1, RECORDS[0].nbytes)).wait()
        buffer = bytearray(RECORDS[0].nbytes)
        late = scratch.read("a", buffer)
        scratch.write("a", content("a", 2, RECORDS[0].nbytes)).wait()
        late.wait()
        assert bytes(buffer) == content("a", 1, RECORDS[0].nbytes)


def test_closing_waits_for_what_is_in_flight(dirs, specs) -> None:
    with Store.create(dirs, specs, engine=LazyEngine(), chunk_nbytes=CHUNK) as store:
        scratch = store.scratch(RECORDS, chunk_nbytes=CHUNK)
        ticket = scratch.write("a", bytes(RECORDS[0].nbytes))
        assert not ticket.done()
        scratch.close()
        assert ticket.done()
        ticket.wait()


def test_what_was_never_written_is_not_read(scratch) -> None:
    scratch.write("a", bytes(CHUNK), offset=CHUNK, nbytes=CHUNK).wait()
    assert read(scratch, "a", CHUNK, CHUNK) == bytes(CHUNK)
    with pytest.raises(StateError, match="chunk 0 of record a was never written"):
        read(scratch, "a")
    with pytest.raises(StateError, match="no record 'x' among its 3"):
        scratch.write("x", bytes(CHUNK))


def test_a_flipped_bit_is_an_error_that_names_drive_offset_and_record(scratch) -> None:
    scratch.write("a", content("a", 1, RECORDS[0].nbytes)).wait()
    drive = scratch._drives[1]
    (byte,) = os.pread(drive.file.fd, 1, 17)
    os.pwrite(drive.file.fd, bytes([byte ^ 4]), 17)
    with pytest.raises(CorruptionError, match=r"drive 1\) at offset 0: chunk 1 of record a") as error:
        read(scratch, "a")
    assert error.value.path == drive.path


def test_bytes_of_another_area_are_not_taken_for_its_own(store) -> None:
    data = content("a", 1, RECORDS[0].nbytes)
    with store.scratch(RECORDS, chunk_nbytes=CHUNK) as one, store.scratch(RECORDS, chunk_nbytes=CHUNK) as two:
        one.write("a", data).wait()
        checksums = one._records["a"].pending.checksums
        two.write("a", data).wait()
        assert checksums != two._records["a"].pending.checksums


def test_a_failed_write_ends_its_use_and_not_the_run_s(dirs, specs) -> None:
    disk = SimDisk()
    engine = SimEngine(disk, queue_depth=3, segment_nbytes=CHUNK // 2)
    with Store.create(dirs, specs, engine=engine, chunk_nbytes=CHUNK) as store:
        with store.scratch(RECORDS, chunk_nbytes=CHUNK) as scratch:
            disk.plan(Fault(len(disk.journal), "EIO"))
            with pytest.raises(StorageError, match=r"write of record a, drive \d") as first:
                scratch.write("a", bytes(RECORDS[0].nbytes)).wait()
            # Whoever comes next may be the first to tell the user: of the drive, not of what follows from it.
            for transfer in (scratch.read, scratch.write):
                with pytest.raises(StorageError, match="Input/output error.*cannot be used further") as later:
                    transfer("b", bytearray(4096))
                assert type(later.value) is type(first.value)
                for detail in ("errno", "path", "offset_bytes", "asked_nbytes", "got_nbytes"):
                    assert getattr(later.value, detail) == getattr(first.value, detail)
                assert later.value.errno == errno.EIO and later.value.__cause__ is first.value
        store.commit({})


def test_a_read_behind_a_write_that_fails_meanwhile_is_refused(dirs, specs) -> None:
    disk = SimDisk()
    engine = SimEngine(disk, queue_depth=3, segment_nbytes=CHUNK // 2)
    with (
        Store.create(dirs, specs, engine=engine, chunk_nbytes=CHUNK) as store,
        store.scratch(RECORDS, chunk_nbytes=CHUNK) as scratch,
    ):
        scratch.write("b", content("b", 1, 4096)).wait()
        disk.plan(Fault(len(disk.journal), "EIO"))
        # Of the same bytes, so that what is there passes for what was to be written.
        scratch.write("b", content("b", 1, 4096))
        with pytest.raises(StorageError, match="write of record b.*cannot be used further"):
            scratch.read("b", bytearray(4096))


def test_too_little_room_is_refused_with_the_bytes_and_leaves_nothing(
    dirs, store, names_of_a_run, monkeypatch
) -> None:
    with pytest.raises(DiskFullError, match=r"the scratch area of the run needs .* bytes\) there") as error:
        store.scratch([RecordSpec("a", 1 << 49)], chunk_nbytes=1 << 30)
    assert error.value.asked_nbytes == 1 << 49  # both directories are on one file system
    assert 0 < error.value.got_nbytes < 1 << 49

    def full(file, nbytes):
        raise DiskFullError("no room", errno=errno.ENOSPC)

    made = []
    monkeypatch.setattr(type(store._drives[0].file), "allocate", full)
    monkeypatch.setattr(type(store._drives[0].file), "close", lambda file: made.append(file))
    with pytest.raises(DiskFullError, match="the scratch area of the run needs"):
        store.scratch(RECORDS, chunk_nbytes=CHUNK)
    assert made
    monkeypatch.undo()
    assert entries(dirs, store) == names_of_a_run


def test_room_for_a_snapshot_beside_it_is_asked_for(dirs, store, monkeypatch) -> None:
    area = sum(spec.nbytes for spec in RECORDS)
    snapshot = sum(spec.nbytes for spec in store.records.values() if spec.mutable)
    monkeypatch.setattr("offload.store.room.free_nbytes", lambda _: area + snapshot - 1)
    store.scratch(RECORDS, chunk_nbytes=CHUNK).close()
    with pytest.raises(DiskFullError, match="scratch area of the run and a snapshot of it") as error:
        store.scratch(RECORDS, chunk_nbytes=CHUNK, room_for_snapshot=True)
    assert (error.value.asked_nbytes, error.value.got_nbytes) == (area + snapshot, area + snapshot - 1)
    monkeypatch.setattr("offload.store.room.free_nbytes", lambda _: area + snapshot)
    store.scratch(RECORDS, chunk_nbytes=CHUNK, room_for_snapshot=True).close()


def test_closing_waits_and_ends_its_use(store) -> None:
    scratch = store.scratch(RECORDS, chunk_nbytes=CHUNK)
    scratch.write("a", bytes(RECORDS[0].nbytes))
    scratch.close()
    scratch.close()
    with pytest.raises(StateError, match="closed"):
        scratch.write("a", bytes(RECORDS[0].nbytes))


def test_a_file_left_by_a_kill_is_taken_over_and_removed(dirs, store, names_of_a_run) -> None:
    for path in dirs:
        (path / f"run-{store.run_id}" / LEFT).touch(mode=0o600)
    with store.scratch(RECORDS, chunk_nbytes=CHUNK):
        assert entries(dirs, store) == names_of_a_run


def test_a_run_with_a_left_file_can_be_removed(dirs, specs) -> None:
    with PlainEngine() as engine, Store.create(dirs, specs, engine=engine, chunk_nbytes=CHUNK) as store:
        run_id = store.run_id
    (dirs[0] / f"run-{run_id}" / LEFT).touch(mode=0o600)
    remove_run(dirs, run_id)
    assert not list(dirs[0].iterdir())


def test_a_file_is_gone_when_its_making_is_interrupted(dirs, store, names_of_a_run, monkeypatch) -> None:
    engine_open = store._engine.open

    def interrupted(*args, **kwargs):
        engine_open(*args, **kwargs).close()
        raise KeyboardInterrupt

    monkeypatch.setattr(store._engine, "open", interrupted)
    with pytest.raises(KeyboardInterrupt):
        store.scratch(RECORDS, chunk_nbytes=CHUNK)
    assert entries(dirs, store) == names_of_a_run


def test_a_symbolic_link_with_its_name_is_not_followed(dirs, store, tmp_path) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"theirs")
    (dirs[0] / f"run-{store.run_id}" / LEFT).symlink_to(victim)
    with store.scratch(RECORDS, chunk_nbytes=CHUNK) as scratch:
        scratch.write("a", bytes(RECORDS[0].nbytes)).wait()
    assert victim.read_bytes() == b"theirs"


KILLED = """
    import os, signal, sys
    from offload.aio import open_engine
    from offload.store import RecordSpec, Store

    engine = open_engine()
    store = Store.create(sys.argv[1:], [RecordSpec("w", 8192)], engine=engine, chunk_nbytes=8192)
    scratch = store.scratch([RecordSpec("a", 32 << 20)], chunk_nbytes=1 << 20)
    scratch.write("a", bytes(32 << 20))
    print(store.run_id, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_kill_leaves_nothing_behind(dirs, names_of_a_run) -> None:
    command = [sys.executable, "-c", textwrap.dedent(KILLED), *map(str, dirs)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == -9, done.stderr
    folders = [path / f"run-{done.stdout.strip()}" for path in dirs]
    assert {name for folder in folders for name in os.listdir(folder)} == names_of_a_run
    allocated = sum(entry.stat().st_blocks * 512 for folder in folders for entry in folder.iterdir())
    assert allocated < 1 << 20


def test_the_name_is_gone_before_room_is_reserved(dirs, store, names_of_a_run, monkeypatch) -> None:
    """A kill can leave an empty file at most."""
    found = []

    def looking(file, directory, nbytes, **words):
        found.append(entries(dirs, store))

    monkeypatch.setattr(scratch_module, "reserve", looking)
    store.scratch(RECORDS, chunk_nbytes=CHUNK).close()
    assert found and all(names == names_of_a_run for names in found)


# -- records cut out of another ----------------------------------------------------------------

ROOM = RecordSpec("room", 16 * CHUNK)


@pytest.mark.parametrize("offset", range(0, 4 * CHUNK, CHUNK))
def test_carved_records_lie_where_the_chunks_of_the_whole_do(store, offset) -> None:
    with store.scratch([RECORDS[0], ROOM], chunk_nbytes=CHUNK) as scratch:
        scratch.write("room", content("room", 1, ROOM.nbytes)).wait()
        spec = RecordSpec("part", 5 * CHUNK + 4096)
        scratch.carve(spec, within="room", offset=offset)
        scratch.write("part", content("part", 1, spec.nbytes)).wait()
        assert read(scratch, "part") == content("part", 1, spec.nbytes)
        # The chunks before and behind it are those of the whole still.
        end = offset + 6 * CHUNK
        whole = content("room", 1, ROOM.nbytes)
        assert read(scratch, "room", end) == whole[end:]
        if offset:
            assert read(scratch, "room", 0, offset) == whole[:offset]


def test_a_carved_record_does_not_take_what_lay_there_before_for_its_own(store) -> None:
    data = content("part", 1, CHUNK)
    checksums = []
    with store.scratch([ROOM], chunk_nbytes=CHUNK) as scratch:
        for _ in range(2):
            scratch.carve(RecordSpec("part", CHUNK), within="room", offset=0)
            with pytest.raises(StateError, match="never written"):
                read(scratch, "part")
            scratch.write("part", data).wait()
            checksums.append(scratch._records["part"].pending.checksums)
            scratch.drop("part")
    assert checksums[0] != checksums[1]


def test_dropped_records_are_gone_and_those_in_use_are_not_dropped(dirs, specs) -> None:
    with (
        Store.create(dirs, specs, engine=LazyEngine(), chunk_nbytes=CHUNK) as store,
        store.scratch([ROOM], chunk_nbytes=CHUNK) as scratch,
    ):
        scratch.carve(RecordSpec("part", CHUNK), within="room", offset=CHUNK)
        ticket = scratch.write("part", bytes(CHUNK))
        with pytest.raises(StateError, match="in use"):
            scratch.drop("part")
        ticket.wait()
        scratch.drop("part")
        with pytest.raises(StateError, match="no record 'part'"):
            read(scratch, "part", nbytes=CHUNK)
        scratch.carve(RecordSpec("part", 2 * CHUNK), within="room", offset=0)


@pytest.mark.parametrize(
    ("nbytes", "offset", "name"),
    [(CHUNK, 4096, "part"), (CHUNK, -CHUNK, "part"), (CHUNK, 16 * CHUNK, "part"), (CHUNK, 0, "room")],
)
def test_what_cannot_be_carved_is_refused(store, nbytes, offset, name) -> None:
    with store.scratch([ROOM], chunk_nbytes=CHUNK) as scratch, pytest.raises(ValueError, match="record"):
        scratch.carve(RecordSpec(name, nbytes), within="room", offset=offset)
