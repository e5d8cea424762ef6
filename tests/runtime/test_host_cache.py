"""A part of the records in host memory: fewer bytes over the drives' link, and the same run bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from toy_models import SETTINGS, build, loss_of, make_batch, record_bytes, train

import offload
from offload.errors import CapacityError, ConfigError

STEPS = 5

# One of each kind with a quarter to all of its records in host memory.
RUNS: list[tuple[str, int, dict[str, Any]]] = [
    ("llama", 1, {}),
    ("llama", 3, {"rows": 2, "save_steps": 2}),
    ("llama", 2, {"dtype": "float32"}),
    ("gpt2", 2, {"moments": "8bit", "save_steps": 4}),
    ("gpt2", 1, {"max_grad_norm": 0.05}),
    ("gpt2", 3, {"max_grad_norm": 0.05, "save_steps": 3}),
    ("qwen3", 4, {"save_steps": 2}),
]


def run(name: str, **settings: Any) -> tuple[list[float], dict[str, bytes]]:
    model = build(name)
    torch.manual_seed(7)
    with offload.attach(model, **(SETTINGS | settings)) as runtime:
        losses = train(name, runtime, model, range(STEPS))
        return losses, record_bytes(runtime)


def state_nbytes(name: str, **settings: Any) -> int:
    """Bytes of all records of a run."""
    with offload.attach(build(name), **(SETTINGS | settings)) as runtime:
        units = runtime._parts.records.values()
        return sum(unit.host_nbytes + unit.optimizer_nbytes for unit in units)


@pytest.mark.parametrize(("name", "quarters", "settings"), RUNS)
def test_a_cached_run_equals_a_resident_one_bit_for_bit(
    name: str, quarters: int, settings: dict[str, Any], tmp_path: Path
) -> None:
    plain = {key: value for key, value in settings.items() if key != "save_steps"}
    cache = state_nbytes(name, **plain) * quarters // 4
    cached = run(name, disk=[tmp_path], host_cache_nbytes=cache, **settings)
    assert cached == run(name, **plain)


def test_half_of_the_records_in_memory_halves_the_bytes_of_the_drives(tmp_path: Path) -> None:
    moved = []
    for cache in (0, state_nbytes("llama", chunk_numel=1024) // 2):
        model = build("llama")
        settings = SETTINGS | {"host_cache_nbytes": cache, "save_steps": 100, "chunk_numel": 1024}
        with offload.attach(model, disk=[tmp_path], **settings) as runtime:
            train("llama", runtime, model, range(1))
            runtime.synchronize()
            runtime.reset_stats()
            train("llama", runtime, model, range(1, 4))
            runtime.synchronize()
            stats = runtime.stats()
            moved.append((stats.disk_read_nbytes, stats.disk_written_nbytes))
    assert sum(moved[1]) <= 0.525 * sum(moved[0])
    assert min(moved[1]) > 0


@pytest.mark.parametrize("parks", [False, True])
def test_a_run_goes_on_with_another_cache(parks: bool, tmp_path: Path) -> None:
    """What is in memory moves; the values do not."""
    total = state_nbytes("gpt2")
    settings = SETTINGS | {"disk": [tmp_path], "max_grad_norm": 0.05 if parks else None}
    losses: list[float] = []
    run_id, found = None, {}
    for step, cache in enumerate((total // 2, 0, total // 4, total, 3 * total // 4)):
        model = build("gpt2")
        torch.manual_seed(7)
        begun = {"run_id": run_id, "resume": run_id is not None, "host_cache_nbytes": cache}
        with offload.attach(model, **(settings | begun)) as runtime:
            run_id = runtime.run_id
            assert runtime.global_step == step
            assert cache - 4096 * 11 < runtime.plan.host_cache_nbytes <= cache
            losses += train("gpt2", runtime, model, range(step, step + 1))
            found = record_bytes(runtime)
            store = runtime._parts.store
            assert store is not None
            assert store.verify().ok
    plain = {"max_grad_norm": 0.05} if parks else {}
    assert (losses, found) == run("gpt2", **plain)


def test_steps_since_the_last_commit_are_gone_in_memory_and_on_disk_alike(tmp_path: Path) -> None:
    """A run that ends without a commit goes on from the last one, of which nothing was overwritten."""
    settings = SETTINGS | {"disk": [tmp_path], "save_steps": 2}
    settings["host_cache_nbytes"] = state_nbytes("llama") // 2
    model = build("llama")
    torch.manual_seed(7)
    runtime = offload.attach(model, **settings)
    losses = train("llama", runtime, model, range(3))
    runtime.synchronize()
    runtime.close()  # as a kill would: step 3 was taken and not committed
    model = build("llama")
    resumed = settings | {"run_id": runtime.run_id, "resume": True, "host_cache_nbytes": 0}
    with offload.attach(model, **resumed) as runtime:
        assert runtime.global_step == 2
        losses[2:] = train("llama", runtime, model, range(2, STEPS))
        assert (losses, record_bytes(runtime)) == run("llama")


def test_a_step_that_is_not_finite_leaves_nothing_in_the_cache(tmp_path: Path) -> None:
    """Some units were updated when the gradient of another is found to be infinite."""
    settings = SETTINGS | {"disk": [tmp_path], "on_non_finite": "skip"}
    settings["host_cache_nbytes"] = state_nbytes("llama") * 3 // 4
    model = build("llama")
    torch.manual_seed(7)
    with offload.attach(model, **settings) as runtime:
        losses = train("llama", runtime, model, range(2))
        before = record_bytes(runtime)
        rng = torch.get_rng_state()
        block = model.model.layers[0]
        hook = block.register_full_backward_hook(lambda *_: (torch.full((4, 12, 32), float("inf")),))
        loss_of("llama", model, make_batch("llama", 2)).backward()
        hook.remove()
        assert runtime.step() is False
        assert record_bytes(runtime) == before
        assert not runtime._parts.residents.uncommitted
        torch.set_rng_state(rng)
        losses += train("llama", runtime, model, range(2, STEPS))
        assert (losses, record_bytes(runtime)) == run("llama")


def test_a_snapshot_is_restored_into_the_cache(tmp_path: Path) -> None:
    settings = SETTINGS | {"disk": [tmp_path], "save_steps": 3}
    settings["host_cache_nbytes"] = state_nbytes("gpt2") // 2
    model = build("gpt2")
    torch.manual_seed(7)
    with offload.attach(model, **settings) as runtime:
        train("gpt2", runtime, model, range(1))
        runtime.snapshot("first")
        kept = record_bytes(runtime)
        losses = train("gpt2", runtime, model, range(1, 3))
        runtime.restore("first")
        assert record_bytes(runtime) == kept
        assert train("gpt2", runtime, model, range(1, 3)) == losses


def test_values_handed_out_are_those_in_the_cache(tmp_path: Path) -> None:
    settings = SETTINGS | {"save_steps": 100}
    half = {"host_cache_nbytes": state_nbytes("llama") // 2}
    values = []
    for disk, cache in (([], {}), ([tmp_path], half)):
        model = build("llama")
        torch.manual_seed(7)
        with offload.attach(model, disk=disk, **settings, **cache) as runtime:
            train("llama", runtime, model, range(2))
            values.append({name: value.clone() for name, value in runtime.detach().state_dict().items()})
    assert values[0].keys() == values[1].keys()
    assert all(torch.equal(values[0][name], values[1][name]) for name in values[0])


def test_budgets_hold_and_a_cache_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    total = state_nbytes("llama")
    settings = SETTINGS | {"disk": [tmp_path], "activations_nbytes": 1 << 16}
    with pytest.raises(CapacityError) as refusal:
        offload.attach(
            build("llama"), **(settings | {"host_memory": total // 2, "host_cache_nbytes": total // 2})
        )
    assert "lower host_cache_nbytes" in str(refusal.value)
    assert not any(tmp_path.iterdir())
    model = build("llama")
    with offload.attach(model, **settings, host_cache_nbytes=total // 2) as runtime:
        train("llama", runtime, model, range(2))
        runtime.synchronize()
        assert runtime.stats().host_high_water_nbytes <= runtime.plan.host_nbytes


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"host_cache_nbytes": -1}, "must not be negative"),
        ({"host_cache_nbytes": "1MiB", "home": "host"}, "home='host'"),
        ({"host_cache_nbytes": 4096}, "home='device'"),
    ],
)
def test_a_cache_without_records_on_disk_is_refused(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        offload.attach(build("mlp"), **SETTINGS, **settings)
