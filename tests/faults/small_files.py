"""The store's small files on a real directory, with the simulated drive's faults and power losses.

Manifests, ownership files and locks are real files; `SmallFiles` stands in for `os` in the modules of
the store. Each call that reaches the drive is an operation of the `SimDisk` that holds the data files,
so that one count numbers everything a run does, and it may fail there. Beside the real tree it is kept
what of it is durable, with the rules of POSIX: bytes by an fsync of their file, names by one of their
directory.

A call that PEP 475 retries (write, fsync, open) is never seen to be interrupted; `EINTR` does nothing there.
"""

from __future__ import annotations

import errno
import functools
import importlib
import os
import pkgutil
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import offload.store
from offload.aio.sim import SimDisk
from offload.aio.sim.faults import OperationKind

__all__ = ["Durable", "SmallFiles"]


@dataclass(eq=False)
class _Content:
    """A file's bytes now, and those that an fsync made durable; None for a directory's or data file's."""

    now: bytes | None
    synced: bytes | None = None
    is_synced: bool = False
    failed: bytes | None = None  # what a flush could not write, and no later one will

    def sync(self) -> None:
        if self.now != self.failed:
            self.synced, self.is_synced = self.now, True


@dataclass
class Durable:
    """What a power loss would find: names by directory, and what is on its way there.

    Attributes:
        names: durable path -> content.
        pending: directory -> changes of its names since its last fsync, in order: (name that goes,
            name that comes, its content).
    """

    names: dict[str, _Content] = field(default_factory=dict)
    pending: dict[str, list[tuple[str | None, str | None, _Content | None]]] = field(default_factory=dict)

    def copy(self) -> Durable:
        """Return the same, to be kept while the run goes on."""
        memo: dict[int, _Content] = {}

        def kept(content: _Content) -> _Content:
            return memo.setdefault(id(content), replace(content))

        return Durable(
            {path: kept(content) for path, content in self.names.items()},
            {
                folder: [
                    (old, new, None if content is None else kept(content)) for old, new, content in changes
                ]
                for folder, changes in self.pending.items()
            },
        )

    def change(self, folder: str, old: str | None, new: str | None, content: _Content | None) -> None:
        """Note a change of a directory's names."""
        self.pending.setdefault(folder, []).append((old, new, content))

    def sync_names(self, folder: str) -> None:
        """Make the changes of a directory durable."""
        for change in self.pending.pop(folder, []):
            _apply(self.names, *change)

    def restore(self, root: Path, disk: SimDisk, rng: random.Random | None) -> None:
        """Build the tree that is left in `root`, which is empty, and drop lost data files from `disk`.

        Args:
            root: where everything lay.
            disk: the data files that are left.
            rng: what a power loss takes: each change of a directory that was not synced has taken place or
                not; a file that was not synced is whole, cut, as it was synced before, or zeros. None
                takes nothing: the power stayed on.
        """
        names = dict(self.names)
        for changes in self.pending.values():
            for change in changes:
                if rng is None or rng.random() < 0.5:
                    _apply(names, *change)
        for path in sorted(names):
            if os.path.dirname(path) != str(root) and os.path.dirname(path) not in names:
                continue  # its directory is gone
            content = names[path]
            if content.now is None and _is_data_file(path):
                Path(path).touch(mode=0o600)
            elif content.now is None:
                Path(path).mkdir(mode=0o700)
            else:
                Path(path).touch(mode=0o600)
                Path(path).write_bytes(content.now if rng is None else _left_of(content, rng))
        for path in disk.paths():
            if not os.path.exists(path):
                disk.remove(path)


@functools.cache
def _modules_that_use_os() -> tuple[ModuleType, ...]:
    """Return the modules of the store that call the operating system."""
    names = [module.name for module in pkgutil.iter_modules(offload.store.__path__, "offload.store.")]
    return tuple(module for module in map(importlib.import_module, names) if hasattr(module, "os"))


def _apply(names: dict[str, _Content], old: str | None, new: str | None, content: _Content | None) -> None:
    if old is not None:
        names.pop(old, None)
    if new is not None:
        assert content is not None
        names[new] = content


def _is_data_file(path: str) -> bool:
    """Whether a name is that of a file whose bytes are the simulated disk's: a run's, or a scratch area's."""
    return path.endswith(".bin") or os.path.basename(path).startswith("scratch-")


def _left_of(content: _Content, rng: random.Random) -> bytes:
    assert content.now is not None
    if content.is_synced and content.synced == content.now:
        return content.now
    cut = rng.randrange(len(content.now) + 1)
    before = content.synced if content.is_synced and content.synced is not None else b""
    return rng.choice((content.now, content.now[:cut], before, bytes(len(content.now))))


