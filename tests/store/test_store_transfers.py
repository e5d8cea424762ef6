"""Reading and writing records: what a read sees, what a write leaves alone, what is refused."""

from __future__ import annotations

import errno
import os

import pytest
from store_content import content, read_all, write_all
from store_doubles import LazyEngine, PlainEngine

from offload.errors import (
    CorruptionError,
    DiskFullError,
    RequestTimeoutError,
    StateError,
    StorageError,
)
from offload.store import DriveMeter, RecordSpec, Store
from offload.store.submit import submitting
from offload.store.ticket import IO_TIMEOUT_S, Part, Piece, Ticket

CHUNK = 8192


def committed(store, generation=1):
    write_all(store, generation)
    store.commit({"step": generation})


def test_what_is_written_is_read(store):
    write_all(store, 1)
    assert read_all(store) == {name: content(name, 1, spec.nbytes) for name, spec in store.records.items()}


def test_records_are_striped_over_both_drives(store, engine):
    write_all(store, 1)
    written = [path for op, path, _, _ in engine.submitted if op == "write"]
    assert len({os.path.dirname(path) for path in written}) == 2


def test_one_drive_gets_one_request_a_record(tmp_path, engine):
    with Store.create([tmp_path], [RecordSpec("w", 10 * CHUNK)], engine=engine, chunk_nbytes=CHUNK) as store:
        store.write("w", bytes(10 * CHUNK)).wait()
        store.read("w", bytearray(10 * CHUNK)).wait()
    assert [(op, nbytes) for op, _, _, nbytes in engine.submitted] == [
        ("write", 10 * CHUNK),
        ("read", 10 * CHUNK),
    ]


def test_a_range_of_chunks_is_read_from_the_start_of_the_buffer(store):
    committed(store)
    buffer = bytearray(b"x" * 3 * CHUNK)
    store.read("w", buffer, offset=CHUNK, nbytes=2 * CHUNK).wait()
    assert bytes(buffer) == content("w", 1, 5 * CHUNK + 4096)[CHUNK : 3 * CHUNK] + b"x" * CHUNK


def test_the_short_last_chunk_is_read_alone(store):
    committed(store)
    buffer = bytearray(4096)
    store.read("w", buffer, offset=5 * CHUNK).wait()
    assert bytes(buffer) == content("w", 1, 5 * CHUNK + 4096)[5 * CHUNK :]


def test_a_read_sees_each_chunk_newest(store):
    committed(store)
    new = content("w", 2, 5 * CHUNK + 4096)
    store.write("w", new[CHUNK : 2 * CHUNK], offset=CHUNK, nbytes=CHUNK).wait()
    old = content("w", 1, 5 * CHUNK + 4096)
    assert read_all(store)["w"] == old[:CHUNK] + new[CHUNK : 2 * CHUNK] + old[2 * CHUNK :]


def test_a_committed_extent_is_never_written(store, engine):
    committed(store)
    places = {}
    for generation in (2, 3, 4):
        engine.submitted.clear()
        write_all(store, generation)
        write_all(store, generation, names=["w"])
        places[generation] = {
            (path, offset + at)
            for op, path, offset, nbytes in engine.submitted
            if op == "write"
            for at in range(0, nbytes, 4096)
        }
        store.commit({})
    assert not places[2] & places[3]
    assert places[2] == places[4]


def test_rollback_brings_the_committed_bytes_back(store):
    committed(store)
    before = read_all(store)
    write_all(store, 2)
    store.rollback()
    assert read_all(store) == before
    assert store.generation == 1


def test_after_a_rollback_a_generation_can_be_built_again(store):
    committed(store)
    write_all(store, 2, names=["w"])
    store.rollback()
    write_all(store, 3, names=["o"])
    assert store.commit({}) == 2
    assert store.verify().ok


def test_a_record_that_was_never_written_cannot_be_read(store):
    with pytest.raises(StateError, match="chunk 0 of record w was never written"):
        store.read("w", bytearray(5 * CHUNK + 4096))
    assert not store.is_written("w")


