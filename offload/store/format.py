"""A manifest, the description of one committed generation, and its bytes: pure, no I/O.

`docs/format.md` is the specification. Decoding trusts nothing: every number is checked against a cap
and against the others before it is used, so that a hostile manifest can make the store neither read
nor write outside its data files nor allocate much.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, cast

from ..aio.engine import ALIGNMENT_NBYTES
from .fields import Fields
from .framing import frame, unframe
from .records import (
    MAX_CHUNK_NBYTES,
    MAX_DRIVES,
    MAX_GENERATION,
    MAX_MANIFEST_NBYTES,
    MAX_NBYTES,
    MAX_RECORDS,
    Manifest,
    RecordEntry,
    RecordSpec,
    num_extents,
    stripes_of,
)
from .stripe import MAX_DEAL, Deal, Stripe

__all__ = [
    "Manifest",
    "RecordEntry",
    "RecordSpec",
    "decode_manifest",
    "encode_manifest",
    "max_manifest_nbytes",
]

_KIND = "offload-manifest"
# What the key `in_place` says of a run whose records are written over; other runs do not have it.
_CLEAN, _IN_USE = "clean", "in use"
# Step, schedules and the random state of Python, numpy, torch and eight GPUs are about 100 KB of JSON.
_STATE_NBYTES = 256 << 10


def encode_manifest(manifest: Manifest) -> tuple[bytes, str]:
    """Return the bytes of a manifest and its checksum.

    Raises:
        ValueError: the state or identity is not JSON, or the manifest is longer than 16 MiB.
    """
    body = {
        "chunk_nbytes": manifest.chunk_nbytes,
        "deal": manifest.deal.order,
        "drives": [{"nbytes": nbytes} for nbytes in manifest.drive_nbytes],
        "generation": manifest.generation,
        "identity": dict(manifest.identity),
        "parent": manifest.parent,
        "records": [_entry_to_json(entry) for entry in manifest.records],
        "run_id": str(manifest.run_id),
        "state": dict(manifest.state),
    }
    if manifest.in_place:
        body["in_place"] = _IN_USE if manifest.in_use else _CLEAN
    data, checksum = frame(_KIND, body)
    if len(data) > MAX_MANIFEST_NBYTES:
        raise ValueError(
            f"a manifest of {len(data):,} bytes, at most {MAX_MANIFEST_NBYTES:,}: commit a smaller state"
        )
    return data, checksum


def max_manifest_nbytes(manifest: Manifest, data: bytes) -> int:
    """Return how long a manifest of a run can become when every record is written.

    Args:
        manifest: the run's generation 0.
        data: its bytes.

    Raises:
        ValueError: longer than a manifest may be.
    """
    stripes = stripes_of([entry.spec for entry in manifest.records], manifest.chunk_nbytes, manifest.deal)
    nbytes = len(data) + 8 * sum(stripe.num_chunks for stripe in stripes)
    # Two generation numbers of 19 digits in every record and what a caller usually keeps as state.
    nbytes += 40 * len(stripes) + _STATE_NBYTES
    if nbytes > MAX_MANIFEST_NBYTES:
        raise ValueError(
            f"the run's manifest would have up to {nbytes:,} bytes, at most {MAX_MANIFEST_NBYTES:,} are "
            "allowed: raise chunk_nbytes or use fewer records"
        )
    return nbytes


def decode_manifest(data: bytes, path: str) -> tuple[Manifest, str]:
    """Return the manifest that `data` holds, and its checksum; the inverse of `encode_manifest`.

    Args:
        data: the whole file.
        path: its path, for messages.

    Raises:
        CorruptionError: torn, changed, or a value that no valid manifest has; names the value.
        StorageError: written by a newer major version of the format.
    """
    body, checksum = unframe(_KIND, data, path)
    return _Decoder(path, "manifest").manifest(body), checksum


def _entry_to_json(entry: RecordEntry) -> dict[str, Any]:
    return {
        "crc32c": struct.pack(f">{len(entry.checksums)}I", *entry.checksums).hex(),
        "extent": entry.extent,
        "generation": entry.generation,
        "mutable": entry.spec.mutable,
        "name": entry.spec.name,
        "nbytes": entry.spec.nbytes,
        "offsets": entry.offsets,
    }


class _Decoder(Fields):
    """Reads a manifest."""

    def manifest(self, body: dict[str, Any]) -> Manifest:
        generation = self.number(body, "generation", 0, MAX_GENERATION)
        drives = self.items(body, "drives", 1, MAX_DRIVES)
        drive_nbytes = tuple(self.number(d, "nbytes", 0, MAX_NBYTES, ALIGNMENT_NBYTES) for d in drives)
        order = self.items(body, "deal", 1, MAX_DEAL)
        deal = Deal(self.numbers(order, "deal", len(order), len(drives) - 1), len(drives))
        chunk_nbytes = self.number(body, "chunk_nbytes", ALIGNMENT_NBYTES, MAX_CHUNK_NBYTES, ALIGNMENT_NBYTES)
        in_place, in_use = self.in_place(body, generation)
        tables = self.items(body, "records", 0, MAX_RECORDS)
        specs = [self.spec(table) for table in tables]
        try:
            stripes = stripes_of(specs, chunk_nbytes, deal)
        except ValueError as error:
            self.refuse(str(error))
        records = tuple(
            self.entry(table, spec, stripe, generation, drive_nbytes, num_extents(spec, in_place=in_place))
            for table, spec, stripe in zip(tables, specs, stripes, strict=True)
        )
        self.check_overlaps(records, stripes, drive_nbytes)
        return Manifest(
            run_id=self.run_id(body),
            generation=generation,
            parent=self.parent(body, generation),
            chunk_nbytes=chunk_nbytes,
            deal=deal,
            drive_nbytes=drive_nbytes,
            records=records,
            state=self.value(body, "state", cast("type[dict[str, Any]]", dict)),
            identity=self.value(body, "identity", cast("type[dict[str, Any]]", dict)),
            in_place=in_place,
            in_use=in_use,
        )

    def in_place(self, body: dict[str, Any], generation: int) -> tuple[bool, bool]:
        """Return whether the run is written in place, and whether it is in use."""
        if "in_place" not in body:
            return False, False
        said = self.value(body, "in_place", str)
        if said not in (_CLEAN, _IN_USE) or (said == _IN_USE and generation == 0):
            self.refuse(f"'in_place' is {said[:16]!r} in generation {generation}")
        return True, said == _IN_USE

    def parent(self, body: dict[str, Any], generation: int) -> str | None:
        if generation == 0 and body.get("parent") is None:
            return None
        parent = self.value(body, "parent", str)
        if not re.fullmatch(r"[0-9a-f]{8}", parent):
            self.refuse(f"'parent' is {parent[:16]!r}, expected 8 hexadecimal digits")
        return parent

    def spec(self, table: Any) -> RecordSpec:
        name, mutable = self.value(table, "name", str), self.value(table, "mutable", bool)
        try:
            return RecordSpec(name, self.value(table, "nbytes", int), mutable)
        except ValueError as error:
            self.refuse(str(error))

    def entry(
        self,
        table: Any,
        spec: RecordSpec,
        stripe: Stripe,
        generation: int,
        drive_nbytes: tuple[int, ...],
        num_extents: int,
    ) -> RecordEntry:
        offsets = self.items(table, "offsets", num_extents, num_extents)
        written = self.number(table, "generation", 0, generation)
        return RecordEntry(
            spec=spec,
            offsets=tuple(
                self.numbers(extent, "offsets", len(drive_nbytes), MAX_NBYTES, ALIGNMENT_NBYTES)
                for extent in offsets
            ),
            extent=self.number(table, "extent", 0, num_extents - 1),
            generation=written,
            checksums=self.checksums(table, stripe.num_chunks if written else 0),
        )

    def check_overlaps(
        self, records: Sequence[RecordEntry], stripes: Sequence[Stripe], nbytes: tuple[int, ...]
    ) -> None:
        for drive, limit in enumerate(nbytes):
            extents = sorted(
                (extent[drive], extent[drive] + stripe.drive_nbytes(drive), entry.spec.name)
                for entry, stripe in zip(records, stripes, strict=True)
                for extent in entry.offsets
                if stripe.drive_nbytes(drive)
            )
            if extents and max(end for _, end, _ in extents) > limit:
                self.refuse(f"an extent on drive {drive} ends beyond its {limit:,} bytes")
            for (_, end, name), (begin, _, other) in pairwise(extents):
                if begin < end:
                    self.refuse(f"extents of {name} and {other} overlap on drive {drive}")
