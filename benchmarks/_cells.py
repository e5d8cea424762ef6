"""What is compared in the I/O benchmark: a cell of the grid, a timed transfer, and paired ratios.

A cell is one direction, block size and queue depth. A transfer is what one contender moved, how long
that took and what CPU time it cost. Pure values and arithmetic; nothing here does I/O.
"""

from __future__ import annotations

import fnmatch
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from offload.aio import Op
from offload.errors import ConfigError
from offload.sizes import MIB, align_up

__all__ = ["OUTSTANDING", "Cell", "Spread", "Transfer", "grid", "select_cells"]

# Requests of ours asked for at any time, on each file; see `Cell.request_nbytes`.
OUTSTANDING = 4


@dataclass(frozen=True, slots=True)
class Cell:
    """One place of the grid: `depth` blocks of `block_nbytes` in flight, in one direction."""

    op: Op
    block_nbytes: int
    depth: int

    @property
    def block(self) -> str:
        """The block size as fio and the options write it: 128k, 1m, 8m."""
        if self.block_nbytes % MIB == 0:
            return f"{self.block_nbytes // MIB}m"
        return f"{self.block_nbytes // 1024}k"

    @property
    def name(self) -> str:
        """`OP:BLOCK:DEPTH`, as `--cells` takes it."""
        return f"{self.op}:{self.block}:{self.depth}"

    @property
    def request_nbytes(self) -> int:
        """The size of one request of ours: half of what is in flight, two blocks, or 1 MiB, the most of them.

        Four such requests are outstanding, so that twice the depth is asked for at any time: while the
        oldest two are in flight, the next two wait in the engine, and a request that ends leaves the
        drive no gap. Together they are twice fio's buffers (depth x block), a little more at depth 1.
        """
        half_nbytes = align_up(self.depth, 2) // 2 * self.block_nbytes
        return max(half_nbytes, 2 * self.block_nbytes, align_up(MIB, self.block_nbytes))

    @property
    def file_nbytes(self) -> int:
        """The least size of a file in which outstanding requests do not overlap."""
        return OUTSTANDING * self.request_nbytes

    def __str__(self) -> str:
        return f"{self.op} {self.block} x {self.depth}"


@dataclass(frozen=True, slots=True)
class Transfer:
    """One timed run of one contender.

    `cpu_s` is what it says of itself; `process_cpu_s` what the operating system charged to its process.
    """

    nbytes: int
    elapsed_s: float
    cpu_s: float
    process_cpu_s: float

    @property
    def bytes_per_s(self) -> float:
        return self.nbytes / self.elapsed_s

    @property
    def cpu_s_per_gb(self) -> float:
        """CPU seconds, user and system, for 10^9 bytes."""
        return self.cpu_s / (self.nbytes / 1e9)


@dataclass(frozen=True, slots=True)
class Spread:
    """The median of samples, with the least and the most."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """Summarise at least one value."""
        all_values = list(values)
        return cls(statistics.median(all_values), min(all_values), max(all_values))

    @classmethod
    def paired(cls, ours: Sequence[float], theirs: Sequence[float]) -> Spread:
        """Summarise ours / theirs, round by round."""
        return cls.of(a / b for a, b in zip(ours, theirs, strict=True))

    def __str__(self) -> str:
        return f"{self.median:.3f} [{self.least:.3f}..{self.most:.3f}]"


def grid(ops: Sequence[Op], blocks_nbytes: Sequence[int], depths: Sequence[int]) -> list[Cell]:
    """Return every cell, directions outermost."""
    return [Cell(op, block, depth) for op in ops for block in blocks_nbytes for depth in depths]


def select_cells(cells: Sequence[Cell], patterns: str) -> list[Cell]:
    """Return the cells whose name matches one of the comma-separated patterns (`read:1m:*`).

    Raises:
        ConfigError: a pattern matches no cell.
    """
    wanted = [pattern.strip() for pattern in patterns.split(",")]
    for pattern in wanted:
        if not any(fnmatch.fnmatchcase(cell.name, pattern) for cell in cells):
            raise ConfigError(
                f"--cells: {pattern!r} matches none of the {len(cells)} cells; they are called"
                f" OP:BLOCK:DEPTH: {', '.join(cell.name for cell in cells[:3])}, ..."
            )
    return [cell for cell in cells if any(fnmatch.fnmatchcase(cell.name, each) for each in wanted)]
