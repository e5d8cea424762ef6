"""What every device promises: the same suite for the CPU stand-in, its strict mode and CUDA."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest
import torch

from offload.buffers import Arena, Budget, Lease
from offload.device import CpuDevice, CudaDevice, Device, DeviceArena
from offload.errors import CapacityError, StateError
from offload.sizes import KIB, MIB
from offload.specs import Tier

DEVICE_NBYTES = 64 * MIB
SLOT_NBYTES = 256 * KIB
NUMEL = 1000
WAIT_S = 30.0


def open_cpu() -> Device:
    return CpuDevice(device_memory=DEVICE_NBYTES, strict=False)


def open_strict() -> Device:
    return CpuDevice(device_memory=DEVICE_NBYTES, strict=True)


def open_cuda() -> Device:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return CudaDevice(0, device_memory=DEVICE_NBYTES)


@pytest.fixture(
    params=[
        pytest.param(open_cpu, id="cpu"),
        pytest.param(open_strict, id="strict"),
        pytest.param(open_cuda, id="cuda", marks=pytest.mark.gpu),
    ]
)
def device(request: pytest.FixtureRequest) -> Iterator[Device]:
    with request.param() as device:
        yield device


class Bench:
    """A host arena and a device arena with a few slots each, and tensors over them."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.host_budget = Budget(Tier.HOST, 16 * MIB)
        self.host: Arena = device.host_arena(self.host_budget, 16 * MIB)
        self.arena: DeviceArena = device.arena(32 * MIB)
        self.host_pool = self.host.pool("host", [SLOT_NBYTES] * 8)
        self.pool = self.arena.pool("device", [SLOT_NBYTES] * 2)

    def on_host(self, values: torch.Tensor) -> tuple[Lease, torch.Tensor]:
        lease = self.host_pool.lease(SLOT_NBYTES, "host side")
        tensor = self.device.host_tensor(self.host, lease, values.dtype, values.numel())
        tensor.copy_(values)
        return lease, tensor

    def on_device(self, dtype: torch.dtype = torch.float32, numel: int = NUMEL) -> tuple[Lease, torch.Tensor]:
        lease = self.pool.lease(SLOT_NBYTES, "device side")
        return lease, self.arena.tensor(lease, dtype, numel)

    def put(self, values: torch.Tensor) -> tuple[Lease, torch.Tensor]:
        """A device tensor with these values, which compute sees."""
        host_lease, source = self.on_host(values)
        lease, target = self.on_device(values.dtype, values.numel())
        event = self.device.upload(source, target)
        self.device.wait_on_compute(event)
        event.wait()
        host_lease.release()
        return lease, target

    def get(self, source: torch.Tensor) -> torch.Tensor:
        """The values of a device tensor, by way of a download."""
        lease, target = self.on_host(torch.zeros(source.numel(), dtype=source.dtype))
        self.device.download(source, target).wait()
        values = target.clone()
        lease.release()
        return values


@pytest.fixture
def bench(device: Device) -> Iterator[Bench]:
    bench = Bench(device)
    yield bench
    bench.arena.close()
    bench.host.close()


VALUES = torch.arange(NUMEL, dtype=torch.float32) - 300


# Budgets


def test_an_arena_is_charged_until_it_closes(device: Device) -> None:
    before = device.budget.used_nbytes
    with device.arena(MIB + 1) as arena:
        assert arena.nbytes == MIB + 4 * KIB
        assert device.budget.holders()["device arena"] == arena.nbytes
    assert device.budget.used_nbytes == before
    arena.close()
    assert device.budget.used_nbytes == before


def test_an_arena_over_the_budget_is_refused_by_name(device: Device) -> None:
    before = device.budget.used_nbytes
    with pytest.raises(CapacityError, match="device_memory"):
        device.arena(DEVICE_NBYTES + 1)
    assert device.budget.used_nbytes == before


def test_closing_the_device_closes_its_arenas(device: Device) -> None:
    arena = device.arena(MIB)
    pool = arena.pool("slots", [KIB])
    device.close()
    device.close()
    assert device.budget.used_nbytes == 0
    with pytest.raises(StateError, match="closed"):
        pool.lease(1, "late")


def test_a_host_arena_is_charged_to_the_budget_given(device: Device) -> None:
    budget = Budget(Tier.HOST, MIB)
    with device.host_arena(budget, MIB) as arena:
        assert arena.address % 4096 == 0
        assert budget.holders() == {"host arena": MIB}
    with pytest.raises(CapacityError, match="host_memory"):
        device.host_arena(budget, MIB + 1)


