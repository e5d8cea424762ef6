"""The CUDA device on a real GPU: what only a driver can show. The rules are in tests/device."""

from __future__ import annotations

import ctypes
import mmap
import threading
from collections.abc import Iterator

import pytest
import torch

from offload.buffers import Budget
from offload.device import CudaDevice, open_device
from offload.errors import CapacityError
from offload.sizes import GIB, MIB
from offload.specs import Tier

pytestmark = pytest.mark.gpu

SLOT_NBYTES = 32 * MIB
NUMEL = SLOT_NBYTES // 4
BUDGET_NBYTES = 256 * MIB
# About 60 ms of a GPU's clock: long enough that whoever does not wait comes first.
SLOW_CYCLES = 100_000_000


@pytest.fixture
def device(cuda: torch.device) -> Iterator[CudaDevice]:
    with CudaDevice(0, device_memory=BUDGET_NBYTES) as device:
        yield device


class Bench:
    def __init__(self, device: CudaDevice) -> None:
        self.host = device.host_arena(Budget(Tier.HOST, BUDGET_NBYTES), 4 * SLOT_NBYTES)
        self.arena = device.arena(4 * SLOT_NBYTES)
        self.pool = self.arena.pool("device", [SLOT_NBYTES] * 2)
        host_pool = self.host.pool("host", [SLOT_NBYTES] * 4)
        self.sources = []
        for index in range(4):
            lease = host_pool.lease(SLOT_NBYTES, f"source {index}")
            self.sources.append(device.host_tensor(self.host, lease, torch.float32, NUMEL).fill_(index + 1))


@pytest.fixture
def bench(device: CudaDevice) -> Iterator[Bench]:
    bench = Bench(device)
    yield bench
    bench.arena.close()
    bench.host.close()


def slow_compute() -> None:
    torch.cuda._sleep(SLOW_CYCLES)


def test_cuda_opens_the_gpu(cuda: torch.device) -> None:
    for name in ("cuda", "cuda:0", None):
        with open_device(name, device_memory=BUDGET_NBYTES) as device:
            assert device.torch_device == torch.device("cuda", 0)


def test_host_memory_is_pinned_in_place_and_unpinned_at_close(device: CudaDevice) -> None:
    with device.host_arena(Budget(Tier.HOST, MIB), MIB) as arena:
        tensor = torch.frombuffer(arena.memory, dtype=torch.uint8)
        assert arena.pinned
        assert tensor.data_ptr() == arena.address
        assert tensor.is_pinned()
    assert not tensor.is_pinned()


def test_a_refused_registration_leaves_no_pending_error(
    device: CudaDevice, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Memory that is registered already cannot be registered again: a refusal without a full machine.
    pages = mmap.mmap(-1, MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    address = ctypes.addressof(ctypes.c_char.from_buffer(pages))
    torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(address, MIB, 0))
    monkeypatch.setattr("offload.buffers.arena.map_pages", lambda nbytes: pages)
    with device.host_arena(Budget(Tier.HOST, MIB), MIB) as arena:
        assert not arena.pinned
        assert "cannot be pinned" in caplog.text
        assert torch.ones(10, device="cuda").sum().item() == 10
    torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(address))


def test_an_upload_does_not_wait_for_compute(device: CudaDevice, bench: Bench) -> None:
    target = bench.arena.tensor(bench.pool.lease(SLOT_NBYTES, "a"), torch.float32, NUMEL)
    slow_compute()
    computed = device.record_compute()
    uploaded = device.upload(bench.sources[0], target)
    uploaded.wait()
    assert not computed.done(), "the upload waited for compute that it has nothing to do with"


def test_a_slot_given_up_behind_slow_compute_is_not_overwritten_early(
    device: CudaDevice, bench: Bench
) -> None:
    total = torch.zeros(NUMEL, device="cuda")
    for turn in range(12):
        lease = bench.pool.lease(SLOT_NBYTES, f"turn {turn}")
        weights = bench.arena.tensor(lease, torch.float32, NUMEL)
        device.wait_on_compute(device.upload(bench.sources[turn % 4], weights))
        slow_compute()
        total += weights
        bench.arena.release_after(lease, device.record_compute())
    assert torch.equal(total, torch.full_like(total, 30.0))


