"""Budgets become slots, or a refusal with the numbers: no memory is touched here."""

from __future__ import annotations

import re
from itertools import combinations
from typing import Any

import pytest
import torch

from offload.codec import RecordFormat
from offload.errors import CapacityError
from offload.specs import TensorSpec, Tier, UnitLayout
from offload.tiers.gradient_homes import PartLayout, choose_homes
from offload.tiers.memory_plan import MemoryPlan
from offload.tiers.memory_planning import plan_memory, smallest_plan
from offload.tiers.memory_request import MemoryRequest
from offload.tiers.records import record_sets
from offload.tiers.schedule import Schedule

MIB = 1 << 20
NUMELS = {"embed": 4 * MIB, "a": MIB, "b": MIB, "c": MIB, "norm": 64}


def request(*, home: Tier = Tier.DISK, **changes: Any) -> MemoryRequest:
    layouts = [
        UnitLayout(name, (TensorSpec(f"{name}.weight", (numel,), 0),)) for name, numel in NUMELS.items()
    ]
    needs = {name: (name,) for name in NUMELS} | {"head": ("embed",)}
    settings: dict[str, Any] = {
        "trains": needs,
        "gradient_itemsize": 4,
        "micro_gradients": False,
        "activations_nbytes": MIB,
    }
    return MemoryRequest(
        schedule=Schedule((*NUMELS, "head"), needs),
        records=record_sets(layouts, RecordFormat("bfloat16", MIB), torch.float32),
        home=home,
        **(settings | changes),
    )


def plan(host: int, device: int, *, fill_activations: bool = False, **changes: Any) -> MemoryPlan:
    return plan_memory(
        request(**changes),
        host_limit_nbytes=host,
        device_limit_nbytes=device,
        fill_activations=fill_activations,
    )


def test_ample_budgets_give_the_deepest_window() -> None:
    deep = plan(1024 * MIB, 1024 * MIB)
    assert (deep.window, deep.updates_in_flight, len(deep.staging)) == (3, 2, 4)
    # A tied embedding's gradient waits on the host over a whole backward, in a slot of its own.
    assert deep.host_gradients.count(16 * MIB) == 2


def test_a_tight_host_budget_gives_a_shallower_plan_within_it() -> None:
    deep = plan(1024 * MIB, 1024 * MIB)
    tight = plan(deep.host_nbytes - 1, 1024 * MIB)
    assert tight.host_nbytes < deep.host_nbytes
    assert (tight.window, tight.updates_in_flight, len(tight.staging)) < (3, 2, 4)


def test_every_plan_fits_the_budgets_it_was_made_for() -> None:
    for host in range(40, 120, 8):
        for device in range(32, 96, 8):
            try:
                found = plan(host * MIB, device * MIB)
            except CapacityError:
                continue
            assert found.host_nbytes <= host * MIB
            assert found.device_nbytes + found.device_reserve_nbytes <= device * MIB


def test_a_refusal_names_the_need_the_budget_and_the_knob() -> None:
    with pytest.raises(CapacityError) as refusal:
        plan(8 * MIB, 8 * MIB)
    message = str(refusal.value)
    assert "host_memory: needs" in message
    assert "the budget is 8.0 MiB" in message
    assert "set device_memory to at least" in message


