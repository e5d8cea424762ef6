"""A process that makes, restores and drops a snapshot ends at every moment.

There is then no snapshot or a whole one, the run is what it was or what was restored, and going on
leads to the same end.
"""

from __future__ import annotations

import errno
import random
from contextlib import suppress
from pathlib import Path

import pytest
from store_content import content, read_all, write_all
from store_doubles import Journal, Killed, PlainEngine, PowerLoss
from store_generations import CHUNK, SPECS, two_dirs

from offload.aio.sim import Fault, FaultKind, SimCrash, SimDisk, SimEngine
from offload.errors import CorruptionError, OffloadError
from offload.store import Store

LAST = 4


def of(*generations: int) -> dict[str, bytes]:
    """What the records hold when they were last written in these generations: w, o and base."""
    return {
        spec.name: content(spec.name, generation, spec.nbytes)
        for spec, generation in zip(SPECS, generations, strict=True)
    }


# The snapshot is of generation 1, and 3 is its restoration.
HOLDS = {0: {}, 1: of(1, 1, 1), 2: of(2, 2, 1), 3: of(1, 1, 1), 4: of(4, 1, 1)}
STATES = {0: {}, 1: {"step": 1}, 2: {"step": 2}, 3: {"step": 1}, 4: {"step": 4}}


def go_on(store: Store, journal: Journal | None = None) -> None:
    """Do what is left of: commit 1, snapshot it, commit 2, restore, commit 4, drop the snapshot."""

    def note(what: str, detail: int) -> None:
        if journal is not None:
            journal.ops.append((what, "", detail))

    def commit(generation: int, names: list[str]) -> None:
        write_all(store, generation, names=names)
        store.commit({"step": generation})
        note("committed", generation)

    if store.generation == 0:
        commit(1, ["w", "o", "base"])
    if store.generation == 1:
        if not store.snapshots():
            store.snapshot("a")
        note("committed", 1)  # The snapshot is there: `is_whole` counts these.
        commit(2, ["w", "o"])
    if store.generation == 2:
        store.restore("a")
        note("committed", 3)
    if store.generation == 3:
        commit(4, ["w"])
    if store.snapshots():
        store.drop_snapshot("a")


def check(store: Store) -> None:
    """The run is one of its generations and the snapshot, if it is there, can be restored whole."""
    assert read_all(store) == HOLDS[store.generation]
    assert store.state == STATES[store.generation]
    names = [info.name for info in store.snapshots()]
    assert names in ([], ["a"])
    assert all(info.problem is None for info in store.snapshots())
    if store.generation in (2, 3):
        assert names == ["a"]  # It was made before 2 and is dropped behind 4.
    for drive in store._drives:
        found = {path for path in drive.folder.names() if path.startswith("snapshot-")}
        assert found == {text for name in names for text in (f"snapshot-{name}", f"snapshot-{name}.bin")}


def check_restores(store: Store) -> None:
    """Restore the snapshot, if it is there, whatever the generation; the end of this copy of the run."""
    if store.snapshots():
        store.restore("a")
        assert read_all(store) == HOLDS[1]
        assert store.state == STATES[1]


def check_end(store: Store) -> None:
    assert store.generation == LAST
    assert read_all(store) == HOLDS[LAST]
    assert store.snapshots() == ()
    assert store.verify().ok


@pytest.fixture
def journal(monkeypatch: pytest.MonkeyPatch) -> Journal:
    journal = Journal()
    journal.attach(monkeypatch)
    return journal


def create(dirs: list[Path], journal: Journal) -> Store:
    return Store.create(dirs, SPECS, engine=PlainEngine(journal), chunk_nbytes=CHUNK)


def reopened(dirs: list[Path], journal: Journal | None, run_id: str) -> Store:
    return Store.open(dirs, engine=PlainEngine(journal), run_id=run_id)


