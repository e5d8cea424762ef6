"""The output directory of a fine-tuning run: which run it holds, its settings and its metrics.

    output_dir/run.json               the run's id, its drives, what it must not change
    output_dir/config.resolved.yaml   every key with its value
    output_dir/metrics.jsonl          one record a step
    output_dir/final/                 the result

Invariants:
- `run.json` is durable before anything is made on a drive, so no start loses track of a run. It says
  `imported` only after the first commit; before that a start removes what is there and begins anew.
- `metrics.jsonl` never holds a step twice: a resumed run cuts what came after its commit.

Thread rule: one thread. Two processes on one directory are kept apart by the lock of the store.
"""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NoReturn
from uuid import uuid4

from ..errors import ConfigError, DiskFullError, StateError, StorageError
from ..export.checkpoint import write_json
from ..store import list_runs, remove_run
from .config import FinetuneConfig
from .pointer import (
    POINTER_NAME,
    RunPointer,
    find_original,
    is_same_directory,
    read_pointer,
    run_directories,
)

__all__ = ["OutputDirectory", "RunPointer"]

CONFIG_NAME = "config.resolved.yaml"
METRICS_NAME = "metrics.jsonl"

# What a record of a step has and the loop reads again; larger numbers than this are nobody's.
_STEP_NUMBERS = ("loss", "seconds", "num_tokens", "disk_read_nbytes", "disk_written_nbytes")
_MAX_NUMBER = 1e300

# A block of most file systems; `run.json` is smaller.
POINTER_NBYTES = 4096


class OutputDirectory:
    """See the module.

    Args:
        path: the directory; made by `begin`, together with its parents.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        self._made: list[Path] = []

    @property
    def final(self) -> Path:
        """Where the trained model goes."""
        return self.path / "final"

    @property
    def state(self) -> Path:
        """Where the run's state goes when the user names no drive."""
        return self.path / "state"

    @property
    def metrics(self) -> Path:
        """One JSON record a line."""
        return self.path / METRICS_NAME

    def pointer(self) -> RunPointer | None:
        """Return which run the directory holds, or None.

        Raises:
            CorruptionError: `run.json` is there and cannot be understood.
        """
        return read_pointer(self.path)

    def begin(
        self, config: FinetuneConfig, disk: tuple[Path, ...], identity: Mapping[str, Any]
    ) -> RunPointer:
        """Make the directory and record a new run in it, durably, before the run itself is made.

        Raises:
            ConfigError: the directory holds files of these names that are not a run's.
            StorageError: it cannot be made or written.
        """
        for name in (POINTER_NAME, CONFIG_NAME, METRICS_NAME):
            if (self.path / name).exists():
                raise ConfigError(
                    f"{self.path} holds a {name} and no run of ours; name a new output_dir, or move it away"
                )
        drives = tuple(str(path.absolute()) for path in disk)
        pointer = RunPointer(str(uuid4()), drives, dict(identity), directory=str(self.path))
        try:
            missing = [path for path in (self.path, *self.path.parents) if not path.exists()]
            for path in reversed(missing):
                path.mkdir()
                self._made.append(path)
            if self.state in (Path(name) for name in pointer.disk) and not self.state.exists():
                self.state.mkdir(mode=0o700)
                self._made.append(self.state)
            # First: a start that is killed behind it knows by this file that the others are ours.
            self._write(pointer)
            self.save_config(config)
        except OSError as error:
            for name in (POINTER_NAME, CONFIG_NAME):
                # The path itself, or a part of it, may be a file.
                with suppress(FileNotFoundError, NotADirectoryError):
                    (self.path / name).unlink()
            self._remove_made()
            _fail(error, self.path, POINTER_NBYTES)
        return pointer

    def save_config(self, config: FinetuneConfig) -> None:
        """Write every key with its value, for the user to read and to start from."""
        path = self.path / CONFIG_NAME
        text = config.to_yaml()
        try:
            _replace(path, text)
        except OSError as error:
            _fail(error, path, len(text))

    def mark_imported(self, pointer: RunPointer, disk: tuple[Path, ...]) -> RunPointer:
        """Note, durably, that the run has a first commit, and where its drives are mounted now."""
        drives = tuple(str(path.absolute()) for path in disk)
        return self._update(pointer, imported=True, disk=drives, directory=str(self.path))

    def mark_exported(self, pointer: RunPointer, step: int) -> RunPointer:
        """Note, durably, that `final` holds the weights of `step`."""
        return self._update(pointer, exported_step=step)

    def abandon(self, pointer: RunPointer) -> None:
        """Remove a run that was never committed: its folders on the drives, then our own files.

        Raises:
            LockedError: another process is importing it at this moment.
            StateError: it was imported; such a run is never removed here.
        """
        if pointer.imported:
            raise StateError(f"run {pointer.run_id} has committed steps; it is not removed")
        # A directory that was moved has its state within it still.
        directories = run_directories(self.path, pointer)
        for directory in directories:
            if _has_steps(directory, pointer.run_id):
                raise StateError(
                    f"{self.path / POINTER_NAME} says that run {pointer.run_id} was never imported, and in"
                    f" {directory} it has committed steps: it is not removed. {self.path} may be an old copy"
                    " of the directory that the run goes on in; use another output_dir"
                )
        for directory in directories:
            _remove_run(directory, pointer.run_id)
        for name in (CONFIG_NAME, METRICS_NAME, POINTER_NAME):
            (self.path / name).unlink(missing_ok=True)
        self._remove_made()

    def check_own(self, pointer: RunPointer, disk: tuple[Path, ...]) -> None:
        """Raise when this directory is a copy of one that has the same run on the same drives.

        A copy that has copies of the run's folders as well is a run of its own, and so is a directory that
        was moved.

        Args:
            pointer: what was found here.
            disk: where the run's folders are.

        Raises:
            ConfigError: names both directories and the drives.
        """
        theirs, original = find_original(self.path, pointer), pointer.directory
        if theirs is None:
            return
        shared = [str(mine) for mine in disk if any(is_same_directory(mine, other) for other in theirs.disk)]
        if pointer.imported and not shared:
            return
        where = f"run {pointer.run_id}" + (f" in {', '.join(shared)}" if shared else "")
        raise ConfigError(
            f"{self.path} is a copy of {original}, and both hold {where}: two of them would change each"
            f" other's run. Go on in {original}; or use a new output_dir for a run of its own; or, to go on"
            f" here and never there, remove {original}/{POINTER_NAME}"
        )

    def check_same(self, pointer: RunPointer, identity: Mapping[str, Any]) -> None:
        """Raise unless a resume has everything that the run began with.

        Raises:
            ConfigError: lists every key that differs, with the old and the new value.
        """
        old = dict(pointer.identity)
        keys = [key for key in dict.fromkeys([*old, *identity]) if old.get(key) != identity.get(key)]
        if keys:
            changes = "; ".join(f"{key}: {old.get(key)!r} then, {identity.get(key)!r} now" for key in keys)
            raise ConfigError(
                f"{self.path} holds a run that was started differently ({changes}); "
                "use the old values to go on, or another output_dir for a new run"
            )

    def append_metrics(self, record: Mapping[str, Any]) -> None:
        """Add one record; it is the operating system's when this returns, so a kill does not lose it."""
        line = json.dumps(record) + "\n"
        try:
            with open(self.metrics, "a", encoding="utf-8") as file:
                file.write(line)
        except OSError as error:
            _fail(error, self.metrics, len(line))

    def sync_metrics(self) -> None:
        """Let the records so far outlast a power cut."""
        try:
            with open(self.metrics, "a", encoding="utf-8") as file:
                os.fsync(file.fileno())
            _sync_directory(self.path)
        except OSError as error:
            _fail(error, self.metrics, 0)

    def read_metrics(self) -> list[dict[str, Any]]:
        """Return the records so far."""
        if not self.metrics.exists():
            return []
        return [json.loads(line) for line in self.metrics.read_text(encoding="utf-8").splitlines()]

    def cut_metrics(self, step: int) -> None:
        """Drop the records after `step`, which a resumed run will write again, and what is no record."""
        try:
            text = self.metrics.read_text(encoding="utf-8", errors="surrogateescape")
        except FileNotFoundError:
            return
        except OSError as error:
            _fail(error, self.metrics, 0)
        # Not splitlines: what somebody else wrote may hold other separators inside a line.
        lines = text.split("\n")
        kept = [line + "\n" for line in lines[:-1] if _step_of(line) <= step]
        if "".join(kept) == text:
            return
        text = "".join(kept)
        try:
            _replace(self.metrics, text)
        except OSError as error:
            _fail(error, self.metrics, len(text))

    def _update(self, pointer: RunPointer, **changes: Any) -> RunPointer:
        changed = replace(pointer, **changes)
        if changed != pointer:
            try:
                self._write(changed)
            except OSError as error:
                _fail(error, self.path, POINTER_NBYTES)
        return changed

    def _write(self, pointer: RunPointer) -> None:
        write_json(self.path / POINTER_NAME, {"format": "offload-run", "version": 1, **asdict(pointer)})

    def _remove_made(self) -> None:
        while self._made:
            path = self._made.pop()
            # Something else may have been put there meanwhile; then it stays.
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()


