"""Small models with dropout, batches for them, and the loop that trains them, resident or streamed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from offload import AdamWOptions

VOCAB, ROWS, LENGTH = 96, 4, 12


def tiny_llama() -> torch.nn.Module:
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_dropout=0.1,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


def tiny_gpt2() -> torch.nn.Module:
    config = GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=3, n_head=4, n_positions=32)
    return GPT2LMHeadModel(config)


def tiny_qwen3() -> torch.nn.Module:
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        attention_dropout=0.1,
        tie_word_embeddings=False,
    )
    return Qwen3ForCausalLM(config)


def mlp() -> torch.nn.Module:
    def block(width: int) -> torch.nn.Module:
        return torch.nn.Sequential(torch.nn.Linear(width, width), torch.nn.GELU(), torch.nn.Dropout(0.1))

    return torch.nn.Sequential(block(32), block(32), block(32), torch.nn.Linear(32, VOCAB))


BUILDERS: dict[str, Callable[[], torch.nn.Module]] = {
    "llama": tiny_llama,
    "gpt2": tiny_gpt2,
    "qwen3": tiny_qwen3,
    "mlp": mlp,
}


def make_batch(name: str, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1000 + step)
    if name == "mlp":
        inputs = torch.randn(ROWS, 32, generator=generator)
        return inputs, torch.randint(VOCAB, (ROWS,), generator=generator)
    tokens = torch.randint(VOCAB, (ROWS, LENGTH), generator=generator)
    return tokens, tokens


def loss_of(name: str, model: torch.nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> Any:
    if name == "mlp":
        return torch.nn.functional.cross_entropy(model(batch[0]), batch[1])
    return model(input_ids=batch[0], labels=batch[1]).loss


def build(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    model = BUILDERS[name]()
    model.train()
    return model


def train(name: str, runtime: Any, model: torch.nn.Module, steps: range) -> list[float]:
    """Run an ordinary loop and return its losses."""
    losses = []
    for step in steps:
        loss = loss_of(name, model, make_batch(name, step))
        loss.backward()
        runtime.step({"next": step + 1})
        losses.append(loss.item())
    return losses


def record_bytes(runtime: Any) -> dict[str, bytes]:
    """Return the bytes of every weights and optimizer record, wherever they rest."""
    runtime.synchronize()
    runtime._parts.transfer.quiet()
    parts, residents = runtime._parts, runtime._parts.residents
    found = {}
    for owner, unit in parts.records.items():
        for kind, nbytes in (("weights", unit.weights_nbytes), ("optimizer", unit.optimizer_nbytes)):
            if not nbytes:
                continue
            memory = bytearray(nbytes)
            if parts.store is not None:
                parts.store.read(unit.name(kind), memory).wait()
            # What lives in host memory is newer than what the store was given at the last commit.
            resident = residents.optimizer(owner)
            if kind == "weights" and residents.holds_weights(owner):
                resident = parts.activations._host.view(residents.weights(owner), 0, nbytes)
            elif kind == "weights":
                resident = b""
            memory[: len(resident)] = resident
            found[unit.name(kind)] = bytes(memory)
    return found


SETTINGS: dict[str, Any] = {
    "device": "cpu",
    "host_memory": "64MiB",
    "device_memory": "64MiB",
    "chunk_numel": 4096,
    "chunk_nbytes": 4096,
    "optimizer": AdamWOptions(lr=1e-2, weight_decay=0.1),
}
