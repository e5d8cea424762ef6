"""What a measurement of drives yields: plain frozen data, between those who measure and those who print.

A `Sample` is one timed run of one workload; a `Cell` gathers the samples of one workload; a
`BenchResult` is everything one `offload bench` found; its `machine` is the short form that is kept.
Pure; nothing here measures or prints.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ..machine import IoSetting, Machine

__all__ = [
    "IN_MEMORY",
    "BenchResult",
    "Cell",
    "DriveFacts",
    "LatencySummary",
    "Mode",
    "Pattern",
    "Sample",
    "SustainedPoint",
    "SustainedRun",
    "Workload",
    "percentile",
]

# File systems that are memory.
IN_MEMORY = ("tmpfs", "ramfs", "devtmpfs")

# `mixed`: half of the bytes are read and half written, at the same time, in different parts of the file.
Pattern = Literal["read", "write", "mixed"]

# `bandwidth`: large requests front to back, cut into blocks by the engine. `latency`: one request for each
# block, at random places.
Mode = Literal["bandwidth", "latency"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What is measured in one cell of a sweep.

    Attributes:
        pattern: read, write or mixed.
        setting: block size and operations in flight.
        drives: indices of the drives that take part; more than one at the same time.
        mode: how the samples were taken. The settings that are compared all have `bandwidth`.
    """

    pattern: Pattern
    setting: IoSetting
    drives: tuple[int, ...]
    mode: Mode = "bandwidth"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One timed run.

    Attributes:
        nbytes: moved, over all drives.
        elapsed_s: from the first submit to the last completion.
        flush_s: time of the fdatasync that followed writes, not in `elapsed_s`; 0 for reads.
        cpu_s: user and system time of this process meanwhile.
    """

    nbytes: int
    elapsed_s: float
    flush_s: float
    cpu_s: float

    @property
    def bytes_per_s(self) -> float:
        """Bandwidth, the flush included."""
        return self.nbytes / (self.elapsed_s + self.flush_s)

    @property
    def cpu_s_per_gb(self) -> float:
        """CPU seconds for each 10^9 bytes."""
        return self.cpu_s / (self.nbytes / 1e9)


@dataclass(frozen=True, slots=True, kw_only=True)
class LatencySummary:
    """Latency of single operations of one block each, at the cell's depth, in seconds.

    Attributes:
        num_operations: how many were timed.
        p50_s: median.
        p99_s: 99th percentile.
        p999_s: 99.9th percentile; the maximum when there were fewer than 1000.
        max_s: the slowest.
    """

    num_operations: int
    p50_s: float
    p99_s: float
    p999_s: float
    max_s: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> LatencySummary:
        """Summarise latencies, at least one."""
        ordered = sorted(seconds)
        return cls(
            num_operations=len(ordered),
            p50_s=percentile(ordered, 0.5),
            p99_s=percentile(ordered, 0.99),
            p999_s=percentile(ordered, 0.999),
            max_s=ordered[-1],
        )


def percentile(ordered: Sequence[float], fraction: float) -> float:
    """Return the nearest-rank percentile of an ascending, non-empty sequence.

    >>> percentile([1.0, 2.0, 3.0, 4.0], 0.5)
    2.0
    """
    return ordered[max(0, math.ceil(fraction * len(ordered)) - 1)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """All samples of one workload.

    Attributes:
        workload: what was measured.
        samples: at least one.
        latency: of single operations with the same block size and depth, timed in runs of their own; where
            the workload's mode is `latency` those are the samples.
    """

    workload: Workload
    samples: tuple[Sample, ...]
    latency: LatencySummary | None = None

    @property
    def bytes_per_s(self) -> float:
        """Median bandwidth."""
        return statistics.median(sample.bytes_per_s for sample in self.samples)

    @property
    def cpu_s_per_gb(self) -> float:
        """Median CPU cost."""
        return statistics.median(sample.cpu_s_per_gb for sample in self.samples)


@dataclass(frozen=True, slots=True, kw_only=True)
class DriveFacts:
    """What is said of a drive beside its figures.

    Attributes:
        path: the directory, absolute.
        device: `major:minor` of the file system.
        source: what is mounted there, `/dev/nvme0n1p2`.
        file_system: its type.
        engine: the I/O engine used.
        engine_reason: why this one, empty when it is the first choice.
        direct: whether O_DIRECT is in use.
        file_nbytes: size of the file that was read and written.
        free_nbytes: free on the file system before.
        verified_nbytes: bytes read back and compared with what was written.
    """

    path: str
    device: str
    source: str
    file_system: str
    engine: str
    engine_reason: str
    direct: bool
    file_nbytes: int
    free_nbytes: int
    verified_nbytes: int

    @property
    def in_memory(self) -> bool:
        """Whether the file system is memory itself, which no drive and no cache stands before."""
        return self.file_system in IN_MEMORY


@dataclass(frozen=True, slots=True, kw_only=True)
class SustainedPoint:
    """Bandwidth of one slice of a long run.

    Attributes:
        at_s: end of the slice, from the start of the run.
        nbytes: written in the slice.
        bytes_per_s: of the slice.
    """

    at_s: float
    nbytes: int
    bytes_per_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SustainedRun:
    """A long write to one drive.

    Attributes:
        drive: index of the drive.
        points: the curve.
        first_bytes_per_s: median of the first tenth.
        last_bytes_per_s: median of the last tenth: what remains when a write cache is full.
        drop_at_nbytes: bytes after which the bandwidth fell below 0.7 of the first tenth, to stay
            there; None when it never did.
    """

    drive: int
    points: tuple[SustainedPoint, ...]
    first_bytes_per_s: float
    last_bytes_per_s: float
    drop_at_nbytes: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchResult:
    """Everything one run of `offload bench` found.

    Attributes:
        drives: in the order given.
        cells: the sweep: each drive alone, then all together.
        sustained: long runs; empty unless asked for.
        machine: the short form, with the best settings.
        notes: what a reader must know: a fallback, a warning, a part that was left out.
    """

    drives: tuple[DriveFacts, ...]
    cells: tuple[Cell, ...]
    sustained: tuple[SustainedRun, ...]
    machine: Machine
    notes: tuple[str, ...] = ()
