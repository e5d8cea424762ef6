"""Which records a cache in host memory holds: the most useful, spread evenly, to the last chunk that fits."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest
import torch

from offload.codec import RecordFormat
from offload.errors import CapacityError
from offload.specs import TensorSpec, Tier, UnitLayout
from offload.tiers.fetches import Fetches, count_fetches
from offload.tiers.host_cache import choose_cached
from offload.tiers.memory_planning import plan_memory, smallest_plan
from offload.tiers.memory_request import MemoryRequest
from offload.tiers.records import RecordSet, record_sets
from offload.tiers.residency import Residency
from offload.tiers.schedule import Schedule

MIB = 1 << 20
BLOCKS = tuple(f"block.{index}" for index in range(12))
FORMAT = RecordFormat("bfloat16", MIB // 4)


def unit(name: str, numel: int, frozen: int = 0) -> UnitLayout:
    held = (TensorSpec(f"{name}.frozen", (frozen,), 0),) if frozen else ()
    trained = (TensorSpec(f"{name}.weight", (numel,), 0),) if numel else ()
    return UnitLayout(name, trained, held)


def equal_blocks() -> dict[str, RecordSet]:
    return record_sets([unit(name, MIB) for name in BLOCKS], FORMAT, torch.float32)


def choose(records: dict[str, RecordSet], capacity_nbytes: int, **changes: bool) -> Residency:
    order = tuple(records)
    parks = changes.get("parks", False)
    needs = {owner: (owner,) for owner in order}
    trains = {owner: (owner,) if records[owner].layout.trainable else () for owner in order}
    fetches = count_fetches(Schedule(order, needs, not parks), trains, window=2, stays=False, parks=parks)
    return choose_cached(records, fetches, order=order, parks=parks, capacity_nbytes=capacity_nbytes)


def test_nothing_fits_into_nothing_and_everything_into_enough() -> None:
    records = equal_blocks()
    total = sum(one.host_nbytes + one.optimizer_nbytes for one in records.values())
    assert choose(records, 0) == Residency()
    whole = choose(records, total)
    assert whole.is_whole(records)
    assert whole.nbytes(records) == total == whole.mutable_nbytes(records)
    assert not choose(records, total - 1).is_whole(records)


@pytest.mark.parametrize("parks", [False, True])
def test_what_is_used_is_what_was_asked_for_but_for_a_chunk(parks: bool) -> None:
    records = equal_blocks()
    total = sum(one.host_nbytes + one.optimizer_nbytes for one in records.values())
    for capacity in range(0, total, total // 97):
        used = choose(records, capacity, parks=parks).nbytes(records)
        assert capacity - FORMAT.chunk_nbytes < used <= capacity


def test_weights_come_first_and_are_spread_over_the_order() -> None:
    records = equal_blocks()
    third = sum(one.host_nbytes for one in records.values()) // 3
    twice = Fetches(dict.fromkeys(BLOCKS, 2), {})
    chosen = choose_cached(records, twice, order=BLOCKS, parks=False, capacity_nbytes=third)
    assert len(chosen.weights) == 4
    places = sorted(BLOCKS.index(owner) for owner in chosen.weights)
    assert {second - first for first, second in pairwise(places)} == {3}
    assert not chosen.chunks


def test_every_optimizer_record_is_cached_in_equal_parts() -> None:
    records = equal_blocks()
    weights = sum(one.host_nbytes for one in records.values())
    optimizer = sum(one.optimizer_nbytes for one in records.values())
    chosen = choose(records, weights + optimizer // 2)
    assert chosen.weights == set(BLOCKS)
    assert chosen.chunks == dict.fromkeys(BLOCKS, 2)  # of four


def test_what_is_fetched_most_comes_first_and_what_is_never_used_last() -> None:
    layouts = [unit("often", MIB), unit("once", MIB), unit("never", 0, MIB)]
    records = record_sets(layouts, FORMAT, torch.float32)
    fetches = Fetches({"often": 3, "once": 2}, {"once": 1})
    sizes = {owner: one.host_nbytes for owner, one in records.items()}
    settings = {"order": tuple(records), "parks": False}
    assert choose_cached(records, fetches, capacity_nbytes=sizes["often"], **settings).weights == {"often"}
    optimizer = sum(one.optimizer_nbytes for one in records.values())
    trained = sizes["often"] + optimizer + sizes["once"]
    found = choose_cached(records, fetches, capacity_nbytes=trained, **settings)
    assert found.weights == {"often", "once"}
    assert found.chunks == {"often": 4, "once": 4}


def request(cache: int, **changes: object) -> MemoryRequest:
    needs = {owner: (owner,) for owner in BLOCKS}
    settings: dict[str, object] = {"parks": False, "parks_on_disk": False}
    return MemoryRequest(
        schedule=Schedule(BLOCKS, needs),
        records=equal_blocks(),
        trains=needs,
        home=Tier.DISK,
        gradient_itemsize=4,
        micro_gradients=False,
        activations_nbytes=MIB,
        host_cache_nbytes=cache,
        **(settings | changes),  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("parks", [False, True])
def test_a_cache_is_counted_and_what_lives_in_it_needs_no_slots(parks: bool) -> None:
    limits = {"host_limit_nbytes": 1024 * MIB, "device_limit_nbytes": 1024 * MIB}
    plain = plan_memory(request(0, parks=parks), **limits)
    assert (plain.host_cache_nbytes, plain.residency) == (0, Residency())
    weights = 12 * 2 * MIB
    cached = plan_memory(request(weights, parks=parks), **limits)
    assert cached.host_cache_nbytes == weights
    assert (cached.host_weights, cached.host_updates) == ((), ())
    assert cached.staging == plain.staging
    slots = sum(plain.host_weights) + sum(plain.host_updates)
    assert cached.host_nbytes == plain.host_nbytes + weights - slots
    whole = plan_memory(request(1024 * MIB, parks=parks), **limits)
    assert (whole.host_weights, whole.host_updates, whole.staging) == ((), (), ())
    assert whole.host_cache_nbytes == 12 * 12 * MIB


@pytest.mark.parametrize("parks_on_disk", [False, True])
def test_a_cache_that_does_not_fit_is_refused_with_its_bytes_and_the_knob(parks_on_disk: bool) -> None:
    asked = request(30 * MIB, parks=parks_on_disk, parks_on_disk=parks_on_disk)
    with pytest.raises(CapacityError) as refusal:
        plan_memory(asked, host_limit_nbytes=16 * MIB, device_limit_nbytes=1024 * MIB)
    message = str(refusal.value)
    assert "cached records 30.0 MiB" in message or "cached records 29." in message
    assert "lower host_cache_nbytes" in message
    needed = re.search(r"host_memory to at least (\d+) bytes", message)
    assert needed
    least = smallest_plan(asked).host_nbytes
    assert int(needed[1]) == least
    assert plan_memory(asked, host_limit_nbytes=least, device_limit_nbytes=1024 * MIB).host_nbytes <= least
