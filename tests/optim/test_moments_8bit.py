"""Moments in eight bits: the same bits from every kernel, sound codes, and no drift."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_arrays import SETTINGS, Arrays, pattern_arrays, update
from moment_arrays import Arrays8, Which, random_arrays8, random_moment, update8

from offload import _adam
from offload.errors import StateError
from offload.optim import kernel
from offload.optim.kernel import Moment8bit, adamw_update_8bit

ISAS = _adam.supported_isas()
BLOCK_NUMEL = 1 << 16
BOTH: tuple[Which, Which] = ("exp_avg", "exp_avg_sq")
# Steps to an octave, and C: see csrc/adam/moments8.h.
STEPS = {"exp_avg": 8, "exp_avg_sq": 16}
OFFSET = 2.0**-15

element = st.one_of(
    st.floats(width=32, allow_nan=True, allow_infinity=True, allow_subnormal=True),
    st.sampled_from([0.0, -0.0, 1e-45, 1.1754942e-38, 1e-30, 1.0, 3.4028235e38, math.inf, math.nan]),
)
finite = st.floats(width=32, allow_nan=False, allow_infinity=False, allow_subnormal=True)


@given(
    rows=st.lists(st.tuples(element, element), min_size=1, max_size=40),
    numel=st.integers(1, 300),
    beta1=st.sampled_from([0.0, 0.3, 0.9]),
    beta2=st.sampled_from([0.0, 0.9, 0.999]),
    grad_scale=st.sampled_from([1.0, 0.37, 1e-20, 1e20]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    split=st.booleans(),
    seed=st.integers(0, 2**64 - 1),
)
@settings(max_examples=300, deadline=None, derandomize=True)
def test_every_instruction_set_gives_the_same_bits(
    rows: list[tuple[float, float]],
    numel: int,
    beta1: float,
    beta2: float,
    grad_scale: float,
    dtype: torch.dtype,
    split: bool,
    seed: int,
) -> None:
    gradient, weights = torch.tensor(rows, dtype=torch.float32).repeat(-(-numel // len(rows)), 1)[:numel].t()
    generator = torch.Generator().manual_seed(seed % 2**63)
    moments = [random_moment(which, numel, generator) for which in BOTH]
    arrays = Arrays8(gradient.to(dtype), weights.contiguous(), None, *moments)
    arrays = arrays.split() if split else arrays
    changes = {"beta1": beta1, "beta2": beta2, "grad_scale": grad_scale}
    results = [update8(arrays, isa=isa, seed=seed, **changes).bits() for isa in ISAS]
    assert all(result == results[0] for result in results)


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_arbitrary_bits_give_the_same_bits_in_every_kernel(split: bool, dtype: torch.dtype) -> None:
    numel = 100_003
    patterns = pattern_arrays(numel, 51, bfloat16_gradient=False)
    generator = torch.Generator().manual_seed(52)
    moments = [random_moment(which, numel, generator) for which in BOTH]
    arrays = Arrays8(patterns.gradient.to(dtype), patterns.weights, None, *moments)
    arrays = arrays.split() if split else arrays
    results = [update8(arrays, isa=isa).bits() for isa in ISAS]
    assert all(result == results[0] for result in results)
    # Whatever comes, what is stored can be decoded.
    after = update8(arrays)
    assert torch.isfinite(after.exp_avg.values()).all()
    assert torch.isfinite(after.exp_avg_sq.values()).all()
    assert (after.exp_avg_sq.values() >= 0).all()


@pytest.mark.parametrize("num_threads", [2, 3, 8])
def test_the_thread_count_changes_no_bit(num_threads: int) -> None:
    arrays = random_arrays8(5 * BLOCK_NUMEL + 1234, 53)
    assert update8(arrays, num_threads=num_threads).bits() == update8(arrays).bits()


def test_one_call_equals_several_on_parts() -> None:
    arrays = random_arrays8(2 * BLOCK_NUMEL + 99, 54).split()
    whole = update8(arrays, seed=5)
    for start, stop in ((0, 128), (128, BLOCK_NUMEL + 640), (BLOCK_NUMEL + 640, 2 * BLOCK_NUMEL + 99)):
        part = update8(arrays.part(start, stop), seed=5, first_element=start)
        assert part.bits() == whole.part(start, stop).bits()


def test_seed_and_step_choose_the_rounding() -> None:
    arrays = random_arrays8(4_096, 55)
    once = update8(arrays, seed=1, step=3)
    assert once.bits() == update8(arrays, seed=1, step=3).bits()
    assert not torch.equal(once.exp_avg.codes, update8(arrays, seed=2, step=3).exp_avg.codes)
    assert not torch.equal(once.exp_avg.codes, update8(arrays, seed=1, step=4).exp_avg.codes)


@pytest.mark.parametrize("isa", ISAS)
def test_an_update_stays_inside_its_buffers(isa: str) -> None:
    outer = random_arrays8(512, 56).split()
    before = outer.part(0, 512)
    inner = [t[128:333] for t in (outer.gradient, outer.weights, outer.residual) if t is not None]
    moments = [(m.codes[128:333].numpy(), m.scales[1:3].view(torch.int16).numpy())
               for m in (outer.exp_avg, outer.exp_avg_sq)]  # fmt: skip
    exported = [t.view(torch.int16).numpy() if t.dtype == torch.bfloat16 else t.numpy() for t in inner]
    values = {name: getattr(SETTINGS, name) for name in ("lr", "beta1", "beta2", "eps", "weight_decay")}
    _adam.adamw_8bit(*exported, *moments, **values, step=1, isa=isa)
    for start, stop in ((0, 128), (384, 512)):
        assert outer.part(start, stop).bits() == before.part(start, stop).bits()
    for now, then in ((outer.exp_avg.codes, before.exp_avg.codes), (outer.weights, before.weights)):
        assert torch.equal(now[333:384].view(torch.uint8), then[333:384].view(torch.uint8))


def test_the_codes_are_those_of_the_format() -> None:
    # The definition in csrc/adam/moments8.h, in double.
    for which, steps, codes in (("exp_avg", 8, 128), ("exp_avg_sq", 16, 256)):
        octaves = torch.arange(codes, dtype=torch.float64).div(steps, rounding_mode="floor")
        part = torch.arange(codes, dtype=torch.float64).remainder(steps) / steps
        want = (2.0 ** (octaves - 15) * (1 + part) - OFFSET) * 0.25
        moment = Moment8bit(
            which, torch.arange(codes, dtype=torch.uint8), torch.full((codes // 128,), 0.25).bfloat16()
        )  # type: ignore[arg-type]
        assert moment.values().double().tolist() == want.tolist()
    negative = Moment8bit("exp_avg", torch.tensor([0x80, 0xFF], dtype=torch.uint8), torch.ones(1).bfloat16())
    assert negative.values().tolist() == [0.0, -1.875 + OFFSET]


@pytest.mark.parametrize("which", BOTH)
def test_what_was_decoded_is_encoded_without_change(which: Which) -> None:
    moment = random_moment(which, 128 * 500 + 17, torch.Generator().manual_seed(57))
    values = moment.values()
    again = Moment8bit.of(which, values)
    assert torch.equal(again.values(), values)
    third = Moment8bit.of(which, again.values())
    assert torch.equal(third.codes, again.codes)
    assert torch.equal(third.scales, again.scales)


@pytest.mark.parametrize("seed", range(5))
def test_rounding_at_random_leaves_decoded_values_alone(seed: int) -> None:
    # A gradient equal to the first moment leaves that as it is.
    generator = torch.Generator().manual_seed(58)
    exp_avg = Moment8bit.of("exp_avg", torch.randn(1_000, generator=generator))
    arrays = Arrays8(
        exp_avg.values(), torch.zeros(1_000), None, exp_avg, Moment8bit.zeros("exp_avg_sq", 1_000)
    )
    after = update8(arrays, seed=seed, beta1=0.9)
    assert torch.equal(after.exp_avg.values(), exp_avg.values())


@pytest.mark.parametrize("which", BOTH)
@given(
    values=st.lists(finite, min_size=1, max_size=200), outlier=st.sampled_from([0.0, 1.0, 1e10, 1e38, 3e38])
)
@settings(max_examples=200, deadline=None, derandomize=True)
def test_encoding_errs_by_half_a_step_at_most(which: Which, values: list[float], outlier: float) -> None:
    x = torch.tensor([*values, outlier], dtype=torch.float32)
    x = x.abs() if which == "exp_avg_sq" else x
    moment = Moment8bit.of(which, x)
    got = moment.values()
    assert torch.isfinite(got).all()
    scale = moment.scales.float().repeat_interleave(128)[: len(x)].double()
    stored = x.double().clamp(-(2.0**126), 2.0**126)
    offset = OFFSET * scale
    half_step = (stored.abs() + offset) / STEPS[which] / 2
    error = (got.double() - stored).abs()
    # A second moment that would round to zero becomes one step instead.
    allowed = torch.maximum(half_step, offset / STEPS[which]) if which == "exp_avg_sq" else half_step
    assert (error <= allowed * (1 + 1e-6)).all()
    assert (got[x == 0] == 0).all()
    if which == "exp_avg_sq":
        assert (got[x > 0] > 0).all()
    # The scale is the least that will do: the largest value uses the last octave.
    largest = stored.abs().max()
    assert largest == 0 or scale[0] == 2.0**-90 or scale.max() <= 2.1 * stored.abs().max()


def test_zeros_are_bytes_of_zero_and_stay_so() -> None:
    moments = [Moment8bit.zeros(which, 200) for which in BOTH]
    arrays = Arrays8(torch.zeros(200), torch.zeros(200), None, *moments)
    for isa in ISAS:
        after = update8(arrays, isa=isa)
        assert not any(any(data) for data in after.bits())


def test_one_nan_concerns_its_own_element_only() -> None:
    arrays = random_arrays8(384, 59)
    bad = replace(arrays, gradient=arrays.gradient.clone())
    bad.gradient[200] = math.nan
    got, want = update8(bad), update8(arrays)
    assert got.weights[200].isnan()
    others = torch.arange(384) != 200
    assert torch.equal(got.weights[others], want.weights[others])
    for now in (got.exp_avg, got.exp_avg_sq):
        assert torch.isfinite(now.values()).all()
        assert now.values()[200] == 0
    assert got.part(0, 128).bits() == want.part(0, 128).bits()
    assert got.part(256, 384).bits() == want.part(256, 384).bits()


def test_rounding_is_right_on_average() -> None:
    numel, seeds = 4_096, 200
    arrays = random_arrays8(numel, 60)
    exact = Arrays(arrays.gradient, arrays.weights, None, arrays.exp_avg.values(), arrays.exp_avg_sq.values())
    want = update(exact)
    for which in BOTH:
        total = torch.zeros(numel, dtype=torch.float64)
        for seed in range(seeds):
            total += getattr(update8(arrays, seed=seed), which).values()
        truth = getattr(want, which).double()
        step = (truth.abs() + OFFSET * 4 * truth.abs().max()) / STEPS[which]
        # The mean of 200 draws from two neighbours errs by 0.035 of a step; of all, by far less.
        error = (total / seeds - truth) / step
        assert error.abs().max() < 0.25
        assert abs(error.mean()) < 0.003


def test_the_second_moment_follows_changes_too_small_for_a_code() -> None:
    # 1.001 of a value is a fiftieth of a step: rounded to nearest, it would stay where it is for ever.
    numel = 2_048
    second = Moment8bit.of("exp_avg_sq", torch.full((numel,), 1.0))
    arrays = Arrays8(torch.zeros(numel), torch.zeros(numel), None, Moment8bit.zeros("exp_avg", numel), second)
    for step in range(1, 501):
        arrays = update8(arrays, step=step)
    assert arrays.exp_avg_sq.values().mean().item() == pytest.approx(0.999**500, rel=0.03)
    low = Moment8bit.of("exp_avg_sq", torch.full((numel,), 0.1))
    rising = replace(arrays, gradient=torch.ones(numel), exp_avg_sq=low)
    for step in range(1, 501):
        rising = update8(rising, step=step)
    assert rising.exp_avg_sq.values().mean().item() == pytest.approx(1 - 0.9 * 0.999**500, rel=0.03)


@pytest.mark.parametrize("split", [False, True])
def test_training_with_8_bits_follows_fp32(split: bool) -> None:
    # A quadratic with curvatures over four decades, noisy gradients, 300 steps.
    numel = 1_024
    generator = torch.Generator().manual_seed(61)
    curvature = torch.logspace(-2, 2, numel)[torch.randperm(numel, generator=generator)]
    start = torch.randn(numel, generator=generator)
    eight = Arrays8(start, start.clone(), None, *(Moment8bit.zeros(which, numel) for which in BOTH))
    eight = eight.split() if split else eight
    full = Arrays(start, start.clone(), None, torch.zeros(numel), torch.zeros(numel))
    for step in range(1, 301):
        noise = 1 + 0.3 * torch.randn(numel, generator=generator)
        eight = update8(replace(eight, gradient=eight.master() * curvature * noise), step=step, lr=1e-2)
        full = update(replace(full, gradient=full.weights * curvature * noise), step=step, lr=1e-2)
    ours, theirs = ((w.square() * curvature).sum().item() for w in (eight.master(), full.weights))
    begun = (start.square() * curvature).sum().item()
    assert theirs < 0.01 * begun
    assert ours < 1.2 * theirs


def test_the_typed_wrapper_runs_the_same_kernel() -> None:
    arrays = random_arrays8(1_003, 62).split()
    got = arrays.part(0, 1_003)
    adamw_update_8bit(
        got.gradient, got.weights, got.residual, got.exp_avg, got.exp_avg_sq,
        settings=SETTINGS, step=3, grad_scale=0.5, seed=9, first_element=256, num_threads=2,
    )  # fmt: skip
    assert got.bits() == update8(arrays, step=3, grad_scale=0.5, seed=9, first_element=256).bits()


def test_the_wrapper_names_what_does_not_fit() -> None:
    arrays = random_arrays8(300, 63)
    first, second = arrays.exp_avg, arrays.exp_avg_sq

    def call(m: Moment8bit, v: Moment8bit, first_element: int = 0) -> None:
        adamw_update_8bit(
            arrays.gradient, arrays.weights, None, m, v,
            settings=SETTINGS, step=1, first_element=first_element,
        )  # fmt: skip

    with pytest.raises(ValueError, match="must be exp_avg and exp_avg_sq, got exp_avg_sq and exp_avg"):
        call(second, first)
    with pytest.raises(ValueError, match="exp_avg scales has 2 elements, the codes need 3"):
        call(replace(first, scales=first.scales[:2]), second)
    with pytest.raises(ValueError, match="exp_avg_sq codes has 299 elements, exp_avg has 300"):
        call(first, replace(second, codes=second.codes[:299]))
    with pytest.raises(ValueError, match=r"exp_avg codes must be uint8, got torch\.int8"):
        call(replace(first, codes=first.codes.view(torch.int8)), second)
    with pytest.raises(ValueError, match="first_element must be a multiple of 128, got 64"):
        call(first, second, first_element=64)


def test_the_extension_names_what_does_not_fit() -> None:
    codes, scales, values = bytearray(300), bytearray(6), bytearray(1200)
    with pytest.raises(ValueError, match="exp_avg scales holds 4 bytes, but 3 elements .as one for each 128"):
        _adam.decode_8bit("exp_avg", codes, scales[:4], values)
    with pytest.raises(ValueError, match="values holds 1196 bytes, but 300 elements"):
        _adam.decode_8bit("exp_avg", codes, scales, values[:1196])
    with pytest.raises(ValueError, match="which must be 'exp_avg' or 'exp_avg_sq', got 'm'"):
        _adam.encode_8bit("m", values, codes, scales)  # type: ignore[arg-type]


def test_without_the_extension_the_error_says_how_to_build_it(monkeypatch: pytest.MonkeyPatch) -> None:
    moment = Moment8bit.zeros("exp_avg", 8)
    monkeypatch.setattr(kernel, "_LOAD_ERROR", ImportError("No module named 'offload._adam'"))
    with pytest.raises(StateError, match=r"pip install \."):
        moment.values()


def test_a_part_is_a_view_with_its_own_scales() -> None:
    whole = Moment8bit.of("exp_avg", torch.randn(300, generator=torch.Generator().manual_seed(1)))
    part = whole.part(slice(128, 300))
    assert torch.equal(part.values(), whole.values()[128:])
    part.codes.zero_()
    part.scales.zero_()
    assert not whole.values()[128:].any()
    assert whole.values()[:128].any()
    with pytest.raises(ValueError, match=r"exp_avg: a part must begin at a multiple of 128, got slice\(64"):
        whole.part(slice(64, 300))