def test_a_download_waits_for_slow_compute(device: CudaDevice, bench: Bench) -> None:
    tensor = bench.arena.tensor(bench.pool.lease(SLOT_NBYTES, "a"), torch.float32, NUMEL)
    slow_compute()
    tensor.fill_(9)
    device.download(tensor, bench.sources[0]).wait()
    assert bool((bench.sources[0] == 9).all())


def test_compute_claims_a_slot_that_a_download_still_reads(device: CudaDevice, bench: Bench) -> None:
    arrived = []
    for turn in range(4):
        lease = bench.pool.lease(SLOT_NBYTES, f"turn {turn}")
        bench.arena.claim_on_compute(lease)
        tensor = bench.arena.tensor(lease, torch.float32, NUMEL).fill_(turn + 10)
        arrived.append(device.download(tensor, bench.sources[turn]))
        bench.arena.release_after(lease, arrived[-1])
    for turn, event in enumerate(arrived):
        event.wait()
        assert bool((bench.sources[turn] == turn + 10).all())


def test_a_dropped_source_is_not_handed_on_before_it_was_read(device: CudaDevice, bench: Bench) -> None:
    events = []
    for turn, target in enumerate(bench.sources):
        events.append(device.download(torch.full((NUMEL,), turn + 5.0, device="cuda"), target))
        torch.full((NUMEL,), -1.0, device="cuda")
    for turn, event in enumerate(events):
        event.wait()
        assert bool((bench.sources[turn] == turn + 5).all())


def test_conversions_allocate_nothing(device: CudaDevice, bench: Bench) -> None:
    host = bench.sources[0].view(torch.bfloat16)[:NUMEL]
    host.fill_(3)
    tensor = bench.arena.tensor(bench.pool.lease(SLOT_NBYTES, "a"), torch.float32, NUMEL)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    device.wait_on_compute(device.upload(host, tensor))
    device.download(tensor, host).wait()
    assert torch.cuda.max_memory_allocated() == before
    assert bool((host == 3).all())


def test_threads_without_a_current_gpu_copy(device: CudaDevice, bench: Bench) -> None:
    tensor = bench.arena.tensor(bench.pool.lease(SLOT_NBYTES, "a"), torch.float32, NUMEL)
    thread = threading.Thread(target=lambda: device.upload(bench.sources[2], tensor).wait())
    thread.start()
    thread.join()
    assert bool((tensor == 3).all())


def test_saved_inputs_hold_a_bounded_amount_of_device_memory(device: CudaDevice, bench: Bench) -> None:
    hidden = torch.zeros(NUMEL, device="cuda")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    for turn in range(16):
        device.save(hidden, bench.sources[turn % 4])
        hidden += 1
    # Four under way, the one being made, and one whose end torch's allocator has yet to notice.
    assert torch.cuda.max_memory_allocated() - before <= 6 * SLOT_NBYTES
    assert bool((device.restore(bench.sources[3]) == 15).all())


def test_events_and_streams_are_not_made_per_step(device: CudaDevice, bench: Bench) -> None:
    def step() -> None:
        for turn in range(8):
            lease = bench.pool.lease(SLOT_NBYTES, f"turn {turn}")
            weights = bench.arena.tensor(lease, torch.float32, NUMEL)
            device.wait_on_compute(device.upload(bench.sources[turn % 4], weights))
            bench.arena.release_after(lease, device.record_compute())
        torch.cuda.synchronize()
        bench.arena.fences(0, 1)

    step()
    free = device._events.num_free
    for _ in range(5):
        step()
    assert device._events.num_free == free


def test_the_arena_takes_what_it_says_and_gives_it_back(device: CudaDevice) -> None:
    before = torch.cuda.memory_allocated()
    with device.arena(64 * MIB):
        assert torch.cuda.memory_allocated() - before == 64 * MIB
    assert torch.cuda.memory_allocated() == before


def test_a_budget_above_the_gpus_free_memory_is_refused(cuda: torch.device) -> None:
    _, total = torch.cuda.mem_get_info(cuda)
    with pytest.raises(CapacityError, match="device_memory"):
        CudaDevice(0, device_memory=total + GIB)
