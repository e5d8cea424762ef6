"""The short look at a machine: what it measures, what it leaves behind, what it finds too slow."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from planner_cases import machine
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from offload.preflight import compute_speed, probe_machine, slower_links, update_bytes_per_s
from offload.sizes import MIB

CPU = torch.device("cpu")


def llama(layers: int) -> torch.nn.Module:
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=4
    )
    with torch.device("meta"):
        return LlamaForCausalLM(config)


def test_a_model_is_timed_by_a_few_of_its_layers_and_stays_as_it_was() -> None:
    model = llama(9)
    before = {name: id(parameter) for name, parameter in model.named_parameters()}
    found = compute_speed(model, device=CPU, rows=2, length=16, limit_s=3600)
    assert found is not None
    assert (found.rows, found.length, found.num_threads) == (2, 16, torch.get_num_threads())
    assert found.seconds > 0
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == before
    assert all(parameter.is_meta for parameter in model.parameters())
    assert len(model.model.layers) == 9


def test_tied_tables_and_learned_positions_are_timed() -> None:
    config = GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=32)
    found = compute_speed(GPT2LMHeadModel(config), device=CPU, rows=1, length=16, limit_s=0.2)
    assert found is not None and found.seconds > 0


def test_a_batch_that_would_take_too_long_is_cut() -> None:
    found = compute_speed(llama(2), device=CPU, rows=4096, length=64, limit_s=0.02)
    assert found is not None
    assert found.rows < 4096


def test_a_model_without_a_list_of_layers_is_not_timed() -> None:
    assert compute_speed(torch.nn.Linear(2, 2), device=CPU, rows=1, length=8) is None


def test_a_model_whose_layers_do_not_fit_into_memory_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    free = SimpleNamespace(available=1000)
    monkeypatch.setattr("offload.preflight.compute.psutil.virtual_memory", lambda: free)
    assert compute_speed(llama(2), device=CPU, rows=1, length=8) is None


@pytest.mark.parametrize("moments", ["float32", "8bit"])
def test_updates_are_timed(moments) -> None:
    assert 1e7 < update_bytes_per_s(moments, num_threads=1, numel=1 << 16) < 1e13


def test_a_probe_measures_drives_and_processor_and_leaves_nothing(tmp_path: Path) -> None:
    found = probe_machine([str(tmp_path)], device=False)
    assert found is not None
    (drive,) = found.drives
    assert drive.path == str(tmp_path)
    assert min(drive.read_bytes_per_s, drive.write_bytes_per_s) > 0
    assert found.processor is not None and found.processor.update_bytes_per_s > 0
    assert found.memory_bytes_per_s is not None
    assert not list(tmp_path.iterdir())


def test_a_drive_without_room_for_a_file_is_not_probed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=8 * MIB)
    monkeypatch.setattr("offload.preflight.probe.shutil.disk_usage", lambda _: usage)
    assert probe_machine([str(tmp_path)], device=False) is None


def test_links_are_slower_from_a_quarter_on() -> None:
    planned = machine(drives=2)
    assert slower_links(planned, planned) == ()
    first, second = planned.drives
    slow = replace(first, read_bytes_per_s=first.read_bytes_per_s * 0.74)
    alike = replace(second, write_bytes_per_s=second.write_bytes_per_s * 0.76)
    (found,) = slower_links(planned, replace(planned, drives=(slow, alike)))
    assert found.what == f"reading from {first.path}"
    assert found.found_bytes_per_s == pytest.approx(0.74 * found.planned_bytes_per_s)


def test_every_link_can_be_slower_and_what_one_side_does_not_know_is_none() -> None:
    planned = machine()
    assert planned.device is not None
    slow = replace(
        planned,
        drives=tuple(replace(drive, read_bytes_per_s=1.0, write_bytes_per_s=1.0) for drive in planned.drives),
        memory_bytes_per_s=1.0,
        device=replace(planned.device, pinned_to_device_bytes_per_s=1.0, device_to_pinned_bytes_per_s=1.0),
    )
    assert len(slower_links(planned, slow)) == 5
    assert slower_links(planned, replace(slow, drives=(), memory_bytes_per_s=None, device=None)) == ()
