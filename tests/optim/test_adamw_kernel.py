"""The AdamW kernel: the same bits from every instruction set and thread count, and torch's numbers."""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
import threading
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_arrays import SETTINGS, Arrays, export, pattern_arrays, random_arrays, update

from offload import _adam
from offload.codec import CANONICAL_NAN_BITS, split_master

ISAS = _adam.supported_isas()
# One block of the kernel; a range larger than this is shared by threads.
BLOCK_NUMEL = 1 << 16
FLT_MAX = torch.finfo(torch.float32).max


needs_two_isas = pytest.mark.skipif(len(ISAS) < 2, reason="this processor has one instruction set")

# What a float field may hold anywhere, with the awkward values made likely.
element = st.one_of(
    st.floats(width=32, allow_nan=True, allow_infinity=True, allow_subnormal=True),
    st.sampled_from(
        [0.0, -0.0, 1e-45, -1e-45, 1.1754942e-38, 3.4028235e38, -3.4028235e38, math.inf, math.nan]
    ),
)


@needs_two_isas
@given(
    rows=st.lists(st.tuples(element, element, element, element), min_size=1, max_size=37),
    beta1=st.sampled_from([0.0, 0.3, 0.5, 0.9, 0.999]),
    beta2=st.sampled_from([0.0, 0.9, 0.999, 0.999999]),
    lr=st.sampled_from([0.0, 1e-30, 1e-5, 1e-1, 10.0, 1e30]),
    weight_decay=st.sampled_from([0.0, 0.01, 1.0]),
    eps=st.sampled_from([1e-30, 1e-8, 1e-1]),
    grad_scale=st.sampled_from([1.0, 0.37, 1e-20, 1e20, -1.0]),
    step=st.sampled_from([1, 2, 10, 100_000, 2**40]),
    split=st.booleans(),
    bfloat16_gradient=st.booleans(),
)
@settings(max_examples=400, deadline=None, derandomize=True)
def test_scalar_and_vector_kernels_give_the_same_bits(
    rows: list[tuple[float, float, float, float]],
    beta1: float,
    beta2: float,
    lr: float,
    weight_decay: float,
    eps: float,
    grad_scale: float,
    step: int,
    split: bool,
    bfloat16_gradient: bool,
) -> None:
    gradient, weights, exp_avg, exp_avg_sq = torch.tensor(rows, dtype=torch.float32).t().contiguous()
    gradient = gradient.to(torch.bfloat16) if bfloat16_gradient else gradient
    arrays = Arrays(gradient, weights, None, exp_avg, exp_avg_sq)
    arrays = arrays.split() if split else arrays
    changes = {
        "beta1": beta1, "beta2": beta2, "lr": lr, "weight_decay": weight_decay, "eps": eps,
        "grad_scale": grad_scale,
    }  # fmt: skip
    results = [update(arrays, isa=isa, step=step, **changes).bits() for isa in ISAS]
    assert all(result == results[0] for result in results)


@needs_two_isas
@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("bfloat16_gradient", [False, True])
def test_random_bit_patterns_give_the_same_bits_in_every_kernel(split: bool, bfloat16_gradient: bool) -> None:
    arrays = pattern_arrays(100_003, 17, bfloat16_gradient=bfloat16_gradient)
    arrays = arrays.split() if split else arrays
    assert update(arrays, isa="scalar").bits() == update(arrays, isa=ISAS[0]).bits()


@pytest.mark.parametrize("numel", [0, 1, 7, 8, 9, 15, 16, 17, 31, 63, 64, 65])
@pytest.mark.parametrize("isa", ISAS)
def test_a_tail_is_rounded_like_everything_else(numel: int, isa: str) -> None:
    whole = random_arrays(128, 1).split()
    tail = Arrays(*(None if t is None else t[:numel] for t in vars(whole).values()))  # type: ignore[arg-type]
    want, got = update(whole, isa=isa), update(tail, isa=isa)
    assert got.master().tolist() == want.master()[:numel].tolist()
    assert got.exp_avg.tolist() == want.exp_avg[:numel].tolist()
    assert got.exp_avg_sq.tolist() == want.exp_avg_sq[:numel].tolist()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("numel", [13, 8 * 5 + 3])