def test_an_immutable_record_is_committed_once(store):
    committed(store)
    with pytest.raises(
        StateError, match=r"base is immutable and was committed in generation 1.*mutable=True"
    ):
        store.write("base", bytes(2 * CHUNK))


def test_an_immutable_record_may_be_written_again_before_the_commit(store):
    store.write("base", bytes(2 * CHUNK)).wait()
    write_all(store, 1)
    store.rollback()
    committed(store)
    assert read_all(store)["base"] == content("base", 1, 2 * CHUNK)


def test_an_immutable_record_takes_its_space_once(store):
    assert store.nbytes_reserved == 2 * (5 * CHUNK + 4096 + 3 * CHUNK + 4096) + 2 * CHUNK


@pytest.mark.parametrize(
    ("offset", "nbytes"),
    [
        (1, CHUNK),
        (0, 4096),
        (-CHUNK, CHUNK),
        (0, 0),
        (0, 6 * CHUNK),
        (5 * CHUNK + 4096, None),
        (CHUNK, -CHUNK),
    ],
)
def test_a_range_off_the_chunks_is_refused(store, offset, nbytes):
    with pytest.raises(ValueError, match="record w"):
        store.write("w", bytes(6 * CHUNK), offset=offset, nbytes=nbytes)


def test_a_short_buffer_is_refused(store):
    with pytest.raises(ValueError, match=r"a buffer of 100 bytes for 4,096 bytes of record tiny"):
        store.write("tiny", bytes(100))


def test_a_read_only_buffer_cannot_be_read_into(store):
    committed(store)
    with pytest.raises(ValueError, match="read-only"):
        store.read("tiny", bytes(4096))


def test_an_unknown_record_is_refused(store):
    with pytest.raises(StateError, match="no record 'x'"):
        store.read("x", bytearray(4096))


def test_a_closed_store_refuses(store):
    store.close()
    store.close()
    with pytest.raises(StateError, match="is closed"):
        store.write("tiny", bytes(4096))
    with pytest.raises(StateError, match="is closed"):
        store.commit({})


@pytest.fixture
def lazy(dirs, specs):
    with (
        LazyEngine() as engine,
        Store.create(dirs, specs, engine=engine, chunk_nbytes=CHUNK) as store,
    ):
        yield store


def test_a_read_waits_for_the_write_before_it(lazy):
    lazy.write("w", content("w", 1, 5 * CHUNK + 4096))
    buffer = bytearray(5 * CHUNK + 4096)
    lazy.read("w", buffer).wait()
    assert bytes(buffer) == content("w", 1, 5 * CHUNK + 4096)


def test_a_write_waits_for_the_write_before_it(lazy):
    first = lazy.write("tiny", content("tiny", 1, 4096))
    second = lazy.write("tiny", content("tiny", 2, 4096))
    second.wait()
    first.wait()
    assert read_all(lazy)["tiny"] == content("tiny", 2, 4096)


def test_a_write_waits_for_the_read_before_it(lazy):
    lazy.write("tiny", content("tiny", 1, 4096)).wait()
    buffer = bytearray(4096)
    read = lazy.read("tiny", buffer)
    lazy.write("tiny", content("tiny", 2, 4096)).wait()
    read.wait()
    assert bytes(buffer) == content("tiny", 1, 4096)


def test_a_read_over_two_commits_is_not_overtaken_by_a_write(lazy):
    """The extent it reads becomes free at the commit and is written by the next generation."""
    write_all(lazy, 1)
    lazy.commit({})
    buffer = bytearray(4096)
    read = lazy.read("tiny", buffer)
    write_all(lazy, 2, names=["tiny"])
    lazy.commit({})
    write_all(lazy, 3, names=["tiny"])
    read.wait()
    assert bytes(buffer) == content("tiny", 1, 4096)


def test_a_commit_waits_for_writes_nobody_waited_for(lazy):
    for name, spec in lazy.records.items():
        lazy.write(name, content(name, 1, spec.nbytes))
    lazy.commit({})
    assert lazy.verify().ok


def test_tickets_that_have_ended_are_let_go(lazy):
    write_all(lazy, 1)
    for _ in range(5):
        lazy.write("tiny", content("tiny", 1, 4096)).wait()
    assert lazy._records["tiny"].in_flight() == []


