"""Opening a device by name, and what the stand-in's strict mode catches: every race of a GPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from offload.buffers import POISON, Arena, Budget, Lease
from offload.device import CpuDevice, DeviceArena, open_device
from offload.errors import PlanError, StateError
from offload.sizes import GIB, KIB, MIB
from offload.specs import Tier

NUMEL = 100
SLOT_NBYTES = 4 * KIB
VALUES = torch.arange(NUMEL, dtype=torch.float32)
POISONED = torch.full((NUMEL * 4,), POISON, dtype=torch.uint8).view(torch.float32)


class Bench:
    def __init__(self, device: CpuDevice) -> None:
        self.device = device
        self.host: Arena = device.host_arena(Budget(Tier.HOST, MIB), MIB)
        self.arena: DeviceArena = device.arena(MIB)
        self.host_pool = self.host.pool("host", [SLOT_NBYTES] * 4)
        self.pool = self.arena.pool("device", [SLOT_NBYTES])

    def on_host(self, values: torch.Tensor) -> tuple[Lease, torch.Tensor]:
        lease = self.host_pool.lease(SLOT_NBYTES, "layer 0 weights")
        tensor = self.device.host_tensor(self.host, lease, values.dtype, NUMEL)
        tensor.copy_(values)
        return lease, tensor

    def on_device(self) -> tuple[Lease, torch.Tensor]:
        lease = self.pool.lease(SLOT_NBYTES, "layer 0 weights")
        return lease, self.arena.tensor(lease, torch.float32, NUMEL)


@pytest.fixture
def bench() -> Iterator[Bench]:
    with CpuDevice(device_memory=MIB, strict=True) as device:
        bench = Bench(device)
        yield bench
        bench.host.close()


def test_reading_a_target_before_its_upload_is_waited_for_gives_poison(bench: Bench) -> None:
    (_, source), (_, target) = bench.on_host(VALUES), bench.on_device()
    event = bench.device.upload(source, target)
    assert torch.equal(target, POISONED)
    bench.device.wait_on_compute(event)
    assert torch.equal(target, VALUES)


def test_changing_a_source_before_its_upload_is_waited_for_changes_the_upload(bench: Bench) -> None:
    (_, source), (_, target) = bench.on_host(VALUES), bench.on_device()
    event = bench.device.upload(source, target)
    source.zero_()
    event.wait()
    assert torch.equal(target, torch.zeros(NUMEL))


def test_compute_into_a_slot_without_a_claim_changes_the_download(bench: Bench) -> None:
    (_, host), (lease, gradient) = bench.on_host(VALUES), bench.on_device()
    gradient.fill_(1)
    arrived = bench.device.download(gradient, host)
    bench.arena.release_after(lease, arrived)
    lease, gradient = bench.on_device()
    gradient.zero_()
    arrived.wait()
    assert torch.equal(host, torch.zeros(NUMEL))


def test_releasing_host_bytes_under_an_upload_raises(bench: Bench) -> None:
    (lease, source), (_, target) = bench.on_host(VALUES), bench.on_device()
    event = bench.device.upload(source, target)
    with pytest.raises(StateError, match=r"layer 0 weights.*while 1 copies of it are under way \(upload\)"):
        lease.release()
    event.wait()
    lease.release()


def test_releasing_device_bytes_under_a_download_raises(bench: Bench) -> None:
    (_, host), (lease, tensor) = bench.on_host(VALUES), bench.on_device()
    event = bench.device.download(tensor, host)
    with pytest.raises(StateError, match="use release_after"):
        lease.release()
    event.wait()
    lease.release()


def test_releasing_device_bytes_after_another_copys_event_raises(bench: Bench) -> None:
    (_, host), (lease, tensor) = bench.on_host(VALUES), bench.on_device()
    bench.device.upload(host, tensor)
    with pytest.raises(StateError, match=r"under way \(upload\)"):
        bench.arena.release_after(lease, bench.device.record_compute())


def test_a_release_after_the_first_of_several_copies_raises(bench: Bench) -> None:
    (_, first), (_, second) = bench.on_host(VALUES), bench.on_host(VALUES)
    lease, tensor = bench.on_device()
    early = bench.device.download(tensor, first)
    bench.device.download(tensor, second)
    with pytest.raises(StateError, match="are under way"):
        bench.arena.release_after(lease, early)


def test_a_release_after_the_last_of_several_copies_covers_them_all(bench: Bench) -> None:
    (_, first), (_, second) = bench.on_host(VALUES), bench.on_host(VALUES)
    lease, tensor = bench.on_device()
    tensor.fill_(5)
    events = [bench.device.download(tensor, first), bench.device.download(tensor, second)]
    bench.arena.release_after(lease, events[-1])
    events[-1].wait()
    assert torch.equal(first, torch.full((NUMEL,), 5.0))
    assert torch.equal(second, first)


def test_released_bytes_are_poisoned_on_both_sides(bench: Bench) -> None:
    (host_lease, host), (lease, tensor) = bench.on_host(VALUES), bench.on_device()
    bench.device.upload(host, tensor).wait()
    host_lease.release()
    bench.arena.release_after(lease, bench.device.record_compute())
    assert torch.equal(host, POISONED)
    assert torch.equal(tensor, POISONED)


def test_closing_the_device_ends_its_copies() -> None:
    with CpuDevice(device_memory=MIB, strict=True) as device:
        bench = Bench(device)
        (_, host), (_, tensor) = bench.on_host(VALUES), bench.on_device()
        tensor.fill_(3)
        event = device.download(tensor, host)
    assert event.done()
    assert torch.equal(host, torch.full((NUMEL,), 3.0))
    bench.host.close()


def test_without_strict_a_copy_is_done_when_its_call_returns() -> None:
    with CpuDevice(device_memory=MIB, strict=False) as device:
        bench = Bench(device)
        (lease, host), (_, tensor) = bench.on_host(VALUES), bench.on_device()
        assert device.upload(host, tensor).done()
        lease.release()
        assert torch.equal(tensor, VALUES)
        bench.host.close()


@pytest.mark.parametrize(("value", "strict"), [("1", True), ("0", False), (None, False)])
def test_the_environment_turns_strict_on(
    monkeypatch: pytest.MonkeyPatch, value: str | None, strict: bool
) -> None:
    monkeypatch.delenv("OFFLOAD_DEBUG", raising=False)
    if value is not None:
        monkeypatch.setenv("OFFLOAD_DEBUG", value)
    with CpuDevice(device_memory=MIB) as device:
        bench = Bench(device)
        (_, host), (_, tensor) = bench.on_host(VALUES), bench.on_device()
        assert device.upload(host, tensor).done() is not strict
        bench.host.close()


# Opening


def test_cpu_opens_the_stand_in() -> None:
    for name in ("cpu", torch.device("cpu")):
        with open_device(name, device_memory=MIB) as device:
            assert isinstance(device, CpuDevice)
            assert device.torch_device == torch.device("cpu")
            assert device.budget.limit_nbytes == MIB


def test_no_name_opens_the_stand_in_where_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with open_device(None, device_memory=MIB) as device:
        assert isinstance(device, CpuDevice)


@pytest.mark.parametrize("name", ["cuda", "cuda:0", torch.device("cuda", 1)])
def test_cuda_without_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch, name: str | torch.device) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(PlanError, match=r"'cuda.*sees no CUDA device; check nvidia-smi"):
        open_device(name, device_memory=MIB)


def test_a_gpu_that_is_not_there_is_refused_with_the_ones_that_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(PlanError, match=r"'cuda:5' was asked for, but torch sees 2: cuda:0 to cuda:1"):
        open_device("cuda:5", device_memory=MIB)


@pytest.mark.parametrize("name", ["gpu", "", "meta", "mps"])
def test_other_devices_are_refused(name: str) -> None:
    with pytest.raises(PlanError, match="cpu, cuda or cuda:0"):
        open_device(name, device_memory=MIB)


def test_a_device_arena_costs_nothing_until_it_is_used() -> None:
    with CpuDevice(device_memory=64 * GIB) as device:
        arena = device.arena(GIB)
        assert arena.free_nbytes == GIB
        # 1 GiB written would take seconds and fail on a small machine; 4 KiB is all that is.
        lease = arena.pool("slots", [GIB]).lease(4 * KIB, "a")
        arena.tensor(lease, torch.uint8, 4 * KIB).fill_(1)
