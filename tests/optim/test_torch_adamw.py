"""`offload.optim.AdamW` in a loop: torch's results, masters of bf16, clip factors, errors."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from optimizer_loops import Model, bits, gradients, parameters_of, set_gradients, train
from torch.nn import Parameter

from offload.codec import split_master
from offload.errors import ConfigError, StateError
from offload.optim import AdamW, ParameterSettings, adamw_update

# None, few, and more than a block of the kernel's threads.
SHAPES = [(), (3,), (5, 7), (0, 4), (8192,), (130, 129), (65_537,)]


def assert_agrees(ours: Model, theirs: Model, lr: float, num_steps: int) -> None:
    """1e-6 of the value, and near zero of the steps it was summed from: what holds for the kernel."""
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.detach(), other.detach(), rtol=1e-6, atol=1e-6 * lr * num_steps)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("maximize", [False, True])
def test_twenty_steps_agree_with_torch(fused: bool, weight_decay: float, maximize: bool) -> None:
    ours, theirs = parameters_of(SHAPES), parameters_of(SHAPES)
    options = {"lr": 3e-3, "betas": (0.8, 0.99), "weight_decay": weight_decay, "maximize": maximize}
    train(AdamW(ours, **options), ours, 20)
    train(torch.optim.AdamW(theirs, fused=fused, **options), theirs, 20)
    assert_agrees(ours, theirs, 3e-3, 20)


def test_the_defaults_are_those_of_torch() -> None:
    [parameter] = parameters_of([(2,)])
    ours, theirs = AdamW([parameter]), torch.optim.AdamW([parameter])
    assert ours.defaults == theirs.defaults
    assert ours.state_dict()["param_groups"] == theirs.state_dict()["param_groups"]


def test_groups_keep_their_own_settings() -> None:
    def grouped(model: Model) -> list[dict[str, object]]:
        return [
            {"params": model[:2], "lr": 1e-2, "weight_decay": 0.0},
            {"params": model[2:4], "betas": (0.5, 0.9), "eps": 1e-4},
            {"params": model[4:], "maximize": True},
        ]

    ours, theirs = parameters_of(SHAPES), parameters_of(SHAPES)
    train(AdamW(grouped(ours), lr=1e-3), ours, 10)
    train(torch.optim.AdamW(grouped(theirs), lr=1e-3), theirs, 10)
    assert_agrees(ours, theirs, 1e-2, 10)


def test_a_scheduler_sets_rate_and_beta() -> None:
    ours, theirs = parameters_of(SHAPES), parameters_of(SHAPES)
    for model, kind in ((ours, AdamW), (theirs, torch.optim.AdamW)):
        optimizer = kind(model, lr=1e-3)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=12)
        train(optimizer, model, 12, after_step=scheduler.step)
    assert_agrees(ours, theirs, 1e-2, 12)


def test_a_parameter_without_gradient_is_left_alone_and_counts_its_own_steps() -> None:
    ours, theirs = parameters_of(SHAPES), parameters_of(SHAPES)
    optimizers = AdamW(ours), torch.optim.AdamW(theirs)
    for step in range(8):
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            set_gradients(model, step)
            for position, parameter in enumerate(model):
                if step % (position + 1):
                    parameter.grad = None
            optimizer.step()
    assert_agrees(ours, theirs, 1e-3, 8)
    steps = [[optimizer.state[p]["step"].item() for p in optimizer.param_groups[0]["params"]]
             for optimizer in optimizers]  # fmt: skip
    assert steps[0] == steps[1] == [8, 4, 3, 2, 2, 2, 2]


@given(
    shapes=st.lists(st.lists(st.integers(0, 33), max_size=3), min_size=1, max_size=12),
    seed=st.integers(0, 99),
)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_a_step_has_the_bits_of_a_call_for_each_parameter(shapes: list[list[int]], seed: int) -> None:
    model = parameters_of(shapes, seed)
    alone = [p.detach().clone().view(-1) for p in model]
    moments = [(torch.zeros_like(w), torch.zeros_like(w)) for w in alone]
    optimizer = AdamW(model, lr=1e-2)
    values = ParameterSettings(1e-2, 0.9, 0.999, 1e-8, 1e-2)
    for step in range(1, 4):
        set_gradients(model, seed + step)
        for parameter, weights, pair in zip(model, alone, moments, strict=True):
            assert parameter.grad is not None
            adamw_update(parameter.grad.view(-1), weights, None, *pair, settings=values, step=step)
        optimizer.step()
    assert bits(model) == bits(alone)
    for parameter, pair in zip(model, moments, strict=True):
        state = optimizer.state[parameter]
        assert bits([state["exp_avg"], state["exp_avg_sq"]]) == bits(pair)


def test_thousands_of_small_parameters_are_updated() -> None:
    shapes = [(7,)] * 2000
    ours, theirs = parameters_of(shapes), parameters_of(shapes)
    train(AdamW(ours), ours, 2)
    train(torch.optim.AdamW(theirs), theirs, 2)
    assert_agrees(ours, theirs, 1e-3, 2)


@pytest.mark.parametrize("shapes", [[(40_000,)], [(9,), (11,)]])
def test_threads_and_backend(shapes: list[tuple[int, ...]]) -> None:
    one, three, reference = (parameters_of(shapes) for _ in range(3))
    train(AdamW(one, num_threads=1), one, 3)
    train(AdamW(three, num_threads=3), three, 3)
    train(AdamW(reference, backend="reference"), reference, 3)
    assert bits(one) == bits(three)
    assert bits(one) != bits(parameters_of(shapes))
    assert_agrees(one, reference, 1e-3, 3)


def test_a_closure_runs_once_with_gradients_and_its_loss_is_returned() -> None:
    [parameter] = parameters_of([(3,)])
    optimizer, before, calls = AdamW([parameter]), parameter.detach().clone(), []

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = parameter.square().sum()
        loss.backward()
        calls.append(torch.is_grad_enabled())
        return loss.detach()

    with torch.no_grad():
        assert optimizer.step(closure) == before.square().sum()
    assert calls == [True]
    assert not torch.equal(parameter.detach(), before)
    optimizer.zero_grad()
    assert parameter.grad is None


def test_step_hooks_are_called() -> None:
    model, calls = parameters_of([(3,)]), []
    optimizer = AdamW(model)
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    train(optimizer, model, 1)
    assert calls == ["before", "after"]


@pytest.mark.parametrize("factor", [0.125, torch.tensor(0.125)])
@pytest.mark.parametrize("maximize", [False, True])
def test_grad_scale_is_a_factor_of_every_gradient_and_leaves_it_alone(
    factor: float | torch.Tensor, maximize: bool
) -> None:
    scaled, plain = parameters_of(SHAPES), parameters_of(SHAPES)
    set_gradients(scaled, 1)
    for parameter, gradient in zip(plain, gradients(plain, 1), strict=True):
        parameter.grad = gradient * 0.125
    AdamW(scaled, maximize=maximize).step(grad_scale=factor)
    AdamW(plain, maximize=maximize).step()
    assert bits(scaled) == bits(plain)
    assert bits(p.grad for p in scaled) == bits(gradients(scaled, 1))


def test_a_grad_scaler_skips_the_step_that_overflowed() -> None:
    [parameter] = parameters_of([(4,)])
    before = parameter.detach().clone()
    optimizer, scaler = AdamW([parameter]), torch.amp.GradScaler("cpu", init_scale=4.0)
    for factor, changed in ((math.inf, False), (1.0, True)):
        optimizer.zero_grad()
        scaler.scale((parameter * factor).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(parameter.detach(), before) is not changed


@pytest.mark.parametrize("shapes", [[(9,)], [(9,), (11, 2)], [(8193,)]])
def test_a_backward_pass_through_an_old_value_is_an_error(shapes: list[tuple[int, ...]]) -> None:
    model = parameters_of(shapes)
    loss = torch.stack([p.square().sum() for p in model]).sum()
    loss.backward(retain_graph=True)
    AdamW(model).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# -- bf16 parameters -----------------------------------------------------------------------------


def test_bf16_parameters_with_masters_equal_a_run_in_fp32_bit_for_bit() -> None:
    halves = parameters_of(SHAPES, dtype=torch.bfloat16)
    singles = [Parameter(p.detach().float()) for p in halves]
    ours, exact = AdamW(halves, lr=1e-4, master_weights=True), AdamW(singles, lr=1e-4)
    for step in range(6):
        set_gradients(halves, step)
        for half, single in zip(halves, singles, strict=True):
            assert half.grad is not None
            single.grad = half.grad.float()
        ours.step()
        exact.step()
    assert bits(ours.master(p) for p in halves) == bits(singles)
    assert bits(halves) == bits(split_master(p.detach())[0] for p in singles)
    assert any(ours.state[p]["residual"].any() for p in halves)


def test_fp32_and_bf16_parameters_share_an_optimizer() -> None:
    halves, singles = parameters_of(SHAPES, dtype=torch.bfloat16), parameters_of(SHAPES)
    apart_halves, apart_singles = parameters_of(SHAPES, dtype=torch.bfloat16), parameters_of(SHAPES)
    mixed = [p for pair in zip(halves, singles, strict=True) for p in pair]
    optimizer = AdamW(mixed, master_weights=True)
    for step in range(3):
        set_gradients(halves, step)
        set_gradients(singles, step)
        optimizer.step()
    train(AdamW(apart_halves, master_weights=True), apart_halves, 3)
    train(AdamW(apart_singles), apart_singles, 3)
    assert bits([*halves, *singles]) == bits([*apart_halves, *apart_singles])
    assert "residual" not in optimizer.state[singles[0]]


def test_the_master_before_the_first_step_is_the_parameter_itself() -> None:
    [half] = parameters_of([(5,)], dtype=torch.bfloat16)
    [single] = parameters_of([(5,)])
    optimizer = AdamW([half, single], master_weights=True)
    assert torch.equal(optimizer.master(half), half.detach().float())
    assert optimizer.master(single).data_ptr() != single.data_ptr()
    assert not optimizer.state


# -- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr must be finite and >= 0, got -1.0"),
        ({"betas": (0.9, 1.0)}, "beta2 must be"),
        ({"eps": 0.0}, "eps must be positive"),
        ({"weight_decay": -1.0}, "weight_decay must be"),
        ({"amsgrad": True}, "amsgrad must be False, got True; use torch.optim.AdamW"),
        ({"capturable": True}, "capturable must be False"),
        ({"differentiable": True}, "differentiable must be False"),
        ({"adamw_mode": False}, "adamw_mode must be True, got False; use torch.optim.Adam"),
        ({"bias_correction": False}, "bias_correction must be True"),
        ({"fp32_optimizer_states": False}, "moments are float32, or 8-bit with moments="),
        ({"num_threads": 0}, "num_threads must be >= 1"),
        ({"backend": "cuda"}, "backend must be 'kernel' or 'reference', got 'cuda'"),
    ],
)
def test_settings_that_are_not_supported_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        AdamW(parameters_of([(2,)]), **options)  # type: ignore[arg-type]


def test_the_keywords_of_deepspeed_and_torch_are_accepted() -> None:
    keywords = {"adamw_mode": True, "bias_correction": True, "fp32_optimizer_states": True, "amsgrad": False}
    optimizer = AdamW(parameters_of([(2,)]), fused=True, foreach=False, **keywords)
    assert optimizer.param_groups[0]["fused"] is True


MISFITS: list[tuple[Callable[[], torch.Tensor], str]] = [
    (lambda: torch.zeros(2, dtype=torch.float64), "be float32, or bfloat16 .* got float64"),
    (lambda: torch.zeros(2, dtype=torch.float16), "got float16"),
    (lambda: torch.zeros(2, dtype=torch.complex64), "got complex64"),
    (lambda: torch.zeros(2, dtype=torch.bfloat16), "bfloat16, in which .* master_weights=True"),
    (lambda: torch.zeros(2, device="meta"), "be a contiguous tensor on the CPU, got .* on meta"),
    (lambda: torch.zeros(4, 3).t(), "be a contiguous tensor on the CPU"),
    (lambda: torch.zeros(2).to_sparse(), "be a contiguous tensor on the CPU, got .*sparse_coo"),
]


@pytest.mark.parametrize(("make", "message"), MISFITS)
def test_parameters_that_do_not_fit_are_named(make: Callable[[], torch.Tensor], message: str) -> None:
    with pytest.raises(ConfigError, match=f"parameter 1 of group 0 .*{message}"):
        AdamW([*parameters_of([(2,)]), Parameter(make())])
    with pytest.raises(ConfigError, match="parameter layer.weight "):
        AdamW([("layer.weight", Parameter(make()))])


def test_frozen_parameters_may_be_of_any_kind_until_they_get_a_gradient() -> None:
    frozen = Parameter(torch.zeros(2, dtype=torch.float64), requires_grad=False)
    model = parameters_of([(2,)])
    optimizer = AdamW([*model, frozen])
    train(optimizer, model, 1)
    frozen.grad = torch.zeros(2, dtype=torch.float64)
    with pytest.raises(StateError, match="parameter 1 of group 0 must be float32"):
        optimizer.step()


def test_a_group_that_is_refused_is_not_added() -> None:
    optimizer = AdamW(parameters_of([(2,)]))
    for group in (
        {"params": [Parameter(torch.zeros(2).double())]},
        {"params": parameters_of([(3,)]), "lr": -1.0},
    ):
        with pytest.raises(ConfigError):
            optimizer.add_param_group(group)
    assert len(optimizer.param_groups) == 1
    late = parameters_of([(3,)])
    optimizer.add_param_group({"params": late, "lr": 0.5})
    before = late[0].detach().clone()
    train(optimizer, late, 1)
    assert ((late[0].detach() - before).abs() > 0.4).all()


def double_gradient(parameter: Parameter) -> None:
    parameter.grad_dtype = None
    parameter.grad = torch.zeros(3, dtype=torch.float64)


def sparse_gradient(parameter: Parameter) -> None:
    parameter.grad = torch.ones(3).to_sparse()


def other_shape(parameter: Parameter) -> None:
    parameter.grad = torch.ones(3)
    parameter.data = torch.ones(2)


def moved(parameter: Parameter) -> None:
    parameter.grad = torch.ones(3)
    parameter.data = torch.ones(6)[::2]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (double_gradient, "gradient of parameter 0 of group 1 must be float32, .* got torch.float64"),
        (sparse_gradient, r"gradient of parameter 0 of group 1 must be dense, got torch.sparse_coo"),
        (other_shape, r"gradient of parameter 0 of group 1 must have shape \(2,\) on the CPU, got \(3,\)"),
        (moved, "parameter 0 of group 1 must be a contiguous tensor"),
    ],
)
def test_a_refused_step_changes_nothing(spoil: Callable[[Parameter], None], message: str) -> None:
    fine, spoilt = parameters_of([(4,), (3,)])
    optimizer = AdamW([{"params": [fine]}, {"params": [spoilt]}])
    set_gradients([fine], 0)
    before = fine.detach().clone()
    spoil(spoilt)
    with pytest.raises(StateError, match=message):
        optimizer.step()
    assert torch.equal(fine.detach(), before)
    assert not optimizer.state


@pytest.mark.parametrize("factor", [math.nan, math.inf, 1e39, -1e300])
def test_a_factor_that_is_not_finite_is_refused(factor: float) -> None:
    model = parameters_of([(4,)])
    before = bits(model)
    set_gradients(model, 0)
    with pytest.raises(ConfigError, match="grad_scale must be finite"):
        AdamW(model).step(grad_scale=factor)
    assert bits(model) == before


def test_a_setting_spoilt_after_construction_is_refused_at_the_step() -> None:
    model = parameters_of([(4,)])
    optimizer = AdamW(model)
    set_gradients(model, 0)
    optimizer.param_groups[0]["amsgrad"] = True
    with pytest.raises(ConfigError, match="amsgrad must be False"):
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_of_two_bytes_are_widened_exactly(dtype: torch.dtype) -> None:
    narrow, wide = parameters_of(SHAPES), parameters_of(SHAPES)
    for one, other, gradient in zip(narrow, wide, gradients(wide, 2), strict=True):
        one.grad_dtype = dtype
        one.grad = gradient.to(dtype)
        other.grad = one.grad.float()
    AdamW(narrow).step()
    AdamW(wide).step()
    assert bits(narrow) == bits(wide)


def test_a_strided_gradient_is_read_in_the_order_of_the_parameter() -> None:
    strided, plain = parameters_of([(4, 3)]), parameters_of([(4, 3)])
    [gradient] = gradients(plain, 3)
    strided[0].grad, plain[0].grad = gradient.t().contiguous().t(), gradient
    AdamW(strided).step()
    AdamW(plain).step()
    assert bits(strided) == bits(plain)


def test_a_gradient_that_is_a_negative_view_is_read_as_the_values_it_stands_for() -> None:
    lazy, plain = parameters_of([(5,)]), parameters_of([(5,)])
    values = torch.randn(5, dtype=torch.complex64)
    lazy[0].grad, plain[0].grad = values.conj().imag, -values.imag
    assert lazy[0].grad.is_neg() and not plain[0].grad.is_neg()
    AdamW(lazy).step()
    AdamW(plain).step()
    assert bits(lazy) == bits(plain)


def test_a_parameter_whose_dtype_was_changed_is_named_and_nothing_is_changed() -> None:
    fine, turned = parameters_of([(4,), (3,)], dtype=torch.bfloat16)
    optimizer = AdamW([("fine", fine), ("turned", turned)], master_weights=True)
    train(optimizer, [fine, turned], 1)
    before = bits([fine, optimizer.state[fine]["residual"], optimizer.state[fine]["step"]])
    turned.grad = None
    turned.data = turned.data.float()
    set_gradients([fine, turned], 1)
    with pytest.raises(StateError, match="the state of parameter turned has a residual"):
        optimizer.step()
    assert bits([fine, optimizer.state[fine]["residual"], optimizer.state[fine]["step"]]) == before


def test_a_state_that_no_check_by_name_finds_is_refused_with_what_the_kernel_says() -> None:
    model = parameters_of([(4,)])
    optimizer = AdamW(model)
    train(optimizer, model, 1)
    optimizer.state[model[0]]["step"].fill_(0.5)
    before = bits(model)
    with pytest.raises(StateError, match="row 0 of group 0: step must be a number of updates"):
        train(optimizer, model, 1)
    assert bits(model) == before
