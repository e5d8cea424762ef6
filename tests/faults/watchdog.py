"""A time limit for one case of many, which says where every thread is when the case hangs."""

from __future__ import annotations

import faulthandler
import math
import tempfile
import threading
from collections.abc import Callable
from typing import TypeVar

import pytest

__all__ = ["within"]

T = TypeVar("T")

_SLICE_S = 1.0


def within(timeout_s: float, what: str, case: Callable[[], T]) -> T:
    """Run `case` on a thread and return its result, or fail with all stacks when it takes too long.

    The thread of a case that hangs is left behind: nothing can end it, but it holds nothing of others.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(case())
        except BaseException as error:  # noqa: BLE001 - handed to the thread that waits, which raises it
            errors.append(error)

    thread = threading.Thread(target=run, name=f"case: {what}", daemon=True)
    thread.start()
    # In slices: one during which the whole process was stopped, to let others measure, counts as one.
    for _ in range(math.ceil(timeout_s / _SLICE_S)):
        thread.join(_SLICE_S)
        if not thread.is_alive():
            break
    if thread.is_alive():
        with tempfile.TemporaryFile("w+") as file:
            faulthandler.dump_traceback(file, all_threads=True)
            file.seek(0)
            pytest.fail(f"{what}: still running after {timeout_s} s\n{file.read()}")
    if errors:
        errors[0].add_note(f"in the case: {what}")
        raise errors[0]
    return results[0]