def count_ops(tmp_path: Path, journal: Journal) -> range:
    with create(two_dirs(tmp_path / "counted"), journal) as store:
        created = len(journal.ops)
        go_on(store, journal)
        check_end(store)
    operations = range(created, len(journal.ops))
    journal.ops.clear()
    return operations


def test_a_process_killed_at_any_moment_goes_on_to_the_same_end(tmp_path: Path, journal: Journal) -> None:
    seen = set()
    for kill_at in count_ops(tmp_path, journal):
        dirs = two_dirs(tmp_path / str(kill_at))
        with create(dirs, journal) as store, suppress(Killed):
            journal.kill_at = kill_at
            go_on(store, journal)
        journal.kill_at = None
        with reopened(dirs, journal, store.run_id) as store:
            check(store)
            seen.add((store.generation, len(store.snapshots())))
            go_on(store)
            check_end(store)
        journal.ops.clear()
    assert seen == {(0, 0), (1, 0), (1, 1), (2, 1), (3, 1), (4, 1), (4, 0)}


def test_a_power_loss_at_any_moment_leaves_no_snapshot_or_a_whole_one(
    tmp_path: Path, journal: Journal
) -> None:
    dirs = two_dirs(tmp_path / "run")
    with create(dirs, journal) as store:
        created = len(journal.ops)
        go_on(store, journal)
    ops = list(journal.ops)
    for end in range(created, len(ops) + 1):
        for seed in range(2):
            root = tmp_path / f"lost-{end}-{seed}"
            PowerLoss(ops[:end], random.Random(seed)).write_to(root, tmp_path / "run")
            lost = [root / "a", root / "b"]
            with reopened(lost, None, store.run_id) as found:
                check(found)
                committed = max((detail for what, _, detail in ops[:end] if what == "committed"), default=0)
                assert found.generation in (committed, committed + 1)
                check_restores(found)


def test_a_power_loss_after_a_kill_leaves_no_snapshot_or_a_whole_one(
    tmp_path: Path, journal: Journal
) -> None:
    """What the killed process renamed and did not sync is made durable before anybody relies on it."""
    rng = random.Random(5)
    for kill_at in sorted(rng.sample(count_ops(tmp_path, journal), 60)):
        root = tmp_path / str(kill_at)
        dirs = two_dirs(root)
        with create(dirs, journal) as store, suppress(Killed):
            journal.kill_at = kill_at
            go_on(store, journal)
        journal.kill_at = None
        with reopened(dirs, journal, store.run_id) as store:
            there, opened, generation = store.snapshots(), len(journal.ops), store.generation
            go_on(store, journal)
        for end in (opened, rng.randrange(opened, len(journal.ops) + 1)):
            lost_root = tmp_path / f"lost-{kill_at}-{end}-{rng.random()}"
            PowerLoss(journal.ops[:end], rng).write_to(lost_root, root)
            with reopened([lost_root / "a", lost_root / "b"], None, store.run_id) as store:
                check(store)
                assert store.generation >= generation
                if end == opened:
                    assert store.snapshots() == there
                check_restores(store)
        journal.ops.clear()


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
def test_a_failure_of_any_operation_is_an_error_or_does_no_harm(
    tmp_path: Path, journal: Journal, number: int
) -> None:
    outcomes = set()
    for fail_at in count_ops(tmp_path, journal):
        dirs = two_dirs(tmp_path / str(fail_at))
        journal.errno = number
        with create(dirs, journal) as store:
            journal.fail_at = fail_at
            try:
                go_on(store, journal)
                outcomes.add("went on")
            except OffloadError as error:
                outcomes.add(type(error).__name__)
                store.rollback()
                assert read_all(store) == HOLDS[store.generation]
                assert all(info.problem is None for info in store.snapshots())
        journal.fail_at = None
        with reopened(dirs, journal, store.run_id) as store:
            check(store)
            go_on(store)
            check_end(store)
        journal.ops.clear()
    assert outcomes == {"went on", "StorageError" if number == errno.EIO else "DiskFullError", "StorageError"}


