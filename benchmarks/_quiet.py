"""A quiet disk: ext4 on a loop device over a file in memory (tmpfs), for figures that repeat.

A real drive of a shared machine wanders by tens of per cent; this one repeats within a few, at some
GB/s, and takes direct I/O like a drive. What it measures is the path from a program to the block
layer: a kernel thread copies between the program's buffers and memory.

It needs root. Everything is taken down again at the end, also after Ctrl-C and SIGTERM (which the
context turns into `KeyboardInterrupt`). After SIGKILL the mounts stay: `umount DIR/disk DIR/memory`
frees them; DIR begins with `offload-quiet-` in the folder of temporary files.

Thread rule: the main thread only.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import FrameType

import psutil

from offload.errors import CapacityError, ConfigError
from offload.sizes import GIB, MIB, format_bytes

__all__ = ["quiet_disk"]

# What ext4 takes for its own structures, and then some.
_OVERHEAD_NBYTES = 160 * MIB
# Left to the machine, beside the disk: the contenders' buffers, and the other programs.
_SPARE_NBYTES = 2 * GIB
# How long an umount may find the disk busy.
_BUSY_S = 20.0
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_TOOLS = ("losetup", "mkfs.ext4", "mount", "umount")


@contextmanager
def quiet_disk(nbytes: int) -> Iterator[Path]:
    """Make a disk with room for `nbytes` and give the directory where it is mounted.

    Raises:
        ConfigError: not root, or a tool is missing.
        CapacityError: there is not enough memory.
    """
    _require(nbytes)
    with _Interrupts() as interrupts, ExitStack() as stack:
        directory = Path(tempfile.mkdtemp(prefix="offload-quiet-"))
        stack.callback(_remove, directory)
        memory, disk = directory / "memory", directory / "disk"
        for mount_point in (memory, disk):
            mount_point.mkdir()
            stack.callback(_remove, mount_point)
        size_nbytes = nbytes + _OVERHEAD_NBYTES
        _mount(stack, memory, "-t", "tmpfs", "-o", f"size={size_nbytes + 16 * MIB},mode=700", "tmpfs")
        image = memory / "image"
        with open(image, "xb") as file:
            file.truncate(size_nbytes)
        # Direct I/O of the loop device itself stays off: tmpfs is memory.
        device = _run("losetup", "--find", "--show", "--direct-io=off", str(image))
        stack.callback(_run, "losetup", "--detach", device)
        _run("mkfs.ext4", "-q", "-m", "0", "-E", "lazy_itable_init=0,lazy_journal_init=0", device)
        _mount(stack, disk, device)
        with interrupts.allowed():
            yield disk


def _require(nbytes: int) -> None:
    if os.geteuid() != 0:
        raise ConfigError("the quiet disk is mounted, which needs root: use sudo, or --disk DIR instead")
    missing = [tool for tool in _TOOLS if shutil.which(tool) is None]
    if missing:
        raise ConfigError(f"the quiet disk needs {', '.join(missing)}: install util-linux and e2fsprogs")
    available_nbytes = psutil.virtual_memory().available
    if available_nbytes < nbytes + _OVERHEAD_NBYTES + _SPARE_NBYTES:
        raise CapacityError(
            f"a quiet disk of {format_bytes(nbytes)} lies in memory, and {format_bytes(_SPARE_NBYTES)} should"
            f" stay free beside it, but {format_bytes(available_nbytes)} are available: lower --size"
        )


def _mount(stack: ExitStack, mount_point: Path, *arguments: str) -> None:
    _run("mount", *arguments, str(mount_point))
    stack.callback(_unmount, mount_point)


def _unmount(mount_point: Path) -> None:
    # The kernel lets go of the files of an io_uring (fio's, with registered files) a while after its
    # process has ended; until then the disk is busy.
    give_up_s = time.monotonic() + _BUSY_S
    while True:
        try:
            _run("umount", str(mount_point))
            return
        except ConfigError as error:
            if "busy" not in str(error) or time.monotonic() > give_up_s:
                raise
        time.sleep(0.05)


def _remove(directory: Path) -> None:
    # Not empty, or a mount point still: then what failed to unmount has said so, and that is the error.
    with suppress(OSError):
        directory.rmdir()


def _run(*command: str) -> str:
    # A session of its own: Ctrl-C goes to the whole group, and must not end an umount.
    done = subprocess.run(command, capture_output=True, text=True, check=False, start_new_session=True)
    if done.returncode:
        raise ConfigError(
            f"{' '.join(command)} ended with status {done.returncode}:"
            f" {done.stderr.strip() or 'it says no more'}"
        )
    return done.stdout.strip()


class _Interrupts:
    """Keeps SIGINT and SIGTERM for later, so that none comes between a mount and the note to undo it."""

    def __init__(self) -> None:
        self._allowed = self._pending = False

    def __enter__(self) -> _Interrupts:
        self._previous = {number: signal.signal(number, self._note) for number in _SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if kind is None and self._pending:
            raise KeyboardInterrupt

    @contextmanager
    def allowed(self) -> Iterator[None]:
        """Let them raise `KeyboardInterrupt` inside the block."""
        if self._pending:
            raise KeyboardInterrupt
        self._allowed = True
        try:
            yield
        finally:
            self._allowed = False

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._pending = True
        if self._allowed:
            raise KeyboardInterrupt
