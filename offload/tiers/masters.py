"""Writes and reads the exact fp32 masters of a unit, chunk by chunk, in bounded memory.

Used when a run is created (values in, moments zero) and when weights are handed out (export,
`detach`). Works on idle records only: no visit and no update may be in progress.

Thread rule: one thread, and none of `Transfer` or `Updater` active meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch

from ..buffers import Arena, Pool
from ..codec import OptimizerChunk, read_masters, view_elements, write_frozen, write_residual, write_weights
from ..sources import WeightSource
from ..specs import TensorSpec
from ..store import Store, Ticket
from .records import RecordSet
from .residents import ResidentRecords

__all__ = ["Masters", "begin_reading_weights"]


class Masters:
    """See the module."""

    def __init__(
        self,
        *,
        host: Arena,
        host_pool: Pool | None,
        staging: Pool | None,
        store: Store | None,
        residents: ResidentRecords,
    ) -> None:
        self._host = host
        self._host_pool = host_pool
        self._staging = staging
        self._store = store
        self._residents = residents

    def write(self, unit: RecordSet, source: WeightSource) -> None:
        """Fill a unit's records from `source`: exact masters, zero moments."""
        with self._weights_buffer(unit) as weights:
            self._write_frozen(unit, weights[unit.weights_nbytes :], source)
            if unit.layout.trainable:
                self._write_trainable(unit, weights[: unit.weights_nbytes], source)
        self._residents.mark_dirty(unit.owner)

    @contextmanager
    def read(self, unit: RecordSet) -> Iterator[dict[str, torch.Tensor]]:
        """Give a unit's values by parameter name: fp32 masters, frozen weights as stored.

        The frozen tensors are views of a host buffer and valid inside the context only; masters are
        the caller's.
        """
        with self._weights_buffer(unit) as weights:
            self._read_weights(unit, weights)
            values = self._read_masters(unit, weights)
            frozen = view_elements(
                weights[unit.weights_nbytes :], unit.compute_dtype, unit.layout.frozen_numel
            )
            for spec in unit.layout.frozen:
                values[spec.name] = frozen[spec.offset : spec.end].view(spec.shape)
            yield values

    def load_residents(self, records: Iterable[RecordSet]) -> None:
        """Fill what lives in host memory of these records from the store, as it was committed last."""
        for unit in records:
            tickets = []
            lease = self._residents.weights(unit.owner)
            if lease is not None:
                assert self._store is not None
                weights = self._host.view(lease, 0, unit.host_nbytes)
                tickets += begin_reading_weights(self._store, unit, weights)
            optimizer = self._residents.optimizer(unit.owner)
            if optimizer:
                assert self._store is not None
                tickets.append(self._store.read(unit.name("optimizer"), optimizer, nbytes=len(optimizer)))
            for ticket in tickets:
                ticket.wait()
            self._residents.mark_clean(unit.owner)

    # -- parts -------------------------------------------------------------------------------

    def _write_frozen(self, unit: RecordSet, memory: memoryview, source: WeightSource) -> None:
        if not unit.layout.frozen:
            return
        _bytes(memory).zero_()
        for spec in unit.layout.frozen:
            write_frozen(spec, source.load(spec.name), memory, unit.compute_dtype)
        if self._store is not None:
            self._store.write(unit.name("frozen"), memory).wait()

    def _write_trainable(self, unit: RecordSet, memory: memoryview, source: WeightSource) -> None:
        _bytes(memory).zero_()
        values = _OneAtATime(source)
        for chunk in unit.chunks:
            with self._optimizer_chunk(unit, chunk, write=True) as chunk_memory:
                _bytes(chunk_memory).zero_()
                for spec in _overlapping(unit.layout.trainable, chunk):
                    if spec.offset >= chunk.start:
                        write_weights(unit.format, spec, values.load(spec), memory)
                    write_residual(chunk, spec, values.load(spec), chunk_memory)
        if not self._residents.holds_weights(unit.owner):
            assert self._store is not None
            self._store.write(unit.name("weights"), memory).wait()

    def _read_masters(self, unit: RecordSet, memory: memoryview) -> dict[str, torch.Tensor]:
        weights = view_elements(memory, unit.format.torch_dtype, unit.layout.trainable_numel)
        values = {spec.name: torch.empty(spec.shape) for spec in unit.layout.trainable}
        if unit.format.dtype == "float32":
            for spec in unit.layout.trainable:
                values[spec.name].copy_(weights[spec.offset : spec.end].view(spec.shape))
            return values
        for chunk in unit.chunks:
            with self._optimizer_chunk(unit, chunk, write=False) as chunk_memory:
                for spec in _overlapping(unit.layout.trainable, chunk):
                    read_masters(chunk, spec, weights, chunk_memory, values[spec.name])
        return values

    def _read_weights(self, unit: RecordSet, weights: memoryview) -> None:
        if self._residents.holds_weights(unit.owner):
            return
        assert self._store is not None
        for ticket in begin_reading_weights(self._store, unit, weights):
            ticket.wait()

    @contextmanager
    def _weights_buffer(self, unit: RecordSet) -> Iterator[memoryview]:
        resident = self._residents.weights(unit.owner)
        if resident is not None:
            yield self._host.view(resident, 0, unit.host_nbytes)
            return
        assert self._host_pool is not None
        with self._host_pool.lease(unit.host_nbytes, unit.owner) as lease:
            yield self._host.view(lease, 0, unit.host_nbytes)

    @contextmanager
    def _optimizer_chunk(
        self, unit: RecordSet, chunk: OptimizerChunk, *, write: bool
    ) -> Iterator[memoryview]:
        resident = self._residents.chunk(unit.owner, chunk)
        if resident is not None:
            yield resident
            return
        assert self._staging is not None and self._store is not None
        with self._staging.lease(chunk.nbytes, f"{unit.owner} optimizer chunk") as lease:
            memory = self._host.view(lease, 0, chunk.nbytes)
            place = {"offset": chunk.offset_bytes, "nbytes": chunk.nbytes}
            if not write:
                self._store.read(unit.name("optimizer"), memory, **place).wait()
            yield memory
            if write:
                self._store.write(unit.name("optimizer"), memory, **place).wait()


def begin_reading_weights(store: Store, unit: RecordSet, memory: memoryview) -> list[Ticket]:
    """Begin to read a unit's weights record and, behind it, its frozen record.

    Args:
        memory: `unit.host_nbytes` bytes, the caller's again when every ticket was waited for.
    """
    tickets = []
    if unit.weights_nbytes:
        tickets.append(store.read(unit.name("weights"), memory[: unit.weights_nbytes]))
    if unit.frozen_nbytes:
        tickets.append(store.read(unit.name("frozen"), memory[unit.weights_nbytes :]))
    return tickets


class _OneAtATime:
    """Keeps the parameter loaded last, since neighbouring chunks often cut the same one."""

    def __init__(self, source: WeightSource) -> None:
        self._source = source
        self._name = ""
        self._value = torch.empty(0)

    def load(self, spec: TensorSpec) -> torch.Tensor:
        if self._name != spec.name:
            # Let the one before go first: two embeddings at once would be the peak of the run.
            self._value = torch.empty(0)
            self._value = self._source.load(spec.name)
            self._name = spec.name
        return self._value


def _overlapping(tensors: tuple[TensorSpec, ...], chunk: OptimizerChunk) -> Iterator[TensorSpec]:
    return (spec for spec in tensors if spec.offset < chunk.stop and spec.end > chunk.start)


def _bytes(memory: memoryview) -> torch.Tensor:
    return torch.frombuffer(memory, dtype=torch.uint8)
