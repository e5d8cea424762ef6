"""Hand-made results of a bench: every part present, figures that follow a simple law, no randomness."""

from __future__ import annotations

from offload.machine import DeviceSpeed, DriveSpeed, IoSetting, Machine, SharedSpeed
from offload.probe.results import (
    BenchResult,
    Cell,
    DriveFacts,
    LatencySummary,
    Mode,
    Pattern,
    Sample,
    SustainedPoint,
    SustainedRun,
    Workload,
)
from offload.sizes import GIB, KIB, MIB

BEST = IoSetting(segment_nbytes=MIB, queue_depth=8)
SHARED = IoSetting(segment_nbytes=4 * MIB, queue_depth=8)
BLOCKS = (128 * KIB, 512 * KIB, MIB, 4 * MIB, 8 * MIB)
DEPTHS = (1, 2, 8, 32)
BOUNDS: dict[Pattern, float] = {"read": 3.5e9, "write": 2.4e9, "mixed": 2.9e9}


def drive(path: str = "/mnt/nvme0", device: str = "259:0", *, direct: bool = True) -> DriveFacts:
    return DriveFacts(
        path=path,
        device=device,
        source="/dev/nvme0n1p2",
        file_system="ext4",
        engine="threads",
        engine_reason="uring: a seccomp filter refuses io_uring",
        direct=direct,
        file_nbytes=4 * GIB,
        free_nbytes=812 * GIB,
        verified_nbytes=4 * GIB,
    )


def drive_speed(path: str = "/mnt/nvme0", device: str = "259:0") -> DriveSpeed:
    return DriveSpeed(
        path=path,
        device=device,
        file_system="ext4",
        engine="threads",
        direct=True,
        setting=BEST,
        read_bytes_per_s=3.41e9,
        write_bytes_per_s=2.31e9,
        mixed_bytes_per_s=2.8e9,
        cpu_s_per_gb=0.051,
    )


def cell(
    pattern: Pattern,
    block_nbytes: int,
    depth: int,
    drives: tuple[int, ...] = (0,),
    *,
    latency: bool = False,
    mode: Mode = "bandwidth",
) -> Cell:
    """Bandwidth that saturates with the bytes in flight: bound x n / (n + 1 MiB)."""
    in_flight = block_nbytes * depth
    rate = len(drives) * BOUNDS[pattern] * in_flight / (in_flight + MIB)
    flush_s = 0.0 if pattern == "read" else 0.001
    samples = tuple(
        Sample(nbytes=GIB, elapsed_s=GIB / (rate * share), flush_s=flush_s, cpu_s=0.05)
        for share in (0.97, 1.0, 1.02)
    )
    p50_s = 80e-6 + in_flight / BOUNDS[pattern]
    summary = LatencySummary(
        num_operations=4096, p50_s=p50_s, p99_s=1.7 * p50_s, p999_s=4 * p50_s, max_s=9 * p50_s
    )
    setting = IoSetting(segment_nbytes=block_nbytes, queue_depth=depth)
    workload = Workload(pattern=pattern, setting=setting, drives=drives, mode=mode)
    return Cell(workload=workload, samples=samples, latency=summary if latency else None)


def machine(num_drives: int = 1, *, device: bool = True) -> Machine:
    return Machine(
        measured_at="2026-11-21T14:40:00+00:00",
        cpu="Example 9000 16-Core",
        num_cores=16,
        memory_nbytes=128 * GIB,
        drives=tuple(drive_speed(f"/mnt/nvme{index}", f"259:{index}") for index in range(num_drives)),
        together=SharedSpeed(setting=SHARED, read_bytes_per_s=6.7e9, write_bytes_per_s=4.4e9)
        if num_drives > 1
        else None,
        memory_bytes_per_s=31.4e9,
        crc32c_bytes_per_s=12.9e9,
        device=DeviceSpeed(
            name="Example GPU 24GB",
            memory_nbytes=24 * GIB,
            pinned_to_device_bytes_per_s=25.1e9,
            device_to_pinned_bytes_per_s=26.2e9,
            both_ways_bytes_per_s=43e9,
            pageable_to_device_bytes_per_s=9.1e9,
            device_to_pageable_bytes_per_s=8.4e9,
        )
        if device
        else None,
    )


def sustained(drive_index: int = 0) -> SustainedRun:
    """Fast until a cache of 60 GB is full, then slow."""
    points = []
    written = 0
    for second in range(1, 61):
        rate = 2.3e9 if written < 60e9 else 0.9e9 + 0.1e9 * (second % 3)
        written += int(rate)
        points.append(SustainedPoint(at_s=float(second), nbytes=int(rate), bytes_per_s=rate))
    return SustainedRun(
        drive=drive_index,
        points=tuple(points),
        first_bytes_per_s=2.3e9,
        last_bytes_per_s=1.0e9,
        drop_at_nbytes=62_100_000_000,
    )


def full_result() -> BenchResult:
    """Two drives, a full sweep of each and of both, latencies, a long run, a GPU, notes."""
    patterns: tuple[Pattern, ...] = ("read", "write", "mixed")
    cells = [
        cell(pattern, block, depth, group, latency=len(group) == 1 and block == MIB and pattern != "mixed")
        for group in ((0,), (1,), (0, 1))
        for pattern in patterns
        for block in BLOCKS
        for depth in DEPTHS
    ]
    cells += [
        cell(pattern, 4 * KIB, 1, (index,), latency=True, mode="latency")
        for index in (0, 1)
        for pattern in ("read", "write")
    ]
    return BenchResult(
        drives=(drive(), drive("/mnt/nvme1", "259:1")),
        cells=tuple(cells),
        sustained=(sustained(),),
        machine=machine(2),
        notes=("/mnt/nvme1 was busy: 2 % of its time went to other programs",),
    )


def small_result(*, direct: bool = True) -> BenchResult:
    """One drive, one block size, two depths, nothing else."""
    return BenchResult(
        drives=(drive(direct=direct),),
        cells=tuple(cell(pattern, MIB, depth) for pattern in ("read", "write") for depth in (1, 8)),
        sustained=(),
        machine=machine(1, device=False),
    )
