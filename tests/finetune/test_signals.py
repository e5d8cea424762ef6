"""The first signal asks, the second leaves, and the old handlers come back."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from offload import signals
from offload.signals import StopRequest

ROOT = Path(signals.__file__).parents[1]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_first_signal_only_asks(number: signal.Signals, code: int) -> None:
    asked: list[signal.Signals] = []
    before = signal.getsignal(number)
    with StopRequest(asked.append) as stop:
        assert (stop.requested, stop.exit_code) == (None, 0)
        os.kill(os.getpid(), number)
        assert (stop.requested, stop.exit_code, asked) == (number, code, [number])
    assert signal.getsignal(number) is before


def test_the_second_signal_leaves_at_once() -> None:
    script = (
        "import os, signal\nfrom offload.signals import StopRequest\n"
        "try:\n    with StopRequest(lambda number: print('asked', flush=True)):\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n        os.kill(os.getpid(), signal.SIGINT)\n"
        "finally:\n    print('cleaned up')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (130, "asked\n")


def test_another_thread_changes_nothing() -> None:
    before = signal.getsignal(signal.SIGINT)
    found: list[object] = []

    def run() -> None:
        with StopRequest(lambda _: None):
            found.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [before]
