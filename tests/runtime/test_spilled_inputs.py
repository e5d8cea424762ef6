"""Runs whose saved inputs go to disk give the bits of runs that keep them in memory, within the budget."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
import torch
from toy_models import LENGTH, ROWS, SETTINGS, build, loss_of, make_batch, record_bytes, train

import offload
from offload.aio import Engine
from offload.errors import CapacityError, ConfigError, DiskFullError, StateError, StorageError
from offload.store import list_runs
from offload.store import scratch as scratch_module
from offload.trace import Tracer

STEPS = 3
# What a unit of the toy models gets from the one before: rows x tokens x width in fp32, two pages.
INPUT_NBYTES = ROWS * LENGTH * 32 * 4
PAGES_NBYTES = 2 * 4096
# As many as the unit of a model that saves the most at once has, which must fit into memory.
TIGHT = {"activations_nbytes": PAGES_NBYTES, "activations_disk_nbytes": 16 * PAGES_NBYTES}


def run(name: str, disk: Path, **settings: Any) -> tuple[Any, Any]:
    """Return what the training came to, and what it cost."""
    model = build(name)
    torch.manual_seed(7)
    with offload.attach(model, disk=[disk], **(SETTINGS | settings)) as runtime:
        losses = train(name, runtime, model, range(STEPS))
        results = losses, record_bytes(runtime)
        return results, runtime.stats()


VARIANTS: dict[str, dict[str, Any]] = {
    "updates in backward": {},
    "rows": {"rows": 1},
    "clip": {"max_grad_norm": 0.05},
    "bf16 compute, rows": {"compute_dtype": "bfloat16", "rows": 2},
    "home host": {"home": "host"},
    "8-bit moments": {"moments": "8bit", "chunk_nbytes": None},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_inputs_on_disk_change_no_bit(variant: str, tmp_path: Path) -> None:
    settings = VARIANTS[variant]
    expected, in_memory = run("gpt2", tmp_path, **settings)
    found, spilled = run("gpt2", tmp_path, **settings, **TIGHT)
    assert found == expected
    assert in_memory.activations_written_nbytes == in_memory.activations_read_nbytes == 0
    assert spilled.activations_written_nbytes > 0


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3"])
@pytest.mark.parametrize("kept", [1, 2, 3])
def test_every_input_that_memory_does_not_hold_is_written_and_read_once(
    name: str, kept: int, tmp_path: Path
) -> None:
    expected, _ = run(name, tmp_path)
    saved = {"activations_nbytes": kept * PAGES_NBYTES, "activations_disk_nbytes": "1MiB"}
    found, stats = run(name, tmp_path, **saved)
    assert found == expected
    # Three blocks, the norm and the head; the tables get token ids, which are not saved.
    nbytes = STEPS * (5 - kept) * PAGES_NBYTES
    assert (stats.activations_written_nbytes, stats.activations_read_nbytes) == (nbytes, nbytes)
    assert stats.host_high_water_nbytes <= 64 << 20


def test_it_equals_the_same_run_in_memory(tmp_path: Path) -> None:
    resident = build("llama")
    torch.manual_seed(7)
    with offload.attach(resident, home="device", **SETTINGS) as runtime:
        expected = train("llama", runtime, resident, range(STEPS)), record_bytes(runtime)
    assert run("llama", tmp_path, **TIGHT)[0] == expected


def test_bytes_of_inputs_are_part_of_those_of_the_drives(tmp_path: Path) -> None:
    _, plain = run("llama", tmp_path, max_grad_norm=1.0)
    _, spilled = run("llama", tmp_path, max_grad_norm=1.0, **TIGHT)
    more = spilled.disk_written_nbytes - plain.disk_written_nbytes
    assert more == spilled.activations_written_nbytes == STEPS * 4 * PAGES_NBYTES


def test_writes_and_reads_are_shown_beside_the_units(tmp_path: Path) -> None:
    model, tracer = build("llama"), Tracer()
    with offload.attach(model, disk=[tmp_path], trace=tracer, **(SETTINGS | TIGHT)) as runtime:
        train("llama", runtime, model, range(2))
        runtime.synchronize()
    for track in ("disk write", "disk read"):
        names = [span.name for span in tracer._spans if span.track == track and span.name.endswith(" input")]
        assert names.count("model.layers.0 input") == 2, track


def test_several_forwards_before_their_backwards(tmp_path: Path) -> None:
    def train_in_pairs(**settings: Any) -> Any:
        model = build("gpt2")
        torch.manual_seed(7)
        settings = {**SETTINGS, "park_gradients": True, **settings}
        with offload.attach(model, disk=[tmp_path], **settings) as runtime:
            for step in range(2):
                losses = [loss_of("gpt2", model, make_batch("gpt2", 2 * step + part)) for part in range(2)]
                (losses[0] + losses[1]).backward()
                for part in (4, 5):
                    loss_of("gpt2", model, make_batch("gpt2", 10 * step + part)).backward()
                runtime.step()
            return runtime.grad_norm, record_bytes(runtime)

    expected = train_in_pairs()
    assert train_in_pairs(**TIGHT) == expected


def test_a_metric_with_a_graph_and_an_evaluation_between(tmp_path: Path) -> None:
    def train_with_metrics(**settings: Any) -> Any:
        model = build("llama")
        torch.manual_seed(7)
        with offload.attach(model, disk=[tmp_path], **(SETTINGS | settings)) as runtime:
            found = []
            for step in range(STEPS):
                loss = loss_of("llama", model, make_batch("llama", step))
                # Its graph is dropped, and what it saved with it.
                found.append(float(loss_of("llama", model, make_batch("llama", 50 + step)).detach()))
                loss.backward()
                runtime.step()
                with torch.no_grad():
                    found.append(float(loss_of("llama", model, make_batch("llama", 70 + step))))
            return found, record_bytes(runtime)

    expected = train_with_metrics()
    assert train_with_metrics(**TIGHT) == expected


class Crossed(torch.nn.Module):
    """Units that hand on several tensors of other dtypes and sizes, one of them to all units behind."""

    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = torch.nn.Linear(32, 32)

        def forward(
            self, hidden: torch.Tensor, first: torch.Tensor, wide: torch.Tensor, mask: torch.Tensor
        ) -> tuple[torch.Tensor, torch.Tensor]:
            hidden = torch.where(mask, self.inner(hidden), hidden) + first
            return hidden.transpose(0, 1).contiguous().transpose(0, 1), wide * hidden.mean().double()

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.enter = torch.nn.ModuleList([torch.nn.Sequential(torch.nn.Linear(32, 32))])
        self.blocks = torch.nn.ModuleList(self.Block() for _ in range(6))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        first = hidden = self.enter[0](inputs)
        wide = torch.ones(1500, dtype=torch.float64, requires_grad=True)
        mask = inputs > 0
        for block in self.blocks:
            hidden, wide = block(hidden, first, wide, mask)
        return hidden.square().sum() + wide.sum().float()


def test_tensors_of_several_kinds_that_units_share(tmp_path: Path) -> None:
    def train_crossed(**settings: Any) -> Any:
        model = Crossed()
        with offload.attach(model, disk=[tmp_path], **(SETTINGS | settings)) as runtime:
            for step in range(STEPS):
                generator = torch.Generator().manual_seed(step)
                model(torch.randn(4, 32, generator=generator)).backward()
                runtime.step()
            return runtime.grad_norm, record_bytes(runtime), runtime.stats().activations_written_nbytes

    expected = train_crossed()
    found = train_crossed(activations_nbytes=6 * 4096, activations_disk_nbytes=1 << 20)
    assert found[:2] == expected[:2]
    assert expected[2] == 0 < found[2]


def test_a_partial_gradient_that_nobody_foresaw_gets_memory_of_inputs(tmp_path: Path) -> None:
    def train_twice(**settings: Any) -> Any:
        torch.manual_seed(3)
        model = torch.nn.Sequential(*(torch.nn.Sequential(torch.nn.Linear(32, 32)) for _ in range(4)))
        with offload.attach(model, disk=[tmp_path], **(SETTINGS | settings)) as runtime:
            for _ in range(STEPS):
                model(model(torch.ones(2, 32))).square().sum().backward()
                runtime.step()
            return runtime.grad_norm, record_bytes(runtime)

    expected = train_twice()
    pages = 4 * 2 + 1  # a gradient of 32 x 33 elements takes two
    assert train_twice(activations_nbytes=pages * 4096, activations_disk_nbytes=1 << 20) == expected


# -- refusals ----------------------------------------------------------------------------------


def test_room_on_disk_without_a_disk_is_refused() -> None:
    with pytest.raises(ConfigError, match="set disk="):
        offload.attach(build("mlp"), **SETTINGS, activations_disk_nbytes="1MiB")
    with pytest.raises(ConfigError, match="negative"):
        offload.attach(build("mlp"), **SETTINGS, activations_disk_nbytes=-1)


def test_more_than_both_hold_is_refused_with_numbers(tmp_path: Path) -> None:
    with pytest.raises(CapacityError, match="raise activations_disk_nbytes"):
        run("llama", tmp_path, activations_nbytes=PAGES_NBYTES, activations_disk_nbytes=2 * PAGES_NBYTES)


def test_drives_without_room_are_refused_and_no_run_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, cure: str, **words: Any) -> None:
        raise DiskFullError(f"no room; {cure}")

    monkeypatch.setattr(scratch_module, "check_room", full)
    with pytest.raises(DiskFullError, match="lower activations_disk_nbytes"):
        offload.attach(build("llama"), disk=[tmp_path], **(SETTINGS | TIGHT))
    assert not list_runs(tmp_path)


# -- failures ----------------------------------------------------------------------------------


@pytest.mark.parametrize("op", ["write", "read"])
def test_a_drive_that_fails_ends_the_step_and_the_last_commit_stands(
    op: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build("llama")
    with offload.attach(model, disk=[tmp_path], **(SETTINGS | TIGHT)) as runtime:
        run_id = runtime.run_id
        train("llama", runtime, model, range(2))
        committed = record_bytes(runtime)
        spill = runtime._parts.activations._spill
        engine: Engine = spill._scratch._transfers._engine
        files = [drive.file for drive in spill._scratch._drives]
        submit = engine.submit

        def failing(what: str, file: Any, *args: Any) -> Any:
            if what == op and file in files:
                raise StorageError("the drive is gone", errno=errno.EIO, path="/a/drive")
            return submit(what, file, *args)

        class Failing:
            submit = staticmethod(failing)

        monkeypatch.setattr(spill._scratch._transfers, "_engine", Failing())
        with pytest.raises(StorageError, match="the drive is gone"):
            train("llama", runtime, model, range(2, 3))
        with pytest.raises(StateError, match="resume the run at step 2"):
            runtime.step()
        runtime.close()
    settings = SETTINGS | TIGHT
    with offload.attach(build("llama"), disk=[tmp_path], run_id=run_id, resume=True, **settings) as resumed:
        assert resumed.global_step == 2
        assert record_bytes(resumed) == committed


def test_a_run_goes_on_with_other_room_and_gives_the_same_bits(tmp_path: Path) -> None:
    expected, _ = run("llama", tmp_path)
    model = build("llama")
    torch.manual_seed(7)
    with offload.attach(model, disk=[tmp_path], **(SETTINGS | TIGHT)) as runtime:
        losses = train("llama", runtime, model, range(2))
        run_id = runtime.run_id
    folder = next(tmp_path.glob(f"run-{run_id}"))
    assert not list(folder.glob("scratch*"))
    model = build("llama")
    with offload.attach(model, disk=[tmp_path], run_id=run_id, resume=True, **SETTINGS) as runtime:
        losses += train("llama", runtime, model, range(2, 3))
        assert (losses, record_bytes(runtime)) == expected


def test_a_snapshot_is_copied_through_the_memory_of_inputs(tmp_path: Path) -> None:
    model = build("llama")
    settings = SETTINGS | TIGHT | {"activations_nbytes": 1 << 18}
    with offload.attach(model, disk=[tmp_path], **settings) as runtime:
        train("llama", runtime, model, range(1))
        before = record_bytes(runtime)
        runtime.snapshot("kept")
        train("llama", runtime, model, range(1, 3))
        runtime.restore("kept")
        assert record_bytes(runtime) == before
