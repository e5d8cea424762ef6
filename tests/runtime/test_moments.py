"""8-bit moments as a format of a run: the same bits wherever the records rest, and fewer of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from toy_models import SETTINGS, build, record_bytes, train

import offload
from offload import AdamWOptions
from offload.codec import view_optimizer_chunk
from offload.errors import CapacityError, ConfigError
from offload.optim import Moment8bit

NAME = "llama"  # its embedding is tied to its head
STEPS = 4


def run(name: str = NAME, steps: int = STEPS, **settings: Any) -> tuple[list[float], dict[str, bytes]]:
    model = build(name)
    torch.manual_seed(5)
    with offload.attach(model, **{**SETTINGS, "moments": "8bit", **settings}) as runtime:
        return train(name, runtime, model, range(steps)), record_bytes(runtime)


def moments_of(runtime: Any) -> Iterator[tuple[str, Moment8bit]]:
    """Each chunk's moments, read from the record's bytes."""
    found = record_bytes(runtime)
    for unit in runtime._parts.records.values():
        memory = memoryview(bytearray(found.get(unit.name("optimizer"), b"")))
        for chunk in unit.format.optimizer_chunks(unit.layout.trainable_numel):
            views = view_optimizer_chunk(chunk, memory[chunk.offset_bytes :])
            assert views.exp_avg_scales is not None and views.exp_avg_sq_scales is not None
            yield unit.owner, Moment8bit("exp_avg", views.exp_avg, views.exp_avg_scales)
            yield unit.owner, Moment8bit("exp_avg_sq", views.exp_avg_sq, views.exp_avg_sq_scales)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("rows", [None, 1], ids=["1 micro-batch", "4 micro-batches"])
@pytest.mark.parametrize("max_norm", [None, 0.25], ids=["in backward", "clipped"])
def test_every_home_computes_the_same_bits(
    dtype: str, rows: int | None, max_norm: float | None, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"dtype": dtype, "rows": rows, "max_grad_norm": max_norm}
    resident = run(home="device", **settings)
    assert run(disk=[tmp_path], **settings) == resident
    assert run(home="host", **settings) == resident


def test_two_drives_change_nothing(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    assert run(disk=[tmp_path / "a", tmp_path / "b"]) == run(home="device")


@pytest.mark.parametrize("home", ["disk", "host", "device"])
def test_resumed_run_equals_unbroken_run_bit_for_bit(tmp_path: Path, home: str) -> None:
    expected = run(steps=6)
    model = build(NAME)
    torch.manual_seed(5)
    settings: dict[str, Any] = {**SETTINGS, "moments": "8bit", "disk": [tmp_path]}
    with offload.attach(model, home=home, **settings) as runtime:
        losses = train(NAME, runtime, model, range(3))
        run_id = runtime.run_id
    torch.manual_seed(12345)
    model = build(NAME)
    with offload.attach(model, home="disk", resume=True, run_id=run_id, **settings) as runtime:
        losses += train(NAME, runtime, model, range(3, 6))
        assert (losses, record_bytes(runtime)) == expected


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_chunks_and_threads_change_no_bit(dtype: str, tmp_path: Path) -> None:
    def values(chunk_numel: int, num_threads: int) -> Any:
        model = build(NAME)
        torch.manual_seed(5)
        optimizer = AdamWOptions(lr=1e-2, weight_decay=0.1, num_threads=num_threads)
        changes = {"chunk_numel": chunk_numel, "chunk_nbytes": None, "optimizer": optimizer, "dtype": dtype}
        folder = tmp_path / f"{chunk_numel} {num_threads}"
        folder.mkdir()
        with offload.attach(model, disk=[folder], moments="8bit", **{**SETTINGS, **changes}) as runtime:
            losses = train(NAME, runtime, model, range(STEPS))
            codes: dict[tuple[str, str], bytes] = {}
            for owner, moment in moments_of(runtime):
                key = (owner, moment.which)
                codes[key] = codes.get(key, b"") + moment.values().numpy().tobytes()
            masters = {
                name: value.numpy().tobytes()
                for _, unit in runtime.parameters_by_unit()
                for name, value in unit.items()
            }
            return losses, codes, masters

    expected = values(1 << 21, 1)
    assert any(any(code) for code in expected[1].values())
    for chunk_numel, num_threads in ((128, 1), (896, 3), (4096, 2)):
        assert values(chunk_numel, num_threads) == expected


def test_the_first_step_equals_that_of_float32_moments_and_later_ones_do_not(tmp_path: Path) -> None:
    # Moments are rounded when they are stored: the update that made them has used the exact ones.
    coded, exact = run(steps=12), run(steps=12, moments="float32")
    assert coded[0][:2] == exact[0][:2]
    assert coded[0] != exact[0]
    assert coded[0] == pytest.approx(exact[0], rel=0.02)


@pytest.mark.parametrize(("begun", "other"), [("8bit", "float32"), ("float32", "8bit")])
def test_resume_with_other_moments_is_refused(begun: str, other: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {**SETTINGS, "disk": [tmp_path]}
    with offload.attach(build("mlp"), moments=begun, **settings) as runtime:
        run_id = runtime.run_id
    with pytest.raises(ConfigError, match=f"begun with moments='{begun}', not '{other}'.*resume with"):
        offload.attach(build("mlp"), moments=other, resume=True, run_id=run_id, **settings)


def test_moments_that_cannot_be_are_refused() -> None:
    with pytest.raises(ConfigError, match="moments must be 'float32' or '8bit', got '4bit'"):
        offload.attach(build("mlp"), moments="4bit", **SETTINGS)


# -- what bounds a run ---------------------------------------------------------------------------


def test_peaks_stay_within_the_least_budget_that_is_taken(tmp_path: Path) -> None:
    def least(moments: str) -> int:
        settings = {**SETTINGS, "moments": moments, "host_memory": 4096, "activations_nbytes": 1 << 18}
        with pytest.raises(CapacityError) as refused:
            offload.attach(build(NAME), disk=[tmp_path], **settings)
        return int(str(refused.value).split("set host_memory to at least ")[1].split()[0])

    budget = least("8bit")
    assert budget < least("float32")
    model = build(NAME)
    settings = {**SETTINGS, "moments": "8bit", "host_memory": budget, "activations_nbytes": 1 << 18}
    with offload.attach(model, disk=[tmp_path], **settings) as runtime:
        train(NAME, runtime, model, range(3))
        assert runtime.stats().host_high_water_nbytes <= budget


def test_the_store_s_chunks_follow_from_the_format(tmp_path: Path) -> None:
    def chunk_nbytes(**settings: Any) -> int:
        chosen = {**SETTINGS, "disk": [tmp_path], "chunk_nbytes": None, **settings}
        with offload.attach(build("mlp"), **chosen) as runtime:
            store: Any = runtime._parts.store
            return int(store.chunk_nbytes)

    assert chunk_nbytes(moments="8bit", chunk_numel=1 << 21) == (4 << 20) + (32 << 10)
    assert chunk_nbytes(moments="float32", chunk_numel=1 << 21) == 4 << 20
    with pytest.raises(ConfigError, match=r"not a whole number of store chunks .*or set it to 4227072"):
        chunk_nbytes(moments="8bit", chunk_numel=1 << 21, chunk_nbytes="4MiB")


# -- gradients that are hard to store ------------------------------------------------------------

NUMEL = 512


class Given(torch.nn.Module):
    """A unit whose weight gets the gradient it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.linspace(-1, 1, NUMEL))
        self.gradient = torch.zeros(NUMEL)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + (self.weight * self.gradient).sum()


