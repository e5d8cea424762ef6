"""Head and loss in chunks of tokens: the same loss and gradients, and logits of one chunk at a time."""

from __future__ import annotations

import contextlib
import copy
import gc
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from loss_models import BUILDERS, HIDDEN, VOCAB, LoraLinear, make, tokens_of
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from toy_models import SETTINGS, build, record_bytes, train

import offload
from offload.errors import CapacityError, ConfigError, StateError
from offload.runtime.blueprint import Blueprint
from offload.runtime.options import RuntimeOptions
from offload.units import find_loss_head, logits_nbytes

ROWS, LENGTH, CHUNK = 3, 16, 8
# So many bytes that a chunk has CHUNK tokens, in fp32.
CHUNK_NBYTES = logits_nbytes(CHUNK, VOCAB, 4)
PARKED = {**SETTINGS, "park_gradients": True, "dtype": "float32"}


@contextlib.contextmanager
def attached(model: torch.nn.Module, **settings: Any) -> Iterator[Any]:
    with offload.attach(model, **(PARKED | settings)) as runtime:
        yield runtime


def gradients_of(runtime: Any) -> dict[str, torch.Tensor]:
    """The parked gradients of the step so far, by parameter."""
    gradients, found = runtime._parts.gradients, {}
    for owner, record in runtime._parts.records.items():
        if owner not in gradients.pending():
            continue
        parked = gradients.parked(owner)
        parked.arrived.wait()
        flat = gradients._device.host_tensor(gradients._host, parked.host, parked.dtype, parked.numel)
        for spec in record.layout.trainable:
            found[spec.name] = flat[spec.offset : spec.end].view(spec.shape).clone()
    return found


def streamed(name: str, call: dict[str, Any], **settings: Any) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of one backward of an attached model."""
    model = make(name)
    with attached(model, **settings) as runtime:
        loss = model(**call).loss
        loss.backward()
        return loss.item(), gradients_of(runtime)


def in_memory(name: str, call: dict[str, Any]) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of the model as transformers computes them."""
    model = make(name)
    loss = model(**call).loss
    loss.backward()
    return loss.item(), {key: value.grad for key, value in model.named_parameters() if value.grad is not None}


def in_memory_chunks(name: str, tokens: torch.Tensor) -> tuple[float, dict[str, torch.Tensor]]:
    """The same of a loss in chunks of CHUNK tokens, written down by hand."""
    model = make(name)
    hidden = model.model(tokens).last_hidden_state
    rows = hidden.detach().reshape(-1, HIDDEN).requires_grad_()
    labels = functional.pad(tokens, (0, 1), value=-100)[:, 1:].reshape(-1)
    count = int((labels != -100).sum())

    def losses() -> Iterator[torch.Tensor]:
        for part, wanted in zip(rows.split(CHUNK), labels.split(CHUNK), strict=True):
            yield functional.cross_entropy(model.lm_head(part), wanted, reduction="none")

    values = torch.cat([part.detach() for part in losses()])
    mean = functional.nll_loss(-values[:, None], torch.where(labels == -100, -100, 0))
    for part in losses():
        part.backward(torch.full_like(part, 1 / count))
    hidden.backward(rows.grad.view_as(hidden))
    return mean.item(), {key: value.grad for key, value in model.named_parameters()}


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("name", sorted(BUILDERS))
def test_one_chunk_is_the_loss_of_transformers_bit_for_bit(name: str) -> None:
    tokens = tokens_of(ROWS, LENGTH)
    loss, gradients = streamed(name, {"input_ids": tokens, "labels": tokens})
    expected_loss, expected = in_memory(name, {"input_ids": tokens, "labels": tokens})
    assert loss == expected_loss
    assert_equal(gradients, expected)


@pytest.mark.parametrize("name", ["llama", "tied"])
def test_many_chunks_are_the_same_chunks_in_memory_bit_for_bit(name: str) -> None:
    tokens = tokens_of(ROWS, LENGTH)
    call = {"input_ids": tokens, "labels": tokens}
    loss, gradients = streamed(name, call, loss_chunk_nbytes=CHUNK_NBYTES)
    expected_loss, expected = in_memory_chunks(name, tokens)
    assert loss == expected_loss
    assert_equal(gradients, expected)


