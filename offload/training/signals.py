"""Ctrl-C and SIGTERM: while training, the first asks for a stop after this step and the second leaves;
elsewhere the first ends the process in order, and the second leaves.

Python runs its handlers in the main thread, between two instructions: a matrix product of minutes would hold
them up. So a thread watches for the second signal, which leaves at once whatever the main thread does.

Invariant: the handlers that were there before are there afterwards. Thread rule: use it in the main
thread, where Python delivers signals; elsewhere it changes nothing and never asks for a stop.
"""

from __future__ import annotations

import os
import signal
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, NoReturn, Self

__all__ = ["OrderlyEnd", "StopRequest"]

WATCHED = (signal.SIGINT, signal.SIGTERM)


class _Watched(ABC):
    """Inside, `_first` is called for the first watched signal, and the second leaves.

    Installs one handler for all, and the thread that acts on the second.
    """

    def __init__(self) -> None:
        self._count = 0
        self._previous: dict[signal.Signals, Any] = {}
        self._previous_fd = -1
        self._write_fd = -1
        self._watcher: threading.Thread | None = None

    def __enter__(self) -> Self:
        if threading.current_thread() is not threading.main_thread():
            return self
        read_fd, self._write_fd = os.pipe()
        os.set_blocking(self._write_fd, False)
        self._watcher = threading.Thread(target=_watch, args=(read_fd,), name="offload signals", daemon=True)
        self._watcher.start()
        # Written to by the C handler, which runs at once, in whichever thread.
        self._previous_fd = signal.set_wakeup_fd(self._write_fd, warn_on_full_buffer=False)
        for number in WATCHED:
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()
        if self._watcher is not None:
            signal.set_wakeup_fd(self._previous_fd)
            os.close(self._write_fd)
            self._watcher.join()
            self._watcher = None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._count += 1
        if self._count > 1:
            _leave(number)
        self._first(signal.Signals(number))

    @abstractmethod
    def _first(self, number: signal.Signals) -> None:
        """Act on the first signal, in its handler."""


class StopRequest(_Watched):
    """A context manager inside which the first signal only sets `requested`.

    Args:
        on_request: called once with the signal, from the handler; it may print.
    """

    def __init__(self, on_request: Callable[[signal.Signals], None]) -> None:
        super().__init__()
        self.requested: signal.Signals | None = None
        self._on_request = on_request

    @property
    def exit_code(self) -> int:
        """128 + the signal's number as shells count it, or 0."""
        return 0 if self.requested is None else 128 + self.requested

    def _first(self, number: signal.Signals) -> None:
        self.requested = number
        self._on_request(number)


class OrderlyEnd(_Watched):
    """A context manager inside which the first signal raises, so that what was begun is taken back.

    SIGINT raises `KeyboardInterrupt` as ever, SIGTERM `SystemExit(143)`.
    """

    def _first(self, number: signal.Signals) -> None:
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + number)


def _watch(read_fd: int) -> None:
    """Leave at the second watched signal; end when the other end is closed."""
    count = 0
    try:
        while data := os.read(read_fd, 64):
            for number in data:
                count += number in WATCHED
                if count > 1:
                    _leave(number)
    finally:
        os.close(read_fd)


def _leave(number: int) -> NoReturn:
    # At once, without cleaning up: the state on the drives is a committed step at any moment.
    os._exit(128 + number)
