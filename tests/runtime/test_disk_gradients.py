"""The slots of gradients on their way to disk and back, and what arrives in them, one call at a time."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from offload.aio.sim import SimDisk, SimEngine
from offload.buffers import Arena, Budget, Lease
from offload.errors import OffloadError, StateError
from offload.optim.arrivals import Arrivals
from offload.optim.gradient_parts import GradientParts
from offload.specs import TensorSpec, Tier
from offload.store import RecordSpec, Store
from offload.tiers.disk_gradients import DiskGradients
from offload.tiers.gradient_homes import PartLayout
from offload.tiers.gradients import FinishedGradient
from offload.trace import Tracer

NUMEL, NBYTES = 1024, 4096
OWNERS = ("a", "b", "c")


class Bench:
    """Gradients of three owners over a ring; nothing is transferred before it is waited for."""

    def __init__(self, store: Store, slots: int) -> None:
        self.scratch = store.scratch([RecordSpec(owner, NBYTES) for owner in OWNERS], chunk_nbytes=NBYTES)
        self.host = Arena(Budget(Tier.HOST, 1 << 20), 1 << 16)
        self.ring = self.host.pool("ring", [NBYTES] * slots)
        self.trace = Tracer(enabled=False)
        self.disk = DiskGradients(
            scratch=self.scratch,
            host=self.host,
            ring=self.ring,
            numel=dict.fromkeys(OWNERS, NUMEL),
            layout=PartLayout(NUMEL, 4),
            trace=self.trace,
        )

    def begin(self, owner: str, value: int) -> Lease:
        """Put a gradient of `value` into a slot; it is being measured then."""
        lease = self.disk.lease(owner)
        self.host.view(lease, 0, NBYTES)[:] = bytes([value]) * NBYTES
        return lease

    def put(self, owner: str, value: int) -> None:
        self.disk.write(owner, self.begin(owner, value))

    def get(self, owner: str) -> int | None:
        """Return the value of a gradient brought back, which is added to next."""
        lease = self.disk.restore(owner)
        if lease is None:
            return None
        memory = bytes(self.host.view(lease, 0, NBYTES))
        lease.release()
        assert memory == memory[:1] * NBYTES
        return memory[0]

    def holders(self) -> list[str]:
        return [holder for holder, _ in self.ring.in_use()]

    def close(self) -> None:
        self.disk.close()
        assert self.holders() == []
        self.scratch.close()
        self.host.close()


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    engine = SimEngine(SimDisk(), queue_depth=4, segment_nbytes=NBYTES)
    with Store.create([tmp_path], [RecordSpec("w", NBYTES)], engine=engine, chunk_nbytes=NBYTES) as store:
        yield store


@pytest.fixture
def bench(store: Store) -> Iterator[Bench]:
    bench = Bench(store, 2)
    yield bench
    bench.close()


def in_thread(act: Callable[[], Any], condition: threading.Condition) -> tuple[threading.Thread, list[Any]]:
    """Run `act` in a thread and return when it waits for `condition`, or has ended."""
    results: list[Any] = []

    def run() -> None:
        try:
            results.append(act())
        except OffloadError as error:
            results.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    while thread.is_alive() and not condition._waiters:  # type: ignore[attr-defined]
        pass
    return thread, results


# -- the ring ----------------------------------------------------------------------------------


def test_sums_come_back_whoever_is_written_between(bench: Bench) -> None:
    for round_ in range(3):
        for index, owner in enumerate(OWNERS):
            assert bench.get(owner) == (None if not round_ else 10 * round_ - 10 + index)
            bench.put(owner, 10 * round_ + index)
    assert bench.disk.kept() == OWNERS


def test_what_was_read_ahead_is_given_to_its_own_owner_alone(bench: Bench) -> None:
    bench.put("a", 1)
    bench.put("b", 2)
    bench.disk._collect()
    bench.disk.close()
    bench.disk.read_ahead("a")
    assert bench.holders() == ["a gradient read ahead"]
    assert bench.get("b") == 2
    assert bench.get("a") == 1


def test_a_sum_read_ahead_is_read_once(bench: Bench) -> None:
    bench.put("a", 1)
    bench.disk.close()
    bench.disk.read_ahead("a")
    assert bench.get("a") == 1
    assert bench.trace.counters()["parked_read_nbytes"] == NBYTES


def test_none_is_read_ahead_while_it_is_added_to(bench: Bench) -> None:
    bench.put("a", 1)
    assert bench.get("a") == 1
    bench.disk.read_ahead("a")
    bench.put("a", 2)
    assert bench.get("a") == 2


@pytest.mark.parametrize("end", ["take", "discard"])
def test_the_next_step_finds_nothing_of_this_one(end: str, bench: Bench) -> None:
    bench.put("a", 1)
    bench.disk.close()
    bench.disk.read_ahead("a")
    bench.disk.take("a") if end == "take" else bench.disk.discard()
    assert (bench.holders(), bench.disk.kept(), bench.get("a")) == ([], (), None)
    bench.put("a", 2)
    assert bench.get("a") == 2


def test_nothing_is_read_ahead_into_the_only_slot(store: Store) -> None:
    bench = Bench(store, 1)
    bench.put("a", 1)
    bench.disk.close()
    bench.disk.read_ahead("a")
    assert bench.holders() == []
    bench.close()


def test_nothing_is_read_ahead_without_a_free_slot(bench: Bench) -> None:
    bench.put("a", 1)
    bench.disk.close()
    leases = [bench.begin("b", 2), bench.begin("c", 3)]
    bench.disk.read_ahead("a")
    assert bench.holders() == ["b gradient", "c gradient"]
    for owner, lease in zip(("b", "c"), leases, strict=True):
        bench.disk.write(owner, lease)


def test_a_sum_is_read_behind_its_write_though_that_was_not_asked_for_yet(bench: Bench) -> None:
    lease = bench.begin("a", 7)
    thread, results = in_thread(lambda: bench.get("a"), bench.disk._changed)
    assert not results
    bench.disk.write("a", lease)
    thread.join()
    assert results == [7]


@pytest.mark.parametrize("slots", [1, 2])
def test_whoever_waits_for_a_gradient_hears_that_it_will_not_be_written(slots: int, store: Store) -> None:
    """For its slot, with one, or for its bytes."""
    bench = Bench(store, slots)
    lease = bench.begin("a", 7)
    thread, results = in_thread(lambda: bench.get("a"), bench.disk._changed)
    assert not results
    bench.disk.fail(StateError("the thread is gone"))
    thread.join()
    assert [str(error) for error in results] == ["the thread is gone"]
    assert bench.holders() == ["a gradient"]
    lease.release()
    bench.close()


def test_a_write_that_is_refused_gives_its_slot_back(bench: Bench) -> None:
    lease = bench.begin("a", 1)
    bench.scratch.close()
    with pytest.raises(StateError, match="closed"):
        bench.disk.write("a", lease)
    assert bench.holders() == []


def test_closing_waits_for_writes_and_reads(bench: Bench) -> None:
    bench.put("a", 1)
    bench.disk.close()
    bench.disk.read_ahead("a")
    bench.put("b", 2)
    assert bench.disk._ahead is not None
    tickets = [bench.disk._ahead.ticket, bench.disk._writes[0].ticket]
    assert [ticket._settled for ticket in tickets] == [False, False]
    bench.disk.close()
    assert [ticket._settled for ticket in tickets] == [True, True]


def test_parts_are_read_in_order_and_given_back_whatever_becomes_of_the_update(bench: Bench) -> None:
    chunks = [SimpleNamespace(start=0, stop=512), SimpleNamespace(start=512, stop=NUMEL)]
    record: Any = SimpleNamespace(
        format=SimpleNamespace(optimizer_chunks=lambda numel: chunks),
        layout=SimpleNamespace(trainable_numel=NUMEL),
    )
    slots = bench.host.pool("parts", [NBYTES] * 2)
    parts = GradientParts(
        records={"a": record}, disk=bench.disk, itemsize=4, host=bench.host, slots=slots, trace=bench.trace
    )
    memory = bytes(range(256)) * 16
    lease = bench.disk.lease("a")
    bench.host.view(lease, 0, NBYTES)[:] = memory
    bench.disk.write("a", lease)
    for _ in range(3):
        parts.expect("a")
    for chunk in chunks:
        taken: Any = chunk
        assert parts.take("a", taken) == memory[4 * chunk.start : 4 * chunk.stop]
        parts.give_back()
    # The next update ends with one part taken and one read.
    parts.take("a", chunks[0])  # type: ignore[arg-type]
    assert len(slots.in_use()) == 2
    parts.settle()
    assert (slots.in_use(), parts.advance()) == ((), False)
    parts.expect("a")
    bench.scratch.close()
    with pytest.raises(StateError, match="closed"):
        parts.advance()
    assert slots.in_use() == ()


# -- arrivals ----------------------------------------------------------------------------------


class Copy:
    """A copy into a slot that takes place when it is waited for, as on a GPU."""

    def __init__(self, bench: Bench, lease: Lease, value: float) -> None:
        self._target = torch.frombuffer(bench.host.view(lease, 0, NBYTES), dtype=torch.float32)
        self._value = value

    def wait(self) -> None:
        self._target.fill_(self._value)


class Measured:
    """Arrivals over a ring, and what they report."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.errors: list[BaseException] = []
        self.arrivals = Arrivals(
            tensors={owner: (TensorSpec(owner, (NUMEL,), 0),) for owner in bench.disk.owners},
            host=bench.host,
            disk=bench.disk,
            num_threads=1,
            on_error=self.errors.append,
            trace=bench.trace,
        )

    def take(self, owner: str, value: float) -> Any:
        lease = self.bench.disk.lease(owner)
        copy: Any = Copy(self.bench, lease, value)
        return self.arrivals.take(owner, FinishedGradient(lease, torch.float32, NUMEL, copy))


