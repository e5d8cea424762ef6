"""The description of a snapshot and its bytes: pure, no I/O.

A snapshot holds every mutable record of one committed generation, in table order. On each drive the
chunks of each record that lie there follow each other as in an extent, and the records follow each
other without gaps: where a byte lies is a function of the run's table, so the description holds no
offsets. Its checksums are those of the generation, seeds included; nothing is summed anew, and what
was damaged before it was copied does not verify in the copy.

Decoding trusts nothing; see `fields`.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast
from uuid import UUID

from ..errors import CorruptionError
from .fields import Fields
from .framing import frame, unframe
from .records import MAX_CHUNKS, MAX_GENERATION, MAX_MANIFEST_NBYTES, MAX_NBYTES, MAX_RECORDS, RecordSpec
from .stripe import Stripe, pack_extents

__all__ = [
    "Snapshot",
    "SnapshotEntry",
    "check_name",
    "check_table",
    "decode_snapshot",
    "encode_snapshot",
    "layout",
]

_KIND = "offload-snapshot"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


@dataclass(frozen=True, slots=True)
class SnapshotEntry:
    """A record in a snapshot.

    Attributes:
        name: the record's.
        generation: in which its bytes were written.
        checksums: crc32c of each chunk.
    """

    name: str
    generation: int
    checksums: Sequence[int]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What a snapshot is.

    Attributes:
        run_id: the run.
        name: the snapshot's.
        generation: the generation it is a copy of.
        nbytes: of the copied records, on all drives together.
        records: the mutable records of the run, in table order.
        state: what was committed with the generation.
    """

    run_id: UUID
    name: str
    generation: int
    nbytes: int
    records: tuple[SnapshotEntry, ...]
    state: Mapping[str, Any]


def check_name(name: str) -> str:
    """Return `name` if a snapshot may have it: it becomes a part of a file's name.

    Raises:
        ValueError: not 1 to 64 letters, digits, `_` and `-`, the first a letter or digit.
    """
    if not _NAME.fullmatch(name):
        raise ValueError(
            "a snapshot's name has 1 to 64 letters, digits, _ and -, and begins with a letter or digit; "
            f"got {name[:80]!r}"
        )
    return name


def layout(
    specs: Sequence[RecordSpec], stripes: Sequence[Stripe]
) -> tuple[dict[str, tuple[int, ...]], tuple[int, ...]]:
    """Return where the mutable records of a table lie in a snapshot.

    Returns:
        For each mutable record its byte offset in each drive's file; and each file's length.
    """
    mutable = [(spec, stripe) for spec, stripe in zip(specs, stripes, strict=True) if spec.mutable]
    offsets = pack_extents([stripe for _, stripe in mutable], [1] * len(mutable))
    num_drives = stripes[0].deal.num_drives if stripes else 0
    lengths = tuple(sum(stripe.drive_nbytes(drive) for _, stripe in mutable) for drive in range(num_drives))
    return {spec.name: extents[0] for (spec, _), extents in zip(mutable, offsets, strict=True)}, lengths


def encode_snapshot(snapshot: Snapshot) -> bytes:
    """Return the bytes of a description.

    Raises:
        ValueError: the state is not JSON, or the description is longer than 16 MiB.
    """
    body = {
        "generation": snapshot.generation,
        "name": snapshot.name,
        "nbytes": snapshot.nbytes,
        "records": [
            {
                "crc32c": struct.pack(f">{len(entry.checksums)}I", *entry.checksums).hex(),
                "generation": entry.generation,
                "name": entry.name,
            }
            for entry in snapshot.records
        ],
        "run_id": str(snapshot.run_id),
        "state": dict(snapshot.state),
    }
    data = frame(_KIND, body)[0]
    if len(data) > MAX_MANIFEST_NBYTES:
        raise ValueError(
            f"the description of a snapshot has {len(data):,} bytes, at most {MAX_MANIFEST_NBYTES:,} are "
            "allowed"
        )
    return data


def decode_snapshot(data: bytes, path: str, run_id: UUID, name: str) -> Snapshot:
    """Return the snapshot that `data` describes; the inverse of `encode_snapshot`.

    Args:
        data: the whole file.
        path: its path, for messages.
        run_id: the run whose folder it lies in.
        name: the name that its file's name promises.

    Raises:
        CorruptionError: torn, changed, a value that no valid description has, or of another snapshot.
        StorageError: written by a newer major version of the format.
    """
    body, _ = unframe(_KIND, data, path)
    fields = Fields(path, "description of a snapshot")
    its_run, its_name = fields.run_id(body), fields.value(body, "name", str)
    if its_run != run_id or its_name != name:
        raise CorruptionError(
            f"{path} describes snapshot {its_name!r:.70} of run {its_run}, which is not what its name says",
            path=path,
        )
    generation = fields.number(body, "generation", 1, MAX_GENERATION)
    return Snapshot(
        run_id=run_id,
        name=name,
        generation=generation,
        nbytes=fields.number(body, "nbytes", 0, MAX_NBYTES),
        records=tuple(
            _entry(fields, table, generation) for table in fields.items(body, "records", 0, MAX_RECORDS)
        ),
        state=fields.value(body, "state", cast("type[dict[str, Any]]", dict)),
    )


def _entry(fields: Fields, table: Any, generation: int) -> SnapshotEntry:
    name = fields.value(table, "name", str)
    num_chunks = len(fields.value(table, "crc32c", str)) // 8
    if num_chunks > MAX_CHUNKS:
        fields.refuse(f"record {name[:64]!r} has {num_chunks:,} chunks, at most {MAX_CHUNKS:,}")
    return SnapshotEntry(
        name, fields.number(table, "generation", 1, generation), fields.checksums(table, num_chunks)
    )


def check_table(
    snapshot: Snapshot, specs: Sequence[RecordSpec], stripes: Sequence[Stripe], path: str
) -> None:
    """Check that a snapshot is of the run with this table.

    Raises:
        CorruptionError: other records, or another number of chunks; `path` is the description's.
    """
    wanted = [
        (spec.name, stripe.num_chunks) for spec, stripe in zip(specs, stripes, strict=True) if spec.mutable
    ]
    found = [(entry.name, len(entry.checksums)) for entry in snapshot.records]
    if wanted != found or snapshot.nbytes != sum(spec.nbytes for spec in specs if spec.mutable):
        raise CorruptionError(
            f"{path} does not describe the records of this run: {len(found)} of {snapshot.nbytes:,} bytes, "
            f"the run has {len(wanted)}",
            path=path,
        )
