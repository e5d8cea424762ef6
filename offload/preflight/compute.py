"""How fast a model computes on its device: a model of the same layers, but few of them, is run.

Forward without a graph, then forward and backward, as a streamed step computes a unit. Two depths are
timed; their difference is a layer, the rest is embedding, head and loss. So the figure holds what no
product of matrices shows: attention, norms, the loss over the vocabulary, launches.

Weights are made up: a small constant, for zeros and denormals may be faster or slower than numbers.

Thread rule: the caller's thread, with torch's threads.
"""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass

import psutil
import torch

__all__ = ["ComputeSpeed", "compute_speed"]

# The depths that are timed.
_SHALLOW, _DEEP = 1, 3

# Timed so often after one to warm up, in turn. The shortest counts: what disturbs only ever adds time, and
# the difference of two medians can be anything.
_ROUNDS = 4

# Of the memory that is free, so much may be taken for a moment.
_MEMORY_SHARE = 4

# Tokens of the first, short look that says how many can be timed.
_FIRST_TOKENS = 32


@dataclass(frozen=True, slots=True)
class ComputeSpeed:
    """What was found.

    Attributes:
        seconds: that the whole model, every layer of it, takes for the batch that was timed.
        rows: of that batch.
        length: tokens of a row of it.
        num_threads: that torch computed with.
    """

    seconds: float
    rows: int
    length: int
    num_threads: int


def compute_speed(
    model: torch.nn.Module, *, device: torch.device, rows: int, length: int, limit_s: float = 2.0
) -> ComputeSpeed | None:
    """Time forward, forward again and backward of a causal language model.

    Args:
        model: of Hugging Face, its parameters on the meta device; it is not changed.
        device: to compute on.
        rows: of a micro-batch. Fewer, and shorter ones, are timed when these would take too long.
        length: tokens of a row.
        limit_s: about how long it may take.

    Returns:
        None where the layers cannot be told apart, or there is too little memory free for a few of them.
    """
    layers = _layers(model)
    if not layers:
        return None
    depth = len(layers)
    depths = (_SHALLOW, min(_DEEP, depth))
    if not _fits(_cut(model, depths[-1]), device):
        return None
    shallow, deep = (_Runner(_cut(model, num_layers), device) for num_layers in depths)
    short = min(length, _FIRST_TOKENS)
    deep.seconds(1, short)
    token_s = deep.seconds(1, short) / short
    # Both depths are timed and warmed up, each at most as long as the deep one.
    tokens = limit_s / (2 * (_ROUNDS + 1) * token_s)
    length = max(short, min(length, int(tokens)))
    rows = max(1, min(rows, int(tokens // length)))
    timed = [(shallow.seconds(rows, length), deep.seconds(rows, length)) for _ in range(_ROUNDS + 1)][1:]
    shallow_s, deep_s = (min(seconds) for seconds in zip(*timed, strict=True))
    layer_s = max(0.0, deep_s - shallow_s) / max(1, depths[1] - depths[0])
    return ComputeSpeed(
        seconds=shallow_s + (depth - depths[0]) * layer_s,
        rows=rows,
        length=length,
        num_threads=torch.get_num_threads(),
    )


class _Runner:
    """A model of few layers on the device."""

    def __init__(self, model: torch.nn.Module, device: torch.device) -> None:
        self._device = device
        self._model = _materialize(model, device)
        self._vocab_size = int(self._model.config.vocab_size)  # type: ignore[union-attr, arg-type]

    def seconds(self, rows: int, length: int) -> float:
        tokens = torch.arange(rows * length, device=self._device).remainder(self._vocab_size)
        tokens = tokens.view(rows, length)
        self._synchronize()
        began_s = time.perf_counter()
        with torch.no_grad():
            self._model(input_ids=tokens, labels=tokens, use_cache=False)
        self._model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        self._synchronize()
        elapsed_s = time.perf_counter() - began_s
        self._model.zero_grad(set_to_none=True)
        return elapsed_s

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def _layers(model: torch.nn.Module) -> torch.nn.ModuleList | None:
    """Return the first, and so the outermost, list of modules: the decoder layers."""
    return next((module for module in model.modules() if isinstance(module, torch.nn.ModuleList)), None)


def _cut(model: torch.nn.Module, depth: int) -> torch.nn.Module:
    """Return a copy with the first `depth` layers, its parameters still without memory."""
    layers = _layers(model)
    assert layers is not None
    # The layers that are left out are not copied; what is on the meta device is copied at no cost.
    memo = {id(layers): torch.nn.ModuleList(copy.deepcopy(layer) for layer in layers[:depth])}
    return copy.deepcopy(model, memo)


def _fits(model: torch.nn.Module, device: torch.device) -> bool:
    # Weights and their gradients, and as much again for activations.
    needed = 4 * sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:
        free = psutil.virtual_memory().available
    return needed <= free // _MEMORY_SHARE


def _materialize(model: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    made: dict[int, torch.nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in made:
                values = torch.full(parameter.shape, 0.01, dtype=parameter.dtype, device=device)
                made[id(parameter)] = torch.nn.Parameter(values, requires_grad=parameter.requires_grad)
            module._parameters[name] = made[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                module._buffers[name] = torch.ones_like(buffer, device=device)
            elif buffer is not None:
                module._buffers[name] = buffer.to(device)
    return model
