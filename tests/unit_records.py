"""Whole parameters in and out of a unit's records, which the package does chunk by chunk."""

from __future__ import annotations

import torch

from offload.codec import (
    OptimizerChunk,
    RecordBuffer,
    RecordFormat,
    read_masters,
    view_elements,
    write_residual,
    write_weights,
)
from offload.specs import TensorSpec


def chunk_bytes(chunk: OptimizerChunk, optimizer: RecordBuffer) -> RecordBuffer:
    return optimizer[chunk.offset_bytes : chunk.offset_bytes + chunk.nbytes]


def write_parameter(
    record_format: RecordFormat,
    spec: TensorSpec,
    source: torch.Tensor,
    weights: RecordBuffer,
    optimizer: RecordBuffer,
    numel: int,
) -> None:
    """Write one trainable parameter into both records of a unit of `numel` elements; not the moments."""
    write_weights(record_format, spec, source, weights)
    for chunk in record_format.optimizer_chunks(numel):
        write_residual(chunk, spec, source, chunk_bytes(chunk, optimizer))


def read_parameter(
    record_format: RecordFormat,
    spec: TensorSpec,
    weights: RecordBuffer,
    optimizer: RecordBuffer,
    numel: int,
) -> torch.Tensor:
    """Return one trainable parameter as its exact fp32 master values, shaped as in the model."""
    out = torch.empty(spec.shape, dtype=torch.float32)
    view = view_elements(weights, record_format.torch_dtype, spec.end)
    if record_format.dtype == "float32":
        return out.copy_(view[spec.offset :].view(spec.shape))
    for chunk in record_format.optimizer_chunks(numel):
        read_masters(chunk, spec, view, chunk_bytes(chunk, optimizer), out)
    return out
