"""Many tensors in one call: the bits of a call for each, all checked first, whatever the threads."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from optimizer_loops import bits

from offload import _adam
from offload.codec import split_master
from offload.optim import ParameterSettings
from offload.optim.kernel import Moment8bit, adamw_update, adamw_update_8bit
from offload.optim.multi_tensor import TensorGroup, TensorRow, update_tensors

SETTINGS = ParameterSettings(3e-3, 0.9, 0.99, 1e-8, 0.1)
OTHERS = ParameterSettings(1e-2, 0.8, 0.999, 1e-6, 0.0)
VALUES = (3e-3, 0.9, 0.99, 1e-8, 0.1, 1.0)
BLOCK_NUMEL = 1 << 16

Row = list[Any]


def row_of(
    shape: Sequence[int],
    seed: int,
    *,
    gradient: torch.dtype = torch.float32,
    split: bool = False,
    eight: bool = False,
    step: int = 0,
) -> Row:
    """A row as in the midst of training, as a list."""
    generator = torch.Generator().manual_seed(seed)
    first, weights, exp_avg, exp_avg_sq = (torch.randn(tuple(shape), generator=generator) for _ in range(4))
    residual = None
    if split:
        weights, residual = split_master(weights)
    exp_avg, exp_avg_sq = 0.1 * exp_avg, 0.01 * exp_avg_sq.square()
    moments: list[Any] = [exp_avg, exp_avg_sq]
    if eight:
        encoded = (
            Moment8bit.of("exp_avg", exp_avg.view(-1)),
            Moment8bit.of("exp_avg_sq", exp_avg_sq.view(-1)),
        )
        moments = [(moment.codes.view(tuple(shape)), moment.scales) for moment in encoded]
    return [first.to(gradient), weights, residual, *moments, torch.tensor(float(step)), seed]


def copy_of(row: Row) -> Row:
    def copied(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(copied(each) for each in value)
        return value.clone() if isinstance(value, torch.Tensor) else value

    return [copied(value) for value in row]


def row_bits(rows: Sequence[Row]) -> list[bytes]:
    """The bytes of everything that rows hold, the gradient included."""
    flat = [v for row in rows for value in row[:6] for v in (value if isinstance(value, tuple) else (value,))]
    return bits(flat)


def tuples(rows: Sequence[Row]) -> list[TensorRow]:
    return [tuple(row) for row in rows]  # type: ignore[misc]


def update_alone(row: Row, values: ParameterSettings = SETTINGS, grad_scale: float = 1.0) -> None:
    """The same update by a call of the kernel for this tensor."""
    gradient, weights, residual, exp_avg, exp_avg_sq, step, seed = row
    flat = [gradient.view(-1), weights.view(-1), None if residual is None else residual.view(-1)]
    common = {"settings": values, "step": int(step) + 1, "grad_scale": grad_scale}
    if isinstance(exp_avg, tuple):
        first = Moment8bit("exp_avg", exp_avg[0].view(-1), exp_avg[1])
        second = Moment8bit("exp_avg_sq", exp_avg_sq[0].view(-1), exp_avg_sq[1])
        adamw_update_8bit(*flat, first, second, seed=seed, **common)  # type: ignore[arg-type]
    else:
        adamw_update(*flat, exp_avg.view(-1), exp_avg_sq.view(-1), **common)  # type: ignore[arg-type]
    step.add_(1)


def assert_as_alone(rows: Sequence[Row], **how: Any) -> None:
    """One call for all has the bits of one for each."""
    alone, together = [copy_of(row) for row in rows], [copy_of(row) for row in rows]
    for row in alone:
        update_alone(row, grad_scale=0.5)
    update_tensors([TensorGroup(tuples(together), SETTINGS, 0.5)], **how)
    assert row_bits(together) == row_bits(alone)
    # The gradient and the rest have changed or not, as they should.
    for row, old in zip(together, rows, strict=True):
        assert torch.equal(row[0], old[0]) and row[5] == old[5] + 1
        assert not row[1].numel() or not torch.equal(row[1], old[1]) or row[2] is not None


@pytest.mark.parametrize("num_threads", [1, 2, 5])
@pytest.mark.parametrize("gradient", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("split", [False, True])
def test_every_kind_of_row_has_the_bits_of_a_call_of_its_own(
    num_threads: int, gradient: torch.dtype, split: bool
) -> None:
    shapes: list[Sequence[int]] = [(), (0,), (1,), (127,), (128,), (5, 7), (0, 3), (BLOCK_NUMEL - 1,)]
    shapes += [(BLOCK_NUMEL + 129,), (3, BLOCK_NUMEL), (4097,), (0,)]
    rows = [
        row_of(shape, number, gradient=gradient, split=split, eight=eight, step=number % 3)
        for number, (shape, eight) in enumerate((s, e) for s in shapes for e in (False, True))
    ]
    assert_as_alone(rows, num_threads=num_threads)


@given(
    shapes=st.lists(
        st.one_of(st.lists(st.integers(0, 40), max_size=3), st.tuples(st.integers(60_000, 70_000))),
        max_size=9,
    ),
    kinds=st.lists(st.booleans(), min_size=9, max_size=9),
    steps=st.lists(st.sampled_from([0, 1, 999, (1 << 24) - 1]), min_size=9, max_size=9),
    num_threads=st.integers(1, 3),
)
@hypothesis_settings(max_examples=40, deadline=None, derandomize=True)
def test_any_mixture_has_the_bits_of_single_calls(
    shapes: list[Sequence[int]], kinds: list[bool], steps: list[int], num_threads: int
) -> None:
    rows = [
        row_of(shape, number, eight=kinds[number], split=kinds[-1 - number])
        for number, shape in enumerate(shapes)
    ]
    for row, step in zip(rows, steps, strict=False):
        row[5].fill_(step)
    alone, together = [copy_of(row) for row in rows], [copy_of(row) for row in rows]
    for row in alone:
        update_alone(row)
        row[5].zero_()
    update_tensors([TensorGroup(tuples(together), SETTINGS)], num_threads=num_threads)
    for row, step in zip(together, steps, strict=False):
        assert row[5] == float(step) + 1
        row[5].zero_()
    assert row_bits(together) == row_bits(alone)


def test_groups_keep_their_own_settings() -> None:
    rows = [row_of((300,), number, eight=number % 2 == 0) for number in range(4)]
    alone = [copy_of(row) for row in rows]
    for row in alone[:2]:
        update_alone(row, SETTINGS, -1.0)
    for row in alone[2:]:
        update_alone(row, OTHERS, 0.25)
    groups = [
        TensorGroup(tuples(rows[:2]), SETTINGS, -1.0),
        TensorGroup([], SETTINGS),
        TensorGroup(tuples(rows[2:]), OTHERS, 0.25),
    ]
    update_tensors(groups)
    assert row_bits(rows) == row_bits(alone)


@pytest.mark.parametrize("isa", _adam.supported_isas())
def test_instruction_sets_agree(isa: str) -> None:
    rows = [row_of((size,), size, eight=size % 2 == 0) for size in (1000, 4097, BLOCK_NUMEL + 2)]
    expected = [copy_of(row) for row in rows]
    for row in expected:
        update_alone(row)
    _adam.adamw_tensors([(tuples(rows), VALUES)], num_threads=2, isa=isa)
    assert row_bits(rows) == row_bits(expected)


def test_nothing_to_do_is_done() -> None:
    update_tensors([])
    update_tensors([TensorGroup([], SETTINGS)])


def test_calls_at_the_same_time_do_not_meddle() -> None:
    rows = [[row_of((size,), size + k, eight=size % 2 == 0) for size in (900, 70_000, 11)] for k in range(4)]
    expected = [[copy_of(row) for row in each] for each in rows]
    for each in expected:
        for row in each:
            for _ in range(5):
                update_alone(row)
    start = threading.Barrier(4)

    def work(each: list[Row]) -> None:
        start.wait()
        for _ in range(5):
            update_tensors([TensorGroup(tuples(each), SETTINGS)], num_threads=2)

    threads = [threading.Thread(target=work, args=(each,)) for each in rows]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [row_bits(each) for each in rows] == [row_bits(each) for each in expected]


def test_the_gil_is_released_while_the_kernel_runs() -> None:
    # As in test_adamw_kernel.py: the other thread gets the GIL only where this one lets it go.
    rows, gate, ran = tuples([row_of((1 << 20,), 1)]), threading.Lock(), []
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
            _adam.adamw_tensors([(rows, VALUES)])
            if ran:
                break
        released = bool(ran)
    finally:
        sys.setswitchinterval(switch_interval)
        other.join()
    assert released


def test_rows_are_let_go_after_a_call_and_after_a_refusal() -> None:
    rows = tuples([row_of((9,), 1)])
    before = [sys.getrefcount(rows[0]), *(sys.getrefcount(t) for t in rows[0])]
    _adam.adamw_tensors([(rows, VALUES)])
    with pytest.raises(ValueError, match="7, from gradient to seed"):
        _adam.adamw_tensors([([*rows, ()], VALUES)])  # type: ignore[list-item]
    assert [sys.getrefcount(rows[0]), *(sys.getrefcount(t) for t in rows[0])] == before


# -- what is refused -----------------------------------------------------------------------------


def change(index: int, make: Callable[[Any], Any]) -> Callable[[Row], None]:
    def changed(row: Row) -> None:
        row[index] = make(row[index])

    return changed


def pair(index: int, part: int, make: Callable[[Any], Any]) -> Callable[[Row], None]:
    def changed(row: Row) -> None:
        parts = list(row[index])
        parts[part] = make(parts[part])
        row[index] = tuple(parts)

    return changed


MISFITS: list[tuple[bool, Callable[[Row], None], str]] = [
    (False, change(0, lambda t: t.double()), "gradient must be float32, bfloat16 or float16, got float64"),
    (False, change(0, lambda t: t.int()), "gradient must be .* got int32"),
    (False, change(0, lambda t: t.to(torch.complex64)), "gradient must be .* got type 5 of DLPack"),
    (
        False,
        change(0, lambda t: t[:-1]),
        r"gradient .* shape of the weights, \(4, 6\), got \(3, 6\)",
    ),
    (False, change(0, lambda t: t.view(6, 4)), r"gradient must have the shape .* got \(6, 4\)"),
    (False, change(0, lambda t: t.view(-1)), r"gradient must have the shape .* got \(24\)"),
    (False, change(0, lambda t: t.t().contiguous().t()), "gradient must be contiguous"),
    (False, change(0, lambda t: t.to_sparse()), "gradient must be a dense tensor: "),
    (False, change(0, lambda t: t.to("meta")), "gradient must be a dense tensor: "),
    (False, change(0, lambda t: None), "gradient must be a dense tensor: "),
    (False, change(1, lambda t: t.bfloat16()), "weights must be float32, got bfloat16"),
    (False, change(1, lambda t: "text"), "weights must be a dense tensor: "),
    (
        False,
        change(2, lambda t: torch.zeros(4, 6, dtype=torch.int16)),
        "weights must be bfloat16, got float32",
    ),
    (False, change(3, lambda t: t.bfloat16()), "exp_avg must be float32, got bfloat16"),
    (False, change(3, lambda t: t[0]), r"exp_avg must have the shape .* got \(6\)"),
    (False, change(3, lambda t: (t,)), r"a moment in 8 bits must be a tuple \(codes, scales\)"),
    (False, change(4, lambda t: (t, t)), "exp_avg_sq must be a dense tensor: "),
    (False, change(4, lambda t: t[:, :3]), "exp_avg_sq must be contiguous"),
    (False, change(5, lambda t: t.long()), "step must be float32, got int64"),
    (False, change(5, lambda t: torch.zeros(2)), r"step must have one element, got \(2\)"),
    (False, change(5, lambda t: torch.tensor(-1.0)), "step must be a number of updates"),
    (False, change(5, lambda t: torch.tensor(0.5)), "step must be a number of updates"),
    (False, change(5, lambda t: torch.tensor(float("nan"))), "step must be a number of updates"),
    (False, change(5, lambda t: torch.tensor(2.0**24)), "step must be a number of updates below 2\\^24"),
    (True, change(4, lambda t: t[0]), r"a moment in 8 bits must be a tuple \(codes, scales\)"),
    (True, change(6, lambda seed: -1), "seed is out of range: -1"),
    (True, change(6, lambda seed: 1 << 64), "seed is out of range"),
    (True, pair(3, 0, lambda t: t.view(torch.int8)), "exp_avg codes must be uint8, got int8"),
    (True, pair(4, 0, lambda t: t[1:]), r"exp_avg_sq codes must have the shape .* got \(3, 6\)"),
    (True, pair(3, 1, lambda t: t.float()), "exp_avg scales must be bfloat16, got float32"),
    (True, pair(4, 1, lambda t: t.repeat(2)), r"exp_avg_sq scales must have shape \(1,\), .* got \(2\)"),
    (True, pair(4, 1, lambda t: t.view(1, 1)), r"exp_avg_sq scales must have shape \(1,\), .* got \(1, 1\)"),
]


@pytest.mark.parametrize(("eight", "spoil", "message"), MISFITS)
def test_a_tensor_that_does_not_fit_is_named_and_nothing_is_changed(
    eight: bool, spoil: Callable[[Row], None], message: str
) -> None:
    good, spoilt = row_of((4, 6), 1), row_of((4, 6), 2, eight=eight)
    kept, all_tensors = [copy_of(good), copy_of(spoilt)], [good, list(spoilt)]
    spoil(spoilt)
    groups = [TensorGroup([], SETTINGS), TensorGroup(tuples([good, spoilt]), SETTINGS)]
    with pytest.raises(ValueError, match=f"adamw_tensors: row 1 of group 1: {message}"):
        update_tensors(groups)
    assert row_bits(all_tensors) == row_bits(kept)


def test_memory_that_is_not_aligned_is_refused() -> None:
    raw = torch.zeros(4 * 9 + 1, dtype=torch.uint8)
    row = row_of((9,), 1)
    # torch refuses such a view; numpy does not, and torch takes it from there.
    row[0] = torch.from_numpy(raw.numpy()[1:].view("<f4"))
    with pytest.raises(ValueError, match="gradient does not begin at a multiple of 4 bytes"):
        update_tensors([TensorGroup(tuples([row]), SETTINGS)])


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([([(1, 2)], VALUES)], "row 0 of group 0: must be a tuple of 7, from gradient to seed"),
        ([([list(row_of((2,), 0))], VALUES)], "must be a tuple of 7"),
        ([((), VALUES)], "group 0 must be a tuple of a list of rows and a tuple of settings"),
        ([3], "group 0 must be a tuple of a list"),
        ([([], VALUES[:5])], "settings must be a tuple of 6 numbers"),
        ([([], (*VALUES[:5], "x"))], "settings must be a tuple of 6 numbers, got .*'x'"),
        ([([], (-1.0, *VALUES[1:]))], "lr must be finite and >= 0, got -1"),
        ([([], (*VALUES[:5], float("inf")))], "grad_scale must be finite"),
        ([([tuple([object()] * 7)], VALUES)], "the type object has no __dlpack_c_exchange_api__"),
    ],
)
def test_what_is_no_group_of_rows_is_refused(groups: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _adam.adamw_tensors(groups)


def test_a_number_of_threads_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError, match=r"num_threads must be in \[1, 1024\], got 0"):
        _adam.adamw_tensors([], num_threads=0)


def test_the_reference_agrees_and_has_no_8bit_moments() -> None:
    kernel, reference = row_of((70,), 3), row_of((70,), 3)
    update_tensors([TensorGroup(tuples([kernel]), SETTINGS)])
    update_tensors([TensorGroup(tuples([reference]), SETTINGS)], backend="reference")
    torch.testing.assert_close(kernel[1], reference[1], rtol=1e-6, atol=1e-8)
    assert kernel[5] == reference[5] == 1
    with pytest.raises(ValueError, match="no 8-bit moments"):
        update_tensors([TensorGroup(tuples([row_of((70,), 3, eight=True)]), SETTINGS)], backend="reference")
