"""A model directory out of a run that is not open: no model object, no runtime, memory for one unit.

The run says which tensor lies where (`contents.py`); every byte is verified as it is read, and nothing is
written to the run. Of the optimizer records only the residuals are read: moments are not weights.

Thread rule: the caller's thread.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch

from ..aio.memory import aligned_buffer
from ..codec import OptimizerChunk, read_masters, view_elements
from ..errors import ConfigError, CorruptionError
from ..sizes import align_up
from ..store import Generation, Ticket
from ..tiers.records import RecordSet, store_records
from .checkpoint import ExportOptions, export
from .contents import Contents

__all__ = ["export_run"]


def export_run(
    generation: Generation,
    contents: Contents,
    directory: str | os.PathLike[str],
    *,
    model: torch.nn.Module | None = None,
    options: ExportOptions | None = None,
    on_written: Callable[[int], None] | None = None,
) -> Path:
    """Write the weights of a run's generation as a plain Hugging Face directory.

    Args:
        generation: of a run that is open for reading.
        contents: what `read_contents` tells of it.
        directory: must not exist, be empty, or be an earlier export of ours, which is replaced.
        model: gives persistent buffers, which a run does not hold.
        options: see `ExportOptions`.
        on_written: called with the bytes of each piece written.

    Returns:
        The directory, absolute.

    Raises:
        ConfigError: `model` is another one, or the directory holds something else than an export of ours.
        CorruptionError: a chunk fails its checksum, or records are not those that the run tells of.
        DiskFullError: too little room, with the bytes needed and free.
        StorageError: reading or writing failed. The run is as it was, and nothing is left of the export.
    """
    records = contents.records
    _check_records(generation, records)
    shapes = {
        spec.name: spec.shape
        for record in records.values()
        for spec in (*record.layout.trainable, *record.layout.frozen)
    }
    if model is not None:
        _check_model(model, shapes)
    return export(
        directory,
        _values(generation, records),
        shapes,
        model=model,
        options=options,
        on_written=on_written,
    )


def _check_records(generation: Generation, records: Mapping[str, RecordSet]) -> None:
    written = {spec.name: spec.nbytes for spec in generation.written}
    for spec in store_records(records):
        if written.get(spec.name) != spec.nbytes:
            raise CorruptionError(
                f"the run should hold record {spec.name} with {spec.nbytes:,} bytes, and holds"
                f" {written.get(spec.name, 'none')}: it says something else than it is"
            )
    for record in records.values():
        # Else reads of single chunks would not be whole chunks of the store.
        if len(_chunks(record)) > 1 and record.format.chunk_nbytes % generation.chunk_nbytes:
            raise CorruptionError(
                f"the run's optimizer chunks of {record.format.chunk_nbytes:,} bytes are no whole number of"
                f" its chunks of {generation.chunk_nbytes:,}: it says something else than it is"
            )


def _check_model(model: torch.nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> None:
    wanted = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    differing = sorted(name for name in {*wanted, *shapes} if wanted.get(name) != shapes.get(name))
    if differing:
        name = differing[0]
        raise ConfigError(
            f"the model directory is of another model: {len(differing)} parameters differ, the first,"
            f" {name}, with shape {shapes.get(name)} in the run and {wanted.get(name)} there"
        )


def _values(
    generation: Generation, records: Mapping[str, RecordSet]
) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    """Yield each unit's values: fp32 masters, frozen weights as stored; valid until the next unit."""
    weights = aligned_buffer(max((record.host_nbytes for record in records.values()), default=0))
    # Two, so that the next is read while one is put together.
    staging = [
        aligned_buffer(
            max((chunk.nbytes for record in records.values() for chunk in _chunks(record)), default=0)
        )
        for _ in range(2)
    ]
    for owner, record in records.items():
        memory = weights[: record.host_nbytes]
        tickets = []
        if record.weights_nbytes:
            tickets.append(generation.read(record.name("weights"), memory[: record.weights_nbytes]))
        if record.frozen_nbytes:
            tickets.append(generation.read(record.name("frozen"), memory[record.weights_nbytes :]))
        for ticket in tickets:
            ticket.wait()
        values = _masters(generation, record, memory, staging)
        frozen = view_elements(
            memory[record.weights_nbytes :], record.compute_dtype, record.layout.frozen_numel
        )
        for spec in record.layout.frozen:
            values[spec.name] = frozen[spec.offset : spec.end].view(spec.shape)
        yield owner, values


def _masters(
    generation: Generation, record: RecordSet, memory: memoryview, staging: list[memoryview]
) -> dict[str, torch.Tensor]:
    weights = view_elements(memory, record.format.torch_dtype, record.layout.trainable_numel)
    if record.format.dtype == "float32":
        return {
            spec.name: weights[spec.offset : spec.end].view(spec.shape) for spec in record.layout.trainable
        }
    values = {spec.name: torch.empty(spec.shape) for spec in record.layout.trainable}
    chunks = _chunks(record)
    in_flight: list[Ticket] = []
    try:
        for number, chunk in enumerate(chunks):
            for ahead in chunks[number : number + 2] if number == 0 else chunks[number + 1 : number + 2]:
                in_flight.append(_begin_residual(generation, record, ahead, staging))
            in_flight.pop(0).wait()
            for spec in record.layout.trainable:
                if spec.offset < chunk.stop and spec.end > chunk.start:
                    read_masters(chunk, spec, weights, staging[_slot(record, chunk)], values[spec.name])
    finally:
        for ticket in in_flight:
            ticket.settle()
    return values


def _begin_residual(
    generation: Generation, record: RecordSet, chunk: OptimizerChunk, staging: list[memoryview]
) -> Ticket:
    """Begin to read the beginning of a chunk, as far as its residuals reach."""
    assert chunk.residual is not None and chunk.residual.start == 0
    nbytes = min(align_up(chunk.residual.stop, generation.chunk_nbytes), chunk.nbytes)
    buffer = staging[_slot(record, chunk)]
    return generation.read(record.name("optimizer"), buffer, offset=chunk.offset_bytes, nbytes=nbytes)


def _slot(record: RecordSet, chunk: OptimizerChunk) -> int:
    return chunk.start // record.format.chunk_numel % 2


def _chunks(record: RecordSet) -> tuple[OptimizerChunk, ...]:
    if record.format.dtype == "float32":
        return ()  # the weights are the masters
    return record.format.optimizer_chunks(record.layout.trainable_numel)