def test_an_update_stays_inside_its_buffers(isa: str, numel: int) -> None:
    outer = random_arrays(128, 2, bfloat16_gradient=True).split()
    before = outer.copy()
    inner = [None if t is None else export(t[32 : 32 + numel]) for t in vars(outer).values()]
    _adam.adamw(
        *inner,  # type: ignore[arg-type]
        lr=1e-3,
        beta1=0.9,
        beta2=0.999,
        eps=1e-8,
        weight_decay=0.1,
        step=1,
        gradient_dtype="bfloat16",
        isa=isa,
    )
    for name, tensor in vars(outer).items():
        untouched = [export(t)[i] for t in (tensor,) for i in (*range(32), *range(32 + numel, 128))]
        want = [export(vars(before)[name])[i] for i in (*range(32), *range(32 + numel, 128))]
        assert untouched == want, name


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("num_threads", [2, 3, 8])
def test_the_thread_count_changes_no_bit(split: bool, num_threads: int) -> None:
    arrays = random_arrays(5 * BLOCK_NUMEL + 1234, 3)
    arrays = arrays.split() if split else arrays
    assert update(arrays, num_threads=num_threads).bits() == update(arrays, num_threads=1).bits()


def test_one_call_equals_several_on_parts() -> None:
    whole = random_arrays(2 * BLOCK_NUMEL + 99, 21)
    cuts = (0, BLOCK_NUMEL - 5, BLOCK_NUMEL + 3, 2 * BLOCK_NUMEL, 2 * BLOCK_NUMEL + 99)
    parts = [
        update(Arrays(*(None if t is None else t[start:stop] for t in vars(whole).values())))  # type: ignore[arg-type]
        for start, stop in itertools.pairwise(cuts)
    ]
    got = update(whole, num_threads=2)
    for name in ("weights", "exp_avg", "exp_avg_sq"):
        assert torch.equal(getattr(got, name), torch.cat([getattr(part, name) for part in parts]))


