"""The folder an export is written to: made beside its target, locked, proved ours, put in place, removed.

A marker (`offload_export.json`) lists the files of an export. Invariants:
- Only files that a marker lists are ever replaced or removed, in a folder that holds nothing else.
- No symbolic link is followed: a folder is opened once and its entries are named relative to it.
- A folder that is being written is locked; nobody else removes it.

Thread rule: none of its own. No torch.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ..errors import ConfigError, LockedError, StorageError

__all__ = [
    "MARKER_NAME",
    "check_export_target",
    "find_leftovers",
    "mark",
    "put_in_place",
    "remove_export",
    "sync_path",
    "work_folder",
    "work_path",
    "write_json",
]

MARKER_NAME = "offload_export.json"
# An export that was killed before its marker was whole left at most the marker's part.
_UNMARKED = f".{MARKER_NAME}.part"
_LEFTOVER = re.compile(r"\..+\.offload-(tmp|old)")
_MAX_MARKER_NBYTES = 16 << 20
_MAX_MODE = 0o777

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
# The kernel or the file system cannot exchange two names: two renames have to do.
_NO_EXCHANGE = (errno.EINVAL, errno.ENOSYS, errno.EPERM)


def check_export_target(directory: str | os.PathLike[str]) -> None:
    """Raise `ConfigError` unless an export may be put at `directory`, and change nothing.

    It may when the path is absent, an empty directory, or holds exactly what an earlier export of
    ours wrote.
    """
    target = Path(directory)
    if not target.exists() and not target.is_symlink():
        return
    if target.is_symlink() or not target.is_dir():
        raise ConfigError(f"cannot export to {target}: it is not a directory; name another one")
    foreign = _foreign_entries(target)
    if foreign:
        raise ConfigError(
            f"cannot export to {target}: it holds files that an export of ours did not write"
            f" ({', '.join(foreign[:3])}); nothing was changed; name another directory or move these files"
            " away"
        )


def _foreign_entries(directory: Path) -> list[str]:
    """Return the entries of a folder that no export of ours wrote, sorted."""
    present = {entry.name for entry in directory.iterdir()}
    return sorted(present - (_marked_files(directory) or {_UNMARKED}))


def work_path(target: Path) -> Path:
    """Return where an export to `target` is written until it is whole."""
    return target.with_name(f".{target.name}.offload-tmp")


@contextmanager
def work_folder(target: Path) -> Iterator[Path]:
    """Make the folder that an export to `target` is written to, and lock it inside the block.

    What an interrupted export left there is removed before. When the block fails, the folder is removed.

    Raises:
        LockedError: another process exports to the same target.
        StorageError: a folder of that name is not ours, or its parent is open to everyone.
    """
    work = work_path(target)
    mode = os.stat(work.parent).st_mode
    if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
        raise StorageError(
            f"{work.parent} is writable by everyone (mode {stat.S_IMODE(mode):o}), so anyone could swap what"
            " is in it; use a directory of your own, or set its sticky bit",
            path=str(work.parent),
        )
    remove_export(work)
    os.mkdir(work)
    fd = os.open(work, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # For nobody else until it is whole, then as everything that the user makes.
        wanted = os.fstat(fd).st_mode & _MAX_MODE
        os.fchmod(fd, 0o700)
        yield work
        os.fchmod(fd, wanted)
        put_in_place(work, target)
    except BaseException:
        os.close(fd)
        fd = -1
        remove_export(work)
        raise
    finally:
        if fd >= 0:
            os.close(fd)


def mark(work: Path, files: list[str]) -> None:
    """Write the marker: what the export will hold besides."""
    write_json(work / MARKER_NAME, {"format": "offload-export", "version": 1, "files": sorted(files)})


def put_in_place(work: Path, target: Path) -> None:
    """Give a whole export its name, in place of an earlier one; durably."""
    if target.exists():
        check_export_target(target)
    if target.exists() and any(target.iterdir()):
        if not _exchange(work, target):
            old = target.with_name(f".{target.name}.offload-old")
            remove_export(old)
            os.rename(target, old)
            os.rename(work, target)
            sync_path(target.parent)
            remove_export(old)
            return
        sync_path(target.parent)
        remove_export(work)
        return
    os.rename(work, target)
    sync_path(target.parent)


def find_leftovers(directory: Path) -> list[Path]:
    """Return the folders in `directory` that interrupted exports left, by their names, sorted.

    That a folder is provably ours is checked by `remove_export`.
    """
    with os.scandir(directory) as entries:
        names = [
            entry.name
            for entry in entries
            if _LEFTOVER.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False)
        ]
    return [directory / name for name in sorted(names)]


def remove_export(directory: Path, *, dry_run: bool = False) -> None:
    """Remove an export of ours, finished or not, file by file; nothing when it is not there.

    Args:
        directory: the folder.
        dry_run: only check that it can be removed.

    Raises:
        LockedError: it is being written.
        StorageError: it is not ours, or holds something else; nothing was removed.
    """
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        fd = os.open(directory, flags)
    except FileNotFoundError:
        return
    except OSError as error:
        raise StorageError(
            f"{directory} is not a folder that an export of ours left: {error.strerror}; move it away",
            errno=error.errno or 0,
            path=str(directory),
        ) from error
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise LockedError(
                f"{directory} is being written by another process; wait until it has ended",
                path=str(directory),
            ) from error
        marked = _marked_files(directory, fd)
        # A part of a listed file is ours too, as far as it was written.
        ours = {_UNMARKED} if marked is None else marked | {f".{name}.part" for name in marked}
        present = set(os.listdir(fd))
        foreign = sorted(present - ours)
        if foreign:
            raise StorageError(
                f"{directory} holds what no export of ours wrote ({', '.join(foreign[:3])}); move it away",
                errno=errno.ENOTEMPTY,
                path=str(directory),
            )
        if dry_run:
            return
        # The marker goes last, so that an interrupted removal can be told from a foreign directory.
        for name in sorted(present, key=lambda name: (name == MARKER_NAME, name)):
            with suppress(FileNotFoundError):
                os.unlink(name, dir_fd=fd)
    finally:
        os.close(fd)
    with suppress(FileNotFoundError):
        os.rmdir(directory)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON to `path` and sync the file; the name appears only when it is whole."""
    part = path.with_name(f".{path.name}.part")
    with open(part, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=2, sort_keys=True, ensure_ascii=True)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)
    sync_path(path.parent)


