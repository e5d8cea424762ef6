"""The CUDA device on a GPU made of queues: no order in which its streams may run gives wrong bytes."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import torch
from fake_cuda import FakeCuda, fake_cuda_device

from offload.buffers import Arena, Budget, Lease
from offload.device import CudaDevice, DeviceArena
from offload.errors import CapacityError, StateError
from offload.sizes import KIB, MIB
from offload.specs import Tier

NUMEL = 3000  # of float32: three staging chunks of the fake
SLOT_NBYTES = 16 * KIB
SEEDS = range(40)


class Bench:
    """The device, arenas and pools of two device slots and four host slots."""

    def __init__(self, gpu: FakeCuda, device: CudaDevice) -> None:
        self.gpu = gpu
        self.device = device
        self.host: Arena = device.host_arena(Budget(Tier.HOST, MIB), MIB)
        self.arena: DeviceArena = device.arena(MIB)
        self.pool = self.arena.pool("device", [SLOT_NBYTES] * 2)
        self.host_pool = self.host.pool("host", [SLOT_NBYTES] * 8)

    def on_host(self, value: float, dtype: torch.dtype = torch.float32) -> tuple[Lease, torch.Tensor]:
        lease = self.host_pool.lease(SLOT_NBYTES, "host")
        tensor = self.device.host_tensor(self.host, lease, dtype, NUMEL)
        tensor.fill_(value)
        return lease, tensor

    def on_device(self, dtype: torch.dtype = torch.float32) -> tuple[Lease, torch.Tensor]:
        lease = self.pool.lease(SLOT_NBYTES, "device")
        return lease, self.arena.tensor(lease, dtype, NUMEL)


@pytest.fixture(params=SEEDS)
def bench(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    gpu = FakeCuda(request.param)
    with fake_cuda_device(gpu, monkeypatch, device_memory=4 * MIB) as device:
        bench = Bench(gpu, device)
        yield bench
        bench.arena.close()
        bench.host.close()


@pytest.fixture
def gpu() -> FakeCuda:
    return FakeCuda()


STORED = pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])


@STORED
def test_streaming_through_two_slots_is_exact(bench: Bench, stored: torch.dtype) -> None:
    """Weights in, a sum on compute, the slot given up behind compute, as a forward pass does."""
    sources = [bench.on_host(value, stored)[1] for value in (1, 2, 4, 8)]
    total = torch.zeros(NUMEL)
    with bench.gpu.compute():
        for turn in range(12):
            lease, weights = bench.on_device()
            bench.device.wait_on_compute(bench.device.upload(sources[turn % 4], weights))
            total.add_(weights)
            bench.arena.release_after(lease, bench.device.record_compute())
    bench.device.record_compute().wait()
    assert torch.equal(total, torch.full((NUMEL,), 45.0))


@STORED
def test_gradients_leave_through_one_slot_exactly(bench: Bench, stored: torch.dtype) -> None:
    """Compute fills a slot, a download empties it, compute fills it again, as a backward pass does."""
    targets = [bench.on_host(-1, stored)[1] for _ in range(6)]
    arrived = []
    for turn, target in enumerate(targets):
        lease, gradient = bench.on_device()
        bench.arena.claim_on_compute(lease)
        with bench.gpu.compute():
            gradient.zero_()
            gradient.add_(turn + 1)
            arrived.append(bench.device.download(gradient, target))
        bench.arena.release_after(lease, arrived[-1])
    for turn, (event, target) in enumerate(zip(arrived, targets, strict=True)):
        event.wait()
        assert torch.equal(target, torch.full((NUMEL,), turn + 1, dtype=stored))


@STORED
def test_an_upload_never_overtakes_the_download_of_its_slot(bench: Bench, stored: torch.dtype) -> None:
    _, down = bench.on_host(-1, stored)
    _, up = bench.on_host(7, stored)
    lease, tensor = bench.on_device()
    with bench.gpu.compute():
        tensor.fill_(3)
        arrived = bench.device.download(tensor, down)
    bench.arena.release_after(lease, arrived)
    lease, tensor = bench.on_device()
    uploaded = bench.device.upload(up, tensor)
    arrived.wait()
    assert torch.equal(down, torch.full((NUMEL,), 3, dtype=stored))
    uploaded.wait()
    assert torch.equal(tensor, torch.full((NUMEL,), 7.0))


def test_uploads_into_the_same_bytes_end_in_the_order_they_were_begun(bench: Bench) -> None:
    (_, narrow), (_, wide) = bench.on_host(1, torch.bfloat16), bench.on_host(2)
    _, target = bench.on_device()
    for source, other in ((narrow, wide), (wide, narrow)):
        bench.device.upload(other, target)
        bench.device.upload(source, target).wait()
        assert torch.equal(target, source.float())


def test_conversions_of_both_directions_keep_apart(bench: Bench) -> None:
    (_, up), (_, down) = bench.on_host(5, torch.bfloat16), bench.on_host(-1, torch.bfloat16)
    (_, first), (_, second) = bench.on_device(), bench.on_device()
    with bench.gpu.compute():
        second.fill_(9)
        events = [bench.device.upload(up, first), bench.device.download(second, down)]
    for event in events:
        event.wait()
    assert torch.equal(first, torch.full((NUMEL,), 5.0))
    assert torch.equal(down, torch.full((NUMEL,), 9, dtype=torch.bfloat16))


def test_saved_inputs_survive_in_place_changes_and_reuse_of_their_host_bytes(bench: Bench) -> None:
    hosts = [bench.on_host(-1)[1] for _ in range(6)]
    hidden, restored = torch.zeros(NUMEL), []
    with bench.gpu.compute():
        for _ in range(2):
            for host in hosts:
                bench.device.save(hidden, host)
                hidden.add_(1)
            restored += [bench.device.restore(host) for host in reversed(hosts)]
    bench.gpu.synchronize()
    assert [int(tensor[0]) for tensor in restored] == [5, 4, 3, 2, 1, 0, 11, 10, 9, 8, 7, 6]
    assert all(torch.equal(tensor, tensor[:1].expand(NUMEL)) for tensor in restored)


def test_events_are_recycled_not_made_per_step(bench: Bench) -> None:
    _, source = bench.on_host(1)

    def step() -> None:
        for _ in range(4):
            lease, weights = bench.on_device()
            bench.device.wait_on_compute(bench.device.upload(source, weights))
            bench.arena.release_after(lease, bench.device.record_compute())
        bench.gpu.synchronize()

    step()
    made = bench.gpu.num_events
    streams = len(bench.gpu.streams)
    for _ in range(5):
        step()
    assert bench.gpu.num_events == made
    assert len(bench.gpu.streams) == streams


def test_an_event_still_held_is_not_recycled(bench: Bench) -> None:
    held = bench.device.record_compute()
    held.wait()
    with bench.gpu.compute():
        torch.zeros(1).add_(1)
        later = [bench.device.record_compute() for _ in range(5)]
    assert held.done()
    assert len({id(event.raw) for event in (held, *later)}) == 6  # type: ignore[attr-defined]


def test_a_source_of_torchs_allocator_is_kept_for_the_copy_stream(bench: Bench) -> None:
    _, target = bench.on_host(-1)
    with bench.gpu.compute():
        bench.device.download(torch.zeros(NUMEL), target).wait()
        _, tensor = bench.on_device()
        bench.device.download(tensor, target).wait()
    assert bench.gpu.recorded_streams == [bench.device._downloads]


# Memory


def test_host_memory_is_registered_in_full_and_unregistered_at_close(
    gpu: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    with fake_cuda_device(gpu, monkeypatch, device_memory=MIB) as device:
        arena = device.host_arena(Budget(Tier.HOST, MIB), 5000)
        assert arena.pinned
        assert gpu.registered == {arena.address: 8192}
        arena.close()
        assert gpu.registered == {}


def test_a_driver_that_refuses_to_pin_is_logged_once(
    gpu: FakeCuda, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    gpu.refuse_to_pin = True
    budget = Budget(Tier.HOST, MIB)
    with (
        caplog.at_level(logging.WARNING),
        fake_cuda_device(gpu, monkeypatch, device_memory=MIB) as device,
        device.host_arena(budget, 8 * KIB) as first,
        device.host_arena(budget, 8 * KIB) as second,
    ):
        assert not first.pinned
        assert not second.pinned
    assert len(caplog.records) == 1
    assert "8.0 KiB of host memory cannot be pinned (error 2)" in caplog.text


def test_more_than_the_gpu_has_free_is_refused_with_numbers(
    gpu: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu.free_nbytes = 10 * MIB
    with (
        pytest.raises(CapacityError, match=r"12\.0 MiB .*has 10\.0 MiB .*of 1\.0 GiB free"),
        fake_cuda_device(gpu, monkeypatch, device_memory=12 * MIB),
    ):
        pass


def test_what_torch_caches_counts_as_free(gpu: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu.free_nbytes, gpu.cached_nbytes = 10 * MIB, 2 * MIB
    with fake_cuda_device(gpu, monkeypatch, device_memory=12 * MIB) as device:
        assert device.budget.limit_nbytes == 12 * MIB


def test_staging_is_charged_to_the_budget_until_close(gpu: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    with fake_cuda_device(gpu, monkeypatch, device_memory=MIB) as device:
        assert device.budget.holders() == {"dtype conversion": 16 * KIB}
    assert device.budget.used_nbytes == 0
    with (
        pytest.raises(CapacityError, match="dtype conversion"),
        fake_cuda_device(gpu, monkeypatch, device_memory=KIB),
    ):
        pass


def test_a_closed_device_refuses_copies(gpu: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    with fake_cuda_device(gpu, monkeypatch, device_memory=4 * MIB) as device:
        bench = Bench(gpu, device)
        _, host = bench.on_host(1)
        _, target = bench.on_device()
    for copy in (device.upload, device.download):
        with pytest.raises(StateError, match="is closed"):
            copy(host, target)
    bench.host.close()


def test_an_arena_the_allocator_cannot_make_gives_the_charge_back(
    gpu: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    with fake_cuda_device(gpu, monkeypatch, device_memory=MIB) as device:

        def no_memory(nbytes: int) -> torch.Tensor:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 4 KiB.\nmore")

        monkeypatch.setattr(device, "_allocate", no_memory)
        with pytest.raises(CapacityError, match=r"in one piece: CUDA out of memory\..*4 KiB"):
            device.arena(4 * KIB)
        assert device.budget.holders() == {"dtype conversion": 16 * KIB}


def test_closing_an_arena_waits_for_the_copies_into_it(
    gpu: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    with fake_cuda_device(gpu, monkeypatch, device_memory=4 * MIB) as device:
        bench = Bench(gpu, device)
        bench.device.upload(bench.on_host(1)[1], bench.on_device()[1])
        bench.arena.close()
        assert not any(stream.queue for stream in gpu.streams)
        bench.host.close()
