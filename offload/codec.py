"""How tensors look in a record: the bytes of weights, frozen and optimizer records.

Owns the exact 4-byte form of fp32 master weights and the layout of records:

- *Split masters.* `bits = (high << 16) + sign_extended(residual)` with `high = (bits + 0x8000) >> 16`:
  `high` is the master rounded to bf16, half away from zero, and the int16 `residual` is what the
  rounding lost. Every finite value, infinity, denormal and signed zero recombines bit for bit. A NaN
  becomes 0x7FC00000, whose high half is a NaN too. (A master above the largest bf16 has an infinite
  high half, as any rounding to bf16 would give it, and recombines all the same.)
- *Weights records*: the unit's flat trainable space as bf16 (high halves) or fp32, padded to 4096 bytes.
- *Frozen records*: the flat frozen space in a dtype of the caller's choice (the one it computes in),
  rounded as `Tensor.to` rounds since no residual makes up for it, padded to 4096 bytes.
- *Optimizer records*: chunk after chunk of `chunk_numel` elements. A chunk is one contiguous transfer
  and holds, each from a 64-byte boundary, residual (bf16 format only), exp_avg and exp_avg_sq of its
  elements, padded to 4096 bytes. Padding is zero.

Arrays are little-endian. Everything here is a pure function of its arguments on CPU tensors, callable
from any thread; views share memory with the buffer they are given and live as long as it does. It
does no I/O, knows no generation, and leaves checksums to the store.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .errors import ConfigError
from .sizes import MIB, align_up
from .specs import ELEMENT_ALIGNMENT, RecordDType, TensorSpec

__all__ = [
    "CANONICAL_NAN_BITS",
    "OptimizerChunk",
    "OptimizerViews",
    "RecordBuffer",
    "RecordFormat",
    "join_master",
    "read_masters",
    "read_parameter",
    "split_master",
    "view_elements",
    "view_optimizer_chunk",
    "write_frozen",
    "write_parameter",
    "write_residual",
    "write_weights",
]

# A record's bytes: a contiguous 1-D uint8 tensor, or a writable memoryview.
RecordBuffer = Tensor | memoryview

# The one NaN that is stored: quiet, positive, and a NaN in its upper half alone.
CANONICAL_NAN_BITS = 0x7FC00000

# 4 KiB: the O_DIRECT alignment of every drive; records and chunks are whole multiples of it.
RECORD_ALIGNMENT_NBYTES = 4096

# 64 bytes: a cache line; the arrays inside a chunk begin on one.
ARRAY_ALIGNMENT_NBYTES = 64

# 1 Mi elements at a time: an int32 copy, a sum and a mask are 9 MiB of temporaries.
_STEP_NUMEL = MIB


@dataclass(frozen=True, slots=True)
class OptimizerChunk:
    """One contiguous piece of an optimizer record.

    Attributes:
        start: first element, in the unit's flat trainable space.
        stop: one past the last element.
        offset_bytes: where the chunk begins in the record, a multiple of 4096.
        nbytes: its size with padding, a multiple of 4096.
        residual: byte range of the int16 residuals inside the chunk; None in the float32 format.
        exp_avg: byte range of the fp32 first moments inside the chunk.
        exp_avg_sq: byte range of the fp32 second moments inside the chunk.
    """

    start: int
    stop: int
    offset_bytes: int
    nbytes: int
    residual: slice | None
    exp_avg: slice
    exp_avg_sq: slice

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
        chunk_numel: elements per optimizer chunk, a multiple of 64. 2^21 by default: chunks of 20 MiB
            (bfloat16) or 16 MiB (float32), large enough for full drive bandwidth and whole multiples
            of 4 MiB, small enough that two or three in flight fit a small host budget.
    """

    dtype: RecordDType = "bfloat16"
    chunk_numel: int = 1 << 21

    def __post_init__(self) -> None:
        if self.dtype not in ("bfloat16", "float32"):
            raise ConfigError(f"record dtype must be 'bfloat16' or 'float32', got {self.dtype!r}")
        if self.chunk_numel <= 0 or self.chunk_numel % ELEMENT_ALIGNMENT:
            raise ConfigError(
                f"chunk_numel must be a positive multiple of {ELEMENT_ALIGNMENT}, got {self.chunk_numel}"
            )

    @property
    def torch_dtype(self) -> torch.dtype:
        """The element type of weights records."""
        return torch.bfloat16 if self.dtype == "bfloat16" else torch.float32

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
        nbytes = full * self._chunk(0, self.chunk_numel, 0).nbytes
        return nbytes + (self._chunk(0, rest, 0).nbytes if rest else 0)

    def optimizer_chunks(self, numel: int) -> tuple[OptimizerChunk, ...]:
        """Return the chunks of an optimizer record of `numel` elements, in the record's order."""
        chunks: list[OptimizerChunk] = []
        offset_bytes = 0
        for start in range(0, numel, self.chunk_numel):
            chunk = self._chunk(start, min(start + self.chunk_numel, numel), offset_bytes)
            chunks.append(chunk)
            offset_bytes += chunk.nbytes
        return tuple(chunks)

    def _chunk(self, start: int, stop: int, offset_bytes: int) -> OptimizerChunk:
        numel = stop - start
        residual: slice | None = None
        end = 0
        if self.dtype == "bfloat16":
            residual = slice(0, 2 * numel)
            end = residual.stop
        exp_avg = _next_array(end, 4 * numel)
        exp_avg_sq = _next_array(exp_avg.stop, 4 * numel)
        nbytes = align_up(exp_avg_sq.stop, RECORD_ALIGNMENT_NBYTES)
        return OptimizerChunk(start, stop, offset_bytes, nbytes, residual, exp_avg, exp_avg_sq)


