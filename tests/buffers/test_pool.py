"""Pools: which slot is lent, who waits for how long, and who comes next."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule

from offload.buffers import PAGE_NBYTES, Arena, Budget, Lease, Partition, Pool, Region
from offload.errors import CapacityError, RequestTimeoutError, StateError
from offload.sizes import MIB
from offload.specs import Tier

PAGE = PAGE_NBYTES
WAIT_S = 30.0  # for threads that must get there; never the time a passing test takes


@pytest.fixture
def arena() -> Iterator[Arena]:
    with Arena(Budget(Tier.HOST, MIB), 16 * PAGE) as arena:
        yield arena


def make_pool(*pages: int) -> Pool:
    nbytes = sum(pages) * PAGE
    return Partition(Region("region", nbytes)).pool("pool", [count * PAGE for count in pages])


class Caller:
    """A thread that leases and is known to block: `lease` or `error` is what it got in the end."""

    def __init__(self, pool: Pool, nbytes: int, holder: str) -> None:
        self.lease: Lease | None = None
        self.error: Exception | None = None
        blocks = threading.Event()
        wait_for = pool._changed.wait_for

        def wait_for_and_tell(*args: Any) -> bool:
            # The caller holds the pool's lock here and gives it up only by waiting.
            blocks.set()
            return wait_for(*args)

        with mock.patch.object(pool._changed, "wait_for", wait_for_and_tell):
            self.thread = threading.Thread(target=self._run, args=(pool, nbytes, holder), daemon=True)
            self.thread.start()
            assert blocks.wait(WAIT_S)

    def _run(self, pool: Pool, nbytes: int, holder: str) -> None:
        try:
            self.lease = pool.lease(nbytes, holder)
        except (StateError, CapacityError) as error:
            self.error = error

    def join(self) -> None:
        self.thread.join(WAIT_S)
        assert not self.thread.is_alive()


def test_pool_lends_the_smallest_free_slot_that_fits() -> None:
    pool = make_pool(4, 1, 2)
    assert pool.lease(PAGE + 1, "a").capacity_nbytes == 2 * PAGE
    assert pool.lease(PAGE, "b").capacity_nbytes == PAGE
    assert pool.lease(1, "c").capacity_nbytes == 4 * PAGE


def test_pool_reports_leases_and_high_water() -> None:
    pool = make_pool(1, 2)
    first = pool.lease(2 * PAGE, "layer 0")
    second = pool.lease(5, "layer 1")
    assert pool.in_use() == (("layer 0", 2 * PAGE), ("layer 1", 5))
    first.release()
    second.release()
    assert pool.in_use() == ()
    assert (pool.used_nbytes, pool.high_water_nbytes) == (0, 3 * PAGE)


def test_request_that_no_slot_could_hold_is_refused_at_once() -> None:
    pool = make_pool(1, 2)
    with pytest.raises(CapacityError, match=r"8,193 bytes.*largest of its 2 slots.*8,192 bytes"):
        pool.lease(2 * PAGE + 1, "huge")
    with pytest.raises(CapacityError):
        pool.try_lease(2 * PAGE + 1, "huge")


def test_lease_of_no_bytes_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        make_pool(1).lease(0, "a")


def test_try_lease_returns_none_when_all_slots_that_fit_are_lent() -> None:
    pool = make_pool(1, 2)
    with pool.lease(2 * PAGE, "a"):
        assert pool.try_lease(PAGE + 1, "b") is None
        small = pool.try_lease(PAGE, "b")
        assert small is not None
        small.release()


def test_releasing_twice_raises_and_frees_once() -> None:
    pool = make_pool(1)
    lease = pool.lease(1, "layer 3")
    lease.release()
    with pytest.raises(StateError, match=r"layer 3.*released already"):
        lease.release()
    pool.lease(1, "a")
    assert pool.try_lease(1, "b") is None


def test_a_lease_released_inside_its_block_is_not_released_again() -> None:
    pool = make_pool(1)
    with pool.lease(1, "a") as lease:
        lease.release()
        with pool.lease(1, "b"):
            pass
    assert pool.in_use() == ()


def test_lease_is_released_when_its_block_raises() -> None:
    pool = make_pool(1)
    with pytest.raises(KeyError), pool.lease(1, "a"):
        raise KeyError
    assert pool.in_use() == ()


def test_lease_blocks_until_a_slot_is_released_in_another_thread() -> None:
    pool = make_pool(1)
    lease = pool.lease(1, "first")
    caller = Caller(pool, 1, "second")
    assert caller.thread.is_alive()
    lease.release()
    caller.join()
    assert caller.lease is not None
    assert pool.in_use() == (("second", 1),)


def test_waiters_are_served_in_the_order_they_came() -> None:
    pool = make_pool(1)
    lease = pool.lease(1, "holder")
    callers = [Caller(pool, 1, f"waiter {index}") for index in range(4)]
    for caller in callers:
        lease.release()
        caller.join()
        assert caller.lease is not None
        lease = caller.lease
    assert pool.num_waiting == 0


def test_a_slot_goes_to_the_first_waiter_that_it_fits() -> None:
    pool = make_pool(1, 3)
    small, large = pool.lease(PAGE, "small"), pool.lease(3 * PAGE, "large")
    wants_large = Caller(pool, 2 * PAGE, "wants large")
    wants_small = Caller(pool, PAGE, "wants small")
    small.release()
    wants_small.join()
    assert wants_large.thread.is_alive()
    large.release()
    wants_large.join()


def test_a_late_caller_does_not_overtake_a_waiter() -> None:
    pool = make_pool(1)
    lease = pool.lease(1, "holder")
    caller = Caller(pool, 1, "waiter")
    lease.release()
    # The slot is the waiter's from the release on, whether or not its thread has run since.
    assert pool.try_lease(1, "late") is None
    caller.join()


def test_timeout_names_the_holders_and_leaves_the_queue() -> None:
    pool = make_pool(1)
    lease = pool.lease(100, "optimizer of layer 7")
    with pytest.raises(RequestTimeoutError, match=r"'fetch'.*optimizer of layer 7 100 B"):
        pool.lease(1, "fetch", timeout_s=0.0)
    assert pool.num_waiting == 0
    lease.release()
    pool.lease(1, "fetch", timeout_s=0.0)


def test_close_wakes_every_waiter() -> None:
    pool = make_pool(1)
    lease = pool.lease(1, "holder")
    callers = [Caller(pool, 1, "waiter") for _ in range(3)]
    pool.close()
    for caller in callers:
        caller.join()
        assert isinstance(caller.error, StateError)
    lease.release()
    assert pool.num_waiting == 0


def test_an_interrupted_waiter_passes_its_slot_on(monkeypatch: pytest.MonkeyPatch) -> None:
    # Ctrl-C arrives while the main thread waits, after a slot was granted to it but before it took it.
    pool = make_pool(1)
    lease = pool.lease(1, "holder")

    def interrupted(*_: object) -> bool:
        lease.release()
        raise KeyboardInterrupt

    monkeypatch.setattr(pool._changed, "wait_for", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pool.lease(1, "interrupted")
    assert pool.num_waiting == 0
    assert pool.try_lease(1, "next") is not None


def test_slots_are_never_shared_under_threads(arena: Arena) -> None:
    pool = arena.pool("slots", [PAGE, PAGE, 2 * PAGE])
    barrier = threading.Barrier(6)
    torn: list[int] = []

    def work(mark: int) -> None:
        barrier.wait(WAIT_S)
        for turn in range(100):
            with pool.lease(PAGE * (1 + turn % 2), f"thread {mark}") as lease:
                view = arena.view(lease)
                view[:] = bytes([mark]) * len(view)
                if bytes(view) != bytes([mark]) * len(view):
                    torn.append(mark)

    threads = [threading.Thread(target=work, args=(mark,)) for mark in range(1, 7)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
        assert not thread.is_alive()
    assert torn == []
    assert pool.in_use() == ()


class PoolModel(RuleBasedStateMachine):
    """Random leases and releases against a list of the ranges that are out."""

    leases: Bundle[Lease] = Bundle("leases")

    @initialize(pages=st.lists(st.integers(1, 5), min_size=1, max_size=6))
    def build(self, pages: list[int]) -> None:
        self.slots = [count * PAGE for count in pages]
        self.region = Region("region", sum(self.slots) + PAGE)
        partition = Partition(self.region)
        partition.pool("before", [PAGE])
        self.pool = partition.pool("pool", self.slots)
        self.out: list[Lease] = []

    @rule(target=leases, nbytes=st.integers(1, 6 * PAGE))
    def lend(self, nbytes: int) -> object:
        free = sorted(self.slots)
        for lease in self.out:
            free.remove(lease.capacity_nbytes)
        if nbytes > max(self.slots):
            with pytest.raises(CapacityError):
                self.pool.try_lease(nbytes, "model")
            return multiple()
        lease = self.pool.try_lease(nbytes, "model")
        fitting = [capacity for capacity in free if capacity >= nbytes]
        if lease is None:
            assert not fitting
            return multiple()
        assert lease.capacity_nbytes == fitting[0]
        self.out.append(lease)
        return lease

    @rule(lease=consumes(leases))
    def give_back(self, lease: Lease) -> None:
        lease.release()
        self.out.remove(lease)

    @invariant()
    def ranges_are_apart_and_inside(self) -> None:
        if not hasattr(self, "pool"):
            return
        end = PAGE  # the pool before this one
        for lease in sorted(self.out, key=lambda lease: lease.offset):
            assert lease.offset >= end
            assert lease.offset % PAGE == 0
            assert lease.nbytes <= lease.capacity_nbytes
            end = lease.offset + lease.capacity_nbytes
        assert end <= self.region.nbytes
        assert self.pool.used_nbytes == sum(lease.capacity_nbytes for lease in self.out)


TestPoolModel = PoolModel.TestCase
TestPoolModel.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
