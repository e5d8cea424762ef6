"""The first signal asks, the second leaves, and the old handlers come back."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from offload.training import signals
from offload.training.signals import OrderlyEnd, StopRequest

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
        "import os, signal\nfrom offload.training.signals import StopRequest\n"
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


# One call that holds the main thread in C for half a minute, without the interpreter's lock: handlers wait.
LONG = "hashlib.pbkdf2_hmac('sha256', b'a', b'b', 60_000_000)"


@pytest.mark.parametrize("context", ["StopRequest(lambda number: None)", "OrderlyEnd()"])
def test_the_second_signal_leaves_a_main_thread_that_is_busy(context: str) -> None:
    script = (
        "import hashlib\nfrom offload.training.signals import OrderlyEnd, StopRequest\n"
        f"with {context}:\n    print('busy', flush=True)\n    {LONG}\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "busy\n"
        process.send_signal(signal.SIGTERM)
        began_s = time.monotonic()
        # The same signal twice in a row may be merged by the kernel; another one is not.
        process.send_signal(signal.SIGINT)
        code = process.wait(timeout=20)
        seconds = time.monotonic() - began_s
    assert code in (130, 143)
    assert seconds < 3


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_outside_of_training_one_signal_ends_in_order(number: signal.Signals, code: int) -> None:
    script = (
        "import os, signal, sys\nfrom offload.training.signals import OrderlyEnd\n"
        "try:\n    with OrderlyEnd():\n        try:\n"
        f"            os.kill(os.getpid(), {int(number)})\n            signal.pause()\n"
        "        finally:\n            print('cleaned up', flush=True)\n"
        "except KeyboardInterrupt:\n    sys.exit(130)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (code, "cleaned up\n")


def test_nested_handlers_and_their_thread_go_again() -> None:
    before = [signal.getsignal(number) for number in signals.WATCHED]
    threads = threading.active_count()
    with OrderlyEnd(), StopRequest(lambda _: None) as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested is signal.SIGTERM
    assert [signal.getsignal(number) for number in signals.WATCHED] == before
    assert threading.active_count() == threads
    assert signal.set_wakeup_fd(-1) == -1