@pytest.mark.parametrize("name", sorted(BUILDERS))
def test_many_chunks_are_near_the_loss_of_transformers(name: str) -> None:
    tokens = tokens_of(ROWS, LENGTH)
    call = {"input_ids": tokens, "labels": tokens}
    loss, gradients = streamed(name, call, loss_chunk_nbytes=CHUNK_NBYTES)
    expected_loss, expected = in_memory(name, call)
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    for key, value in expected.items():
        assert (gradients[key] - value).norm() <= 2e-6 * value.norm(), key


LABELS = {
    "ignored tokens": {},
    "a whole row and a whole chunk ignored": {},
    "all ignored": {},
    "items counted by the caller": {"num_items_in_batch": torch.tensor(160)},
    "items counted by the caller as a number": {"num_items_in_batch": 160},
    "another ignored index": {"ignore_index": 0},
    "labels shifted by the caller": {},
}


@pytest.mark.parametrize("case", LABELS)
def test_labels_mean_what_they_mean_to_transformers(case: str) -> None:
    tokens = tokens_of(ROWS, LENGTH)
    labels = tokens.clone()
    if case == "ignored tokens":
        labels[:, ::3] = -100
    elif case == "a whole row and a whole chunk ignored":
        labels[1] = -100
    elif case == "all ignored":
        labels[:] = -100
    elif case == "another ignored index":
        labels[:, 2:5] = 0
    call = {"input_ids": tokens, "labels": labels, **LABELS[case]}
    if case == "labels shifted by the caller":
        call["shift_labels"] = torch.roll(labels, 3, 1)
    expected_loss, expected = in_memory("llama", call)
    loss, gradients = streamed("llama", call)
    many, _ = streamed("llama", call, loss_chunk_nbytes=CHUNK_NBYTES)
    if case == "all ignored":
        assert loss != loss and many != many and expected_loss != expected_loss
        return
    assert loss == expected_loss
    assert many == pytest.approx(expected_loss, rel=1e-6)
    assert_equal(gradients, expected)


