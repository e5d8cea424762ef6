"""One drive's folder of a run, `run-<uuid>`: its entries, its lock, its removal.

The folder is 0700 and ours; it is opened once, without following a symbolic link, and everything in it
is named relative to that descriptor. What the folder may hold is a short list of names; nothing else
is ever touched.

Thread rule: any thread may list the names (a commit does, while another thread looks for snapshots); the
store calls everything else from one thread at a time.
"""

from __future__ import annotations

import errno
import os
import re
import stat
import threading
from dataclasses import dataclass, field
from uuid import UUID

from ..errors import StorageError
from . import files
from .lock import LOCK_NAME, RunLock, find_holder
from .owner import MAX_OWNER_NBYTES, OWNER_NAME, Owner, decode_owner, encode_owner
from .records import MAX_MANIFEST_NBYTES

__all__ = ["DATA_NAME", "RunDirectory", "run_folder_name", "runs_in"]

DATA_NAME = "data.bin"
_FOLDER = re.compile(r"run-([0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12})")
_MANIFEST = re.compile(r"manifest-(0|[1-9][0-9]{0,18})")
# A file of a scratch area, while it is made; see `scratch.py`.
_SCRATCH = re.compile(r"scratch-[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")
# A description, and the records it describes.
_SNAPSHOT = re.compile(r"snapshot-([A-Za-z0-9][A-Za-z0-9_-]{0,63})(\.bin)?")
_STAGED = re.compile(rf"({_MANIFEST.pattern}|OFFLOAD_RUN|snapshot-[A-Za-z0-9][A-Za-z0-9_-]{{0,63}})\.tmp")


def run_folder_name(run_id: UUID) -> str:
    """Return the name of a run's folder in each of its directories."""
    return f"run-{run_id}"


def runs_in(directory: str) -> list[UUID]:
    """Return the runs that the names in `directory` promise, sorted."""
    with files.storage_errors("list", directory):
        names = os.listdir(directory)
    return sorted(UUID(match[1]) for name in names if (match := _FOLDER.fullmatch(name)))