def _has_steps(directory: str, run_id: str) -> bool:
    """Whether a run has a commit behind its import."""
    if not os.path.isdir(directory):
        return False
    return any(run.run_id == run_id and run.generation > 1 for run in list_runs(directory))


def _remove_run(directory: str, run_id: str) -> None:
    try:
        remove_run([directory], run_id)
    except StorageError as error:
        # The start that is abandoned may have ended before it made this drive's folder.
        if error.errno != errno.ENOENT:
            raise


def _replace(path: Path, text: str) -> None:
    """Write a file beside `path` that takes its place, durably, when it is whole."""
    part = path.with_name(f".{path.name}.part")
    try:
        with open(part, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
        _sync_directory(path.parent)
    finally:
        part.unlink(missing_ok=True)


def _sync_directory(path: Path) -> None:
    directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _step_of(line: str) -> float:
    """Return a record's step; a line that is no record of ours counts as later than every step."""
    try:
        record = json.loads(line) if line.isascii() else None
    except (ValueError, RecursionError):
        return math.inf
    if not isinstance(record, dict) or type(record.get("step")) is not int or record["step"] < 0:
        return math.inf
    numbers = [record.get(key) for key in _STEP_NUMBERS if "loss" in record]
    return record["step"] if all(map(_is_number, numbers)) else math.inf


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < _MAX_NUMBER  # not nan either


def _fail(error: OSError, path: Path, needed_nbytes: int) -> NoReturn:
    if isinstance(error, StorageError):
        raise error
    where = error.filename or str(path)
    text = f"cannot use output_dir: {where}: {error.strerror or error}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        there = next(folder for folder in (path, *path.parents) if folder.is_dir())
        free_nbytes = shutil.disk_usage(there).free
        raise DiskFullError(
            f"{text}: {needed_nbytes:,} bytes needed, {free_nbytes:,} free; free space, then run the"
            " same command again",
            errno=error.errno,
            path=where,
            asked_nbytes=needed_nbytes,
            got_nbytes=free_nbytes,
        )
    raise StorageError(f"{text}; name a directory that can be written", errno=error.errno or 0, path=where)
