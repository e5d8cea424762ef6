"""Records spans on named tracks, and counters.

A track is one thing that can be busy: `compute`, `disk read`, `disk write`, `host to device`,
`device to host`, `update`, `commit`, `stall`. Any name may be used. Times are `time.perf_counter()`
seconds, which all threads share.

Counters and busy time are always kept; the spans themselves only when the tracer is enabled, in a
ring, to be written as a Chrome trace (`chrome://tracing`, `ui.perfetto.dev`).

Invariants: memory is bounded, whatever the length of the run; a counter falls at a reset only; a
track is busy at most as long as the clock ran, however many of its spans overlap.

Thread rule: every method may be called from any thread. The file is written outside the lock.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from pathlib import Path
from time import perf_counter
from types import TracebackType

from ..errors import StateError
from .chrome import Recorded, write_chrome_trace
from .intervals import Intervals

__all__ = ["Span", "Tracer"]

# About 20 MiB of spans: some hundred steps of a 32-layer model.
DEFAULT_CAPACITY = 1 << 16


class Tracer:
    """Records spans and counters of one run.

    Args:
        enabled: keep the spans for `write_chrome_trace`. Counters and busy time do not need it.
        capacity: how many spans to keep; the oldest are dropped, and counted in `num_dropped`.

    >>> tracer = Tracer(enabled=False)
    >>> tracer.add("disk read", "model.layers.0", 1.0, 3.0)
    >>> tracer.add("compute", "model.layers.0", 2.0, 4.0)
    >>> tracer.busy_s(), tracer.overlap_s("disk read", "compute")
    ({'disk read': 2.0, 'compute': 2.0}, 1.0)
    """

    def __init__(self, enabled: bool = True, capacity: int = DEFAULT_CAPACITY) -> None:
        if capacity < 1:
            raise ValueError(f"capacity must be at least 1 span, got {capacity}")
        self._enabled = enabled
        self._lock = threading.Lock()
        self._spans: deque[Recorded] = deque(maxlen=capacity)
        self._num_recorded = 0
        self._counters: dict[str, int] = {}
        self._busy: dict[str, Intervals] = {}
        self._moved: dict[str, int] = {}
        self._since_s = -math.inf

    @property
    def enabled(self) -> bool:
        """Whether spans are kept for the trace file."""
        return self._enabled

    @property
    def num_dropped(self) -> int:
        """Number of spans that the ring no longer holds."""
        with self._lock:
            return self._num_recorded - len(self._spans)

    def span(self, name: str, track: str, **args: object) -> Span:
        """Return a context manager that adds the time it is open, an exception inside included.

        Args:
            name: what the viewer shows: a unit or an owner.
            track: what is busy meanwhile.
            args: shown by the viewer when the span is selected.
        """
        return Span(self, name, track, args)

    def add(self, track: str, name: str, start_s: float, end_s: float, **args: object) -> None:
        """Add a span that has ended.

        Args:
            track: what was busy.
            name: what the viewer shows.
            start_s, end_s: `time.perf_counter()` at both ends.
            args: shown by the viewer when the span is selected.

        Raises:
            ValueError: it ends before it starts.
        """
        if not start_s <= end_s:
            raise ValueError(
                f"span {name!r} on track {track!r} ends at {end_s} s, before its start at {start_s} s"
            )
        self._record(Recorded(track, name, start_s, end_s, args))

    def count(self, counter: str, amount: int) -> None:
        """Add `amount`, at least 0, to a counter, which begins at 0.

        Raises:
            ValueError: `amount` is negative.
        """
        if amount < 0:
            raise ValueError(f"counter {counter!r} cannot fall: got amount {amount}")
        with self._lock:
            self._counters[counter] = self._counters.get(counter, 0) + amount

    def counters(self) -> dict[str, int]:
        """Return the counters since the last reset."""
        with self._lock:
            return dict(self._counters)

    def busy_s(self) -> dict[str, float]:
        """Return for each track the seconds since the last reset in which any of its spans was open.

        Spans count when they have ended; of one that began before the reset, the part after it counts.
        """
        with self._lock:
            return {track: intervals.total_s() for track, intervals in self._busy.items()}

    def moved_nbytes(self) -> dict[str, int]:
        """Return for each track the sum of the `nbytes` of its spans since the last reset."""
        with self._lock:
            return dict(self._moved)

    def overlap_s(self, track: str, other: str) -> float:
        """Return the seconds since the last reset in which both tracks were busy; 0 for unknown ones.

        Without a reset it looks back over the last few thousand busy intervals of each track only.
        """
        with self._lock:
            if track not in self._busy or other not in self._busy:
                return 0.0
            return self._busy[track].overlap_s(self._busy[other])

    def reset(self) -> None:
        """Start counters and busy time over. The spans for the trace file stay."""
        with self._lock:
            self._since_s = perf_counter()
            self._counters.clear()
            self._busy.clear()
            self._moved.clear()

    def write_chrome_trace(self, path: str | Path) -> None:
        """Write the spans kept so far as Chrome trace JSON, compressed if the name ends in `.gz`.

        Each track is a named thread; spans of one track that overlap go to further threads, `disk
        read 2` and so on, since the viewers take only spans that nest. The file is replaced whole.

        Raises:
            StateError: the tracer is not enabled, so there are no spans.
            StorageError: the file cannot be written; nothing is left behind.
        """
        if not self._enabled:
            raise StateError(
                f"no spans to write to {path}: this tracer only counts; make it with enabled=True"
            )
        with self._lock:
            spans = list(self._spans)
            other = {
                "counters": dict(self._counters),
                "busy_s": {track: intervals.total_s() for track, intervals in self._busy.items()},
                "num_dropped_spans": self._num_recorded - len(spans),
            }
        write_chrome_trace(Path(path), spans, other)

    def _record(self, span: Recorded) -> None:
        with self._lock:
            busy = self._busy.get(span.track)
            if busy is None:
                busy = self._busy[span.track] = Intervals(self._since_s)
            busy.add(span.start_s, span.end_s)
            if isinstance(nbytes := span.args.get("nbytes"), int):
                self._moved[span.track] = self._moved.get(span.track, 0) + nbytes
            if self._enabled:
                self._spans.append(span)
                self._num_recorded += 1


class Span:
    """An open span; made by `Tracer.span`, used once."""

    __slots__ = ("_args", "_name", "_start_s", "_tracer", "_track")

    def __init__(self, tracer: Tracer, name: str, track: str, args: dict[str, object]) -> None:
        self._tracer = tracer
        self._name = name
        self._track = track
        self._args = args

    def __enter__(self) -> None:
        self._start_s = perf_counter()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        end_s = perf_counter()
        self._tracer._record(Recorded(self._track, self._name, self._start_s, end_s, self._args))