class OptimizerViews(NamedTuple):
    """The arrays of one optimizer chunk, sharing memory with its buffer."""

    residual: Tensor | None
    exp_avg: Tensor
    exp_avg_sq: Tensor


def split_master(
    master: Tensor, *, high: Tensor | None = None, residual: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Split fp32 values into bf16 high halves and int16 residuals.

    Args:
        master: fp32, any shape, contiguous.
        high: where to write the high halves, bf16 or its bits as int16; a new tensor when None.
        residual: where to write the residuals, int16; a new tensor when None.

    Returns:
        (high, residual), contiguous and shaped as `master`.

    Raises:
        ValueError: a tensor has the wrong dtype or shape, or is not contiguous.
    """
    _check(master, "master", (torch.float32,), master.shape)
    if high is None:
        high = torch.empty(master.shape, dtype=torch.bfloat16)
    if residual is None:
        residual = torch.empty(master.shape, dtype=torch.int16)
    _check(high, "high", (torch.bfloat16, torch.int16), master.shape)
    _check(residual, "residual", (torch.int16,), master.shape)
    flat, flat_high, flat_residual = master.view(-1), high.view(torch.int16).view(-1), residual.view(-1)
    for part in _steps(flat.numel()):
        bits = _canonical_bits(flat[part])
        flat_residual[part] = _residual(bits)
        flat_high[part] = _high(bits)
    return high, residual


def join_master(high: Tensor, residual: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Recombine bf16 high halves and int16 residuals into the fp32 values they were split from.

    Args:
        high: bf16, or its bits as int16; contiguous.
        residual: int16, of the same shape; contiguous.
        out: where to write, fp32 of the same shape; a new tensor when None.

    Raises:
        ValueError: a tensor has the wrong dtype or shape, or is not contiguous.
    """
    _check(high, "high", (torch.bfloat16, torch.int16), high.shape)
    _check(residual, "residual", (torch.int16,), high.shape)
    if out is None:
        out = torch.empty(high.shape, dtype=torch.float32)
    _check(out, "out", (torch.float32,), high.shape)
    bits, flat_high = out.view(torch.int32).view(-1), high.view(torch.int16).view(-1)
    flat_residual = residual.view(-1)
    for part in _steps(bits.numel()):
        bits[part].copy_(flat_high[part]).bitwise_left_shift_(16).add_(flat_residual[part])
    return out


def view_elements(record: RecordBuffer, dtype: torch.dtype, numel: int) -> Tensor:
    """Return the elements of a weights or frozen record: 1-D, `numel` of `dtype`, sharing its memory.

    Raises:
        ValueError: the buffer is too small, not writable or not bytes.
    """
    return _view(record, slice(0, numel * dtype.itemsize), dtype, "record")


def view_optimizer_chunk(chunk: OptimizerChunk, buffer: RecordBuffer) -> OptimizerViews:
    """Return the arrays of one chunk; `buffer` begins where the chunk begins.

    Raises:
        ValueError: the buffer is too small, not writable or not bytes.
    """
    residual = None
    if chunk.residual is not None:
        residual = _view(buffer, chunk.residual, torch.int16, "optimizer chunk")
    return OptimizerViews(
        residual,
        _view(buffer, chunk.exp_avg, torch.float32, "optimizer chunk"),
        _view(buffer, chunk.exp_avg_sq, torch.float32, "optimizer chunk"),
    )


def write_weights(
    record_format: RecordFormat, spec: TensorSpec, source: Tensor, weights: RecordBuffer
) -> None:
    """Write one trainable parameter into a weights record.

    Args:
        record_format: the run's format.
        spec: the parameter; its shape must be that of `source`.
        source: fp32, bf16 or fp16 on the CPU, any strides.
        weights: the record's bytes.

    Raises:
        ValueError: the source or the buffer does not fit the parameter.
    """
    if record_format.dtype == "float32":
        write_frozen(spec, source, weights, torch.float32)
        return
    _check_source(spec, source)
    flat = source.detach().reshape(-1)
    high = view_elements(weights, torch.int16, spec.end)[spec.offset :]
    for part in _steps(spec.numel):
        high[part] = _high(_canonical_bits(flat[part]))


def write_frozen(spec: TensorSpec, source: Tensor, frozen: RecordBuffer, dtype: torch.dtype) -> None:
    """Write one parameter into a frozen record whose elements are of `dtype`, as `Tensor.to` converts.

    Raises:
        ValueError: the source or the buffer does not fit the parameter.
    """
    _check_source(spec, source)
    target = view_elements(frozen, dtype, spec.end)[spec.offset :]
    target.copy_(source.detach().reshape(-1))


def write_residual(chunk: OptimizerChunk, spec: TensorSpec, source: Tensor, buffer: RecordBuffer) -> None:
    """Write the residuals of those elements of one parameter that lie in `chunk`.

    Moments are not touched: a chunk whose buffer was zero has moments of zero, as at step 0. Does
    nothing in the float32 format, or when the parameter has no element in the chunk.

    Args:
        chunk: the chunk.
        spec: the parameter; its shape must be that of `source`.
        source: fp32, bf16 or fp16 on the CPU, any strides; the whole parameter.
        buffer: the chunk's bytes, from where the chunk begins.

    Raises:
        ValueError: the source or the buffer does not fit.
    """
    _check_source(spec, source)
    residual = view_optimizer_chunk(chunk, buffer).residual
    overlap = _overlap(chunk, spec)
    if residual is None or overlap is None:
        return
    in_parameter, in_chunk = overlap
    flat, target = source.detach().reshape(-1)[in_parameter], residual[in_chunk]
    for part in _steps(flat.numel()):
        target[part] = _residual(_canonical_bits(flat[part]))


def read_masters(
    chunk: OptimizerChunk, spec: TensorSpec, weights: Tensor, buffer: RecordBuffer, out: Tensor
) -> None:
    """Write into `out` the exact masters of those elements of one parameter that lie in `chunk`.

    Args:
        chunk: a chunk of the bfloat16 format.
        spec: the parameter.
        weights: the view of its weights record, see `view_elements`.
        buffer: the chunk's bytes, from where the chunk begins.
        out: the whole parameter, fp32, contiguous.

    Raises:
        ValueError: a buffer or `out` does not fit.
    """
    _check(out, "out", (torch.float32,), torch.Size(spec.shape))
    residual = view_optimizer_chunk(chunk, buffer).residual
    overlap = _overlap(chunk, spec)
    if residual is None or overlap is None:
        return
    in_parameter, in_chunk = overlap
    high = weights[spec.offset : spec.end][in_parameter]
    join_master(high, residual[in_chunk], out=out.view(-1)[in_parameter])


def write_parameter(
    record_format: RecordFormat,
    spec: TensorSpec,
    source: Tensor,
    weights: RecordBuffer,
    optimizer: RecordBuffer,
    numel: int,
) -> None:
    """Write one trainable parameter into both records of a unit; moments are not touched.

    A unit's initial records are zeroed buffers into which each of its parameters was written.

    Args:
        record_format: the run's format.
        spec: the parameter; its shape must be that of `source`.
        source: fp32, bf16 or fp16 on the CPU, any strides.
        weights: the bytes of the whole weights record.
        optimizer: the bytes of the whole optimizer record.
        numel: elements of the unit's flat trainable space (`UnitLayout.trainable_numel`).

    Raises:
        ValueError: the source or a buffer does not fit.
    """
    write_weights(record_format, spec, source, weights)
    for chunk in record_format.optimizer_chunks(numel):
        write_residual(chunk, spec, source, _chunk_bytes(chunk, optimizer))


def read_parameter(
    record_format: RecordFormat,
    spec: TensorSpec,
    weights: RecordBuffer,
    optimizer: RecordBuffer,
    numel: int,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """Return one trainable parameter as its exact fp32 master values, shaped as in the model.

    Args:
        record_format: the run's format.
        spec: the parameter.
        weights: the bytes of the whole weights record.
        optimizer: the bytes of the whole optimizer record; not read in the float32 format.
        numel: elements of the unit's flat trainable space.
        out: where to write, fp32, contiguous; a new tensor when None. Never a view of the records.

    Raises:
        ValueError: a buffer or `out` does not fit.
    """
    if out is None:
        out = torch.empty(spec.shape, dtype=torch.float32)
    _check(out, "out", (torch.float32,), torch.Size(spec.shape))
    view = view_elements(weights, record_format.torch_dtype, spec.end)
    if record_format.dtype == "float32":
        out.view(-1).copy_(view[spec.offset :])
        return out
    for chunk in record_format.optimizer_chunks(numel):
        read_masters(chunk, spec, view, _chunk_bytes(chunk, optimizer), out)
    return out


def _next_array(end: int, nbytes: int) -> slice:
    start = align_up(end, ARRAY_ALIGNMENT_NBYTES)
    return slice(start, start + nbytes)


def _steps(numel: int) -> Iterator[slice]:
    for start in range(0, numel, _STEP_NUMEL):
        yield slice(start, min(start + _STEP_NUMEL, numel))


def _canonical_bits(values: Tensor) -> Tensor:
    """Return a new int32 tensor: the fp32 bits of `values`, every NaN the canonical one."""
    # Not Tensor.to: it keeps strides, and one element with a stride other than 1 has no int16 view.
    exact = torch.empty(values.shape, dtype=torch.float32).copy_(values)
    return exact.view(torch.int32).masked_fill_(exact.isnan(), CANONICAL_NAN_BITS)


# Little-endian: of the two halves of an int32 the lower comes first. Read as signed, it is the residual.
def _residual(bits: Tensor) -> Tensor:
    return bits.view(torch.int16)[0::2]


def _high(bits: Tensor) -> Tensor:
    """Return the rounded upper halves of `bits`, which is overwritten."""
    return bits.add_(0x8000).view(torch.int16)[1::2]


def _overlap(chunk: OptimizerChunk, spec: TensorSpec) -> tuple[slice, slice] | None:
    """Return where the parameter and the chunk meet, in the parameter and in the chunk; None if nowhere."""
    start, stop = max(chunk.start, spec.offset), min(chunk.stop, spec.end)
    if start >= stop:
        return None
    return slice(start - spec.offset, stop - spec.offset), slice(start - chunk.start, stop - chunk.start)


def _chunk_bytes(chunk: OptimizerChunk, record: RecordBuffer) -> RecordBuffer:
    return record[chunk.offset_bytes : chunk.offset_bytes + chunk.nbytes]


def _view(buffer: RecordBuffer, where: slice, dtype: torch.dtype, what: str) -> Tensor:
    if isinstance(buffer, Tensor):
        if buffer.dtype != torch.uint8 or buffer.dim() != 1 or not buffer.is_contiguous():
            raise ValueError(
                f"{what}: wanted a contiguous 1-D uint8 tensor, got {buffer.dtype} "
                f"of shape {tuple(buffer.shape)}"
            )
        nbytes = buffer.numel()
    else:
        if buffer.readonly or not buffer.contiguous or buffer.itemsize != 1 or buffer.ndim != 1:
            raise ValueError(f"{what}: wanted a writable, contiguous 1-D memoryview of bytes, got {buffer!r}")
        nbytes = buffer.nbytes
    if nbytes < where.stop:
        raise ValueError(f"{what}: the buffer holds {nbytes} bytes, {where.stop} are needed")
    if where.start == where.stop:
        return torch.empty(0, dtype=dtype)
    if isinstance(buffer, Tensor):
        return buffer[where].view(dtype)
    count = (where.stop - where.start) // dtype.itemsize
    return torch.frombuffer(buffer, dtype=dtype, count=count, offset=where.start)


def _check(tensor: Tensor, name: str, dtypes: tuple[torch.dtype, ...], shape: torch.Size) -> None:
    if tensor.dtype not in dtypes or tensor.shape != shape or not tensor.is_contiguous():
        raise ValueError(
            f"{name}: wanted a contiguous tensor of {dtypes[0]} and shape {tuple(shape)}, got "
            f"{'a contiguous' if tensor.is_contiguous() else 'a strided'} tensor of {tensor.dtype} "
            f"and shape {tuple(tensor.shape)}"
        )


def _check_source(spec: TensorSpec, source: Tensor) -> None:
    if source.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"{spec.name}: a parameter must be float32, bfloat16 or float16, got {source.dtype}")
    if source.device.type != "cpu" or tuple(source.shape) != spec.shape:
        raise ValueError(
            f"{spec.name}: wanted a CPU tensor of shape {spec.shape}, got {source.device} "
            f"and shape {tuple(source.shape)}"
        )