# The same with what a drive may do to the segments of a data file.


def sim_engine(disk: SimDisk) -> SimEngine:
    return SimEngine(disk, queue_depth=3, segment_nbytes=CHUNK // 2)


def sim_create(root: Path, disk: SimDisk) -> Store:
    return Store.create(two_dirs(root), SPECS, engine=sim_engine(disk), chunk_nbytes=CHUNK)


def sim_reopened(root: Path, disk: SimDisk, run_id: str) -> Store:
    return Store.open([root / "a", root / "b"], engine=sim_engine(disk), run_id=run_id)


@pytest.fixture
def data_operations(tmp_path: Path, journal: Journal) -> range:
    """The operations on data files; with the journal, small files are not really synced."""
    disk = SimDisk()
    with sim_create(tmp_path / "counted", disk) as store:
        created = len(disk.journal)
        go_on(store)
        return range(created, len(disk.journal))


def test_a_process_killed_at_any_data_operation_goes_on_to_the_same_end(
    tmp_path: Path, data_operations: range
) -> None:
    for operation in data_operations:
        root = tmp_path / str(operation)
        disk = SimDisk(faults=[Fault(operation, "crash")])
        with suppress(SimCrash), sim_create(root, disk) as store:
            go_on(store)
        assert disk.is_dead
        disk.restart()
        with sim_reopened(root, disk, store.run_id) as store:
            check(store)
            go_on(store)
            check_end(store)


def test_a_power_loss_at_any_data_operation_leaves_no_snapshot_or_a_whole_one(
    tmp_path: Path, data_operations: range, journal: Journal
) -> None:
    for operation in data_operations:
        journal.ops.clear()
        root = tmp_path / str(operation)
        disk = SimDisk(faults=[Fault(operation, "crash")])
        with suppress(SimCrash), sim_create(root, disk) as store:
            go_on(store)
        ops = list(journal.ops)
        for seed in range(2):
            new_root = tmp_path / f"lost-{operation}-{seed}"
            PowerLoss(ops, random.Random(seed)).write_to(new_root, root)
            # The names of simulated files: a snapshot's was synced before its description was made.
            for folder in root.glob("*/run-*"):
                for path in (folder / "data.bin", *folder.glob("snapshot-*.bin")):
                    (new_root / path.relative_to(root)).touch(mode=0o600)
            left = disk.crash(seed, moved=(str(root), str(new_root)))
            with sim_reopened(new_root, left, store.run_id) as found:
                check(found)
                check_restores(found)


@pytest.mark.parametrize("kind", ["EIO", "ENOSPC", "short"])
def test_a_fault_at_any_data_operation_is_an_error_or_does_no_harm(
    tmp_path: Path, data_operations: range, kind: FaultKind
) -> None:
    outcomes = set()
    for operation in data_operations:
        root = tmp_path / str(operation)
        disk = SimDisk(faults=[Fault(operation, kind)])
        with sim_create(root, disk) as store:
            try:
                go_on(store)
                outcomes.add("went on")
            except OffloadError as error:
                outcomes.add(type(error).__name__)
                store.rollback()
                assert read_all(store) == HOLDS[store.generation]
        with sim_reopened(root, disk, store.run_id) as store:
            check(store)
            go_on(store)
            check_end(store)
    assert outcomes == {{"short": "went on", "EIO": "StorageError", "ENOSPC": "DiskFullError"}[kind]}


def test_a_bit_that_flips_at_any_data_operation_is_found(tmp_path: Path, data_operations: range) -> None:
    outcomes = set()
    for operation in data_operations:
        disk = SimDisk(faults=[Fault(operation, "flip")])
        with sim_create(tmp_path / str(operation), disk) as store:
            try:
                go_on(store)
                assert read_all(store) == HOLDS[LAST]
                outcomes.add("overwritten since, or no bytes moved")
            except CorruptionError:
                outcomes.add("found")
    assert len(outcomes) == 2
