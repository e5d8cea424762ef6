"""Two drives, one three times as fast: what each gets, how long that takes, and what the meters say.

The drives are throttled by a clock of their own, which a wait moves on: nothing sleeps.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from store_doubles import PlainEngine

from offload.store import RecordSpec, Store, submit

CHUNK = 4096
NUM_CHUNKS = 64
RATES = {"a": 1e6, "b": 3e6}


class ThrottledRequest:
    def __init__(self, engine: ThrottledEngine, nbytes: int, finished_s: float) -> None:
        self._engine, self._nbytes, self._finished_s = engine, nbytes, finished_s

    def wait(self, timeout_s: float | None = None) -> int:
        self._engine.now_s = max(self._engine.now_s, self._finished_s)
        return self._nbytes

    def done(self) -> bool:
        return self._engine.now_s >= self._finished_s

    @property
    def finished_s(self) -> float | None:
        return self._finished_s if self.done() else None


class ThrottledEngine(PlainEngine):
    """Each drive does one request after another, at its own rate."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 100.0
        self._free_s = dict.fromkeys(RATES, 0.0)

    def submit(self, op, file, buffer, file_offset, nbytes=None):
        moved = super().submit(op, file, buffer, file_offset, nbytes).wait()
        name = next(name for name in RATES if f"/{name}/" in file.full_path)
        self._free_s[name] = max(self._free_s[name], self.now_s) + moved / RATES[name]
        return ThrottledRequest(self, moved, self._free_s[name])


@pytest.fixture
def throttled(monkeypatch) -> ThrottledEngine:
    engine = ThrottledEngine()
    monkeypatch.setattr(submit, "time", SimpleNamespace(perf_counter=lambda: engine.now_s))
    return engine


def create(dirs, engine, weights) -> Store:
    spec = RecordSpec("w", NUM_CHUNKS * CHUNK)
    return Store.create(dirs, [spec], engine=engine, chunk_nbytes=CHUNK, weights=weights)


def elapsed_s(store: Store, engine: ThrottledEngine) -> float:
    begun_s = engine.now_s
    store.write("w", bytes(NUM_CHUNKS * CHUNK)).wait()
    store.read("w", bytearray(NUM_CHUNKS * CHUNK)).wait()
    return engine.now_s - begun_s


def test_time_is_that_of_the_sum_of_the_speeds(dirs, throttled) -> None:
    nbytes = 2 * NUM_CHUNKS * CHUNK
    with create(dirs, throttled, [1.0, 3.0]) as store:
        assert elapsed_s(store, throttled) == pytest.approx(nbytes / 4e6)
    with create(dirs, throttled, None) as store:
        assert elapsed_s(store, throttled) == pytest.approx(nbytes / 2e6)  # twice the slower one's


def test_each_part_of_a_record_is_dealt_in_proportion(dirs, throttled) -> None:
    with create(dirs, throttled, [1.0, 3.0]) as store:
        store.write("w", bytes(NUM_CHUNKS * CHUNK)).wait()
        for first in range(0, NUM_CHUNKS, 8):
            for meter in store.meters:
                meter.reset()
            store.read("w", bytearray(8 * CHUNK), offset=first * CHUNK, nbytes=8 * CHUNK).wait()
            assert [meter.load().read_nbytes for meter in store.meters] == [2 * CHUNK, 6 * CHUNK]


def test_meters_count_bytes_and_time_at_work(dirs, throttled) -> None:
    with create(dirs, throttled, [1.0, 3.0]) as store:
        elapsed_s(store, throttled)
        loads = [meter.load() for meter in store.meters]
        assert [load.directory for load in loads] == [str(path) for path in dirs]
        assert [load.share for load in loads] == [0.25, 0.75]
        parts = [NUM_CHUNKS * CHUNK // 4, 3 * NUM_CHUNKS * CHUNK // 4]
        assert [(load.read_nbytes, load.written_nbytes) for load in loads] == [(n, n) for n in parts]
        # As long as each other, since each has its part.
        assert [load.busy_s for load in loads] == pytest.approx([2 * parts[0] / 1e6] * 2)
        assert [load.bytes_per_s for load in loads] == pytest.approx([1e6, 3e6])


def test_a_drive_slower_than_its_part_is_at_work_for_longer(dirs, throttled) -> None:
    with create(dirs, throttled, None) as store:
        elapsed_s(store, throttled)
        slow, fast = (meter.load() for meter in store.meters)
        assert slow.busy_s == pytest.approx(3 * fast.busy_s)
        assert (slow.bytes_per_s, fast.bytes_per_s) == pytest.approx((1e6, 3e6))


def test_scratch_areas_count_on_the_drives_of_their_run(dirs, throttled) -> None:
    with create(dirs, throttled, [1.0, 3.0]) as store:
        with store.scratch([RecordSpec("g", 4 * CHUNK)], chunk_nbytes=CHUNK) as scratch:
            scratch.write("g", bytes(4 * CHUNK)).wait()
        assert [meter.load().written_nbytes for meter in store.meters] == [CHUNK, 3 * CHUNK]


def test_a_run_that_is_opened_again_keeps_its_shares(dirs, throttled) -> None:
    with create(dirs, throttled, [1.0, 3.0]) as store:
        store.write("w", bytes(NUM_CHUNKS * CHUNK)).wait()
        store.commit({})
    with Store.open(dirs, engine=throttled, run_id=store.run_id) as store:
        assert [meter.load().share for meter in store.meters] == [0.25, 0.75]