class SmallFiles:
    """Stands in for `os`; see the module.

    Args:
        disk: counts the operations and has the faults.
        root: the directory below which everything lies.
    """

    def __init__(self, disk: SimDisk, root: Path) -> None:
        self.disk = disk
        self.durable = Durable()
        self._root = str(root)
        self._contents: dict[str, _Content] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Take the place of `os` in the store."""
        with pytest.MonkeyPatch.context() as patch:
            for module in _modules_that_use_os():
                patch.setattr(module, "os", self)
            yield

    def adopt(self) -> None:
        """Take what lies below the root now as durable: what a power loss has left."""
        for path in sorted(Path(self._root).rglob("*")):
            now = None if path.is_dir() or _is_data_file(str(path)) else path.read_bytes()
            self._contents[str(path)] = self.durable.names[str(path)] = _Content(now, now, True)

    def data_file_created(self, folder_fd: int, name: str) -> None:
        """Note the name of a data file, whose bytes are the simulated disk's."""
        self._came(self._path(name, folder_fd), None)

    # The calls that reach the drive.

    def open(self, path: str, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        full = self._path(path, dir_fd)
        creates = bool(flags & os.O_CREAT) and not os.path.lexists(full)
        self._enter("create" if creates else "look", full, retried=True)
        fd = os.open(path, flags, mode, dir_fd=dir_fd)
        if creates:
            self._came(full, b"")
        return fd

    def write(self, fd: int, data: Any) -> int:
        path = self._path_of(fd)
        view = memoryview(data)
        kind = self._enter("put", path, nbytes=len(view), retried=True)
        if kind == "short" and len(view) > 1:
            view = view[: len(view) // 2]
        moved = os.write(fd, view)
        self._changed(path)
        return moved

    def pwrite(self, fd: int, data: bytes, offset: int) -> int:
        path = self._path_of(fd)
        kind = self._enter("put", path, nbytes=len(data), retried=True)
        moved = os.pwrite(fd, data[: len(data) // 2] if kind == "short" and len(data) > 1 else data, offset)
        self._changed(path)
        return moved

    def ftruncate(self, fd: int, nbytes: int) -> None:
        path = self._path_of(fd)
        self._enter("put", path, retried=True)
        os.ftruncate(fd, nbytes)
        self._changed(path)

    def fsync(self, fd: int) -> None:
        """Note what is durable; a real sync is left out, since nothing here outlives the test."""
        path = self._path_of(fd)
        kind = self._enter("flush", path, retried=True, fails=False)
        number = getattr(errno, kind or "", 0)
        if number:
            if path in self._contents:
                self._contents[path].failed = self._contents[path].now
            raise OSError(number, os.strerror(number))
        with self.disk.lock:
            if os.path.isdir(path):
                self.durable.sync_names(path)
            else:
                self._contents[path].sync()

    fdatasync = fsync

    def rename(
        self, old: str, new: str, *, src_dir_fd: int | None = None, dst_dir_fd: int | None = None
    ) -> None:
        source, target = self._path(old, src_dir_fd), self._path(new, dst_dir_fd)
        self._enter("rename", target)
        with self.disk.lock:
            os.rename(old, new, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd)
            content = self._contents[target] = self._contents.pop(source)
            self.durable.change(os.path.dirname(target), source, target, content)

    replace = rename

    def unlink(self, path: str, *, dir_fd: int | None = None) -> None:
        full = self._path(path, dir_fd)
        self._enter("remove", full)
        with self.disk.lock:
            os.unlink(path, dir_fd=dir_fd)
            self._contents.pop(full)
            self.durable.change(os.path.dirname(full), full, None, None)
            self.disk.remove(full)

    def mkdir(self, path: str, mode: int = 0o777, *, dir_fd: int | None = None) -> None:
        full = self._path(path, dir_fd)
        self._enter("create", full)
        os.mkdir(path, mode, dir_fd=dir_fd)
        self._came(full, None)

    def rmdir(self, path: str, *, dir_fd: int | None = None) -> None:
        full = self._path(path, dir_fd)
        self._enter("remove", full)
        os.rmdir(path, dir_fd=dir_fd)
        with self.disk.lock:
            self._contents.pop(full)
            self.durable.change(os.path.dirname(full), full, None, None)

    def listdir(self, path: int | str) -> list[str]:
        self._enter("look", self._path_of(path) if isinstance(path, int) else path)
        return os.listdir(path)

    def fdopen(self, fd: int, *args: Any, **kwargs: Any) -> Any:
        return _Reader(self, os.fdopen(fd, *args, **kwargs), self._path_of(fd))

    # Parts.

    def _enter(
        self, what: OperationKind, path: str, *, nbytes: int = 0, retried: bool = False, fails: bool = True
    ) -> str | None:
        """Count an operation and raise the error that hits it; return another fault's kind."""
        fault = self.disk.enter(what, path, nbytes=nbytes)
        if fault is None or (retried and fault.kind in ("EINTR", "EAGAIN")):
            return None
        if fault.errno and fails:
            raise OSError(fault.errno, os.strerror(fault.errno))
        return fault.kind

    def _path(self, path: str, dir_fd: int | None) -> str:
        return os.path.abspath(path) if dir_fd is None else os.path.join(self._path_of(dir_fd), path)

    def _path_of(self, fd: int) -> str:
        return os.readlink(f"/proc/self/fd/{fd}")

    def _came(self, path: str, now: bytes | None) -> None:
        with self.disk.lock:
            content = self._contents[path] = _Content(now)
            self.durable.change(os.path.dirname(path), None, path, content)

    def _changed(self, path: str) -> None:
        with self.disk.lock:
            self._contents[path].now = Path(path).read_bytes()


class _Reader:
    """An open small file that is read."""

    def __init__(self, owner: SmallFiles, file: Any, path: str) -> None:
        self._owner, self._file, self._path = owner, file, path

    def read(self, nbytes: int) -> bytes:
        # FileIO.read retries what is interrupted.
        self._owner._enter("look", self._path, retried=True)
        data: bytes = self._file.read(nbytes)
        return data

    def __enter__(self) -> _Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
