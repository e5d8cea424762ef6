"""Copies to a GPU, on a stand-in: what is copied where, and the arithmetic of the figures."""

from __future__ import annotations

import sys
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest

from offload.errors import CapacityError
from offload.probe import copies
from offload.sizes import MIB


class FakeTorch:
    """Streams that take milliseconds for each MiB; up is twice as fast as down, pageable slowest."""

    def __init__(self) -> None:
        self.uint8 = "uint8"
        self.OutOfMemoryError = RuntimeError
        self.copied: list[tuple[str, str]] = []
        self.host_s = 0.0
        self.current: Stream | None = None
        self.streams: list[Stream] = []
        self.cuda = SimpleNamespace(
            is_available=lambda: True,
            device=lambda index: nullcontext(),
            Stream=self.new_stream,
            Event=lambda enable_timing: Event(enable_timing),
            stream=self.stream,
            synchronize=self.synchronize,
            get_device_properties=lambda gpu: SimpleNamespace(name="GPU", total_memory=80 << 30),
        )

    def device(self, kind: str, index: int) -> str:
        return f"{kind}:{index}"

    def ones(self, nbytes: int, *, dtype: str, device: str = "host") -> Tensor:
        return Tensor(self, nbytes, device)

    def new_stream(self, gpu: str) -> Stream:
        self.streams.append(Stream())
        return self.streams[-1]

    def synchronize(self, gpu: str) -> None:
        """Whatever comes next begins after all that was."""
        for stream in self.streams:
            stream.at_ms = max(other.at_ms for other in self.streams)
            stream.idle = True

    @contextmanager
    def stream(self, stream: Stream) -> Any:
        self.current = stream
        yield
        self.current = None


class Stream:
    def __init__(self) -> None:
        self.at_ms = 0.0
        self.idle = True

    def wait_event(self, event: Event) -> None:
        self.at_ms = max(self.at_ms, event.at_ms)


class Event:
    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing
        self.at_ms = -1.0

    def record(self, stream: Stream) -> None:
        # A stream that slept takes a moment: another must wait for it, to begin at the same time.
        stream.at_ms += 1.0 if stream.idle else 0.0
        self.at_ms = stream.at_ms

    def elapsed_time(self, end: Event) -> float:
        return end.at_ms - self.at_ms


class Tensor:
    def __init__(self, torch: FakeTorch, nbytes: int, where: str) -> None:
        self.torch, self.nbytes, self.where = torch, nbytes, where

    def pin_memory(self) -> Tensor:
        return Tensor(self.torch, self.nbytes, "pinned")

    def copy_(self, source: Tensor, non_blocking: bool = False) -> None:
        self.torch.copied.append((source.where, self.where))
        assert non_blocking == ("pinned" in (source.where, self.where))
        milliseconds = self.nbytes / MIB * (1 if source.where == "pinned" else 2)
        if self.torch.current is None:
            self.torch.host_s += 4 * milliseconds / 1e3
        else:
            self.torch.current.at_ms += milliseconds
            self.torch.current.idle = False


@pytest.fixture
def torch(monkeypatch) -> FakeTorch:
    fake = FakeTorch()
    monkeypatch.setitem(sys.modules, "torch", fake)
    monkeypatch.setattr(copies.time, "perf_counter", lambda: fake.host_s)
    return fake


def test_each_direction_has_its_rate_and_both_share_the_time(torch):
    speed = copies.device_speed(copy_nbytes=10 * MIB, rounds=3)
    assert speed is not None
    assert (speed.name, speed.memory_nbytes) == ("GPU", 80 << 30)
    assert speed.pinned_to_device_bytes_per_s == pytest.approx(MIB / 1e-3)
    assert speed.device_to_pinned_bytes_per_s == pytest.approx(MIB / 2e-3)
    # At once: twice the bytes in the time of the slower.
    assert speed.both_ways_bytes_per_s == pytest.approx(2 * MIB / 2e-3)
    assert speed.pageable_to_device_bytes_per_s == pytest.approx(MIB / 8e-3)
    assert speed.device_to_pageable_bytes_per_s == pytest.approx(MIB / 8e-3)
    kinds = {("pinned", "cuda:0"), ("cuda:0", "pinned"), ("host", "cuda:0"), ("cuda:0", "host")}
    assert set(torch.copied) == kinds


def test_no_gpu_is_none(torch):
    torch.cuda.is_available = lambda: False
    assert copies.device_speed() is None


def test_no_torch_is_none(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert copies.device_speed() is None


def test_what_the_driver_refuses_is_told(torch):
    def refuse(*_, **__):
        raise RuntimeError("CUDA error: out of memory\nmore lines")

    torch.ones = refuse
    with pytest.raises(CapacityError, match="GPU 0 cannot be measured: CUDA error: out of memory; free"):
        copies.device_speed()


@pytest.mark.gpu
def test_a_real_gpu_has_rates(cuda):
    speed = copies.device_speed(copy_nbytes=64 * MIB, rounds=3)
    assert speed is not None
    assert min(speed.pinned_to_device_bytes_per_s, speed.device_to_pinned_bytes_per_s) > 1e9
    assert speed.memory_nbytes > 1 << 30
