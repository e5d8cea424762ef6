"""What a run asks of its memory plan, told from its options. Pure.

The runtime and the planner both ask through here, so what a plan promises is what a run gets.
"""

from __future__ import annotations

from collections.abc import Mapping

from ..sizes import MIB
from ..tiers.memory_request import MemoryRequest
from ..tiers.records import RecordSet
from ..tiers.schedule import Schedule
from ..units import LossHead
from .options import RuntimeOptions

__all__ = ["DEFAULT_ACTIVATIONS_NBYTES", "memory_request"]

# What saved inputs get at least when the user does not say: enough for 8 units of 2 x 256 x 1024 fp32.
DEFAULT_ACTIVATIONS_NBYTES = 16 * MIB


def memory_request(
    options: RuntimeOptions,
    schedule: Schedule,
    records: Mapping[str, RecordSet],
    trains: Mapping[str, tuple[str, ...]],
    activations_nbytes: int,
    loss_head: LossHead | None,
) -> MemoryRequest:
    """Return the request of a run.

    Args:
        options: of the run.
        schedule: the predicted order, wrapping unless gradients are parked.
        records: by owner.
        trains: for each unit, the owners whose gradients its backward adds to.
        activations_nbytes: host bytes for saved inputs.
        loss_head: the head whose loss is computed in chunks, None when none is.
    """
    limit, itemsize = options.loss_chunk_nbytes, options.torch_compute_dtype.itemsize
    chunked: tuple[str, ...] = ()
    chunk_nbytes = 0
    if loss_head is not None and limit is not None:
        chunked, chunk_nbytes = trains[loss_head.unit], loss_head.chunk_nbytes(limit, itemsize)
    return MemoryRequest(
        schedule=schedule,
        records=records,
        trains=trains,
        home=options.resolved_home,
        gradient_itemsize=options.torch_gradient_dtype.itemsize,
        micro_gradients=options.sums_wide,
        activations_nbytes=activations_nbytes,
        parks=options.parks,
        parks_on_disk=bool(options.disk),
        chunked=chunked,
        chunk_nbytes=chunk_nbytes,
        host_cache_nbytes=options.host_cache_nbytes,
    )
