"""The simulated disk's faults: each is what it says, where it says, and the same every time."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import get_args

import pytest
from engine_workbench import SEGMENT_NBYTES, pattern

from offload.aio import EngineName, open_engine
from offload.aio.sim import Fault, FaultKind, SimCrash, SimDisk, SimEngine, SimStuckError
from offload.errors import ConfigError, DiskFullError, OffloadError, RequestTimeoutError, StorageError

PATH = "/sim/data"
ERRNOS = ("EIO", "ENOSPC", "EDQUOT", "EFBIG", "EROFS", "EINVAL")
RETRIED = ("EINTR", "EAGAIN")
NBYTES = 6 * SEGMENT_NBYTES + 100


def engine_on(disk: SimDisk) -> SimEngine:
    return SimEngine(disk, queue_depth=4, segment_nbytes=SEGMENT_NBYTES)


def use(disk: SimDisk, read: Callable[[bytearray], None] = lambda data: None) -> None:
    """A little of everything; `read` is given what was read back."""
    with engine_on(disk) as engine, engine.open(PATH, "x+") as file:
        file.allocate(2 * NBYTES)
        writes = [engine.submit("write", file, pattern(NBYTES, n), n * NBYTES) for n in range(2)]
        for request in reversed(writes):
            request.wait()
        engine.sync(file)
        target = bytearray(2 * NBYTES)
        requests = [
            engine.submit("read", file, memoryview(target)[start : start + NBYTES], start)
            for start in (0, NBYTES)
        ]
        for request in requests:
            while not request.done():
                pass
            request.wait()
        read(target)


def num_operations() -> int:
    disk = SimDisk(seed=3)
    use(disk)
    return len(disk.journal)


def test_the_same_seed_and_calls_give_the_same_journal() -> None:
    journals = []
    for seed in (1, 1, 2):
        disk = SimDisk(seed=seed, faults=[Fault(5, "short"), Fault(9, "EINTR")])
        use(disk)
        journals.append(disk.journal)
    assert journals[0] == journals[1]
    assert journals[0] != journals[2]


def test_every_operation_is_in_the_journal() -> None:
    disk = SimDisk(short_rate=0)
    use(disk)
    kinds = [entry.what for entry in disk.journal]
    assert kinds == ["open", "allocate"] + ["write"] * 14 + ["sync"] + ["read"] * 14
    assert {entry.path for entry in disk.journal} == {PATH}
    assert disk.journal[1].nbytes == 2 * NBYTES
    starts = range(0, NBYTES, SEGMENT_NBYTES)
    cut = {(at + n * NBYTES, min(SEGMENT_NBYTES, NBYTES - at)) for at in starts for n in range(2)}
    assert {(entry.offset_bytes, entry.nbytes) for entry in disk.journal[2:16]} == cut


def test_requests_complete_in_an_order_of_their_own() -> None:
    orders = set()
    for seed in range(10):
        with SimEngine(SimDisk(seed=seed)) as engine, engine.open(PATH, "x+") as file:
            requests = [engine.submit("write", file, pattern(512), n * 512) for n in range(6)]
            order: list[int] = []
            while len(order) < 6:
                order += [n for n, request in enumerate(requests) if n not in order and request.done()]
            orders.add(tuple(order))
    assert len(orders) > 5


def test_a_read_beside_a_write_in_flight_sees_old_or_new_sectors() -> None:
    old, new = pattern(SEGMENT_NBYTES, 1), pattern(SEGMENT_NBYTES, 2)
    mixtures = 0
    for seed in range(10):
        disk = SimDisk(seed=seed)
        disk.write_file(PATH, old)
        with engine_on(disk) as engine, engine.open(PATH, "r+") as file:
            target = bytearray(SEGMENT_NBYTES)
            engine.submit("write", file, new, 0)
            engine.submit("read", file, target, 0).wait()
            places = range(0, SEGMENT_NBYTES, 512)
            assert all(target[at : at + 512] in (old[at : at + 512], new[at : at + 512]) for at in places)
            mixtures += target not in (old, new)
    assert mixtures > 0


@pytest.mark.parametrize("rate", [0, 1 / 2, 1])
def test_short_transfers_are_completed(rate: float) -> None:
    disk = SimDisk(short_rate=rate)
    found: list[bytes] = []
    use(disk, lambda data: found.append(bytes(data)))
    assert found == [pattern(NBYTES, 0) + pattern(NBYTES, 1)]
    assert (len(disk.journal) > 2 + 28 + 1) == (rate > 0)


def test_a_short_fault_makes_one_more_operation() -> None:
    disk = SimDisk(short_rate=0, faults=[Fault(1, "short", of="write")])
    use(disk)
    short, rest = [entry for entry in disk.journal if entry.offset_bytes // SEGMENT_NBYTES == 1][:2]
    assert short.fault == "short"
    assert rest.offset_bytes + rest.nbytes == 2 * SEGMENT_NBYTES
    assert 0 < rest.nbytes < SEGMENT_NBYTES


@pytest.mark.parametrize("kind", ERRNOS)
@pytest.mark.parametrize("op", ["read", "write"])
def test_an_error_is_raised_by_the_wait_with_the_bytes_before_it(kind: FaultKind, op: str) -> None:
    disk = SimDisk(short_rate=0, faults=[Fault(2, kind, of=op)])  # type: ignore[arg-type]
    disk.write_file(PATH, bytes(NBYTES))
    with engine_on(disk) as engine, engine.open(PATH, "r+") as file:
        request = engine.submit(op, file, bytearray(NBYTES), 0)  # type: ignore[arg-type]
        with pytest.raises(StorageError) as caught:
            request.wait()
        assert engine.submit("write", file, b"next", 0).wait() == 4
    error = caught.value
    assert (error.errno, error.path) == (getattr(errno, kind), PATH)
    assert (error.asked_nbytes, error.got_nbytes) == (NBYTES, 2 * SEGMENT_NBYTES)
    assert isinstance(error, DiskFullError) == (kind in ("ENOSPC", "EDQUOT"))
    assert f"{op} failed: {2 * SEGMENT_NBYTES:,} of {NBYTES:,} bytes at offset 0 of {PATH}" in str(error)


@pytest.mark.parametrize("kind", ERRNOS)
def test_open_allocate_and_sync_fail_as_well(kind: FaultKind) -> None:
    disk = SimDisk(faults=[Fault(0, kind), Fault(2, kind), Fault(3, kind)])
    with engine_on(disk) as engine:
        with pytest.raises(StorageError, match=f"open failed: .*{kind}"):
            engine.open(PATH, "x+")
        assert not disk.exists(PATH)
        with engine.open(PATH, "x+") as file:
            with pytest.raises(StorageError, match=f"allocate failed: .*{kind}"):
                file.allocate(1000)
            assert file.size_nbytes == 0
            with pytest.raises(StorageError, match=f"sync failed: .*{kind}"):
                engine.sync(file)


@pytest.mark.parametrize("kind", RETRIED)
def test_what_is_interrupted_is_tried_again_64_times(kind: FaultKind) -> None:
    for num_faults, works in ((64, True), (65, False)):
        faults = [Fault(n, kind, of="write") for n in range(num_faults)]
        disk = SimDisk(short_rate=0, faults=faults)
        with engine_on(disk) as engine, engine.open(PATH, "x+") as file:
            request = engine.submit("write", file, b"again", 0)
            if works:
                assert request.wait() == 5
            else:
                with pytest.raises(StorageError, match=kind):
                    request.wait()
        assert [entry.what for entry in disk.journal] == ["open"] + ["write"] * 65


def test_an_interrupted_open_is_tried_again_and_an_interrupted_sync_is_not() -> None:
    disk = SimDisk(faults=[Fault(0, "EINTR", of="open"), Fault(0, "EINTR", of="sync")])
    with engine_on(disk) as engine, engine.open(PATH, "x+") as file, pytest.raises(StorageError):
        engine.sync(file)
    assert [entry.what for entry in disk.journal] == ["open", "open", "sync"]


def test_a_fault_that_lasts_hits_every_later_operation() -> None:
    disk = SimDisk(faults=[Fault(1, "EROFS", of="write", forever=True)])
    with engine_on(disk) as engine, engine.open(PATH, "x+") as file:
        assert engine.submit("write", file, b"1", 0).wait() == 1
        for _ in range(3):
            with pytest.raises(StorageError, match="EROFS"):
                engine.submit("write", file, b"2", 0).wait()
    assert disk.read_file(PATH) == b"1"


def test_a_stuck_request_times_out_at_once_until_it_is_released() -> None:
    disk = SimDisk(faults=[Fault(0, "stuck", of="write")])
    with engine_on(disk) as engine, engine.open(PATH, "x+") as file:
        stuck = engine.submit("write", file, b"late", 0)
        other = engine.submit("write", file, b"early", 100)
        with pytest.raises(RequestTimeoutError) as caught:
            stuck.wait(timeout_s=1e6)
        assert (caught.value.offset_bytes, caught.value.asked_nbytes) == (0, 4)
        assert disk.now_s >= 1e6
        assert other.done()
        with pytest.raises(SimStuckError, match="write of 4 bytes at offset 0 of /sim/data hangs"):
            stuck.wait()
        with pytest.raises(SimStuckError):
            engine.close()
        disk.unstick()
        assert stuck.wait() == 4
    assert disk.read_file(PATH)[:4] == b"late"


@pytest.mark.parametrize("what", ["open", "allocate", "sync"])
def test_a_call_that_would_block_for_ever_says_so(what: str) -> None:
    disk = SimDisk(faults=[Fault(0, "stuck", of=what)])  # type: ignore[arg-type]
    with pytest.raises(SimStuckError, match=f"{what} of {PATH}"):
        use(disk)


def test_a_wait_with_a_timeout_ends_when_simulated_time_says() -> None:
    disk = SimDisk()
    with engine_on(disk) as engine, engine.open(PATH, "x+") as file:
        request = engine.submit("write", file, b"x", 0)
        with pytest.raises(RequestTimeoutError):
            request.wait(timeout_s=1e-6)
        assert request.wait(timeout_s=1) == 1


def num_bits_changed(got: bytes, want: bytes) -> int:
    return sum((one ^ other).bit_count() for one, other in zip(got, want, strict=True))


def test_a_bit_flipped_in_a_read_is_right_on_the_disk() -> None:
    source = pattern(5000)
    disk = SimDisk(faults=[Fault(0, "flip", of="read")])
    disk.write_file(PATH, source)
    with engine_on(disk) as engine, engine.open(PATH) as file:
        found = []
        for _ in range(2):
            target = bytearray(5000)
            engine.submit("read", file, target, 0).wait()
            found.append(num_bits_changed(target, source))
    assert found == [1, 0]


def test_a_bit_flipped_in_a_write_is_wrong_at_rest() -> None:
    source = pattern(5000)
    disk = SimDisk(faults=[Fault(0, "flip", of="write")])
    with engine_on(disk) as engine, engine.open(PATH, "x+") as file:
        assert engine.submit("write", file, source, 0).wait() == 5000
    assert num_bits_changed(disk.read_file(PATH), source) == 1


def test_a_bit_can_be_flipped_at_rest() -> None:
    disk = SimDisk()
    disk.write_file(PATH, bytes(1000))
    disk.flip_bit(PATH, 700, bit=3)
    assert disk.read_file(PATH) == bytes(700) + b"\x08" + bytes(299)
    assert disk.crash(seed=1).read_file(PATH) == disk.read_file(PATH)


@pytest.mark.parametrize("kind", ["short", *ERRNOS, *RETRIED])
@pytest.mark.parametrize("forever", [False, True])
def test_a_fault_at_any_operation_is_an_error_or_does_no_harm(kind: FaultKind, forever: bool) -> None:
    outcomes = set()
    for operation in range(num_operations()):
        disk = SimDisk(seed=3, faults=[Fault(operation, kind, forever=forever)])
        found: list[bytes] = []
        try:
            use(disk, lambda data, found=found: found.append(bytes(data)))
            outcomes.add("went on")
            assert found == [pattern(NBYTES, 0) + pattern(NBYTES, 1)]
        except OffloadError:
            outcomes.add("failed")
        assert any(entry.fault == kind for entry in disk.journal) or kind == "short"
    if kind == "short":
        assert outcomes == {"went on"}
    elif kind in RETRIED:
        assert ("went on" in outcomes) == (not forever)
    else:
        assert outcomes == {"failed"}


def test_a_process_that_ended_asks_in_vain() -> None:
    for operation in range(num_operations()):
        disk = SimDisk(seed=3, faults=[Fault(operation, "crash")])
        with pytest.raises(SimCrash):
            use(disk)
        assert disk.is_dead
        with pytest.raises(SimCrash):
            engine_on(disk).open("/sim/other", "x+")
        assert len(disk.journal) == operation + 1


def test_a_crash_inside_a_request_raises_at_its_wait_too() -> None:
    disk = SimDisk(faults=[Fault(4, "crash", of="write")])
    engine = engine_on(disk)
    file = engine.open(PATH, "x+")
    request = engine.submit("write", file, pattern(NBYTES), 0)  # four segments begin
    with pytest.raises(SimCrash):
        request.wait()
    with pytest.raises(SimCrash):
        request.wait()
    assert not request.done()
    file.close()
    engine.close()


def test_users_never_see_it() -> None:
    assert "sim" not in get_args(EngineName)
    with pytest.raises(ConfigError, match="'sim'"):
        open_engine("sim")  # type: ignore[arg-type]


def test_what_is_stuck_for_a_while_completes_then() -> None:
    disk = SimDisk(faults=[Fault(0, "stuck", of="write"), Fault(0, "stuck", of="sync")], stuck_s=1000)
    with engine_on(disk) as engine, engine.open(PATH, "x+") as file:
        stuck = engine.submit("write", file, b"late", 0)
        with pytest.raises(RequestTimeoutError):
            stuck.wait(timeout_s=900)
        assert stuck.wait() == 4
        assert 1000 <= disk.now_s < 1100
        engine.sync(file)
        assert 2000 <= disk.now_s < 2100
    assert disk.crash(seed=1).read_file(PATH) == b"late"


def test_a_healed_disk_has_no_faults_and_nothing_that_hangs() -> None:
    disk = SimDisk(faults=[Fault(0, "stuck", of="write"), Fault(1, "EIO", of="write", forever=True)])
    with engine_on(disk) as engine, engine.open(PATH, "x+") as file:
        stuck = engine.submit("write", file, b"late", 0)
        with pytest.raises(StorageError, match="EIO"):
            engine.submit("write", file, b"lost", 4).wait()
        disk.heal()
        assert stuck.wait() == 4
        assert engine.submit("write", file, b"kept", 4).wait() == 4
    assert disk.read_file(PATH) == b"latekept"


def test_operations_that_take_place_elsewhere_are_counted_and_hit() -> None:
    numbers: list[int] = []
    disk = SimDisk(faults=[Fault(1, "EIO"), Fault(2, "short")], on_operation=numbers.append)
    assert disk.enter("create", "/sim/small") is None
    fault = disk.enter("put", "/sim/small", nbytes=10)
    assert fault is not None
    assert fault.kind == "EIO"
    assert disk.enter("rename", "/sim/small") is None  # moves no bytes, so it cannot be short
    assert [one.what for one in disk.journal] == ["create", "put", "rename"]
    assert numbers == [0, 1, 2]


def test_a_snapshot_stays_as_it_is_and_loses_power_like_the_disk_itself() -> None:
    disk = SimDisk()
    with engine_on(disk) as engine, engine.open(PATH, "x+") as file:
        engine.submit("write", file, b"old!", 0).wait()
        engine.sync(file)
        engine.submit("write", file, b"new!", 0).wait()
        kept = disk.snapshot()
        expected = [disk.crash(seed).read_file(PATH) for seed in range(20)]
        engine.submit("write", file, b"last", 0).wait()
        engine.sync(file)
    assert [kept.crash(seed).read_file(PATH) for seed in range(20)] == expected
    assert {b"old!", b"new!"} <= set(expected)
