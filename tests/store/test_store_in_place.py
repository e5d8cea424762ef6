"""Runs that are written in place: half the room, one marked state of use, and never a mixture of steps.

The run: step 1 is the import and committed; 2 and 3 go over it without a commit; 4 is committed; 5 is not.
"""

from __future__ import annotations

import random
import threading
from contextlib import suppress

import pytest
from store_content import content, read_all, write_all
from store_doubles import Journal, Killed, PlainEngine, PowerLoss
from store_generations import CHUNK, SPECS, build, expected, two_dirs

from offload.errors import CorruptionError, DiskFullError, StateError, StorageError
from offload.store import RunReader, RunState, Store, fall_back, find_runs, remove_run, room

COMMITTED_STEPS = (1, 4)
LAST = 5


@pytest.fixture
def journal(monkeypatch):
    journal = Journal()
    journal.attach(monkeypatch)
    return journal


def create(dirs, engine) -> Store:
    return Store.create(dirs, SPECS, engine=engine, chunk_nbytes=CHUNK, in_place=True)


def train(store: Store, journal: Journal | None = None, last: int = LAST) -> None:
    for step in range(1, last + 1):
        build(store, step)
        if step in COMMITTED_STEPS:
            store.commit({"step": step})
            if journal is not None:
                journal.ops.append(("committed", "", step))


def outcome(dirs, run_id, committed: int) -> str:
    """Open what is left and check it: a whole committed step or none at all."""
    allowed = {committed, *(step for step in COMMITTED_STEPS if step > committed)}
    if find_runs(dirs)[0].state is RunState.LOST:
        with pytest.raises(CorruptionError, match="did not end in order"):
            Store.open(dirs, engine=PlainEngine(), run_id=run_id)
        return "lost"
    with Store.open(dirs, engine=PlainEngine(), run_id=run_id) as store:
        step = store.state.get("step", 0)
        assert step in allowed
        assert read_all(store) == expected(step)
        assert store.verify().ok
        return f"step {step}"


def test_a_run_in_place_takes_half_the_room_of_what_changes(dirs, engine):
    with create(dirs, engine) as store:
        assert store.in_place
        assert store.nbytes_reserved == sum(spec.nbytes for spec in SPECS)
        assert sum(path.stat().st_size for path in store_files(dirs)) == store.nbytes_reserved


def store_files(dirs):
    return [path for directory in dirs for path in directory.glob("run-*/data.bin")]


def test_what_was_written_in_place_is_read_back_before_and_after_a_commit(dirs, engine):
    with create(dirs, engine) as store:
        for step in (1, 2, 3):
            build(store, step)
            assert read_all(store) == expected(step)
            if step == 1:
                store.commit({"step": 1})
        assert store.in_use
        assert store.commit({"step": 3}) == 3
        assert not store.in_use
        assert read_all(store) == expected(3)
    with Store.open(dirs, engine=engine, run_id=store.run_id) as store:
        assert (store.in_place, store.state) == (True, {"step": 3})
        assert read_all(store) == expected(3)
        build(store, 4)
        assert read_all(store) == expected(4)


def test_every_drive_says_that_the_run_is_in_use_before_the_first_byte_goes_over_another(dirs, journal):
    with create(dirs, PlainEngine(journal)) as store:
        train(store, last=1)
        start = len(journal.ops)
        store.write("o", content("o", 2, 2 * CHUNK)).wait()
        seen = [(what, *path.split("/")[-3::2]) for what, path, _ in journal.ops[start:]]
        store.write("o", content("o", 3, 2 * CHUNK)).wait()
        again = [what for what, _, _ in journal.ops[start + len(seen) :]]
    names = [(what, place, name) for what, place, name in seen if what in ("rename", "unlink", "write")]
    assert names == [
        ("rename", "a", "manifest-2"),
        ("rename", "b", "manifest-2"),
        ("unlink", "a", "manifest-1"),
        ("unlink", "a", "manifest-0"),
        ("unlink", "b", "manifest-1"),
        ("unlink", "b", "manifest-0"),
        ("write", "b", "data.bin"),
        ("write", "a", "data.bin"),
    ]
    last_rename = max(index for index, (what, *_) in enumerate(seen) if what == "rename")
    assert seen[last_rename + 1][0] == "fsync"  # its folder
    assert set(again) == {"write"}


def test_a_power_loss_at_any_moment_leaves_a_committed_step_or_a_run_that_nobody_opens(tmp_path, journal):
    dirs = two_dirs(tmp_path / "run")
    with create(dirs, PlainEngine(journal)) as store:
        created = len(journal.ops)
        train(store, journal)
    outcomes = set()
    for end in range(created, len(journal.ops) + 1):
        for seed in range(3):
            root = tmp_path / f"lost-{end}-{seed}"
            PowerLoss(journal.ops[:end], random.Random(seed)).write_to(root, tmp_path / "run")
            outcomes.add(outcome([root / "a", root / "b"], store.run_id, journal.committed(end)))
    assert outcomes == {"step 0", "step 1", "step 4", "lost"}


def test_a_process_killed_at_any_moment_leaves_a_committed_step_or_a_run_that_nobody_opens(tmp_path, journal):
    with create(two_dirs(tmp_path / "counted"), PlainEngine(journal)) as store:
        created = len(journal.ops)
        train(store, journal)
    outcomes = []
    for kill_at in range(created, len(journal.ops)):
        journal.ops.clear()
        dirs = two_dirs(tmp_path / str(kill_at))
        with create(dirs, PlainEngine(journal)) as store, suppress(Killed):
            journal.kill_at = kill_at
            train(store, journal)
        journal.kill_at = None
        outcomes.append(outcome(dirs, store.run_id, journal.committed(kill_at)))
    assert set(outcomes) == {"step 0", "step 1", "step 4", "lost"}
    # Once a step has gone over the import, only the commit of step 4 brings the run back.
    begun = outcomes.index("lost")
    assert "step 1" not in outcomes[begun:]


