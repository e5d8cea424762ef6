"""The state of `offload.optim.AdamW`: torch's layout both ways, files, copies, other libraries."""

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
from offload.optim import AdamW

SHAPES = [(), (3,), (5, 7), (0, 4), (8193,)]

Optimizer = torch.optim.Optimizer


def state_bits(optimizer: Optimizer) -> list[tuple[str, torch.dtype, torch.Size, bytes]]:
    """Every tensor of the state with its name, dtype and shape."""
    return [
        (name, tensor.dtype, tensor.shape, bits([tensor])[0])
        for _, entry in sorted(optimizer.state_dict()["state"].items())
        for name, tensor in sorted(entry.items())
    ]


def clone(model: Model) -> Model:
    return [Parameter(p.detach().clone()) for p in model]


@pytest.mark.parametrize("fused", [False, True])
def test_the_state_has_the_layout_of_torch(fused: bool) -> None:
    ours, theirs = parameters_of(SHAPES), parameters_of(SHAPES)
    mine, other = AdamW(ours, fused=fused), torch.optim.AdamW(theirs, fused=fused)
    train(mine, ours, 2)
    train(other, theirs, 2)
    assert mine.state_dict()["param_groups"] == other.state_dict()["param_groups"]
    assert [entry[:3] for entry in state_bits(mine)] == [entry[:3] for entry in state_bits(other)]


@pytest.mark.parametrize("fused", [False, True])
def test_a_state_goes_to_torch_and_back_without_losing_a_bit(fused: bool) -> None:
    model, unbroken = parameters_of(SHAPES), parameters_of(SHAPES)
    whole = AdamW(unbroken, lr=2e-3)
    train(whole, unbroken, 8)
    first = AdamW(model, lr=2e-3)
    train(first, model, 5)
    torchs = torch.optim.AdamW(clone(model), fused=fused)
    torchs.load_state_dict(copy.deepcopy(first.state_dict()))
    assert state_bits(torchs) == state_bits(first)
    last = AdamW(model)
    last.load_state_dict(copy.deepcopy(torchs.state_dict()))
    assert state_bits(last) == state_bits(first)
    train(last, model, 3, first_step=5)
    assert bits(model) == bits(unbroken)
    assert state_bits(last) == state_bits(whole)


@pytest.mark.parametrize("fused", [False, True])
def test_a_state_comes_from_torch_and_goes_back_without_losing_a_bit(fused: bool) -> None:
    model, unbroken = parameters_of(SHAPES), parameters_of(SHAPES)
    whole = torch.optim.AdamW(unbroken, lr=2e-3, fused=fused)
    train(whole, unbroken, 8)
    first = torch.optim.AdamW(model, lr=2e-3, fused=fused)
    train(first, model, 5)
    ours = AdamW(clone(model))
    ours.load_state_dict(copy.deepcopy(first.state_dict()))
    last = torch.optim.AdamW(model)
    last.load_state_dict(copy.deepcopy(ours.state_dict()))
    assert state_bits(last) == state_bits(ours) == state_bits(first)
    train(last, model, 3, first_step=5)
    assert bits(model) == bits(unbroken)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("way", ["file", "pickle", "deepcopy"])
def test_a_copy_goes_on_as_the_original(dtype: torch.dtype, way: str, tmp_path: Path) -> None:
    model = parameters_of(SHAPES, dtype=dtype)
    optimizer = AdamW(model, master_weights=dtype == torch.bfloat16, num_threads=2)
    train(optimizer, model, 3)
    if way == "file":
        torch.save([model, optimizer.state_dict()], tmp_path / "state.pt")
        copied, state = torch.load(tmp_path / "state.pt", weights_only=True)
        other = AdamW(copied, master_weights=dtype == torch.bfloat16)
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
    assert copied[0].data_ptr() != model[0].data_ptr()