def gradients(kind: str, step: int) -> torch.Tensor:
    """Gradients of one step; every block of 128 has some of each."""
    values = torch.randn(NUMEL, generator=torch.Generator().manual_seed(step))
    if kind == "zeros":
        return torch.zeros(NUMEL)
    if kind == "zeros after values":
        return values if step < 2 else torch.zeros(NUMEL)
    if kind == "outliers":
        values[step % 7 :: 61] *= 1e6
        return values
    if kind == "extreme outliers":
        values *= 1e-20
        values[5::97] = 1e18
        return values
    if kind == "denormals":
        return values * 1e-40
    if kind == "denormals beside values":
        values[::2] *= 1e-42
        return values
    assert kind == "fall"
    return values * 10.0 ** (-3 * step)


@pytest.mark.parametrize(
    "kind",
    [
        "zeros",
        "zeros after values",
        "outliers",
        "extreme outliers",
        "denormals",
        "denormals beside values",
        "fall",
    ],
)
def test_hard_gradients_never_blow_up(kind: str, tmp_path: Path) -> None:
    lr = 1e-3

    def train_given(**settings: Any) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Return the masters after each step and the moments after the last."""
        model = torch.nn.Sequential(Given(), Given())
        optimizer = AdamWOptions(lr=lr, weight_decay=0.0)
        weights = []
        with offload.attach(
            model, moments="8bit", **{**SETTINGS, "optimizer": optimizer}, **settings
        ) as runtime:
            for step in range(10):
                for index, unit in enumerate(model):
                    unit.gradient = gradients(kind, step + 100 * index)
                model(torch.zeros(1, 1)).sum().backward()
                runtime.step()
                values = {n: v.clone() for _, unit in runtime.parameters_by_unit() for n, v in unit.items()}
                weights.append(torch.cat([values["0.weight"], values["1.weight"]]))
            return weights, [moment.values() for _, moment in moments_of(runtime)]

    weights, moments = train_given(disk=[tmp_path])
    began = before = torch.linspace(-1, 1, NUMEL).repeat(2)
    for after in weights:
        assert after.isfinite().all()
        # With exact moments no weight moves by more than lr here; rounding adds an eighth or so. A second
        # moment lost to an outlier beside it would make a step of thousands.
        assert (after - before).abs().max() <= 1.5 * lr
        before = after
    assert all(moment.isfinite().all() for moment in moments)
    if kind == "zeros":
        assert torch.equal(weights[-1], began)
        assert not any(moment.any() for moment in moments)
    # The gradient does not depend on the weights here, so that both forms of them can be compared.
    for settings in ({"home": "device"}, {"dtype": "float32"}):
        others, other_moments = train_given(**settings)
        assert all(torch.equal(a, b) for a, b in zip(weights, others, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(moments, other_moments, strict=True))
