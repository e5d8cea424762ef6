"""The facts of directories that a run may lie in, and of the drives below them.

Each is tried as a run uses it: a file made through the engine, its room reserved, written, flushed, read
back and compared. It is the only thing the doctor ever writes: `offload-doctor-<uuid>`, 1 MiB, whose name
is removed before anything is put into it. A kill in the instant between leaves an empty one.

Thread rule: any thread; each call opens an engine of its own.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

from ..aio import EngineName, aligned_buffer, open_engine
from ..errors import CorruptionError, OffloadError
from ..machine import file_system_id
from ..probe import host
from ..sizes import MIB
from .facts import BlockDevice, DirectoryFacts, Origin
from .pcie import link_of, read_text

__all__ = ["block_device", "look_at_directory"]

_FILE_NBYTES = MIB
_BLOCK_NBYTES = 64 << 10

# Of a drive that takes this long for 64 KiB nothing more needs to be known.
_WAIT_S = 2.0


def look_at_directory(
    path: str, origin: Origin, engine: EngineName | None, root: Path = Path("/")
) -> DirectoryFacts:
    """Return the facts of one directory.

    Args:
        path: as it was given.
        origin: why it is looked at.
        engine: what to try it with; None does not write.
        root: where /sys lies.
    """
    path = os.path.abspath(path)
    try:
        status = os.stat(path)
        if not stat.S_ISDIR(status.st_mode):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        room = os.statvfs(path)
        mount = host.mount_of(path)
        found = file_system_id(path)
    except OSError as error:
        return DirectoryFacts(path=path, origin=origin, problem=_words(error))
    direct, skew_s, problem = None, 0.0, ""
    if engine is not None:
        try:
            direct, skew_s = _try(path, engine)
        except (OSError, OffloadError) as error:
            problem = _words(error)
    return DirectoryFacts(
        path=path,
        origin=origin,
        mount=mount,
        file_system_id=found,
        mode=stat.S_IMODE(status.st_mode),
        total_nbytes=room.f_blocks * room.f_frsize,
        free_nbytes=room.f_bavail * room.f_frsize,
        direct=None if engine == "portable" else direct,
        write_problem=problem,
        clock_skew_s=skew_s,
        device=block_device(status.st_dev, mount.source, root),
    )


def block_device(device_id: int, source: str, root: Path = Path("/")) -> BlockDevice | None:
    """Return the drive below a file system.

    Args:
        device_id: st_dev of something on it.
        source: what is mounted; asked where the number stands for no drive, as with btrfs.
        root: where /sys lies.

    Source: Documentation/ABI/stable/sysfs-block.
    """
    known = host.device_nbytes(_number(device_id), root)
    if known is None and source.startswith("/dev/"):
        with contextlib.suppress(OSError):
            known = host.device_nbytes(_number(os.stat(source).st_rdev), root)
    if known is None:
        return None
    top = (root / "sys/block" / known[0]).resolve()
    layers = list(_layers(top))
    drives = [folder for folder in layers if not _below(folder)]
    # Of a volume on one drive that drive counts; of one on several, what the volume says of itself.
    folder = drives[0] if len(drives) == 1 else top
    scheduler = read_text(folder / "queue/scheduler")
    return BlockDevice(
        name=known[0],
        model=read_text(folder / "device/model"),
        bus=_bus(folder),
        rotational=read_text(folder / "queue/rotational") == "1",
        write_cache=read_text(folder / "queue/write_cache"),
        scheduler=scheduler.partition("[")[2].partition("]")[0] or scheduler,
        parts=tuple(dict.fromkeys(drive.name for drive in drives if drive != top)),
        encrypted=any(read_text(layer / "dm/uuid").startswith("CRYPT-") for layer in layers),
        # nvme0n1 -> its controller nvme0 -> the PCI device.
        link=link_of(folder / "device/device"),
    )


def _layers(folder: Path) -> Iterator[Path]:
    """Yield a block device and all below it, as a device mapper or RAID stacks them."""
    yield folder
    for below in _below(folder):
        yield from _layers(below)


def _below(folder: Path) -> list[Path]:
    try:
        entries = sorted((folder / "slaves").iterdir())
    except OSError:
        return []
    parts = [entry.resolve() for entry in entries]
    return [part.parent if (part / "partition").exists() else part for part in parts]


def _bus(folder: Path) -> str:
    """Return how a drive is attached: the innermost bus on the way to it."""
    parts = folder.parts
    if folder.name.startswith("nvme"):
        return "nvme"
    if any(part.startswith("usb") for part in parts):
        return "usb"
    if any(part.startswith("virtio") for part in parts):
        return "virtio"
    if any(part.startswith("ata") for part in parts):
        return "sata"
    return "virtual" if "virtual" in parts else ""


def _try(path: str, name: EngineName) -> tuple[bool, float]:
    """Write a file and read it back; return whether that was direct, and the clock's skew in seconds.

    Raises:
        StorageError: it cannot be done, and why.
    """
    written, got = aligned_buffer(_BLOCK_NBYTES), aligned_buffer(_BLOCK_NBYTES)
    written[:] = os.urandom(_BLOCK_NBYTES)
    with contextlib.ExitStack() as stack:
        folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        stack.callback(os.close, folder)
        engine = stack.enter_context(open_engine(name, queue_depth=1))
        before_s = time.time()
        with _unlinked(f"offload-doctor-{uuid4()}", folder) as entry:
            file = stack.enter_context(engine.open(entry, "x+", dir_fd=folder))
            made_s = os.stat(entry, dir_fd=folder, follow_symlinks=False).st_mtime
            after_s = time.time()
        file.allocate(_FILE_NBYTES)
        engine.submit("write", file, written, 0).wait(_WAIT_S)
        engine.sync(file)
        engine.submit("read", file, got, 0).wait(_WAIT_S)
        if got != written:
            raise CorruptionError("other bytes were read back than were written", path=path)
        # The kernel's clock for files lags by a tick; what lies between the two readings is no skew.
        skew_s = min(made_s - before_s, 0.0) if made_s < before_s else max(made_s - after_s, 0.0)
        return file.direct, skew_s


@contextlib.contextmanager
def _unlinked(name: str, folder: int) -> Iterator[str]:
    """Give a name, and remove it at the end, if there is one by then."""
    try:
        yield name
    except BaseException:
        # What went wrong counts, and a file system that cannot be written to refuses this as well.
        with contextlib.suppress(OSError):
            os.unlink(name, dir_fd=folder)
        raise
    os.unlink(name, dir_fd=folder)


def _words(error: OSError | OffloadError) -> str:
    number = getattr(error, "errno", None)
    return os.strerror(number) if number else str(error)


def _number(device_id: int) -> str:
    return f"{os.major(device_id)}:{os.minor(device_id)}"
