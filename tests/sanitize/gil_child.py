"""The child of tests/aio/test_engine_gil.py: makes one call of an engine while its system calls are held.

    gil_child.py MAIN_FD TICKER_FD CASE ENGINE FOLDER

A second thread ticks: it answers the parent whenever it can run Python. The switch interval is so long
that it never takes the interpreter from the main thread; it gets in where the main thread lets go.
"""

from __future__ import annotations

import ctypes
import os
import socket
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from held_calls import install_filter

from offload.aio import open_engine
from offload.errors import StateError

BUFFER = bytes(5000)


@dataclass
class Stage:
    """What the cases work with. A case deletes what it drops."""

    channel: socket.socket
    engine_name: str
    engine: Any
    file: Any
    path: str
    request: Any = None

    def hold(self, *calls: str) -> None:
        """Have the parent hold the next of `calls`."""
        self.channel.sendall(f"hold {' '.join(calls)}\n".encode())
        assert self.channel.recv(100) == b"go\n"

    def wait_until_held(self) -> None:
        """Return when some thread is inside that call."""
        self.channel.sendall(b"wait\n")
        assert self.channel.recv(100) == b"go\n"

    def put_in_flight(self) -> None:
        """Submit a write that does not end until the parent lets it."""
        self.hold(*(["io_uring_enter"] if self.engine_name == "uring" else ["pwritev", "pwritev2"]))
        self.request = self.engine.submit("write", self.file, BUFFER, 0)
        self.wait_until_held()

    def close_elsewhere(self) -> None:
        """Have another thread be inside the close of the file's descriptor."""
        self.hold("close")
        threading.Thread(target=self.file.close, daemon=True).start()
        self.wait_until_held()


# Before the call, and the call.
Case = tuple[Callable[[Stage], None], Callable[[Stage], object]]


def drop(name: str) -> Callable[[Stage], None]:
    return lambda stage: delattr(stage, name)


def refused(call: Callable[[Stage], object]) -> Callable[[Stage], None]:
    """The call, which may be refused because the file is being closed."""

    def wrapped(stage: Stage) -> None:
        try:
            call(stage)
        except StateError:
            return

    return wrapped


def size_nbytes(stage: Stage) -> object:
    return stage.file.size_nbytes


def submit(stage: Stage) -> object:
    return stage.engine.submit("write", stage.file, BUFFER, 8192)


close = ctypes.PyDLL(None).close


def keep(stage: Stage) -> None:
    """Close a descriptor with the interpreter held (ctypes.PyDLL), as no engine may."""
    close(0)


def drop_engine(stage: Stage) -> None:
    del stage.engine


CASES: dict[str, Case] = {
    "open": (lambda stage: stage.hold("openat"), lambda stage: stage.engine.open(stage.path, "r+")),
    "size_nbytes": (lambda stage: stage.hold("newfstatat", "fstat"), size_nbytes),
    "allocate": (lambda stage: stage.hold("fallocate"), lambda stage: stage.file.allocate(100_000)),
    "sync": (lambda stage: stage.hold("fdatasync"), lambda stage: stage.engine.sync(stage.file)),
    "file.close": (lambda stage: stage.hold("close"), lambda stage: stage.file.close()),
    "file dropped": (lambda stage: stage.hold("close"), drop("file")),
    "wait": (Stage.put_in_flight, lambda stage: stage.request.wait()),
    "wait with timeout": (Stage.put_in_flight, lambda stage: stage.request.wait(3600)),
    "file.close in flight": (Stage.put_in_flight, lambda stage: stage.file.close()),
    "engine.close in flight": (Stage.put_in_flight, lambda stage: stage.engine.close()),
    "engine dropped in flight": (Stage.put_in_flight, drop_engine),
    "submit": (Stage.put_in_flight, submit),
    "done": (Stage.put_in_flight, lambda stage: stage.request.done()),
    "cancel": (Stage.put_in_flight, lambda stage: stage.request.cancel()),
    "request dropped in flight": (Stage.put_in_flight, drop("request")),
    "file dropped in flight": (Stage.put_in_flight, drop("file")),
    "size_nbytes in flight": (Stage.put_in_flight, size_nbytes),
    "size_nbytes while closing": (Stage.close_elsewhere, refused(size_nbytes)),
    "submit while closing": (Stage.close_elsewhere, refused(submit)),
    "kept": (lambda stage: stage.hold("close"), keep),
}


def tick(channel: socket.socket, gate: threading.Lock, state: dict[str, bool]) -> None:
    """Say when the main thread has let go inside its call, then answer each question."""
    gate.acquire()
    channel.sendall(b"inside\n")
    while channel.recv(1):
        channel.sendall(b"after\n" if state["returned"] else b"during\n")


def main() -> None:
    main_fd, ticker_fd = int(sys.argv[1]), int(sys.argv[2])
    case, engine_name, folder = sys.argv[3:]
    channel = socket.socket(fileno=main_fd)
    ticker_channel = socket.socket(fileno=ticker_fd)
    gate = threading.Lock()
    gate.acquire()
    state = {"returned": False}
    # Before the filter: nobody asks about this thread's calls.
    threading.Thread(target=tick, args=(ticker_channel, gate, state), daemon=True).start()
    try:
        listener = install_filter()
    except OSError as error:
        channel.sendall(f"no filter: {error}\n".encode())
        return
    socket.send_fds(channel, [b"ready\n"], [listener])
    engine = open_engine(engine_name, queue_depth=4, segment_nbytes=16384, threads=4)  # type: ignore[arg-type]
    path = os.path.join(folder, "data")
    stage = Stage(channel, engine_name, engine, engine.open(path, "x+"), path)
    del engine
    prepare, call = CASES[case]
    prepare(stage)
    sys.setswitchinterval(1000)
    gate.release()  # keeps the interpreter: the ticker gets in at the call, or never
    call(stage)
    state["returned"] = True
    channel.sendall(b"returned\n")
    channel.recv(100)


if __name__ == "__main__":
    main()
