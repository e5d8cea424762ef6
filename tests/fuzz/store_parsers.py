"""Harnesses over the small files of a run folder: frame, manifest, ownership file, snapshot, lock.

A body is framed again with a right checksum, so that mutation reaches what lies behind it.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from uuid import UUID

from fuzz.harness import Finding, Harness

from offload.aio import crc32c
from offload.errors import StorageError
from offload.store import lock
from offload.store.format import decode_manifest, encode_manifest
from offload.store.framing import unframe
from offload.store.owner import Owner, decode_owner, encode_owner
from offload.store.records import Manifest, stripes_of
from offload.store.snapshot_format import check_table, decode_snapshot, encode_snapshot

__all__ = ["HARNESSES", "framed"]

DOCUMENT = (Path(__file__).resolve().parents[2] / "docs" / "format.md").read_text()
RUN_ID = UUID("00010203-0405-4607-8809-0a0b0c0d0e0f")
KINDS = ("offload-manifest", "offload-run", "offload-snapshot")


def framed(kind: str, body: bytes) -> bytes:
    """Return `body` behind a first line that fits it."""
    line = f"{kind} 1.0 nbytes={len(body)}".encode()
    return b"%b crc32c=%08x\n%b" % (line, crc32c(body, crc32c(line)), body)


def _example(kind: str) -> bytes:
    found = re.search(rf"    ({kind} .*)\n    (\{{.*\}})\n", DOCUMENT)
    assert found is not None, f"docs/format.md has no example of {kind}"
    return "\n".join(found.groups()).encode()


def _body(data: bytes) -> bytes:
    return data.partition(b"\n")[2]


def _example_manifest() -> Manifest:
    return decode_manifest(_example(KINDS[0]), "example")[0]


def _manifest_in_place() -> bytes:
    """Return what the example is with one extent for each record, while it is written over."""
    example = _example_manifest()
    records = tuple(
        replace(entry, offsets=(entry.offsets[entry.extent],), extent=0) for entry in example.records
    )
    return encode_manifest(replace(example, records=records, in_place=True, in_use=True))[0]


def _owner() -> bytes:
    return encode_owner(Owner(RUN_ID, 1, ("/mnt/a", "/mnt/b")))


def _parse_frame(data: bytes, folder: Path) -> None:
    for kind in KINDS:
        try:
            unframe(kind, data, "it")
        except StorageError:
            if kind == KINDS[-1]:
                raise


def _parse_manifest(data: bytes, folder: Path) -> None:
    manifest, _ = decode_manifest(framed(KINDS[0], data), "it")
    specs = [entry.spec for entry in manifest.records]
    stripes = stripes_of(specs, manifest.chunk_nbytes, manifest.deal)
    for entry, stripe in zip(manifest.records, stripes, strict=True):
        for extent in entry.offsets:
            for drive, nbytes in enumerate(manifest.drive_nbytes):
                if extent[drive] < 0 or extent[drive] + stripe.drive_nbytes(drive) > nbytes:
                    raise Finding(f"{entry.spec.name} reaches outside of drive {drive}")
        if entry.checksums and len(entry.checksums) != stripe.num_chunks:
            raise Finding(f"{entry.spec.name} has {len(entry.checksums)} checksums")
    if decode_manifest(encode_manifest(manifest)[0], "again")[0] != manifest:
        raise Finding("a manifest that was read is not what is written again")


def _parse_owner(data: bytes, folder: Path) -> None:
    owner = decode_owner(framed(KINDS[1], data), "it", RUN_ID)
    if (
        not 0 <= owner.drive < len(owner.directories)
        or decode_owner(encode_owner(owner), "again", RUN_ID) != owner
    ):
        raise Finding(f"an owner that was read is not what is written again: {owner}")


def _parse_snapshot(data: bytes, folder: Path) -> None:
    snapshot = decode_snapshot(framed(KINDS[2], data), "it", RUN_ID, "a")
    if decode_snapshot(encode_snapshot(snapshot), "again", RUN_ID, "a") != snapshot:
        raise Finding("a snapshot that was read is not what is written again")
    example = _example_manifest()
    specs = [entry.spec for entry in example.records]
    check_table(snapshot, specs, stripes_of(specs, example.chunk_nbytes, example.deal), "it")


def _parse_lock(data: bytes, folder: Path) -> None:
    holder = lock._parse(data)
    if holder is not None and (type(holder[0]) is not int or holder[0] < 0):
        raise Finding(f"the holder is {holder}")
    if "is locked by" not in lock._who(data, "it"):
        raise Finding("a message does not say that the run is locked")


HARNESSES = (
    Harness(
        name="frame",
        kind="bytes",
        parse=_parse_frame,
        seeds=lambda: [_example(KINDS[0]), _owner(), _example(KINDS[2])],
    ),
    Harness(
        name="manifest",
        parse=_parse_manifest,
        seeds=lambda: [_body(_example(KINDS[0])), _body(_manifest_in_place())],
    ),
    Harness(name="owner", parse=_parse_owner, seeds=lambda: [_body(_owner())]),
    Harness(name="snapshot", parse=_parse_snapshot, seeds=lambda: [_body(_example(KINDS[2]))]),
    Harness(
        name="lock",
        refuses=False,
        parse=_parse_lock,
        seeds=lambda: [
            json.dumps({"boot_id": lock._boot_id(), "pid": pid}).encode() for pid in (1, 4_000_000)
        ],
    ),
)
