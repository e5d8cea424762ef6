"""The processor's link: what shares its cores adds up."""

from __future__ import annotations

from dataclasses import replace

import pytest
from planner_cases import llama, machine, question

from offload.machine import ProcessorSpeed
from offload.planner import TrainingPlan, plan_training
from offload.planner.times import Link
from offload.sizes import GIB
from offload.specs import Tier

SMALL = llama(512, 6, 1408, 8, 8, 8192)
SPEED = ProcessorSpeed(
    num_threads=16, update_bytes_per_s=20e9, update_8bit_bytes_per_s=10e9, flops_per_s=1e11
)


def links(plan: TrainingPlan) -> dict[str, Link]:
    return {link.name: link for link in plan.links}


def make_plan(*, gpu: bool = False, processor: ProcessorSpeed | None = SPEED, **changes) -> TrainingPlan:
    on = machine(memory=8 * GIB, device=2 * GIB if gpu else None)
    on = replace(on, processor=processor, crc32c_bytes_per_s=10e9)
    plan = plan_training(question(on, batch=4, length=128, home=Tier.DISK, **changes), SMALL).plan
    assert plan is not None
    return plan


def test_without_a_gpu_units_updates_sums_and_copies_add_up() -> None:
    found = links(make_plan())
    parts = [link for link in found.values() if link.part_of == "processor"]
    assert [link.name for link in parts] == ["AdamW", "checksums, transfers", "copies", "units"]
    assert found["processor"].seconds == pytest.approx(sum(link.seconds or 0 for link in parts))
    assert found["units"].seconds == found["compute"].seconds
    assert found["processor"].seconds > found["compute"].seconds


def test_units_that_leave_cores_free_count_by_their_share() -> None:
    found = links(make_plan(processor=replace(SPEED, num_threads=4)))
    assert found["units"].seconds == pytest.approx(found["compute"].seconds / 4)
    assert make_plan(processor=replace(SPEED, num_threads=4)).bottleneck == "compute"
    assert make_plan().bottleneck == "processor"


def test_beside_a_gpu_the_processor_updates_and_sums_only() -> None:
    parts = [link.name for link in make_plan(gpu=True).links if link.part_of == "processor"]
    assert parts == ["AdamW", "checksums, transfers"]


def test_updates_with_8bit_moments_have_a_rate_of_their_own() -> None:
    for moments, rate in (("float32", 20e9), ("8bit", 10e9)):
        update = links(make_plan(moments=moments))["AdamW"]
        assert update.seconds == pytest.approx(update.amount / rate)


def test_a_machine_that_only_bench_measured_counts_updates_in_host_memory() -> None:
    found = links(make_plan(processor=None, flops_per_s=1e12))
    assert "processor" not in found
    assert found["AdamW"].part_of == "host memory"
