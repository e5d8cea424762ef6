"""The way from writes that have ended to a committed generation: its manifest, and the order of syncs.

[Note: in place] A run that is created `in_place` has one extent for a record in place of two: half the room
for all that changes, and no way back. Before the first write over something committed, a manifest that says
"in use" is published on every drive, and the ones before are removed; a commit publishes one that does not.
Nobody opens a run whose newest manifest is in use (CorruptionError), because its records may be of several
steps. So a process that ends between the two loses the run, which is then never taken for a whole one. What
is written is checksummed and verified as ever.

Owns nothing; the store calls it from the thread that commits, with no write in flight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from ..aio.engine import Engine
from ..errors import DiskFullError, StateError
from . import manifests
from .drives import Drive
from .format import encode_manifest
from .records import Manifest
from .table import Record, describe_ranges

__all__ = ["made_durable", "mark_in_use", "next_manifest"]


def next_manifest(
    base: Manifest, parent: str, records: Mapping[str, Record], state: Mapping[str, Any]
) -> Manifest:
    """Return what the generation after `base` is.

    Args:
        base: the committed generation.
        parent: its checksum.
        records: the table, with what was written since.
        state: what the caller commits with it.

    Raises:
        StateError: a record is partly written; names it and the chunks.
    """
    for name, record in records.items():
        if missing := record.missing():
            raise StateError(
                f"record {name} is only partly written: chunks {describe_ranges(missing)} of "
                f"{record.stripe.num_chunks} are missing; write the whole record before the commit"
            )
    return replace(
        base,
        generation=base.generation + 1,
        parent=parent,
        records=tuple(record.next_entry() for record in records.values()),
        state=state,
        in_use=False,
    )


def mark_in_use(base: Manifest, parent: str) -> Manifest:
    """Return the manifest that is durable before records of `base` are written over; [Note: in place].

    Args:
        base: the committed generation, of a run that is written in place.
        parent: its checksum.
    """
    return replace(base, generation=base.generation + 1, parent=parent, in_use=True)


@contextmanager
def made_durable(
    engine: Engine, drives: Sequence[Drive], manifest: Manifest, on_fatal: Callable[[BaseException], None]
) -> Iterator[str]:
    """Sync the data, publish the manifest, and run the block, which goes on from it.

    A failed sync may have dropped what it should have written and cannot be tried again. After the
    first rename the new generation may be found by the next opening, so its extents must not be
    written any more. Only a manifest that found no room has changed nothing.

    Args:
        engine: of the data files.
        drives: of the run.
        manifest: the generation to commit.
        on_fatal: called with a failure after which nothing may be written.

    Yields:
        The manifest's checksum.

    Raises:
        DiskFullError: no room for the manifest; nothing has changed.
        StorageError: a sync or rename failed.
    """
    data, checksum = encode_manifest(manifest)
    folders = [drive.folder for drive in drives]
    has_room = True
    try:
        for drive in drives:
            engine.sync(drive.file)
        try:
            manifests.stage(folders, manifest.generation, data)
        except DiskFullError:
            has_room = False
            raise
        manifests.publish(folders, manifest.generation)
        # Still inside: an interrupt here must not leave the store building on the generation before.
        yield checksum
    except BaseException as error:
        if has_room:
            on_fatal(error)
        raise
