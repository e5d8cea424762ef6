"""Parameters in the bytes of records: the arrays a record holds, and values written and read through them.

Views share memory with the buffer they are given and live as long as it does. Pure functions of their
arguments on CPU tensors, callable from any thread; the layout is `layout.py`, the halves `masters.py`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..specs import TensorSpec
from .layout import OptimizerChunk, RecordFormat
from .masters import check_tensor, copy_high, copy_residual, join_master

__all__ = [
    "OptimizerViews",
    "RecordBuffer",
    "read_masters",
    "view_elements",
    "view_optimizer_chunk",
    "write_frozen",
    "write_residual",
    "write_weights",
]

# A record's bytes: a contiguous 1-D uint8 tensor, or a writable memoryview.
RecordBuffer = Tensor | memoryview


class OptimizerViews(NamedTuple):
    """The arrays of one optimizer chunk of n elements, sharing memory with its buffer.

    Attributes:
        residual: int16, n; None in the float32 format.
        exp_avg: fp32, n; or with 8-bit moments uint8 codes, n.
        exp_avg_scales: bf16, ceil(n / 128); None with fp32 moments.
        exp_avg_sq: as `exp_avg`.
        exp_avg_sq_scales: as `exp_avg_scales`.
    """

    residual: Tensor | None
    exp_avg: Tensor
    exp_avg_scales: Tensor | None
    exp_avg_sq: Tensor
    exp_avg_sq_scales: Tensor | None


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
    moments = torch.float32 if chunk.exp_avg_scales is None else torch.uint8

    def view(where: slice, dtype: torch.dtype) -> Tensor:
        return _view(buffer, where, dtype, "optimizer chunk")

    return OptimizerViews(
        residual=None if chunk.residual is None else view(chunk.residual, torch.int16),
        exp_avg=view(chunk.exp_avg, moments),
        exp_avg_scales=None if chunk.exp_avg_scales is None else view(chunk.exp_avg_scales, torch.bfloat16),
        exp_avg_sq=view(chunk.exp_avg_sq, moments),
        exp_avg_sq_scales=(
            None if chunk.exp_avg_sq_scales is None else view(chunk.exp_avg_sq_scales, torch.bfloat16)
        ),
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
    copy_high(source.detach().reshape(-1), view_elements(weights, torch.int16, spec.end)[spec.offset :])


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
    copy_residual(source.detach().reshape(-1)[in_parameter], residual[in_chunk])


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
    check_tensor(out, "out", (torch.float32,), torch.Size(spec.shape))
    residual = view_optimizer_chunk(chunk, buffer).residual
    overlap = _overlap(chunk, spec)
    if residual is None or overlap is None:
        return
    in_parameter, in_chunk = overlap
    high = weights[spec.offset : spec.end][in_parameter]
    join_master(high, residual[in_chunk], out=out.view(-1)[in_parameter])


def _overlap(chunk: OptimizerChunk, spec: TensorSpec) -> tuple[slice, slice] | None:
    """Return where the parameter and the chunk meet, in the parameter and in the chunk; None if nowhere."""
    start, stop = max(chunk.start, spec.offset), min(chunk.stop, spec.end)
    if start >= stop:
        return None
    return slice(start - spec.offset, stop - spec.offset), slice(start - chunk.start, stop - chunk.start)


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


def _check_source(spec: TensorSpec, source: Tensor) -> None:
    if source.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"{spec.name}: a parameter must be float32, bfloat16 or float16, got {source.dtype}")
    if source.device.type != "cpu" or tuple(source.shape) != spec.shape:
        raise ValueError(
            f"{spec.name}: wanted a CPU tensor of shape {spec.shape}, got {source.device} "
            f"and shape {tuple(source.shape)}"
        )
