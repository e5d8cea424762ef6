"""Watches the private memory of a process from another one, so that watching costs it nothing.

What is counted is RssAnon + RssShmem of /proc/PID/status: every page of the process that no file
backs. A child process reads it every few milliseconds, since a thread would wait for the GIL just
when a long call allocates.

Run as a script it is that child: `python -S _memory.py PID INTERVAL_S`, until its stdin closes; then it
prints the largest value of each 0.1 s as `time bytes`, by the clock of `time.monotonic`.
"""

from __future__ import annotations

import re
import select
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType

__all__ = ["MemoryWatch", "private_nbytes"]

BIN_S = 0.1


def private_nbytes(pid: int | str = "self") -> int:
    """Return the bytes of a process that no file backs."""
    with open(f"/proc/{pid}/status", "rb", buffering=0) as file:
        status = file.read()
    return sum(int(kib) for kib in re.findall(rb"^Rss(?:Anon|Shmem):\s+(\d+) kB", status, re.MULTILINE)) << 10


class MemoryWatch:
    """Samples a process from entry to exit; a context manager. Then `samples` holds (time_s, nbytes)."""

    def __init__(self, pid: int, interval_s: float = 0.004) -> None:
        self.samples: list[tuple[float, int]] = []
        self._command = [sys.executable, "-S", str(Path(__file__)), str(pid), str(interval_s)]

    def __enter__(self) -> MemoryWatch:
        self._child = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._child.stdout is not None
        self._child.stdout.readline()  # It says when it has begun.
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        output, _ = self._child.communicate()
        for line in output.splitlines():
            time_s, nbytes = line.split()
            self.samples.append((float(time_s), int(nbytes)))

    def peak_nbytes(self, start_s: float, end_s: float) -> int:
        """Return the largest value between two times of `time.monotonic`, whole bins."""
        return max(
            (nbytes for time_s, nbytes in self.samples if start_s - BIN_S <= time_s <= end_s), default=0
        )


def _watch(pid: int, interval_s: float) -> None:
    print("watching", flush=True)
    bins: list[tuple[float, int]] = []
    while True:
        try:
            now_s, nbytes = time.monotonic(), private_nbytes(pid)
        except (FileNotFoundError, ProcessLookupError):
            break  # It has ended, and somebody has waited for it.
        if bins and now_s - bins[-1][0] < BIN_S:
            bins[-1] = (bins[-1][0], max(bins[-1][1], nbytes))
        else:
            bins.append((now_s, nbytes))
        if select.select([sys.stdin], [], [], interval_s)[0]:
            break
    for time_s, peak in bins:
        print(f"{time_s:.3f} {peak}")


if __name__ == "__main__":
    _watch(int(sys.argv[1]), float(sys.argv[2]))
