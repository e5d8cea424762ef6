"""Verification reads everything, finds each damage, and says where it is."""

from __future__ import annotations

import random

import pytest
from store_content import write_all
from store_doubles import LazyEngine

from offload.errors import CorruptionError
from offload.store import Store

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
    assert len(seen) == NUM_CHUNKS
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


def test_records_never_written_are_left_out(store):
    write_all(store, 1, names=["o"])
    store.commit({})
    assert store.verify().num_chunks == 3


def test_chunks_are_read_ahead_of_their_check(dirs, specs):
    with LazyEngine() as engine, Store.create(dirs, specs, engine=engine, chunk_nbytes=CHUNK) as store:
        write_all(store, 1)
        store.commit({})
        engine.submitted.clear()
        first = []
        store.verify(progress=lambda done, total: first.append(len(engine.submitted)))
    assert first[0] == 4
