"""Ctrl-C and SIGTERM while training: the first asks for a stop after this step, the second leaves.

Invariant: the handlers that were there before are there afterwards. Thread rule: use it in the main
thread, where Python delivers signals; elsewhere it changes nothing and never asks for a stop.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, Self

__all__ = ["StopRequest"]

WATCHED = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """A context manager inside which the first signal only sets `requested`.

    Args:
        on_request: called once with the signal, from the handler; it may print.
    """

    def __init__(self, on_request: Callable[[signal.Signals], None]) -> None:
        self.requested: signal.Signals | None = None
        self._on_request = on_request
        self._previous: dict[signal.Signals, Any] = {}

    @property
    def exit_code(self) -> int:
        """128 + the signal's number as shells count it, or 0."""
        return 0 if self.requested is None else 128 + self.requested

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in WATCHED:
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested is not None:
            # At once, without cleaning up: the state on the drives is a committed step at any moment.
            os._exit(128 + number)
        self.requested = signal.Signals(number)
        self._on_request(self.requested)