# Tensors


def test_host_tensor_is_the_leased_memory_itself(bench: Bench) -> None:
    lease = bench.host_pool.lease(64, "a")
    tensor = bench.device.host_tensor(bench.host, lease, torch.int32, 4, offset_bytes=16)
    tensor.copy_(torch.tensor([1, 2, 3, 4]))
    assert tensor.data_ptr() == bench.host.address + lease.offset + 16
    assert bytes(bench.host.view(lease, 16, 4)) == (1).to_bytes(4, "little")


def test_device_tensors_of_one_lease_share_its_bytes(bench: Bench) -> None:
    lease, whole = bench.put(torch.arange(8, dtype=torch.float32))
    half = bench.arena.tensor(lease, torch.float32, 4, offset_bytes=16)
    assert half.device == bench.device.torch_device
    assert half.tolist() == [4, 5, 6, 7]
    half.zero_()
    assert whole.tolist() == [0, 1, 2, 3, 0, 0, 0, 0]


def test_an_empty_tensor_may_end_a_lease(bench: Bench) -> None:
    lease = bench.pool.lease(64, "a")
    host_lease = bench.host_pool.lease(64, "a")
    target = bench.arena.tensor(lease, torch.float32, 0, offset_bytes=64)
    source = bench.device.host_tensor(bench.host, host_lease, torch.float32, 0, offset_bytes=64)
    assert target.shape == source.shape == (0,)
    bench.device.upload(source, target).wait()
    bench.device.download(target, source).wait()


@pytest.mark.parametrize(("numel", "offset"), [(17, 0), (16, 4), (1, -4), (1, 2)])
def test_a_tensor_outside_its_lease_or_misaligned_is_refused(bench: Bench, numel: int, offset: int) -> None:
    lease, host_lease = bench.pool.lease(64, "a"), bench.host_pool.lease(64, "a")
    with pytest.raises(ValueError, match=r"not within|not a multiple"):
        bench.arena.tensor(lease, torch.float32, numel, offset)
    with pytest.raises(ValueError, match=r"not within|not a multiple"):
        bench.device.host_tensor(bench.host, host_lease, torch.float32, numel, offset)


def test_a_tensor_of_a_released_lease_is_refused(bench: Bench) -> None:
    lease = bench.pool.lease(64, "a")
    lease.release()
    with pytest.raises(StateError, match="was released"):
        bench.arena.tensor(lease, torch.float32, 1)


def test_a_tensor_of_another_arenas_lease_is_refused(bench: Bench) -> None:
    with (
        bench.device.arena(MIB) as other,
        other.pool("slots", [KIB]).lease(1, "a") as lease,
        pytest.raises(StateError, match="is not of"),
    ):
        bench.arena.tensor(lease, torch.uint8, 1)


def test_an_upload_into_one_slot_leaves_autograd_of_another_alone(bench: Bench) -> None:
    _, weight = bench.put(VALUES)
    weight.requires_grad_()
    loss = (weight * weight).sum()
    bench.put(VALUES)
    loss.backward()
    assert weight.grad is not None
    assert torch.equal(weight.grad.cpu(), 2 * VALUES)


# Copies


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8])
def test_a_round_trip_keeps_every_byte(bench: Bench, dtype: torch.dtype) -> None:
    raw = torch.randint(0, 256, (NUMEL * dtype.itemsize,), dtype=torch.uint8)
    values = raw.view(dtype)
    _, tensor = bench.put(values)
    assert torch.equal(bench.get(tensor).view(torch.uint8), raw)


@pytest.mark.parametrize(
    ("stored", "computed"), [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)]
)
def test_an_upload_converts_exactly_as_torch_does(
    bench: Bench, stored: torch.dtype, computed: torch.dtype
) -> None:
    values = torch.randn(NUMEL).to(stored)
    _, source = bench.on_host(values)
    _, target = bench.on_device(computed)
    bench.device.upload(source, target).wait()
    assert torch.equal(bench.get(target), values.to(computed))


@pytest.mark.parametrize(
    ("computed", "stored"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)]
)
def test_a_download_converts_exactly_as_torch_does(
    bench: Bench, computed: torch.dtype, stored: torch.dtype
) -> None:
    values = torch.randn(NUMEL).to(computed)
    _, source = bench.put(values)
    _, target = bench.on_host(torch.zeros(NUMEL, dtype=stored))
    bench.device.download(source, target).wait()
    assert torch.equal(target, values.to(stored))


