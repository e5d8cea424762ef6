"""How much memory each part of the runtime gets: the slots of every pool. No behaviour.

`memory_planning.py` makes the plan, once, before anything runs. Its slots are all the memory that streaming
uses, so a run that was planned cannot run out later.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..sizes import format_bytes
from ..specs import Tier
from .residency import Residency

__all__ = ["MemoryPlan"]


@dataclass(frozen=True)
class MemoryPlan:
    """The slots of every pool, in bytes, and the depths they allow.

    Attributes:
        home: where the records rest between uses, those of `residency` apart.
        window: visits fetched ahead of the one that runs.
        updates_in_flight: units whose update may be pending while the model goes on.
        host_weights: slots for weights and frozen records on their way to the device.
        host_gradients: slots for gradients waiting for their update; one for each that is parked in host
            memory.
        host_updates: slots for weights under update between passes, when gradients are parked.
        parked_nbytes: host bytes of parked gradients, 0 when updates run during backward; they are part of
            `host_gradients`.
        parked_on_disk: owners whose parked gradients go to disk.
        parked_disk_nbytes: bytes of these; so many are written and read once a step.
        gradient_ring: slots for whole gradients on their way to disk.
        gradient_parts: slots for parts of gradients on their way back.
        staging: slots for chunks of optimizer records.
        residency: which records live in host memory for the whole run.
        host_resident_nbytes: bytes of these.
        activations_nbytes: what is left of the host budget for saved unit inputs.
        device_weights: slots for weights in the compute dtype.
        device_gradients: slots for gradients of the unit in backward.
        device_reserve_nbytes: device bytes left to the framework for activations and temporaries.
    """

    home: Tier
    window: int
    updates_in_flight: int
    host_weights: tuple[int, ...]
    host_gradients: tuple[int, ...]
    host_updates: tuple[int, ...]
    parked_nbytes: int
    parked_on_disk: tuple[str, ...]
    parked_disk_nbytes: int
    gradient_ring: tuple[int, ...]
    gradient_parts: tuple[int, ...]
    staging: tuple[int, ...]
    residency: Residency
    host_resident_nbytes: int
    activations_nbytes: int
    device_weights: tuple[int, ...]
    device_gradients: tuple[int, ...]
    device_reserve_nbytes: int

    @property
    def host_nbytes(self) -> int:
        """Bytes of the host arena."""
        slots = (*self.host_weights, *self.host_gradients, *self.host_updates, *self.staging)
        in_transit = (*self.gradient_ring, *self.gradient_parts)
        return sum((*slots, *in_transit)) + self.host_resident_nbytes + self.activations_nbytes

    @property
    def device_nbytes(self) -> int:
        """Bytes of the device arena; the reserve is not part of it."""
        return sum((*self.device_weights, *self.device_gradients))

    @property
    def host_cache_nbytes(self) -> int:
        """Bytes of records that rest on disk and are kept in host memory as well."""
        return self.host_resident_nbytes if self.home is Tier.DISK else 0

    def describe_parked(self) -> str:
        """Return a line on where parked gradients wait, empty when none are."""
        if not self.parked_nbytes and not self.parked_on_disk:
            return ""
        memory = f"gradients of a step: {format_bytes(self.parked_nbytes)} parked in host memory"
        if not self.parked_on_disk:
            return memory
        disk = format_bytes(self.parked_disk_nbytes)
        return f"{memory}, {disk} on disk, written and read once a step"
