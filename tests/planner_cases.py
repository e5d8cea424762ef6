"""Machines and models that the planner is asked about in the tests."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import LlamaConfig

from offload.machine import DeviceSpeed, DriveSpeed, IoSetting, Machine, load_machine
from offload.planner import (
    ModelFacts,
    Question,
    config_of_shape,
    default_budgets,
    describe_config,
    find_shape,
)
from offload.sizes import GIB, MIB

EXAMPLES = Path(__file__).resolve().parents[1] / "examples" / "machines"


def example(name: str) -> Machine:
    return load_machine(EXAMPLES / f"{name}.json")


@functools.cache
def shape(name: str) -> ModelFacts:
    return describe_config(config_of_shape(find_shape(name)), name)


@functools.cache
def llama(hidden: int, layers: int, intermediate: int, heads: int, kv_heads: int, vocab: int) -> ModelFacts:
    config = LlamaConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        intermediate_size=intermediate,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocab,
        tie_word_embeddings=False,
    )
    return describe_config(config, f"llama of {layers} layers")


def drive(number: int = 0, read: float = 7e9, write: float = 5e9) -> DriveSpeed:
    return DriveSpeed(
        path=f"/nowhere/{number}",
        device=f"none-{number}",
        file_system="ext4",
        engine="uring",
        direct=True,
        setting=IoSetting(segment_nbytes=MIB, queue_depth=32),
        read_bytes_per_s=read,
        write_bytes_per_s=write,
    )


def machine(*, memory: int = 128 * GIB, drives: int = 1, device: int | None = 24 * GIB) -> Machine:
    gpu = None
    if device is not None:
        gpu = DeviceSpeed(
            name="A GPU",
            memory_nbytes=device,
            pinned_to_device_bytes_per_s=25e9,
            device_to_pinned_bytes_per_s=25e9,
            both_ways_bytes_per_s=40e9,
            pageable_to_device_bytes_per_s=10e9,
            device_to_pageable_bytes_per_s=10e9,
            flops_per_s=100e12,
        )
    return Machine(
        measured_at="a test",
        cpu="A CPU",
        num_cores=16,
        memory_nbytes=memory,
        drives=tuple(drive(number) for number in range(drives)),
        memory_bytes_per_s=32e9,
        device=gpu,
    )


def question(on: Machine | None = None, **changes: Any) -> Question:
    """A question with the default budgets of its machine and no cache, but for `changes`."""
    chosen = machine() if on is None else on
    host, device = default_budgets(chosen)
    plain = Question(machine=chosen, host_memory=host, device_memory=device, host_cache=0)
    return replace(plain, **changes)