def test_a_conversion_larger_than_the_staging_buffers_is_whole(bench: Bench) -> None:
    # 5 MiB of bfloat16 and a bit: two staging buffers of 4 MiB, the second one partly used.
    numel = 5 * MIB // 2 + 7
    values = torch.randn(numel).to(torch.bfloat16)
    host_lease = bench.host.pool("large host", [2 * numel]).lease(2 * numel, "a")
    source = bench.device.host_tensor(bench.host, host_lease, torch.bfloat16, numel)
    source.copy_(values)
    lease = bench.arena.pool("large device", [4 * numel]).lease(4 * numel, "a")
    target = bench.arena.tensor(lease, torch.float32, numel)
    bench.device.wait_on_compute(bench.device.upload(source, target))
    assert torch.equal(target.cpu(), values.float())
    source.zero_()
    bench.device.download(target, source).wait()
    assert torch.equal(source, values)


def test_compute_sees_an_upload_it_waits_for(bench: Bench) -> None:
    _, source = bench.on_host(VALUES)
    _, target = bench.on_device()
    bench.device.wait_on_compute(bench.device.upload(source, target))
    assert torch.equal((target * 2).cpu(), VALUES * 2)


def test_a_download_sees_the_compute_before_it(bench: Bench) -> None:
    _, tensor = bench.put(VALUES)
    for _ in range(20):
        tensor.add_(1)
    _, target = bench.on_host(torch.zeros(NUMEL))
    bench.device.download(tensor, target).wait()
    assert torch.equal(target, VALUES + 20)


def test_compute_may_overwrite_the_source_of_a_download_it_waits_for(bench: Bench) -> None:
    _, tensor = bench.put(VALUES)
    _, target = bench.on_host(torch.zeros(NUMEL))
    event = bench.device.download(tensor, target)
    bench.device.wait_on_compute(event)
    tensor.zero_()
    event.wait()
    assert torch.equal(target, VALUES)


def test_a_download_of_a_tensor_of_no_arena_outlives_it(bench: Bench) -> None:
    _, target = bench.on_host(torch.zeros(NUMEL))
    event = bench.device.download(VALUES.to(bench.device.torch_device) + 1, target)
    event.wait()
    assert torch.equal(target, VALUES + 1)


def test_later_uploads_end_after_earlier_ones(bench: Bench) -> None:
    _, first_source = bench.on_host(VALUES)
    _, second_source = bench.on_host(VALUES + 1)
    (_, first), (_, second) = bench.on_device(), bench.on_device()
    early = bench.device.upload(first_source, first)
    late = bench.device.upload(second_source, second)
    late.wait()
    assert early.done()
    assert torch.equal(bench.get(first), VALUES)


