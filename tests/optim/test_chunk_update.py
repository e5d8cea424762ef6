"""Updates of chunks that cross parameter boundaries."""

from __future__ import annotations

import hashlib
import itertools
from typing import Any

import pytest
import torch
from unit_records import read_parameter, write_parameter

from offload.codec import RecordFormat, view_elements, view_optimizer_chunk
from offload.optim import (
    ChunkMemory,
    Moment8bit,
    ParameterSettings,
    SettingsRun,
    adamw_update_8bit,
    settings_runs,
    update_chunk,
)
from offload.specs import TensorSpec, UnitLayout

DECAYED = ParameterSettings(lr=1e-2, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.5)
PLAIN = ParameterSettings(lr=1e-2, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.0)
LAYOUT = UnitLayout(
    "unit",
    (
        TensorSpec("norm.weight", (10,), 0),
        TensorSpec("norm.bias", (10,), 128),
        TensorSpec("up.weight", (30, 10), 256),
        TensorSpec("down.weight", (10, 30), 640),
        TensorSpec("down.bias", (10,), 1024),
    ),
)
BY_NAME = {spec.name: DECAYED if len(spec.shape) > 1 else PLAIN for spec in LAYOUT.trainable}


def test_neighbours_with_equal_settings_are_one_run() -> None:
    runs = settings_runs(LAYOUT.trainable, 0, LAYOUT.trainable_numel, BY_NAME)
    assert runs == (
        SettingsRun(0, 256, PLAIN),
        SettingsRun(256, 1024, DECAYED),
        SettingsRun(1024, 1152, PLAIN),
    )


@pytest.mark.parametrize("size", [64, 192, 256, 1152])
def test_runs_cover_each_chunk_exactly(size: int) -> None:
    for start in range(0, LAYOUT.trainable_numel, size):
        stop = min(start + size, LAYOUT.trainable_numel)
        runs = settings_runs(LAYOUT.trainable, start, stop, BY_NAME)
        assert runs[0].start == start
        assert runs[-1].stop == stop
        for before, after in itertools.pairwise(runs):
            assert before.stop == after.start
            assert before.settings != after.settings


def test_a_chunk_of_padding_belongs_to_the_tensor_before_it() -> None:
    assert settings_runs(LAYOUT.trainable, 138, 200, BY_NAME) == (SettingsRun(138, 200, PLAIN),)
    assert settings_runs(LAYOUT.trainable, 640 + 300, 1024, BY_NAME) == (SettingsRun(940, 1024, DECAYED),)


def test_an_empty_range_has_no_runs() -> None:
    assert settings_runs((), 0, 0, {}) == ()
    assert settings_runs(LAYOUT.trainable, 64, 64, BY_NAME) == ()


def test_elements_without_tensors_are_an_error() -> None:
    with pytest.raises(ValueError, match="elements 0 to 64 belong to no tensor"):
        settings_runs((), 0, 64, {})


