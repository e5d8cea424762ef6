"""What a memory plan is asked for, apart from the budgets that it has to fit. No behaviour."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from ..specs import Tier
from .records import RecordSet
from .schedule import Schedule, first_use_order

__all__ = ["MemoryRequest", "shared_owners"]


@dataclass(frozen=True, kw_only=True)
class MemoryRequest:
    """The sizes and the order that a memory plan is made from.

    Attributes:
        schedule: the predicted order.
        records: the records by owner.
        trains: for each unit, the owners whose gradients its backward adds to.
        home: where records rest; `DEVICE` keeps the optimizer records in host memory.
        gradient_itemsize: bytes of one gradient element as it crosses to the host.
        micro_gradients: whether micro-batches are summed in a second, wider device buffer.
        activations_nbytes: host bytes for saved inputs.
        parks: keep every gradient until the step ends.
        parks_on_disk: gradients that do not fit into host memory may be kept on disk.
        chunked: owners whose gradients are sums over chunks of the loss, and so in fp32 as well.
        chunk_nbytes: device bytes that the logits of a chunk and their loss take at once.
        host_cache_nbytes: host bytes for records whose home is the disk; no more than this is used, and less
            by what a chunk takes at most.
    """

    schedule: Schedule
    records: Mapping[str, RecordSet]
    trains: Mapping[str, tuple[str, ...]]
    home: Tier
    gradient_itemsize: int
    micro_gradients: bool
    activations_nbytes: int
    parks: bool = False
    parks_on_disk: bool = False
    chunked: tuple[str, ...] = ()
    chunk_nbytes: int = 0
    host_cache_nbytes: int = 0

    @property
    def update_order(self) -> tuple[str, ...]:
        """The owners in the order of their updates between passes."""
        return first_use_order(self.schedule.order, self.trains)

    @property
    def shared(self) -> tuple[str, ...]:
        """The owners whose gradients more than one unit adds to."""
        return shared_owners(self.trains)


def shared_owners(trains: Mapping[str, tuple[str, ...]]) -> tuple[str, ...]:
    """Return the owners whose gradients more than one unit adds to.

    >>> shared_owners({"embed": ("embed",), "block": ("block",), "head": ("embed",)})
    ('embed',)
    """
    counts = Counter(owner for owners in trains.values() for owner in owners)
    return tuple(owner for owner, count in counts.items() if count > 1)
