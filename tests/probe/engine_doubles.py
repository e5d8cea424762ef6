"""Engines around a real one: one that notes what it is asked, and one with a clock of its own."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from offload.aio import Engine, open_engine
from offload.probe import drives


@dataclass
class Log:
    """What engines were asked: (op, directory, offset, nbytes) and how many were outstanding then."""

    submitted: list[tuple[str, Any, int, int]] = field(default_factory=list)
    outstanding: list[int] = field(default_factory=list)
    syncs: int = 0

    def nbytes(self, op: str) -> int:
        return sum(nbytes for done, _, _, nbytes in self.submitted if done == op)


class RecordingEngine:
    """Passes everything on to a real engine."""

    def __init__(self, engine: Engine, log: Log) -> None:
        self.engine = engine
        self.log = log
        self.pending: dict[int, set[int]] = {}
        self.queue_depth = engine.queue_depth

    def submit(self, op, file, buffer, file_offset, nbytes=None):
        request = self.engine.submit(op, file, buffer, file_offset, nbytes)
        pending = self.pending.setdefault(id(file), set())
        pending.add(file_offset)
        self.log.submitted.append((op, file, file_offset, memoryview(buffer).nbytes))
        self.log.outstanding.append(len(pending))
        return RecordedRequest(request, lambda: pending.discard(file_offset))

    def sync(self, file):
        self.log.syncs += 1
        self.engine.sync(file)

    def close(self):
        self.engine.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


class RecordedRequest:
    """A request whose end is noted when it is waited for."""

    def __init__(self, request, ended):
        self.request = request
        self.ended = ended

    def wait(self):
        self.ended()
        return self.request.wait()

    def done(self):
        return self.request.done()

    @property
    def finished_s(self):
        return self.request.finished_s


def record(monkeypatch: pytest.MonkeyPatch) -> Log:
    """Make the runs of `drives` use recording engines."""
    log = Log()
    monkeypatch.setattr(
        drives, "open_engine", lambda *names, **options: RecordingEngine(open_engine(*names, **options), log)
    )
    return log


class TimedEngine:
    """A drive with a constant rate and a clock that only its own work moves."""

    def __init__(self, engine: Engine, clock: Clock) -> None:
        self.engine = engine
        self.clock = clock

    def submit(self, op, file, buffer, file_offset, nbytes=None):
        moved = self.engine.submit(op, file, buffer, file_offset, nbytes).wait()
        self.clock.busy_until_s = max(self.clock.busy_until_s, self.clock.now_s) + moved / self.clock.rate
        return TimedRequest(self.clock, moved, self.clock.busy_until_s)

    def sync(self, file):
        self.engine.sync(file)
        self.clock.now_s += self.clock.flush_s

    def close(self):
        self.engine.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


@dataclass
class TimedRequest:
    clock: Clock
    nbytes: int
    finished_s: float

    def wait(self):
        self.clock.now_s = max(self.clock.now_s, self.finished_s)
        return self.nbytes


@dataclass
class Clock:
    """Seconds that pass only when somebody waits."""

    rate: float
    flush_s: float
    now_s: float = 1000.0
    busy_until_s: float = 0.0


def keep_time(monkeypatch: pytest.MonkeyPatch, *, rate: float, flush_s: float) -> Clock:
    """Make the runs of `drives` use engines, and a clock, of this rate."""
    clock = Clock(rate, flush_s)
    monkeypatch.setattr(
        drives, "open_engine", lambda *names, **options: TimedEngine(open_engine(*names, **options), clock)
    )
    monkeypatch.setattr(drives, "time", SimpleNamespace(perf_counter=lambda: clock.now_s))
    return clock
