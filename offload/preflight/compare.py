"""Which links are slower now than a plan reckons with. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from ..machine import Machine

__all__ = ["SlowLink", "slower_links"]

# A drive wanders by so much from one moment to the next; what is slower is told.
TOLERANCE = 0.25


@dataclass(frozen=True, slots=True)
class SlowLink:
    """One link that is slower than planned.

    Attributes:
        what: in words, `reading from /mnt/nvme0`.
        planned_bytes_per_s: that the plan reckons with.
        found_bytes_per_s: that was found.
    """

    what: str
    planned_bytes_per_s: float
    found_bytes_per_s: float


def slower_links(planned: Machine, found: Machine, *, tolerance: float = TOLERANCE) -> tuple[SlowLink, ...]:
    """Return the links of `found` that are slower than those of `planned` by more than `tolerance`.

    Drives are told apart by their file systems; what only one of the two knows is left out.
    """
    pairs: list[tuple[str, float | None, float | None]] = []
    known = {drive.device: drive for drive in planned.drives}
    for drive in found.drives:
        if before := known.get(drive.device):
            pairs += [
                (f"reading from {drive.path}", before.read_bytes_per_s, drive.read_bytes_per_s),
                (f"writing to {drive.path}", before.write_bytes_per_s, drive.write_bytes_per_s),
            ]
    pairs.append(("copying in host memory", planned.memory_bytes_per_s, found.memory_bytes_per_s))
    if planned.device is not None and found.device is not None:
        pairs += [
            (
                "copying to the GPU",
                planned.device.pinned_to_device_bytes_per_s,
                found.device.pinned_to_device_bytes_per_s,
            ),
            (
                "copying from the GPU",
                planned.device.device_to_pinned_bytes_per_s,
                found.device.device_to_pinned_bytes_per_s,
            ),
        ]
    return tuple(
        SlowLink(what, before, now)
        for what, before, now in pairs
        if before is not None and now is not None and now < before * (1 - tolerance)
    )
