"""A mount namespace of a process's own: what it mounts goes with it, also when it is killed.

The kernel takes a namespace down with the last process in it, and detaches the loop devices mounted there.
"""

from __future__ import annotations

import ctypes
import os

__all__ = ["leave_shared_mounts"]

# From <linux/sched.h> and <linux/mount.h>; Python has os.unshare from 3.12.
_CLONE_NEWNS, _MS_REC, _MS_PRIVATE = 0x20000, 1 << 14, 1 << 18


def leave_shared_mounts() -> None:
    """Give the calling thread, and those and the children it starts from now on, mounts of their own.

    Raises:
        OSError: not allowed here; it needs root.

    Source: unshare(2), and mount(2) for the propagation: private, so that nothing reaches the machine's own.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNS) or libc.mount(None, b"/", None, _MS_REC | _MS_PRIVATE, None):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
