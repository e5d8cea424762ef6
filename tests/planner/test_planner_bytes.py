"""What the planner says a step moves and holds is what a runtime counts."""

from __future__ import annotations

import csv
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from planner_cases import llama, machine, question, shape
from toy_models import LENGTH, ROWS, SETTINGS, build, make_batch, train

import offload
from offload.codec import RecordFormat
from offload.errors import CapacityError
from offload.planner import Lack, TrainingPlan, describe_model
from offload.planner.inputs import saved_inputs
from offload.planner.layout import Choice, lay_out
from offload.planner.traffic import Traffic, step_traffic
from offload.sizes import GIB, MIB, align_up
from offload.specs import Tier
from offload.tiers.fetches import count_fetches
from offload.tiers.memory_planning import smallest_plan
from offload.tiers.memory_request import MemoryRequest
from offload.tiers.records import record_sets
from offload.trace import Tracer

ROOT = Path(__file__).resolve().parents[2]
MODELS = ("llama", "gpt2", "qwen3")  # tied and untied, one with two tables
STEPS = 3
FORMAT = RecordFormat("bfloat16", SETTINGS["chunk_numel"])
# What a unit of these models gets from the one before: rows x tokens x width in fp32.
INPUT_NBYTES = ROWS * LENGTH * 32 * 4


def run(
    name: str, tmp_path: Path, tracer: Tracer | None = None, **settings: Any
) -> tuple[Traffic, list[Any]]:
    """The planned traffic of a toy model, and what each step moved, waiting for its updates."""
    model = build(name)
    facts = describe_model(model, name)
    with offload.attach(model, disk=[tmp_path], trace=tracer, **(SETTINGS | settings)) as runtime:
        parts = runtime._parts
        saved = saved_inputs(facts, ROWS, LENGTH, 4)
        planned = step_traffic(
            parts.schedule, parts.records, facts.trains, parts.options, runtime.plan, saved
        )
        moved = []
        for step in range(STEPS):
            runtime.reset_stats()
            train(name, runtime, model, range(step, step + 1))
            runtime.synchronize()
            moved.append(runtime.stats())
    return planned, moved


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("moments", ["float32", "8bit"])
def test_a_step_from_disk_writes_what_was_planned_and_reads_within_the_bounds(name, moments, tmp_path):
    planned, moved = run(name, tmp_path, moments=moments)
    assert [one.disk_written_nbytes for one in moved] == [planned.disk_written_nbytes] * STEPS
    low, high = planned.least_disk_read_nbytes, planned.most_disk_read_nbytes
    assert all(low <= one.disk_read_nbytes <= high for one in moved[1:])
    assert low <= planned.disk_read_nbytes <= high


@pytest.mark.parametrize("name", MODELS)
def test_parked_updates_that_are_done_before_forward_read_the_most(name, tmp_path):
    planned, moved = run(name, tmp_path, max_grad_norm=1.0)
    assert [one.disk_read_nbytes for one in moved] == [planned.most_disk_read_nbytes] * STEPS
    assert [one.disk_written_nbytes for one in moved] == [planned.disk_written_nbytes] * STEPS
    assert planned.disk_read_nbytes == planned.least_disk_read_nbytes < planned.most_disk_read_nbytes


@pytest.mark.parametrize("parks", [False, True])
@pytest.mark.parametrize("quarters", [1, 2, 3, 4])
@pytest.mark.parametrize("name", MODELS)
def test_a_cached_step_moves_what_was_planned(name, quarters, parks, tmp_path):
    facts = describe_model(build(name), name)
    records = record_sets((unit.layout for unit in facts.units), FORMAT, torch.float32)
    cache = sum(unit.host_nbytes + unit.optimizer_nbytes for unit in records.values()) * quarters // 4
    clip = {"max_grad_norm": 1.0} if parks else {}
    planned, moved = run(name, tmp_path, host_cache_nbytes=cache, save_steps=2, **clip)
    assert planned.commit_nbytes > 0
    each = planned.disk_written_nbytes - planned.commit_nbytes // 2
    assert [one.disk_written_nbytes for one in moved] == [each, each + planned.commit_nbytes, each]
    low, high = planned.least_disk_read_nbytes, planned.most_disk_read_nbytes
    assert all(low <= one.disk_read_nbytes <= high for one in moved[1:])
    assert (each == high == 0) is (quarters == 4)


