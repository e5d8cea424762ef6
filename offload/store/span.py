"""A span: a range of a record's chunks together with the buffer that holds or receives them.

Turns the range into requests and checksums; does no I/O itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..aio import crc32c
from ..sizes import MIB
from .table import Record, Version
from .ticket import Check

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["MAX_REQUEST_NBYTES", "Span", "Transfer"]

# Chunks that are contiguous on a drive are one request up to this length: long enough that a request
# costs nothing beside its transfer, short enough that it is verified while in the last-level cache and
# while the next one is on its way.
MAX_REQUEST_NBYTES = 16 * MIB


@dataclass(frozen=True, slots=True)
class Transfer:
    """One request to submit: which bytes of the buffer, where on which drive, and what to check after."""

    drive: int
    offset_bytes: int
    view: memoryview
    checks: tuple[Check, ...]


@dataclass(frozen=True, slots=True)
class Span:
    """Chunks `first` to `end` of a record; `view` holds exactly their bytes."""

    record: Record
    view: memoryview
    first: int
    end: int

    @classmethod
    def of(cls, record: Record, buffer: Buffer, offset: int, nbytes: int | None) -> Span:
        """Return the span of `nbytes` bytes from `offset`, held in the beginning of `buffer`.

        Raises:
            ValueError: not on chunk boundaries, outside the record, or longer than the buffer.
        """
        total, chunk_nbytes = record.spec.nbytes, record.stripe.chunk_nbytes
        stop = total if nbytes is None else offset + nbytes
        if (
            not 0 <= offset < stop <= total
            or offset % chunk_nbytes
            or (stop % chunk_nbytes and stop != total)
        ):
            raise ValueError(
                f"bytes {offset:,} to {stop:,} of record {record.spec.name} ({total:,} bytes): both must be "
                f"multiples of its chunk length {chunk_nbytes:,}, or the record's end"
            )
        view = memoryview(buffer).cast("B")
        if len(view) < stop - offset:
            raise ValueError(
                f"a buffer of {len(view):,} bytes for {stop - offset:,} bytes of record {record.spec.name}"
            )
        return cls(record, view[: stop - offset], offset // chunk_nbytes, -(-stop // chunk_nbytes))

    def checksums(self, generation: int) -> list[int]:
        """Return the checksum of each chunk as the buffer is now, as bytes of `generation`."""
        return [
            crc32c(self._chunk(chunk), self.record.seed(chunk, generation))
            for chunk in range(self.first, self.end)
        ]

    def transfers(self, version: Version, first: int, end: int, *, verify: bool) -> Iterator[Transfer]:
        """Yield the requests that move chunks `first` to `end` between the buffer and `version`."""
        stripe = self.record.stripe
        base = self.first * stripe.chunk_nbytes
        for run in stripe.runs(first, end, MAX_REQUEST_NBYTES):
            begin = stripe.chunk_span(run.first)[0]
            checks: list[Check] = []
            for chunk in range(run.first, run.end) if verify else ():
                low, high = stripe.chunk_span(chunk)
                seed = self.record.seed(chunk, version.generation)
                checks.append(Check(chunk, low - begin, high - begin, seed, version.checksums[chunk]))
            yield Transfer(
                run.drive,
                self.record.offsets[version.extent][run.drive] + run.offset_bytes,
                self.view[begin - base : begin - base + run.nbytes],
                tuple(checks),
            )

    def _chunk(self, chunk: int) -> memoryview:
        base = self.first * self.record.stripe.chunk_nbytes
        begin, end = self.record.stripe.chunk_span(chunk)
        return self.view[begin - base : end - base]
