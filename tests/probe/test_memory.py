"""Host memory and checksum: figures come out, and threads end."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from offload.errors import CapacityError
from offload.probe import memory
from offload.sizes import MIB


def test_all_threads_copy_at_once_and_end():
    before = threading.active_count()
    assert memory.copy_bytes_per_s(3, thread_nbytes=MIB, rounds=2) > 0
    assert threading.active_count() == before


def test_the_rate_counts_what_all_threads_copied_once(monkeypatch):
    ticks = iter(range(1000))
    monkeypatch.setattr(memory.time, "perf_counter", lambda: float(next(ticks)))
    # One thread: a start and an end one second apart, each round.
    assert memory.copy_bytes_per_s(1, thread_nbytes=MIB, rounds=3) == memory._COPIES * MIB


def test_a_host_without_room_says_so_and_threads_end(monkeypatch):
    before = threading.active_count()

    def full(*_, **__):
        raise MemoryError

    monkeypatch.setattr(memory, "np", type("Numpy", (), {"full": full, "uint8": np.uint8}))
    with pytest.raises(CapacityError, match="leave host memory out"):
        memory.copy_bytes_per_s(2, thread_nbytes=MIB)
    assert threading.active_count() == before


def test_the_checksum_has_a_rate():
    assert memory.checksum_bytes_per_s(MIB, rounds=2) > 0