def sync_path(path: Path) -> None:
    """Make a file, or the entries of a directory, durable."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _marked_files(directory: Path, fd: int | None = None) -> set[str] | None:
    """Return the names an export of ours put into `directory`, or None when it has no marker."""
    name = MARKER_NAME if fd is not None else str(directory / MARKER_NAME)
    try:
        # O_NONBLOCK: a FIFO in its place must not hang.
        marker_fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=fd)
        with os.fdopen(marker_fd, "rb") as file:
            if not stat.S_ISREG(os.fstat(marker_fd).st_mode):
                return None
            marker = json.loads(file.read(_MAX_MARKER_NBYTES))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(marker, dict) or marker.get("format") != "offload-export":
        return None
    files = marker.get("files")
    if not isinstance(files, list) or not all(_is_name(name) for name in files):
        return None
    return {MARKER_NAME, *files}


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and value not in ("", ".", "..") and "/" not in value and "\0" not in value


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two names in one step; return False where that is not possible.

    Source: renameat2(2).
    """
    libc = ctypes.CDLL(None, use_errno=True)
    renameat2 = getattr(libc, "renameat2", None)
    if renameat2 is None:
        return False
    paths = os.fsencode(one), os.fsencode(other)
    if renameat2(_AT_FDCWD, paths[0], _AT_FDCWD, paths[1], _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in _NO_EXCHANGE:
        return False
    raise OSError(number, os.strerror(number), str(other))
