"""Engines for tests, and a journal of everything that reaches a drive.

`PlainEngine` does each transfer with pread and pwrite, `LazyEngine` only when somebody waits for it.
A `Journal` notes every write, sync, rename and unlink in order, can make the n-th one fail or kill the
"process" there, and builds what a power loss would leave of them.
"""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Callable
from pathlib import Path

from offload.errors import DiskFullError, StorageError
from offload.store import files

SECTOR_NBYTES = 512


class PlainFile:
    def __init__(self, path: str, fd: int, full_path: str, journal: Journal | None) -> None:
        self.path, self.fd, self.full_path, self.journal = path, fd, full_path, journal
        self.direct = False

    @property
    def size_nbytes(self) -> int:
        return os.fstat(self.fd).st_size

    def allocate(self, nbytes: int) -> None:
        if self.journal is not None:
            self.journal.note("allocate", self.full_path, nbytes)
        os.posix_fallocate(self.fd, 0, nbytes)

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        self.close()


class PlainRequest:
    """A transfer that takes place at the first wait, or at once when `now`."""

    def __init__(self, transfer: Callable[[], int], *, now: bool) -> None:
        self._transfer = transfer
        self._result: int | StorageError | None = None
        if now:
            self._run()

    def _run(self) -> None:
        if self._result is None:
            try:
                self._result = self._transfer()
            except StorageError as error:
                self._result = error

    def wait(self, timeout_s: float | None = None) -> int:
        self._run()
        if isinstance(self._result, StorageError):
            raise self._result
        return self._result

    def done(self) -> bool:
        return self._result is not None

    @property
    def finished_s(self) -> float | None:
        return 0.0 if self.done() else None


class PlainEngine:
    """Every transfer at once, with pread and pwrite."""

    name = "plain"
    queue_depth = 1
    now = True

    def __init__(self, journal: Journal | None = None) -> None:
        self.journal = journal
        self.submitted: list[tuple[str, str, int, int]] = []
        self.opened: list[PlainFile] = []

    def open(self, path: str, mode: str = "r", *, dir_fd: int | None = None) -> PlainFile:
        flags = {"r": os.O_RDONLY, "r+": os.O_RDWR, "x+": os.O_RDWR | os.O_CREAT | os.O_EXCL}[mode]
        try:
            fd = os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=dir_fd)
        except OSError as error:
            raise StorageError(f"cannot open {path}", errno=error.errno, path=path) from error
        file = PlainFile(path, fd, os.readlink(f"/proc/self/fd/{fd}"), self.journal)
        self.opened.append(file)
        if mode == "x+" and self.journal is not None:
            try:
                self.journal.note("create", file.full_path)
            except BaseException:
                file.close()
                raise
        return file

    def submit(self, op, file, buffer, file_offset, nbytes=None) -> PlainRequest:
        view = memoryview(buffer)
        assert view.format == "B"
        view = view[:nbytes]
        self.submitted.append((op, file.full_path, file_offset, len(view)))

        def transfer() -> int:
            if op == "write":
                if self.journal is not None:
                    self.journal.note("write", file.full_path, (file_offset, bytes(view)))
                return os.pwrite(file.fd, view, file_offset)
            return os.preadv(file.fd, [view], file_offset)

        return PlainRequest(transfer, now=self.now)

    def sync(self, file) -> None:
        if self.journal is not None:
            self.journal.note("fsync", file.full_path)

    def close(self) -> None:
        for file in self.opened:
            file.close()

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        self.close()


class LazyEngine(PlainEngine):
    """No transfer until somebody waits for it: what a slow drive looks like, without a clock."""

    now = False


class Killed(BaseException):
    """The process ends here: nothing after it reaches the drive."""


