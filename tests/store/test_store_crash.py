"""Ends at every moment: a power loss, a killed process, an operation that fails.

The run recovered is always the last generation whose commit returned, or the one that was being
committed: whole, and no mixture of the two.
"""

from __future__ import annotations

import errno
import random
from contextlib import suppress

import pytest
from store_content import read_all
from store_doubles import Journal, Killed, PlainEngine, PowerLoss
from store_generations import CHUNK, LAST, SPECS, build, check_recovered, expected, train, two_dirs

from offload.errors import DiskFullError, OffloadError, StorageError
from offload.store import Store, list_runs


@pytest.fixture
def journal(monkeypatch):
    journal = Journal()
    journal.attach(monkeypatch)
    return journal


def create(dirs, journal) -> Store:
    return Store.create(dirs, SPECS, engine=PlainEngine(journal), chunk_nbytes=CHUNK)


def reopened(dirs, journal, run_id) -> Store:
    return Store.open(dirs, engine=PlainEngine(journal), run_id=run_id)


def power_loss(journal, end, seed, old_root, new_root):
    """Build what a power loss before operation `end` leaves, and return its directories."""
    PowerLoss(journal.ops[:end], random.Random(seed)).write_to(new_root, old_root)
    return [new_root / "a", new_root / "b"]


def test_a_power_loss_at_any_moment_leaves_a_whole_generation(tmp_path, dirs, journal):
    with create(dirs, journal) as store:
        run_id, created = store.run_id, len(journal.ops)
        train(store, journal)
    ops, recovered = len(journal.ops), set()
    for end in range(created, ops + 1):
        for seed in range(3):
            lost = power_loss(journal, end, seed, tmp_path, tmp_path / f"lost-{end}-{seed}")
            with Store.open(lost, engine=PlainEngine(), run_id=run_id) as store:
                check_recovered(store, journal.committed(end))
                recovered.add(store.generation - journal.committed(end))
    assert recovered == {0, 1}


def run_and_kill(dirs, journal, kill_at, last=LAST) -> str:
    """Create a run and train it until the process ends before operation `kill_at`; return its id."""
    with create(dirs, journal) as store, suppress(Killed):
        journal.kill_at = kill_at
        train(store, journal, last)
    journal.kill_at = None
    return store.run_id


def count_ops(tmp_path, journal, last=LAST, num_drives=2) -> range:
    """The operations of a run between its creation and the return of its last commit."""
    dirs = two_dirs(tmp_path / "counted")[:num_drives]
    with create(dirs, journal) as store:
        created = len(journal.ops)
        train(store, journal, last)
    ops = range(created, len(journal.ops))
    journal.ops.clear()
    return ops


def test_a_process_killed_at_any_moment_goes_on_to_the_same_end(tmp_path, journal):
    for kill_at in count_ops(tmp_path, journal):
        dirs = two_dirs(tmp_path / str(kill_at))
        run_id = run_and_kill(dirs, journal, kill_at)
        with reopened(dirs, journal, run_id) as store:
            check_recovered(store, journal.committed(kill_at))
            train(store, journal)
            assert read_all(store) == expected(LAST)
        journal.ops.clear()


@pytest.mark.parametrize("num_drives", [1, 2])
def test_a_power_loss_in_a_recovered_run_leaves_a_whole_generation(tmp_path, journal, num_drives):
    """The process is killed, the run goes on, and then the power fails. What the killed process renamed
    was perhaps not synced, and what the recovered run overwrote must not be needed again."""
    for kill_at in count_ops(tmp_path, journal, last=2, num_drives=num_drives):
        root = tmp_path / str(kill_at)
        dirs = two_dirs(root)[:num_drives]
        run_id = run_and_kill(dirs, journal, kill_at, last=2)
        with reopened(dirs, journal, run_id) as store:
            journal.ops.append(("committed", "", store.generation))
            resumed = len(journal.ops)
            train(store, journal, last=store.generation + 1)
        rng = random.Random(kill_at)
        for end in [resumed, *rng.choices(range(resumed, len(journal.ops) + 1), k=6)]:
            lost_root = tmp_path / f"lost-{kill_at}-{end}-{rng.random()}"
            lost = power_loss(journal, end, rng.random(), root, lost_root)[:num_drives]
            with Store.open(lost, engine=PlainEngine(), run_id=run_id) as store:
                check_recovered(store, journal.committed(end))
        journal.ops.clear()


