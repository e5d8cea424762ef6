"""Where everything lies in the records of a run: sizes, chunks, and the arrays of a chunk. Bytes only.

- *Weights records*: the unit's flat trainable space as bf16 (high halves) or fp32, padded to 4096 bytes.
- *Frozen records*: the flat frozen space in a dtype of the caller's choice (the one it computes in),
  padded to 4096 bytes.
- *Optimizer records*: chunk after chunk of `chunk_numel` elements. A chunk is one contiguous transfer
  and holds, each from a 64-byte boundary, residual (bf16 format only), exp_avg and exp_avg_sq of its
  elements, padded to 4096 bytes. With 8-bit moments each of the two is an array of codes and, from the
  next boundary, an array of scales. Padding is zero.

docs/format.md has these layouts with an example. Pure, callable from any thread.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import get_args

import torch

from ..errors import ConfigError
from ..sizes import GIB, MIB, align_up
from ..specs import ELEMENT_ALIGNMENT, SCALE_NUMEL, MomentDType, RecordDType

__all__ = ["OptimizerChunk", "RecordFormat"]

# 4 KiB: the O_DIRECT alignment of every drive; records and chunks are whole multiples of it.
RECORD_ALIGNMENT_NBYTES = 4096

# 64 bytes: a cache line; the arrays inside a chunk begin on one.
ARRAY_ALIGNMENT_NBYTES = 64

# What a store chunk should be near: large enough for full bandwidth, small enough to spread over drives.
STORE_CHUNK_NBYTES = 4 * MIB

# The largest store chunk that the format on disk allows.
MAX_STORE_CHUNK_NBYTES = GIB


@dataclass(frozen=True, slots=True)
class OptimizerChunk:
    """One contiguous piece of an optimizer record.

    Attributes:
        start: first element, in the unit's flat trainable space.
        stop: one past the last element.
        offset_bytes: where the chunk begins in the record, a multiple of 4096.
        nbytes: its size with padding, a multiple of 4096.
        residual: byte range of the int16 residuals inside the chunk; None in the float32 format.
        exp_avg: byte range of the first moments inside the chunk: fp32, or the uint8 codes.
        exp_avg_scales: byte range of their bf16 scales, one for each 128 elements; None with fp32 moments.
        exp_avg_sq: byte range of the second moments inside the chunk: fp32, or the uint8 codes.
        exp_avg_sq_scales: byte range of their scales; None with fp32 moments.
    """

    start: int
    stop: int
    offset_bytes: int
    nbytes: int
    residual: slice | None
    exp_avg: slice
    exp_avg_scales: slice | None
    exp_avg_sq: slice
    exp_avg_sq_scales: slice | None

    @property
    def numel(self) -> int:
        """Number of elements."""
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class RecordFormat:
    """The layout of every record of a run.

    Attributes:
        dtype: `bfloat16` (high halves, with a residual in the optimizer record; fp32 masters stay
            exact) or `float32`. bfloat16 by default: the forward then reads 2 bytes a parameter.
        chunk_numel: elements per optimizer chunk, a multiple of 128. 2^21 by default: chunks of 20 MiB
            (bfloat16) or 16 MiB (float32), or of 8.1 and 4.1 MiB with 8-bit moments; large enough for
            full drive bandwidth, small enough that two or three in flight fit a small host budget.
        moments: `float32`, or `8bit` for a byte and a 64th in place of 4.
    """

    dtype: RecordDType = "bfloat16"
    chunk_numel: int = 1 << 21
    moments: MomentDType = "float32"

    def __post_init__(self) -> None:
        if self.dtype not in get_args(RecordDType):
            raise ConfigError(f"record dtype must be 'bfloat16' or 'float32', got {self.dtype!r:.40}")
        if self.moments not in get_args(MomentDType):
            raise ConfigError(f"moments must be 'float32' or '8bit', got {self.moments!r:.40}")
        if self.chunk_numel <= 0 or self.chunk_numel % ELEMENT_ALIGNMENT:
            raise ConfigError(
                f"chunk_numel must be a positive multiple of {ELEMENT_ALIGNMENT}, got {self.chunk_numel}"
            )

    @property
    def torch_dtype(self) -> torch.dtype:
        """The element type of weights records."""
        return torch.bfloat16 if self.dtype == "bfloat16" else torch.float32

    @property
    def chunk_nbytes(self) -> int:
        """Size of a full optimizer chunk, padding included."""
        return self._chunk(0, self.chunk_numel, 0).nbytes

    @property
    def store_chunk_nbytes(self) -> int:
        """The length nearest to 4 MiB of which a full optimizer chunk is a whole number.

        >>> RecordFormat().store_chunk_nbytes == 4 << 20
        True
        >>> RecordFormat(moments="8bit").store_chunk_nbytes == (4 << 20) + (32 << 10)
        True
        """
        pages = self.chunk_nbytes // RECORD_ALIGNMENT_NBYTES
        return RECORD_ALIGNMENT_NBYTES * min(
            (
                divisor
                for small in range(1, math.isqrt(pages) + 1)
                if pages % small == 0
                for divisor in (small, pages // small)
                if divisor * RECORD_ALIGNMENT_NBYTES <= MAX_STORE_CHUNK_NBYTES
            ),
            key=lambda divisor: abs(math.log(divisor * RECORD_ALIGNMENT_NBYTES / STORE_CHUNK_NBYTES)),
        )

    def weights_nbytes(self, numel: int) -> int:
        """Return the size of a weights record of `numel` elements, padding included."""
        return align_up(numel * self.torch_dtype.itemsize, RECORD_ALIGNMENT_NBYTES)

    def frozen_nbytes(self, numel: int, dtype: torch.dtype | None = None) -> int:
        """Return the size of a frozen record of `numel` elements of `dtype`, padding included.

        `dtype` is that of the weights records when None.
        """
        return align_up(numel * (dtype or self.torch_dtype).itemsize, RECORD_ALIGNMENT_NBYTES)

    def optimizer_nbytes(self, numel: int) -> int:
        """Return the size of an optimizer record of `numel` elements, padding included."""
        full, rest = divmod(numel, self.chunk_numel)
        return full * self.chunk_nbytes + (self._chunk(0, rest, 0).nbytes if rest else 0)

    def optimizer_chunks(self, numel: int) -> tuple[OptimizerChunk, ...]:
        """Return the chunks of an optimizer record of `numel` elements, in the record's order."""
        return _chunks(self, numel)

    def _chunk(self, start: int, stop: int, offset_bytes: int) -> OptimizerChunk:
        numel = stop - start
        end = 0

        def next_array(nbytes: int) -> slice:
            nonlocal end
            begin = align_up(end, ARRAY_ALIGNMENT_NBYTES)
            end = begin + nbytes
            return slice(begin, end)

        coded = self.moments == "8bit"
        scales_nbytes = 2 * -(-numel // SCALE_NUMEL)
        # The order of these calls is the order of the arrays.
        residual = next_array(2 * numel) if self.dtype == "bfloat16" else None
        exp_avg = next_array(numel if coded else 4 * numel)
        exp_avg_scales = next_array(scales_nbytes) if coded else None
        exp_avg_sq = next_array(numel if coded else 4 * numel)
        exp_avg_sq_scales = next_array(scales_nbytes) if coded else None
        return OptimizerChunk(
            start=start,
            stop=stop,
            offset_bytes=offset_bytes,
            nbytes=align_up(end, RECORD_ALIGNMENT_NBYTES),
            residual=residual,
            exp_avg=exp_avg,
            exp_avg_scales=exp_avg_scales,
            exp_avg_sq=exp_avg_sq,
            exp_avg_sq_scales=exp_avg_sq_scales,
        )


# Updates ask for every chunk of a unit; a unit of 10^9 elements has 500, and the last few units are asked for
# again and again.
@functools.lru_cache(maxsize=8)
def _chunks(record_format: RecordFormat, numel: int) -> tuple[OptimizerChunk, ...]:
    chunks: list[OptimizerChunk] = []
    offset_bytes = 0
    for start in range(0, numel, record_format.chunk_numel):
        stop = min(start + record_format.chunk_numel, numel)
        chunks.append(record_format._chunk(start, stop, offset_bytes))
        offset_bytes += chunks[-1].nbytes
    return tuple(chunks)