@pytest.fixture
def measured(bench: Bench) -> Iterator[Measured]:
    measured = Measured(bench)
    yield measured
    measured.arrivals.close()


def test_a_gradient_is_measured_when_it_has_arrived(measured: Measured) -> None:
    waits = [measured.take("a", 1.0), measured.take("b", 2.0)]
    assert [wait.wait() for wait in waits] == [True, True]
    assert measured.arrivals.global_norm().value == math.sqrt(5 * NUMEL)
    lease = measured.bench.disk.restore("b")
    assert lease is not None
    assert torch.frombuffer(measured.bench.host.view(lease, 0, NBYTES), dtype=torch.float32)[7] == 2.0
    lease.release()


def test_the_norm_of_a_later_sum_replaces_the_one_before_and_goes_with_the_step(measured: Measured) -> None:
    measured.take("a", 1.0)
    measured.take("a", math.inf)
    assert measured.arrivals.global_norm().not_finite == ("a",)
    measured.take("a", 3.0)
    assert measured.arrivals.global_norm().value == 3 * math.sqrt(NUMEL)
    measured.arrivals.forget_norms()
    measured.take("b", 1.0)
    assert measured.arrivals.global_norm().value == math.sqrt(NUMEL)


def test_a_norm_is_known_when_the_write_was_asked_for(
    measured: Measured, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever waited for it may read the gradient."""
    known: list[bool] = []
    write = measured.bench.disk.write

    def looking(owner: str, lease: Lease) -> None:
        known.extend((measurement._known.is_set(), not measured.arrivals._norms._awaited))
        write(owner, lease)

    monkeypatch.setattr(measured.bench.disk, "write", looking)
    # The thread is in the write only when this is known: the queue has one entry.
    gate = threading.Event()
    real = Copy.wait

    def gated(copy: Copy) -> None:
        gate.wait()
        real(copy)

    monkeypatch.setattr(Copy, "wait", gated)
    measurement = measured.take("a", 1.0)
    gate.set()
    assert measurement.wait() and measured.arrivals.global_norm().value
    assert known == [False, False]


def test_a_failure_reaches_everybody_and_frees_the_slots_of_what_comes_behind(
    measured: Measured, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured.bench.scratch._note_failure(OSError("the drive is gone"))
    first = measured.take("a", 1.0)
    with pytest.raises(StateError, match="the drive is gone"):
        first.wait()
    with pytest.raises(StateError, match="the drive is gone"):
        measured.arrivals.global_norm()
    with pytest.raises(StateError, match="the drive is gone"):
        measured.bench.disk.restore("a")
    second = measured.take("b", 1.0)
    with pytest.raises(StateError, match="the drive is gone"):
        second.wait()
    measured.arrivals.close()
    assert len(measured.errors) == 1
    assert measured.bench.holders() == []


def test_a_gradient_that_cannot_be_measured_gives_its_slot_back(
    measured: Measured, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(copy: Copy) -> None:
        raise StateError("the copy failed")

    monkeypatch.setattr(Copy, "wait", broken)
    with pytest.raises(StateError, match="the copy failed"):
        measured.take("a", 1.0).wait()
    measured.arrivals.close()
    assert measured.bench.holders() == []
