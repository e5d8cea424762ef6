"""The ownership file of a run folder: proof that the folder is ours, and which drive of the run it is.

Nothing is ever deleted from a folder that lacks a valid one. Pure: bytes in, bytes out.
"""

from __future__ import annotations

from dataclasses import dataclass
from uuid import UUID

from ..errors import CorruptionError
from .framing import frame, unframe
from .records import MAX_DRIVES

__all__ = ["MAX_OWNER_NBYTES", "OWNER_NAME", "Owner", "decode_owner", "encode_owner"]

OWNER_NAME = "OFFLOAD_RUN"
# A path is at most 4096 bytes, six times that when every byte is escaped, once for each drive.
MAX_OWNER_NBYTES = 2 << 20

_KIND = "offload-run"


@dataclass(frozen=True, slots=True)
class Owner:
    """What a run folder says about itself.

    Attributes:
        run_id: the run.
        drive: which of its drives this folder is, from 0.
        directories: where the run's folders were when it was created, one a drive: a hint for
            messages about a missing drive, never a place to look.
    """

    run_id: UUID
    drive: int
    directories: tuple[str, ...]


def encode_owner(owner: Owner) -> bytes:
    """Return the bytes of the ownership file."""
    body = {"directories": owner.directories, "drive": owner.drive, "run_id": str(owner.run_id)}
    return frame(_KIND, body)[0]


def decode_owner(data: bytes, path: str, run_id: UUID) -> Owner:
    """Return what the ownership file `data` says.

    Args:
        data: the whole file.
        path: its path, for messages.
        run_id: the run that the folder's name promises.

    Raises:
        CorruptionError: damaged, or of another run.
        StorageError: written by a newer major version of the format.
    """
    body, _ = unframe(_KIND, data, path)
    directories, drive = body.get("directories"), body.get("drive")
    if body.get("run_id") != str(run_id):
        raise CorruptionError(f"{path} belongs to run {body.get('run_id')!r:.60}, not {run_id}", path=path)
    if (
        not isinstance(directories, list)
        or not 1 <= len(directories) <= MAX_DRIVES
        or not all(isinstance(directory, str) for directory in directories)
        or type(drive) is not int
        or not 0 <= drive < len(directories)
    ):
        raise CorruptionError(f"{path} does not name a drive of its run", path=path)
    return Owner(run_id, drive, tuple(directories))