@pytest.mark.parametrize("name", MODELS)
def test_a_cached_step_that_is_committed_only_reads_less(name, tmp_path):
    planned, moved = run(name, tmp_path, host_cache_nbytes=128 << 10)
    assert planned.commit_nbytes > 0
    (tmp_path / "plain").mkdir()
    plain, _ = run(name, tmp_path / "plain")
    assert [one.disk_written_nbytes for one in moved] == [plain.disk_written_nbytes] * STEPS
    assert planned.disk_written_nbytes == plain.disk_written_nbytes
    assert planned.most_disk_read_nbytes < plain.least_disk_read_nbytes


@pytest.mark.parametrize("name", MODELS)
def test_gradients_parked_on_disk_move_what_was_planned(name, tmp_path):
    model = build(name)
    facts = describe_model(model, name)
    layouts = (unit.layout for unit in facts.units)
    least = smallest_plan(
        MemoryRequest(
            schedule=facts.schedule(wraps=False),
            records=record_sets(layouts, FORMAT, torch.float32),
            trains=facts.trains,
            home=Tier.DISK,
            gradient_itemsize=4,
            micro_gradients=False,
            activations_nbytes=64 << 10,
            parks=True,
            parks_on_disk=True,
        )
    )
    settings = {"host_memory": least.host_nbytes + 8192, "activations_nbytes": 64 << 10, "max_grad_norm": 1.0}
    planned, moved = run(name, tmp_path, **settings)
    assert planned.parked_nbytes > 0
    assert [one.disk_written_nbytes for one in moved] == [planned.disk_written_nbytes] * STEPS
    assert [one.disk_read_nbytes for one in moved] == [planned.most_disk_read_nbytes] * STEPS


@pytest.mark.parametrize("home", ["host", "device"])
@pytest.mark.parametrize("name", MODELS)
def test_a_home_in_memory_only_writes_commits(name, home, tmp_path):
    planned, moved = run(name, tmp_path, home=home, save_steps=2)
    assert [one.disk_written_nbytes for one in moved] == [0, planned.commit_nbytes, 0]
    assert planned.disk_written_nbytes == planned.commit_nbytes // 2
    assert {one.disk_read_nbytes for one in moved} == {planned.disk_read_nbytes} == {0}


@pytest.mark.parametrize(("home", "parks"), [("host", True), ("device", True), ("device", False)])
@pytest.mark.parametrize("name", MODELS)
def test_the_device_gets_and_gives_what_was_planned(name, home, parks, tmp_path):
    # Where updates run during backward a window reaches into the next step; the other choices are exact.
    tracer = Tracer()
    planned, _ = run(name, tmp_path, tracer, home=home, park_gradients=parks)
    moved = {
        track: sum(span.args["nbytes"] for span in tracer._spans if span.track == track)
        for track in ("host to device", "device to host")
    }
    # A saved input is planned in whole pages, and its span has its bytes.
    inputs = planned.saved_inputs_nbytes // align_up(INPUT_NBYTES, 4096) * INPUT_NBYTES
    to_device = planned.to_device_nbytes - planned.saved_inputs_nbytes + inputs
    to_host = planned.to_host_nbytes - planned.saved_inputs_nbytes + inputs
    assert moved["host to device"] == STEPS * to_device
    assert moved["device to host"] == STEPS * to_host


