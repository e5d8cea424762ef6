"""Which run an output directory holds: the file `run.json` of `offload finetune`, read and nothing else.

Nothing read here is trusted beyond its form: what it names is opened, and removed, only after the run
folders have proved themselves.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

from ..errors import CorruptionError, StorageError

__all__ = [
    "POINTER_NAME",
    "RunPointer",
    "find_original",
    "is_same_directory",
    "read_pointer",
    "run_directories",
]

POINTER_NAME = "run.json"


@dataclass(frozen=True, slots=True)
class RunPointer:
    """What `run.json` says.

    Attributes:
        run_id: the run's UUID.
        disk: its directories, absolute.
        identity: keys and values that a resume must not change.
        imported: whether the weights were imported and committed.
        exported_step: the step whose weights `final` holds, None before the first export.
        directory: the output directory that it was written in, absolute: another one is a copy, or was moved.
            None where an earlier version wrote it.
    """

    run_id: str
    disk: tuple[str, ...]
    identity: Mapping[str, Any]
    imported: bool = False
    exported_step: int | None = None
    directory: str | None = None


def read_pointer(directory: Path) -> RunPointer | None:
    """Return which run `directory` holds, or None.

    Raises:
        CorruptionError: `run.json` is there and cannot be understood.
        StorageError: it cannot be read.
    """
    path = directory / POINTER_NAME
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if value["format"] != "offload-run":
            raise ValueError("another format")
        run_id, exported_step = str(UUID(value["run_id"])), value["exported_step"]
        if not isinstance(value["disk"], list) or not all(
            isinstance(disk, str) and "\0" not in disk for disk in value["disk"]
        ):
            raise ValueError("disk is no list of directories")
        if exported_step is not None and type(exported_step) is not int:
            raise ValueError("exported_step is no step")
        written_in = value.get("directory")
        if written_in is not None and (not isinstance(written_in, str) or "\0" in written_in):
            raise ValueError("directory is none")
        return RunPointer(
            run_id,
            tuple(value["disk"]),
            dict(value["identity"]),
            imported=value["imported"] is True,
            exported_step=exported_step,
            directory=written_in,
        )
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise StorageError(
            f"cannot read {path}: {error.strerror or error}", errno=error.errno or 0, path=str(path)
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CorruptionError(
            f"{path} is damaged ({error!r:.300}); restore it, or use another output_dir", path=str(path)
        ) from error


def run_directories(directory: Path, pointer: RunPointer) -> tuple[str, ...]:
    """Return where the folders of a run are, read in `directory`: what lay in it has come along with it.

    Args:
        directory: where `pointer` was read; perhaps another than it was written in.
        pointer: what it says.
    """
    if pointer.directory is None:
        return pointer.disk
    return tuple(
        str(directory / os.path.relpath(disk, pointer.directory))
        if Path(disk).is_relative_to(pointer.directory)
        else disk
        for disk in pointer.disk
    )


def find_original(directory: Path, pointer: RunPointer) -> RunPointer | None:
    """Return what the output directory says that `directory` is a copy of; None where it is none.

    A directory that was moved is no copy: nothing is left where it was written, or another run.

    Args:
        directory: where `pointer` was read.
        pointer: what it says.

    Raises:
        CorruptionError: the original's `run.json` cannot be understood.
        StorageError: it cannot be read.
    """
    if pointer.directory is None or is_same_directory(pointer.directory, directory):
        return None
    original = read_pointer(Path(pointer.directory))
    return original if original is not None and original.run_id == pointer.run_id else None


def is_same_directory(one: str | Path, other: str | Path) -> bool:
    """Whether two names are of one directory that is there."""
    try:
        return os.path.samefile(one, other)
    except OSError:
        return False