def test_done_tells_without_waiting(lazy):
    ticket = lazy.write("tiny", content("tiny", 1, 4096))
    assert not ticket.done()
    ticket.wait()
    assert ticket.done()


class TimeoutOnce(PlainEngine):
    """The first wait of every request runs out of time."""

    def submit(self, op, file, buffer, file_offset, nbytes=None):
        request = super().submit(op, file, buffer, file_offset, nbytes)
        wait, patience = request.wait, [True]

        def impatient(timeout_s=None):
            if timeout_s is not None and patience.pop():
                patience.append(False)
                raise RequestTimeoutError("too slow", path=file.path, asked_nbytes=len(buffer))
            return wait()

        request.wait = impatient
        return request


def test_a_wait_that_ran_out_of_time_may_be_repeated(tmp_path):
    with (
        TimeoutOnce() as engine,
        Store.create([tmp_path], [RecordSpec("tiny", 4096)], engine=engine) as store,
    ):
        ticket = store.write("tiny", bytes(4096))
        with pytest.raises(RequestTimeoutError, match="record tiny, drive 0"):
            ticket.wait(timeout_s=0.0)
        ticket.wait(timeout_s=None)
        assert store.commit({}) == 1


class FailingEngine(PlainEngine):
    """Fails transfers that `fails(op, path, offset)` names."""

    def __init__(self, fails, kind=StorageError):
        super().__init__()
        self.fails, self.kind = fails, kind

    def submit(self, op, file, buffer, file_offset, nbytes=None):
        request = super().submit(op, file, buffer, file_offset, nbytes)
        if self.fails(op, file.full_path, file_offset):
            request._result = self.kind(
                "it broke", errno=5, path=file.path, offset_bytes=file_offset, asked_nbytes=len(buffer)
            )
        return request


def failing_store(tmp_path, fails, kind=StorageError):
    engine = FailingEngine(fails, kind)
    return Store.create([tmp_path], [RecordSpec("w", 4 * CHUNK)], engine=engine, chunk_nbytes=CHUNK)


def test_a_failed_write_names_the_record_and_the_file(tmp_path):
    with failing_store(tmp_path, lambda *_: True) as store:
        ticket = store.write("w", bytes(4 * CHUNK))
        with pytest.raises(
            StorageError, match=r"it broke \(write of record w, drive 0: .*/data.bin\)"
        ) as first:
            ticket.wait()
        with pytest.raises(StorageError) as second:
            ticket.wait()
    assert second.value is first.value
    assert first.value.errno == 5
    assert first.value.path == str(tmp_path / f"run-{store.run_id}" / "data.bin")
    assert first.value.asked_nbytes == 4 * CHUNK


def test_the_kind_of_a_failure_is_kept(tmp_path):
    with (
        failing_store(tmp_path, lambda *_: True, DiskFullError) as store,
        pytest.raises(DiskFullError),
    ):
        store.write("w", bytes(4 * CHUNK)).wait()


def test_a_failed_write_poisons_the_generation_until_rollback(tmp_path):
    broken = []
    with failing_store(tmp_path, lambda op, *_: op == "write" and bool(broken)) as store:
        write_all(store, 1)
        store.commit({"step": 1})
        broken.append(True)
        with pytest.raises(StorageError):
            store.write("w", bytes(4 * CHUNK)).wait()
        with pytest.raises(
            StorageError, match="^it broke.* after this failed write, generation 2 cannot be continued; "
        ):
            store.commit({"step": 2})
        with pytest.raises(StorageError, match="generation 2 cannot be read in record w"):
            store.read("w", bytearray(4 * CHUNK))
        broken.clear()
        store.rollback()
        assert read_all(store) == {"w": content("w", 1, 4 * CHUNK)}
        write_all(store, 2)
        assert store.commit({"step": 2}) == 2


def test_a_commit_notices_a_failed_write_that_nobody_waited_for(tmp_path):
    with failing_store(tmp_path, lambda op, *_: op == "write") as store:
        store.write("w", bytes(4 * CHUNK))
        with pytest.raises(StorageError, match="^it broke.*: roll back$") as error:
            store.commit({})
        assert (error.value.errno, error.value.path, error.value.asked_nbytes) == (
            errno.EIO,
            str(tmp_path / f"run-{store.run_id}" / "data.bin"),
            4 * CHUNK,
        )
        assert store.generation == 0