@pytest.mark.parametrize("name", MODELS)
def test_saved_inputs_take_what_was_planned_and_not_a_page_less(name, tmp_path):
    saved = saved_inputs(describe_model(build(name), name), ROWS, LENGTH, 4).nbytes
    for nbytes in (saved, saved - 4096):
        model = build(name)
        folder = tmp_path / str(nbytes)
        folder.mkdir()
        with offload.attach(model, disk=[folder], **(SETTINGS | {"activations_nbytes": nbytes})) as runtime:
            if nbytes == saved:
                train(name, runtime, model, range(1))
            else:
                with pytest.raises(CapacityError):
                    model(input_ids=make_batch(name, 0)[0], labels=make_batch(name, 0)[0])


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("pages", [2, 5, 8])
def test_inputs_on_disk_move_what_was_planned(name, pages, tmp_path):
    settings = {"activations_nbytes": pages * 4096, "activations_disk_nbytes": MIB, "max_grad_norm": 1.0}
    planned, moved = run(name, tmp_path, **settings)
    assert planned.spilled_nbytes == (5 - pages // 2) * align_up(INPUT_NBYTES, 4096)
    assert [one.activations_written_nbytes for one in moved] == [planned.spilled_nbytes] * STEPS
    assert [one.activations_read_nbytes for one in moved] == [planned.spilled_nbytes] * STEPS
    assert [one.disk_written_nbytes for one in moved] == [planned.disk_written_nbytes] * STEPS
    assert [one.disk_read_nbytes for one in moved] == [planned.most_disk_read_nbytes] * STEPS


@pytest.mark.parametrize("home", list(Tier))
@pytest.mark.parametrize("clip", [None, 1.0])
def test_a_plan_for_a_host_too_small_for_the_inputs_sends_the_rest_to_disk(clip, home, tmp_path):
    model = build("llama")
    facts, choice = describe_model(model, "llama"), Choice(home, "float32", None)
    asked = question(
        machine(memory=GIB, device=None),
        host_memory=4096,
        device_memory=64 * MIB,
        batch=ROWS,
        length=LENGTH,
        max_grad_norm=clip,
    )
    lack = lay_out(asked, facts, choice)
    assert isinstance(lack, Lack) and lack.tier is Tier.HOST
    plan = lay_out(replace(asked, host_memory=lack.needed_nbytes + 4096), facts, choice)
    assert isinstance(plan, TrainingPlan)
    assert plan.traffic.spilled_nbytes > 0
    assert plan.settings["activations_disk_nbytes"] >= plan.traffic.spilled_nbytes
    assert any("activations_disk_nbytes" in note for note in plan.notes)
    with offload.attach(model, disk=[tmp_path], **(plan.settings | {"device": "cpu"})) as runtime:
        train("llama", runtime, model, range(2))
        runtime.synchronize()
        stats = runtime.stats()
    assert runtime.plan == plan.memory
    assert stats.activations_written_nbytes == 2 * plan.traffic.spilled_nbytes
    assert stats.activations_read_nbytes == 2 * plan.traffic.spilled_nbytes
    assert stats.host_high_water_nbytes == plan.memory.host_nbytes <= lack.needed_nbytes + 4096


@pytest.mark.parametrize("home", list(Tier))
@pytest.mark.parametrize("rows", [None, 2])
@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("moments", ["float32", "8bit"])
def test_a_runtime_attached_with_the_settings_of_a_plan_has_its_memory(moments, clip, rows, home, tmp_path):
    model = build("llama")
    asked = question(
        machine(memory=GIB, device=None),
        host_memory=96 * MIB,
        device_memory=64 * MIB,
        batch=ROWS,
        length=LENGTH,
        max_grad_norm=clip,
    )
    plan = lay_out(asked, describe_model(model, "llama"), Choice(home, moments, rows))
    assert isinstance(plan, TrainingPlan)
    with offload.attach(model, disk=[tmp_path], device="cpu", **plan.settings) as runtime:
        train("llama", runtime, model, range(2))
        runtime.synchronize()
        stats = runtime.stats()
        disk = sum(file.stat().st_size for file in tmp_path.rglob("data*"))
    assert runtime.plan == plan.memory
    assert stats.host_high_water_nbytes == plan.memory.host_nbytes
    assert stats.device_high_water_nbytes == plan.memory.device_nbytes
    assert disk == plan.drive_nbytes


@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("host", [600 << 10, 800 << 10, MIB])
def test_a_runtime_has_the_cache_of_its_plan(host, clip, tmp_path):
    model = build("llama")
    asked = question(
        machine(memory=GIB, device=None),
        host_memory=host,
        host_cache=None,
        device_memory=64 * MIB,
        batch=ROWS,
        length=LENGTH,
        max_grad_norm=clip,
    )
    plan = lay_out(asked, describe_model(model, "llama"), Choice(Tier.DISK, "8bit", None))
    assert isinstance(plan, TrainingPlan)
    assert plan.options.save_steps == 100
    assert plan.memory.host_cache_nbytes > 0
    assert plan.host_nbytes <= host
    with offload.attach(model, disk=[tmp_path], device="cpu", **plan.settings) as runtime:
        train("llama", runtime, model, range(2))
        runtime.synchronize()
        assert runtime.plan == plan.memory
        assert runtime.stats().host_high_water_nbytes == plan.memory.host_nbytes


@pytest.mark.parametrize("rows", [None, 2])
def test_the_memory_of_a_run_that_computes_in_bf16_is_planned(rows, tmp_path):
    model = build("qwen3")
    asked = question(
        machine(memory=GIB, device=None),
        host_memory=96 * MIB,
        device_memory=64 * MIB,
        batch=ROWS,
        length=LENGTH,
        compute_dtype="bfloat16",
    )
    plan = lay_out(asked, describe_model(model, "qwen3"), Choice(Tier.DISK, "float32", rows))
    with offload.attach(model, disk=[tmp_path], device="cpu", **plan.settings) as runtime:
        assert runtime.plan == plan.memory


@pytest.mark.parametrize(
    ("results", "moments"),
    [("fewest_bytes", "float32"), ("fewest_bytes_8bit", "8bit"), ("fewest_bytes_tied", "float32")],
)
def test_bytes_agree_with_published_measurements(results, moments):
    (raw,) = (ROOT / "benchmarks" / "results").glob(f"*/{results}/raw.csv")
    rows = [row for row in csv.DictReader(raw.read_text().splitlines()) if row["warm_up"] == "False"]
    model = shape("smollm2-135m") if results.endswith("tied") else llama(640, 14, 1792, 10, 5, 32000)
    asked = question(
        machine(memory=24 * GIB, device=None),
        host_memory=512 * MIB,
        device_memory=GIB,
        batch=4,
        length=32,
    )
    for micro_batches in (1, 4):
        plan = lay_out(asked, model, Choice(Tier.DISK, moments, None if micro_batches == 1 else 1))
        measured = [row for row in rows if int(row["micro_batches"]) == micro_batches]
        for key, planned in (
            ("runtime_read", plan.traffic.disk_read_nbytes),
            ("runtime_written", plan.traffic.disk_written_nbytes),
        ):
            figure = statistics.median(float(row[key]) for row in measured)
            assert planned / model.num_parameters == pytest.approx(figure, rel=0.03), key


def test_a_larger_window_never_reads_more():
    model = llama(640, 14, 1792, 10, 5, 32000)
    schedule = model.schedule(wraps=True)
    counts = [
        sum(count_fetches(schedule, model.trains, window=window, stays=False, parks=False).all.values())
        for window in (1, 2, 3)
    ]
    assert counts == sorted(counts, reverse=True)
    assert torch.get_default_device().type == "cpu"  # building on the meta device has left nothing behind
