"""The state of every random generator as JSON: Python's, numpy's, torch's on the CPU and on each GPU.

Nothing is pickled: the state is numbers and base64 text, small enough (14 KiB) to travel in the
manifest of every commit. Thread rule: the generators are process-wide, so call from the thread that
trains. It does not know what uses the randomness.
"""

from __future__ import annotations

import base64
import random
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from ..errors import StateError

__all__ = ["DeviceRng", "capture_rng", "check_rng", "restore_rng"]


# The Mersenne Twister of all three: words, and the largest deviate it could ever keep, generously.
_NUM_WORDS = 624
_PYTHON_VERSION = 3
_MAX_GAUSS = 1e3
_TORCH_STATE = struct.Struct("<QiiQ")


class DeviceRng:
    """The generators that a unit's dropout draws from: torch's on the CPU and on one device.

    A unit's state before each micro-batch is kept from its forward to its recompute, in memory: 5 KB
    on the CPU, 16 bytes on CUDA; taking it does not wait for the device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device if device.type == "cuda" else None

    def get(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the present state."""
        on_device = None if self._device is None else torch.cuda.get_rng_state(self._device)
        return torch.get_rng_state(), on_device

    def set(self, state: tuple[torch.Tensor, torch.Tensor | None]) -> None:
        """Go back to a state that `get` returned."""
        torch.set_rng_state(state[0])
        if self._device is not None and state[1] is not None:
            torch.cuda.set_rng_state(state[1], self._device)

    @contextmanager
    def preserved(self) -> Iterator[None]:
        """Restore on exit the state found on entry, so that a recompute draws nothing."""
        state = self.get()
        try:
            yield
        finally:
            self.set(state)


def capture_rng() -> dict[str, Any]:
    """Return the state of Python's, numpy's and torch's generators (CPU and every CUDA device).

    The result holds only what JSON can, so it travels in a manifest without pickle.
    """
    version, words, gauss_next = random.getstate()
    legacy = np.random.get_state(legacy=False)
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {
        "python": {"version": version, "words": _words_to_text(words), "gauss_next": gauss_next},
        "numpy": {
            "bit_generator": legacy["bit_generator"],
            "key": _words_to_text(legacy["state"]["key"]),
            "pos": int(legacy["state"]["pos"]),
            "has_gauss": int(legacy["has_gauss"]),
            "gauss": float(legacy["gauss"]),
        },
        "torch": _tensor_to_text(torch.get_rng_state()),
        "cuda": [_tensor_to_text(state) for state in cuda],
    }


def restore_rng(state: Mapping[str, Any]) -> None:
    """Put every generator back into a state that `capture_rng` returned.

    Raises:
        StateError: the state names another number of CUDA devices than this machine has, or is not
            a state of ours; no generator was changed then, those of GPUs excepted.
    """
    python, legacy, on_cpu, on_gpus = _read(state)
    try:
        for index, on_gpu in enumerate(on_gpus):
            torch.cuda.set_rng_state(on_gpu, index)
        torch.set_rng_state(on_cpu)
    except RuntimeError as error:
        raise StateError(f"the saved random state cannot be used: {error!r:.300}") from error
    random.setstate(python)
    np.random.set_state(legacy)


def check_rng(state: Mapping[str, Any]) -> None:
    """Raise as `restore_rng` does, as far as that can be known before, and change nothing."""
    _read(state)


def _read(
    state: Mapping[str, Any],
) -> tuple[tuple[Any, ...], dict[str, Any], torch.Tensor, list[torch.Tensor]]:
    """Return the states of Python, numpy, torch and each GPU, none of which was trusted."""
    try:
        gpu_texts = list(state.get("cuda", []))
        _check_devices(len(gpu_texts))
        on_gpus = [_text_to_tensor(text) for text in gpu_texts]
        python, legacy = state["python"], state["numpy"]
        words = _text_to_words(python["words"], _NUM_WORDS + 1)
        key = np.array(_text_to_words(legacy["key"], _NUM_WORDS), np.uint32)
        gauss_next = None if python["gauss_next"] is None else _checked_normal(python["gauss_next"])
        # numpy believes its position, and would draw from behind its words.
        for value, limit in ((words[-1], _NUM_WORDS), (legacy["pos"], _NUM_WORDS), (legacy["has_gauss"], 1)):
            if type(value) is not int or not 0 <= value <= limit:
                raise ValueError(f"{value!r:.40} is not within 0 to {limit}")
        if python["version"] != _PYTHON_VERSION or legacy["bit_generator"] != "MT19937":
            raise ValueError("the generators are others than Python's and numpy's own")
        return (
            (_PYTHON_VERSION, tuple(words), gauss_next),
            {
                "bit_generator": "MT19937",
                "state": {"key": key, "pos": legacy["pos"]},
                "has_gauss": legacy["has_gauss"],
                "gauss": _checked_normal(legacy["gauss"]),
            },
            _checked_torch(_text_to_tensor(state["torch"])),
            on_gpus,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise StateError(f"the saved random state cannot be read: {error!r:.300}") from error


def _check_devices(saved: int) -> None:
    here = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if saved not in (0, here):
        raise StateError(
            f"the saved random state is for {saved} CUDA devices and this machine shows {here}; "
            "resume where the run began, or set CUDA_VISIBLE_DEVICES to as many devices"
        )


def _words_to_text(words: Any) -> str:
    return base64.b64encode(np.asarray(words, "<u4").tobytes()).decode("ascii")


def _text_to_words(text: str, count: int) -> list[int]:
    words: list[int] = np.frombuffer(base64.b64decode(text, validate=True), "<u4").tolist()
    if len(words) != count:
        raise ValueError(f"{len(words)} words, expected {count}")
    return words


def _checked_normal(value: Any) -> float:
    if type(value) not in (int, float) or not abs(value) < _MAX_GAUSS:
        raise ValueError(f"a normal deviate is {value!r:.40}")
    return float(value)


def _checked_torch(state: torch.Tensor) -> torch.Tensor:
    """Return torch's state on the CPU if it draws from within its words.

    torch checks that each of the two counters is in range, and not that they fit each other.

    Source: aten/src/ATen/CPUGeneratorImpl.cpp and ATen/core/MT19937RNGEngine.h: the seed, the words left
    before they are made anew, whether it was seeded, and the next word.
    """
    if state.numel() != torch.get_rng_state().numel():
        raise ValueError(f"torch's state has {state.numel()} bytes, here {torch.get_rng_state().numel()}")
    _, left, _, following = _TORCH_STATE.unpack_from(state.numpy().data)
    if (left, following) != (1, 0) and (left + following != _NUM_WORDS + 1 or not 0 < left <= _NUM_WORDS):
        raise ValueError(f"torch's state has {left} words left and is at word {following}")
    return state


def _tensor_to_text(state: torch.Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode("ascii")


def _text_to_tensor(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text, validate=True)), dtype=torch.uint8)
