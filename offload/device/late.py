"""Copies that run as late as the rules allow: the stand-in's strict mode, for tests and debugging.

A GPU runs a copy at some moment between its call and its event. Here it runs at the last one: when
its event is waited for. Until then its target holds poison. So whoever reads a target, or overwrites
a source, without waiting gets wrong bytes every time, not once in a thousand runs on a GPU.

Invariants: the copies of one queue run in the order they were begun, as on a stream.

Thread rule: every method may be called from any thread.
"""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass
from typing import Literal

import torch

from ..buffers import POISON
from .tensors import nbytes_of

__all__ = ["LateCopies", "LateEvent", "QueueName"]

QueueName = Literal["upload", "download"]

# A caller that polls must get there in the end; one that merely looks must not run the copy.
_POLLS_TO_PASS = 100


@dataclass(frozen=True, slots=True)
class _Copy:
    source: torch.Tensor
    target: torch.Tensor
    index: int

    def touches(self, address: int, nbytes: int) -> bool:
        return any(
            tensor.data_ptr() < address + nbytes and address < tensor.data_ptr() + nbytes_of(tensor)
            for tensor in (self.source, self.target)
        )


class LateEvent:
    """Passes when its copy has run: at `wait`, or after being asked `done` often."""

    def __init__(self, copies: LateCopies, queue: QueueName, index: int) -> None:
        self._copies = copies
        self.queue = queue
        self.index = index
        self._polls = 0

    def wait(self) -> None:
        """Run the copies up to this one."""
        self._copies.run_until(self)

    def done(self) -> bool:
        """Return whether the copy has run."""
        self._polls += 1
        if self._polls >= _POLLS_TO_PASS:
            self.wait()
        return self._copies.has_run(self)

    def covers(self, other: LateEvent) -> bool:
        """Return whether waiting for this event waits for `other` too."""
        return self.queue == other.queue and self.index >= other.index


class LateCopies:
    """Two queues of copies, begun now and run when waited for; see the module."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._pending: dict[QueueName, deque[_Copy]] = {"upload": deque(), "download": deque()}
        self._begun: dict[QueueName, int] = {"upload": 0, "download": 0}

    def begin(self, queue: QueueName, source: torch.Tensor, target: torch.Tensor) -> LateEvent:
        """Poison `target`, remember the copy and return its event."""
        with self._lock:
            target.view(torch.uint8).fill_(POISON)
            index = self._begun[queue]
            self._begun[queue] += 1
            self._pending[queue].append(_Copy(source, target, index))
            return LateEvent(self, queue, index)

    def run_until(self, event: LateEvent) -> None:
        """Run the copies of the event's queue up to its own."""
        with self._lock, torch.no_grad():
            pending = self._pending[event.queue]
            while pending and pending[0].index <= event.index:
                copy = pending.popleft()
                copy.target.copy_(copy.source)

    def has_run(self, event: LateEvent) -> bool:
        """Return whether the event's copy has run."""
        with self._lock:
            pending = self._pending[event.queue]
            return not pending or pending[0].index > event.index

    def touching(self, address: int, nbytes: int) -> list[LateEvent]:
        """Return the events of the copies not yet run that read or write any of these bytes."""
        with self._lock:
            return [
                LateEvent(self, queue, copy.index)
                for queue, pending in self._pending.items()
                for copy in pending
                if copy.touches(address, nbytes)
            ]

    def run_all(self) -> None:
        """Run every copy begun so far."""
        for queue in self._pending:
            self.run_until(LateEvent(self, queue, self._begun[queue]))