@dataclass(slots=True)
class RunDirectory:
    """An open run folder.

    Attributes:
        run_id: the run.
        directory: the directory the user named.
        path: the folder's whole path, for messages.
        parent_fd: descriptor of `directory`.
        fd: descriptor of the folder.
        lock: held from `acquire` to `close`.
    """

    run_id: UUID
    directory: str
    path: str
    parent_fd: int
    fd: int
    lock: RunLock | None = None
    _listing: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    @classmethod
    def create(cls, directory: str, run_id: UUID) -> RunDirectory:
        """Make the folder in `directory`, which must not have it yet."""
        name = run_folder_name(run_id)
        path = os.path.join(directory, name)
        parent_fd = files.open_directory(directory, directory, follow=True)
        try:
            mode = os.fstat(parent_fd).st_mode
            if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
                raise StorageError(
                    f"{directory} is writable by everyone (mode {stat.S_IMODE(mode):o}), so anyone could "
                    "swap what is in it; use a directory of your own, or set its sticky bit",
                    path=directory,
                )
            fd = files.make_directory(parent_fd, name, path)
        except BaseException:
            os.close(parent_fd)
            raise
        return cls(run_id, directory, path, parent_fd, fd)

    @classmethod
    def open(cls, directory: str, run_id: UUID) -> RunDirectory:
        """Open the folder of an existing run after checking that it is ours alone.

        Raises:
            StorageError: there is no such run in `directory`, or the folder is not ours.
        """
        name = run_folder_name(run_id)
        path = os.path.join(directory, name)
        parent_fd = files.open_directory(directory, directory, follow=True)
        try:
            fd = files.open_directory(name, path, dir_fd=parent_fd)
        except StorageError as error:
            os.close(parent_fd)
            if error.errno == errno.ENOENT:
                raise StorageError(
                    f"{directory} holds no run {run_id}; mount its drive there, or name the directory it was"
                    " made in",
                    errno=errno.ENOENT,
                    path=path,
                ) from error
            raise
        folder = cls(run_id, directory, path, parent_fd, fd)
        try:
            files.check_owned(fd, path, directory=True)
        except BaseException:
            folder.close()
            raise
        return folder

    def acquire(self, *, shared: bool = False) -> None:
        """Take the run's lock in this folder; `shared` is enough to read.

        Raises:
            LockedError: a live process holds it.
        """
        self.lock = RunLock(self.fd, self.path_of(LOCK_NAME), shared=shared)

    def find_holder(self) -> int | None:
        """Return the pid of the process that uses the run, 0 where it is not known; None for nobody."""
        return find_holder(self.fd, self.path_of(LOCK_NAME))

    def written_s(self, name: str) -> float | None:
        """Return when an entry was last written, in seconds since 1970; None when it is not there."""
        try:
            return os.stat(name, dir_fd=self.fd, follow_symlinks=False).st_mtime
        except OSError:
            return None

    def close(self) -> None:
        """Release the lock and the descriptors. Closing twice is harmless."""
        if self.lock is not None:
            self.lock.release()
            self.lock = None
        for fd in (self.fd, self.parent_fd):
            if fd >= 0:
                os.close(fd)
        self.fd = self.parent_fd = -1

    def path_of(self, name: str) -> str:
        """Return the whole path of an entry, for messages."""
        return os.path.join(self.path, name)

    def write_owner(self, owner: Owner) -> None:
        """Write the ownership file, durably."""
        self.stage(OWNER_NAME, encode_owner(owner))
        self.publish(OWNER_NAME)
        with files.storage_errors("sync", self.directory):
            os.fsync(self.parent_fd)

    def read_owner(self) -> Owner:
        """Return what the ownership file says.

        Raises:
            StorageError: there is none, or it is damaged (CorruptionError).
        """
        path = self.path_of(OWNER_NAME)
        data = files.read_file(self.fd, OWNER_NAME, path, MAX_OWNER_NBYTES)
        return decode_owner(data, path, self.run_id)

    def manifest_name(self, generation: int) -> str:
        """Return the name of the manifest of `generation`."""
        return f"manifest-{generation}"

    def manifest_generations(self) -> list[int]:
        """Return the generations that have a manifest here by name, newest first."""
        found = (_MANIFEST.fullmatch(name) for name in self.names())
        return sorted((int(match[1]) for match in found if match), reverse=True)

    def snapshot_names(self) -> tuple[set[str], set[str]]:
        """Return the snapshots that have a description here by name, and those that have data."""
        found = [match for name in self.names() if (match := _SNAPSHOT.fullmatch(name))]
        return {match[1] for match in found if not match[2]}, {match[1] for match in found if match[2]}

    def staged_names(self) -> list[str]:
        """Return the files left by a `stage` that no `publish` followed."""
        return [name for name in self.names() if _STAGED.fullmatch(name)]

    def scratch_names(self) -> list[str]:
        """Return the files of scratch areas whose making was interrupted."""
        return [name for name in self.names() if _SCRATCH.fullmatch(name)]

    def read_manifest(self, generation: int) -> bytes:
        """Return the bytes of a manifest."""
        name = self.manifest_name(generation)
        return files.read_file(self.fd, name, self.path_of(name), MAX_MANIFEST_NBYTES)

    def names(self) -> list[str]:
        """Return the names of all entries."""
        # A listing begins where the descriptor stands, and moves it: of two at once, each would lack names.
        with self._listing, files.storage_errors("list", self.path):
            return os.listdir(self.fd)

    def stage(self, name: str, data: bytes) -> None:
        """Write `data` durably under a temporary name."""
        staged = name + ".tmp"
        path = self.path_of(staged)
        self.discard(staged)
        fd = files.create_file(self.fd, staged, path)
        try:
            files.write_file(fd, data, path)
            files.sync(fd, path)
        finally:
            os.close(fd)

    def publish(self, name: str) -> None:
        """Give what `stage` wrote its final name, durably."""
        files.rename(self.fd, name + ".tmp", name, self.path_of(name))
        self.sync()

    def sync(self) -> None:
        """Make the folder's entries durable."""
        files.sync(self.fd, self.path)

    def discard(self, name: str) -> None:
        """Remove an entry if it is there."""
        try:
            files.unlink(self.fd, name, self.path_of(name))
        except StorageError as error:
            if error.errno != errno.ENOENT:
                raise

    def is_blank(self) -> bool:
        """Return whether nothing lies here but what creating a run begins or removing one ends with."""
        return set(self.names()) <= {LOCK_NAME, OWNER_NAME + ".tmp"}

    def check_removable(self) -> None:
        """Check that the folder holds nothing but what a run has.

        Raises:
            StorageError: something else lies in it; names it.
        """
        known = (OWNER_NAME, DATA_NAME, LOCK_NAME)
        foreign = sorted(
            name
            for name in self.names()
            if name not in known
            and not any(pattern.fullmatch(name) for pattern in (_MANIFEST, _STAGED, _SCRATCH, _SNAPSHOT))
        )
        if foreign:
            raise StorageError(
                f"{self.path} holds entries that are not of a run: {', '.join(foreign[:5])}; move them away",
                errno=errno.ENOTEMPTY,
                path=self.path,
            )

    def remove(self) -> None:
        """Unlink every known name, the proof of ownership last, then the folder; and close."""
        self.check_removable()
        for name in sorted(self.names(), key=lambda name: (name == OWNER_NAME, name)):
            self.discard(name)
        files.remove_directory(self.parent_fd, run_folder_name(self.run_id), self.path)
        self.close()
