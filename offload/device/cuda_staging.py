"""Copies between host and device whose two ends differ in dtype: two fixed buffers, two streams.

One stream fills a buffer while the other empties the other one, chunk by chunk, so the conversion
hides behind the link. Upload: the link fills, a conversion empties. Download: a conversion fills, the
link empties. Either way the bytes on the link are of the host's dtype.

Invariant: at most two chunks are staged; nothing is allocated per copy.

Thread rule: one call at a time; the device's lock of that direction sees to it.
"""

from __future__ import annotations

import torch

from ..sizes import MIB
from .cuda_events import new_event
from .tensors import device_tensor

__all__ = ["STAGING_NBYTES", "Staging"]

_NUM_BUFFERS = 2

# 4 MiB: 0.16 ms on a PCIe 4.0 x16 link, an order above what it costs to enqueue a chunk.
_CHUNK_NBYTES = 4 * MIB

# Device memory of one `Staging`, for the budget.
STAGING_NBYTES = _NUM_BUFFERS * _CHUNK_NBYTES


class Staging:
    """The staging buffers of one direction; see the module.

    Args:
        memory: uint8 device memory of `STAGING_NBYTES`.
    """

    def __init__(self, memory: torch.Tensor) -> None:
        self._memory = memory
        self._filled = [new_event() for _ in range(_NUM_BUFFERS)]
        self._emptied = [new_event() for _ in range(_NUM_BUFFERS)]
        self._next = 0

    def copy(
        self,
        source: torch.Tensor,
        target: torch.Tensor,
        *,
        staged_dtype: torch.dtype,
        fill: torch.cuda.Stream,
        empty: torch.cuda.Stream,
    ) -> None:
        """Enqueue source -> buffer on `fill` and buffer -> target on `empty`, for every chunk.

        The caller has made `fill` wait until `source` is ready, and `empty` until `target` is free.
        """
        chunk_numel = _CHUNK_NBYTES // staged_dtype.itemsize
        for begin in range(0, source.numel(), chunk_numel):
            numel = min(chunk_numel, source.numel() - begin)
            index = self._next
            self._next = (index + 1) % _NUM_BUFFERS
            buffer = device_tensor(self._memory, staged_dtype, numel, index * _CHUNK_NBYTES)
            fill.wait_event(self._emptied[index])
            with torch.cuda.stream(fill):
                buffer.copy_(source[begin : begin + numel], non_blocking=True)
            self._filled[index].record(fill)
            empty.wait_event(self._filled[index])
            with torch.cuda.stream(empty):
                target[begin : begin + numel].copy_(buffer, non_blocking=True)
            self._emptied[index].record(empty)