def test_a_failed_read_does_not_poison(tmp_path):
    with failing_store(tmp_path, lambda op, *_: op == "read") as store:
        write_all(store, 1)
        with pytest.raises(StorageError, match="read of record w"):
            store.read("w", bytearray(4 * CHUNK)).wait()
        assert store.commit({}) == 1


def test_a_submission_that_fails_half_way_poisons_and_waits_for_the_rest(dirs):
    class Refusing(LazyEngine):
        def submit(self, op, file, buffer, file_offset, nbytes=None):
            if op == "write" and "/b/" in file.full_path:
                raise StateError("the file is closed")
            return super().submit(op, file, buffer, file_offset, nbytes)

    engine = Refusing()
    with Store.create(dirs, [RecordSpec("w", 2 * CHUNK)], engine=engine, chunk_nbytes=CHUNK) as store:
        with pytest.raises(StateError, match="the file is closed"):
            store.write("w", bytes(2 * CHUNK))
        with pytest.raises(StateError, match="^the file is closed; after this failed write"):
            store.commit({})
        store.rollback()
        assert not store.is_written("w")


def test_a_corrupt_chunk_is_named(store, dirs):
    committed(store)
    for data in [dirs[0], dirs[1]]:
        path = data / f"run-{store.run_id}" / "data.bin"
        raw = bytearray(path.read_bytes())
        old = content("w", 1, 5 * CHUNK + 4096)[3 * CHUNK : 4 * CHUNK]
        if (at := raw.find(old)) >= 0:
            raw[at + 5000] ^= 16
            path.write_bytes(raw)
            found = path, at
    with pytest.raises(CorruptionError) as error:
        store.read("w", bytearray(5 * CHUNK + 4096)).wait()
    path, at = found
    drive = dirs.index(path.parents[1])
    assert f"mismatch in {path} (drive {drive}) at offset {at:,}: chunk 3 of record w has" in str(error.value)
    assert (error.value.path, error.value.offset_bytes) == (str(path), at)


def test_a_write_that_the_drive_lost_is_found(store, dirs):
    """What lies there is whole and was once right: generation 1's bytes in the extent of generation 3."""
    paths = [path / f"run-{store.run_id}" / "data.bin" for path in dirs]
    committed(store, 1)
    old = [path.read_bytes() for path in paths]
    committed(store, 2)
    committed(store, 3)
    assert store.verify().ok
    for path, data in zip(paths, old, strict=True):
        path.write_bytes(data)
    report = store.verify()
    assert len(report.damages) == 6 + 3 + 1  # every chunk but those of the immutable record


def test_the_same_bytes_have_another_checksum_in_each_place_and_generation(store):
    for generation in (1, 2):
        for name, spec in store.records.items():
            if name != "base" or generation == 1:
                store.write(name, bytes(spec.nbytes))
        store.commit({})
        full_chunks = [c for name in ("w", "o") for c in store._records[name].committed.checksums][:-1]
        if generation == 1:
            first = set(full_chunks)
        assert len(set(full_chunks)) == len(full_chunks)
    assert not first & set(full_chunks)


def test_an_interrupted_submission_leaves_when_what_was_submitted_has_ended() -> None:
    waited: list[float | None] = []

    class Slow:
        finished_s = None

        def wait(self, timeout_s: float | None = None) -> None:
            waited.append(timeout_s)
            raise StorageError("a drive failed", path="/nvme0")

        def done(self) -> bool:
            return bool(waited)

    def submit_two() -> None:
        with submitting(Ticket("a", [Piece(0, 0, 1)], is_write=True), ()) as parts:
            parts += [
                Part(Slow(), memoryview(b""), 0, "/nvme0", offset, DriveMeter("/nvme0", 1.0), 0.0)
                for offset in (0, 4096)
            ]
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        submit_two()
    assert waited == [IO_TIMEOUT_S] * 2