class LargestLogits(TorchDispatchMode):
    """Notes the most rows of logits that any operation makes at once."""

    rows = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        views = func in (torch.ops.aten.t.default, torch.ops.aten.transpose.int)
        logits = isinstance(result, torch.Tensor) and result.shape[-1:] == (VOCAB,) and not views
        if logits and result.device.type != "meta":
            self.rows = max(self.rows, result.numel() // VOCAB)
        return result


@pytest.mark.parametrize("name", sorted(BUILDERS))
@pytest.mark.parametrize("training", [True, False])
def test_full_logits_never_exist(name: str, training: bool) -> None:
    tokens = tokens_of(ROWS, LENGTH)
    model = make(name)
    with attached(model, loss_chunk_nbytes=CHUNK_NBYTES), LargestLogits() as largest:
        with torch.set_grad_enabled(training):
            output = model(input_ids=tokens, labels=tokens)
        if training:
            output.loss.backward()
        assert output.logits.shape == (ROWS, LENGTH, VOCAB)
        assert largest.rows == CHUNK
        del output


def test_without_chunks_full_logits_exist() -> None:
    tokens = tokens_of(ROWS, LENGTH)
    model = make("llama")
    with attached(model, loss_chunk_nbytes=None), LargestLogits() as largest:
        model(input_ids=tokens, labels=tokens).loss.backward()
        assert largest.rows == ROWS * LENGTH


@pytest.mark.parametrize("name", ["llama", "capped", "scaled"])
@pytest.mark.parametrize("training", [True, False])
def test_logits_that_are_used_are_the_true_ones(name: str, training: bool) -> None:
    tokens = tokens_of(ROWS, LENGTH)
    expected = make(name)(input_ids=tokens, labels=tokens).logits.detach()
    model = make(name)
    with attached(model, loss_chunk_nbytes=CHUNK_NBYTES), torch.set_grad_enabled(training):
        output = model(input_ids=tokens, labels=tokens)
        assert output.logits.dtype == torch.float32 and output.logits.device.type == "cpu"
        assert "DeferredLogits" in repr(output.logits)
        assert torch.equal(output.logits.argmax(-1), expected.argmax(-1))
        assert torch.equal(output.logits.detach(), expected)
        assert torch.equal(torch.stack(list(output.logits)), expected)


def test_a_loss_of_the_caller_on_the_logits_has_its_gradient() -> None:
    tokens = tokens_of(ROWS, LENGTH)

    def backward(model: torch.nn.Module) -> float:
        output = model(input_ids=tokens, labels=tokens)
        loss = output.loss + 0.1 * output.logits.logsumexp(-1).square().mean()
        loss.backward()
        return float(loss.detach())

    expected_model = make("llama")
    expected = backward(expected_model)
    model = make("llama")
    with attached(model) as runtime:
        assert backward(model) == pytest.approx(expected, rel=1e-6)
        found = gradients_of(runtime)
    for key, value in expected_model.named_parameters():
        assert torch.allclose(found[key], value.grad, rtol=1e-4, atol=1e-6), key


def test_logits_of_an_earlier_step_are_refused() -> None:
    tokens = tokens_of(ROWS, LENGTH)
    model = make("llama")
    with attached(model) as runtime:
        output = model(input_ids=tokens, labels=tokens)
        output.loss.backward()
        runtime.step()
        with pytest.raises(StateError, match=r"behind runtime.step"):
            output.logits.sum()


def test_a_gradient_that_would_go_around_the_head_is_refused() -> None:
    class Around(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, logits: torch.Tensor) -> torch.Tensor:
            ctx.shape = logits.shape
            return torch.zeros(())

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            return torch.ones(ctx.shape, device="meta")

    tokens = tokens_of(ROWS, LENGTH)
    model = make("llama")
    with attached(model):
        output = model(input_ids=tokens, labels=tokens)
        with pytest.raises(StateError, match="go around|not computed"):
            (output.loss + Around.apply(output.logits)).backward()


def test_a_model_with_a_loss_of_its_own_gets_its_logits() -> None:
    tokens = tokens_of(ROWS, LENGTH)
    call = {"input_ids": tokens, "labels": tokens}
    model = make("llama")
    seen: list[torch.Tensor] = []

    def own(logits: torch.Tensor, labels: torch.Tensor, vocab_size: int, **_: Any) -> torch.Tensor:
        seen.append(logits)
        return functional.cross_entropy(logits.view(-1, vocab_size), labels.view(-1))

    model.loss_function = own
    assert find_loss_head(model, [name for name, _ in model.named_modules()]) is None
    with attached(model) as runtime:
        model(**call).loss.backward()
        assert type(seen[0]) is torch.Tensor
        assert set(gradients_of(runtime)) == {key for key, _ in model.named_parameters()}


@pytest.mark.parametrize("trains_head", [True, False])
def test_adapters_on_a_frozen_model(trains_head: bool) -> None:
    tokens = tokens_of(ROWS, LENGTH)

    def adapted() -> torch.nn.Module:
        model = make("llama").requires_grad_(False)
        torch.manual_seed(3)
        for layer in model.model.layers:
            layer.self_attn.q_proj = LoraLinear(layer.self_attn.q_proj)
        if trains_head:
            model.lm_head = LoraLinear(model.lm_head)
        return model

    reference = adapted()
    loss = reference(input_ids=tokens, labels=tokens).loss
    loss.backward()
    expected = {key: value.grad for key, value in reference.named_parameters() if value.grad is not None}
    model = adapted()
    with attached(model, loss_chunk_nbytes=CHUNK_NBYTES) as runtime, LargestLogits() as largest:
        found = model(input_ids=tokens, labels=tokens).loss
        found.backward()
        assert found.item() == pytest.approx(loss.item(), rel=1e-6)
        assert largest.rows == CHUNK
        gradients = gradients_of(runtime)
    assert gradients.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.allclose(gradients[key], value, rtol=1e-4, atol=1e-7), key


def test_several_backwards_before_a_step() -> None:
    tokens = tokens_of(4, LENGTH)
    expected = make("tied")
    model = make("tied")
    with attached(model) as runtime:
        for one in (expected, model):
            for rows in tokens.split(2):
                one(input_ids=rows, labels=rows, num_items_in_batch=60).loss.backward()
        found = gradients_of(runtime)
    for key, value in expected.named_parameters():
        assert torch.allclose(found[key], value.grad, rtol=1e-5, atol=1e-7), key


def test_rows_and_one_batch_move_the_same_bytes_and_equal_the_run_in_memory(tmp_path: Path) -> None:
    tokens = tokens_of(16, LENGTH)

    def run(**settings: Any) -> tuple[list[float], int, int, dict[str, bytes]]:
        model = make("tied")
        torch.manual_seed(7)
        # What a window fetches for the next step would not be counted alike; parked gradients end it.
        own = {**SETTINGS, "loss_chunk_nbytes": CHUNK_NBYTES, "max_grad_norm": 1.0, **settings}
        with offload.attach(model, **own) as runtime:
            losses = []
            for _ in range(3):
                runtime.reset_stats()
                loss = model(input_ids=tokens, labels=tokens).loss
                loss.backward()
                runtime.step()
                runtime.synchronize()
                losses.append(loss.item())
            stats = runtime.stats()
            return losses, stats.disk_read_nbytes, stats.disk_written_nbytes, record_bytes(runtime)

    for name in ("one", "cut"):
        (tmp_path / name).mkdir()
    one = run(disk=[tmp_path / "one"], rows=None)
    cut = run(disk=[tmp_path / "cut"], rows=1)
    assert one[1:3] == cut[1:3] and one[1] > 0
    for found, rows in ((one, None), (cut, 1)):
        resident = run(rows=rows)
        assert found[0] == resident[0]
        assert found[3] == resident[3]


def test_the_model_gets_its_loss_and_forward_back() -> None:
    model = make("llama")
    before = model.loss_function
    with offload.attach(model, **SETTINGS):
        assert model.loss_function is not before
    assert model.loss_function is before
    assert "forward" not in vars(model) and "forward" not in vars(model.lm_head)


def test_a_graph_does_not_own_the_runtime() -> None:
    tokens = tokens_of(ROWS, LENGTH)
    model = make("capped")
    with attached(model) as runtime:
        loss = model(input_ids=tokens, labels=tokens).loss
        gone = weakref.ref(runtime._step)
    del runtime, model
    gc.collect()
    assert gone() is None
    assert loss.requires_grad


def test_a_run_in_chunks_streams_as_it_computes_resident(tmp_path: Path) -> None:
    def run(**settings: Any) -> tuple[list[float], dict[str, bytes]]:
        model = build("llama")
        torch.manual_seed(7)
        own = {**SETTINGS, "loss_chunk_nbytes": logits_nbytes(5, 96, 4), **settings}
        with offload.attach(model, **own) as runtime:
            return train("llama", runtime, model, range(5)), record_bytes(runtime)

    assert run(disk=[tmp_path]) == run()


def test_in_bf16_the_gradient_of_the_head_is_summed_in_fp32_and_planned(tmp_path: Path) -> None:
    options = {**SETTINGS, "compute_dtype": "bfloat16"}
    chunked, whole = (
        next(Blueprint.cuts(make("llama"), RuntimeOptions.parse({**options, "loss_chunk_nbytes": nbytes})))
        for nbytes in (CHUNK_NBYTES, None)
    )
    assert chunked.wide_owners == {"lm_head"} and whole.wide_owners == frozenset()

    def run(**settings: Any) -> tuple[list[float], dict[str, bytes], Any]:
        model = make("llama").to(torch.bfloat16)
        with offload.attach(model, **options, **settings) as runtime:
            losses = []
            for _ in range(3):
                loss = model(input_ids=tokens_of(2, LENGTH), labels=tokens_of(2, LENGTH)).loss
                loss.backward()
                runtime.step()
                losses.append(loss.item())
            return losses, record_bytes(runtime), runtime.plan

    nbytes = logits_nbytes(CHUNK, VOCAB, 2)
    resident = run(loss_chunk_nbytes=nbytes)
    assert run(loss_chunk_nbytes=nbytes, disk=[tmp_path])[:2] == resident[:2]
    unchunked = run(loss_chunk_nbytes=None)
    table_nbytes = VOCAB * HIDDEN * 2
    assert resident[2].device_reserve_nbytes == nbytes + table_nbytes
    assert unchunked[2].device_reserve_nbytes == table_nbytes
    assert max(resident[2].device_gradients) == 3 * max(unchunked[2].device_gradients)


def test_a_chunk_that_does_not_fit_is_refused_before_anything_runs() -> None:
    with pytest.raises(CapacityError, match="temporaries"):
        offload.attach(make("llama"), **{**SETTINGS, "device_memory": "8MiB"})


def test_a_chunk_of_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="loss_chunk_nbytes"):
        offload.attach(copy.deepcopy(make("llama")), loss_chunk_nbytes=0)
