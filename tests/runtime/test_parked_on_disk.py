"""Gradients parked on disk give the bits of gradients parked in memory, within the budget."""

from __future__ import annotations

import errno
import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from test_clip import TIGHT, backward
from toy_models import SETTINGS, build, make_batch, record_bytes

import offload
from offload.errors import CapacityError, CorruptionError, DiskFullError, StorageError
from offload.runtime import blueprint
from offload.sizes import align_up
from offload.store import list_runs
from offload.store import scratch as scratch_module
from offload.tiers import memory_planning as plan
from offload.trace import Tracer
from offload.units import find_cuts

STEPS = 3
NAME = "gpt2"  # its embedding is tied to its head

# Saved inputs have what they need, so that a budget is spent on gradients.
SMALL = {**SETTINGS, "activations_nbytes": 1 << 18}


@pytest.fixture(autouse=True)
def one_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """All budgets cut the model alike: what is compared is records; test_sub_units.py compares cuts."""
    monkeypatch.setattr(blueprint, "find_cuts", lambda model: itertools.islice(find_cuts(model), 1))


def refused(disk: Path, **settings: Any) -> str:
    """Return what a budget of one page is refused with."""
    with pytest.raises(CapacityError) as refusal:
        offload.attach(build(NAME), disk=[disk], **{**SMALL, **settings, "host_memory": 4096})
    return str(refusal.value)