@pytest.mark.parametrize("persistent", [False, True])
def test_a_failure_of_any_operation_ends_the_run_or_is_not_needed(tmp_path, journal, persistent):
    with create(two_dirs(tmp_path / "counted"), PlainEngine(journal)) as store:
        created = len(journal.ops)
        train(store, journal, last=4)
    outcomes = set()
    for fail_at in range(created, len(journal.ops)):
        journal.ops.clear()
        dirs = two_dirs(tmp_path / str(fail_at))
        with create(dirs, PlainEngine(journal)) as store:
            journal.fail_at, journal.persistent = fail_at, persistent
            with suppress(StorageError):
                train(store, journal, last=4)
        journal.fail_at = None
        outcomes.add(outcome(dirs, store.run_id, journal.committed(len(journal.ops))))
    assert {"step 0", "step 1", "lost"} <= outcomes <= {"step 0", "step 1", "step 4", "lost"}


def test_a_failed_write_over_what_is_committed_ends_the_run(dirs, journal):
    with create(dirs, PlainEngine(journal)) as store:
        train(store, last=2)
        journal.fail_at = len(journal.ops)
        with pytest.raises(StorageError, match="injected at write"):
            build(store, 3)
        with pytest.raises(StateError, match=r"commit: off.*nothing to go back to"):
            store.rollback()
        with pytest.raises(StorageError, match=r"written over \(commit: off\): the run is lost"):
            store.commit({"step": 3})
    with pytest.raises(CorruptionError, match="did not end in order"):
        Store.open(dirs, engine=PlainEngine(), run_id=store.run_id)


def test_a_torn_chunk_is_found_while_the_run_goes_on(dirs, engine):
    with create(dirs, engine) as store:
        train(store, last=2)
        for path in store_files(dirs):
            path.write_bytes(bytes(path.stat().st_size))
        with pytest.raises(CorruptionError, match="checksum mismatch"):
            read_all(store)


def test_a_run_in_place_has_no_snapshots(dirs, engine):
    with create(dirs, engine) as store:
        train(store, last=1)
        with pytest.raises(StateError, match=r"commit: off.*no write goes over"):
            store.snapshot("a")


def test_nothing_is_read_out_of_a_run_that_did_not_end_in_order(dirs, engine):
    with create(dirs, engine) as store:
        train(store, last=2)
        assert find_runs(dirs)[0].state is RunState.IN_USE
    for use in (RunReader.open, fall_back):
        with pytest.raises(CorruptionError, match="neither resumed nor verified nor exported"):
            use(dirs, engine=engine, run_id=store.run_id)
    (found,) = find_runs(dirs)
    assert (found.state, found.newest.state) == (RunState.LOST, None)
    assert "commit: off" in found.reason
    remove_run(dirs, store.run_id)
    assert find_runs(dirs) == ()


def test_a_run_that_ended_in_order_is_complete_and_has_no_generation_before(dirs, engine):
    with create(dirs, engine) as store:
        train(store, last=4)
    (found,) = find_runs(dirs)
    assert (found.state, found.newest.state) == (RunState.COMPLETE, {"step": 4})
    with RunReader.open(dirs, engine=engine, run_id=store.run_id) as reader:
        assert reader.older is None
    with pytest.raises(CorruptionError, match="no committed generation before"):
        fall_back(dirs, engine=engine, run_id=store.run_id)


def test_a_read_waits_for_a_write_that_is_going_over_the_same_bytes(dirs):
    """The write's checksums are known only when its requests are under way; the read then takes those."""
    engine = HeldEngine()
    with create(dirs, engine) as store:
        write_all(store, 1)
        store.commit({"step": 1})
        engine.holds = True
        writer = threading.Thread(target=lambda: store.write("o", content("o", 2, 2 * CHUNK)).wait())
        writer.start()
        assert engine.reached.wait(10)
        engine.holds = False
        buffer = bytearray(2 * CHUNK)
        threading.Timer(0.05, engine.released.set).start()
        store.read("o", buffer).wait()
        writer.join()
        assert bytes(buffer) == content("o", 2, 2 * CHUNK)


class HeldEngine(PlainEngine):
    """Stops a thread behind its first write until it is released."""

    def __init__(self) -> None:
        super().__init__()
        self.holds = False
        self.reached, self.released = threading.Event(), threading.Event()

    def submit(self, op, file, buffer, file_offset, nbytes=None):
        request = super().submit(op, file, buffer, file_offset, nbytes)
        if op == "write" and self.holds:
            self.reached.set()
            assert self.released.wait(10)
        return request


@pytest.mark.parametrize(("spare_nbytes", "named"), [(0, True), (-1, False)])
def test_a_drive_without_room_for_two_generations_names_commit_off_where_one_fits(
    dirs, engine, monkeypatch, spare_nbytes, named
):
    # Both directories are on one file system.
    free_nbytes = 0
    monkeypatch.setattr(room, "free_nbytes", lambda _: free_nbytes)
    with pytest.raises(DiskFullError) as error:
        Store.create(dirs, SPECS, engine=engine, chunk_nbytes=CHUNK)
    free_nbytes = error.value.asked_nbytes - sum(spec.nbytes for spec in SPECS if spec.mutable) + spare_nbytes
    with pytest.raises(DiskFullError) as error:
        Store.create(dirs, SPECS, engine=engine, chunk_nbytes=CHUNK)
    assert ("set commit: off" in str(error.value)) == named
    if named:
        create(dirs, engine).close()
