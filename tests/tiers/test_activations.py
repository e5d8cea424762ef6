"""Saved inputs come back as they were, from host memory or from disk, whoever is slow."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_cuda import FakeCuda, fake_cuda_device

from offload.aio.sim import Fault, SimDisk, SimEngine
from offload.buffers import Arena, Budget
from offload.device import CpuDevice, Device
from offload.errors import CapacityError, CorruptionError, StateError, StorageError
from offload.sizes import MIB
from offload.specs import Tier
from offload.store import RecordSpec, Store
from offload.store.scratch import Scratch
from offload.tiers.activations import Activations, SavedTensor
from offload.tiers.spill import Spill, chunk_nbytes_of, room_nbytes
from offload.trace import Tracer

PAGE = 4096
NUMEL = PAGE // 4  # of float32: an input is a page


class Bench:
    """Saved inputs over a host heap of some pages and a room on two simulated drives of some more."""

    def __init__(self, store: Store, device: Device, pages: int, disk_pages: int) -> None:
        self.trace = Tracer()
        self.scratch: Scratch | None = None
        spill = None
        self.host: Arena = device.host_arena(Budget(Tier.HOST, MIB), pages * PAGE)
        if disk_pages:
            room = Spill.record(disk_pages * PAGE)
            self.scratch = store.scratch([room], chunk_nbytes=chunk_nbytes_of(room.nbytes))
            spill = Spill(self.scratch, self.host, self.trace)
        self.heap = self.host.heap("saved inputs", pages * PAGE)
        self.activations = Activations(device, self.host, self.heap, self.trace, spill)

    def save(self, value: int, numel: int = NUMEL) -> SavedTensor:
        return self.activations.save(torch.full((numel,), float(value)), f"unit {value}")

    def restore(self, saved: SavedTensor, value: int) -> None:
        tensor = self.activations.restore(saved)
        assert torch.equal(tensor, torch.full_like(tensor, value))

    def restore_all(self, saved: list[SavedTensor]) -> None:
        for value in reversed(range(len(saved))):
            self.restore(saved[value], value)

    def run_pass(self, count: int) -> None:
        """Forward and backward of `count` units."""
        self.restore_all([self.save(value) for value in range(count)])

    def moved(self) -> tuple[int, int]:
        """Inputs written and read, in pages, since the last call."""
        counters = self.trace.counters()
        self.trace.reset()
        keys = ("activations_written_nbytes", "activations_read_nbytes")
        written, read = (counters.get(key, 0) for key in keys)
        return written // PAGE, read // PAGE

    def close(self) -> None:
        self.activations.reset()
        assert not self.heap.used_nbytes
        if self.scratch is not None:
            assert list(self.scratch.records) == ["saved-inputs"]
            self.scratch.close()
        self.host.close()


@pytest.fixture
def disk() -> SimDisk:
    return SimDisk()


@pytest.fixture
def store(tmp_path: Path, disk: SimDisk) -> Iterator[Store]:
    folders = [tmp_path / name for name in "ab"]
    for folder in folders:
        folder.mkdir()
    engine = SimEngine(disk, queue_depth=4, segment_nbytes=PAGE)
    with Store.create(folders, [RecordSpec("w", PAGE)], engine=engine, chunk_nbytes=PAGE) as store:
        yield store


Make = Callable[[int, int], Bench]


@pytest.fixture
def make(store: Store) -> Iterator[Make]:
    benches = []

    def make(pages: int, disk_pages: int) -> Bench:
        benches.append(Bench(store, CpuDevice(device_memory=MIB), pages, disk_pages))
        return benches[-1]

    yield make
    for bench in benches:
        bench.close()


# -- how much goes to disk ---------------------------------------------------------------------


@pytest.mark.parametrize(("count", "pages"), [(8, 8), (8, 7), (8, 3), (8, 1), (1, 1), (9, 2)])
def test_what_memory_does_not_hold_is_written_once_and_read_once(make: Make, count: int, pages: int) -> None:
    bench = make(pages, count)
    for _ in range(3):
        bench.run_pass(count)
        bench.activations.reset()
        assert bench.moved() == (count - pages, count - pages)


def test_those_saved_first_go_to_disk(make: Make) -> None:
    bench = make(3, 8)
    for _ in range(2):
        saved = [bench.save(value) for value in range(8)]
        assert [one.lease is None for one in saved] == [True] * 5 + [False] * 3
        bench.restore_all(saved)
        bench.activations.reset()


def test_from_the_second_step_on_inputs_are_written_as_they_are_saved(make: Make) -> None:
    bench = make(3, 8)
    bench.run_pass(8)
    bench.activations.reset()
    bench.moved()
    saved = []
    for value in range(5):
        saved.append(bench.save(value))
        assert bench.moved() == (1, 0)
    saved += [bench.save(value) for value in range(5, 8)]
    assert bench.moved() == (0, 0)


def test_memory_that_backward_gives_back_is_read_into_ahead(make: Make) -> None:
    bench = make(3, 8)
    saved = [bench.save(value) for value in range(8)]
    bench.moved()
    for value in (7, 6, 5):
        bench.restore(saved[value], value)
    assert bench.moved() == (0, 3)  # 4, 3 and 2
    assert [one.lease is None for one in saved[:5]] == [True, True, False, False, False]
    bench.restore_all(saved[:5])
    assert bench.moved() == (0, 2)


def test_a_forecast_that_was_too_high_costs_writes_and_no_reads(make: Make) -> None:
    bench = make(4, 8)
    bench.run_pass(8)
    bench.activations.reset()
    bench.moved()
    bench.run_pass(4)
    assert bench.moved() == (4, 0)
    bench.activations.reset()
    bench.run_pass(4)
    assert bench.moved() == (0, 0)


def test_two_forwards_before_their_backwards(make: Make) -> None:
    bench = make(3, 12)
    for order in ((0, 1), (1, 0)):
        both = [[bench.save(10 * index + value) for value in range(5)] for index in range(2)]
        for index in order:
            for value in reversed(range(5)):
                bench.restore(both[index][value], 10 * index + value)
        bench.activations.reset()


# -- what may be saved -------------------------------------------------------------------------


TENSORS = {
    "a scalar": torch.tensor(3.5),
    "no elements": torch.zeros(0, 4),
    "bool": torch.arange(40) % 3 == 0,
    "int64": torch.arange(1500) * 7919,
    "bfloat16": torch.randn(50, 41, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16),
    "complex64": torch.complex(torch.arange(9.0), -torch.arange(9.0)),
    "not contiguous": torch.arange(600.0).view(20, 30).t()[::2],
    "not a number": torch.tensor([float("nan"), float("inf"), -0.0]),
    "three pages": torch.arange(3.0 * NUMEL),
}


def test_every_dtype_and_shape_comes_back_bit_for_bit_from_disk(make: Make) -> None:
    bench = make(3, 64)
    for _ in range(2):
        saved = {}
        for name, tensor in TENSORS.items():
            mutable = tensor.clone(memory_format=torch.preserve_format)
            saved[name] = bench.activations.save(mutable, "unit")
            mutable.zero_()
        assert bench.moved()[0] > 0
        for name, tensor in reversed(TENSORS.items()):
            found = bench.activations.restore(saved[name])
            assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape), name
            as_bytes = [one.contiguous().view(-1).view(torch.uint8) for one in (found, tensor)]
            assert torch.equal(*as_bytes), name
        bench.activations.reset()


# -- what is given up --------------------------------------------------------------------------


def test_dropped_inputs_give_back_memory_and_room_wherever_they_are(make: Make) -> None:
    bench = make(3, 5)
    for _ in range(3):
        saved = [bench.save(value) for value in range(8)]
        for one in (saved[0], saved[7], saved[3], saved[3]):
            bench.activations.drop(one)
        again = [bench.save(value) for value in (20, 21, 22)]
        for value in (22, 21, 20):
            bench.restore(again[value - 20], value)
        for value in (6, 5, 4, 2, 1):
            bench.restore(saved[value], value)
        assert bench.heap.used_nbytes == 0


def test_an_input_of_a_step_that_is_over_is_not_restored(make: Make) -> None:
    bench = make(2, 4)
    saved = [bench.save(value) for value in range(4)]
    bench.activations.reset()
    assert bench.heap.used_nbytes == 0
    with pytest.raises(StateError, match="once, before"):
        bench.activations.restore(saved[0])


def test_others_who_need_memory_get_that_of_inputs(make: Make) -> None:
    bench = make(3, 8)
    saved = [bench.save(value) for value in range(3)]
    lease = bench.activations.lease(2 * PAGE, "a partial gradient")
    bench.restore(saved[2], 2)
    bench.restore(saved[1], 1)
    lease.release()
    bench.restore(saved[0], 0)
    assert bench.activations.free_nbytes() == 3 * PAGE


# -- what does not fit -------------------------------------------------------------------------


def test_without_a_disk_too_many_inputs_are_refused_with_numbers(make: Make) -> None:
    bench = make(3, 0)
    for value in range(3):
        bench.save(value)
    with pytest.raises(CapacityError, match=r"12\.0 KiB.* activations_nbytes.*activations_disk_nbytes"):
        bench.save(3)


def test_more_than_the_disk_has_room_for_is_refused_with_numbers(make: Make) -> None:
    bench = make(2, 3)
    saved = [bench.save(value) for value in range(5)]
    with pytest.raises(CapacityError, match=r"'unit 3'(?s:.*)12,288 bytes\) of 12\.0 KiB"):
        bench.save(5)
    bench.restore_all(saved)


def test_an_input_larger_than_the_memory_is_refused(make: Make) -> None:
    bench = make(2, 8)
    bench.save(0)
    with pytest.raises(CapacityError, match=r"asked for 12\.0 KiB"):
        bench.save(1, 3 * NUMEL)


@pytest.mark.parametrize("sizes", [[1], [PAGE] * 5, [300 * PAGE, PAGE, 70 * PAGE], [9 << 20] * 300])
def test_the_room_for_inputs_is_enough_and_hardly_more(sizes: list[int]) -> None:
    room = room_nbytes(sizes)
    assert Spill.record(room).nbytes == room
    chunk = chunk_nbytes_of(room)
    assert sum(-(-size // chunk) for size in sizes) * chunk == room
    assert room <= sum(sizes) + len(sizes) * max(PAGE, room // 1000)


# -- drives that fail --------------------------------------------------------------------------


def test_a_failed_write_is_told_and_gives_everything_back(make: Make, disk: SimDisk) -> None:
    bench = make(2, 8)
    disk.plan(Fault(len(disk.journal), "EIO", forever=True))
    with pytest.raises(StorageError) as error:
        bench.run_pass(6)
    assert error.value.errno == errno.EIO
    bench.activations.reset()
    assert bench.heap.used_nbytes == 0


def test_a_failed_read_is_told_and_gives_everything_back(make: Make, disk: SimDisk) -> None:
    bench = make(2, 8)
    saved = [bench.save(value) for value in range(6)]
    disk.plan(Fault(len(disk.journal), "EIO", forever=True))
    with pytest.raises(StorageError) as error:
        bench.restore_all(saved)
    assert error.value.errno == errno.EIO
    bench.activations.reset()
    assert bench.heap.used_nbytes == 0
    disk.heal()
    bench.run_pass(6)


def test_a_flipped_bit_on_disk_is_found(make: Make) -> None:
    bench = make(2, 8)
    saved = [bench.save(value) for value in range(6)]
    assert bench.scratch is not None
    engine, buffer = bench.scratch._transfers._engine, bytearray(PAGE)
    for drive in bench.scratch._drives:
        engine.submit("read", drive.file, buffer, 0).wait()
        buffer[100] ^= 1
        engine.submit("write", drive.file, buffer, 0).wait()
    with pytest.raises(CorruptionError, match="record input-"):
        bench.restore_all(saved)


# -- a device that is slow ---------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(30))
def test_no_order_of_a_gpu_s_streams_gives_other_bytes(
    seed: int, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Copies of the device may run long after they were begun: drives neither write nor read before them."""
    gpu = FakeCuda(seed)
    with fake_cuda_device(gpu, monkeypatch, device_memory=MIB) as device:
        bench = Bench(store, device, 3, 8)
        hidden = torch.zeros(NUMEL)
        restored: list[Any] = []
        for _ in range(3):
            with gpu.compute():
                saved = []
                for _ in range(7):
                    saved.append(bench.activations.save(hidden, "unit"))
                    hidden.add_(1)
                dropped = bench.activations.save(hidden, "metric")
                bench.activations.drop(dropped)
                restored += [bench.activations.restore(one) for one in reversed(saved)]
            bench.activations.reset()
        gpu.synchronize()
        wanted = [7 * turn + value for turn in range(3) for value in reversed(range(7))]
        assert [int(tensor[0]) for tensor in restored] == wanted
        assert all(torch.equal(tensor, tensor[:1].expand(NUMEL)) for tensor in restored)
        bench.close()
