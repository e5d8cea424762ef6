"""The state of every random generator as JSON: Python's, numpy's, torch's on the CPU and on each GPU.

Nothing is pickled: the state is numbers and base64 text, small enough (14 KiB) to travel in the
manifest of every commit. Thread rule: the generators are process-wide, so call from the thread that
trains. It does not know what uses the randomness.
"""

from __future__ import annotations

import base64
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from .errors import StateError

__all__ = ["DeviceRng", "capture_rng", "restore_rng"]


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
            a state of ours.
    """
    cuda = state.get("cuda", [])
    here = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if len(cuda) not in (0, here):
        raise StateError(
            f"the saved random state is for {len(cuda)} CUDA devices and this machine shows {here}; "
            "resume where the run began, or set CUDA_VISIBLE_DEVICES to as many devices"
        )
    try:
        python, legacy = state["python"], state["numpy"]
        random.setstate((python["version"], tuple(_text_to_words(python["words"])), python["gauss_next"]))
        np.random.set_state(
            {
                "bit_generator": legacy["bit_generator"],
                "state": {"key": np.array(_text_to_words(legacy["key"]), np.uint32), "pos": legacy["pos"]},
                "has_gauss": legacy["has_gauss"],
                "gauss": legacy["gauss"],
            }
        )
        torch.set_rng_state(_text_to_tensor(state["torch"]))
    except (KeyError, TypeError, ValueError) as error:
        raise StateError(f"the saved random state cannot be read: {type(error).__name__}: {error}") from error
    for index, text in enumerate(cuda):
        torch.cuda.set_rng_state(_text_to_tensor(text), index)


def _words_to_text(words: Any) -> str:
    return base64.b64encode(np.asarray(words, "<u4").tobytes()).decode("ascii")


def _text_to_words(text: str) -> list[int]:
    words: list[int] = np.frombuffer(base64.b64decode(text, validate=True), "<u4").tolist()
    return words


def _tensor_to_text(state: torch.Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode("ascii")


def _text_to_tensor(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text, validate=True)), dtype=torch.uint8)