def test_a_power_loss_while_a_run_is_created_leaves_nothing_in_the_way(tmp_path, dirs, journal):
    with create(dirs, journal) as store:
        run_id = store.run_id
    for end in range(len(journal.ops) + 1):
        for seed in range(3):
            lost_root = tmp_path / f"lost-{end}-{seed}"
            two_dirs(lost_root)
            lost = power_loss(journal, end, seed, tmp_path, lost_root)
            for path in lost:
                for info in list_runs(path):
                    assert info.run_id == run_id
            with Store.create(lost, SPECS, engine=PlainEngine(), chunk_nbytes=CHUNK) as store:
                build(store, 1)
                store.commit({"step": 1})


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
@pytest.mark.parametrize("persistent", [False, True])
def test_a_failure_of_any_operation_is_an_error_and_never_wrong_bytes(tmp_path, journal, number, persistent):
    """Each operation of a run fails in turn: the run says so or does not need it, the last commit can
    still be read, and after opening again the run goes on to the same end."""
    outcomes = set()
    for fail_at in count_ops(tmp_path, journal, last=3):
        dirs = two_dirs(tmp_path / str(fail_at))
        journal.errno, journal.persistent = number, persistent
        with create(dirs, journal) as store:
            run_id = store.run_id
            journal.fail_at = fail_at
            try:
                train(store, journal, last=3)
                outcomes.add("went on")
            except OffloadError as error:
                committed = journal.committed(len(journal.ops))
                outcomes.add(type(error).__name__)
                store.rollback()
                assert store.generation == committed
                assert read_all(store) == expected(committed)
        journal.fail_at = None
        with reopened(dirs, journal, run_id) as store:
            check_recovered(store, journal.committed(len(journal.ops)))
            train(store, journal)
            assert read_all(store) == expected(LAST)
        journal.ops.clear()
    assert outcomes <= {"went on", "StorageError", "DiskFullError"}
    assert "StorageError" in outcomes
    assert ("DiskFullError" in outcomes) == (number == errno.ENOSPC)


def test_a_failed_sync_is_not_forgotten_by_a_rollback(dirs, journal):
    with create(dirs, journal) as store:
        build(store, 1)
        journal.fail_at = len(journal.ops)
        with pytest.raises(StorageError, match="injected at fsync"):
            store.commit({"step": 1})
        store.rollback()
        # The drive's error again: a thread that reads may meet it before the one that commits has told.
        for use in (lambda: store.write("w", bytes(5 * CHUNK)), lambda: store.commit({"step": 1})):
            with pytest.raises(
                StorageError,
                match=r"^injected at fsync.* failed commit, generation 1 cannot .*close the run and open it",
            ) as error:
                use()
            assert error.value.errno == errno.EIO


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
def test_a_failed_sync_of_a_manifest_ends_the_run_until_it_is_opened_again(dirs, journal, number):
    with create(dirs, journal) as store:
        build(store, 1)
        journal.errno = number
        journal.fail_at = len(journal.ops) + 4  # two data files, a manifest created and written
        with pytest.raises(StorageError, match=r"injected at fsync .*manifest-1\.tmp"):
            store.commit({"step": 1})
        with pytest.raises(StorageError, match="open it again"):
            store.commit({"step": 1})


def test_a_commit_that_stopped_between_two_drives_ends_the_run_until_it_is_opened_again(dirs, journal):
    """One drive holds the new manifest already, so its extents must not be written again."""
    with create(dirs, journal) as store:
        run_id = store.run_id
        train(store, journal, last=1)
        build(store, 2)
        # Two syncs, three operations to stage each manifest, the first drive's rename and its sync.
        journal.fail_at = len(journal.ops) + 2 + 6 + 2
        with pytest.raises(StorageError, match=r"injected at rename .*/b/"):
            store.commit({"step": 2})
        store.rollback()
        assert read_all(store) == expected(1)
        with pytest.raises(StorageError, match="open it again"):
            store.write("w", bytes(5 * CHUNK))
    journal.fail_at = None
    with reopened(dirs, journal, run_id) as store:
        assert store.generation == 2
        check_recovered(store, 2)


def test_a_commit_without_room_for_its_manifest_may_be_tried_again(dirs, journal):
    with create(dirs, journal) as store:
        run_id = store.run_id
        train(store, journal, last=1)
        build(store, 2)
        journal.errno = errno.ENOSPC
        # Two syncs of data files, then the first manifest is created and written.
        journal.fail_at = len(journal.ops) + 3
        with pytest.raises(DiskFullError, match="the manifest of generation 2 needs"):
            store.commit({"step": 2})
        assert store.generation == 1
        assert [path.name for path in dirs[0].rglob("*.tmp")] == []
        assert read_all(store) == {**expected(1), "w": expected(2)["w"], "o": expected(2)["o"]}
        assert store.commit({"step": 2}) == 2
    with reopened(dirs, journal, run_id) as store:
        check_recovered(store, 2)


def test_a_commit_syncs_data_then_manifests_then_names_and_only_then_removes(dirs, journal):
    with create(dirs, journal) as store:
        train(store, journal, last=2)
        build(store, 3)
        start = len(journal.ops)
        store.commit({"step": 3})
    seen = [
        (what, path.removeprefix(str(dirs[0].parent)).split("/")) for what, path, _ in journal.ops[start:]
    ]
    assert [(what, parts[1], parts[3] if len(parts) > 3 else "") for what, parts in seen] == [
        ("fsync", "a", "data.bin"),
        ("fsync", "b", "data.bin"),
        ("create", "a", "manifest-3.tmp"),
        ("content", "a", "manifest-3.tmp"),
        ("fsync", "a", "manifest-3.tmp"),
        ("create", "b", "manifest-3.tmp"),
        ("content", "b", "manifest-3.tmp"),
        ("fsync", "b", "manifest-3.tmp"),
        ("rename", "a", "manifest-3"),
        ("fsync", "a", ""),
        ("rename", "b", "manifest-3"),
        ("fsync", "b", ""),
        ("unlink", "a", "manifest-1"),
        ("unlink", "b", "manifest-1"),
    ]