class Records:
    """One unit's records and gradient in memory, with moments of zero."""

    def __init__(self, record_format: RecordFormat) -> None:
        numel = LAYOUT.trainable_numel
        self.format = record_format
        self.weights = torch.zeros(record_format.weights_nbytes(numel), dtype=torch.uint8)
        self.optimizer = torch.zeros(record_format.optimizer_nbytes(numel), dtype=torch.uint8)
        generator = torch.Generator().manual_seed(1)
        self.gradient = torch.zeros(numel)
        for spec in LAYOUT.trainable:
            source = torch.randn(spec.shape, generator=generator)
            write_parameter(record_format, spec, source, self.weights, self.optimizer, numel)
            self.gradient[spec.offset : spec.end] = torch.randn(spec.numel, generator=generator)

    def step(self, step: int, dtype: torch.dtype = torch.float32, num_threads: int = 1) -> None:
        gradient = memoryview(self.gradient.to(dtype).view(torch.uint8).numpy())
        for chunk in self.format.optimizer_chunks(LAYOUT.trainable_numel):
            own = self.optimizer[chunk.offset_bytes : chunk.offset_bytes + chunk.nbytes]
            part = gradient[chunk.start * dtype.itemsize : chunk.stop * dtype.itemsize]
            memory = ChunkMemory(self.format, chunk, own, self.weights, part, dtype)
            update_chunk(memory, LAYOUT, BY_NAME, step=step, num_threads=num_threads)

    def masters(self) -> dict[str, torch.Tensor]:
        return {
            spec.name: read_parameter(self.format, spec, self.weights, self.optimizer, LAYOUT.trainable_numel)
            for spec in LAYOUT.trainable
        }


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("chunk_numel", [128, 384, 512, 1 << 21])
def test_a_unit_in_chunks_equals_torch_adamw_with_groups(dtype: str, chunk_numel: int) -> None:
    records = Records(RecordFormat(dtype, chunk_numel))  # type: ignore[arg-type]
    parameters = {name: torch.nn.Parameter(value) for name, value in records.masters().items()}
    groups = [
        {"params": [parameters[name]], "weight_decay": settings.weight_decay}
        for name, settings in BY_NAME.items()
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.99), eps=1e-8)
    for step in (1, 2, 3):
        records.gradient.mul_(-0.7)
        for spec in LAYOUT.trainable:
            parameters[spec.name].grad = records.gradient[spec.offset : spec.end].view(spec.shape).clone()
        optimizer.step()
        records.step(step)
    for name, value in records.masters().items():
        torch.testing.assert_close(value, parameters[name].detach(), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("gradient_dtype", [torch.float32, torch.bfloat16])
def test_chunk_size_format_and_threads_change_no_bit(gradient_dtype: torch.dtype) -> None:
    results = []
    for record_format in (RecordFormat("float32"), RecordFormat("bfloat16"), RecordFormat("bfloat16", 128)):
        for num_threads in (1, 2):
            records = Records(record_format)
            for step in (1, 2):
                records.step(step, gradient_dtype, num_threads)
            results.append({name: value.numpy().tobytes() for name, value in records.masters().items()})
    assert all(result == results[0] for result in results)


def moments_8bit(records: Records) -> dict[str, torch.Tensor]:
    """The values of both moments of the whole unit."""
    found: dict[str, list[torch.Tensor]] = {"exp_avg": [], "exp_avg_sq": []}
    for chunk in records.format.optimizer_chunks(LAYOUT.trainable_numel):
        views = view_optimizer_chunk(chunk, records.optimizer[chunk.offset_bytes :])
        assert views.exp_avg_scales is not None and views.exp_avg_sq_scales is not None
        found["exp_avg"].append(Moment8bit("exp_avg", views.exp_avg, views.exp_avg_scales).values())
        found["exp_avg_sq"].append(
            Moment8bit("exp_avg_sq", views.exp_avg_sq, views.exp_avg_sq_scales).values()
        )
    return {which: torch.cat(parts) for which, parts in found.items()}


@pytest.mark.parametrize("gradient_dtype", [torch.float32, torch.bfloat16])
def test_8bit_moments_are_the_same_bits_in_any_chunks_format_and_threads(gradient_dtype: torch.dtype) -> None:
    results: list[dict[str, bytes]] = []
    for dtype, chunk_numel in (
        ("float32", 1 << 21),
        ("bfloat16", 1 << 21),
        ("bfloat16", 128),
        ("float32", 384),
    ):
        for num_threads in (1, 2):
            records = Records(RecordFormat(dtype, chunk_numel, "8bit"))  # type: ignore[arg-type]
            for step in (1, 2, 3):
                records.step(step, gradient_dtype, num_threads)
            values = {**records.masters(), **moments_8bit(records)}
            results.append({name: value.numpy().tobytes() for name, value in values.items()})
    assert all(result == results[0] for result in results)


def test_8bit_moments_of_a_chunk_are_those_of_one_call_for_each_parameter() -> None:
    # The seed is a part of the format of a run: a resumed one must round as it would have.
    seeds = {
        spec.name: int.from_bytes(hashlib.sha256(spec.name.encode()).digest()[:8], "little")
        for spec in LAYOUT.trainable
    }
    records = Records(RecordFormat("float32", 384, "8bit"))
    masters = records.masters()
    moments = {
        spec.name: (Moment8bit.zeros("exp_avg", spec.numel), Moment8bit.zeros("exp_avg_sq", spec.numel))
        for spec in LAYOUT.trainable
    }
    for step in (1, 2, 3):
        records.step(step)
        for spec in LAYOUT.trainable:
            adamw_update_8bit(
                records.gradient[spec.offset : spec.end],
                masters[spec.name].view(-1),
                None,
                *moments[spec.name],
                settings=BY_NAME[spec.name],
                step=step,
                seed=seeds[spec.name],
            )
    found = moments_8bit(records)
    for spec in LAYOUT.trainable:
        assert torch.equal(records.masters()[spec.name], masters[spec.name])
        for moment in moments[spec.name]:
            assert torch.equal(found[moment.which][spec.offset : spec.end], moment.values())


def test_8bit_moments_have_no_reference() -> None:
    records = Records(RecordFormat("float32", moments="8bit"))
    (chunk,) = records.format.optimizer_chunks(LAYOUT.trainable_numel)
    gradient = memoryview(records.gradient.view(torch.uint8).numpy())
    memory = ChunkMemory(records.format, chunk, records.optimizer, records.weights, gradient, torch.float32)
    with pytest.raises(ValueError, match="backend='kernel' alone, got 'reference'"):
        update_chunk(memory, LAYOUT, BY_NAME, step=1, backend="reference")
    assert not records.optimizer.any()


@pytest.mark.parametrize("moments", ["float32", "8bit"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_padding_stays_zero(dtype: Any, moments: Any) -> None:
    records = Records(RecordFormat(dtype, 384, moments))
    for step in (1, 2, 3):
        records.step(step)
    padding = torch.ones(LAYOUT.trainable_numel, dtype=torch.bool)
    for spec in LAYOUT.trainable:
        padding[spec.offset : spec.end] = False
    weights = view_elements(records.weights, records.format.torch_dtype, LAYOUT.trainable_numel)
    assert not weights[padding].any()
    for chunk in records.format.optimizer_chunks(LAYOUT.trainable_numel):
        views = view_optimizer_chunk(chunk, records.optimizer[chunk.offset_bytes :])
        for view in views:
            if view is not None and view.numel() == chunk.numel:
                assert not view[padding[chunk.start : chunk.stop]].any()


def test_a_gradient_too_short_is_refused() -> None:
    records = Records(RecordFormat("float32"))
    records.gradient = records.gradient[:800]
    with pytest.raises(ValueError, match="the buffer holds 3200 bytes, 4608 are needed"):
        records.step(1)
