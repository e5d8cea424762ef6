"""`offload.optim.AdamW` with moments in eight bits: what it keeps, that it goes on, and forms that meet."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from optimizer_loops import Model, bits, parameters_of, set_gradients, train
from torch.nn import Parameter

from offload.errors import ConfigError, StateError
from offload.optim import AdamW, ParameterSettings
from offload.optim.kernel import Moment8bit, adamw_update_8bit
from offload.optim.torch_state import MIN_8BIT_NUMEL

# Both sides of the limit below which moments stay fp32, and sizes that end within a block of 128.
SHAPES = [(), (3,), (MIN_8BIT_NUMEL - 1,), (MIN_8BIT_NUMEL,), (65, 67), (130, 129)]
LARGE = [number for number, shape in enumerate(SHAPES) if torch.Size(shape).numel() >= MIN_8BIT_NUMEL]


def state_bits(optimizer: torch.optim.Optimizer) -> list[tuple[int, str, torch.dtype, torch.Size, bytes]]:
    """Every tensor of the state with its parameter, name, dtype and shape."""
    return [
        (number, name, tensor.dtype, tensor.shape, bits([tensor])[0])
        for number, entry in sorted(optimizer.state_dict()["state"].items())
        for name, tensor in sorted(entry.items())
    ]


def copies(model: Model) -> Model:
    return [Parameter(p.detach().clone()) for p in model]


def values_of(entry: dict[str, torch.Tensor], which: Any) -> torch.Tensor:
    """The fp32 values of one moment in 8 bits."""
    codes = entry[f"{which}_codes"]
    return Moment8bit(which, codes.view(-1), entry[f"{which}_scales"]).values().view(codes.shape)


def test_large_tensors_have_codes_and_scales_and_small_ones_fp32_moments() -> None:
    model = parameters_of(SHAPES)
    optimizer = AdamW(model, moments="8bit")
    train(optimizer, model, 2)
    for number, entry in optimizer.state_dict()["state"].items():
        numel = model[number].numel()
        scales = (-(-numel // 128),)
        wanted = {
            "step": (torch.float32, ()),
            "exp_avg_codes": (torch.uint8, model[number].shape),
            "exp_avg_scales": (torch.bfloat16, scales),
            "exp_avg_sq_codes": (torch.uint8, model[number].shape),
            "exp_avg_sq_scales": (torch.bfloat16, scales),
        }
        if number not in LARGE:
            kept = {"step", "exp_avg", "exp_avg_sq"}
            wanted = {key: (torch.float32, () if key == "step" else model[number].shape) for key in kept}
        assert {key: (t.dtype, tuple(t.shape)) for key, t in entry.items()} == {
            key: (dtype, tuple(shape)) for key, (dtype, shape) in wanted.items()
        }
        assert entry["step"] == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_is_a_call_of_the_kernel_with_the_number_of_the_parameter_as_its_seed(
    dtype: torch.dtype,
) -> None:
    model = parameters_of(SHAPES, dtype=dtype)
    expected = copies(model)
    groups = [{"params": model[:4], "lr": 1e-2}, {"params": model[4:], "lr": 3e-3}]
    train(AdamW(groups, moments="8bit", master_weights=True), model, 4)
    for number in LARGE:
        weights, numel = expected[number].detach().view(-1), expected[number].numel()
        first, second = Moment8bit.zeros("exp_avg", numel), Moment8bit.zeros("exp_avg_sq", numel)
        residual = torch.zeros(numel, dtype=torch.int16) if dtype == torch.bfloat16 else None
        values = ParameterSettings(1e-2 if number < 4 else 3e-3, 0.9, 0.999, 1e-8, 1e-2)
        for step in range(4):
            set_gradients(expected, step)
            gradient = expected[number].grad
            assert gradient is not None
            adamw_update_8bit(
                gradient.view(-1), weights, residual, first, second,
                settings=values, step=step + 1, seed=number,
            )  # fmt: skip
        assert bits([model[number]]) == bits([weights])


def test_small_tensors_are_updated_as_with_fp32_moments() -> None:
    ours, plain = parameters_of(SHAPES), parameters_of(SHAPES)
    train(AdamW(ours, moments="8bit"), ours, 5)
    train(AdamW(plain), plain, 5)
    for number, (mine, other) in enumerate(zip(ours, plain, strict=True)):
        assert (bits([mine]) == bits([other])) is (number not in LARGE)
        # Two steps of the size lr apart at most, of five.
        torch.testing.assert_close(mine.detach(), other.detach(), rtol=0, atol=2e-3)


def test_results_depend_neither_on_threads_nor_on_who_else_has_a_gradient() -> None:
    one, three = parameters_of(SHAPES), parameters_of(SHAPES)
    alone = parameters_of(SHAPES)
    train(AdamW(one, moments="8bit", num_threads=1), one, 3)
    train(AdamW(three, moments="8bit", num_threads=3), three, 3)
    assert bits(one) == bits(three)
    optimizer = AdamW(alone, moments="8bit")
    for step in range(3):
        set_gradients(alone, step)
        for parameter in alone[:-1]:
            parameter.grad = None
        optimizer.step()
    assert bits(alone[-1:]) == bits(one[-1:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("way", ["file", "pickle", "deepcopy"])
def test_a_copy_goes_on_as_the_original(dtype: torch.dtype, way: str, tmp_path: Path) -> None:
    model = parameters_of(SHAPES, dtype=dtype)
    options: dict[str, Any] = {"moments": "8bit", "master_weights": dtype == torch.bfloat16, "lr": 1e-2}
    optimizer = AdamW(model, **options)
    train(optimizer, model, 3)
    if way == "file":
        torch.save([model, optimizer.state_dict()], tmp_path / "state.pt")
        copied, state = torch.load(tmp_path / "state.pt", weights_only=True)
        other = AdamW(copied, **options)
        other.load_state_dict(state)
    elif way == "pickle":
        copied, other = pickle.loads(pickle.dumps([model, optimizer]))
    else:
        copied, other = copy.deepcopy([model, optimizer])
    assert state_bits(other) == state_bits(optimizer)
    train(optimizer, model, 3, first_step=3)
    train(other, copied, 3, first_step=3)
    assert bits(copied) == bits(model)
    assert state_bits(other) == state_bits(optimizer)


@pytest.mark.parametrize("kind", [AdamW, torch.optim.AdamW])
def test_fp32_moments_are_encoded_to_the_nearest_codes(kind: type[torch.optim.Optimizer]) -> None:
    model = parameters_of(SHAPES)
    first = kind(model)
    train(first, model, 3)
    second = AdamW(copies(model), moments="8bit")
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for number, saved in first.state_dict()["state"].items():
        entry = second.state_dict()["state"][number]
        assert entry["step"] == 3
        for which in ("exp_avg", "exp_avg_sq"):
            if number not in LARGE:
                assert torch.equal(entry[which], saved[which])
                continue
            assert which not in entry
            nearest = Moment8bit.of(which, saved[which].view(-1))
            assert torch.equal(entry[f"{which}_codes"].view(-1), nearest.codes)
            assert torch.equal(entry[f"{which}_scales"], nearest.scales)
    train(second, second.param_groups[0]["params"], 1, first_step=3)


def test_8bit_moments_are_decoded_exactly_and_hardly_change_when_encoded_again() -> None:
    model = parameters_of(SHAPES)
    eight = AdamW(model, moments="8bit")
    train(eight, model, 3)
    plain = AdamW(copies(model))
    plain.load_state_dict(copy.deepcopy(eight.state_dict()))
    for number, saved in eight.state_dict()["state"].items():
        entry = plain.state_dict()["state"][number]
        assert set(entry) == {"step", "exp_avg", "exp_avg_sq"}
        for which in ("exp_avg", "exp_avg_sq"):
            wanted = values_of(saved, which) if number in LARGE else saved[which]
            assert torch.equal(entry[which], wanted) and entry[which].dtype == torch.float32
    # What torch takes over from there is torch's own layout.
    torchs = torch.optim.AdamW(copies(model))
    torchs.load_state_dict(copy.deepcopy(plain.state_dict()))
    train(torchs, torchs.param_groups[0]["params"], 1, first_step=3)
    again = AdamW(copies(model), moments="8bit")
    again.load_state_dict(copy.deepcopy(plain.state_dict()))
    for number in LARGE:
        was, entry = eight.state_dict()["state"][number], again.state_dict()["state"][number]
        for which in ("exp_avg", "exp_avg_sq"):
            # Where a block's largest value was rounded down, half the scale may do, whose codes stand for
            # values 2^-16 of the old scale apart from the old ones.
            scales = was[f"{which}_scales"].float().repeat_interleave(128)[: model[number].numel()]
            off = (values_of(entry, which) - values_of(was, which)).view(-1).abs()
            assert (off <= 2.0**-16 * scales).all()
            assert (off == 0).float().mean() > 0.9


def test_loading_takes_tensors_over_and_never_widens_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    model = parameters_of(SHAPES)
    first = AdamW(model, moments="8bit")
    train(first, model, 2)
    saved = first.state_dict()
    cast = torch.optim.Optimizer._process_value_according_to_param_policy

    def no_cast(*args: Any, **kwargs: Any) -> torch.Tensor:
        raise AssertionError(f"{cast} was asked")

    monkeypatch.setattr(torch.optim.Optimizer, "_process_value_according_to_param_policy", no_cast)
    second = AdamW(copies(model), moments="8bit")
    second.load_state_dict(saved)
    loaded = second.state_dict()["state"]
    for number in LARGE:
        assert (
            loaded[number]["exp_avg_codes"].data_ptr() == saved["state"][number]["exp_avg_codes"].data_ptr()
        )


def test_torch_refuses_the_state_instead_of_reading_codes_as_moments() -> None:
    model = parameters_of([(MIN_8BIT_NUMEL,)])
    eight = AdamW(model, moments="8bit")
    train(eight, model, 1)
    torchs = torch.optim.AdamW(copies(model))
    torchs.load_state_dict(copy.deepcopy(eight.state_dict()))
    with pytest.raises(KeyError, match="exp_avg"):
        train(torchs, torchs.param_groups[0]["params"], 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"exp_avg_scales": None}, "parameter 0 of group 0 has no 'exp_avg_scales'"),
        ({"exp_avg_codes": torch.zeros(5, dtype=torch.uint8)}, r"shape \(4096,\), got \(5,\)"),
        ({"exp_avg_sq_codes": torch.zeros(4096)}, "8-bit exp_avg_sq of parameter 0 .* got torch.float32"),
        (
            {"exp_avg_scales": torch.zeros(32)},
            r"32 bfloat16 scales, got torch.uint8 and \(32,\) torch.float32",
        ),
        ({"exp_avg_scales": torch.zeros(33, dtype=torch.bfloat16)}, r"32 bfloat16 scales, .* \(33,\)"),
    ],
)
@pytest.mark.parametrize("moments", ["float32", "8bit"])
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(
    changes: dict[str, torch.Tensor | None], message: str, moments: Any
) -> None:
    model = parameters_of([(MIN_8BIT_NUMEL,)])
    first = AdamW(model, moments="8bit")
    train(first, model, 2)
    saved = copy.deepcopy(first.state_dict())
    for key, value in changes.items():
        saved["state"][0][key] = value
        if value is None:
            del saved["state"][0][key]
    again = parameters_of([(MIN_8BIT_NUMEL,)])
    optimizer = AdamW(again, moments=moments)
    train(optimizer, again, 1)
    before = state_bits(optimizer)
    with pytest.raises(StateError, match=message):
        optimizer.load_state_dict(saved)
    assert state_bits(optimizer) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"moments": "int8"}, "moments must be 'float32' or '8bit', got 'int8'"),
        ({"moments": "8bit", "backend": "reference"}, "the reference has no 8-bit moments"),
    ],
)
def test_settings_that_are_not_supported_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        AdamW(parameters_of([(2,)]), **options)


def test_a_training_ends_near_that_with_fp32_moments() -> None:
    def final_loss(**options: Any) -> float:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.Tanh(), torch.nn.Linear(128, 64))
        teacher = torch.nn.Linear(64, 64)
        optimizer = AdamW(model.parameters(), lr=3e-3, **options)
        x = torch.randn(256, 64)
        y = teacher(x).detach()
        for _ in range(150):
            optimizer.zero_grad()
            loss = (model(x) - y).square().mean()
            loss.backward()
            optimizer.step()
        return loss.item()

    assert final_loss(moments="8bit") == pytest.approx(final_loss(), rel=0.05)
