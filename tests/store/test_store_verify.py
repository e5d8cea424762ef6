"""Verification reads everything, finds each damage, and says where it is."""

from __future__ import annotations

import errno
import os
import random
import shutil
from pathlib import Path

import pytest
from store_content import content, read_all, write_all
from store_doubles import Journal, Killed, LazyEngine, PlainEngine

from offload.errors import CorruptionError, LockedError, StorageError
from offload.store import RunReader, Store, fall_back, verify_reader

CHUNK = 8192
NUM_CHUNKS = 6 + 3 + 1 + 2


@pytest.fixture
def paths(dirs, store):
    write_all(store, 1)
    store.commit({})
    return [path / f"run-{store.run_id}" / "data.bin" for path in dirs]


def test_a_sound_run_verifies_whole(store, paths):
    seen = []
    report = store.verify(progress=lambda done, total: seen.append((done, total)))
    nbytes = sum(spec.nbytes for spec in store.records.values())
    assert (report.ok, report.nbytes, report.num_chunks) == (True, nbytes, NUM_CHUNKS)
    assert len(seen) == len(store.records)
    assert seen[-1] == (nbytes, nbytes)
    assert seen == sorted(seen)


def test_every_flipped_bit_is_found_and_named(store, paths):
    """In the extents that hold the generation; what lies in the free ones does not matter."""
    rng = random.Random(7)
    found = 0
    for _ in range(60):
        path = rng.choice(paths)
        data = bytearray(path.read_bytes())
        position = rng.randrange(len(data))
        data[position] ^= 1 << rng.randrange(8)
        original = path.read_bytes()
        path.write_bytes(data)
        damages = store.verify().damages
        path.write_bytes(original)
        live = any(original[position & -4096 :][:4096])
        assert len(damages) == live
        for damage in damages:
            assert isinstance(damage, CorruptionError)
            assert damage.path == str(path)
            assert damage.offset_bytes <= position < damage.offset_bytes + damage.asked_nbytes
            found += 1
    assert found > 20


def test_verification_goes_on_after_a_damage(store, paths):
    for path in paths:
        path.write_bytes(bytes(path.stat().st_size))
    report = store.verify()
    assert (len(report.damages), report.num_chunks) == (NUM_CHUNKS, NUM_CHUNKS)
    assert len({str(damage) for damage in report.damages}) == NUM_CHUNKS
    assert {(chunk.record, chunk.chunk) for chunk in report.damaged if chunk.record == "o"} == {
        ("o", 0),
        ("o", 1),
        ("o", 2),
    }
    assert sum(chunk.end - chunk.begin for chunk in report.damaged) == report.nbytes


def test_records_never_written_are_left_out(store):
    write_all(store, 1, names=["o"])
    store.commit({})
    assert store.verify().num_chunks == 3


def test_records_are_read_ahead_of_their_check(dirs, specs, engine):
    with LazyEngine() as engine, Store.create(dirs, specs, engine=engine, chunk_nbytes=CHUNK) as store:
        write_all(store, 1)
        store.commit({})
        engine.submitted.clear()
        first = []
        store.verify(progress=lambda done, total: first.append(len(engine.submitted)))
    # All four records are on their way before the first of them is checked.
    assert first[0] == NUM_CHUNKS


def test_a_read_that_fails_once_is_told_of(dirs, specs, monkeypatch):
    with PlainEngine() as engine, Store.create(dirs, specs, engine=engine, chunk_nbytes=CHUNK) as store:
        write_all(store, 1)
        store.commit({})
        real, failures = os.preadv, [errno.EIO]

        def sometimes(fd, buffers, offset):
            if failures:
                raise StorageError("the drive hiccups", errno=failures.pop())
            return real(fd, buffers, offset)

        monkeypatch.setattr(os, "preadv", sometimes)
        report = store.verify()
    assert [chunk.record for chunk in report.damaged] == ["w"]
    assert "the drive hiccups" in str(report.damages[0])


@pytest.fixture
def run(dirs, specs, engine):
    """A closed run of three generations; its id. Generation 3 wrote `w` alone."""
    with Store.create(dirs, specs, engine=engine, chunk_nbytes=CHUNK) as store:
        for generation in (1, 2):
            write_all(store, generation)
            store.commit({"step": generation})
        write_all(store, 3, names=["w"])
        store.commit({"step": 3})
    return store.run_id


def spoil(dirs, run_id, generation_name, record, engine):
    """Flip a bit of a record in one generation; return the file and the offset."""
    with RunReader.open(dirs, engine=engine, run_id=run_id) as reader:
        generation = getattr(reader, generation_name)
        _, path, offset = generation.place(record, 1)
    data = bytearray(Path(path).read_bytes())
    data[offset + 5] ^= 4
    Path(path).write_bytes(data)
    return path, offset


def test_a_sound_run_is_read_once(dirs, run, engine):
    with RunReader.open(dirs, engine=engine, run_id=run) as reader:
        assert (reader.newest.number, reader.older.number, reader.notes) == (3, 2, ())
        assert (dict(reader.newest.state), dict(reader.older.state)) == ({"step": 3}, {"step": 2})
        report = verify_reader(reader)
    assert report.ok and report.older is None


