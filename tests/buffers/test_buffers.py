"""Budgets, arenas and heaps: what is charged, carved and shown, and what the messages say."""

from __future__ import annotations

import ctypes
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload.buffers import PAGE_NBYTES, POISON, Arena, Budget, FreeRanges
from offload.errors import CapacityError, StateError
from offload.sizes import GIB, MIB
from offload.specs import Tier

PAGE = PAGE_NBYTES
WAIT_S = 30.0  # for threads that must get there; never the time a passing test takes


@pytest.fixture
def budget() -> Budget:
    return Budget(Tier.HOST, 64 * MIB)


@pytest.fixture
def arena(budget: Budget) -> Iterator[Arena]:
    with Arena(budget, 16 * PAGE) as arena:
        yield arena


# Budget


def test_budget_counts_charges_refunds_and_high_water() -> None:
    budget = Budget(Tier.HOST, 1000)
    budget.charge(300, "cache")
    budget.charge(400, "window")
    budget.refund(300, "cache")
    assert (budget.used_nbytes, budget.free_nbytes, budget.high_water_nbytes) == (400, 600, 700)
    assert budget.holders() == {"window": 400}


def test_budget_holders_come_largest_first() -> None:
    budget = Budget(Tier.HOST, 1000)
    for nbytes, holder in ((100, "small"), (500, "large"), (200, "middle")):
        budget.charge(nbytes, holder)
    assert list(budget.holders()) == ["large", "middle", "small"]


@pytest.mark.parametrize(("tier", "knob"), [(Tier.HOST, "host_memory"), (Tier.DEVICE, "device_memory")])
def test_budget_refusal_names_tier_numbers_holders_and_knob(tier: Tier, knob: str) -> None:
    budget = Budget(tier, 10_000)
    budget.charge(2_000, "gradients")
    budget.charge(5_000, "window")
    with pytest.raises(CapacityError) as caught:
        budget.charge(4_000, "activations")
    message = str(caught.value)
    for part in (tier.value, "'activations'", "4,000 bytes", "3,000 bytes", "9.8 KiB", knob, "11,000 bytes"):
        assert part in message
    assert message.index("window 4.9 KiB") < message.index("gradients 2.0 KiB")


def test_budget_refusal_charges_nothing() -> None:
    budget = Budget(Tier.HOST, 100)
    with pytest.raises(CapacityError, match="nobody"):
        budget.charge(101, "late")
    assert budget.used_nbytes == budget.high_water_nbytes == 0
    assert budget.holders() == {}


def test_budget_can_be_charged_to_the_last_byte() -> None:
    budget = Budget(Tier.HOST, 100)
    budget.charge(100, "all")
    assert budget.free_nbytes == 0


def test_refund_of_more_than_was_charged_raises() -> None:
    budget = Budget(Tier.HOST, 100)
    budget.charge(10, "a")
    with pytest.raises(StateError, match="'a' refunds 11 bytes but was charged 10"):
        budget.refund(11, "a")
    assert budget.used_nbytes == 10


def test_negative_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="negative"):
        Budget(Tier.HOST, -1)
    budget = Budget(Tier.HOST, 100)
    with pytest.raises(ValueError, match="negative"):
        budget.charge(-1, "a")
    with pytest.raises(ValueError, match="negative"):
        budget.refund(-1, "a")


