"""What a commit keeps, what it refuses, and what it costs."""

from __future__ import annotations

import pytest
from store_content import content, read_all, write_all
from store_doubles import Journal, LazyEngine, PlainEngine

from offload.errors import StateError
from offload.store import RecordSpec, Store

CHUNK = 8192


def test_generations_count_from_one(store):
    assert store.generation == 0
    write_all(store, 1)
    assert [store.commit({}), store.commit({}), store.generation] == [1, 2, 2]


def test_a_partly_written_record_cannot_be_committed(store):
    write_all(store, 1)
    store.commit({})
    store.write("w", bytes(CHUNK), offset=CHUNK, nbytes=CHUNK)
    store.write("w", bytes(CHUNK), offset=3 * CHUNK, nbytes=CHUNK)
    with pytest.raises(
        StateError, match="record w is only partly written: chunks 0, 2, 4-5 of 6 are missing"
    ):
        store.commit({})
    assert store.generation == 1


def test_after_a_refused_commit_the_rest_may_be_written(store):
    new = content("w", 2, 5 * CHUNK + 4096)
    store.write("w", new[:CHUNK], nbytes=CHUNK)
    with pytest.raises(StateError, match="chunks 1-5 of 6"):
        store.commit({})
    store.write("w", new[CHUNK:], offset=CHUNK)
    assert store.commit({}) == 1
    assert read_all(store)["w"] == new


def test_records_never_written_may_be_committed_and_stay_unreadable(store):
    write_all(store, 1, names=["tiny"])
    store.commit({})
    assert [name for name in store.records if store.is_written(name)] == ["tiny"]


def test_a_record_that_is_not_written_keeps_its_bytes_over_commits(dirs, store, engine):
    write_all(store, 1)
    store.commit({})
    for generation in (2, 3, 4):
        write_all(store, generation, names=["o"])
        store.commit({"step": generation})
    expected = {
        name: content(name, 4 if name == "o" else 1, spec.nbytes) for name, spec in store.records.items()
    }
    run_id = store.run_id
    store.close()
    with Store.open(dirs, engine=engine, run_id=run_id) as again:
        assert read_all(again) == expected
        assert again.verify().ok


def test_state_and_identity_come_back_as_json(dirs, specs, engine):
    identity = {"model": "m", "shape": (1, 2)}
    state = {"step": 3, "rng": [1, 2], "nested": {"b": None, "a": 1.5}, "text": "e\u00e9\U0001f600"}
    with Store.create(dirs, specs, engine=engine, identity=identity) as store:
        run_id = store.run_id
        store.commit(state)
        assert store.state == state
    with Store.open(dirs, engine=engine, run_id=run_id) as store:
        assert store.state == state
        assert store.identity == {"model": "m", "shape": [1, 2]}


def test_a_state_is_what_it_was_at_the_commit(store):
    state = {"steps": [1]}
    store.commit(state)
    state["steps"].append(2)
    assert store.state == {"steps": [1]}


@pytest.mark.parametrize("state", [{"x": float("nan")}, {"x": {1}}, {"x": b"bytes"}])
def test_a_state_that_is_not_json_is_refused_before_anything_happens(store, state):
    write_all(store, 1)
    with pytest.raises(ValueError, match="the state cannot be stored as JSON"):
        store.commit(state)
    assert store.commit({}) == 1


def test_a_state_too_long_for_a_manifest_is_refused_before_anything_happens(store):
    with pytest.raises(ValueError, match="commit a smaller state"):
        store.commit({"x": "x" * (17 << 20)})
    assert store.commit({}) == 1


def test_two_manifests_are_kept_on_each_drive(dirs, store):
    for generation in range(1, 6):
        store.commit({"step": generation})
    for path in dirs:
        names = {entry.name for entry in (path / f"run-{store.run_id}").iterdir()}
        assert names == {"OFFLOAD_RUN", "lock", "data.bin", "manifest-4", "manifest-5"}


def test_every_drive_holds_the_same_manifest(dirs, store):
    store.commit({"step": 1})
    first, second = [(path / f"run-{store.run_id}" / "manifest-1").read_bytes() for path in dirs]
    assert first == second


def test_writes_end_before_the_first_sync(dirs, specs, monkeypatch):
    journal = Journal()
    journal.attach(monkeypatch)
    with (
        LazyEngine(journal) as engine,
        Store.create(dirs, specs, engine=engine, chunk_nbytes=CHUNK) as store,
    ):
        start = len(journal.ops)
        for name, spec in store.records.items():
            store.write(name, bytes(spec.nbytes))
        store.commit({})
    kinds = [what for what, _, _ in journal.ops[start:]]
    assert "write" not in kinds[kinds.index("fsync") :]
    assert kinds.count("write") == 6 + 3 + 1 + 2


def test_a_write_during_a_commit_is_refused_and_a_read_is_not(dirs, specs):
    class SyncCalls(PlainEngine):
        during = None

        def sync(self, file):
            if self.during is not None:
                self.during()

    refused, found = [], []

    def try_both():
        with pytest.raises(StateError, match=r"a commit of run .* is in progress") as error:
            store.write("tiny", bytes(4096))
        refused.append(error)
        found.append(read_all(store)["tiny"])

    with (
        SyncCalls() as engine,
        Store.create(dirs, specs, engine=engine, chunk_nbytes=CHUNK) as store,
    ):
        write_all(store, 1)
        engine.during = try_both
        store.commit({})
    assert len(refused) == 2
    assert set(found) == {content("tiny", 1, 4096)}


def test_thousands_of_chunks_are_verified_after_a_commit(tmp_path, engine):
    """The manifest of a large run: every checksum must find its way there and back."""
    with Store.create([tmp_path], [RecordSpec("w", 4096 * 4000)], engine=engine, chunk_nbytes=4096) as store:
        data = content("w", 1, 4096 * 4000)
        store.write("w", data).wait()
        store.commit({})
        run_id = store.run_id
    with Store.open([tmp_path], engine=engine, run_id=run_id) as store:
        assert read_all(store)["w"] == data