def budgets(disk: Path, **settings: Any) -> list[int]:
    """Return host budgets with which no, some and most parked gradients stay in memory."""
    text = refused(disk, **settings)
    least = re.search(r"host_memory to at least (\d+) bytes", text)
    gradients = re.search(r"all (\d+) bytes of gradients .* pass through (\d+) of", text)
    assert least and gradients
    everything = int(least[1]) - int(gradients[2]) + int(gradients[1])
    return [int(least[1]), (int(least[1]) + everything) // 2, everything - 4096]


class Run:
    """A training run, its results, and what it cost."""

    def __init__(self, disk: Path, accumulation: int = 1, *, steps: int = STEPS, **settings: Any) -> None:
        settings = {**SMALL, **settings}
        model = build(NAME)
        torch.manual_seed(7)
        losses, norms = [], []
        with offload.attach(model, disk=[disk], **settings) as runtime:
            for step in range(steps):
                losses.append(backward(model, step, accumulation))
                assert runtime.step({"next": step + 1})
                norms.append(runtime.grad_norm)
            self.results = losses, norms, record_bytes(runtime)
            self.plan = runtime.plan
            self.stats = runtime.stats()
        if isinstance(settings["host_memory"], int):
            assert self.stats.host_high_water_nbytes <= settings["host_memory"]


# What runs, with how many backwards a step.
VARIANTS: dict[str, tuple[int, dict[str, Any]]] = {
    "clip": (1, {"max_grad_norm": TIGHT}),
    "two backwards": (2, {"park_gradients": True}),
    "clip, two backwards": (2, {"max_grad_norm": TIGHT}),
    "clip, four backwards, rows": (4, {"max_grad_norm": TIGHT, "rows": 1}),
    "rows": (2, {"max_grad_norm": TIGHT, "rows": 1}),
    "bf16 gradients": (2, {"max_grad_norm": TIGHT, "gradient_dtype": "bfloat16"}),
    "bf16 compute": (2, {"max_grad_norm": TIGHT, "compute_dtype": "bfloat16"}),
    "bf16 compute, rows": (2, {"park_gradients": True, "compute_dtype": "bfloat16", "rows": 1}),
    "fp32 records": (2, {"max_grad_norm": TIGHT, "dtype": "float32"}),
    "8-bit moments": (2, {"max_grad_norm": TIGHT, "moments": "8bit", "chunk_nbytes": None}),
    "odd chunks": (2, {"max_grad_norm": TIGHT, "chunk_numel": 3200, "chunk_nbytes": None}),
    "home host": (2, {"max_grad_norm": TIGHT, "home": "host"}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_budget_computes_the_same_bits(variant: str, tmp_path: Path) -> None:
    accumulation, settings = VARIANTS[variant]
    expected = Run(tmp_path, accumulation, **settings)
    assert not expected.plan.parked_on_disk
    found = []
    for host_memory in budgets(tmp_path, **settings):
        run = Run(tmp_path, accumulation, **settings, host_memory=host_memory)
        assert run.results == expected.results, host_memory
        found.append(len(run.plan.parked_on_disk))
        assert len(run.plan.gradient_ring) == run.plan.updates_in_flight
    assert found[0] == 6
    assert 6 >= found[1] >= found[2] > 0
    assert found[2] < 6


@pytest.mark.parametrize("accumulation", [1, 2])
def test_every_budget_computes_what_the_same_run_in_memory_does(accumulation: int, tmp_path: Path) -> None:
    resident = build(NAME)
    torch.manual_seed(7)
    losses, norms = [], []
    with offload.attach(resident, home="device", max_grad_norm=TIGHT, **SETTINGS) as runtime:
        for step in range(STEPS):
            losses.append(backward(resident, step, accumulation))
            runtime.step()
            norms.append(runtime.grad_norm)
        expected = losses, norms, record_bytes(runtime)
    for host_memory in budgets(tmp_path, max_grad_norm=TIGHT):
        run = Run(tmp_path, accumulation, max_grad_norm=TIGHT, host_memory=host_memory)
        assert run.results == expected


def test_copies_that_run_late_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where a gradient arrives some time after its copy was begun."""
    expected = Run(tmp_path, 2, max_grad_norm=TIGHT)
    monkeypatch.setenv("OFFLOAD_DEBUG", "1")
    for host_memory in budgets(tmp_path, max_grad_norm=TIGHT):
        run = Run(tmp_path, 2, max_grad_norm=TIGHT, host_memory=host_memory)
        assert run.results == expected.results


@pytest.mark.parametrize(("gradient_dtype", "itemsize"), [(None, 4), ("bfloat16", 2)])
def test_a_gradient_on_disk_is_written_once_and_read_once(
    gradient_dtype: str | None, itemsize: int, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"max_grad_norm": TIGHT, "gradient_dtype": gradient_dtype}
    budget = budgets(tmp_path, **settings)
    in_memory = Run(tmp_path, **settings, host_memory=budget[2] + (1 << 20), steps=6)
    run = Run(tmp_path, **settings, host_memory=budget[2], steps=6)
    # The tied embedding's would be written for the head and again for the embedding: it stays.
    assert "transformer.wte" not in run.plan.parked_on_disk
    # A block, in whole pages.
    nbytes = align_up(13312 * itemsize, 4096) * len(run.plan.parked_on_disk)
    assert run.plan.parked_disk_nbytes == nbytes > 0
    assert run.stats.parked_written_nbytes == run.stats.parked_read_nbytes == 6 * nbytes
    assert run.stats.disk_written_nbytes == in_memory.stats.disk_written_nbytes + 6 * nbytes
    assert (in_memory.stats.parked_written_nbytes, in_memory.stats.parked_read_nbytes) == (0, 0)


def test_several_backwards_read_add_and_write(tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "park_gradients": True,
        "host_memory": budgets(tmp_path, park_gradients=True)[0],
    }
    run = Run(tmp_path, 3, **settings)
    numel = {"transformer.wte": 3072, "transformer.wpe": 1024, "transformer.ln_f": 1024}
    blocks = 3 * 13312
    # The embedding's gradient twice in each backward: of the head and of itself.
    others = numel["transformer.wpe"] + numel["transformer.ln_f"] + blocks
    written = 4 * (3 * others + 6 * numel["transformer.wte"])
    assert run.stats.parked_written_nbytes == STEPS * written
    # Before every sum but the first, and for the update.
    assert run.stats.parked_read_nbytes == STEPS * written


def test_every_norm_is_measured_while_the_gradient_passes_through(tmp_path: Path) -> None:
    """Once for each time that it passes: it is not read again for that."""
    host_memory = budgets(tmp_path, max_grad_norm=TIGHT)[0]
    model = build(NAME)
    tracer = Tracer()
    settings = {**SMALL, "host_memory": host_memory, "max_grad_norm": TIGHT}
    with offload.attach(model, disk=[tmp_path], trace=tracer, **settings) as runtime:
        backward(model, 0, 1)
        runtime.step()
        runtime.synchronize()
        tracer.write_chrome_trace(tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    names = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    measured = [event["name"] for event in events if names.get(event["tid"]) == "norm" and event["ph"] == "X"]
    assert sorted(measured) == sorted([*runtime.plan.parked_on_disk, "transformer.wte"])


def test_a_skipped_step_leaves_nothing_of_it_on_disk_either(tmp_path: Path) -> None:
    def train(host_memory: Any) -> Any:
        model = build(NAME)
        torch.manual_seed(7)
        norms = []
        settings = {**SMALL, "host_memory": host_memory, "max_grad_norm": TIGHT, "on_non_finite": "skip"}
        with offload.attach(model, disk=[tmp_path], **settings) as runtime:
            for step in range(5):
                tokens, labels = make_batch(NAME, step)
                loss = model(input_ids=tokens, labels=labels).loss
                (loss * float("inf") if step in (1, 2) else loss).backward()
                if step == 3:
                    backward(model, 9, 1)
                assert runtime.step() is (step not in (1, 2))
                norms.append(runtime.grad_norm if step not in (1, 2) else None)
            return norms, record_bytes(runtime), runtime.skipped_steps

    expected = train("64MiB")
    for host_memory in budgets(tmp_path, max_grad_norm=TIGHT):
        assert train(host_memory) == expected


def test_clipping_in_the_loop_and_giving_up_a_step(tmp_path: Path) -> None:
    def train(host_memory: Any) -> Any:
        model = build(NAME)
        torch.manual_seed(7)
        settings = {**SMALL, "host_memory": host_memory, "park_gradients": True, "on_non_finite": "skip"}
        norms = []
        with offload.attach(model, disk=[tmp_path], **settings) as runtime:
            for step in range(4):
                backward(model, step, 2)
                norms.append(float(runtime.clip_grad_norm_(TIGHT)))
                if step == 1:
                    runtime.give_up_step("the loss is odd")
                else:
                    runtime.step()
            return norms, record_bytes(runtime)

    expected = train("64MiB")
    for host_memory in budgets(tmp_path, park_gradients=True):
        assert train(host_memory) == expected


def test_gradients_of_a_forward_that_the_next_one_does_not_repeat(tmp_path: Path) -> None:
    """The order predicted, by which gradients are read ahead, is not the one that comes."""

    def train(host_memory: Any) -> Any:
        torch.manual_seed(3)
        model = torch.nn.ModuleList(torch.nn.Sequential(torch.nn.Linear(32, 32)) for _ in range(6))
        paths = ([0, 1, 2, 3], [0, 4, 5, 3], [3, 2, 5, 0], [0, 1, 1, 4])
        settings = {**SMALL, "host_memory": host_memory, "park_gradients": True}
        with offload.attach(model, disk=[tmp_path], **settings) as runtime:
            for step in range(4):
                for path in (paths[step], paths[(step + 1) % 4]):
                    hidden = torch.ones(2, 32)
                    for index in path:
                        hidden = model[index](hidden)
                    hidden.square().sum().backward()
                runtime.step()
            return runtime.grad_norm, record_bytes(runtime), len(runtime.plan.parked_on_disk)

    expected = train("64MiB")
    with pytest.raises(CapacityError) as refusal:
        train(4096)
    least = re.search(r"host_memory to at least (\d+) bytes", str(refusal.value))
    assert least
    for spare in (0, 8192, 16384):
        found = train(int(least[1]) + spare)
        assert found[:2] == expected[:2]
        assert found[2] > 0


class Tied(torch.nn.Module):
    """Blocks of which the first three, side by side, share a large weight."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        wide = torch.nn.Linear(64, 64)
        self.layers = torch.nn.ModuleList(
            torch.nn.Sequential(
                torch.nn.Linear(32, 64), *([wide] if index < 3 else []), torch.nn.Linear(64, 32)
            )
            for index in range(8)
        )

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_sum_that_neighbours_add_to_is_not_read_ahead_of_its_write(
    accumulation: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The only plan then, with two slots in the ring: one can be read ahead.
    monkeypatch.setattr(plan, "WINDOWS", (1,))
    monkeypatch.setattr(plan, "UPDATES_IN_FLIGHT", (2,))
    monkeypatch.setattr(plan, "STAGING_SLOTS", (2,))

    def train(host_memory: Any) -> Any:
        model = Tied()
        settings = {**SMALL, "host_memory": host_memory, "park_gradients": True}
        with offload.attach(model, disk=[tmp_path], **settings) as runtime:
            for step in range(3):
                for part in range(accumulation):
                    generator = torch.Generator().manual_seed(10 * step + part)
                    model(torch.randn(2, 32, generator=generator)).square().sum().backward()
                runtime.step()
            return runtime.grad_norm, record_bytes(runtime), runtime.plan

    expected = train("64MiB")
    with pytest.raises(CapacityError) as refusal:
        train(4096)
    least = re.search(r"host_memory to at least (\d+) bytes", str(refusal.value))
    assert least
    found = train(int(least[1]))
    assert "layers.0" in found[2].parked_on_disk and len(found[2].gradient_ring) == 2
    assert found[:2] == expected[:2]


def test_a_flipped_bit_in_a_gradient_stops_the_run_with_the_last_commit_intact(tmp_path: Path) -> None:
    settings = {**SMALL, "host_memory": budgets(tmp_path, max_grad_norm=TIGHT)[0], "max_grad_norm": TIGHT}
    model = build(NAME)
    with offload.attach(model, disk=[tmp_path], **settings) as runtime:
        run_id = runtime.run_id
        backward(model, 0, 1)
        runtime.step()
        runtime.synchronize()
        committed = record_bytes(runtime)
        backward(model, 1, 1)
        runtime.measure_gradients()
        scratch = runtime._parts.disk_gradients._scratch
        for transfer in list(runtime._parts.disk_gradients._writes):
            transfer.ticket.wait()
        buffer = bytearray(4096)
        file = scratch._drives[0].file
        engine = scratch._transfers._engine
        engine.submit("read", file, buffer, 4096).wait()
        buffer[100] ^= 1
        engine.submit("write", file, buffer, 4096).wait()
        runtime.step()
        with pytest.raises(CorruptionError, match=r"record transformer\.wte|record transformer\."):
            runtime.synchronize()
        runtime.close()
    with offload.attach(build(NAME), disk=[tmp_path], run_id=run_id, resume=True, **settings) as resumed:
        assert resumed.global_step == 1
        assert record_bytes(resumed) == committed


def one_step(model: torch.nn.Module, runtime: Any) -> None:
    backward(model, 0, 1)
    runtime.step()


def test_a_gradient_that_cannot_be_written_stops_the_step(tmp_path: Path) -> None:
    settings = {**SMALL, "host_memory": budgets(tmp_path, max_grad_norm=TIGHT)[0], "max_grad_norm": TIGHT}
    model = build(NAME)
    with offload.attach(model, disk=[tmp_path], **settings) as runtime:
        gone = StorageError("the drive is gone", errno=errno.EIO, path="/a/drive", offset_bytes=4096)
        runtime._parts.disk_gradients._scratch._note_failure(gone)
        with pytest.raises(StorageError, match="^the drive is gone; after this failed write") as error:
            one_step(model, runtime)
        assert (error.value.errno, error.value.path, error.value.offset_bytes) == (
            errno.EIO,
            "/a/drive",
            4096,
        )
        runtime.close()


def test_drives_without_room_for_gradients_are_refused_and_no_run_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {**SMALL, "host_memory": budgets(tmp_path, max_grad_norm=TIGHT)[0], "max_grad_norm": TIGHT}

    def full(*args: Any, **words: Any) -> None:
        raise DiskFullError("no room for gradients")

    monkeypatch.setattr(scratch_module, "check_room", full)
    with pytest.raises(DiskFullError, match="no room for gradients"):
        offload.attach(build(NAME), disk=[tmp_path], **settings)
    assert not list_runs(tmp_path)
    monkeypatch.undo()
    with offload.attach(build(NAME), disk=[tmp_path], **settings) as runtime:
        run_id = runtime.run_id
    monkeypatch.setattr(scratch_module, "check_room", full)
    with pytest.raises(DiskFullError, match="no room for gradients"):
        offload.attach(build(NAME), disk=[tmp_path], run_id=run_id, resume=True, **settings)
    assert [run.run_id for run in list_runs(tmp_path)] == [run_id]


def test_without_a_disk_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CapacityError, match="of these, 180224 bytes are gradients kept until the step ends"):
        offload.attach(build(NAME), **{**SMALL, "host_memory": 1 << 19, "max_grad_norm": 1.0})


def test_two_drives_share_the_gradients(tmp_path: Path) -> None:
    disks = [tmp_path / "a", tmp_path / "b"]
    for disk in disks:
        disk.mkdir()
    expected = Run(tmp_path, max_grad_norm=TIGHT)
    settings = {**SMALL, "host_memory": budgets(tmp_path, max_grad_norm=TIGHT)[0], "max_grad_norm": TIGHT}
    model = build(NAME)
    torch.manual_seed(7)
    with offload.attach(model, disk=disks, **settings) as runtime:
        sizes = [drive.file.size_nbytes for drive in runtime._parts.disk_gradients._scratch._drives]
        assert sum(sizes) == runtime.plan.parked_disk_nbytes and min(sizes) > 0
        for step in range(STEPS):
            backward(model, step, 1)
            runtime.step({"next": step + 1})
        assert record_bytes(runtime) == expected.results[2]
