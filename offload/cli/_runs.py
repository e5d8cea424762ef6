"""Which runs the arguments of a command mean, and how a run is named: shared by the commands over runs.

An argument is a directory that runs lie in, a run's own folder, an output directory of `offload finetune`,
or a directory of such. Nothing is changed, and no run is kept from its user.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..errors import ConfigError, CorruptionError, StorageError
from ..report.terminal import printable
from ..store import FoundRun, RunInfo, RunState, find_runs
from ..training.pointer import (
    POINTER_NAME,
    RunPointer,
    find_original,
    is_same_directory,
    read_pointer,
    run_directories,
)

__all__ = [
    "Target",
    "age",
    "choose",
    "find_targets",
    "model_of",
    "print_json",
    "step_of",
    "to_json",
]

_FOLDER = re.compile(r"run-([0-9a-f-]{36})")
# The shortest part of an id that is taken for the whole of it.
_MIN_PREFIX = 4


@dataclass(frozen=True, slots=True)
class Target:
    """A run that was meant.

    Attributes:
        run: what was found of it.
        output: the output directory that names it, None when it was found on its drives alone.
        pointer: what the output directory says.
    """

    run: FoundRun
    output: Path | None = None
    pointer: RunPointer | None = None

    @property
    def label(self) -> str:
        """How messages name it."""
        return f"run {self.run.run_id}" + (f" of {self.output}" if self.output is not None else "")


def find_targets(arguments: Sequence[str]) -> tuple[Target, ...]:
    """Return the runs that `arguments` mean, the newest commit first.

    Raises:
        StorageError: an argument is not there, or is no directory.
        CorruptionError: an output directory's `run.json` is damaged.
    """
    everything: list[str] = []  # directories all of whose runs are meant
    places: dict[str, list[str]] = {}  # run -> directories that hold it, for runs that are meant alone
    outputs: list[tuple[Path, RunPointer]] = []
    for argument in arguments:
        path = Path(os.path.abspath(argument))
        if not path.is_dir():
            raise StorageError(
                f"{argument} is not a directory; name an output directory, a run's folder, or the directory"
                " of a drive that runs lie in",
                path=str(path),
            )
        if match := _FOLDER.fullmatch(path.name):
            places.setdefault(match[1], []).append(str(path.parent))
            continue
        for output in _outputs(path):
            pointer = read_pointer(output)
            if pointer is not None:
                outputs.append((output, pointer))
        everything.append(str(path))
    found = {run.run_id: run for run in find_runs(everything)}
    for run_id, directories in places.items():
        found[run_id] = _find(run_id, [*_directories(found.get(run_id)), *directories])
    # An original before its copies: of those that name the same folders, it has the run.
    outputs.sort(key=lambda named: find_original(*named) is not None)
    targets: list[Target] = []
    for output, pointer in outputs:
        run = _of_output(output, pointer, found)
        if not any(_is_same_run(run, target.run) for target in targets):
            targets.append(Target(run, output, pointer))
    targets += [
        Target(run) for run in found.values() if not any(_is_same_run(run, target.run) for target in targets)
    ]
    return tuple(sorted(targets, key=lambda target: -(target.run.newest.committed_s or 0)))


def _of_output(output: Path, pointer: RunPointer, found: Mapping[str, FoundRun]) -> FoundRun:
    """Return the run that an output directory names, with drives of it that only an argument names."""
    directories = list(run_directories(output, pointer))
    beside = _directories(found.get(pointer.run_id))
    if any(is_same_directory(one, other) for one in beside for other in directories) or not any(
        os.path.isdir(directory) for directory in directories
    ):
        directories += beside
    return _find(pointer.run_id, directories)


def _find(run_id: str, directories: Sequence[str]) -> FoundRun:
    there = [directory for directory in dict.fromkeys(directories) if os.path.isdir(directory)]
    runs = {run.run_id: run for run in find_runs(there)}
    return runs.get(run_id) or _absent(run_id, directories)


def _directories(run: FoundRun | None) -> list[str]:
    return [] if run is None else list(run.directories)


def _is_same_run(one: FoundRun, other: FoundRun) -> bool:
    """Whether two are one run and have a folder in common; a copied run has its folders elsewhere."""
    return one.run_id == other.run_id and any(
        mine.path == theirs.path or is_same_directory(mine.path, theirs.path)
        for mine in one.folders
        for theirs in other.folders
    )


def choose(targets: Sequence[Target], wanted: str | None, arguments: Sequence[str]) -> Target:
    """Return the one run that is meant.

    Args:
        targets: what was found.
        wanted: the beginning of a run's id, or None.
        arguments: where it was looked for, for messages.

    Raises:
        ConfigError: there is none, or several that it could be.
    """
    where = " ".join(arguments)
    if wanted is not None and len(wanted) < _MIN_PREFIX:
        raise ConfigError(
            f"--run: give at least the first {_MIN_PREFIX} characters of the id, got {wanted!r}"
        )
    chosen = [target for target in targets if wanted is None or target.run.run_id.startswith(wanted)]
    if len(chosen) == 1:
        return chosen[0]
    if not chosen:
        what = "no run" if wanted is None else f"no run whose id begins with {wanted}"
        raise ConfigError(f"{where} holds {what}; 'offload runs {where}' lists what is there")
    ids = ", ".join(target.run.run_id for target in chosen[:5])
    raise ConfigError(f"{where} holds {len(chosen)} runs: say which with --run ({ids})")


def model_of(target: Target) -> str:
    """Return what the run trains, as far as it says."""
    said = target.pointer.identity.get("model_name_or_path") if target.pointer is not None else None
    contents = (target.run.newest.identity or {}).get("contents")
    contents = contents if isinstance(contents, Mapping) else {}
    directory = said or contents.get("directory")
    name = contents.get("model")
    shown = os.path.basename(directory) if isinstance(directory, str) else name
    return printable(str(shown)) if isinstance(shown, str) and shown else "-"


def step_of(info: RunInfo) -> int | None:
    """Return the optimizer step that was committed, None where the run does not say."""
    step = (info.state or {}).get("step")
    return step if type(step) is int else None


def age(committed_s: float | None) -> str:
    """Return how long ago that was, to the nearest unit."""
    if committed_s is None:
        return "-"
    seconds = max(0.0, time.time() - committed_s)
    for limit_s, unit_s, unit in ((90, 1, "s"), (90 * 60, 60, "min"), (36 * 3600, 3600, "h")):
        if seconds < limit_s:
            return f"{seconds / unit_s:.0f} {unit} ago"
    return f"{seconds / 86400:.0f} days ago"


def to_json(target: Target) -> dict[str, Any]:
    """Return what is known of a run, for other programs."""
    run, newest = target.run, target.run.newest
    committed = newest.committed_s
    return {
        "run_id": run.run_id,
        "state": run.state.value,
        "reason": run.reason,
        "model": model_of(target),
        "step": step_of(newest),
        "generation": newest.generation,
        "nbytes": run.nbytes,
        "committed": None if committed is None else datetime.fromtimestamp(committed, UTC).isoformat(),
        "pid": run.holder,
        "output_dir": None if target.output is None else str(target.output),
        "folders": [
            {"path": folder.path, "drive": folder.drive, "problem": folder.problem, "notes": folder.notes}
            for folder in run.folders
        ],
    }


def print_json(value: Any) -> str:
    """Return `value` as indented JSON with a newline."""
    return json.dumps(value, indent=2, ensure_ascii=True) + "\n"


def _outputs(path: Path) -> list[Path]:
    """Return `path` when it is an output directory, else those that lie in it."""
    if (path / POINTER_NAME).is_file():
        return [path]
    try:
        with os.scandir(path) as entries:
            names = sorted(entry.name for entry in entries if entry.is_dir(follow_symlinks=False))
    except OSError as error:
        raise StorageError(
            f"cannot list {path}: {error.strerror}", errno=error.errno or 0, path=str(path)
        ) from error
    found = []
    for name in names:
        try:
            if (path / name / POINTER_NAME).is_file() and read_pointer(path / name) is not None:
                found.append(path / name)
        except (CorruptionError, PermissionError):
            continue  # somebody else's run.json, or folder
    return found


def _absent(run_id: str, directories: Sequence[str]) -> FoundRun:
    """Return a run that an output directory names and that is nowhere."""
    places = tuple(dict.fromkeys(directories)) or ("",)
    folders = tuple(
        RunInfo(run_id, os.path.join(directory, f"run-{run_id}"), "it is not there", drive)
        for drive, directory in enumerate(places)
    )
    return FoundRun(run_id, folders, RunState.DRIVE_MISSING, f"nothing of it is in {', '.join(places)}")