def test_budget_is_exact_under_threads() -> None:
    budget = Budget(Tier.HOST, 8)
    barrier = threading.Barrier(8)

    def work(holder: str) -> None:
        barrier.wait(WAIT_S)
        for _ in range(300):
            budget.charge(1, holder)
            budget.refund(1, holder)

    threads = [threading.Thread(target=work, args=(f"thread {index}",)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    assert budget.used_nbytes == 0
    assert budget.high_water_nbytes <= 8


# Arena


def test_arena_is_page_aligned_and_charged_whole_pages(budget: Budget) -> None:
    with Arena(budget, PAGE + 1, "window") as arena:
        assert arena.address % PAGE == 0
        assert arena.nbytes == len(arena.memory) == 2 * PAGE
        assert budget.holders() == {"window": 2 * PAGE}
    assert budget.used_nbytes == 0


def test_arena_over_budget_is_refused(budget: Budget) -> None:
    with pytest.raises(CapacityError, match="host_memory"):
        Arena(budget, 65 * MIB)
    assert budget.used_nbytes == 0


def test_arena_that_the_system_refuses_gives_the_charge_back() -> None:
    budget = Budget(Tier.HOST, 1 << 62)
    with pytest.raises(CapacityError, match="system refused to map"):
        Arena(budget, 1 << 60)
    assert budget.used_nbytes == 0


def test_creating_an_arena_touches_none_of_it() -> None:
    def resident_nbytes() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE

    budget = Budget(Tier.HOST, GIB)
    before = resident_nbytes()
    with Arena(budget, GIB) as arena:
        pool = arena.pool("slots", [256 * MIB] * 4)
        with pool.lease(200 * MIB, "nobody writes"):
            assert resident_nbytes() - before < 32 * MIB


def test_pages_go_back_at_close_even_under_a_live_view() -> None:
    arena = Arena(Budget(Tier.HOST, PAGE), PAGE)
    view = arena.memory
    view[:4] = b"data"
    arena.close()
    assert bytes(view[:4]) == bytes(4)


def test_closed_arena_lends_and_shows_nothing(arena: Arena) -> None:
    pool = arena.pool("slots", [PAGE])
    lease = pool.lease(10, "a")
    arena.close()
    arena.close()
    assert arena.closed
    for use in (
        lambda: arena.view(lease),
        lambda: arena.memory,
        lambda: arena.pool("more", [PAGE]),
        lambda: arena.heap("more", PAGE),
        lambda: pool.lease(1, "b"),
    ):
        with pytest.raises(StateError, match="closed"):
            use()
    lease.release()


def test_a_pin_is_undone_once_at_close(arena: Arena) -> None:
    undone: list[str] = []
    assert not arena.pinned
    arena.pin(lambda: undone.append("unpinned"))
    assert arena.pinned
    arena.close()
    arena.close()
    assert undone == ["unpinned"]
    assert not arena.pinned


def test_a_forked_child_does_not_inherit_the_memory_and_is_told_so() -> None:
    # In a fresh interpreter: forking this one, which may have threads, warns.
    script = """
import os
from offload.buffers import Arena, Budget
from offload.errors import StateError
from offload.specs import Tier
arena = Arena(Budget(Tier.HOST, 4096), 4096)
address = f"{arena.address:x}-"
assert any(line.startswith(address) for line in open("/proc/self/maps")), "not mapped in the parent"
child = os.fork()
if child == 0:
    inherited = any(line.startswith(address) for line in open("/proc/self/maps"))
    try:
        arena.memory
    except StateError as error:
        told = "fork" in str(error)
    else:
        told = False
    os._exit(0 if told and not inherited else 1)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=WAIT_S)


# Views


def test_view_shows_the_lease_and_nothing_else(arena: Arena) -> None:
    pool = arena.pool("slots", [PAGE, PAGE])
    first, second = pool.lease(100, "first"), pool.lease(100, "second")
    arena.view(first)[:] = b"\x11" * 100
    arena.view(second)[:] = b"\x22" * 100
    assert bytes(arena.view(first)) == b"\x11" * 100
    assert bytes(arena.view(second, 10, 5)) == b"\x22" * 5
    assert len(arena.view(second, 90)) == 10
    assert ctypes.addressof(ctypes.c_char.from_buffer(arena.view(second))) == arena.address + second.offset


@pytest.mark.parametrize(("offset", "nbytes"), [(0, 101), (100, 1), (-1, 2), (0, -1), (101, None)])
def test_view_outside_the_lease_raises(arena: Arena, offset: int, nbytes: int | None) -> None:
    with arena.pool("slots", [PAGE]).lease(100, "a") as lease, pytest.raises(ValueError, match="not within"):
        arena.view(lease, offset, nbytes)


def test_view_of_a_released_lease_raises(arena: Arena) -> None:
    with arena.pool("slots", [PAGE]).lease(100, "a") as lease:
        pass
    with pytest.raises(StateError, match="was released"):
        arena.view(lease)


def test_view_of_another_arenas_lease_raises(arena: Arena, budget: Budget) -> None:
    with (
        Arena(budget, PAGE, "other") as other,
        other.pool("slots", [PAGE]).lease(1, "a") as lease,
        pytest.raises(StateError, match="is not of 'arena'"),
    ):
        arena.view(lease)


# Carving


def test_pools_and_heaps_of_an_arena_do_not_overlap(arena: Arena) -> None:
    ranges = [
        arena.pool("a", [1]).lease(1, "a"),
        arena.heap("b", PAGE + 1).lease(2 * PAGE, "b"),
        arena.pool("c", [3 * PAGE]).lease(1, "c"),
    ]
    assert [lease.offset for lease in ranges] == [0, PAGE, 3 * PAGE]
    assert arena.free_nbytes == 10 * PAGE


def test_pool_larger_than_the_arena_is_refused_with_numbers(arena: Arena) -> None:
    arena.pool("window", [4 * PAGE])
    with pytest.raises(
        CapacityError, match=r"'cache' needs 52\.0 KiB \(53,248 bytes\).*49,152 bytes.*window"
    ):
        arena.pool("cache", [13 * PAGE])
    assert arena.free_nbytes == 12 * PAGE


@pytest.mark.parametrize("slots", [[], [0], [PAGE, -1]])
def test_pool_of_no_or_empty_slots_is_refused(arena: Arena, slots: list[int]) -> None:
    with pytest.raises(ValueError, match="slots must be"):
        arena.pool("bad", slots)


def test_heap_of_no_bytes_is_refused(arena: Arena) -> None:
    with pytest.raises(ValueError, match="at least one"):
        arena.heap("bad", 0)


# Heap


def test_heap_lends_the_first_place_that_is_free(arena: Arena) -> None:
    arena.pool("slots", [PAGE])
    heap = arena.heap("activations", 5 * PAGE)
    first, second, third = (
        heap.lease(nbytes, f"layer {index}") for index, nbytes in enumerate([1, PAGE + 1, 1])
    )
    assert [lease.offset for lease in (first, second, third)] == [PAGE, 2 * PAGE, 4 * PAGE]
    second.release()
    assert (heap.used_nbytes, heap.high_water_nbytes, heap.largest_free_nbytes) == (
        2 * PAGE,
        4 * PAGE,
        2 * PAGE,
    )
    assert heap.lease(PAGE, "layer 3").offset == 2 * PAGE
    assert heap.in_use() == (("layer 0", 1), ("layer 2", 1), ("layer 3", PAGE))
    assert arena.view(third, 0, 1).nbytes == 1


def test_what_is_released_is_one_piece_with_what_is_free_beside_it(arena: Arena) -> None:
    heap = arena.heap("activations", 4 * PAGE)
    leases = [heap.lease(PAGE, "layer") for _ in range(4)]
    for index in (0, 2, 1):
        leases[index].release()
    assert heap.largest_free_nbytes == 3 * PAGE
    assert heap.lease(3 * PAGE, "layer").offset == leases[0].offset


def test_full_heap_is_refused_with_numbers_and_holders(arena: Arena) -> None:
    heap = arena.heap("activations", 3 * PAGE)
    heap.lease(2 * PAGE, "layer 0")
    with pytest.raises(
        CapacityError, match=r"'layer 1' asked for 8\.0 KiB.*4\.0 KiB.*of 12\.0 KiB.*layer 0 8\.0 KiB"
    ):
        heap.lease(PAGE + 1, "layer 1")
    assert heap.try_lease(PAGE + 1, "layer 1") is None
    heap.lease(PAGE, "layer 1")


def test_heap_refuses_an_empty_lease(arena: Arena) -> None:
    with pytest.raises(ValueError, match="at least one"):
        arena.heap("activations", PAGE).lease(0, "layer 0")


def test_heap_release_twice_raises(arena: Arena) -> None:
    lease = arena.heap("activations", 2 * PAGE).lease(1, "layer 0")
    lease.release()
    with pytest.raises(StateError, match="released already"):
        lease.release()


def test_closed_heap_lends_nothing_and_takes_back(arena: Arena) -> None:
    heap = arena.heap("activations", 2 * PAGE)
    lease = heap.lease(1, "layer 0")
    heap.close()
    with pytest.raises(StateError, match="closed"):
        heap.lease(1, "layer 1")
    lease.release()
    assert heap.used_nbytes == 0


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 6)), max_size=60))
def test_free_ranges_never_overlap_and_come_together_again(acts: list[tuple[bool, int]]) -> None:
    free = FreeRanges(16)
    taken: dict[int, int] = {}
    for takes, number in acts:
        if takes:
            used = {byte for at, nbytes in taken.items() for byte in range(at, at + nbytes)}
            gaps = [at for at in range(17 - number) if not used.intersection(range(at, at + number))]
            offset = free.take(number)
            assert offset == (gaps[0] if gaps else None)
            if offset is not None:
                taken[offset] = number
        elif taken:
            offset = sorted(taken)[number % len(taken)]
            free.give(offset, taken.pop(offset))
        assert free.free_nbytes == 16 - sum(taken.values())
    for offset, nbytes in taken.items():
        free.give(offset, nbytes)
    assert free.largest_nbytes == 16


# Poison


def test_released_memory_is_poisoned_in_debug(monkeypatch: pytest.MonkeyPatch, budget: Budget) -> None:
    monkeypatch.setenv("OFFLOAD_DEBUG", "1")
    with Arena(budget, 4 * PAGE) as arena:
        pool, heap = arena.pool("slots", [PAGE, PAGE]), arena.heap("heap", PAGE)
        kept = pool.lease(PAGE, "kept")
        arena.view(kept)[:] = b"\x01" * PAGE
        for lease in (pool.lease(10, "pool"), heap.lease(10, "heap")):
            view = arena.view(lease)
            view[:] = b"\x02" * 10
            lease.release()
            assert bytes(view) == bytes([POISON]) * 10
        assert bytes(arena.view(kept)) == b"\x01" * PAGE


def test_released_memory_is_left_alone_without_debug(monkeypatch: pytest.MonkeyPatch, budget: Budget) -> None:
    monkeypatch.delenv("OFFLOAD_DEBUG", raising=False)
    with Arena(budget, PAGE) as arena:
        lease = arena.pool("slots", [PAGE]).lease(4, "a")
        view = arena.view(lease)
        view[:] = b"data"
        lease.release()
        assert bytes(view) == b"data"
