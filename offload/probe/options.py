"""What a measurement is asked to do: `BenchOptions`, checked at construction.

Pure; nothing here measures.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

from ..aio.engine import ALIGNMENT_NBYTES, EngineName
from ..errors import ConfigError
from ..sizes import GIB, MIB, format_bytes
from .results import Pattern

__all__ = ["BenchOptions"]

# The largest operation that anything sends; beyond it a drive's own limit cuts requests anyway.
MAX_BLOCK_NBYTES = 64 * MIB

# What `open_engine` takes.
MAX_DEPTH = 4096

# Room for four requests of 1 MiB, reading and writing apart.
MIN_FILE_NBYTES = 8 * MIB


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchOptions:
    """What to measure, and how long.

    Attributes:
        size_nbytes: of the file made in each directory, rounded down to 1 MiB, at least 8 MiB. 4 GiB:
            more than the cache in a drive's controller holds.
        patterns: of reading, writing, and both at once. Without both `read` and `write` there is no
            setting to keep.
        full: every block size from 128 KiB to 8 MiB with every depth from 1 to 32; else a few
            sensible settings.
        block_nbytes: block sizes instead of those; powers of two from 4 KiB to 64 MiB.
        depths: operations in flight instead of those.
        rounds: samples of each cell; the cells take turns, so a drive that wanders disturbs all alike.
        sample_s: shortest time of one sample. Half a second moves gigabytes on a fast drive, and
            enough requests on a slow one.
        engine: I/O engine by name; None takes the best that works here.
        direct: bypass the page cache where the file system allows it.
        latency: time single operations as well.
        memory: measure host memory and the checksum.
        device: measure the copies to and from the GPU, where there is one.
        sustained_s: write to each drive for so long and record the curve; None leaves it out.
        buffer_nbytes: upper bound of the memory that holds the bytes on their way, over all drives.
            Settings that need more are left out, and a note says so.
    """

    size_nbytes: int = 4 * GIB
    patterns: tuple[Pattern, ...] = ("read", "write", "mixed")
    full: bool = False
    block_nbytes: tuple[int, ...] | None = None
    depths: tuple[int, ...] | None = None
    rounds: int = 3
    sample_s: float = 0.5
    engine: EngineName | None = None
    direct: bool = True
    latency: bool = True
    memory: bool = True
    device: bool = True
    sustained_s: float | None = None
    buffer_nbytes: int = 256 * MIB

    def __post_init__(self) -> None:
        _require(
            self.size_nbytes >= MIN_FILE_NBYTES,
            f"size: {format_bytes(self.size_nbytes)} is too little to measure with; use 8MiB or more",
        )
        _require(bool(self.patterns), "patterns: nothing to measure; name read, write or mixed")
        _require(
            len(set(self.patterns)) == len(self.patterns),
            f"patterns: named twice: {', '.join(self.patterns)}",
        )
        for pattern in self.patterns:
            _require(
                pattern in get_args(Pattern),
                f"patterns: {pattern!r} is none of {', '.join(get_args(Pattern))}",
            )
        for block in self.block_nbytes or ():
            _require(
                ALIGNMENT_NBYTES <= block <= MAX_BLOCK_NBYTES and block.bit_count() == 1,
                f"block: {block:,} bytes is no power of two from 4KiB to 64MiB",
            )
        for depth in self.depths or ():
            _require(1 <= depth <= MAX_DEPTH, f"depth: {depth} is not from 1 to {MAX_DEPTH}")
        _require(self.block_nbytes != () and self.depths != (), "block, depth: an empty list; leave it out")
        _require(self.rounds >= 1, f"rounds: {self.rounds} is less than 1")
        _require(0 <= self.sample_s <= 3600, f"sample: {self.sample_s} s is not from 0 to 3600 s")
        _require(
            self.sustained_s is None or self.sustained_s > 0,
            f"sustained: {self.sustained_s} s is not positive",
        )
        _require(
            self.buffer_nbytes >= MIN_FILE_NBYTES,
            f"buffers: {format_bytes(self.buffer_nbytes)} is too little to measure with; use 8MiB or more",
        )


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ConfigError(message)