class Journal:
    """What reached the drives, in order: (what, path, detail).

    Attributes:
        ops: create, allocate (length), write (offset, bytes), content (bytes), fsync (of a file or
            directory), rename (old path), unlink, and `committed` (generation), which only the test notes.
        kill_at: index of the operation before which the process ends.
        fail_at: index of the operation that fails, and every later one when `persistent`.
        errno: what it fails with.
    """

    def __init__(self) -> None:
        self.ops: list[tuple[str, str, object]] = []
        self.kill_at: int | None = None
        self.fail_at: int | None = None
        self.persistent = False
        self.errno = errno.EIO

    def note(self, what: str, path: str, detail: object = None) -> None:
        index = len(self.ops)
        if self.kill_at is not None and index >= self.kill_at:
            raise Killed
        if self.fail_at is not None and (index == self.fail_at or (self.persistent and index > self.fail_at)):
            self.ops.append(("failed " + what, path, None))
            kind = DiskFullError if self.errno == errno.ENOSPC and what != "fsync" else StorageError
            raise kind(f"injected at {what} {path}", errno=self.errno, path=path)
        self.ops.append((what, path, detail))

    def attach(self, monkeypatch) -> None:
        """Record the small files too. Real syncs are left out: nothing here outlives the test."""
        create_file, write_file, rename, unlink = (
            files.create_file,
            files.write_file,
            files.rename,
            files.unlink,
        )

        def noting_create(dir_fd, name, path):
            self.note("create", path)
            return create_file(dir_fd, name, path)

        def noting_write(fd, data, path):
            self.note("content", path, bytes(data))
            write_file(fd, data, path)

        def noting_rename(dir_fd, old, new, path):
            self.note("rename", path, os.path.join(os.path.dirname(path), old))
            rename(dir_fd, old, new, path)

        def noting_unlink(dir_fd, name, path):
            if name in os.listdir(dir_fd):
                self.note("unlink", path)
            unlink(dir_fd, name, path)

        monkeypatch.setattr(files, "create_file", noting_create)
        monkeypatch.setattr(files, "write_file", noting_write)
        monkeypatch.setattr(files, "rename", noting_rename)
        monkeypatch.setattr(files, "unlink", noting_unlink)
        monkeypatch.setattr(files, "sync", lambda fd, path: self.note("fsync", path))

    def committed(self, end: int) -> int:
        """The last generation whose commit had returned before operation `end`."""
        return max((detail for what, _, detail in self.ops[:end] if what == "committed"), default=0)


class PowerLoss:
    """What a volatile cache and a file system may leave of the first operations of a journal.

    What was synced is there. Of the rest, every sector of a write and every change of a directory is
    there or not, as `rng` says, and an unsynced small file is whole, cut, empty or zeros.
    """

    def __init__(self, ops, rng: random.Random) -> None:
        self.rng = rng
        self.durable: dict[str, bytearray] = {}  # path -> content, as the directories durably say
        self.content: dict[str, bytearray] = {}  # path -> content as a process sees it
        self.synced: set[int] = set()  # ids of contents that are durable
        self.pending_writes: dict[str, list[tuple[int, bytes]]] = {}
        self.pending_names: dict[str, list[tuple[str, str, bytearray | None]]] = {}
        for what, path, detail in ops:
            getattr(self, "_" + what.split()[0])(path, detail)
        self._lose()

    def write_to(self, root: Path, old_root: Path) -> None:
        """Build the tree under `root` that was under `old_root`."""
        for path, content in self.durable.items():
            target = root / Path(path).relative_to(old_root)
            target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            target.touch(mode=0o600)
            target.write_bytes(content)

    def _failed(self, path, detail) -> None:
        pass

    def _committed(self, path, detail) -> None:
        pass

    def _create(self, path, detail) -> None:
        self.content[path] = bytearray()
        self._rename_pending(path, ("create", path, self.content[path]))

    def _allocate(self, path, detail) -> None:
        self.content[path].extend(bytes(detail))

    def _content(self, path, detail) -> None:
        self.content[path][:] = detail

    def _write(self, path, detail) -> None:
        offset, data = detail
        self.pending_writes.setdefault(path, []).append((offset, data))

    def _fsync(self, path, detail) -> None:
        if path in self.content:
            self.synced.add(id(self.content[path]))
            for offset, data in self.pending_writes.pop(path, []):
                _patch(self.content[path], offset, data)
            return
        for change in self.pending_names.pop(path, []):
            self._apply(change)

    def _rename(self, path, old) -> None:
        self.content[path] = self.content.pop(old)
        self._rename_pending(path, ("rename", old, self.content[path]), new=path)

    def _unlink(self, path, detail) -> None:
        self.content.pop(path, None)  # A process killed at its creation has left it.
        self._rename_pending(path, ("unlink", path, None))

    def _rename_pending(self, path, change, new=None) -> None:
        folder = os.path.dirname(path)
        self.pending_names.setdefault(folder, []).append((*change, new))

    def _apply(self, change) -> None:
        what, path, content, new = change
        if what == "create":
            self.durable[path] = content
        elif what == "rename":
            self.durable.pop(path, None)
            self.durable[new] = content
        else:
            self.durable.pop(path, None)

    def _lose(self) -> None:
        for changes in self.pending_names.values():
            for change in changes:
                if self.rng.random() < 0.5:
                    self._apply(change)
        for path, writes in self.pending_writes.items():
            if path in self.content:
                for offset, data in writes:
                    for start in range(0, len(data), SECTOR_NBYTES):
                        if self.rng.random() < 0.5:
                            _patch(self.content[path], offset + start, data[start : start + SECTOR_NBYTES])
        for path, content in self.durable.items():
            if id(content) not in self.synced:
                fate = self.rng.randrange(4)
                cut = self.rng.randrange(len(content) + 1)
                lost = (bytes(content), bytes(content[:cut]), b"", bytes(len(content)))[fate]
                self.durable[path] = bytearray(lost)


def _patch(content: bytearray, offset: int, data: bytes) -> None:
    if len(content) < offset + len(data):
        content.extend(bytes(offset + len(data) - len(content)))
    content[offset : offset + len(data)] = data
