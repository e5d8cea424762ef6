"""How a PCI Express device is linked, from its files in /sys. Reads; measures nothing.

Source: Documentation/ABI/testing/sysfs-bus-pci (current_link_speed and its like).
"""

from __future__ import annotations

from pathlib import Path

from .facts import Link

__all__ = ["link_of", "read_text"]

# Transfers per second on a lane, as the kernel prints them, and the generation that has them.
_GENERATIONS = {
    "2.5": 1,
    "5.0": 2,
    "5": 2,
    "8.0": 3,
    "8": 3,
    "16.0": 4,
    "16": 4,
    "32.0": 5,
    "32": 5,
    "64.0": 6,
}


def link_of(device: Path) -> Link | None:
    """Return the link of a device; None where it has none, as below most virtual machines.

    Args:
        device: its folder, `/sys/bus/pci/devices/0000:01:00.0`.
    """
    speeds = [read_text(device / f"{which}_link_speed").split(" ")[0] for which in ("current", "max")]
    widths = [read_text(device / f"{which}_link_width") for which in ("current", "max")]
    generations = [_GENERATIONS.get(speed, 0) for speed in speeds]
    lanes = [int(width) if width.isdigit() else 0 for width in widths]
    # A slot that is asleep, or hidden by a hypervisor, says 0, 255 or Unknown.
    if not all(generations) or not all(0 < width <= 32 for width in lanes):
        return None
    return Link(generation=generations[0], width=lanes[0], max_generation=generations[1], max_width=lanes[1])


def read_text(path: Path) -> str:
    """Return what a small file of the kernel holds, stripped; empty when it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
