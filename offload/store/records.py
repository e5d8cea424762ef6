"""What a run stores: records, their place in a manifest, a manifest; and the caps on all of them.

Frozen data and arithmetic; `format` turns a manifest into bytes and back.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from ..aio.engine import ALIGNMENT_NBYTES
from ..sizes import GIB
from .stripe import Deal, Stripe, deal_by_weight, pack_extents

__all__ = [
    "MAX_CHUNKS",
    "MAX_CHUNK_NBYTES",
    "MAX_DRIVES",
    "MAX_GENERATION",
    "MAX_MANIFEST_NBYTES",
    "MAX_NBYTES",
    "MAX_RECORDS",
    "Manifest",
    "RecordEntry",
    "RecordSpec",
    "extents_nbytes",
    "first_manifest",
    "num_extents",
    "stripes_of",
]

# 2^20 chunks are 4 TiB of records at 4 MiB a chunk, and 8 MiB of checksums in the manifest.
MAX_CHUNKS = 1 << 20
MAX_RECORDS = 100_000
MAX_DRIVES = 64
MAX_MANIFEST_NBYTES = 16 << 20

MAX_NBYTES = 1 << 50
MAX_GENERATION = 1 << 62
MAX_CHUNK_NBYTES = GIB
_NAME = re.compile(r"[!-~]{1,256}")


@dataclass(frozen=True, slots=True)
class RecordSpec:
    """A record to make room for.

    Attributes:
        name: printable ASCII without spaces, at most 256 characters, unique in the run.
        nbytes: a positive multiple of 4096.
        mutable: False for bytes that are written once in a run (a frozen base model): one extent
            instead of two, also where the run is not written in place.
    """

    name: str
    nbytes: int
    mutable: bool = True

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ValueError(
                f"a record's name is 1 to 256 printable ASCII characters, got {self.name[:64]!r}"
            )
        if not 0 < self.nbytes <= MAX_NBYTES or self.nbytes % ALIGNMENT_NBYTES:
            raise ValueError(
                f"record {self.name}: nbytes must be a positive multiple of 4096, got {self.nbytes}"
            )


@dataclass(frozen=True, slots=True)
class RecordEntry:
    """A record in a manifest.

    Attributes:
        spec: name, length, mutability.
        offsets: for each extent, its byte offset in each drive's data file.
        extent: which extent holds the committed bytes.
        generation: in which they were written; 0 when the record was never written.
        checksums: crc32c of each chunk; empty when the record was never written.
    """

    spec: RecordSpec
    offsets: tuple[tuple[int, ...], ...]
    extent: int = 0
    generation: int = 0
    checksums: Sequence[int] = ()


@dataclass(frozen=True, slots=True)
class Manifest:
    """One generation of a run.

    Attributes:
        run_id: the run's UUID.
        generation: its number; 0 describes a run in which nothing was committed.
        parent: checksum of the manifest of the generation before, None for generation 0.
        chunk_nbytes: length of a chunk.
        deal: which drive each chunk lies on.
        drive_nbytes: length of each drive's data file.
        records: the table of records.
        state: what the caller committed with the generation.
        identity: what the caller said the run is, when it was created.
        in_place: whether records have one extent each, which is written over.
        in_use: whether that may have happened since: what is committed is then there only if the process
            that began it ends in order. Never without `in_place`.
    """

    run_id: UUID
    generation: int
    parent: str | None
    chunk_nbytes: int
    deal: Deal
    drive_nbytes: tuple[int, ...]
    records: tuple[RecordEntry, ...]
    state: Mapping[str, Any]
    identity: Mapping[str, Any]
    in_place: bool = False
    in_use: bool = False


def num_extents(spec: RecordSpec, *, in_place: bool) -> int:
    """Return how many extents a record has: two when it is mutable and not written in place."""
    return 2 if spec.mutable and not in_place else 1


def extents_nbytes(
    specs: Sequence[RecordSpec], stripes: Sequence[Stripe], num_drives: int, *, in_place: bool
) -> tuple[int, ...]:
    """Return how long each drive's data file is: all extents of all records."""
    return tuple(
        sum(
            num_extents(spec, in_place=in_place) * stripe.drive_nbytes(drive)
            for spec, stripe in zip(specs, stripes, strict=True)
        )
        for drive in range(num_drives)
    )


def stripes_of(specs: Sequence[RecordSpec], chunk_nbytes: int, deal: Deal) -> list[Stripe]:
    """Return how each record of a table is cut and dealt.

    Raises:
        ValueError: a chunk length that is not allowed, too many records or chunks, a name twice.
    """
    if not ALIGNMENT_NBYTES <= chunk_nbytes <= MAX_CHUNK_NBYTES or chunk_nbytes % ALIGNMENT_NBYTES:
        raise ValueError(f"chunk_nbytes must be a multiple of 4096 up to 1 GiB, got {chunk_nbytes}")
    if len(specs) > MAX_RECORDS:
        raise ValueError(f"{len(specs):,} records; a run has at most {MAX_RECORDS:,}")
    names = {spec.name for spec in specs}
    if len(names) != len(specs):
        raise ValueError("two records have the same name")
    stripes = []
    num_chunks = 0
    for spec in specs:
        stripes.append(Stripe(spec.nbytes, chunk_nbytes, num_chunks, deal))
        num_chunks += stripes[-1].num_chunks
    if num_chunks > MAX_CHUNKS:
        raise ValueError(f"{num_chunks:,} chunks; a run has at most {MAX_CHUNKS:,}: raise chunk_nbytes")
    return stripes


def first_manifest(
    run_id: UUID,
    specs: Sequence[RecordSpec],
    *,
    num_drives: int,
    chunk_nbytes: int,
    weights: Sequence[float] | None,
    identity: Mapping[str, Any],
    in_place: bool,
) -> Manifest:
    """Lay a new run out: generation 0, in which no record was written.

    Raises:
        ValueError: drives, weights, records or chunks that no run can have; says which.
    """
    if not 1 <= num_drives <= MAX_DRIVES:
        raise ValueError(f"a run has 1 to {MAX_DRIVES} directories, got {num_drives}")
    if weights is not None and len(weights) != num_drives:
        raise ValueError(f"{len(weights)} weights for {num_drives} directories; give one for each")
    deal = deal_by_weight(weights if weights is not None else [1.0] * num_drives)
    stripes = stripes_of(specs, chunk_nbytes, deal)
    offsets = pack_extents(stripes, [num_extents(spec, in_place=in_place) for spec in specs])
    return Manifest(
        run_id=run_id,
        generation=0,
        parent=None,
        chunk_nbytes=chunk_nbytes,
        deal=deal,
        drive_nbytes=extents_nbytes(specs, stripes, num_drives, in_place=in_place),
        records=tuple(
            RecordEntry(spec, tuple(of_record)) for spec, of_record in zip(specs, offsets, strict=True)
        ),
        state={},
        identity=identity,
        in_place=in_place,
    )