def test_what_a_refusal_asks_for_is_enough() -> None:
    with pytest.raises(CapacityError):
        plan(8 * MIB, 1024 * MIB)
    needed = plan(1024 * MIB, 1024 * MIB, activations_nbytes=MIB)
    smallest = min(
        found.host_nbytes
        for host in range(8 * MIB, needed.host_nbytes, MIB // 4)
        for found in [_try(host)]
        if found is not None
    )
    assert _try(smallest) is not None
    assert _try(smallest - 4096) is None


def test_host_home_holds_all_records_and_needs_no_staging() -> None:
    resident = plan(1024 * MIB, 1024 * MIB, home=Tier.HOST)
    records = sum(NUMELS.values()) * 12
    assert records <= resident.host_resident_nbytes <= records + 20 * 4096
    assert resident.staging == ()
    assert resident.host_weights == ()


def test_parked_gradients_have_a_slot_each_and_updates_their_own_weights() -> None:
    parked = plan(1024 * MIB, 1024 * MIB, parks=True)
    numel = sum(NUMELS.values())
    assert sum(parked.host_gradients) == parked.parked_nbytes
    assert 4 * numel <= parked.parked_nbytes < 4 * numel + 4096 * len(NUMELS)
    assert len(parked.host_gradients) == len(NUMELS)
    assert len(parked.host_updates) == parked.updates_in_flight == 2
    assert max(parked.host_updates) >= 2 * NUMELS["embed"]
    free = plan(1024 * MIB, 1024 * MIB)
    assert (free.parked_nbytes, free.host_updates) == (0, ())
    assert len(free.host_weights) > len(parked.host_weights)


def test_parked_gradients_that_do_not_fit_are_refused_with_their_bytes_and_the_knobs() -> None:
    needed = plan(1024 * MIB, 1024 * MIB, parks=True).parked_nbytes
    with pytest.raises(CapacityError) as refusal:
        plan(32 * MIB, 1024 * MIB, parks=True)
    assert f"{needed} bytes are gradients kept until the step ends" in str(refusal.value)
    assert "max_grad_norm=None" in str(refusal.value)
    assert "parked gradients 28.0 MiB" in str(refusal.value)


def test_parked_gradients_that_do_not_fit_go_to_disk_where_there_is_one() -> None:
    memory = plan(1024 * MIB, 1024 * MIB, parks=True)
    smallest = memory.host_nbytes
    for host in range(memory.host_nbytes, 0, -8 * MIB):
        try:
            found = plan(host, 1024 * MIB, parks=True, parks_on_disk=True)
        except CapacityError as error:
            message = str(error)
            break
        smallest = host
        assert found.host_nbytes <= host
        assert found.parked_nbytes + found.parked_disk_nbytes == memory.parked_nbytes
        assert bool(found.parked_on_disk) == bool(found.gradient_ring) == bool(found.gradient_parts)
        assert len(found.gradient_ring) in (0, found.updates_in_flight)
    else:
        pytest.fail("every budget was enough")
    assert f"all {memory.parked_nbytes} bytes of gradients" in message
    assert "gradients on their way to disk and back" in message
    # Weights under update, chunks and the ring, but not the gradients.
    assert smallest < memory.parked_nbytes + 48 * MIB


def test_what_a_refusal_asks_for_is_enough_with_gradients_on_disk() -> None:
    with pytest.raises(CapacityError) as refusal:
        plan(MIB, 1024 * MIB, parks=True, parks_on_disk=True)
    asked = re.search(r"host_memory to at least (\d+) bytes", str(refusal.value))
    assert asked
    found = plan(int(asked[1]), 1024 * MIB, parks=True, parks_on_disk=True)
    assert len(found.parked_on_disk) == len(NUMELS)
    with pytest.raises(CapacityError):
        plan(int(asked[1]) - 4096, 1024 * MIB, parks=True, parks_on_disk=True)


def test_saved_inputs_keep_a_share_where_gradients_fill_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = {f"block.{index}": MIB for index in range(24)}
    monkeypatch.setitem(globals(), "NUMELS", {"embed": MIB, **blocks})
    settings: dict[str, Any] = {"parks": True, "parks_on_disk": True, "fill_activations": True}
    with pytest.raises(CapacityError) as refusal:
        plan(MIB, 1024 * MIB, **settings)
    asked = re.search(r"host_memory to at least (\d+) bytes", str(refusal.value))
    assert asked
    host = int(asked[1]) + 40 * MIB
    found = plan(host, 1024 * MIB, **settings)
    assert found.parked_on_disk
    assert found.activations_nbytes >= host // 8 > MIB
    assert host - 4096 < found.host_nbytes <= host


SIZES = {"embed": 16, "a": 4, "b": 4, "c": 4, "norm": 1}
ORDER = ("embed", "a", "b", "c", "norm")


@pytest.mark.parametrize(
    ("capacity", "shared", "host"),
    [
        (0, (), None),
        (16 + 2, (), ()),  # the ring alone: one slot for the largest, and the parts
        # The embedding is worth its bytes: the ring is then as small as a block.
        (16 + 4 + 2, (), ("embed",)),
        (16 + 4 + 2 + 4, (), ("embed", "a")),
        (16 + 4 + 2 + 3, (), ("embed", "norm")),
        (16 + 2 + 9, ("c",), ("embed", "c", "norm")),
        (28, (), ("embed", "a", "norm")),
        (29, (), ("embed", "a", "b", "c", "norm")),  # all, and no ring
    ],
)
def test_the_gradients_that_stay_are_the_most_bytes_then_the_first_updated(
    capacity: int, shared: tuple[str, ...], host: tuple[str, ...] | None
) -> None:
    found = choose_homes(SIZES, order=ORDER, shared=shared, capacity_nbytes=capacity, ring=1, parts=(1, 1))
    if host is None:
        assert found is None
        return
    assert found is not None
    assert (sorted(found.host), sorted((*found.host, *found.disk))) == (sorted(host), sorted(SIZES))
    used = sum(SIZES[owner] for owner in found.host) + found.transit_nbytes
    assert used <= capacity
    assert [max(SIZES[owner] for owner in found.disk)] == list(found.ring) if found.disk else not found.ring


def test_no_choice_of_homes_keeps_more_bytes_within_the_capacity() -> None:
    for capacity in range(3, 40):
        found = choose_homes(SIZES, order=ORDER, shared=(), capacity_nbytes=capacity, ring=2, parts=(1,))
        best = -1
        for chosen in (set(some) for count in range(6) for some in combinations(SIZES, count)):
            disk = [SIZES[owner] for owner in SIZES if owner not in chosen]
            kept = sum(SIZES[owner] for owner in chosen)
            if kept + (2 * max(disk) + 1 if disk else 0) <= capacity:
                best = max(best, kept)
        kept = -1 if found is None else sum(SIZES[owner] for owner in found.host)
        assert best - min(SIZES.values()) <= kept <= best, capacity


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("chunk_numel", [128, 384, 4096, 3 << 18, 1 << 21])
def test_parts_of_a_gradient_cover_their_elements(chunk_numel: int, itemsize: int) -> None:
    layout = PartLayout(chunk_numel, itemsize)
    numel = 128 * 331
    assert layout.chunk_nbytes % 4096 == 0
    assert 0 <= layout.record_nbytes(numel) - numel * itemsize < 4096
    for start in range(0, numel, chunk_numel):
        stop = min(start + chunk_numel, numel)
        begin, nbytes = layout.part(start, stop, numel)
        assert begin % layout.chunk_nbytes == 0
        assert begin <= start * itemsize
        assert stop * itemsize <= begin + nbytes <= layout.record_nbytes(numel)
        assert nbytes <= layout.max_part_nbytes(numel)
        if chunk_numel * itemsize % 4096 == 0:
            assert begin == start * itemsize
            assert nbytes - (stop - start) * itemsize < 4096


def test_parked_gradients_of_resident_records_need_no_more_weights() -> None:
    parked = plan(1024 * MIB, 1024 * MIB, home=Tier.HOST, parks=True)
    assert (parked.host_updates, parked.host_weights) == ((), ())
    assert parked.parked_nbytes > 0


def test_saved_inputs_get_what_is_left_when_asked() -> None:
    filled = plan(512 * MIB, 1024 * MIB, fill_activations=True)
    assert 512 * MIB - 4096 < filled.host_nbytes <= 512 * MIB


def _try(host: int) -> MemoryPlan | None:
    try:
        return plan(host, 1024 * MIB)
    except CapacityError:
        return None


def test_a_plan_says_where_parked_gradients_wait() -> None:
    assert plan(1024 * MIB, 1024 * MIB).describe_parked() == ""
    memory = plan(1024 * MIB, 1024 * MIB, parks=True)
    assert memory.describe_parked() == "gradients of a step: 28.0 MiB parked in host memory"
    with pytest.raises(CapacityError) as refusal:
        plan(MIB, 1024 * MIB, parks=True, parks_on_disk=True)
    asked = re.search(r"host_memory to at least (\d+) bytes", str(refusal.value))
    assert asked
    disk = plan(int(asked[1]), 1024 * MIB, parks=True, parks_on_disk=True)
    assert disk.describe_parked().endswith(
        "0 B parked in host memory, 28.0 MiB on disk, written and read once a step"
    )


@pytest.mark.parametrize("home", list(Tier))
@pytest.mark.parametrize("parks", [False, True])
def test_the_smallest_plan_is_where_a_refusal_begins(home: Tier, parks: bool) -> None:
    least = smallest_plan(request(home=home, parks=parks, parks_on_disk=parks))
    device = least.device_nbytes + least.device_reserve_nbytes
    settings = {"home": home, "parks": parks, "parks_on_disk": parks}
    assert plan(least.host_nbytes, device, **settings).host_nbytes <= least.host_nbytes
    with pytest.raises(CapacityError, match="host_memory"):
        plan(least.host_nbytes - 1, device, **settings)
    with pytest.raises(CapacityError, match="device_memory"):
        plan(least.host_nbytes, device - 1, **settings)
