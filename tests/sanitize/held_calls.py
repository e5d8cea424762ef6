"""A child process whose system calls can be held: seen to be inside the kernel, and kept there.

The child puts a seccomp filter on itself that asks its parent about a few system calls
(SECCOMP_RET_USER_NOTIF). The parent lets them pass, but for the one that it was told to hold. Nothing
is timed: while a call is held, its thread is in the kernel and nowhere else. Needs no privilege.

x86-64 Linux from 5.5 on. One thread uses a `HeldChild`.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import platform
import select
import socket
import struct
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

__all__ = ["CALLS", "PATIENCE_S", "HeldChild", "Stuck", "install_filter", "missing_reason"]

# System calls by their x86-64 numbers.
CALLS = {
    "close": 3,
    "fstat": 5,  # where a sanitizer stands between us and the C library
    "fdatasync": 75,
    "openat": 257,
    "newfstatat": 262,
    "fallocate": 285,
    "pwritev": 296,
    "pwritev2": 328,  # what os.pwritev is
    "io_uring_enter": 426,
}

# How long a child may say nothing before it counts as stuck. Only a failing test waits for it.
PATIENCE_S = 30.0

# include/uapi/linux/seccomp.h; the sizes of the two structures are part of the ioctl numbers.
_SYS_SECCOMP = 317
_PR_SET_NO_NEW_PRIVS = 38
_SET_MODE_FILTER = 1
_FILTER_FLAG_NEW_LISTENER = 8
_RET_USER_NOTIF = 0x7FC00000
_RET_ALLOW = 0x7FFF0000
_NOTIF = struct.Struct("=QIIiIQ6Q")
_RESPONSE = struct.Struct("=QqiI")
_NOTIF_RECV = 0xC0002100 | _NOTIF.size << 16
_NOTIF_SEND = 0xC0002101 | _RESPONSE.size << 16
_CONTINUE = 1


def missing_reason() -> str:
    """Return why calls cannot be held here, or an empty string."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return "the numbers of system calls are known for x86-64 Linux only"
    release = tuple(int(part) for part in platform.release().split("-")[0].split(".")[:2])
    return "" if release >= (5, 5) else "seccomp cannot let a call pass before Linux 5.5"


def install_filter() -> int:
    """In the child: have CALLS of this thread, and those it starts, asked about; return the listener."""
    steps = [(0x20, 0, 0, 0)]  # load the number of the system call
    steps += [(0x15, len(CALLS) - place, 0, number) for place, number in enumerate(CALLS.values())]
    steps += [(0x06, 0, 0, _RET_ALLOW), (0x06, 0, 0, _RET_USER_NOTIF)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
    program = struct.pack("HP", len(steps), ctypes.addressof(code))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0:
        listener: int = libc.syscall(_SYS_SECCOMP, _SET_MODE_FILTER, _FILTER_FLAG_NEW_LISTENER, program)
        if listener >= 0:
            return listener
    raise OSError(ctypes.get_errno(), "seccomp")


class Stuck(Exception):
    """The child said nothing for too long."""


class HeldChild:
    """Runs a Python program that speaks over two sockets, and holds its calls. A context manager.

    The program is started with two descriptors as its first arguments: one for its main thread,
    where the first message carries the listener, and one for a thread that ticks. Messages are lines.
    """

    def __init__(self, program: Path, *arguments: str, patience_s: float = PATIENCE_S) -> None:
        self._main, main_end = socket.socketpair()
        self._ticker, ticker_end = socket.socketpair()
        ends = (main_end.fileno(), ticker_end.fileno())
        self._process = subprocess.Popen(
            [sys.executable, str(program), *map(str, ends), *arguments], pass_fds=ends
        )
        main_end.close()
        ticker_end.close()
        self._patience_s = patience_s
        self._listener = -1
        self._wanted: set[int] = set()
        self._held: int | None = None
        self._unread = {self._main: b"", self._ticker: b""}

    def start(self) -> str:
        """Take the listener; return what the child said with it."""
        if not select.select([self._main], [], [], self._patience_s)[0]:
            raise Stuck("the child did not start")
        message, descriptors, _, _ = socket.recv_fds(self._main, 100, 1)
        self._listener = descriptors[0] if descriptors else -1
        return message.decode().strip()

    def hold(self, *calls: str) -> None:
        """Hold the next of `calls` that any thread makes."""
        self._wanted = {CALLS[call] for call in calls}

    def held(self) -> None:
        """Wait until it is held. Fails when it is not made."""
        try:
            self._serve([], until_held=True)
        except Stuck as error:
            raise AssertionError("the child never made the call that was to be held") from error

    def let_go(self) -> None:
        """Let the call that is held, or that was going to be, pass."""
        self._wanted = set()
        if self._held is not None:
            self._answer(self._held)
            self._held = None

    def tell(self, message: str) -> None:
        """Say something to the main thread."""
        self._main.sendall(message.encode() + b"\n")

    def heard(self) -> str:
        """The next thing that the main thread says."""
        return self._serve([self._main])

    def heard_from_any(self) -> str:
        """The next thing that the main thread or the ticker says."""
        return self._serve([self._main, self._ticker])

    def tick(self) -> str:
        """Ask for a tick, for which the child needs the interpreter; return what it says to it."""
        self._ticker.sendall(b"?")
        return self._serve([self._ticker])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()
        self._main.close()
        self._ticker.close()
        if self._listener >= 0:
            os.close(self._listener)

    def _serve(self, sources: Sequence[socket.socket], *, until_held: bool = False) -> str:
        """Let calls pass until one is held or one of `sources` has said a line."""
        while True:
            for source in sources:
                line, found, rest = self._unread[source].partition(b"\n")
                if found:
                    self._unread[source] = rest
                    return line.decode()
            if until_held and self._held is not None:
                return ""
            waits = [self._listener, *sources]
            ready = select.select(waits, [], [], self._patience_s)[0]
            if not ready:
                raise Stuck("no thread of the child can run Python")
            for source in ready:
                if isinstance(source, socket.socket):
                    said = source.recv(1000)
                    if not said:
                        raise Stuck(f"the child ended with {self._process.wait()}")
                    self._unread[source] += said
                else:
                    self._asked()

    def _asked(self) -> None:
        message = bytearray(_NOTIF.size)
        try:
            fcntl.ioctl(self._listener, _NOTIF_RECV, message)
        except FileNotFoundError:
            return  # the thread was killed before we looked
        identity, _, _, number, *_ = _NOTIF.unpack(message)
        if number in self._wanted and self._held is None:
            self._held = identity
        else:
            self._answer(identity)

    def _answer(self, identity: int) -> None:
        fcntl.ioctl(self._listener, _NOTIF_SEND, _RESPONSE.pack(identity, 0, 0, _CONTINUE))