def test_an_event_stays_passed_and_can_be_waited_for_by_any_thread(bench: Bench) -> None:
    _, source = bench.on_host(VALUES)
    _, target = bench.on_device()
    event = bench.device.upload(source, target)
    threads = [threading.Thread(target=event.wait) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    assert event.done()
    for _ in range(200):
        bench.device.record_compute().wait()
    assert event.done()


def test_an_event_that_is_only_polled_passes(bench: Bench) -> None:
    _, source = bench.on_host(VALUES)
    _, target = bench.on_device()
    event = bench.device.upload(source, target)
    while not event.done():
        pass
    assert torch.equal(bench.get(target), VALUES)


# Slots that are given up with an event


def test_an_upload_waits_for_the_download_that_still_reads_its_slot(bench: Bench) -> None:
    lease, tensor = bench.put(VALUES)
    _, target = bench.on_host(torch.zeros(NUMEL))
    arrived = bench.device.download(tensor, target)
    bench.arena.release_after(lease, arrived)
    again = bench.pool.lease(SLOT_NBYTES, "same slot")
    assert again.offset == lease.offset
    _, source = bench.on_host(VALUES + 1)
    bench.device.upload(source, bench.arena.tensor(again, torch.float32, NUMEL)).wait()
    arrived.wait()
    assert torch.equal(target, VALUES)


def test_an_upload_waits_for_the_compute_that_still_reads_its_slot(bench: Bench) -> None:
    lease, tensor = bench.put(VALUES)
    result = torch.zeros(NUMEL, device=bench.device.torch_device)
    for _ in range(50):
        result += tensor
    bench.arena.release_after(lease, bench.device.record_compute())
    _, source = bench.on_host(VALUES * 0)
    for _ in range(2):
        lease, target = bench.on_device()
        bench.device.upload(source, target).wait()
    assert torch.equal(result.cpu(), VALUES * 50)


def test_compute_that_claims_a_slot_waits_for_the_download_that_reads_it(bench: Bench) -> None:
    lease, tensor = bench.put(VALUES)
    _, target = bench.on_host(torch.zeros(NUMEL))
    arrived = bench.device.download(tensor, target)
    bench.arena.release_after(lease, arrived)
    again = bench.pool.lease(SLOT_NBYTES, "same slot")
    assert again.offset == lease.offset
    bench.arena.claim_on_compute(again)
    bench.arena.tensor(again, torch.float32, NUMEL).fill_(-1)
    arrived.wait()
    assert torch.equal(target, VALUES)


def test_release_after_twice_raises(bench: Bench) -> None:
    lease, _ = bench.on_device()
    bench.arena.release_after(lease, bench.device.record_compute())
    with pytest.raises(StateError, match="released already"):
        bench.arena.release_after(lease, bench.device.record_compute())


# Saved inputs


def test_a_saved_tensor_survives_its_original(bench: Bench) -> None:
    original = VALUES.clone().to(bench.device.torch_device)
    lease, host = bench.on_host(torch.zeros(NUMEL))
    bench.device.save(original, host)
    original.zero_()
    restored = bench.device.restore(host)
    lease.release()
    assert restored.device == bench.device.torch_device
    assert torch.equal(restored.cpu(), VALUES)


def test_a_host_slot_can_be_saved_into_again_after_its_restore(bench: Bench) -> None:
    _, host = bench.on_host(torch.zeros(NUMEL))
    restored = []
    for turn in range(10):
        bench.device.save((VALUES + turn).to(bench.device.torch_device), host)
        restored.append(bench.device.restore(host))
    for turn, tensor in enumerate(restored):
        assert torch.equal(tensor.cpu(), VALUES + turn)


# What a copy may be


BAD_COPIES: dict[str, Callable[[Device, torch.Tensor, torch.Tensor], object]] = {
    "upload from device memory": lambda device, host, on_device: device.upload(on_device, on_device),
    "upload outside an arena": lambda device, host, on_device: device.upload(host, on_device.clone()),
    "upload of another length": lambda device, host, on_device: device.upload(host[1:], on_device),
    "upload not 1-D": lambda device, host, on_device: device.upload(host.view(10, 100), on_device),
    "upload with strides": lambda device, host, on_device: device.upload(host[::2], on_device[:500]),
    "download into device memory": lambda device, host, on_device: device.download(on_device, on_device),
    "download of another length": lambda device, host, on_device: device.download(on_device, host[1:]),
    "save into device memory": lambda device, host, on_device: device.save(on_device, on_device),
    "restore from device memory": lambda device, host, on_device: device.restore(on_device),
}


@pytest.mark.parametrize("copy", BAD_COPIES.values(), ids=BAD_COPIES.keys())
def test_a_copy_that_no_gpu_could_do_is_refused(
    bench: Bench, copy: Callable[[Device, torch.Tensor, torch.Tensor], object]
) -> None:
    _, host = bench.on_host(VALUES)
    _, on_device = bench.on_device()
    with pytest.raises(ValueError, match=r"must be host memory|must lie in an arena|copy"):
        copy(bench.device, host, on_device)


def test_threads_copy_at_once(bench: Bench) -> None:
    """Two threads stream through two slots in both directions; every value arrives."""
    barrier = threading.Barrier(2)
    wrong: list[str] = []

    def work(mark: int) -> None:
        barrier.wait(WAIT_S)
        host_lease, source = bench.on_host(VALUES + mark)
        _, target = bench.on_host(torch.zeros(NUMEL))
        for turn in range(50):
            lease, tensor = bench.on_device()
            bench.device.wait_on_compute(bench.device.upload(source, tensor))
            arrived = bench.device.download(tensor, target)
            bench.arena.release_after(lease, arrived)
            arrived.wait()
            if not torch.equal(target, VALUES + mark):
                wrong.append(f"thread {mark} turn {turn}")
        host_lease.release()

    threads = [threading.Thread(target=work, args=(mark,)) for mark in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
        assert not thread.is_alive()
    assert wrong == []
