"""What a runtime has moved and how busy it was: totals for people and benchmarks. No behaviour.

Immutable; any thread may read one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..store import DriveLoad
from .parts import Parts
from .slow_drives import describe_slow_drives

__all__ = ["RuntimeStats"]


@dataclass(frozen=True)
class RuntimeStats:
    """Totals since the runtime was attached or since `reset_stats`.

    Attributes:
        steps: optimizer steps.
        disk_read_nbytes: bytes asked from drives.
        disk_written_nbytes: bytes given to drives, manifests aside.
        parked_read_nbytes: of `disk_read_nbytes`, those of gradients parked on disk.
        parked_written_nbytes: of `disk_written_nbytes`, those of gradients parked on disk.
        activations_read_nbytes: of `disk_read_nbytes`, those of saved inputs.
        activations_written_nbytes: of `disk_written_nbytes`, those of saved inputs.
        to_device_nbytes: bytes copied to the device.
        to_host_nbytes: bytes copied from the device to the host.
        busy_s: seconds in which each link or worker was busy, by track name.
        stall_s: seconds in which someone waited; included in `busy_s` as "stall".
        host_high_water_nbytes: the most host memory under lease.
        device_high_water_nbytes: the most device memory under lease.
        drives: what each drive has moved, with its share of the run's bytes; empty without a disk.
        slow_drives: a sentence for each drive that held the others up, or gave less than was measured.
    """

    steps: int
    disk_read_nbytes: int
    disk_written_nbytes: int
    parked_read_nbytes: int
    parked_written_nbytes: int
    activations_read_nbytes: int
    activations_written_nbytes: int
    to_device_nbytes: int
    to_host_nbytes: int
    busy_s: Mapping[str, float]
    stall_s: float
    host_high_water_nbytes: int
    device_high_water_nbytes: int
    drives: tuple[DriveLoad, ...] = ()
    slow_drives: tuple[str, ...] = ()

    @classmethod
    def collect(cls, steps: int, parts: Parts) -> RuntimeStats:
        """Return the totals of a runtime's parts, `steps` optimizer steps in."""
        trace = parts.trace
        drives = () if parts.store is None else tuple(meter.load() for meter in parts.store.meters)
        counters, busy_s, moved = trace.counters(), trace.busy_s(), trace.moved_nbytes()
        return cls(
            steps=steps,
            disk_read_nbytes=counters.get("disk_read_nbytes", 0),
            disk_written_nbytes=counters.get("disk_written_nbytes", 0),
            parked_read_nbytes=counters.get("parked_read_nbytes", 0),
            parked_written_nbytes=counters.get("parked_written_nbytes", 0),
            activations_read_nbytes=counters.get("activations_read_nbytes", 0),
            activations_written_nbytes=counters.get("activations_written_nbytes", 0),
            to_device_nbytes=moved.get("host to device", 0),
            to_host_nbytes=moved.get("device to host", 0),
            busy_s=busy_s,
            stall_s=busy_s.get("stall", 0.0),
            host_high_water_nbytes=parts.host_budget.high_water_nbytes,
            device_high_water_nbytes=parts.device_budget.high_water_nbytes,
            drives=drives,
            slow_drives=describe_slow_drives(drives, parts.drive_speeds),
        )
