"""Writes spans as Chrome trace JSON, which `chrome://tracing` and `ui.perfetto.dev` open.

Each track is a named thread. Spans of one track that overlap are dealt to further threads, `disk read
2` and so on: the viewers take only spans that nest.

Source: "Trace Event Format" (Google), the JSON object format with `X` and `M` events.
"""

from __future__ import annotations

import errno
import gzip
import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from ..errors import DiskFullError, StorageError

__all__ = ["Recorded", "write_chrome_trace"]

# From top to bottom in the viewer. Other tracks follow in order of their names.
_TRACK_ORDER = (
    "compute",
    "stall",
    "host to device",
    "device to host",
    "disk read",
    "disk write",
    "update",
    "commit",
)


class Recorded(NamedTuple):
    """A span that has ended; times in seconds."""

    track: str
    name: str
    start_s: float
    end_s: float
    args: dict[str, object]


def write_chrome_trace(path: Path, spans: Sequence[Recorded], other: Mapping[str, object]) -> None:
    """Write `spans` to `path`, and `other` as the trace's own data; compress if it ends in `.gz`.

    Raises:
        DiskFullError: no room, with the bytes needed and free; nothing is left behind.
        StorageError: the file cannot be written for another reason; nothing is left behind.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        try:
            with _open_text(part, compress=path.suffix == ".gz") as file:
                file.writelines(_document(spans, other))
            with part.open("rb") as written:
                os.fsync(written.fileno())
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _no_room(path, error, sum(map(len, _document(spans, other)))) from error
        raise StorageError(
            f"cannot write the trace {path}: {error.strerror}; "
            "name a file in a directory that exists and is writable",
            errno=error.errno or 0,
            path=str(path),
        ) from error


def _no_room(path: Path, error: OSError, nbytes: int) -> DiskFullError:
    free_nbytes = shutil.disk_usage(path.parent).free
    needed = f"{'up to ' if path.suffix == '.gz' else ''}{nbytes:,} bytes needed"
    return DiskFullError(
        f"cannot write the trace {path}: {error.strerror}: {needed}, {free_nbytes:,} free; free space, or"
        " name a file on another drive",
        errno=error.errno or 0,
        path=str(path),
        asked_nbytes=nbytes,
        got_nbytes=free_nbytes,
    )


def _document(spans: Sequence[Recorded], other: Mapping[str, object]) -> Iterator[str]:
    """Yield the text of a trace in the JSON object format, one event a line.

    Source: Trace Event Format (Google, "Trace Event Format" document), events `X` and `M`.
    """
    yield '{"displayTimeUnit": "ms",\n"otherData": ' + json.dumps(other) + ',\n"traceEvents": [\n'
    separator = ""
    for event in _events(spans):
        yield separator + json.dumps(event, allow_nan=False)
        separator = ",\n"
    yield "\n]}\n"


def _events(spans: Sequence[Recorded]) -> Iterator[dict[str, Any]]:
    pid = os.getpid()
    yield {"ph": "M", "name": "process_name", "pid": pid, "tid": 0, "args": {"name": "offload"}}
    origin_s = min((span.start_s for span in spans), default=0.0)
    tid = 0
    for track in sorted({span.track for span in spans}, key=_track_place):
        for i, lane in enumerate(_lanes(span for span in spans if span.track == track)):
            tid += 1
            name = f"{track} {i + 1}" if i else track
            yield {"ph": "M", "name": "thread_name", "pid": pid, "tid": tid, "args": {"name": name}}
            yield {
                "ph": "M",
                "name": "thread_sort_index",
                "pid": pid,
                "tid": tid,
                "args": {"sort_index": tid},
            }
            for span in lane:
                # Whole nanoseconds first, so that rounding never makes neighbours overlap.
                start_ns = round((span.start_s - origin_s) * 1e9)
                end_ns = round((span.end_s - origin_s) * 1e9)
                yield {
                    "ph": "X",
                    "name": span.name,
                    "cat": track,
                    "pid": pid,
                    "tid": tid,
                    "ts": start_ns / 1e3,
                    "dur": (end_ns - start_ns) / 1e3,
                    "args": {key: _plain(value) for key, value in span.args.items()},
                }


def _track_place(track: str) -> tuple[int, str]:
    return (_TRACK_ORDER.index(track) if track in _TRACK_ORDER else len(_TRACK_ORDER), track)


def _lanes(spans: Iterable[Recorded]) -> list[list[Recorded]]:
    """Deal spans into as few lists as possible in which none overlap.

    Perfetto cuts or misplaces complete events of one thread that overlap without nesting
    (google/perfetto issues 432, 4280).
    """
    lanes: list[list[Recorded]] = []
    for span in sorted(spans, key=lambda span: (span.start_s, span.end_s)):
        lane = next((lane for lane in lanes if lane[-1].end_s <= span.start_s), None)
        if lane is None:
            lanes.append([span])
        else:
            lane.append(span)
    return lanes


def _plain(value: object) -> object:
    """Return `value` if JSON has it, else its text; NaN and infinities are not JSON."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if value is None or isinstance(value, (str, int, float)) else str(value)


def _open_text(path: Path, *, compress: bool) -> TextIO:
    if compress:
        return gzip.open(path, "wt", encoding="utf-8", newline="\n")
    return path.open("w", encoding="utf-8", newline="\n")
