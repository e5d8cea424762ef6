"""Going back: the generation before the newest becomes the newest, after every byte of it was checked.

For a run whose newest generation is damaged. Nothing is overwritten or removed: what the older manifest
says is published once more under the next number, by the steps of an ordinary commit, so a kill at any
moment leaves the run as it was or gone back.

Thread rule: the caller's thread; the run is locked meanwhile.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any
from uuid import UUID

from ..aio.engine import Engine
from ..errors import CorruptionError
from . import manifests
from .drives import close_drives, open_drives
from .format import encode_manifest
from .reading import Generation
from .verify import Progress, verify_run

__all__ = ["FallBack", "fall_back"]


@dataclass(frozen=True, slots=True)
class FallBack:
    """What a run went back to.

    Attributes:
        left: the generation that is no longer the newest.
        source: the generation whose bytes count again.
        generation: the number under which they do.
        state: what was committed with them.
    """

    left: int
    source: int
    generation: int
    state: Mapping[str, Any]


def fall_back(
    directories: Sequence[str | os.PathLike[str]],
    *,
    engine: Engine,
    run_id: str,
    progress: Progress | None = None,
) -> FallBack:
    """Make the generation before the newest one the newest, when it is whole.

    Args:
        directories: the run's, in any order.
        engine: does the I/O.
        run_id: which run.
        progress: called with bytes checked so far and in all.

    Raises:
        LockedError: a live process uses the run.
        CorruptionError: there is no older generation, or it is damaged too; nothing was changed.
        StorageError: a drive is missing, or the manifest could not be made durable: open the run again.
    """
    paths = [os.path.abspath(directory) for directory in directories]
    drives, recovered = open_drives(paths, UUID(run_id), engine=engine)
    try:
        folders = [drive.folder for drive in drives]
        newest = recovered.manifest
        older = manifests.find_newest(folders, below=newest.generation)
        source = Generation(drives, older, engine=engine)
        if not source.number or newest.in_place:
            raise CorruptionError(
                f"run {run_id} has no committed generation before {newest.generation} to go back to",
                path=folders[0].path,
            )
        report = verify_run(source.read, source.written, source.chunk_nbytes, progress)
        if not report.ok:
            raise CorruptionError(
                f"generation {source.number} of run {run_id} is damaged too, in {len(report.damaged)} chunks,"
                f" the first: {report.damages[0]}",
                path=folders[0].path,
            ) from report.damages[0]
        manifest = replace(older.manifest, generation=newest.generation + 1, parent=recovered.checksum)
        data, _ = encode_manifest(manifest)
        manifests.stage(folders, manifest.generation, data)
        manifests.publish(folders, manifest.generation)
    finally:
        close_drives(drives)
    return FallBack(newest.generation, source.number, manifest.generation, manifest.state)