def test_moments_of_bf16_parameters_are_loaded_in_fp32() -> None:
    model = parameters_of([(64,)], dtype=torch.bfloat16)
    first = AdamW(model, master_weights=True)
    train(first, model, 3)
    second = AdamW(clone(model), master_weights=True)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    entry = second.state_dict()["state"][0]
    assert {name: tensor.dtype for name, tensor in entry.items()} == {
        "step": torch.float32, "exp_avg": torch.float32, "exp_avg_sq": torch.float32, "residual": torch.int16
    }  # fmt: skip
    assert state_bits(second) == state_bits(first)


def test_a_bf16_run_of_torch_goes_on_with_masters() -> None:
    model = parameters_of([(64,)], dtype=torch.bfloat16)
    torchs = torch.optim.AdamW(model)
    train(torchs, model, 3)
    ours = AdamW(model, master_weights=True)
    ours.load_state_dict(copy.deepcopy(torchs.state_dict()))
    state, old = ours.state[model[0]], torchs.state[model[0]]
    assert torch.equal(state["exp_avg"], old["exp_avg"].float())
    assert torch.equal(ours.master(model[0]), model[0].detach().float())
    before = ours.master(model[0])
    train(ours, model, 1, first_step=3)
    assert state["residual"].any()
    assert not torch.equal(ours.master(model[0]), before)


def test_the_state_of_deepspeed_is_loaded() -> None:
    model, again = parameters_of([(5,)]), parameters_of([(5,)])
    first = AdamW(model, lr=3e-3, weight_decay=0.0)
    train(first, model, 2)
    saved = copy.deepcopy(first.state_dict())
    saved["state"][0]["step"] = 2
    keys = {"lr", "betas", "eps", "weight_decay", "amsgrad", "params"}
    saved["param_groups"] = [{key: value for key, value in saved["param_groups"][0].items() if key in keys}]
    saved["param_groups"][0]["bias_correction"] = True
    second = AdamW(again)
    second.load_state_dict(saved)
    assert state_bits(second) == state_bits(first)
    with torch.no_grad():
        again[0].copy_(model[0])
    train(first, model, 2, first_step=2)
    train(second, again, 2, first_step=2)
    assert bits(again) == bits(model)
    saved["param_groups"][0]["bias_correction"] = False
    with pytest.raises(ConfigError, match="bias_correction must be True"):
        second.load_state_dict(saved)


