"""Budgets become slots, or a refusal with the numbers: no memory is touched here."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from offload.codec import RecordFormat
from offload.errors import CapacityError
from offload.plan import MemoryPlan, plan_memory
from offload.records import record_sets
from offload.schedule import Schedule
from offload.specs import TensorSpec, Tier, UnitLayout

MIB = 1 << 20
NUMELS = {"embed": 4 * MIB, "a": MIB, "b": MIB, "c": MIB, "norm": 64}


def plan(host: int, device: int, *, home: Tier = Tier.DISK, **changes: Any) -> MemoryPlan:
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
    return plan_memory(
        Schedule((*NUMELS, "head"), needs),
        record_sets(layouts, RecordFormat("bfloat16", MIB), torch.float32),
        home=home,
        host_limit_nbytes=host,
        device_limit_nbytes=device,
        **(settings | changes),
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