@pytest.mark.parametrize("beta1", [0.0, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("isa", ISAS)
def test_fp32_agrees_with_torch_adamw_over_20_steps(isa: str, beta1: float) -> None:
    arrays = replace(random_arrays(4_001, 4), exp_avg=torch.zeros(4_001), exp_avg_sq=torch.zeros(4_001))
    parameter = torch.nn.Parameter(arrays.weights.clone())
    optimizer = torch.optim.AdamW(
        [parameter],
        lr=SETTINGS.lr,
        betas=(beta1, 0.999),
        eps=SETTINGS.eps,
        weight_decay=SETTINGS.weight_decay,
    )
    generator = torch.Generator().manual_seed(5)
    for step in range(1, 21):
        gradient = torch.randn(4_001, generator=generator)
        parameter.grad = gradient.clone()
        optimizer.step()
        arrays = update(replace(arrays, gradient=gradient), isa=isa, step=step, beta1=beta1)
    state = optimizer.state[parameter]
    # 1e-6 of the value; near zero, of the steps it was summed from (each about lr).
    torch.testing.assert_close(arrays.weights, parameter.detach(), rtol=1e-6, atol=1e-6 * SETTINGS.lr * 20)
    torch.testing.assert_close(arrays.exp_avg, state["exp_avg"], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(arrays.exp_avg_sq, state["exp_avg_sq"], rtol=1e-6, atol=0)


def test_it_is_as_close_to_float64_as_torch_is() -> None:
    arrays = replace(random_arrays(20_000, 6), exp_avg=torch.zeros(20_000), exp_avg_sq=torch.zeros(20_000))
    double = torch.nn.Parameter(arrays.weights.double())
    single = torch.nn.Parameter(arrays.weights.clone())
    options = {"lr": SETTINGS.lr, "betas": (0.9, 0.999), "weight_decay": SETTINGS.weight_decay}
    exact, ordinary = torch.optim.AdamW([double], **options), torch.optim.AdamW([single], **options)
    generator = torch.Generator().manual_seed(7)
    for step in range(1, 21):
        gradient = torch.randn(20_000, generator=generator)
        double.grad, single.grad = gradient.double(), gradient.clone()
        exact.step()
        ordinary.step()
        arrays = update(replace(arrays, gradient=gradient), step=step)
    ours = (arrays.weights - double.detach()).abs().mean()
    theirs = (single.detach() - double.detach()).abs().mean()
    assert ours <= theirs * 1.05


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bfloat16_gradient", [False, True])
def test_high_and_residual_equal_fp32_masters_over_steps(isa: str, bfloat16_gradient: bool) -> None:
    masters = random_arrays(3_001, 8)
    halves = masters.split()
    generator = torch.Generator().manual_seed(9)
    for step in range(1, 13):
        gradient = torch.randn(3_001, generator=generator)
        gradient = gradient.to(torch.bfloat16) if bfloat16_gradient else gradient
        masters = update(replace(masters, gradient=gradient), isa=isa, step=step)
        halves = update(replace(halves, gradient=gradient), isa=isa, step=step)
        assert halves.bits() == masters.bits()
    high, residual = split_master(masters.weights)
    assert torch.equal(halves.weights.view(torch.int16), high.view(torch.int16))
    assert halves.residual is not None
    assert torch.equal(halves.residual, residual)


def test_high_and_residual_equal_fp32_for_arbitrary_bits() -> None:
    arrays = pattern_arrays(100_003, 10, bfloat16_gradient=False)
    assert update(arrays.split()).bits() == update(arrays).bits()


@pytest.mark.parametrize("isa", ISAS)
def test_bf16_gradients_are_widened_exactly(isa: str) -> None:
    arrays = random_arrays(1_003, 11, bfloat16_gradient=True)
    widened = replace(arrays, gradient=arrays.gradient.float())
    assert update(arrays, isa=isa).bits() == update(widened, isa=isa).bits()


@pytest.mark.parametrize("isa", ISAS)
def test_grad_scale_multiplies_the_gradient_first(isa: str) -> None:
    arrays = random_arrays(1_003, 12)
    scaled = replace(arrays, gradient=arrays.gradient * 0.125)
    assert update(arrays, isa=isa, grad_scale=0.125).bits() == update(scaled, isa=isa).bits()


@pytest.mark.parametrize("isa", ISAS)
def test_every_nan_is_stored_as_the_canonical_one(isa: str) -> None:
    arrays = random_arrays(9, 13)
    arrays.gradient.view(torch.int32)[:] = 0x7F812345
    result = update(arrays, isa=isa)
    for tensor in (result.weights, result.exp_avg, result.exp_avg_sq):
        assert tensor.view(torch.int32).tolist() == [CANONICAL_NAN_BITS] * 9


@pytest.mark.parametrize("isa", ISAS)
def test_zero_elements_stay_zero_bits(isa: str) -> None:
    zeros = torch.zeros(11)
    arrays = Arrays(zeros, zeros, None, zeros, zeros)
    for step in (1, 1000):
        assert set(update(arrays, isa=isa, step=step).bits().values()) == {bytes(44)}


@pytest.mark.parametrize("num_threads", [1, 2])
def test_flushing_denormals_in_the_calling_thread_changes_no_bit(num_threads: int) -> None:
    arrays = random_arrays(2 * BLOCK_NUMEL, 14)
    arrays.gradient.mul_(1e-22)
    arrays.exp_avg_sq.mul_(1e-40)
    want = update(arrays, num_threads=num_threads)
    assert ((want.exp_avg_sq > 0) & (want.exp_avg_sq < 1.1754942e-38)).any()
    torch.set_flush_denormal(True)
    try:
        got = update(arrays, num_threads=num_threads)
    finally:
        torch.set_flush_denormal(False)
    assert got.bits() == want.bits()


def test_the_gil_is_released_while_the_kernel_runs() -> None:
    # No forced switches: the other thread gets the GIL only where this one lets it go. It may be slow to
    # wake, hence the repeats; a kernel that kept the GIL would never let it run.
    arrays = [np.zeros(1 << 20, np.float32) for _ in range(4)]
    gate, ran = threading.Lock(), []
    gate.acquire()

    def wait_then_run() -> None:
        with gate:
            ran.append(True)

    other = threading.Thread(target=wait_then_run)
    other.start()
    switch_interval = sys.getswitchinterval()
    sys.setswitchinterval(1000)
    try:
        gate.release()
        for _ in range(1000):
            call_kernel(*arrays)
            if ran:
                break
        released = bool(ran)
    finally:
        sys.setswitchinterval(switch_interval)
        other.join()
    assert released


def call_kernel(*arrays: npt.NDArray[np.float32]) -> None:
    gradient, weights, exp_avg, exp_avg_sq = arrays
    call(gradient=gradient, weights=weights, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq)


def call(**changes: object) -> None:
    zeros = np.zeros(8, np.float32)
    arguments: dict[str, object] = {
        "gradient": zeros, "weights": zeros.copy(), "residual": None, "exp_avg": zeros.copy(),
        "exp_avg_sq": zeros.copy(), "lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8,
        "weight_decay": 0.01, "step": 1,
    }  # fmt: skip
    _adam.adamw(**{**arguments, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"exp_avg_sq": np.zeros(7, np.float32)}, r"exp_avg_sq holds 28 bytes, but 8 elements .* are 32"),
        ({"gradient": np.zeros(9, np.float32)}, "gradient holds 36 bytes"),
        ({"gradient_dtype": "bfloat16"}, "gradient has elements of format 'f'.*2-byte"),
        ({"gradient": np.zeros(8, np.int16), "gradient_dtype": "float32"}, "gradient .*format 'h'"),
        (
            {"gradient": bytes(16), "gradient_dtype": "float8"},
            "'float32', 'bfloat16' or 'float16', got 'float8'",
        ),
        ({"weights": np.zeros(16, np.float32)[::2]}, "weights must be a contiguous writable buffer"),
        ({"weights": bytes(32)}, "weights must be a contiguous writable buffer"),
        ({"weights": np.zeros(8)}, "weights has elements of format 'd'"),
        ({"residual": np.zeros(8, np.int16)}, "weights has elements of format 'f'.*2-byte"),
        ({"weights": np.zeros(8, np.uint16), "residual": np.zeros(8, np.uint16)}, "residual .*format 'H'"),
        ({"weights": np.zeros(8, np.uint16), "residual": np.zeros(3, np.int16)}, "residual holds 6 bytes"),
        ({"exp_avg": memoryview(bytearray(33))[1:]}, "exp_avg does not begin at a multiple of 4 bytes"),
        ({"exp_avg": bytearray(30)}, "exp_avg holds 30 bytes, not a multiple of 4"),
        ({"exp_avg": 3}, "exp_avg must be a contiguous writable buffer"),
        ({"lr": -1.0}, "lr must be finite and >= 0, got -1"),
        ({"lr": math.nan}, "lr must be finite"),
        ({"beta1": 1.0}, r"beta1 must be in \[0, 1\), got 1"),
        ({"beta2": -0.5}, r"beta2 must be in \[0, 1\), got -0.5"),
        ({"eps": 0.0}, "eps must be positive and finite in fp32, got 0"),
        ({"eps": 1e-60}, "eps must be positive"),
        ({"weight_decay": math.inf}, "weight_decay must be finite"),
        ({"step": 0}, r"step must be >= 1 \(1 is the first update\), got 0"),
        ({"grad_scale": math.inf}, "grad_scale must be finite, got inf"),
        ({"num_threads": 0}, r"num_threads must be in \[1, 1024\], got 0"),
        ({"isa": "sse9"}, "instruction set 'sse9' is not supported here, only: .*'scalar'"),
    ],
)
def test_bad_arguments_are_named(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(**changes)


def test_a_refused_call_changes_nothing() -> None:
    weights = np.ones(8, np.float32)
    with pytest.raises(ValueError):
        call(weights=weights, gradient=np.ones(8, np.float32), exp_avg_sq=np.zeros(7, np.float32))
    assert weights.tolist() == [1.0] * 8


def test_raw_bytes_are_accepted() -> None:
    arrays = random_arrays(8, 16).split()
    raw = {name: bytearray(export(tensor).tobytes()) for name, tensor in vars(arrays).items()}
    values = {name: getattr(SETTINGS, name) for name in ("lr", "beta1", "beta2", "eps", "weight_decay")}
    _adam.adamw(**raw, **values, step=1)  # type: ignore[arg-type]
    want = update(arrays)
    assert bytes(raw["weights"]) == export(want.weights).tobytes()
    assert bytes(raw["exp_avg_sq"]) == export(want.exp_avg_sq).tobytes()


def import_with_isa(value: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", "from offload import _adam; print(_adam.active_isa())"],
        env={**os.environ, "OFFLOAD_ADAM_ISA": value},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("isa", ISAS)
def test_the_environment_chooses_the_instruction_set(isa: str) -> None:
    assert import_with_isa(isa).stdout.strip() == isa


def test_an_unknown_instruction_set_in_the_environment_is_an_error() -> None:
    result = import_with_isa("mmx")
    assert result.returncode != 0
    assert "OFFLOAD_ADAM_ISA: instruction set 'mmx' is not supported here" in result.stderr


def test_the_best_instruction_set_is_the_default() -> None:
    assert _adam.active_isa() in ISAS
    assert ISAS[-1] == "scalar"
    assert import_with_isa("auto").stdout.strip() == ISAS[0]