def test_a_damaged_generation_has_the_older_one_checked(dirs, run, engine):
    path, offset = spoil(dirs, run, "newest", "w", engine)
    seen = []
    with RunReader.open(dirs, engine=engine, run_id=run) as reader:
        report = verify_reader(reader, lambda done, total: seen.append(total))
    (chunk,) = report.newest.damaged
    assert (chunk.record, chunk.chunk, chunk.begin, chunk.end) == ("w", 1, CHUNK, 2 * CHUNK)
    assert (chunk.error.path, chunk.error.offset_bytes) == (path, offset)
    assert report.older is not None and report.older.ok
    # Only what differs is read again.
    assert seen[-1] == 5 * CHUNK + 4096


def test_what_both_generations_hold_is_damaged_in_both(dirs, run, engine):
    spoil(dirs, run, "newest", "base", engine)
    with RunReader.open(dirs, engine=engine, run_id=run) as reader:
        report = verify_reader(reader)
    assert [chunk.record for chunk in report.older.damaged] == ["base"]


def test_readers_share_a_run_and_keep_writers_out(dirs, run, engine):
    with (
        RunReader.open(dirs, engine=engine, run_id=run),
        RunReader.open(dirs[::-1], engine=engine, run_id=run) as second,
    ):
        assert second.newest.number == 3
        with pytest.raises(LockedError):
            Store.open(dirs, engine=engine, run_id=run)
    with (
        Store.open(dirs, engine=engine, run_id=run),
        pytest.raises(LockedError, match=f"process {os.getpid()}"),
    ):
        RunReader.open(dirs, engine=engine, run_id=run)


def test_reading_a_run_writes_nothing_but_the_lock(dirs, run, engine):
    (dirs[0] / f"run-{run}" / "manifest-3").unlink()

    def tree():
        return {path: path.read_bytes() for d in dirs for path in d.rglob("*") if path.name == "data.bin"} | {
            path: path.name for d in dirs for path in d.rglob("*")
        }

    before = tree()
    with RunReader.open(dirs, engine=engine, run_id=run) as reader:
        assert reader.newest.number == 3
        assert verify_reader(reader).ok
    assert tree() == before


def test_a_damaged_manifest_is_a_problem_even_with_a_sound_copy(dirs, run, engine):
    for name, generation in (("manifest-3", 3), ("manifest-2", 3)):
        manifest = dirs[1] / f"run-{run}" / name
        whole = manifest.read_bytes()
        manifest.write_bytes(whole[:-1])
        with RunReader.open(dirs, engine=engine, run_id=run) as reader:
            report = verify_reader(reader)
        assert (reader.newest.number, report.newest.ok, report.ok) == (generation, True, False)
        assert str(manifest) in report.problems[0]
        manifest.write_bytes(whole)


def test_a_run_goes_back_and_goes_on(dirs, run, engine):
    spoil(dirs, run, "newest", "w", engine)
    went = fall_back(dirs, engine=engine, run_id=run)
    assert (went.left, went.source, went.generation, dict(went.state)) == (3, 2, 4, {"step": 2})
    with Store.open(dirs, engine=engine, run_id=run) as store:
        assert (store.generation, store.state) == (4, {"step": 2})
        assert read_all(store)["w"] == content("w", 2, store.records["w"].nbytes)
        assert store.verify().ok
        write_all(store, 9)
        assert store.commit({"step": 3}) == 5
    with Store.open(dirs, engine=engine, run_id=run) as store:
        assert store.verify().ok and read_all(store)["w"] == content("w", 9, store.records["w"].nbytes)


def test_a_run_does_not_go_back_to_what_is_damaged(dirs, run, engine):
    spoil(dirs, run, "newest", "base", engine)
    before = {path: path.read_bytes() for d in dirs for path in d.rglob("manifest-*")}
    with pytest.raises(CorruptionError, match="generation 2 of run .* is damaged too, in 1 chunks"):
        fall_back(dirs, engine=engine, run_id=run)
    assert {path: path.read_bytes() for d in dirs for path in d.rglob("manifest-*")} == before


def test_a_run_in_use_does_not_go_back(dirs, run, engine):
    with Store.open(dirs, engine=engine, run_id=run), pytest.raises(LockedError):
        fall_back(dirs, engine=engine, run_id=run)


def test_a_first_generation_has_none_before_it(dirs, specs, engine):
    with Store.create(dirs, specs, engine=engine, chunk_nbytes=CHUNK) as store:
        write_all(store, 1)
        store.commit({})
    with pytest.raises(CorruptionError, match="no committed generation before 1"):
        fall_back(dirs, engine=engine, run_id=store.run_id)


def test_going_back_may_be_killed_anywhere(dirs, run, engine, tmp_path, monkeypatch):
    spoil(dirs, run, "newest", "w", engine)
    original = tmp_path / "original"
    for path in dirs:
        shutil.copytree(path, original / path.name)
    journal = Journal()
    journal.attach(monkeypatch)
    kill_at, outcomes = 0, []
    done = False
    while not done:
        for path in dirs:
            shutil.rmtree(path)
            shutil.copytree(original / path.name, path)
        journal.ops.clear()
        journal.kill_at = kill_at
        try:
            fall_back(dirs, engine=engine, run_id=run)
            done = True
        except Killed:
            kill_at += 1
        journal.kill_at = None
        with Store.open(dirs, engine=engine, run_id=run) as store:
            outcomes.append((store.generation, store.state["step"]))
    assert set(outcomes) == {(3, 3), (4, 2)}
    assert outcomes == sorted(outcomes)