def test_the_hooks_of_the_user_see_and_change_what_is_loaded() -> None:
    model = parameters_of([(64,)], dtype=torch.bfloat16)
    first = AdamW(model, master_weights=True)
    train(first, model, 2)
    second = AdamW(clone(model), master_weights=True)
    seen: list[torch.dtype] = []

    def double(_: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        changed = copy.deepcopy(state_dict)
        changed["state"][0]["exp_avg"] *= 2
        return changed

    second.register_load_state_dict_pre_hook(double)
    second.register_load_state_dict_post_hook(
        lambda optimizer: seen.append(optimizer.state_dict()["state"][0]["exp_avg"].dtype)
    )
    second.load_state_dict(first.state_dict())
    loaded = second.state_dict()["state"][0]["exp_avg"]
    assert torch.equal(loaded, first.state[model[0]]["exp_avg"] * 2)
    assert seen == [torch.float32]


def saved_state(**changes: Any) -> dict[str, Any]:
    """The state_dict of one parameter of shape (4,) after a step; a None takes the key out."""
    model = parameters_of([(4,)])
    optimizer = AdamW(model)
    train(optimizer, model, 1)
    saved = copy.deepcopy(optimizer.state_dict())
    for key, value in changes.items():
        where = (
            saved["state"][0] if key in ("exp_avg", "exp_avg_sq", "residual") else saved["param_groups"][0]
        )
        where[key] = value
        if value is None:
            del where[key]
    return saved


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"exp_avg": torch.zeros(5)}, StateError, r"exp_avg of parameter 0 of group 0 .* \(4,\), got \(5,\)"),
        (
            {"exp_avg": None, "exp_avg_sq": None},
            StateError,
            "parameter 0 of group 0 has no 'exp_avg', 'exp_avg_sq'",
        ),
        ({"residual": torch.zeros(4, dtype=torch.int16)}, StateError, "has a residual, .*AdamW.master"),
        ({"betas": None}, StateError, "group 0 of the state_dict has no 'betas'"),
        ({"amsgrad": True}, ConfigError, "amsgrad must be False"),
        ({"decoupled_weight_decay": False}, ConfigError, "decoupled_weight_decay must be True"),
        ({"eps": 0.0}, ConfigError, "eps must be"),
        ({"params": [0, 1]}, ValueError, "doesn't match the size"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    model = parameters_of([(4,)])
    optimizer = AdamW(model, lr=0.25)
    train(optimizer, model, 2)
    before = state_bits(optimizer)
    with pytest.raises(error, match=message):
        optimizer.load_state_dict(saved_state(**changes))
    assert state_bits(optimizer) == before
    assert optimizer.param_groups[0]["lr"] == 0.25
    assert not optimizer._optimizer_load_state_dict_pre_hooks
    assert not optimizer._optimizer_load_state_dict_post_hooks


def test_the_state_of_sgd_is_refused() -> None:
    model = parameters_of([(4,)])
    sgd = torch.optim.SGD(model, lr=0.1, momentum=0.9)
    train(sgd, model, 1)
    with pytest.raises(StateError, match="has no 'betas', 'eps'"):
        AdamW(model).load_state_dict(sgd.state_dict())


def test_accelerate_prepares_it() -> None:
    accelerate = pytest.importorskip("accelerate")
    plain, prepared = parameters_of(SHAPES), parameters_of(SHAPES)
    train(AdamW(plain, lr=1e-2), plain, 2)
    try:
        wrapped = accelerate.Accelerator(cpu=True).prepare(AdamW(prepared, lr=1e-2))
        for step in range(2):
            wrapped.zero_grad()
            set_gradients(prepared, step)
            wrapped.step()
    finally:
        # accelerate keeps one state for the process.
        accelerate.state.AcceleratorState._reset_state(True)
    assert bits(prepared) == bits(plain)


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_schedulers_of_transformers_drive_it(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    ours, theirs = parameters_of(SHAPES), parameters_of(SHAPES)
    rates: list[list[float]] = []
    for model, kind in ((ours, AdamW), (theirs, torch.optim.AdamW)):
        optimizer = kind(model, lr=1e-2)
        scheduler = transformers.get_scheduler(name, optimizer, 2, 6)
        rates.append([])
        for step in range(6):
            rates[-1].append(optimizer.param_groups[0]["lr"])
            train(optimizer, model, 1, first_step=step, after_step=scheduler.step)
    assert rates[0] == rates[1]
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.detach(), other.detach(), rtol=1e-6, atol=1e-7)


def test_a_trainer_of_transformers_goes_on_from_the_checkpoint_of_torchs_adamw(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    accelerate = pytest.importorskip("accelerate")
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=32
    )
    initial = transformers.LlamaForCausalLM(config)
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(0, 32, (8, 6))]

    def run(kind: type[Optimizer], max_steps: int, checkpoint: Path | None = None) -> Optimizer:
        model = copy.deepcopy(initial)
        arguments = transformers.TrainingArguments(
            str(tmp_path / kind.__module__), max_steps=max_steps, save_steps=2, per_device_train_batch_size=4,
            report_to=[], use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False,
        )  # fmt: skip
        optimizer = kind(model.parameters(), lr=1e-2)
        trainer = transformers.Trainer(model, arguments, train_dataset=rows, optimizers=(optimizer, None))
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        return optimizer

    try:
        whole = run(torch.optim.AdamW, 4)
        checkpoint = tmp_path / torch.optim.AdamW.__module__ / "checkpoint-2"
        resumed = run(AdamW, 4, checkpoint)
    finally:
        accelerate.state.AcceleratorState._reset_state(True)
    ours, theirs = resumed.param_groups[0]["params"], whole.param_groups[0]["params"]
    for mine, other in zip(ours, theirs, strict=True):
        assert resumed.state[mine]["step"] == 4
        torch.testing.assert_close(mine.detach(), other.detach(), rtol=1e-5, atol=1e-6)
